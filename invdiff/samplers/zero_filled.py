"""Zero filling: what was not measured is taken for zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from invdiff.protocols import Problem
from invdiff.samplers.checks import at_least, linear


class ZeroFilledState(NamedTuple):
    """i: steps done; x: image (s c h w)."""

    i: int
    x: Tensor


@dataclass(frozen=True)
class ZeroFilled:
    """The operator's ``zero_filled(y)``: its adjoint, with density compensation where samples are uneven; no inverse.

    For MRI the coil-combined inverse FFT of k-space as it was sampled (Roemer et al. 1990), aliased where it is
    undersampled. In the units of the problem: what is not measured is filled with the value of 0 in prior units, so
    that a range symmetric about zero, ``NoPrior("a.u.", -1, 1)``, is what gives the usual picture.
    """

    estimate: ClassVar[str] = "point estimate"

    steps: int = 1

    def __post_init__(self) -> None:
        at_least(self, steps=1)

    def sigma(self, i: int) -> float:  # noqa: ARG002
        """Always 0: no noise levels."""
        return 0.0

    def init(self, problem: Problem) -> ZeroFilledState:
        """Zero."""
        linear(self, problem)
        return ZeroFilledState(0, torch.zeros(problem.operator.domain.shape, device=problem.y.device))

    def step(self, problem: Problem, state: ZeroFilledState) -> ZeroFilledState:  # noqa: ARG002
        """x = A^H D y."""
        operator = problem.operator
        fill = getattr(operator, "zero_filled", operator.adjoint)
        return ZeroFilledState(self.steps, fill(problem.y))
