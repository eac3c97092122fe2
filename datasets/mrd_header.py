"""The XML header of ISMRMRD, which fastMRI's files carry too: encoding, and what it says about the scan."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from typing import Any, NamedTuple

_NAMESPACE = "{http://www.ismrm.org/ISMRMRD}"


class MRDHeader(NamedTuple):
    """Of the first encoding. Sizes (x y z), x the readout; mm; None where the header does not say."""

    encoded: tuple[int, int, int]
    encoded_fov_mm: tuple[float, float, float]
    recon: tuple[int, int, int] | None
    recon_fov_mm: tuple[float, float, float] | None
    centres: tuple[int | None, int | None]
    trajectory: str
    facts: dict[str, Any]


def parse_header(text: str | bytes) -> MRDHeader:
    """The header of an ISMRMRD file.

    Args:
        text: XML.

    Raises:
        ValueError: no XML, no encoding in it, sizes that are missing or not positive.
    """
    try:
        root = ET.fromstring(text)
    except (ET.ParseError, ValueError, LookupError) as error:  # an encoding that is none
        raise ValueError(f"its ISMRMRD header is not XML: {error}") from error
    encoding = _find(root, "encoding")
    if encoding is None:
        raise ValueError("its ISMRMRD header has no encoding")
    encoded = _space(encoding, "encodedSpace")
    if encoded is None:
        raise ValueError("its ISMRMRD header has no encodedSpace with matrixSize and fieldOfView_mm")
    recon = _space(encoding, "reconSpace")
    centres = tuple(_centre(encoding, f"kspace_encoding_step_{n}") for n in (1, 2))
    kind = _text(encoding, "trajectory") or "cartesian"
    size, fov_mm = recon or (None, None)
    return MRDHeader(encoded[0], encoded[1], size, fov_mm, (centres[0], centres[1]), kind, _facts(root))


def _facts(root: ET.Element) -> dict[str, Any]:
    """What a later reader may want to know; nothing that names a person."""
    found: dict[str, Any] = {}
    for key, path in (
        ("protocol", "measurementInformation/protocolName"),
        ("patient_position", "measurementInformation/patientPosition"),
        ("scanner", "acquisitionSystemInformation/systemModel"),
        ("vendor", "acquisitionSystemInformation/systemVendor"),
        ("sequence", "sequenceParameters/sequence_type"),
    ):
        value = _text(root, path)
        if value:
            found[key] = value
    for key, path in (
        ("field_T", "acquisitionSystemInformation/systemFieldStrength_T"),
        ("noise_bandwidth", "acquisitionSystemInformation/relativeReceiverNoiseBandwidth"),
        ("tr_ms", "sequenceParameters/TR"),
        ("te_ms", "sequenceParameters/TE"),
        ("ti_ms", "sequenceParameters/TI"),
        ("flip_angle_deg", "sequenceParameters/flipAngle_deg"),
    ):
        value = _text(root, path)
        if value:
            found[key] = _number(float, value, key)
    return found


def _find(element: ET.Element, path: str) -> ET.Element | None:
    for namespace in (_NAMESPACE, ""):
        found = element.find("/".join(namespace + part for part in path.split("/")))
        if found is not None:
            return found
    return None


def _text(element: ET.Element, path: str) -> str | None:
    found = _find(element, path)
    return None if found is None or found.text is None else found.text.strip()


def _number(kind: Any, text: str, what: str) -> Any:
    try:
        return kind(text)
    except ValueError as error:
        raise ValueError(f"its ISMRMRD header has {what} {text!r}; a number is wanted") from error


def _space(encoding: ET.Element, name: str) -> tuple[tuple[int, int, int], tuple[float, float, float]] | None:
    """Sizes and field of view; None if the space is not there, or says nothing of one of them."""
    values = []
    for part, kind in (("matrixSize", int), ("fieldOfView_mm", float)):
        texts = [_text(encoding, f"{name}/{part}/{axis}") for axis in "xyz"]
        if None in texts:
            return None
        numbers = [_number(kind, str(t), f"{name} {part}") for t in texts]
        if not all(0 < v < 1e6 for v in numbers):
            raise ValueError(f"its ISMRMRD header has {name} {part} {numbers}; three positive numbers are wanted")
        values.append((numbers[0], numbers[1], numbers[2]))
    return values[0], values[1]


def _centre(encoding: ET.Element, name: str) -> int | None:
    """The value of one counter at k = 0."""
    text = _text(encoding, f"encodingLimits/{name}/center")
    return None if text is None else int(_number(int, text, f"limits of {name}"))
