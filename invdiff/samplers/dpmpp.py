"""DPM-Solver++(2M) (Lu, Zhou, Bao, Chen, Li & Zhu, 2022): a two-step method on the denoised image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from invdiff.protocols import Problem
from invdiff.samplers.checks import within
from invdiff.samplers.solver import OneStep, OneStepState, denoised


def extrapolated_image(D: Tensor, before: Tensor | None, levels: Sequence[float]) -> Tensor:
    """D_bar of algorithm 2: D extrapolated linearly in ln sigma to the middle of the next step.

    Args:
        D: denoised image at the present level, (s c h w).
        before: that of the level before; None, or a next level of 0, leaves D as it is.
        levels: next, present and, with ``before``, the level before.
    """
    if before is None or levels[0] == 0:
        return D
    s_next, s, s_before = levels
    r = math.log(s_before / s) / math.log(s / s_next)
    return D + (D - before) / (2 * r)


@dataclass(frozen=True)
class DPMpp2M(OneStep):
    """Exponential integrator in lambda = -ln sigma, with D extrapolated linearly from the step before (algorithm 2).

    With alpha = 1 and h = lambda' - lambda: x' = (s'/s) x - (e^-h - 1) D_bar, D_bar = (1 + 1/2r) D - 1/2r D_before,
    r = h_before / h. Second order; the first step and the last, to 0, are first order: DDIM. Since D stays within the
    prior's range, large steps do not overshoot as extrapolations of the noise do: a good choice for few evaluations.

    Not for noise in the process (see ``DDPM``, ``Heun`` with churn), nor beyond about 100 evaluations, where a
    third-order method (``DEIS``) ends nearer.

    Args:
        steps: denoiser evaluations. Published 10 to 25.
        grid: uniform in lambda by default, where the method's polynomial lives; nearer than ``karras`` on exact priors.
        order: 2, or 1, which is DDIM.
    """

    steps: int = 20
    grid: str = "geometric"
    order: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        within(self, order=(1, 2))

    def step(self, problem: Problem, state: OneStepState) -> OneStepState:
        """One step of algorithm 2; the state's x is the step before's D."""
        i, before, x_t = state
        s, s_next = self.sigma(i), self.sigma(i + 1)
        D = denoised(problem, x_t, s)
        second = self.order == 2 and i > 0
        levels = [s_next, s, self.sigma(i - 1)] if second else [s_next, s]
        D_bar = extrapolated_image(D, before if second else None, levels)
        return OneStepState(i + 1, D, s_next / s * x_t + (1 - s_next / s) * D_bar)
