"""RED-Diff (Mardani, Song, Kautz & Vahdat, ICLR 2024): a variational point estimate, sampling as optimisation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from invdiff.linalg import cg, couples, difference, difference_adjoint, plus_roughness
from invdiff.noise import KeyedNoise, geometric
from invdiff.protocols import Problem
from invdiff.samplers.checks import at_least, first_guess, linear
from invdiff.samplers.discrepancy import believed_variance, first_rule, next_rule, weight_of

WEIGHTS: dict[str, Callable[[float], float]] = {
    "linear": lambda s: s,
    "sqrt": math.sqrt,
    "square": lambda s: s**2,
    "log": math.log1p,
    "trunc_linear": lambda s: min(s, 1.0),
    "power2over3": lambda s: s ** (2 / 3),
    "const": lambda _: 1.0,
}
ORDERS = ("descending", "ascending", "random", "mini-batch")
ADAM_EPSILON = 1e-8  # of Adam, as published
SLICES = 0


class REDDiffState(NamedTuple):
    """i: steps done; x: the estimate mu (s c h w); m, v: Adam's moments; rule: see ``discrepancy``."""

    i: int
    x: Tensor
    m: Tensor
    v: Tensor
    rule: Tensor


@dataclass(frozen=True)
class REDDiff:
    """Minimise ||A x - y||^2 / 2 + sigma^2 lam E_t[ w(t) / sigma_t <sg(x - D(x + sigma_t n, sigma_t)), x> ] by Adam.

    Sums, not means, and the noise's own weight (eq. 7 and proposition 2 of the paper, times sigma_y^2): lam means the
    same at every image size and number of views. With ``weight`` linear the regulariser's gradient is
    lam (x - D): every noise level weighs the same in the image domain. A point estimate, not a posterior sample.

    Args:
        steps: denoiser evaluations (times ``draws``). Published 1000, with Adam.
        rate: damping of the Newton step, at most 1; with Adam its first learning rate in prior units, published 0.1.
        final_rate: last rate over the first; the decay is geometric. Published 1. A small one averages the noise out.
        lam: weight of the prior: about one over the squared error, in prior units, that its denoiser makes at the
            noise levels that matter; None finds it, for each slice, by the discrepancy rule (see
            ``invdiff.samplers.discrepancy``). Published 0.25, for losses that are means and noise that is not weighed.
        weight: how the noise level weighs: linear, sqrt, square, log, trunc_linear, power2over3, const.
        order: of the noise levels: ``descending``, the published choice, ``ascending``, ``random`` (one a step) or
            ``mini-batch`` (each of a step's ``draws`` at one of its own, spread over the range). Published as worse.
        draws: noise draws a step, averaged.
        newton_steps: 0 is Adam, as published, for any operator. Else each step is a damped Newton step of the same
            loss, its system solved by this many CG steps, for linear operators: the same fixed point, in tens of
            steps where Adam needs thousands because A^T A is as badly conditioned as in CT.
        sigma_floor: smallest sigma_y assumed, prior units with ||A|| = 1, so that noiseless data leave the prior a say.
        z_lam: weight of a Huber-smoothed TV across slices, times sigma^2 too; 0 leaves slices uncoupled.
        z_width: jump between slices at which that TV becomes linear, prior units.
        beta1: Adam's decay of the mean. Published 0.9.
        beta2: Adam's decay of the square. Published 0.99.
        sigma_max: largest noise level, prior units. Published 157, where the denoised image is nearly constant.
        sigma_min: smallest. Published 0.01.
    """

    estimate: ClassVar[str] = "point estimate"

    steps: int = 50
    rate: float = 0.7
    final_rate: float = 0.5
    lam: float | None = None
    weight: str = "linear"
    order: str = "descending"
    draws: int = 1
    newton_steps: int = 40
    sigma_floor: float = 1e-3
    z_lam: float = 0.0
    z_width: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    sigma_max: float = 3.0
    sigma_min: float = 0.03

    def __post_init__(self) -> None:
        at_least(self, steps=1, rate=0, final_rate=0, draws=1, newton_steps=0)
        if self.lam is not None:
            at_least(self, lam=0)
        at_least(self, sigma_floor=0, z_lam=0, z_width=1e-12)
        if self.weight not in WEIGHTS:
            raise ValueError(f"REDDiff.weight is {self.weight!r}; one of {', '.join(WEIGHTS)} is wanted")
        if self.order not in ORDERS:
            raise ValueError(f"REDDiff.order is {self.order!r}; one of {', '.join(ORDERS)} is wanted")
        geometric(self.steps, self.sigma_max, self.sigma_min)

    def sigma(self, i: int) -> float:
        """Noise level of step i in descending order."""
        return geometric(self.steps, self.sigma_max, self.sigma_min)[i]

    def init(self, problem: Problem) -> REDDiffState:
        """mu = A^+ y (FBP for CT), as published."""
        x = first_guess(problem)
        rule = first_rule(problem, believed_variance(problem, self.sigma_floor), self.lam)
        return REDDiffState(0, x, torch.zeros_like(x), torch.zeros_like(x), rule)

    def step(self, problem: Problem, state: REDDiffState) -> REDDiffState:
        """One Adam step on the loss above (algorithm 1 of the paper)."""
        i, x, m, v, rule = state
        g = problem.operator.vjp(x, problem.operator.forward(x) - problem.y)
        variance, weight, D = believed_variance(problem, self.sigma_floor), x.new_zeros(()), torch.zeros_like(x)
        for draw in range(self.draws):
            s = self._level(problem, i, draw)
            denoised = problem.prior.denoise(x + s * problem.noise(i, x, draw), torch.tensor(s, device=x.device))
            share = weight_of(rule, x) * WEIGHTS[self.weight](s) / s / self.draws
            g, weight, D = g + share * (x - denoised), weight + share, D + denoised / self.draws
        if self.z_lam:
            d = difference(x, SLICES) / self.z_width
            g = g + variance * self.z_lam * difference_adjoint(d.clamp(-1, 1), SLICES)
        size = self.rate * self.final_rate ** (i / max(1, self.steps - 1))
        if self.newton_steps:
            down = self._newton(problem, g, weight)
            rule = next_rule(rule, problem, x - down, D, variance)
            return REDDiffState(i + 1, x - size * down, m, v, rule)
        rule = next_rule(rule, problem, x, D, variance)
        m = self.beta1 * m + (1 - self.beta1) * g
        v = self.beta2 * v + (1 - self.beta2) * g.square()
        unbiased = m / (1 - self.beta1 ** (i + 1)) / ((v / (1 - self.beta2 ** (i + 1))).sqrt() + ADAM_EPSILON)
        return REDDiffState(i + 1, x - size * unbiased, m, v, rule)

    def _newton(self, problem: Problem, g: Tensor, weight: Tensor) -> Tensor:
        """(A^T A + weight + z-term)^-1 g by CG: the loss's curvature with the denoiser held fixed."""
        A = linear(self, problem)
        curvature = believed_variance(problem, self.sigma_floor) * self.z_lam / self.z_width

        def normal(v: Tensor) -> Tensor:
            out = torch.addcmul(A.normal(v), weight, v)
            return plus_roughness(out, v, curvature, SLICES) if curvature else out

        return cg(normal, g, None, self.newton_steps, joint=bool(curvature) or couples(A))

    def _level(self, problem: Problem, i: int, draw: int) -> float:
        """The noise level of one draw; random ones are log-uniform, a mini-batch's stratified."""
        if self.order in ("descending", "ascending"):
            return self.sigma(i if self.order == "descending" else self.steps - 1 - i)
        noise = problem.noise
        if not isinstance(noise, KeyedNoise):
            raise ValueError(
                f"REDDiff.order {self.order} needs KeyedNoise; {type(noise).__name__} has no uniform draws"
            )
        u = noise.uniform(i) if self.order == "random" else (draw + noise.uniform(i, draw)) / self.draws
        return self.sigma_max * (self.sigma_min / self.sigma_max) ** u
