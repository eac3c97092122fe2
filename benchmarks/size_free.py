"""Do whole slices, patches, or patches with position and pixel size make the better size-free prior?

python benchmarks/size_free.py --train FOLDER --val FOLDER --out RESULTS [--images 24000]

Three small networks of one size see the same number of pixels of the same CT slices: whole 256 x 256 slices; patches of
96 to 256 pixels; the same patches with three more input channels that hold the patch's row and column in the slice,
from -1 to 1, and the logarithm of the pixel size. Each is then judged on scans that it was not trained on, at several
sizes of the image around the same central 128 x 128 pixels and at several pixel sizes. Trains what is missing in
RESULTS, about twenty minutes each on one core, then prints the table.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from invdiff.datasets import read_volume
from invdiff.files import whole_file
from invdiff.noise import KeyedNoise
from invdiff.priors import PriorInfo
from invdiff.priors.edm import draw_sigma, edm_denoise, edm_loss
from invdiff.priors.model import fast_dtype
from invdiff.priors.network import UNet, UNetConfig
from invdiff.priors.slices import Slices, read_slices
from invdiff.priors.training import TrainingConfig, learning_rate

SIZES = UNetConfig(channels=(32, 64, 96), blocks=(1, 1, 1))
INFO = PriorInfo("size-free", "HU", -1000.0, 2000.0, 0.002, 100.0, 0.5, (1.03, 2.73))
PATCHES = TrainingConfig(warmup=1000, ema=2000)
WHOLE = replace(PATCHES, crops=(256,), batches=(2,), shares=(1.0,))
SIGMAS = (0.05, 0.2, 0.5, 2.0)
CENTRE = 128  # pixels, the region that is judged
GRIDS = (256, 384)  # pixels across the field of view of a validation scan
WINDOWS = (128, 192, 256, 384)  # pixels denoised at once
PER_SERIES = 4
AIR = -1000.0


@dataclass(frozen=True)
class Variant:
    """What a network is trained on, and whether it is told where and how large its pixels are."""

    config: TrainingConfig
    told: bool


VARIANTS = {"whole slices": Variant(WHOLE, False), "patches": Variant(PATCHES, False),
            "patches, position and pixel size": Variant(PATCHES, True)}  # fmt: skip


class Told(nn.Module):
    """A U-Net whose three last input channels are given, not denoised."""

    def __init__(self, told: bool) -> None:
        super().__init__()
        self.unet = UNet(replace(SIZES, image_channels=4 if told else 1))
        self.where: Tensor | None = None

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        if self.where is None:
            return self.unet(x, label)
        return self.unet(torch.cat([x, self.where], 1), label)[:, :1]


def where(height: int, width: int, pixel_mm: float) -> Tensor:
    """Row and column in [-1, 1] and ln(pixel in mm), (3 h w)."""
    row, column = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    return torch.stack([row, column, torch.full((height, width), float(np.log(pixel_mm)))])


def draw(slices: Slices, config: TrainingConfig, step: int) -> tuple[Tensor, Tensor]:
    """Clean crops in prior units and what they are told, both (s c h w): flips, rotations and crops act on both."""
    from monai.transforms import Compose, RandAffine, RandFlip, RandSpatialCrop

    rng = np.random.default_rng((config.seed, step))
    kind = int(rng.choice(len(config.crops), p=config.shares))
    size = config.crops[kind]
    transform = Compose(
        [
            RandFlip(0.5, spatial_axis=1),
            RandAffine(config.warp, rotate_range=config.rotate, scale_range=config.scale, padding_mode="border"),
            RandSpatialCrop((size, size), random_size=False),
        ]
    )
    transform.set_random_state(int(rng.integers(2**31)))
    subjects = slices.members[0]
    crops = []
    for _ in range(config.batches[kind]):
        index = int(rng.choice(subjects[rng.integers(len(subjects))]))
        image = torch.from_numpy(slices.images[index].astype(np.float32))[None]
        told = where(*image.shape[1:], float(slices.pixel_mm[index]))
        crops.append(torch.as_tensor(np.asarray(transform(torch.cat([image, told]).numpy()))))
    both = torch.stack(crops)
    return (both[:, :1] - (INFO.high + INFO.low) / 2) / ((INFO.high - INFO.low) / 2), both[:, 1:]


def train(variant: Variant, slices: Slices, images: int) -> nn.Module:
    """The moving average of the weights after as many pixels as ``images`` patches of 96 x 96."""
    config = replace(variant.config, images=images)
    torch.manual_seed(0)
    network = Told(variant.told).train()
    average = copy.deepcopy(network).requires_grad_(False)
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.rate, betas=(0.9, 0.99), weight_decay=1e-2)
    seen, step = 0.0, 0
    while seen < images:
        clean, told = draw(slices, config, step)
        g = torch.Generator().manual_seed(step)
        u, n = torch.rand(len(clean), generator=g), torch.randn(len(clean), generator=g)
        sigma = draw_sigma(u, n, -1.4, 1.4, INFO.sigma_min, INFO.sigma_max, 0.1)
        noisy = clean + sigma[:, None, None, None] * torch.randn(clean.shape, generator=g)
        optimizer.param_groups[0]["lr"] = learning_rate(config, int(seen))
        network.where = told if variant.told else None
        with torch.autocast("cpu", dtype=fast_dtype("cpu") or torch.float32, enabled=fast_dtype("cpu") is not None):
            denoised = edm_denoise(network, noisy, sigma, INFO.sigma_data)
        loss = edm_loss(denoised, clean, sigma, INFO.sigma_data).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), config.clip)
        optimizer.step()
        worth = clean.numel() / 96**2
        seen, step = seen + worth, step + 1
        keep = min(0.5 ** (worth / config.ema), (1 + step) / (10 + step))
        with torch.no_grad():
            for a, b in zip(average.parameters(), network.parameters(), strict=True):
                a.lerp_(b, 1 - keep)
        if step % 100 == 0:
            print(f"  {seen:.0f} of {images}: loss {float(loss):.3f}", flush=True)
    return average.eval()


def scans(folder: Path) -> Iterator[tuple[int, Tensor, float]]:
    """(pixels across, slices (n 1 grid grid) in prior units, pixel in mm) of every series at every grid."""
    for series in sorted(p for p in folder.iterdir() if p.is_dir()):
        volume = read_volume(series)
        index = np.linspace(0, len(volume.data) - 1, PER_SERIES).round().astype(int)
        data = (volume.data[index].clamp_min(AIR) - (INFO.high + INFO.low) / 2) / ((INFO.high - INFO.low) / 2)
        for grid in GRIDS:
            shrunk = F.interpolate(data, (grid, grid), mode="bilinear", antialias=True)
            yield grid, shrunk, volume.spacing_mm[1] * data.shape[-1] / grid


def centre(x: Tensor, size: int) -> Tensor:
    """The middle ``size`` x ``size`` pixels."""
    h, w = ((n - size) // 2 for n in x.shape[-2:])
    return x[..., h : h + size, w : w + size]


@torch.no_grad()
def judge(network: nn.Module, told: bool, folder: Path) -> dict[str, dict[str, float]]:
    """PSNR (dB, peak 2) of the central pixels: "grid/window" to sigma to the mean over slices."""
    found: dict[str, dict[str, list[float]]] = {}
    for grid, clean, pixel_mm in scans(folder):
        noise = KeyedNoise(7)(0, clean)
        for window in (w for w in WINDOWS if w <= grid):
            for sigma in SIGMAS:
                noisy = centre(clean + sigma * noise, window)
                network.where = (
                    centre(where(grid, grid, pixel_mm), window).expand(len(noisy), -1, -1, -1) if told else None
                )
                out = edm_denoise(network, noisy, torch.tensor(sigma), INFO.sigma_data)
                error = (centre(out, CENTRE) - centre(clean, CENTRE)).square().mean(dim=(1, 2, 3))
                found.setdefault(f"{grid}/{window}", {}).setdefault(str(sigma), []).extend(
                    (10 * (4 / error).log10()).tolist()
                )
    return {key: {s: float(np.mean(v)) for s, v in row.items()} for key, row in found.items()}


def main() -> None:
    """Train what is missing, judge it, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--val", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=24_000, help="patches of 96 x 96 pixels, or as many pixels")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    slices = read_slices(sorted(options.train.glob("ct_*.h5")))
    rows = {}
    for name, variant in VARIANTS.items():
        path = options.out / f"{name.replace(' ', '_').replace(',', '')}.json"
        if not path.exists():
            print(name, flush=True)
            began = time.perf_counter()
            network = train(variant, slices, options.images)
            seconds = time.perf_counter() - began
            with whole_file(path) as part:
                part.write_text(json.dumps({"seconds": seconds, "psnr": judge(network, variant.told, options.val)}))
        rows[name] = json.loads(path.read_text())
    keys = list(next(iter(rows.values()))["psnr"])
    print("| pixels across the scan / denoised at once | sigma | " + " | ".join(rows) + " |")
    print("|---" * (2 + len(rows)) + "|")
    for key in keys:
        for sigma in SIGMAS:
            print(
                f"| {key} | {sigma} | " + " | ".join(f"{r['psnr'][key][str(sigma)]:.2f}" for r in rows.values()) + " |"
            )
    print("\nseconds of training: " + ", ".join(f"{name} {r['seconds']:.0f}" for name, r in rows.items()))


if __name__ == "__main__":
    main()
