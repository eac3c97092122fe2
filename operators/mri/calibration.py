"""What a scan's k-space tells of itself: its centre, its noise, its coils, its phase and its scale. On plain tensors.

Every function takes k-space as (s coil h w) complex, zero frequency at index n // 2, and returns new tensors.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from invdiff.fourier import centred_ifft

MAPS_TOLERANCE = 1e-3  # of the sum of squares of normalised maps from 1
QUANTILE = 0.999  # of the image's voxels, that is 1 in the a.u. of the prior brain-mr
FOREGROUND = 0.05  # of a quantile of all voxels: those above are not background
EDGE = 0.1  # share of rows and of columns at either end whose corners hold noise alone


class Region(NamedTuple):
    """A block of k-space: rows top to bottom and columns left to right, the ends not included."""

    top: int
    bottom: int
    left: int
    right: int

    def of(self, kspace: Tensor) -> Tensor:
        """The block of (... h w)."""
        return kspace[..., self.top : self.bottom, self.left : self.right]


def find_acs(mask: Tensor) -> Region:
    """The largest fully sampled block around zero frequency: the auto-calibration signal.

    Args:
        mask: (h w) or (s h w), bool or 0 and 1; a sample counts where every slice has it.

    Raises:
        ValueError: another shape, or zero frequency itself not sampled.
    """
    if mask.ndim not in (2, 3):
        raise ValueError(f"the mask is {tuple(mask.shape)}; (h w) or (s h w) is wanted")
    sampled = mask != 0
    plane = sampled.all(0) if mask.ndim == 3 else sampled
    if not bool(plane[plane.shape[0] // 2, plane.shape[1] // 2]):
        raise ValueError("the mask does not sample the centre of k-space; calibration lines around it are wanted")
    upright, lying = _grown(plane), _grown(plane.T)
    turned = Region(lying.left, lying.right, lying.top, lying.bottom)
    return max(upright, turned, key=lambda r: (r.bottom - r.top) * (r.right - r.left))


def _grown(plane: Tensor) -> Region:
    """The best block of rows about the middle, each with the columns that all of them have."""
    h, w = plane.shape
    row, column = h // 2, w // 2
    best, area = Region(row, row + 1, column, column + 1), 0
    for half in range(h // 2 + 1):
        for top, bottom in ((row - half, row + half), (row - half, row + half + 1)):
            if top < 0 or bottom > h or top == bottom:
                continue
            gaps = (~plane[top:bottom].all(0)).nonzero().flatten()
            left = int(gaps[gaps < column].max()) + 1 if bool((gaps < column).any()) else 0
            right = int(gaps[gaps >= column].min()) if bool((gaps >= column).any()) else w
            if (bottom - top) * (right - left) > area and right > left:
                best, area = Region(top, bottom, left, right), (bottom - top) * (right - left)
    return best


def check_maps(maps: Tensor) -> None:
    """Refuse coil maps whose sum of squares is neither 1 nor, where there is no signal, 0.

    Args:
        maps: (coil h w) or (s coil h w), complex.

    Raises:
        ValueError: another shape or dtype, values that are not finite, maps that are not normalised or all zero.
    """
    if maps.ndim not in (3, 4) or not maps.is_complex():
        raise ValueError(f"the maps are {tuple(maps.shape)} {maps.dtype}; complex (coil h w) or (s coil h w) is wanted")
    power = maps.abs().square().sum(-3)
    if not bool(torch.isfinite(power).all()):
        raise ValueError("the coil maps hold NaN or infinite values; finite ones are wanted")
    inside = power > 0
    if not bool(inside.any()):
        raise ValueError("the coil maps are zero throughout; sensitivities are wanted")
    worst = float((power[inside] - 1).abs().max())
    if worst > MAPS_TOLERANCE:
        raise ValueError(
            f"the coil maps are not normalised: the sum of their squares is up to {worst:.3g} away from 1; "
            "divide them by its root"
        )


def normalised_maps(maps: Tensor) -> Tensor:
    """The maps (... coil h w) over the root of their sum of squares; zero stays zero."""
    power = maps.abs().square().sum(-3, keepdim=True)
    return torch.where(power > 0, maps / power.clamp_min(torch.finfo(power.dtype).tiny).sqrt(), 0)


def filled_maps(maps: Tensor) -> Tensor:
    """Maps (... coil h w) with equal sensitivities of norm 1 where they are zero, so that the data are heard there too.

    Where maps are cut to the body, k-space says nothing of the background, and a generative prior fills it with what
    it likes; with maps there the data say that nothing is.
    """
    power = maps.abs().square().sum(-3, keepdim=True)
    return torch.where(power > 0, maps, maps.shape[-3] ** -0.5)


def noise_covariance(noise: Tensor) -> Tensor:
    """Covariance of the coils' noise, complex Hermitian (coil coil): E[n n^H] of samples (coil n).

    White noise whose real components deviate by sigma has 2 sigma^2 I.

    Args:
        noise: samples without signal, (coil n), n at least the number of coils; from a noise scan, or ``edge_noise``.

    Raises:
        ValueError: another shape, a real dtype, too few samples, NaN or infinite values, or a coil without noise.
    """
    if noise.ndim != 2 or not noise.is_complex():
        raise ValueError(f"the noise is {tuple(noise.shape)} {noise.dtype}; complex (coil n) is wanted")
    if noise.shape[1] < noise.shape[0]:
        raise ValueError(f"{noise.shape[1]} samples of noise for {noise.shape[0]} coils; at least as many are wanted")
    if not bool(torch.isfinite(noise.abs()).all()):
        raise ValueError("the noise holds NaN or infinite values; finite ones are wanted")
    silent = (noise.abs().amax(1) == 0).nonzero().flatten().tolist()
    if silent:
        raise ValueError(f"coil {silent[0]} has no noise: it is switched off, or its samples were never written")
    wide = noise.to(torch.complex128)
    return wide @ wide.mH / noise.shape[1]


def edge_noise(kspace: Tensor, mask: Tensor | None = None, share: float = EDGE) -> Tensor:
    """Samples (coil n) from the corners of k-space, where there is more noise than signal.

    Not for scans whose signal reaches the corners (sharp edges at low resolution): the noise is then overestimated.

    Args:
        kspace: (s coil h w).
        mask: what was sampled, (h w) or (s h w); everything if None.
        share: of the rows and of the columns, at either end.

    Raises:
        ValueError: nothing was sampled there.
    """
    s, _, h, w = kspace.shape
    rows, columns = max(1, round(h * share)), max(1, round(w * share))
    corners = torch.zeros(h, w, dtype=torch.bool, device=kspace.device)
    for r in (slice(None, rows), slice(-rows, None)):
        for c in (slice(None, columns), slice(-columns, None)):
            corners[r, c] = True
    chosen = (corners if mask is None else corners & (mask != 0)).expand(s, h, w)
    if not bool(chosen.any()):
        raise ValueError(f"no sample within {share:g} of the corners of k-space; a noise scan is wanted")
    return kspace.transpose(0, 1)[:, chosen]


def prewhitening(covariance: Tensor) -> Tensor:
    """The matrix (coil coil) after which the noise of one real component has deviation 1: (L / sqrt 2)^-1, C = L L^H.

    Raises:
        ValueError: not a positive definite Hermitian matrix.
    """
    if covariance.ndim != 2 or covariance.shape[0] != covariance.shape[1]:
        raise ValueError(f"the covariance is {tuple(covariance.shape)}; (coil coil) is wanted")
    root, failed = torch.linalg.cholesky_ex(covariance.to(torch.complex128))
    if bool(failed) or not bool(torch.isfinite(root.abs()).all()):
        raise ValueError("the noise covariance is not positive definite; more samples of noise are wanted")
    identity = torch.eye(len(root), dtype=root.dtype, device=root.device)
    return math.sqrt(2) * torch.linalg.solve_triangular(root, identity, upper=False)


def prewhiten(data: Tensor, covariance: Tensor) -> Tensor:
    """Data (s coil ...) in coils whose noise is white: real components of deviation 1, so that sigma_y is 1.

    Maps must be estimated from whitened data, or go through the same matrix (``mixed``).

    Raises:
        ValueError: another number of coils, or a covariance that is none.
    """
    return mixed(data, prewhitening(covariance))


def compression(data: Tensor, coils: int | None = None, energy: float = 0.99) -> Tensor:
    """Orthonormal rows (virtual coil) that keep most of the data: principal components (Buehrer et al. 2007).

    Orthonormal, so that whitened noise stays white with the same deviation.

    Args:
        data: (s coil ...), prewhitened.
        coils: virtual coils to keep; as few as hold ``energy`` if None.
        energy: share of the sum of squares, in (0, 1].

    Returns:
        (virtual coil), to go onto data, noise and maps by ``mixed``.

    Raises:
        ValueError: no such number of coils or share, or data that are zero.
    """
    count = data.shape[1]
    if coils is not None and not 1 <= coils <= count:
        raise ValueError(f"{coils} virtual coils of {count}; 1 to {count} are wanted")
    if not 0 < energy <= 1:
        raise ValueError(f"energy is {energy}; a share above 0 and at most 1 is wanted")
    flat = data.transpose(0, 1).flatten(1).to(torch.complex128)
    values, vectors = torch.linalg.eigh(flat @ flat.mH)
    kept = values.flip(0).clamp_min(0).cumsum(0)
    if float(kept[-1]) == 0:
        raise ValueError("the data are zero; coils cannot be compressed")
    enough = int((kept < energy * kept[-1] * (1 - 1e-12)).sum()) + 1
    return vectors.flip(1)[:, : enough if coils is None else coils].mH


def compress_coils(data: Tensor, coils: int | None = None, energy: float = 0.99) -> tuple[Tensor, Tensor]:
    """Data (s virtual ...) and the matrix (virtual coil) of ``compression`` that made them."""
    matrix = compression(data, coils, energy)
    return mixed(data, matrix), matrix


def mixed(data: Tensor, matrix: Tensor) -> Tensor:
    """Data (s coil ...) in other coils: sum_c matrix[v c] data[s c ...], in the data's dtype.

    Raises:
        ValueError: another number of coils than the matrix has columns.
    """
    if data.ndim < 2 or data.shape[1] != matrix.shape[1]:
        raise ValueError(f"the data are {tuple(data.shape)}; (s, {matrix.shape[1]}, ...) is wanted")
    return torch.einsum("vc,sc...->sv...", matrix.to(data.dtype), data)


def hann(shape: tuple[int, int], region: Region) -> Tensor:
    """A Hann window over the region of k-space (h w), 1 at zero frequency, 0 outside: float32."""
    ends = ((region.top, region.bottom), (region.left, region.right))
    axes = [_hann_axis(n, first, last) for n, (first, last) in zip(shape, ends, strict=True)]
    return axes[0][:, None] * axes[1]


def _hann_axis(n: int, first: int, last: int) -> Tensor:
    """cos^2 from the middle to just beyond either end; an axis that is sampled throughout is not cut at its ends."""
    k = torch.arange(n, dtype=torch.float64) - n // 2
    reach = min(n // 2 - first, last - 1 - n // 2) + 1
    return torch.where(k.abs() < reach, (math.pi * k / (2 * reach)).cos().square(), 0.0).float()


def low_resolution(kspace: Tensor, region: Region, maps: Tensor | None = None) -> Tensor:
    """The image (s 1 h w), complex, of the centre of k-space under a Hann window, which does not ring.

    Args:
        kspace: (s coil h w); ``centred_fft`` of an image (s 1 h w) for an image.
        region: of the centre, from ``find_acs``.
        maps: of the coils, normalised, (coil h w) or (s coil h w); None for one coil.

    Raises:
        ValueError: several coils without maps, whose images have phases of their own.
    """
    if maps is None and kspace.shape[1] != 1:
        raise ValueError(f"{kspace.shape[1]} coils without maps have no common phase; their maps are wanted")
    window = hann((kspace.shape[-2], kspace.shape[-1]), region).to(kspace.device)
    images = centred_ifft(kspace * window)
    return images if maps is None else (maps.to(kspace).conj() * images).sum(1, keepdim=True)


def low_resolution_phase(kspace: Tensor, region: Region, maps: Tensor | None = None) -> Tensor:
    """The phase (s h w) in radians of ``low_resolution``, for ``KnownPhase`` (Noll et al. 1991); 0 without signal."""
    return low_resolution(kspace, region, maps)[:, 0].angle()


def root_sum_of_squares(kspace: Tensor) -> Tensor:
    """The magnitude image (s 1 h w) without maps: real, sensitivity-weighted (Roemer et al. 1990)."""
    return centred_ifft(kspace).abs().square().sum(1, keepdim=True).sqrt()


def image_scale(image: Tensor, quantile: float = QUANTILE) -> float:
    """The value of the image that is 1 a.u. for a prior: a quantile of the magnitude of its foreground.

    The prior ``brain-mr`` has the 99.9 % quantile of a volume's non-zero voxels as its unit. A reconstruction's
    background is not zero but faint: the foreground is what lies above 5 % of the same quantile over all voxels.

    Args:
        image: (s 1 h w), combined and zero-filled: the operator's ``zero_filled(y)``, or ``root_sum_of_squares``.
        quantile: in (0, 1].

    Raises:
        ValueError: an image that is zero or not finite, or another quantile.
    """
    if not 0 < quantile <= 1:
        raise ValueError(f"quantile is {quantile}; a number above 0 and at most 1 is wanted")
    size = image.detach().abs().flatten().double().cpu()
    if not bool(torch.isfinite(size).all()):
        raise ValueError("the image holds NaN or infinite values; its scale cannot be told")
    top = _quantile(size, quantile)
    if top == 0:
        raise ValueError("the image is zero: nothing was measured that could give it a scale")
    return _quantile(size[size > FOREGROUND * top], quantile)


def _quantile(values: Tensor, quantile: float) -> float:
    """The least value that a share ``quantile`` of the values (n) does not exceed."""
    return float(values.kthvalue(max(1, math.ceil(quantile * len(values)))).values)
