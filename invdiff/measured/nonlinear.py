"""Examples of operators that are not linear: no filter undoes them, so their own ``lift`` makes the features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from invdiff.measured.examples import Example, view_of
from invdiff.measured.response import Lift, nothing

KEPT = 1e-6  # share of the variance that features are said to recover: none, but for the scale that it gives them


@dataclass(frozen=True, eq=False)
class NonlinearExample(Example):
    """y = A(x) + sigma n of one image, A with ``lift(y, chosen)``, ``split`` and ``part``: of ``nonlinear_example_of``.

    Args:
        size: root of the mean square of y about ``middle``.
        middle: mean of y.
    """

    size: float = 1.0
    middle: float = 0.0

    def lift(self, y: Tensor, chosen: Tensor, noise: float, deviation: float, steps: int = 1) -> Lift:  # noqa: ARG002
        """The operator's own lift of the chosen views, about 0 and of size about 1, believed to recover nothing.

        Raises:
            ValueError: the lift has another shape than the image.
        """
        index = torch.nonzero(chosen).flatten().tolist()
        like = torch.empty(self.operator.domain.shape, device=y.device)
        if not index:
            return nothing(like)
        scaled = (y - self.middle) / (noise**2 + self.size**2) ** 0.5
        features = self.operator.lift(scaled, index)
        if features.shape != like.shape:
            raise ValueError(
                f"the lift of {type(self.operator).__name__} is {tuple(features.shape)}; the image's "
                f"{tuple(like.shape)} is wanted"
            )
        share = len(index) / self.views
        return Lift(deviation * KEPT**0.5 * features, torch.full_like(like[:, :1], share), torch.full_like(like, KEPT))

    def misfit(self, x: Tensor, y: Tensor, chosen: Tensor) -> Tensor:
        """||A(x) - y||^2 over the chosen views, by the number of real measurements; only they are computed: ()."""
        index = torch.nonzero(chosen).flatten().tolist()
        if not index:
            return 0 * x.sum()
        residual = self.operator.split(index).forward(x) - self.operator.part(y, index)
        return residual.abs().square().mean() / (2 if residual.is_complex() else 1)


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
    middle = float(y.real.mean())
    size = float((y - middle).abs().square().mean().sqrt())
    return NonlinearExample(
        operator, y, sigma, view_of(operator), len(operator.views), None, size**2, source, None, size, middle
    )
