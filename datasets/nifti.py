"""NIfTI in and out, with the affine and the axis order of the source."""

from __future__ import annotations

import gzip
import re
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from invdiff.datasets.orientation import Affine, checked_affine, nearest_storage, to_canonical, to_stored
from invdiff.datasets.volume import Volume
from invdiff.files import existing_file, sha256_of, whole_file

SUFFIXES = (".nii", ".nii.gz")
HU_BELOW = -500.0  # voxels below this are taken for HU where nothing says the unit: air is -1000 HU, MR has none such
_MM = {"unknown": 1.0, "mm": 1.0, "meter": 1e3, "micron": 1e-3}
_QFORM_MM = 0.01  # qform keeps no shear and rounds rotations: written only where every corner is this near


def read_nifti(path: str | Path, unit: str | None = None) -> Volume:
    """A NIfTI file (.nii, .nii.gz; sform, else qform) as a volume.

    Args:
        path: a file of three axes, or of four, the last of which becomes the channel.
        unit: of the voxels. If None: what ``write_nifti`` left in the header's description, else "HU" if any voxel is
            below -500, else "a.u.".

    Raises:
        ValueError: no file, no NIfTI, truncated, another number of axes, complex or colour voxels, NaN or infinite
            voxels, no usable affine.
    """
    path = existing_file(path)
    array, affine, description = _load(path)
    with np.errstate(over="ignore"):  # Volume refuses what becomes infinite
        stored = array.astype(np.float32)
    stored = stored[..., None] if stored.ndim == 3 else stored
    storage = nearest_storage(affine)
    data, canonical = to_canonical(stored, affine, storage)
    if unit is None:
        noted = re.match(r"invdiff: unit (\S+?);", description)
        unit = noted[1] if noted else "HU" if float(data.min()) < HU_BELOW else "a.u."
    source = {"name": path.name, "format": "nifti", "sha256": sha256_of([path])}
    return Volume(data, canonical, unit, storage, source)


def _load(path: Path) -> tuple[NDArray[Any], Affine, str]:
    """The scaled voxels (3 or 4 axes), the affine in mm and the header's description."""
    import nibabel

    failures = (nibabel.filebasedimages.ImageFileError, nibabel.spatialimages.HeaderDataError)
    try:
        _check_gzip(path)
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", category=UserWarning, module=r"nibabel\."
            )  # about extensions, unused here
            image = nibabel.load(path)
        if not isinstance(image, nibabel.Nifti1Image):
            raise ValueError(f"it is {type(image).__name__}")
        with np.errstate(all="ignore"):
            array = np.asanyarray(image.dataobj)
    except (OSError, EOFError, ValueError, OverflowError, MemoryError, zlib.error, *failures) as error:
        raise ValueError(f"{path} is not a whole NIfTI file: {_one_line(error)}") from error
    if array.ndim > 4 and set(array.shape[4:]) == {1}:
        array = array.reshape(array.shape[:4])
    if array.ndim not in (3, 4) or 0 in array.shape:
        raise ValueError(f"{path} has shape {array.shape}; three axes, or four with channels last, are wanted")
    if array.dtype.kind not in "iufb":
        raise ValueError(f"{path} has voxels of type {array.dtype}; real numbers are wanted")
    spatial = image.header.get_xyzt_units()[0]
    scale = np.diag([_MM[spatial]] * 3 + [1.0])
    affine = checked_affine(scale @ np.asarray(image.affine, dtype=np.float64), path.name)
    return array, affine, bytes(image.header["descrip"].tobytes()).split(b"\0")[0].decode("latin-1")


def _check_gzip(path: Path) -> None:
    """Raises OSError, EOFError or zlib.error where a compressed file fails its checksum, which nibabel never reads."""
    if path.name.endswith(".gz"):
        with gzip.open(path) as stream:
            while stream.read(1 << 20):
                pass


def write_nifti(path: str | Path, volume: Volume) -> None:
    """The volume as float32 NIfTI, in the axis order of its source, whole or not at all.

    sform is always set; qform too, where it can hold the affine (no shear). The unit goes into the description.

    Args:
        path: ends in .nii or .nii.gz; an existing file is replaced.
        volume: one channel is written as three axes, several as four.

    Raises:
        ValueError: another ending, or a path that cannot be written.
    """
    import nibabel

    path = Path(path)
    if not path.name.endswith(SUFFIXES):
        raise ValueError(f"{path} does not end in .nii or .nii.gz")
    stored, affine = to_stored(volume.data, volume.affine, volume.storage)
    image = nibabel.Nifti1Image(stored[..., 0] if stored.shape[3] == 1 else stored, affine)
    image.set_sform(affine, code="scanner")
    image.set_qform(affine, code="scanner")
    if _corner_error(image.get_qform(), affine, stored.shape) > _QFORM_MM:
        image.set_qform(None, code="unknown")
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = f"invdiff: unit {volume.unit}; NOT FOR DIAGNOSTIC USE".encode("latin-1")[:79]
    with whole_file(path) as part:
        nibabel.save(image, part)


def _corner_error(a: Affine, b: Affine, shape: tuple[int, ...]) -> float:
    """The largest distance in mm that two affines put between one corner of the volume."""
    corners = np.array(np.meshgrid(*([0, n - 1] for n in shape[:3]))).reshape(3, -1)
    difference = (a - b)[:3, :3] @ corners + (a - b)[:3, 3:]
    return float(np.linalg.norm(difference, axis=0).max())


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
