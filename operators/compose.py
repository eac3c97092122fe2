"""Operators made of operators: normalised, whitened, stacked. The algebra itself is in ``linear``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from invdiff.operators.linear import Composition, LinearOperatorBase, Scaled
from invdiff.operators.mask import Diagonal
from invdiff.protocols import Space


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

    @property
    def row_weights(self) -> Tensor | None:
        """W, where it is a tensor."""
        return self.outer.diagonal.abs().expand(self.range.shape) if isinstance(self.outer, Diagonal) else None

    def zero_filled(self, y: Tensor) -> Tensor:
        """A's ``zero_filled`` of the measurements before whitening."""
        return self.inner.zero_filled(self.outer.pinv(y))

    def split(self, index: Sequence[int]) -> LinearOperatorBase:
        """The chosen views with their weights."""
        part = self.inner.split(index)
        if not isinstance(self.outer, Diagonal):
            return Whitened(part, self.outer.split(index))
        return Whitened(part, self.inner.part(self.outer.diagonal.expand(self.range.shape), index))

    def whole(self, views: int) -> LinearOperatorBase:
        """That of A, under ray weights of the same mean square, or under the same covariance."""
        return self._weighted(self.inner.whole(views))

    def unmeasured(self, views: int) -> LinearOperatorBase:
        """Likewise."""
        return self._weighted(self.inner.unmeasured(views))

    def _weighted(self, other: LinearOperatorBase) -> LinearOperatorBase:
        if isinstance(self.outer, Diagonal):
            return Scaled(other, float(self.outer.diagonal.abs().square().mean().sqrt()))
        if self.outer.domain != other.range:
            raise ValueError(
                f"the whitening is for {self.outer.domain.shape}, the views wanted give {other.range.shape}"
            )
        return Composition(self.outer, other)

    @property
    def views(self) -> tuple[int, ...]:
        """Those of A."""
        return self.inner.views

    def part(self, y: Tensor, index: Sequence[int]) -> Tensor:
        """As A chooses: the weights stay with their measurements."""
        return self.inner.part(y, index)


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
        self.coupled = any(a.coupled for a in operators)
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
