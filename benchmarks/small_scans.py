"""Small problems on real slices that no prior was trained on, for benchmarks that run many samplers on many of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from denoising import FINE_SIZE, QUANTILE, volumes
from torch import Tensor

from invdiff.datasets import Volume, read_volume
from invdiff.noise import KeyedNoise
from invdiff.operators import CartesianMRI, KnownPhase, Mask, ParallelBeam
from invdiff.pipelines.reconstruct import RunConfig, prior_of
from invdiff.problem import Prepared, prepare
from invdiff.units import MU_WATER

SIZE = 128  # pixels, both ways
PEAK = {"HU": 2000.0, "a.u.": 1.0}
VIEWS, ACCELERATION, CENTRE, KEPT = 20, 4, 0.08, 0.3
SEED = 77  # of the measurements' noise; the samplers have their own


class Scan(NamedTuple):
    """prepared: the problem; truth (s 1 h w) in the prior's unit."""

    prepared: Prepared
    truth: Tensor

    def psnr(self, x: Tensor) -> Tensor:
        """Of each slice (s) of an image in prior units, dB."""
        error = (self.prepared.to_physical(x) - self.truth).square().flatten(1).mean(1)
        return 10 * torch.log10(PEAK[self.prepared.unit] ** 2 / error)


class Bench:
    """The middle slice of every series of a CT folder and of every volume of an MR folder, at 128 x 128 pixels.

    ct: 20 parallel views over 180 degrees; mri: one coil, a quarter of the phase-encode lines, 8 % the centre, a smooth
    known phase; inpainting: 30 % of the pixels of the MR slices. Noise in percent: of the largest line integral, or of
    the 99.9 % quantile of the magnitude.
    """

    def __init__(self, ct: Path, mr: Path) -> None:
        self.ct = torch.stack([_fitted(read_volume(p)) for p in sorted(ct.iterdir()) if p.is_dir()])
        self.mr = torch.stack([_magnitude(read_volume(p)) for p in volumes(mr).values()])
        self.priors = {"ct": prior_of("ct", RunConfig())[0], "mr": prior_of("brain-mr", RunConfig())[0]}

    def scan(self, task: str, percent: float, seed: int = 0) -> Scan:
        """The problem of a task, ct, mri or inpainting, with so much noise."""
        generator = torch.Generator().manual_seed(3)
        if task == "ct":
            x = MU_WATER * (1 + self.ct / 1000).clamp_min(0)
            truth, prior = (x / MU_WATER - 1) * 1000, self.priors["ct"]
            angles = [math.pi * k / VIEWS for k in range(VIEWS)]
            operator: Any = ParallelBeam((len(x), 1, SIZE, SIZE), angles, pixel_mm=3.0)
        else:
            x = truth = self.mr
            prior = self.priors["mr"]
            operator = _kspace(len(x), generator) if task == "mri" else _pixels(len(x), generator)
        clean = operator.forward(x)
        sigma = percent / 100 * (float(clean.abs().max()) if task == "ct" else 1.0)
        n = KeyedNoise(SEED)(0, clean)
        y = clean + sigma * (n * 2**0.5 if n.is_complex() else n) * (operator.forward(torch.rand(x.shape)) != 0)
        return Scan(prepare(y, operator, prior, sigma, KeyedNoise(seed)), truth)


def _kspace(slices: int, generator: torch.Generator) -> Any:
    kept = torch.zeros(SIZE, dtype=torch.bool)
    centre = round(CENTRE * SIZE / 2)
    kept[SIZE // 2 - centre : SIZE // 2 + centre] = True
    others = torch.nonzero(~kept).flatten()
    more = SIZE // ACCELERATION - int(kept.sum())
    kept[others[torch.randperm(len(others), generator=generator)[:more]]] = True
    row, column = torch.meshgrid(torch.linspace(-1, 1, SIZE), torch.linspace(-1, 1, SIZE), indexing="ij")
    phase = KnownPhase(1.5 * row - 0.8 * column + 0.9 * row * column, slices=slices)
    return CartesianMRI(kept[:, None].expand(SIZE, SIZE), slices=slices) @ phase


def _pixels(slices: int, generator: torch.Generator) -> Any:
    return Mask(torch.rand(SIZE, SIZE, generator=generator) < KEPT, (slices, 1, SIZE, SIZE))


def _fitted(volume: Volume) -> Tensor:
    """The middle slice (1 h w), averaged to 128 x 128."""
    middle = volume.data[len(volume.data) // 2]
    return F.avg_pool2d(middle, FINE_SIZE // SIZE)


def _magnitude(volume: Volume) -> Tensor:
    """The middle slice (1 h w) in units of the volume's quantile, shrunk to fit and centred on zeros."""
    voxels = volume.data[volume.data > 0]
    middle = volume.data[len(volume.data) // 2] / torch.quantile(voxels[:: 1 + len(voxels) // 1_000_000], QUANTILE)
    h, w = middle.shape[1:]
    scale = SIZE / max(h, w)
    small = F.interpolate(middle[None], size=(round(h * scale), round(w * scale)), mode="area")[0]
    top, left = (SIZE - small.shape[1]) // 2, (SIZE - small.shape[2]) // 2
    return F.pad(small, (left, SIZE - left - small.shape[2], top, SIZE - top - small.shape[1]))
