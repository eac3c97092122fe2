"""The centred orthonormal Fourier transform of MRI, in two dimensions and in three."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PLANE = (-2, -1)
VOLUME = (-4, -2, -1)  # of (s coil h w): the slice axis is the third direction of space


def centred_fft(x: Tensor, axes: Sequence[int] = PLANE) -> Tensor:
    """Orthonormal FFT over ``axes``, zero frequency and origin in the middle (index n // 2)."""
    k: Tensor = torch.fft.fftshift(torch.fft.fftn(torch.fft.ifftshift(x, dim=axes), dim=axes, norm="ortho"), dim=axes)
    return k


def centred_ifft(k: Tensor, axes: Sequence[int] = PLANE) -> Tensor:
    """The inverse, and so the adjoint, of ``centred_fft``."""
    x: Tensor = torch.fft.fftshift(torch.fft.ifftn(torch.fft.ifftshift(k, dim=axes), dim=axes, norm="ortho"), dim=axes)
    return x
