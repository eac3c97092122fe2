"""Training slices: reading, checking, and drawing crops whose every random choice is keyed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from invdiff.priors.model import PriorInfo

GAMMA = (0.7, 1.4)  # powers between which the grey values of some images are raised
LOOKED_AT = 32  # slices of a file whose values are looked at, about
AIR_BELOW = -500.0  # HU: a CT file that has no value below has no air
FEWEST = 8  # slices below which a training would only learn them by heart
EXTREMES = (0.1, 99.9)  # percentiles between which a file's grey values are taken to lie
SUM_TOLERANCE = 1e-6  # of shares that sum to 1
SPAN = (0.02, 4.0)  # that a file's grey values may span, as shares of the prior's range


@dataclass(frozen=True)
class Drawing:
    """How crops are drawn.

    Args:
        crops: edge lengths of the square crops; each step draws one.
        batches: images a step for each of ``crops``.
        shares: probability of each of ``crops``.
        warp: share of images that are slightly rotated and scaled (interpolated).
        rotate: largest rotation of those, in radians.
        scale: largest relative change of size of those.
        gamma: share of images whose grey values are raised to a random power, for contrasts that vary (MR).
        brightness: largest relative change of those images' grey values.
        group_power: a group of slices is drawn in proportion to its number of subjects to this power: 1 draws every
            subject alike, 0 every group.
        seed: of everything random.
    """

    crops: tuple[int, ...] = (96, 128, 256)
    batches: tuple[int, ...] = (16, 9, 2)
    shares: tuple[float, ...] = (0.6, 0.25, 0.15)
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
        sound = self.crops and min(self.crops) > 0 and min(self.batches) > 0 and min(self.shares) >= 0
        if not sound or abs(sum(self.shares) - 1) > SUM_TOLERANCE:
            raise ValueError(
                f"crops {self.crops}, batches {self.batches} and shares {self.shares}: "
                "at least 1, at least 1 and a sum of 1 are wanted"
            )
        for name in ("warp", "rotate", "scale", "gamma", "brightness", "group_power", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; 0 or more is wanted")


@dataclass(frozen=True, eq=False)
class Slices:
    """Training slices, with the subject and the group (such as an MR contrast) of each.

    Args:
        images: (h w) each, not necessarily of one size; times ``scale`` they are in physical units.
        subject: number of each slice's subject.
        pixel_mm: pixel size of each slice.
        group: number of each slice's group; one group if None.
        scale: physical unit of one grey value.
        source: the file of each slice, for messages.
    """

    images: Sequence[NDArray[Any]] | NDArray[Any]
    subject: NDArray[np.int64]
    pixel_mm: NDArray[np.float32]
    group: NDArray[np.int64] | None = None
    scale: float = 1.0
    source: Sequence[str] = ()

    @cached_property
    def members(self) -> list[list[NDArray[np.int64]]]:
        """Indices of the slices of every subject of every group."""
        group = np.zeros(len(self.images), np.int64) if self.group is None else self.group
        return [
            [np.flatnonzero((group == g) & (self.subject == who)) for who in np.unique(self.subject[group == g])]
            for g in np.unique(group)
        ]

    @property
    def subjects(self) -> int:
        """How many there are."""
        return len(np.unique(self.subject))

    def where(self, chosen: NDArray[np.bool_]) -> Slices:
        """The slices that ``chosen`` (n) marks."""
        index = np.flatnonzero(chosen)
        return replace(
            self,
            images=self.images[index] if isinstance(self.images, np.ndarray) else [self.images[int(k)] for k in index],
            subject=self.subject[index],
            pixel_mm=self.pixel_mm[index],
            group=None if self.group is None else self.group[index],
            source=[self.source[int(k)] for k in index] if self.source else (),
        )

    def in_prior_units(self, index: int, info: PriorInfo) -> Tensor:
        """One slice (1 h w), -1 and +1 at the ends of the prior's range."""
        return info.in_prior_units(torch.from_numpy(self.scale * np.asarray(self.images[index], np.float32)[None]))


def read_slices(paths: Sequence[Path], groups: Sequence[str] = (), scale: float = 1.0) -> Slices:
    """Read HDF5 slice files: ``slices`` (n h w), ``subject`` (n), ``pixel_mm`` (n).

    Args:
        paths: the files.
        groups: data sets (n) whose values together name a slice's group.
        scale: physical unit of one grey value.

    Raises:
        ValueError: no file or no slice, a file that is no HDF5, a missing data set, data sets of different lengths, or
            slices of different sizes.
    """
    if not paths:
        raise ValueError("no training files were given")
    files = [_read_file(path, ("slices", "subject", "pixel_mm", *groups)) for path in paths]
    if len({f["slices"].shape[1:] for f in files}) > 1:
        raise ValueError(f"slices differ in size: {sorted({f['slices'].shape[1:] for f in files})}")
    images, pixel = (np.concatenate([f[name] for f in files]) for name in ("slices", "pixel_mm"))
    if not len(images):
        raise ValueError(f"there are no slices in {', '.join(map(str, paths))}")
    _, subject = np.unique(np.concatenate([f["subject"].astype("S") for f in files]), return_inverse=True)
    group = np.zeros(len(images), np.int64)
    for name in groups:  # each further data set splits the groups so far
        _, number = np.unique(np.concatenate([f[name].astype("S") for f in files]), return_inverse=True)
        _, group = np.unique(group * (number.max() + 1) + number, return_inverse=True)
    source = [str(path) for path, f in zip(paths, files, strict=True) for _ in f["slices"]]
    return Slices(images, subject, pixel, group, scale, source)


def _read_file(path: Path, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    import h5py

    try:
        with h5py.File(path) as f:
            missing = [name for name in names if name not in f]
            if missing:
                raise ValueError(f"{path} has no data set {missing[0]!r}; it has: {', '.join(f)}")
            found = {name: f[name][:] for name in names}
    except OSError as error:
        raise ValueError(f"{path} is not an HDF5 file that can be read ({type(error).__name__})") from error
    lengths = {name: len(value) for name, value in found.items()}
    if len(set(lengths.values())) > 1 or found["slices"].ndim != 3:
        shape = found["slices"].shape
        raise ValueError(f"{path}: slices is {shape}, the lengths are {lengths}; (n h w) and n are wanted")
    return found


def checked(slices: Slices, info: PriorInfo) -> Slices:
    """The slices that are fit for the prior: constant ones (empty ends of volumes) are left out.

    Raises:
        ValueError: a file of nothing but constant slices, values that are not finite, or a file whose values
            do not fit the prior's range or the other files, as in another unit.
    """
    source = np.array(slices.source or ["the slices"] * len(slices.images))
    varied = np.array([image.min() != image.max() for image in slices.images])
    lowest = {}
    for name in np.unique(source):
        ours = np.flatnonzero(source == name)
        if not all(np.isfinite(slices.images[int(k)]).all() for k in ours):
            raise ValueError(f"{name} holds NaN or infinite values; finite ones are wanted")
        if not varied[ours].any():
            raise ValueError(f"{name}: all of its {len(ours)} slices are constant; images are wanted")
        lowest[str(name)] = _lowest(str(name), slices, ours[varied[ours]], info)
    if info.unit == "HU":
        _check_air(lowest)
    return slices if varied.all() else slices.where(varied)


def _lowest(name: str, slices: Slices, index: NDArray[np.int64], info: PriorInfo) -> float:
    """The lowest value of a file, nearly; a file whose values cannot be in the prior's unit is refused."""
    some = index[:: max(1, len(index) // LOOKED_AT)]
    values = slices.scale * np.concatenate([np.asarray(slices.images[int(k)], np.float32).ravel() for k in some])
    low, high = np.percentile(values, EXTREMES)
    share = (high - low) / (info.high - info.low)
    outside = max(info.low - low, high - info.high) / (info.high - info.low)
    if not SPAN[0] <= share <= SPAN[1] or outside > SPAN[1] / 2:
        raise ValueError(
            f"{name}: its values run from {low:g} to {high:g}, prior {info.name!r} from {info.low:g} to {info.high:g} "
            f"{info.unit}; slices in that unit are wanted (data.scale multiplies those of HDF5 files)"
        )
    return float(low)


def _check_air(lowest: dict[str, float]) -> None:
    """Refuse CT files without air where others have it: theirs are raw values, or of another unit."""
    with_air = {name for name, low in lowest.items() if low < AIR_BELOW}
    for name, low in lowest.items():
        if with_air and name not in with_air:
            raise ValueError(
                f"{name}: its lowest values are {low:g} HU, other files have air near -1000; HU are wanted"
            )


def check_enough(slices: Slices) -> None:
    """Refuse to train on too few slices.

    Raises:
        ValueError: fewer than ``FEWEST``.
    """
    if len(slices.images) < FEWEST:
        raise ValueError(f"there are {len(slices.images)} slices to train on; at least {FEWEST} are wanted")


def split(slices: Slices, share: float, seed: int) -> tuple[Slices, Slices | None]:
    """(slices to train on, slices to validate on): whole subjects are held out, about ``share`` of them.

    At least one subject is held out where ``share`` is above 0, and at least one is trained on.
    """
    who = np.unique(slices.subject)
    held = min(len(who) - 1, max(1, round(share * len(who)))) if share else 0
    chosen = np.random.default_rng(seed).permutation(who)[:held]
    marked = np.isin(slices.subject, chosen)
    return (slices.where(~marked), slices.where(marked)) if held else (slices, None)


def digest(slices: Slices | None) -> str:
    """A hash of the slices, to know a run's data again; "" for none."""
    if slices is None:
        return ""
    found = hashlib.blake2b(repr(slices.scale).encode(), digest_size=16)
    for image in slices.images:
        found.update(np.ascontiguousarray(image).data)
    for numbers in (slices.subject, slices.pixel_mm, slices.group):
        found.update(b"" if numbers is None else np.ascontiguousarray(numbers).data)
    return found.hexdigest()


def batch_of(config: Drawing, step: int) -> tuple[int, int]:
    """(edge length of the crops, number of crops) of a step."""
    shares = np.array(config.shares) / sum(config.shares)  # they sum to 1 within SUM_TOLERANCE only
    kind = int(np.random.default_rng((config.seed, step)).choice(len(config.crops), p=shares))
    return config.crops[kind], config.batches[kind]


def draw_crop(slices: Slices, config: Drawing, info: PriorInfo, step: int, item: int) -> Tensor:
    """One crop of a step, (1 size size) in prior units: a group at random, a subject of it, one of its slices.

    Keyed by (seed, step, item): crops can be drawn in any order, by any process.
    """
    from monai.transforms import (
        Compose,
        RandAdjustContrast,
        RandAffine,
        RandFlip,
        RandScaleIntensity,
        RandSpatialCrop,
        SpatialPad,
    )

    size, _ = batch_of(config, step)
    rng = np.random.default_rng((config.seed, step, item))
    chances = np.array([len(subjects) for subjects in slices.members]) ** config.group_power
    subjects = slices.members[int(rng.choice(len(chances), p=chances / chances.sum()))]
    image = slices.images[int(rng.choice(subjects[int(rng.integers(len(subjects)))]))]
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
    x = torch.as_tensor(np.asarray(transform(slices.scale * np.asarray(image, np.float32)[None])))
    return info.in_prior_units(x)
