"""DICOM out: a volume as a derived series."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from invdiff.datasets.dicom import DIRECTION_TOLERANCE, RAS_FROM_LPS
from invdiff.datasets.orientation import CANONICAL, Affine, to_stored
from invdiff.datasets.volume import Volume
from invdiff.files import whole_folder

CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"
MR_IMAGE = "1.2.840.10008.5.1.4.1.1.4"
HU_INTERCEPT = -1024.0
_LEVELS = 65535  # of the 16 bits of a pixel
_STANDARD = {"HU": ("CT", CT_IMAGE), "a.u.": ("MR", MR_IMAGE)}
_TYPE_2 = (  # may be empty, must be there
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID"),
    *("AccessionNumber", "ReferringPhysicianName", "PositionReferenceIndicator", "AcquisitionNumber"),
)
_TYPE_2_OF = {CT_IMAGE: ("KVP",), MR_IMAGE: ("ScanOptions", "MRAcquisitionType", "EchoTime", "EchoTrainLength")}


def write_dicom(folder: str | Path, volume: Volume, description: str = "reconstruction") -> None:
    """The volume as a derived DICOM series, one file a slice, whole or not at all.

    New series and instance UIDs; patient, study and frame of reference of the source where that was DICOM, and its
    slices' orientation, else axial slices and a new study. HU is stored in steps of 1 HU, other units in 65535 steps
    of their range. Marked ``DERIVED\\SECONDARY`` and NOT FOR DIAGNOSTIC USE.

    Args:
        folder: new or empty.
        volume: one channel; "HU", or "a.u." for MR.
        description: what was done and by which version, for SeriesDescription and DerivationDescription; at most 48
            characters.

    Raises:
        ValueError: more channels, another unit, HU beyond 16 bits, sheared pixels, a folder that is not empty or
            cannot be written.
    """
    import pydicom

    folder = Path(folder)
    known: dict[str, str] = dict(volume.source.get("dicom", {}))
    if volume.data.shape[1] != 1:
        raise ValueError(f"the volume has {volume.data.shape[1]} channels; DICOM takes one")
    if volume.unit not in _STANDARD:
        raise ValueError(f"the volume is in {volume.unit!r}; 'HU' or 'a.u.' is wanted")
    if len(description) > 48:
        raise ValueError(f"the description has {len(description)} characters; at most 48 are wanted")
    storage = volume.storage if known else CANONICAL
    stored, affine = to_stored(volume.data, volume.affine, storage)
    pixels, slope, intercept = _quantised(stored[..., 0], volume.unit)
    lps = RAS_FROM_LPS @ affine
    # What is kept of the source goes out as it came in, even where it bends the standard.
    with pydicom.config.disable_value_validation(), whole_folder(folder) as part:
        series = _series(known, volume.unit, description)
        _set_geometry(series, affine, pixels.shape)
        _set_pixel_format(series, volume.unit, slope, intercept)
        for k in range(pixels.shape[2]):
            position = lps[:3, 2] * k + lps[:3, 3]
            series.ImagePositionPatient = [_ds(v) for v in position]
            series.InstanceNumber = k + 1
            series.SOPInstanceUID = pydicom.uid.generate_uid()
            series.file_meta.MediaStorageSOPInstanceUID = series.SOPInstanceUID
            series.PixelData = np.ascontiguousarray(pixels[:, :, k].T).astype("<u2").tobytes()
            series.save_as(part / f"{k + 1:04d}.dcm", enforce_file_format=True)


def _quantised(stored: NDArray[np.float32], unit: str) -> tuple[NDArray[np.uint16], float, float]:
    """16-bit pixels with the slope and intercept that a reader will see."""
    low, high = float(stored.min()), float(stored.max())
    if unit == "HU":
        slope, intercept = 1.0, min(HU_INTERCEPT, float(np.floor(low)))
        if high - intercept > _LEVELS:
            raise ValueError(f"voxels from {low:g} to {high:g} HU do not fit 16 bits in steps of 1 HU")
    else:
        slope, intercept = float(_ds((high - low) / _LEVELS or 1.0)), float(_ds(low))
    levels = np.rint((stored.astype(np.float64) - intercept) / slope)
    return levels.clip(0, _LEVELS).astype(np.uint16), slope, intercept


def _series(known: dict[str, str], unit: str, description: str) -> Any:
    """A data set with all that does not depend on the slice, the geometry or the pixels."""
    import pydicom

    modality, sop_class = _STANDARD[unit]
    series = pydicom.dataset.Dataset()
    series.SpecificCharacterSet = "ISO_IR 192"
    series.ImageType = ["DERIVED", "SECONDARY", "AXIAL" if unit == "HU" else "OTHER"]
    series.SOPClassUID, series.Modality = sop_class, modality
    series.StudyInstanceUID, series.FrameOfReferenceUID = pydicom.uid.generate_uid(), pydicom.uid.generate_uid()
    for key in (*_TYPE_2, *_TYPE_2_OF[sop_class]):
        setattr(series, key, None if key in _TYPE_2_OF[sop_class] else "")
    for key, value in known.items():
        setattr(series, key, value)
    if sop_class == MR_IMAGE:
        series.ScanningSequence, series.SequenceVariant = "RM", "NONE"
    series.SeriesInstanceUID = pydicom.uid.generate_uid()
    series.SeriesNumber = None
    series.SeriesDescription = f"invdiff {description}"
    series.DerivationDescription = f"invdiff {description}"
    series.ImageComments = "NOT FOR DIAGNOSTIC USE"
    series.Manufacturer = "invdiff"
    series.file_meta = pydicom.dataset.FileMetaDataset()
    series.file_meta.MediaStorageSOPClassUID = series.SOPClassUID
    series.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    return series


def _set_geometry(series: Any, affine: Affine, shape: tuple[int, ...]) -> None:
    """Size, directions and spacings; the positions come with the slices."""
    lps = RAS_FROM_LPS @ affine
    lengths = np.linalg.norm(lps[:3, :3], axis=0)
    row, column = lps[:3, 0] / lengths[0], lps[:3, 1] / lengths[1]
    if abs(row @ column) > DIRECTION_TOLERANCE:
        raise ValueError("the rows and columns of the slices are not at a right angle; DICOM cannot hold that")
    between = abs(float(np.cross(row, column) @ lps[:3, 2]))
    series.Columns, series.Rows = shape[0], shape[1]
    series.PixelSpacing = [_ds(float(lengths[1])), _ds(float(lengths[0]))]
    series.ImageOrientationPatient = [_ds(float(v)) for v in (*row, *column)]
    series.SliceThickness = series.SpacingBetweenSlices = _ds(between)


def _set_pixel_format(series: Any, unit: str, slope: float, intercept: float) -> None:
    series.SamplesPerPixel, series.PhotometricInterpretation = 1, "MONOCHROME2"
    series.BitsAllocated, series.BitsStored, series.HighBit, series.PixelRepresentation = 16, 16, 15, 0
    series.RescaleSlope, series.RescaleIntercept = _ds(slope), _ds(intercept)
    series.RescaleType = "HU" if unit == "HU" else "US"
    series.BurnedInAnnotation = "NO"


def _ds(value: float) -> str:
    """A number as a DICOM decimal string: 16 characters at most."""
    from pydicom.valuerep import format_number_as_ds

    return str(format_number_as_ds(float(value)))
