"""Scans in and out: one format a file, into ``Volume`` or ``Measurements`` in physical units; never normalised."""

from invdiff.datasets.dicom import read_dicom
from invdiff.datasets.dicom_write import write_dicom
from invdiff.datasets.htc2022 import read_htc2022
from invdiff.datasets.measurements import Measurements, read_measurements, write_measurements
from invdiff.datasets.nifti import read_nifti, write_nifti
from invdiff.datasets.orientation import Storage
from invdiff.datasets.read import find_volumes, read_volume
from invdiff.datasets.tiff import read_tiff_sinogram
from invdiff.datasets.volume import Volume, block_mean, pad_to_multiple

__all__ = [
    "Measurements",
    "Storage",
    "Volume",
    "block_mean",
    "find_volumes",
    "pad_to_multiple",
    "read_dicom",
    "read_htc2022",
    "read_measurements",
    "read_nifti",
    "read_tiff_sinogram",
    "read_volume",
    "write_dicom",
    "write_measurements",
    "write_nifti",
]
