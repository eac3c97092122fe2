"""Ambient diffusion (Daras et al., NeurIPS 2023): a prior out of scans alone, as far as they show images.

The scan's operator is corrupted further: some of its views are held out, A_S is left. The network sees the lift of
y_S + sigma A_S n = A_S (x_0 + sigma n) + noise, the image under image noise as A_S sees it, and gives an image; the
loss compares A_N x with the held-out y_N, whose noise the network never saw. Its optimum is
E[x_0 | A_S x_sigma + noise] on all that the held-out views of other scans may show. Seen through one A_S that leaves
little out, this is a denoiser of images: ``AmbientPrior``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from invdiff.measured.conditions import check_coverage, check_grids
from invdiff.measured.examples import HELD, TARGET, Example, Splitting
from invdiff.measured.forward import ROLES, ForwardModelTask, MeasuredPart, Rows, described, fit, judged
from invdiff.measured.method import MeasuredLearning, Method
from invdiff.measured.model import Inputs, MeasuredInfo, extra_channels, inputs_of, signal
from invdiff.measured.response import Lift, nothing
from invdiff.noise import KeyedNoise
from invdiff.priors.edm import draw_sigma
from invdiff.priors.model import PriorInfo
from invdiff.priors.training import SIGMAS, generator_of

STEP = -5  # of the keyed noise that probes whether rows are orthonormal
ORTHONORMAL = 1e-3  # relative difference of A A^H y and y at which they still are


@dataclass(frozen=True)
class AmbientMethod(Method):
    """A prior out of measurements (Ambient diffusion): some views are dropped further, and the loss stands on them.

    Args:
        target: least and greatest share of the views that the network is shown; the others judge it.
        seen_weight: in the loss, of the views that are shown. Their noise n_y is also in what the network sees; the
            loss stands on (1 - k) A_S x + k (A_S x_sigma + n_y), k = sigma_y^2 / (sigma^2 + sigma_y^2), whose optimum
            is the same (Tweedie's formula as in Daras et al., ICML 2024). Only for operators of orthonormal rows
            (masks, one coil), whose held-out views say nothing of what the shown ones see.
        unseen: largest share of the image space that no scan sees.
        lift_steps: iterations of a lift, see ``invdiff.measured.response.lift``.
        filtered: share of the loss in the norm of the residual's lift, see ``ForwardModelMethod``.
    """

    name: ClassVar[str] = "ambient"

    target: tuple[float, float] = (0.6, 0.95)
    seen_weight: float = 0.0
    unseen: float = 0.15
    lift_steps: int = 8
    filtered: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "target", self.splitting.target)
        if self.seen_weight < 0:
            raise ValueError(f"measured.seen_weight is {self.seen_weight}; 0 or more is wanted")

    @property
    def splitting(self) -> Splitting:
        """Of the views: no context."""
        return Splitting((0.0, 0.0), self.target, 0.0)

    def extra(self, channels: int) -> int:
        """As of the forward-model network, whose context is left empty."""
        return extra_channels(channels)

    def check(self, examples: Sequence[Example], info: PriorInfo) -> list[str]:  # noqa: ARG002
        """Grids and coverage; with ``seen_weight``, that the rows of the operators are orthonormal.

        Raises:
            ValueError: one of them fails, or an operator is not linear.
        """
        check_grids(examples)
        for example in examples:
            if not hasattr(example.operator, "adjoint"):
                raise ValueError(f"{example.source} has an operator that is not linear; a linear one is wanted")
        if self.seen_weight:
            _check_orthonormal(examples[0])
        return check_coverage(examples, self.unseen)

    def task(self, examples: Sequence[Example], learning: MeasuredLearning, info: PriorInfo) -> AmbientTask:
        """Further corruption, image noise, and the loss on what was dropped."""
        return AmbientTask(examples, self, learning, info)

    def judge(
        self, network: nn.Module, examples: Sequence[Example], info: PriorInfo, autocast: torch.dtype | None
    ) -> dict[float, float]:
        """The loss on some held-out scans at the levels of ``SIGMAS``."""
        task = AmbientTask(examples, self, MeasuredLearning(batch=1), info)
        return judged(task, network, SIGMAS, autocast)

    def exported(self, info: PriorInfo, examples: Sequence[Example]) -> MeasuredInfo:
        """The description with the scans' noise and views."""
        return described(self, info, examples, max(e.views for e in examples))


@dataclass(frozen=True, eq=False)
class AmbientTask(ForwardModelTask):
    """The task of ``AmbientMethod``; arguments as of ``ForwardModelTask``."""

    method: Any  # an AmbientMethod

    def item(self, index: int, step: int, k: int, sigma: Tensor | None = None) -> MeasuredPart:
        """One item, its noise that of an image (1 c h w); keyed by (seed, step, k)."""
        example, seed = self.examples[index], self.learning.seed
        generator = generator_of(seed, step, k)
        u, n = torch.rand(1, generator=generator), torch.randn(1, generator=generator)
        how, low, high = self.learning, self.info.sigma_min, self.info.sigma_max
        drawn = draw_sigma(u, n, how.sigma_center, how.sigma_width, low, high, how.sigma_uniform)
        level = drawn if sigma is None else sigma[None]
        noise = torch.randn(example.operator.domain.shape, generator=generator)
        roles = self.method.splitting.draw(example.views, (seed, step, k, ROLES))
        return MeasuredPart([index], [roles], level, [noise], torch.ones(1))

    def loss(self, network: nn.Module, part: MeasuredPart, autocast: torch.dtype | None) -> Tensor:
        """One process's share of the step's loss."""
        examples = [self.examples[k] for k in part.which]
        d, steps = self.info.sigma_data, self.method.lift_steps
        sigmas = part.sigma.tolist()
        with torch.no_grad():
            noisy = [e.y + s * e.operator.forward(n) for e, s, n in zip(examples, sigmas, part.noise, strict=True)]
            each = zip(examples, noisy, part.roles, sigmas, strict=True)
            inputs = joined([corrupted(e, y, roles == TARGET, s, d, steps) for e, y, roles, s in each], d)
        with torch.autocast(part.sigma.device.type, dtype=autocast or torch.float32, enabled=autocast is not None):
            x = signal(network, inputs, part.sigma)
        terms = []
        for k, (example, roles, sigma) in enumerate(zip(examples, part.roles, sigmas, strict=True)):
            one = x[k : k + 1]
            keep = sigma**2 / (sigma**2 + example.sigma**2)
            rows = (
                Rows(roles == HELD, 1.0, 1.0, example.y),
                Rows(roles == TARGET, self.method.seen_weight, keep, example.y - (1 - keep) * noisy[k]),
            )
            terms.append(fit(example, one, rows, inputs.spread[k], self.method.filtered))
        return (part.weight * torch.stack(terms)).sum()


def corrupted(example: Example, y: Tensor, chosen: Tensor, sigma: float, deviation: float, steps: int = 1) -> Lift:
    """The lift of y = A (x_0 + sigma n) + sigma_y n_y, some views of it: the best filter for white images.

    Args:
        example: whose operator A is.
        y: (1 ...).
        chosen: marks views (views).
        sigma: of the image noise n.
        deviation: of images in prior units; of the whole image without noise the lift is EDM's c_skip x.
        steps: see ``invdiff.measured.response.lift``.
    """
    return example.lift(y, chosen, example.sigma, deviation, steps, sigma)


def joined(lifts: Sequence[Lift], deviation: float) -> Inputs:
    """The network's inputs of one lift each, without a context."""
    target = Lift(*(torch.cat(field) for field in zip(*lifts, strict=True)))
    return inputs_of(nothing(target.image), target, deviation)


class AmbientPrior:
    """What ``AmbientMethod`` learned, as a Prior: denoises what one scan's operator sees of an image.

    Args:
        network: as trained.
        info: as trained.
        example: a scan of the kind that was trained on, of many views; its own measurements do not matter.
        autocast: dtype of the network's arithmetic.
        sha256: hash of the weights, for records.
    """

    def __init__(
        self,
        network: nn.Module,
        info: MeasuredInfo,
        example: Example,
        autocast: torch.dtype | None = None,
        sha256: str | None = None,
    ) -> None:
        self.network, self.info, self.example = network, info, example
        self.autocast, self.sha256 = autocast, sha256
        self.channels: int = example.operator.domain.shape[1]

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """E[x_0 | A x_sigma] by the network: x (s c h w) in prior units, sigma () or (s).

        Raises:
            ValueError: images of another size than the scan's.
        """
        shape = self.example.operator.domain.shape
        if x.ndim != 4 or tuple(x.shape[1:]) != tuple(shape[1:]):
            raise ValueError(f"the images have shape {tuple(x.shape)}; (s, {', '.join(map(str, shape[1:]))}) is wanted")
        levels = sigma.expand(len(x)) if sigma.ndim == 0 else sigma
        held = levels.clamp(self.info.sigma_min, self.info.sigma_max)
        everything = torch.ones(self.example.views)
        lifts = []
        for one, level in zip(x.split(1), held.tolist(), strict=True):
            y = self.example.operator.forward(one)
            lifts.append(corrupted(self.example, y, everything, level, self.info.sigma_data, self.info.lift_steps))
        inputs = joined(lifts, self.info.sigma_data)
        with torch.autocast(x.device.type, dtype=self.autocast or torch.float32, enabled=self.autocast is not None):
            return signal(self.network, inputs, held)

    def to(self, device: torch.device | str, autocast: torch.dtype | None = None) -> AmbientPrior:
        """The same prior on ``device``, computing in ``autocast``; the network is moved in place."""
        return AmbientPrior(self.network.to(device), self.info, self.example.to(device), autocast, self.sha256)


def _check_orthonormal(example: Example) -> None:
    y = KeyedNoise()(STEP, example.y) * example.mask(torch.ones(example.views))
    again = example.operator.forward(example.operator.adjoint(y))
    if float((again - y).abs().max()) > ORTHONORMAL * float(y.abs().max()):
        raise ValueError(
            f"measured.seen_weight wants operators of orthonormal rows, such as masks and one coil; that of "
            f"{example.source} has others: 0 is wanted"
        )
