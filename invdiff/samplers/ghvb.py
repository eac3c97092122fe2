"""GHVB: generalised heavy ball momentum (Wizadwongsa, Chinchuthakun, Khungurn, Raj & Suwajanakorn, ICLR 2024)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from invdiff.protocols import Problem
from invdiff.samplers.deis import extrapolated
from invdiff.samplers.solver import Multistep, MultistepState, denoised


@dataclass(frozen=True)
class GHVB(Multistep):
    """Adams-Bashforth on a velocity that follows the noise estimate eps = (x - D) / sigma with momentum.

    v_n = (1 - beta) v_{n-1} + beta eps_n with v_0 = eps_0, so that eps = v + (1 - beta) / beta (v_n - v_{n-1})
    exactly, and x' = x + (s' - s) (AB_k[v] + (1 - beta) / beta AB_{k-1}[v_n - v_{n-1}]), AB_0 = 0. On equal steps
    these are the paper's coefficients (for order 2, with beta v' = v: ((2 + beta) v'_n - (2 - beta) v'_{n-1}) / 2);
    here AB integrates the polynomial of the actual noise levels, which keeps the order on any smooth grid.

    The order is ``order`` for every beta, where D is smooth in x and sigma, as far as the start allows (see ``DEIS``;
    the start of v leaves an error of the same kind): order 1 is heavy ball, beta 1 is plain Adams-Bashforth, and as
    beta falls to 0 the error tends to that of one order less, and the stability region grows. The paper writes order 2
    with beta 0.8 as GHVB1.8.

    Not where plain Adams-Bashforth (``DEIS``) does not diverge: momentum then only adds error. It is for strong
    guidance and other stiff denoisers at few steps.

    Args:
        steps: denoiser evaluations.
        order: 1 to 4; published 2 to 4.
        beta: damping in (0, 1]; less resists divergence more.
    """

    steps: int = 20
    order: int = 2
    beta: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.beta <= 1:
            raise ValueError(f"GHVB.beta is {self.beta}; a value in (0, 1] is wanted")

    def step(self, problem: Problem, state: MultistepState) -> MultistepState:
        """One step; orders rise over the first ones, and the last, to 0, is first order."""
        i, _, x_t, past = state
        s, s_next = self.sigma(i), self.sigma(i + 1)
        D = denoised(problem, x_t, s)
        if s_next == 0:
            return MultistepState(i + 1, D, D, past)
        eps = (x_t - D) / s
        v = eps if i == 0 else (1 - self.beta) * past[0] + self.beta * eps
        order = min(i + 1, self.order)
        velocities = torch.cat([v[None], past])
        levels = [self.sigma(i - j) for j in range(order)]
        slope = extrapolated(list(velocities[:order]), levels, s_next)
        if order > 1:
            changes = velocities[: order - 1] - velocities[1:order]
            slope = slope + (1 - self.beta) / self.beta * extrapolated(list(changes), levels[:-1], s_next)
        return MultistepState(i + 1, D, x_t + (s_next - s) * slope, velocities[: len(past)])
