"""What several samplers ask of their fields."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from invdiff.protocols import Problem


def at_least(owner: object, **limits: float) -> None:
    """Refuse fields below their limit, with the field's name and value."""
    for name, limit in limits.items():
        value = getattr(owner, name)
        if value < limit:
            raise ValueError(f"{type(owner).__name__}.{name} is {value}; at least {limit} is wanted")


def within(owner: object, **limits: tuple[float, float]) -> None:
    """Refuse fields outside their closed range, with the field's name and value."""
    for name, (low, high) in limits.items():
        value = getattr(owner, name)
        if not low <= value <= high:
            raise ValueError(f"{type(owner).__name__}.{name} is {value}; a value in [{low}, {high}] is wanted")


def linear(owner: object, problem: Problem) -> Any:
    """The problem's operator, refused if it has no adjoint."""
    if not hasattr(problem.operator, "adjoint"):
        raise ValueError(
            f"{type(owner).__name__} needs a linear operator; {type(problem.operator).__name__} has no adjoint"
        )
    return problem.operator


def first_guess(problem: Problem) -> Tensor:
    """The operator's pseudo-inverse of y where it has one (FBP for CT), in prior units, (s c h w)."""
    pinv = getattr(problem.operator, "pinv", None)
    return (
        pinv(problem.y)
        if pinv is not None
        else problem.operator.vjp(problem.y.new_zeros(problem.operator.domain.shape), problem.y)
    )


def above_nothing(problem: Problem, inverse: Callable[[Tensor], Tensor]) -> Tensor:
    """An approximate inverse of the scanner's own data, not of what prior units make of them: (s c h w).

    What is not measured then counts as air, or no signal, and not as the middle of the prior's range.
    """
    operator = problem.operator
    nothing = torch.full(operator.domain.shape, problem.zero, dtype=operator.domain.dtype, device=problem.y.device)
    return nothing + inverse(problem.y - operator.forward(nothing))
