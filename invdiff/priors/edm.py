"""EDM preconditioning: a raw network F to a denoiser D (Karras et al., NeurIPS 2022, eq. 7 and table 1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from invdiff.priors.parameterisation import denoise, unbounded


def edm_denoise(network: nn.Module, x: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
    """D(x, sigma) = c_skip x + c_out F(c_in x, ln(sigma) / 4).

    Args:
        network: F, called with (s c h w) and the noise label (s).
        x: noisy image (s c h w), prior units.
        sigma: noise level, () or (s).
        sigma_data: the data's standard deviation that the network was trained with.

    Returns:
        The denoised image (s c h w), float32.
    """
    return denoise(network, unbounded(sigma_data), x, sigma)


def edm_loss(denoised: Tensor, clean: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
    """The EDM loss of each image, mean over pixels, (s): unit weight for F at every sigma (table 1)."""
    weight = (sigma.square() + sigma_data**2) / (sigma * sigma_data).square()
    return weight * (denoised - clean).square().mean(dim=(1, 2, 3))


def draw_sigma(u: Tensor, n: Tensor, center: float, width: float, low: float, high: float, uniform: float) -> Tensor:
    """Training noise levels: log-normal, but for a share ``uniform`` that is log-uniform over [low, high].

    The log-uniform share teaches the far ends of the stated range, where samplers start and stop.

    Args:
        u: uniform draws in [0, 1), (s).
        n: normal draws, (s).
        center: mean of ln sigma.
        width: standard deviation of ln sigma.
        low: smallest sigma.
        high: largest sigma.
        uniform: share of log-uniform draws.
    """
    lognormal = (center + width * n).exp()
    ends = torch.tensor([low, high], dtype=u.dtype).log()
    loguniform = (ends[0] + (ends[1] - ends[0]) * u / max(uniform, 1e-12)).exp()
    return torch.where(u < uniform, loguniform, lognormal).clamp(low, high)
