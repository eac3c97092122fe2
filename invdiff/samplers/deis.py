"""DEIS, the multistep kind tAB (Zhang & Chen, ICLR 2023): the noise estimate extrapolated by a polynomial."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from invdiff.protocols import Problem
from invdiff.samplers.solver import Multistep, MultistepState, denoised


def adams_weights(levels: Sequence[float], s_next: float) -> list[float]:
    """Weights w with: mean over [levels[0], s_next] of the polynomial through (level, f) = sum of w f, exactly.

    The Adams-Bashforth weights of any spacing: (3/2, -1/2) for two equal steps.

    Args:
        levels: where the values are known, the present one first; all different, none of them ``s_next``.
        s_next: end of the step.
    """
    s = levels[0]
    u = [(level - s) / (s_next - s) for level in levels]  # the step is [0, 1]
    weights = []
    for j, node in enumerate(u):
        basis = [1.0]  # the Lagrange polynomial's coefficients, constant first
        for other in u[:j] + u[j + 1 :]:
            shifted = zip([0.0, *basis], [*basis, 0.0], strict=True)
            basis = [(low - other * same) / (node - other) for low, same in shifted]
        weights.append(sum(c / (k + 1) for k, c in enumerate(basis)))
    return weights


def extrapolated(values: Sequence[Tensor], levels: Sequence[float], s_next: float) -> Tensor:
    """Mean over the next step of the polynomial through ``values`` at ``levels``, newest first, each (s c h w)."""
    weighted = [w * f for w, f in zip(adams_weights(levels, s_next), values, strict=True)]
    return torch.stack(weighted).sum(0)


@dataclass(frozen=True)
class DEIS(Multistep):
    """x' = x + (s' - s) times the mean over the step of the polynomial through the last noise estimates.

    With eps = (x - D) / sigma the ODE is dx/dsigma = eps: in VE form the exponential integrator of the paper (eq. 14,
    15) has no linear part left, and sigma is its rho, so that tAB and rhoAB are one. ``order`` values make a
    polynomial of degree order - 1 (the paper's r). Orders rise 1, 2, 3 over the first steps and the last, to 0, is
    first order. Order 3 holds for D smooth in x and sigma, as far as the first, Euler, step allows: it leaves
    (s_1 - s_0)^2 / 2 |d eps / d sigma| at sigma_max, which falls as C / sigma_max^3 and is nothing at the default.

    Not for a handful of evaluations, where it gains little over DDIM: see ``DPMpp2M``.

    Args:
        steps: denoiser evaluations. Published 10 to 20.
        order: noise estimates used, 1 (DDIM) to 4.
    """

    steps: int = 20
    order: int = 3

    def step(self, problem: Problem, state: MultistepState) -> MultistepState:
        """One step of tAB-DEIS, eq. 14."""
        i, _, x_t, past = state
        s, s_next = self.sigma(i), self.sigma(i + 1)
        D = denoised(problem, x_t, s)
        if s_next == 0:
            return MultistepState(i + 1, D, D, past)
        order = min(i + 1, self.order)
        slopes = torch.cat([((x_t - D) / s)[None], past])
        levels = [self.sigma(i - j) for j in range(order)]
        x_t = x_t + (s_next - s) * extrapolated(list(slopes[:order]), levels, s_next)
        return MultistepState(i + 1, D, x_t, slopes[: len(past)])
