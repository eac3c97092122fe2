"""What a training reads: HDF5 slice files, or NIfTI files and DICOM series, as ``Slices`` in the prior's unit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from invdiff.datasets import Volume, find_volumes, read_nifti, read_volume
from invdiff.priors.slices import Slices, read_slices

HDF5 = (".h5", ".hdf5")
PADDING_HU = -1024.0  # below air lies only padding outside the scanner's field of view


@dataclass(frozen=True)
class DataConfig:
    """Which files are read, and what their grey values mean.

    Args:
        files: pattern of the file names, such as ``*_T1w.nii.gz``; all that are known if empty.
        validation_files: pattern of the names in a validation folder; that of ``files`` if empty.
        unit: of the voxels of NIfTI files, which do not say; if empty HU where any is below -500, else a.u.
        groups: data sets of the HDF5 files whose values together name a slice's group, such as a contrast.
        scale: physical unit of one grey value of an HDF5 file.
        quantile: of the non-zero voxels of an MR volume, which becomes 1: magnitudes have no unit of their own.
    """

    files: str = ""
    validation_files: str = ""
    unit: str = ""
    groups: tuple[str, ...] = ()
    scale: float = 1.0
    quantile: float = 0.999

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", tuple(self.groups))
        if not 0 < self.quantile <= 1:
            raise ValueError(f"data.quantile is {self.quantile}; a share in (0, 1] is wanted")
        if not self.scale > 0:
            raise ValueError(f"data.scale is {self.scale}; more than 0 is wanted")


def read_training(folder: Path, config: DataConfig, unit: str) -> Slices:
    """Every slice below ``folder``; HDF5 files if there are any, else NIfTI files and DICOM series.

    A subject is a folder directly below ``folder``, or a file that lies directly in it; in HDF5 files it is said.

    Raises:
        ValueError: no such folder, nothing to read in it, or volumes of another unit than the prior's.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; one with HDF5, NIfTI or DICOM files is wanted")
    pattern = config.files or "*"
    volumes = find_volumes(folder, pattern)
    hdf5 = sorted(p for p in folder.rglob(pattern) if p.suffix in HDF5)
    if hdf5:
        return read_slices(hdf5, config.groups, config.scale)
    images: list[NDArray[Any]] = []
    subject, pixel, source = [], [], []
    for path in volumes:
        volume = read_nifti(path, config.unit or None) if path.is_file() else read_volume(path)
        if volume.unit != unit:
            raise ValueError(f"{path} is in {volume.unit}, the prior in {unit}; volumes of one unit are wanted")
        found = _images(volume, config.quantile, path)
        images += list(found)
        parts = path.relative_to(folder).parts or (folder.name,)
        subject += [parts[0]] * len(found)
        pixel += [sum(volume.spacing_mm[1:]) / 2] * len(found)
        source += [str(path)] * len(found)
    if not images:
        wanted = f"{folder} holds no HDF5, NIfTI or DICOM files"
        raise ValueError(f"{wanted} that match {config.files!r}" if config.files else wanted)
    _, index = np.unique(subject, return_inverse=True)
    return Slices(images, index, np.array(pixel, np.float32), source=source)


def _images(volume: Volume, quantile: float, path: Path) -> NDArray[Any]:
    """(s h w): HU as int16; magnitudes as float16, the quantile of the non-zero ones at 1."""
    if volume.data.shape[1] != 1:
        raise ValueError(f"{path} has {volume.data.shape[1]} channels; 1 is wanted")
    data = volume.data[:, 0].numpy()
    if volume.unit == "HU":
        return data.clip(PADDING_HU, np.iinfo(np.int16).max).round().astype(np.int16)
    inside = data[data != 0]
    one = float(np.quantile(inside, quantile)) if inside.size else 0.0
    if one <= 0 or data.max() / one > np.finfo(np.float16).max:
        raise ValueError(
            f"{path}: the {quantile:g} quantile of its non-zero voxels is {one:g}, the largest {data.max():g}; "
            "an image of magnitudes is wanted"
        )
    return (data / one).astype(np.float16)
