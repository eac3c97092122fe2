"""Joseph's line integrals (Joseph, IEEE TMI 1982) as sparse rows.

A ray crosses the image row by row, or column by column if it is closer to horizontal. On each it takes the linear
interpolation between the two nearest pixel centres, times the length of ray from one row (column) to the next.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from invdiff.operators.sparse import Rows, pointer


class Rays(NamedTuple):
    """Straight lines, float64, all of one shape; world axes as in ``invdiff.operators.ct``.

    x, y: a point of the ray in mm; dx, dy: its direction, of any length but 0.
    """

    x: Tensor
    y: Tensor
    dx: Tensor
    dy: Tensor


def footprints(rays: Rays, size: tuple[int, int], pixel_mm: float, dtype: torch.dtype) -> Rows:
    """The rows of A for ``rays``: weights in mm.

    Args:
        rays: any number, flattened in order.
        size: (h, w) of the image, whose middle is the origin.
        pixel_mm: side of a square pixel.
        dtype: of the weights; positions are computed in float64.
    """
    (h, w), device = size, rays.x.device
    x, y, dx, dy = (v.flatten()[:, None] for v in rays)
    steep = dy.abs() >= dx.abs()  # one sample on each image row
    column, row = x / pixel_mm + (w - 1) / 2, (h - 1) / 2 - y / pixel_mm
    slope = torch.where(steep, -dx / dy, -dy / dx)  # pixels across for each pixel along
    start = torch.where(steep, column - slope * row, row - slope * column)
    along = torch.arange(max(h, w), device=device)
    across = start + slope * along
    lower = across.floor()
    fraction = across - lower
    weight = (
        torch.stack([1 - fraction, fraction], -1) * (pixel_mm * torch.hypot(slope, torch.ones_like(slope)))[..., None]
    )
    place = torch.stack([lower, lower + 1], -1).to(torch.int32)
    count, width = torch.where(steep, h, w), torch.where(steep, w, h)
    inside = (weight > 0) & (place >= 0) & (place < width[..., None]) & (along < count)[..., None]
    along32 = along.to(torch.int32)[:, None]
    index = torch.where(steep[..., None], along32 * w + place, place * w + along32)
    lengths = inside.flatten(1).sum(1)
    return Rows(index[inside], pointer(lengths), weight[inside].to(dtype))
