"""What learning from measurements alone needs, checked where it can be: each failure is one sentence.

Together the operators must see every direction of the image space, or nothing says what stands in it; grids must be the
same, noise comparable and below the smallest noise level; a scan needs views to split (see ``Example``).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from invdiff.linalg import lanczos
from invdiff.measured.examples import Example
from invdiff.noise import KeyedNoise
from invdiff.priors.model import PriorInfo

LOOKED_AT = 48  # examples whose operators are probed, about
STEP = -4  # of the keyed noise that probes them
LANCZOS_STEPS = 30  # of the quadrature of their spectrum
UNSEEN = 0.01  # of the mean eigenvalue of the mean of A^H A: a direction that is seen less than this is hardly seen
NOISE_RATIO = 10.0  # largest over smallest noise of a collection, prior units: thin and thick bodies differ fourfold


def check_grids(examples: Sequence[Example]) -> None:
    """Refuse examples whose images differ in shape, or none.

    Raises:
        ValueError: with both shapes.
    """
    if not examples:
        raise ValueError("there are no scans to train on; at least one is wanted")
    first = examples[0]
    for other in examples:
        ours, theirs = (tuple(e.operator.domain.shape[1:]) for e in (first, other))
        if ours != theirs:
            raise ValueError(
                f"{first.source} is for images of {ours} and {other.source} of {theirs} (c h w); one grid is wanted"
            )


def check_noise(examples: Sequence[Example], info: PriorInfo) -> None:
    """Refuse noise above the smallest noise level, or of another size in one scan than in another.

    Raises:
        ValueError: with the noise that came.
    """
    low, high = (pick(examples, key=lambda e: e.sigma) for pick in (min, max))
    if high.sigma > NOISE_RATIO * low.sigma:
        raise ValueError(
            f"the noise of {high.source} is {high.sigma:.3g} and that of {low.source} {low.sigma:.3g} in prior units: "
            "scans whitened alike are wanted"
        )
    if high.sigma > info.sigma_min:
        raise ValueError(
            f"the noise of {high.source} is {high.sigma:.3g} in prior units and prior.sigma_min {info.sigma_min:.3g}; "
            "no smaller noise level than the scans' own is wanted"
        )


def check_coverage(examples: Sequence[Example], allowed: float) -> list[str]:
    """Refuse linear operators that together leave more of the image space unseen than ``allowed``; notes on the others.

    Raises:
        ValueError: with the share that is unseen.
    """
    linear = [e for e in examples if hasattr(e.operator, "normal")]
    if not linear:
        return ["the operator is not linear: whether the scans together see the whole image was not checked"]
    share = unseen(linear)
    if share > allowed:
        raise ValueError(
            f"{100 * share:.3g} % of the image space are seen by no scan (measured.unseen is {allowed:.3g}); "
            "views or lines that differ between scans and together cover it are wanted, for nothing teaches the rest"
        )
    return []


def unseen(examples: Sequence[Example]) -> float:
    """Share of the image space that the operators together do not see, or hardly.

    What a white image's reconstruction M (M + rho I)^-1 x misses of its variance: the mean of (rho / (m + rho))^2 over
    the eigenvalues m of M, the mean of A^H A over up to ``LOOKED_AT`` of the operators, rho being ``UNSEEN`` of their
    mean; by Lanczos quadrature. Projections from all sides miss a few percent, of the finest detail.
    """
    index = np.unique(np.linspace(0, len(examples) - 1, LOOKED_AT).round().astype(int))
    operators = [examples[int(k)].operator for k in index]
    like = torch.empty(operators[0].domain.shape, dtype=operators[0].domain.dtype, device=examples[0].y.device)

    def normal(v: Tensor) -> Tensor:
        return torch.stack([operator.normal(v) for operator in operators]).mean(0)

    nodes, weights = lanczos(normal, KeyedNoise()(STEP, like), LANCZOS_STEPS)
    mean = (weights * nodes).sum() / weights.sum()
    floor = UNSEEN * mean
    return float((weights * (floor / (nodes.clamp_min(0) + floor)).square()).sum() / weights.sum())
