"""What a raw network computes, and the one conversion of it to D(x, sigma) = E[x_0 | x_0 + sigma n = x].

Every parameterisation has the same form. The network sees alpha (x_0 + sigma n) and a label of the noise level, and

    D(x, sigma) = skip x + out F(alpha x, label);

a schedule gives alpha and the label, what the network predicts gives skip and out. VP processes have
alpha = 1 / sqrt(1 + sigma^2) (with ab = alpha^2, sigma = sqrt((1 - ab) / ab)), flows alpha = 1 / (1 + sigma).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from invdiff.config import build
from invdiff.priors.schedules import SCHEDULES, Schedule

TINY = 1e-8  # smallest noise level that any network is asked for: its logarithm is finite

# What a network predicts, as (skip, out) of alpha and sigma: D from x = x_0 + sigma n with n = (x - D) / sigma.
_PREDICTS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "eps": lambda _, s: (torch.ones_like(s), -s),  # F = n
    "x0": lambda _, s: (torch.zeros_like(s), torch.ones_like(s)),  # F = D
    "v": lambda a, s: (1 / (1 + s * s), -s / a / (1 + s * s)),  # F = alpha n - alpha sigma D
    "score": lambda a, s: (torch.ones_like(s), a * s * s),  # F = -n / (alpha sigma)
    "scaled-score": lambda _, s: (torch.ones_like(s), s),  # F = -n: the score times its deviation alpha sigma
    "velocity": lambda _, s: (1 / (1 + s), -s / (1 + s)),  # F = n - D
    "velocity-to-data": lambda _, s: (1 / (1 + s), s / (1 + s)),  # F = D - n
}
PREDICTS = ("edm", *_PREDICTS)


class Coefficients(NamedTuple):
    """D = skip x + out F(x / spread, label); each (s)."""

    spread: Tensor
    label: Tensor
    skip: Tensor
    out: Tensor


class Parameterisation(Protocol):
    """What a network computes, as a frozen dataclass."""

    @property
    def name(self) -> str:
        """What the network predicts: one of ``PREDICTS``."""
        ...

    @property
    def sigma_range(self) -> tuple[float, float]:
        """Smallest and largest noise level that the network was trained at, on its own images."""
        ...

    def coefficients(self, sigma: Tensor) -> Coefficients:
        """Of noise levels (s) within ``sigma_range``."""
        ...


@dataclass(frozen=True)
class EDM:
    """F of Karras et al. (NeurIPS 2022, eq. 7 and table 1), with the label ln(sigma) / 4.

    Args:
        sigma_data: the data's standard deviation that the network was trained with, published 0.5.
        sigma_min: smallest noise level of the training, published 0.002.
        sigma_max: largest one, published 80.
    """

    sigma_data: float = 0.5
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    name: ClassVar[str] = "edm"

    def __post_init__(self) -> None:
        if self.sigma_data <= 0 or not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(
                f"sigma_data {self.sigma_data}, sigma_min {self.sigma_min}, sigma_max {self.sigma_max}: "
                "sigma_data > 0 and 0 < sigma_min < sigma_max are wanted"
            )

    @property
    def sigma_range(self) -> tuple[float, float]:
        return self.sigma_min, self.sigma_max

    def coefficients(self, sigma: Tensor) -> Coefficients:
        """c_in = 1 / spread, c_noise = label, c_skip = skip, c_out = out."""
        total = (sigma.square() + self.sigma_data**2).sqrt()
        skip = (self.sigma_data / total).square()
        return Coefficients(total, sigma.log() / 4, skip, sigma * self.sigma_data / total)


@dataclass(frozen=True)
class Predicts:
    """A network that predicts ``name`` on a schedule.

    Args:
        name: ``eps`` (the noise n), ``x0`` (the image), ``v`` (alpha n - alpha sigma x_0, VP schedules only), ``score``
            (of the network's noisy image), ``scaled-score`` (that times the noise's deviation, which is -n),
            ``velocity`` (n - x_0, flows only) or ``velocity-to-data`` (x_0 - n, flows only).
        schedule: a ``Discrete``, ``Continuous``, ``VarianceExploding`` or ``Flow``, or your own ``Schedule``.

    Raises:
        ValueError: a prediction that is not known, or that the schedule does not have.
    """

    name: str
    schedule: Schedule

    def __post_init__(self) -> None:
        if self.name not in _PREDICTS:
            raise ValueError(f"predicts {self.name!r} is not known; there are: {', '.join(_PREDICTS)}")
        wanted = {"v": "vp", "velocity": "flow", "velocity-to-data": "flow"}.get(self.name, self.schedule.process)
        if self.schedule.process != wanted:
            raise ValueError(
                f"a network on the schedule {type(self.schedule).__name__} does not predict {self.name!r}: "
                f"'v' belongs to Discrete and Continuous, 'velocity' and 'velocity-to-data' to Flow"
            )

    @property
    def sigma_range(self) -> tuple[float, float]:
        return self.schedule.sigma_range

    def coefficients(self, sigma: Tensor) -> Coefficients:
        spread = self.schedule.spread(sigma)
        skip, out = _PREDICTS[self.name](1 / spread, sigma)
        return Coefficients(spread, self.schedule.label(sigma), skip, out)


def denoise(network: Callable[[Tensor, Tensor], Tensor], how: Parameterisation, x: Tensor, sigma: Tensor) -> Tensor:
    """D(x, sigma) by a network of any parameterisation, at any noise level.

    Beyond ``how.sigma_range`` the network is asked at the nearest level L that it knows: above, of x scaled so that its
    noise is L (D is then nearly the data's mean, as it should be); below, with the score of L held,
    D = x + (sigma / L)^2 (D(x, L) - x), which tends to x with sigma.

    Args:
        network: called with (s c h w) and the label (s).
        how: what it computes.
        x: noisy image (s c h w), on the network's range.
        sigma: its noise level, () or (s).

    Returns:
        The denoised image (s c h w), of x's dtype.
    """
    s = sigma.to(x).expand(x.shape[0])
    low, high = how.sigma_range
    level = s.clamp(low, high)
    c = how.coefficients(level)
    seen = x * _per_image((level / s).clamp(max=1))
    raw = network(seen / _per_image(c.spread), c.label).to(x.dtype)
    denoised = seen * _per_image(c.skip) + raw * _per_image(c.out)
    held = x + _per_image((s / level).clamp(max=1).square()) * (denoised - x)
    return torch.where(_per_image(s < low), held, denoised)


def _per_image(v: Tensor) -> Tensor:
    return v[:, None, None, None]


def parameterisation_of(table: Mapping[str, Any]) -> Parameterisation:
    """A parameterisation from a table: ``kind`` names the schedule or is ``edm``, ``predicts`` what is predicted.

    Raises:
        ValueError: a kind, a key or a value that is not known; the right ones are listed.
    """
    fields = dict(table)
    kind, predicts = fields.pop("kind", "discrete"), fields.pop("predicts", None)
    if kind == "edm":
        if predicts not in (None, "edm"):
            raise ValueError(f"predicts is {predicts!r} with kind 'edm'; leave it out, or name another schedule")
        return build(EDM, fields, "schedule")
    if kind not in SCHEDULES:
        raise ValueError(f"no schedule {kind!r}; there are: edm, {', '.join(SCHEDULES)}")
    if predicts is None:
        raise ValueError(f"the schedule lacks 'predicts'; one of {', '.join(_PREDICTS)} is wanted")
    return Predicts(predicts, build(SCHEDULES[kind], fields, "schedule"))


def unbounded(sigma_data: float) -> EDM:
    """EDM at whatever noise level it is asked."""
    return EDM(sigma_data, TINY, math.inf)
