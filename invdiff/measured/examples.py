"""One image's measurements as an example of a training, and their random split into context, target and held-out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from invdiff.measured.response import Lift, Response, evened, lift, nothing, response_of
from invdiff.problem import ScaledLinear

CONTEXT, TARGET, HELD = 0, 1, 2  # what becomes of a view
FEWEST_VIEWS = 2  # one of the target and one held out


@dataclass(frozen=True, eq=False)
class Example:
    """y = A x + sigma n of one image, white, in prior units with ||A|| about 1.

    Other kinds (nonlinear operators) subclass this and give ``lift`` anew.

    Args:
        operator: A, on real images (1 c h w).
        y: (1 ...), of the operator's range.
        sigma: standard deviation of a real component of the noise; 0 is noiseless.
        view: number of the view, from 0, of every measurement, the shape of y; -1 where none was taken.
        views: how many there are.
        response: of A; None where ``lift`` does not need it.
        density: mean squared norm of a row of A.
        source: for messages.
        truth: the image (1 c h w) in prior units, for methods that are shown it; None where it is not known.
    """

    operator: Any
    y: Tensor
    sigma: float
    view: Tensor
    views: int
    response: Response | None = None
    density: float = 1.0
    source: str = "the scan"
    truth: Tensor | None = None

    def __post_init__(self) -> None:
        if self.views < FEWEST_VIEWS:
            raise ValueError(f"{self.source} has {self.views} views; {FEWEST_VIEWS} at least are wanted to split them")

    def mask(self, chosen: Tensor) -> Tensor:
        """1 for the measurements of the views that ``chosen`` (views) marks, else 0: real, the shape of y."""
        table = torch.cat([chosen.to(self.view.device) != 0, torch.zeros(1, dtype=torch.bool, device=self.view.device)])
        return table[self.view.long()].to(self.y.real.dtype)

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
        """The lift of the views that ``chosen`` (views) marks; of none it is 0.

        Args:
            y: measurements in the place of the example's own, (1 ...).
            chosen: marks views.
            noise: standard deviation of a real component of y.
            deviation: of images in prior units.
            steps: see ``invdiff.measured.response.lift``.
            under: standard deviation of white noise that the image was under before it was measured.
            least: see there.
        """
        count = int((chosen != 0).sum())
        if count == 0:
            return nothing(torch.empty(self.operator.domain.shape, device=self.y.device))
        if self.response is None:
            raise ValueError(f"{self.source} has an operator without a response; a linear one is wanted")
        response = self.response.share(count / self.views)
        return lift(self.operator, y, response, noise, deviation, steps, self.mask(chosen), under, least)

    def misfit(self, x: Tensor, y: Tensor, chosen: Tensor) -> Tensor:
        """||A x - y||^2 over the views that ``chosen`` marks, by the number of real measurements: ()."""
        return self.mean_square(self.mask(chosen) * (self.operator.forward(x) - y), chosen)

    def mean_square(self, residual: Tensor, chosen: Tensor) -> Tensor:
        """||r||^2 of a residual that is 0 but for the views that ``chosen`` marks, by their real measurements: ()."""
        parts = 2 if residual.is_complex() else 1
        return residual.abs().square().sum() / (parts * self.mask(chosen).sum()).clamp_min(1)

    def filtered_mean_square(self, residual: Tensor, chosen: Tensor, deviation: float) -> Tensor:
        """The mean square of a residual A x - y under the filter of ``evened``: ().

        About the image's own norm: A sees fine detail less than the rest, and in the measurements' norm it is learnt
        slowly. Where the residual's mean is least, it is so in both.

        Args:
            residual: (1 ...), 0 but for the views that ``chosen`` marks.
            chosen: marks views.
            deviation: of the error of x.
        """
        if self.response is None:
            raise ValueError(f"{self.source} has an operator without a response; measured.filtered = 0 is wanted")
        share = max(1, int((chosen != 0).sum())) / self.views
        return evened(self.operator, residual, self.response.share(share), self.sigma, deviation).square().mean()

    def to(self, device: torch.device | str) -> Example:
        """The same example with its tensors on ``device``."""
        response = None if self.response is None else self.response.to(device)
        operator = self.operator.to(device) if hasattr(self.operator, "to") else self.operator
        truth = None if self.truth is None else self.truth.to(device)
        return replace(
            self, operator=operator, y=self.y.to(device), view=self.view.to(device), response=response, truth=truth
        )


def example_of(operator: Any, y: Tensor, sigma: float, source: str = "the scan", probes: int = 6) -> Example:
    """The example of a linear operator that has views (``views``, ``part``).

    Args:
        operator: whitened, in prior units with norm about 1, of one real image.
        y: its measurements (1 ...).
        sigma: standard deviation of a real component of their noise.
        source: for messages.
        probes: see ``response_of``.

    Raises:
        ValueError: an operator without views, or with too few.
    """
    if not operator.views:
        raise ValueError(f"{source}: {type(operator).__name__} has no views to split; CT or MRI is wanted")
    response, view = response_of(operator, probes), view_of(operator)
    density = density_of(operator, response)
    return Example(operator, y, sigma, view, len(operator.views), response, density, source)


def density_of(operator: Any, response: Response) -> float:
    """Mean squared norm of a row of A: the trace of A^H A over the number of real measurements."""
    has_views = bool(getattr(operator, "views", ()))
    count = int((view_of(operator) >= 0).sum()) if has_views else math.prod(operator.range.shape)
    parts = 2 if operator.range.dtype.is_complex else 1
    return float(response.trace.sum()) / (parts * max(1, count))


def alike(examples: Sequence[Example], density: float | None = None) -> list[Example]:
    """The examples with operators scaled so that their rows have one mean squared norm, and with y and sigma so too.

    A noise level then means the same in scans of few views and of many. Nonlinear operators stay as they are.

    Args:
        examples: of ``example_of``.
        density: that norm; the median if None.
    """
    linear = [e.density for e in examples if e.response is not None]
    wanted = density or (float(np.median(linear)) if linear else 1.0)
    return [e if e.response is None else _scaled(e, (wanted / e.density) ** 0.5) for e in examples]


def _scaled(e: Example, factor: float) -> Example:
    r = e.response
    response = (
        None if r is None else Response(factor**2 * r.transfer, factor**4 * r.power, r.where, factor**2 * r.trace)
    )
    operator, density = ScaledLinear(e.operator, 1 / factor), factor**2 * e.density
    return replace(e, operator=operator, y=factor * e.y, sigma=factor * e.sigma, response=response, density=density)


def view_of(operator: Any) -> Tensor:
    """The number of the view of every measurement, int16, the shape of the range; -1 where none was taken."""
    shape = operator.range.shape
    size = int(np.prod(shape))
    place = torch.arange(1, size + 1, dtype=torch.float64).view(shape)  # what ``part`` keeps is not 0
    view = torch.full((size + 1,), -1, dtype=torch.int16)
    for number, name in enumerate(operator.views):
        view[operator.part(place, [name]).flatten().long()] = number
    return view[1:].view(shape)


@dataclass(frozen=True)
class Splitting:
    """How the views of an example are split anew at every step.

    Args:
        context: least and greatest share of the views that the network is given as they are.
        target: least and greatest share of the others that it is given under further noise; the rest is held out.
        dropped: share of the splits without a context, whose views are held out then; guidance needs some.
    """

    context: tuple[float, float] = (0.05, 0.6)
    target: tuple[float, float] = (0.2, 0.6)
    dropped: float = 0.1

    def __post_init__(self) -> None:
        for name in ("context", "target"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            low, high = getattr(self, name)
            if not 0 <= low <= high <= 1:
                raise ValueError(f"{name} is [{low}, {high}]; two shares in [0, 1], the lesser first, are wanted")
        if not 0 <= self.dropped <= 1:
            raise ValueError(f"dropped is {self.dropped}; a share in [0, 1] is wanted")

    def draw(self, views: int, key: Sequence[int]) -> Tensor:
        """CONTEXT, TARGET or HELD of every view (views), int64; at least one is TARGET and one HELD.

        Args:
            views: how many.
            key: whole numbers from 0 up, on which alone the split depends.
        """
        rng = np.random.default_rng(tuple(key))
        share, of_rest, dropped = rng.uniform(*self.context), rng.uniform(*self.target), rng.random() < self.dropped
        context, target = self._counts(views, share, of_rest)
        roles = np.full(views, HELD)
        order = rng.permutation(views)
        roles[order[:context]] = HELD if dropped else CONTEXT
        roles[order[context : context + target]] = TARGET
        return torch.from_numpy(roles)

    def largest_target(self, views: int) -> int:
        """Of as many views at most ``draw`` makes a target."""
        return self._counts(views, self.context[0], self.target[1])[1]

    @staticmethod
    def _counts(views: int, share: float, of_rest: float) -> tuple[int, int]:
        """Views of the context and of the target."""
        context = min(views - FEWEST_VIEWS, round(share * views))
        return context, min(views - context - 1, max(1, round(of_rest * (views - context))))
