"""SENSE: regularised least squares of all coils together by conjugate gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from invdiff.linalg import cg_floor, cg_step, inner
from invdiff.protocols import Problem
from invdiff.samplers.checks import at_least, linear


class SENSEState(NamedTuple):
    """i: steps done; x: image; r: residual of the normal equations; p: direction (s c h w); floor: see ``cg_step``."""

    i: int
    x: Tensor
    r: Tensor
    p: Tensor
    floor: Tensor


@dataclass(frozen=True)
class SENSE:
    """min ||A x - y||^2 / 2 + lam / 2 ||x||^2 by CG from zero (CG-SENSE, Pruessmann et al. 2001, with Tikhonov).

    lam = (sigma_y / deviation)^2 makes x the posterior mean of independent pixels of that deviation; unlike CGLS, which
    stops early, it converges.

    Args:
        steps: CG iterations.
        deviation: of the image from zero, prior units.
        sigma_floor: smallest sigma_y assumed, prior units with ||A|| = 1.
    """

    estimate: ClassVar[str] = "point estimate"

    steps: int = 30
    deviation: float = 0.5
    sigma_floor: float = 0.01

    def __post_init__(self) -> None:
        at_least(self, steps=1, deviation=1e-12, sigma_floor=0)

    def sigma(self, i: int) -> float:  # noqa: ARG002
        """Always 0: no noise levels."""
        return 0.0

    def init(self, problem: Problem) -> SENSEState:
        """x = 0, r = p = A^H y."""
        r = linear(self, problem).adjoint(problem.y)
        return SENSEState(0, torch.zeros_like(r), r, r, cg_floor(inner(r, r)))

    def step(self, problem: Problem, state: SENSEState) -> SENSEState:
        """One iteration on (A^H A + lam I) x = A^H y, a step length a slice."""
        i, x, r, p, floor = state
        lam = (max(problem.sigma_y, self.sigma_floor) / self.deviation) ** 2

        def normal(v: Tensor) -> Tensor:
            return problem.operator.normal(v) + lam * v  # type: ignore[no-any-return]

        return SENSEState(i + 1, *cg_step(normal, x, r, p, floor), floor)
