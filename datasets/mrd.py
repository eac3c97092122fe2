"""ISMRMRD (MRD) raw data: HDF5 with one compound record a readout and an XML header (Inati et al. 2017)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from invdiff.datasets.kspace import KSpace
from invdiff.datasets.mrd_header import MRDHeader, parse_header
from invdiff.datasets.readouts import Encoding, Place, Readout, assemble, in_plane_affine
from invdiff.files import existing_file, sha256_of

# bits of a readout's flags, counted from 1 (ISMRMRD's acquisition header)
NOISE, CALIBRATION, REVERSE, LAST = 19, 20, 22, 25
CALIBRATION_AND_IMAGING = 21
_SKIPPED = (23, 26, 27, 28, 29, 30, 31)  # navigators, feedback, dummy scans, stabilisation: no part of an image
_PHASE_CORRECTION = 24
_RELATIVE = 0.5 + 1e-6  # cycles per pixel: trajectories beyond are in cycles per field of view


def read_ismrmrd(path: str | Path, frame: int = 0, dataset: str = "dataset") -> KSpace:
    """An ISMRMRD file: Cartesian 2D or 3D, or non-Cartesian 2D, with noise and calibration readouts.

    Rows are phase-encoded lines, columns the readout with its oversampling (``crop`` has the size without it). The
    image's centre is the readouts' position, its axes their read_dir and phase_dir (LPS); both reversed where the
    vendor is Siemens, whose raw data run against the directions that converters copy (as in ``read_twix``, and in
    SIRF). 3D: see ``assemble``. A trajectory is taken as cycles per pixel where it stays in [-0.5, 0.5], else as cycles
    per field of view.

    Args:
        path: of the file.
        frame: which of the frames (contrast, phase, repetition, set); averages are averaged.
        dataset: the group.

    Raises:
        ValueError: no HDF5 or a truncated file, another layout (the keys that are there are named), echo-planar
            readouts that need a phase correction, anything that ``KSpace`` or ``assemble`` refuses.
    """
    path = existing_file(path)
    records, text = _load(path, dataset)
    try:
        header = parse_header(text)
        source = {"name": path.name, "format": "ismrmrd", "sha256": sha256_of([path]), **header.facts}
        return _kspace(records, header, source, frame)
    except ValueError as error:
        message = str(error)
        raise ValueError(message if message.startswith(path.name) else f"{path.name}: {message}") from error


def _load(path: Path, dataset: str) -> tuple[NDArray[Any], bytes]:
    import h5py

    try:
        with h5py.File(path, "r") as file:
            if dataset not in file or not {"data", "xml"} <= set(file[dataset]):
                found = ", ".join(f"{k} ({', '.join(file[k])})" if isinstance(file[k], h5py.Group) else k for k in file)
                raise ValueError(f"{dataset}/data and {dataset}/xml are wanted and the file holds {found or 'nothing'}")
            group = file[dataset]
            records, text = group["data"][()], group["xml"][()]
    except (OSError, RuntimeError, KeyError, TypeError, MemoryError) as error:
        raise ValueError(f"{path} is not a whole HDF5 file: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path} is no ISMRMRD file: {error}") from error
    if records.dtype.names is None or not {"head", "traj", "data"} <= set(records.dtype.names) or not len(records):
        raise ValueError(f"{path} is no ISMRMRD file: its data are {records.dtype.names}, (head, traj, data) is wanted")
    text = np.asarray(text).ravel()[0]
    return records, text.encode() if isinstance(text, str) else bytes(text)


def _kspace(records: NDArray[Any], header: MRDHeader, source: dict[str, Any], frame: int) -> KSpace:
    flags = records["head"]["flags"]
    if has(flags, _PHASE_CORRECTION).any():
        raise ValueError("echo-planar readouts need a phase correction, which is not done here")
    noise = _noise(records[has(flags, NOISE)])
    rest = ~has(flags, NOISE)
    for bit in _SKIPPED:
        rest &= ~has(flags, bit)
    only = rest & has(flags, CALIBRATION) & ~has(flags, CALIBRATION_AND_IMAGING)
    sign = -1.0 if "siemens" in str(source.get("vendor", "")).lower() else 1.0
    lines = [_readout(record, sign) for record in records[rest & ~only]]
    if not lines:
        raise ValueError(f"none of its {len(records)} readouts is of an image")
    dwell = float(records[rest & ~only]["head"]["sample_time_us"][0])
    if dwell > 0:
        source = {**source, "dwell_us": dwell}
    noise_dwell = float(records[has(flags, NOISE)]["head"]["sample_time_us"][0]) if noise is not None else 0.0
    if noise_dwell > 0:
        source = {**source, "noise_dwell_us": noise_dwell}
    if header.trajectory.lower() not in ("cartesian", "epi"):
        trajectories = [_trajectory(record) for record in records[rest & ~only]]
        return _off_grid(lines, trajectories, noise, header, source, frame)
    x, y, z = header.encoded
    if header.centres[0] is None:
        first = min(line.line for line in lines)
        last = max(line.line for line in lines)
        centres = (first + (last - first + 1) // 2, header.centres[1] or 0)
    else:
        centres = (header.centres[0], header.centres[1] or 0)
    depth = z if any(line.partition for line in lines) else 1
    encoding = Encoding((x, y, depth), header.encoded_fov_mm, _recon(header), centres)
    calibration = [_readout(record, sign) for record in records[only]]
    return assemble(lines, calibration, noise, encoding, source, frame)


def _recon(header: MRDHeader) -> tuple[int, int] | None:
    """Pixels (x y) of the scanner's field of view on the encoded spacing."""
    if header.recon_fov_mm is None:
        return None
    sizes = [
        round(n * recon / encoded)
        for n, recon, encoded in zip(header.encoded, header.recon_fov_mm, header.encoded_fov_mm, strict=True)
    ]
    return max(sizes[0], 1), max(sizes[1], 1)


def _noise(records: NDArray[Any]) -> Tensor | None:
    """(coil n) of all noise readouts."""
    if not len(records):
        return None
    parts = [_samples(record) for record in records]
    coils = {part.shape[0] for part in parts}
    if len(coils) > 1:
        raise ValueError(f"its noise readouts have {sorted(coils)} coils; one number is wanted")
    return torch.from_numpy(np.concatenate(parts, axis=1))


def _samples(record: Any) -> NDArray[np.complex64]:
    """(coil n) of one readout."""
    head = record["head"]
    coils, n = int(head["active_channels"]), int(head["number_of_samples"])
    values = np.ascontiguousarray(record["data"], dtype=np.float32)
    if values.size != 2 * coils * n or not n or not coils:
        raise ValueError(f"a readout of {coils} coils and {n} samples holds {values.size} numbers")
    return values.view(np.complex64).reshape(coils, n)


def _readout(record: Any, sign: float) -> Readout:
    head = record["head"]
    idx = head["idx"]
    data = _samples(record)
    n, centre = data.shape[1], int(head["center_sample"])
    before, after = int(head["discard_pre"]), int(head["discard_post"])
    if before + after >= n:
        raise ValueError(f"a readout of {n} samples discards {before} and {after} of them")
    data, centre = data[:, before : n - after], centre - before
    if has(head["flags"], REVERSE):
        data, centre = np.ascontiguousarray(data[:, ::-1]), data.shape[1] - 1 - centre
    return Readout(
        data,
        int(idx["slice"]),
        int(idx["kspace_encode_step_1"]),
        int(idx["kspace_encode_step_2"]),
        centre,
        tuple(int(idx[k]) for k in ("contrast", "phase", "repetition", "set")),
        _place(head, sign),
    )


def _place(head: Any, sign: float) -> Place:
    """Files without directions (all zero) get those of an axial slice: columns to the left, rows to the back."""
    centre, *axes = (np.asarray(head[k], dtype=np.float64) for k in ("position", "read_dir", "phase_dir", "slice_dir"))
    lengths = [float(np.linalg.norm(axis)) for axis in axes]
    if not any(lengths):
        return Place(centre, *np.eye(3))
    if min(lengths) < 0.5 or not np.isfinite(lengths).all():
        raise ValueError(f"its directions have lengths {lengths}; unit vectors are wanted")
    read, phase, normal = (axis / length for axis, length in zip(axes, lengths, strict=True))
    return Place(centre, sign * read, sign * phase, normal)


def _trajectory(record: Any) -> NDArray[np.float32]:
    """(n 2): x along the readout direction, y along the phase direction."""
    head = record["head"]
    n, dims = int(head["number_of_samples"]), int(head["trajectory_dimensions"])
    values = np.asarray(record["traj"], dtype=np.float32)
    if dims < 2 or values.size != n * dims:
        raise ValueError(f"a readout has a trajectory of {values.size} numbers for {n} samples of {dims} dimensions")
    points = values.reshape(n, dims)
    if dims > 2 and points[:, 2].any():
        raise ValueError("its trajectory is three-dimensional, which is not read here")
    return points[int(head["discard_pre"]) : n - int(head["discard_post"]), :2]


def _off_grid(
    lines: Sequence[Readout],
    trajectories: Sequence[NDArray[np.float32]],
    noise: Tensor | None,
    header: MRDHeader,
    source: dict[str, Any],
    frame: int,
) -> KSpace:
    frames = sorted({line.frame for line in lines})
    if not 0 <= frame < len(frames):
        raise ValueError(f"it holds {len(frames)} frames of imaging lines; there is no frame {frame}")
    pairs = [(a, b) for a, b in zip(lines, trajectories, strict=True) if a.frame == frames[frame]]
    if any(line.partition for line, _ in pairs):
        raise ValueError("its non-Cartesian readouts have partitions; 2D ones are read here")
    fov = header.encoded_fov_mm
    pixel = np.array(fov[:2]) / header.encoded[:2]
    view = fov if header.recon_fov_mm is None else header.recon_fov_mm
    w, h = (max(round(mm / p), 1) for mm, p in zip(view, pixel, strict=False))
    affine, order = in_plane_affine([line for line, _ in pairs], (pixel[0], pixel[1], fov[2]), (w // 2, h // 2), source)
    data, where = [], []
    for number in order:
        chosen = [pair for pair in pairs if pair[0].slice == number]
        data.append(np.concatenate([line.data for line, _ in chosen], axis=1))
        where.append(np.concatenate([points for _, points in chosen]))
    shapes = {part.shape for part in data}
    if len(shapes) > 1:
        raise ValueError(f"its slices have readouts of {sorted(shapes)} (coil samples); equal ones are wanted")
    points = np.stack(where).astype(np.float64)
    if np.abs(points).max() > _RELATIVE:
        points = points / np.array(header.encoded[:2])
    points = points[..., ::-1].astype(np.float32)  # (row, column)
    shared = bool((points == points[:1]).all())
    return KSpace(
        data=torch.from_numpy(np.stack(data)),
        mask=None,
        affine=affine,
        trajectory=torch.from_numpy(np.ascontiguousarray(points[0] if shared else points)),
        shape=(h, w),
        noise=noise,
        source={**source, "frames": len(frames)},
    )


def has(flags: Any, bit: int) -> Any:
    """Whether bit number ``bit``, counted from 1, is set."""
    return (np.asarray(flags).astype(np.uint64) >> np.uint64(bit - 1)) & np.uint64(1) == 1
