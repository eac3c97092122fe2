"""Examples of operators that are not linear: no filter undoes them, so their own ``lift`` makes the features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from invdiff.measured.examples import Example, view_of
from invdiff.measured.response import Lift, nothing

KEPT = 1e-6  # share of the variance that features are said to recover: none, but for the scale that it gives them
VIEWS = 6  # at which a map of coverage is 1


@dataclass(frozen=True, eq=False)
class NonlinearExample(Example):
    """y = A(x) + sigma n of one image, A with ``lift(y, chosen)``, ``split`` and ``part``: of ``nonlinear_example_of``.

    Args:
        middle: mean of y.
        size: root of the mean square of y about it.
    """

    middle: float = 0.0
    size: float = 1.0

    def lift(
        self,
        y: Tensor,
        chosen: Tensor,
        noise: float,
        deviation: float,
        steps: int = 1,
        under: float = 0.0,
        least: float | None = None,
    ) -> Lift:
        """``features`` of the chosen views; as of ``Example.lift``, the last three without a meaning here."""
        del steps, under, least
        index = torch.nonzero(chosen).flatten().tolist()
        if not index:
            return nothing(torch.empty(self.operator.domain.shape, device=y.device))
        return features(self.operator, y, noise, deviation, (self.middle, self.size), index)

    def filtered_mean_square(self, residual: Tensor, chosen: Tensor, deviation: float) -> Tensor:
        """``mean_square`` over the measurements' own: nothing filters what is not linear."""
        del deviation
        return self.mean_square(residual, chosen) / self.density


def scale_of(y: Tensor) -> tuple[float, float]:
    """Mean of y and root of its mean square about it: what features are made of size 1 with."""
    middle = float(y.real.mean())
    return middle, float((y - middle).abs().square().mean().sqrt())


def features(
    operator: Any,
    y: Tensor,
    noise: float,
    deviation: float,
    scale: tuple[float, float],
    chosen: Sequence[int] | None = None,
) -> Lift:
    """The operator's own lift of y in the place of a filter's: about 0, of size about 1 to the network.

    It is believed to recover nothing, so that the network's output stands alone.

    Args:
        operator: with ``lift(y, chosen)``, of the shape of its domain.
        y: (s ...).
        noise: standard deviation of a real component of y.
        deviation: of images in prior units.
        scale: of ``scale_of``.
        chosen: views; all if None.

    Raises:
        ValueError: the lift has another shape than the image.
    """
    middle, size = scale
    found = operator.lift((y - middle) / (noise**2 + size**2) ** 0.5, chosen)
    if tuple(found.shape) != tuple(operator.domain.shape):
        raise ValueError(f"the operator lifts to {tuple(found.shape)}; the image's {operator.domain.shape} is wanted")
    share = torch.full_like(found[:, :1], len(operator.views if chosen is None else chosen) / VIEWS)
    kept = torch.full_like(nothing(found).kept, KEPT)
    return Lift(deviation * KEPT**0.5 * found, share, kept, torch.ones_like(kept[:1, :1]))


def nonlinear_example_of(operator: Any, y: Tensor, sigma: float, source: str = "the scan") -> NonlinearExample:
    """The example of an operator that is not linear.

    Args:
        operator: in prior units, of one real image, with views and ``lift(y, chosen)``.
        y: its measurements (1 ...).
        sigma: standard deviation of a real component of their noise.
        source: for messages.

    Raises:
        ValueError: an operator without views, or without a lift.
    """
    if not operator.views or not hasattr(operator, "lift"):
        raise ValueError(f"{source}: {type(operator).__name__} has no views to split or no lift of its own")
    middle, size = scale_of(y)
    return NonlinearExample(
        operator, y, sigma, view_of(operator), len(operator.views), None, size**2, source, None, middle, size
    )
