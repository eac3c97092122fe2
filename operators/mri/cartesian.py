"""Cartesian MRI with one or many coils, slice by slice or with a third encoded direction."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from invdiff.fourier import PLANE, VOLUME, centred_fft, centred_ifft
from invdiff.operators.channels import slice_count
from invdiff.operators.linear import LinearOperatorBase, SelfAdjoint, as_dtype, dtype_name
from invdiff.operators.mask import check_mask
from invdiff.operators.sparse import MatchedProduct
from invdiff.protocols import Space

TILE_BYTES = 2**20  # coil images at a time, to stay in a core's cache: fastest of 0.5 to 4 MiB at 256^2


class Cartesian(LinearOperatorBase):
    """x -> mask · F(maps · x), SENSE (Pruessmann et al. 1999) on the Cartesian grid; zero where not sampled.

    What ``CartesianMRI`` and ``CartesianMRI3D`` share.

    Args:
        mask: bool (s c h w), with size 1 where it has no such axis.
        maps: complex (s coil h w), s maybe 1, or None.
        slices: s.
        dtype: of the image and of k-space.
        readout: name of the axis along which a line is read.
        coils_at_once: coil images of a slice held at once; as many as pay if None.
    """

    axes: ClassVar[tuple[int, ...]]
    names: ClassVar[dict[str, int]]

    def __init__(
        self,
        mask: Tensor,
        maps: Tensor | None,
        slices: int,
        dtype: torch.dtype | str,
        readout: str,
        coils_at_once: int | None,
    ) -> None:
        kind = complex_dtype(dtype)
        if readout not in self.names:
            raise ValueError(f"readout is {readout!r}; one of {', '.join(self.names)} is wanted")
        check_coils_at_once(coils_at_once)
        coils, (h, w) = 1 if maps is None else maps.shape[1], mask.shape[-2:]
        self.domain, self.range = Space((slices, 1, h, w), kind), Space((slices, coils, h, w), kind)
        self.mask = mask.detach().to(kind.to_real())
        self.maps = None if maps is None else maps.detach().to(kind).clone()
        self.readout, self.coils_at_once = readout, coils_at_once
        # F^H mask F is I along an axis on which the mask does not vary, and needs no shifts: they commute with F
        self._vary = tuple(a for a in self.axes if bool((mask != mask.narrow(a, 0, 1)).any()))
        shifted = torch.fft.ifftshift(self.mask, dim=self._vary) if self._vary else self.mask
        shifted = shifted / math.prod(self.range.shape[a] for a in self._vary)  # so that the FFTs need no scale: 15 %
        self._conjugating = torch.stack([shifted, -shifted], -1)  # multiplies real and imaginary parts

    def _forward(self, x: Tensor) -> Tensor:
        out: Tensor = MatchedProduct.apply(x, self, False)
        return out

    def _adjoint(self, y: Tensor) -> Tensor:
        out: Tensor = MatchedProduct.apply(y, self, True)
        return out

    def normal(self, x: Tensor) -> Tensor:
        """A^H A x: one pair of FFTs a coil, along the axes on which the mask varies, without shifts."""
        self._check(x, self.domain, "input")
        return SelfAdjoint.apply(x, self._normal)

    def product(self, v: Tensor, transposed: bool) -> Tensor:
        """A v, or A^H v, tile by tile."""
        out = torch.zeros(self.domain.shape if transposed else self.range.shape, dtype=v.dtype, device=v.device)
        for s, c, maps, mask in self._tiles(self.mask.to(v.device)):
            if transposed:
                out[s] += (maps.conj() * centred_ifft(mask * v[s, c], self.axes)).sum(1, keepdim=True)
            else:
                torch.mul(mask, centred_fft(maps * v[s], self.axes), out=out[s, c])
        return out

    def _normal(self, x: Tensor) -> Tensor:
        """The sum over coils of S^* F^-1 M F S x, as the conjugate of S F (M F S x)^*: no conjugate maps are made."""
        out = torch.zeros_like(x)
        for s, _, maps, mask in self._tiles(self._conjugating.to(x.device)):
            image, some = maps * x[s], out[s]
            image = torch.fft.fftn(image, dim=self._vary) if self._vary else image
            torch.view_as_real(image).mul_(mask)
            image = torch.fft.fftn(image, dim=self._vary) if self._vary else image
            for coil in image.mul_(maps).split(1, 1):
                some += coil
        return out.conj_physical_()

    def _tiles(self, mask: Tensor) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
        """Slices and coils to take at once, and their maps (s coil h w) and part of ``mask``."""
        s, coils, h, w = self.range.shape
        maps = torch.ones(1, 1, 1, 1, dtype=self.domain.dtype) if self.maps is None else self.maps
        maps, whole = maps.to(mask.device), 0 in self._fourier_axes
        room = TILE_BYTES // (h * w * self.range.dtype.itemsize * (s if whole else 1))
        columns = self.coils_at_once or min(coils, max(1, room))
        rows = s if whole else max(1, room // columns)
        for i in range(0, s, rows):
            here = slice(i, i + rows)
            own_maps, own_mask = (v if v.shape[0] == 1 else v[here] for v in (maps, mask))
            for j in range(0, coils, columns):
                there = slice(j, j + columns)
                yield here, there, own_maps[:, there], own_mask

    def solve(
        self, rhs: Tensor, rho: float, x0: Tensor | None = None, iterations: int = 100, tolerance: float | None = None
    ) -> Tensor:
        """F^H (mask + rho)^-1 F rhs without maps; conjugate gradients with them."""
        if self.maps is not None:
            return super().solve(rhs, rho, x0, iterations, tolerance)
        self._check_rho(rho)
        self._check(rhs, self.domain, "right-hand side")
        return centred_ifft(centred_fft(rhs, self.axes) / (self.mask.to(rhs.device) + rho), self.axes)

    def pinv(self, y: Tensor) -> Tensor:
        """Without maps the zero-filled image, which is the pseudo-inverse; with them least squares by CG (SENSE)."""
        return super().pinv(y) if self.maps is not None else self.adjoint(y)

    @property
    def views(self) -> tuple[int, ...]:
        """Lines of which any sample is kept, numbered across the readout: row by row where they run in two axes."""
        kept = (self.mask != 0).any(self.names[self.readout])
        return tuple((kept if 0 in self._fourier_axes else kept.any(0)).flatten().nonzero().flatten().tolist())

    def split(self, index: Sequence[int]) -> LinearOperatorBase:
        """The operator that keeps of this mask the lines ``index`` alone; k-space stays as large, zero elsewhere.

        Raises:
            ValueError: a number that is no line, or lines of which this mask keeps nothing.
        """
        return self._masked((self.mask * self._lines(index).to(self.mask)) != 0)

    def whole(self, views: int) -> LinearOperatorBase:
        """The operator of ``views`` whole lines evenly over k-space, at most of all."""
        return self._masked(torch.ones_like(self.mask) * self._lines(_evenly(range(self._line_count), views)) != 0)

    def unmeasured(self, views: int) -> LinearOperatorBase:
        """The operator of lines of which this mask keeps nothing.

        Raises:
            ValueError: there are none.
        """
        left = sorted(set(range(self._line_count)) - set(self.views))
        if not left:
            raise ValueError(f"all of {self._line_count} lines are measured; the whole is wanted")
        return self._masked(torch.ones_like(self.mask) * self._lines(_evenly(left, views)) != 0)

    def _masked(self, mask: Tensor) -> LinearOperatorBase:
        fields = {**self.fields(), "mask": self._plain_mask(mask), "coils_at_once": self.coils_at_once}
        return type(self)(**fields).to(self.device)

    @property
    def _line_count(self) -> int:
        across = self._fourier_axes - {self.names[self.readout] + 4}
        return math.prod(n for a, n in enumerate(self.range.shape) if a in across)

    def part(self, y: Tensor, index: Sequence[int]) -> Tensor:
        """``y`` with zeros on all lines but ``index``."""
        return y * self._lines(index).to(y.device)

    def _lines(self, index: Sequence[int]) -> Tensor:
        """1 on the lines ``index``, else 0: broadcasts over k-space."""
        across = self._fourier_axes - {self.names[self.readout] + 4}
        shape = [n if a in across else 1 for a, n in enumerate(self.range.shape)]
        lines, chosen = torch.zeros(shape, dtype=torch.bool), torch.as_tensor(list(index), dtype=torch.int64)
        if chosen.numel() == 0 or int(chosen.min()) < 0 or int(chosen.max()) >= lines.numel():
            raise ValueError(f"lines {list(index)} of {lines.numel()}; at least one, from 0 up, is wanted")
        lines.view(-1)[chosen] = True
        return lines

    @property
    def _fourier_axes(self) -> set[int]:
        return {a + 4 for a in self.axes}

    @abstractmethod
    def _plain_mask(self, mask: Tensor) -> Tensor:
        """A mask (s c h w) in the shape that the constructor takes."""


class CartesianMRI(Cartesian):
    """x -> mask · F(maps · x), SENSE (Pruessmann et al. 1999) on the Cartesian grid; zero where not sampled.

    Domain (s 1 h w) complex, range (s coil h w) complex. The number of slices is that of ``mask`` or ``maps`` where
    one has a slice axis. Frames of a dynamic scan are slices: a mask (s h w) has one for each, maps (coil h w) serve
    them all.

    Args:
        mask: bool or 0 and 1, (h w) or (s h w), zero frequency at index n // 2; every slice keeps something.
        maps: coil sensitivities, complex, (coil h w) or (s coil h w); None: one coil of sensitivity 1.
        slices: s, needed only where neither has a slice axis and it is not 1.
        dtype: of the image and of k-space.
        readout: axis along which a line is read, "h" (the mask chooses columns) or "w": what ``split`` cuts along.
        coils_at_once: coil images of a slice held at once; as many as pay if None.

    Raises:
        ValueError: shapes that do not fit one another, values other than 0 and 1 in the mask, a mask that keeps
            nothing of a slice, real or non-finite maps, or a real dtype.
    """

    kind = "cartesian-mri"
    axes = PLANE
    names: ClassVar[dict[str, int]] = {"h": -2, "w": -1}

    def __init__(
        self,
        mask: Tensor,
        maps: Tensor | None = None,
        slices: int | None = None,
        dtype: torch.dtype | str = torch.complex64,
        readout: str = "h",
        coils_at_once: int | None = None,
    ) -> None:
        if mask.ndim not in (2, 3):
            raise ValueError(f"the mask is {tuple(mask.shape)}; (h w) or (s h w) is wanted")
        named: dict[str, int | None] = {"mask": mask.shape[0] if mask.ndim == 3 else None}
        if maps is not None:
            check_maps(maps, mask.shape[-2:])
            named["maps"] = maps.shape[0] if maps.ndim == 4 else None
        full = check_mask(mask)
        empty = (~full.flatten(1).any(1)).nonzero().flatten().tolist()
        if empty:
            where = f" of slices {empty}" if full.shape[0] > 1 else ""
            raise ValueError(f"the mask keeps nothing{where}; at least one sample a slice is wanted")
        own = maps[None] if maps is not None and maps.ndim == 3 else maps
        super().__init__(full, own, slice_count(slices, named), dtype, readout, coils_at_once)

    def fields(self) -> dict[str, Any]:
        """``mask`` (bool tensor, (h w) or (s h w)), ``maps`` (tensor or None), ``slices``, ``dtype``, ``readout``."""
        return {
            "mask": self._plain_mask(self.mask != 0),
            "maps": self.maps if self.maps is None or self.maps.shape[0] > 1 else self.maps[0],
            "slices": self.domain.shape[0],
            "dtype": dtype_name(self.domain.dtype),
            "readout": self.readout,
        }

    def _plain_mask(self, mask: Tensor) -> Tensor:
        return mask[0, 0] if mask.shape[0] == 1 else mask[:, 0]


class CartesianMRI3D(Cartesian):
    """x -> mask · F(maps · x) with F over all three axes: the slice axis is encoded too, so slices are coupled.

    Domain (s 1 h w) complex, s the third direction of space; range (s coil h w) complex, whose axis 0 is k-space
    along that direction (the partition), zero frequency at index s // 2.

    Args:
        mask: bool or 0 and 1, (s h w), zero frequency at index n // 2.
        maps: coil sensitivities, complex, (coil s h w); None: one coil of sensitivity 1.
        dtype: of the image and of k-space.
        readout: axis along which a line is read, "s", "h" or "w": what ``split`` cuts along.
        coils_at_once: coil images of a slice held at once; as many as pay if None.

    Raises:
        ValueError: shapes that do not fit one another, values other than 0 and 1 in the mask, a mask that keeps
            nothing, real or non-finite maps, or a real dtype.
    """

    kind = "cartesian-mri-3d"
    axes = VOLUME
    names: ClassVar[dict[str, int]] = {"s": -4, "h": -2, "w": -1}
    coupled = True

    def __init__(
        self,
        mask: Tensor,
        maps: Tensor | None = None,
        dtype: torch.dtype | str = torch.complex64,
        readout: str = "h",
        coils_at_once: int | None = None,
    ) -> None:
        if mask.ndim != 3:
            raise ValueError(f"the mask is {tuple(mask.shape)}; (s h w) is wanted")
        full = check_mask(mask)
        if not bool(full.any()):
            raise ValueError("the mask keeps nothing; at least one sample is wanted")
        if maps is not None:
            check_maps(maps, mask.shape, 4)
        own = None if maps is None else maps.transpose(0, 1)
        super().__init__(full, own, mask.shape[0], dtype, readout, coils_at_once)

    def fields(self) -> dict[str, Any]:
        """``mask`` (bool tensor (s h w)), ``maps`` (tensor (coil s h w) or None), ``dtype``, ``readout``."""
        return {
            "mask": self._plain_mask(self.mask != 0),
            "maps": None if self.maps is None else self.maps.transpose(0, 1).contiguous(),
            "dtype": dtype_name(self.domain.dtype),
            "readout": self.readout,
        }

    def _plain_mask(self, mask: Tensor) -> Tensor:
        return mask[:, 0]


def _evenly(lines: Sequence[int], count: int) -> list[int]:
    """``count`` of the lines, evenly, the middle one among them; all if there are no more."""
    if count >= len(lines):
        return list(lines)
    step, middle = len(lines) / count, len(lines) // 2
    return sorted(lines[int(middle + step * k) % len(lines)] for k in range(count))


def complex_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """``as_dtype``, refused where it is real.

    Raises:
        ValueError: a real dtype or none at all.
    """
    kind = as_dtype(dtype)
    if not kind.is_complex:
        raise ValueError(f"dtype is {dtype_name(kind)}; a complex one is wanted")
    return kind


def check_coils_at_once(coils_at_once: int | None) -> None:
    """Refuse a number of coils below 1.

    Raises:
        ValueError: it is.
    """
    if coils_at_once is not None and coils_at_once < 1:
        raise ValueError(f"coils_at_once is {coils_at_once}; at least 1 is wanted, or None")


def check_maps(maps: Tensor, size: Sequence[int], axes: int | None = None) -> None:
    """Refuse coil maps that do not fit an image or are not finite complex numbers.

    Args:
        maps: (coil h w) or (s coil h w), or (coil s h w) where ``axes`` is 4.
        size: the image's (h w), or (s h w).
        axes: of ``maps``; 3 or 4 if None.

    Raises:
        ValueError: another shape, real values, NaN or infinity.
    """
    form = "(coil s h w)" if axes else "(coil h w) or (s coil h w)"
    if maps.ndim not in ((axes,) if axes else (3, 4)) or tuple(maps.shape[-len(size) :]) != tuple(size):
        raise ValueError(f"maps are {tuple(maps.shape)} and the image {tuple(size)}; {form} of its size is wanted")
    if not maps.is_complex() or not bool(torch.isfinite(torch.view_as_real(maps)).all()):
        raise ValueError(f"maps are {dtype_name(maps.dtype)}; finite complex values are wanted")
