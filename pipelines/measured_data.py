"""Measurement files as examples of a training: no image, in prior units, one operator for all slices that share it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from invdiff.datasets import Measurements, read_measurements
from invdiff.files import existing_file
from invdiff.linalg import power_norm
from invdiff.measured import Example, MeasuredInfo, alike, example_of
from invdiff.measured.nonlinear import nonlinear_example_of
from invdiff.noise import KeyedNoise
from invdiff.pipelines.budget import built
from invdiff.pipelines.mri import MRIConfig, as_seen_by, way_of
from invdiff.pipelines.scans import operator_of, some_slices
from invdiff.priors.model import PriorInfo
from invdiff.problem import NORM_ITERATIONS, PriorUnits, prior_to_operator
from invdiff.run import fingerprint
from invdiff.samplers import ForwardModelDiffusion
from invdiff.units import MU_WATER

HDF5 = (".h5", ".hdf5")


class Collection(NamedTuple):
    """Examples of scans.

    examples: of every slice; scan: the number of each one's scan; file: that of its file; pixel_mm: of each one's
    image; unsampled: share of a Cartesian k-space that no scan sampled, 0 for others; widest: the slice of most views.
    """

    examples: list[Example]
    scan: list[int]
    file: list[int]
    pixel_mm: list[float]
    unsampled: float = 0.0
    widest: Measurements | None = None

    def where(self, scans: Sequence[int]) -> list[Example]:
        """The examples of some scans."""
        return [e for e, k in zip(self.examples, self.scan, strict=True) if k in set(scans)]


class Described:
    """Stands in for a model that is yet to be trained: its unit and range.

    Args:
        info: what it will be.
        channels: of its images.
    """

    def __init__(self, info: PriorInfo, channels: int) -> None:
        known = isinstance(info, MeasuredInfo)
        self.info, self.channels = info if known else MeasuredInfo(**asdict(info)), channels

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Refused.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"{self.info.name!r} is yet to be trained: it denoises no {tuple(x.shape)} at {sigma.tolist()}"
        )


def files_of(paths: Sequence[Path]) -> list[Path]:
    """The measurement files among ``paths`` and below the folders among them, in order.

    Raises:
        ValueError: a path that is not there, or no file at all.
    """
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path} is not there; a measurement file or a folder of them is wanted")
        below = sorted(p for p in path.rglob("*") if p.suffix in HDF5) if path.is_dir() else [path]
        if not below:
            raise ValueError(f"{path} holds no measurement files (.h5)")
        found += below
    return found


def collect(
    paths: Sequence[Path], info: PriorInfo, channels: int, mri: MRIConfig | None, images: Path | None = None
) -> Collection:
    """Every slice of every scan of the files, in the model's units, rows of the operators scaled alike.

    Args:
        paths: files and folders.
        info: unit and range of the model.
        channels: of its images.
        mri: how complex images are made real.
        images: HDF5 file with the true ``images`` (n 1 h w) of all slices in order, in the operators' unit (1/mm for
            CT), for methods that are shown them.

    Raises:
        ValueError: files that cannot be read, scans of another unit, or without views to split, or not an image each.
    """
    examples, scans, files, pixels, made = list[Example](), [], [], [], dict[str, Any]()
    truths = None if images is None else _images(images)
    widest: tuple[int, Measurements | None] = 0, None
    number, sampled = 0, dict[tuple[int, ...], Tensor]()
    for file, path in enumerate(files_of(paths)):
        for index, scan in enumerate(read_measurements(path)):
            seen = as_seen_by(scan, ForwardModelDiffusion(), mri)
            for k in range(len(scan.y)):
                source = f"{path.name} scan {index} slice {k}"
                one, number_of = some_slices(seen, k), len(examples)
                if truths is not None and number_of >= len(truths):
                    raise ValueError(f"{images} holds {len(truths)} images, fewer than the slices; one each is wanted")
                truth = None if truths is None else truths[number_of][None]
                examples.append(_example(one, info, channels, mri, made, source, truth))
                widest = max(widest, (examples[-1].views, one), key=lambda pair: pair[0])
                scans.append(number)
                files.append(file)
                pixels.append(float(scan.spacing_mm[1]))
            number += 1
            mask = scan.fields.get("mask")
            if isinstance(mask, Tensor) and mask.shape[-2:] == scan.y.shape[-2:]:
                union = (mask != 0).flatten(0, -3).any(0) if mask.ndim > 2 else mask != 0
                sampled[tuple(union.shape)] = sampled.get(tuple(union.shape), torch.zeros_like(union)) | union
    if truths is not None and len(truths) != len(examples):
        raise ValueError(f"{images} holds {len(truths)} images of {len(examples)} slices; one each is wanted")
    first = sorted(examples, key=lambda e: e.density)[len(examples) // 2]
    if not hasattr(first.operator, "normal"):
        return Collection(examples, scans, files, pixels, 0.0, widest[1])
    like = torch.empty(first.operator.domain.shape, dtype=first.operator.domain.dtype)
    norm = power_norm(first.operator.normal, KeyedNoise()(0, like), NORM_ITERATIONS)
    unsampled = max((1 - float(union.double().mean()) for union in sampled.values()), default=0.0)
    return Collection(alike(examples, first.density / norm**2), scans, files, pixels, unsampled, widest[1])


def _example(
    scan: Measurements,
    info: PriorInfo,
    channels: int,
    mri: MRIConfig | None,
    made: dict[str, Any],
    source: str,
    truth: Tensor | None,
) -> Example:
    """One slice; ``made`` holds the operators so far, by their fields; ``truth``: its image (1 1 h w), if known."""
    plain = [(k, fingerprint(v) if isinstance(v, Tensor) else v) for k, v in sorted(scan.fields.items())]
    key = fingerprint(scan.kind, repr(plain))
    if key not in made:
        made[key] = built(scan.kind, scan.fields)
    operator, y, sigma = operator_of(scan, made[key])
    prior: Any = Described(info, channels)
    way = way_of(scan, operator, y, ForwardModelDiffusion(), mri, False)
    if way is not None:
        operator, prior = way.operator, way.wrap(prior)
    if operator.domain.shape[1] != channels:
        raise ValueError(
            f"{source} is of images of {operator.domain.shape[1]} channels; network.image_channels is {channels}"
        )
    _, affine, _ = prior_to_operator(prior, operator, scan.mu_water or MU_WATER)
    if not hasattr(operator, "adjoint"):
        return nonlinear_example_of(PriorUnits(operator, affine), y, sigma, source)
    offset = torch.full(operator.domain.shape, affine.offset, dtype=operator.domain.dtype)
    shifted = (y - operator.forward(offset)) / affine.scale if affine.offset else y / affine.scale
    found = example_of(operator, shifted, sigma / affine.scale, source)
    if truth is None:
        return found
    real = truth if way is None else way.operator.inner.adjoint(truth.to(way.operator.inner.range.dtype))
    return replace(found, truth=(real - affine.offset) / affine.scale)


def _images(path: Path) -> Tensor:
    """(n 1 h w).

    Raises:
        ValueError: no HDF5, or none with ``images`` of that form.
    """
    import h5py

    try:
        with h5py.File(existing_file(path), "r") as file:
            images = torch.from_numpy(file["images"][()])
    except (OSError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no HDF5 file with images: {error}") from error
    if images.ndim != 4 or images.shape[1] != 1:
        raise ValueError(f"the images of {path} are {tuple(images.shape)}; (n 1 h w) is wanted")
    return images


def held_out(count: int, share: float, seed: int) -> list[int]:
    """Numbers of the scans that only the validation sees: about ``share`` of ``count``, never all."""
    held = min(count - 1, max(1, round(share * count))) if share else 0
    return np.random.default_rng(seed).permutation(count)[:held].tolist()
