"""SENSE: regularised least squares of all coils together by conjugate gradients."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from invdiff.protocols import Problem
from invdiff.samplers.checks import at_least
from invdiff.samplers.classical import CGLS


@dataclass(frozen=True)
class SENSE(CGLS):
    """min ||A x - y||^2 / 2 + lam / 2 ||x||^2 by CG from zero (CG-SENSE, Pruessmann et al. 2001, with Tikhonov).

    lam = (sigma_y / deviation)^2 makes x the posterior mean of independent pixels of that deviation; unlike CGLS, which
    stops early, it converges.

    Args:
        steps: CG iterations.
        deviation: of the image from zero, prior units.
        sigma_floor: smallest sigma_y assumed, prior units with ||A|| = 1.
    """

    steps: int = 30
    deviation: float = 0.5
    sigma_floor: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, deviation=1e-12, sigma_floor=0)

    def normal(self, problem: Problem, v: Tensor) -> Tensor:
        """(A^H A + lam I) v."""
        lam = (max(problem.sigma_y, self.sigma_floor) / self.deviation) ** 2
        return super().normal(problem, v) + lam * v
