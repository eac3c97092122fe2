"""Denoising PSNR of a CT prior beside tuned TV and wavelet denoisers, on slices it was not trained on.

python benchmarks/denoising.py --data FOLDER [--prior ct] [--card MODEL_CARD.md]

FOLDER holds DICOM series of CT, one a sub-folder. Slices of 512 x 512 are averaged 2 x 2. TV (Chambolle) and wavelet
(BayesShrink's soft threshold on db2, sigma scaled) have their one parameter tuned at every noise level on these very
slices, which favours them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from skimage.restoration import denoise_tv_chambolle, denoise_wavelet

from invdiff.datasets import block_mean, read_volume
from invdiff.noise import KeyedNoise
from invdiff.priors import load
from invdiff.priors.model import fast_dtype

FLOOR_HU = -1024.0
SIGMAS = (0.02, 0.05, 0.1, 0.2, 0.5)
PEAK = 2.0  # prior units, [-1, 1]
SLICES = 6  # of each series, evenly spread
TV_WEIGHTS = (0.3, 0.5, 0.7, 0.9, 1.2, 1.6)  # times sigma
WAVELET_SCALES = (0.5, 0.7, 0.85, 1.0, 1.3)  # times sigma
MARKS = ("<!-- denoising -->", "<!-- /denoising -->")

Denoiser = Callable[[NDArray[np.float32], float], NDArray[np.float32]]


def psnr(image: NDArray[np.float32], truth: NDArray[np.float32]) -> float:
    """Mean over slices, dB, peak 2."""
    error = np.mean((image - truth) ** 2, axis=(1, 2))
    return float(np.mean(10 * np.log10(PEAK**2 / error)))


def slices(folder: Path, low: float, high: float) -> dict[str, NDArray[np.float32]]:
    """Series name to slices (n h w) in prior units."""
    found = {}
    for series in sorted(p for p in folder.iterdir() if p.is_dir()):
        volume = read_volume(series)
        # Below air lies only padding outside the scanner's field of view, -3024 HU in some; training slices had it cut
        volume = block_mean(replace(volume, data=volume.data.clamp_min(FLOOR_HU)), 2)
        index = np.linspace(0, len(volume.data) - 1, SLICES).round().astype(int)
        found[series.name] = ((volume.data[index, 0].numpy() - (high + low) / 2) / ((high - low) / 2)).astype(
            np.float32
        )
    return found


def tuned(name: str, noisy: NDArray[np.float32], truth: NDArray[np.float32], sigma: float) -> float:
    """The best PSNR over the grid of the denoiser's parameter."""
    grid = TV_WEIGHTS if name == "TV" else WAVELET_SCALES

    def one(image: NDArray[np.float32], value: float) -> NDArray[np.float32]:
        if name == "TV":
            return denoise_tv_chambolle(image, weight=value * sigma, max_num_iter=100)
        return denoise_wavelet(image, sigma=value * sigma, wavelet="db2", rescale_sigma=True)

    return max(psnr(np.stack([one(image, value) for image in noisy]), truth) for value in grid)


def main() -> None:
    """Print the table, and put it into the model card if one is named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--prior", default="ct")
    parser.add_argument("--card", type=Path)
    options = parser.parse_args()
    prior = load(options.prior)
    info = prior.info
    prior = prior.to("cpu", fast_dtype("cpu"))
    sets = slices(options.data, info.low, info.high)
    lines = [
        "| sigma, prior units | HU | noisy | wavelet, tuned | TV, tuned | prior | prior over the best other |",
        "|---|---|---|---|---|---|---|",
    ]
    truth = np.concatenate(list(sets.values()))
    clean = torch.from_numpy(truth)[:, None]
    for sigma in SIGMAS:
        noisy = clean + sigma * KeyedNoise(7)(0, clean)
        with torch.no_grad():
            ours = torch.cat([prior.denoise(part, torch.tensor(sigma)) for part in noisy.split(6)])[:, 0].numpy()
        array = noisy[:, 0].numpy()
        wavelet, tv = (tuned(name, array, truth, sigma) for name in ("wavelet", "TV"))
        mine = psnr(ours, truth)
        lines.append(
            f"| {sigma} | {sigma * (info.high - info.low) / 2:.0f} | {psnr(array, truth):.2f} "
            f"| {wavelet:.2f} | {tv:.2f} | {mine:.2f} | {mine - max(wavelet, tv):+.2f} |"
        )
    lines.append(
        f"\n{len(truth)} slices of {len(sets)} series ({', '.join(sets)}), 256 x 256; PSNR in dB, peak 2 prior units."
    )
    text = "\n".join(lines)
    print(text)
    if options.card:
        card = options.card.read_text()
        before, after = card.split(MARKS[0])[0], card.split(MARKS[1])[1]
        options.card.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}")


if __name__ == "__main__":
    main()
