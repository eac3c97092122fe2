"""Cartesian MRI with one or many coils."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from invdiff.operators.channels import slice_count
from invdiff.operators.linear import LinearOperatorBase, as_dtype, dtype_name
from invdiff.operators.mask import check_mask
from invdiff.protocols import Space

PLANE = (-2, -1)


def centred_fft(x: Tensor) -> Tensor:
    """Orthonormal 2D FFT over the last two axes, zero frequency and origin in the middle (index n // 2)."""
    k: Tensor = torch.fft.fftshift(torch.fft.fft2(torch.fft.ifftshift(x, dim=PLANE), norm="ortho"), dim=PLANE)
    return k


def centred_ifft(k: Tensor) -> Tensor:
    """The inverse, and so the adjoint, of ``centred_fft``."""
    x: Tensor = torch.fft.fftshift(torch.fft.ifft2(torch.fft.ifftshift(k, dim=PLANE), norm="ortho"), dim=PLANE)
    return x


class CartesianMRI(LinearOperatorBase):
    """x -> mask · F(maps · x), SENSE (Pruessmann et al. 1999) on the Cartesian grid; zero where not sampled.

    Domain (s 1 h w) complex, range (s coil h w) complex. The number of slices is that of ``mask`` or ``maps`` where
    one has a slice axis.

    Args:
        mask: bool or 0 and 1, (h w) or (s h w), zero frequency at index n // 2.
        maps: coil sensitivities, complex, (coil h w) or (s coil h w); None: one coil of sensitivity 1.
        slices: s, needed only where neither has a slice axis and it is not 1.
        dtype: of the image and of k-space.

    Raises:
        ValueError: shapes that do not fit one another, values other than 0 and 1 in the mask, real or non-finite
            maps, or a real dtype.
    """

    kind = "cartesian-mri"

    def __init__(
        self,
        mask: Tensor,
        maps: Tensor | None = None,
        slices: int | None = None,
        dtype: torch.dtype | str = torch.complex64,
    ) -> None:
        kind = as_dtype(dtype)
        if not kind.is_complex:
            raise ValueError(f"dtype is {dtype_name(kind)}; a complex one is wanted")
        if mask.ndim not in (2, 3):
            raise ValueError(f"the mask is {tuple(mask.shape)}; (h w) or (s h w) is wanted")
        named: dict[str, int | None] = {"mask": mask.shape[0] if mask.ndim == 3 else None}
        coils = 1
        if maps is not None:
            _check_maps(maps, mask)
            named["maps"] = maps.shape[0] if maps.ndim == 4 else None
            coils = maps.shape[-3]
        s = slice_count(slices, named)
        h, w = mask.shape[-2:]
        self.domain, self.range = Space((s, 1, h, w), kind), Space((s, coils, h, w), kind)
        self.mask = check_mask(mask.detach()).to(kind.to_real())
        self.maps = None if maps is None else maps.detach().to(kind).clone()

    def _forward(self, x: Tensor) -> Tensor:
        image = x if self.maps is None else self.maps.to(x.device) * x
        return self.mask.to(x.device) * centred_fft(image)

    def _adjoint(self, y: Tensor) -> Tensor:
        image = centred_ifft(self.mask.to(y.device) * y)
        return image if self.maps is None else (self.maps.to(y.device).conj() * image).sum(1, keepdim=True)

    def solve(
        self, rhs: Tensor, rho: float, x0: Tensor | None = None, iterations: int = 100, tolerance: float | None = None
    ) -> Tensor:
        """F^H (mask + rho)^-1 F rhs without maps; conjugate gradients with them."""
        if self.maps is not None:
            return super().solve(rhs, rho, x0, iterations, tolerance)
        self._check_rho(rho)
        self._check(rhs, self.domain, "right-hand side")
        return centred_ifft(centred_fft(rhs) / (self.mask.to(rhs.device) + rho))

    def pinv(self, y: Tensor) -> Tensor:
        """Without maps the zero-filled image, which is the pseudo-inverse; with them least squares by CG (SENSE)."""
        return super().pinv(y) if self.maps is not None else self.adjoint(y)

    def fields(self) -> dict[str, Any]:
        """``mask`` (bool tensor, (h w) or (s h w)), ``maps`` (tensor or None), ``slices``, ``dtype``."""
        mask = self.mask[:, 0] != 0
        shared = mask[0] if mask.shape[0] == 1 else mask
        shape, dtype = self.domain
        return {"mask": shared, "maps": self.maps, "slices": shape[0], "dtype": dtype_name(dtype)}


def _check_maps(maps: Tensor, mask: Tensor) -> None:
    if maps.ndim not in (3, 4) or maps.shape[-2:] != mask.shape[-2:]:
        raise ValueError(
            f"maps are {tuple(maps.shape)} and the mask is {tuple(mask.shape)}; (coil h w) or (s coil h w) of the "
            "mask's h and w is wanted"
        )
    if not maps.is_complex() or not bool(torch.isfinite(torch.view_as_real(maps)).all()):
        raise ValueError(f"maps are {dtype_name(maps.dtype)}; finite complex values are wanted")
