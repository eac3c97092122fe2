"""DICOM series in (JPEG 2000 too): one series, no slice missing, in physical units."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, MutableSequence, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from invdiff.datasets.orientation import Affine, checked_affine, nearest_storage, to_canonical
from invdiff.datasets.volume import Volume
from invdiff.files import readable, sha256_of

# What pydicom and its decoders raise on files that are cut off or damaged, beside pydicom's BytesLengthException.
_DAMAGE = (OSError, EOFError, ValueError, TypeError, LookupError, AttributeError, RuntimeError)
GAP_TOLERANCE = 0.05  # part of the slice distance by which a slice may lie off its place
DIRECTION_TOLERANCE = 1e-4  # largest difference between direction cosines of one series
RAS_FROM_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
KEPT = (  # what a derived series keeps of its source: who, which study, which frame of reference
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "PatientAge", "PatientWeight", "PatientPosition"),
    *("PatientIdentityRemoved", "DeidentificationMethod", "StudyInstanceUID", "StudyDate", "StudyTime", "StudyID"),
    *("AccessionNumber", "ReferringPhysicianName", "StudyDescription", "FrameOfReferenceUID", "BodyPartExamined"),
    *("PositionReferenceIndicator", "Modality", "SOPClassUID"),
)


class _Header(NamedTuple):
    """What the header of one image says, parsed."""

    file: Path
    size: tuple[int, int]  # rows, columns
    position: tuple[float, ...]  # of the first pixel, LPS mm
    orientation: tuple[float, ...]  # direction along a row, then along a column
    spacing: tuple[float, ...]  # between rows, between columns, mm
    thickness: float  # mm; 1 where it is not said
    series: str
    unit: str
    kept: dict[str, str]


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
    affine, headers = _geometry(path, headers)
    rows, columns = headers[0].size
    stored = np.empty((columns, rows, len(headers), 1), dtype=np.float32)
    for k, header in enumerate(headers):
        stored[:, :, k, 0] = _pixels(header.file).T
    storage = nearest_storage(affine)
    data, canonical = to_canonical(stored, affine, storage)
    digest = sha256_of([header.file for header in headers])
    source = {"name": path.name, "format": "dicom", "sha256": digest, "dicom": headers[0].kept}
    return Volume(data, canonical, headers[0].unit, storage, source)


def _headers(path: Path) -> list[_Header]:
    """The headers of the images among the files."""
    if not path.exists():
        raise ValueError(f"{path} is not there; a DICOM file or a folder of them is wanted")
    files = sorted(f for f in readable(path).iterdir() if f.is_file()) if path.is_dir() else [path]
    found = [_header(file, strict=file == path or file.suffix.lower() == ".dcm") for file in files]
    headers = [header for header in found if header is not None]
    if not headers:
        raise ValueError(f"{path} holds no DICOM image ({len(files)} files)")
    return headers


def _header(file: Path, strict: bool) -> _Header | None:
    """The header of a file; None if it is no DICOM image and ``strict`` is not set."""
    import pydicom

    try:
        with _quiet():
            dataset = pydicom.dcmread(file, stop_before_pixels=True)
            if dataset.get("Rows") and dataset.get("Columns"):
                return _parsed(file, dataset)
    except pydicom.errors.InvalidDicomError as error:
        if not strict:
            return None
        raise ValueError(f"{file} is not a DICOM file") from error
    except (*_DAMAGE, pydicom.errors.BytesLengthException) as error:
        raise ValueError(f"{file} cannot be read as a slice: {_one_line(error)}") from error
    if strict:
        raise ValueError(f"{file} is a DICOM file without an image")
    return None


def _parsed(file: Path, dataset: Any) -> _Header:
    """Raises ValueError, without the file's name, unless this is a grey single-frame image in a known place."""
    if int(dataset.get("SamplesPerPixel") or 1) != 1 or "PALETTE" in str(dataset.get("PhotometricInterpretation")):
        raise ValueError("it is a colour image; grey values are wanted")
    if int(dataset.get("NumberOfFrames") or 1) != 1:
        raise ValueError(f"it has {dataset.NumberOfFrames} frames; one file a slice is wanted")
    place: dict[str, tuple[float, ...]] = {}
    for key, count in (("ImagePositionPatient", 3), ("ImageOrientationPatient", 6), ("PixelSpacing", 2)):
        values = dataset.get(key)
        if not isinstance(values, MutableSequence) or len(values) != count:
            raise ValueError(f"it has no {key} of {count} numbers, so its place in the patient is not known")
        place[key] = tuple(float(v) for v in values)
    thickness = dataset.get("SliceThickness") or dataset.get("SpacingBetweenSlices") or 1.0
    kept = {key: _text(dataset.get(key)) for key in KEPT if dataset.get(key) not in (None, "")}
    return _Header(
        file,
        (int(dataset.Rows), int(dataset.Columns)),
        place["ImagePositionPatient"],
        place["ImageOrientationPatient"],
        place["PixelSpacing"],
        abs(float(thickness)),
        str(dataset.get("SeriesInstanceUID")),
        _unit(dataset),
        kept,
    )


def _check_one_series(path: Path, headers: Sequence[_Header]) -> None:
    """Raises ValueError unless all are of one series, size, spacing and orientation."""
    series = sorted({h.series for h in headers})
    if len(series) > 1:
        named = ", ".join(f"{uid} ({sum(h.series == uid for h in headers)} files)" for uid in series)
        raise ValueError(f"{path} holds {len(series)} series where one is wanted: {named}")
    sizes = sorted({h.size for h in headers})
    if len(sizes) > 1:
        raise ValueError(f"{path} holds slices of {len(sizes)} sizes: {', '.join(f'{r} x {c}' for r, c in sizes)}")
    units = sorted({h.unit for h in headers})
    if len(units) > 1:
        raise ValueError(f"{path} holds slices in several units: {', '.join(units)}")
    for key in ("orientation", "spacing"):
        values = np.array([getattr(h, key) for h in headers])
        if np.ptp(values, axis=0).max() > DIRECTION_TOLERANCE:
            n = int(np.abs(values - values[0]).max(axis=1).argmax())
            raise ValueError(f"{path} mixes slices of {key} {values[0].tolist()} and {values[n].tolist()}")


def _geometry(path: Path, headers: Sequence[_Header]) -> tuple[Affine, list[_Header]]:
    """The affine from (column, row, slice) to RAS mm, and the headers in order along the normal."""
    row, column = np.array(headers[0].orientation).reshape(2, 3)
    lengths = np.linalg.norm(row), np.linalg.norm(column)
    if min(lengths) == 0 or abs(row @ column) > DIRECTION_TOLERANCE:
        wanted = "two directions at a right angle are wanted"
        raise ValueError(f"{path}: the orientation is {list(headers[0].orientation)}; {wanted}")
    row, column = row / lengths[0], column / lengths[1]
    normal = np.cross(row, column)
    ordered = sorted(headers, key=lambda h: float(np.dot(h.position, normal)))
    positions = np.array([h.position for h in ordered])
    if len(ordered) == 1:
        step = normal * ordered[0].thickness
    else:
        _check_gaps(path, positions @ normal)
        step = (positions[-1] - positions[0]) / (len(ordered) - 1)
        expected = positions[0] + np.arange(len(ordered))[:, None] * step
        off = float(np.linalg.norm(positions - expected, axis=1).max())
        if off > GAP_TOLERANCE * np.linalg.norm(step):
            raise ValueError(f"{path}: the slices do not lie on one line, a slice is {off:.3g} mm off")
    rows_mm, columns_mm = ordered[0].spacing
    affine = np.eye(4)
    affine[:3] = np.stack([row * columns_mm, column * rows_mm, step, positions[0]], axis=1)
    return checked_affine(RAS_FROM_LPS @ affine, str(path)), ordered


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
    return "\\".join(str(v) for v in value) if isinstance(value, MutableSequence) else str(value)


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
    except (*_DAMAGE, pydicom.errors.BytesLengthException) as error:
        raise ValueError(f"the pixels of {file} cannot be read: {_one_line(error)}") from error
    with np.errstate(over="ignore"):  # Volume refuses what becomes infinite
        return np.asarray(values, dtype=np.float32)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without pydicom's warnings about files that bend the standard in ways that do not touch the image."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module=r"pydicom\.")
        yield


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
