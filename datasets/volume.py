"""A scan in physical units with its place in the world."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from invdiff.datasets.orientation import CANONICAL, Affine, Storage, checked_affine, spacing_of


@dataclass(frozen=True, eq=False)
class Volume:
    """A scan (s c h w) in physical units, in the orientation of an axial slice on a screen.

    Columns run from the patient's right to the left, rows from anterior to posterior, slices from inferior to
    superior, as near as flips and permutations of the stored axes can make it. ``dataclasses.replace(volume, data=x)``
    is the same place with other voxels.

    Args:
        data: (s c h w), float32, finite, in ``unit``. Values are never normalised, clipped or padded by a reader.
        affine: 4 x 4, float64: voxel index (w, h, s), that is (column, row, slice), of ``data`` to RAS mm.
        unit: of the voxels: "HU" for CT, "a.u." for MR.
        storage: how the source stored its axes, so that a writer can give them back.
        source: where it came from: ``name`` (no folder), ``sha256`` of the bytes, ``format``, and what the writer of
            that format needs; can be written as JSON.

    Raises:
        ValueError: another shape or dtype, voxels that are NaN or infinite, or an affine that is none.
    """

    data: Tensor
    affine: Affine
    unit: str
    storage: Storage = CANONICAL
    source: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        name = str(self.source.get("name", "volume"))
        if self.data.ndim != 4 or 0 in self.data.shape:
            raise ValueError(f"{name}: the voxels have shape {tuple(self.data.shape)}; (s c h w) is wanted")
        if self.data.dtype != torch.float32:
            raise ValueError(f"{name}: the voxels are {self.data.dtype}; torch.float32 is wanted")
        bad = int((~torch.isfinite(self.data)).sum())
        if bad:
            raise ValueError(f"{name}: {bad} of {self.data.numel()} voxels are NaN or infinite; all must be finite")
        if not self.unit:
            raise ValueError(f"{name}: the unit is empty; 'HU' or 'a.u.' is wanted")
        object.__setattr__(self, "affine", checked_affine(self.affine, name))

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distances in mm between neighbouring slices, rows and columns (s h w)."""
        return spacing_of(self.affine)


def block_mean(volume: Volume, factor: int) -> Volume:
    """Every ``factor`` x ``factor`` block of a slice averaged into one pixel, which lies at the block's centre.

    Args:
        volume: its rows and columns must be divisible by ``factor``; see ``pad_to_multiple``.
        factor: at least 1.

    Raises:
        ValueError: the size is not divisible, or the factor is below 1.
    """
    s, c, h, w = volume.data.shape
    if factor < 1:
        raise ValueError(f"block_mean by {factor}; a factor of at least 1 is wanted")
    if h % factor or w % factor:
        raise ValueError(f"slices of {h} x {w} pixels cannot be averaged {factor} x {factor}: pad or crop them first")
    data = volume.data.reshape(s, c, h // factor, factor, w // factor, factor).mean(dim=(3, 5))
    affine = volume.affine.copy()
    affine[:, 3] += (factor - 1) / 2 * (volume.affine[:, 0] + volume.affine[:, 1])
    affine[:, :2] *= factor
    return replace(volume, data=data, affine=affine)


def pad_to_multiple(volume: Volume, factor: int, value: float) -> Volume:
    """Rows added below and columns at the right, of ``value``, until both numbers are multiples of ``factor``.

    Args:
        volume: what was there keeps its indices, so the affine stays.
        factor: at least 1.
        value: of the new pixels, in the volume's unit (air is -1000 HU).

    Raises:
        ValueError: the factor is below 1.
    """
    if factor < 1:
        raise ValueError(f"pad_to_multiple of {factor}; a factor of at least 1 is wanted")
    h, w = volume.data.shape[2:]
    pad = (0, -w % factor, 0, -h % factor)
    return replace(volume, data=torch.nn.functional.pad(volume.data, pad, value=value))
