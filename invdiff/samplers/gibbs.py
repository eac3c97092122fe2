"""Split Gibbs sampling with a diffusion prior (PnP-DM: Wu, Sun, Chen, Zhang, Yue & Bouman, NeurIPS 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, NamedTuple

from torch import Tensor

from invdiff.noise import geometric
from invdiff.protocols import Problem
from invdiff.samplers.checks import at_least, linear, within
from invdiff.samplers.consistency import gaussian_draw
from invdiff.samplers.solver import denoised, reverse_diffusion, start

COMPENSATED = 0.5  # rho^2 / sigma_y^2 from which down the likelihood is drawn compensated
ROOT_TERMS = 8  # of the series of (I - t)^1/2: 1e-4 at t = COMPENSATED
DRAWS = 2  # draws of noise that the z step takes


class GibbsState(NamedTuple):
    """i: sweeps done; x: the sample, drawn from the prior given z; z: drawn from the likelihood given x (s c h w)."""

    i: int
    x: Tensor
    z: Tensor


@dataclass(frozen=True)
class SplitGibbs:
    """Alternate z ~ exp(-||A z - y||^2 / 2 sigma_y^2 - ||z - x||^2 / 2 rho^2) and x ~ p(x | x + rho n = z).

    The likelihood step is exact, by perturb and optimise; the prior step is the reverse SDE from noise level rho down,
    in ``prior_steps`` (PnP-DM, algorithm 1; Vono, Dobigeon & Chainais 2019 without the network). rho falls
    geometrically from ``rho_max`` to ``rho_min`` and stays there for the last ``keep`` sweeps. x depends on x before
    only through z: sweeps at one rho are a Markov chain whose limit has the x-marginal p(x) N(y; A x, sigma_y^2 I +
    rho^2 A A^T), the posterior of a likelihood widened by rho.

    That widening is taken out where it can be: for rho^2 <= sigma_y^2 / 2 the z step draws with the covariance
    sigma_y^2 I - rho^2 A A^T in place of sigma_y^2 I, and the x-marginal is the posterior, at finite rho. By Matheron's
    rule that draw needs no solver: z = x + rho^2 / sigma_y^2 A^T (y - A x) + rho (I - rho^2 / sigma_y^2 A^T A)^1/2 n,
    the root by its series (||A|| = 1). So rho falls no further than sigma_y / sqrt 2, which also mixes better.

    What remains: the reverse SDE's steps (Euler-Maruyama has the right mean; with the defaults its variance of
    p(x | z) is 4 % too small along directions much wider than rho, up to a fifth off along those as narrow as rho);
    too few sweeps (at one rho the chain forgets over (posterior deviation / rho)^2 of them, so what is seen is how far
    the anneal lags: half the sweeps make about 1.5 times the error); and the widening, where sigma_y / sqrt 2 is below
    ``rho_min``.

    Not for several sharp modes, between which the anneal chooses too early. Not for non-linear operators. Not for a
    quick look, at 480 evaluations, nor where one image near the posterior mean is wanted: see ``DDS``.

    Args:
        steps: sweeps in all; each costs ``prior_steps`` denoiser evaluations. Published 100.
        keep: of these, sweeps at the lowest rho.
        prior_steps: steps of the reverse SDE a sweep. Published 100 and fewer.
        depth: its last noise level over rho; the last step denoises from there. Smaller wants more steps.
        rho_max: first coupling, prior units. Published 10.
        rho_min: last one, or sigma_y / sqrt 2 where that is greater. Published 0.1 to 0.3.
        cg_steps: CG steps of the likelihood's draw; 0 is the operator's own ``solve``.
        sigma_floor: smallest sigma_y assumed, prior units with ||A|| = 1.
    """

    estimate: ClassVar[str] = "posterior sampler"

    steps: int = 120
    keep: int = 10
    prior_steps: int = 4
    depth: float = 0.2
    rho_max: float = 5.0
    rho_min: float = 0.01
    cg_steps: int = 30
    sigma_floor: float = 1e-3

    def __post_init__(self) -> None:
        at_least(self, steps=1, keep=0, prior_steps=1, cg_steps=0, sigma_floor=1e-12)
        if self.keep >= self.steps:
            raise ValueError(f"SplitGibbs.keep is {self.keep} of {self.steps} steps; fewer than steps is wanted")
        within(self, depth=(1e-6, 1))
        self.sigma(0)

    @property
    def evaluations(self) -> int:
        """Denoiser evaluations of a whole run, of each slice."""
        return self.steps * self.prior_steps

    def sigma(self, i: int) -> float:
        """The coupling rho of sweep i, before sigma_y is asked."""
        anneal = self.steps - self.keep
        return geometric(anneal, self.rho_max, self.rho_min)[min(i, anneal - 1)]

    def init(self, problem: Problem) -> GibbsState:
        """Zero."""
        linear(self, problem)
        zero, _ = start(problem, 0.0)
        return GibbsState(0, zero, zero)

    def step(self, problem: Problem, state: GibbsState) -> GibbsState:
        """One sweep: the likelihood step, then the prior step."""
        i, x, _ = state
        sigma_y = max(problem.sigma_y, self.sigma_floor)
        rho = max(self.sigma(i), COMPENSATED**0.5 * sigma_y)
        if rho**2 <= COMPENSATED * sigma_y**2 * (1 + 1e-9):
            z = compensated_draw(problem, x, rho, sigma_y, i)
        else:
            z = gaussian_draw(problem, x, rho, sigma_y, i, 0, self.cg_steps)
        levels = geometric(self.prior_steps, rho, self.depth * rho)
        x = z
        for k, (s, s_next) in enumerate(pairwise(levels)):
            x = reverse_diffusion(x, denoised(problem, x, s), s, s_next, problem.noise(i, x, DRAWS + k))
        return GibbsState(i + 1, x, z)


def compensated_draw(problem: Problem, x: Tensor, rho: float, sigma_y: float, step: int) -> Tensor:
    """z given x under the likelihood N(y; A z, sigma_y^2 I - rho^2 A A^T), for rho^2 <= sigma_y^2 / 2 and ||A|| = 1."""
    A, share = problem.operator, (rho / sigma_y) ** 2
    power = root = problem.noise(step, x)
    weight = 0.5
    for k in range(1, ROOT_TERMS + 1):  # (1 - t)^1/2 = 1 - t/2 - t^2/8 - ...
        power = share * A.normal(power)
        root = root - weight * power
        weight = weight * (2 * k - 1) / (2 * k + 2)
    return x + share * A.adjoint(problem.y - A.forward(x)) + rho * root
