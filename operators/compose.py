"""Operators made of operators: adjoint, composition, multiples, whitening, stacks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from invdiff.operators.linear import LinearOperatorBase
from invdiff.operators.mask import Diagonal
from invdiff.protocols import Space


class Adjoint(LinearOperatorBase):
    """A^H as an operator; its own ``H`` is A again."""

    def __init__(self, operator: LinearOperatorBase) -> None:
        self.operator = operator
        self.domain, self.range = operator.range, operator.domain

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

    def pinv(self, y: Tensor) -> Tensor:
        """B's ``pinv`` of A's ``pinv``."""
        return self.inner.pinv(self.outer.pinv(y))

    def split(self, index: Sequence[int]) -> LinearOperatorBase:
        """The chosen views of A, after B."""
        return Composition(self.outer.split(index), self.inner)


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

    def pinv(self, y: Tensor) -> Tensor:
        """A's ``pinv``, divided by c."""
        return self.operator.pinv(y / self.scale)

    def split(self, index: Sequence[int]) -> LinearOperatorBase:
        """The chosen views, with the same c."""
        return Scaled(self.operator.split(index), self.scale)


class Normalised(Scaled):
    """A / ||A||, so that rho, lambda and step sizes mean the same for every operator.

    Args:
        operator: A.
        norm: ||A|| where it is known; else ``operator.norm()``.

    Raises:
        ValueError: ``norm`` is not positive, or A is 0.

    The measurements of the new operator are ``scale * y``.
    """

    def __init__(self, operator: LinearOperatorBase, norm: float | None = None) -> None:
        value = operator.norm() if norm is None else norm
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"the operator's norm is {value}; a positive number is wanted")
        super().__init__(operator, 1 / value)


class Whitened(Composition):
    """W A with W^H W the inverse noise covariance, so that the noise of W y is white with standard deviation 1.

    Args:
        operator: A.
        sqrt_w: W: a real tensor that broadcasts to A's range (ray statistics; 0 for a ray to be left out), or a
            linear operator on A's range (the inverse Cholesky factor of a coil covariance).

    Raises:
        ValueError: a tensor with negative or non-finite values or another shape, or an operator on another space.
    """

    def __init__(self, operator: LinearOperatorBase, sqrt_w: Tensor | LinearOperatorBase) -> None:
        if isinstance(sqrt_w, Tensor):
            if sqrt_w.is_complex() or bool((sqrt_w < 0).any()):
                raise ValueError("sqrt_w holds complex or negative values; real ones from 0 up are wanted")
            super().__init__(Diagonal(sqrt_w, *operator.range), operator)
        else:
            super().__init__(sqrt_w, operator)

    def whiten(self, y: Tensor) -> Tensor:
        """W y: the measurements of this operator, from those of A."""
        return self.outer.forward(y)

    def split(self, index: Sequence[int]) -> LinearOperatorBase:
        """The chosen views with their weights."""
        part = self.inner.split(index)
        if not isinstance(self.outer, Diagonal):
            return Whitened(part, self.outer.split(index))
        weights = self.outer.diagonal.expand(self.range.shape)
        return Whitened(part, weights.index_select(-2, torch.as_tensor(list(index), device=weights.device)))


class Stacked(LinearOperatorBase):
    """x -> (A_1 x, A_2 x, ...), flattened and joined slice by slice; made by ``stack``."""

    def __init__(self, operators: Sequence[LinearOperatorBase]) -> None:
        if not operators:
            raise ValueError("no operators to stack; at least one is wanted")
        first = operators[0]
        for other in operators[1:]:
            if other.domain != first.domain or other.range.dtype != first.range.dtype:
                raise ValueError(
                    f"operators to stack take {first.domain} and {other.domain} and give {first.range.dtype} and "
                    f"{other.range.dtype}; the same is wanted"
                )
            if other.range.shape[0] != first.range.shape[0]:
                raise ValueError(
                    f"operators to stack give {first.range.shape[0]} and {other.range.shape[0]} slices; "
                    "the same is wanted"
                )
        self.operators = tuple(operators)
        self._sizes = tuple(math.prod(a.range.shape[1:]) for a in operators)
        self.domain, self.unit = first.domain, first.unit
        self.range = Space((first.range.shape[0], sum(self._sizes)), first.range.dtype)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """One measurement (s m) of the stack from one of each operator."""
        return torch.cat([part.flatten(1) for part in parts], 1)

    def parts(self, y: Tensor) -> list[Tensor]:
        """The measurement of each operator, in its own shape, from one of the stack (s m)."""
        self._check(y, self.range, "measurement")
        return [p.reshape(a.range.shape) for a, p in zip(self.operators, y.split(self._sizes, 1), strict=True)]

    def _forward(self, x: Tensor) -> Tensor:
        return self.join([a.forward(x) for a in self.operators])

    def _adjoint(self, y: Tensor) -> Tensor:
        images = [a.adjoint(p) for a, p in zip(self.operators, self.parts(y), strict=True)]
        return torch.stack(images).sum(0)


def stack(operators: Sequence[LinearOperatorBase]) -> Stacked:
    """The operator that measures with each of ``operators``: range (s m), its parts flattened and joined.

    Args:
        operators: all with the same domain, dtype of range and number of slices.

    Raises:
        ValueError: none, or spaces that differ.
    """
    return Stacked(operators)
