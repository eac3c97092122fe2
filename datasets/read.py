"""A scan by its path, whatever its format."""

from __future__ import annotations

from pathlib import Path

from invdiff.datasets.dicom import read_dicom
from invdiff.datasets.nifti import SUFFIXES, read_nifti
from invdiff.datasets.volume import Volume
from invdiff.files import readable


def read_volume(path: str | Path) -> Volume:
    """The volume that a path holds: a folder or file of DICOM, or NIfTI.

    Args:
        path: a folder of one DICOM series, a DICOM file with any name, or a file ending in .nii or .nii.gz.

    Raises:
        ValueError: nothing there, not a scan, or anything that ``read_dicom`` or ``read_nifti`` refuses.
    """
    path = Path(path)
    if path.name.lower().endswith(SUFFIXES) and not path.is_dir():
        return read_nifti(path)
    if path.suffix.lower() in (".h5", ".hdf5"):
        raise ValueError(f"{path} holds measurements, not a volume; DICOM or NIfTI is wanted")
    if path.is_file() and not is_dicom(path):
        raise ValueError(f"{path} is not a scan: a folder of DICOM, a DICOM file, .nii or .nii.gz is wanted")
    return read_dicom(path)


def find_volumes(folder: Path, pattern: str = "*") -> list[Path]:
    """Every NIfTI file and every folder of DICOM below ``folder``, itself included, sorted, NIfTI first.

    Args:
        folder: where to look.
        pattern: of the file names, as in ``Path.rglob``.

    Raises:
        ValueError: a pattern that is none.
    """
    try:
        files = sorted(p for p in folder.rglob(pattern) if p.is_file())
    except (NotImplementedError, ValueError) as error:
        raise ValueError(f"{pattern!r} is no pattern of file names: {error}") from error
    nifti = [p for p in files if p.name.lower().endswith(SUFFIXES)]
    return nifti + sorted({p.parent for p in files if p not in nifti and is_dicom(p)})


def is_dicom(path: Path) -> bool:
    """A DICOM file has the four letters after a preamble of 128 bytes."""
    with readable(path).open("rb") as f:
        return f.read(132)[128:] == b"DICM"
