"""The Helsinki Tomography Challenge 2022: real fan-beam sinograms of acrylic discs, as MATLAB files."""

from __future__ import annotations

import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from invdiff.datasets.measurements import Measurements
from invdiff.datasets.orientation import centred_affine
from invdiff.datasets.sinogram import noise_sigma
from invdiff.files import existing_file, sha256_of

SIZE = 512  # pixels of the challenge's images, which have the detector's pixel size at the rotation axis
MU_WATER_HTC = 0.036  # 1/mm: acrylic is 0.0345 here; acrylic / water is 0.96 at 30 keV (NIST XCOM), the mean energy


def read_htc2022(path: str | Path, size: int = SIZE) -> Measurements:
    """A sinogram of the challenge (a ``CtDataLimited`` or ``CtDataFull`` struct) with its geometry.

    The operator is ``fan``, its image ``size`` x ``size`` pixels over the area of the challenge's 512 x 512, so
    that the challenge's truth lies on the same pixels. ``sigma_y`` is estimated from the data (``noise_sigma``). The
    line integrals are of a 45 kV spectrum and uncorrected: beam hardening makes long paths some per cent too short.

    Args:
        path: a MATLAB file (version 5) of the challenge.
        size: rows and columns of the image.

    Raises:
        ValueError: no MATLAB file, no such struct in it, a missing or impossible value, a sinogram that does not fit
            its angles and detector.
    """
    path = existing_file(path)
    if size < 1:
        raise ValueError(f"an image of {size} x {size} pixels; at least 1 is wanted")
    data = _struct(path)
    p = _member(path, data, "parameters")
    sinogram = np.atleast_2d(_numbers(path, data, "sinogram")).astype(np.float32)
    degrees = np.atleast_1d(_numbers(path, p, "angles"))
    detectors = int(_number(path, p, "numDetectorsPost"))
    if sinogram.shape != (len(degrees), detectors):
        raise ValueError(f"{path}: a sinogram of shape {sinogram.shape} for {len(degrees)} angles, {detectors} pixels")
    y = torch.from_numpy(sinogram)[None, None]
    detector_mm = _number(path, p, "pixelSizePost")
    source_origin = _number(path, p, "distanceSourceOrigin")
    source_detector = _number(path, p, "distanceSourceDetector")
    pixel_mm = detector_mm * source_origin / source_detector * SIZE / size
    fields = {
        "shape": (1, 1, size, size),
        "angles": (degrees * (math.pi / 180)).tolist(),
        "source_origin_mm": source_origin,
        "source_detector_mm": source_detector,
        "detectors": detectors,
        "pixel_mm": pixel_mm,
        "detector_mm": detector_mm,
    }
    return Measurements(
        y=y,
        kind="fan",
        fields=fields,
        affine=centred_affine((1, size, size), (pixel_mm, pixel_mm, pixel_mm)),
        unit="1/mm",
        sigma_y=noise_sigma(y),
        mu_water=MU_WATER_HTC,
        simulated=False,
        source_sha256=sha256_of([path]),
    )


def _struct(path: Path) -> Any:
    """The only struct of the file that has a sinogram."""
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    damage = (MatReadError, zlib.error, MemoryError)  # a damaged size asks for any amount of memory
    try:
        content = loadmat(path, struct_as_record=False, squeeze_me=True)
    except (OSError, EOFError, ValueError, TypeError, LookupError, NotImplementedError, *damage) as error:
        raise ValueError(f"{path} is not a whole MATLAB file of version 5: {error}") from error
    found = [value for value in content.values() if hasattr(value, "sinogram")]
    if len(found) != 1:
        names = ", ".join(k for k in content if not k.startswith("__")) or "nothing"
        raise ValueError(f"{path} holds {names}; one struct with a sinogram is wanted")
    return found[0]


def _member(path: Path, struct: Any, name: str) -> Any:
    if not hasattr(struct, name):
        raise ValueError(f"{path}: {name} is missing")
    return getattr(struct, name)


def _numbers(path: Path, struct: Any, name: str) -> np.ndarray:
    values = np.asarray(_member(path, struct, name))
    if values.dtype.kind not in "iuf":
        raise ValueError(f"{path}: {name} holds {values.dtype}; real numbers are wanted")
    return values.astype(np.float64)


def _number(path: Path, struct: Any, name: str) -> float:
    value = _member(path, struct, name)
    if not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{path}: {name} is {value!r}; a positive number is wanted")
    return float(value)
