"""Density compensation: how much of k-space each sample of a trajectory stands for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from invdiff.operators.mri.nufft import gridding
from invdiff.operators.sparse import multiply

ACCURACY = 1e-2  # of the kernel: gridding after 30 steps is better than with 3e-2 or 1e-3
DOUBLE = torch.complex128
SPOT = 0.2  # of the field of view, its width
FIELDS = 2  # of view, of that grid: two pixels are up to two apart. On a single one gridding was 15 % wrong, not 0.5 %


def density_compensation(trajectory: Tensor, size: Sequence[int], iterations: int = 30) -> Tensor:
    """Weights w for which gridding of w is flat, by w <- w / (K w) from 1 (Pipe & Menon, MRM 1999, eq. 9).

    K is the kernel convolved with itself, from sample to sample. A weight is the area that its sample stands for in
    cells of 1/h by 1/w: 1 for every sample of the full Cartesian grid, so that F^H w F keeps
    the scale of an image. No sample stands for more than about the kernel's width, two cells, so gaps are not filled.

    Args:
        trajectory: (samples 2) or (s samples 2), row and column frequency in cycles per pixel.
        size: (h w) of the image.
        iterations: of the fixed point.

    Returns:
        (samples) or (s samples), float64, positive.

    Raises:
        ValueError: no iteration, or a trajectory of another shape.
    """
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}; at least 1 is wanted")
    if trajectory.ndim == 3:
        return torch.stack([density_compensation(one, size, iterations) for one in trajectory])
    if trajectory.ndim != 2 or trajectory.shape[1] != 2:
        raise ValueError(f"the trajectory is {tuple(trajectory.shape)}; (samples 2) or (s samples 2) is wanted")
    h, w = size
    grid = gridding(trajectory, (FIELDS * h, FIELDS * w), torch.float64, ACCURACY)
    rows = grid.rows._replace(weight=grid.rows.weight.abs())  # without the signs that move the image to the middle
    turned = grid.turned._replace(weight=grid.turned.weight.abs())
    weights = torch.ones(len(trajectory), 1, dtype=torch.float64, device=trajectory.device)
    for _ in range(iterations):
        weights = weights / multiply(rows, multiply(turned, weights))
    # On a grid at Nyquist's distance K sees the neighbours too, 18 % of them: the energy of a broad spot sets the scale
    spot = torch.outer(*(torch.exp(-((torch.arange(n).double() - n // 2) / (SPOT * n)).square()) for n in (h, w)))
    sample = gridding(trajectory, (h, w), torch.float64, ACCURACY).forward(spot.to(trajectory.device, DOUBLE)[None])
    energy = (weights[:, 0] * sample[0].abs().square()).sum()
    return weights[:, 0] * (spot.square().sum().to(energy) / energy)
