"""Trajectories in k-space: (samples 2), row and column frequency in cycles per pixel, within [-0.5, 0.5)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

GOLDEN_ANGLE = math.pi * (math.sqrt(5) - 1) / 2  # 111.25 degrees (Winkelmann et al., IEEE TMI 2007)


def radial(spokes: int, samples: int, golden: bool = True, first: int = 0) -> Tensor:
    """Spokes through the centre of k-space, one after the other.

    A spoke at angle a runs along (sin a, cos a) in (row, column), from -0.5 up, with sample ``samples // 2`` at 0.

    Args:
        spokes: how many.
        samples: on each; twice the matrix size is usual (readout oversampling), at least the matrix size is wanted.
        golden: each spoke is 111.25 degrees on from the last, so that any run of them covers k-space; else evenly
            over 180 degrees.
        first: number of the first spoke, so that frames of a golden-angle scan go on where the last one ended.

    Returns:
        (spokes·samples 2), float64.

    Raises:
        ValueError: fewer than 1 spoke or 2 samples.
    """
    if spokes < 1 or samples < 2:
        raise ValueError(f"{spokes} spokes of {samples} samples; at least 1 of at least 2 are wanted")
    number = torch.arange(first, first + spokes, dtype=torch.float64)
    angle = number * (GOLDEN_ANGLE if golden else math.pi / spokes)
    along = (torch.arange(samples, dtype=torch.float64) - samples // 2) / samples
    return torch.stack([torch.outer(angle.sin(), along), torch.outer(angle.cos(), along)], -1).flatten(0, 1)


def spiral(interleaves: int, samples: int, turns: float, density: float = 1.0) -> Tensor:
    """Archimedean spirals from the centre out to 0.5, turned evenly against one another.

    Args:
        interleaves: how many.
        samples: on each, evenly spaced along the curve's angle.
        turns: of one interleaf; ``interleaves * turns`` is the number of rings, half the matrix size for full sampling.
        density: the radius grows as the angle to this power: 1 is even, above 1 denser in the middle.

    Returns:
        (interleaves·samples 2), float64.

    Raises:
        ValueError: fewer than 1 interleaf or 2 samples, or turns or a density that is not positive.
    """
    if interleaves < 1 or samples < 2:
        raise ValueError(f"{interleaves} interleaves of {samples} samples; at least 1 of at least 2 are wanted")
    if not (0 < turns < math.inf and 0 < density < math.inf):
        raise ValueError(f"turns is {turns} and density {density}; positive numbers are wanted")
    share = torch.arange(samples, dtype=torch.float64) / samples
    start = 2 * math.pi * torch.arange(interleaves, dtype=torch.float64) / interleaves
    angle, radius = start[:, None] + 2 * math.pi * turns * share, 0.5 * share**density
    return torch.stack([radius * angle.sin(), radius * angle.cos()], -1).flatten(0, 1)
