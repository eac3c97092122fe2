"""One-step reconstruction learned from scans alone (SSDU: Yaman et al., MRM 2020; Noise2Noise), and with images.

The network sees the lift of the context y_C and gives an image; the loss compares A_N x with the held-out y_N. Its
optimum is E[x | y_C] on what the held-out parts see: one image, no samples. The methods named ``supervised`` are shown
images: the same networks on the same inputs, but the loss stands on the image itself. What measurements alone lose is
the difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from invdiff.measured.conditions import check_coverage, check_grids
from invdiff.measured.examples import CONTEXT, HELD, Example
from invdiff.measured.forward import (
    ROLES,
    ForwardModelMethod,
    ForwardModelTask,
    MeasuredPart,
    Rows,
    described,
    fit,
    judged,
)
from invdiff.measured.method import MeasuredLearning, Method
from invdiff.measured.model import MeasuredInfo, extra_channels, inputs_of, signal
from invdiff.measured.response import Lift, nothing
from invdiff.priors.model import PriorInfo

LEVEL = 1.0  # the noise label of a network that is asked at none


@dataclass(frozen=True)
class OneStepMethod(Method):
    """One-step reconstruction from measurements (SSDU, Noise2Noise): an image of some views, judged by the others.

    Args:
        context: least and greatest share of the views that the network is shown; the others judge it.
        unseen: largest share of the image space that no scan sees.
        lift_steps: iterations of a lift, see ``invdiff.measured.response.lift``.
        filtered: share of the loss in the norm of the residual's lift, see ``ForwardModelMethod``.
    """

    name: ClassVar[str] = "ssdu"

    context: tuple[float, float] = (0.05, 0.95)
    unseen: float = 0.15
    lift_steps: int = 8
    filtered: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "context", tuple(self.context))
        low, high = self.context
        if not 0 <= low <= high <= 1:
            raise ValueError(f"context is [{low}, {high}]; two shares in [0, 1], the lesser first, are wanted")

    def draw(self, views: int, key: Sequence[int]) -> Tensor:
        """CONTEXT or HELD of every view (views), at least one of each; depends on ``key`` alone."""
        rng = np.random.default_rng(tuple(key))
        count = min(views - 1, max(1, round(rng.uniform(*self.context) * views)))
        roles = np.full(views, HELD)
        roles[rng.permutation(views)[:count]] = CONTEXT
        return torch.from_numpy(roles)

    def extra(self, channels: int) -> int:
        """As of the forward-model network, whose target is left empty."""
        return extra_channels(channels)

    def check(self, examples: Sequence[Example], info: PriorInfo) -> list[str]:  # noqa: ARG002
        """Grids, coverage; of a supervised method that there are images.

        Raises:
            ValueError: one of them fails.
        """
        check_grids(examples)
        if self.supervised:
            check_truths(examples)
        return check_coverage(examples, self.unseen)

    def task(self, examples: Sequence[Example], learning: MeasuredLearning, info: PriorInfo) -> OneStepTask:
        """Split, lift, and the loss on the held-out views, or on the image."""
        return OneStepTask(examples, self, learning, info)

    def judge(
        self, network: nn.Module, examples: Sequence[Example], info: PriorInfo, autocast: torch.dtype | None
    ) -> dict[float, float]:
        """The loss on some held-out scans, named by the one noise label."""
        return judged(OneStepTask(examples, self, MeasuredLearning(batch=1), info), network, (LEVEL,), autocast)

    def exported(self, info: PriorInfo, examples: Sequence[Example]) -> MeasuredInfo:
        """The description with the scans' noise and views."""
        return described(self, info, examples, max(e.views for e in examples))


@dataclass(frozen=True)
class SupervisedOneStepMethod(OneStepMethod):
    """One-step reconstruction learned with images: an image of some views, judged by the true one."""

    name: ClassVar[str] = "supervised"
    supervised: ClassVar[bool] = True


@dataclass(frozen=True, eq=False)
class OneStepTask(ForwardModelTask):
    """The task of ``OneStepMethod``; arguments as of ``ForwardModelTask``."""

    method: Any  # a OneStepMethod

    def item(self, index: int, step: int, k: int, sigma: Tensor | None = None) -> MeasuredPart:
        """One item, without noise; its split is keyed by (seed, step, k)."""
        del sigma
        roles = self.method.draw(self.examples[index].views, (self.learning.seed, step, k, ROLES))
        return MeasuredPart([index], [roles], torch.full((1,), LEVEL), [torch.zeros(())], torch.ones(1))

    def loss(self, network: nn.Module, part: MeasuredPart, autocast: torch.dtype | None) -> Tensor:
        """One process's share of the step's loss."""
        examples, d = [self.examples[k] for k in part.which], self.info.sigma_data
        with torch.no_grad():
            each = zip(examples, part.roles, strict=True)
            lifts = [e.lift(e.y, roles == CONTEXT, e.sigma, d, self.method.lift_steps) for e, roles in each]
            context = Lift(*(torch.cat(field) for field in zip(*lifts, strict=True)))
            inputs = inputs_of(context, nothing(context.image), d)
        with torch.autocast(part.sigma.device.type, dtype=autocast or torch.float32, enabled=autocast is not None):
            x = signal(network, inputs, part.sigma)
        terms = []
        for k, (example, roles) in enumerate(zip(examples, part.roles, strict=True)):
            one, spread = x[k : k + 1], inputs.spread[k]
            if self.method.supervised:
                terms.append(image_loss(one, example, spread))
                continue
            terms.append(fit(example, one, [Rows(roles == HELD, 1.0, 1.0, example.y)], spread, self.method.filtered))
        return (part.weight * torch.stack(terms)).sum()


@dataclass(frozen=True)
class SupervisedForwardModelMethod(ForwardModelMethod):
    """Diffusion with forward models learned with images: the loss stands on the true one, not on held-out views."""

    name: ClassVar[str] = "forward-model-supervised"
    supervised: ClassVar[bool] = True

    def check(self, examples: Sequence[Example], info: PriorInfo) -> list[str]:
        """As without images, and that there are some.

        Raises:
            ValueError: one of them fails.
        """
        check_truths(examples)
        return super().check(examples, info)

    def task(self, examples: Sequence[Example], learning: MeasuredLearning, info: PriorInfo) -> ForwardModelTask:
        """Split, noise, lift, and the loss on the image."""
        return SupervisedForwardModelTask(examples, self, learning, info)


@dataclass(frozen=True, eq=False)
class SupervisedForwardModelTask(ForwardModelTask):
    """The task of ``SupervisedForwardModelMethod``; arguments as of ``ForwardModelTask``."""

    def misfit(self, example: Example, x: Tensor, noisy: Tensor, roles: Tensor, sigma: float, spread: Tensor) -> Tensor:
        """That of the image: the measurements are looked at by the network alone."""
        del noisy, roles, sigma
        return image_loss(x, example, spread)


def image_loss(x: Tensor, example: Example, spread: Tensor) -> Tensor:
    """||x - truth||^2 of one image (1 c h w), over what it is about: ()."""
    truth = example.truth
    if truth is None:
        raise ValueError(f"{example.source} has no image; a supervised method wants one of every scan")
    return (x - truth).square().mean() / spread.square().mean()


def check_truths(examples: Sequence[Example]) -> None:
    """Refuse scans whose images are not known.

    Raises:
        ValueError: with the scan.
    """
    for example in examples:
        if example.truth is None:
            raise ValueError(
                f"{example.source} has no image; a supervised method wants one of every scan: --images FILE"
            )
