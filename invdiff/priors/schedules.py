"""Noise schedules: what a network is fed at the noise level sigma, and how that level is named to it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Protocol

import torch
from torch import Tensor

COSINE_OFFSET = 0.008  # s of Nichol & Dhariwal (ICML 2021), eq. 17
LARGEST_BETA = 0.999  # their clip of the cosine schedule
SIGMOID_WIDTH = 6.0  # the sigmoid schedule's betas run over sigmoid(-6) to sigmoid(6), in MONAI and diffusers


class Schedule(Protocol):
    """A frozen dataclass: the process is x_t = (x_0 + sigma n) / spread."""

    process: ClassVar[str]

    @property
    def sigma_range(self) -> tuple[float, float]:
        """Smallest and largest noise level of the training."""
        ...

    def spread(self, sigma: Tensor) -> Tensor:
        """1 / alpha, (s) -> (s)."""
        ...

    def label(self, sigma: Tensor) -> Tensor:
        """What the network is told, (s) -> (s)."""
        ...


@dataclass(frozen=True)
class Discrete:
    """A variance-preserving process of so many steps, labelled by the step's number from 0 (DDPM).

    Between two steps the label is interpolated linearly in ln(sigma).

    Args:
        betas: shape of the betas: ``linear``, ``scaled-linear`` (linear in their roots), ``cosine``, ``sigmoid``.
        beta_start: first beta; unused by ``cosine``.
        beta_end: last beta; unused by ``cosine``.
        steps: number of steps in training.
        values: all betas, instead of a shape.
        integers: whole numbers as labels, the nearest, for networks that take no others.
        label_scale: the label is this times the step (networks of T steps that are told 1000 / T times the step).

    Raises:
        ValueError: a shape that is not known, or betas outside (0, 1).
    """

    betas: str = "linear"
    beta_start: float = 1e-4
    beta_end: float = 0.02
    steps: int = 1000
    values: tuple[float, ...] = ()
    integers: bool = False
    label_scale: float = 1.0
    process: ClassVar[str] = "vp"

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(self.values))
        if self.betas not in ("linear", "scaled-linear", "cosine", "sigmoid"):
            raise ValueError(f"betas {self.betas!r} are not known; linear, scaled-linear, cosine or sigmoid is wanted")
        if self.values and len(self.values) != self.steps:
            raise ValueError(f"{len(self.values)} betas were given for {self.steps} steps; as many are wanted")
        if self.steps < 2:
            raise ValueError(f"steps is {self.steps}; at least 2 are wanted")
        if self.label_scale <= 0:
            raise ValueError(f"label_scale is {self.label_scale}; more than 0 is wanted")
        beta = self._beta()
        if not bool(((beta > 0) & (beta < 1)).all()):
            raise ValueError(f"the betas run from {float(beta[0])} to {float(beta[-1])}; all must be in (0, 1)")

    def _beta(self) -> Tensor:
        n = self.steps
        if self.values:
            return torch.tensor(self.values, dtype=torch.float64)
        if self.betas == "cosine":
            t = torch.linspace(0, 1, n + 1, dtype=torch.float64)
            ab = ((t + COSINE_OFFSET) / (1 + COSINE_OFFSET) * math.pi / 2).cos().square()
            return (1 - ab[1:] / ab[:-1]).clamp(max=LARGEST_BETA)
        if self.betas == "sigmoid":
            rise = torch.linspace(-SIGMOID_WIDTH, SIGMOID_WIDTH, n, dtype=torch.float64).sigmoid()
            return self.beta_start + (self.beta_end - self.beta_start) * rise
        power = 2.0 if self.betas == "scaled-linear" else 1.0
        ends = self.beta_start ** (1 / power), self.beta_end ** (1 / power)
        return torch.linspace(*ends, n, dtype=torch.float64) ** power

    @cached_property
    def sigmas(self) -> Tensor:
        """Noise level of every step, rising, (steps), float64."""
        ab = (1 - self._beta()).cumprod(0)
        return ((1 - ab) / ab).sqrt()

    @property
    def sigma_range(self) -> tuple[float, float]:
        return float(self.sigmas[0]), float(self.sigmas[-1])

    def spread(self, sigma: Tensor) -> Tensor:
        return (1 + sigma.square()).sqrt()

    def label(self, sigma: Tensor) -> Tensor:
        table = self.sigmas.log().to(sigma)
        wanted = sigma.log()
        above = torch.searchsorted(table, wanted.contiguous()).clamp(1, self.steps - 1)
        low, high = table[above - 1], table[above]
        step = above - 1 + ((wanted - low) / (high - low)).clamp(0, 1)
        return (self.label_scale * step).round().long() if self.integers else self.label_scale * step


@dataclass(frozen=True)
class Continuous:
    """The variance-preserving SDE with a linear beta(t), t in (0, 1] (Song et al., ICLR 2021, eq. 33).

    ln(1 + sigma^2) = beta_min t + (beta_max - beta_min) t^2 / 2.

    Args:
        beta_min: beta(0), published 0.1.
        beta_max: beta(1), published 20.
        t_min: smallest time in training, published 1e-5.
        label_scale: the label is this times t; the authors' networks take 999.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 1e-5
    label_scale: float = 999.0
    process: ClassVar[str] = "vp"

    def __post_init__(self) -> None:
        if not 0 < self.beta_min < self.beta_max or not 0 < self.t_min < 1:
            raise ValueError(
                f"beta_min {self.beta_min}, beta_max {self.beta_max}, t_min {self.t_min}: "
                "0 < beta_min < beta_max and 0 < t_min < 1 are wanted"
            )

    @property
    def sigma_range(self) -> tuple[float, float]:
        low, high = (self.beta_min * t + (self.beta_max - self.beta_min) * t * t / 2 for t in (self.t_min, 1.0))
        return math.sqrt(math.expm1(low)), math.sqrt(math.expm1(high))

    def spread(self, sigma: Tensor) -> Tensor:
        return (1 + sigma.square()).sqrt()

    def label(self, sigma: Tensor) -> Tensor:
        integral = sigma.square().log1p()
        root = (self.beta_min**2 + 2 * (self.beta_max - self.beta_min) * integral).sqrt()
        return self.label_scale * 2 * integral / (self.beta_min + root)


@dataclass(frozen=True)
class VarianceExploding:
    """The image plus noise as it is (score networks, and denoisers that are told sigma).

    Args:
        sigma_min: smallest noise level of the training, published 0.01.
        sigma_max: largest, published 50 at 32 x 32, 378 at 256 x 256 (Song et al., ICLR 2021, for [0, 1] images).
        label_of: what the network is told: ``sigma``, ``log`` (ln sigma) or ``log/4``.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    label_of: str = "sigma"
    process: ClassVar[str] = "ve"

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(f"noise levels {self.sigma_min} to {self.sigma_max}: 0 < sigma_min < sigma_max is wanted")
        if self.label_of not in ("sigma", "log", "log/4"):
            raise ValueError(f"label_of is {self.label_of!r}; sigma, log or log/4 is wanted")

    @property
    def sigma_range(self) -> tuple[float, float]:
        return self.sigma_min, self.sigma_max

    def spread(self, sigma: Tensor) -> Tensor:
        return torch.ones_like(sigma)

    def label(self, sigma: Tensor) -> Tensor:
        return {"sigma": sigma, "log": sigma.log(), "log/4": sigma.log() / 4}[self.label_of]


@dataclass(frozen=True)
class Flow:
    """A rectified flow, x_t = (1 - t) x_0 + t n (Liu et al., ICLR 2023): sigma = t / (1 - t).

    Args:
        t_min: smallest time that the network is asked for.
        t_max: largest, below 1, where sigma would be infinite.
        label_scale: the label is this times t; MONAI and diffusers take 1000.
        data_at_one: the network's time runs the other way: 0 is noise, 1 the data.
    """

    t_min: float = 1e-3
    t_max: float = 0.999
    label_scale: float = 1.0
    data_at_one: bool = False
    process: ClassVar[str] = "flow"

    def __post_init__(self) -> None:
        if not 0 < self.t_min < self.t_max < 1:
            raise ValueError(f"t_min {self.t_min} and t_max {self.t_max}: 0 < t_min < t_max < 1 is wanted")

    @property
    def sigma_range(self) -> tuple[float, float]:
        return self.t_min / (1 - self.t_min), self.t_max / (1 - self.t_max)

    def spread(self, sigma: Tensor) -> Tensor:
        return 1 + sigma

    def label(self, sigma: Tensor) -> Tensor:
        return self.label_scale * (1 if self.data_at_one else sigma) / (1 + sigma)


SCHEDULES: dict[str, type] = {
    "discrete": Discrete,
    "continuous": Continuous,
    "ve": VarianceExploding,
    "flow": Flow,
}
