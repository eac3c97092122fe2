"""Zero filling: what was not measured is taken for zero."""

from __future__ import annotations

from dataclasses import dataclass

from invdiff.protocols import Problem
from invdiff.samplers.checks import above_nothing
from invdiff.samplers.classical import FBP, FBPState


@dataclass(frozen=True)
class ZeroFilled(FBP):
    """The operator's ``zero_filled(y)``: its adjoint, with density compensation where samples are uneven; no inverse.

    For MRI the coil-combined inverse FFT of k-space as it was sampled (Roemer et al. 1990), aliased where it is
    undersampled.
    """

    def step(self, problem: Problem, state: FBPState) -> FBPState:  # noqa: ARG002
        """x = A^H D y."""
        operator = problem.operator
        fill = getattr(operator, "zero_filled", operator.adjoint)  # type: ignore[attr-defined]
        return FBPState(self.steps, above_nothing(problem, fill))
