"""Rays that a scan lacks: in the shadow of metal, or beside a detector that is too narrow."""

from __future__ import annotations

import torch
from torch import Tensor

from invdiff.operators.ct.beam import BeamOperator, check_positive
from invdiff.operators.linear import LinearOperatorBase
from invdiff.operators.mask import check_mask


def metal_shadow(operator: LinearOperatorBase, region: Tensor) -> Tensor:
    """The rays through a region, such as metal, behind which nothing is measured.

    ``Mask(~metal_shadow(operator, region), operator.range.shape) @ operator`` is the scan without them.

    Args:
        operator: line integrals: a projector of no negative weights, such as ``ParallelBeam`` or ``FanBeam``.
        region: bool or 0 and 1: (h w), (s h w) or (s c h w) of its images.

    Returns:
        True where a ray's projection of the region is above 0: bool, of the operator's range.

    Raises:
        ValueError: values other than 0 and 1, another size, or a region without a pixel.
    """
    inside, (shape, dtype) = check_mask(region), operator.domain
    if any(n not in (1, wanted) for n, wanted in zip(inside.shape, shape, strict=True)):
        raise ValueError(f"the region is {tuple(region.shape)}; one that broadcasts to the images' {shape} is wanted")
    if not bool(inside.any()):
        raise ValueError("the region holds no pixel; at least one is wanted")
    return operator.forward(inside.to(dtype).expand(shape).contiguous()) > 0


def within_field(operator: BeamOperator, diameter_mm: float) -> Tensor:
    """The rays through a disc about the rotation axis: all that a narrow detector sees, where the body is wider.

    Args:
        operator: ``ParallelBeam`` or ``FanBeam``, of the whole body.
        diameter_mm: of the scanned field of view.

    Returns:
        True where a ray comes within the disc: bool (view detector).

    Raises:
        ValueError: a diameter that is not positive, or one that no ray comes within.
    """
    check_positive("the field's diameter", diameter_mm)
    rays = operator.rays(operator.angles)
    away = (rays.x * rays.dy - rays.y * rays.dx).abs() / torch.hypot(rays.dx, rays.dy)
    kept = away <= diameter_mm / 2
    if not bool(kept.any()):
        raise ValueError(f"no ray comes within {diameter_mm / 2:g} mm of the axis; a wider field is wanted")
    return kept
