"""CoPaint: each noisy iterate is optimised until its denoised image fits what is known (Zhang et al., ICML 2023)."""

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
from invdiff.samplers.solver import OneStepState, denoised_with_pullback, start

PUBLISHED_STEPS = 250
RATE_GROWTH, ANCHOR_GROWTH = 1.012, 1.01  # a published step
BACKTRACK, TRIES = 0.8, 10  # factor of a step that was too long, and how often


@dataclass(frozen=True)
class CoPaint:
    """DDIM in which x_t first goes down ||A D(x_t) - y||^2 + c ||x_t - x_t,start||^2 by a few gradient steps.

    The gradient passes through the denoiser; a step that does not lower a slice's loss is shortened by 0.8, up to ten
    times. In the variance-preserving form the published step is ``rate`` and the weight ``anchor``; in VE form they
    are rate (1 + sigma^2)^1/2 and anchor / (1 + sigma^2). Both grow with the steps as published, by 1.012 and 1.01 a
    step of 250. A may be any differentiable operator, through its vjp. Without the published time travel.

    Not for a calibrated posterior: the one-step approximation D of x_0 ignores its spread. Not where memory is short:
    every evaluation is differentiated. What y knows is fitted, not put in: composite it where it must be exact.

    Args:
        steps: levels; each takes 1 + ``descents`` evaluations and more where steps are shortened. Published 250.
        descents: gradient steps a level. Published 2.
        rate: length of the first level's gradient steps, for ||A|| = 1. Published 0.02.
        anchor: weight of the distance to the start. Published 1e-4.
        sigma_max: first noise level, prior units. Published 157.
        sigma_min: last one above 0. Published 0.01.
    """

    estimate: ClassVar[str] = "approximate sampler"

    steps: int = 50
    descents: int = 2
    rate: float = 0.02
    anchor: float = 1e-4
    sigma_max: float = 80.0
    sigma_min: float = 0.01

    def __post_init__(self) -> None:
        at_least(self, steps=1, descents=0, rate=0, anchor=0)
        self.sigma(0)

    def sigma(self, i: int) -> float:
        """Noise level of step i; 0 after the last."""
        return karras(self.steps, self.sigma_max, self.sigma_min)[i]

    def init(self, problem: Problem) -> OneStepState:
        """x_t ~ N(0, sigma_max^2 I)."""
        return OneStepState(0, *start(problem, self.sigma_max))

    def step(self, problem: Problem, state: OneStepState) -> OneStepState:
        """Optimise x_t, then DDIM without fresh noise."""
        i, _, first = state
        s, s_next, passed = self.sigma(i), self.sigma(i + 1), i * PUBLISHED_STEPS / self.steps
        rate = self.rate * RATE_GROWTH**passed * (1 + s**2) ** 0.5 * torch.ones_like(first[:, :1, :1, :1])
        anchor = self.anchor * ANCHOR_GROWTH**passed / (1 + s**2)
        x_t, (D, loss, gradient) = first, _loss(problem, first, first, s, anchor)
        for _ in range(self.descents):
            for _ in range(TRIES):
                moved = x_t - rate * gradient
                new_D, new_loss, new_gradient = _loss(problem, moved, first, s, anchor)
                better = new_loss <= loss
                if bool(better.all()):
                    break
                rate = torch.where(better, rate, BACKTRACK * rate)
            x_t, D = torch.where(better, moved, x_t), torch.where(better, new_D, D)
            loss, gradient = torch.where(better, new_loss, loss), torch.where(better, new_gradient, gradient)
        return OneStepState(i + 1, D, ddim_move(D, x_t, D, s, s_next, 0.0, torch.zeros_like(D)))


def _loss(problem: Problem, x_t: Tensor, first: Tensor, s: float, anchor: float) -> tuple[Tensor, Tensor, Tensor]:
    """D (s c h w), ||A D - y||^2 + anchor ||x_t - first||^2 of each slice (s 1 1 1), and its gradient."""
    D, pullback = denoised_with_pullback(problem, x_t, s)
    r, away = problem.operator.forward(D) - problem.y, x_t - first
    loss = inner(r, r).view(-1, 1, 1, 1) + anchor * inner(away, away).view(-1, 1, 1, 1)
    return D, loss, 2 * pullback(problem.operator.vjp(D, r)) + 2 * anchor * away
