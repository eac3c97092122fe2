"""Pointwise operators: a diagonal, the mask that keeps some pixels, and an operator whose measurements a mask thins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from invdiff.operators.linear import Composition, LinearOperatorBase, as_dtype, dtype_name
from invdiff.protocols import Space


class Diagonal(LinearOperatorBase):
    """(A x)_i = d_i x_i.

    Args:
        diagonal: real or complex, anything that broadcasts to ``shape``.
        shape: of the domain and the range, the slice first.
        dtype: of the domain and the range.

    Raises:
        ValueError: not finite, of a shape that does not broadcast, or complex over a real domain.
    """

    def __init__(self, diagonal: Tensor, shape: Sequence[int], dtype: torch.dtype | str = torch.float32) -> None:
        kind = as_dtype(dtype)
        self.domain = self.range = Space(tuple(shape), kind)
        if diagonal.is_complex() and not kind.is_complex:
            raise ValueError(f"the diagonal is complex and the domain {dtype_name(kind)}; a complex domain is wanted")
        if not bool(torch.isfinite(diagonal).all()):
            raise ValueError("the diagonal holds NaN or infinite values; finite ones are wanted")
        try:
            fits = torch.broadcast_shapes(diagonal.shape, self.domain.shape) == torch.Size(self.domain.shape)
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(f"a diagonal of shape {tuple(diagonal.shape)} does not broadcast to {self.domain.shape}")
        self.diagonal = diagonal.to(kind if diagonal.is_complex() else kind.to_real()).detach().clone()

    def _forward(self, x: Tensor) -> Tensor:
        return self.diagonal.to(x.device) * x

    def _adjoint(self, y: Tensor) -> Tensor:
        return self.diagonal.to(y.device).conj() * y

    def solve(
        self, rhs: Tensor, rho: float, x0: Tensor | None = None, iterations: int = 0, tolerance: float | None = None
    ) -> Tensor:
        """rhs / (|d|^2 + rho): closed form, so that ``x0``, ``iterations`` and ``tolerance`` do not matter."""
        del x0, iterations, tolerance
        self._check_rho(rho)
        self._check(rhs, self.domain, "right-hand side")
        return rhs / (self.diagonal.to(rhs.device).abs() ** 2 + rho)

    def pinv(self, y: Tensor) -> Tensor:
        """y / d where d is not 0, else 0: the pseudo-inverse, exactly."""
        self._check(y, self.range, "measurement")
        d = self.diagonal.to(y.device)
        return torch.where(d != 0, y / d.where(d != 0, 1), 0)


class Mask(Diagonal):
    """Keeps the pixels where ``mask`` is 1 and sets the others to 0 (inpainting).

    ``Mask(keep, operator.range.shape) @ operator`` is the operator without the measurements that ``keep`` leaves out:
    see ``Masked``.

    Args:
        mask: bool or 0 and 1: (h w), (s h w) or (s c h w); any that broadcasts where ``shape`` has not four axes.
        shape: (s c h w) of the domain, or of any measurements; from ``mask`` if None, with one slice or channel where
            it names none.
        dtype: of the domain and the range.

    Raises:
        ValueError: values other than 0 and 1, or a mask that does not fit ``shape``.
    """

    kind = "mask"

    def __init__(
        self, mask: Tensor, shape: Sequence[int] | None = None, dtype: torch.dtype | str = torch.float32
    ) -> None:
        full = check_mask(mask) if shape is None or len(shape) == 4 else check_binary(mask)
        super().__init__(full, full.shape if shape is None else shape, dtype)
        if len(self.domain.shape) < 2:
            raise ValueError(f"shape is {self.domain.shape}; (s c h w) or another with a slice axis is wanted")

    def __matmul__(self, other: LinearOperatorBase) -> LinearOperatorBase:
        """``Masked``: the operator without some of its measurements."""
        return Masked(self, other)

    def whole(self, views: int) -> LinearOperatorBase:  # noqa: ARG002
        """Every pixel."""
        return Mask(torch.ones_like(self.diagonal), *self.domain)

    def unmeasured(self, views: int) -> LinearOperatorBase:  # noqa: ARG002
        """The pixels that are not kept."""
        return Mask(self.diagonal == 0, *self.domain)

    def fields(self) -> dict[str, Any]:
        """``mask`` (bool tensor), ``shape``, ``dtype``."""
        shape, dtype = self.domain
        return {"mask": self.diagonal != 0, "shape": list(shape), "dtype": dtype_name(dtype)}


class Masked(Composition):
    """M A, the measurements of A that a mask keeps, the others 0: k-space and sinogram inpainting. ``Mask @ A``.

    Args:
        outer: M, on the range of A.
        inner: A.

    Raises:
        ValueError: the spaces differ.
    """

    outer: Mask

    @property
    def views(self) -> tuple[int, ...]:
        """Those of A of which anything is kept."""
        return tuple(v for v in self.inner.views if bool(self.inner.part(self._kept, [v]).any()))

    def split(self, index: Sequence[int]) -> LinearOperatorBase:
        """The chosen views of A with their part of the mask."""
        part = self.inner.split(index)
        return Mask(self.inner.part(self._kept, index) != 0, *part.range) @ part

    def part(self, y: Tensor, index: Sequence[int]) -> Tensor:
        """As A chooses."""
        return self.inner.part(y, index)

    def pinv(self, y: Tensor) -> Tensor:
        """Least squares by conjugate gradients; of projections A's own ``pinv``.

        That is of the views of which anything is kept, other rays interpolated along the detector (Kalender, Hebel &
        Ebersberger 1987).
        """
        if not hasattr(self.inner, "interpolated"):
            return LinearOperatorBase.pinv(self, y)
        self._check(y, self.range, "measurement")
        views = self.views
        if 0 < len(views) < len(self.inner.views):
            return self.split(views).pinv(self.part(y, views))
        kept = (self.outer.diagonal != 0).expand(self.range.shape)
        return self.inner.pinv(self.inner.interpolated(y, kept.to(y.device)))

    @property
    def _kept(self) -> Tensor:
        """The mask, with the axes along which A may cut it."""
        kept = self.outer.diagonal
        lead = [1] * (len(self.range.shape) - kept.ndim) + list(kept.shape)
        return kept.expand(*lead[:-2], *self.range.shape[-2:])


def check_mask(mask: Tensor) -> Tensor:
    """A mask (h w), (s h w) or (s c h w) as bool (s c h w), with size 1 where it has no such axis.

    Raises:
        ValueError: another number of axes, or values other than 0 and 1.
    """
    if mask.ndim not in (2, 3, 4):
        raise ValueError(f"the mask is {tuple(mask.shape)}; (h w), (s h w) or (s c h w) is wanted")
    on = check_binary(mask)
    return on[None, None] if on.ndim == 2 else on[:, None] if on.ndim == 3 else on


def check_binary(mask: Tensor) -> Tensor:
    """A mask as bool.

    Raises:
        ValueError: values other than 0 and 1.
    """
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError("the mask holds values other than 0 and 1")
    return mask != 0
