"""What every nonlinear operator has, written once: the derivative by autograd, checks, devices."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from invdiff.operators.linear import LinearOperatorBase
from invdiff.protocols import Space


class NonlinearOperatorBase(ABC):
    """Base of differentiable operators that are not linear: a subclass sets the spaces and writes ``_forward``.

    Immutable: nothing is assigned after ``__init__``. Axis 0 of both sides is the slice.

    Attributes:
        kind: name of the entry point in ``invdiff.operators``.
        unit: physical unit of the domain, "" where any will do.
        domain: what ``forward`` takes.
        range: what ``forward`` gives.
    """

    kind: ClassVar[str] = ""
    unit: str = ""
    domain: Space
    range: Space

    @abstractmethod
    def _forward(self, x: Tensor) -> Tensor: ...

    def forward(self, x: Tensor) -> Tensor:
        """A(x), an element of ``range``.

        Raises:
            ValueError: x is no element of ``domain``.
        """
        LinearOperatorBase._check(x, self.domain, "input")
        return self._forward(x)

    def __call__(self, x: Tensor) -> Tensor:
        """``forward``."""
        return self.forward(x)

    def vjp(self, x: Tensor, r: Tensor) -> Tensor:
        """J(x)^H r by autograd: an element of ``domain`` from one of ``range``; itself differentiable where x is.

        Raises:
            ValueError: x or r is of another shape or dtype.
        """
        LinearOperatorBase._check(r, self.range, "measurement")
        further = torch.is_grad_enabled() and (x.requires_grad or r.requires_grad)
        with torch.enable_grad():
            at = x if x.requires_grad else x.detach().requires_grad_()
            inner = (r.conj() * self.forward(at)).real.sum() if r.is_complex() else (r * self.forward(at)).sum()
            (product,) = torch.autograd.grad(inner, at, create_graph=further)
        return product

    @property
    def views(self) -> tuple[int, ...]:
        """What ``split`` chooses from; none where there is nothing to choose."""
        return ()

    def split(self, index: Sequence[int]) -> NonlinearOperatorBase:
        """The operator of the views ``index`` alone, whose measurements are ``part(y, index)``.

        Raises:
            ValueError: this operator has no views to choose from.
        """
        raise ValueError(f"{type(self).__name__} has no views to choose {list(index)} from")

    def part(self, y: Tensor, index: Sequence[int]) -> Tensor:
        """The measurements of ``split(index)`` from those of this operator."""
        raise ValueError(f"{type(self).__name__} has no views to choose {list(index)} from, of y {tuple(y.shape)}")

    def fields(self) -> dict[str, Any]:
        """Constructor arguments as JSON-able values or tensors.

        Raises:
            ValueError: an operator that has none.
        """
        raise ValueError(f"{type(self).__name__} has no fields to store")

    def to(self, device: torch.device | str) -> Self:
        """The same operator with its tensors on ``device``; this one stays as it is."""
        moved = copy.copy(self)
        moved.__dict__.update({k: v.to(device) if isinstance(v, Tensor) else v for k, v in vars(self).items()})
        return moved
