"""Where a pipeline's files go: beside the volume, whole or not at all, refused before the work is done."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from invdiff.datasets import Volume, write_dicom, write_nifti
from invdiff.files import whole_file


def write_volume(out: Path, volume: Volume) -> None:
    """NIfTI for a path that ends in .nii or .nii.gz, else a folder of DICOM files."""
    if is_nifti(out):
        write_nifti(out, volume)
    else:
        write_dicom(out, volume)


def is_nifti(out: Path) -> bool:
    """Whether a path names a NIfTI file."""
    return out.name.endswith((".nii", ".nii.gz"))


def map_path(out: Path, name: str) -> Path:
    """``recon.nii.gz`` and "std" to ``recon-std.nii.gz``."""
    return beside(out, f"-{name}" + (".nii.gz" if out.suffix == ".gz" else ".nii"))


def check_writable(out: Path, maps: Sequence[str] = ()) -> None:
    """Refuse an output that cannot be written before any work is done.

    Raises:
        ValueError: with the path and why.
    """
    if out.suffix and not is_nifti(out):
        raise ValueError(f"{out} ends in {out.suffix!r}; .nii, .nii.gz or a folder name for DICOM is wanted")
    for path in [map_path(out, name) for name in maps if is_nifti(out)]:
        if path.is_dir():
            raise ValueError(f"{path} is a folder; the name of a file is wanted")
    probe(out)


def probe(out: Path) -> None:
    """Refuse a path whose folder is not there or cannot be written to.

    Raises:
        ValueError: with the path and why.
    """
    if not out.parent.is_dir():
        raise ValueError(f"{out} cannot be written: the folder {out.parent} is not there")
    with whole_file(out.parent / f"{out.name}.checkpoint.probe") as part:
        part.touch()
    (out.parent / f"{out.name}.checkpoint.probe").unlink()


def beside(out: Path, suffix: str) -> Path:
    """``recon.nii.gz`` and ".png" to ``recon.png``."""
    name = out.name
    for ending in (".nii.gz", ".nii"):
        name = name.removesuffix(ending)
    return out.with_name(name + suffix)


def checkpoint_path(out: Path) -> Path:
    """Where an unfinished run is kept."""
    return beside(out, ".checkpoint")


def versions() -> dict[str, str]:
    """Of Python and the packages that the numbers depend on."""
    return {"python": platform.python_version(), **{p: version(p) for p in ("invdiff", "torch", "monai", "numpy")}}
