"""Heun's method of EDM, with and without churn (Karras, Aittala, Aila & Laine, NeurIPS 2022)."""

from __future__ import annotations

from dataclasses import dataclass

from invdiff.protocols import Problem
from invdiff.samplers.checks import at_least
from invdiff.samplers.solver import OneStep, OneStepState, denoised

MOST_CHURN = 2**0.5 - 1  # gamma at most, so that no step adds more noise than there is (algorithm 2)


@dataclass(frozen=True)
class Heun(OneStep):
    """Second-order steps of two evaluations each; algorithm 1 of the paper, algorithm 2 with ``churn`` above 0.

    Churn raises the noise a little with fresh noise before each step, which forgets earlier errors. Published for
    ImageNet at 64 x 64: churn 40 from 0.05 to 50, churn_noise 1.003.

    Not for less than about 20 evaluations: long steps down from noise far above the prior's deviation overshoot, and
    two evaluations are better spent on two steps of a multistep method.

    Args:
        steps: levels of the grid above 0; ``evaluations`` is twice that less 1. Published 18 to 256.
        churn: S_churn, shared over the steps; 0 is deterministic.
        churn_min: S_tmin, smallest noise level with churn, prior units.
        churn_max: S_tmax, greatest, prior units.
        churn_noise: S_noise, deviation of the fresh noise; a little above 1 offsets a network that denoises too much.
    """

    steps: int = 18
    churn: float = 0.0
    churn_min: float = 0.05
    churn_max: float = 50.0
    churn_noise: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, churn=0, churn_min=0, churn_max=self.churn_min, churn_noise=0)

    @property
    def evaluations(self) -> int:
        """Two a step, but one in the last."""
        return 2 * self.steps - 1

    def step(self, problem: Problem, state: OneStepState) -> OneStepState:
        """One step of algorithm 2; with gamma 0, of algorithm 1."""
        i, _, x = state
        s, s_next = self.sigma(i), self.sigma(i + 1)
        gamma = min(self.churn / self.steps, MOST_CHURN) if self.churn_min <= s <= self.churn_max else 0.0
        if gamma:
            raised = s * (1 + gamma)
            x = x + (raised**2 - s**2) ** 0.5 * self.churn_noise * problem.noise(i, x)
            s = raised
        D = denoised(problem, x, s)
        if s_next == 0:
            return OneStepState(i + 1, D, D)
        d = (x - D) / s
        trial = x + (s_next - s) * d
        D = denoised(problem, trial, s_next)
        return OneStepState(i + 1, D, x + (s_next - s) * (d + (trial - D) / s_next) / 2)
