"""Does a prior denoise as well at other image sizes as at the one it was trained at?

python benchmarks/sizes.py --data FOLDER [--prior ct]

Slices below FOLDER as in benchmarks/denoising.py, but those of 512 x 512 shrunk to 384 x 384. The PSNR is that of the
central 128 x 128 pixels, the same in every column: cut out, or with more and more of their surroundings, beyond the
slice of the prior's lowest value (air, no signal). With the same pixels judged, columns differ by nothing but the size
of the image.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from denoising import PEAK, SIGMAS, slices, volumes
from torch import Tensor

from invdiff.noise import KeyedNoise
from invdiff.priors import load
from invdiff.priors.model import fast_dtype

WINDOWS = ((128, 128), (192, 192), (256, 256), (384, 384), (512, 512), (192, 256), (333, 210))
TRAINED = (256, 256)
CENTRE = (128, 128)
LARGEST = 512
GRID = 384
PER_VOLUME = 3


def centre(x: Tensor, size: tuple[int, int]) -> Tensor:
    """The middle of the last two axes."""
    top, left = ((n - m) // 2 for n, m in zip(x.shape[-2:], size, strict=True))
    return x[..., top : top + size[0], left : left + size[1]]


def surrounded(x: Tensor) -> Tensor:
    """(1 1 512 512): the slice in the middle of the prior's lowest value, or its middle if it is larger."""
    h, w = x.shape[-2:]
    top, left = max(0, LARGEST - h), max(0, LARGEST - w)
    padded = F.pad(x, (left // 2, left - left // 2, top // 2, top - top // 2), value=-1.0)
    return centre(padded, (LARGEST, LARGEST))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--prior", default="ct")
    options = parser.parse_args()
    info = load(options.prior).info
    prior = load(options.prior).to("cpu", fast_dtype("cpu"))
    found = [a for p in volumes(options.data).values() for a in slices(p, info, GRID)[::PER_VOLUME]]
    images = [surrounded(torch.from_numpy(a)[None, None]) for a in found if min(a.shape) >= min(CENTRE)]
    print("| sigma | " + " | ".join(f"{h} x {w}" for h, w in WINDOWS) + " | most from 256 x 256, dB |")
    print("|---" * (len(WINDOWS) + 2) + "|")
    for sigma in SIGMAS:
        row = {}
        for window in WINDOWS:
            scores = []
            for number, clean in enumerate(images):
                seen = centre(clean, window)
                noisy = centre(clean + sigma * KeyedNoise(7, first=number)(0, clean), window)
                with torch.no_grad():
                    out = prior.denoise(noisy, torch.tensor(sigma))
                error = (centre(out, CENTRE) - centre(seen, CENTRE)).square().mean()
                scores.append(10 * np.log10(PEAK**2 / float(error)))
            row[window] = float(np.mean(scores))
        most = max(abs(v - row[TRAINED]) for v in row.values())
        print(f"| {sigma} | " + " | ".join(f"{v:.2f}" for v in row.values()) + f" | {most:.2f} |", flush=True)
    print(f"\n{options.prior}: {len(images)} slices; PSNR of the central 128 x 128 pixels in dB, peak 2 prior units.")


if __name__ == "__main__":
    main()
