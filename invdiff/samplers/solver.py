"""What the unconditional solvers share: their fields, the noise grid, the start, the denoiser's call, their states."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from invdiff.noise import noise_levels
from invdiff.protocols import Problem
from invdiff.samplers.checks import at_least, within


class OneStepState(NamedTuple):
    """i: steps done; x: denoised image of the last step (s c h w); x_t: noisy iterate (s c h w)."""

    i: int
    x: Tensor
    x_t: Tensor


class MultistepState(NamedTuple):
    """i: steps done; x: denoised image; x_t: noisy iterate (s c h w); past: slopes, newest first (k s c h w)."""

    i: int
    x: Tensor
    x_t: Tensor
    past: Tensor


@dataclass(frozen=True)
class Solver(ABC):
    """Base of the solvers of the probability-flow ODE (or its SDE), dx/dsigma = (x - D(x, sigma)) / sigma.

    They ignore the measurements: they sample whatever the prior denoises to. From N(0, sigma_max^2 I) they go down the
    grid to ``sigma_min``; the last step, to 0, is the denoiser itself: x = D(x_t, sigma_min), with every solver.

    Args:
        steps: levels of the grid above 0.
        sigma_max: first noise level, prior units; far above the prior's own deviation, within what it was trained at.
        sigma_min: last one above 0, prior units.
        grid: spacing of the levels between: ``karras`` (EDM's, power 7) or ``geometric`` (uniform in ln sigma).
    """

    steps: int = 50
    sigma_max: float = 80.0
    sigma_min: float = 0.01
    grid: str = "karras"

    def __post_init__(self) -> None:
        at_least(self, steps=1)
        self.sigma(0)

    @property
    def evaluations(self) -> int:
        """Denoiser evaluations of a whole run, of each slice."""
        return self.steps

    def sigma(self, i: int) -> float:
        """Noise level of step i; 0 after the last."""
        return noise_levels(self.grid, self.steps, self.sigma_max, self.sigma_min)[i]

    @abstractmethod
    def init(self, problem: Problem) -> Any:
        """The state before the first step."""

    @abstractmethod
    def step(self, problem: Problem, state: Any) -> Any:
        """The state after one more step."""

    def start(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """x = 0 and x_t ~ N(0, sigma_max^2 I), both (s c h w) of the operator's domain."""
        shape, dtype = problem.operator.domain
        x = torch.zeros(shape, dtype=dtype, device=problem.y.device)
        return x, self.sigma_max * problem.noise(-1, x)


class OneStep(Solver):
    """A solver that needs nothing of earlier steps but, at most, their last denoised image."""

    def init(self, problem: Problem) -> OneStepState:
        """x_t ~ N(0, sigma_max^2 I)."""
        return OneStepState(0, *self.start(problem))


@dataclass(frozen=True)
class Multistep(Solver):
    """A solver that extrapolates the slopes of ``order`` steps, the present one among them.

    Args:
        order: 1 to 4.
    """

    order: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        within(self, order=(1, 4))

    def init(self, problem: Problem) -> MultistepState:
        """x_t ~ N(0, sigma_max^2 I); no slopes yet, zeros in their place."""
        x, x_t = self.start(problem)
        return MultistepState(0, x, x_t, x.expand(max(1, self.order - 1), *x.shape).clone())


def denoised(problem: Problem, x_t: Tensor, s: float) -> Tensor:
    """D(x_t, s), (s c h w), with the noise level in the iterate's own precision."""
    return problem.prior.denoise(x_t, torch.tensor(s, dtype=x_t.dtype, device=x_t.device))
