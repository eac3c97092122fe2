"""The log density of a prior at a noise level, from its denoiser alone.

p_sigma solves the heat equation, so at a fixed x (Tweedie: score = (D - x) / sigma^2, n pixels)

    d ln p / d ln sigma = div D - n + |D - x|^2 / sigma^2,

which is integrated from a level so high that p is a Gaussian round the prior's mean.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from invdiff.protocols import Prior

HIGHEST = 100.0  # noise level, prior units, at which a prior of [-1, 1] images looks like a point


def log_density(prior: Prior, x: Tensor, sigma: Tensor, levels: int = 16, probes: int = 1) -> Tensor:
    """ln p(x; sigma) of each slice, (s): the prior's own ``log_density`` where it has one, else the integral.

    Args:
        prior: any Prior; differentiable in x.
        x: noisy images (s c h w), prior units.
        sigma: noise level, () or (s), below 100.
        levels: Gauss-Legendre nodes in ln sigma; one evaluation and one gradient a node.
        probes: random sign vectors of Hutchinson's estimate of div D; the same for every slice, prior and call.

    Returns:
        ln p, without a gradient where it is integrated.
    """
    own = getattr(prior, "log_density", None)
    if own is not None:
        known: Tensor = own(x, sigma)
        return known
    x = x.detach()
    low = sigma.detach().to(x).expand(x.shape[0]).log()
    half = (math.log(HIGHEST) - low) / 2
    result = _at_the_top(prior, x)
    for node, weight in zip(*np.polynomial.legendre.leggauss(levels), strict=True):
        level = (low + half * (1 + float(node))).exp()
        result = result - float(weight) * half * _slope(prior, x, level, probes)
    return result


def _at_the_top(prior: Prior, x: Tensor) -> Tensor:
    """ln N(x; D(x), HIGHEST^2 I)."""
    with torch.no_grad():
        mean = prior.denoise(x, torch.tensor(HIGHEST, device=x.device))
    n = x[0].numel()
    square = (x - mean).square().sum(dim=(1, 2, 3))
    return -n / 2 * math.log(2 * math.pi * HIGHEST**2) - square / (2 * HIGHEST**2)


def _slope(prior: Prior, x: Tensor, level: Tensor, probes: int) -> Tensor:
    """d ln p / d ln sigma at a level a slice, (s)."""
    divergence = torch.zeros(x.shape[0], device=x.device)
    with torch.enable_grad():
        leaf = x.clone().requires_grad_()
        denoised = prior.denoise(leaf, level)
        for k in range(probes):
            generator = torch.Generator().manual_seed(k)
            signs = (2.0 * torch.randint(2, x.shape[1:], generator=generator) - 1).to(x)
            (gradient,) = torch.autograd.grad((denoised * signs).sum(), leaf, retain_graph=k + 1 < probes)
            divergence = divergence + (gradient * signs).sum(dim=(1, 2, 3)) / probes
    square = (denoised.detach() - x).square().sum(dim=(1, 2, 3))
    return divergence - x[0].numel() + square / level.square()
