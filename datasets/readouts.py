"""From single readouts, as scanners store them, to k-space on a grid: what ISMRMRD and Siemens twix have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from invdiff.datasets.kspace import KSpace, middle
from invdiff.datasets.orientation import Affine
from invdiff.fourier import centred_ifft

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])
_EVEN = 0.01  # slices are evenly spaced to this part of their mean distance
_STRAIGHT = 1e-3  # parallel slices: largest difference of a direction's components


class Place(NamedTuple):
    """Where a slice (or a slab) lies: its centre in mm and unit vectors along readout, lines and slices, all LPS."""

    centre: NDArray[np.float64]
    read: NDArray[np.float64]
    phase: NDArray[np.float64]
    normal: NDArray[np.float64]


class Readout(NamedTuple):
    """One line: complex64 (coil n), its counters, the sample at k = 0, and the frame (echo, phase, repetition, set)."""

    data: NDArray[np.complex64]
    slice: int
    line: int
    partition: int
    centre: int
    frame: tuple[int, ...]
    place: Place


@dataclass(frozen=True)
class Encoding:
    """What the header says about the grid.

    Args:
        matrix: samples (readout, line, partition); raised to what the lines need.
        fov_mm: field of view of those samples (readout, line, partition); the last is the slice's thickness in 2D.
        recon: pixels (readout, line) of the scanner's image on the same spacing, its oversampling cut away.
        centres: counters of the line and the partition at k = 0.
    """

    matrix: tuple[int, int, int]
    fov_mm: tuple[float, float, float]
    recon: tuple[int, int] | None
    centres: tuple[int, int]


def assemble(
    lines: Sequence[Readout],
    calibration: Sequence[Readout],
    noise: Tensor | None,
    encoding: Encoding,
    source: Mapping[str, Any],
    frame: int = 0,
) -> KSpace:
    """Lines on the grid: rows are phase-encoded lines, columns the readout; averages are averaged.

    3D: Fourier transformed along the readout (orthonormal, oversampling cut away), whose pixels become the slices; rows
    are then lines and columns partitions.

    Args:
        lines: of the image. The frame number ``frame`` (echo, cardiac phase, repetition, set, in that order) is taken.
        calibration: lines of a separate calibration scan; may be empty.
        noise: (coil n).
        encoding: of the lines.
        source: of the result; the number of frames is added.
        frame: which frame.

    Raises:
        ValueError: no line, no such frame, coils or samples that differ, slices that are not parallel or evenly
            spaced, anything that ``KSpace`` refuses.
    """
    name = source["name"]
    frames = sorted({line.frame for line in lines})
    if not 0 <= frame < len(frames):
        raise ValueError(f"{name} holds {len(frames)} frames of imaging lines; there is no frame {frame}")
    chosen = [line for line in lines if line.frame == frames[frame]]
    coils = {line.data.shape[0] for line in [*chosen, *calibration]}
    if len(coils) > 1:
        raise ValueError(f"{name} has lines of {sorted(coils)} coils; one number is wanted")
    order, step = _slices(name, chosen, encoding.fov_mm[2])
    size = _needed(chosen, encoding.centres, encoding.matrix)
    data, counts = _grid(chosen, order, size, encoding.centres)
    acs = _calibration(name, calibration, order, encoding) if calibration else None
    facts = {**source, "frames": len(frames), "averages": int(counts.max())}
    # pixels of the encoded field of view; more samples than the header says mean smaller pixels, not a larger view
    pixel = np.array(encoding.fov_mm) / size
    recon = _recon(encoding, size)
    where = next(line.place for line in chosen if line.slice == order[0])
    if size[2] > 1:
        return _slab(data, counts, acs, noise, pixel, recon, where, facts, name, len(order))
    affine = _affine(
        where.centre, (where.read * pixel[0], where.phase * pixel[1], step), (size[0] // 2, size[1] // 2, 0)
    )
    mask = torch.from_numpy(counts[:, 0] > 0)
    return KSpace(
        data=torch.from_numpy(data[:, :, 0]),
        mask=mask[0] if bool((mask == mask[:1]).all()) else mask,
        affine=affine,
        noise=noise,
        calibration=None if acs is None else torch.from_numpy(acs[:, :, 0]),
        crop=None if recon is None else (recon[1], recon[0]),
        readout="w",
        source=facts,
    )


def _calibration(name: str, lines: Sequence[Readout], order: list[int], encoding: Encoding) -> NDArray[np.complex64]:
    """The first frame of a separate calibration scan on the smallest grid that holds it."""
    missing = set(order) - {line.slice for line in lines}
    if missing:
        raise ValueError(f"{name}: the calibration scan lacks {len(missing)} of {len(order)} slices")
    first = min(line.frame for line in lines)
    used = [line for line in lines if line.frame == first]
    return _grid(used, order, _needed(used, encoding.centres, (1, 1, 1)), encoding.centres)[0]


def _slab(
    data: NDArray[np.complex64],
    counts: NDArray[np.int64],
    acs: NDArray[np.complex64] | None,
    noise: Tensor | None,
    pixel: NDArray[np.float64],
    recon: tuple[int, int] | None,
    where: Place,
    facts: Mapping[str, Any],
    name: str,
    slabs: int,
) -> KSpace:
    """3D: from (1 coil partition line readout) to slices along the readout, rows lines, columns partitions."""
    if slabs > 1:
        raise ValueError(f"{name} holds {slabs} slabs of a 3D scan; one is wanted")
    sampled = (counts[0] > 0).any(-1)  # partition, line
    x, size = data.shape[4], data.shape[4] if recon is None else min(recon[0], data.shape[4])

    def sliced(grid: NDArray[np.complex64], pixels: int) -> Tensor:
        image = middle(centred_ifft(torch.from_numpy(grid[0]), (3,)), 3, pixels)
        return image.permute(3, 0, 2, 1).contiguous()

    axes = (where.normal * pixel[2], where.phase * pixel[1], where.read * pixel[0])
    calibration = None
    if acs is not None:  # its readout may be shorter: the missing outer samples are zeros
        wide = np.zeros((*acs.shape[:4], x), np.complex64)
        start = x // 2 - acs.shape[4] // 2
        wide[..., start : start + acs.shape[4]] = acs
        calibration = sliced(wide, size)
    mask = torch.from_numpy(np.ascontiguousarray(sampled.T))
    return KSpace(
        data=sliced(data, size) * mask,
        mask=mask,
        affine=_affine(where.centre, axes, (data.shape[2] // 2, data.shape[3] // 2, size // 2)),
        noise=noise,
        calibration=calibration,
        source=facts,
    )


def in_plane_affine(
    lines: Sequence[Readout],
    pixel: tuple[float, float, float],
    middle_pixel: tuple[int, int],
    source: Mapping[str, Any],
) -> tuple[Affine, list[int]]:
    """The affine of slices of lines, and the slices' numbers in the order of their positions.

    Args:
        lines: of one frame.
        pixel: mm along readout, lines and slices; the last only where there is one slice.
        middle_pixel: (column, row) of the slices' centre.
        source: its name stands in messages.

    Raises:
        ValueError: slices that are not parallel or evenly spaced.
    """
    order, step = _slices(source["name"], lines, pixel[2])
    where = next(line.place for line in lines if line.slice == order[0])
    return _affine(where.centre, (where.read * pixel[0], where.phase * pixel[1], step), (*middle_pixel, 0)), order


def _slices(name: str, lines: Sequence[Readout], thickness: float) -> tuple[list[int], NDArray[np.float64]]:
    """The slices' numbers in the order of their positions, and the step from one to the next in LPS mm."""
    places = {line.slice: line.place for line in lines}
    normal = next(iter(places.values())).normal
    for place in places.values():
        tilt = max(np.abs(np.subtract(place[1:], next(iter(places.values()))[1:])).ravel())
        if tilt > _STRAIGHT:
            raise ValueError(f"{name} holds slices that are not parallel (directions differ by {tilt:.2g})")
    order = sorted(places, key=lambda n: float(places[n].centre @ normal))
    if len(order) == 1:
        return order, normal * thickness
    steps = np.diff([places[n].centre for n in order], axis=0)
    step = steps.mean(0)
    uneven = float(np.abs(steps - step).max())
    if uneven > _EVEN * float(np.linalg.norm(step)) or not step.any():
        raise ValueError(f"{name} holds {len(order)} slices that are not evenly spaced ({uneven:.2g} mm off)")
    return order, step


def needed_size(before: int, after: int) -> int:
    """The smallest n with ``before`` samples below index n // 2 and ``after`` from there on."""
    return max(2 * before, 2 * after - 1, 1)


def _needed(lines: Sequence[Readout], centres: tuple[int, int], least: tuple[int, int, int]) -> tuple[int, int, int]:
    """The grid (readout, line, partition) that holds the lines."""
    spans = (
        [(line.centre, line.data.shape[1] - line.centre) for line in lines],
        [(centres[0] - line.line, line.line - centres[0] + 1) for line in lines],
        [(centres[1] - line.partition, line.partition - centres[1] + 1) for line in lines],
    )
    sizes = [max(n, *(needed_size(*pair) for pair in span)) for span, n in zip(spans, least, strict=True)]
    return sizes[0], sizes[1], sizes[2]


def _grid(
    lines: Sequence[Readout], order: list[int], size: tuple[int, int, int], centres: tuple[int, int]
) -> tuple[NDArray[np.complex64], NDArray[np.int64]]:
    """The mean of all lines at each place (s coil partition line readout), and how many there were, without coils."""
    x, y, z = size
    coils = lines[0].data.shape[0]
    data = np.zeros((len(order), coils, z, y, x), np.complex64)
    counts = np.zeros((len(order), z, y, x), np.int64)
    index = {number: at for at, number in enumerate(order)}
    for line in lines:
        if line.slice not in index:
            continue
        at = index[line.slice]
        k, j = line.partition - centres[1] + z // 2, line.line - centres[0] + y // 2
        first = x // 2 - line.centre
        last = first + line.data.shape[1]
        data[at, :, k, j, first:last] += line.data
        counts[at, k, j, first:last] += 1
    data /= np.maximum(counts, 1)[:, None]
    return data, counts


def _recon(encoding: Encoding, size: tuple[int, int, int]) -> tuple[int, int] | None:
    """The scanner's image, where it is not finer or larger than what was measured."""
    if encoding.recon is None:
        return None
    return min(encoding.recon[0], size[0]), min(encoding.recon[1], size[1])


def _affine(
    centre: NDArray[np.float64],
    steps: tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]],
    index: tuple[int, int, int],
) -> Affine:
    """4 x 4 to RAS of axes with the given steps in LPS, ``centre`` at voxel ``index``."""
    affine = np.eye(4)
    affine[:3, :3] = LPS_TO_RAS @ np.stack(steps, axis=1)
    affine[:3, 3] = LPS_TO_RAS @ centre - affine[:3, :3] @ np.array(index)
    return affine
