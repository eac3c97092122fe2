"""Training a network: one loop for every task, EMA, exact resume; and the first task, a denoiser on slices.

Everything random in step ``i`` is keyed by (seed, i), so a resumed run repeats the undisturbed one.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from invdiff.priors.edm import draw_sigma, edm_denoise, edm_loss
from invdiff.priors.launch import Launcher
from invdiff.priors.model import PriorInfo
from invdiff.priors.network import UNet, UNetConfig
from invdiff.priors.slices import Drawing, Slices, batch_of, draw_crop
from invdiff.protocols import Prior

SIGMAS = (0.02, 0.05, 0.1, 0.2, 0.5, 2.0)  # noise levels of the validation, prior units
VALIDATED = 12  # slices that it looks at
BETAS = (0.9, 0.99)  # of AdamW; 0.99 forgets the large gradients of the start sooner than the usual 0.999
WEIGHT_DECAY = 1e-2  # of AdamW, its default
EMA_START = 10  # steps over which the moving average's memory grows to its full length (as in EMA of TensorFlow)
P = TypeVar("P")


@dataclass(frozen=True)
class Learning:
    """How any network is trained, whatever its task.

    Args:
        images: training images (crops) seen in all.
        rate: peak learning rate of AdamW.
        warmup: images over which the rate rises.
        decay: share of ``images`` at the end over which the rate falls to ``final`` of its peak.
        final: last learning rate over the peak.
        clip: largest norm of the gradient.
        ema: images after which a weight's share in the moving average has halved.
        sigma_center: mean of ln sigma (EDM's P_mean).
        sigma_width: standard deviation of ln sigma (EDM's P_std).
        sigma_uniform: share of sigmas drawn log-uniformly over the prior's whole range.
        every: images between checkpoints, each with a validation.
        held_out: share of the subjects that only the validation sees.
        patience: validations without a better mean loss after which training stops; 0 never stops early.
        seed: of everything random.
    """

    images: int = 150_000
    rate: float = 5e-4
    warmup: int = 3_000
    decay: float = 0.3
    final: float = 0.02
    clip: float = 1.0
    ema: int = 8_000
    sigma_center: float = -1.4
    sigma_width: float = 1.4
    sigma_uniform: float = 0.1
    every: int = 4_000
    held_out: float = 0.05
    patience: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("images", "every", "warmup", "ema"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; at least 1 is wanted")
        for name in ("rate", "clip", "sigma_width"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; more than 0 is wanted")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out is {self.held_out}; a share in [0, 1) is wanted")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; 0 or more is wanted")


@dataclass(frozen=True)
class TrainingConfig(Learning, Drawing):
    """How a prior is trained: how its crops are drawn (see ``Drawing``), how it learns (``Learning``), and one more.

    Args:
        sigma_growth: how much the mean of ln sigma rises with ln(crop / smallest crop): small crops teach texture, at
            little cost, whole slices the shape of the body, which only large noise hides.
    """

    sigma_growth: float = 0.0

    def __post_init__(self) -> None:
        Learning.__post_init__(self)
        Drawing.__post_init__(self)


class TrainingState(NamedTuple):
    """All that changes in training."""

    step: int
    seen: int
    loss: float
    network: UNet
    average: UNet
    optimizer: torch.optim.Optimizer


def learning_rate(config: Learning, seen: int) -> float:
    """Warm-up, constant, then linear decay over the last ``decay`` of the images."""
    rise = min(1.0, (seen + 1) / config.warmup)
    left = (config.images - seen) / max(1.0, config.decay * config.images)
    return config.rate * rise * max(config.final, min(1.0, left))


def start(
    config: Learning, network: UNetConfig, weights: dict[str, Tensor] | None = None, extra: int = 0
) -> TrainingState:
    """A network, its average and its optimizer; the network fresh, or with ``weights`` to go on from (fine-tuning).

    Args:
        config: seed and rate.
        network: sizes.
        weights: to start from.
        extra: channels that the network sees beside the image's, see ``UNet``.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        net = UNet(network, extra)
    if weights is not None:
        net.load_state_dict(weights)
    return TrainingState(0, 0, float("nan"), net, copy.deepcopy(net).requires_grad_(False), _adamw(config, net))


def _adamw(config: Learning, network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(network.parameters(), lr=config.rate, betas=BETAS, weight_decay=WEIGHT_DECAY)


class Task(Protocol[P]):
    """What a network is trained for: what a step draws, and its loss.

    Everything random in ``part`` is keyed by the step, and by the item's number in its batch.
    """

    def part(self, step: int, rank: int = 0, world: int = 1) -> P:
        """What the process ``rank`` of ``world`` needs of a step, on the CPU: items rank, rank + world, ...

        A process without an item takes one with weight 0, for its gradients must meet the others'.
        """
        ...

    def count(self, step: int) -> int:
        """Images of a step, in all processes."""
        ...

    def loss(self, network: nn.Module, part: P, autocast: torch.dtype | None) -> Tensor:
        """One process's share of a step's loss; the shares of all processes sum to the batch's mean.

        Args:
            network: to call, on the device where the loss is to be.
            part: of ``part``, its tensors on that device.
            autocast: dtype of the network's arithmetic; None is float32.
        """
        ...


class Part(NamedTuple):
    """What one process needs of a step.

    clean: crops (s 1 h w) in prior units; sigma: (s); noise: N(0, I), as clean; weight: of each in the step's loss (s).
    """

    clean: Tensor
    sigma: Tensor
    noise: Tensor
    weight: Tensor


@dataclass(frozen=True, eq=False)
class Denoising:
    """The task of a prior: crops of slices under noise, the EDM loss.

    Args:
        slices: what to train on.
        config: how.
        info: range and noise levels.
    """

    slices: Slices
    config: TrainingConfig
    info: PriorInfo

    def part(self, step: int, rank: int = 0, world: int = 1) -> Part:
        """Crops, noise levels and noise of the items rank, rank + world, ... of the step's batch."""
        config, info = self.config, self.info
        size, count = batch_of(config, step)
        items, weight = share_of(count, rank, world)
        clean = torch.stack([draw_crop(self.slices, config, info, step, k) for k in items])
        u, n, noise = [], [], []
        for k in items:
            generator = generator_of(config.seed, step, k)
            u.append(torch.rand((), generator=generator))
            n.append(torch.randn((), generator=generator))
            noise.append(torch.randn(clean.shape[1:], generator=generator))
        sigma = draw_sigma(
            torch.stack(u),
            torch.stack(n),
            config.sigma_center + config.sigma_growth * math.log(size / min(config.crops)),
            config.sigma_width,
            info.sigma_min,
            info.sigma_max,
            config.sigma_uniform,
        )
        return Part(clean, sigma, torch.stack(noise), weight)

    def count(self, step: int) -> int:
        """Crops of a step."""
        return batch_of(self.config, step)[1]

    def loss(self, network: nn.Module, part: Part, autocast: torch.dtype | None) -> Tensor:
        """``part_loss``."""
        return part_loss(network, part, self.info, autocast)


def share_of(count: int, rank: int, world: int) -> tuple[list[int], Tensor]:
    """The items of a batch of ``count`` that one process takes, and the weight of each in the step's mean loss (s).

    A process without an item gets the first one with weight 0.
    """
    items = list(range(rank, count, world))
    weight = torch.full((max(1, len(items)),), 1 / count if items else 0.0)
    return items or [0], weight


def generator_of(seed: int, step: int, item: int) -> torch.Generator:
    """Random numbers keyed by (seed, step, item)."""
    key = int(np.random.default_rng((seed, step, item, 1)).integers(2**63))
    return torch.Generator().manual_seed(key)


class _Steps(Dataset[P]):
    """The part of every step that one process takes."""

    def __init__(self, task: Task[P], rank: int, world: int) -> None:
        self.task, self.rank, self.world = task, rank, world

    def __getitem__(self, step: int) -> P:
        return self.task.part(step, self.rank, self.world)


def train(
    state: TrainingState,
    task: Task[P],
    config: Learning,
    launcher: Launcher,
    autocast: torch.dtype | None,
    workers: int = 0,
    compiled: bool = False,
) -> Iterator[TrainingState]:
    """Train until ``config.images`` are seen; yields the state after every step.

    The loss of a step is the mean over its whole batch, whatever the number of processes.

    Args:
        state: from ``start`` or ``unpack``.
        task: what is drawn and what is lost, such as ``Denoising``.
        config: how.
        launcher: the processes that share the work.
        autocast: dtype of the network's arithmetic; None is float32.
        workers: processes that draw parts beside each training process; they change nothing but the speed.
        compiled: ``torch.compile`` the network.

    Raises:
        FloatingPointError: the loss is not finite; the message names the step.
    """
    device, network, average, optimizer = launcher.device, state.network, state.average, state.optimizer
    network.to(device).train()
    average.to(device)
    for values in optimizer.state.values():  # of a resumed run they are on the CPU
        values.update({k: v.to(device) for k, v in values.items() if torch.is_tensor(v) and v.ndim})
    called = launcher.setup(cast(nn.Module, torch.compile(network)) if compiled else network, optimizer)
    step, seen = state.step, state.seen
    for part in _parts(_Steps(task, launcher.rank, launcher.world), step, workers, device):
        if seen >= config.images:
            return
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, seen)
        loss = task.loss(called, _moved(part, device), autocast)
        value = float(launcher.total(loss.detach()))
        if not np.isfinite(value):
            raise FloatingPointError(f"the training loss is {value} at step {step}; lower the rate ({config.rate})")
        optimizer.zero_grad()
        launcher.backward(launcher.world * loss)  # gradients are averaged over the processes, the loss is a sum
        torch.nn.utils.clip_grad_norm_(network.parameters(), config.clip)
        optimizer.step()
        count = task.count(step)
        seen, step = seen + count, step + 1
        _follow(average, network, min(0.5 ** (count / config.ema), (1 + step) / (EMA_START + step)))
        yield TrainingState(step, seen, value, network, average, optimizer)


def _parts(steps: _Steps[P], first: int, workers: int, device: torch.device) -> DataLoader[P]:
    """The parts of all steps from ``first`` on."""
    return DataLoader(
        steps,
        batch_size=None,
        sampler=itertools.count(first),
        num_workers=workers,
        pin_memory=device.type == "cuda",
    )


def _moved(part: Any, device: torch.device) -> Any:
    """Tensors of a part, in named tuples, tuples and lists, on the device; the rest as it is."""
    if isinstance(part, Tensor):
        return part.to(device, non_blocking=True)
    if isinstance(part, tuple | list):
        moved = [_moved(one, device) for one in part]
        return type(part)(*moved) if hasattr(part, "_fields") else type(part)(moved)
    return part


def part_loss(network: nn.Module, part: Part, info: PriorInfo, autocast: torch.dtype | None) -> Tensor:
    """One process's share of a step's loss; the shares of all processes sum to the batch's mean."""
    noisy = part.clean + part.sigma[:, None, None, None] * part.noise
    with torch.autocast(noisy.device.type, dtype=autocast or torch.float32, enabled=autocast is not None):
        denoised = edm_denoise(network, noisy, part.sigma, info.sigma_data)
    return (part.weight * edm_loss(denoised, part.clean, part.sigma, info.sigma_data)).sum()


@torch.no_grad()
def _follow(average: nn.Module, network: nn.Module, keep: float) -> None:
    """The moving average of the weights."""
    for a, b in zip(average.parameters(), network.parameters(), strict=True):
        a.lerp_(b, 1 - keep)


@torch.no_grad()
def validate(prior: Prior, slices: Slices, info: PriorInfo, device: torch.device) -> dict[float, float]:
    """The EDM loss at each of ``SIGMAS`` over about ``VALIDATED`` slices; the noise is always the same."""
    index = np.unique(np.linspace(0, len(slices.images) - 1, VALIDATED).round().astype(int))
    losses: dict[float, list[float]] = {sigma: [] for sigma in SIGMAS}
    for k in index:
        clean = slices.in_prior_units(k, info)[None]
        for number, sigma in enumerate(SIGMAS):
            generator = torch.Generator().manual_seed(int(k) * len(SIGMAS) + number)
            noise = torch.randn(clean.shape, generator=generator).to(device)
            level = torch.tensor([sigma], device=device)
            denoised = prior.denoise(clean.to(device) + sigma * noise, level)
            losses[sigma].append(float(edm_loss(denoised, clean.to(device), level, info.sigma_data)))
    return {sigma: float(np.mean(values)) for sigma, values in losses.items()}


def pack(state: TrainingState) -> dict[str, Any]:
    """The state as tensors and numbers, for ``torch.save``."""
    return {
        "step": state.step,
        "seen": state.seen,
        "loss": state.loss,
        "network": state.network.state_dict(),
        "average": state.average.state_dict(),
        "optimizer": state.optimizer.state_dict(),
    }


def unpack(document: dict[str, Any], config: Learning, network: UNetConfig, extra: int = 0) -> TrainingState:
    """The state that ``pack`` wrote; arguments as of ``start``."""
    fresh = start(config, network, None, extra)
    fresh.network.load_state_dict(document["network"])
    fresh.average.load_state_dict(document["average"])
    fresh.optimizer.load_state_dict(document["optimizer"])
    return fresh._replace(step=document["step"], seen=document["seen"], loss=document["loss"])
