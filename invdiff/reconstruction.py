"""``invdiff.reconstruct`` and ``invdiff.sample``: the whole way to images in the prior's unit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from invdiff.noise import KeyedNoise
from invdiff.priors.model import fast_dtype, load
from invdiff.priors.wrappers import Chunked
from invdiff.problem import Prepared, prepare, unconditional
from invdiff.protocols import Operator, Prior, Problem, Sampler, State
from invdiff.run import guarded, iterate, last, residual_norms
from invdiff.samplers.dds import DDS
from invdiff.samplers.discrepancy import measurements
from invdiff.samplers.dpmpp import DPMpp2M
from invdiff.samplers.solver import Solver
from invdiff.uncertainty import BestState, Gather, SeedsState, Spread, SpreadState, meaning, over_seeds
from invdiff.units import MU_WATER

Progress = Callable[[Iterator[Any]], Iterator[Any]]


class Result(NamedTuple):
    """x: the images (s c h w) in the prior's physical unit; record: what was run and how well y, if any, is matched.

    Where samples were summed up x is their mean, std their standard deviation, low and high their interval; else None.
    """

    x: Tensor
    record: dict[str, Any]
    std: Tensor | None = None
    low: Tensor | None = None
    high: Tensor | None = None


class _End(NamedTuple):
    """What a record is written of where many samples became one image."""

    i: int
    x: Tensor


def run_record(prepared: Prepared, sampler: Sampler[Any], state: State, seed: int) -> dict[str, Any]:
    """What was run: sampler, its fields and what its images are, prior, seed, steps and the images' unit."""
    info = getattr(prepared.problem.prior, "info", None)
    return {
        "sampler": {"kind": type(sampler).__name__, **asdict(sampler)},  # type: ignore[call-overload]
        "estimate": sampler.estimate,
        "prior": None if info is None else asdict(info),
        "seed": seed,
        "steps": state.i,
        "unit": prepared.unit,
    }


def record_of(prepared: Prepared, sampler: Sampler[Any], state: State, seed: int) -> dict[str, Any]:
    """What a result is: sampler and its fields, prior, seed, norm, noise and the residual's chi^2 per measurement."""
    problem = prepared.problem
    residual, count = residual_norms(problem, state.x), measurements(problem)
    return {
        **run_record(prepared, sampler, state, seed),
        "operator_norm": prepared.norm,
        "sigma_y_normalised": problem.sigma_y,
        "residual": (residual / problem.y.flatten(1).norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)).tolist(),
        "chi2": chi2_of(problem, residual, count),
    }


def chi2_of(problem: Problem, residual: Tensor, measured: tuple[Tensor, Tensor]) -> list[Any] | None:
    """Chi^2 per measurement of residual norms (... s), of what ``measurements`` found; None for noiseless data."""
    if problem.sigma_y == 0:
        return None
    count, idle = measured
    return ((residual.square() - idle).clamp_min(0) / count.clamp_min(1) / problem.sigma_y**2).tolist()


def gathered(prepared: Prepared, sampler: Sampler[Any], gather: Gather, end: SeedsState, seed: int) -> Result:
    """What a finished run over seeds says, in the prior's physical unit, with its record.

    Args:
        prepared: the problem that was run.
        sampler: what ran.
        gather: what became of the images.
        end: the last state of ``invdiff.uncertainty.over_seeds``.
        seed: of the first sample.
    """
    scale, to_physical, problem = prepared.to_physical.scale, prepared.to_physical, prepared.problem
    extra: dict[str, Any] = {"seeds": list(range(seed, seed + gather.count)), **asdict(gather)}
    extra["meaning"] = meaning(gather, sampler.estimate)
    extra["chi2"] = chi2_of(problem, end.residuals, measurements(problem))
    maps: dict[str, Tensor] = {}
    if isinstance(gather, Spread):
        x, std, low, high = gather.summary(SpreadState(**end.kept))
        maps = {"std": scale * std, "low": to_physical(low), "high": to_physical(high)}
        extra["interval"] = "rank" if gather.by_rank else "student"
    else:
        best = BestState(**end.kept)
        x = best.x
        extra |= {"chosen_seeds": (best.which + seed).tolist(), "score": best.score.tolist()}
    record = record_of(prepared, sampler, _End(end.i, x), seed)
    record["samples" if maps else "best"] = extra
    return Result(to_physical(x), record, **maps)


def reconstruct(
    y: Tensor,
    operator: Operator,
    prior: str | Prior = "ct",
    sampler: Sampler[Any] | None = None,
    sigma_y: float = 0.0,
    seed: int = 0,
    chunk: int | None = None,
    mu_water: float = MU_WATER,
    progress: Progress | None = None,
    samples: int | Gather | None = None,
) -> Result:
    """Reconstruct an image from measurements. Runs where ``y`` is.

    A prior given by name is put there too, its network in bfloat16 where that is native.

    Args:
        y: measurements, the shape of ``operator.range``, in physical units (line integrals for CT).
        operator: any ``invdiff.protocols.Operator`` on physical units (1/mm for CT).
        prior: a Prior, or the name or folder of one.
        sampler: default ``DDS()``.
        sigma_y: standard deviation of one real component of the noise; with ray weights give
            ``Whitened(operator, sqrt_w)``, ``sqrt_w * y`` and 1.
        seed: of all noise.
        chunk: slices denoised at once; all if None.
        mu_water: attenuation of water in 1/mm, for CT.
        progress: wraps the iterator of states, such as a progress bar.
        samples: run so many seeds, from ``seed`` up, and return their mean, standard deviation and 90 % interval:
            short for ``invdiff.uncertainty.Spread(samples)``; with ``BestOf(4)`` the best of four instead.

    Returns:
        ``x`` in the prior's unit (HU for ``ct``) and ``record``; with ``samples`` also ``std``, ``low``, ``high``.

    Raises:
        ValueError: anything that does not fit; the message says what came and what was wanted.
        invdiff.run.DivergedError: NaN or a residual that grew tenfold.
    """
    chosen = DDS() if sampler is None else sampler
    used = _prior_on(y.device, prior, chunk)
    prepared = prepare(y, operator, used, sigma_y, KeyedNoise(seed), mu_water)
    if samples is not None:
        gather = Spread(samples) if isinstance(samples, int) else samples
        states: Iterator[Any] = over_seeds(chosen, prepared.problem, gather)
        return gathered(prepared, chosen, gather, last(states if progress is None else progress(states)), seed)
    state = _run(prepared, chosen, progress)
    return Result(prepared.to_physical(state.x), record_of(prepared, chosen, state, seed))


def sample(
    prior: str | Prior = "ct",
    shape: tuple[int, int, int, int] = (4, 1, 256, 256),
    solver: Solver | None = None,
    seed: int = 0,
    chunk: int | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Result:
    """Draw images from the prior alone, without measurements.

    A prior given by name is put on ``device``, its network in bfloat16 where that is native. An image depends on the
    seed and its number among the slices alone (with a network, to its rounding): the first of 8 is the first of 4.

    Args:
        prior: a Prior, or the name or folder of one.
        shape: (s c h w): s images, the prior's channels.
        solver: default ``DPMpp2M()``.
        seed: of all noise.
        chunk: images denoised at once; all if None.
        device: where the images are drawn; a Prior that is given must be there.
        progress: wraps the iterator of states, such as a progress bar.

    Returns:
        ``x`` in the prior's unit (HU for ``ct``) and ``record``.

    Raises:
        ValueError: a shape that does not fit the prior, or a sampler that needs measurements.
        invdiff.run.DivergedError: NaN.
    """
    chosen = DPMpp2M() if solver is None else solver
    if not isinstance(chosen, Solver):
        raise ValueError(
            f"{type(chosen).__name__} reconstructs from measurements; a solver without them is wanted, such as DPMpp2M"
        )
    prepared = unconditional(tuple(shape), _prior_on(device, prior, chunk), KeyedNoise(seed), device)
    state = _run(prepared, chosen, progress)
    record = run_record(prepared, chosen, state, seed)
    return Result(prepared.to_physical(state.x), {**record, "evaluations": chosen.evaluations})


def _prior_on(device: torch.device | str, prior: str | Prior, chunk: int | None) -> Prior:
    used = load(prior).to(device, fast_dtype(device)) if isinstance(prior, str) else prior
    return used if chunk is None else Chunked(used, chunk)


def _run(prepared: Prepared, sampler: Sampler[Any], progress: Progress | None) -> Any:
    states: Iterator[Any] = guarded(iterate(sampler, prepared.problem), sampler, prepared.problem)
    return last(states if progress is None else progress(states))
