"""What several runs buy: one seed, the mean of N, the best of N by residual and by density, averaged flips and shifts.

python benchmarks/combining.py --data FOLDER [--slices 4] [--samples 4] [--views 20] [--photons 1e5] [--sampler dds]
    [--steps 20] [--threads 2]

FOLDER holds one DICOM series, of which evenly spaced slices are measured on their own grid and reconstructed at half
their pixels. PSNR is of all slices together (data range 2000 HU); evaluations are the denoiser's, of a slice.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from invdiff.config import build, find
from invdiff.datasets import Volume, read_volume
from invdiff.metrics import compare
from invdiff.pipelines.reconstruct import RunConfig, prior_of
from invdiff.pipelines.scans import operator_of
from invdiff.pipelines.simulate import Simulation, simulate
from invdiff.priors import Averaged
from invdiff.protocols import Prior
from invdiff.reconstruction import reconstruct
from invdiff.uncertainty import BestOf, Spread

DENSITY = 0.1  # noise level at which the prior's density is asked, prior units
DENSITY_COST = 16  # evaluations of log_density, with a gradient each
SHIFTS = ((1, 1),)


def spaced(volume: Volume, count: int) -> Volume:
    """``count`` slices of the middle half, evenly spaced; their own places in the world are lost."""
    s = volume.data.shape[0]
    index = torch.linspace(s / 4, 3 * s / 4, count + 2)[1:-1].long()
    return replace(volume, data=volume.data[index].clone())


def ways(
    run: Callable[..., Tensor], prior: Prior, steps: int, samples: int
) -> Iterator[tuple[str, int, Callable[[], Tensor]]]:
    """(name, evaluations a slice, how to make the image)."""
    yield "one seed", steps, lambda: run(prior)
    yield f"mean of {samples}", samples * steps, lambda: run(prior, samples=Spread(samples))
    yield f"best of {samples} by residual", samples * steps, lambda: run(prior, samples=BestOf(samples))
    both = BestOf(samples, density=DENSITY)
    yield (
        f"best of {samples} by residual and density",
        samples * (steps + DENSITY_COST),
        lambda: run(prior, samples=both),
    )
    yield "averaged flips", 2 * steps, lambda: run(Averaged(prior))
    yield "averaged flips and a shift", 4 * steps, lambda: run(Averaged(prior, (-1,), SHIFTS))


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--slices", type=int, default=4)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--views", type=int, default=20)
    parser.add_argument("--photons", type=float, default=1e5)
    parser.add_argument("--sampler", default="dds")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prior", default="ct")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    prior, _ = prior_of(options.prior, RunConfig())
    kind = find("samplers", options.sampler)
    uncoupled = {"lam": 0.0} if options.sampler == "dds" else {}  # slices are not neighbours
    sampler = build(kind, {"steps": options.steps, **uncoupled}, options.sampler)
    scan, truth = simulate(
        spaced(read_volume(options.data), options.slices), Simulation(views=options.views, photons=options.photons)
    )
    operator, y, sigma_y = operator_of(scan)

    def run(used: Prior, **more: Any) -> Tensor:
        return reconstruct(y, operator, used, sampler, sigma_y, **more).x

    print("| | evaluations a slice | PSNR, dB |\n|---|---|---|")
    for name, cost, make in ways(run, prior, options.steps, options.samples):
        print(f"| {name} | {cost} | {compare(make(), truth.data, 'HU').psnr:.2f} |", flush=True)


if __name__ == "__main__":
    main()
