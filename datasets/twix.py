"""Siemens twix raw data (.dat), VB and VD/VE, through twixtools (MIT)."""

from __future__ import annotations

import contextlib
import io
import struct
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from invdiff.datasets.kspace import KSpace
from invdiff.datasets.readouts import Encoding, Place, Readout, assemble
from invdiff.files import existing_file, sha256_of

_VB_HEADER, _VD_HEADER = 128, 192  # bytes of a readout's header
_ACQEND, _SYNCDATA = 1 << 0, 1 << 5  # of its flags
_LENGTH = (1 << 25) - 1  # the bits of its first word that are its length
_CARTESIAN = 1  # sKSpace.ucTrajectory
_NOT_IMAGE = ("RTFEEDBACK", "HPFEEDBACK", "RETRO_DUMMYSCAN", "REFPHASESTABSCAN", "PHASESTABSCAN")
_ENTRY = 152  # bytes of an entry of a VD file's list of measurements


def read_twix(path: str | Path, frame: int = 0) -> KSpace:
    """The last measurement of a twix file, Cartesian 2D or 3D, with its noise and its reference lines.

    Rows are phase-encoded lines, columns the readout with its oversampling (``crop`` has the size without it). Where
    the sequence leaves the counter of the central line at zero (Pulseq does), the middle one is taken. The image's
    centre is the slice's position; its axes are the columns (phase, readout, slice) of the rotation that the readouts'
    quaternions give, the first two reversed: an inverse Fourier transform runs against them. (twixtools and SIRF have
    the same signs; a water surface in a phantom measured with the vendor's sequence is on top with them, and below
    without.) Pulseq sequences have axes of their own: not reversed for them, which puts a water surface on top, while
    left and right are not known. The field of view is the header's, which such sequences may leave to chance.

    Args:
        path: of the file.
        frame: which of the frames (echo, phase, repetition, set); averages are averaged.

    Raises:
        ValueError: no twix file, a truncated one, an absent package, no imaging lines, a trajectory other than
            Cartesian, echo-planar lines, anything that ``KSpace`` or ``assemble`` refuses.
    """
    path = existing_file(path)
    if not path.suffix:
        raise ValueError(f"{path} has no ending, which twixtools takes for a name without its .dat: give it one")
    _check_whole(path)
    scans = _load(path)
    scan = scans[-1]
    image: list[Any] = []
    reference: list[Any] = []
    for block in scan["mdb"]:
        if block.is_flag_set("PHASCOR"):
            raise ValueError(f"{path.name}: echo-planar lines need a phase correction, which is not done here")
        if any(block.is_flag_set(flag) for flag in _NOT_IMAGE) or block.is_flag_set("NOISEADJSCAN"):
            continue
        only = block.is_flag_set("PATREFSCAN") and not block.is_flag_set("PATREFANDIMASCAN")
        (reference if only else image).append(block)
    if not image:
        raise ValueError(f"{path.name} holds no imaging lines")
    header = scan["hdr"]
    trajectory = _get(header, ("MeasYaps", "sKSpace", "ucTrajectory"), _CARTESIAN)
    if trajectory != _CARTESIAN:
        raise ValueError(f"{path.name}: its trajectory is number {trajectory}, not Cartesian: convert it to ISMRMRD")
    source = {"name": path.name, "format": "twix", "sha256": sha256_of([path]), **_facts(header)}
    sign = 1.0 if "pulseq" in str(source.get("sequence", "")).lower() else -1.0
    noisy = [one for one in scans if any(block.is_flag_set("NOISEADJSCAN") for block in one["mdb"])]
    if noisy and noisy[0] is not scan:  # a noise scan of its own has a header of its own
        dwell = _facts(noisy[0]["hdr"]).get("dwell_us")
        source |= {} if dwell is None else {"noise_dwell_us": dwell}
    lines, calibration = ([_readout(block, sign) for block in blocks] for blocks in (image, reference))
    noise = _noise(path, scans, lines[0].data.shape[0])
    return assemble(lines, calibration, noise, _encoding(header, image, lines), source, frame)


def is_twix(path: Path) -> bool:
    """A VD/VE file begins with zero (or little) and the number of measurements; a VB file with its header's length."""
    with path.open("rb") as file:
        start = file.read(12)
    if len(start) < 12:
        return False
    first, second, _ = struct.unpack("<III", start)
    if first < 10000 and 1 <= second <= 64:
        return True
    return 10000 <= first <= min(path.stat().st_size, 1 << 24) and start[8:12].isascii() and 1 <= second < 100


def _check_whole(path: Path) -> None:
    """From readout to readout to the last one, which says that it is the last.

    Raises:
        ValueError: the end comes before it.
    """
    size = path.stat().st_size
    if not is_twix(path):
        raise ValueError(f"{path} is no twix file: neither a list of measurements nor a header begins it")
    short = f"{path} is not a whole twix file: it ends before its last readout"
    with path.open("rb") as file:
        first, count = struct.unpack("<II", file.read(8))
        new = first < 10000
        starts = [0]
        if new:
            table = file.read(_ENTRY * count)
            if len(table) < _ENTRY * count:
                raise ValueError(short)
            starts = [struct.unpack_from("<Q", table, _ENTRY * n + 8)[0] for n in range(count)]
        header = _VD_HEADER if new else _VB_HEADER
        for start in starts:
            file.seek(start)
            word = file.read(4)
            at = start + struct.unpack("<I", word)[0] if len(word) == 4 else size
            last = False
            while not last:
                file.seek(at)
                last, length = _step(file.read(header), new)
                at += length
                if not length or (at > size and not last):
                    raise ValueError(short)


def _step(head: bytes, new: bool) -> tuple[bool, int]:
    """Whether a readout is the last, and its bytes (0 where the header is cut off)."""
    if len(head) < _VB_HEADER:
        return False, 0
    at = 40 if new else 20  # of the flags; the numbers of samples and channels come 8 bytes later
    flags, _, samples, channels = struct.unpack_from("<IIHH", head, at)
    if flags & (_ACQEND | _SYNCDATA):
        return bool(flags & _ACQEND), struct.unpack_from("<I", head)[0] & _LENGTH
    if len(head) < (_VD_HEADER if new else _VB_HEADER):
        return False, 0
    return False, _VD_HEADER + channels * (8 * samples + 32) if new else channels * (8 * samples + _VB_HEADER)


def _load(path: Path) -> list[dict[str, Any]]:
    """All measurements; what twixtools prints is dropped."""
    try:
        import twixtools
    except ImportError as error:
        raise ValueError("reading twix files needs the package twixtools: pip install invdiff[mri]") from error
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")  # about headers that it takes for damaged, and files that it leaves open
            scans = twixtools.read_twix(str(path), parse_geometry=False, verbose=False)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path} is not a twix file that can be read: {error!r}") from error
    if not scans or not scans[-1].get("mdb"):
        raise ValueError(f"{path} holds no readouts")
    return list(scans)


def _readout(block: Any, sign: float) -> Readout:
    head = block.mdh
    data = np.ascontiguousarray(block.data, dtype=np.complex64)
    centre, before, after = int(head.CenterCol), int(head.CutOff.Pre), int(head.CutOff.Post)
    data, centre = data[:, before : data.shape[1] - after], centre - before
    if block.is_flag_set("REFLECT"):
        data, centre = np.ascontiguousarray(data[:, ::-1]), data.shape[1] - 1 - centre
    count = head.Counter
    where = head.SliceData
    position = np.array([where.SlicePos.Sag, where.SlicePos.Cor, where.SlicePos.Tra], dtype=np.float64)
    phase, read, normal = _rotation(np.array(list(where.Quaternion), dtype=np.float64)).T
    frame = (int(count.Eco), int(count.Phs), int(count.Rep), int(count.Set))
    place = Place(position, sign * read, sign * phase, normal)
    return Readout(data, int(count.Sli), int(count.Lin), int(count.Par), centre, frame, place)


def _rotation(quaternion: np.ndarray) -> np.ndarray:
    """The rotation of a quaternion, scalar first; the identity where all are zero."""
    length = float(np.linalg.norm(quaternion))
    if not length:
        return np.eye(3)
    w, x, y, z = quaternion / length
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def _noise(path: Path, scans: Sequence[dict[str, Any]], coils: int) -> Tensor | None:
    """(coil n) of the noise readouts of all measurements."""
    blocks = [block for scan in scans for block in scan["mdb"] if block.is_flag_set("NOISEADJSCAN")]
    if not blocks:
        return None
    parts = [np.asarray(block.data, dtype=np.complex64) for block in blocks]
    found = {part.shape[0] for part in parts}
    if found != {coils}:
        raise ValueError(f"{path.name}: its noise readouts have {sorted(found)} coils and its lines {coils}")
    return torch.from_numpy(np.concatenate(parts, axis=1))


def _encoding(header: Any, blocks: Sequence[Any], lines: Sequence[Readout]) -> Encoding:
    """Sizes, view and centres, from the header where the lines agree with it."""
    place = _get(header, ("MeasYaps", "sSliceArray", "asSlice"), [{}])[0]
    base = round(_number(header, ("MeasYaps", "sKSpace", "lBaseResolution"), lines[0].data.shape[1]))
    factor = _number(header, ("Meas", "flReadoutOSFactor"), 1.0)
    extra = 1 + _number(header, ("MeasYaps", "sKSpace", "dPhaseOversamplingForDialog"), 0.0)
    slab = 1 + _number(header, ("MeasYaps", "sKSpace", "dSliceOversamplingForDialog"), 0.0)
    rows = round(_number(header, ("Meas", "iPEFTLength"), 1.0))
    depth = round(_number(header, ("Meas", "i3DFTLength"), 1.0)) if any(line.partition for line in lines) else 1
    columns = round(base * factor)
    recon = (base, round(rows / extra))
    wide = max(line.data.shape[1] for line in lines)
    high = 1 + max(line.line for line in lines) - min(line.line for line in lines)
    if wide > columns or high > rows:  # the sequence is not the header's
        columns, rows, depth = wide, high, 1 + max(line.partition for line in lines)
        recon = (round(columns / factor), high)
    centres = (
        _centre(blocks, lines, "CenterLin", "line", high),
        _centre(blocks, lines, "CenterPar", "partition", depth),
    )
    thickness = _number(place, ("dThickness",), 1.0) * (slab if depth > 1 else 1.0)
    fov = (_number(place, ("dReadoutFOV",), base) * factor, _number(place, ("dPhaseFOV",), rows) * extra, thickness)
    return Encoding((columns, rows, depth), fov, recon, centres)


def _centre(blocks: Sequence[Any], lines: Sequence[Readout], name: str, counter: str, count: int) -> int:
    """The counter at k = 0: what the readouts say, or the middle of them where they say 0 and there are others."""
    said = int(getattr(blocks[0].mdh, name))
    if said or count <= 1:
        return said
    return min(int(getattr(line, counter)) for line in lines) + count // 2


def _facts(header: Any) -> dict[str, Any]:
    """What the header says of the scan; nothing that names a person."""
    facts: dict[str, Any] = {}
    for key, path in (
        ("sequence", ("MeasYaps", "tSequenceFileName")),
        ("protocol", ("MeasYaps", "tProtocolName")),
        ("patient_position", ("Meas", "tPatientPosition")),
    ):
        value = _get(header, path, None)
        if isinstance(value, str) and value:
            facts[key] = value
    numbers: tuple[tuple[str, tuple[str | int, ...], float], ...] = (
        ("field_T", ("Dicom", "flMagneticFieldStrength"), 1.0),
        ("tr_ms", ("MeasYaps", "alTR", 0), 1e-3),
        ("te_ms", ("MeasYaps", "alTE", 0), 1e-3),
        ("dwell_us", ("MeasYaps", "sRXSPEC", "alDwellTime", 0), 1e-3),
    )
    for key, where, scale in numbers:
        number = _number(header, where, 0.0)
        if number > 0:
            facts[key] = number * scale
    return facts


def _get(header: Any, path: Sequence[str | int], default: Any) -> Any:
    """A value deep in the header."""
    for key in path:
        try:
            header = header[key]
        except (KeyError, IndexError, TypeError):
            return default
    return header


def _number(header: Any, path: Sequence[str | int], default: float) -> float:
    """A positive number deep in the header; the default where there is none."""
    value = _get(header, path, default)
    return float(value) if isinstance(value, int | float) and value > 0 else float(default)
