"""Diffusion with forward models (Tewari et al., NeurIPS 2023): the iterate is a measurement, the sample an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from invdiff.measured import Lift, MeasuredInfo, Response, inputs_of, lift, nothing, response_of
from invdiff.measured.examples import density_of
from invdiff.measured.model import SAMPLE
from invdiff.measured.nonlinear import features, scale_of
from invdiff.noise import noise_levels
from invdiff.problem import ScaledLinear
from invdiff.protocols import Problem
from invdiff.samplers.checks import at_least, linear, within
from invdiff.samplers.consistency import nearest
from invdiff.samplers.moves import advance, check_move, levels_of, no_past

TARGETS = ("whole", "unmeasured")
NOISE_RATIO = 2.0  # of a scan's noise to that of the scans of the training, a row of A for a row
CG_STEPS = 15  # of the consistency of a step


class ForwardModelState(NamedTuple):
    """i: steps done; x: clean estimate of the last step (s c h w); y_t: noisy target measurement (s ...).

    past: of the move (k s ...); image, coverage, kept, power: the context's lift, which does not change.
    """

    i: int
    x: Tensor
    y_t: Tensor
    past: Tensor
    image: Tensor
    coverage: Tensor
    kept: Tensor
    power: Tensor


@dataclass(frozen=True)
class ForwardModelDiffusion:
    """Samples p(x | y) with a model that was trained on measurements: diffusion of a measurement y_T nobody took.

    The context is y. The iterate is y_T^s, the target's measurement under noise s; the model gives x from both, A_T x
    is the denoised target, from which any move goes on; the last x is the sample. Samples have the spread of p(x | y)
    where A_T sees the image; a direction that neither y nor A_T sees stays at its mean.

    Not for usual priors (see ``DDS`` and others), nor for operators that do not know what else could be measured. An
    operator that is not linear wants a ``lift`` of its own.

    Args:
        steps: network evaluations.
        move: one of ddim, dpmpp2m, deis3m; see ``invdiff.samplers.moves.advance``.
        eta: share of fresh noise in each step.
        guidance: g of x_u + g (x_c - x_u), x_u without the context: twice the evaluations where it is not 1.
        target: ``whole``, views or lines evenly over all, or ``unmeasured``, over those that y lacks.
        views: of the target, at most; 0 is as many as the largest targets of the training had.
        consistency: deviation of the model's x from the truth, prior units, for a solve in every step that trades it
            against y's noise, as in DDS: what the model misses of y would be fed back to it; 0 leaves x as it is.
        sigma_max: first noise level, prior units.
        sigma_min: last one above 0; raised to the smallest that the model knows. Models of short trainings repeat their
            own errors below 0.1.
        grid: spacing of the levels.
    """

    estimate: ClassVar[str] = "approximate sampler"

    steps: int = 30
    move: str = "dpmpp2m"
    eta: float = 0.0
    guidance: float = 1.0
    target: str = "whole"
    views: int = 0
    consistency: float = 0.0
    sigma_max: float = 20.0
    sigma_min: float = 0.1
    grid: str = "karras"

    def __post_init__(self) -> None:
        check_move(self, self.move)
        at_least(self, steps=1, views=0, guidance=0, consistency=0)
        within(self, eta=(0, 1))
        if self.target not in TARGETS:
            raise ValueError(f"ForwardModelDiffusion.target is {self.target!r}; one of {', '.join(TARGETS)} is wanted")
        self.sigma(0)

    def sigma(self, i: int) -> float:
        """Noise level of step i, where the model knows all of them; 0 after the last."""
        return noise_levels(self.grid, self.steps, self.sigma_max, self.sigma_min)[i]

    def init(self, problem: Problem) -> ForwardModelState:
        """y_t ~ N(0, sigma_max^2 I), and the lift of y.

        Raises:
            ValueError: a usual prior, a nonlinear operator without a lift or with ``consistency``, noise that
                the model does not know, or guidance of a model that was never trained without a context.
        """
        lifts = hasattr(problem.operator, "lift") and self.consistency == 0
        info, A = model_of(problem), problem.operator if lifts else linear(self, problem)
        if self.guidance != 1 and info.dropped == 0:
            raise ValueError(
                f"guidance is {self.guidance} and the model {info.name!r} knows no empty context; 1 is wanted"
            )
        response = response_of(A) if hasattr(A, "adjoint") else None
        check_noise(problem, info, response)
        context = _lifted(problem, A, response, problem.y, problem.sigma_y)
        operator, _ = self._target(problem, info)
        y_t = torch.zeros(operator.range.shape, dtype=operator.range.dtype, device=problem.y.device)
        start = self._levels(info)[0] * _white(problem, -1, y_t)
        return ForwardModelState(0, torch.zeros_like(context.image), start, no_past(self.move, y_t), *context)

    def step(self, problem: Problem, state: ForwardModelState) -> ForwardModelState:
        """x from y and y_t, A_T x in the place of the denoised iterate, and the move (methods of DFM, section 3)."""
        i, _, y_t, past, *context = state
        info = model_of(problem)
        operator, response = self._target(problem, info)
        grid = self._levels(info)
        s, A = grid[i], operator
        target = _lifted(problem, A, response, y_t, s)
        x = _denoised(problem, Lift(*context), target, s, info.sigma_data)
        if self.guidance != 1:
            free = _denoised(problem, nothing(x), target, s, info.sigma_data)
            x = free + self.guidance * (x - free)
        if self.consistency > 0:
            x = nearest(problem.operator, problem.y, x, (problem.sigma_y / self.consistency) ** 2, CG_STEPS)
        fresh = _white(problem, i, y_t) if self.eta > 0 else None
        levels = levels_of(self.move, grid.__getitem__, i)
        y_t, past = advance(self.move, levels, y_t, A.forward(x), past, self.eta, fresh)
        return ForwardModelState(i + 1, x, y_t, past, *context)

    def _levels(self, info: MeasuredInfo) -> list[float]:
        low = max(self.sigma_min, info.sigma_min)
        return noise_levels(self.grid, self.steps, max(min(self.sigma_max, info.sigma_max), low), low)

    def _target(self, problem: Problem, info: MeasuredInfo) -> tuple[Any, Response | None]:
        return _target_of(problem.operator, self.target, self.views or info.views, info.density)


@lru_cache(maxsize=1)  # a pure function of immutable operators; building a projector costs more than a step
def _target_of(operator: Any, target: str, views: int, density: float) -> tuple[Any, Response | None]:
    """A_T, its rows scaled as those of the training, and its response."""
    if not hasattr(operator, target):
        raise ValueError(f"{type(operator).__name__} does not know what else could be measured; CT or MRI is wanted")
    found = getattr(operator, target)(views)
    if not hasattr(found, "adjoint"):
        return found, None
    scaled = ScaledLinear(found, (density_of(found, response_of(found)) / density) ** 0.5)
    return scaled, response_of(scaled)


def model_of(problem: Problem, methods: Sequence[str] = SAMPLE, sampler: str = "forward-model") -> MeasuredInfo:
    """The model's description.

    Raises:
        ValueError: a usual prior, or a model that was not trained by one of ``methods``, which ``sampler`` wants.
    """
    info = getattr(problem.prior, "info", None)
    if not isinstance(info, MeasuredInfo):
        named = getattr(info, "name", type(problem.prior).__name__)
        raise ValueError(
            f"the prior {named!r} is one of images; the sampler {sampler} wants a model of invdiff train --from"
        )
    if info.method not in methods:
        raise ValueError(
            f"the model {info.name!r} was trained by {info.method}; the sampler {sampler} wants one of "
            f"{' or '.join(methods)}"
        )
    return info


def check_noise(problem: Problem, info: MeasuredInfo, response: Response | None) -> None:
    """Refuse a scan that is much noisier, or much less so, than those of the training: whitened otherwise, mostly."""
    rows = info.density if response is None else density_of(problem.operator, response)
    noise = problem.sigma_y * (info.density / rows) ** 0.5
    low, high = info.sigma_y[0] / NOISE_RATIO, info.sigma_y[1] * NOISE_RATIO
    if not low <= noise <= high:
        raise ValueError(
            f"the scan's noise is {noise:.3g} in prior units, a row of the operator being as in the training, whose "
            f"scans had {info.sigma_y[0]:.3g} to {info.sigma_y[1]:.3g}; a scan whitened alike is wanted"
        )


def _lifted(problem: Problem, operator: Any, response: Response | None, y: Tensor, noise: float) -> Lift:
    """The lift of a measurement: by a filter, or by the operator's own features where it is not linear."""
    info = model_of(problem)
    if response is None:
        return features(operator, y, noise, info.sigma_data, scale_of(problem.y))
    return lift(operator, y, response, noise, info.sigma_data, info.lift_steps)


def _white(problem: Problem, step: int, like: Tensor) -> Tensor:
    """Noise of variance 1 a real component."""
    noise = problem.noise(step, like)
    return 2**0.5 * noise if noise.is_complex() else noise


def _denoised(problem: Problem, context: Lift, target: Lift, s: float, deviation: float) -> Tensor:
    """x (s c h w) by the model."""
    inputs = inputs_of(context, target, deviation).stacked()
    level = torch.tensor(s, dtype=inputs.dtype, device=inputs.device)
    return problem.prior.denoise(inputs, level)[:, : target.image.shape[1]]
