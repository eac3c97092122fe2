"""Regions of a volume: NIfTI files of 0 and 1 on its grid."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from invdiff.datasets import Volume, read_nifti
from invdiff.pipelines.compare import PLACE_MM, corner_distance


def read_region(path: Path, volume: Volume, name: str) -> Tensor:
    """The region (s 1 h w), bool.

    Args:
        path: NIfTI, 1 inside.
        volume: whose grid it lies on.
        name: what it is, for errors.

    Raises:
        ValueError: another grid than the volume's, values other than 0 and 1, or no voxel.
    """
    region = read_nifti(path, "a.u.")
    check_grid(region, volume, f"{name} {path}")
    odd = region.data[(region.data != 0) & (region.data != 1)]
    if len(odd):
        raise ValueError(f"{name} {path} holds {float(odd[0]):g}; 1 (inside) and 0 (outside) alone are wanted")
    if not bool(region.data.any()):
        raise ValueError(f"{name} {path} is empty; at least one voxel of it is wanted")
    return region.data != 0


def check_grid(other: Volume, volume: Volume, name: str) -> None:
    """Refuse a volume of another grid.

    Args:
        other: what is to lie on it.
        volume: whose grid it is.
        name: of ``other``, for errors.

    Raises:
        ValueError: another shape, or a corner that lies elsewhere.
    """
    came, wanted = tuple(other.data.shape), (volume.data.shape[0], 1, *volume.data.shape[2:])
    if came != wanted:
        raise ValueError(f"{name} is {came}, the volume {wanted} (s c h w); one grid is wanted")
    distance = corner_distance(other.affine, volume.affine, volume.data.shape)
    if distance > PLACE_MM:
        raise ValueError(f"{name} lies up to {distance:.3g} mm from the volume; one grid is wanted")
