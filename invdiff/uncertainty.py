"""Many samples of one problem without keeping them: mean, deviation and exact intervals, or the best of them.

A central interval by rank needs the few least and greatest samples of every voxel, not all of them: for 90 % and N
samples about N / 20 at either end, so that ``Spread`` is exact in a tenth of the memory that the samples would take
(for up to 39 samples the two at each end). Estimates of quantiles in constant memory, such as P^2, are not exact and
are poorest in the tails, at the few dozen samples that one can pay for.

What is gathered is a NamedTuple of tensors and ints, as a sampler's state is: ``over_seeds`` goes on from its own state
bit-identically. Every slice is gathered for itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from invdiff.calibration import at_rank, fewest, lower_rank, student_reach
from invdiff.priors.density import log_density
from invdiff.protocols import Problem, Sampler
from invdiff.run import DivergedError, guarded, iterate, residual_norms

SIGMA_FLOOR = 1e-3  # smallest sigma_y assumed, prior units with ||A|| = 1: the samplers' own


class SpreadState(NamedTuple):
    """n: samples added; mean: of them; square: summed squared deviations from it (s c h w).

    low, high: the least and the greatest samples of every voxel in ascending order (k s c h w), k 0 for Student's.
    """

    n: int
    mean: Tensor
    square: Tensor
    low: Tensor
    high: Tensor


class Summary(NamedTuple):
    """mean, std: of the samples, n - 1 in the denominator; low, high: bounds of the interval (s c h w)."""

    mean: Tensor
    std: Tensor
    low: Tensor
    high: Tensor


@dataclass(frozen=True)
class Spread:
    """Mean, standard deviation and a central interval of every voxel over ``count`` samples.

    The interval holds a further draw with probability ``level``: so does it the truth, if the sampler's spread is the
    posterior's. By rank, for any distribution, where the samples are enough (19 for 90 %, 39 for 95 %); else Student's,
    which takes every voxel for Gaussian. The mean's own error is the deviation over the root of ``count``.

    Not for correlations between voxels: the bounds of a mean over a region are not the means of the bounds.

    Args:
        count: samples, at least 2.
        level: of the interval, in (0, 1).
    """

    count: int = 20
    level: float = 0.9

    def __post_init__(self) -> None:
        if self.count < 2:
            raise ValueError(f"{self.count} samples have no spread; 2 or more are wanted")
        fewest(self.level)

    @property
    def by_rank(self) -> bool:
        """Whether the samples are enough for an interval by rank."""
        return self.count >= fewest(self.level)

    @property
    def kept(self) -> int:
        """How many of the least and of the greatest samples of a voxel are kept."""
        return math.ceil(lower_rank(self.count, self.level) - 1e-9) if self.by_rank else 0

    def start(self, problem: Problem) -> SpreadState:
        """Nothing added yet."""
        shape, dtype = problem.operator.domain
        zero = torch.zeros(shape, dtype=dtype, device=problem.y.device)
        ends = zero.new_full((self.kept, *shape), math.inf)
        return SpreadState(0, zero, zero, ends, -ends)

    def add(self, problem: Problem, state: SpreadState, x: Tensor) -> SpreadState:  # noqa: ARG002
        """One more sample (s c h w): Welford's update (1962), and the ends."""
        n = state.n + 1
        apart = x - state.mean
        mean = state.mean + apart / n
        low, high = (torch.cat([ends, x[None]]).sort(0).values if self.kept else ends for ends in state[3:])
        return SpreadState(n, mean, state.square + apart * (x - mean), low[: self.kept], high[-self.kept :])

    def summary(self, state: SpreadState) -> Summary:
        """Of all ``count`` samples.

        Raises:
            ValueError: samples are still missing.
        """
        if state.n != self.count:
            raise ValueError(f"{state.n} samples were added; {self.count} are wanted")
        std = (state.square / (self.count - 1)).sqrt()
        if not self.by_rank:
            reach = student_reach(self.count, self.level) * std
            return Summary(state.mean, std, state.mean - reach, state.mean + reach)
        rank = lower_rank(self.count, self.level)
        return Summary(state.mean, std, at_rank(state.low, rank), at_rank(state.high, self.kept + 1 - rank))


class BestState(NamedTuple):
    """n: samples seen; x: the best of them (s c h w); score: less is better (s); which: their numbers, from 0 (s)."""

    n: int
    x: Tensor
    score: Tensor
    which: Tensor


@dataclass(frozen=True)
class BestOf:
    """The best of ``count`` samples, slice by slice: the least ||A x - y||^2 / 2 sigma_y^2 - ln p(x; density).

    The residual alone tells a start that went astray from one that did not. Among good ones it favours those that fit
    the noise; the prior's log density speaks against them, at 16 denoiser evaluations and gradients a sample.

    Not for an estimate of the mean: the mean of the same samples has a smaller error, unless some have gone astray.

    Args:
        count: samples, at least 1.
        density: noise level, prior units, at which the prior's log density is added; 0 leaves it out.
        whole: choose all slices from one sample; wanted where the sampler couples slices.
    """

    count: int = 4
    density: float = 0.0
    whole: bool = False

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"the best of {self.count} samples is none; 1 or more are wanted")
        if not (math.isfinite(self.density) and self.density >= 0):
            raise ValueError(f"the density's noise level is {self.density}; 0 or a positive number is wanted")

    def start(self, problem: Problem) -> BestState:
        """Nothing seen yet."""
        shape, dtype = problem.operator.domain
        x = torch.zeros(shape, dtype=dtype, device=problem.y.device)
        none = x.new_full(shape[:1], math.inf)
        return BestState(0, x, none, torch.zeros_like(none, dtype=torch.int64))

    def add(self, problem: Problem, state: BestState, x: Tensor) -> BestState:
        """One more sample (s c h w), which takes the place of what is worse."""
        score = self.score(problem, x)
        better = score.sum() < state.score.sum() if self.whole else score < state.score
        better = better.expand(score.shape)
        return BestState(
            state.n + 1,
            torch.where(better.view(-1, *[1] * (x.ndim - 1)), x, state.x),
            torch.where(better, score, state.score),
            torch.where(better, torch.full_like(state.which, state.n), state.which),
        )

    def score(self, problem: Problem, x: Tensor) -> Tensor:
        """Minus the log posterior of each slice up to a constant, (s): less is better."""
        score = residual_norms(problem, x).square() / (2 * max(problem.sigma_y, SIGMA_FLOOR) ** 2)
        if self.density == 0:
            return score
        level = torch.tensor(self.density, device=x.device)
        # A slice at a time: a gradient through the prior keeps all that it computed
        return score - torch.cat([log_density(problem.prior, one, level) for one in x.split(1)])


Gather = Spread | BestOf
_SPREAD_OF = {
    "posterior sampler": "exact posteriors say that this sampler's spread is the posterior's",
    "approximate sampler": "this sampler's spread is near the posterior's in form, and not proven to be it",
    "point estimate": "the sampler is a point estimate: its spread over seeds is its own noise, not the posterior's, "
    "and says nothing of how sure one can be",
    "prior sampler": "the sampler ignores the measurements: the spread is the prior's",
}


def meaning(gather: Gather, estimate: str) -> list[str]:
    """Plain sentences on what was gathered from samples of a sampler's ``estimate``, for records.

    Args:
        gather: what became of the images.
        estimate: of the sampler.
    """
    if isinstance(gather, BestOf):
        what = "slices of one sample" if gather.whole else "each slice of the sample that is best there"
        by = "the residual and the prior's density" if gather.density else "the residual"
        return [f"the best of {gather.count} by {by}, {what}"]
    said = [_SPREAD_OF.get(estimate, f"the sampler is a {estimate}")]
    if not gather.by_rank:
        said.append(
            f"the {gather.level:.0%} interval is Student's and takes every voxel for Gaussian: {gather.count} samples "
            f"are too few for one by rank, which wants {fewest(gather.level)}"
        )
    return said


class SeedsState(NamedTuple):
    """Where a run over seeds is: tensors, ints and tables of them, so that it can be stored.

    i: steps done, over all samples; done: samples gathered; current: fields of the sampler's state in the sample that
    is running, empty between two; kept: fields of what is gathered; residuals: ||A x - y|| of each sample (done s).
    """

    i: int
    done: int
    current: dict[str, Any]
    kept: dict[str, Any]
    residuals: Tensor


def over_seeds(
    sampler: Sampler[Any], problem: Problem, gather: Gather, state: SeedsState | None = None
) -> Iterator[SeedsState]:
    """Run the seeds ``seed, seed + 1, ...`` one after the other and gather their images; yields after every step.

    Sample k is bit for bit what the sampler gives with the noise of seed + k alone.

    Args:
        sampler: any.
        problem: its noise is ``KeyedNoise`` of the first seed.
        gather: what becomes of the images.
        state: where to go on; from the start if None.

    Raises:
        DivergedError: NaN or a growing residual, with the seed.
    """
    if state is None:
        state = SeedsState(0, 0, {}, gather.start(problem)._asdict(), problem.y.new_zeros(0, len(problem.y)).abs())
        yield state
    noise: Any = problem.noise
    while state.done < gather.count:
        seed = noise.seed + state.done
        one = problem._replace(noise=replace(noise, seed=seed))
        try:
            for reached in _one_sample(sampler, one, gather, state):
                state = reached
                yield reached
        except DivergedError as error:
            raise DivergedError(f"{error}, in the sample of seed {seed}") from error


def _one_sample(sampler: Sampler[Any], problem: Problem, gather: Gather, state: SeedsState) -> Iterator[SeedsState]:
    """The steps of the next sample, or of the rest of it; with the last it is gathered."""
    begun, first = None, state.i
    if state.current:
        begun = get_type_hints(type(sampler).init)["return"](**state.current)
        first -= begun.i
    for inner in guarded(iterate(sampler, problem, begun), sampler, problem):
        if inner.i == sampler.steps:
            residuals = torch.cat([state.residuals, residual_norms(problem, inner.x)[None]])
            yield SeedsState(
                first + inner.i, state.done + 1, {}, _added(problem, gather, state.kept, inner.x), residuals
            )
        elif inner.i:
            yield state._replace(i=first + inner.i, current=inner._asdict())


def _added(problem: Problem, gather: Gather, kept: dict[str, Any], x: Tensor) -> dict[str, Any]:
    """The fields of what is gathered, with one more image."""
    if isinstance(gather, Spread):
        return gather.add(problem, SpreadState(**kept), x)._asdict()
    return gather.add(problem, BestState(**kept), x)._asdict()
