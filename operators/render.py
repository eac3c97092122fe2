"""A volume of density and colour seen by cameras: emission and absorption along rays, in plain torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from invdiff.operators.linear import as_dtype, dtype_name
from invdiff.operators.nonlinear import NonlinearOperatorBase
from invdiff.protocols import Space

DENSITY = 20.0  # of a voxel at x = 1, per half edge of the box: 1/8 of a half edge lets 8 % of the light through
DENSITY_SHARPNESS = 6.0  # of the softplus that keeps density positive: at x = -1 the whole box takes 2 % of the light
COLOUR_SHARPNESS = 4.0  # of the logistic that keeps colours in (0, 1): 2 % and 98 % at x = -1 and 1
REACH = 3**0.5  # of the box from its middle, half an edge being 1


class VolumeRenderer(NonlinearOperatorBase):
    """Pictures of a box of density and colour from pinhole cameras round it; not linear: what is in front hides.

    C = sum_i T_i (1 - exp(-sigma_i delta)) c_i + T_end b with T_i = exp(-delta sum_(j<i) sigma_j) along each ray
    (Max, "Optical models for direct volume rendering", 1995); sigma and sigma c are interpolated trilinearly. The
    image holds the box as planes in its channels: (s (1 + colours) depth h w), first the planes of density, then
    those of each colour, so that a 2D network takes it. In prior units: density is softplus(6 x) 20 / 6 per half
    edge, colours are logistic(4 x). Rows run downwards; the edges of the box are -1 and 1 on all three axes.

    Args:
        shape: (s c h w) of the domain, c a multiple of 1 + ``colours``.
        azimuth: of the cameras in radians, round the vertical axis, 0 looking along the planes' order; (v) or (s v).
        elevation: in radians above the horizon, one of all cameras.
        size: rows and columns of a picture.
        distance: of the cameras from the middle of the box, whose half edge is 1; more than its reach of 1.73.
        field: half the width of the picture at the middle of the box.
        samples: of a ray.
        colours: 3 for RGB, 1 for grey.
        background: colour b behind the box.
        dtype: of both sides.

    Raises:
        ValueError: a shape, a camera or a number that cannot be.
    """

    kind = "volume-renderer"

    def __init__(
        self,
        shape: Sequence[int],
        azimuth: Sequence[float] | Tensor,
        elevation: float = 0.3,
        size: Sequence[int] = (16, 16),
        distance: float = 4.0,
        field: float = 1.5,
        samples: int = 24,
        colours: int = 3,
        background: float = 1.0,
        dtype: torch.dtype | str = torch.float32,
    ) -> None:
        kind = as_dtype(dtype)
        angles = torch.as_tensor(azimuth, dtype=torch.float64)
        if len(shape) != 4 or min(shape) < 1 or colours < 1 or shape[1] % (1 + colours):
            raise ValueError(f"shape is {tuple(shape)}; (s c h w) with c a multiple of {1 + colours} is wanted")
        if angles.ndim not in (1, 2) or angles.shape[-1] < 1 or (angles.ndim == 2 and len(angles) != shape[0]):
            raise ValueError(f"azimuth is {tuple(angles.shape)}; (v) or ({shape[0]}, v) with v at least 1 is wanted")
        if not bool(torch.isfinite(angles).all()) or not abs(elevation) < math.pi / 2:
            raise ValueError(f"elevation is {elevation}; finite azimuths and less than a quarter turn are wanted")
        if not distance > REACH or not field > 0 or samples < 2 or len(size) != 2 or min(size) < 1:
            raise ValueError(
                f"distance {distance}, field {field}, samples {samples} and size {tuple(size)}; a camera outside the "
                f"box ({REACH:.3g}), a positive field, two samples and a picture are wanted"
            )
        self.domain = Space(tuple(shape), kind)
        self.range = Space((shape[0], angles.shape[-1], colours, *size), kind)
        self.azimuth, self.elevation, self.size = angles, float(elevation), tuple(size)
        self.distance, self.field, self.samples = float(distance), float(field), samples
        self.colours, self.background = colours, float(background)
        self.depth = shape[1] // (1 + colours)
        self._step = 2 * REACH / samples

    @property
    def views(self) -> tuple[int, ...]:
        """Numbers of the cameras."""
        return tuple(range(self.range.shape[1]))

    def split(self, index: Sequence[int]) -> VolumeRenderer:
        """The cameras ``index`` alone."""
        fields = self.fields()
        return VolumeRenderer(**{**fields, "azimuth": self.azimuth[..., list(index)]})

    def part(self, y: Tensor, index: Sequence[int]) -> Tensor:
        """The pictures (s v colour row column) of some cameras; y may be anything that broadcasts, v kept."""
        return y.index_select(1, torch.as_tensor(list(index), device=y.device))

    def whole(self, views: int) -> VolumeRenderer:
        """``views`` cameras evenly round the box, from the first one on."""
        return self._turned(range(views), views)

    def unmeasured(self, views: int) -> VolumeRenderer:
        """Those of ``whole`` but for its first, which is a measured one.

        Raises:
            ValueError: fewer than 2 views.
        """
        if views < 2:
            raise ValueError(f"views is {views}: the first one is measured; at least 2 are wanted")
        return self._turned(range(1, views), views)

    def _turned(self, steps: Sequence[int], of: int) -> VolumeRenderer:
        turns = 2 * math.pi / of * torch.tensor(list(steps), dtype=torch.float64)
        return VolumeRenderer(**{**self.fields(), "azimuth": self.azimuth[..., :1] + turns})

    def fields(self) -> dict[str, Any]:
        """All constructor arguments; ``azimuth`` is a float64 tensor."""
        shape, dtype = self.domain
        names = ("azimuth", "elevation", "size", "distance", "field", "samples", "colours", "background")
        return {"shape": list(shape), **{n: getattr(self, n) for n in names}, "dtype": dtype_name(dtype)}

    def density_and_colour(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Density (s 1 depth h w) per half edge and colours (s colour depth h w) in (0, 1) of an image."""
        box = x.unflatten(1, (1 + self.colours, self.depth))
        density = DENSITY / DENSITY_SHARPNESS * F.softplus(DENSITY_SHARPNESS * box[:, :1])
        return density, torch.sigmoid(COLOUR_SHARPNESS * box[:, 1:])

    def image_of(self, density: Tensor, colour: Tensor) -> Tensor:
        """The image (s c h w) of a density (s depth h w) and colours (s colour depth h w), both clipped to [-1, 1]."""
        scaled = (density * DENSITY_SHARPNESS / DENSITY).clamp_min(1e-6)
        planes = (scaled + torch.log(-torch.expm1(-scaled))) / DENSITY_SHARPNESS  # the inverse of softplus
        tints = torch.logit(colour, 1e-3) / COLOUR_SHARPNESS
        return torch.cat([planes[:, None], tints], 1).flatten(1, 2).clamp(-1, 1).to(self.domain.dtype)

    def lift(self, y: Tensor, chosen: Sequence[int] | None = None) -> Tensor:
        """Pictures smeared along their rays: for every voxel the mean over the cameras of the colour where it would be
        seen, and of its distance from the camera less that of the middle.

        Linear in y but for the distances; no inverse, for there is none: features for a network.

        Args:
            y: an element of ``range``.
            chosen: of ``views``, the cameras to take; all if None.

        Returns:
            (s (colours + 1) depth h w): planes of each colour, then those of the distance; 0 where no camera looks.

        Raises:
            ValueError: y is no element of ``range``.
        """
        if tuple(y.shape) != self.range.shape or y.dtype != self.range.dtype:
            raise ValueError(f"the measurement is {tuple(y.shape)} {y.dtype}; {self.range} is wanted")
        index = list(self.views if chosen is None else chosen)
        y, (where, far) = y[:, index], (v[:, index].to(y) for v in self._seen())
        s, v = y.shape[:2]
        inside = (where.abs() <= 1).all(-1).to(y.dtype).expand(s, *where.shape[1:-1])[:, :, None]
        grid = where.expand(s, *where.shape[1:]).flatten(0, 1).flatten(1, 2)
        colour = F.grid_sample(y.flatten(0, 1), grid, align_corners=False, padding_mode="border")
        colour = colour.view(s, v, self.colours, *inside.shape[3:])
        features = torch.cat([colour, far.expand(s, *far.shape[1:])[:, :, None]], 2)
        return ((features * inside).sum(1) / inside.sum(1).clamp_min(1)).flatten(1, 2)

    def _forward(self, x: Tensor) -> Tensor:
        density, colour = self.density_and_colour(x)
        points = self._along_rays().to(x)
        points = points.expand(len(x), *points.shape[1:])
        at = F.grid_sample(torch.cat([density, density * colour], 1), points, align_corners=False)
        sigma, glow = at[:, :1], at[:, 1:]
        depth = self._step * sigma.cumsum(-1)
        share = torch.exp(-(depth - self._step * sigma)) - torch.exp(-depth)
        tint = glow / sigma.clamp_min(torch.finfo(x.dtype).tiny ** 0.5)
        out = (share * tint).sum(-1) + self.background * torch.exp(-depth[..., -1])
        return out.transpose(1, 2).unflatten(-1, self.size)

    def _frame(self) -> Tensor:
        """Right, down and forward of each camera (s|1 v 3 3) in (w h d), float64."""
        a, e = self.azimuth.reshape(-1, self.azimuth.shape[-1]), torch.tensor(self.elevation).double()
        zero = torch.zeros_like(a)
        right = torch.stack([a.cos(), zero, -a.sin()], -1)
        forward = torch.stack([a.sin() * e.cos(), e.sin().expand_as(a), a.cos() * e.cos()], -1)
        return torch.stack([right, torch.linalg.cross(forward, right), forward], -2)

    def _along_rays(self) -> Tensor:
        """Points (s|1 v pixels samples 3) as ``grid_sample`` wants them: (w h d) in [-1, 1] inside the box."""
        frame = self._frame()
        rows, columns = (self.field * (2 * torch.arange(n).double() + 1 - n) / max(self.size) for n in self.size)
        plane = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1).flatten(0, 1)
        local = torch.cat([plane, torch.full_like(plane[:, :1], self.distance)], -1)
        rays = F.normalize(torch.einsum("pk,svkx->svpx", local, frame), dim=-1)
        along = self.distance - REACH + self._step * (torch.arange(self.samples).double() + 0.5)
        return rays[..., None, :] * along[:, None] - self.distance * frame[:, :, 2][:, :, None, None]

    def _seen(self) -> tuple[Tensor, Tensor]:
        """Where in its picture each voxel is (s|1 v depth h w 2), and how far (s|1 v depth h w), float64."""
        axes = [(2 * torch.arange(n).double() + 1 - n) / n for n in (self.depth, *self.domain.shape[2:])]
        d, h, w = torch.meshgrid(*axes, indexing="ij")
        local = torch.einsum("dhwx,svkx->svdhwk", torch.stack([w, h, d], -1), self._frame())
        rows, columns = self.size
        reach = self.field / max(self.size) * torch.tensor([columns, rows]).double()
        return local[..., :2] * self.distance / (local[..., 2:] + self.distance) / reach, local[..., 2]
