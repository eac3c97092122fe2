"""How a file stored its axes, and the one orientation in memory: flips and permutations only, never interpolation.

In memory, columns run from the patient's right to the left, rows from anterior to posterior, slices from inferior to
superior: what a DICOM axial slice looks like on a screen. World coordinates are RAS (right, anterior, superior) in mm.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Affine = NDArray[np.float64]

_AXIS_OF = (3, 2, 0)  # where canonical axis w, h, s lies in (s c h w)
_SIGN = (-1.0, -1.0, 1.0)  # w, h, s run to -x (left), -y (posterior), +z (superior)


@dataclass(frozen=True)
class Storage:
    """The stored axes (i, j, k) in terms of the canonical ones (0 column w, 1 row h, 2 slice s).

    Args:
        axes: stored axis a is canonical axis ``axes[a]``.
        flips: stored axis a runs against the canonical direction.

    Raises:
        ValueError: ``axes`` is not a permutation of 0, 1, 2, or ``flips`` is not three booleans.
    """

    axes: tuple[int, int, int] = (0, 1, 2)
    flips: tuple[bool, bool, bool] = (False, False, False)

    def __post_init__(self) -> None:
        if sorted(self.axes) != [0, 1, 2]:
            raise ValueError(f"stored axes are {self.axes}; a permutation of 0, 1, 2 is wanted")
        if len(self.flips) != 3 or not all(isinstance(f, bool) for f in self.flips):
            raise ValueError(f"stored flips are {self.flips}; three booleans are wanted")

    def matrix(self, sizes: tuple[int, ...]) -> Affine:
        """4 x 4: canonical index (w, h, s) to stored index (i, j, k), for ``sizes`` of the stored axes."""
        m = np.zeros((4, 4))
        m[3, 3] = 1
        for a in range(3):
            m[a, self.axes[a]] = -1 if self.flips[a] else 1
            m[a, 3] = sizes[a] - 1 if self.flips[a] else 0
        return m


CANONICAL = Storage()


def nearest_storage(affine: Affine) -> Storage:
    """The storage whose axes are nearest to the canonical ones.

    Args:
        affine: 4 x 4, stored index (i, j, k) to RAS mm, already checked.
    """
    cosines = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    axes = max(permutations(range(3)), key=lambda p: sum(abs(cosines[p[a], a]) for a in range(3)))
    flips = [bool(cosines[axes[a], a] * _SIGN[axes[a]] < 0) for a in range(3)]
    return Storage((axes[0], axes[1], axes[2]), (flips[0], flips[1], flips[2]))


def to_canonical(stored: NDArray[np.float32], affine: Affine, storage: Storage) -> tuple[Tensor, Affine]:
    """From an array (i j k c) and its affine to a new tensor (s c h w) and the affine of (w, h, s)."""
    flipped = np.flip(stored, tuple(a for a in range(3) if storage.flips[a]))
    w, h, s = (storage.axes.index(p) for p in range(3))
    data = torch.from_numpy(np.array(np.transpose(flipped, (s, 3, h, w)), order="C"))
    return data, affine @ storage.matrix(stored.shape)


def to_stored(data: Tensor, affine: Affine, storage: Storage) -> tuple[NDArray[np.float32], Affine]:
    """The inverse of ``to_canonical``: from (s c h w) to an array (i j k c) in the order that the source had."""
    i, j, k = (_AXIS_OF[p] for p in storage.axes)
    stored = np.transpose(data.detach().cpu().numpy(), (i, j, k, 1))
    stored = np.flip(stored, tuple(a for a in range(3) if storage.flips[a]))
    return np.ascontiguousarray(stored), affine @ np.linalg.inv(storage.matrix(stored.shape))


def checked_affine(affine: Affine, name: str) -> Affine:
    """``affine`` as a read-only float64 copy.

    Raises:
        ValueError: not 4 x 4, not finite, its last row not (0 0 0 1), or not invertible.
    """
    result = np.array(affine, dtype=np.float64)
    if result.shape != (4, 4):
        raise ValueError(f"{name}: the affine has shape {result.shape}; (4, 4) is wanted")
    if not np.isfinite(result).all() or not np.allclose(result[3], (0, 0, 0, 1)):
        raise ValueError(f"{name}: the affine is not one of finite numbers with last row 0 0 0 1: {result.tolist()}")
    lengths = np.linalg.norm(result[:3, :3], axis=0)
    if lengths.min() <= 0 or abs(np.linalg.det(result[:3, :3] / lengths)) < 1e-3:
        raise ValueError(f"{name}: the affine maps the voxels onto a plane: {result.tolist()}")
    result.setflags(write=False)
    return result


def spacing_of(affine: Affine) -> tuple[float, float, float]:
    """Distances in mm between neighbouring slices, rows and columns (s h w) along their axes."""
    w, h, s = (float(v) for v in np.linalg.norm(affine[:3, :3], axis=0))
    return s, h, w


def centred_affine(shape: tuple[int, int, int], spacing_mm: tuple[float, float, float]) -> Affine:
    """The affine of an image (s h w) in canonical orientation whose centre is the world's origin."""
    s, h, w = shape
    affine = np.diag([*(sign * mm for sign, mm in zip(_SIGN, reversed(spacing_mm), strict=True)), 1.0])
    affine[:3, 3] = -affine[:3, :3] @ (np.array([w, h, s]) - 1) / 2
    return affine
