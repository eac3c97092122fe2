"""The moves of methods that change the denoised image: from one noise level to the next, first order or higher."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from invdiff.noise import karras
from invdiff.protocols import Problem
from invdiff.samplers.checks import at_least, linear
from invdiff.samplers.ddim import ddim_move
from invdiff.samplers.deis import extrapolated
from invdiff.samplers.dpmpp import extrapolated_image
from invdiff.samplers.solver import MultistepState, denoised, start

MOVES = {"ddim": 0, "dpmpp2m": 1, "deis3m": 2}  # and how many images of earlier steps each wants


def check_move(owner: object, move: str) -> None:
    """Refuse a name that is no move's."""
    if move not in MOVES:
        raise ValueError(f"{type(owner).__name__}.move is {move!r}; one of {', '.join(MOVES)} is wanted")


def no_past(move: str, like: Tensor) -> Tensor:
    """The history before the first step, (k s c h w), k of the move, in the form that ``advance`` keeps."""
    return like.new_zeros((MOVES[move], *like.shape))


def levels_of(move: str, sigma: Callable[[int], float], i: int) -> list[float]:
    """The noise levels that step ``i`` of ``advance`` wants: next, present, and those before that it has images of."""
    return [sigma(i + 1 - k) for k in range(2 + min(i, MOVES[move]))]


def advance(
    move: str,
    levels: Sequence[float],
    x_t: Tensor,
    x0: Tensor,
    past: Tensor,
    eta: float = 0.0,
    noise: Tensor | None = None,
    plain: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The iterate at the next noise level around a denoised image that knows of y, and the new history.

    ``ddim`` keeps the noise estimate (x_t - plain) / s. The others are steps of the ODE dx/dsigma = (x - x0) / sigma
    of the changed denoised image itself: ``dpmpp2m`` extrapolates x0 linearly in ln sigma (see ``DPMpp2M``), ``deis3m``
    the slope as a polynomial of the last three (see ``DEIS``); their first steps are of lower order. Of the next
    level's noise the share ``eta`` is fresh, as in ``ddim_move``. To 0, every move gives x0.

    Args:
        move: one of MOVES.
        levels: noise levels from the next one backwards: next, present, and those before (as many as there were).
        x_t: iterate at the present level, (s c h w).
        x0: denoised image to go on from.
        past: (k s c h w), from ``no_past`` or the call before.
        eta: share of fresh noise: 0 is deterministic, 1 all fresh.
        noise: N(0, I), the shape of x0; not needed where eta is 0.
        plain: the prior's own denoised image, which ``ddim`` estimates the noise from; x0 if None.
    """
    s_next, s = levels[0], levels[1]
    known = min(len(levels) - 2, len(past))
    if s_next == 0:
        return x0, past
    if move == "ddim":
        fresh = x_t.new_zeros(()) if noise is None else noise
        return ddim_move(x0, x_t, x0 if plain is None else plain, s, s_next, eta, fresh), past
    down = s_next * (1 - eta**2) ** 0.5
    new = x0 if move == "dpmpp2m" else (x_t - x0) / s
    images = [new, *past[:known]]
    if move == "dpmpp2m":
        before = images[1] if known else None
        x = down / s * x_t + (1 - down / s) * extrapolated_image(x0, before, levels[:3])
    else:
        x = x_t + (down - s) * extrapolated(images, list(levels[1 : known + 2]), s_next)
    history = torch.cat([new[None], past])[: len(past)]
    return (x if noise is None else x + eta * s_next * noise), history


@dataclass(frozen=True)
class Guided(ABC):
    """Base of methods for linear operators that change the denoised image and move on: fields, grid, start.

    Args:
        steps: denoiser evaluations.
        move: one of MOVES, see ``advance``.
        cg_steps: CG steps of each solve with A^T A + mu I; 0 is the operator's own ``solve``.
        sigma_max: first noise level, prior units.
        sigma_min: last one above 0.
    """

    estimate: ClassVar[str] = "approximate sampler"

    steps: int = 50
    move: str = "ddim"
    cg_steps: int = 30
    sigma_max: float = 10.0
    sigma_min: float = 0.01

    def __post_init__(self) -> None:
        check_move(self, self.move)
        at_least(self, steps=1, cg_steps=0)
        self.sigma(0)

    def sigma(self, i: int) -> float:
        """Noise level of step i; 0 after the last."""
        return karras(self.steps, self.sigma_max, self.sigma_min)[i]

    def init(self, problem: Problem) -> MultistepState:
        """x_t ~ N(0, sigma_max^2 I)."""
        linear(self, problem)
        x, x_t = start(problem, self.sigma_max)
        return MultistepState(0, x, x_t, no_past(self.move, x))

    @abstractmethod
    def step(self, problem: Problem, state: MultistepState) -> MultistepState:
        """The state after one more step."""

    def moved(
        self, problem: Problem, state: MultistepState, x: Tensor, eta: float, plain: Tensor | None = None
    ) -> MultistepState:
        """The state after the move from ``state`` around x; arguments as in ``advance``."""
        i, _, x_t, past = state
        noise = problem.noise(i, x_t) if eta > 0 else None
        levels = levels_of(self.move, self.sigma, i)
        return MultistepState(i + 1, x, *advance(self.move, levels, x_t, x, past, eta, noise, plain))


def flow(problem: Problem, x_t: Tensor, levels: Sequence[float], move: str) -> Tensor:
    """The prior's probability-flow ODE from x_t at levels[0] through ``levels``, the last of them 0: (s c h w)."""
    past = no_past(move, x_t)
    for k, s in enumerate(levels[:-1]):
        x_t, past = advance(move, levels_of(move, levels.__getitem__, k), x_t, denoised(problem, x_t, s), past)
    return x_t
