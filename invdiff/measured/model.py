"""The network that carries the forward model inside its denoising step: its inputs, its output, its folder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from invdiff.measured.response import Lift, fused
from invdiff.priors.model import PriorInfo

COVERAGES = 2  # maps beside the lifts: of the context and of the target


@dataclass(frozen=True)
class MeasuredInfo(PriorInfo):
    """What a model that was trained on measurements alone is.

    Args:
        method: how it was trained.
        sigma_y: least and greatest noise of the scans that it was trained on, prior units with ||A|| = 1.
        views: most views of one of them.
        dropped: share of the training without a context.
    """

    method: str = "forward-model"
    sigma_y: tuple[float, float] = (0.0, 0.0)
    views: int = 0
    dropped: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "sigma_y", tuple(self.sigma_y))


class Inputs(NamedTuple):
    """What the network is asked with.

    skip: estimate without it (s c h w); spread: deviation of what is missing (s 1 1 1); seen: its channels
    (s 2c+2 h w): lifts of target and context, of variance about 1, and both coverage maps.
    """

    skip: Tensor
    spread: Tensor
    seen: Tensor

    def stacked(self) -> Tensor:
        """One tensor (s 3c+3 h w), which wrappers of priors can cut and move."""
        spread = self.spread.expand(-1, 1, *self.skip.shape[-2:])
        return torch.cat([self.skip, spread, self.seen], 1)


def stacked_channels(channels: int) -> int:
    """Channels of ``Inputs.stacked`` for images of ``channels``."""
    return 3 * channels + 1 + COVERAGES


def extra_channels(channels: int) -> int:
    """Channels that the network sees beside as many as the image has."""
    return channels + COVERAGES


def unstacked(x: Tensor, channels: int) -> Inputs:
    """The inputs that were ``stacked``."""
    skip, spread, seen = x.split([channels, 1, 2 * channels + COVERAGES], 1)
    return Inputs(skip, spread, seen)


def inputs_of(context: Lift, target: Lift, deviation: float) -> Inputs:
    """The network's inputs; for a target that is the whole image exactly EDM's c_skip x, c_out and c_in x.

    Args:
        context: lift of the measurements as they are.
        target: lift of the noisy ones.
        deviation: of images in prior units.
    """
    skip, left = fused(context, target)
    seen = [_unit(one, deviation) for one in (target, context)]
    maps = [context.coverage, target.coverage]
    return Inputs(skip, deviation * left.sqrt(), torch.cat([*seen, *maps], 1))


def _unit(one: Lift, deviation: float) -> Tensor:
    size = deviation * one.recovered.sqrt()
    return torch.where(size > 0, one.image / size.clamp_min(torch.finfo(size.dtype).tiny), 0.0)


def signal(network: nn.Module, inputs: Inputs, sigma: Tensor) -> Tensor:
    """x = skip + spread F(seen, ln(sigma) / 4), (s c h w) in prior units.

    Args:
        network: F.
        inputs: of ``inputs_of``.
        sigma: noise of the target, (s).
    """
    raw: Tensor = network(inputs.seen, sigma.to(inputs.seen).log() / 4)
    return inputs.skip + inputs.spread * raw.to(inputs.skip.dtype)
