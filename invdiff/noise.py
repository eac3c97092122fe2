"""Noise: sigma grids (n + 1 values, the last 0) and keyed normal noise."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class KeyedNoise:
    """Standard normal noise keyed by (seed, step, draw, absolute slice).

    Chunk size, resume point and the choice of slices do not change a slice's noise. Drawn on the CPU, so that it is
    the same on every device.

    Args:
        seed: any integer; 0 is a seed.
        first: absolute number of the first slice.
    """

    seed: int = 0
    first: int = 0

    def __call__(self, step: int, like: Tensor, draw: int = 0) -> Tensor:
        """N(0, I) of the shape, dtype and device of ``like`` (s ...); complex has variance 1/2 a component."""
        slices = [
            torch.randn(like.shape[1:], dtype=like.dtype, generator=self._generator(step, draw, self.first + k))
            for k in range(like.shape[0])
        ]
        return torch.stack(slices).to(like.device)

    def uniform(self, step: int, draw: int = 0) -> float:
        """One number in [0, 1) for all slices, keyed by (seed, step, draw)."""
        return float(torch.rand((), dtype=torch.float64, generator=self._generator(step, draw, -1)))

    def _generator(self, step: int, draw: int, index: int) -> torch.Generator:
        key = hashlib.blake2b(f"{self.seed}/{step}/{draw}/{index}".encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(key, "big") >> 1)


def karras(steps: int, high: float, low: float, power: float = 7.0) -> list[float]:
    """EDM's grid from ``high`` to ``low`` and then 0 (Karras et al. 2022, eq. 5): steps + 1 values."""
    _check(steps, high, low)
    if steps == 1:
        return [high, 0.0]
    a, b = high ** (1 / power), low ** (1 / power)
    return [(a + i / (steps - 1) * (b - a)) ** power for i in range(steps)] + [0.0]


def geometric(steps: int, high: float, low: float) -> list[float]:
    """Levels in constant ratio from ``high`` to ``low`` and then 0: steps + 1 values."""
    _check(steps, high, low)
    if steps == 1:
        return [high, 0.0]
    return [high * (low / high) ** (i / (steps - 1)) for i in range(steps)] + [0.0]


GRIDS: dict[str, Callable[[int, float, float], list[float]]] = {"karras": karras, "geometric": geometric}


def noise_levels(grid: str, steps: int, high: float, low: float) -> list[float]:
    """The levels of the grid of that name: steps + 1 values, the last 0.

    Raises:
        ValueError: no such grid, or levels that are none.
    """
    if grid not in GRIDS:
        raise ValueError(f"no noise grid {grid!r}; one of {', '.join(GRIDS)} is wanted")
    return GRIDS[grid](steps, high, low)


def _check(steps: int, high: float, low: float) -> None:
    if steps < 1:
        raise ValueError(f"steps is {steps}; at least 1 is wanted")
    if not 0 < low <= high or (steps > 1 and low == high):
        raise ValueError(f"noise levels from {high} to {low}: 0 < low < high is wanted")
