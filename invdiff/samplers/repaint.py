"""RePaint: the known is noised and put in at every level, and the level is gone through again (Lugmayr et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from invdiff.noise import karras
from invdiff.protocols import Problem
from invdiff.samplers.checks import at_least, linear
from invdiff.samplers.consistency import nearest
from invdiff.samplers.ddim import ddim_move
from invdiff.samplers.solver import OneStepState, denoised, start


@dataclass(frozen=True)
class RePaint:
    """Ancestral steps in which what y determines comes from noised data, with resampling (algorithm 1 of the paper).

    At each level the unknown part is drawn by DDPM's step and the known one as y + sigma' n; the two do not yet know
    of each other, so that the image is noised again by ``jump`` levels and goes down them anew, ``repeats`` times in
    all. The first ``jump`` levels are gone through once, as published. For a mask the known part is the mask's; for
    another linear operator it is the component of its range, x + A^+ (y + sigma' A n - A x), with sigma_y^2 / sigma'^2
    in the pseudo-inverse where y is noisy.

    Not for a calibrated posterior, which it nears only with many repeats. Not for few evaluations: see ``DDS``, or
    ``DDNM`` with eta 0, which is DDIM with the known pixels put in. Not for non-linear operators.

    Args:
        levels: of the noise grid above 0. Published 250.
        jump: levels that each resampling goes back. Published 10.
        repeats: how often each is gone through; 1 is no resampling. Published 10, which takes 2410 evaluations.
        cg_steps: CG steps of the pseudo-inverse; one is enough for a mask.
        sigma_max: first noise level, prior units. Published 157.
        sigma_min: last one above 0. Published 0.01.
    """

    estimate: ClassVar[str] = "approximate sampler"

    levels: int = 50
    jump: int = 5
    repeats: int = 3
    cg_steps: int = 10
    sigma_max: float = 80.0
    sigma_min: float = 0.01

    def __post_init__(self) -> None:
        at_least(self, levels=1, jump=1, repeats=1, cg_steps=1)
        karras(self.levels, self.sigma_max, self.sigma_min)

    @cached_property
    def path(self) -> tuple[int, ...]:
        """The level before each step, and behind the last one ``levels``."""
        first = self.levels - self.jump * ((self.levels - 1) // self.jump)  # whole blocks end at 0
        path = list(range(first))
        for a in range(first, self.levels, self.jump):
            path += [*range(a, a + self.jump)] * self.repeats
        return (*path, self.levels)

    @property
    def steps(self) -> int:
        """Denoiser evaluations."""
        return len(self.path) - 1

    def sigma(self, i: int) -> float:
        """Noise level of step i; 0 after the last."""
        return karras(self.levels, self.sigma_max, self.sigma_min)[self.path[i]]

    def init(self, problem: Problem) -> OneStepState:
        """x_t ~ N(0, sigma_max^2 I)."""
        linear(self, problem)
        return OneStepState(0, *start(problem, self.sigma_max))

    def step(self, problem: Problem, state: OneStepState) -> OneStepState:
        """One level down with the known put in, and where the path says so up again."""
        i, _, x_t = state
        A, grid = problem.operator, karras(self.levels, self.sigma_max, self.sigma_min)
        s, s_next = grid[self.path[i]], grid[self.path[i] + 1]
        D = denoised(problem, x_t, s)
        eta = (1 - (s_next / s) ** 2) ** 0.5
        unknown = ddim_move(D, x_t, D, s, s_next, eta, problem.noise(i, x_t))
        y = problem.y + s_next * A.forward(problem.noise(i, x_t, draw=1))
        mu = (problem.sigma_y / (s_next or s)) ** 2
        x_t = nearest(A, y, unknown, mu, self.cg_steps)
        x = x_t if s_next == 0 else nearest(A, problem.y, D, mu, self.cg_steps)
        again = self.sigma(i + 1)
        if again > s_next:
            x_t = x_t + (again**2 - s_next**2) ** 0.5 * problem.noise(i, x_t, draw=2)
        return OneStepState(i + 1, x, x_t)
