"""Measurements of real slices whose images are then hidden, and of made-up scenes, for ``measured.py``.

CT: slices averaged to 128 x 128 are projected, two rays to a detector pixel, and described for 64 x 64; photon noise.
MR: slices averaged to 64 x 64, a smooth phase of each, coils round it, white noise. Scenes: boxes of 32 voxels a side
are seen by cameras, and described for 16.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from invdiff.datasets import Measurements, read_volume, write_measurements
from invdiff.files import whole_file
from invdiff.noise import KeyedNoise
from invdiff.operators import CartesianMRI, ParallelBeam, TransmissionPoisson, VolumeRenderer
from invdiff.operators.mri.masks import random_mask
from invdiff.operators.mri.simulate import birdcage_maps, simulate_kspace, smooth_phase
from invdiff.units import MU_WATER, mu_from_hu

SIZE, FINE, READ = 64, 128, 256  # pixels of what is reconstructed, projected and stored
VIEWS = 180  # angles that a CT scan's views are drawn from, over half a turn
FEWEST, MOST = 30, 60  # views of a scan
PHOTONS = 2e4
COILS, ACCELERATION, CENTRE, SIGMA = 8, 4.0, 0.08, 0.02
MR_ONE = 4000.0  # stored value of 1 a.u.
MR_SCANS = 800
AIR_HU = -1000.0
SCENE, SCENE_FINE, CAMERAS, PICTURE = 16, 32, 6, 16
SCENE_SIGMA = 0.02
SCENES = 3000
SEEDS = {"ct": 1_000_000, "mr": 2_000_000, "scenes": 3_000_000}  # of what is trained on; ``measured.py`` has others


class Slices(NamedTuple):
    """fine: (n 1 h w), HU of 128 x 128 or a.u. of 64 x 64; pixel_mm: of 64 x 64 pixels (n)."""

    fine: Tensor
    pixel_mm: Tensor

    @property
    def truth(self) -> Tensor:
        """(n 1 64 64)."""
        return F.avg_pool2d(self.fine, self.fine.shape[-1] // SIZE)


def train_slices(folder: Path, pattern: str, most: int | None = None) -> Slices:
    """Slices of HDF5 files, all or ``most`` evenly spread."""
    import h5py

    images, pixels = [], []
    for path in sorted(folder.glob(pattern)):
        with h5py.File(path) as f:
            images.append(f["slices"][()])
            pixels.append(f["pixel_mm"][()])
    whole, pixel = np.concatenate(images), np.concatenate(pixels)
    index = np.arange(len(whole)) if most is None else np.linspace(0, len(whole) - 1, most).round().astype(int)
    x = torch.from_numpy(whole[index].astype(np.float32))[:, None]
    ct = whole.dtype == np.int16
    x = F.avg_pool2d(x.clamp_min(AIR_HU), READ // FINE) if ct else F.avg_pool2d(x / MR_ONE, READ // SIZE)
    return Slices(x, torch.from_numpy(pixel[index].astype(np.float64)) * READ / SIZE)


def judged_ct(folder: Path, each: int = 8) -> Slices:
    """``each`` slices of every series of 512 x 512 DICOM images below ``folder``, from their middle 60 %."""
    images, pixels = [], []
    for path in sorted(p for p in folder.iterdir() if p.is_dir()):
        volume = read_volume(path)
        n = len(volume.data)
        index = np.linspace(0.2 * n, 0.8 * n - 1, each).round().astype(int)
        x = volume.data[index].float().clamp_min(AIR_HU)
        images.append(F.avg_pool2d(x, x.shape[-1] // FINE))
        pixels += [volume.spacing_mm[1] * x.shape[-1] / SIZE] * each
    return Slices(torch.cat(images), torch.tensor(pixels, dtype=torch.float64))


def judged_mr(folder: Path, each: int = 6) -> Slices:
    """``each`` axial slices of every NIfTI volume below ``folder``, its 99.9 % quantile at 1, fitted to 64 x 64."""
    images = []
    for path in sorted(folder.rglob("*.nii.gz")):
        volume = read_volume(path)
        if volume.data.shape[0] < 20 or min(volume.data.shape[2:]) < SIZE:
            continue
        voxels = volume.data[volume.data > 0].float()
        one = float(np.quantile(voxels[:: 1 + len(voxels) // 500_000].numpy(), 0.999))
        n = len(volume.data)
        index = np.linspace(0.45 * n, 0.75 * n - 1, each).round().astype(int)
        x = volume.data[index].float() / one
        scale = SIZE / max(x.shape[2:])
        x = F.interpolate(x, size=[round(v * scale) for v in x.shape[2:]], mode="area")
        top, left = ((SIZE - v) // 2 for v in x.shape[2:])
        images.append(F.pad(x, (left, SIZE - left - x.shape[3], top, SIZE - top - x.shape[2])))
    x = torch.cat(images)
    return Slices(x, torch.full((len(x),), 3.6, dtype=torch.float64))


def drawn_views(count: int, seed: int) -> list[list[int]]:
    """For each scan 30 to 60 of the 180 angles at random."""
    random = np.random.default_rng(seed)
    return [sorted(random.permutation(VIEWS)[: random.integers(FEWEST, MOST + 1)].tolist()) for _ in range(count)]


def spread_views(count: int, views: int) -> list[list[int]]:
    """For each scan the same evenly spaced angles."""
    return [[round(VIEWS * k / views) for k in range(views)]] * count


def ct_scans(slices: Slices, views: Sequence[Sequence[int]], seed: int) -> Iterator[Measurements]:
    """A scan of each slice with its own views, noise and pixel size."""
    angles = [math.pi * k / VIEWS for k in range(VIEWS)]
    detectors = 2 * ParallelBeam((1, 1, SIZE, SIZE), [0.0]).detectors
    project = ParallelBeam((1, 1, FINE, FINE), angles, detectors)  # 1 mm pixels and detector elements
    noise = TransmissionPoisson(PHOTONS)
    for k, (image, pixel, chosen) in enumerate(zip(slices.fine, slices.pixel_mm.tolist(), views, strict=True)):
        clean = pixel * SIZE / FINE * project(mu_from_hu(image[None], MU_WATER))[:, :, list(chosen)]
        y, sqrt_w = noise.sample(clean.unflatten(-1, (detectors // 2, 2)).mean(-1), KeyedNoise(seed + k))
        some = [angles[v] for v in chosen]
        model = ParallelBeam((1, 1, SIZE, SIZE), some, detectors // 2, pixel, pixel, memory_mb=1e-6)
        affine = np.diag([pixel, pixel, 1.0, 1.0])
        yield Measurements(y, "parallel", model.fields(), affine, "1/mm", None, sqrt_w, MU_WATER, True)


def mr_images(slices: Slices, seed: int) -> Tensor:
    """Complex images (n 1 h w): magnitudes with a smooth phase each."""
    phases = torch.stack([smooth_phase((SIZE, SIZE), seed + k) for k in range(len(slices.fine))])
    return torch.polar(slices.truth, phases[:, None])


def mr_scans(slices: Slices, seed: int) -> Iterator[Measurements]:
    """A scan of each slice with its own mask of a quarter of the lines, phase and noise; eight coils."""
    maps = birdcage_maps(COILS, (SIZE, SIZE))
    for k, image in enumerate(mr_images(slices, seed)):
        model = CartesianMRI(random_mask((SIZE, SIZE), ACCELERATION, CENTRE, seed + k), maps, 1)
        y = simulate_kspace(image[None].abs(), model, image.angle(), SIGMA, KeyedNoise(seed + k))
        pixel = float(slices.pixel_mm[k])
        affine = np.diag([pixel, pixel, 1.0, 1.0])
        yield Measurements(y, "cartesian-mri", model.fields(), affine, "a.u.", SIGMA, None, None, True)


PALETTE = torch.tensor([[0.9, 0.15, 0.1], [0.1, 0.55, 0.15], [0.1, 0.2, 0.9], [0.95, 0.75, 0.1]])
PILLAR = torch.tensor([0.35, 0.35, 0.4])


def scenes(count: int, seed: int, size: int = SCENE_FINE) -> tuple[Tensor, Tensor]:
    """Density (n d h w) per half edge and colour (n 3 d h w): a grey pillar and two balls beside it.

    The balls, of different colours, stand at random turns about the pillar, which often hides one of them.
    """
    random = torch.Generator().manual_seed(seed)
    axis = (2 * torch.arange(size) + 1 - size) / size
    d, h, w = torch.meshgrid(axis, axis, axis, indexing="ij")
    density, colour = torch.zeros(count, size, size, size), torch.ones(count, 3, size, size, size)
    for k in range(count):
        turn, heights = 2 * math.pi * torch.rand((), generator=random), torch.rand(3, generator=random)
        half = 0.2 + 0.12 * heights[2]
        pillar = (d.abs() < half) & (w.abs() < half) & (h > -0.7)
        density[k][pillar], colour[k][:, pillar] = 20.0, PILLAR[:, None]
        tints = torch.randperm(len(PALETTE), generator=random)
        gap = math.pi * (0.5 + torch.rand((), generator=random))
        for n in range(2):
            t = turn + n * gap
            middle = (0.62 * t.cos(), 0.55 - 0.9 * heights[n], 0.62 * t.sin())
            ball = (d - middle[0]) ** 2 + (h - middle[1]) ** 2 + (w - middle[2]) ** 2 < 0.3**2
            density[k][ball], colour[k][:, ball] = 20.0, PALETTE[tints[n]][:, None]
    return density, colour


def scene_scans(count: int, seed: int, cameras: int = CAMERAS) -> Iterator[Measurements]:
    """Pictures of each scene from cameras at random turns, with white noise."""
    random = np.random.default_rng(seed)
    picture = {"size": (PICTURE, PICTURE), "field": 1.2}
    for k in range(count):
        density, colour = scenes(1, seed + k)
        turns = torch.from_numpy(2 * np.pi * random.random((1, cameras)))
        fine = VolumeRenderer((1, 4 * SCENE_FINE, SCENE_FINE, SCENE_FINE), turns, samples=64, **picture)
        model = VolumeRenderer((1, 4 * SCENE, SCENE, SCENE), turns, **picture)
        y = fine(fine.image_of(density, colour))
        y = y + SCENE_SIGMA * KeyedNoise(seed + k)(0, y)
        yield Measurements(y, model.kind, model.fields(), np.eye(4), "a.u.", SCENE_SIGMA, None, None, True)


def write_all(data: Path, out: Path) -> None:
    """``NAME.h5``, measurements alone, and ``NAME-images.h5``, the images (n c h w) that they hide: CT, MR, scenes.

    What stands already is left as it is.
    """
    import h5py

    out.mkdir(parents=True, exist_ok=True)
    for name, pattern, most in (("ct", "ct_*.h5", None), ("mr", "mr_*.h5", MR_SCANS)):
        slices = train_slices(data / "train", pattern, most)
        images = mu_from_hu(slices.truth, MU_WATER) if name == "ct" else mr_images(slices, SEEDS[name])
        if not (out / f"{name}-images.h5").exists():
            with whole_file(out / f"{name}-images.h5") as part, h5py.File(part, "w") as f:
                f["images"] = images.numpy()
        if not (out / f"{name}.h5").exists():
            seed = SEEDS[name]
            scans = ct_scans(slices, drawn_views(len(images), seed), seed) if name == "ct" else mr_scans(slices, seed)
            write_measurements(out / f"{name}.h5", list(scans))
            print(out / f"{name}.h5", len(images), "scans", flush=True)
    if not (out / "scenes.h5").exists():
        write_measurements(out / "scenes.h5", list(scene_scans(SCENES, SEEDS["scenes"])))


def main() -> None:
    """Simulate from the slices of ``--data`` into ``--out``."""
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--data", type=Path, required=True, help="folder with train/ and val/")
    words.add_argument("--out", type=Path, required=True, help="folder of the measurements")
    args = words.parse_args()
    torch.set_num_threads(1)
    write_all(args.data, args.out)


if __name__ == "__main__":
    main()
