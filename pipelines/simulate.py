"""``invdiff simulate``: measurements of a volume, taken on its own grid and described for a coarser one."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from invdiff.config import find
from invdiff.datasets import Measurements, Volume, block_mean, pad_to_multiple
from invdiff.files import sha256_of
from invdiff.noise import KeyedNoise
from invdiff.operators import Gaussian, TransmissionPoisson, within_field
from invdiff.units import MU_WATER, mu_from_hu

AIR_HU = -1000.0
FINE_SIZE = 384  # pixels; a volume at least this wide is measured on its grid and reconstructed on half of it
SQUARE = 1e-3  # relative difference of row and column spacing that still counts as square pixels


@dataclass(frozen=True)
class Simulation:
    """How a volume is measured.

    Args:
        operator: ``parallel`` or ``fan``.
        views: number of projections.
        arc: degrees that they span, from ``first``; the end is not taken.
        first: angle of the first view in degrees.
        photons: photons a ray (transmission Poisson noise with its weights); 0 is noiseless.
        sigma: standard deviation of Gaussian noise on the line integrals instead; 0 is none.
        reduce: pixels of the volume (in each direction) to one of the reconstruction; 0 chooses 2 from 384 pixels on.
        source_origin_mm: source to rotation axis, for ``fan``.
        source_detector_mm: source to detector, for ``fan``.
        mu_water: attenuation of water in 1/mm.
        seed: of the noise.
        field: diameter in mm of the scanned field of view: rays beside it are not measured; 0 is all.
    """

    operator: str = "parallel"
    views: int = 20
    arc: float = 180.0
    first: float = 0.0
    photons: float = 0.0
    sigma: float = 0.0
    reduce: int = 0
    source_origin_mm: float = 570.0
    source_detector_mm: float = 1040.0
    mu_water: float = MU_WATER
    seed: int = 0
    field: float = 0.0

    def __post_init__(self) -> None:
        if self.operator not in ("parallel", "fan"):
            raise ValueError(f"operator {self.operator!r} cannot be simulated; parallel or fan is wanted")
        if self.views < 1:
            raise ValueError(f"views is {self.views}; at least 1 is wanted")
        if not 0 < self.arc <= 360:
            raise ValueError(f"the arc is {self.arc} degrees; more than 0 and at most 360 is wanted")
        if self.photons < 0 or self.sigma < 0:
            raise ValueError(f"photons {self.photons} and sigma {self.sigma}; none may be negative")
        if self.photons and self.sigma:
            raise ValueError(
                f"photons {self.photons} and sigma {self.sigma} are both given; one kind of noise is wanted"
            )
        if self.field < 0:
            raise ValueError(f"the field is {self.field} mm; 0 (all) or a positive number is wanted")
        if self.reduce < 0:
            raise ValueError(f"reduce is {self.reduce}; 0 (choose) or a positive number is wanted")

    @property
    def angles(self) -> list[float]:
        """Of the views, in radians."""
        return [math.radians(self.first + self.arc * k / self.views) for k in range(self.views)]


def some_slices(volume: Volume, text: str) -> Volume:
    """The slices ``a:b`` of a volume, counted from the feet.

    Raises:
        ValueError: not of the form a:b, or no slice in that range.
    """
    parts = text.split(":")
    if len(parts) != 2 or not all(p.strip().lstrip("-").isdigit() or not p.strip() for p in parts):
        raise ValueError(f"slices {text!r}; two numbers such as 10:26 are wanted")
    a, b, _ = slice(*[int(p) if p.strip() else None for p in parts]).indices(volume.data.shape[0])
    if a >= b:
        raise ValueError(f"slices {text!r} of a volume of {volume.data.shape[0]} are none")
    affine = volume.affine.copy()
    affine[:, 3] += a * affine[:, 2]
    return replace(volume, data=volume.data[a:b].clone(), affine=affine)


def simulate(volume: Volume, how: Simulation, metal: Tensor | None = None) -> tuple[Measurements, Volume]:
    """Measure a CT volume; also the truth on the reconstruction's grid.

    The volume's own pixels are projected, each detector pixel as the mean over ``reduce`` rays; the reconstruction's
    pixels are ``reduce`` times as wide, so that the same grid is not used twice (no inverse crime).

    Args:
        volume: in HU.
        how: it is measured.
        metal: bool (s c h w) on the volume's grid: rays through it are not measured.

    Raises:
        ValueError: a volume that is not in HU, whose pixels are not square, or of which nothing is measured.
    """
    if volume.unit != "HU":
        raise ValueError(f"the volume is in {volume.unit}; CT is simulated from HU")
    _, rows, columns = volume.spacing_mm
    if abs(rows - columns) > SQUARE * rows:
        raise ValueError(f"the pixels are {rows:g} x {columns:g} mm; square ones are wanted")
    factor = how.reduce or (2 if max(volume.data.shape[2:]) >= FINE_SIZE else 1)
    # A body is nowhere less dense than vacuum: the padding below air outside a scanner's field of view is air
    fine = pad_to_multiple(replace(volume, data=volume.data.clamp_min(AIR_HU)), factor, AIR_HU)
    coarse = block_mean(fine, factor)
    operator = find("operators", how.operator)
    s, c, h, w = coarse.data.shape
    fields: dict[str, Any] = {"shape": (s, c, h, w), "angles": how.angles, "pixel_mm": columns * factor}
    if how.operator == "fan":
        fields |= {"source_origin_mm": how.source_origin_mm, "source_detector_mm": how.source_detector_mm}
    model = operator(**fields)
    fields = model.fields()
    clean = _project(operator, fields, (mu_from_hu(v[None], how.mu_water) for v in fine.data), factor)
    keep = None
    if how.field:
        keep = within_field(model, how.field)[None, None]
    if metal is not None:
        solid = pad_to_multiple(replace(volume, data=metal.float()), factor, 0.0).data
        seen = _project(operator, fields, solid.split(1), factor) <= 0
        keep = seen if keep is None else seen & keep
    y, sigma_y, sqrt_w = _noisy(clean, how)
    y = y if keep is None else torch.where(keep, y, 0.0)
    sha = str(volume.source.get("sha256", ""))
    known = (y, how.operator, fields, coarse.affine, "1/mm", sigma_y, sqrt_w, how.mu_water, True, sha, coarse.storage)
    return Measurements(*known, keep=keep), coarse


def _project(operator: Any, fields: dict[str, Any], images: Iterable[Tensor], factor: int) -> Tensor:
    """Line integrals (s c angle detector) of images (1 c h w), ``factor`` times as fine; mean of as many rays each."""
    detectors = fields["detectors"]
    h, w = (factor * n for n in fields["shape"][2:])
    fine_fields = fields | {
        "shape": (1, fields["shape"][1], h, w),
        "pixel_mm": fields["pixel_mm"] / factor,
        "detectors": detectors * factor,
        "detector_mm": fields["detector_mm"] / factor,
    }
    forward = operator(**fine_fields)
    return torch.cat([forward(image) for image in images]).unflatten(-1, (detectors, factor)).mean(-1)


def _noisy(clean: Tensor, how: Simulation) -> tuple[Tensor, float | None, Tensor | None]:
    noise = KeyedNoise(how.seed)
    if how.photons:
        y, sqrt_w = TransmissionPoisson(how.photons).sample(clean, noise)
        return y, None, sqrt_w
    if how.sigma:
        return Gaussian(how.sigma).sample(clean, noise)[0], how.sigma, None
    return clean, 0.0, None


def source_hash(path: Path) -> str:
    """SHA-256 of a file, or of the files of a folder."""
    return sha256_of(sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path])
