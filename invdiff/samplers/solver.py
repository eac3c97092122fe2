"""What the unconditional solvers share: their fields, the noise grid, the start, the denoiser's call, their states."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from invdiff.noise import noise_levels
from invdiff.protocols import Problem
from invdiff.samplers.checks import at_least, within


class OneStepState(NamedTuple):
    """i: steps done; x: clean estimate of the last step (s c h w); x_t: noisy iterate (s c h w)."""

    i: int
    x: Tensor
    x_t: Tensor


class MultistepState(NamedTuple):
    """i: steps done; x: clean estimate; x_t: noisy iterate (s c h w); past: of earlier steps, newest first (k s c h w).

    What ``past`` holds is the method's affair: the slopes, or the denoised images, that it extrapolates.
    """

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

    estimate: ClassVar[str] = "prior sampler"

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


class OneStep(Solver):
    """A solver that needs nothing of earlier steps but, at most, their last denoised image."""

    def init(self, problem: Problem) -> OneStepState:
        """x_t ~ N(0, sigma_max^2 I)."""
        return OneStepState(0, *start(problem, self.sigma_max))


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
        x, x_t = start(problem, self.sigma_max)
        return MultistepState(0, x, x_t, x.expand(max(1, self.order - 1), *x.shape).clone())


def start(problem: Problem, sigma_max: float) -> tuple[Tensor, Tensor]:
    """x = 0 and x_t ~ N(0, sigma_max^2 I), both (s c h w) of the operator's domain."""
    shape, dtype = problem.operator.domain
    x = torch.zeros(shape, dtype=dtype, device=problem.y.device)
    return x, sigma_max * problem.noise(-1, x)


def denoised(problem: Problem, x_t: Tensor, s: float) -> Tensor:
    """D(x_t, s), (s c h w), with the noise level in the iterate's own precision."""
    return problem.prior.denoise(x_t, torch.tensor(s, dtype=x_t.dtype, device=x_t.device))


def denoised_with_pullback(problem: Problem, x_t: Tensor, s: float) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """D(x_t, s), and v -> J^T v with J its derivative in x_t, by autograd; both (s c h w).

    The network's activations of every slice stay in memory until the pullback is dropped, chunked or not.
    """
    with torch.enable_grad():
        x = x_t.detach().requires_grad_()
        D = denoised(problem, x, s)

    def pullback(v: Tensor) -> Tensor:
        return torch.autograd.grad(D, x, v)[0]

    return D.detach(), pullback


def reverse_diffusion(x_t: Tensor, D: Tensor, s: float, s_next: float, noise: Tensor) -> Tensor:
    """One Euler-Maruyama step of the reverse SDE in sigma^2: the reverse diffusion predictor (Song et al., ICLR 2021).

    Without noise in the step to 0, which gives D. Of p(x_0 | x_t) this keeps the variance along what the noise has not
    hidden, where the ancestral step (``DDPM``), which takes x_0 for D, loses most of it in a few steps.
    """
    gap = s**2 - s_next**2
    x = x_t + gap / s**2 * (D - x_t)
    return x + gap**0.5 * noise if s_next > 0 else x
