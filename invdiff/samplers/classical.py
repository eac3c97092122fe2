"""Prior-free baselines on the same seams: FBP, CGLS, total variation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from invdiff.linalg import cg, cg_floor, cg_step, couples, difference, difference_adjoint, inner, plus_roughness, shrink
from invdiff.protocols import Problem
from invdiff.samplers.checks import above_nothing, at_least, linear

SLICES, ROWS, COLUMNS = 0, 2, 3
CHANNELS = 2  # of a gradient (3 s c h w)


class FBPState(NamedTuple):
    """i: steps done; x: image (s c h w)."""

    i: int
    x: Tensor


@dataclass(frozen=True)
class OneShot:
    """What an image made in one step has: a point estimate without noise levels. A subclass writes ``step``."""

    estimate: ClassVar[str] = "point estimate"

    steps: int = 1

    def __post_init__(self) -> None:
        at_least(self, steps=1)

    def sigma(self, i: int) -> float:  # noqa: ARG002
        """Always 0: no noise levels."""
        return 0.0

    def init(self, problem: Problem) -> FBPState:
        """Zero."""
        linear(self, problem)
        return FBPState(0, torch.zeros(problem.operator.domain.shape, device=problem.y.device))


@dataclass(frozen=True)
class FBP(OneShot):
    """The operator's own pseudo-inverse in one step: filtered back-projection for CT, zero-filling for MRI.

    Of the data as the scanner gave them: what no view sees counts as air, not as the middle of the prior's range.
    """

    def step(self, problem: Problem, state: FBPState) -> FBPState:  # noqa: ARG002
        """x = A^+ y."""
        operator = problem.operator
        return FBPState(self.steps, above_nothing(problem, getattr(operator, "pinv", operator.adjoint)))


class CGLSState(NamedTuple):
    """i: steps done; x: image; r: residual of the normal equations; p: direction (s c h w); floor: see ``cg_step``."""

    i: int
    x: Tensor
    r: Tensor
    p: Tensor
    floor: Tensor


@dataclass(frozen=True)
class CGLS:
    """Conjugate gradients on the normal equations from zero; stopping early is the regularisation.

    Args:
        steps: iterations; 10 to 30 is usual for sparse-view CT.
    """

    estimate: ClassVar[str] = "point estimate"

    steps: int = 15

    def __post_init__(self) -> None:
        at_least(self, steps=1)

    def sigma(self, i: int) -> float:  # noqa: ARG002
        """Always 0: no noise levels."""
        return 0.0

    def init(self, problem: Problem) -> CGLSState:
        """x = 0, r = p = A^H y."""
        r = linear(self, problem).adjoint(problem.y)
        return CGLSState(0, torch.zeros_like(r), r, r, cg_floor(inner(r, r, couples(problem.operator))))

    def step(self, problem: Problem, state: CGLSState) -> CGLSState:
        """One iteration, a step length a slice, or one for all where A couples them (Hestenes & Stiefel 1952)."""
        i, x, r, p, floor = state
        normal = partial(self.normal, problem)
        return CGLSState(i + 1, *cg_step(normal, x, r, p, floor, couples(problem.operator)), floor)

    def normal(self, problem: Problem, v: Tensor) -> Tensor:
        """A^H A v."""
        return problem.operator.normal(v)  # type: ignore[attr-defined, no-any-return]


class TVState(NamedTuple):
    """i: sweeps done; x: image (s c h w); z, u: split gradient (rows, columns, slices) and scaled dual (3 s c h w)."""

    i: int
    x: Tensor
    z: Tensor
    u: Tensor


@dataclass(frozen=True)
class TV:
    """min ||A x - y||^2 / 2 + lam TV_hw(x) + lam_z ||D_z x||_1 by ADMM with CG (Goldstein & Osher 2009).

    The TV in the plane is isotropic, of forward differences (turned by 90 degrees a body comes out a little different),
    and joint over channels (real and imaginary part of a complex image). ``lam_z`` 0 leaves slices uncoupled.

    Args:
        steps: ADMM sweeps.
        lam: weight in the plane, for [-1, 1] images and ||A|| = 1.
        lam_z: weight across slices.
        rho: ADMM penalty; it changes the speed, not the limit. Ten times more is several times slower on sparse views.
        cg_steps: CG steps a sweep.
    """

    estimate: ClassVar[str] = "point estimate"

    steps: int = 60
    lam: float = 3e-4
    lam_z: float = 3e-4
    rho: float = 0.005
    cg_steps: int = 10

    def __post_init__(self) -> None:
        at_least(self, steps=1, lam=0, lam_z=0, rho=1e-12, cg_steps=1)

    def sigma(self, i: int) -> float:  # noqa: ARG002
        """Always 0: no noise levels."""
        return 0.0

    def init(self, problem: Problem) -> TVState:
        """Zero."""
        x = torch.zeros_like(linear(self, problem).adjoint(problem.y))
        z = torch.zeros(3, *x.shape, dtype=x.dtype, device=x.device)
        return TVState(0, x, z, z)

    def step(self, problem: Problem, state: TVState) -> TVState:
        """One ADMM sweep."""
        i, x, z, u = state
        A, dims = problem.operator, (ROWS, COLUMNS, SLICES) if self.lam_z else (ROWS, COLUMNS)

        def normal(v: Tensor) -> Tensor:
            out = A.normal(v).clone()  # its own memory, whatever A gives
            for d in dims:
                out = plus_roughness(out, v, self.rho, d)
            return out

        rhs = A.adjoint(problem.y)
        for k, d in enumerate(dims):
            rhs = rhs + self.rho * difference_adjoint(z[k] - u[k], d)
        x = cg(normal, rhs, x, self.cg_steps, joint=bool(self.lam_z) or couples(A))
        gradient = torch.stack([difference(x, d) for d in (ROWS, COLUMNS, SLICES)])
        split = gradient + u
        size = split[:2].square().sum((0, CHANNELS), keepdim=True).sqrt()
        kept = (size - self.lam / self.rho).clamp_min(0) / size.clamp_min(torch.finfo(x.dtype).tiny)
        across = _joint_shrink(split[2:], self.lam_z / self.rho) if self.lam_z else torch.zeros_like(split[2:])
        z = torch.cat([split[:2] * kept, across])
        u = split - z
        if not self.lam_z:
            u = torch.cat([u[:2], across])
        return TVState(i + 1, x, z, u)


def _joint_shrink(v: Tensor, threshold: float) -> Tensor:
    """Soft threshold of the magnitude over the channels: v (k s c h w)."""
    if v.shape[CHANNELS] == 1:
        return shrink(v, threshold)
    size = v.square().sum(CHANNELS, keepdim=True).sqrt()
    return v * ((size - threshold).clamp_min(0) / size.clamp_min(torch.finfo(v.dtype).tiny))
