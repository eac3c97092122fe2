"""Pictures of samples from models that saw measurements alone: CT from 6 views, scenes from one picture.

python benchmarks/measured_pictures.py --data FOLDER --out RESULTS --docs docs          of what measured.py left there
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import matplotlib
import measured as bench
import measured_data as source
import torch
from torch import Tensor

from invdiff.operators import VolumeRenderer
from invdiff.priors import NoPrior, load
from invdiff.reconstruction import reconstruct
from invdiff.samplers import FBP, ForwardModelDiffusion

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SHOWN = 4  # samples
AROUND, WIDE = 6, 32  # cameras that look at a sample, pixels of their pictures
SCENES = (9_000_001, 9_000_030, 9_000_041)  # seeds of what no model saw
CT_SLICES = (1, 5, 9)
WINDOW = (-1000.0, 500.0)  # HU


def grid(rows: list[list[Tensor | None]], heads: list[str], path: Path, **how: Any) -> None:
    """Rows of images (h w) or (3 h w) as one picture; None leaves a gap."""
    n, m = len(rows), len(heads)
    figure, axes = plt.subplots(n, m, figsize=(1.1 * m, 1.1 * n + 0.25), squeeze=False)
    for line, images in zip(axes, rows, strict=True):
        for axis, image in zip(line, images, strict=True):
            axis.axis("off")
            if image is not None:
                shown = image if image.ndim == 2 else image.movedim(0, -1).clamp(0, 1)
                axis.imshow(shown.detach().numpy(), interpolation="nearest", **how)
    for axis, head in zip(axes[0], heads, strict=True):
        axis.set_title(head, fontsize=7)
    figure.subplots_adjust(0.01, 0.01, 0.99, 1 - 0.25 / (1.1 * n + 0.25), 0.03, 0.03)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def scene_samples(model: Any, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """What is given (3 h w), and from all sides the truth (v 3 h w) and samples (k v 3 h w)."""
    scan = next(iter(source.scene_scans(1, seed, 1)))
    turn = float(scan.fields["azimuth"][0, 0])
    fields = {**scan.fields, "shape": (SHOWN, *tuple(scan.fields["shape"])[1:]), "azimuth": [turn]}
    sampler = ForwardModelDiffusion(steps=30, target="unmeasured", views=3, sigma_min=0.01)
    y = scan.y.repeat(SHOWN, 1, 1, 1, 1)
    x = reconstruct(y, VolumeRenderer(**fields), model, sampler, source.SCENE_SIGMA, seed=3).x
    around = {**fields, "azimuth": [turn + 2 * math.pi * k / AROUND for k in range(AROUND)], "size": (WIDE, WIDE)}
    fine = {**around, "shape": (1, 4 * source.SCENE_FINE, source.SCENE_FINE, source.SCENE_FINE), "samples": 64}
    world = VolumeRenderer(**fine)
    return scan.y[0, 0], world(world.image_of(*source.scenes(1, seed)))[0], VolumeRenderer(**around)(x)


def scenes(out: Path, docs: Path) -> None:
    """The given picture, then the truth and samples from six sides, the first that of the given one."""
    model, rows = load(out / "runs" / "scenes-forward-model" / "model"), []
    for seed in SCENES:
        given, truth, samples = scene_samples(model, seed)
        rows.append([given, *truth])
        rows += [[None, *one] for one in samples]
    heads = ["given", *(f"{360 * k // AROUND}°" for k in range(AROUND))]
    grid(rows, heads, docs / "samples-scenes.png")


def ct(data: Path, out: Path, docs: Path) -> None:
    """Truth, FBP, the samples' mean and spread, and samples, from 6 views."""
    model = load(out / "runs" / "ct-forward-model" / "model")
    slices = bench.judged("ct", data)
    scans, rows = bench.scans_of("ct", slices, "6 views"), []
    for k in CT_SLICES:
        x = bench.samples_of(scans[k], model)[:, 0]
        start = bench.point(scans[k], NoPrior("HU", -1000.0, 1000.0), FBP())[0, 0]
        spread = x.std(0) / 300 * (WINDOW[1] - WINDOW[0]) + WINDOW[0]  # 300 HU is white
        rows.append([slices.truth[k, 0], start, x.mean(0), spread, *x[:SHOWN]])
    heads = ["truth", "FBP", "mean", "spread", *(f"sample {k + 1}" for k in range(SHOWN))]
    grid(rows, heads, docs / "samples-measured-ct.png", cmap="gray", vmin=WINDOW[0], vmax=WINDOW[1])


def main() -> None:
    """Both pictures."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--data", type=Path, required=True, help="folder with val/")
    words.add_argument("--out", type=Path, required=True, help="what measured.py left")
    words.add_argument("--docs", type=Path, required=True, help="where the pictures go")
    words.add_argument("--only", nargs="+", choices=("ct", "scenes"), default=["ct", "scenes"])
    args = words.parse_args()
    torch.set_num_threads(1)
    if "scenes" in args.only:
        scenes(args.out, args.docs)
    if "ct" in args.only:
        ct(args.data, args.out, args.docs)


if __name__ == "__main__":
    main()
