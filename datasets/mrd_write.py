"""k-space to an ISMRMRD file, readout by readout."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from invdiff.datasets.kspace import KSpace, exchanged
from invdiff.datasets.mrd import CALIBRATION, LAST, NOISE
from invdiff.datasets.readouts import LPS_TO_RAS
from invdiff.files import whole_file

_LARGEST = 65535  # samples and coils are 16 bit numbers
_PROTON_HZ_PER_T = 42.577478518e6


def write_ismrmrd(path: str | Path, kspace: KSpace) -> None:
    """The k-space as ISMRMRD, whole or not at all; an existing file is replaced.

    Each line becomes a readout along the axis whose lines are sampled from end to end (the columns where both are, the
    rows where only they are: reading it back then gives rows and columns exchanged, in the same place). Positions
    are 32 bit numbers in the format. Noise and calibration scans are written as such; ``storage`` is not.

    Args:
        path: of the file.
        kspace: Cartesian, or with a trajectory.

    Raises:
        ValueError: a mask with gaps along both axes, more samples or coils than the format holds, an absent package,
            or a path that cannot be written.
    """
    try:
        from ismrmrd.hdf5 import acquisition_dtype
    except ImportError as error:
        raise ValueError("writing ISMRMRD needs the package ismrmrd: pip install invdiff[mri]") from error
    import h5py

    if kspace.mask is not None and not _full_lines(kspace.mask, -1):
        if not _full_lines(kspace.mask, -2):
            raise ValueError(f"{kspace.name}: a mask with gaps along rows and columns cannot be written as readouts")
        kspace = exchanged(kspace)
    if kspace.mask is not None and max(kspace.data.shape) > _LARGEST:
        raise ValueError(
            f"{kspace.name}: k-space of {tuple(kspace.data.shape)}; ISMRMRD holds at most {_LARGEST} a line"
        )
    lines = _records(kspace, acquisition_dtype)
    with whole_file(Path(path)) as part, h5py.File(part, "w") as file:
        group = file.create_group("dataset")
        group.create_dataset("xml", (1,), dtype=h5py.special_dtype(vlen=bytes))[0] = _header(kspace).encode()
        group.create_dataset("data", data=lines, maxshape=(None,), chunks=True)


def _full_lines(mask: Tensor, dim: int) -> bool:
    return torch.equal(mask.any(dim, keepdim=True).expand_as(mask), mask)


def _records(kspace: KSpace, dtype: Any) -> NDArray[Any]:
    """All readouts: noise, calibration, image."""
    slices, coils = kspace.data.shape[:2]
    rows: list[tuple[NDArray[np.complex64], NDArray[np.float32] | None, dict[str, Any]]] = []
    if kspace.noise is not None:
        values = kspace.noise.to(torch.complex64).cpu().numpy()
        rows += [
            (part, None, {"flag": NOISE}) for part in np.split(values, range(_LARGEST, values.shape[1], _LARGEST), 1)
        ]
    for s in range(slices):
        if kspace.calibration is not None:
            acs = kspace.calibration[s].to(torch.complex64).cpu().numpy()
            shift = kspace.image_shape[0] // 2 - acs.shape[1] // 2
            if shift < 0:
                raise ValueError(f"{kspace.name}: the calibration scan has more lines than k-space; fewer are wanted")
            fixed = {"flag": CALIBRATION, "slice": s, "centre": acs.shape[2] // 2}
            rows += [(acs[:, j], None, {**fixed, "line": j + shift}) for j in range(acs.shape[1])]
        data = kspace.data[s].cpu().numpy()
        if kspace.trajectory is not None:
            track = kspace.trajectory if kspace.trajectory.ndim == 2 else kspace.trajectory[s]
            xy = track.flip(-1).to(torch.float32).cpu().numpy()
            parts = range(0, len(xy), _LARGEST)
            rows += [(data[:, n : n + _LARGEST], xy[n : n + _LARGEST], {"slice": s}) for n in parts]
        elif kspace.mask is not None:
            mask = kspace.mask if kspace.mask.ndim == 2 else kspace.mask[s]
            for j in torch.nonzero(mask.any(-1))[:, 0].tolist():
                rows.append((data[:, j], None, {"slice": s, "line": j, "centre": data.shape[2] // 2}))
    records = np.zeros(len(rows), dtype=dtype)
    for n, (samples, points, counters) in enumerate(rows):
        _fill(records[n : n + 1], samples, points, counters, kspace, n)
    records["head"]["available_channels"] = coils
    records["head"]["flags"][-1] |= np.uint64(1 << (LAST - 1))
    return records


def _fill(
    record: NDArray[Any],
    samples: NDArray[np.complex64],
    points: NDArray[np.float32] | None,
    counters: dict[str, Any],
    kspace: KSpace,
    number: int,
) -> None:
    head = record["head"]
    head["version"], head["scan_counter"] = 1, number
    head["number_of_samples"], head["active_channels"] = samples.shape[1], samples.shape[0]
    head["center_sample"] = counters.get("centre", 0)
    dwell = float(kspace.source.get("dwell_us", 0.0))
    own = counters.get("flag") == NOISE
    head["sample_time_us"] = float(kspace.source.get("noise_dwell_us", dwell)) if own else dwell
    if "flag" in counters:
        head["flags"] = np.uint64(1 << (counters["flag"] - 1))
    head["idx"]["slice"] = counters.get("slice", 0)
    head["idx"]["kspace_encode_step_1"] = counters.get("line", 0)
    h, w = kspace.image_shape
    axes = kspace.affine[:3, :3] / np.linalg.norm(kspace.affine[:3, :3], axis=0)
    centre = kspace.affine @ np.array([w // 2, h // 2, counters.get("slice", 0), 1])
    head["position"] = LPS_TO_RAS @ centre[:3]
    for key, axis in zip(("read_dir", "phase_dir", "slice_dir"), axes.T, strict=True):
        head[key] = LPS_TO_RAS @ axis
    record[0]["data"] = np.ascontiguousarray(samples, dtype=np.complex64).view(np.float32).ravel()
    record[0]["traj"] = np.zeros(0, np.float32) if points is None else np.ascontiguousarray(points).ravel()
    head["trajectory_dimensions"] = 0 if points is None else 2


def _header(kspace: KSpace) -> str:
    """The smallest header that the schema admits, with what is known."""
    h, w = kspace.image_shape
    thickness, row, column = kspace.spacing_mm
    recon = (h, w) if kspace.crop is None else kspace.crop
    facts = kspace.source
    kind = "cartesian" if kspace.trajectory is None else "other"
    field = facts.get("field_T")
    names = "".join(
        f"<{tag}>{escape(str(facts[key]))}</{tag}>"
        for key, tag in (("scanner", "systemModel"), ("field_T", "systemFieldStrength_T"))  # a vendor may turn axes
        if key in facts
    )
    timing = "".join(
        f"<{tag}>{float(facts[key])!r}</{tag}>"
        for key, tag in (("tr_ms", "TR"), ("te_ms", "TE"), ("ti_ms", "TI"), ("flip_angle_deg", "flipAngle_deg"))
        if key in facts
    )
    limits = "".join(
        f"<{tag}><minimum>0</minimum><maximum>{n - 1}</maximum><center>{centre}</center></{tag}>"
        for tag, n, centre in (
            ("kspace_encoding_step_1", h, h // 2),
            ("kspace_encoding_step_2", 1, 0),
            ("slice", kspace.data.shape[0], 0),
        )
    )
    return (
        '<?xml version="1.0" encoding="UTF-8"?><ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD">'
        + (
            f"<measurementInformation><patientPosition>{escape(str(facts['patient_position']))}</patientPosition>"
            "</measurementInformation>"
            if "patient_position" in facts
            else ""
        )
        + f"<acquisitionSystemInformation>{names}<receiverChannels>{kspace.data.shape[1]}</receiverChannels>"
        "</acquisitionSystemInformation><experimentalConditions><H1resonanceFrequency_Hz>"
        f"{round(float(field or 0) * _PROTON_HZ_PER_T)}</H1resonanceFrequency_Hz></experimentalConditions><encoding>"
        + _space("encodedSpace", (w, h), (w * column, h * row, thickness))
        + _space("reconSpace", (recon[1], recon[0]), (recon[1] * column, recon[0] * row, thickness))
        + f"<encodingLimits>{limits}</encodingLimits><trajectory>{kind}</trajectory></encoding>"
        + (f"<sequenceParameters>{timing}</sequenceParameters>" if timing else "")
        + "</ismrmrdHeader>"
    )


def _space(tag: str, size: tuple[int, int], fov_mm: tuple[float, float, float]) -> str:
    sizes = "".join(f"<{axis}>{n}</{axis}>" for axis, n in zip("xyz", (*size, 1), strict=True))
    lengths = "".join(f"<{axis}>{float(mm)!r}</{axis}>" for axis, mm in zip("xyz", fov_mm, strict=True))
    return f"<{tag}><matrixSize>{sizes}</matrixSize><fieldOfView_mm>{lengths}</fieldOfView_mm></{tag}>"
