"""Diffusion with forward models (Tewari et al., NeurIPS 2023) for scans: the denoising step goes through the operator.

The network sees lifts of the context y_C and of the target under noise, y_T^s = y_T + sqrt(s^2 - sigma_y^2) eps, and
gives an image x; A_T x is then the denoiser of A_T x at noise s. Where whitening weighted the rows (photon counts), s
is the noise of a row without its weight, as of a target that nobody took, or the row's own where that is more. The loss
compares A_N x with the held-out y_N, whose noise the network never saw, so that its optimum is E[x | y_C, y_T^s] on
what the held-out parts see (Noise2Noise).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from invdiff.measured.conditions import check_coverage, check_grids, check_noise
from invdiff.measured.examples import CONTEXT, HELD, TARGET, Example, Splitting
from invdiff.measured.method import MeasuredLearning, Method
from invdiff.measured.model import Inputs, MeasuredInfo, extra_channels, inputs_of, signal
from invdiff.measured.response import Lift, noise_of
from invdiff.priors.edm import draw_sigma
from invdiff.priors.model import PriorInfo
from invdiff.priors.training import SIGMAS, VALIDATED, generator_of, share_of

WHICH, ROLES = 2, 3  # further keys of the draws of a step: the example, its split


class MeasuredPart(NamedTuple):
    """What one process needs of a step: of each item the example's number, its split and its noise.

    which: (s); roles: CONTEXT, TARGET or HELD of each view, each (views); sigma: noise of the target (s); noise: of
    y's shape, of variance 1 a real component; weight: of each in the step's loss (s).
    """

    which: list[int]
    roles: list[Tensor]
    sigma: Tensor
    noise: list[Tensor]
    weight: Tensor


@dataclass(frozen=True)
class ForwardModelMethod(Splitting, Method):
    """Diffusion with forward models: a network that samples images given a scan, trained on scans alone.

    Args:
        held_weight: of the held-out views in the loss.
        target_weight: of the target's. Its noise is also in y_T^s, which the network sees: the loss stands on
            (1 - k) A_T x + k y_T^s with k = sigma_y^2 / s^2, whose optimum is the same (Moran et al., Noisier2Noise,
            2020). It teaches what the held-out views of a scan never see beside its context and target; 0 is the loss
            on the held-out views alone.
        context_weight: of the context's, for noiseless scans only.
        filtered: share of the loss that is in the norm of the filtered residual, about the image's own; the rest is in
            that of the measurements, fair to their noise, but they see fine detail little. The optimum is the same.
        lift_steps: iterations of a lift, see ``invdiff.measured.response.lift``.
        unseen: largest share of the image space that no scan sees, such as corners outside the field of view.
    """

    name: ClassVar[str] = "forward-model"

    held_weight: float = 1.0
    target_weight: float = 1.0
    context_weight: float = 0.0
    filtered: float = 1.0
    lift_steps: int = 8
    unseen: float = 0.15

    def __post_init__(self) -> None:
        super().__post_init__()
        weights = (self.held_weight, self.target_weight, self.context_weight)
        if min(weights) < 0 or sum(weights) == 0:
            raise ValueError(f"held_weight, target_weight, context_weight are {weights}; 0 or more and one above 0")

        if not 0 <= self.filtered <= 1:
            raise ValueError(f"filtered is {self.filtered}; a share in [0, 1] is wanted")
        if self.lift_steps < 1:
            raise ValueError(f"lift_steps is {self.lift_steps}; at least 1 is wanted")

    def extra(self, channels: int) -> int:
        """A second lift and two coverage maps."""
        return extra_channels(channels)

    def check(self, examples: Sequence[Example], info: PriorInfo) -> list[str]:
        """The conditions of methods that can be checked; see ``invdiff.measured.conditions``.

        Raises:
            ValueError: one of them fails, or ``context_weight`` with noisy scans.
        """
        check_grids(examples)
        check_noise(examples, info)
        worst = max(example.sigma for example in examples)
        if self.context_weight and worst > 0:
            raise ValueError(
                f"measured.context_weight is {self.context_weight} and the scans have noise {worst:.3g}: the network "
                "would copy it; 0 is wanted"
            )
        return check_coverage(examples, self.unseen)

    def task(self, examples: Sequence[Example], learning: MeasuredLearning, info: PriorInfo) -> ForwardModelTask:
        """Split, noise, lift, and the loss behind the operator."""
        return ForwardModelTask(examples, self, learning, info)

    def judge(
        self, network: nn.Module, examples: Sequence[Example], info: PriorInfo, autocast: torch.dtype | None
    ) -> dict[float, float]:
        """The loss on some held-out scans at the levels of ``SIGMAS`` that are above their noise."""
        task = ForwardModelTask(examples, self, MeasuredLearning(batch=1), info)
        least = max(info.sigma_min, *(example.sigma for example in examples))
        return judged(task, network, [sigma for sigma in SIGMAS if sigma >= least], autocast)

    def exported(self, info: PriorInfo, examples: Sequence[Example]) -> MeasuredInfo:
        """The description with the scans' noise and views."""
        return described(self, info, examples, max(self.largest_target(e.views) for e in examples), self.dropped)


@dataclass(frozen=True, eq=False)
class ForwardModelTask:
    """The task of ``ForwardModelMethod``.

    Args:
        examples: scans, on the device of the training.
        method: how they are split, and the weights of the loss.
        learning: noise levels, batch, seed.
        info: range and noise levels.
    """

    examples: Sequence[Example]
    method: ForwardModelMethod
    learning: MeasuredLearning
    info: PriorInfo

    def part(self, step: int, rank: int = 0, world: int = 1) -> MeasuredPart:
        """Of items rank, rank + world, ...: an example at random, its split, its noise level and noise."""
        items, weight = share_of(self.learning.batch, rank, world)
        parts = []
        for k in items:
            rng = np.random.default_rng((self.learning.seed, step, k, WHICH))
            parts.append(self.item(int(rng.integers(len(self.examples))), step, k))
        which, roles, noise = ([getattr(p, name)[0] for p in parts] for name in ("which", "roles", "noise"))
        return MeasuredPart(which, roles, torch.cat([p.sigma for p in parts]), noise, weight)

    def item(self, index: int, step: int, k: int, sigma: Tensor | None = None) -> MeasuredPart:
        """One item, its weight 1, keyed by (seed, step, k); at the noise level ``sigma`` () where it is given."""
        example, seed = self.examples[index], self.learning.seed
        generator = generator_of(seed, step, k)
        level = self._level(example, generator) if sigma is None else sigma[None]
        roles = self.method.draw(example.views, (seed, step, k, ROLES))
        noise = torch.randn(example.y.shape, dtype=example.y.dtype, generator=generator)
        return MeasuredPart([index], [roles], level, [2**0.5 * noise if noise.is_complex() else noise], torch.ones(1))

    def _level(self, example: Example, generator: torch.Generator) -> Tensor:
        u, n = torch.rand(1, generator=generator), torch.randn(1, generator=generator)
        low, high, how = max(self.info.sigma_min, example.sigma), self.info.sigma_max, self.learning
        return draw_sigma(u, n, how.sigma_center, how.sigma_width, low, high, how.sigma_uniform)

    def count(self, step: int) -> int:  # noqa: ARG002
        """Images of a step."""
        return self.learning.batch

    def loss(self, network: nn.Module, part: MeasuredPart, autocast: torch.dtype | None) -> Tensor:
        """One process's share of the step's loss: the network on a batch of images, operators one by one."""
        examples = [self.examples[k] for k in part.which]
        with torch.no_grad():
            noisy = [noisy_target(*each) for each in zip(examples, part.noise, part.sigma.tolist(), strict=True)]
            inputs = self.inputs(examples, part, noisy)
        with torch.autocast(part.sigma.device.type, dtype=autocast or torch.float32, enabled=autocast is not None):
            x = signal(network, inputs, part.sigma)
        terms = [
            self.misfit(example, x[k : k + 1], noisy[k], part.roles[k], float(part.sigma[k]), inputs.spread[k])
            for k, example in enumerate(examples)
        ]
        return (part.weight * torch.stack(terms)).sum()

    def inputs(self, examples: Sequence[Example], part: MeasuredPart, noisy: Sequence[Tensor]) -> Inputs:
        """The network's inputs for every item."""
        context, target, steps, deviation = [], [], self.method.lift_steps, self.info.sigma_data
        for example, roles, y, sigma in zip(examples, part.roles, noisy, part.sigma.tolist(), strict=True):
            context.append(example.lift(example.y, roles == CONTEXT, example.sigma, deviation, steps))
            target.append(example.lift(y, roles == TARGET, sigma, deviation, steps, least=example.sigma))
        lifts = [Lift(*(torch.cat(field) for field in zip(*some, strict=True))) for some in (context, target)]
        return inputs_of(lifts[0], lifts[1], deviation)

    def misfit(self, example: Example, x: Tensor, noisy: Tensor, roles: Tensor, sigma: float, spread: Tensor) -> Tensor:
        """The weighted misfit of one image (1 c h w), over what its expectation is about: ()."""
        method, keep = self.method, 1 - (example.sigma / noise_of(example.operator, sigma, example.sigma)) ** 2
        rows = (
            Rows(roles == HELD, method.held_weight, 1.0, example.y),
            Rows(roles == TARGET, method.target_weight, keep, example.y - (1 - keep) * noisy),
            Rows(roles == CONTEXT, method.context_weight, 1.0, example.y),
        )
        return fit(example, x, rows, spread, method.filtered)


class Rows(NamedTuple):
    """Rows of a residual, gain A x - y. chosen: marks views; weight: of their squares; gain: or (1 ...); y: (1 ...)."""

    chosen: Tensor
    weight: float
    gain: Any
    y: Tensor


def fit(example: Example, x: Tensor, rows: Sequence[Rows], spread: Tensor, filtered: float) -> Tensor:
    """The mean square of one residual of all rows that count, over what its expectation is about: ().

    Args:
        example: whose operator A is.
        x: (1 c h w).
        rows: the roots of their weights stand before them.
        spread: standard deviation of the error of x that is expected, (c h w).
        filtered: share in the norm of the filtered residual; the rest is in that of the measurements.
    """
    counted = [row for row in rows if row.weight > 0]
    marks = [row.weight**0.5 * example.mask(row.chosen) for row in counted]
    wanted = torch.stack([m * row.y for m, row in zip(marks, counted, strict=True)]).sum(0)
    gain = torch.stack([m * row.gain for m, row in zip(marks, counted, strict=True)]).sum(0)
    residual, used = gain * example.operator.forward(x) - wanted, torch.stack([row.chosen for row in counted]).any(0)
    square, total = float(spread.square().mean()), torch.zeros((), device=x.device)
    if filtered < 1:
        total = (1 - filtered) * example.mean_square(residual, used) / (example.density * square + example.sigma**2)
    if filtered > 0:
        total = total + filtered * example.filtered_mean_square(residual, used, square**0.5) / square
    return total


def described(
    method: Any, info: PriorInfo, examples: Sequence[Example], views: int, dropped: float = 0.0
) -> MeasuredInfo:
    """What a model that a method trained says of itself: the scans' noise and rows, ``views`` and ``dropped``."""
    sigmas, densities = [e.sigma for e in examples], [e.density for e in examples]
    return MeasuredInfo(
        **asdict(info),
        method=method.name,
        sigma_y=(min(sigmas), max(sigmas)),
        density=sum(densities) / len(densities),
        views=views,
        dropped=dropped,
        lift_steps=method.lift_steps,
    )


def judged(
    task: ForwardModelTask, network: nn.Module, sigmas: Sequence[float], autocast: torch.dtype | None
) -> dict[float, float]:
    """The mean loss of a task on some of its examples at noise levels, with the same draws at every call."""
    found: dict[float, float] = {}
    count = len(task.examples)
    for number, sigma in enumerate(sigmas):
        losses = []
        for k in np.unique(np.linspace(0, count - 1, VALIDATED).round().astype(int)):
            part = task.item(int(k), number * count + int(k), 0, torch.tensor(float(sigma)))
            with torch.no_grad():
                losses.append(float(task.loss(network, part, autocast)))
        found[sigma] = float(np.mean(losses))
    return found


def noisy_target(example: Example, noise: Tensor, sigma: float) -> Tensor:
    """y^s = y + sqrt(s^2 - sigma_y^2) n, whose noise is s, or ``noise_of``: the shape of y.

    Raises:
        ValueError: a level below the scan's own noise.
    """
    if sigma < example.sigma * (1 - 1e-6):
        raise ValueError(
            f"the noise level is {sigma:.4g}, that of {example.source} {example.sigma:.4g}; no less is wanted"
        )
    level = noise_of(example.operator, sigma, example.sigma)
    return example.y + abs(level**2 - example.sigma**2) ** 0.5 * noise
