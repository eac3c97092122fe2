"""DAPS: decoupled annealing posterior sampling (Zhang, Chu, Berner, Meng, Anandkumar & Song, CVPR 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from invdiff.linalg import inner
from invdiff.noise import geometric, karras
from invdiff.protocols import Problem
from invdiff.samplers.checks import at_least, linear
from invdiff.samplers.consistency import gaussian_draw
from invdiff.samplers.moves import check_move, flow
from invdiff.samplers.solver import OneStepState, start

LANGEVIN = 2  # the first draw of noise of the Langevin steps, one each
PROBES = 4  # power iterations for a nonlinear operator's curvature before the first Langevin step
PROBE_SIZE = 1e-3  # of the finite differences, prior units of a pixel


@dataclass(frozen=True)
class DAPS:
    """At each noise level draw x_0 given x_t and y, then add fresh noise of the next level (algorithm 1 of the paper).

    x_0 given x_t is taken for N(x_hat, r^2 I), with x_hat from ``ode_steps`` steps of the probability-flow ODE down
    from x_t. Given y too it is Gaussian for a linear operator, and drawn exactly by perturb and optimise; with
    ``langevin_steps`` it is approached by that many Langevin steps from x_hat, as published, for any operator. Levels
    inherit nothing of each other but x_0.

    With ``ode_steps`` 1, x_hat is E[x_0 | x_t] and, with r^2 = sigma^2 p^2 / (sigma^2 + p^2), p ``prior_deviation``,
    the draw is exact where the prior is iid Gaussian of deviation p: then every step count samples the posterior. For
    any prior, as sigma falls, denoising and drawing together become a Langevin step of the prior of length sigma^2, so
    that a slow anneal ends at the posterior: with 200 steps, on correlated Gaussians, the mean is within 0.26 posterior
    deviations, the spread 2 to 9 % wide. The published 5 ODE steps make x_hat an image instead of a mean, and the
    spread 20 to 50 % wide; published r = sigma (p infinite: 1e6 will do) changes little.

    Not for posteriors of several modes, if their spread matters: at high noise x_0 given x_t is then far from Gaussian
    (up to 40 % too wide where ``SplitGibbs`` is 11 %). What the prior holds for impossible keeps noise of about
    ``sigma_min``. Langevin steps of a length that is stable where the data are sharp hardly move where they are not:
    (r / sigma_y)^2 of them are needed, more than 100 at high noise.

    Args:
        steps: noise levels; each costs ``ode_steps`` denoiser evaluations. Published 200.
        ode_steps: steps of the ODE. Published 5.
        ode_min: its last level above 0. Published 0.01.
        move: of the ODE: ``ddim`` (Euler, as published), ``dpmpp2m`` or ``deis3m``.
        prior_deviation: p, standard deviation of the images about their mean, prior units.
        langevin_steps: 0 draws exactly, for linear operators. Published 100.
        langevin_rate: length of a Langevin step over that of the curvature, 1 / (1 / r^2 + ||J||^2 / sigma_y^2) with
            the greatest ||J|| met, each slice its own; below 2, and small for a right variance. Published steps are 2
            falling to 0.02 in this measure.
        cg_steps: CG steps of the exact draw; 0 is the operator's own ``solve``.
        sigma_floor: smallest sigma_y assumed, prior units with ||A|| = 1.
        sigma_max: first noise level, prior units. Published 100.
        sigma_min: last one. Published 0.1.
    """

    estimate: ClassVar[str] = "approximate sampler"

    steps: int = 200
    ode_steps: int = 1
    ode_min: float = 0.01
    move: str = "ddim"
    prior_deviation: float = 0.5
    langevin_steps: int = 0
    langevin_rate: float = 0.2
    cg_steps: int = 30
    sigma_floor: float = 1e-3
    sigma_max: float = 10.0
    sigma_min: float = 0.01

    def __post_init__(self) -> None:
        check_move(self, self.move)
        at_least(self, steps=1, ode_steps=1, ode_min=1e-6, prior_deviation=1e-6, langevin_steps=0, langevin_rate=0)
        at_least(self, cg_steps=0, sigma_floor=1e-12)
        self.sigma(0)

    @property
    def evaluations(self) -> int:
        """Denoiser evaluations of a whole run, of each slice."""
        return self.steps * self.ode_steps

    def sigma(self, i: int) -> float:
        """Noise level of step i."""
        return karras(self.steps, self.sigma_max, self.sigma_min)[i]

    def init(self, problem: Problem) -> OneStepState:
        """x_t ~ N(0, sigma_max^2 I)."""
        if not self.langevin_steps:
            linear(self, problem)
        return OneStepState(0, *start(problem, self.sigma_max))

    def step(self, problem: Problem, state: OneStepState) -> OneStepState:
        """One level: ODE, draw, fresh noise."""
        i, _, x_t = state
        s, s_next = self.sigma(i), self.sigma(i + 1)
        guess = flow(problem, x_t, geometric(self.ode_steps, s, min(s, self.ode_min)), self.move)
        r = s / (1 + (s / self.prior_deviation) ** 2) ** 0.5
        sigma_y = max(problem.sigma_y, self.sigma_floor)
        if self.langevin_steps:
            x = self._langevin(problem, guess, r, sigma_y, i)
        else:
            x = gaussian_draw(problem, guess, r, sigma_y, i, 0, self.cg_steps)
        fresh = problem.noise(i, x, LANGEVIN + self.langevin_steps)
        return OneStepState(i + 1, x, x + s_next * fresh)

    def _langevin(self, problem: Problem, guess: Tensor, r: float, sigma_y: float, i: int) -> Tensor:
        """Unadjusted Langevin steps on ||A(x) - y||^2 / 2 sigma_y^2 + ||x - guess||^2 / 2 r^2, from ``guess``."""
        A, x = problem.operator, guess
        nonlinear = not hasattr(A, "adjoint")
        curvature, u = torch.ones_like(inner(x, x)), problem.y
        for _ in range(PROBES if nonlinear else 0):
            curvature, u = squared_norm(problem, x, u)
        for k in range(self.langevin_steps):
            size = self.langevin_rate / (1 / r**2 + curvature / sigma_y**2)
            g = (x - guess) / r**2 + A.vjp(x, A.forward(x) - problem.y) / sigma_y**2
            x = x - size * g + (2 * size).sqrt() * problem.noise(i, x, LANGEVIN + k)
            if nonlinear:
                here, u = squared_norm(problem, x, u)
                curvature = torch.maximum(curvature, here)
        return x


def squared_norm(problem: Problem, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """One power iteration on J J^T at x: the estimate of ||J||^2 of each slice, (s 1 1 1), and the next u.

    Args:
        problem: whose nonlinear operator has the derivative J; its product with a vector is a finite difference.
        x: where, (s c h w).
        u: the guess, the shape of y, of any length.
    """
    A, tiny = problem.operator, torch.finfo(x.dtype).tiny
    v = A.vjp(x, u / inner(u, u).sqrt().clamp_min(tiny))
    value = inner(v, v)
    step = PROBE_SIZE * (v[0].numel() / value.clamp_min(tiny)) ** 0.5
    return value, (A.forward(x + step * v) - A.forward(x)) / step.view(-1, *[1] * (u.ndim - 1))
