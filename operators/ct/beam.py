"""What parallel and fan beam share: validation, the matched pair of sparse matrices, the memory budget."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from invdiff.operators.ct.joseph import Rays, footprints
from invdiff.operators.linear import LinearOperatorBase, as_dtype, dtype_name
from invdiff.operators.sparse import MatchedProduct, Rows, join, multiply, transpose
from invdiff.protocols import Space

MEMORY_MB = 2048.0  # of A and A^T together, at most, unless told
CHUNK_ENTRIES = 2**22  # footprint entries computed at once
ENTRY_BYTES = 60  # of each meanwhile, about
SLICES_AT_ONCE = 32, 64  # in A and in A^T: fastest of 16, 32, 64, 128 at 256^2 with 60 views and at 512^2 with 20
FULL_TURN = 2 * math.pi


class BeamOperator(LinearOperatorBase):
    """Line integrals of a stack of slices; ``ParallelBeam`` and ``FanBeam`` say along which rays.

    A and A^T are built once, on the CPU; where both would pass ``memory_mb``, their rows are computed again, some
    views at a time, in every product, on the device of the data.

    Args:
        shape: (s c h w) of the image.
        angles: in radians, one a view.
        detectors: elements of the detector.
        pixel_mm: side of a square pixel.
        detector_mm: width of a detector element.
        detector_offset_mm: of the detector's middle, along +u.
        multi_turn: take angles beyond 2 pi as they are.
        memory_mb: most memory for A and A^T together.
        dtype: of the image and of the sinogram, real.
    """

    unit = "1/mm"
    period: ClassVar[float]  # radians after which the rays come again

    def __init__(
        self,
        shape: Sequence[int],
        angles: Sequence[float] | Tensor,
        detectors: int,
        pixel_mm: float,
        detector_mm: float,
        detector_offset_mm: float,
        multi_turn: bool,
        memory_mb: float,
        dtype: torch.dtype | str,
    ) -> None:
        self.angles = check_angles(angles, multi_turn)
        if detectors < 1:
            raise ValueError(f"detectors is {detectors}; at least 1 is wanted")
        for name, value in (("detector_mm", detector_mm), ("memory_mb", memory_mb)):
            check_positive(name, value)
        if not math.isfinite(detector_offset_mm):
            raise ValueError(f"detector_offset_mm is {detector_offset_mm}; a finite number is wanted")
        kind = as_dtype(dtype)
        if kind not in (torch.float32, torch.float64):
            raise ValueError(f"dtype is {dtype_name(kind)}; float32 or float64 is wanted")
        s, c, h, w = check_shape(shape)
        self.domain = Space((s, c, h, w), kind)
        self.range = Space((s, c, self.angles.numel(), detectors), kind)
        self.detectors, self.pixel_mm, self.detector_mm = detectors, float(pixel_mm), float(detector_mm)
        self.detector_offset_mm, self.multi_turn, self.memory_mb = float(detector_offset_mm), multi_turn, memory_mb
        self._matrices = self._build() if self._fits() else None

    @abstractmethod
    def rays(self, angles: Tensor) -> Rays:
        """The rays of the views ``angles`` (v), each field (v detector)."""

    @abstractmethod
    def locate(self, angles: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Where pixels fall on the detector, and their weight in backprojection.

        Args:
            angles: (v).
            device: of the results.

        Returns:
            Detector index, not rounded, and weight, float64, each (h·w v).
        """

    @abstractmethod
    def ray_shares(self) -> Tensor:
        """Weight of each ray before the ramp filter: share of the arc, cosine, redundancy. (view detector) float64."""

    @property
    @abstractmethod
    def spacing_at_origin(self) -> float:
        """Width of a detector element seen at the rotation centre, in mm."""

    def product(self, v: Tensor, transposed: bool) -> Tensor:
        """A v of (h·w k), or A^T v of (views·detectors k): one of the matched pair."""
        if self._matrices is not None:
            return multiply(self._matrices[transposed], v)
        pixels = math.prod(self.domain.shape[2:])
        if not transposed:
            return torch.cat([multiply(rows, v) for rows in self._chunks(v.device)])
        result, done = v.new_zeros(pixels, v.shape[1]), 0
        for rows in self._chunks(v.device):
            count = rows.ptr.numel() - 1
            result = result + multiply(transpose(rows, pixels), v[done : done + count])
            done += count
        return result

    def interpolated(self, y: Tensor, kept: Tensor) -> Tensor:
        """``y`` with the rays that are not ``kept`` (its shape, bool) linear between their neighbours in the view.

        Beyond the outermost kept ray the value stays; a view of which nothing is kept is 0.
        """
        index = torch.arange(self.detectors, device=y.device).expand(y.shape)
        lower = torch.where(kept, index, -1).cummax(-1).values
        upper = torch.where(kept, index, self.detectors).flip(-1).cummin(-1).values.flip(-1)
        lower, upper = torch.where(lower < 0, upper, lower), torch.where(upper == self.detectors, lower, upper)
        nothing = (lower == self.detectors) | (upper < 0)
        ends = [y.gather(-1, end.clamp(0, self.detectors - 1)) for end in (lower, upper)]
        share = (index - lower).to(y) / (upper - lower).clamp_min(1).to(y)
        return torch.where(nothing, 0.0, ends[0] + share * (ends[1] - ends[0]))

    def positions(self, device: torch.device | None = None) -> Tensor:
        """Detector coordinate u of each element's middle in mm (detector), float64."""
        index = torch.arange(self.detectors, dtype=torch.float64, device=device)
        return (index - (self.detectors - 1) / 2) * self.detector_mm + self.detector_offset_mm

    def pixel_centres(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """World x and y in mm of the pixel centres, row by row, each (h·w 1), float64."""
        h, w = self.domain.shape[2:]
        x = (torch.arange(w, dtype=torch.float64, device=device) - (w - 1) / 2) * self.pixel_mm
        y = ((h - 1) / 2 - torch.arange(h, dtype=torch.float64, device=device)) * self.pixel_mm
        return x.repeat(h)[:, None], y.repeat_interleave(w)[:, None]

    def fields(self) -> dict[str, Any]:
        """The constructor's arguments, without ``memory_mb``: that is the machine's matter, not the scan's."""
        shape, dtype = self.domain
        return {
            "shape": list(shape),
            "angles": self.angles.tolist(),
            "detectors": self.detectors,
            "pixel_mm": self.pixel_mm,
            "detector_mm": self.detector_mm,
            "detector_offset_mm": self.detector_offset_mm,
            "multi_turn": self.multi_turn,
            "dtype": dtype_name(dtype),
        }

    @property
    def views(self) -> tuple[int, ...]:
        """The numbers of the angles."""
        return tuple(range(self.angles.numel()))

    def split(self, index: Sequence[int]) -> LinearOperatorBase:
        """The operator of the views ``index`` alone, whose measurements are ``y[..., index, :]``."""
        return self._at(self.angles[torch.as_tensor(list(index), dtype=torch.int64)])

    def whole(self, views: int) -> LinearOperatorBase:
        """``views`` angles evenly over ``period`` from the first one on, at most as many as the grid resolves."""
        return self._at(self._even(views))

    def unmeasured(self, views: int) -> LinearOperatorBase:
        """Those of ``whole`` that are no nearer than half a step to a measured one.

        Raises:
            ValueError: none is left.
        """
        angles, measured = self._even(views), self.angles.remainder(self.period)
        gap = (angles[:, None] - measured).abs()
        left = torch.minimum(gap, self.period - gap).amin(1) > 0.499 * self.period / len(angles)
        if not bool(left.any()):
            raise ValueError(f"all of {len(angles)} views are measured; more views, or the whole are wanted")
        return self._at(angles[left])

    def _even(self, views: int) -> Tensor:
        count = max(1, min(views, math.ceil(self.period / 2 * max(self.domain.shape[2:]))))
        return (self.angles[0] + self.period / count * torch.arange(count, dtype=torch.float64)).remainder(self.period)

    def _at(self, angles: Tensor) -> LinearOperatorBase:
        fields = {**self.fields(), "angles": angles.tolist(), "memory_mb": self.memory_mb}
        return type(self)(**fields).to(self.device)

    def _forward(self, x: Tensor) -> Tensor:
        return self._apply(x, False).reshape(self.range.shape)

    def _adjoint(self, y: Tensor) -> Tensor:
        return self._apply(y, True).reshape(self.domain.shape)

    def _apply(self, v: Tensor, transposed: bool) -> Tensor:
        images = v.flatten(0, 1).flatten(1)
        width = images.shape[0] if self._matrices is None else SLICES_AT_ONCE[transposed]
        return torch.cat([self._apply_columns(part, transposed) for part in images.split(width)])

    def _apply_columns(self, images: Tensor, transposed: bool) -> Tensor:
        columns = images.t().clone(memory_format=torch.contiguous_format)  # canonical strides for a single slice too
        product: Tensor = MatchedProduct.apply(columns, self, transposed)
        return product.t().contiguous()

    def matrix_bytes(self, memory_mb: float) -> int:
        """What A and A^T take, estimated, built or not; 0 where that is beyond ``memory_mb``, so that none are kept."""
        entries = self._entries()
        size = 2 * entries * (4 + self.domain.dtype.itemsize)
        return int(size) if size <= memory_mb * 2**20 and entries < 2**31 else 0

    def footprint_bytes(self) -> int:
        """What computing rows of A takes meanwhile, estimated."""
        h, w = self.domain.shape[2:]
        return ENTRY_BYTES * min(CHUNK_ENTRIES, 2 * max(h, w) * self.detectors * self.angles.numel())

    def _fits(self) -> bool:
        return self.matrix_bytes(self.memory_mb) > 0

    def _entries(self) -> float:
        """Entries of A, estimated."""
        h, w = self.domain.shape[2:]
        across = min(max(h, w) * self.detectors, h * w * self.pixel_mm / self.spacing_at_origin)
        return 2 * across * self.angles.numel()

    def _chunks(self, device: torch.device) -> Iterator[Rows]:
        h, w = self.domain.shape[2:]
        views = max(1, CHUNK_ENTRIES // (2 * max(h, w) * self.detectors))
        for angles in self.angles.to(device).split(views):
            yield footprints(self.rays(angles), (h, w), self.pixel_mm, self.domain.dtype)

    def _build(self) -> tuple[Rows, Rows]:
        rows = join(list(self._chunks(self.angles.device)))
        return rows, transpose(rows, math.prod(self.domain.shape[2:]))


def check_shape(shape: Sequence[int]) -> tuple[int, int, int, int]:
    """(s c h w) of positive numbers.

    Raises:
        ValueError: anything else.
    """
    if len(shape) != 4 or min(shape) < 1:
        raise ValueError(f"shape is {tuple(shape)}; (s c h w), each at least 1, is wanted")
    s, c, h, w = shape
    return s, c, h, w


def check_positive(name: str, value: float) -> None:
    """Refuse a length that is not positive and finite.

    Raises:
        ValueError: with ``name`` and ``value``.
    """
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} is {value}; a positive number is wanted")


def check_angles(angles: Sequence[float] | Tensor, multi_turn: bool) -> Tensor:
    """Angles in radians as float64 on the CPU.

    Raises:
        ValueError: none, not finite, or beyond a full turn without ``multi_turn``.
    """
    values = torch.as_tensor(angles, dtype=torch.float64).detach().cpu().clone()
    if values.ndim != 1 or values.numel() == 0 or not bool(torch.isfinite(values).all()):
        raise ValueError(f"angles have shape {tuple(values.shape)}; a list of at least one finite number is wanted")
    largest = max(float(values.abs().max()), float(values.max() - values.min()))
    if not multi_turn and largest > FULL_TURN * (1 + 1e-6):
        raise ValueError(
            f"angles go up to {largest:.4g}, beyond 2*pi: degrees, most likely; radians are wanted (or multi_turn=True)"
        )
    return values


def half_diagonal(shape: Sequence[int], pixel_mm: float) -> float:
    """Radius in mm of the circle about the rotation centre that holds the whole image."""
    return pixel_mm * math.hypot(shape[-2], shape[-1]) / 2
