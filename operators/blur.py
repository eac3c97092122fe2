"""Blur: convolution of every channel with one kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from invdiff.operators.linear import LinearOperatorBase, as_dtype, dtype_name
from invdiff.protocols import Space

PLANE = (-2, -1)
BOUNDARIES = ("zero", "circular")
NOT_PASSED = 1e-6  # |K| over its largest below which ``pinv`` takes a frequency for lost


class Blur(LinearOperatorBase):
    """(A x)_i = sum_d k_d x_(i - d), of the image's own size; the kernel's origin is its element (h // 2, w // 2).

    By FFT, so that the cost does not grow with the kernel. Lengths are in pixels: an operator for any unit.

    Args:
        kernel: real, (h w), even sizes too.
        shape: (s c h w) of the domain and the range.
        boundary: what lies outside the image: ``zero``, or ``circular``, which is diagonal in frequency and
            has closed forms for ``solve`` and ``pinv``.
        dtype: of the domain and the range.

    Raises:
        ValueError: a kernel that is not finite, real and (h w), a circular one larger than the image, another shape
            or boundary.
    """

    kind = "blur"

    def __init__(
        self, kernel: Tensor, shape: Sequence[int], boundary: str = "zero", dtype: torch.dtype | str = torch.float32
    ) -> None:
        if kernel.ndim != 2 or kernel.is_complex() or not bool(torch.isfinite(kernel).all()) or kernel.numel() == 0:
            raise ValueError(f"the kernel is {tuple(kernel.shape)} {kernel.dtype}; finite real (h w) is wanted")
        if len(shape) != 4 or min(shape) < 1:
            raise ValueError(f"shape is {tuple(shape)}; (s c h w), each at least 1, is wanted")
        if boundary not in BOUNDARIES:
            raise ValueError(f"boundary is {boundary!r}; one of {', '.join(BOUNDARIES)} is wanted")
        size = tuple(shape)[2:]
        if boundary == "circular" and any(k > n for k, n in zip(kernel.shape, size, strict=True)):
            raise ValueError(f"the kernel is {tuple(kernel.shape)} and the image {size}; a smaller kernel is wanted")
        self.domain = self.range = Space(tuple(shape), as_dtype(dtype))
        self.kernel, self.boundary = kernel.detach().to(torch.float64).clone(), boundary
        extra = [k - 1 if boundary == "zero" else 0 for k in kernel.shape]
        self._padded = tuple(n + e for n, e in zip(size, extra, strict=True))
        full = torch.zeros(self._padded, dtype=torch.float64, device=kernel.device)
        full[: kernel.shape[0], : kernel.shape[1]] = self.kernel
        centred = full.roll([-(k // 2) for k in kernel.shape], PLANE)
        transform = torch.fft.fft2 if self.domain.dtype.is_complex else torch.fft.rfft2
        self._spectrum = transform(centred).to(self.domain.dtype.to_complex())

    def _forward(self, x: Tensor) -> Tensor:
        return self._filter(x, self._spectrum)

    def _adjoint(self, y: Tensor) -> Tensor:
        return self._filter(y, self._spectrum.conj())

    def solve(
        self, rhs: Tensor, rho: float, x0: Tensor | None = None, iterations: int = 100, tolerance: float | None = None
    ) -> Tensor:
        """F^-1 (|K|^2 + rho)^-1 F rhs for the circular boundary; conjugate gradients for zeros."""
        if self.boundary != "circular":
            return super().solve(rhs, rho, x0, iterations, tolerance)
        self._check_rho(rho)
        self._check(rhs, self.domain, "right-hand side")
        return self._filter(rhs, 1 / (self._spectrum.abs().square() + rho))

    def pinv(self, y: Tensor) -> Tensor:
        """1 / K where it is not 0 for the circular boundary: the pseudo-inverse; least squares by CG for zeros.

        A smooth kernel's 1 / K is huge at high frequencies: with noise this is no picture to look at.
        """
        if self.boundary != "circular":
            return super().pinv(y)
        self._check(y, self.range, "measurement")
        size = self._spectrum.abs()
        passed = size > NOT_PASSED * size.max()
        return self._filter(y, torch.where(passed, 1 / self._spectrum.where(passed, 1), 0))

    def fields(self) -> dict[str, Any]:
        """``kernel`` (float64 tensor), ``shape``, ``boundary``, ``dtype``."""
        shape, dtype = self.domain
        return {"kernel": self.kernel, "shape": list(shape), "boundary": self.boundary, "dtype": dtype_name(dtype)}

    def _filter(self, x: Tensor, gain: Tensor) -> Tensor:
        """The image, padded by zeros, times ``gain`` in frequency, and cut to its size again."""
        h, w = x.shape[2:]
        g = gain.to(x.device)
        if x.is_complex():
            out: Tensor = torch.fft.ifft2(g * torch.fft.fft2(x, s=self._padded))
        else:
            out = torch.fft.irfft2(g * torch.fft.rfft2(x, s=self._padded), s=self._padded)
        return out[..., :h, :w].contiguous()


def gaussian_kernel(deviation: float, radius: int | None = None) -> Tensor:
    """A Gaussian of sum 1 on (2 radius + 1) squared pixels, float64.

    Args:
        deviation: standard deviation in pixels.
        radius: three deviations if None.

    Raises:
        ValueError: a deviation that is not positive, or a negative radius.
    """
    reach = int(3 * deviation + 0.5) if radius is None else radius
    if not deviation > 0 or reach < 0:
        raise ValueError(f"deviation is {deviation} and radius {radius}; positive ones are wanted")
    line = torch.exp(-torch.arange(-reach, reach + 1).double().square() / (2 * deviation**2))
    plane = torch.outer(line, line)
    return plane / plane.sum()
