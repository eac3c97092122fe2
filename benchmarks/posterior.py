"""Every sampler against exact posteriors: means, spreads, intervals.

python benchmarks/posterior.py --out RESULTS [--only SAMPLER ...] [--threads 1]     runs what is missing
python benchmarks/posterior.py --out RESULTS --table                                prints the tables

Tasks: inpainting, sparse-view CT, multi-coil MRI and blur of 12 x 14 images. Priors, in closed form: a Gaussian process
whose mean is a picture, and a mixture of three such that these measurements hardly tell apart. Noise: white, and for CT
also the Poisson noise of few photons, whitened by ray weights. Three truths a cell, 79 samples of each, all slices of
one problem; what they are held to: ``invdiff.posterior`` and ``invdiff.calibration``.

Samplers: all that are registered and see the measurements, with their defaults or SETTINGS, which turn off what couples
slices: these are samples here, not neighbours. A sampler says what it claims in its class (``estimate``); the bars are
for "posterior sampler". ``exact`` draws from the closed form: the control. ``prior`` does not look at the data: it
covers what it says all the same, so that coverage alone proves nothing. Evaluations are calls of the
denoiser; gradients through it are not counted, seconds have them.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from invdiff.calibration import COVERAGE_90, LEVELS, MOST_BIAS, RATIO, Calibration, calibrate
from invdiff.config import find, registered
from invdiff.files import whole_file
from invdiff.noise import KeyedNoise
from invdiff.operators import (
    Blur,
    CartesianMRI,
    Gaussian,
    LinearOperatorBase,
    Mask,
    ParallelBeam,
    RealChannels,
    TransmissionPoisson,
    Whitened,
    gaussian_kernel,
)
from invdiff.posterior import Posterior, exact_posteriors
from invdiff.priors import GaussianMixturePrior, GaussianPrior
from invdiff.problem import prepare
from invdiff.protocols import Prior
from invdiff.run import DivergedError, guarded, iterate, last
from invdiff.samplers import DDS, TV, DiffusionMBIR
from invdiff.samplers.solver import Solver

H, W = 12, 14
TRUTHS = 3
SAMPLES = 79  # of each: makes the ranks of all intervals whole numbers
MEAN, DEVIATION, LENGTH = 0.2, 0.3, 1.5  # of the priors, prior units and pixels
APART, SMOOTHER, WEIGHTS = 3.0, 1.1, (0.4, 0.4, 0.2)  # of the mixture's parts: posterior deviations, lengths, weights
VIEWS, COILS, KEPT, ACCELERATION = 5, 4, 0.4, 3
PIXEL_MM, PHOTONS = 0.5, 100.0  # mm; a ray; line integrals are about 2
TRUTH_SEED, MEASURE_SEED, SEED, CONTROL_SEED = 5, 6, 7, 8
POINT, CLAIM = "point estimate", "posterior sampler"
CONTROLS = ("exact", "prior")
SETTINGS: dict[str, Any] = {
    "dds": DDS(lam=0.0),
    "tv": TV(lam_z=0.0),
    # Published: 2000 steps. No penalty across slices; its step length stays joint
    "diffusionmbir": DiffusionMBIR(steps=100, rho=1e-12, lam=0.0),
}


@dataclass(frozen=True)
class Task:
    """A problem's physics: ``operator(slices)`` on images of ``channels``, and its noise models."""

    channels: int
    operator: Callable[[int], LinearOperatorBase]
    noises: dict[str, Gaussian | TransmissionPoisson]


class Case(NamedTuple):
    """One cell's problem, TRUTHS * SAMPLES slices, and what is known of it."""

    operator: LinearOperatorBase
    y: Tensor
    sigma_y: float
    prior: GaussianPrior | GaussianMixturePrior
    posteriors: list[Posterior]


def inpainting(slices: int) -> LinearOperatorBase:
    """KEPT of the pixels, at random."""
    return Mask(torch.rand(H, W, generator=torch.Generator().manual_seed(1)) < KEPT, (slices, 1, H, W))


def sparse_ct(slices: int) -> LinearOperatorBase:
    """VIEWS parallel views over half a turn."""
    angles = [0.1 + k * math.pi / VIEWS for k in range(VIEWS)]
    return ParallelBeam((slices, 1, H, W), angles, pixel_mm=PIXEL_MM)


def multicoil_mri(slices: int) -> LinearOperatorBase:
    """Every ACCELERATION-th line and the middle two, by COILS smooth coils round the image."""
    mask = torch.zeros(H, W)
    mask[:, ::ACCELERATION] = 1
    mask[:, W // 2 - 1 : W // 2 + 1] = 1
    row, column = torch.meshgrid(torch.linspace(-1, 1, H), torch.linspace(-1, 1, W), indexing="ij")
    turns = torch.arange(COILS) * 2 * math.pi / COILS
    away = [(row - 1.2 * t.sin()).square() + (column - 1.2 * t.cos()).square() for t in turns]
    maps = torch.stack([torch.polar(torch.exp(-a / 2), row + t) for a, t in zip(away, turns, strict=True)])
    return CartesianMRI(mask, maps, slices) @ RealChannels((slices, 1, H, W))


def blur(slices: int) -> LinearOperatorBase:
    """A Gaussian of 1.5 pixels; nothing outside the image."""
    return Blur(gaussian_kernel(1.5), (slices, 1, H, W))


TASKS = {
    "inpainting": Task(1, inpainting, {"white": Gaussian(0.1)}),
    "sparse CT": Task(1, sparse_ct, {"white": Gaussian(0.2), "Poisson": TransmissionPoisson(PHOTONS)}),
    "multi-coil MRI": Task(2, multicoil_mri, {"white": Gaussian(0.1)}),
    "blur": Task(1, blur, {"white": Gaussian(0.05)}),
}


def process(task: Task, length: float = LENGTH, shift: Tensor | float = 0.0) -> GaussianPrior:
    """A Gaussian process whose mean is a bump, the second channel half as high, plus ``shift``."""
    row, column = torch.meshgrid(torch.linspace(-1, 1, H), torch.linspace(-1, 1, W), indexing="ij")
    height = 1 / torch.arange(1, task.channels + 1)[:, None, None]
    bump = MEAN * height * (1 + torch.exp(-2 * (row.square() + column.square())))
    return GaussianPrior.smooth((task.channels, H, W), length, DEVIATION, bump + shift)


def mixture(task: Task) -> GaussianMixturePrior:
    """The process moved either way along what its posterior (white noise) knows least, and a smoother one unmoved."""
    white, A, single = task.noises["white"], task.operator(1), process(task)
    y = torch.zeros(A.range.shape, dtype=A.range.dtype)  # any: the covariance does not depend on it
    values, vectors = torch.linalg.eigh(exact_posteriors(y, A, single, white.sigma_y)[0].covariance)
    shift = (APART * values[-1].sqrt() * vectors[:, -1]).view(single.mean.shape).float()
    parts = [process(task, shift=shift), process(task, shift=-shift), process(task, SMOOTHER * LENGTH)]
    return GaussianMixturePrior(parts, WEIGHTS)


PRIORS: dict[str, Callable[[Task], GaussianPrior | GaussianMixturePrior]] = {"process": process, "mixture": mixture}


class Counted:
    """The same prior, which counts its calls."""

    def __init__(self, prior: Prior) -> None:
        self.prior, self.channels, self.calls = prior, prior.channels, 0

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """As the prior's."""
        self.calls += 1
        return self.prior.denoise(x, sigma)


def build(task: str, prior_name: str, noise: str, truths: int = TRUTHS, samples: int = SAMPLES) -> Case:
    """Measure ``truths`` draws of the prior once and repeat each measurement for ``samples`` slices."""
    kind = TASKS[task]
    prior, model = PRIORS[prior_name](kind), kind.noises[noise]
    few = kind.operator(truths)
    y, sqrt_w = model.sample(few(prior.draw(truths, KeyedNoise(TRUTH_SEED))), KeyedNoise(MEASURE_SEED))
    many = kind.operator(truths * samples)
    if sqrt_w is not None:
        few, y = Whitened(few, sqrt_w), sqrt_w * y
        many = Whitened(many, sqrt_w.repeat_interleave(samples, 0))
    posteriors = exact_posteriors(y, few, prior, model.sigma_y)
    return Case(many, y.repeat_interleave(samples, 0), model.sigma_y, prior, posteriors)


def draw(sampler: Any, case: Case) -> tuple[list[Tensor], int]:
    """(each truth's samples (k c h w), denoiser evaluations of a sample); the names in CONTROLS need no sampler.

    Raises:
        DivergedError, ValueError: the sampler's own.
    """
    truths, k = len(case.posteriors), len(case.y) // len(case.posteriors)
    if sampler == "exact":
        return [p.draw(k, KeyedNoise(CONTROL_SEED, j * k)) for j, p in enumerate(case.posteriors)], 0
    if sampler == "prior":
        return list(case.prior.draw(truths * k, KeyedNoise(CONTROL_SEED)).split(k)), 0
    counted = Counted(case.prior)
    problem = prepare(case.y, case.operator, counted, case.sigma_y, KeyedNoise(SEED)).problem
    x = last(guarded(iterate(sampler, problem), sampler, problem)).x
    return list(x.split(k)), counted.calls


def candidates() -> dict[str, Any]:
    """The controls and every registered sampler that sees measurements, as it is run here."""
    kinds = {name: find("samplers", name) for name in registered("samplers")}
    seeing = {name: kind for name, kind in kinds.items() if not issubclass(kind, Solver)}
    return {**{c: c for c in CONTROLS}, **{name: SETTINGS.get(name) or kind() for name, kind in seeing.items()}}


def cell(name: str, task: str, prior: str, noise: str) -> dict[str, Any]:
    """One cell's record."""
    sampler, case = candidates()[name], build(task, prior, noise)
    record: dict[str, Any] = {"sampler": name, "task": task, "prior": prior, "noise": noise, "fields": repr(sampler)}
    record["estimate"] = {"exact": CLAIM, "prior": "the prior"}.get(name, getattr(sampler, "estimate", ""))
    began = time.perf_counter()
    try:
        samples, record["evaluations"] = draw(sampler, case)
    except (DivergedError, ValueError) as error:
        return {**record, "failed": str(error)}
    seconds = time.perf_counter() - began
    return {**record, "seconds": seconds, "calibration": calibrate(samples, case.posteriors)._asdict()}


def run(out: Path, only: list[str]) -> None:
    """Run every cell that has no JSON yet."""
    out.mkdir(parents=True, exist_ok=True)
    for name in only:
        for task, kind in TASKS.items():
            for prior in PRIORS:
                for noise in kind.noises:
                    path = out / f"{name}--{task}--{prior}--{noise}.json".replace(" ", "_")
                    if path.exists():
                        continue
                    record = cell(name, task, prior, noise)
                    with whole_file(path) as part:
                        part.write_text(json.dumps(record, indent=1))
                    print(row(record), flush=True)


HEAD = ["sampler", "says", "task", "prior", "noise", "mean error", "beyond chance", "std ratio", "its median"]
HEAD += [f"{100 * level:.0f} %" for level in LEVELS] + ["CRPS", "over the least", "evaluations", "seconds", "bars"]
SHORT = ["sampler", "says", "bias mean", "worst", "ratio mean", "worst", "90 % mean", "worst", "CRPS over the least"]
SHORT += ["worst", "evaluations", "seconds", "cells within the bars"]


def row(record: dict[str, Any]) -> str:
    """One line of the full table; of a point estimate the mean error alone."""
    first = [record[k] for k in ("sampler", "estimate", "task", "prior", "noise")]
    if "failed" in record:
        return line([*first, record["failed"], *[""] * (len(HEAD) - len(first) - 1)])
    c = Calibration(**record["calibration"])
    cost = [str(record["evaluations"]), f"{record['seconds']:.1f}"]
    if record["estimate"] == POINT:
        return line([*first, f"{c.error:.2f}", f"{c.bias:.2f}", *[""] * 8, *cost, POINT])
    cells = [f"{c.error:.2f}", f"{c.bias:.2f}", f"{c.ratio:.2f}", f"{c.ratio_median:.2f}"]
    cells += [f"{100 * v:.0f}" for v in c.coverage] + [f"{c.crps:.4f}", f"{c.crps_ratio:.2f}"]
    return line([*first, *cells, *cost, ", ".join(c.missed()) or "all"])


def summary(records: list[dict[str, Any]]) -> str:
    """One sampler's line of the short table, over its cells."""
    done = [r for r in records if "failed" not in r]
    first = [records[0]["sampler"], records[0]["estimate"] or "(nothing)"]
    if not done:
        return line([*first, *[""] * (len(SHORT) - 3), f"failed in all {len(records)}"])
    cs = [Calibration(**r["calibration"]) for r in done]
    cost = [f"{max(r['evaluations'] for r in done)}", f"{sum(r['seconds'] for r in done) / len(done):.1f}"]
    cells = _mean_and_worst([c.bias for c in cs], 0.0)
    if records[0]["estimate"] == POINT:
        return line([*first, *cells, *[""] * 6, *cost, POINT])
    cells += _mean_and_worst([c.ratio for c in cs], 1.0)
    cells += _mean_and_worst([c.coverage[LEVELS.index(0.9)] for c in cs], 0.9)
    cells += _mean_and_worst([c.crps_ratio for c in cs], 1.0)
    return line([*first, *cells, *cost, f"{sum(not c.missed() for c in cs)} of {len(records)}"])


def _mean_and_worst(values: list[float], ideal: float) -> list[str]:
    return [f"{sum(values) / len(values):.2f}", f"{max(values, key=lambda v: abs(v - ideal)):.2f}"]


def line(cells: list[str]) -> str:
    """A row in Markdown."""
    return "| " + " | ".join(cells) + " |"


def table(out: Path) -> None:
    """Print both tables."""
    by_sampler: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(out.glob("*.json")):
        record = json.loads(path.read_text())
        by_sampler.setdefault(record["sampler"], []).append(record)
    order = sorted(by_sampler, key=lambda name: (name not in CONTROLS, name))
    for head, lines in (
        (SHORT, [summary(by_sampler[name]) for name in order]),
        (HEAD, [row(record) for name in order for record in by_sampler[name]]),
    ):
        print("\n".join(["", line(head), "|" + "---|" * len(head), *lines]))
    low, high = COVERAGE_90
    print(
        f"\nExact samples' mean error is {1 / math.sqrt(SAMPLES):.2f}. Bars: mean off by at most {MOST_BIAS} std "
        f"beyond chance, std ratio {RATIO[0]}-{RATIO[1]}, 90 % coverage {low}-{high}. CRPS over the least: 1 is exact. "
        f"Seconds: {TRUTHS * SAMPLES} samples."
    )


def main() -> None:
    """Run or print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", default=list(candidates()), choices=list(candidates()))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.table:
        table(options.out)
    else:
        run(options.out, options.only)


if __name__ == "__main__":
    main()
