"""A sinogram as a TIFF image: parallel beams, one row a view."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from invdiff.datasets.measurements import Measurements
from invdiff.datasets.orientation import centred_affine
from invdiff.datasets.sinogram import noise_sigma, rotation_axis
from invdiff.files import existing_file, sha256_of

MOST_DEAD = 0.01  # part of the detector's values that may be dead


def read_tiff_sinogram(
    path: str | Path,
    detector_mm: float,
    arc: float | None = None,
    angles: Tensor | Sequence[float] | None = None,
    open_beam: float | None = None,
    axis: float | None = None,
    mu_water: float | None = None,
) -> Measurements:
    """A TIFF image (angle detector) as parallel-beam measurements of one slice.

    The operator is ``parallel``, its image has as many rows and columns as the detector has pixels, of the detector's
    pixel size. ``sigma_y`` is estimated from the data (``noise_sigma``).

    Args:
        path: a TIFF file of one grey image.
        detector_mm: size of a detector pixel; TIFF does not say it.
        arc: in radians, over which the views are spread evenly, the end not included; or else ``angles``.
        angles: in radians, one a row.
        open_beam: the value of a ray that met nothing, if the image holds intensities: the line integral is
            -log(value / open_beam). Values of 0 or below come from dead pixels and are interpolated along the detector,
            from the same view. None if the image holds line integrals.
        axis: where the rotation axis lies, in pixels from the detector's middle; estimated if None.
        mu_water: attenuation of water in 1/mm, where HU make sense.

    Raises:
        ValueError: no TIFF, truncated, not one grey image, both or none of arc and angles, another number of angles
            than of rows, a size or value that is not positive, NaN or infinite values, more than 1 % dead pixels, an
            axis that cannot be estimated.
    """
    path = existing_file(path)
    if not 0 < detector_mm < math.inf:
        raise ValueError(f"detector_mm is {detector_mm}; a positive number in mm is wanted")
    image = _image(path)
    views = _angles(image.shape[0], arc, angles)
    if open_beam is not None:
        if not 0 < open_beam < math.inf:
            raise ValueError(f"open_beam is {open_beam}; a positive value is wanted")
        image = -np.log(_without_dead(path, image) / open_beam)
    y = torch.from_numpy(image.astype(np.float32))[None, None]
    size = image.shape[1]
    offset = rotation_axis(y, views) if axis is None else axis
    fields = {
        "shape": (1, 1, size, size),
        "angles": views.tolist(),
        "detectors": size,
        "pixel_mm": float(detector_mm),
        "detector_mm": float(detector_mm),
        "detector_offset_mm": -offset * detector_mm,
    }
    return Measurements(
        y=y,
        kind="parallel",
        fields=fields,
        affine=centred_affine((1, size, size), (detector_mm, detector_mm, detector_mm)),
        unit="1/mm",
        sigma_y=noise_sigma(y),
        mu_water=mu_water,
        simulated=False,
        source_sha256=sha256_of([path]),
    )


def _image(path: Path) -> np.ndarray:
    """(angle detector), float64, finite."""
    import tifffile

    damage = (struct.error, MemoryError, tifffile.TiffFileError)  # a damaged size asks for any amount of memory
    try:
        with tifffile.TiffFile(path) as file:
            image = file.asarray()
    except (OSError, EOFError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, *damage) as error:
        raise ValueError(f"{path} is not a whole TIFF file: {error}") from error
    if image.ndim != 2 or 0 in image.shape or image.dtype.kind not in "iuf":
        raise ValueError(f"{path} holds {image.dtype} of shape {image.shape}; one grey image is wanted")
    if not np.isfinite(image).all():
        raise ValueError(f"{path} has {int((~np.isfinite(image)).sum())} values that are NaN or infinite")
    return image.astype(np.float64)


def _without_dead(path: Path, image: np.ndarray) -> np.ndarray:
    """Values of 0 or below interpolated along the detector."""
    dead = image <= 0
    if dead.mean() > MOST_DEAD or dead.all(axis=1).any():
        raise ValueError(
            f"{path}: {dead.sum()} of {dead.size} intensities are 0 or below; does it hold line integrals?"
        )
    result, index = image.copy(), np.arange(image.shape[1])
    for row in np.flatnonzero(dead.any(axis=1)):
        result[row] = np.interp(index, index[~dead[row]], image[row, ~dead[row]])
    return result


def _angles(rows: int, arc: float | None, angles: Tensor | Sequence[float] | None) -> Tensor:
    """(angle,), float64."""
    if (arc is None) == (angles is None):
        raise ValueError("one of arc and angles is wanted, not both and not none")
    if arc is not None:
        if not 0 < abs(arc) <= 2 * math.pi + 1e-9:
            raise ValueError(f"the arc is {arc}; radians of at most 2 pi are wanted")
        return torch.arange(rows, dtype=torch.float64) * (arc / rows)
    views = torch.as_tensor(angles, dtype=torch.float64)
    if views.shape != (rows,):
        raise ValueError(f"{tuple(views.shape)} angles for {rows} rows; one angle a row is wanted")
    return views
