"""Denoising PSNR of priors beside tuned wavelet, TV and non-local-means denoisers, on slices they were not trained on.

python benchmarks/denoising.py --data FOLDER [--prior ct] [--contrasts NAME=PATTERN ...] [--card MODEL_CARD.md]

Below FOLDER lie NIfTI files and folders of DICOM. Each contrast is the volumes whose path below FOLDER matches its
pattern (fnmatch), all of them one contrast by default. CT of 512 x 512 is averaged 2 x 2, MR is scaled so that the
99.9 % quantile of a volume's non-zero voxels is 1. TV (Chambolle), wavelet (BayesShrink's soft threshold on db2, sigma
scaled) and non-local means have their one parameter tuned at every noise level on these very slices, which favours
them.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from skimage.restoration import denoise_nl_means, denoise_tv_chambolle, denoise_wavelet

from invdiff.datasets import Volume, block_mean, find_volumes, read_volume
from invdiff.noise import KeyedNoise
from invdiff.priors import PriorInfo, load
from invdiff.priors.model import fast_dtype

FLOOR_HU = -1024.0
QUANTILE = 0.999  # of an MR volume's non-zero voxels, which is 1 in the prior's unit
FINE_SIZE = 512  # pixels; slices of this size are averaged 2 x 2
SIGMAS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
PEAK = 2.0  # prior units, [-1, 1]
SLICES = 6  # of each volume, evenly spread over the middle
MIDDLE = (0.2, 0.8)  # share of the volume that they come from
GRIDS = {  # of each denoiser's parameter, times sigma
    "wavelet": (0.5, 0.7, 0.85, 1.0, 1.3),
    "TV": (0.3, 0.5, 0.7, 0.9, 1.2, 1.6),
    "NLM": (0.4, 0.6, 0.8, 1.0),
}
MARKS = ("<!-- denoising -->", "<!-- /denoising -->")

Images = list[NDArray[np.float32]]


def psnr(images: Images, truth: Images) -> float:
    """Mean over slices, dB, peak 2."""
    errors = [np.mean((a - b) ** 2) for a, b in zip(images, truth, strict=True)]
    return float(np.mean([10 * np.log10(PEAK**2 / e) for e in errors]))


def volumes(folder: Path) -> dict[str, Path]:
    """Path below the folder to every NIfTI file and every folder of DICOM."""
    return {str(p.relative_to(folder)): p for p in find_volumes(folder)}


def in_unit(volume: Volume, info: PriorInfo, size: int = 0) -> Volume:
    """HU floored at air's padding, MR by its quantile; large slices averaged 2 x 2, or of ``size`` pixels if not 0."""
    data = volume.data.clamp_min(FLOOR_HU) if info.unit == "HU" else volume.data
    if info.unit != "HU":
        data = data / float(np.quantile(data[data != 0].numpy(), QUANTILE))
    volume = replace(volume, data=data)
    if data.shape[-1] < FINE_SIZE:
        return volume
    if not size:
        return block_mean(volume, 2)
    return replace(volume, data=F.interpolate(data, (size, size), mode="bilinear", antialias=True))


def slices(path: Path, info: PriorInfo, size: int = 0) -> Images:
    """Evenly spread slices in prior units; see ``in_unit``."""
    volume = in_unit(read_volume(path), info, size)
    count = len(volume.data)
    index = np.linspace(MIDDLE[0] * (count - 1), MIDDLE[1] * (count - 1), SLICES).round().astype(int)
    return list(info.in_prior_units(volume.data[index, 0]).numpy())


def classical(name: str) -> Callable[[NDArray[np.float32], float, float], NDArray[np.float32]]:
    """A denoiser of (image, its parameter, sigma)."""
    if name == "TV":
        return lambda image, weight, _: denoise_tv_chambolle(image, weight=weight, max_num_iter=100)
    if name == "wavelet":
        return lambda image, level, _: denoise_wavelet(image, sigma=level, wavelet="db2", rescale_sigma=True)
    return lambda image, h, sigma: denoise_nl_means(
        image, patch_size=5, patch_distance=6, h=h, sigma=sigma, fast_mode=True
    )


def tuned(name: str, noisy: Images, truth: Images, sigma: float) -> float:
    """The best PSNR over the grid of the denoiser's parameter."""
    denoise = classical(name)
    return max(psnr([denoise(image, value * sigma, sigma) for image in noisy], truth) for value in GRIDS[name])


def table(prior_name: str, sets: dict[str, Images]) -> str:
    """Markdown: a row a contrast and noise level."""
    prior = load(prior_name).to("cpu", fast_dtype("cpu"))
    lines = [
        "| contrast | sigma, prior units | noisy | "
        + " | ".join(f"{n}, tuned" for n in GRIDS)
        + " | prior | over the best other |",
        "|---" * (5 + len(GRIDS)) + "|",
    ]
    for contrast, truth in sets.items():
        for sigma in SIGMAS:
            noisy = []
            for number, image in enumerate(truth):
                clean = torch.from_numpy(image)[None, None]
                noisy.append((clean + sigma * KeyedNoise(7, first=number)(0, clean))[0, 0].numpy())
            with torch.no_grad():
                ours = [
                    prior.denoise(torch.from_numpy(a)[None, None], torch.tensor(sigma))[0, 0].numpy() for a in noisy
                ]
            others = [tuned(name, noisy, truth, sigma) for name in GRIDS]
            mine = psnr(ours, truth)
            cells = [psnr(noisy, truth), *others, mine]
            shown = " | ".join(f"{v:.2f}" for v in cells)
            lines.append(f"| {contrast} | {sigma} | {shown} | {mine - max(others):+.2f} |")
            print(lines[-1], flush=True)
    return "\n".join(lines)


def main() -> None:
    """Print the table, and put it into the model card if one is named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--prior", default="ct")
    parser.add_argument("--contrasts", nargs="+", default=["all=*"], help="NAME=PATTERN")
    parser.add_argument("--card", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning, module="skimage")
    info, known = load(options.prior).info, volumes(options.data)
    sets: dict[str, Images] = {}
    notes = []
    for contrast in options.contrasts:
        name, _, pattern = contrast.partition("=")
        paths = [path for key, path in known.items() if fnmatch(key, pattern)]
        if not paths:
            parser.error(f"no volume below {options.data} matches {pattern!r}; there are: {', '.join(known)}")
        sets[name] = [image for path in paths for image in slices(path, info)]
        sizes = sorted({f"{a.shape[0]} x {a.shape[1]}" for a in sets[name]})
        notes.append(
            f"{name}: {len(sets[name])} slices of {', '.join(sizes)} pixels ({', '.join(p.name for p in paths)})"
        )
    text = f"{table(options.prior, sets)}\n\nPSNR in dB, peak 2 prior units. {'; '.join(notes)}."
    print(text)
    if options.card:
        card = options.card.read_text()
        before, after = card.split(MARKS[0])[0], card.split(MARKS[1])[1]
        options.card.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}")


if __name__ == "__main__":
    main()
