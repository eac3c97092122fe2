"""Multi-coil brain MR at four- and eight-fold acceleration: every method beside the classical ones.

python benchmarks/mri_table.py --data FOLDER --out RESULTS [--threads 1]     runs what is missing
python benchmarks/mri_table.py --out RESULTS --table                         prints the tables

The middle slice of every volume in FOLDER (2 x 2 averaged where pixels are below 0.6 mm): 8 simulated coils, a smooth
random phase, noise of 1 % of the volume's 99.9 % quantile in every real component (5 % in one more row). Cartesian:
random lines with 8 % (4 % at 8x) of the centre; radial: golden-angle spokes, as many as lines. Coil maps are ESPIRiT's:
from the mask's own centre lines, for radial scans from a separate scan of 24 x 24 samples with the same noise.
"magnitude": one channel under the phase of the low-resolution image; "complex": two channels. The weights of L1-wavelet
and TV are the best of a grid for each cell, by the PSNR against the truth: that favours them. Ours run with their
defaults (DDS without its term across slices, of which there is one).

Radial and complex scans are of the volumes in SLOW alone. DPS, SplitGibbs and DiffusionMBIR are slow and run in
few cells (magnitude, Cartesian, volumes in SLOW); DiffusionMBIR takes three neighbouring slices, of which the middle
one counts.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from denoising import volumes

from invdiff.datasets import Measurements, Volume, block_mean, pad_to_multiple, read_volume
from invdiff.files import whole_file
from invdiff.metrics import compare
from invdiff.noise import KeyedNoise
from invdiff.operators import CartesianMRI, NonCartesianMRI
from invdiff.operators.mri.calibration import image_scale
from invdiff.operators.mri.espirit import espirit_maps
from invdiff.operators.mri.simulate import birdcage_maps, simulate_kspace, smooth_phase
from invdiff.operators.mri.trajectories import radial
from invdiff.pipelines.mri import MRIConfig, MRSimulation, as_seen_by, completed, simulate, way_of
from invdiff.pipelines.pictures import panel
from invdiff.pipelines.reconstruct import RunConfig, prior_of
from invdiff.pipelines.scans import operator_of
from invdiff.problem import prepare
from invdiff.run import guarded, iterate, last
from invdiff.samplers import DDS, DPS, SENSE, TV, DiffusionMBIR, L1Wavelet, REDDiff, SplitGibbs, ZeroFilled

COILS, NOISE, MORE_NOISE = 8, 1.0, 5.0  # percent
CENTRE = {4: 0.08, 8: 0.04}
FINE_MM = 0.6  # pixels below are averaged 2 x 2
CALIBRATION = 24  # samples each way of the separate scan
SLOW = ("T2W",)  # parts of the names of the volumes that slow methods, radial and complex scans are run on
TUNED: dict[str, list[Any]] = {
    "L1-wavelet": [L1Wavelet(lam=lam) for lam in (5e-4, 2e-3, 8e-3)],
    "TV": [TV(steps=25, rho=0.05, lam=lam, lam_z=0.0) for lam in (3e-3, 1e-2)],
}
PLAIN: dict[str, Any] = {"zero-filled": ZeroFilled(), "SENSE": SENSE()}
OURS: dict[str, Any] = {"RED-Diff": REDDiff(), "DDS": DDS(lam=0.0)}
SLOWER: dict[str, Any] = {
    "DPS": DPS(steps=60),
    "SplitGibbs": SplitGibbs(steps=40, keep=5),
    "DiffusionMBIR": DiffusionMBIR(steps=100),
}


class Cell(NamedTuple):
    """One scan and how it is made real."""

    volume: str
    acceleration: int
    trajectory: str
    channels: str
    noise: float

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.volume}-{self.acceleration}x-{self.trajectory}-{self.channels}-{self.noise:g}"


def middle(volume: Volume, count: int) -> Volume:
    """The middle slices, ``count`` of them."""
    first = (len(volume.data) - count) // 2
    cut = replace(volume, data=volume.data[first : first + count].clone())
    return block_mean(pad_to_multiple(cut, 2, 0.0), 2) if volume.spacing_mm[1] < FINE_MM else cut


def scanned(volume: Volume, cell: Cell) -> tuple[Measurements, Volume]:
    """The cell's measurements of a volume, and the truth."""
    centre = CENTRE[cell.acceleration]
    how = MRSimulation(cell.acceleration, COILS, "random", centre, cell.noise)
    if cell.trajectory == "cartesian":
        return simulate(volume, how)
    truth = replace(volume, data=volume.data.clamp_min(0))
    s, _, h, w = truth.data.shape
    sigma = cell.noise / 100 * image_scale(truth.data)
    coils, phase = birdcage_maps(COILS, (h, w)), smooth_phase((h, w))
    everything = CartesianMRI(torch.ones(h, w, dtype=torch.bool), coils, slices=s)
    full = simulate_kspace(truth.data, everything, phase, sigma, KeyedNoise(1))
    top, left = h // 2 - CALIBRATION // 2, w // 2 - CALIBRATION // 2
    maps = espirit_maps(full[..., top : top + CALIBRATION, left : left + CALIBRATION], (h, w)).maps[0]
    path = radial(round(h / cell.acceleration), 2 * max(h, w))
    y = simulate_kspace(truth.data, NonCartesianMRI(path, (h, w), coils, slices=s), phase, sigma, KeyedNoise(0))
    fields = NonCartesianMRI(path, (h, w), maps, slices=s).fields()
    return Measurements(y, "non-cartesian-mri", fields, truth.affine, "a.u.", sigma, simulated=True), truth


def solved(scan: Measurements, truth: Volume, cell: Cell, sampler: Any, prior: Any) -> tuple[dict[str, float], Any]:
    """The numbers of one method on one scan, and its image (h w)."""
    used = as_seen_by(scan, sampler)
    operator, y, sigma_y = operator_of(used)
    way = way_of(used, operator, y, sampler, MRIConfig(channels=cell.channels), several=False)
    assert way is not None
    prepared = prepare(y, way.operator, way.wrap(prior), sigma_y, KeyedNoise(0))
    began = time.process_time()
    state = last(guarded(iterate(sampler, prepared.problem), sampler, prepared.problem))
    seconds = time.process_time() - began
    k = len(truth.data) // 2
    image, wanted = way.magnitude(prepared.to_physical(state.x))[k : k + 1], truth.data[k : k + 1]
    found = compare(image, wanted, "a.u.")
    numbers = {"psnr": found.psnr, "ssim": found.ssim, "nmse": found.nmse, "seconds": seconds / len(truth.data)}
    return numbers, image[0, 0]


def by_grappa(scan: Measurements, truth: Volume, cell: Cell, prior: Any) -> tuple[dict[str, float], Any]:
    """``solved`` by GRAPPA, whose seconds are those of filling k-space."""
    began = time.process_time()
    full = completed(scan, ZeroFilled())
    seconds = time.process_time() - began
    numbers, image = solved(full, truth, cell, ZeroFilled(), prior)
    return {**numbers, "seconds": seconds}, image


def run(cell: Cell, path: Path, out: Path, prior: Any) -> None:
    """Every method on one cell; writes its numbers and its picture."""
    scan, truth = scanned(middle(read_volume(path), 1), cell)
    results: dict[str, dict[str, float]] = {}
    pictures = {"truth": truth.data[0, 0]}
    for name, samplers in {**{k: [v] for k, v in PLAIN.items()}, **TUNED, **{k: [v] for k, v in OURS.items()}}.items():
        tried = [solved(scan, truth, cell, sampler, prior) for sampler in samplers]
        results[name], pictures[name] = max(tried, key=lambda pair: pair[0]["psnr"])
    if cell.trajectory == "cartesian" and cell.channels == "magnitude":
        results["GRAPPA"], pictures["GRAPPA"] = by_grappa(scan, truth, cell, prior)
    slow = cell.channels == "magnitude" and cell.trajectory == "cartesian" and cell.noise == NOISE
    for name, sampler in SLOWER.items() if slow and any(s in cell.volume for s in SLOW) else ():
        many = scanned(middle(read_volume(path), 3), cell) if name == "DiffusionMBIR" else (scan, truth)
        results[name], pictures[name] = solved(*many, cell, sampler, prior)
    with whole_file(out / f"{cell.name}.json") as part:
        part.write_text(json.dumps({"cell": cell._asdict(), "results": results}, indent=1))
    panel(out / f"{cell.name}.png", {"": pictures}, "a.u.", title=cell.name)


def cells(names: list[str]) -> Iterator[Cell]:
    """All of them, the most telling first; radial and complex scans of few volumes."""
    few = [n for n in names if any(part in n for part in SLOW)]
    for acceleration, name in product(CENTRE, names):
        yield Cell(name, acceleration, "cartesian", "magnitude", NOISE)
    for trajectory, channels in (("radial", "magnitude"), ("cartesian", "complex"), ("radial", "complex")):
        for acceleration, name in product(CENTRE, few):
            yield Cell(name, acceleration, trajectory, channels, NOISE)
    for name in few:
        yield Cell(name, 4, "cartesian", "magnitude", MORE_NOISE)


def table(out: Path) -> str:
    """Markdown: PSNR, SSIM, NMSE a row, what ours gain over L1-wavelet, and the means of CPU seconds."""
    found = [json.loads(p.read_text()) for p in sorted(out.glob("*.json"))]
    methods = [*PLAIN, "GRAPPA", *TUNED, *OURS, *SLOWER]
    head = ["scan", "R", "trajectory", "channels", "noise, %", *methods, "best of ours over L1-wavelet, dB"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for entry in sorted(found, key=lambda e: tuple(e["cell"].values())[::-1]):
        cell, results = Cell(**entry["cell"]), entry["results"]
        shown = ["{psnr:.2f} / {ssim:.3f} / {nmse:.4f}".format(**results[m]) if m in results else "" for m in methods]
        gain = max(results[m]["psnr"] for m in OURS) - results["L1-wavelet"]["psnr"]
        lines.append(
            f"| {cell.volume} | {cell.acceleration} | {cell.trajectory} | {cell.channels} | {cell.noise:g} | "
            + " | ".join(shown)
            + f" | {gain:+.2f} |"
        )
    seconds = {m: [e["results"][m]["seconds"] for e in found if m in e["results"]] for m in methods}
    means = ", ".join(f"{m} {np.mean(v):.1f}" for m, v in seconds.items() if v)
    return "\n".join(lines) + f"\n\nPSNR, dB / SSIM / NMSE. CPU seconds a slice, mean: {means}."


def main() -> None:
    """Run what is missing, or print what is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if options.table:
        print(table(options.out))
        return
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    paths = {key.split(".")[0].replace("/", "-"): path for key, path in volumes(options.data).items()}
    prior, _ = prior_of("brain-mr", RunConfig())
    for cell in cells(list(paths)):
        if not (options.out / f"{cell.name}.json").exists():
            run(cell, paths[cell.volume], options.out, prior)
            print(cell.name, flush=True)


if __name__ == "__main__":
    main()
