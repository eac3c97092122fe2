"""What measurements that mix the cells say of each: expectation propagation (Minka 2001; Opper & Winther 2005).

A circuit's evidence is of every cell alone, measurements y = B c + n are of sums over many. They are one Gaussian
factor exp(h . c - c H c / 2) with H = B^T W B, h = B^T W y, W the inverse noise covariance. Its independent stand-in,
a Gaussian site for each cell, is found such that two posteriors agree on mean and variance of every cell: the circuit's
with all sites, and the factor's with what the circuit says of each cell besides its site. Two passes in turn, damped.

At a fixed point the cells' means satisfy both exactly where the circuit is Gaussian. Where it makes the cells
independent, or where B mixes nothing, means and variances are exact after one pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from invdiff.circuits.inputs import Spot

ROUNDS = 10
LEAST_OWN = 1e-3  # of what the circuit says of a cell, the share without its site: above 0, as a Gaussian's is
DAMPING = 0.5  # share of the old site that stays, after the first round


class Moments(NamedTuple):
    """mean, variance: of cells, (s v) each."""

    mean: Tensor
    variance: Tensor


def sites_of(
    said: Callable[[Spot], Moments], H: Tensor, h: Tensor, rounds: int = ROUNDS, damping: float = DAMPING
) -> Spot:
    """The evidence (s v) of cells that stands for the factor exp(h . c - c H c / 2).

    Args:
        said: mean and variance (s v) of the cells by the circuit given evidence (s v).
        H: (v v) for all slices, or (s v v); symmetric, positive semidefinite.
        h: (s v).
        rounds: of both passes.
        damping: share of the old site that stays in each round but the first, in [0, 1).

    Raises:
        ValueError: shapes that do not fit, or ``rounds`` below 1.
    """
    if H.shape[-2:] != (h.shape[1], h.shape[1]) or rounds < 1:
        raise ValueError(f"H is {tuple(H.shape)}, h {tuple(h.shape)}, rounds {rounds}; (v v), (s v) and 1 are wanted")
    precision, pull = torch.zeros_like(h), torch.zeros_like(h)
    for number in range(rounds):
        q = said(Spot(pull / precision.clamp_min(torch.finfo(h.dtype).tiny), 1 / precision))
        besides = torch.maximum(1 / q.variance - precision, LEAST_OWN / q.variance)
        middle = (q.mean / q.variance - pull) / besides
        mean, variance = solved(H, h, besides, middle)
        new = (1 / variance - besides).clamp_min(0)
        keep = damping if number else 0.0
        precision = keep * precision + (1 - keep) * new
        pull = keep * pull + (1 - keep) * torch.where(new > 0, mean / variance - besides * middle, 0.0)
    return Spot(pull / torch.where(precision > 0, precision, 1.0), 1 / precision)


def solved(H: Tensor, h: Tensor, precision: Tensor, middle: Tensor) -> Moments:
    """Mean and variance (s v) of independent Gaussians (s v) times the factor, a slice at a time."""
    means, variances = [], []
    for k in range(len(h)):
        whole = (H if H.ndim == 2 else H[k]) + torch.diag(precision[k])
        root = torch.linalg.cholesky(whole)
        inverse = torch.cholesky_inverse(root)
        means.append(inverse @ (h[k] + precision[k] * middle[k]))
        variances.append(inverse.diagonal())
    return Moments(torch.stack(means), torch.stack(variances))
