"""The seams: what a prior, an operator, a sampler and a problem are. Imports only torch.

Axes: ``s`` slice (= batch), ``c`` channel, ``h`` row, ``w`` column, ``m`` measurement (any shape). A volume is
``(s c h w)``. Samplers and priors see real float32 in *prior units*: [-1, 1] over the prior's stated range.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor


class Space(NamedTuple):
    """One side of an operator: enough to draw a random element of it."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@runtime_checkable
class Prior(Protocol):
    """A denoiser at every noise level. A wrapper of a Prior is a Prior."""

    channels: int

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """E[x_0 | x_0 + sigma n = x]: x (s c h w), sigma () or (s); slices independent, differentiable in x."""
        ...


@runtime_checkable
class Operator(Protocol):
    """A differentiable forward model. Immutable: no call changes what a later call returns."""

    @property
    def domain(self) -> Space: ...

    @property
    def range(self) -> Space: ...

    def forward(self, x: Tensor) -> Tensor: ...

    def vjp(self, x: Tensor, r: Tensor) -> Tensor:
        """J(x)^H r."""
        ...


@runtime_checkable
class LinearOperator(Operator, Protocol):
    """A linear operator with an exact adjoint: Re<Ax, y> = Re<x, A^H y> to rounding."""

    def adjoint(self, y: Tensor) -> Tensor: ...

    def normal(self, x: Tensor) -> Tensor: ...

    def solve(self, rhs: Tensor, rho: float, x0: Tensor | None = None) -> Tensor:
        """(A^H A + rho I)^-1 rhs."""
        ...


class Noise(Protocol):
    """Standard normal noise keyed by (seed, step, draw, absolute slice); step -1 is ``init``."""

    def __call__(self, step: int, like: Tensor, draw: int = 0) -> Tensor: ...


class Problem(NamedTuple):
    """y = A(x) + sigma_y n, in prior units.

    zero: the value of x that stands for physical zero (no attenuation, no signal): -1 for HU from -1000.
    """

    operator: Any
    y: Tensor
    sigma_y: float
    prior: Prior
    noise: Noise
    zero: float = 0.0


class State(Protocol):
    """All that changes in a run, so all that a checkpoint holds: tensors and ints (a NamedTuple of them)."""

    @property
    def i(self) -> int: ...

    @property
    def x(self) -> Tensor:
        """The current clean estimate (s c h w)."""
        ...


S = TypeVar("S", bound=State)


class Sampler(Protocol[S]):
    """A frozen dataclass: its fields are its configuration, its command line, its line in the log.

    ``estimate`` says what its result is: a "posterior sampler" has the posterior's mean, spread and coverage at its
    defaults, as far as exact posteriors show; an "approximate sampler" is one in form; a "point estimate" is one image
    without spread; a "prior sampler" ignores the measurements.
    """

    estimate: ClassVar[str]

    @property
    def steps(self) -> int: ...

    def init(self, problem: Problem) -> S: ...

    def step(self, problem: Problem, state: S) -> S: ...

    def sigma(self, i: int) -> float:
        """Noise level of step ``i``, for messages."""
        ...
