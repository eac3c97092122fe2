"""What a CT scan says of the cells of a circuit's grid, as independent evidence."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from invdiff.circuits.images import GridInfo, ImageCircuit
from invdiff.circuits.inputs import Spot
from invdiff.circuits.measured import Moments, sites_of
from invdiff.config import find
from invdiff.datasets import Measurements
from invdiff.operators.ct.beam import BeamOperator
from invdiff.pipelines.budget import built, with_axes
from invdiff.problem import prior_to_operator
from invdiff.protocols import Prior
from invdiff.units import MU_WATER

MOST_VIEWS = 180  # of which evidence is made, evenly over all: what is smaller than a cell outweighs the noise
AT_ONCE = 64  # cells projected at once
LEAST_NOISE = 1e-3  # of a line integral: no model of a scanner is exact


@dataclass(frozen=True)
class Rays:
    """Means over as many rays as a cell is wide: r = B c + n in prior units.

    Args:
        matrix: B, (m v).
        values: r, (s m).
        variance: of n, infinite where a ray was not measured: (s m).
    """

    matrix: Tensor
    values: Tensor
    variance: Tensor


def evidence_of(scan: Measurements, circuit: ImageCircuit, prior: Prior) -> Spot:
    """Evidence of the cells (s v), prior units, such that with it the circuit's posterior is that given the scan.

    The rays' noise has a part of what is smaller than a cell: as if all pixels of a cell were off its mean together, by
    ``within``. See ``invdiff.circuits.measured``.

    Args:
        scan: CT, parallel or fan beam.
        circuit: over the cells of its images.
        prior: whose units they are.

    Raises:
        ValueError: another kind of scan, or images that the grid does not cover.
    """
    rays = rays_of(scan, circuit.info, prior)
    weights = 1 / rays.variance
    b = rays.matrix
    H = torch.stack([b.T @ (w[:, None] * b) for w in weights])
    h = (weights * torch.where(torch.isinf(rays.variance), 0.0, rays.values)) @ b

    def said(evidence: Spot) -> Moments:
        found = circuit.posterior(evidence)
        return Moments(found.mean.flatten(1), found.variance.flatten(1))

    return sites_of(said, H, h)


def rays_of(scan: Measurements, info: GridInfo, prior: Prior) -> Rays:
    """The scan's rays, averaged.

    Raises:
        ValueError: as ``evidence_of``.
    """
    check_covered(scan, info)
    views = len(scan.fields["angles"])
    chosen = torch.linspace(0, views - 1, min(views, MOST_VIEWS)).round().long()
    shape = tuple(scan.fields["shape"])
    fields = {**scan.fields, "angles": tuple(scan.fields["angles"][int(k)] for k in chosen)}
    one = built(scan.kind, {**fields, "shape": (1, *shape[1:])})
    affine = prior_to_operator(prior, one, scan.mu_water or MU_WATER)[1]
    plain = torch.ones(one.domain.shape)
    y = scan.y[:, :, chosen] - affine.offset * one.forward(plain)
    variance = _noise(scan, chosen).expand(y.shape)
    matrix = affine.scale * _blocks(scan.kind, {**fields, "shape": (AT_ONCE, *shape[1:])}, info)
    detail = info.within**2 * matrix.square().sum(1)
    count = info.block
    return Rays(matrix, _binned(y, count), _binned(variance, count) / count + detail)


def check_covered(scan: Measurements, info: GridInfo) -> None:
    """Refuse a scan that is not CT, or images beyond the grid.

    Raises:
        ValueError: with what came.
    """
    if not issubclass(find("operators", scan.kind), BeamOperator):
        raise ValueError(f"a scan of kind {scan.kind!r} cannot be steered; parallel- or fan-beam CT is wanted")
    h, w = tuple(scan.fields["shape"])[2:]
    if h > info.rows * info.block or w > info.columns * info.block:
        size = f"{info.rows * info.block} x {info.columns * info.block}"
        raise ValueError(f"the images are {h} x {w}, the grid of circuit {info.name!r} {size}; no more is wanted")


def _noise(scan: Measurements, chosen: Tensor) -> Tensor:
    """Variance of each ray of some views, infinite where none was measured; broadcasts over them."""
    if scan.sqrt_w is None:
        found = torch.full((1, 1, 1, 1), float(scan.sigma_y or 0.0) ** 2)
    else:
        found = with_axes(scan.sqrt_w, 4)
        found = 1 / (found if found.shape[2] == 1 else found[:, :, chosen]).square()
    if scan.keep is not None:
        keep = with_axes(scan.keep, 4)
        found = torch.where(keep if keep.shape[2] == 1 else keep[:, :, chosen], found, math.inf)
    return found + LEAST_NOISE**2


def _blocks(kind: str, fields: dict[str, Any], info: GridInfo) -> Tensor:
    """B of cells that are 1 in all their pixels, by the projector itself: (m v)."""
    operator = built(kind, fields)
    h, w = tuple(fields["shape"])[2:]
    cells = torch.eye(info.rows * info.columns).view(-1, 1, info.rows, info.columns)
    columns = []
    for part in cells.split(AT_ONCE):
        image = info.put(part.repeat_interleave(info.block, 2).repeat_interleave(info.block, 3), h, w)
        full = torch.cat([image, image.new_zeros(AT_ONCE - len(image), *image.shape[1:])])
        columns.append(_binned(operator.forward(full), info.block)[: len(part)])
    return torch.cat(columns).T.contiguous()


def _binned(v: Tensor, count: int) -> Tensor:
    """Means of ``count`` neighbouring elements of the detector, those of its middle: (s c view detector) -> (s m)."""
    bins = v.shape[-1] // count
    first = (v.shape[-1] - bins * count) // 2
    return v[..., first : first + bins * count].unflatten(-1, (bins, count)).mean(-1).flatten(1)
