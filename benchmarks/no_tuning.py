"""Weights found from sigma_y beside the best of a grid search: PSNR lost, and chi^2 of what was measured.

python benchmarks/no_tuning.py --ct FOLDER --mr FOLDER --out FOLDER [--samplers reddiff dds ...]

Every sampler with its defaults (steps: those of SAMPLERS) on three tasks (``small_scans``) at four noise levels. dof is
of the whole method, its denoiser's own answer to y included, by a second run with a Hutchinson probe added to y. The
grid is of the one weight that a user would tune, 1 to 3 steps a factor of ten, and its best is chosen by the PSNR
against the truth. A cell passes if chi^2 is within 0.1 of 1 - dof / M (point estimates and approximate samplers) or in
[0.9, 1.1] (posterior samplers), and the PSNR within 0.5 dB of the grid's best. Seconds are not measured here.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from small_scans import Bench, Scan
from torch import Tensor

from invdiff.files import whole_file
from invdiff.protocols import Problem
from invdiff.run import guarded, iterate, last, residual_norms
from invdiff.samplers import DAPS, DDNM, DDS, DPS, DiffPIR, PiGDM, REDDiff, SplitGibbs
from invdiff.samplers.discrepancy import measurements, probed_degrees_of_freedom

TASKS, NOISES = ("ct", "mri", "inpainting"), (0.5, 1.0, 2.0, 5.0)
WEIGHTS = (10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)
NEAR, LOST = 0.1, 0.5  # of chi^2, and dB


class Entry(NamedTuple):
    """A sampler, the field that a user would tune ("" for none), and the grid of it."""

    sampler: Any
    field: str = ""
    grid: tuple[float, ...] = ()


SAMPLERS = {
    "reddiff": Entry(REDDiff(steps=30), "lam", WEIGHTS),
    "dds": Entry(DDS(steps=30, lam=0.0), "anchor", WEIGHTS),
    "diffpir": Entry(DiffPIR(steps=30), "lam", (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)),
    "dps": Entry(DPS(steps=100), "scale", (0.3, 1.0, 3.0, 10.0, 30.0)),
    "pigdm": Entry(PiGDM(steps=30), "prior_deviation", (0.1, 0.2, 0.5, 1.0)),
    "daps": Entry(DAPS(steps=60), "prior_deviation", (0.1, 0.2, 0.5, 1.0)),
    "ddnm": Entry(DDNM(steps=60)),
    "splitgibbs": Entry(SplitGibbs(steps=40, keep=5)),
}


def image(sampler: Any, problem: Problem) -> Tensor:
    """The sampler's last image, (s c h w)."""
    return last(guarded(iterate(sampler, problem), sampler, problem)).x


def cell(entry: Entry, scan: Scan) -> dict[str, Any]:
    """chi^2, 1 - dof / M and PSNR of every slice without tuning, and the PSNR of every weight of the grid."""
    problem = scan.prepared.problem
    x = image(entry.sampler, problem)
    count, idle = measurements(problem)
    chi2 = (residual_norms(problem, x).square() - idle) / count / problem.sigma_y**2
    dof = probed_degrees_of_freedom(lambda p: image(entry.sampler, p), problem, x)
    tuned = {}
    for value in entry.grid:
        try:
            tuned[value] = scan.psnr(image(replace(entry.sampler, **{entry.field: value}), problem)).tolist()
        except ArithmeticError:  # a weight at which the run diverges
            continue
    return {
        "chi2": chi2.tolist(),
        "wanted": (1 - dof / count).tolist(),
        "psnr": scan.psnr(x).tolist(),
        "tuned": tuned,
        "estimate": entry.sampler.estimate,
    }


def mean(values: list[float]) -> float:
    """Of slices."""
    return sum(values) / len(values)


def row(name: str, task: str, percent: float, found: dict[str, Any]) -> tuple[str, bool, bool]:
    """The table's line, whether chi^2 is as wanted, and whether the PSNR is."""
    chi2, wanted, psnr = (mean(found[k]) for k in ("chi2", "wanted", "psnr"))
    sampler = found["estimate"] == "posterior sampler"
    fits = abs(chi2 - 1) <= NEAR if sampler else abs(chi2 - wanted) <= NEAR
    best, note, near = psnr, "", True
    if found["tuned"]:
        value, best = max(((v, mean(p)) for v, p in found["tuned"].items()), key=lambda pair: pair[1])
        note, near = f"{best:.2f} (at {value:g})", psnr >= best - LOST
    line = f"| {name} | {task} | {percent:g} | {chi2:.2f} | {1.0 if sampler else wanted:.2f} | {psnr:.2f} | {note} | "
    return line + f"{psnr - best:+.2f} |" if note else line + " |", fits, near


def main() -> None:
    """Run every cell and print the table and the shares that pass."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("ct", "mr", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--samplers", nargs="+", default=list(SAMPLERS), choices=list(SAMPLERS))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    bench, passed = Bench(options.ct, options.mr), {}
    print("| sampler | task | noise, % | chi² | wanted | PSNR | best of the grid | over it, dB |\n" + "|---" * 8 + "|")
    for name in options.samplers:
        for task in TASKS:
            for percent in NOISES:
                torch.manual_seed(0)
                found = cell(SAMPLERS[name], bench.scan(task, percent))
                line, fits, near = row(name, task, percent, found)
                print(line, flush=True)
                passed.setdefault(name, []).append((fits, near))
                with whole_file(options.out / f"{name}-{task}-{percent:g}.json") as part:
                    part.write_text(json.dumps(found, indent=1))
    print("\n| sampler | what it gives | chi² as wanted | PSNR within 0.5 dB |\n|---|---|---|---|")
    for name, cells in passed.items():
        fits, near = (sum(c[k] for c in cells) for k in (0, 1))
        tuned = f"{near} of {len(cells)}" if SAMPLERS[name].grid else "nothing to tune"
        print(f"| {name} | {SAMPLERS[name].sampler.estimate} | {fits} of {len(cells)} | {tuned} |")


if __name__ == "__main__":
    main()
