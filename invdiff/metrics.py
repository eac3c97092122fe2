"""PSNR, SSIM, NMSE and HU error over whole volumes in physical units.

Definitions are fastMRI's (Zbontar et al. 2018): one PSNR and NMSE a volume, SSIM a slice with a 7 x 7 uniform window,
then averaged. The data range is stated: for HU 2000 after clipping both to [-1000, 1000], else the truth's maximum.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

HU_WINDOW = (-1000.0, 1000.0)  # HU, both volumes are clipped to it
PLANES = {"axial": 0, "coronal": 1, "sagittal": 2}  # the axis of a (s h w) volume that counts the plane's slices
SSIM_WINDOW = 7  # pixels


class Comparison(NamedTuple):
    """How near a volume is to the truth.

    psnr: dB, of the volume. nmse: of the volume. psnr_planes, ssim_planes: mean over the slices of each plane (None
    where a slice is smaller than the SSIM window). rmse, bias: in the
    unit; HU below air (-1000) count as air. data_range: as stated.
    """

    psnr: float
    ssim: float
    nmse: float
    rmse: float
    bias: float
    data_range: float
    unit: str
    psnr_planes: dict[str, float]
    ssim_planes: dict[str, float | None]


def psnr(image: NDArray[np.floating], truth: NDArray[np.floating], data_range: float) -> float:
    """10 log10(range^2 / mean squared error), dB; infinite for equal arrays."""
    error = float(np.mean((image - truth) ** 2))
    return float("inf") if error == 0 else 10 * float(np.log10(data_range**2 / error))


def ssim(image: NDArray[np.floating], truth: NDArray[np.floating], data_range: float) -> float | None:
    """Mean structural similarity of two images (h w), Wang et al. 2004; None if smaller than the window."""
    from skimage.metrics import structural_similarity

    if min(image.shape) < SSIM_WINDOW:
        return None
    return float(structural_similarity(truth, image, win_size=SSIM_WINDOW, data_range=data_range))


def nmse(image: NDArray[np.floating], truth: NDArray[np.floating]) -> float:
    """||image - truth||^2 / ||truth||^2."""
    return float(np.sum((image - truth) ** 2) / np.sum(truth**2))


class FastMRIMetrics(NamedTuple):
    """nmse: of the volume. psnr: dB, of the volume, its range the target's maximum. ssim: mean over the slices."""

    nmse: float
    psnr: float
    ssim: float


def fastmri_metrics(target: Tensor, estimate: Tensor) -> FastMRIMetrics:
    """The figures of the fastMRI challenge (Zbontar et al. 2018, section 6), of a volume of magnitudes.

    Args:
        target: (s 1 h w) or (s h w), the published reconstruction, cropped as published.
        estimate: the same shape.

    Raises:
        ValueError: other shapes, complex values, slices smaller than the SSIM window, a target whose maximum is not
            positive.
    """
    if target.shape != estimate.shape or target.ndim not in (3, 4) or (target.ndim == 4 and target.shape[1] != 1):
        shapes = f"{tuple(target.shape)} and {tuple(estimate.shape)}"
        raise ValueError(f"target and estimate are {shapes}; the same (s 1 h w) or (s h w) is wanted")
    if target.is_complex() or estimate.is_complex():
        raise ValueError("target or estimate is complex; magnitudes are wanted")
    a, b = (v.detach().double().cpu().reshape(-1, *v.shape[-2:]).numpy() for v in (estimate, target))
    if min(b.shape[1:]) < SSIM_WINDOW:
        raise ValueError(
            f"slices of {b.shape[1]} x {b.shape[2]} pixels; SSIM wants at least {SSIM_WINDOW} x {SSIM_WINDOW}"
        )
    data_range = float(b.max())
    if not 0 < data_range < np.inf:
        raise ValueError(f"the target's maximum is {data_range}; a positive one is wanted")
    values = [ssim(x, y, data_range) for x, y in zip(a, b, strict=True)]
    return FastMRIMetrics(nmse(a, b), psnr(a, b, data_range), float(np.mean(np.array(values, dtype=float))))


def compare(image: Tensor, truth: Tensor, unit: str) -> Comparison:
    """Compare two volumes (s 1 h w) in physical units.

    Args:
        image: the reconstruction.
        truth: the reference, same shape.
        unit: ``HU``, or anything else for magnitude images.

    Raises:
        ValueError: shapes differ, more than one channel, or a truth that is zero throughout.
    """
    if image.shape != truth.shape:
        raise ValueError(f"the shapes are {tuple(image.shape)} and {tuple(truth.shape)}; equal ones are wanted")
    if image.ndim != 4 or image.shape[1] != 1:
        raise ValueError(f"the volumes have shape {tuple(image.shape)}; (s, 1, h, w) is wanted")
    a, b = (v[:, 0].double().cpu().numpy() for v in (image, truth))
    raw = a - b
    if unit == "HU":
        raw = a.clip(HU_WINDOW[0]) - b.clip(
            HU_WINDOW[0]
        )  # nothing is less dense than air: below is a scanner's padding
        a, b, data_range = a.clip(*HU_WINDOW), b.clip(*HU_WINDOW), HU_WINDOW[1] - HU_WINDOW[0]
        shifted = (a - HU_WINDOW[0], b - HU_WINDOW[0])  # NMSE counts from air, or its value would depend on HU's zero
    else:
        data_range, shifted = float(b.max()), (a, b)
    if not np.any(shifted[1]):
        raise ValueError("the truth is empty (zero, or air throughout); nothing can be compared with it")
    psnrs: dict[str, float] = {}
    ssims: dict[str, float | None] = {}
    for plane, axis in PLANES.items():
        pairs = list(zip(np.moveaxis(a, axis, 0), np.moveaxis(b, axis, 0), strict=True))
        finite = [p for p in (psnr(x, y, data_range) for x, y in pairs) if np.isfinite(p)]
        psnrs[plane] = float(np.mean(finite)) if finite else float("inf")
        values = [ssim(x, y, data_range) for x, y in pairs]
        ssims[plane] = None if None in values else float(np.mean(np.array(values, dtype=float)))
    return Comparison(
        psnr(a, b, data_range),
        float(ssims["axial"] or np.nan),
        nmse(*shifted),
        float(np.sqrt(np.mean(raw**2))),
        float(np.mean(raw)),
        data_range,
        unit,
        psnrs,
        ssims,
    )
