"""DICOM series in (JPEG 2000 too): one series, no slice missing, in physical units."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from invdiff.datasets.files import sha256_of
from invdiff.datasets.orientation import Affine, checked_affine, nearest_storage, to_canonical
from invdiff.datasets.volume import Volume

GAP_TOLERANCE = 0.05  # part of the slice distance by which a slice may lie off its place
DIRECTION_TOLERANCE = 1e-4  # largest difference between direction cosines of one series
RAS_FROM_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
KEPT = (  # what a derived series keeps of its source: who, which study, which frame of reference
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "PatientAge", "PatientWeight", "PatientPosition"),
    *("PatientIdentityRemoved", "DeidentificationMethod", "StudyInstanceUID", "StudyDate", "StudyTime", "StudyID"),
    *("AccessionNumber", "ReferringPhysicianName", "StudyDescription", "FrameOfReferenceUID", "BodyPartExamined"),
    *("PositionReferenceIndicator", "Modality", "SOPClassUID"),
)
_USED = (
    *("Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "NumberOfFrames", "SeriesInstanceUID"),
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness", "SpacingBetweenSlices"),
    *("RescaleType", "Modality"),
)


def read_dicom(path: str | Path) -> Volume:
    """A DICOM series, as a folder of files or as one file, as a volume.

    CT is in HU, other modalities in "a.u.", both after the file's rescale. Slices are sorted by their position along
    the normal, and their distance comes from the positions; a series with a tilted gantry keeps its shear in the
    affine. Padding outside the field of view keeps the value that the file gives it. Files of a folder that are no
    DICOM, and DICOM objects without an image, are passed over unless their name ends in .dcm.

    Args:
        path: a folder (not searched below) or a file.

    Raises:
        ValueError: no image, a file that is no DICOM or truncated, two series, missing or uneven slices, two slices
            in one place, mixed sizes, orientations or spacings, colour or multi-frame images, no position, CT without
            rescale, NaN or infinite voxels.
    """
    path = Path(path)
    headers = _headers(path)
    _check_one_series(path, headers)
    affine, order = _geometry(path, [header for _, header in headers])
    files = [headers[n][0] for n in order]
    first = headers[order[0]][1]
    stored = np.empty((int(first.Columns), int(first.Rows), len(files), 1), dtype=np.float32)
    for k, file in enumerate(files):
        stored[:, :, k, 0] = _pixels(file).T
    storage = nearest_storage(affine)
    data, canonical = to_canonical(stored, affine, storage)
    kept = {key: _text(first.get(key)) for key in KEPT if first.get(key) not in (None, "")}
    source = {"name": path.name, "format": "dicom", "sha256": sha256_of(files), "dicom": kept}
    return Volume(data, canonical, _unit(first), storage, source)


def _headers(path: Path) -> list[tuple[Path, Any]]:
    """The images among the files, each with its header."""
    if not path.exists():
        raise ValueError(f"{path} is not there; a DICOM file or a folder of them is wanted")
    files = sorted(f for f in path.iterdir() if f.is_file()) if path.is_dir() else [path]
    found = []
    for file in files:
        strict = file == path or file.suffix.lower() == ".dcm"
        header = _header(file, strict)
        if header is None:
            continue
        if "Rows" in header and "Columns" in header:
            found.append((file, header))
        elif strict:
            raise ValueError(f"{file} is a DICOM file without an image")
    if not found:
        raise ValueError(f"{path} holds no DICOM image ({len(files)} files)")
    return found


def _header(file: Path, strict: bool) -> Any | None:
    """All but the pixels; None if it is no DICOM and ``strict`` is not set."""
    import pydicom

    try:
        with _quiet():
            header = pydicom.dcmread(file, stop_before_pixels=True)
            for key in (*_USED, *KEPT):
                header.get(key)  # values are parsed, and warned about, when first asked for
            return header
    except pydicom.errors.InvalidDicomError as error:
        if not strict:
            return None
        raise ValueError(f"{file} is not a DICOM file") from error
    except (OSError, EOFError, ValueError, TypeError, KeyError, AttributeError, NotImplementedError) as error:
        raise ValueError(f"{file} is not a whole DICOM file: {_one_line(error)}") from error


def _check_one_series(path: Path, headers: Sequence[tuple[Path, Any]]) -> None:
    """Raises ValueError unless all are grey single-frame images of one series, size, spacing and orientation."""
    for file, header in headers:
        if int(header.get("SamplesPerPixel") or 1) != 1 or "PALETTE" in str(header.get("PhotometricInterpretation")):
            raise ValueError(f"{file} is a colour image; grey values are wanted")
        if int(header.get("NumberOfFrames") or 1) != 1:
            raise ValueError(f"{file} has {header.NumberOfFrames} frames; one file a slice is wanted")
        for key, count in (("ImagePositionPatient", 3), ("ImageOrientationPatient", 6), ("PixelSpacing", 2)):
            values = header.get(key)
            if values is None or len(values) != count:
                raise ValueError(f"{file} has no {key}, so its place in the patient is not known")
    series = sorted({str(header.get("SeriesInstanceUID", "")) for _, header in headers})
    if len(series) > 1:
        counts = [sum(str(h.get("SeriesInstanceUID", "")) == uid for _, h in headers) for uid in series]
        named = ", ".join(f"{uid or '(none)'} ({n} files)" for uid, n in zip(series, counts, strict=True))
        raise ValueError(f"{path} holds {len(series)} series where one is wanted: {named}")
    sizes = sorted({(int(h.Rows), int(h.Columns)) for _, h in headers})
    if len(sizes) > 1:
        raise ValueError(f"{path} holds slices of {len(sizes)} sizes: {', '.join(f'{r} x {c}' for r, c in sizes)}")
    for key in ("ImageOrientationPatient", "PixelSpacing"):
        values = np.array([h.get(key) for _, h in headers], dtype=np.float64)
        if np.ptp(values, axis=0).max() > DIRECTION_TOLERANCE:
            n = int(np.abs(values - values[0]).max(axis=1).argmax())
            raise ValueError(f"{path} mixes slices of {key} {values[0].tolist()} and {values[n].tolist()}")


def _geometry(path: Path, headers: Sequence[Any]) -> tuple[Affine, list[int]]:
    """The affine from (column, row, slice) to RAS mm, and the headers' order along the normal."""
    first = headers[0]
    row, column = np.array(first.ImageOrientationPatient, dtype=np.float64).reshape(2, 3)
    lengths = np.linalg.norm(row), np.linalg.norm(column)
    if min(lengths) == 0 or abs(row @ column) > DIRECTION_TOLERANCE:
        raise ValueError(f"{path}: the image orientation {[*row, *column]} is not two directions at a right angle")
    row, column = row / lengths[0], column / lengths[1]
    positions = np.array([h.ImagePositionPatient for h in headers], dtype=np.float64)
    normal = np.cross(row, column)
    order = [int(n) for n in np.argsort(positions @ normal, kind="stable")]
    positions = positions[order]
    if len(order) == 1:
        step = normal * _thickness(first)
    else:
        _check_gaps(path, positions @ normal)
        step = (positions[-1] - positions[0]) / (len(order) - 1)
        expected = positions[0] + np.arange(len(order))[:, None] * step
        off = float(np.linalg.norm(positions - expected, axis=1).max())
        if off > GAP_TOLERANCE * np.linalg.norm(step):
            raise ValueError(f"{path}: the slices do not lie on one line, a slice is {off:.3g} mm off")
    rows_mm, columns_mm = (float(v) for v in first.PixelSpacing)
    affine = np.eye(4)
    affine[:3] = np.stack([row * columns_mm, column * rows_mm, step, positions[0]], axis=1)
    return checked_affine(RAS_FROM_LPS @ affine, path.name), order


def _check_gaps(path: Path, z: NDArray[np.float64]) -> None:
    gaps = np.diff(z)
    usual = float(np.median(gaps))
    if gaps.min() < 1e-3:
        k = int(gaps.argmin())
        raise ValueError(f"{path} has two slices at {z[k]:.3f} mm along the normal; one series of one pass is wanted")
    k = int(np.abs(gaps - usual).argmax())
    if abs(gaps[k] - usual) > GAP_TOLERANCE * usual:
        where = f"{gaps[k]:.3f} mm between {z[k]:.3f} and {z[k + 1]:.3f} mm, {usual:.3f} mm elsewhere"
        raise ValueError(f"{path} has missing or uneven slices: {where}")


def _text(value: Any) -> str:
    """A value of one or several parts, as the backslash notation of DICOM."""
    return "\\".join(str(v) for v in value) if isinstance(value, list) else str(value)


def _thickness(header: Any) -> float:
    """The extent in mm of a single slice: its thickness, else 1 mm."""
    return abs(float(header.get("SliceThickness") or header.get("SpacingBetweenSlices") or 1.0)) or 1.0


def _unit(header: Any) -> str:
    if header.get("Modality") != "CT":
        return "a.u."
    kind = str(header.get("RescaleType") or "HU")
    return "HU" if kind == "US" else kind


def _pixels(file: Path) -> NDArray[np.float32]:
    """(h w): the stored values after the file's own rescale."""
    import pydicom
    from pydicom.pixels.processing import apply_modality_lut

    try:
        with _quiet():
            dataset = pydicom.dcmread(file)
            if dataset.get("Modality") == "CT" and not {"RescaleSlope", "ModalityLUTSequence"} & set(dataset.dir()):
                raise ValueError("it is CT without RescaleSlope, so its values are not HU")
            values = apply_modality_lut(dataset.pixel_array, dataset)
    except (OSError, EOFError, ValueError, TypeError, KeyError, AttributeError, NotImplementedError) as error:
        raise ValueError(f"the pixels of {file} cannot be read: {_one_line(error)}") from error
    except RuntimeError as error:  # what pydicom raises where no decoder of the transfer syntax is installed
        raise ValueError(f"the pixels of {file} cannot be decoded: {_one_line(error)}") from error
    return np.asarray(values, dtype=np.float32)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without pydicom's warnings about files that bend the standard in ways that do not touch the image."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module=r"pydicom\.")
        yield


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
