"""Priors made of priors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from invdiff.priors.density import log_density
from invdiff.protocols import Prior


class _Wrapper:
    """What every wrapper of one prior has: its channels and its description."""

    def __init__(self, prior: Prior) -> None:
        self.prior = prior
        self.channels = prior.channels

    @property
    def info(self) -> Any:
        """The wrapped prior's description, if it has one."""
        return getattr(self.prior, "info", None)


class Chunked(_Wrapper):
    """The same prior, called on at most ``size`` slices at a time: memory independent of depth.

    Args:
        prior: any Prior.
        size: slices a call, at least 1.
    """

    def __init__(self, prior: Prior, size: int) -> None:
        if size < 1:
            raise ValueError(f"the chunk size is {size}; at least 1 slice is wanted")
        super().__init__(prior)
        self.size = size

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """As the prior's: x (s c h w), sigma () or (s)."""
        sigmas = sigma.expand(x.shape[0])
        pairs = zip(x.split(self.size), sigmas.split(self.size), strict=True)
        return torch.cat([self.prior.denoise(part, s) for part, s in pairs])


class Offloaded(_Wrapper):
    """The same prior on another device than the images: they are moved there and the answer back.

    In ``Chunked(Offloaded(prior, device), n)`` the volume, the measurements and the sampler's state stay in host memory
    and n slices at a time are on the device. Each call waits for both copies.

    Args:
        prior: a Prior whose network is on ``device``.
        device: such as ``cuda``.
    """

    def __init__(self, prior: Prior, device: torch.device | str) -> None:
        super().__init__(prior)
        self.device = torch.device(device)

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """As the prior's: x (s c h w) anywhere, sigma () or (s) -> (s c h w) where x is."""
        return self.prior.denoise(x.to(self.device), sigma.to(self.device)).to(x.device)


class Averaged(_Wrapper):
    """The mean of what the prior says of flipped and shifted copies of the image: self-ensemble (Timofte et al. 2016).

    A prior that is as likely flipped as not has a denoiser that commutes with flips; a network's only nearly does,
    and the mean has less of what it errs by chance. Costs one evaluation a copy. Shifts are circular, by whole pixels:
    they undo the grid of a strided network.

    Not for priors that know left from right: flip only along rows (``flips=(-2,)``) or not at all.

    Args:
        prior: any Prior.
        flips: axes that are flipped, each alone and together: -1 columns, -2 rows.
        shifts: (rows, columns) by which further copies are moved; () is none.
    """

    def __init__(self, prior: Prior, flips: Sequence[int] = (-1,), shifts: Sequence[tuple[int, int]] = ()) -> None:
        super().__init__(prior)
        if any(axis not in (-1, -2) for axis in flips) or len(set(flips)) < len(flips):
            raise ValueError(f"flips is {tuple(flips)}; -1 (columns), -2 (rows) or both are wanted")
        turns: list[tuple[int, ...]] = [()]
        for axis in flips:
            turns += [(*turn, axis) for turn in turns]
        self.copies = [(turn, tuple(shift)) for turn in turns for shift in ((0, 0), *shifts)]

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Mean of the undone copies: x (s c h w), sigma () or (s)."""
        total = torch.zeros_like(x)
        for flips, (row, column) in self.copies:
            out = self.prior.denoise(x.flip(flips).roll((row, column), (-2, -1)), sigma)
            total = total + out.roll((-row, -column), (-2, -1)).flip(flips)
        return total / len(self.copies)


class Superposed:
    """A mixture of priors: each denoiser weighs by the density that its prior gives the noisy image.

    For p = sum_k w_k p_k the exact denoiser is sum_k r_k D_k, r_k = w_k p_k(x; sigma) / sum_j w_j p_j(x; sigma): the OR
    of SuperDiff (Skreta et al., ICLR 2025, prop. 1 and algorithm 1, ``temperature`` T). A prior that knows its log
    density (``GaussianPrior``) is asked; for a network it is integrated along the noise levels above sigma
    (``invdiff.priors.density``), at ``levels`` extra evaluations with a gradient each.

    Not for priors of different units or ranges. In many dimensions log densities differ by thousands: unless the
    temperature is low, the likelier prior takes all. Where a density is integrated, gradients hold its share fixed.

    Args:
        priors: two or more, with equal channels, units and ranges.
        weights: w_k, positive; equal if None.
        temperature: what the log densities are multiplied by; 1 is the mixture, 0 an average with the weights.
        levels: noise levels at which a density is integrated.
        probes: random vectors of the divergence estimate.

    Raises:
        ValueError: fewer than two priors, channels, units or ranges that differ, weights that do not fit.
    """

    def __init__(
        self,
        priors: Sequence[Prior],
        weights: Sequence[float] | None = None,
        temperature: float = 1.0,
        levels: int = 16,
        probes: int = 1,
    ) -> None:
        self.priors, self.temperature, self.levels, self.probes = list(priors), temperature, levels, probes
        self.weights = [1.0] * len(self.priors) if weights is None else list(weights)
        if len(self.priors) < 2:
            raise ValueError(f"{len(self.priors)} priors were given; two or more are wanted")
        if len(self.weights) != len(self.priors) or min(self.weights) <= 0:
            raise ValueError(f"the weights are {self.weights}; {len(self.priors)} positive numbers are wanted")
        described = {(p.channels, *_range(getattr(p, "info", None))) for p in self.priors}
        if len(described) > 1:
            raise ValueError(f"the priors have channels, unit and range {sorted(described)}; equal ones are wanted")
        self.channels = self.priors[0].channels

    @property
    def info(self) -> Any:
        """The first prior's description, if it has one."""
        return getattr(self.priors[0], "info", None)

    def log_density(self, x: Tensor, sigma: Tensor) -> Tensor:
        """ln p(x; sigma) of the mixture, up to the constant of the priors' own, (s)."""
        total = math.log(sum(self.weights))
        return torch.stack(self._logs(x, sigma)).logsumexp(0) - total

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """sum_k r_k D_k: x (s c h w), sigma () or (s)."""
        shares = torch.stack(self._logs(x, sigma, self.temperature)).softmax(0)
        parts = torch.stack([p.denoise(x, sigma) for p in self.priors])
        return (shares.view(*shares.shape, 1, 1, 1) * parts).sum(0)

    def _logs(self, x: Tensor, sigma: Tensor, temperature: float = 1.0) -> list[Tensor]:
        """ln w_k + T ln p_k(x; sigma), (s) each."""
        return [
            math.log(w) + temperature * log_density(p, x, sigma, self.levels, self.probes)
            for w, p in zip(self.weights, self.priors, strict=True)
        ]


def _range(info: Any) -> tuple[object, ...]:
    return () if info is None else (info.unit, info.low, info.high)


class Precision(_Wrapper):
    """The same prior with its network's arithmetic in another dtype (autocast). What it costs: docs/results.md.

    Args:
        prior: a prior whose network runs on the image's device.
        dtype: such as ``torch.bfloat16``.
    """

    def __init__(self, prior: Prior, dtype: torch.dtype) -> None:
        super().__init__(prior)
        self.dtype = dtype

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """As the prior's, rounded: x (s c h w) -> (s c h w) in the dtype of x."""
        with torch.autocast(x.device.type, dtype=self.dtype):
            return self.prior.denoise(x, sigma).to(x.dtype)


class Compiled(_Wrapper):
    """The same prior through ``torch.compile``: the first call with a new image size takes a minute.

    For a GPU and long runs (not measured); on a CPU with bfloat16 it gains nothing (docs/results.md).

    Args:
        prior: any Prior written in torch.
        backend: of ``torch.compile``.
    """

    def __init__(self, prior: Prior, backend: str = "inductor") -> None:
        super().__init__(prior)
        self._compiled = torch.compile(prior.denoise, backend=backend)

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """As the prior's, to rounding: x (s c h w), sigma () or (s)."""
        out: Tensor = self._compiled(x, sigma)
        return out
