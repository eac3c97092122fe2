"""Noise of measurements: what a scan adds to A x, and the weights that make it white."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from invdiff.protocols import Noise

STEP = -2  # of the keyed noise: the measurement; a sampler's ``init`` is -1, its steps are 0, 1, ...


@dataclass(frozen=True)
class Gaussian:
    """y = A x + sigma n.

    Args:
        sigma: standard deviation of one real component, in the unit of the measurements.

    Raises:
        ValueError: negative or not finite.
    """

    sigma: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.sigma) and self.sigma >= 0):
            raise ValueError(f"sigma is {self.sigma}; a number from 0 up is wanted")

    @property
    def sigma_y(self) -> float:
        """``sigma``."""
        return self.sigma

    def sample(self, clean: Tensor, noise: Noise) -> tuple[Tensor, None]:
        """Noisy measurements; no weights are needed.

        Args:
            clean: (s ...), real or complex.
            noise: keyed noise such as ``invdiff.noise.KeyedNoise(seed)``.
        """
        scale = self.sigma * math.sqrt(2) if clean.is_complex() else self.sigma
        return clean + scale * noise(STEP, clean), None


@dataclass(frozen=True)
class TransmissionPoisson:
    """Counted photons: N ~ Poisson(photons exp(-A x)), y = -ln(max(N, 1) / photons).

    The variance of y is about 1 / N, so that sqrt_w = sqrt(N) whitens it to standard deviation 1 (Thibault et al.,
    Med. Phys. 34, 2007).

    Args:
        photons: a ray without an object.

    Raises:
        ValueError: not positive.
    """

    photons: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.photons) and self.photons > 0):
            raise ValueError(f"photons is {self.photons}; a positive number is wanted")

    @property
    def sigma_y(self) -> float:
        """1: the standard deviation after ``Whitened``."""
        return 1.0

    def sample(self, clean: Tensor, noise: Noise) -> tuple[Tensor, Tensor]:
        """Noisy line integrals and sqrt_w for ``Whitened``, both of the shape of ``clean``.

        Args:
            clean: (s ...), real line integrals.
            noise: keyed noise such as ``invdiff.noise.KeyedNoise(seed)``; each slice's counts depend on its key alone.

        Raises:
            ValueError: complex line integrals, or ones that are not finite.
        """
        if clean.is_complex() or not bool(torch.isfinite(clean).all()):
            raise ValueError(f"line integrals are {clean.dtype}; finite real ones are wanted")
        keys = noise(STEP, torch.empty(clean.shape[0], 1, dtype=torch.float64)).view(torch.int64)
        rates = self.photons * torch.exp(-clean.to("cpu", torch.float64))
        counts = torch.stack(
            [
                torch.poisson(rate, generator=torch.Generator().manual_seed(int(key) & (2**63 - 1)))
                for rate, key in zip(rates, keys, strict=True)
            ]
        ).clamp_min(1)
        y = -torch.log(counts / self.photons)
        return y.to(clean), counts.sqrt().to(clean)
