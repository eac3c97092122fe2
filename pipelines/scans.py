"""Scans as pipelines see them: read, made into an operator, cut to some slices, put at their place in the world."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from invdiff.datasets import Measurements, Volume, read_htc2022, read_measurements
from invdiff.datasets.read import is_raw
from invdiff.operators import Mask, Whitened
from invdiff.pipelines.budget import built, with_axes
from invdiff.pipelines.mri import MRIConfig, as_seen_by, way_of
from invdiff.pipelines.raw_mr import RawConfig, read_raw
from invdiff.priors import NoPrior
from invdiff.protocols import Prior
from invdiff.reconstruction import Result, reconstruct
from invdiff.units import MU_WATER

SLICED = {
    "mask": 3,
    "maps": 4,
    "trajectory": 3,
    "phase": 3,
    "azimuth": 2,
}  # axes of a field whose first one is the slice


def scan_of(path: Path, index: int = 0, raw: RawConfig | None = None) -> Measurements:
    """The scan that a file holds at ``index``: our own format, raw MR data of any that is read, or an HTC2022 ``.mat``.

    Args:
        path: of the file, or of a folder of BART's.
        index: which scan.
        raw: what is made of raw MR data, ``RawConfig()`` if None.

    Raises:
        ValueError: no such scan, a file that cannot be read, or ``raw`` for another format.
    """
    if path.suffix != ".mat" and is_raw(path):
        scans = [read_raw(path, raw)]
    elif raw is not None:
        raise ValueError(f"the table raw is for raw MR data; {path} is none")
    else:
        scans = [read_htc2022(path)] if path.suffix == ".mat" else read_measurements(path)
    if not 0 <= index < len(scans):
        raise ValueError(f"{path} holds {len(scans)} scans; index {index} is not among 0 to {len(scans) - 1}")
    return scans[index]


def as_volume(scan: Measurements, x: Tensor) -> Volume:
    """An image (s c h w), HU for CT, at the scan's place in the world, to be stored in its source's axis order."""
    unit = "HU" if scan.unit == "1/mm" else scan.unit
    return Volume(x.float(), scan.affine, unit, scan.storage, {"name": "reconstruction", "sha256": scan.source_sha256})


def operator_of(scan: Measurements, made: Any = None) -> tuple[Any, Tensor, float]:
    """The whitened operator of what was kept, the whitened y and its sigma_y, of a scan's description.

    Args:
        scan: its description.
        made: the operator of its kind and fields, where it is there already.

    Raises:
        ValueError: an unknown kind, fields it does not take, or a y that does not fit it.
    """
    operator = built(scan.kind, scan.fields) if made is None else made
    if tuple(scan.y.shape) != tuple(operator.range.shape):
        raise ValueError(
            f"the measurement has shape {tuple(scan.y.shape)}; its operator gives {tuple(operator.range.shape)}"
        )
    y = scan.y
    if scan.keep is not None:
        mask = Mask(with_axes(scan.keep, y.ndim), *operator.range)
        operator, y = mask @ operator, mask.forward(y)
    if scan.sqrt_w is None:
        return operator, y, float(scan.sigma_y or 0.0)
    return Whitened(operator, scan.sqrt_w), scan.sqrt_w * y, 1.0


def image_of(
    scan: Measurements, sampler: Any, prior: Prior | None = None, how: MRIConfig | None = None, seed: int = 0
) -> tuple[Volume, Tensor, Result]:
    """An MR scan reconstructed in memory, as ``invdiff reconstruct`` does it: magnitude, phase, all that is known.

    Args:
        scan: of complex images, such as from ``read_raw``.
        sampler: baseline or generative.
        prior: in a.u., such as ``load("brain-mr")``; None for baselines.
        how: channels and scale.
        seed: of all noise.

    Returns:
        The magnitude in the scanner's unit, the phase (s 1 h w) in radians, and the result as the sampler sees it.

    Raises:
        ValueError: a scan of real images, or parts that do not fit one another.
    """
    scan = as_seen_by(scan, sampler, how)
    operator, y, sigma_y = operator_of(scan)
    way = way_of(scan, operator, y, sampler, how, False)
    if way is None:
        raise ValueError(f"the scan of kind {scan.kind!r} is of real images; complex ones are wanted")
    whole = way.wrap(NoPrior() if prior is None else prior)
    result = reconstruct(y, way.operator, whole, sampler, sigma_y, seed)
    return as_volume(scan, way.magnitude(result.x)), way.angle(result.x), result


def notes_on(prior: Prior, volume: Volume) -> list[str]:
    """What a user should know of how the prior fits the scan."""
    low, high = prior.info.pixel_mm  # type: ignore[attr-defined]
    pixel = volume.spacing_mm[1]
    if not high or low <= pixel <= high:
        return []
    return [f"the pixels are {pixel:.3g} mm; the prior was trained on {low:.3g} to {high:.3g} mm"]


def baseline_slice(scan: Measurements, sampler: Any, index: int) -> Tensor:
    """One slice (h w) in HU by a prior-free baseline, on the CPU."""
    operator, y, sigma_y = operator_of(some_slices(scan, index))
    return reconstruct(y, operator, NoPrior(), sampler, sigma_y, mu_water=scan.mu_water or MU_WATER).x[0, 0]


def some_slices(scan: Measurements, index: int, count: int = 1) -> Measurements:
    """The scan of ``count`` slices from ``index`` on."""
    rows = slice(index, index + count)
    whole = [None if v is None else with_axes(v, scan.y.ndim) for v in (scan.sqrt_w, scan.keep)]
    weights, keep = (v if v is None or len(v) == 1 else v[rows] for v in whole)
    affine = scan.affine.copy()
    affine[:, 3] += index * affine[:, 2]
    fields = {k: _of_slices(k, v, rows, count) for k, v in scan.fields.items()}
    return replace(scan, y=scan.y[rows], sqrt_w=weights, fields=fields, affine=affine, keep=keep)


def _of_slices(key: str, value: Any, rows: slice, count: int) -> Any:
    """A field of an operator for some of its slices."""
    if key == "shape":
        return (count, *tuple(value)[1:])
    if key == "slices":
        return count
    return value[rows] if isinstance(value, Tensor) and value.ndim == SLICED.get(key) else value
