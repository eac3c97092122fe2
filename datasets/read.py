"""A scan, or raw data, by its path, whatever the format."""

from __future__ import annotations

from pathlib import Path

from invdiff.datasets.bart import read_bart
from invdiff.datasets.calgary import read_calgary_campinas
from invdiff.datasets.dicom import read_dicom
from invdiff.datasets.fastmri import read_fastmri
from invdiff.datasets.kspace import KSpace, upright
from invdiff.datasets.mrd import read_ismrmrd
from invdiff.datasets.nifti import SUFFIXES, read_nifti
from invdiff.datasets.twix import is_twix, read_twix
from invdiff.datasets.volume import Volume
from invdiff.files import existing_file, readable


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


def read_kspace(path: str | Path, frame: int = 0) -> KSpace:
    """Raw MR data, the format told by the content, slices as they look on a DICOM screen (``upright``).

    Args:
        path: an HDF5 file of ISMRMRD, fastMRI or Calgary-Campinas, a Siemens twix file, an array of BART (its .hdr or
            .cfl), or a folder that holds one.
        frame: which of the frames (echo, cardiac phase, repetition, set) of ISMRMRD and twix; others hold one.

    Raises:
        ValueError: nothing there, none of these formats (with the keys of an HDF5 file), or what the reader refuses.
    """
    path = Path(path)
    if path.is_dir() or path.suffix.lower() in (".hdr", ".cfl"):
        return upright(_only(read_bart(path), frame))
    path = existing_file(path)
    with path.open("rb") as file:
        hdf5 = file.read(8) == b"\x89HDF\r\n\x1a\n"
    if hdf5:
        return upright(_read_hdf5(path, frame))
    if is_twix(path):
        return upright(read_twix(path, frame))
    wanted = "HDF5 (ISMRMRD, fastMRI, Calgary-Campinas), Siemens twix or BART"
    raise ValueError(f"{path} is no raw MR data that is read here: {wanted} is wanted")


def is_raw(path: Path) -> bool:
    """Whether ``read_kspace`` is to read it: BART, twix, or HDF5 that is whole and not a file of measurements."""
    import h5py

    if path.is_dir() or path.suffix.lower() in (".hdr", ".cfl"):
        return True
    if not path.is_file():
        return False
    try:
        with h5py.File(readable(path), "r") as file:
            return "schema" not in file.attrs and not any(name.startswith("scan_") for name in file)
    except (OSError, RuntimeError):
        return is_twix(path)


def _only(kspace: KSpace, frame: int) -> KSpace:
    if frame:
        raise ValueError(f"{kspace.name} holds one frame; there is no frame {frame}")
    return kspace


def _read_hdf5(path: Path, frame: int) -> KSpace:
    import h5py

    try:
        with h5py.File(path, "r") as file:
            keys = list(file)
            if "schema" in file.attrs:
                raise LookupError(f"{path} is a file of measurements ({file.attrs['schema']}), not raw data")
            kind = file["kspace"].dtype.kind if "kspace" in keys and isinstance(file["kspace"], h5py.Dataset) else ""
            shape: tuple[int, ...] = file["kspace"].shape if kind else ()
    except LookupError as error:
        raise ValueError(str(error.args[0])) from error
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{path} is not a whole HDF5 file: {error}") from error
    if "dataset" in keys:
        return read_ismrmrd(path, frame)
    # real (x, ky, kz, 2 coils); elsewhere the last axis is a spatial one, and real values are a mistake
    if kind == "f" and len(shape) == 4 and shape[3] < min(shape[1:3]) and "ismrmrd_header" not in keys:
        return _only(read_calgary_campinas(path), frame)
    if kind:
        return _only(read_fastmri(path), frame)
    found = ", ".join(keys) or "nothing"
    raise ValueError(f"{path} holds {found}; kspace (fastMRI, Calgary-Campinas) or dataset (ISMRMRD) is wanted")


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
