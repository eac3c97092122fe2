"""Are a prior's own images copies of training slices? The nearest one of each, as a picture and a number.

python benchmarks/memorisation.py --prior ct --config CONFIG.toml --train FOLDER --val FOLDER --out FOLDER

Every image is shrunk to 64 x 64 pixels. The distance of two images is the root-mean-square difference in prior units,
the least over both flips; the nearest of all training slices is the one drawn. Beside the prior's own images stand as
many slices of subjects that were not trained on: a prior that copies has images much nearer to the training slices
than those are.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from denoising import slices as val_slices
from denoising import volumes
from torch import Tensor

import invdiff
from invdiff.pipelines.pictures import sheet
from invdiff.pipelines.training_data import read_training
from invdiff.pipelines.training_plan import plan_of
from invdiff.priors import load
from invdiff.samplers import DPMpp2M

COUNT, SIZE, STEPS, SEED = 8, 256, 40, 0
SMALL = 64  # pixels


def small(images: Tensor) -> Tensor:
    """(n 1 h w) to (n, 64 * 64)."""
    return F.interpolate(images, (SMALL, SMALL), mode="bilinear", antialias=True).flatten(1)


def nearest(images: Tensor, trained: Tensor) -> tuple[Tensor, Tensor]:
    """(distance, index of the nearest training slice) of each of ``images`` (n 1 h w); ``trained`` is (m, 64 * 64)."""
    turned = [images, images.flip(-1), images.flip(-2), images.flip(-1, -2)]
    distances = torch.stack([torch.cdist(small(t), trained) / SMALL for t in turned]).amin(0)
    found = distances.min(dim=1)
    return found.values, found.indices


def main() -> None:
    """Draw the images, print the distances, write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prior", default="ct")
    for name in ("config", "train", "val", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    options = parser.parse_args()
    info, plan = load(options.prior).info, plan_of(options.config)
    options.out.mkdir(parents=True, exist_ok=True)
    read = read_training(options.train, plan.data, info.unit)
    trained = torch.cat([small(read.in_prior_units(k, info)[None]) for k in range(len(read.images))])
    result = invdiff.sample(options.prior, (COUNT, 1, SIZE, SIZE), DPMpp2M(steps=STEPS), SEED, chunk=4)
    ours = info.in_prior_units(result.x)
    distance, index = nearest(ours, trained)
    pictures = torch.stack([p for k in range(COUNT) for p in (ours[k], read.in_prior_units(int(index[k]), info))])
    title = f"{info.name}: a drawn image and the training slice nearest to it, in turns"
    sheet(options.out / f"{info.name}-nearest.png", info.in_physical_units(pictures[:, 0]), info.unit,
          {"whole range": (info.low, info.high)}, title)  # fmt: skip
    unseen = [torch.from_numpy(a)[None, None] for p in volumes(options.val).values() for a in val_slices(p, info)]
    unseen = [unseen[k] for k in np.linspace(0, len(unseen) - 1, COUNT).round().astype(int)]
    others = torch.cat([nearest(image, trained)[0] for image in unseen])
    for name, values in (("the prior's images", distance), ("slices of unseen subjects", others)):
        print(f"{name}: RMS distance to the nearest of {len(trained)} training slices, prior units: ", end="")
        print(f"{float(values.min()):.3f} to {float(values.max()):.3f}, mean {float(values.mean()):.3f}")


if __name__ == "__main__":
    main()
