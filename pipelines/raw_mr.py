"""From a scanner's raw k-space to measurements: white noise of known size, coil maps, and what was done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from invdiff.config import build, with_overrides
from invdiff.datasets import KSpace, Measurements, Volume, read_kspace, without_oversampling, write_measurements
from invdiff.datasets.kspace import middle
from invdiff.fourier import centred_fft
from invdiff.operators import CartesianMRI, NonCartesianMRI
from invdiff.operators.mri.calibration import (
    EDGE,
    compression,
    edge_noise,
    find_acs,
    mixed,
    noise_covariance,
    prewhitening,
    root_sum_of_squares,
)
from invdiff.operators.mri.espirit import espirit_maps
from invdiff.pipelines.mri import UNIT, MRSimulation, mask_of
from invdiff.pipelines.output import check_writable, write_volume

NOISES = ("auto", "scan", "edge", "none")
LEAST = 8  # calibration lines: of fewer ESPIRiT's maps have holes, see ``kernel_for``
SAMPLES_A_COIL = 10  # of noise: a covariance of fewer makes its coils look whiter than they are
SAME_VIEW = 0.01  # fields of view that differ by less are one


@dataclass(frozen=True)
class RawConfig:
    """What is made of raw k-space before it is reconstructed.

    Args:
        frame: which echo, cardiac phase, repetition or set.
        noise: whose covariance whitens the coils: ``scan``, the file's noise scan; ``edge``, the outermost samples of
            k-space; ``auto``, the scan where there is one; ``none``, no whitening, and noise that counts as zero.
        compress: virtual coils that are kept, by energy; 0 keeps all as they are.
        calibration: another raw file of the same coils, slices and field of view whose centre gives the coil maps.
        acceleration: grid samples to one that is kept of a fully sampled scan; 1 keeps it whole.
        mask: for it, uniform, random, equispaced, poisson or radial; lines run along the readout.
        centre: share of the lines in the fully sampled centre.
        seed: of the mask.
    """

    frame: int = 0
    noise: str = "auto"
    compress: int = 0
    calibration: str = ""
    acceleration: float = 1.0
    mask: str = "equispaced"
    centre: float = 0.08
    seed: int = 0

    def __post_init__(self) -> None:
        if self.noise not in NOISES:
            raise ValueError(f"raw.noise is {self.noise!r}; one of {', '.join(NOISES)} is wanted")
        if self.compress < 0 or self.frame < 0:
            raise ValueError(f"raw.compress is {self.compress}, raw.frame {self.frame}; at least 0 is wanted")
        _ = self.undersampling

    @property
    def undersampling(self) -> MRSimulation:
        """The mask, as a simulation has it; ValueError where there is none such."""
        return MRSimulation(self.acceleration, mask=self.mask, centre=self.centre, seed=self.seed)


def read_raw(path: str | Path, how: RawConfig | None = None) -> Measurements:
    """``measurements_of`` what ``read_kspace`` reads.

    Raises:
        ValueError: what the reader or ``measurements_of`` refuses.
    """
    how = RawConfig() if how is None else how
    return measurements_of(read_kspace(path, how.frame), how)


def measurements_of(kspace: KSpace, how: RawConfig | None = None) -> Measurements:
    """k-space without readout oversampling, in coils of white noise, with coil maps and the operator that it is of.

    The noise of all coils is brought to the same ``sigma_y``, the median of what it was, so that k-space and image keep
    the scanner's unit. ``history`` says what was done.

    Args:
        kspace: as read.
        how: ``RawConfig()`` if None.

    Raises:
        ValueError: no samples of noise, too few calibration lines for maps, retrospective undersampling of what is not
            fully sampled, or settings that do not fit the scan.
    """
    how = RawConfig() if how is None else how
    cut = without_oversampling(kspace)
    prescan = _prescan(cut, how.calibration) if how.calibration else cut.calibration
    coils = cut.data.shape[1]
    matrix, sigma, noise = _whitening(cut, how.noise)
    used = undersampled(cut, how) if how.acceleration > 1 else cut
    if how.compress:
        if how.compress > coils:
            raise ValueError(f"{cut.name} has {coils} coils; raw.compress is {how.compress}, at most {coils} is wanted")
        matrix = compression(mixed(used.data, matrix), how.compress) @ matrix
    used = replace(used, data=mixed(used.data, matrix), noise=None, calibration=None)
    maps, origin = _maps(used, None if prescan is None else mixed(prescan, matrix))
    operator = _operator(used, maps)
    history = {
        "raw": dict(kspace.source),
        "samples": {"read": list(kspace.data.shape), "kept": list(cut.data.shape)},
        "noise": {**noise, "sigma_y": sigma},
        "coils": {"measured": coils, "virtual": matrix.shape[0]},
        "maps": origin,
    }
    if how.acceleration > 1:
        kept = float(operator.fields()["mask"].float().mean())
        names = ("acceleration", "mask", "centre", "seed")
        history["undersampled"] = {**{k: getattr(how, k) for k in names}, "share": kept}
    return Measurements(
        y=used.data,
        kind=operator.kind,
        fields=operator.fields(),
        affine=used.affine,
        unit=UNIT,
        sigma_y=sigma,
        source_sha256=str(kspace.source.get("sha256", "")),
        storage=used.storage,
        history=history,
    )


def convert(path: Path, out: Path, overrides: Sequence[str]) -> str:
    """Write a measurement file, or where ``out`` is no .h5 the image of ``rss_of``; what to tell the user.

    Raises:
        ValueError: input that does not fit, an override of another table, or a path that cannot be written.
    """
    document = with_overrides({}, overrides)
    other = [table for table in document if table != "raw"]
    if other:
        raise ValueError(f"no table {other[0]!r} here; raw is wanted")
    how = build(RawConfig, document.get("raw", {}), "raw")
    if out.suffix not in (".h5", ".hdf5"):
        check_writable(out)
        if how != RawConfig(frame=how.frame):
            raise ValueError(f"{out} will hold the root of sum of squares, which takes raw.frame alone; .h5 takes all")
        volume = rss_of(read_kspace(path, how.frame))
        write_volume(out, volume)
        s, _, h, w = volume.data.shape
        return f"{out}: root of the sum of squares, {s} slices of {h} x {w} pixels of {volume.spacing_mm[1]:.3g} mm"
    scan = read_raw(path, how)
    write_measurements(out, [scan])
    shape = " x ".join(map(str, scan.y.shape))
    maps = scan.history["maps"]["from"]
    return f"{out}: {scan.kind}, k-space {shape}, noise {scan.sigma_y:.3g}, coil maps from {maps}"


def rss_of(kspace: KSpace) -> Volume:
    """The root of the coils' sum of squares (s 1 h w), cut to ``crop``: what a scan looks like without any method.

    Off the grid the samples are gridded. The unit is the scanner's; unlike SENSE images it is shaded by the coils.
    """
    cut = without_oversampling(kspace)
    data = cut.data if cut.mask is not None else _gridded(cut)
    image, affine = root_sum_of_squares(data), cut.affine.copy()
    for dim, size in zip((-2, -1), cut.crop or (), strict=False):
        n = image.shape[dim]
        image = middle(image, dim, min(size, n))
        affine[:3, 3] += max(n // 2 - size // 2, 0) * affine[:3, -1 - dim]
    source = {"name": "root sum of squares", "sha256": str(cut.source.get("sha256", ""))}
    return Volume(image, affine, UNIT, cut.storage, source)


def undersampled(kspace: KSpace, how: RawConfig) -> KSpace:
    """A fully sampled scan with the lines that the mask of ``how`` keeps.

    Raises:
        ValueError: k-space off the grid, or with gaps already.
    """
    if kspace.mask is None:
        raise ValueError(f"{kspace.name} is not on a grid; raw.acceleration is for k-space that is, 1 is wanted")
    if _has_gaps(kspace.mask):
        share = 100 * float(kspace.mask.float().mean())
        raise ValueError(
            f"{kspace.name} samples {share:.3g} % of its grid with gaps; raw.acceleration={how.acceleration:g} is for "
            "fully sampled scans, 1 is wanted"
        )
    h, w = kspace.image_shape
    lying = kspace.readout == "w"  # a mask's lines run along h
    kept = mask_of(how.undersampling, (w, h)).T if lying else mask_of(how.undersampling, (h, w))
    mask = kspace.mask & kept
    return replace(kspace, data=kspace.data * mask.unsqueeze(-3), mask=mask)


def _has_gaps(mask: Tensor) -> bool:
    """Whether any row or column of (... h w) is sampled, then not, then again."""
    for dim in (-2, -1):
        starts = torch.diff(mask.int(), dim=dim, prepend=torch.zeros_like(mask.narrow(dim, 0, 1)).int()) > 0
        if bool((starts.sum(dim) > 1).any()):
            return True
    return False


def _whitening(kspace: KSpace, source: str) -> tuple[Tensor, float, dict[str, Any]]:
    """The matrix (coil coil) after which the noise is white, its deviation, the coils' median, and how."""
    coils = kspace.data.shape[1]
    if source == "none":
        return torch.eye(coils, dtype=torch.complex128), 0.0, {"from": "none"}
    if source == "scan" and kspace.noise is None:
        raise ValueError(f"{kspace.name} has no noise scan; raw.noise=edge takes the edge of k-space")
    if kspace.noise is not None and source != "edge":
        factor = _bandwidths(kspace)
        samples, record = kspace.noise, {"from": "noise scan", "variance_factor": factor}
    else:
        factor, samples = 1.0, _edge(kspace)
        record = {"from": "edge of k-space"}
    try:
        covariance = factor * noise_covariance(samples)
        whitening = prewhitening(covariance)
    except ValueError as error:
        raise ValueError(
            f"{kspace.name}: {error} (noise from the {record['from']}; raw.noise=none takes k-space as it is)"
        ) from error
    sigma = float((covariance.diagonal().real / 2).sqrt().median())
    return sigma * whitening, sigma, {**record, "samples": samples.shape[1]}


def _bandwidths(kspace: KSpace) -> float:
    """The variance of the image's noise over that of the noise scan's.

    The variance of a sample goes with the receiver's bandwidth, one over the dwell time; that of a noise scan is an
    average over the whole band, of which the middle, where the image is, has more (the header may say by how much).
    Averaged readouts have less.
    """
    source = kspace.source
    dwell, own = source.get("dwell_us"), source.get("noise_dwell_us")
    ratio = float(own) / float(dwell) if dwell and own else 1.0
    return ratio / float(source.get("noise_bandwidth") or 1.0) / max(1, int(source.get("averages", 1)))


def _edge(kspace: KSpace) -> Tensor:
    """Samples (coil n) where k-space is nearly noise alone: its corners, else those farthest from its centre."""
    wanted = SAMPLES_A_COIL * kspace.data.shape[1]
    if kspace.mask is not None:
        share = EDGE
        while share < 2 * EDGE:
            try:
                found = edge_noise(kspace.data, kspace.mask, share)
            except ValueError:
                break
            if found.shape[1] >= wanted:
                return found
            share += EDGE / 4
        far = _radius(kspace.image_shape)
        each = kspace.mask if kspace.mask.ndim == 3 else kspace.mask[None]
        far = torch.where(each, far, -1.0).flatten(1)
    else:
        track = kspace.trajectory
        far = (track if track is not None and track.ndim == 3 else track[None]).norm(dim=-1)  # type: ignore[index]
    sampled = int((far >= 0).sum(1).min())
    count = min(sampled, max(-(-wanted // len(kspace.data)), round(sampled * EDGE / 4)))
    chosen = far.topk(count, dim=1).indices.expand(len(kspace.data), count)
    flat = kspace.data.flatten(2)
    return torch.cat([part[:, index] for part, index in zip(flat, chosen, strict=True)], 1)


def _radius(shape: tuple[int, int]) -> Tensor:
    """Distance (h w) from the middle of k-space, 1 at the ends of either axis."""
    rows, columns = ((torch.arange(n) - n // 2).abs() / (n / 2) for n in shape)
    return torch.hypot(rows[:, None], columns)


def _maps(kspace: KSpace, prescan: Tensor | None) -> tuple[Tensor, dict[str, Any]]:
    """Coil maps (s coil h w) of whitened k-space, and where they come from."""
    shape, coils = kspace.image_shape, kspace.data.shape[1]
    if coils == 1:
        return torch.ones(len(kspace.data), 1, *shape, dtype=torch.complex64), {"from": "one coil"}
    origin, data = "calibration scan", prescan
    if data is None:
        origin = "calibration lines" if kspace.mask is not None else "gridded centre of k-space"
        data = _centre(kspace)
    lines = min(data.shape[-2:]) if data is not None else 0
    if data is None or lines < LEAST:
        wider = "raw.centre=0.2 keeps more lines, " if lines and kspace.mask is not None and prescan is None else ""
        raise ValueError(
            f"{kspace.name} has {lines} fully sampled lines about the centre of k-space; coil maps want {LEAST}: "
            f"{wider}raw.calibration=FILE takes them from another scan of these coils, raw.compress=1 needs no maps"
        )
    maps = espirit_maps(data, shape).maps[0]
    return maps, {"from": origin, "method": "espirit", "lines": list(data.shape[-2:])}


def _centre(kspace: KSpace) -> Tensor | None:
    """The fully sampled centre (s coil h' w'); None where the middle itself is not sampled."""
    data, mask = kspace.data, kspace.mask
    if mask is None:
        mask, data = _cells(kspace), _gridded(kspace)
    try:
        return find_acs(mask).of(data)
    except ValueError:
        return None


def _cells(kspace: KSpace) -> Tensor:
    """Which points of the grid (s h w) have a sample of the trajectory within half a cell either way."""
    track = torch.as_tensor(kspace.trajectory, dtype=torch.float64)
    h, w = kspace.image_shape
    each = track if track.ndim == 3 else track[None]
    cells = torch.zeros(len(each), h, w, dtype=torch.bool)
    for plane, points in zip(cells, each, strict=True):
        row, column = ((points[:, k] * n).round().long() + n // 2 for k, n in enumerate((h, w)))
        inside = (row >= 0) & (row < h) & (column >= 0) & (column < w)
        plane[row[inside], column[inside]] = True
    return cells


def _gridded(kspace: KSpace) -> Tensor:
    """k-space off the grid on the grid, (s coil h w): density-compensated, transformed there and back."""
    s, coils, _ = kspace.data.shape
    track = torch.as_tensor(kspace.trajectory)
    each = track if track.ndim == 3 else track.expand(1, *track.shape)
    operators = [NonCartesianMRI(one, kspace.image_shape, slices=coils) for one in each]
    images = [operators[i % len(operators)].pinv(kspace.data[i][:, None]) for i in range(s)]
    return centred_fft(torch.stack([image[:, 0] for image in images]))


def _operator(kspace: KSpace, maps: Tensor) -> CartesianMRI | NonCartesianMRI:
    if kspace.mask is not None:
        return CartesianMRI(kspace.mask, maps, slices=len(kspace.data), readout=kspace.readout or "h")
    return NonCartesianMRI(torch.as_tensor(kspace.trajectory), kspace.image_shape, maps, slices=len(kspace.data))


def _prescan(kspace: KSpace, path: str) -> Tensor:
    """(s coil h' w') of another scan's centre.

    Raises:
        ValueError: other coils, slices or field of view, or nothing sampled at the centre.
    """
    other = without_oversampling(read_kspace(path))
    if other.data.shape[:2] != kspace.data.shape[:2]:
        raise ValueError(
            f"{path} has {other.data.shape[0]} slices of {other.data.shape[1]} coils and {kspace.name} "
            f"{kspace.data.shape[0]} of {kspace.data.shape[1]}; the same are wanted for its calibration"
        )
    views = [[n * mm for n, mm in zip(one.image_shape, one.spacing_mm[1:], strict=True)] for one in (kspace, other)]
    if any(abs(a - b) > SAME_VIEW * a for a, b in zip(*views, strict=True)):
        said = [" x ".join(f"{mm:.4g}" for mm in view) for view in views]
        raise ValueError(
            f"{path} has a field of view of {said[1]} mm, {kspace.name} of {said[0]} mm; the same is wanted"
        )
    centre = _centre(other)
    if centre is None:
        raise ValueError(f"{path} does not sample the centre of k-space; it cannot calibrate {kspace.name}")
    return centre
