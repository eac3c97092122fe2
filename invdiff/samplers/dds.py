"""DDS: decomposed diffusion sampling (Chung, Lee & Ye, ICLR 2024), the fast successor of DiffusionMBIR."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from invdiff.noise import karras
from invdiff.protocols import Problem
from invdiff.samplers.checks import at_least, first_guess, linear, within
from invdiff.samplers.consistency import admm_sweep, check_coupling, nearest
from invdiff.samplers.discrepancy import believed_variance, first_rule, next_rule, weight_of
from invdiff.samplers.moves import advance, check_move, levels_of, no_past
from invdiff.samplers.solver import denoised, start


class DDSState(NamedTuple):
    """i: steps done; x: consistent image; x_t: noisy iterate; z, u: split D_z x and its scaled dual (s c h w).

    past: what the move keeps of earlier steps (k s c h w), k 0 for ``ddim``; rule: see ``discrepancy``.
    """

    i: int
    x: Tensor
    x_t: Tensor
    z: Tensor
    u: Tensor
    past: Tensor
    rule: Tensor


@dataclass(frozen=True)
class DDS:
    """Denoise, make consistent by a few CG steps (one ADMM sweep with a z-TV), add noise again (DDS, algorithms 1, 3).

    The consistency minimises ||A x - y||^2 / 2 + rho/2 ||D_z x - z + u||^2 + mu/2 ||x - D||^2 by ``cg_steps`` steps
    from D = denoise(x_t), with mu = anchor * sigma_y^2 (the paper's proximal step for noisy data, gamma = 1 / mu):
    noisy data weigh what they are worth. Without an ``anchor`` each slice's mu follows from sigma_y by the discrepancy
    rule (see ``invdiff.samplers.discrepancy``). With ``anchor`` 0 stopping early is all that holds x near D, as
    published for noiseless data.

    Not for a calibrated posterior: it is a sampler in form, but its spread is not the posterior's. Not with ``lam``
    where data have no noise and slices differ: even a perfect denoiser's image is then smoothed across slices, where
    with ``lam`` 0 it comes back whole. Not for non-linear operators.

    Args:
        steps: denoiser evaluations.
        eta: share of fresh noise in [0, 1]; published 0.15 at 20, 0.5 at 50, 0.85 at 100 evaluations. Less is
            nearer to the posterior mean.
        cg_steps: CG steps of each consistency, published 5. The weight that is found wants
            them converged: with 15, weighted CT at 20 views lost 0.7 dB to 40.
        rho: ADMM penalty of the z-term for ||A|| = 1 (published 10 for an operator of squared norm 390).
        lam: weight of ||D_z x||_1 for [-1, 1] images and ||A|| = 1; 0 leaves slices uncoupled. Published 2e-4.
        coupling: what D_z x is, sparse across slices: ``tv`` (as published) the differences of neighbours, ``haar`` the
            details of an orthonormal Haar transform, at all levels: neighbours are not all alike to it, pairs may show.
        anchor: weight of the denoised image: about one over its squared error in prior units, as RED-Diff's lam; None
            finds it.
        sigma_floor: smallest sigma_y assumed, prior units with ||A|| = 1: no model of a scanner is exact.
        move: ``ddim`` as published, with the prior's own noise estimate, which brings the data in whole at every step;
            ``dpmpp2m`` or ``deis3m`` follow the ODE of the consistent image. With eta 0 and 15 evaluations these are
            nearer to their limit than ``ddim`` in 50 to its own, but that limit is further from the posterior mean.
        warm: start from FBP (the operator's pinv) plus noise, else from noise alone.
        sigma_max: first noise level, prior units. Published 157.
        sigma_min: last one above 0; at low noise the data say more than the prior. Published 0.01.
    """

    estimate: ClassVar[str] = "approximate sampler"

    steps: int = 50
    eta: float = 0.85
    cg_steps: int = 40
    rho: float = 0.025
    lam: float = 5e-5
    coupling: str = "tv"
    anchor: float | None = None
    sigma_floor: float = 1e-3
    move: str = "ddim"
    warm: bool = False
    sigma_max: float = 10.0
    sigma_min: float = 0.03

    def __post_init__(self) -> None:
        check_move(self, self.move)
        check_coupling(self, self.coupling)
        at_least(self, steps=1, cg_steps=1, rho=0, lam=0, sigma_floor=0)
        if self.anchor is not None:
            at_least(self, anchor=0)
        within(self, eta=(0, 1))
        if self.lam > 0 and self.rho == 0:
            raise ValueError("DDS.rho is 0 with lam above 0; a positive penalty is wanted")
        karras(self.steps, self.sigma_max, self.sigma_min)

    def sigma(self, i: int) -> float:
        """Noise level of step i."""
        return karras(self.steps, self.sigma_max, self.sigma_min)[i]

    def init(self, problem: Problem) -> DDSState:
        """x_t ~ N(x_0, sigma_max^2 I) with x_0 = 0 or FBP; z and u zero."""
        linear(self, problem)
        zero, x_t = start(problem, self.sigma_max)
        x = first_guess(problem) if self.warm else zero
        rule = first_rule(problem, believed_variance(problem, self.sigma_floor), self.anchor)
        return DDSState(0, x, x + x_t, zero, zero, no_past(self.move, zero), rule)

    def step(self, problem: Problem, state: DDSState) -> DDSState:
        """DDS algorithm 3 (algorithm 1 where lam is 0)."""
        i, _, x_t, z, u, past, rule = state
        D = denoised(problem, x_t, self.sigma(i))
        mu = weight_of(rule, D)
        if self.lam > 0:
            how: Any = {"rho": self.rho, "lam": self.lam, "cg_steps": self.cg_steps, "coupling": self.coupling}
            x, z, u = admm_sweep(problem, D, z, u, mu=mu, **how)
        else:
            x = nearest(problem.operator, problem.y, D, mu, self.cg_steps)
        levels = levels_of(self.move, self.sigma, i)
        x_t, past = advance(self.move, levels, x_t, x, past, self.eta, problem.noise(i, x_t), D)
        rule = next_rule(rule, problem, x, D, believed_variance(problem, self.sigma_floor))
        return DDSState(i + 1, x, x_t, z, u, past, rule)
