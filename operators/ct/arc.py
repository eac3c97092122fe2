"""Which arc the views cover, and how much of it each one stands for."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

MISSING_GAP = 2.0  # a largest gap of more than this many times the next one was not measured


class Arc(NamedTuple):
    """Views on a circle of circumference ``period``.

    shares: (v) radians that each view stands for, half of the way to both neighbours; start: where the arc begins;
    length: of the arc, ``period`` if nothing is missing.
    """

    shares: Tensor
    start: float
    length: float
    period: float

    def taper(self, angles: Tensor, width: float) -> Tensor:
        """1 on the arc, falling as cos^2 to 0 over ``width`` at its ends, 0 off it; 1 everywhere on a whole circle."""
        if self.length >= self.period:
            return torch.ones_like(angles)
        place = torch.remainder(angles - self.start, self.period)
        depth = torch.minimum(place, self.length - place).clamp_min(0)
        return torch.sin(math.pi / 2 * (depth / min(width, self.length / 4)).clamp_max(1)) ** 2


def arc_of(angles: Tensor, period: float) -> Arc:
    """The arc of ``angles`` and each one's share of it.

    The largest gap is one that was not measured if it is more than twice as large as the next one; the views on its
    two sides then stand for as much on its side as a view beside that next gap.

    Args:
        angles: (v) in radians, in any order, repeated ones too, float64.
        period: after how many radians the rays come again: pi for parallel beam, 2 pi for fan beam.
    """
    order = torch.remainder(angles, period).sort()
    gaps = torch.cat([order.values.diff(), order.values[:1] + period - order.values[-1:]])  # after each view
    ranked = gaps.sort(descending=True)
    largest, following = int(ranked.indices[0]), float(ranked.values[1]) if gaps.numel() > 1 else 0.0
    start, length = 0.0, period
    if following > 1e-9 * period and float(gaps[largest]) > MISSING_GAP * following:
        start = float(order.values[(largest + 1) % gaps.numel()]) - following / 2
        length = period - float(gaps[largest]) + following
        gaps = gaps.index_fill(0, torch.tensor([largest], device=gaps.device), following)
    shares = torch.empty_like(gaps)
    shares[order.indices] = (gaps + gaps.roll(1)) / 2
    return Arc(shares, start, length, period)
