"""BART's arrays: a text header ``name.hdr`` with up to 16 sizes, complex64 values ``name.cfl``, first axis fastest."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from invdiff.datasets.kspace import KSpace
from invdiff.datasets.orientation import centred_affine
from invdiff.files import existing_file, sha256_of, whole_file
from invdiff.fourier import centred_ifft

READ, PHS1, PHS2, COIL, SLICE, DIMENSIONS = 0, 1, 2, 3, 13, 16  # of BART's axes
_MARK = "# Dimensions"


def read_cfl(path: str | Path) -> NDArray[np.complex64]:
    """One array with the sizes of its header, its axes in BART's order.

    Args:
        path: with or without .hdr or .cfl.

    Raises:
        ValueError: a missing file, a header without sizes, values of another number.
    """
    hdr, cfl = (existing_file(p) for p in pair_of(path))
    try:
        lines = [line.strip() for line in hdr.read_text().splitlines()]
        sizes = [int(n) for n in lines[lines.index(_MARK) + 1].split()]
    except (ValueError, IndexError, UnicodeDecodeError) as error:
        raise ValueError(f"{hdr} is not a header of BART: a line of whole numbers after {_MARK!r} is wanted") from error
    if not sizes or min(sizes) < 1:
        raise ValueError(f"{hdr} has sizes {sizes}; positive ones are wanted")
    if cfl.stat().st_size != 8 * math.prod(sizes):
        wanted = 8 * math.prod(sizes)
        raise ValueError(f"{cfl} has {cfl.stat().st_size} bytes and its header says {wanted}: it is not a whole file")
    return np.fromfile(cfl, dtype="<c8").astype(np.complex64).reshape(sizes, order="F")


def write_cfl(path: str | Path, array: NDArray[np.complex64]) -> None:
    """An array, its axes in BART's order, as ``path``.hdr and ``path``.cfl.

    Raises:
        ValueError: more than 16 axes, or a path that cannot be written.
    """
    if array.ndim > DIMENSIONS:
        raise ValueError(f"an array of {array.ndim} axes; BART has {DIMENSIONS}")
    hdr, cfl = pair_of(path)
    sizes = [*array.shape, *[1] * (DIMENSIONS - array.ndim)]
    with whole_file(cfl) as values, whole_file(hdr) as header:
        array.astype("<c8").ravel(order="F").tofile(values)
        header.write_text(f"{_MARK}\n{' '.join(map(str, sizes))} \n")


def read_bart(
    path: str | Path,
    trajectory: str | Path | None = None,
    shape: tuple[int, int] | None = None,
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> KSpace:
    """k-space of BART: rows PHS1, columns READ, slices SLICE; 3D (PHS2 above 1) becomes slices along READ.

    What is zero in every coil counts as not sampled. Arrays hold no geometry.

    Args:
        path: of the k-space; or a folder that holds its pair of files and, maybe, that of its trajectory.
        trajectory: (3, samples, spokes), cycles per field of view; the k-space is then (1, samples, spokes, coils).
        shape: (h w) of the image of non-Cartesian k-space; None: twice the trajectory's largest value, rounded up.
        spacing_mm: between slices, rows and columns.

    Raises:
        ValueError: anything that ``read_cfl`` or ``KSpace`` refuses, an axis that is not read here, a folder with other
            files, a trajectory that does not fit.
    """
    path = Path(path)
    if path.is_dir():
        path, trajectory = _of_folder(path, trajectory)
    array = read_cfl(path)
    sizes = [*array.shape, *[1] * (DIMENSIONS - array.ndim)]
    other = [n for n in range(len(sizes)) if sizes[n] > 1 and n not in (READ, PHS1, PHS2, COIL, SLICE)]
    if other:
        raise ValueError(f"{path} has sizes {sizes}: axis {other[0]} is not read here; slice it first")
    source = {"name": path.name, "format": "bart", "sha256": sha256_of(list(pair_of(path)))}
    data = torch.from_numpy(array.reshape([sizes[n] for n in (READ, PHS1, PHS2, COIL, SLICE)], order="F").copy())
    if trajectory is not None:
        points = read_cfl(trajectory)
        return _off_grid(data, points.reshape([*points.shape, *[1] * (3 - points.ndim)]), shape, spacing_mm, source)
    if shape is not None:
        raise ValueError(f"{path}: a shape is for k-space with a trajectory")
    if sizes[PHS2] > 1:
        if sizes[SLICE] > 1:
            raise ValueError(f"{path} has sizes {sizes}: partitions and slices; one of them is wanted")
        sampled = (data[..., 0] != 0).any(-1).any(0)  # PHS1, PHS2
        data = centred_ifft(data[..., 0], (0,)).permute(0, 3, 1, 2).contiguous() * sampled
        affine = centred_affine((data.shape[0], data.shape[2], data.shape[3]), spacing_mm)
        return KSpace(data=data, mask=sampled, affine=affine, source=source)
    data = data[:, :, 0].permute(3, 2, 1, 0).contiguous()
    held = (data != 0).any(1)
    mask = held[0] if bool((held == held[:1]).all()) else held
    affine = centred_affine((data.shape[0], data.shape[2], data.shape[3]), spacing_mm)
    return KSpace(data=data, mask=mask, affine=affine, readout="w", source=source)


def write_bart(path: str | Path, kspace: KSpace) -> None:
    """k-space as ``read_bart`` reads it; a trajectory goes beside it, as ``path``_traj. Geometry is lost.

    Raises:
        ValueError: a path that cannot be written, a trajectory for each slice.
    """
    data = kspace.data.cpu().numpy()
    if kspace.trajectory is None:
        write_cfl(path, _on_axes(data.transpose(3, 2, 1, 0), (READ, PHS1, COIL, SLICE)))
        return
    if kspace.trajectory.ndim != 2:
        raise ValueError(f"{kspace.name}: one trajectory for all slices is wanted, it has one for each")
    points = np.zeros((3, kspace.trajectory.shape[0], 1), np.complex64)
    size = np.array(kspace.image_shape)
    points[:2, :, 0] = (kspace.trajectory.double().cpu().numpy() * size).T[::-1]
    write_cfl(path, _on_axes(data.transpose(2, 1, 0), (PHS1, COIL, SLICE)))
    cfl = pair_of(path)[1]
    write_cfl(cfl.with_name(f"{cfl.name.removesuffix('.cfl')}_traj"), points)


def pair_of(path: str | Path) -> tuple[Path, Path]:
    """The header and the values of a name with or without .hdr or .cfl."""
    path = Path(path)
    stem = path.name.removesuffix(".hdr").removesuffix(".cfl")
    return path.with_name(stem + ".hdr"), path.with_name(stem + ".cfl")


def _on_axes(array: NDArray[np.complex64], axes: tuple[int, ...]) -> NDArray[np.complex64]:
    """The array's axes at BART's numbers ``axes``, which rise."""
    sizes = [1] * DIMENSIONS
    for axis, size in zip(axes, array.shape, strict=True):
        sizes[axis] = size
    return array.reshape(sizes)


def _of_folder(folder: Path, trajectory: str | Path | None) -> tuple[Path, str | Path | None]:
    """The k-space of a folder, and its trajectory: an array whose first size is 3."""
    names = sorted(p for p in folder.glob("*.hdr") if p.with_suffix(".cfl").is_file())
    tracks = [p for p in names if read_cfl(p).shape[0] == 3] if trajectory is None and len(names) == 2 else []
    if len(names) - len(tracks) != 1 or len(tracks) > 1:
        found = ", ".join(p.name for p in names) or "none"
        raise ValueError(
            f"{folder} holds {found}; one .hdr with its .cfl, or two of k-space and trajectory, are wanted"
        )
    return next(p for p in names if p not in tracks), tracks[0] if tracks else trajectory


def _off_grid(
    data: torch.Tensor,
    points: NDArray[np.complex64],
    shape: tuple[int, int] | None,
    spacing_mm: tuple[float, float, float],
    source: dict[str, str],
) -> KSpace:
    """k-space (1 samples spokes coil slice) with its trajectory (3 samples spokes)."""
    if points.shape[0] != 3 or points.shape[1:3] != data.shape[1:3] or points.size != 3 * math.prod(points.shape[1:3]):
        raise ValueError(
            f"{source['name']}: the trajectory has sizes {points.shape} for k-space of {tuple(data.shape[:3])}; (3, "
            "samples, spokes) for (1, samples, spokes) is wanted"
        )
    xyz = points.reshape(3, -1, order="F").real
    if xyz[2].any() or data.shape[0] != 1:
        raise ValueError(f"{source['name']}: a trajectory in three dimensions is not read here")
    size = math.ceil(2 * float(np.abs(xyz).max()))
    h, w = (size, size) if shape is None else shape
    track = torch.from_numpy(np.stack([xyz[1] / h, xyz[0] / w], axis=1).astype(np.float32))
    samples = data[0].permute(3, 2, 1, 0).flatten(2)  # (s coil spokes samples): samples fastest, as in the trajectory
    affine = centred_affine((samples.shape[0], h, w), spacing_mm)
    return KSpace(data=samples.contiguous(), mask=None, affine=affine, trajectory=track, shape=(h, w), source=source)
