"""DDIM (Song et al., ICLR 2021) in variance-exploding form: unconditional, or for a wrapped prior."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from invdiff.protocols import Problem
from invdiff.samplers.checks import within
from invdiff.samplers.solver import OneStep, OneStepState, denoised


def ddim_move(x0: Tensor, x_t: Tensor, denoised: Tensor, s: float, s_next: float, eta: float, noise: Tensor) -> Tensor:
    """x at noise s_next around x0: DDIM with DDS's eta (methods: DDS, step 3), in VE form.

    Args:
        x0: clean estimate to go on from, (s c h w).
        x_t: iterate at noise ``s``.
        denoised: the prior's D(x_t, s); the noise estimate is (x_t - denoised) / s.
        s: present noise level.
        s_next: next one.
        eta: share of fresh noise: 0 is deterministic, 1 all fresh.
        noise: N(0, I), the shape of x0.
    """
    x = torch.add(x0, x_t - denoised, alpha=(1 - eta**2) ** 0.5 * s_next / s)
    return torch.add(x, noise, alpha=eta * s_next)


@dataclass(frozen=True)
class DDIM(OneStep):
    """Plain DDIM on the prior: ignores the measurements, so it samples whatever the prior denoises to.

    Use it with a prior that carries the condition (a steered or projected one), or unconditionally. Without fresh
    noise it is Euler's method in sigma: first order. To reconstruct from measurements use DDS; for fewer evaluations
    at the same error see ``DPMpp2M``.

    Args:
        steps: denoiser evaluations.
        eta: share of fresh noise in [0, 1].
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        within(self, eta=(0, 1))

    def step(self, problem: Problem, state: OneStepState) -> OneStepState:
        """One DDIM step (Song et al. 2021, eq. 12)."""
        i, _, x_t = state
        s, s_next = self.sigma(i), self.sigma(i + 1)
        D = denoised(problem, x_t, s)
        return OneStepState(i + 1, D, ddim_move(D, x_t, D, s, s_next, self.eta, problem.noise(i, x_t)))
