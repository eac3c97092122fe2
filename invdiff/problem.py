"""Physical units to prior units and back: builds a Problem whose operator has norm 1, and maps the answer back.

The one affine map is x_phys = a x + b; with L = ||A||, A' = A / L, y' = (y - A b) / (a L), sigma_y' = sigma_y / (a L).
A nonlinear operator gets A'(x) = A(a x + b) and y unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from invdiff.linalg import couples, power_norm
from invdiff.noise import KeyedNoise
from invdiff.protocols import LinearOperator, Noise, Operator, Prior, Problem, Space
from invdiff.units import MU_WATER, hu_affine

NORM_ITERATIONS = 30  # power iterations for ||A||: 1 % from below for projectors


class Affine(NamedTuple):
    """x_phys = scale * x + offset."""

    scale: float
    offset: float

    def __call__(self, x: Tensor) -> Tensor:
        return self.scale * x + self.offset

    def after(self, first: Affine) -> Affine:
        """This map of the result of ``first``."""
        return Affine(self.scale * first.scale, self.scale * first.offset + self.offset)


class Prepared(NamedTuple):
    """A Problem in prior units and the way back to the prior's physical unit."""

    problem: Problem
    to_physical: Affine
    unit: str
    norm: float


@dataclass(frozen=True)
class ScaledLinear:
    """A linear operator over a positive number: A' = A / norm, with exact adjoint and solve.

    Args:
        operator: A.
        norm: what it is divided by.
    """

    operator: LinearOperator
    norm: float

    @property
    def domain(self) -> Space:
        return self.operator.domain

    @property
    def range(self) -> Space:
        return self.operator.range

    @property
    def coupled(self) -> bool:
        return couples(self.operator)

    def forward(self, x: Tensor) -> Tensor:
        return self.operator.forward(x) / self.norm

    def adjoint(self, y: Tensor) -> Tensor:
        return self.operator.adjoint(y) / self.norm

    def vjp(self, x: Tensor, r: Tensor) -> Tensor:
        return self.operator.vjp(x, r) / self.norm

    def normal(self, x: Tensor) -> Tensor:
        return self.operator.normal(x) / self.norm**2

    def solve(self, rhs: Tensor, rho: float, x0: Tensor | None = None) -> Tensor:
        return self.norm**2 * self.operator.solve(rhs, rho * self.norm**2, x0)

    def pinv(self, y: Tensor) -> Tensor:
        """A first guess of x from y: the operator's own ``pinv`` (FBP for CT), else its adjoint."""
        pinv = getattr(self.operator, "pinv", None)
        return self.norm * pinv(y) if pinv is not None else self.adjoint(y)

    def zero_filled(self, y: Tensor) -> Tensor:
        """Zero for what was not measured: the operator's own ``zero_filled``, else its adjoint."""
        own = getattr(self.operator, "zero_filled", None)
        return self.norm * own(y) if own is not None else self.norm * self.operator.adjoint(y)

    @property
    def row_weights(self) -> Tensor | None:
        """What whitening multiplied each measurement by, up to a number; None where it was nothing."""
        weights: Tensor | None = getattr(self.operator, "row_weights", None)
        return weights

    @property
    def views(self) -> tuple[int, ...]:
        """What can be split, none where the operator has no views."""
        return tuple(getattr(self.operator, "views", ()))

    def part(self, y: Tensor, index: Sequence[int]) -> Tensor:
        """The measurements of some views, as the operator chooses."""
        chosen: Tensor = _own(self.operator, "part")(y, index)
        return chosen

    def whole(self, views: int) -> ScaledLinear:
        """The operator's ``whole``, over the same number."""
        return ScaledLinear(_own(self.operator, "whole")(views), self.norm)

    def unmeasured(self, views: int) -> ScaledLinear:
        """The operator's ``unmeasured``, over the same number."""
        return ScaledLinear(_own(self.operator, "unmeasured")(views), self.norm)

    def to(self, device: torch.device | str) -> ScaledLinear:
        """The same on ``device``, where the operator can be moved."""
        moved: Any = getattr(self.operator, "to", lambda _device: self.operator)(device)
        return ScaledLinear(moved, self.norm)


def _own(operator: Any, name: str) -> Any:
    own = getattr(operator, name, None)
    if own is None:
        raise ValueError(f"{type(operator).__name__} has no views to choose from; CT, MRI or a renderer is wanted")
    return own


@dataclass(frozen=True)
class PriorUnits:
    """A nonlinear operator on prior units: A'(x) = A(a x + b).

    Args:
        operator: A on physical units.
        affine: prior units to the operator's unit.
    """

    operator: Operator
    affine: Affine

    @property
    def domain(self) -> Space:
        return self.operator.domain

    @property
    def range(self) -> Space:
        return self.operator.range

    def forward(self, x: Tensor) -> Tensor:
        return self.operator.forward(self.affine(x))

    def vjp(self, x: Tensor, r: Tensor) -> Tensor:
        return self.affine.scale * self.operator.vjp(self.affine(x), r)

    @property
    def views(self) -> tuple[int, ...]:
        """What can be split, none where the operator has no views."""
        return tuple(getattr(self.operator, "views", ()))

    def split(self, index: Sequence[int]) -> PriorUnits:
        """The operator of some views, on prior units."""
        return PriorUnits(_own(self.operator, "split")(index), self.affine)

    def part(self, y: Tensor, index: Sequence[int]) -> Tensor:
        """The measurements of some views, as the operator chooses."""
        chosen: Tensor = _own(self.operator, "part")(y, index)
        return chosen

    def whole(self, views: int) -> PriorUnits:
        """The operator's ``whole``, on prior units."""
        return PriorUnits(_own(self.operator, "whole")(views), self.affine)

    def unmeasured(self, views: int) -> PriorUnits:
        """The operator's ``unmeasured``, on prior units."""
        return PriorUnits(_own(self.operator, "unmeasured")(views), self.affine)

    def lift(self, y: Tensor, chosen: Sequence[int] | None = None) -> Tensor:
        """The operator's own features of its measurements: for networks, in no unit."""
        features: Tensor = _own(self.operator, "lift")(y, chosen)
        return features


@dataclass(frozen=True)
class Nothing:
    """The operator that measures nothing, for samples of the prior alone: its range is (s 0).

    It has no adjoint on purpose: samplers that need measurements refuse it as they refuse any nonlinear operator.

    Args:
        domain: of the images (s c h w).
    """

    domain: Space

    @property
    def range(self) -> Space:
        return Space((self.domain.shape[0], 0), self.domain.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :0]

    def vjp(self, x: Tensor, r: Tensor) -> Tensor:  # noqa: ARG002
        return torch.zeros_like(x)


def unconditional(
    shape: tuple[int, ...], prior: Prior, noise: Noise | None = None, device: torch.device | str = "cpu"
) -> Prepared:
    """A Problem without measurements, for samples of the prior, and the way to the prior's unit.

    Args:
        shape: of the samples, (s c h w).
        prior: the prior.
        noise: keyed noise; seed 0 if None.
        device: where the samples are drawn; the prior must be there.

    Raises:
        ValueError: a shape that is not (s c h w), or not the prior's channels.
    """
    if len(shape) != 4 or min(shape) < 1:
        raise ValueError(f"the samples' shape is {tuple(shape)}; (s c h w), each at least 1, is wanted")
    if shape[1] != prior.channels:
        raise ValueError(f"the samples' shape {tuple(shape)} has {shape[1]} channels; the prior has {prior.channels}")
    operator = Nothing(Space(tuple(shape), torch.float32))
    to_physical, _, unit = prior_to_operator(prior, operator)
    y = torch.zeros(operator.range.shape, device=device)
    return Prepared(Problem(operator, y, 0.0, prior, KeyedNoise() if noise is None else noise), to_physical, unit, 1.0)


def prior_to_operator(prior: Prior, operator: Operator, mu_water: float = MU_WATER) -> tuple[Affine, Affine, str]:
    """(prior units to the prior's physical unit, prior units to the operator's unit, the prior's unit).

    Raises:
        ValueError: units that cannot be converted into each other.
    """
    info = getattr(prior, "info", None)
    if info is None:
        return Affine(1.0, 0.0), Affine(1.0, 0.0), ""
    to_physical = Affine((info.high - info.low) / 2, (info.high + info.low) / 2)
    unit = getattr(operator, "unit", "")
    if unit in ("", info.unit):
        return to_physical, to_physical, info.unit
    if (info.unit, unit) == ("HU", "1/mm"):
        return to_physical, Affine(*hu_affine(mu_water)).after(to_physical), info.unit
    raise ValueError(
        f"the prior {info.name!r} is in {info.unit}, the operator acts on {unit}; give a prior in that unit"
    )


def prepare(
    y: Tensor,
    operator: Operator,
    prior: Prior,
    sigma_y: float,
    noise: Noise | None = None,
    mu_water: float = MU_WATER,
) -> Prepared:
    """The Problem in prior units.

    Args:
        y: measurements in physical units, the shape of ``operator.range``.
        operator: A, on physical units (attenuation in 1/mm for CT); linear where it has ``adjoint``.
        prior: the prior; its ``info`` states the range and the unit; without one, prior units are physical.
        sigma_y: standard deviation of one real component of y's noise, in y's unit; 0 is noiseless.
        noise: keyed noise; seed 0 if None.
        mu_water: attenuation of water in 1/mm, for CT.

    Raises:
        ValueError: shapes, dtypes, channels or units that do not fit, non-finite y, a negative sigma_y.
    """
    _check(y, operator, prior, sigma_y)
    to_physical, to_operator, unit = prior_to_operator(prior, operator, mu_water)
    noise = KeyedNoise() if noise is None else noise
    if not hasattr(operator, "adjoint"):
        problem = Problem(PriorUnits(operator, to_operator), y, sigma_y, prior, noise)
        return Prepared(problem, to_physical, unit, 1.0)
    linear: Any = operator
    start = KeyedNoise()(0, torch.empty(operator.domain.shape, dtype=operator.domain.dtype, device=y.device))
    norm = power_norm(linear.normal, start, NORM_ITERATIONS)
    if norm == 0:
        raise ValueError("the operator is zero: it measures nothing")
    offset = torch.full(operator.domain.shape, to_operator.offset, dtype=operator.domain.dtype, device=y.device)
    scale = to_operator.scale * norm
    shifted = (y - linear.forward(offset)) / scale
    zero = -to_operator.offset / to_operator.scale
    problem = Problem(ScaledLinear(linear, norm), shifted, sigma_y / scale, prior, noise, zero)
    return Prepared(problem, to_physical, unit, norm)


def _check(y: Tensor, operator: Operator, prior: Prior, sigma_y: float) -> None:
    if tuple(y.shape) != tuple(operator.range.shape):
        raise ValueError(
            f"the measurement has shape {tuple(y.shape)}; the operator gives {tuple(operator.range.shape)}"
        )
    if y.dtype != operator.range.dtype:
        raise ValueError(f"the measurement is {y.dtype}; the operator gives {operator.range.dtype}")
    if operator.domain.dtype.is_complex:
        raise ValueError("the operator acts on complex images; wrap it in RealChannels or KnownPhase")
    if operator.domain.shape[1] != prior.channels:
        raise ValueError(f"the operator has {operator.domain.shape[1]} channels; the prior has {prior.channels}")
    if not bool(torch.isfinite(torch.view_as_real(y) if y.is_complex() else y).all()):
        raise ValueError("the measurement holds NaN or infinite values; finite ones are wanted")
    if sigma_y < 0:
        raise ValueError(f"sigma_y is {sigma_y}; zero or more is wanted")
