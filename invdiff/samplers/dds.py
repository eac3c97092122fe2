"""DDS: decomposed diffusion sampling (Chung, Lee & Ye, ICLR 2024), the fast successor of DiffusionMBIR."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from invdiff.linalg import cg, difference, difference_adjoint, shrink
from invdiff.noise import karras
from invdiff.protocols import Problem
from invdiff.samplers.checks import at_least, first_guess, linear, within
from invdiff.samplers.ddim import ddim_move

SLICES = 0  # the axis along which the z-term couples


class DDSState(NamedTuple):
    """i: steps done; x: consistent image; x_t: noisy iterate; z, u: split D_z x and its scaled dual (s c h w)."""

    i: int
    x: Tensor
    x_t: Tensor
    z: Tensor
    u: Tensor


@dataclass(frozen=True)
class DDS:
    """Denoise, make consistent by a few CG steps (one ADMM sweep with a z-TV), add noise again (DDS, algorithms 1, 3).

    The consistency minimises ||A x - y||^2 / 2 + rho/2 ||D_z x - z + u||^2 + mu/2 ||x - D||^2 by ``cg_steps`` steps
    from D = denoise(x_t), with mu = anchor * sigma_y^2 (the paper's proximal step for noisy data, gamma = 1 / mu):
    noisy data weigh what they are worth. With ``anchor`` 0 stopping early is all that holds x near D, as published
    for noiseless data.

    Not for a calibrated posterior: it is a sampler in form, but its spread is not the posterior's. Not for
    non-linear operators.

    Args:
        steps: denoiser evaluations.
        eta: share of fresh noise in [0, 1]; published 0.15 at 20, 0.5 at 50, 0.85 at 100 evaluations. Less is
            nearer to the posterior mean.
        cg_steps: CG steps of each consistency, published 5; weighted CT data want more.
        rho: ADMM penalty of the z-term for ||A|| = 1 (published 10 for an operator of squared norm 390).
        lam: weight of ||D_z x||_1 for [-1, 1] images and ||A|| = 1; 0 leaves slices uncoupled. Published 2e-4.
        anchor: weight of the denoised image: about one over its squared error in prior units, as RED-Diff's lam.
        sigma_floor: smallest sigma_y assumed, prior units with ||A|| = 1: no model of a scanner is exact.
        warm: start from FBP (the operator's pinv) plus noise, else from noise alone.
        sigma_max: first noise level, prior units. Published 157.
        sigma_min: last one above 0; at low noise the data say more than the prior. Published 0.01.
    """

    steps: int = 50
    eta: float = 0.85
    cg_steps: int = 15
    rho: float = 0.025
    lam: float = 5e-5
    anchor: float = 300.0
    sigma_floor: float = 1e-3
    warm: bool = False
    sigma_max: float = 10.0
    sigma_min: float = 0.03

    def __post_init__(self) -> None:
        at_least(self, steps=1, cg_steps=1, rho=0, lam=0, anchor=0, sigma_floor=0)
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
        zero = torch.zeros(problem.operator.domain.shape, device=problem.y.device)
        x = first_guess(problem) if self.warm else zero
        return DDSState(0, x, x + self.sigma_max * problem.noise(-1, zero), zero, zero)

    def step(self, problem: Problem, state: DDSState) -> DDSState:
        """DDS algorithm 3 (algorithm 1 where lam is 0)."""
        i, _, x_t, z, u = state
        s, s_next = self.sigma(i), self.sigma(i + 1)
        denoised = problem.prior.denoise(x_t, torch.tensor(s, device=x_t.device))
        x, z, u = self._consistent(problem, denoised, z, u)
        return DDSState(i + 1, x, ddim_move(x, x_t, denoised, s, s_next, self.eta, problem.noise(i, x_t)), z, u)

    def _consistent(self, problem: Problem, denoised: Tensor, z: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One ADMM sweep from the denoised image."""
        A = problem.operator
        rho = self.rho if self.lam > 0 else 0.0
        mu = self.anchor * max(problem.sigma_y, self.sigma_floor) ** 2

        def normal(v: Tensor) -> Tensor:
            out = A.normal(v) + mu * v
            return out + rho * difference_adjoint(difference(v, SLICES), SLICES) if rho else out

        rhs = A.adjoint(problem.y) + mu * denoised
        if rho:
            rhs = rhs + rho * difference_adjoint(z - u, SLICES)
        x = cg(normal, rhs, denoised, self.cg_steps, joint=bool(rho))
        if not rho:
            return x, z, u
        d = difference(x, SLICES)
        z = shrink(d + u, self.lam / rho)
        return x, z, u + d - z
