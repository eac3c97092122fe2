"""Raw k-space of one scan with its place in the world: the one thing that every reader of raw MR data gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from invdiff.datasets.orientation import CANONICAL, Affine, Storage, checked_affine, spacing_of
from invdiff.fourier import centred_fft, centred_ifft

_NOTHING = 1e-6  # of the largest value: a slice below is rounding
_IN_PLANE = ((-1.0, 0.0, 0.0), (0.0, -1.0, 0.0), (0.0, 0.0, -1.0))  # left, posterior, inferior in RAS
# which of these columns and rows point to, by the world axis that the slice's normal is nearest to (DICOM displays)
_SCREEN = {0: (1, 2), 1: (0, 2), 2: (0, 1)}


@dataclass(frozen=True, eq=False)
class KSpace:
    """Raw k-space of one scan, as the scanner gave it (never normalised), with its place in the world.

    Args:
        data: complex64. Cartesian: (s coil h w), zero frequency at index n // 2, zeros where not sampled; the image is
            its centred inverse Fourier transform. Non-Cartesian: (s coil samples).
        mask: Cartesian: bool (h w) or (s h w), what was sampled; None for non-Cartesian.
        affine: 4 x 4, float64: voxel (w, h, s) of the image (s 1 h w) that a Fourier transform of ``data`` gives to
            RAS mm.
        trajectory: non-Cartesian: (samples 2) or (s samples 2), (row, column) in cycles per pixel, [-0.5, 0.5).
        shape: (h w) of the image of non-Cartesian data.
        noise: (coil n) complex samples of a noise scan.
        calibration: (s coil h' w') complex: a separate scan of the centre of k-space, zero frequency at n // 2.
        readout: the axis along which lines are read, "h" or "w"; None where both are phase-encoded, or off the grid.
        crop: (h w) that the scanner's image has after its readout oversampling (and fastMRI's 320 x 320) is cut away.
        storage: how a result is to be stored.
        source: name, sha256, format, and what the header says, such as sequence, tr_ms, te_ms; can be written as JSON.

    Raises:
        ValueError: values that are NaN or infinite, real values, shapes that do not fit one another, an empty mask,
            data that are zero throughout, values where the mask says that nothing was sampled, lines that the mask
            claims and that hold nothing but zeros.
    """

    data: Tensor
    mask: Tensor | None
    affine: Affine
    trajectory: Tensor | None = None
    shape: tuple[int, int] | None = None
    noise: Tensor | None = None
    calibration: Tensor | None = None
    crop: tuple[int, int] | None = None
    readout: str | None = None
    storage: Storage = CANONICAL
    source: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        name = self.name
        _check_complex(self.data, f"{name}: k-space")
        if self.data.dtype != torch.complex64:
            raise ValueError(f"{name}: k-space is {self.data.dtype}; torch.complex64 is wanted")
        if self.readout not in (None, "h", "w"):
            raise ValueError(f"{name}: the readout is {self.readout!r}; 'h', 'w' or None is wanted")
        if (self.mask is None) == (self.trajectory is None):
            raise ValueError(f"{name}: one of mask and trajectory is wanted, not both and not none")
        if self.mask is None:
            self._check_samples()
        else:
            _check_grid(name, self.data, self.mask, self.shape, self.crop)
        if not bool(self.data.any()):
            raise ValueError(f"{name}: k-space of shape {tuple(self.data.shape)} is zero throughout")
        self._check_scans()
        object.__setattr__(self, "affine", checked_affine(self.affine, name))

    def _check_samples(self) -> None:
        """Non-Cartesian: shapes of data, trajectory and image."""
        name, data, where, shape = self.name, self.data, self.trajectory, self.shape
        if where is None or shape is None or self.crop is not None or min(shape) < 1:
            raise ValueError(
                f"{name}: k-space off the grid has shape {shape}, crop {self.crop}; (h w) and None are wanted"
            )
        fits = data.ndim == 3 and where.ndim in (2, 3) and where.shape[-2:] == (data.shape[2], 2)
        if not fits or (where.ndim == 3 and where.shape[0] != data.shape[0]):
            raise ValueError(
                f"{name}: the trajectory is {tuple(where.shape)} for k-space of {tuple(data.shape)}; (samples 2) or "
                "(s samples 2) for (s coil samples) is wanted"
            )
        if not where.is_floating_point() or not bool((where.abs() <= 0.5 + 1e-6).all()):  # NaN fails it too
            raise ValueError(f"{name}: the trajectory leaves [-0.5, 0.5) cycles per pixel, or is not real and finite")

    def _check_scans(self) -> None:
        """Noise and calibration, where there are any, have the coils and slices of the data."""
        slices, coils = self.data.shape[:2]
        if self.noise is not None:
            _check_complex(self.noise, f"{self.name}: the noise scan")
            if self.noise.ndim != 2 or self.noise.shape[0] != coils or self.noise.shape[1] < 1:
                raise ValueError(
                    f"{self.name}: the noise scan is {tuple(self.noise.shape)} and k-space has {coils} coils; (coil n) "
                    "is wanted"
                )
        if self.calibration is not None:
            _check_complex(self.calibration, f"{self.name}: the calibration scan")
            if self.calibration.ndim != 4 or self.calibration.shape[:2] != (slices, coils):
                raise ValueError(
                    f"{self.name}: the calibration scan is {tuple(self.calibration.shape)} and k-space has {slices} "
                    f"slices and {coils} coils; (s coil h w) is wanted"
                )

    @property
    def name(self) -> str:
        """Of the file, for messages."""
        return str(self.source.get("name", "k-space"))

    @property
    def image_shape(self) -> tuple[int, int]:
        """(h w) of the image that a Fourier transform of ``data`` gives."""
        h, w = self.data.shape[2:] if self.shape is None else self.shape
        return h, w

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distances in mm between neighbouring slices, rows and columns (s h w) of the image."""
        return spacing_of(self.affine)


def without_oversampling(kspace: KSpace) -> KSpace:
    """The k-space of the image whose readout is cut to ``crop``: half the samples, the same pixels, white noise stays.

    The readout is the axis with more samples for each pixel of ``crop``. Its lines are Fourier transformed (centred,
    orthonormal), cut about the middle, and transformed back; each line by itself, so any undersampling of the other
    axis is untouched. A calibration scan is cut to the same field of view. ``noise`` stays as it is: the map keeps the
    standard deviation of each sample.

    Args:
        kspace: unchanged where ``crop`` is None or nothing is oversampled.

    Raises:
        ValueError: the readout's lines are not sampled from end to end.
    """
    if kspace.crop is None or kspace.mask is None:
        return kspace
    sizes = kspace.data.shape[2:]
    axis = 0 if sizes[0] / kspace.crop[0] >= sizes[1] / kspace.crop[1] else 1
    n, m = sizes[axis], kspace.crop[axis]
    if m >= n:
        return kspace
    dim = axis - 2
    lines = kspace.mask.any(dim, keepdim=True)
    if not torch.equal(lines.expand_as(kspace.mask), kspace.mask):
        what = "rows" if axis == 0 else "columns"
        raise ValueError(f"{kspace.name}: the readout along the {what} has gaps, so {n} cannot be cut to {m} samples")
    affine = kspace.affine.copy()
    affine[:3, 3] += (n // 2 - m // 2) * affine[:3, 1 - axis]
    calibration = kspace.calibration
    if calibration is not None:
        calibration = _cut_calibration(calibration, dim, n, m)
    data = cut_readout(kspace.data, dim, m) * lines.unsqueeze(-3)  # exact zeros stay exact
    return replace(kspace, data=data, mask=kspace.mask.narrow(dim, 0, m), affine=affine, calibration=calibration)


def cut_readout(data: Tensor, dim: int, size: int) -> Tensor:
    """k-space of the middle ``size`` pixels along ``dim``: centred orthonormal transforms, index n // 2 the middle."""
    return centred_fft(middle(centred_ifft(data, (dim,)), dim, size), (dim,))


def middle(data: Tensor, dim: int, size: int) -> Tensor:
    """The middle ``size`` elements along ``dim``: index n // 2 goes to ``size`` // 2."""
    return data.narrow(dim, data.shape[dim] // 2 - size // 2, size)


def upright(kspace: KSpace) -> KSpace:
    """Rows and columns exchanged and reversed until a slice looks as on a DICOM screen, as near as that can be.

    Axial: columns to the patient's left, rows to the back. Sagittal: columns to the back, rows to the feet. Coronal:
    columns to the left, rows to the feet. Slices keep their order. An axis is reversed about index n // 2, in k-space
    and image alike, so that no phase is added; where n is even the pixel row at the edge of the field of view thereby
    changes sides, which it may since the field of view is periodic.
    """
    affine = kspace.affine
    normal = int(abs(affine[:3, 2] / max(abs(affine[:3, 2]))).argmax())
    column, row = _SCREEN[normal]
    directions = affine[:3, :2] / (affine[:3, :2] ** 2).sum(0) ** 0.5
    straight = abs(directions[column, 0]) + abs(directions[row, 1])
    crossed = abs(directions[column, 1]) + abs(directions[row, 0])
    result = exchanged(kspace) if crossed > straight else kspace
    for axis, world in ((1, column), (0, row)):
        if result.affine[:3, 1 - axis] @ _IN_PLANE[world] < 0:
            result = _reversed(result, axis)
    return result


def exchanged(kspace: KSpace) -> KSpace:
    """Rows for columns, in the same place."""
    affine = kspace.affine[:, [1, 0, 2, 3]]
    shape, crop = (None if pair is None else (pair[1], pair[0]) for pair in (kspace.shape, kspace.crop))
    calibration = None if kspace.calibration is None else kspace.calibration.transpose(-2, -1).contiguous()
    if kspace.mask is None:
        track = None if kspace.trajectory is None else kspace.trajectory.flip(-1)
        return replace(kspace, affine=affine, trajectory=track, shape=shape, calibration=calibration)
    data, mask = kspace.data.transpose(-2, -1).contiguous(), kspace.mask.transpose(-2, -1).contiguous()
    readout = None if kspace.readout is None else {"h": "w", "w": "h"}[kspace.readout]
    changes: dict[str, Any] = {"data": data, "mask": mask, "calibration": calibration, "crop": crop}
    return replace(kspace, affine=affine, readout=readout, **changes)


def _reversed(kspace: KSpace, axis: int) -> KSpace:
    """One axis (0 rows, 1 columns) about index n // 2."""
    affine = kspace.affine.copy()
    affine[:3, 3] += 2 * (kspace.image_shape[axis] // 2) * affine[:3, 1 - axis]
    affine[:3, 1 - axis] *= -1
    calibration = None if kspace.calibration is None else _about_middle(kspace.calibration, axis - 2)
    if kspace.mask is None:
        track = kspace.trajectory
        if track is not None:
            track = track * torch.tensor([-1.0, 1.0] if axis == 0 else [1.0, -1.0], dtype=track.dtype)
        return replace(kspace, affine=affine, trajectory=track, calibration=calibration)
    data, mask = _about_middle(kspace.data, axis - 2), _about_middle(kspace.mask, axis - 2)
    return replace(kspace, data=data, mask=mask, affine=affine, calibration=calibration)


def _about_middle(data: Tensor, dim: int) -> Tensor:
    """Index n // 2 + d to n // 2 - d, modulo n."""
    n = data.shape[dim]
    return data.flip(dim) if n % 2 else data.flip(dim).roll(1, dim)


def _cut_calibration(data: Tensor, dim: int, n: int, m: int) -> Tensor:
    """The calibration scan on m / n of its field of view, first cut to a length that this divides."""
    length = data.shape[dim]
    while length * m % n:
        length -= 1
    if not length:
        raise ValueError(f"a calibration scan of {data.shape[dim]} samples cannot be cut to {m} / {n} of its view")
    return cut_readout(middle(data, dim, length), dim, length * m // n)


def _check_complex(value: Tensor, what: str) -> None:
    if not value.is_complex():
        raise ValueError(f"{what} is {value.dtype}, which is real; complex values are wanted")
    bad = int((~torch.isfinite(value)).sum())
    if bad:
        raise ValueError(f"{what} has {bad} of {value.numel()} values that are NaN or infinite; all must be finite")


def _check_grid(
    name: str, data: Tensor, mask: Tensor, shape: tuple[int, int] | None, crop: tuple[int, int] | None
) -> None:
    """Cartesian: shapes of data and mask, and whether the one holds what the other says."""
    if data.ndim != 4 or shape is not None:
        raise ValueError(
            f"{name}: k-space on a grid is {tuple(data.shape)}, shape {shape}; (s coil h w), None are wanted"
        )
    if mask.dtype != torch.bool or tuple(mask.shape) not in ((*data.shape[2:],), (data.shape[0], *data.shape[2:])):
        raise ValueError(
            f"{name}: the mask is {mask.dtype} of {tuple(mask.shape)} for k-space of {tuple(data.shape)}; torch.bool "
            "of (h w) or (s h w) is wanted"
        )
    empty = int((~mask.flatten(-2).any(-1)).sum())
    if empty:
        where = "" if mask.ndim == 2 else f" in {empty} of {mask.shape[0]} slices"
        raise ValueError(f"{name}: the mask is zero throughout{where}: nothing was sampled")
    if crop is not None and min(crop) < 1:
        raise ValueError(f"{name}: crop is {crop}; two positive sizes are wanted")
    held = (data != 0).any(1)
    outside = int((held & ~mask).sum())
    if outside:
        raise ValueError(f"{name}: k-space holds values at {outside} places that the mask says were not sampled")
    peaks = data.abs().amax(dim=(1, 2, 3))
    signal = (peaks > _NOTHING * peaks.max())[:, None]  # a slice of air, simulated without noise, has no lines to miss
    for dim, what in ((-1, "rows"), (-2, "columns")):
        missing = mask.any(dim) & ~held.any(dim) & signal
        count = int(missing.sum())
        if count:
            first = torch.nonzero(missing)[0].tolist()
            raise ValueError(
                f"{name}: {count} of {missing.numel()} {what} that count as sampled hold nothing but zeros, the first "
                f"in slice {first[0]}, index {first[1]}: lines are missing"
            )
