"""HU and 1/mm, mm: the only place that knows 1000 or mu_water."""

from __future__ import annotations

from torch import Tensor

MU_WATER = 0.0193  # 1/mm, linear attenuation of water at about 70 keV
HU_SCALE = 1000.0  # HU of water minus HU of vacuum


def mu_from_hu(hu: Tensor, mu_water: float = MU_WATER) -> Tensor:
    """Attenuation in 1/mm, never negative: mu = max(0, mu_water (1 + HU / 1000))."""
    return (mu_water * (1 + hu / HU_SCALE)).clamp_min(0)


def hu_from_mu(mu: Tensor, mu_water: float = MU_WATER) -> Tensor:
    """HU = 1000 (mu / mu_water - 1)."""
    return HU_SCALE * (mu / mu_water - 1)


def hu_affine(mu_water: float = MU_WATER) -> tuple[float, float]:
    """(slope, intercept) of mu = slope HU + intercept, without the floor at 0."""
    return mu_water / HU_SCALE, mu_water
