"""DPS: diffusion posterior sampling (Chung, Kim, McCann, Klasky & Ye, ICLR 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from invdiff.linalg import inner
from invdiff.noise import karras
from invdiff.protocols import Problem
from invdiff.samplers.checks import at_least
from invdiff.samplers.ddim import ddim_move
from invdiff.samplers.discrepancy import measurements
from invdiff.samplers.solver import OneStepState, denoised_with_pullback, start

PUBLISHED_STEPS = 1000
PUBLISHED_SIZE = 3 * 256 * 256  # numbers in an image of the paper


@dataclass(frozen=True)
class DPS:
    """A step of the prior alone, then one down the gradient of ||y - A(D(x_t))|| in x_t (algorithm 1 of the paper).

    The norm is that of each slice and not squared, as in the published code, so that a step's length does not depend
    on the misfit's. The gradient passes through the denoiser; A may be any differentiable operator, through its vjp.
    In VE form the published step of ``scale`` becomes scale sqrt((1 + sigma^2) (1 + sigma'^2)). Its length is that of
    a whole image, so it moves a pixel the less the more of them there are, and it is made once a step; here it is
    multiplied by the root of the number of pixels over the paper's, and by the paper's number of steps over ours:
    scale means the same at every size and step count. And no slice goes further than where its misfit would be that of
    the noise alone to first order, (||r|| - sigma_y M^1/2) / ||gradient||^2 (discrepancy principle): steps of a fixed
    length shake where the data are sharp, or diverge. Without a ``scale`` it goes just there.

    Not for a calibrated posterior: what the data weigh is that step, not what they are worth at each noise level. Not
    for linear operators, where ``PiGDM`` and ``SplitGibbs`` know what y is worth, and where gradient steps are slow if
    A^T A is as badly conditioned as in CT. Not where memory is short: each step differentiates the network, all slices
    at once.

    Args:
        steps: denoiser evaluations, each with its derivative. Published 1000.
        scale: length of the guidance, for ||A|| = 1; None: as far as the noise allows. Published 0.3 (super-
            resolution, blur), 0.5 (inpainting), 1 (phase retrieval), with denoised images clipped to [-1, 1].
        ancestral: DDPM's noise, as published; else DDIM without noise.
        sigma_max: first noise level, prior units. Published 157.
        sigma_min: last one above 0. Published 0.01.
    """

    estimate: ClassVar[str] = "approximate sampler"

    steps: int = 250
    scale: float | None = None
    ancestral: bool = True
    sigma_max: float = 80.0
    sigma_min: float = 0.01

    def __post_init__(self) -> None:
        at_least(self, steps=1)
        if self.scale is not None:
            at_least(self, scale=0)
        self.sigma(0)

    def sigma(self, i: int) -> float:
        """Noise level of step i."""
        return karras(self.steps, self.sigma_max, self.sigma_min)[i]

    def init(self, problem: Problem) -> OneStepState:
        """x_t ~ N(0, sigma_max^2 I)."""
        return OneStepState(0, *start(problem, self.sigma_max))

    def step(self, problem: Problem, state: OneStepState) -> OneStepState:
        """One step of algorithm 1; the last, to 0, is the denoised image with its guidance."""
        i, _, x_t = state
        s, s_next = self.sigma(i), self.sigma(i + 1)
        D, misfit, gradient = misfit_gradient(problem, x_t, s)
        eta = (1 - (s_next / s) ** 2) ** 0.5 if self.ancestral else 0.0
        moved = ddim_move(D, x_t, D, s, s_next, eta, problem.noise(i, x_t))
        length = (misfit - noise_norm(problem, D)).clamp_min(0)
        length = length / inner(gradient, gradient).clamp_min(torch.finfo(D.dtype).tiny)
        if self.scale is not None:
            published = self.scale * PUBLISHED_STEPS / self.steps * (D[0].numel() / PUBLISHED_SIZE) ** 0.5
            length = length.clamp_max(published * ((1 + s**2) * (1 + s_next**2)) ** 0.5)
        x_t = moved - length * gradient
        return OneStepState(i + 1, D if s_next > 0 else x_t, x_t)


def noise_norm(problem: Problem, like: Tensor) -> Tensor:
    """What ||A x - y|| of the true x is of each slice, (s 1 1 1)."""
    count, idle = measurements(problem)
    return (count * problem.sigma_y**2 + idle).sqrt().view(-1, *[1] * (like.ndim - 1))


def misfit_gradient(problem: Problem, x_t: Tensor, s: float) -> tuple[Tensor, Tensor, Tensor]:
    """D(x_t, s), each slice's ||A(D) - y|| (s 1 1 1), and its gradient in x_t; D and gradient (s c h w)."""
    A = problem.operator
    D, pullback = denoised_with_pullback(problem, x_t, s)
    r = A.forward(D) - problem.y
    size = inner(r, r).sqrt()
    gradient = pullback(A.vjp(D, r / size.clamp_min(torch.finfo(D.dtype).tiny)))
    return D, size.view(-1, *[1] * (D.ndim - 1)), gradient
