"""ASTRA (extra ``[astra]``, GPL-3): the same geometries, as an independent check and for FBP on a GPU."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from invdiff.operators.ct.arc import arc_of
from invdiff.operators.ct.beam import FULL_TURN, BeamOperator
from invdiff.operators.ct.fan import FanBeam

EVEN = 1e-3  # largest relative deviation of a view's share from the mean: ASTRA's FBP gives all views the same


def astra_geometries(operator: BeamOperator, vectors: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
    """ASTRA's 2D volume and projection geometry of ``operator``: the conventions are the same, lengths in mm.

    Args:
        operator: ``ParallelBeam`` or ``FanBeam``.
        vectors: the ``_vec`` form, which alone can shift the detector.

    Raises:
        ValueError: a shifted detector without ``vectors``.
    """
    import astra

    h, w = operator.domain.shape[2:]
    x, y = w * operator.pixel_mm / 2, h * operator.pixel_mm / 2
    volume = astra.create_vol_geom(h, w, -x, x, -y, y)
    angles = operator.angles.cpu().numpy()
    count, width, fan = operator.detectors, operator.detector_mm, isinstance(operator, FanBeam)
    if vectors:
        rows = _vectors(operator).cpu().numpy()
        return volume, astra.create_proj_geom("fanflat_vec" if fan else "parallel_vec", count, rows)
    if operator.detector_offset_mm != 0:
        raise ValueError(f"detector_offset_mm is {operator.detector_offset_mm}; ASTRA needs vectors=True for it")
    if not isinstance(operator, FanBeam):
        return volume, astra.create_proj_geom("parallel", width, count, angles)
    behind = operator.source_detector_mm - operator.source_origin_mm
    return volume, astra.create_proj_geom("fanflat", width, count, angles, operator.source_origin_mm, behind)


def astra_fbp(operator: BeamOperator, y: Tensor) -> Tensor:
    """Ram-Lak filtered backprojection by ASTRA, slice by slice on the tensors themselves, without a copy.

    On a GPU behind ``astra.use_cuda()`` parallel and fan beam; on a CPU parallel beam alone. Views must be spread
    evenly over a half or full turn (parallel) or a full turn (fan), which ASTRA's weights take for granted.

    Args:
        operator: without detector offset, float32.
        y: (s c view detector).

    Returns:
        (s c h w), on the device of ``y``.

    Raises:
        ValueError: a geometry that ASTRA's FBP does not serve, or a GPU tensor where ASTRA has no GPU.
    """
    import astra

    fan = isinstance(operator, FanBeam)
    _check(operator, y, fan)
    if y.is_cuda and not astra.use_cuda():
        raise ValueError(f"y is on {y.device} and ASTRA sees no GPU; a CPU tensor or a CUDA driver is wanted")
    if y.is_cuda:
        torch.cuda.current_stream(y.device).synchronize()  # ASTRA works on a stream of its own
    volume, projection = astra_geometries(operator)
    projector = astra.create_projector("cuda" if y.is_cuda else "linear", projection, volume)
    lines = y.detach().contiguous()
    result = torch.zeros(operator.domain.shape, dtype=y.dtype, device=y.device)
    try:
        for i in range(y.shape[0]):
            for j in range(y.shape[1]):
                _one(astra, projector, (projection, lines[i, j]), (volume, result[i, j]))
    finally:
        astra.projector.delete(projector)
    return result


def _one(
    astra: Any, projector: int, lines: tuple[dict[str, Any], Tensor], image: tuple[dict[str, Any], Tensor]
) -> None:
    source = astra.data2d.link("-sino", *lines)
    target = astra.data2d.link("-vol", *image)
    config = astra.astra_dict("FBP_CUDA" if image[1].is_cuda else "FBP")
    config.update(ProjectorId=projector, ProjectionDataId=source, ReconstructionDataId=target)
    config["option"] = {"FilterType": "Ram-Lak"}
    algorithm = astra.algorithm.create(config)
    try:
        astra.algorithm.run(algorithm)
    finally:
        astra.algorithm.delete(algorithm)
        astra.data2d.delete([source, target])


def _check(operator: BeamOperator, y: Tensor, fan: bool) -> None:
    if tuple(y.shape) != operator.range.shape or y.dtype != torch.float32 or operator.range.dtype != torch.float32:
        raise ValueError(f"y is {tuple(y.shape)} {y.dtype}; {operator.range.shape} float32 is wanted")
    arc = arc_of(operator.angles, FULL_TURN)
    half = arc_of(operator.angles, math.pi)
    turn = arc if fan or arc.length == arc.period else half
    uneven = float((turn.shares / turn.shares.mean() - 1).abs().max())
    if turn.length < turn.period or uneven > EVEN:
        wanted = "a full turn" if fan else "a half or full turn"
        raise ValueError(f"the views are not spread evenly over {wanted} (off by {uneven:.2g}); use invdiff's own fbp")
    if fan and not y.is_cuda:
        raise ValueError("ASTRA's fan-beam FBP needs a GPU and y is on the CPU; use invdiff's own fbp")


def _vectors(operator: BeamOperator) -> Tensor:
    """ASTRA's six numbers a view: ray (parallel) or source (fan), the detector's middle, one element's step."""
    sin, cos = operator.angles.sin(), operator.angles.cos()
    x, y = operator.detector_offset_mm * cos, operator.detector_offset_mm * sin
    first = (sin, -cos)
    if isinstance(operator, FanBeam):
        behind = operator.source_detector_mm - operator.source_origin_mm
        x, y = x - behind * sin, y + behind * cos
        first = (operator.source_origin_mm * sin, -operator.source_origin_mm * cos)
    return torch.stack([*first, x, y, operator.detector_mm * cos, operator.detector_mm * sin], -1)
