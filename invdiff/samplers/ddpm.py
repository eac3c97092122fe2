"""DDPM's ancestral sampling (Ho, Jain & Abbeel, NeurIPS 2020) in variance-exploding form."""

from __future__ import annotations

from dataclasses import dataclass

from invdiff.protocols import Problem
from invdiff.samplers.ddim import ddim_move
from invdiff.samplers.solver import OneStep, OneStepState, denoised


@dataclass(frozen=True)
class DDPM(OneStep):
    """Draw x at the next level from q(x' | x, x_0 = D): the chain's own posterior (Ho et al. 2020, eq. 6, 7).

    In VE form (Song et al., ICLR 2021, appendix F): x' = D + (s'/s)^2 (x - D) + s' sqrt(1 - (s'/s)^2) n. It is DDIM
    with the share of fresh noise eta = sqrt(1 - (s'/s)^2) of each step. Fresh noise forgets earlier errors; its own
    error, too small a variance, falls with the first power of the step.

    Not for few steps: below about 100 evaluations a second-order solver without noise is nearer to the prior. Not
    where one start noise must give one image whatever the number of steps.
    """

    steps: int = 250

    def step(self, problem: Problem, state: OneStepState) -> OneStepState:
        """One draw from q(x' | x, D)."""
        i, _, x_t = state
        s, s_next = self.sigma(i), self.sigma(i + 1)
        D = denoised(problem, x_t, s)
        eta = (1 - (s_next / s) ** 2) ** 0.5
        return OneStepState(i + 1, D, ddim_move(D, x_t, D, s, s_next, eta, problem.noise(i, x_t)))
