"""Filtered backprojection for parallel beam and flat-detector fan beam (Kak & Slaney 1988, chapter 3)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from invdiff.operators.ct.beam import CHUNK_ENTRIES, BeamOperator

Window = Literal["ram-lak", "hann"]


def fbp(operator: BeamOperator, y: Tensor, window: Window = "ram-lak") -> Tensor:
    """Filtered backprojection.

    Any set of angles: each view counts for the arc that it stands for. Less than a half turn is summed over the
    measured arc alone; a fan-beam ray that is measured from both ends counts once.

    Args:
        operator: ``ParallelBeam`` or ``FanBeam``.
        y: (s c view detector), line integrals.
        window: "hann" damps high frequencies, "ram-lak" leaves them.

    Returns:
        (s c h w) in 1/mm, on the device of ``y``.

    Raises:
        ValueError: an unknown window, or ``y`` of another shape or dtype.
    """
    shape, dtype = operator.range
    if tuple(y.shape) != shape or y.dtype != dtype:
        raise ValueError(f"y is {tuple(y.shape)} {y.dtype}; {shape} {dtype} is wanted")
    weighted = y * operator.ray_shares().to(y)
    return backproject(operator, ramp(weighted, operator.spacing_at_origin, window))


def ramp(y: Tensor, spacing: float, window: Window = "ram-lak") -> Tensor:
    """The ramp filter |f| along the last axis, sampled in space so that constants are right (Kak & Slaney eq. 61).

    Args:
        y: (... detector).
        spacing: of the detector elements at the rotation centre, in mm.
        window: "ram-lak" or "hann".

    Raises:
        ValueError: an unknown window.
    """
    if window not in ("ram-lak", "hann"):
        raise ValueError(f"window is {window!r}; 'ram-lak' or 'hann' is wanted")
    count = y.shape[-1]
    size = 2 ** (2 * count - 1).bit_length()  # no wrap-round
    place = torch.arange(size, dtype=torch.float64)
    place = torch.minimum(place, size - place)
    kernel = torch.where(place % 2 == 1, -1 / (torch.pi * place.clamp_min(1) * spacing) ** 2, 0.0)
    kernel[0] = 1 / (4 * spacing**2)
    response = torch.fft.rfft(kernel).real * spacing
    if window == "hann":
        response = response * (1 + torch.cos(torch.pi * torch.linspace(0, 1, size // 2 + 1, dtype=torch.float64))) / 2
    filtered: Tensor = torch.fft.irfft(torch.fft.rfft(y, n=size) * response.to(y), n=size)
    return filtered[..., :count]


def backproject(operator: BeamOperator, q: Tensor) -> Tensor:
    """Sum over views of the filtered line at each pixel, linearly interpolated: pixel-driven, not the adjoint.

    Args:
        operator: gives where each pixel falls on the detector, and its weight.
        q: (s c view detector), 0 beyond the detector.

    Returns:
        (s c h w).
    """
    s, c, h, w = operator.domain.shape
    lines = q.permute(2, 3, 0, 1).reshape(-1, q.shape[3], s * c)  # (view detector s·c)
    views = max(1, CHUNK_ENTRIES // (2 * h * w))
    total = q.new_zeros(h * w, s * c)
    for angles, part in zip(operator.angles.split(views), lines.split(views), strict=True):
        place, weight = operator.locate(angles, q.device)  # (h·w v)
        lower = place.floor()
        both = torch.stack([lower, lower + 1], -1)
        share = torch.stack([1 - (place - lower), place - lower], -1) * weight[..., None]
        inside = (both >= 0) & (both < operator.detectors)
        row = torch.arange(angles.numel(), device=q.device)[:, None] * operator.detectors
        index = both.clamp(0, operator.detectors - 1).to(torch.int64) + row
        total = total + torch.nn.functional.embedding_bag(
            index.flatten(1),
            part.flatten(0, 1).contiguous(),
            mode="sum",
            per_sample_weights=torch.where(inside, share, 0.0).to(q.dtype).flatten(1),
        )
    return total.t().reshape(s, c, h, w)
