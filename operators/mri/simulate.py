"""Coils, phase and noise for simulated scans of magnitude images."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from invdiff.fourier import centred_fft, centred_ifft
from invdiff.noise import KeyedNoise
from invdiff.operators.mri.calibration import normalised_maps
from invdiff.operators.noise import Gaussian
from invdiff.protocols import LinearOperator, Noise

STEP = -6  # of the keyed noise: the phase
COIL_DISTANCE = 1.5  # of the coils from the centre, in halves of the field of view
PHASE_WIDTH = 0.125  # of the phase's structure, in fields of view


def birdcage_maps(coils: int, shape: tuple[int, int], distance: float = COIL_DISTANCE) -> Tensor:
    """Sensitivities (coil h w), complex64, of coils on a circle about the image: smooth, sum of squares 1.

    Each falls with the inverse distance from its coil and has the phase of the direction from it (Roemer et al. 1990,
    for small loops), turned so that the coils add up in the centre.

    Args:
        coils: at least 1.
        shape: (h w).
        distance: of the coils from the centre, in halves of the field of view; above 1 they are outside.

    Raises:
        ValueError: no coil, or coils within the image.
    """
    if coils < 1:
        raise ValueError(f"{coils} coils; at least 1 is wanted")
    if distance <= math.sqrt(2):
        raise ValueError(f"coils at {distance} halves of the field of view; more than its corners' 1.414 is wanted")
    h, w = shape
    rows = (2 * (torch.arange(h, dtype=torch.float64) - (h - 1) / 2) / h)[:, None]
    columns = 2 * (torch.arange(w, dtype=torch.float64) - (w - 1) / 2) / w
    maps = []
    for k in range(coils):
        angle = 2 * math.pi * k / coils
        y, x = rows - distance * math.sin(angle), columns - distance * math.cos(angle)
        maps.append(torch.polar(1 / torch.hypot(x, y), torch.atan2(y, -x) + angle))
    return normalised_maps(torch.stack(maps)).to(torch.complex64)


def smooth_phase(
    shape: tuple[int, int], seed: int = 0, width: float = PHASE_WIDTH, peak: float = math.pi / 2
) -> Tensor:
    """A random phase (h w) in radians, float32, without edges: low-passed noise of greatest size ``peak``.

    Args:
        shape: (h w).
        seed: of the noise.
        width: of the Gaussian that smooths it, in fields of view.
        peak: greatest absolute value.
    """
    h, w = shape
    noise = KeyedNoise(seed)(STEP, torch.empty(1, h, w, dtype=torch.float64))[0]
    y, x = ((torch.arange(n, dtype=torch.float64) - n // 2) for n in (h, w))
    window = (-2 * (math.pi * width) ** 2 * (y[:, None].square() + x.square())).exp()
    smooth = centred_ifft(centred_fft(noise.to(torch.complex128)) * window).real
    return (peak * smooth / smooth.abs().max()).float()


def simulate_kspace(
    image: Tensor, operator: LinearOperator, phase: Tensor | None = None, sigma: float = 0.0, noise: Noise | None = None
) -> Tensor:
    """k-space of a magnitude image: the operator of image exp(i phase), with white complex noise on every sample.

    Args:
        image: (s 1 h w) real, in a.u.
        operator: with its coils' maps, on complex images (s 1 h w).
        phase: in radians, (h w) or (s h w); 0 if None.
        sigma: standard deviation of one real component of the noise, in the unit of the image.
        noise: keyed noise; seed 0 if None.

    Returns:
        An element of the operator's range; on the Cartesian grid zero where nothing is sampled.

    Raises:
        ValueError: a complex image, or a negative sigma.
    """
    if image.is_complex():
        raise ValueError("the image is complex; a magnitude image (s 1 h w) is wanted")
    angle = torch.zeros(image.shape[-2:]) if phase is None else phase
    turned = torch.polar(torch.ones_like(angle), angle)
    turned = turned[:, None] if turned.ndim == 3 else turned
    clean = operator.forward((image * turned).to(operator.domain.dtype))
    noisy, _ = Gaussian(sigma).sample(clean, KeyedNoise() if noise is None else noise)
    mask = getattr(operator, "mask", None)
    return noisy if mask is None else noisy * mask
