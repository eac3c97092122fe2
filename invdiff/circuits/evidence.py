"""Independent Gaussian evidence of a grid's cells, and its product: what is known of an image, from whatever source."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from invdiff.circuits.images import GridInfo
from invdiff.circuits.inputs import Spot


def product(*evidence: Spot) -> Spot:
    """All of it together: precisions add, values are weighed by them; where any is exact, it counts alone.

    Args:
        evidence: at least one, (s v) each.
    """
    precisions = [1 / e.variance for e in evidence]  # infinity of none
    total = torch.stack(precisions).sum(0)
    exact = torch.isinf(total)
    weights = [torch.where(exact, torch.isinf(p).to(p), p) for p in precisions]
    weight = torch.stack(weights).sum(0)
    value = torch.stack([w * e.value for w, e in zip(weights, evidence, strict=True)]).sum(0)
    return Spot(value / torch.where(weight > 0, weight, 1.0), 1 / total)


def tempered(evidence: Spot, strength: float) -> Spot:
    """Its power: of variance / strength, so that 0 is no evidence and infinity a known value.

    Args:
        evidence: (s v).
        strength: 0 or more, infinity too.

    Raises:
        ValueError: it is negative or NaN.
    """
    if not strength >= 0:
        raise ValueError(f"the strength of evidence is {strength}; 0 (none) to inf (a known value) is wanted")
    if strength == 0:
        return nothing(evidence.value)
    return Spot(evidence.value, torch.where(torch.isinf(evidence.variance), math.inf, evidence.variance / strength))


def nothing(like: Tensor) -> Spot:
    """No evidence of cells (s v)."""
    return Spot(torch.zeros_like(like), torch.full_like(like, math.inf))


def of_pixels(info: GridInfo, known: Tensor, mask: Tensor) -> Spot:
    """Of the pixels of a cell that are known: their mean, which all of them would differ from.

    The variance is within^2 (1 / n - 1 / N) of n known pixels of N, and that of a level.

    Args:
        info: of the grid.
        known: pixels (s 1 h w) in prior units, finite where they are not known.
        mask: where they are known, bool (s 1 h w).
    """
    every, seen = info.pooled(known).number, info.pooled(torch.where(mask, known, 0.0), mask)
    variance = info.width**2 / 12 + info.within**2 * (1 / seen.number - 1 / every).clamp_min(0)
    return Spot(seen.mean, variance.masked_fill(seen.number == 0, math.inf))


def of_example(info: GridInfo, example: Tensor, region: Tensor, strength: float = 1.0) -> Spot:
    """That a region is to be like an example: with strength 1 as if its pixels were known to be the example's.

    Args:
        info: of the grid.
        example: pixels (s 1 h w) in prior units.
        region: where it counts, bool (s 1 h w).
        strength: see ``tempered``.

    Raises:
        ValueError: another shape, a region without a pixel of the grid, or a negative strength.
    """
    if region.shape != example.shape:
        raise ValueError(f"the region is {tuple(region.shape)}, the example {tuple(example.shape)}; one is wanted")
    found = of_pixels(info, example, region)
    if not bool(torch.isfinite(found.variance).any()):
        raise ValueError("the example's region holds no pixel of the circuit's grid; at least one is wanted")
    return tempered(found, strength)


def of_noisy(info: GridInfo, x: Tensor, sigma: Tensor) -> Spot:
    """Of x = x_0 + sigma n: a cell's mean over N pixels has noise sigma / N^1/2.

    Args:
        info: of the grid.
        x: noisy images (s 1 h w), prior units.
        sigma: noise levels (s).
    """
    noisy = info.pooled(x)
    return Spot(noisy.mean, sigma[:, None].square() / noisy.number)
