"""Parallel beam for stacks of slices."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from invdiff.operators.ct.arc import arc_of
from invdiff.operators.ct.beam import MEMORY_MB, BeamOperator, check_positive, check_shape, half_diagonal
from invdiff.operators.ct.fbp import fbp
from invdiff.operators.ct.joseph import Rays


class ParallelBeam(BeamOperator):
    """Line integrals along parallel rays: (s c h w) in 1/mm -> (s c angle detector) without unit.

    Axes, rotation sense and detector coordinate: ``invdiff.operators.ct``.

    Args:
        shape: (s c h w) of the image.
        angles: in radians, one a view, in any order.
        detectors: elements of the detector; enough for the image's diagonal if None.
        pixel_mm: side of a square pixel.
        detector_mm: width of a detector element; ``pixel_mm`` if None.
        detector_offset_mm: where the detector's middle is, along +u.
        multi_turn: take angles beyond 2 pi as they are, instead of for degrees.
        memory_mb: above this size of A and A^T together, rows are computed on the fly.
        dtype: float32, or float64 for exact tests.

    Raises:
        ValueError: angles beyond 2 pi, or any value that is not positive where it must be.
    """

    kind = "parallel"
    period = math.pi

    def __init__(
        self,
        shape: Sequence[int],
        angles: Sequence[float] | Tensor,
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
        width = pixel_mm if detector_mm is None else detector_mm
        check_positive("detector_mm", width)
        reach = half_diagonal(size, pixel_mm) + abs(detector_offset_mm)
        count = math.ceil(2 * reach / width) if detectors is None else detectors
        super().__init__(size, angles, count, pixel_mm, width, detector_offset_mm, multi_turn, memory_mb, dtype)

    def rays(self, angles: Tensor) -> Rays:
        """Through u (cos, sin), along (sin, -cos): each field (v detector)."""
        u, cos, sin = self.positions(angles.device), angles.cos()[:, None], angles.sin()[:, None]
        one = torch.ones_like(u)
        return Rays(u * cos, u * sin, sin * one, -cos * one)

    def locate(self, angles: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Detector index of every pixel, and weight 1: each (h·w v)."""
        (x, y), a = self.pixel_centres(device), angles.to(device)
        u = x * a.cos() + y * a.sin()
        index = (u - self.detector_offset_mm) / self.detector_mm + (self.detectors - 1) / 2
        return index, torch.ones_like(index)

    def ray_shares(self) -> Tensor:
        """Each view's share of a half turn, the same for all its rays: (view detector)."""
        return arc_of(self.angles, math.pi).shares[:, None].expand(-1, self.detectors)

    @property
    def spacing_at_origin(self) -> float:
        """``detector_mm``."""
        return self.detector_mm

    def pinv(self, y: Tensor) -> Tensor:
        """Filtered backprojection with the Ram-Lak filter: see ``fbp``."""
        return fbp(self, y)
