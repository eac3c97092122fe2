"""DiffusionMBIR (Chung, Ryu, McCann, Klasky & Ye, CVPR 2023): a 2D prior in the slice, TV across slices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from invdiff.linalg import inner
from invdiff.noise import geometric
from invdiff.protocols import Problem
from invdiff.samplers.checks import at_least, linear
from invdiff.samplers.consistency import admm_sweep, check_coupling
from invdiff.samplers.solver import denoised, reverse_diffusion, start

NORM_SQUARED = 1.0  # ||A||^2: no step of SIRT is longer than 1 over it, or entries of both signs would make it diverge


class MBIRState(NamedTuple):
    """i: steps done; x: clean estimate; x_t: noisy iterate; z, u: split D_z x and its scaled dual (s c h w)."""

    i: int
    x: Tensor
    x_t: Tensor
    z: Tensor
    u: Tensor


@dataclass(frozen=True)
class DiffusionMBIR:
    """Predictor, corrector, then one ADMM sweep with one CG step on the noisy volume (algorithm 2 of the paper).

    z and u are kept from step to step ("variable sharing"). The ends in z are Neumann, not circular as published, and
    the corrector's norms are per slice, so that a slice does not depend on its batch. The corrector is evaluated at
    the level that the predictor reached (published: the level it left; the same in the limit of many steps).
    ``DiffusionMBIR()`` is the published run: 2000 steps, 3999 evaluations a slice; for speed use DDS. With few steps
    the data are seen too seldom, and more CG steps a sweep do not help: they take the noise out of what is measured and
    leave it in the rest, which the prior does not expect (measured: 100 steps fall behind TV, ten CG steps each
    diverge).

    Args:
        steps: predictor steps; each costs two denoiser evaluations (the last one). Published 2000.
        snr: signal-to-noise ratio of the Langevin corrector. Published 0.16.
        rho: ADMM penalty for ||A|| = 1 (published 10 for an operator of squared norm 390). Above about 0.1 the
            highest frequencies in z freeze and the run diverges.
        lam: weight of ||D_z x||_1 for [-1, 1] images and ||A|| = 1; lam / rho is the threshold. Published 2e-4.
        coupling: what of x is sparse across slices: ``tv`` as published, or ``haar``; see ``DDS``.
        final: end with one SIRT step, as published for CT; nowhere longer than 1 / ||A||^2, for entries of both signs.
        sigma_max: first noise level. Published 378.
        sigma_min: last one above 0. Published 0.01.
    """

    estimate: ClassVar[str] = "approximate sampler"

    steps: int = 2000
    snr: float = 0.16
    rho: float = 0.025
    lam: float = 2e-4
    coupling: str = "tv"
    final: bool = True
    sigma_max: float = 378.0
    sigma_min: float = 0.01

    def __post_init__(self) -> None:
        check_coupling(self, self.coupling)
        at_least(self, steps=1, snr=0, rho=1e-12, lam=0)
        geometric(self.steps, self.sigma_max, self.sigma_min)

    def sigma(self, i: int) -> float:
        """Noise level of step i."""
        return geometric(self.steps, self.sigma_max, self.sigma_min)[i]

    def init(self, problem: Problem) -> MBIRState:
        """x_t ~ N(0, sigma_max^2 I); z and u zero."""
        linear(self, problem)
        zero, x_t = start(problem, self.sigma_max)
        return MBIRState(0, zero, x_t, zero, zero)

    def step(self, problem: Problem, state: MBIRState) -> MBIRState:
        """One predictor-corrector step and one ADMM sweep."""
        i, _, x, z, u = state
        s, s_next = self.sigma(i), self.sigma(i + 1)
        clean = denoised(problem, x, s)
        x = reverse_diffusion(x, clean, s, s_next, problem.noise(i, x))
        if s_next > 0:
            x, clean = self._correct(problem, x, s_next, i)
        how: Any = {"rho": self.rho, "lam": self.lam, "coupling": self.coupling}
        x, z, u = admm_sweep(problem, x, z, u, mu=0.0, cg_steps=1, **how)
        last = i + 1 == self.steps
        if last and self.final:
            A = problem.operator
            weights = A.normal(torch.ones_like(x)).clamp_min(NORM_SQUARED)
            x = x + A.adjoint(problem.y - A.forward(x)) / weights
        return MBIRState(i + 1, x if last else clean, x, z, u)

    def _correct(self, problem: Problem, x: Tensor, s: float, i: int) -> tuple[Tensor, Tensor]:
        """One Langevin step with the step size of its signal-to-noise ratio, per slice; also the denoised image."""
        clean = denoised(problem, x, s)
        score = (clean - x) / s**2
        n = problem.noise(i, x, draw=1)
        ratio = (inner(n, n) / inner(score, score).clamp_min(torch.finfo(x.dtype).tiny)).sqrt()
        size = 2 * (self.snr * ratio).square()
        return x + size * score + (2 * size).sqrt() * n, clean
