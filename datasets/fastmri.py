"""fastMRI's HDF5 files, multi-coil and single-coil, knee and brain (Zbontar et al. 2018, arXiv:1811.08839)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from invdiff.datasets.kspace import KSpace
from invdiff.datasets.mrd_header import MRDHeader, parse_header
from invdiff.datasets.orientation import Affine, centred_affine
from invdiff.datasets.volume import Volume
from invdiff.files import existing_file, sha256_of

TARGETS = ("reconstruction_rss", "reconstruction_esc")  # multi-coil, single-coil
_CROP = 320  # pixels of the challenge's images, where there is no header


def read_fastmri(path: str | Path) -> KSpace:
    """The k-space of a file of fastMRI: (s coil h w), rows the readout, columns the phase-encoded lines.

    ``crop`` is the size of the published target: the header's reconSpace, both sizes the number of columns where there
    are fewer columns than that. Files of the test set have a mask of columns; in others all count as sampled but the
    empty ones at both ends, which are padding. The header says nothing of the patient's orientation: the affine has the
    right spacing and its centre at the origin. ``source`` has the file's acquisition, max and norm.

    Args:
        path: a file with the key kspace.

    Raises:
        ValueError: no HDF5 or a truncated file, no key kspace (the keys that are there are named), a header that is
            none, lines that count as sampled and are empty, anything that ``KSpace`` refuses.
    """
    path = existing_file(path)
    keys, attributes = load_keys(path, ("kspace", "mask", "ismrmrd_header"))
    source = {"name": path.name, "format": "fastmri", "sha256": sha256_of([path]), **attributes}
    values = keys["kspace"]
    if values.dtype.kind != "c":
        raise ValueError(f"{path.name}: kspace is {values.dtype}, which is real; complex values are wanted")
    values = values[:, None] if values.ndim == 3 else values
    if values.ndim != 4 or 0 in values.shape:
        raise ValueError(f"{path.name}: kspace has shape {values.shape}; (slice, coil, row, column) is wanted")
    header = _header(path, keys.get("ismrmrd_header"))
    s, _, h, w = values.shape
    data = torch.from_numpy(values.astype(np.complex64))
    mask = _columns(path, data, keys.get("mask")).expand(h, w).clone()
    if header is not None:
        source.update(header.facts)
    return KSpace(
        data=data * mask,
        mask=mask,
        affine=centred_affine((s, h, w), _spacing(header, (h, w))),
        crop=_crop((h, w), header),
        readout="h",
        source=source,
    )


def read_fastmri_target(path: str | Path) -> Volume | None:
    """The published target of a file, (s 1 h w), where ``read_fastmri`` puts it in the world; None in test files.

    Raises:
        ValueError: as ``read_fastmri``, or a target of another shape.
    """
    path = existing_file(path)
    keys, attributes = load_keys(path, (*TARGETS, "ismrmrd_header"), needed="")
    found = [key for key in TARGETS if key in keys]
    if not found:
        return None
    values = keys[found[0]]
    if values.ndim != 3 or values.dtype.kind != "f":
        raise ValueError(
            f"{path.name}: {found[0]} is {values.dtype} of {values.shape}; real (slice, row, column) is wanted"
        )
    header = _header(path, keys.get("ismrmrd_header"))
    full = values.shape[1:] if header is None else header.encoded[:2]
    spacing = _spacing(header, (full[0], full[1]))
    affine = _target_affine((full[0], full[1]), (values.shape[1], values.shape[2]), values.shape[0], spacing)
    source = {"name": path.name, "format": "fastmri", "sha256": sha256_of([path]), "key": found[0], **attributes}
    return Volume(torch.from_numpy(values.astype(np.float32))[:, None], affine, "a.u.", source=source)


def _target_affine(
    full: tuple[int, int], size: tuple[int, int], slices: int, spacing: tuple[float, float, float]
) -> Affine:
    """Of the middle ``size`` pixels of slices of ``full`` pixels, as fastMRI crops: from (full - size) // 2."""
    affine = centred_affine((slices, *full), spacing)
    affine[:3, 3] += affine[:3, 1] * ((full[0] - size[0]) // 2) + affine[:3, 0] * ((full[1] - size[1]) // 2)
    return affine


def load_keys(path: Path, names: tuple[str, ...], needed: str = "kspace") -> tuple[dict[str, Any], dict[str, Any]]:
    """The arrays of these names that are there, and fastMRI's attributes acquisition, max and norm.

    Raises:
        ValueError: no HDF5 or a truncated file, or no key ``needed`` (the keys that are there are named).
    """
    import h5py

    try:
        with h5py.File(path, "r") as file:
            there = ", ".join(file) or "nothing"
            if needed and needed not in file:
                raise LookupError(f"{path.name} has no key {needed!r}; it holds {there}")
            keys = {name: file[name][()] for name in names if name in file}
            attributes = {k: _plain(v) for k, v in file.attrs.items() if k in ("acquisition", "max", "norm")}
    except LookupError as error:
        raise ValueError(error.args[0]) from error
    except (OSError, RuntimeError, ValueError, TypeError, AttributeError, MemoryError) as error:
        raise ValueError(f"{path} is not a whole HDF5 file: {error}") from error
    return keys, attributes


def _plain(value: Any) -> str | float:
    value = value.decode() if isinstance(value, bytes) else value
    return value if isinstance(value, str) else float(value)


def _header(path: Path, text: Any) -> MRDHeader | None:
    if text is None:
        return None
    try:
        return parse_header(text if isinstance(text, str | bytes) else bytes(np.asarray(text).ravel()[0]))
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error


def _columns(path: Path, data: Tensor, mask: NDArray[Any] | None) -> Tensor:
    """Which columns were sampled, (w,): the mask's or all, without the padding, empty columns at both ends."""
    w = data.shape[3]
    columns = torch.ones(w, dtype=torch.bool)
    if mask is not None:
        if mask.size != w:
            raise ValueError(f"{path.name}: the mask has shape {mask.shape} for {w} columns; one value each is wanted")
        columns = torch.from_numpy(mask.ravel() != 0)
    held = torch.nonzero((data != 0).flatten(0, 2).any(0))[:, 0]
    first, last = (int(held[0]), int(held[-1])) if len(held) else (0, w - 1)
    index = torch.arange(w)
    return columns & (index >= first) & (index <= last)


def _spacing(header: MRDHeader | None, size: tuple[int, int]) -> tuple[float, float, float]:
    """mm between slices, rows, columns; 1 where nothing is known."""
    if header is None:
        return 1.0, 1.0, 1.0
    fov = header.encoded_fov_mm
    return fov[2], fov[0] / size[0], fov[1] / size[1]


def _crop(size: tuple[int, int], header: MRDHeader | None) -> tuple[int, int]:
    """Rows and columns of the published target."""
    h, w = (_CROP, _CROP) if header is None or header.recon is None else header.recon[:2]
    if size[1] < w:
        h = w = size[1]
    return min(h, size[0]), w
