"""Quality against seconds of every sampler, as one plot with the Pareto front.

python benchmarks/pareto.py --ct FOLDER --mr FOLDER --out FOLDER

Two tasks of ``small_scans``: CT at 20 views with noise of 0.3 % of the largest line integral (about 1e5 photons behind
the body) and brain MR at four-fold acceleration with 1 % noise. Every sampler at several step counts, else with its
defaults; seconds of CPU time of the process for a slice, the network's included; PSNR is the mean of the slices.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from no_tuning import image, mean
from small_scans import Bench, Scan

from invdiff.files import whole_file
from invdiff.priors import NoPrior
from invdiff.samplers import DAPS, DDNM, DDS, DPS, FBP, TV, DiffPIR, DiffusionMBIR, PiGDM, REDDiff, SplitGibbs

TASKS = {"ct": 0.3, "mri": 1.0}
TITLES = {"ct": "CT, 20 views", "mri": "brain MR, 4x"}
FEW = (8, 15, 30, 60)
SAMPLERS: dict[str, list[Any]] = {
    "FBP / zero-filled": [FBP()],
    "TV": [TV(steps=n, lam_z=0.0, lam=lam) for n in (15, 60) for lam in (3e-4, 1e-3)],
    "RED-Diff": [REDDiff(steps=n) for n in FEW],
    "DDS": [DDS(steps=n, lam=0.0, eta=eta) for n, eta in zip(FEW, (0.15, 0.15, 0.5, 0.5), strict=True)],
    "DDS, dpmpp2m": [DDS(steps=n, lam=0.0, eta=0.0, move="dpmpp2m") for n in (8, 15)],
    "DiffPIR": [DiffPIR(steps=n) for n in FEW],
    "DDNM+": [DDNM(steps=n) for n in (15, 50, 100)],
    "PiGDM": [PiGDM(steps=n) for n in (8, 15, 50)],
    "DPS": [DPS(steps=n) for n in (50, 250)],
    "DAPS": [DAPS(steps=n) for n in (30, 100, 200)],
    "DiffusionMBIR": [DiffusionMBIR(steps=100, lam=0.0)],
    "SplitGibbs": [SplitGibbs(steps=n, keep=n // 10) for n in (30, 120)],
}


def front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those (seconds, PSNR) that no other beats in both."""
    kept: list[tuple[float, float]] = []
    for point in sorted(points):
        if not kept or point[1] > kept[-1][1]:
            kept.append(point)
    return kept


def measured(sampler: Any, scan: Scan) -> tuple[float, float]:
    """CPU seconds a slice, and PSNR, dB."""
    began = time.process_time()
    x = image(sampler, scan.prepared.problem)
    return (time.process_time() - began) / len(x), mean(scan.psnr(x).tolist())


def main() -> None:
    """Run, write the numbers and the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("ct", "mr", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    bench, found = Bench(options.ct, options.mr), {}
    for task, percent in TASKS.items():
        scan = bench.scan(task, percent)
        plain = without_prior(scan)
        print(f"\n{TITLES[task]}\n\n| sampler | steps | s a slice | PSNR |\n|---|---|---|---|")
        for name, samplers in SAMPLERS.items():
            for sampler in samplers:
                used = plain if isinstance(sampler, FBP | TV) else scan
                try:
                    seconds, psnr = measured(sampler, used)
                except ArithmeticError as error:
                    print(f"| {name} | {sampler.steps} | diverged | {error} |")
                    continue
                print(f"| {name} | {sampler.steps} | {seconds:.2f} | {psnr:.2f} |", flush=True)
                found.setdefault(task, {}).setdefault(name, []).append((seconds, psnr, sampler.steps))
    with whole_file(options.out / "pareto.json") as part:
        part.write_text(json.dumps(found, indent=1))
    plot(found, options.out / "pareto.png")


def without_prior(scan: Scan) -> Scan:
    """The same scan for baselines that ask no prior."""
    problem = scan.prepared.problem._replace(prior=NoPrior())
    return scan._replace(prepared=scan.prepared._replace(problem=problem))


def plot(found: dict[str, dict[str, list[tuple[float, float, int]]]], path: Path) -> None:
    """One panel a task; the front is drawn through the points that nothing beats."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (task, methods) in zip(figure.subplots(1, len(found)), found.items(), strict=True):
        for k, (name, points) in enumerate(methods.items()):
            style = {"marker": "os^vDP*X<>hd"[k % 12], "color": f"C{k % 10}"}
            axes.plot([p[0] for p in points], [p[1] for p in points], linewidth=0.7, label=name, **style)
        best = front([(p[0], p[1]) for points in methods.values() for p in points])
        axes.step(*zip(*best, strict=True), where="post", color="black", linewidth=2, alpha=0.4, label="Pareto front")
        axes.set(xscale="log", xlabel="CPU seconds a slice of 128 x 128", ylabel="PSNR, dB", title=TITLES[task])
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
