"""How well samples know what they do not know: intervals, coverage, CRPS, and the bars of the exact test bench.

Samples have shape (k ...), k independent draws; everything is per pixel over them.

Intervals count one draw more. An interval between the q and 1 - q quantiles of few samples, taken as if these were the
posterior's, covers too little: 16 samples and 90 % in name are 79 % in truth. If truth and samples are exchangeable,
the truth falls below the j-th smallest of k samples with probability j / (k + 1), whatever the distribution: so
``rank_interval`` reads its bounds at the ranks (k + 1) (1 -+ level) / 2. That is exact where they are whole numbers
(k = 39, 79, 119, ... for 50, 80, 90 and 95 %); between two it interpolates and covers up to about 1 % too much. With
fewer than 2 / (1 - level) - 1 samples no two of them lie that far out: ``student_interval`` then assumes a Gaussian and
is exact for one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from invdiff.posterior import Posterior

LEVELS = (0.5, 0.8, 0.9, 0.95)
MOST_BIAS = 0.3  # bar: error of the mean beyond the Monte-Carlo floor, posterior standard deviations
RATIO = (0.9, 1.1)  # bar: standard deviation over the posterior's
COVERAGE_90 = (0.85, 0.95)  # bar


def rank_interval(samples: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """Bounds (...) that hold a further draw with probability ``level``, by rank: for any distribution.

    Args:
        samples: (k ...), at least 2 / (1 - level) - 1.
        level: in (0, 1).

    Raises:
        ValueError: a level outside (0, 1), or too few samples for it.
    """
    k = len(samples)
    below = lower_rank(k, level)
    ordered = samples.sort(0).values
    return at_rank(ordered, below), at_rank(ordered, k + 1 - below)


def lower_rank(count: int, level: float) -> float:
    """The rank, from 1, at which ``rank_interval`` reads its lower bound; the upper one is as far from the other end.

    Raises:
        ValueError: a level outside (0, 1), or too few samples for it.
    """
    below = _tail(level) * (count + 1)
    if below < 1 - 1e-9:
        raise ValueError(
            f"{count} samples for an interval of {level:.0%}; {fewest(level)} or more are wanted, or Student's"
        )
    return below


def fewest(level: float) -> int:
    """The least number of samples for which ``rank_interval`` has ranks.

    Raises:
        ValueError: a level outside (0, 1).
    """
    return math.ceil(1 / _tail(level) - 1 - 1e-9)


def at_rank(ordered: Tensor, rank: float) -> Tensor:
    """The sample of a rank from 1 to k, interpolated between the two next to it: (k ...), ascending -> (...)."""
    whole = min(max(math.floor(rank + 1e-9), 1), len(ordered))
    upper = min(whole, len(ordered) - 1)
    return torch.lerp(ordered[whole - 1], ordered[upper], max(0.0, rank - whole))


def student_interval(samples: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """Bounds (...) that hold a further draw with probability ``level`` if all are Gaussian: mean -+ t s sqrt(1 + 1/k).

    Args:
        samples: (k ...), at least 2.
        level: in (0, 1).

    Raises:
        ValueError: a level outside (0, 1), or fewer than 2 samples.
    """
    reach = student_reach(len(samples), level) * samples.std(0)
    return samples.mean(0) - reach, samples.mean(0) + reach


def student_reach(count: int, level: float) -> float:
    """t sqrt(1 + 1/k): how many of their standard deviations ``student_interval`` reaches to either side.

    Raises:
        ValueError: a level outside (0, 1), or fewer than 2 samples.
    """
    from scipy.special import stdtrit

    tail = _tail(level)
    if count < 2:
        raise ValueError(f"{count} samples for an interval; 2 or more are wanted")
    return float(stdtrit(count - 1, 1 - tail)) * math.sqrt(1 + 1 / count)


def covered(interval: tuple[Tensor, Tensor], truth: Tensor) -> float:
    """Share of the pixels whose truth lies in its interval."""
    low, high = interval
    return float(((truth >= low) & (truth <= high)).double().mean())


def crps(samples: Tensor, truth: Tensor) -> Tensor:
    """Continuous ranked probability score of each pixel, (...): 0 is best, in the unit of the image.

    The fair one (Ferro 2014, eq. 6), mean|x_i - truth| - sum_ij |x_i - x_j| / (2 k (k - 1)): its expectation does not
    depend on the number of samples. For one sample it is the absolute error.

    Args:
        samples: (k ...).
        truth: (...).
    """
    return (samples - truth).abs().mean(0) - half_difference(samples)


def half_difference(samples: Tensor) -> Tensor:
    """Unbiased E|X - X'| / 2 of each pixel from (k ...), by the sorted samples; 0 for one sample."""
    k = len(samples)
    if k == 1:
        return torch.zeros_like(samples[0])
    ranks = torch.arange(1 - k, k, 2, dtype=samples.dtype, device=samples.device)
    return torch.tensordot(ranks, samples.sort(0).values, 1) / (k * (k - 1))


class Calibration(NamedTuple):
    """How near samples are to an exact posterior, over all pixels (and cases).

    error: RMS error of the samples' mean, in posterior standard deviations. bias: that without what so many samples
    would be off by chance (sqrt of the mean of error^2 - own variance / k), in the same unit. floor: 1 / sqrt(k), the
    error that exact samples have. ratio: RMS standard deviation over the posterior's. ratio_median: median over pixels
    of the ratio. coverage: posterior probability of the samples' rank intervals at LEVELS. crps: expected under
    the posterior, in the image's unit. crps_ratio: that over the least possible: 1 is best.
    """

    error: float
    bias: float
    floor: float
    ratio: float
    ratio_median: float
    coverage: tuple[float, ...]
    crps: float
    crps_ratio: float

    def missed(self) -> list[str]:
        """The bars that these samples miss, in words; none if they are a posterior sampler's."""
        at_90 = self.coverage[LEVELS.index(0.9)]
        checks = {
            f"mean off by {self.bias:.2f} std": self.bias <= MOST_BIAS,
            f"std ratio {self.ratio:.2f}": RATIO[0] <= self.ratio <= RATIO[1],
            f"90 % coverage {at_90:.3f}": COVERAGE_90[0] <= at_90 <= COVERAGE_90[1],
        }
        return [text for text, good in checks.items() if not good]


def calibrate(samples: Sequence[Tensor], posteriors: Sequence[Posterior]) -> Calibration:
    """Hold samples to the exact posteriors of one or more cases, pooled.

    Coverage and CRPS are expectations over the posterior in closed form, not counts of one truth: many times less
    noisy.

    Args:
        samples: of each case (k c h w), k at least 39.
        posteriors: of each case.

    Raises:
        ValueError: samples that are too few or not as many cases as posteriors.
    """
    parts = [_compared(x.double(), p) for x, p in zip(samples, posteriors, strict=True)]
    joined = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
    mean = {name: float(v.mean()) for name, v in joined.items()}
    k = len(samples[0])
    ratios = (joined["variance"] / joined["exact variance"]).sqrt()
    return Calibration(
        error=math.sqrt(mean["square"]),
        bias=math.sqrt(max(0.0, mean["square"] - float(ratios.square().mean()) / k)),
        floor=1 / math.sqrt(k),
        ratio=math.sqrt(mean["variance"] / mean["exact variance"]),
        ratio_median=float(ratios.median()),
        coverage=tuple(mean[f"coverage {level}"] for level in LEVELS),
        crps=mean["crps"],
        crps_ratio=mean["crps"] / mean["least crps"],
    )


def _compared(x: Tensor, posterior: Posterior) -> dict[str, Tensor]:
    """What ``calibrate`` pools, per pixel (c h w)."""
    out = {
        "square": ((x.mean(0) - posterior.mean) / posterior.deviation).square(),
        "variance": x.var(0),
        "exact variance": posterior.deviation.square(),
        "crps": posterior.distance(x).mean(0) - half_difference(x),
        "least crps": posterior.spread(),
    }
    for level in LEVELS:
        low, high = rank_interval(x, level)
        out[f"coverage {level}"] = posterior.cdf(high) - posterior.cdf(low)
    return out


def _tail(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; a number between 0 and 1 is wanted")
    return (1 - level) / 2
