"""What every linear operator has, written once: adjoint, products, multiples, norm, normal equations, devices."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from invdiff import linalg
from invdiff.noise import KeyedNoise
from invdiff.protocols import Space


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """The torch dtype of a name such as "float32"; a dtype stays itself.

    Raises:
        ValueError: not a real or complex floating dtype.
    """
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not (found.is_floating_point or found.is_complex):
        raise ValueError(f"dtype is {dtype!r}; a floating or complex one such as 'float32' or 'complex64' is wanted")
    return found


def dtype_name(dtype: torch.dtype) -> str:
    """The name that ``as_dtype`` reads: "float32" of torch.float32."""
    return str(dtype).removeprefix("torch.")


class LinearOperatorBase(ABC):
    """Base of all linear operators: a subclass sets ``domain`` and ``range`` and writes ``_forward`` and ``_adjoint``.

    Immutable: nothing is assigned after ``__init__``. Linear over the reals; axis 0 of both sides is the slice.

    Attributes:
        kind: name of the entry point in ``invdiff.operators``.
        unit: physical unit of the domain, "" where any will do.
        unitary: A is an invertible isometry, so that A^H is its inverse.
        coupled: a slice of the measurements depends on several slices of the image (3D encoding): conjugate gradients
            then take one step length for all slices.
        domain: what ``forward`` takes.
        range: what ``forward`` gives.
    """

    kind: ClassVar[str] = ""
    unit: str = ""
    unitary: ClassVar[bool] = False
    coupled: bool = False
    domain: Space
    range: Space

    @abstractmethod
    def _forward(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def _adjoint(self, y: Tensor) -> Tensor: ...

    def forward(self, x: Tensor) -> Tensor:
        """A x.

        Args:
            x: an element of ``domain``.

        Returns:
            An element of ``range``, on the device of ``x``.

        Raises:
            ValueError: another shape or dtype.
        """
        self._check(x, self.domain, "input")
        return self._forward(x)

    def adjoint(self, y: Tensor) -> Tensor:
        """A^H y, exact: Re<A x, y> = Re<x, A^H y> to rounding.

        Args:
            y: an element of ``range``.

        Returns:
            An element of ``domain``, on the device of ``y``.

        Raises:
            ValueError: another shape or dtype.
        """
        self._check(y, self.range, "measurement")
        return self._adjoint(y)

    def __call__(self, x: Tensor) -> Tensor:
        """``forward``."""
        return self.forward(x)

    def vjp(self, x: Tensor, r: Tensor) -> Tensor:
        """J(x)^H r, which is A^H r at every ``x``."""
        self._check(x, self.domain, "input")
        return self.adjoint(r)

    def normal(self, x: Tensor) -> Tensor:
        """A^H A x."""
        return self.adjoint(self.forward(x))

    def solve(
        self, rhs: Tensor, rho: float, x0: Tensor | None = None, iterations: int = 100, tolerance: float | None = None
    ) -> Tensor:
        """(A^H A + rho I)^-1 rhs, by conjugate gradients unless a closed form exists.

        One step length a slice, or one for all where slices are ``coupled``.

        Args:
            rhs: an element of ``domain``.
            rho: greater than 0.
            x0: first guess, zero if None; closed forms do not need it.
            iterations: most iterations; closed forms need none.
            tolerance: residual norm relative to that of ``rhs``, slice by slice; ten times the rounding unit if None.

        Raises:
            ValueError: ``rho`` is not positive, or another shape or dtype.
        """
        self._check_rho(rho)
        self._check(rhs, self.domain, "right-hand side")
        goal = 10 * torch.finfo(rhs.dtype).eps if tolerance is None else tolerance
        return linalg.cg(lambda v: self.normal(v) + rho * v, rhs, x0, iterations, goal, self.coupled)

    def pinv(self, y: Tensor) -> Tensor:
        """A first reconstruction: the least-squares solution of least norm, by conjugate gradients from zero.

        Operators with a better-known answer give that: filtered backprojection for CT, zero filling for one coil.

        Args:
            y: an element of ``range``.
        """
        return linalg.cg(self.normal, self.adjoint(y), iterations=50, tolerance=1e-5, joint=self.coupled)

    def zero_filled(self, y: Tensor) -> Tensor:
        """The image of y with zero for what was not measured: the adjoint, weighted where samples are uneven.

        In the unit of the domain; cheap, never an inversion.

        Args:
            y: an element of ``range``.
        """
        return self.adjoint(y)

    def norm(self, iterations: int = 50) -> float:
        """The largest singular value, from below, by power iterations from a fixed start."""
        start = KeyedNoise(0)(-1, torch.empty(self.domain.shape, dtype=self.domain.dtype, device=self.device))
        return linalg.power_norm(self.normal, start, iterations)

    @property
    def row_weights(self) -> Tensor | None:
        """What whitening multiplied each measurement by, real, the shape of the range; None where there is no such."""
        return None

    @property
    def views(self) -> tuple[int, ...]:
        """What ``split`` chooses from: numbers of views, lines or readouts; none where there are none."""
        return ()

    def split(self, index: Sequence[int]) -> LinearOperatorBase:
        """The operator of the views ``index`` alone, whose measurements are ``part(y, index)``.

        Raises:
            ValueError: this operator has no views to choose from.
        """
        raise ValueError(f"{type(self).__name__} has no views to choose {list(index)} from; CT or MRI is wanted")

    def part(self, y: Tensor, index: Sequence[int]) -> Tensor:
        """The measurements of ``split(index)`` from those of this operator: ``y[..., index, :]`` for CT.

        Args:
            y: (s ...), any that broadcasts over ``range`` (weights too) and has its axis of views.
            index: which of ``views``, in any order.
        """
        return y.index_select(-2, torch.as_tensor(list(index), device=y.device))

    def whole(self, views: int) -> LinearOperatorBase:
        """The same scan with views or lines evenly over all that there are, at most ``views`` of them.

        Raises:
            ValueError: this operator does not know what else could be measured.
        """
        raise ValueError(f"{type(self).__name__} has no whole of {views} views; CT, Cartesian MRI or a mask is wanted")

    def unmeasured(self, views: int) -> LinearOperatorBase:
        """Likewise, of those that this scan did not measure.

        Raises:
            ValueError: as ``whole``; or nothing is left to measure.
        """
        raise ValueError(f"{type(self).__name__} has no {views} unmeasured views; CT or Cartesian MRI is wanted")

    def fields(self) -> dict[str, Any]:
        """Constructor arguments as JSON-able values or tensors: ``type(A)(**A.fields())`` is the same operator.

        Raises:
            ValueError: a composite operator, which has none.
        """
        raise ValueError(f"{type(self).__name__} has no fields to store; store the operators that it is made of")

    def to(self, device: torch.device | str) -> Self:
        """The same operator with its tensors on ``device``; this one stays as it is."""
        moved = copy.copy(self)
        moved.__dict__.update({name: _moved(value, device) for name, value in vars(self).items()})
        return moved

    @property
    def device(self) -> torch.device:
        """Where this operator's tensors are; data on another device are served too, with a copy each call."""
        return next((t.device for t in _tensors(tuple(vars(self).values()))), torch.device("cpu"))

    @property
    def H(self) -> LinearOperatorBase:  # noqa: N802
        """The adjoint as an operator."""
        return Adjoint(self)

    def __matmul__(self, other: LinearOperatorBase) -> LinearOperatorBase:
        """``(A @ B)(x) = A(B(x))``."""
        return Composition(self, other)

    def __mul__(self, scale: float) -> LinearOperatorBase:
        """``(c * A)(x) = c A(x)`` for a real number c."""
        return Scaled(self, scale)

    __rmul__ = __mul__

    def __truediv__(self, scale: float) -> LinearOperatorBase:
        """``A / c``."""
        if scale == 0:
            raise ValueError("an operator divided by 0; a number other than 0 is wanted")
        return self * (1 / scale)

    @staticmethod
    def _check(x: Tensor, space: Space, what: str) -> None:
        if tuple(x.shape) != space.shape or x.dtype != space.dtype:
            came, wanted = (f"{tuple(v.shape)} {dtype_name(v.dtype)}" for v in (x, space))
            raise ValueError(f"the {what} is {came}; {wanted} is wanted")

    @staticmethod
    def _check_rho(rho: float) -> None:
        if not (rho > 0 and math.isfinite(rho)):
            raise ValueError(f"rho is {rho}; a positive number is wanted")


class SelfAdjoint(torch.autograd.Function):
    """A product with A^H A that autograd need not look into: its derivative is the same product, to any order."""

    @staticmethod
    def forward(x: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
        """``product(x)``, which may work in place on what it makes itself."""
        return product(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Callable[[Tensor], Tensor]], output: Tensor) -> None:
        """Keep the product, nothing of the data."""
        del output
        ctx.product = inputs[1]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """The product of the gradient."""
        return SelfAdjoint.apply(g, ctx.product), None


class Adjoint(LinearOperatorBase):
    """A^H as an operator; its own ``H`` is A again."""

    def __init__(self, operator: LinearOperatorBase) -> None:
        self.operator = operator
        self.domain, self.range = operator.range, operator.domain
        self.coupled = operator.coupled

    def _forward(self, x: Tensor) -> Tensor:
        return self.operator.adjoint(x)

    def _adjoint(self, y: Tensor) -> Tensor:
        return self.operator.forward(y)

    @property
    def H(self) -> LinearOperatorBase:  # noqa: N802
        """The operator itself."""
        return self.operator


class Composition(LinearOperatorBase):
    """(A B)(x) = A(B(x)).

    Args:
        outer: A.
        inner: B, whose range is the domain of A.

    Raises:
        ValueError: the spaces differ.
    """

    def __init__(self, outer: LinearOperatorBase, inner: LinearOperatorBase) -> None:
        if outer.domain != inner.range:
            raise ValueError(
                f"{type(outer).__name__} takes {outer.domain} and {type(inner).__name__} gives {inner.range}; "
                "the same is wanted"
            )
        self.outer, self.inner = outer, inner
        self.domain, self.range, self.unit = inner.domain, outer.range, inner.unit
        self.coupled = outer.coupled or inner.coupled

    def _forward(self, x: Tensor) -> Tensor:
        return self.outer.forward(self.inner.forward(x))

    def _adjoint(self, y: Tensor) -> Tensor:
        return self.inner.adjoint(self.outer.adjoint(y))

    def normal(self, x: Tensor) -> Tensor:
        """B^H (A^H A) B x, with A's own normal."""
        return self.inner.adjoint(self.outer.normal(self.inner.forward(x)))

    def solve(
        self, rhs: Tensor, rho: float, x0: Tensor | None = None, iterations: int = 100, tolerance: float | None = None
    ) -> Tensor:
        """B^H (A^H A + rho I)^-1 B rhs where B is unitary, which keeps A's closed form; else conjugate gradients."""
        if not self.inner.unitary:
            return super().solve(rhs, rho, x0, iterations, tolerance)
        first = None if x0 is None else self.inner.forward(x0)
        return self.inner.adjoint(self.outer.solve(self.inner.forward(rhs), rho, first, iterations, tolerance))

    @property
    def row_weights(self) -> Tensor | None:
        """Those of A."""
        return self.outer.row_weights

    def pinv(self, y: Tensor) -> Tensor:
        """B's ``pinv`` of A's ``pinv``."""
        return self.inner.pinv(self.outer.pinv(y))

    @property
    def views(self) -> tuple[int, ...]:
        """Those of A."""
        return self.outer.views

    def zero_filled(self, y: Tensor) -> Tensor:
        """B's ``zero_filled`` of A's."""
        return self.inner.zero_filled(self.outer.zero_filled(y))

    def split(self, index: Sequence[int]) -> LinearOperatorBase:
        """The chosen views of A, after B."""
        return Composition(self.outer.split(index), self.inner)

    def whole(self, views: int) -> LinearOperatorBase:
        """That of A, after B."""
        return Composition(self.outer.whole(views), self.inner)

    def unmeasured(self, views: int) -> LinearOperatorBase:
        """That of A, after B."""
        return Composition(self.outer.unmeasured(views), self.inner)

    def part(self, y: Tensor, index: Sequence[int]) -> Tensor:
        """As A chooses."""
        return self.outer.part(y, index)


class Scaled(LinearOperatorBase):
    """(c A)(x) = c A(x).

    Args:
        operator: A.
        scale: c, a real number other than 0.

    Raises:
        ValueError: 0, NaN or infinite.
    """

    def __init__(self, operator: LinearOperatorBase, scale: float) -> None:
        if not (math.isfinite(scale) and scale != 0):
            raise ValueError(f"the scale is {scale}; a finite number other than 0 is wanted")
        self.operator, self.scale = operator, float(scale)
        self.domain, self.range, self.unit = operator.domain, operator.range, operator.unit
        self.coupled = operator.coupled

    def _forward(self, x: Tensor) -> Tensor:
        return self.scale * self.operator.forward(x)

    def _adjoint(self, y: Tensor) -> Tensor:
        return self.scale * self.operator.adjoint(y)

    def normal(self, x: Tensor) -> Tensor:
        """c^2 A^H A x."""
        return self.scale**2 * self.operator.normal(x)

    def solve(
        self, rhs: Tensor, rho: float, x0: Tensor | None = None, iterations: int = 100, tolerance: float | None = None
    ) -> Tensor:
        """(A^H A + rho/c^2 I)^-1 rhs / c^2, which keeps A's closed form."""
        self._check_rho(rho)
        return self.operator.solve(rhs / self.scale**2, rho / self.scale**2, x0, iterations, tolerance)

    @property
    def row_weights(self) -> Tensor | None:
        """Those of A: c is in all of them."""
        return self.operator.row_weights

    def pinv(self, y: Tensor) -> Tensor:
        """A's ``pinv``, divided by c."""
        return self.operator.pinv(y / self.scale)

    def zero_filled(self, y: Tensor) -> Tensor:
        """A's ``zero_filled``, divided by c."""
        return self.operator.zero_filled(y / self.scale)

    def split(self, index: Sequence[int]) -> LinearOperatorBase:
        """The chosen views, with the same c."""
        return Scaled(self.operator.split(index), self.scale)

    def whole(self, views: int) -> LinearOperatorBase:
        """That of A, with the same c."""
        return Scaled(self.operator.whole(views), self.scale)

    def unmeasured(self, views: int) -> LinearOperatorBase:
        """That of A, with the same c."""
        return Scaled(self.operator.unmeasured(views), self.scale)

    @property
    def views(self) -> tuple[int, ...]:
        """Those of A."""
        return self.operator.views

    def part(self, y: Tensor, index: Sequence[int]) -> Tensor:
        """As A chooses."""
        return self.operator.part(y, index)


def _moved(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, tuple):
        parts = [_moved(v, device) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value.to(device) if isinstance(value, Tensor | LinearOperatorBase) else value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, LinearOperatorBase):
        yield from _tensors(tuple(vars(value).values()))
