"""``invdiff plan``: what a reconstruction will take in memory and time, before it takes it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any

import torch

from invdiff.datasets import Measurements
from invdiff.noise import KeyedNoise
from invdiff.pipelines.budget import GB, Budget
from invdiff.pipelines.devices import device_of
from invdiff.pipelines.memory import held_bytes
from invdiff.pipelines.mri import as_seen_by
from invdiff.pipelines.reconstruct import Job, home_of, prior_for, prior_of, way_of_job, within_memory
from invdiff.pipelines.scans import operator_of, scan_of, some_slices
from invdiff.priors import NoPrior
from invdiff.problem import prepare
from invdiff.protocols import Prior
from invdiff.run import guarded, iterate
from invdiff.units import MU_WATER

TIMED = 3  # steps that are timed, after one that is not


@dataclass(frozen=True)
class Plan:
    """What a run will take.

    Args:
        budget: memory by parts.
        held: bytes that the process holds without them: libraries, weights, the measurements as read.
        steps: of the sampler.
        seconds: of all of them.
        notes: what a user should know.
    """

    budget: Budget
    held: int
    steps: int
    seconds: float
    notes: list[str]

    @property
    def peak(self) -> int:
        """Bytes of the process at most, where the volume is."""
        return self.held + self.budget.bytes

    def lines(self) -> list[str]:
        """For a reader."""
        b = self.budget
        parts = {
            "libraries, weights and measurements": self.held,
            "projector": b.projector,
            "volume: measurements, state and what a step needs": b.volume.peak * b.slices * b.spread,
            f"network, {min(b.chunk, b.slices)} slices at once": b.activations,
        }
        work = f"{self.steps} steps of {b.slices} slices"
        return [
            f"peak memory {self.peak / GB:.3g} GB, time {self.seconds:.3g} s for {work}",
            *(f"  {name}: {size / GB:.3g} GB" for name, size in parts.items()),
            *(f"note: {note}" for note in self.notes),
        ]


def run(job: Job) -> Plan:
    """Plan a job; writes nothing.

    Raises:
        ValueError: input that does not fit, or a run that does not fit into the free memory.
    """
    scan = as_seen_by(scan_of(job.scan, job.index, job.raw), job.sampler, job.mri)
    prior, _ = prior_of(prior_for(job.prior, scan), job.run)
    prior, budget, notes = within_memory(scan, job, prior, way_of_job(scan, job))
    held = held_bytes(home_of(job.run))
    seconds = seconds_of(job, scan, prior, budget)
    runs = 1 if job.gather is None else job.gather.count
    return Plan(budget, held, runs * job.sampler.steps, runs * seconds, notes)


def seconds_of(job: Job, scan: Measurements, prior: Prior, budget: Budget) -> float:
    """Seconds of a whole run, from a few steps of one chunk of its slices.

    The first steps are the dearest where CG ends early at low noise: the run may be faster than this.
    """
    count = min(budget.slices, budget.chunk if not isinstance(prior, NoPrior) else budget.slices)
    few = some_slices(scan, 0, count)
    (operator, y, sigma_y), way = operator_of(few), way_of_job(few, job)
    if way is not None:
        operator, prior = way.operator, way.wrap(prior)
    home, device = home_of(job.run), device_of(job.run.device)
    mu_water = scan.mu_water or MU_WATER
    problem: Any = prepare(y.to(home), operator, prior, sigma_y, KeyedNoise(job.run.seed), mu_water).problem
    moments = []
    states = guarded(iterate(job.sampler, problem), job.sampler, problem)
    began = time.monotonic()
    for _ in islice(states, 2 + TIMED):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        moments.append(time.monotonic())
    first = moments[0] - began
    gaps = [b - a for a, b in pairwise(moments)]
    step = min(gaps[1:] or gaps)  # what else the machine does meanwhile is not the run's
    return (first + job.sampler.steps * step) * budget.slices / count
