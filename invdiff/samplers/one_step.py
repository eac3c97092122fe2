"""One-step reconstruction by a network that was trained on scans (SSDU: Yaman et al., MRM 2020) or on images."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from invdiff.measured import inputs_of, lift, nothing, response_of
from invdiff.measured.model import ONE_STEP
from invdiff.measured.one_step import LEVEL
from invdiff.protocols import Problem
from invdiff.samplers.checks import linear
from invdiff.samplers.classical import FBPState, OneShot
from invdiff.samplers.forward_model import check_noise, model_of


@dataclass(frozen=True)
class OneStep(OneShot):
    """E[x | y] in one step, by a model of ``invdiff train --from`` whose method is ssdu or supervised. No samples."""

    def step(self, problem: Problem, state: FBPState) -> FBPState:  # noqa: ARG002
        """x = U(lift of y).

        Raises:
            ValueError: a usual prior, a model that samples, a nonlinear operator, noise that the model does not know.
        """
        info, A = model_of(problem, ONE_STEP, "one-step"), linear(self, problem)
        response = response_of(A)
        check_noise(problem, info, response)
        context = lift(A, problem.y, response, problem.sigma_y, info.sigma_data, info.lift_steps)
        inputs = inputs_of(context, nothing(context.image), info.sigma_data).stacked()
        x = problem.prior.denoise(inputs, torch.tensor(LEVEL, dtype=inputs.dtype, device=inputs.device))
        return FBPState(self.steps, x[:, : context.image.shape[1]])
