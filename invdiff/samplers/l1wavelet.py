"""Compressed sensing: an image whose wavelet coefficients are sparse."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from invdiff.protocols import Problem
from invdiff.samplers.checks import at_least, linear
from invdiff.wavelets import analysis, padding, synthesis

ROWS, COLUMNS = -2, -1
CHANNELS = -3
STEP_LENGTH = 0.95  # of the gradient step for ||A|| = 1, which a power iteration finds from below
TURNS = (5, 3)  # shifts of step i: multiples of i modulo 2^levels, so that 2^levels steps see every row and column


class L1WaveletState(NamedTuple):
    """i: steps done; x: image (s c h w); z: the same on the padded grid; v: FISTA's extrapolated point (s c h' w')."""

    i: int
    x: Tensor
    z: Tensor
    v: Tensor


@dataclass(frozen=True)
class L1Wavelet:
    """min ||A x - y||^2 / 2 + lam ||W x||_1 by FISTA (Beck & Teboulle 2009), W orthonormal: SparseMRI (Lustig 2007).

    W is Daubechies-4, periodic, on a grid padded to a multiple of 2^levels. The channels of a complex image are shrunk
    by their common magnitude. With ``spin`` W is shifted from step to step (cycle spinning, Coifman & Donoho 1995),
    which removes the grid of the transform; the iteration then settles near, not at, the minimum of one W.

    Args:
        steps: FISTA iterations.
        lam: weight for [-1, 1] images and ||A|| = 1, where the noise is small.
        noise_weight: added to ``lam`` as this times sigma_y: coefficients of white noise have its deviation.
        levels: of the transform.
        spin: cycle spinning.
        coarse: shrink the coarsest approximation too, as sigpy does; it biases the level of the image.
    """

    estimate: ClassVar[str] = "point estimate"

    steps: int = 80
    lam: float = 2e-3
    noise_weight: float = 0.3
    levels: int = 4
    spin: bool = True
    coarse: bool = False

    def __post_init__(self) -> None:
        at_least(self, steps=1, lam=0, noise_weight=0, levels=1)

    def sigma(self, i: int) -> float:  # noqa: ARG002
        """Always 0: no noise levels."""
        return 0.0

    def init(self, problem: Problem) -> L1WaveletState:
        """Zero."""
        x = torch.zeros_like(linear(self, problem).adjoint(problem.y))
        down, right = padding((x.shape[ROWS], x.shape[COLUMNS]), self.levels)
        z = pad(x, (0, right, 0, down))
        return L1WaveletState(0, x, z, z)

    def step(self, problem: Problem, state: L1WaveletState) -> L1WaveletState:
        """One iteration: gradient, shrinkage, extrapolation (eqs. 4.1 to 4.3)."""
        i, x, z, v = state
        h, w = x.shape[ROWS:]
        A = problem.operator
        down, right = v.shape[ROWS] - h, v.shape[COLUMNS] - w
        gradient = A.adjoint(A.forward(v[..., :h, :w].contiguous()) - problem.y)
        lam = self.lam + self.noise_weight * problem.sigma_y
        new = self._shrunk(v - STEP_LENGTH * pad(gradient, (0, right, 0, down)), STEP_LENGTH * lam, i)
        t, t_new = _momentum(i), _momentum(i + 1)
        return L1WaveletState(i + 1, new[..., :h, :w].contiguous(), new, new + (t - 1) / t_new * (new - z))

    def objective(self, problem: Problem, x: Tensor) -> Tensor:
        """||A x - y||^2 / 2 + lam ||W x||_1 of each slice (s), x (s c h w), W unshifted and x padded with zeros."""
        misfit = (problem.operator.forward(x) - problem.y).abs().square().flatten(1).sum(1) / 2
        down, right = padding((x.shape[ROWS], x.shape[COLUMNS]), self.levels)
        parts = analysis(pad(x, (0, right, 0, down)), self.levels)
        sizes = [p.square().sum(CHANNELS).sqrt() for p in parts]
        total = sum(s.sum((0, ROWS, COLUMNS)) for s in sizes[1:])
        if self.coarse:
            total = total + sizes[0].sum((ROWS, COLUMNS))
        return misfit + (self.lam + self.noise_weight * problem.sigma_y) * total

    def _shrunk(self, x: Tensor, threshold: float, i: int) -> Tensor:
        """W^T S(W x), W shifted by what step ``i`` says."""
        shift = tuple(turn * i % 2**self.levels for turn in TURNS) if self.spin else (0, 0)
        parts = analysis(x.roll(shift, (ROWS, COLUMNS)), self.levels)
        first = 0 if self.coarse else 1
        kept = [*parts[:first], *(_joint_shrink(p, threshold) for p in parts[first:])]
        return synthesis(kept).roll(tuple(-n for n in shift), (ROWS, COLUMNS))


def _joint_shrink(parts: Tensor, threshold: float) -> Tensor:
    """Soft threshold of the magnitude over the channels (... c h w)."""
    size = parts.square().sum(CHANNELS, keepdim=True).sqrt()
    return parts * ((size - threshold).clamp_min(0) / size.clamp_min(torch.finfo(size.dtype).tiny))


def _momentum(i: int) -> float:
    """t of step ``i``: t_0 = 1, t_{k+1} = (1 + sqrt(1 + 4 t_k^2)) / 2."""
    t = 1.0
    for _ in range(i):
        t = (1 + math.sqrt(1 + 4 * t * t)) / 2
    return t
