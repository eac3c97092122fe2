"""DiffPIR (Zhu, Zhang, Liang, Cao, Wen, Timofte & Van Gool, CVPR workshops 2023): half-quadratic splitting, noised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from invdiff.protocols import Problem
from invdiff.samplers.checks import at_least, within
from invdiff.samplers.consistency import nearest
from invdiff.samplers.discrepancy import believed_variance, first_rule, next_rule, weight_of
from invdiff.samplers.moves import Guided
from invdiff.samplers.solver import MultistepState, denoised


class DiffPIRState(NamedTuple):
    """As ``MultistepState``, and rule: see ``discrepancy``; with lam given, lam sigma_y^2."""

    i: int
    x: Tensor
    x_t: Tensor
    past: Tensor
    rule: Tensor


@dataclass(frozen=True)
class DiffPIR(Guided):
    """Denoise, take the proximal step of the data, add noise again (algorithm 1 of the paper).

    The proximal step is argmin ||A x - y||^2 + rho_t ||x - D||^2 with rho_t = lam sigma_y^2 / sigma_t^2 (eq. 13): D is
    taken for the truth within sigma_t / sqrt lam. Without a ``lam`` each slice's rho follows from sigma_y by the
    discrepancy rule (see ``invdiff.samplers.discrepancy``). The noise estimate is then that of the proximal image,
    (x_t - x) / sigma_t, a share zeta of its variance replaced by fresh noise. The published code leaves out the
    proximal step at the last noise level; here the result has it.

    Not for a calibrated posterior: where the prior is sure of a direction the data are believed there too, and errors
    made at high noise stay (on correlated Gaussians the mean is 0.5 to 0.9 posterior deviations off; fresh noise
    forgets some, and narrows the spread). Not for non-linear operators.

    Args:
        steps: denoiser evaluations. Published 20 for noiseless, 100 for noisy data.
        move: ``ddim`` as published; ``dpmpp2m`` or ``deis3m``, with zeta 0, end in 15 evaluations as near to their
            limit as ``ddim`` in 45.
        cg_steps: CG steps of the proximal step; 0 is the operator's own ``solve``.
        sigma_max: first noise level, prior units. Published 157.
        sigma_min: last one above 0. Published 0.01.
        lam: weight of the denoised image; None finds it. Published 1, and 7 to 13 for some tasks.
        zeta: share of fresh noise in [0, 1]. Published 1 (noiseless inpainting), 0.1 and 0.25 (noisy).
        sigma_floor: smallest sigma_y assumed, prior units with ||A|| = 1. Published 0.001 of [0, 1].
    """

    lam: float | None = None
    zeta: float = 0.7
    sigma_floor: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, sigma_floor=0)
        if self.lam is not None:
            at_least(self, lam=0)
        within(self, zeta=(0, 1))

    def init(self, problem: Problem) -> DiffPIRState:  # type: ignore[override]
        """x_t ~ N(0, sigma_max^2 I)."""
        started = super().init(problem)
        return DiffPIRState(*started, first_rule(problem, believed_variance(problem, self.sigma_floor), self.lam))

    def step(self, problem: Problem, state: DiffPIRState) -> DiffPIRState:  # type: ignore[override]
        """One step of algorithm 1."""
        s, rule = self.sigma(state.i), state.rule
        variance = believed_variance(problem, self.sigma_floor)
        rho = weight_of(rule, state.x) if self.lam is None else self.lam * variance / s**2  # eq. 13
        D = denoised(problem, state.x_t, s)
        x = nearest(problem.operator, problem.y, D, rho, self.cg_steps)
        rule = next_rule(rule, problem, x, D, variance)
        return DiffPIRState(*self.moved(problem, MultistepState(*state[:4]), x, self.zeta**0.5), rule)
