"""Scans in and out: one format a file, into ``Volume``, ``KSpace`` or ``Measurements``; never normalised."""

from invdiff.datasets.bart import read_bart, write_bart
from invdiff.datasets.calgary import read_calgary_campinas
from invdiff.datasets.dicom import read_dicom
from invdiff.datasets.dicom_write import write_dicom
from invdiff.datasets.fastmri import read_fastmri, read_fastmri_target
from invdiff.datasets.htc2022 import read_htc2022
from invdiff.datasets.kspace import KSpace, upright, without_oversampling
from invdiff.datasets.measurements import Measurements, read_measurements, write_measurements
from invdiff.datasets.mrd import read_ismrmrd
from invdiff.datasets.mrd_write import write_ismrmrd
from invdiff.datasets.nifti import read_nifti, write_nifti
from invdiff.datasets.orientation import Storage
from invdiff.datasets.read import find_volumes, read_kspace, read_volume
from invdiff.datasets.tiff import read_tiff_sinogram
from invdiff.datasets.twix import read_twix
from invdiff.datasets.volume import Volume, block_mean, pad_to_multiple

__all__ = [
    "KSpace",
    "Measurements",
    "Storage",
    "Volume",
    "block_mean",
    "find_volumes",
    "pad_to_multiple",
    "read_bart",
    "read_calgary_campinas",
    "read_dicom",
    "read_fastmri",
    "read_fastmri_target",
    "read_htc2022",
    "read_ismrmrd",
    "read_kspace",
    "read_measurements",
    "read_nifti",
    "read_tiff_sinogram",
    "read_twix",
    "read_volume",
    "upright",
    "without_oversampling",
    "write_bart",
    "write_dicom",
    "write_ismrmrd",
    "write_measurements",
    "write_nifti",
]
