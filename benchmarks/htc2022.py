"""A real scan with a known truth: the Helsinki Tomography Challenge 2022 disc by FBP, TV, RED-Diff and DDS.

python benchmarks/htc2022.py --data FOLDER --out RESULTS

FOLDER holds htc2022_ta_sparse_example.mat (121 views over 60 degrees), ta_category7.mat (61 views over 30 degrees) and
their truths, which are segmentations. As in the challenge a reconstruction is split by Otsu's threshold and scored by
Matthews' correlation with the truth. TV's weight is the best of a grid by that score, which favours TV. The prior was
trained on patients, not on acrylic: what it adds here is generic.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from skimage.filters import threshold_otsu
from skimage.io import imread
from skimage.transform import resize

from invdiff.datasets import read_htc2022
from invdiff.files import whole_file
from invdiff.pipelines.pictures import panel
from invdiff.pipelines.reconstruct import RunConfig, prior_of
from invdiff.pipelines.scans import operator_of
from invdiff.priors import NoPrior
from invdiff.reconstruction import reconstruct
from invdiff.samplers import DDS, FBP, TV, REDDiff

SCANS = {
    "121 views, 60°": ("htc2022_ta_sparse_example.mat", "htc2022_ta_full_recon_fbp_seg.png"),
    "61 views, 30°": ("ta_category7.mat", "ta_category7.png"),
}
SIZE = 256  # pixels; the truth's 512 are averaged 2 x 2 and cut at one half
TV_GRID = (3e-4, 1e-3, 3e-3)


def score(image: NDArray[np.float32], truth: NDArray[np.bool_]) -> float:
    """Matthews' correlation of the image, split by Otsu's threshold, with the truth; in [-1, 1]."""
    found = image > threshold_otsu(image)
    return float(np.corrcoef(found.ravel(), truth.ravel())[0, 1])


def main() -> None:
    """Run both scans; print the table; write pictures and numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    prior, _ = prior_of("ct", RunConfig())
    methods = {"FBP": [FBP()], "TV": [TV(steps=40, cg_steps=8, lam=lam, lam_z=0.0) for lam in TV_GRID],
               "RED-Diff": [REDDiff(steps=30)], "DDS": [DDS(steps=30, lam=0.0)]}  # fmt: skip
    numbers: dict[str, dict[str, list[float]]] = {}
    rows: dict[str, dict[str, torch.Tensor]] = {}
    print("| scan | " + " | ".join(methods) + " |\n|---" + "|---" * len(methods) + "|")
    for label, (file, picture) in SCANS.items():
        scan = read_htc2022(options.data / file, SIZE)
        truth = (
            resize(imread(options.data / picture).astype(np.float32), (SIZE, SIZE), order=1, anti_aliasing=False) > 0.5
        )
        operator, y, sigma_y = operator_of(scan)
        acrylic = float(np.float32(-40.0))
        rows[label] = {"truth": torch.where(torch.from_numpy(truth), acrylic, -1000.0)}
        numbers[label] = {}
        for name, samplers in methods.items():
            used = prior if name in ("RED-Diff", "DDS") else NoPrior()
            best = (-2.0, None, 0.0)
            for sampler in samplers:
                began = time.perf_counter()
                x = reconstruct(y, operator, used, sampler, sigma_y, mu_water=scan.mu_water or 0.0).x[0, 0]
                found = (score(x.numpy(), truth), x, time.perf_counter() - began)
                best = max(best, found, key=lambda b: b[0])
            numbers[label][name] = [best[0], best[2]]
            if best[1] is not None:
                rows[label][name] = best[1]
        print(
            f"| {label} | " + " | ".join(f"{v[0]:.3f} ({v[1]:.0f} s)" for v in numbers[label].values()) + " |",
            flush=True,
        )
    panel(options.out / "htc2022.png", rows, "HU", (-1200.0, 400.0), title="HTC2022, real fan-beam data")
    with whole_file(options.out / "htc2022.json") as part:
        part.write_text(json.dumps(numbers, indent=1))


if __name__ == "__main__":
    main()
