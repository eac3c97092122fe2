"""Which samples of the Cartesian grid are kept: masks (h w), bool, zero frequency at index n // 2.

Line masks choose lines that are read along ``readout`` ("h": columns are chosen; "w": rows). The acceleration is the
number of samples of the full grid for each one kept, the fully sampled centre (ACS) included. The same seed gives the
same mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from invdiff.operators.mri.trajectories import GOLDEN_ANGLE

CLOSE = 0.02  # relative difference from the wanted acceleration at which a search stops
SEARCH = 20  # bisections
STEP = 0.5  # between the points of a drawn curve, in samples


def acceleration(mask: Tensor) -> float:
    """Samples of the grid for each one that ``mask`` keeps.

    Raises:
        ValueError: it keeps none.
    """
    kept = int((mask != 0).sum())
    if kept == 0:
        raise ValueError("the mask keeps nothing; at least one sample is wanted")
    return mask.numel() / kept


def uniform_mask(shape: Sequence[int], step: int, centre_fraction: float = 0.0, readout: str = "h") -> Tensor:
    """Every ``step``-th line, the one of zero frequency among them, and the centre: the lattice of GRAPPA and SENSE.

    The centre comes on top, so that the acceleration is less than ``step``.

    Args:
        shape: (h w).
        step: 1 or more, lines from one to the next.
        centre_fraction: share of the lines, in the middle, that are all kept.
        readout: axis along which lines are read.

    Raises:
        ValueError: a shape, step, fraction or axis that makes no sense.
    """
    lines = _lines(shape, readout)
    if not (isinstance(step, int) and 1 <= step <= lines):
        raise ValueError(f"step is {step}; a whole number from 1 to {lines} is wanted")
    kept = _centre(lines, centre_fraction) | ((torch.arange(lines) - lines // 2) % step == 0)
    return _as_mask(kept, shape, readout)


def random_mask(
    shape: Sequence[int], acceleration: float, centre_fraction: float = 0.08, seed: int = 0, readout: str = "h"
) -> Tensor:
    """The centre and, outside it, lines drawn evenly at random without replacement.

    As fastMRI's random mask (Zbontar et al. 2018), which tosses a coin for each line; here the number of lines is
    exact, and so is the acceleration, to half a line.

    Args:
        shape: (h w).
        acceleration: 1 or more.
        centre_fraction: share of the lines, in the middle, that are all kept.
        seed: of the draw.
        readout: axis along which lines are read.

    Raises:
        ValueError: an acceleration below 1, or one that leaves fewer lines than the centre has or none at all.
    """
    lines = _lines(shape, readout)
    kept = _centre(lines, centre_fraction)
    more = round(_outside(lines, acceleration, kept))
    free = (~kept).nonzero().flatten()
    kept[free[torch.randperm(len(free), generator=_generator(seed))[:more]]] = True
    return _as_mask(kept, shape, readout)


def equispaced_mask(
    shape: Sequence[int], acceleration: float, centre_fraction: float = 0.08, seed: int = 0, readout: str = "h"
) -> Tensor:
    """The centre and lines at an even, not always whole, spacing from a random offset.

    As fastMRI's equispaced mask with adjusted acceleration: of N lines with N_c in the centre, lines stand
    (N - N_c) / (N / acceleration - N_c) apart, so that all together are N / acceleration.

    Args:
        shape: (h w).
        acceleration: 1 or more.
        centre_fraction: share of the lines, in the middle, that are all kept.
        seed: of the offset.
        readout: axis along which lines are read.

    Raises:
        ValueError: an acceleration below 1, or one that leaves fewer lines than the centre has or none at all.
    """
    lines = _lines(shape, readout)
    kept = _centre(lines, centre_fraction)
    more = _outside(lines, acceleration, kept)
    if more >= 0.5:
        spacing = int((~kept).sum()) / more
        offset = int(torch.randint(max(1, round(spacing)), (), generator=_generator(seed)))
        kept[torch.arange(offset, lines - 0.5, spacing, dtype=torch.float64).round().long()] = True
    return _as_mask(kept, shape, readout)


def partial_fourier_mask(shape: Sequence[int], fraction: float, readout: str = "h", from_end: bool = False) -> Tensor:
    """The first ``fraction`` of the lines, so that one half of k-space is whole; combine with another mask by ``&``.

    Args:
        shape: (h w).
        fraction: of the lines, more than 0.5 and at most 1; 5/8 to 7/8 are usual.
        readout: axis along which lines are read.
        from_end: the last ones instead.

    Raises:
        ValueError: a fraction that does not reach beyond the middle, or above 1.
    """
    lines = _lines(shape, readout)
    if not 0.5 < fraction <= 1:
        raise ValueError(f"fraction is {fraction}; more than 0.5 and at most 1 is wanted")
    kept = torch.arange(lines) < max(math.ceil(fraction * lines), lines // 2 + 1)
    return _as_mask(kept.flip(0) if from_end else kept, shape, readout)


def poisson_mask(
    shape: Sequence[int], acceleration: float, centre_fraction: float = 0.08, seed: int = 0, elliptical: bool = True
) -> Tensor:
    """Variable-density Poisson disc (Vasanawala et al. 2011): points no nearer than a distance that grows outwards.

    Both axes are phase-encoded. Points are taken in random order, each if no earlier one is nearer than its own
    distance, which is proportional to that from the centre; the factor is found by bisection.

    Args:
        shape: (h w).
        acceleration: 1 or more, reached to 2 % where the grid is large enough for that.
        centre_fraction: side of the fully sampled middle, as a share of each axis.
        seed: of the order.
        elliptical: leave out the corners.

    Raises:
        ValueError: an acceleration below 1, or one that the centre, or the ellipse without the corners, cannot have.
    """
    h, w = _size(shape)
    goal = h * w / _at_least_one(acceleration)
    centre = torch.outer(_centre(h, centre_fraction), _centre(w, centre_fraction))
    y, x = torch.arange(h)[:, None] - h // 2, torch.arange(w) - w // 2
    radius = torch.hypot(y / (h / 2), x / (w / 2))
    allowed = (radius <= 1) | centre if elliptical else torch.ones(h, w, dtype=torch.bool)
    _feasible(goal, int(centre.sum()), int(allowed.sum()), acceleration)
    order = torch.randperm(h * w, generator=_generator(seed))
    order = order[allowed.flatten()[order]]

    def draw(slope: float) -> Tensor:
        return _discs(order.numpy(), (slope * radius).numpy()) | centre

    return _search(draw, goal, float(max(h, w)))


def radial_mask(shape: Sequence[int], acceleration: float, seed: int = 0) -> Tensor:
    """Golden-angle spokes on the grid, each sample moved to the nearest point; as many as come nearest.

    Args:
        shape: (h w).
        acceleration: 1 or more.
        seed: of the first spoke's angle.

    Raises:
        ValueError: an acceleration below 1, or one that a single spoke exceeds.
    """
    h, w = _size(shape)
    goal = h * w / _at_least_one(acceleration)
    first = math.pi * float(torch.rand((), generator=_generator(seed), dtype=torch.float64))
    along = torch.arange(-max(h, w) / 2, max(h, w) / 2, STEP, dtype=torch.float64) / max(h, w)
    kept = torch.zeros(h, w, dtype=torch.bool)
    number, before = 0, kept
    while int(kept.sum()) < goal and number < 4 * (h + w):
        angle, before, number = first + number * GOLDEN_ANGLE, kept, number + 1
        kept = before | _drawn(along * math.sin(angle), along * math.cos(angle), (h, w))
    if number == 1 and int(kept.sum()) > 1.5 * goal:
        raise ValueError(f"acceleration is {acceleration}; one spoke keeps {int(kept.sum())} samples of {h * w}")
    nearer = number > 1 and goal - int(before.sum()) < int(kept.sum()) - goal
    return before if nearer else kept


def spiral_mask(shape: Sequence[int], acceleration: float, seed: int = 0, interleaves: int = 1) -> Tensor:
    """Archimedean spirals on the grid, each sample moved to the nearest point; the corners stay empty.

    Args:
        shape: (h w).
        acceleration: at least 4 / pi, which is the whole ellipse.
        seed: of the angle at which the first one starts.
        interleaves: how many spirals.

    Raises:
        ValueError: an acceleration that is less, or fewer than 1 interleaf.
    """
    h, w = _size(shape)
    goal = h * w / _at_least_one(acceleration)
    if interleaves < 1:
        raise ValueError(f"interleaves is {interleaves}; at least 1 is wanted")
    first = 2 * math.pi * float(torch.rand((), generator=_generator(seed), dtype=torch.float64))
    start = first + 2 * math.pi * torch.arange(interleaves, dtype=torch.float64)[:, None] / interleaves

    def draw(apart: float) -> Tensor:
        turns = max(h, w) / 2 / interleaves / apart
        share = torch.arange(0, 1, STEP / (math.pi * turns * max(h, w) + 1), dtype=torch.float64)
        angle = start + 2 * math.pi * turns * share
        return _drawn((0.5 * share * angle.sin()).flatten(), (0.5 * share * angle.cos()).flatten(), (h, w))

    _feasible(goal, 1, int(draw(0.5).sum()), acceleration)
    return _search(lambda extra: draw(0.5 + extra), goal, float(max(h, w)))


def _search(draw: Callable[[float], Tensor], goal: float, most: float) -> Tensor:
    """The mask nearest to ``goal`` samples among draws that keep fewer as their argument grows from 0 to ``most``."""
    low, high, best = 0.0, most, draw(0.0)
    for _ in range(SEARCH):
        if abs(int(best.sum()) - goal) <= CLOSE * goal:
            break
        middle = (low + high) / 2
        mask = draw(middle)
        low, high = (middle, high) if int(mask.sum()) > goal else (low, middle)
        best = min(best, mask, key=lambda m: abs(int(m.sum()) - goal))
    return best


def _discs(order: np.ndarray, radius: np.ndarray) -> Tensor:
    """Points in ``order`` of which none has an earlier one within that one's own radius."""
    h, w = radius.shape
    edge = int(radius.max()) + 1
    closed, kept = np.zeros((h + 2 * edge, w + 2 * edge), bool), np.zeros((h, w), bool)
    discs: dict[int, np.ndarray] = {}
    for i, j in zip(*(v.tolist() for v in np.divmod(order, w)), strict=True):
        if closed[i + edge, j + edge]:
            continue
        kept[i, j] = True
        square = math.ceil(radius[i, j] ** 2)  # squared distances are whole: those below radius^2 are below this
        if square <= 1:
            continue
        n = math.isqrt(square - 1)
        if square not in discs:
            side = np.arange(-n, n + 1) ** 2
            discs[square] = side[:, None] + side < square
        closed[i + edge - n : i + edge + n + 1, j + edge - n : j + edge + n + 1] |= discs[square]
    return torch.from_numpy(kept)


def _drawn(rows: Tensor, columns: Tensor, size: tuple[int, int]) -> Tensor:
    """A curve in cycles per pixel as the grid's points nearest to it."""
    h, w = size
    i, j = (rows * h + h // 2).round().long(), (columns * w + w // 2).round().long()
    inside = (i >= 0) & (i < h) & (j >= 0) & (j < w)
    mask = torch.zeros(h, w, dtype=torch.bool)
    mask[i[inside], j[inside]] = True
    return mask


def _size(shape: Sequence[int]) -> tuple[int, int]:
    if len(shape) != 2 or min(shape) < 2:
        raise ValueError(f"shape is {tuple(shape)}; (h w), each at least 2, is wanted")
    return shape[0], shape[1]


def _lines(shape: Sequence[int], readout: str) -> int:
    h, w = _size(shape)
    if readout not in ("h", "w"):
        raise ValueError(f"readout is {readout!r}; 'h' or 'w' is wanted")
    return w if readout == "h" else h


def _as_mask(kept: Tensor, shape: Sequence[int], readout: str) -> Tensor:
    lines = kept if readout == "h" else kept[:, None]
    return lines.expand(*shape).clone()


def _centre(lines: int, fraction: float) -> Tensor:
    """The middle ``fraction`` of the lines, rounded to whole ones, about index n // 2: as fastMRI places it."""
    if not 0 <= fraction < 1:
        raise ValueError(f"centre_fraction is {fraction}; at least 0 and less than 1 is wanted")
    count = round(lines * fraction)
    first = (lines - count + 1) // 2
    index = torch.arange(lines)
    return (index >= first) & (index < first + count)


def _at_least_one(acceleration: float) -> float:
    if not (1 <= acceleration < math.inf):
        raise ValueError(f"acceleration is {acceleration}; a finite number from 1 up is wanted")
    return acceleration


def _outside(lines: int, acceleration: float, centre: Tensor) -> float:
    """How many lines are to be kept outside the centre."""
    goal, inside = lines / _at_least_one(acceleration), int(centre.sum())
    if round(goal) < max(1, inside):
        raise ValueError(
            f"acceleration {acceleration} keeps {goal:.3g} of {lines} lines and the centre alone has {inside}; "
            "at least one line, and no fewer than the centre, is wanted"
        )
    return max(0.0, goal - inside)


def _feasible(goal: float, least: int, most: int, acceleration: float) -> None:
    if not least * (1 - CLOSE) <= goal <= most * (1 + CLOSE):
        raise ValueError(
            f"acceleration {acceleration} keeps {goal:.4g} samples; from {least} (the centre) to {most} are possible"
        )


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
