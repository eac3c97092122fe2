"""The non-uniform FFT by Kaiser-Bessel gridding (Fessler & Sutton 2003; Beatty et al. 2005), as one sparse product.

Samples of the Fourier transform between the grid's points: the image is divided by the transform of a short kernel,
zero-padded, transformed by FFT on a grid ``oversampling`` times as fine, and each sample is a sum over the ``width``
by ``width`` nearest points of that grid, weighted by the kernel. The image stands in the middle of the padded grid;
the shift that this asks for is a sign (-1)^(row + column) of the weights, so nothing is moved.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from invdiff.operators.sparse import MatchedProduct, Rows, multiply, transpose

OVERSAMPLING = (1.25, 1.5, 2.0)  # tried in this order
FEW = 8  # widest kernel for which the coarser grid is the faster one: width 7 at 1.25 against 6 at 1.5 (256^2, 8 coils)
ERROR = 0.45  # of the rule error = ERROR exp(-(width - 1) pi sqrt(1 - 1 / oversampling)), measured at 1.25 to 2
FACTORS = (2, 3, 5, 7)  # sizes of fast FFTs
FINEST = {torch.float32: 1e-6, torch.float64: 1e-14}


class Grid(NamedTuple):
    """All that the transform of one trajectory needs.

    size: (h w) of the image; fine: (h w) of the oversampled grid; rows, turned: kernel weights from the grid to the
    samples and their transpose; scale: (h w), one over the kernel's transform, times the factor that
    makes all orthonormal.
    """

    size: tuple[int, int]
    fine: tuple[int, int]
    rows: Rows
    turned: Rows
    scale: Tensor

    def product(self, v: Tensor, transposed: bool) -> Tensor:
        """(grid points k) -> (samples k), or back."""
        return multiply(self.turned if transposed else self.rows, v)

    def forward(self, images: Tensor) -> Tensor:
        """Samples of the centred orthonormal Fourier transform: (k h w) complex -> (k samples)."""
        (h, w), (rows, columns) = self.size, self.fine
        top, left = rows // 2 - h // 2, columns // 2 - w // 2
        beside = (left, columns - w - left, top, rows - h - top)
        grid = torch.fft.fft2(torch.nn.functional.pad(images * self.scale.to(images.device), beside))
        table = torch.view_as_real(grid.permute(1, 2, 0).contiguous()).reshape(rows * columns, -1)
        samples: Tensor = MatchedProduct.apply(table, self, False)
        return torch.view_as_complex(samples.view(len(samples), -1, 2)).t().contiguous()

    def adjoint(self, samples: Tensor) -> Tensor:
        """The adjoint of ``forward``: (k samples) -> (k h w)."""
        (h, w), (rows, columns) = self.size, self.fine
        top, left = rows // 2 - h // 2, columns // 2 - w // 2
        table = torch.view_as_real(samples.t().contiguous()).reshape(samples.shape[1], -1)
        spread: Tensor = MatchedProduct.apply(table, self, True)
        grid = torch.view_as_complex(spread.view(rows, columns, -1, 2)).permute(2, 0, 1)
        images = torch.fft.ifft2(grid, norm="forward")[:, top : top + h, left : left + w]
        return images * self.scale.to(images.device)


def gridding(trajectory: Tensor, size: tuple[int, int], dtype: torch.dtype, accuracy: float = 1e-4) -> Grid:
    """The sparse matrices of a trajectory.

    Args:
        trajectory: (samples 2), row and column frequency in cycles per pixel.
        size: (h w) of the image.
        dtype: float32 or float64, of the weights.
        accuracy: relative error of the transform in the 2-norm.

    Raises:
        ValueError: an accuracy that the dtype cannot hold, or of 0.1 and more.
    """
    check_accuracy(accuracy, dtype)
    oversampling, width = kernel(accuracy)
    fine = tuple(fast_size(math.ceil(oversampling * n)) for n in size)
    sides = [_side(trajectory[:, a].double(), size[a], fine[a], width) for a in range(2)]
    weight = (sides[0].weight[:, :, None] * sides[1].weight[:, None, :]).flatten().to(dtype)
    column = (sides[0].place[:, :, None] * fine[1] + sides[1].place[:, None, :]).flatten().to(torch.int32)
    ptr = torch.arange(len(trajectory) + 1, dtype=torch.int32, device=trajectory.device) * width**2
    rows = Rows(column, ptr, weight)
    scale = torch.outer(sides[0].scale, sides[1].scale).to(dtype)
    return Grid(size, (fine[0], fine[1]), rows, transpose(rows, fine[0] * fine[1]), scale)


def kernel(accuracy: float) -> tuple[float, int]:
    """Oversampling of the grid and width of the kernel in its points for a relative error of ``accuracy``."""
    for oversampling in OVERSAMPLING:
        rate = math.pi * math.sqrt(1 - 1 / oversampling)
        width = max(2, math.ceil(math.log(ERROR / accuracy) / rate + 1))
        if width <= FEW:
            break
    return oversampling, width


def check_accuracy(accuracy: float, dtype: torch.dtype) -> None:
    """Refuse what no kernel reaches.

    Raises:
        ValueError: an accuracy that the real dtype cannot hold, or of 0.1 and more.
    """
    finest = FINEST[dtype]
    if not finest <= accuracy < 0.1:
        raise ValueError(f"accuracy is {accuracy}; from {finest:g} up and less than 0.1 is wanted in {dtype}")


def fast_size(n: int) -> int:
    """The next even number from ``n`` up without a prime factor above 7."""
    m = n + n % 2
    while _rest(m) != 1:
        m += 2
    return m


def _rest(m: int) -> int:
    for factor in FACTORS:
        while m % factor == 0:
            m //= factor
    return m


class _Side(NamedTuple):
    """One direction: place, weight (samples width); scale (n)."""

    place: Tensor
    weight: Tensor
    scale: Tensor


def _side(k: Tensor, n: int, fine: int, width: int) -> _Side:
    beta, at = _beta(width, fine / n), k * fine
    first = torch.ceil(at - width / 2)
    point = first[:, None] + torch.arange(width, device=k.device)
    inside = (1 - (2 * (at[:, None] - point) / width).square()).clamp_min(0).sqrt()
    top = torch.special.i0(torch.tensor(beta, dtype=torch.float64, device=k.device))
    weight = torch.special.i0(beta * inside) / top
    pixel = (torch.arange(n, dtype=torch.float64, device=k.device) - n // 2) / fine
    scale = 1 / (_transform(pixel, beta, width) * math.sqrt(n))
    return _Side((point % fine).long(), weight * (1 - 2 * (point % 2)), scale)


def _beta(width: int, oversampling: float) -> float:
    """The shape of the best kernel of its width (Beatty et al. 2005, eq. 5)."""
    return math.pi * math.sqrt(max(0.1, (width / oversampling * (oversampling - 0.5)) ** 2 - 0.8))


def _transform(x: Tensor, beta: float, width: int) -> Tensor:
    """Fourier transform of the kernel, 1 at its middle, at ``x`` in cycles per grid point."""
    square = beta**2 - (math.pi * width * x).square()
    root = square.abs().sqrt().clamp_min(1e-12)
    value = torch.where(square > 0, root.sinh(), root.sin()) / root
    return value * width / torch.special.i0(torch.tensor(beta, dtype=torch.float64, device=x.device))


class Toeplitz(NamedTuple):
    """F^H F of a trajectory as a convolution on a grid twice as large (Wajer & Pruessmann 2001).

    size: (h w); spectrum: real, of the point spread function on the doubled grid.
    """

    size: tuple[int, int]
    spectrum: Tensor

    def normal(self, images: Tensor) -> Tensor:
        """(k h w) -> (k h w)."""
        h, w = self.size
        fine = tuple(self.spectrum.shape)
        grid = torch.fft.fft2(images, s=fine) * self.spectrum.to(images.device)
        return torch.fft.ifft2(grid, s=fine)[:, :h, :w]


def point_spread(trajectory: Tensor, size: tuple[int, int], dtype: torch.dtype, accuracy: float) -> Toeplitz:
    """The point spread function by one adjoint on the doubled grid, and its spectrum; arguments as ``gridding``."""
    double = (2 * size[0], 2 * size[1])
    grid = gridding(trajectory, double, dtype, accuracy)
    ones = torch.ones(1, len(trajectory), dtype=dtype.to_complex(), device=trajectory.device)
    spread = grid.adjoint(ones)[0] * (math.sqrt(math.prod(double)) / math.prod(size))
    # distances -n .. n-1, of which -n never occurs; without it the spread is Hermitian and its spectrum real
    spread[0], spread[:, 0] = 0, 0
    return Toeplitz(size, torch.fft.fft2(torch.fft.ifftshift(spread)).real.contiguous())
