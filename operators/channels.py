"""Channel adaptors: samplers see only real images, complex ones are made of them here (``A @ RealChannels(...)``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from invdiff.operators.linear import LinearOperatorBase, as_dtype, dtype_name
from invdiff.protocols import Space


class RealChannels(LinearOperatorBase):
    """(s 2c h w) real -> (s c h w) complex: the first c channels are real parts, the others imaginary ones.

    An isometry onto its range; linear over the reals.

    Args:
        shape: (s c h w) of the complex image.
        dtype: of the complex image.

    Raises:
        ValueError: a shape of other than four axes, or a real dtype.
    """

    kind = "real-channels"
    unitary = True

    def __init__(self, shape: Sequence[int], dtype: torch.dtype | str = torch.complex64) -> None:
        self.range = _complex_space(shape, dtype)
        s, c, h, w = self.range.shape
        self.domain = Space((s, 2 * c, h, w), self.range.dtype.to_real())

    def _forward(self, x: Tensor) -> Tensor:
        return torch.complex(*x.chunk(2, 1))

    def _adjoint(self, y: Tensor) -> Tensor:
        return torch.cat([y.real, y.imag], 1)

    def normal(self, x: Tensor) -> Tensor:
        """``x``: the map is an isometry."""
        self._check(x, self.domain, "input")
        return x.clone()

    def solve(
        self, rhs: Tensor, rho: float, x0: Tensor | None = None, iterations: int = 0, tolerance: float | None = None
    ) -> Tensor:
        """rhs / (1 + rho): closed form, so that ``x0``, ``iterations`` and ``tolerance`` do not matter."""
        del x0, iterations, tolerance
        return _isometry_solve(self, rhs, rho)

    def pinv(self, y: Tensor) -> Tensor:
        """The adjoint, which is the inverse."""
        return self.adjoint(y)

    def fields(self) -> dict[str, Any]:
        """``shape``, ``dtype``."""
        return {"shape": list(self.range.shape), "dtype": dtype_name(self.range.dtype)}


class KnownPhase(LinearOperatorBase):
    """(s 1 h w) real -> (s 1 h w) complex: x exp(i phase).

    Args:
        phase: in radians, (h w) or (s h w).
        slices: s; from ``phase`` if None, 1 if it has no slice axis.
        dtype: of the complex image.

    Raises:
        ValueError: a phase of another shape or not finite, another number of slices, or a real dtype.
    """

    kind = "known-phase"

    def __init__(self, phase: Tensor, slices: int | None = None, dtype: torch.dtype | str = torch.complex64) -> None:
        if phase.ndim not in (2, 3) or phase.is_complex() or not bool(torch.isfinite(phase).all()):
            raise ValueError(f"phase is {tuple(phase.shape)} {phase.dtype}; finite real (h w) or (s h w) is wanted")
        count = slice_count(slices, {"phase": phase.shape[0] if phase.ndim == 3 else None})
        self.range = _complex_space((count, 1, *phase.shape[-2:]), dtype)
        self.domain = Space(self.range.shape, self.range.dtype.to_real())
        self.phase = phase.detach().to(torch.float64).clone()
        full = self.phase[:, None] if phase.ndim == 3 else self.phase[None, None]
        self._factor = torch.polar(torch.ones_like(full), full).to(self.range.dtype)

    def _forward(self, x: Tensor) -> Tensor:
        return x * self._factor.to(x.device)

    def _adjoint(self, y: Tensor) -> Tensor:
        return (y * self._factor.to(y.device).conj()).real

    def normal(self, x: Tensor) -> Tensor:
        """``x``: the map is an isometry."""
        self._check(x, self.domain, "input")
        return x.clone()

    def solve(
        self, rhs: Tensor, rho: float, x0: Tensor | None = None, iterations: int = 0, tolerance: float | None = None
    ) -> Tensor:
        """rhs / (1 + rho): closed form, so that ``x0``, ``iterations`` and ``tolerance`` do not matter."""
        del x0, iterations, tolerance
        return _isometry_solve(self, rhs, rho)

    def pinv(self, y: Tensor) -> Tensor:
        """The adjoint, which is the pseudo-inverse."""
        return self.adjoint(y)

    def fields(self) -> dict[str, Any]:
        """``phase`` (float64 tensor), ``slices``, ``dtype``."""
        return {"phase": self.phase, "slices": self.range.shape[0], "dtype": dtype_name(self.range.dtype)}


def slice_count(slices: int | None, found: Mapping[str, int | None]) -> int:
    """The number of slices that ``slices`` and the tensors with a slice axis agree on; 1 if nothing says.

    Args:
        slices: as asked for, or None.
        found: for each tensor, by name, the length of its slice axis, None if it has none.

    Raises:
        ValueError: they differ, or a number below 1.
    """
    named = {"slices": slices, **found}
    counts = {name: n for name, n in named.items() if n is not None}
    if len(set(counts.values())) > 1:
        raise ValueError(f"slices differ: {', '.join(f'{k} has {n}' for k, n in counts.items())}; one number is wanted")
    count = next(iter(counts.values()), 1)
    if count < 1:
        raise ValueError(f"slices is {count}; at least 1 is wanted")
    return count


def _isometry_solve(operator: LinearOperatorBase, rhs: Tensor, rho: float) -> Tensor:
    operator._check_rho(rho)
    operator._check(rhs, operator.domain, "right-hand side")
    return rhs / (1 + rho)


def _complex_space(shape: Sequence[int], dtype: torch.dtype | str) -> Space:
    kind = as_dtype(dtype)
    if not kind.is_complex:
        raise ValueError(f"dtype is {dtype_name(kind)}; a complex one is wanted")
    if len(shape) != 4 or min(shape) < 1:
        raise ValueError(f"shape is {tuple(shape)}; (s c h w), each at least 1, is wanted")
    return Space(tuple(shape), kind)
