"""Measured or invented: a real slice from few and from more views, and in which part the errors are.

python benchmarks/measured_or_invented.py --data FOLDER --out PICTURE.png [--views 8 60] [--sampler reddiff]
    [--steps 30] [--slice K] [--photons 1e5] [--tau 0.058 0.1 0.2 0.5] [--threads 2]

FOLDER holds one DICOM series. One slice is measured on its own grid and reconstructed at half its pixels, so that the
truth is known. Written: a row of pictures for each number of views (truth, reconstruction, measured, invented part,
share) at the default tau, and beside it as JSON the table that is printed: for each number of views and each tau the
RMS of the invented part, the mean share, and the RMS of the reconstruction's error in either part. The split does not
know the truth: errors that lie nearly all in the invented part say that it splits well.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from invdiff.config import build, find
from invdiff.datasets import Volume, read_volume
from invdiff.files import whole_file
from invdiff.invented import Split, measured_or_invented
from invdiff.pipelines.pictures import CT_WINDOW, Picture, pictures
from invdiff.pipelines.reconstruct import RunConfig, prior_of
from invdiff.pipelines.scans import operator_of
from invdiff.pipelines.simulate import Simulation, simulate
from invdiff.pipelines.uncertainty import parts_row
from invdiff.protocols import Prior
from invdiff.reconstruction import reconstruct

COLUMNS = ("views", "tau", "invented_rms", "mean_share", "error", "error_measured", "error_invented", "iterations")


def one_slice(volume: Volume, index: int | None) -> Volume:
    """Slice ``index``, the middle one if None."""
    k = volume.data.shape[0] // 2 if index is None else index
    if not 0 <= k < volume.data.shape[0]:
        raise ValueError(f"slice {k}; 0 to {volume.data.shape[0] - 1} are there")
    affine = volume.affine.copy()
    affine[:, 3] += k * affine[:, 2]
    return replace(volume, data=volume.data[k : k + 1].clone(), affine=affine)


def rms(x: Tensor) -> float:
    """Root of the mean square."""
    return float(x.square().mean().sqrt())


def of_views(
    volume: Volume, views: int, photons: float, sampler: Any, prior: Prior, taus: list[float]
) -> tuple[list[Picture], list[dict[str, float]]]:
    """(the row of pictures, the rows of the table) for a number of views."""
    scan, truth = simulate(volume, Simulation(views=views, photons=photons))
    operator, y, sigma_y = operator_of(scan)
    began = time.monotonic()
    x = reconstruct(y, operator, prior, sampler, sigma_y).x
    print(f"{views} views: reconstructed in {time.monotonic() - began:.0f} s", flush=True)
    error, rows = x - truth.data, []
    for tau in taus:
        split = Split(tau=tau, iterations=2000)
        parts = measured_or_invented(x, operator, prior, sigma_y, split)
        wrong = measured_or_invented(error, operator, prior, sigma_y, split, reference=0.0)
        values = (views, tau, rms(parts.invented), parts.record["mean_share"][0], rms(error), rms(wrong.measured),
                  rms(wrong.invented), parts.record["iterations"])  # fmt: skip
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    shown = measured_or_invented(x, operator, prior, sigma_y)
    images = [v[0, 0] for v in (x, shown.measured, shown.invented, shown.share)]
    row = parts_row(images[0], images[1], images[2], images[3], CT_WINDOW, "HU", f"{views} views")
    return [Picture("truth", truth.data[0, 0], CT_WINDOW), *row], rows


def table(rows: list[dict[str, float]]) -> str:
    """As Markdown, in HU."""
    lines = [
        "| views | tau | invented, RMS HU | mean share | error, RMS HU | its measured part | its invented part "
        "| iterations |",
        "|---" * len(COLUMNS) + "|",
    ]
    for r in rows:
        lines.append(
            f"| {r['views']} | {r['tau']:g} | {r['invented_rms']:.0f} | {r['mean_share']:.2f} | {r['error']:.0f} "
            f"| {r['error_measured']:.0f} | {r['error_invented']:.0f} | {r['iterations']} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run, write and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--views", type=int, nargs="+", default=[8, 60])
    parser.add_argument("--sampler", default="reddiff")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--slice", type=int)
    parser.add_argument("--photons", type=float, default=1e5)
    parser.add_argument("--tau", type=float, nargs="+", default=[0.058, 0.1, 0.2, 0.5])
    parser.add_argument("--prior", default="ct")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    prior, _ = prior_of(options.prior, RunConfig())
    sampler = build(find("samplers", options.sampler), {"steps": options.steps}, options.sampler)
    volume = one_slice(read_volume(options.data), options.slice)
    shown, rows = [], []
    for views in options.views:
        row, found = of_views(volume, views, options.photons, sampler, prior, options.tau)
        shown.append(row)
        rows += found
    low, high = CT_WINDOW
    pictures(options.out, shown, f"{options.sampler}, {options.steps} steps, window {low:g} to {high:g} HU")
    with whole_file(options.out.with_suffix(".json")) as part:
        part.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
