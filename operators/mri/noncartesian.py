"""MRI on any trajectory, with one or many coils."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from invdiff.operators.channels import slice_count
from invdiff.operators.linear import LinearOperatorBase, dtype_name
from invdiff.operators.mri.cartesian import check_coils_at_once, check_maps, complex_dtype
from invdiff.operators.mri.density import density_compensation
from invdiff.operators.mri.finufft_engine import Finufft
from invdiff.operators.mri.nufft import gridding, point_spread
from invdiff.protocols import Space

IMAGES_AT_ONCE = 16  # complex columns of the sparse product: two cache lines a row in float32
EDGE = 0.5 + 1e-9  # cycles per pixel


class Transform(Protocol):
    """The non-uniform transform of one trajectory: (k h w) -> (k samples), and its adjoint."""

    def forward(self, images: Tensor) -> Tensor: ...

    def adjoint(self, samples: Tensor) -> Tensor: ...


ENGINES: dict[str, Callable[..., Transform]] = {"own": gridding, "finufft": Finufft}


class NonCartesianMRI(LinearOperatorBase):
    """x -> F_k(maps · x): samples of the centred orthonormal Fourier transform between the grid's points.

    Domain (s 1 h w) complex, range (s coil samples) complex. The sample at (ky kx) cycles per pixel is the sum over
    pixels of x exp(-2 pi i (ky (row - h // 2) + kx (column - w // 2))) / sqrt(h w), so that on the Cartesian grid's
    points it is ``centred_fft``. No weights are in it; ``pinv`` has them.

    Args:
        trajectory: (samples 2) or (s samples 2), row and column frequency in cycles per pixel, within [-0.5, 0.5].
        size: (h w) of the image.
        maps: coil sensitivities, complex, (coil h w) or (s coil h w); None: one coil of sensitivity 1.
        slices: s, needed only where neither has a slice axis and it is not 1.
        dtype: of the image and of k-space.
        accuracy: relative error of the transform; its adjoint is exact all the same.
        engine: "own", sparse gridding in torch on any device, or "finufft", on the CPU, without matrices.
        toeplitz: ``normal`` by one FFT pair on a grid twice as large, which differs from adjoint of forward by
            ``accuracy``; pays from about 1.5 samples a pixel on.
        samples_per_readout: how many samples in a row are one spoke or interleaf, which ``split`` keeps together;
            1 if None.
        coils_at_once: coil images held at once; all if None.

    Raises:
        ValueError: shapes that do not fit one another, a trajectory that is not in cycles per pixel, real or
            non-finite maps, a real dtype, an unknown engine or one that is not installed.
    """

    kind = "non-cartesian-mri"

    def __init__(
        self,
        trajectory: Tensor,
        size: Sequence[int],
        maps: Tensor | None = None,
        slices: int | None = None,
        dtype: torch.dtype | str = torch.complex64,
        accuracy: float = 1e-4,
        engine: str = "own",
        toeplitz: bool = False,
        samples_per_readout: int | None = None,
        coils_at_once: int | None = None,
    ) -> None:
        kind = complex_dtype(dtype)
        check_coils_at_once(coils_at_once)
        if engine not in ENGINES:
            raise ValueError(f"engine is {engine!r}; one of {', '.join(ENGINES)} is wanted")
        h, w = check_size(size)
        self.trajectory = check_trajectory(trajectory)
        named: dict[str, int | None] = {"trajectory": trajectory.shape[0] if trajectory.ndim == 3 else None}
        if maps is not None:
            check_maps(maps, (h, w))
            named["maps"] = maps.shape[0] if maps.ndim == 4 else None
        s, samples = slice_count(slices, named), trajectory.shape[-2]
        if samples_per_readout is not None and (samples_per_readout < 1 or samples % samples_per_readout):
            raise ValueError(f"samples_per_readout is {samples_per_readout}; a divisor of {samples} is wanted")
        self.domain = Space((s, 1, h, w), kind)
        self.range = Space((s, 1 if maps is None else maps.shape[-3], samples), kind)
        own = maps[None] if maps is not None and maps.ndim == 3 else maps
        self.maps = None if own is None else own.detach().to(kind).clone()
        self.accuracy, self.engine, self.toeplitz = accuracy, engine, toeplitz
        self.samples_per_readout, self.coils_at_once = samples_per_readout, coils_at_once
        each = self.trajectory[None] if trajectory.ndim == 2 else self.trajectory
        real = kind.to_real()
        self._transforms: tuple[Transform, ...] = tuple(ENGINES[engine](k, (h, w), real, accuracy) for k in each)
        self._spreads = tuple(point_spread(k, (h, w), real, accuracy) for k in each) if toeplitz else ()

    def _forward(self, x: Tensor) -> Tensor:
        return torch.cat([self._each(part * x, "forward") for part in self._parts(x.device)], 1)

    def _adjoint(self, y: Tensor) -> Tensor:
        first, images = 0, []
        for part in self._parts(y.device):
            back = self._each(y[:, first : first + part.shape[1]], "adjoint")
            images.append((part.conj() * back).sum(1, keepdim=True))
            first += part.shape[1]
        return images[0] if len(images) == 1 else torch.stack(images).sum(0)

    def normal(self, x: Tensor) -> Tensor:
        """A^H A x; with ``toeplitz`` by the point spread function."""
        if not self.toeplitz:
            return super().normal(x)
        self._check(x, self.domain, "input")
        images = [(part.conj() * self._each(part * x, "normal")).sum(1, keepdim=True) for part in self._parts(x.device)]
        return images[0] if len(images) == 1 else torch.stack(images).sum(0)

    def _each(self, v: Tensor, what: str) -> Tensor:
        """(s coil ...) through the transform of each slice's trajectory."""
        found = self._spreads if what == "normal" else self._transforms
        calls: list[Callable[[Tensor], Tensor]] = [getattr(one, what) for one in found]
        groups = [v.flatten(0, 1)] if len(calls) == 1 else list(v)
        done = [call(part) for call, group in zip(calls, groups, strict=True) for part in group.split(IMAGES_AT_ONCE)]
        out = torch.cat(done)
        return out.view(*v.shape[:2], *out.shape[1:])

    def _parts(self, device: torch.device) -> tuple[Tensor, ...]:
        """Maps of some coils at a time, (s coil h w)."""
        if self.maps is None:
            return (torch.ones(1, 1, 1, 1, dtype=self.domain.dtype.to_real(), device=device),)
        return self.maps.to(device).split(self.coils_at_once or self.range.shape[1], 1)

    def pinv(self, y: Tensor) -> Tensor:
        """Gridding: the adjoint of the density-compensated samples, over the coils' sum of squares.

        Right in scale, and a good first image; not the least-squares solution. See ``density_compensation``.
        """
        weights = density_compensation(self.trajectory, self.domain.shape[2:]).to(y.device, y.dtype.to_real())
        image = self.adjoint(y * (weights if weights.ndim == 1 else weights[:, None]))
        if self.maps is None:
            return image
        squares = self.maps.to(y.device).abs().square().sum(1, keepdim=True)
        return torch.where(squares > 0, image / squares.where(squares > 0, 1), 0)

    @property
    def views(self) -> tuple[int, ...]:
        """Numbers of the readouts."""
        return tuple(range(self.range.shape[2] // (self.samples_per_readout or 1)))

    def split(self, index: Sequence[int]) -> LinearOperatorBase:
        """The operator of the readouts ``index`` alone."""
        chosen = self._choose(self.trajectory.movedim(-1, 0), index).movedim(0, -1)
        fields = {**self.fields(), "trajectory": chosen, "coils_at_once": self.coils_at_once}
        return type(self)(**fields).to(self.device)

    def part(self, y: Tensor, index: Sequence[int]) -> Tensor:
        """The samples of the readouts ``index``, in that order: (... samples) -> (... fewer samples)."""
        return self._choose(y, index)

    def _choose(self, v: Tensor, index: Sequence[int]) -> Tensor:
        count = len(self.views)
        if not index or min(index) < 0 or max(index) >= count:
            raise ValueError(f"readouts {list(index)} of {count}; at least one, from 0 up, is wanted")
        readouts = v.unflatten(-1, (count, self.samples_per_readout or 1))
        return readouts.index_select(-2, torch.as_tensor(list(index), device=v.device)).flatten(-2)

    def zero_filled(self, y: Tensor) -> Tensor:
        """``pinv``: the adjoint, compensated for the density of the samples."""
        return self.pinv(y)

    def fields(self) -> dict[str, Any]:
        """The constructor's arguments, without ``coils_at_once``: that is the machine's matter, not the scan's."""
        return {
            "trajectory": self.trajectory,
            "size": list(self.domain.shape[2:]),
            "maps": self.maps if self.maps is None or self.maps.shape[0] > 1 else self.maps[0],
            "slices": self.domain.shape[0],
            "dtype": dtype_name(self.domain.dtype),
            "accuracy": self.accuracy,
            "engine": self.engine,
            "toeplitz": self.toeplitz,
            "samples_per_readout": self.samples_per_readout,
        }


def check_trajectory(trajectory: Tensor) -> Tensor:
    """A trajectory as float64.

    Raises:
        ValueError: not (samples 2) or (s samples 2), complex, not finite, or beyond 0.5 cycles per pixel.
    """
    shape = tuple(trajectory.shape)
    if trajectory.ndim not in (2, 3) or shape[-1] != 2 or 0 in shape or trajectory.is_complex():
        raise ValueError(f"the trajectory is {shape} {trajectory.dtype}; real (samples 2) or (s samples 2) is wanted")
    largest = float(trajectory.abs().max())
    if not largest <= EDGE:
        raise ValueError(
            f"the trajectory reaches {largest:.4g}; at most 0.5 cycles per pixel is wanted (radians divided by 2 pi, "
            "cycles per field of view by the matrix size)"
        )
    return trajectory.detach().to(torch.float64).clone()


def check_size(size: Sequence[int]) -> tuple[int, int]:
    """(h w) of positive numbers.

    Raises:
        ValueError: anything else.
    """
    if len(size) != 2 or min(size) < 2:
        raise ValueError(f"size is {tuple(size)}; (h w), each at least 2, is wanted")
    return size[0], size[1]
