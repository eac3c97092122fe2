"""Off-resonance by time segmentation (Noll et al. 1991; least squares as Sutton, Noll & Fessler, IEEE TMI 2003)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from invdiff.operators.linear import LinearOperatorBase, dtype_name

FREQUENCIES = 8  # of the fit, for each segment
MOST = 200  # segments
TIMES_AT_ONCE = 4096
RANK = 1e-12  # smallest singular value of the fit, relative


class OffResonance(LinearOperatorBase):
    """An MRI operator whose spins precess by a field map while they are read: exp(-2 pi i f(r) t) inside its sum.

    The phase is a sum of few terms, sum_l b_l(t) exp(-2 pi i f(r) tau_l), so that A' x = sum_l b_l · A(c_l · x). The
    b_l are the least-squares fit over the frequencies between the map's smallest and largest, one for each time.

    Args:
        operator: A, with domain (s 1 h w) complex; Cartesian or not.
        field: f in Hz, (h w) or (s h w).
        times: t in seconds of every sample, real; broadcasts over A's range: (samples), or (h 1) for rows read one
            after the other, (h w), ...
        segments: number of terms; the fewest that keep ``tolerance`` if None.
        tolerance: largest error of the unit phase.

    Raises:
        ValueError: a field or times of another shape or not finite, fewer than 1 segment, or more than 200 needed.
    """

    def __init__(
        self,
        operator: LinearOperatorBase,
        field: Tensor,
        times: Tensor,
        segments: int | None = None,
        tolerance: float = 1e-4,
    ) -> None:
        shape, kind = operator.domain
        if not kind.is_complex:
            raise ValueError(f"the operator takes {dtype_name(kind)}; complex images are wanted")
        for name, value in (("field", field), ("times", times)):
            if value.is_complex() or not bool(torch.isfinite(value).all()):
                raise ValueError(f"{name} is {value.dtype} or not finite; finite real values are wanted")
        if field.ndim not in (2, 3) or field.shape[-2:] != shape[-2:] or (field.ndim == 3 and len(field) != shape[0]):
            raise ValueError(f"field is {tuple(field.shape)}; (h w) or (s h w) of {shape} is wanted")
        sizes = zip(reversed(times.shape), reversed(operator.range.shape), strict=False)
        if times.ndim > len(operator.range.shape) or any(a not in (1, b) for a, b in sizes):
            raise ValueError(f"times are {tuple(times.shape)}; what broadcasts to {operator.range.shape} is wanted")
        if (segments is not None and segments < 1) or not 0 < tolerance < 1:
            raise ValueError(f"segments {segments} and tolerance {tolerance}; at least 1 and within (0, 1) are wanted")
        self.operator, self.field, self.times = operator, field.detach().double(), times.detach().double()
        self.segments, self.tolerance = segments, tolerance
        self.domain, self.range, self.unit, self.coupled = *_sides(operator), operator.unit, operator.coupled
        moments, weights = interpolators(self.field, self.times, segments, tolerance)
        self._weights = weights.to(kind)
        full = self.field[None, None] if field.ndim == 2 else self.field[:, None]
        self._phases = _phase(moments.view(-1, 1, 1, 1, 1) * full).to(kind)

    @property
    def terms(self) -> int:
        """How many segments there are."""
        return len(self._phases)

    def _forward(self, x: Tensor) -> Tensor:
        parts = zip(self._weights.to(x.device), self._phases.to(x.device), strict=True)
        return sum((b * self.operator.forward(c * x) for b, c in parts), x.new_zeros(()))

    def _adjoint(self, y: Tensor) -> Tensor:
        parts = zip(self._weights.to(y.device), self._phases.to(y.device), strict=True)
        return sum((c.conj() * self.operator.adjoint(b.conj() * y) for b, c in parts), y.new_zeros(()))

    @property
    def views(self) -> tuple[int, ...]:
        """Those of A."""
        return self.operator.views

    def split(self, index: Sequence[int]) -> LinearOperatorBase:
        """The chosen lines or readouts of A, at their times."""
        times = self.part(self.times.expand(self.range.shape), index)
        return OffResonance(self.operator.split(index), self.field, times, self.segments, self.tolerance)

    def part(self, y: Tensor, index: Sequence[int]) -> Tensor:
        """As A chooses."""
        return self.operator.part(y, index)


def interpolators(field: Tensor, times: Tensor, segments: int | None, tolerance: float) -> tuple[Tensor, Tensor]:
    """Times tau (l) and weights b (l ...): sum_l b_l(t) exp(-2 pi i f tau_l) is as near exp(-2 pi i f t) as can be.

    Args:
        field: in Hz, any shape; only its smallest and largest value count.
        times: in seconds, any shape.
        segments: l; the fewest that keep ``tolerance`` if None.
        tolerance: largest error, where ``segments`` is None.

    Raises:
        ValueError: more than 200 segments would be needed.
    """
    low, high = float(field.min()), float(field.max())
    each, place = times.unique(return_inverse=True)
    start = math.ceil((high - low) * float(each[-1] - each[0])) + 1
    for count in range(min(start, MOST), MOST + 1) if segments is None else [segments]:
        moments = _spread(float(each[0]), float(each[-1]), count, each.device)
        frequencies = torch.linspace(low, high, FREQUENCIES * count + 1, dtype=torch.float64, device=each.device)
        basis = _phase(torch.outer(frequencies, moments))
        solver = torch.linalg.pinv(basis, rtol=RANK)
        weights, error = [], 0.0
        for part in each.split(TIMES_AT_ONCE):
            wanted = _phase(torch.outer(frequencies, part))
            weights.append(solver @ wanted)
            error = max(error, float((basis @ weights[-1] - wanted).abs().max()))
        if segments is not None or error <= tolerance:
            return moments, torch.cat(weights, 1)[:, place]
    raise ValueError(
        f"a field from {low:g} to {high:g} Hz over {float(each[-1] - each[0]):g} s wants more than {MOST} segments; "
        "less of either is wanted (times are in seconds)"
    )


def _spread(low: float, high: float, count: int, device: torch.device) -> Tensor:
    if count == 1:
        return torch.tensor([(low + high) / 2], dtype=torch.float64, device=device)
    return torch.linspace(low, high, count, dtype=torch.float64, device=device)


def _phase(turns: Tensor) -> Tensor:
    return torch.polar(torch.ones_like(turns), -2 * math.pi * turns)


def _sides(operator: LinearOperatorBase) -> tuple:
    return operator.domain, operator.range
