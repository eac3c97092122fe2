"""Sinograms completed by a circuit over their cells: missing rays become soft measurements."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from invdiff.circuits.evidence import of_pixels
from invdiff.circuits.images import ImageCircuit


class Completed(NamedTuple):
    """y: line integrals (s 1 view detector); sd: of their error besides the noise, 0 measured, infinite not known."""

    y: Tensor
    sd: Tensor


def completed(circuit: ImageCircuit, y: Tensor, keep: Tensor) -> Completed:
    """The exact posterior of the cells of a sinogram given the measured rays, as measurements of the missing ones.

    A cell's error is shared by its rays, which samplers take for independent: the variance of each of n missing rays is
    n times the cell's and that of a ray round it, so that together they count as what is known of the cell.

    Args:
        circuit: over cells of ``block`` views x ``block`` rays, of line integrals from ``info.low`` to ``info.high``.
        y: (s 1 view detector), of the geometry that the circuit was trained on; where missing any finite value.
        keep: where it was measured, bool, broadcasts to y.

    Returns:
        The sinogram and its standard deviations: ``Whitened(A, 1 / (sd^2 + sigma^2)^1/2)`` takes them.
    """
    info, (views, detectors) = circuit.info, y.shape[2:]
    half, middle = (info.high - info.low) / 2, (info.high + info.low) / 2
    measured = keep.expand(y.shape)
    x = torch.where(measured, (y - middle) / half, 0.0)
    said = circuit.posterior(of_pixels(info, x, measured))
    missing = info.pooled(x, ~measured).number.view_as(said.mean).clamp_min(1)
    variance = missing * said.variance + info.within**2
    flat = variance.repeat_interleave(info.block, 1).repeat_interleave(info.block, 2)[:, None]
    covered = info.put(torch.ones_like(flat), views, detectors) > 0
    sd = torch.where(covered, half * info.put(flat, views, detectors).sqrt(), math.inf)
    filled = middle + half * info.spread(said.mean, views, detectors)
    return Completed(torch.where(measured, y, torch.where(covered, filled, 0.0)), torch.where(measured, 0.0, sd))


def weights_of(found: Completed, sigma: Tensor) -> Tensor:
    """One over each ray's standard deviation: of the noise, and of what the circuit does not know.

    Args:
        found: of ``completed``.
        sigma: of the noise, broadcasts to y, above 0.
    """
    return 1 / (found.sd.square() + sigma.square()).sqrt()
