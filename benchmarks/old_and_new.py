"""An older prior beside a newer one, in one run: sparse-view CT at 20 views and MRI at four-fold acceleration.

python benchmarks/old_and_new.py --ct FOLDER --mr FOLDER --priors OLD ct --mr-priors OLD brain-mr --out FOLDER

CT: the middle 4 slices of every series, 20 parallel views, 1e5 photons a ray, measured at 512 x 512 and reconstructed
at 256 x 256, beside FBP and TV with the weight that serves each series best. MR: 4 middle slices of every volume, one
coil, random phase-encode lines (a quarter of them, 8 % the centre), a smooth known phase, noise of 1 % of the 99.9 %
quantile of the magnitude, beside the zero-filled image and TV tuned likewise. Same measurements and same noise for
every prior.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ct_table import FEW, middle, solve, tuned_tv
from denoising import in_unit, volumes
from torch import Tensor

from invdiff.datasets import read_volume
from invdiff.files import whole_file
from invdiff.metrics import compare
from invdiff.noise import KeyedNoise
from invdiff.operators import CartesianMRI, KnownPhase
from invdiff.pipelines.pictures import panel
from invdiff.pipelines.reconstruct import RunConfig, prior_of
from invdiff.priors import NoPrior
from invdiff.reconstruction import reconstruct
from invdiff.samplers import DDS, FBP, TV, REDDiff

GEOMETRY, NOISE = "20 views", "1e5 photons"
SAMPLERS = {"RED-Diff": REDDiff(steps=40), "DDS": DDS(steps=20)}
ACCELERATION, CENTRE, SIGMA = 4, 0.08, 0.01
TV_GRID = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)


def ct_cell(path: Path, priors: dict[str, Any], out: Path) -> dict[str, float]:
    """PSNR (dB, range 2000 HU) of every method on one series."""
    volume = middle(read_volume(path), FEW)
    jobs = {"FBP": (FBP(), NoPrior()), "TV, tuned": (tuned_tv(volume, GEOMETRY, NOISE), NoPrior())}
    jobs |= {f"{s}, {p}": (sampler, prior) for s, sampler in SAMPLERS.items() for p, prior in priors.items()}
    found, pictures = {}, {}
    for name, (sampler, prior) in jobs.items():
        x, truth, _ = solve(volume, GEOMETRY, NOISE, sampler, prior)
        found[name] = compare(x, truth, "HU").psnr
        pictures[name] = x[FEW // 2, 0]
    panel(
        out / f"{path.name}.png",
        {"": {"truth": truth[FEW // 2, 0], **pictures}},
        "HU",
        title=f"{path.name}, {GEOMETRY}",
    )
    return found


def mr_measured(magnitude: Tensor) -> tuple[Any, Tensor, float]:
    """Operator on the real image, k-space and sigma_y, of (s 1 h w): the image in units of its 99.9 % quantile."""
    s, _, h, w = magnitude.shape
    rng = np.random.default_rng(0)
    centre = round(CENTRE * h / 2)
    kept = np.zeros(h, bool)
    kept[h // 2 - centre : h // 2 + centre] = True
    kept[rng.choice(np.flatnonzero(~kept), round(h / ACCELERATION) - kept.sum(), replace=False)] = True
    mask = torch.from_numpy(kept)[:, None].float().expand(h, w)
    row, column = torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij")
    phase = 1.5 * row - 0.8 * column + 0.9 * row * column
    operator = CartesianMRI(mask, slices=s) @ KnownPhase(phase, slices=s)
    clean = operator(magnitude)
    noise = KeyedNoise(3)(0, clean) * 2**0.5  # complex noise has variance 1/2 a component
    return operator, clean + SIGMA * mask * noise, SIGMA


def mr_cell(path: Path, priors: dict[str, Any], out: Path, name: str) -> dict[str, float]:
    """PSNR (dB, range the truth's maximum) of every method on one volume."""
    none = NoPrior("a.u.", 0.0, 1.0)
    truth = middle(in_unit(read_volume(path), none.info), FEW).data
    operator, y, sigma_y = mr_measured(truth)
    best: tuple[float, TV] = (-1.0, TV())
    for lam in TV_GRID:
        sampler = TV(steps=50, cg_steps=10, rho=0.05, lam=lam, lam_z=lam)
        score = compare(reconstruct(y, operator, none, sampler, sigma_y).x, truth, "a.u.").psnr
        best = max(best, (score, sampler), key=lambda pair: pair[0])
    jobs: dict[str, Any] = {"zero-filled": (FBP(), none), "TV, tuned": (best[1], none)}
    jobs |= {f"{s}, {p}": (sampler, prior) for s, sampler in SAMPLERS.items() for p, prior in priors.items()}
    found, pictures = {}, {}
    for method, (sampler, prior) in jobs.items():
        x = reconstruct(y, operator, prior, sampler, sigma_y).x
        found[method] = compare(x, truth, "a.u.").psnr
        pictures[method] = x[FEW // 2, 0]
    panel(
        out / f"{name}.png", {"": {"truth": truth[FEW // 2, 0], **pictures}}, "a.u.", title=f"{name}, {ACCELERATION}x"
    )
    return found


def show(title: str, rows: dict[str, dict[str, float]]) -> None:
    """One Markdown table, with the mean as its last row."""
    methods = list(next(iter(rows.values())))
    print(f"\n{title}: PSNR, dB\n\n| | " + " | ".join(methods) + " |\n" + "|---" * (len(methods) + 1) + "|")
    rows = rows | {"mean": {m: float(np.mean([r[m] for r in rows.values()])) for m in methods}}
    for name, row in rows.items():
        print(f"| {name} | " + " | ".join(f"{row[m]:.2f}" for m in methods) + " |", flush=True)


def main() -> None:
    """Run every cell, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("ct", "mr", "out"):
        parser.add_argument(f"--{name}", type=Path, required=name == "out")
    parser.add_argument("--priors", nargs="+", default=["ct"], help="names or folders")
    parser.add_argument("--mr-priors", nargs="+", default=["brain-mr"], help="names or folders")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, dict[str, float]]] = {}
    if options.ct:
        priors = {name: prior_of(name, RunConfig())[0] for name in options.priors}
        folders = sorted(p for p in options.ct.iterdir() if p.is_dir())
        results["CT, 20 views, 1e5 photons"] = {p.name: ct_cell(p, priors, options.out) for p in folders}
    if options.mr:
        priors = {name: prior_of(name, RunConfig())[0] for name in options.mr_priors}
        found = {}
        for key, path in volumes(options.mr).items():
            name = key.split(".")[0].replace("/", "-")
            found[name] = mr_cell(path, priors, options.out, name)
        results[f"MR, {ACCELERATION}x, one coil, known phase"] = found
    for title, rows in results.items():
        show(title, rows)
    with whole_file(options.out / "old-and-new.json") as part:
        part.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
