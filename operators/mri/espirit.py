"""ESPIRiT: coil sensitivities as eigenvectors (Uecker et al., MRM 71:990, 2014), one or several sets.

The patches of the calibration data span a small space; its projection, written in the image, is one Hermitian matrix
(coil coil) a pixel whose eigenvectors of eigenvalue 1 are the sensitivities (eqs. 17 to 20). Here the matrix is built
from the correlations of the kernels, which are a few samples wide, so that coils^2 FFTs serve for all kernels.

Two sets are for a field of view smaller than the body, where points of different sensitivity fold onto one pixel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from invdiff.fourier import PLANE
from invdiff.noise import KeyedNoise

FEWEST, MOST = 4, 6  # samples to a side of a patch


class Espirit(NamedTuple):
    """maps: of unit norm over the coils where a set has signal, else 0, (set s coil h w); ``maps[0]`` is the usual one.

    eigenvalues: 1 where the set explains the calibration data, less elsewhere, (set s h w).
    """

    maps: Tensor
    eigenvalues: Tensor


def espirit_maps(
    calibration: Tensor,
    shape: tuple[int, int],
    sets: int = 1,
    width: int = 24,
    kernel: int | None = None,
    threshold: float = 0.02,
    crop: float = 0.8,
    iterations: int = 40,
) -> Espirit:
    """Sensitivities from fully sampled lines about the centre of k-space.

    The phase of a map is that of the coils' first principal component: smooth where that coil sees the body, and the
    image's own phase is relative to it.

    Args:
        calibration: (s coil h' w') complex, zero frequency at index n // 2: ACS lines or a scan of their own.
        shape: (h w) of the maps.
        sets: of maps.
        width: lines and columns of the calibration data that are used, from their middle: further out is more noise
            than signal, which adds singular values above ``threshold`` and with them maps of noise.
        kernel: side of the patches, in samples; by ``kernel_for`` if None.
        threshold: singular values below this share of the largest are noise; 0.02 as published code has it.
        crop: eigenvalue below which a pixel has no map; 0.95 cuts closer to the body and into it where there is noise.
        iterations: of the power method.

    Raises:
        ValueError: real or non-finite data, zero data, fewer lines than a kernel, or more sets than coils.
    """
    kernel = kernel_for(min(calibration.shape[-2:])) if kernel is None else kernel
    _check(calibration, shape, sets, kernel)
    centre = _middle(calibration, max(width, kernel))
    found = [_one_slice(c, shape, sets, kernel, threshold, iterations) for c in centre]
    vectors = torch.stack([v for v, _ in found], 1)
    values = torch.stack([e for _, e in found], 1)
    reference = torch.stack([_principal(c) for c in centre])
    turn = torch.einsum("sc,ksc...->ks...", reference.conj(), vectors)
    turn = torch.where(turn.abs() > 0, turn / turn.abs().clamp_min(torch.finfo(values.dtype).tiny), 1)
    maps = vectors * turn.conj()[:, :, None] * (values > crop)[:, :, None]
    return Espirit(maps.to(calibration.dtype), values)


def kernel_for(lines: int) -> int:
    """Side of the patches for so many lines: published code's 6, less below 14 lines, 4 at least.

    Patches of 6 in 8 to 10 lines are too few to span what they measure: eigenvalues fall, and maps get holes. In three
    phantoms (2, 16, 32 coils) they lost 13 to 77 % of the signal at 8 lines and 13 to 16 % at 10; these kernels lose
    0.1 to 1 % and 0.1 to 0.2 %. Patches of 3 are too small for two coils.
    """
    return max(FEWEST, min(MOST, lines // 2 - 1))


def _middle(kspace: Tensor, width: int) -> Tensor:
    """The middle of (... h w), at most ``width`` wide either way, index n // 2 still that of zero frequency."""
    for axis in PLANE:
        n = kspace.shape[axis]
        size = min(n, width)
        kspace = kspace.narrow(axis, n // 2 - size // 2, size)
    return kspace


def _one_slice(
    calibration: Tensor, shape: tuple[int, int], sets: int, kernel: int, threshold: float, iterations: int
) -> tuple[Tensor, Tensor]:
    """Leading eigenvectors (set coil h w) and eigenvalues (set h w) of one slice (coil h' w')."""
    matrix = _projection(_kernels(calibration, kernel, threshold), shape)
    vectors, values = [], []
    for _ in range(sets):
        v, value = _leading(matrix, iterations)
        vectors.append(v.movedim(-1, 0))
        values.append(value)
        matrix = matrix - value[..., None, None] * v[..., :, None] * v[..., None, :].conj()
    return torch.stack(vectors), torch.stack(values)


def _kernels(calibration: Tensor, kernel: int, threshold: float) -> Tensor:
    """An orthonormal basis (n coil kernel kernel) of the space of patches of (coil h' w')."""
    patches = calibration.unfold(1, kernel, 1).unfold(2, kernel, 1)  # (coil rows columns kernel kernel)
    rows = patches.permute(1, 2, 0, 3, 4).flatten(2).flatten(0, 1)
    values, vectors = torch.linalg.eigh((rows.mH @ rows).to(torch.complex128))
    kept = values.clamp_min(0).sqrt() > threshold * values[-1].sqrt()
    basis = vectors[:, kept].mH if bool(kept.any()) else vectors[:, -1:].mH
    return basis.unflatten(1, (calibration.shape[0], kernel, kernel)).to(calibration.dtype)


def _projection(basis: Tensor, shape: tuple[int, int]) -> Tensor:
    """The matrix of every pixel (h w coil coil), eigenvalues in [0, 1], of a basis (n coil kernel kernel).

    It is sum_n k_n(r) k_n(r)^H / kernel^2 with k_n(r) the kernels' Fourier sums: the transform of their correlations.
    """
    _, coils, kernel, _ = basis.shape
    wide = 2 * kernel - 1
    spectra = torch.fft.fft2(basis, s=(wide, wide)).permute(2, 3, 1, 0)  # (wide wide coil n)
    lags = torch.fft.ifft2(spectra @ spectra.mH, dim=(0, 1)).permute(2, 3, 0, 1)  # (coil coil wide wide), lag 0 first
    lags = torch.fft.fftshift(lags, dim=PLANE) / kernel**2
    grid = torch.zeros(coils, coils, *shape, dtype=basis.dtype, device=basis.device)
    for row in range(wide):
        for column in range(wide):
            grid[:, :, (row - kernel + 1) % shape[0], (column - kernel + 1) % shape[1]] += lags[:, :, row, column]
    image = torch.fft.fftshift(torch.fft.ifft2(grid, norm="forward"), dim=PLANE)
    return image.permute(2, 3, 0, 1).contiguous()


def _leading(matrix: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """The eigenvector (h w coil) of the largest eigenvalue (h w) of Hermitian matrices, by power iterations."""
    coils = matrix.shape[-1]
    start = KeyedNoise()(-1, torch.empty(1, coils, dtype=matrix.dtype, device=matrix.device))[0]
    v = start.expand(*matrix.shape[:-1]) / start.norm()
    for _ in range(iterations):
        v = torch.einsum("hwcd,hwd->hwc", matrix, v)
        v = v / v.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(matrix.dtype).tiny)
    value = torch.einsum("hwc,hwcd,hwd->hw", v.conj(), matrix, v).real
    return v, value


def _principal(calibration: Tensor) -> Tensor:
    """The coils' first principal component, (coil), of (coil h' w'); its largest coil is real and positive."""
    flat = calibration.flatten(1).to(torch.complex128)
    vector = torch.linalg.eigh(flat @ flat.mH).eigenvectors[:, -1]
    largest = vector[vector.abs().argmax()]
    return (vector * largest.conj() / largest.abs()).to(calibration.dtype)


def _check(calibration: Tensor, shape: tuple[int, int], sets: int, kernel: int) -> None:
    if calibration.ndim != 4 or not calibration.is_complex():
        came = f"{tuple(calibration.shape)} {calibration.dtype}"
        raise ValueError(f"the calibration data are {came}; complex (s coil h w) is wanted")
    if not bool(torch.isfinite(calibration.abs()).all()):
        raise ValueError("the calibration data hold NaN or infinite values; finite ones are wanted")
    if not bool(calibration.any()):
        raise ValueError("the calibration data are zero; lines about the centre of k-space are wanted")
    lines = min(calibration.shape[-2:])
    if lines < kernel:
        raise ValueError(f"{lines} calibration lines for kernels of {kernel}; at least as many are wanted")
    if min(shape) < 2 * kernel - 1:
        raise ValueError(f"maps of {shape[0]} x {shape[1]} pixels; at least {2 * kernel - 1} are wanted")
    if not 1 <= sets <= calibration.shape[1]:
        raise ValueError(f"{sets} sets of maps for {calibration.shape[1]} coils; 1 to the number of coils is wanted")
