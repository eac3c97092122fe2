"""DDIM (Song et al., ICLR 2021) in variance-exploding form: unconditional, or for a wrapped prior."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from invdiff.noise import karras
from invdiff.protocols import Problem
from invdiff.samplers.checks import at_least


class DDIMState(NamedTuple):
    """i: steps done; x: denoised image (s c h w); x_t: noisy iterate (s c h w)."""

    i: int
    x: Tensor
    x_t: Tensor


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
    n = (x_t - denoised) / s
    return x0 + s_next * (eta * noise + (1 - eta**2) ** 0.5 * n)


@dataclass(frozen=True)
class DDIM:
    """Plain DDIM on the prior: ignores the measurements, so it samples whatever the prior denoises to.

    Use it with a prior that carries the condition (a steered or projected one), or unconditionally. To reconstruct
    from measurements use DDS.

    Args:
        steps: denoiser evaluations.
        eta: share of fresh noise in [0, 1].
        sigma_max: first noise level, prior units.
        sigma_min: last one above 0.
    """

    steps: int = 50
    eta: float = 0.0
    sigma_max: float = 80.0
    sigma_min: float = 0.01

    def __post_init__(self) -> None:
        at_least(self, steps=1, eta=0)
        karras(self.steps, self.sigma_max, self.sigma_min)

    def sigma(self, i: int) -> float:
        """Noise level of step i."""
        return karras(self.steps, self.sigma_max, self.sigma_min)[i]

    def init(self, problem: Problem) -> DDIMState:
        """x_t ~ N(0, sigma_max^2 I)."""
        x = torch.zeros(problem.operator.domain.shape, device=problem.y.device)
        return DDIMState(0, x, self.sigma_max * problem.noise(-1, x))

    def step(self, problem: Problem, state: DDIMState) -> DDIMState:
        """One DDIM step (Song et al. 2021, eq. 12)."""
        i, x_t = state.i, state.x_t
        s, s_next = self.sigma(i), self.sigma(i + 1)
        x0 = problem.prior.denoise(x_t, torch.tensor(s, device=x_t.device))
        return DDIMState(i + 1, x0, ddim_move(x0, x_t, x0, s, s_next, self.eta, problem.noise(i, x_t)))
