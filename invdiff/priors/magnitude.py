"""Priors for MR images: in the scanner's units, and for complex images by way of their magnitude."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from invdiff.protocols import Prior

PHASE_NOISE = 0.1  # deviation of the noise left in the low-passed image from which the phase is read, prior units
REACH = 0.125  # widest low pass, as a share of the shorter side: beyond it the phase is one number


class Rescaled:
    """The same prior for images in another unit of intensity: its range times ``scale``, its weights untouched.

    MR intensities have no unit. A prior whose range is [0, 1] serves a scan whose image reaches ``scale`` (a quantile
    of a first reconstruction, ``invdiff.operators.mri.calibration.image_scale``): the result is in the scanner's unit.

    Args:
        prior: with ``info``.
        scale: physical value that is 1 in the prior's own unit, positive.

    Raises:
        ValueError: a prior that states no range, or a scale that is not positive.
    """

    def __init__(self, prior: Prior, scale: float) -> None:
        info = _info_of(prior, "rescaled")
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"the scale is {scale}; a positive number is wanted")
        self.prior, self.scale, self.channels = prior, scale, prior.channels
        self.info = replace(info, low=info.low * scale, high=info.high * scale)

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """As the prior's: prior units do not change."""
        return self.prior.denoise(x, sigma)


class MagnitudePhase:
    """A prior of magnitude images as one of complex images (s 2 h w), real and imaginary part, of smooth phase.

    z is turned by the phase of its own low pass; the real part is denoised by the prior, the imaginary part, in which
    a smooth phase leaves only noise, is shrunk as a Gaussian of ``deviation``; both are turned back. The low pass is
    so wide that the noise in it is small beside the signal, and never narrower than ``width``: it narrows as sigma
    falls, and with it the phase is estimated anew at every call from x alone.

    Units: as the prior's, but for the zero: no signal is 0 here where the prior has -1, so that its ``info`` is the
    range about zero of the same extent (offset 0), and noise levels mean the same.

    Not for images whose phase jumps within ``width`` (fat and water out of phase, vessels with flow): the imaginary
    part there is real signal, and shrinking it loses it; a larger ``deviation`` keeps more.

    Args:
        prior: of magnitude, one channel, with ``info``.
        deviation: of the imaginary part after turning, prior units.
        width: of the narrowest low pass: standard deviation of its Gaussian, pixels.

    Raises:
        ValueError: a prior of other than one channel or without a range, or widths and deviations below 0.
    """

    channels = 2

    def __init__(self, prior: Prior, deviation: float = 0.02, width: float = 5.0) -> None:
        info = _info_of(prior, "applied to magnitudes")
        if prior.channels != 1:
            raise ValueError(f"the prior has {prior.channels} channels; one of magnitude images is wanted")
        if not (deviation >= 0 and width > 0 and math.isfinite(deviation) and math.isfinite(width)):
            raise ValueError(f"deviation {deviation} and width {width}; at least 0 and more than 0 are wanted")
        self.prior, self.deviation, self.width = prior, deviation, width
        half = (info.high - info.low) / 2
        self.zero = -(info.high + info.low) / 2 / half
        self.info = replace(info, low=-half, high=half)

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """E[x_0 | x_sigma = x] under the estimated phase: x (s 2 h w), sigma () or (s).

        Raises:
            ValueError: images of other than two channels.
        """
        if x.ndim != 4 or x.shape[1] != 2:
            raise ValueError(f"the images have shape {tuple(x.shape)}; (s, 2, h, w) is wanted")
        sigmas = sigma.to(x).expand(x.shape[0])
        z = torch.complex(x[:, :1], x[:, 1:])
        turn = self.phasor(x, sigmas)
        turned = z * turn.conj()
        real = self.prior.denoise(turned.real + self.zero, sigmas) - self.zero
        gain = self.deviation**2 / (self.deviation**2 + sigmas.square()).clamp_min(torch.finfo(x.dtype).tiny)
        out = torch.complex(real, gain[:, None, None, None] * turned.imag) * turn
        return torch.cat([out.real, out.imag], 1)

    def phasor(self, x: Tensor, sigma: Tensor) -> Tensor:
        """exp(i phase), complex (s 1 h w), of the low pass of x (s 2 h w) at noise levels sigma (s); 1 at zero."""
        z = torch.complex(x[:, :1], x[:, 1:])
        low = _blurred(z, self._widths(sigma, x.shape[-2:]))
        tiny = torch.finfo(x.dtype).eps
        low = low + tiny  # a pixel without any signal has phase 0, and a gradient
        return low / low.abs().clamp_min(tiny * tiny)

    def _widths(self, sigma: Tensor, shape: torch.Size) -> Tensor:
        """Standard deviations (s) in pixels: white noise sigma is left with sigma / (2 sqrt(pi) width)."""
        most = max(self.width, REACH * min(shape))
        return (sigma / (2 * math.sqrt(math.pi) * PHASE_NOISE)).clamp(self.width, most)


def _blurred(z: Tensor, widths: Tensor) -> Tensor:
    """Complex images (s 1 h w) under Gaussians of ``widths`` (s) pixels, periodic at the edges."""
    axes = [torch.fft.fftfreq(n, device=z.device, dtype=widths.dtype) for n in z.shape[-2:]]
    squared = axes[0][:, None].square() + axes[1].square()
    window = (-2 * (math.pi * widths[:, None, None, None]) ** 2 * squared).exp()
    out: Tensor = torch.fft.ifft2(torch.fft.fft2(z) * window)
    return out


def _info_of(prior: Prior, what: str) -> Any:
    info = getattr(prior, "info", None)
    if info is None:
        raise ValueError(f"{type(prior).__name__} states no range, so it cannot be {what}; one with info is wanted")
    return info
