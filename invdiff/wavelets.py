"""An orthonormal wavelet transform of images, periodic at the edges, in torch: any device, differentiable.

Daubechies' filter with four vanishing moments ("db4", Ten Lectures on Wavelets, 1992, table 6.1), the one that Lustig
et al. (2007) and sigpy shrink MR images with. Each level is two polyphase filters an axis; its adjoint is its inverse.
"""

from __future__ import annotations

import torch
from torch import Tensor

DB4 = (
    *(0.2303778133088965, 0.7148465705529157, 0.6308807679298589, -0.027983769416859854),
    *(-0.18703481171909309, 0.030841381835560764, 0.0328830116668852, -0.010597401785069032),
)

FIRST = len(DB4) // 2 - 1  # coefficient n begins at sample 2 (n - FIRST), as PyWavelets and sigpy number them


def analysis(x: Tensor, levels: int) -> list[Tensor]:
    """W x: images (... h w) to [coarse (... h' w'), details (3 ... h' w'), ..., details (3 ... h/2 w/2)].

    Args:
        x: h and w must be multiples of 2**levels; see ``padding``.
        levels: at least 0.

    Raises:
        ValueError: a size that is no multiple.
    """
    h, w = x.shape[-2:]
    if levels < 0 or h % 2**levels or w % 2**levels:
        raise ValueError(f"images of {h} x {w} pixels have no {levels} levels; multiples of {2**levels} are wanted")
    details: list[Tensor] = []
    for _ in range(levels):
        (low, right), (down, both) = (_split(part, -1) for part in _split(x, -2))
        details.append(torch.stack([right, down, both]))
        x = low
    return [x, *reversed(details)]


def synthesis(parts: list[Tensor]) -> Tensor:
    """W^T, which is W^-1: what ``analysis`` gave back to images (... h w)."""
    x = parts[0]
    for right, down, both in parts[1:]:
        x = _join(_join(x, right, -1), _join(down, both, -1), -2)
    return x


def padding(shape: tuple[int, int], levels: int) -> tuple[int, int]:
    """Rows and columns to add to an image (h w) so that it has ``levels`` levels."""
    return -shape[0] % 2**levels, -shape[1] % 2**levels


def _split(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Low and high pass of ``x`` along ``dim``, each of half the size: sum_k f_k x[2 (n - FIRST) + k], periodic."""
    even, odd = x.unflatten(dim, (-1, 2)).unbind(dim)
    low, high = torch.zeros_like(even), torch.zeros_like(even)
    for j in range(len(DB4) // 2):
        a, b = even.roll(FIRST - j, dim), odd.roll(FIRST - j, dim)
        low = low + DB4[2 * j] * a + DB4[2 * j + 1] * b
        high = high + DB4[-1 - 2 * j] * a - DB4[-2 - 2 * j] * b
    return low, high


def _join(low: Tensor, high: Tensor, dim: int) -> Tensor:
    """The adjoint of ``_split``."""
    even, odd = torch.zeros_like(low), torch.zeros_like(low)
    for j in range(len(DB4) // 2):
        even = even + (DB4[2 * j] * low + DB4[-1 - 2 * j] * high).roll(j - FIRST, dim)
        odd = odd + (DB4[2 * j + 1] * low - DB4[-2 - 2 * j] * high).roll(j - FIRST, dim)
    axis = dim % low.ndim
    return torch.stack([even, odd], axis + 1).flatten(axis, axis + 1)
