"""The network that carries the forward model inside its denoising step: its inputs, its output, its folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from invdiff.config import build
from invdiff.files import sha256_of
from invdiff.measured.response import Lift, fused
from invdiff.priors.description import Description
from invdiff.priors.model import CONFIG_FILE, WEIGHTS_FILE, NetworkPrior, PriorInfo
from invdiff.priors.network import UNet, UNetConfig
from invdiff.priors.state_dict import load_weights, state_dict_of

SAMPLE = ("forward-model", "forward-model-supervised")  # methods whose models the sampler forward-model takes
ONE_STEP = ("ssdu", "supervised")  # and the sampler one-step
METHODS = (*SAMPLE, *ONE_STEP)
COVERAGES = 2  # maps beside the lifts: of the context and of the target


@dataclass(frozen=True)
class MeasuredInfo(PriorInfo):
    """What a model that was trained on measurements alone is.

    Args:
        method: how it was trained.
        sigma_y: least and greatest noise of the scans that it was trained on, prior units.
        density: mean squared norm of a row of their operators.
        views: most views of a target in the training, of a scan where the method has no target.
        dropped: share of the training without a context.
        lift_steps: iterations of the lifts.
    """

    method: str = "forward-model"
    sigma_y: tuple[float, float] = (0.0, 0.0)
    density: float = 1.0
    views: int = 0
    dropped: float = 0.0
    lift_steps: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "sigma_y", tuple(self.sigma_y))

    def inputs(self, channels: int) -> int:
        """Channels of what the network is called with: ``Inputs.stacked``."""
        return stacked_channels(channels)


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


class ForwardModel(NetworkPrior):
    """A model that was trained on measurements: takes ``Inputs.stacked`` in the place of a noisy image.

    It is no prior of images: it gives E[x | y_C, y_T^s] from lifts of measurements, one-step models E[x | y_C], and
    refuses anything else. That it is called as one lets the wrappers of priors (chunks, devices, scales) serve it too.
    """

    info: MeasuredInfo

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """x (s 3c+3 h w): ``Inputs.stacked``; sigma () or (s): noise of the target. Gives the image (s c h w).

        Raises:
            ValueError: images in the place of the inputs, as of a sampler that wants a prior.
        """
        wanted, sampler = stacked_channels(self.channels), "one-step" if self.info.method in ONE_STEP else SAMPLE[0]
        if x.ndim != 4 or x.shape[1] != wanted:
            raise ValueError(
                f"the model {self.info.name!r} takes lifts of measurements and is no prior of images: it serves the "
                f"sampler {sampler} alone (it got {tuple(x.shape)}, ({x.shape[0]}, {wanted}, h, w) is wanted)"
            )
        inputs, level = unstacked(x, self.channels), sigma.to(x).expand(x.shape[0])
        with torch.autocast(x.device.type, dtype=self.autocast or torch.float32, enabled=self.autocast is not None):
            return signal(self.network, inputs, level)

    def to(self, device: torch.device | str, autocast: torch.dtype | None = None) -> ForwardModel:
        """The same model with its weights on ``device``, computing in ``autocast``."""
        network = self.network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return ForwardModel(network, self.info, autocast, self.sha256)


def read(folder: Path, description: Description | None) -> ForwardModel | None:
    """A folder that a training on measurements exported, with any method of ``METHODS``; None for another folder.

    Raises:
        ValueError: a description, which the folder has itself; or files that do not fit each other.
    """
    if method_of(folder) not in METHODS:
        return None
    network, info, sha256 = read_network(folder, description)
    return ForwardModel(network, info, None, sha256)


def method_of(folder: Path) -> str | None:
    """How the model of a folder was trained on measurements; None of another folder."""
    return _document_of(folder).get("prior", {}).get("method")


def read_network(folder: Path, description: Description | None) -> tuple[UNet, MeasuredInfo, str]:
    """The network of a folder that a training on measurements exported, its description and its hash.

    Raises:
        ValueError: a description, which the folder has itself; or files that do not fit each other.
    """
    document = _document_of(folder)
    if description is not None:
        raise ValueError(f"{folder} states its own unit and range; a description is for folders of others")
    weights, where = folder / WEIGHTS_FILE, folder / CONFIG_FILE
    sha256 = sha256_of([weights])
    if sha256 != document.get("sha256"):
        raise ValueError(
            f"{weights} has sha256 {sha256[:12]}..., {CONFIG_FILE} names {document.get('sha256')!s:.12}..."
        )
    config = build(UNetConfig, document["network"], f"{where}: network")
    network = UNet(config, extra_channels(config.image_channels))
    load_weights(network, state_dict_of(weights), weights)
    info = build(MeasuredInfo, document["prior"], f"{where}: prior")
    return network.eval().requires_grad_(False), info, sha256


def _document_of(folder: Path) -> dict[str, Any]:
    """``config.json`` of a folder with weights, {} where there is none that can be read."""
    if not (folder / CONFIG_FILE).is_file() or not (folder / WEIGHTS_FILE).is_file():
        return {}
    try:
        document = json.loads((folder / CONFIG_FILE).read_text())
    except ValueError:
        return {}
    return document if isinstance(document, dict) and isinstance(document.get("prior"), dict) else {}
