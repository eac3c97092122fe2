"""FBP, tuned TV, RED-Diff, DiffusionMBIR and DDS on sparse-view and limited-angle CT of real scans.

python benchmarks/ct_table.py --data FOLDER --out RESULTS [--only METHOD ...] [--threads 2]     runs what is missing
python benchmarks/ct_table.py --out RESULTS --table                                             prints the tables

FOLDER holds DICOM series, one a sub-folder. The middle 16 slices of each are measured on their own 512 x 512 grid and
reconstructed at 256 x 256 (no inverse crime). Every cell (series, views, noise, method) is a JSON file and a middle
slice in RESULTS; a second call goes on where the first one stopped.

Settings. Ours: the samplers' defaults at 40 (RED-Diff) and 20 (DDS) steps, the same everywhere, on all 16 slices.
TV and DiffusionMBIR run on the middle 4 slices, on which all are compared. TV's weight (in the plane and across slices
alike) is the best of a grid for each cell, by the PSNR against the truth, which favours TV. DiffusionMBIR runs 100
steps (199 evaluations; published: 2000 and 4000) at 8 and 20 views.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from invdiff.datasets import Volume, read_volume
from invdiff.files import whole_file
from invdiff.metrics import compare
from invdiff.noise import KeyedNoise
from invdiff.pipelines.pictures import panel
from invdiff.pipelines.reconstruct import RunConfig, prior_of
from invdiff.pipelines.scans import operator_of
from invdiff.pipelines.simulate import Simulation, simulate
from invdiff.priors import NoPrior
from invdiff.problem import prepare
from invdiff.run import guarded, iterate, last
from invdiff.samplers import DDS, FBP, TV, DiffusionMBIR, REDDiff

GEOMETRIES = {"8 views": (8, 180.0), "20 views": (20, 180.0), "60 views": (60, 180.0), "60 views, 90°": (60, 90.0)}
NOISES = {"noiseless": 0.0, "1e5 photons": 1e5}
SLICES, FEW = 16, 4
TV_GRID = (3e-5, 1e-4, 3e-4, 1e-3)  # risen along until the PSNR falls
TV_SWEEPS, TV_CG, TV_RHO = 50, 10, 0.005  # 200 sweeps at any rho add about 0.2 dB
PRIOR_FREE = ("FBP", "TV")
ON_FEW = ("TV", "DiffusionMBIR")  # run on the middle slices alone
METHODS = ("FBP", "TV", "RED-Diff", "DDS", "DiffusionMBIR")
MBIR_GEOMETRIES = ("8 views", "20 views")
AIR_HU = -1000.0


def middle(volume: Volume, count: int) -> Volume:
    """The middle ``count`` slices."""
    start = (volume.data.shape[0] - count) // 2
    affine = volume.affine.copy()
    affine[:, 3] += start * affine[:, 2]
    return replace(volume, data=volume.data[start : start + count].clone(), affine=affine)


def solve(
    volume: Volume, geometry: str, noise: str, sampler: Any, prior: Any
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """(reconstruction, truth) in HU and seconds."""
    views, arc = GEOMETRIES[geometry]
    scan, truth = simulate(volume, Simulation(views=views, arc=arc, photons=NOISES[noise]))
    operator, y, sigma_y = operator_of(scan)
    prepared = prepare(y, operator, prior, sigma_y, KeyedNoise(0))
    began = time.perf_counter()
    state = last(guarded(iterate(sampler, prepared.problem), sampler, prepared.problem))
    return prepared.to_physical(state.x), truth.data, time.perf_counter() - began


def tuned_tv(volume: Volume, geometry: str, noise: str) -> TV:
    """TV with the weight that serves these slices best, walked up until the PSNR falls."""
    best = (-1.0, TV())
    for lam in TV_GRID:
        sampler = TV(steps=TV_SWEEPS, cg_steps=TV_CG, rho=TV_RHO, lam=lam, lam_z=lam)
        x, truth, _ = solve(volume, geometry, noise, sampler, NoPrior())
        found = compare(x, truth, "HU").psnr
        if found < best[0]:
            break
        best = (found, sampler)
    return best[1]


def sampler_of(method: str, volume: Volume, geometry: str, noise: str) -> tuple[Any, int]:
    """The method's sampler and its denoiser evaluations a slice."""
    if method == "FBP":
        return FBP(), 0
    if method == "TV":
        return tuned_tv(volume, geometry, noise), 0
    if method == "RED-Diff":
        return REDDiff(steps=40), 40
    if method == "DDS":
        return DDS(steps=20), 20
    return DiffusionMBIR(steps=100), 2 * 100 - 1


def cell(volume: Volume, geometry: str, noise: str, method: str, prior: Any, stem: Path) -> None:
    """Run one cell and write its JSON and its middle slice."""
    used = middle(volume, FEW) if method in ON_FEW else volume
    sampler, evaluations = sampler_of(method, used, geometry, noise)
    x, truth, seconds = solve(used, geometry, noise, sampler, NoPrior() if method in PRIOR_FREE else prior)
    few = slice((len(x) - FEW) // 2, (len(x) - FEW) // 2 + FEW)
    numbers = {
        **compare(x, truth, "HU")._asdict(),
        "psnr_few": compare(x[few], truth[few], "HU").psnr,
        "ssim_few": compare(x[few], truth[few], "HU").ssim,
        "rmse_few": compare(x[few], truth[few], "HU").rmse,
        "seconds": seconds,
        "evaluations": evaluations,
        "sampler": repr(sampler),
        "slices": len(x),
        "threads": torch.get_num_threads(),
    }
    shown = len(x) // 2
    torch.save({"image": x[shown, 0].half(), "truth": truth[shown, 0].half()}, stem.with_suffix(".pt"))
    with whole_file(stem.with_suffix(".json")) as part:
        part.write_text(json.dumps(numbers, indent=1))
    print(f"{stem.name}: {numbers['psnr']:.2f} dB, SSIM {numbers['ssim']:.3f}, {seconds:.0f} s", flush=True)


def run(data: Path, out: Path, only: list[str], prior_name: str) -> None:
    """Run every cell that has no JSON yet."""
    out.mkdir(parents=True, exist_ok=True)
    prior = None
    for method in only:
        for folder in sorted(p for p in data.iterdir() if p.is_dir()):
            volume = middle(read_volume(folder), SLICES)
            for geometry in GEOMETRIES if method != "DiffusionMBIR" else MBIR_GEOMETRIES:
                for noise in NOISES:
                    stem = out / f"{folder.name}--{geometry}--{noise}--{method}".replace(" ", "_").replace(",", "")
                    if stem.with_suffix(".json").exists():
                        continue
                    if prior is None and method not in PRIOR_FREE:
                        prior, _ = prior_of(prior_name, RunConfig())
                    cell(volume, geometry, noise, method, prior, stem)


def table(out: Path) -> None:
    """Print one Markdown table for 16 slices, one for the 4 of DiffusionMBIR, and the margins; write the panels."""
    cells: dict[tuple[str, str, str], dict[str, Any]] = {}
    for path in sorted(out.glob("*.json")):
        series, geometry, noise, method = path.stem.split("--")
        cells.setdefault((series, geometry, noise), {})[method] = json.loads(path.read_text())
    ours = ("RED-Diff", "DDS", "DiffusionMBIR")
    for title, keys, methods in (
        (f"{SLICES} slices", ("psnr", "ssim", "rmse"), ("FBP", "RED-Diff", "DDS")),
        (f"the middle {FEW} slices", ("psnr_few", "ssim_few", "rmse_few"), METHODS),
    ):
        print(f"\n{title}: PSNR dB / SSIM / RMSE HU (data range 2000 HU)\n")
        print("| series | views | noise | " + " | ".join(methods) + " | best of ours over TV, dB |")
        print("|---" * (4 + len(methods)) + "|")
        for (series, geometry, noise), row in sorted(cells.items(), key=lambda i: (_rank(i[0][1]), i[0][2], i[0][0])):
            shown = [
                f"{row[m][keys[0]]:.2f} / {row[m][keys[1]]:.3f} / {row[m][keys[2]]:.0f}" if m in row else ""
                for m in methods
            ]
            have = [row[m][keys[0]] for m in ours if m in row and m in methods]
            margin = f"{max(have) - row['TV'][keys[0]]:+.2f}" if have and "TV" in row and "TV" in methods else ""
            print(
                f"| {series} | {geometry.replace('_', ' ')} | {noise.replace('_', ' ')} | "
                + " | ".join(shown)
                + f" | {margin} |"
            )
    print("\nseconds a slice and evaluations: ", end="")
    for m in METHODS:
        used = [r[m] for r in cells.values() if m in r]
        if used:
            mean = sum(r["seconds"] / r["slices"] for r in used) / len(used)
            print(f"{m} {mean:.2f} s, {used[0]['evaluations']}; ", end="")
    print()
    for (series, geometry, noise), row in cells.items():
        stem = f"{series}--{geometry}--{noise}"
        saved = {m: torch.load(out / f"{stem}--{m}.pt", weights_only=True) for m in METHODS if m in row}
        if saved:
            pictures = {
                "truth": next(iter(saved.values()))["truth"].float(),
                **{m: s["image"].float() for m, s in saved.items()},
            }
            label = f"{series}, {geometry}, {noise}".replace("_", " ")
            panel(out / f"{stem}.png", {"": pictures}, "HU", title=label)


def _rank(geometry: str) -> tuple[bool, int]:
    return ("°" in geometry, int(geometry.split("_")[0]))


def main() -> None:
    """Run or print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--prior", default="ct")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.table:
        table(options.out)
    elif options.data is None:
        parser.error("--data is wanted")
    else:
        run(options.data, options.out, options.only, options.prior)


if __name__ == "__main__":
    main()
