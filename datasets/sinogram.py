"""What a sinogram tells about itself: its noise, and where the rotation axis is."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MAD_TO_SIGMA = 1.4826  # of normal noise
_SECOND_DIFFERENCE = math.sqrt(6.0)  # standard deviation of n[k-1] - 2 n[k] + n[k+1] for white n of deviation 1


def noise_sigma(sinogram: Tensor) -> float:
    """Standard deviation of the noise, from second differences between neighbouring views.

    The median absolute second difference along the angle, scaled for normal noise: the object changes smoothly from
    view to view, and views are independent, while neighbouring detector pixels share light. Where the noise varies
    (behind dense parts it grows as exp(p / 2)) this is its middle value.

    Args:
        sinogram: (s c angle detector), at least three views.

    Raises:
        ValueError: fewer than three views.
    """
    if sinogram.shape[2] < 3:
        raise ValueError(f"the noise of {sinogram.shape[2]} views cannot be estimated; at least 3 are wanted")
    second = sinogram.double().diff(n=2, dim=2)
    return float((second - second.median()).abs().median()) * _MAD_TO_SIGMA / _SECOND_DIFFERENCE


def rotation_axis(sinogram: Tensor, angles: Tensor) -> float:
    """Where on the detector the rotation axis lies, in pixels from its middle, from opposite parallel views.

    A view and the mirrored view half a turn later agree when mirrored about the axis: the peak of their summed
    correlation, to a part of a pixel by a parabola.

    Args:
        sinogram: (s c angle detector), line integrals of an object that fits on the detector.
        angles: (angle,) in radians, of parallel beams.

    Returns:
        Index of the axis minus that of the detector's middle, (detectors - 1) / 2.

    Raises:
        ValueError: no view has an opposite one within one step of the angles.
    """
    step = float(angles.diff().abs().median())
    turned = torch.remainder(angles[None, :] - angles[:, None], 2 * math.pi) - math.pi
    near, opposite = turned.abs().min(dim=1)
    pairs = torch.nonzero(near <= 1.001 * step)[:, 0]
    if len(pairs) == 0:
        raise ValueError("no two views are opposite, so the rotation axis cannot be found: give its offset")
    n = sinogram.shape[3]
    views = sinogram.double() - sinogram.double().mean(dim=3, keepdim=True)
    a = torch.fft.rfft(views[:, :, pairs], n=2 * n)
    b = torch.fft.rfft(views[:, :, opposite[pairs]].flip(3), n=2 * n)
    correlation = torch.fft.irfft((a.conj() * b).sum(dim=(0, 1, 2)), n=2 * n)
    k = int(correlation.argmax())
    left, peak, right = (float(correlation[(k + d) % (2 * n)]) for d in (-1, 0, 1))
    fraction = 0.5 * (left - right) / (left - 2 * peak + right)
    shift = (k if k < n else k - 2 * n) + fraction
    return -shift / 2
