"""Density compensation: how much of k-space each sample of a trajectory stands for."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from invdiff.operators.mri.nufft import gridding
from invdiff.operators.sparse import multiply

ACCURACY = 1e-2  # of the kernel: its width, about 3 cells of k-space, is as far as a sample can stand for


def density_compensation(trajectory: Tensor, size: Sequence[int], iterations: int = 30) -> Tensor:
    """Weights w for which gridding of w is flat, by w <- w / (K w) from 1 (Pipe & Menon, MRM 1999, eq. 9).

    K is the kernel convolved with itself, from sample to sample. A weight is the area that its sample stands for in
    cells of 1/h by 1/w: 1 for every sample of the full Cartesian grid, so that F^H w F keeps the scale of an image.
    No sample stands for more than about the kernel's width, so gaps are not filled in.

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
    grid = gridding(trajectory, (h, w), torch.float64, ACCURACY)
    rows = grid.rows._replace(weight=grid.rows.weight.abs())  # without the signs that move the image to the middle
    turned = grid.turned._replace(weight=grid.turned.weight.abs())
    weights = torch.ones(len(trajectory), 1, dtype=torch.float64, device=trajectory.device)
    for _ in range(iterations):
        weights = weights / multiply(rows, multiply(turned, weights))
    middle = float(grid.scale[h // 2, w // 2])  # one over the kernel's area in grid points, and over sqrt(h w)
    return weights[:, 0] / (math.prod(grid.fine) * middle**2)
