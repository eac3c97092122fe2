"""Fan beam with a flat detector for stacks of slices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from invdiff.operators.ct.arc import arc_of
from invdiff.operators.ct.beam import FULL_TURN, MEMORY_MB, BeamOperator, check_positive, check_shape, half_diagonal
from invdiff.operators.ct.fbp import fbp
from invdiff.operators.ct.joseph import Rays

SHORT_SCAN_TAPER = math.radians(10)  # the width that Noo et al. 2002 take


class FanBeam(BeamOperator):
    """Line integrals from a point source to a flat detector: (s c h w) in 1/mm -> (s c angle detector) without unit.

    Axes, rotation sense and detector coordinate: ``invdiff.operators.ct``. A virtual detector through the rotation
    centre is the case ``source_detector_mm == source_origin_mm``.

    Args:
        shape: (s c h w) of the image.
        angles: in radians, one a view, in any order.
        source_origin_mm: from the source to the rotation centre; the source stays outside the image.
        source_detector_mm: from the source to the detector, through the rotation centre.
        detectors: elements of the detector; enough for the image's diagonal if None.
        pixel_mm: side of a square pixel.
        detector_mm: width of a detector element; if None such that it is ``pixel_mm`` at the rotation centre.
        detector_offset_mm: where the detector's middle is, along +u, on the detector itself.
        multi_turn: take angles beyond 2 pi as they are, instead of for degrees.
        memory_mb: above this size of A and A^T together, rows are computed on the fly.
        dtype: float32, or float64 for exact tests.

    Raises:
        ValueError: angles beyond 2 pi, a source inside the image's circle, a detector nearer to the source than the
            rotation centre, or any value that is not positive where it must be.
    """

    kind = "fan"
    period = 2 * math.pi

    def __init__(
        self,
        shape: Sequence[int],
        angles: Sequence[float] | Tensor,
        source_origin_mm: float,
        source_detector_mm: float,
        detectors: int | None = None,
        pixel_mm: float = 1.0,
        detector_mm: float | None = None,
        detector_offset_mm: float = 0.0,
        multi_turn: bool = False,
        memory_mb: float = MEMORY_MB,
        dtype: torch.dtype | str = torch.float32,
    ) -> None:
        size = check_shape(shape)
        check_positive("pixel_mm", pixel_mm)
        radius = half_diagonal(size, pixel_mm)
        if not (math.isfinite(source_origin_mm) and source_origin_mm > radius):
            raise ValueError(
                f"source_origin_mm is {source_origin_mm}; more than {radius:.4g}, half the image's diagonal, is wanted"
            )
        if not (math.isfinite(source_detector_mm) and source_detector_mm >= source_origin_mm):
            raise ValueError(
                f"source_detector_mm is {source_detector_mm}; at least source_origin_mm = {source_origin_mm} is wanted"
            )
        self.source_origin_mm, self.source_detector_mm = float(source_origin_mm), float(source_detector_mm)
        width = pixel_mm * self.magnification if detector_mm is None else detector_mm
        check_positive("detector_mm", width)
        tangent = source_detector_mm * radius / math.sqrt(source_origin_mm**2 - radius**2)
        count = math.ceil(2 * (tangent + abs(detector_offset_mm)) / width) if detectors is None else detectors
        super().__init__(size, angles, count, pixel_mm, width, detector_offset_mm, multi_turn, memory_mb, dtype)

    @property
    def magnification(self) -> float:
        """Size on the detector over size at the rotation centre."""
        return self.source_detector_mm / self.source_origin_mm

    def ray_shares(self) -> Tensor:
        """Share of the turn x cosine of the fan angle x share of a ray that is measured from both ends.

        The latter is c / (c + c_opposite), c falling to 0 at the ends of the arc (Noo, Defrise, Clackdoyle and Kudo,
        Phys. Med. Biol. 47, 2002): 1/2 for a full turn, smooth for a short scan, 1 where only one end is measured.
        """
        arc = arc_of(self.angles, FULL_TURN)
        fan = torch.atan2(self.positions(self.device), torch.tensor(self.source_detector_mm, dtype=torch.float64))
        own = arc.taper(self.angles, SHORT_SCAN_TAPER)[:, None]
        opposite = arc.taper(self.angles[:, None] + math.pi - 2 * fan, SHORT_SCAN_TAPER)
        return arc.shares[:, None] * fan.cos() * own / (own + opposite)

    @property
    def spacing_at_origin(self) -> float:
        """``detector_mm`` over the magnification."""
        return self.detector_mm / self.magnification

    def rays(self, angles: Tensor) -> Rays:
        """From the source to each detector element: each field (v detector)."""
        u, cos, sin = self.positions(angles.device), angles.cos()[:, None], angles.sin()[:, None]
        x, y = self.source_origin_mm * sin, -self.source_origin_mm * cos
        dx, dy = u * cos - self.source_detector_mm * sin, u * sin + self.source_detector_mm * cos
        return Rays(x.expand_as(dx), y.expand_as(dy), dx, dy)

    def locate(self, angles: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Detector index of every pixel, and (source_origin_mm / its depth from the source)^2: each (h·w v)."""
        (x, y), a = self.pixel_centres(device), angles.to(device)
        depth = self.source_origin_mm - x * a.sin() + y * a.cos()
        u = self.source_detector_mm * (x * a.cos() + y * a.sin()) / depth
        index = (u - self.detector_offset_mm) / self.detector_mm + (self.detectors - 1) / 2
        return index, (self.source_origin_mm / depth) ** 2

    def fields(self) -> dict[str, Any]:
        """The constructor's arguments, without ``memory_mb``: that is the machine's matter, not the scan's."""
        distances = {"source_origin_mm": self.source_origin_mm, "source_detector_mm": self.source_detector_mm}
        return {**super().fields(), **distances}

    def pinv(self, y: Tensor) -> Tensor:
        """Filtered backprojection with the Ram-Lak filter: see ``fbp``."""
        return fbp(self, y)
