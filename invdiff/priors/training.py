"""Training a denoiser on slices: draws by subject, EDM loss, EMA, exact resume.

Everything random in step ``i`` is keyed by (seed, i), so a resumed run repeats the undisturbed one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from invdiff.priors.edm import draw_sigma, edm_denoise, edm_loss
from invdiff.priors.model import PriorInfo
from invdiff.priors.network import UNet, UNetConfig

GAMMA = (0.7, 1.4)  # powers between which the grey values of some images are raised


@dataclass(frozen=True)
class TrainingConfig:
    """How a prior is trained.

    Args:
        images: training images (crops) seen in all.
        crops: edge lengths of the square crops; each step draws one.
        batches: images a step for each of ``crops``.
        shares: probability of each of ``crops``.
        rate: peak learning rate of AdamW.
        warmup: images over which the rate rises.
        decay: share of ``images`` at the end over which the rate falls to ``final`` of its peak.
        final: last learning rate over the peak.
        clip: largest norm of the gradient.
        ema: images after which a weight's share in the moving average has halved.
        sigma_center: mean of ln sigma (EDM's P_mean).
        sigma_width: standard deviation of ln sigma (EDM's P_std).
        sigma_uniform: share of sigmas drawn log-uniformly over the prior's whole range.
        warp: share of images that are slightly rotated and scaled (interpolated).
        rotate: largest rotation of those, in radians.
        scale: largest relative change of size of those.
        gamma: share of images whose grey values are raised to a random power, for contrasts that vary (MR).
        brightness: largest relative change of those images' grey values.
        group_power: a group of slices is drawn in proportion to its number of subjects to this power: 1 draws every
            subject alike, 0 every group.
        seed: of everything random.
    """

    images: int = 150_000
    crops: tuple[int, ...] = (96, 128, 256)
    batches: tuple[int, ...] = (16, 9, 2)
    shares: tuple[float, ...] = (0.6, 0.25, 0.15)
    rate: float = 5e-4
    warmup: int = 3_000
    decay: float = 0.3
    final: float = 0.02
    clip: float = 1.0
    ema: int = 8_000
    sigma_center: float = -1.4
    sigma_width: float = 1.4
    sigma_uniform: float = 0.1
    warp: float = 0.3
    rotate: float = 0.2
    scale: float = 0.15
    gamma: float = 0.0
    brightness: float = 0.0
    group_power: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("crops", "batches", "shares"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not len(self.crops) == len(self.batches) == len(self.shares):
            raise ValueError(
                f"crops {self.crops}, batches {self.batches} and shares {self.shares} must be equally long"
            )
        if self.images < 1:
            raise ValueError(f"images is {self.images}; at least 1 is wanted")


@dataclass(frozen=True, eq=False)
class Slices:
    """Training slices, with the subject and the group (such as an MR contrast) of each.

    Args:
        images: (h w) each, not necessarily of one size; times ``scale`` they are in physical units.
        subject: number of each slice's subject.
        pixel_mm: pixel size of each slice.
        group: number of each slice's group; one group if None.
        scale: physical unit of one grey value.
    """

    images: Sequence[NDArray[Any]] | NDArray[Any]
    subject: NDArray[np.int64]
    pixel_mm: NDArray[np.float32]
    group: NDArray[np.int64] | None = None
    scale: float = 1.0

    @cached_property
    def members(self) -> list[list[NDArray[np.int64]]]:
        """Indices of the slices of every subject of every group."""
        group = np.zeros(len(self.images), np.int64) if self.group is None else self.group
        return [
            [np.flatnonzero((group == g) & (self.subject == who)) for who in np.unique(self.subject[group == g])]
            for g in np.unique(group)
        ]


class TrainingState(NamedTuple):
    """All that changes in training."""

    step: int
    seen: int
    loss: float
    network: UNet
    average: UNet
    optimizer: torch.optim.Optimizer


def read_slices(paths: Sequence[Path], groups: Sequence[str] = (), scale: float = 1.0) -> Slices:
    """Read HDF5 slice files: ``slices`` (n h w), ``subject`` (n), ``pixel_mm`` (n).

    Args:
        paths: the files.
        groups: data sets (n) whose values together name a slice's group.
        scale: physical unit of one grey value.

    Raises:
        ValueError: no file, a missing data set, or slices of different sizes.
    """
    import h5py

    if not paths:
        raise ValueError("no training files were given")
    images, subject, pixel, group = [], [], [], []
    for path in paths:
        with h5py.File(path) as f:
            missing = [name for name in ("slices", "subject", "pixel_mm", *groups) if name not in f]
            if missing:
                raise ValueError(f"{path} has no data set {missing[0]!r}")
            images.append(f["slices"][:])
            subject.append(f["subject"][:])
            pixel.append(f["pixel_mm"][:])
            names = [f[name][:] for name in groups]
            group += [b"/".join(row) for row in zip(*names, strict=True)] if groups else [b""] * len(images[-1])
    if len({a.shape[1:] for a in images}) > 1:
        raise ValueError(f"slices differ in size: {sorted({a.shape[1:] for a in images})}")
    _, index = np.unique(np.concatenate(subject), return_inverse=True)
    _, kind = np.unique(group, return_inverse=True)
    return Slices(np.concatenate(images), index, np.concatenate(pixel), kind, scale)


def draw_batch(slices: Slices, config: TrainingConfig, info: PriorInfo, step: int) -> Tensor:
    """The clean crops of one step, (s 1 h w) in prior units; every crop is keyed by (seed, step, its number)."""
    kind = int(np.random.default_rng((config.seed, step)).choice(len(config.crops), p=config.shares))
    return torch.stack(
        [draw_crop(slices, config, info, config.crops[kind], (step, k)) for k in range(config.batches[kind])]
    )


def draw_crop(slices: Slices, config: TrainingConfig, info: PriorInfo, size: int, key: tuple[int, int]) -> Tensor:
    """One crop (1 size size) in prior units: a group at random, then a subject of it, then one of its slices."""
    from monai.transforms import (
        Compose,
        RandAdjustContrast,
        RandAffine,
        RandFlip,
        RandScaleIntensity,
        RandSpatialCrop,
        SpatialPad,
    )

    rng = np.random.default_rng((config.seed, *key))
    chances = np.array([len(subjects) for subjects in slices.members]) ** config.group_power
    subjects = slices.members[rng.choice(len(chances), p=chances / chances.sum())]
    image = slices.images[int(rng.choice(subjects[rng.integers(len(subjects))]))]
    transform = Compose(
        [
            RandFlip(0.5, spatial_axis=0),
            RandFlip(0.5, spatial_axis=1),
            RandAffine(config.warp, rotate_range=config.rotate, scale_range=config.scale, padding_mode="border"),
            RandAdjustContrast(config.gamma, GAMMA),
            RandScaleIntensity(config.brightness, config.gamma),
            SpatialPad((size, size), mode="edge"),
            RandSpatialCrop((size, size), random_size=False),
        ]
    )
    transform.set_random_state(int(rng.integers(2**31)))
    x = torch.as_tensor(np.asarray(transform(slices.scale * image[None].astype(np.float32))))
    return (x - (info.high + info.low) / 2) / ((info.high - info.low) / 2)


def learning_rate(config: TrainingConfig, seen: int) -> float:
    """Warm-up, constant, then linear decay over the last ``decay`` of the images."""
    rise = min(1.0, (seen + 1) / config.warmup)
    left = (config.images - seen) / max(1.0, config.decay * config.images)
    return config.rate * rise * max(config.final, min(1.0, left))


def start(config: TrainingConfig, network: UNetConfig) -> TrainingState:
    """A fresh network, its average and its optimizer."""
    torch.manual_seed(config.seed)
    net = UNet(network)
    optimizer = torch.optim.AdamW(net.parameters(), lr=config.rate, betas=(0.9, 0.99), weight_decay=1e-2)
    return TrainingState(0, 0, float("nan"), net, copy.deepcopy(net).requires_grad_(False), optimizer)


def train(
    state: TrainingState,
    slices: Slices,
    config: TrainingConfig,
    info: PriorInfo,
    device: torch.device,
    autocast: torch.dtype | None,
) -> Iterator[TrainingState]:
    """Train until ``config.images`` are seen; yields the state after every step.

    Raises:
        FloatingPointError: the loss is not finite; the message names the step.
    """
    network, average, optimizer = state.network.to(device).train(), state.average.to(device), state.optimizer
    step, seen = state.step, state.seen
    while seen < config.images:
        clean = draw_batch(slices, config, info, step).to(device)
        generator = torch.Generator().manual_seed(int(np.random.default_rng((config.seed, step, 1)).integers(2**63)))
        u, n = torch.rand(len(clean), generator=generator), torch.randn(len(clean), generator=generator)
        sigma = draw_sigma(
            u, n, config.sigma_center, config.sigma_width, info.sigma_min, info.sigma_max, config.sigma_uniform
        ).to(device)
        noisy = clean + sigma[:, None, None, None] * torch.randn(clean.shape, generator=generator).to(device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, seen)
        with torch.autocast(device.type, dtype=autocast or torch.float32, enabled=autocast is not None):
            denoised = edm_denoise(network, noisy, sigma, info.sigma_data)
        loss = edm_loss(denoised, clean, sigma, info.sigma_data).mean()
        value = float(loss.detach())
        if not np.isfinite(value):
            raise FloatingPointError(f"the training loss is {value} at step {step}; lower the rate ({config.rate})")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), config.clip)
        optimizer.step()
        seen, step = seen + len(clean), step + 1
        keep = min(0.5 ** (len(clean) / config.ema), (1 + step) / (10 + step))
        with torch.no_grad():
            for a, b in zip(average.parameters(), network.parameters(), strict=True):
                a.lerp_(b, 1 - keep)
        yield TrainingState(step, seen, value, network, average, optimizer)


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


def unpack(document: dict[str, Any], config: TrainingConfig, network: UNetConfig) -> TrainingState:
    """The state that ``pack`` wrote."""
    fresh = start(config, network)
    fresh.network.load_state_dict(document["network"])
    fresh.average.load_state_dict(document["average"])
    fresh.optimizer.load_state_dict(document["optimizer"])
    return fresh._replace(step=document["step"], seen=document["seen"], loss=document["loss"])
