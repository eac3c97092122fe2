"""A prior steered by a circuit's exact posterior of what is coarse (Tiramisu: Liu, Niepert & Van den Broeck 2024)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from invdiff.circuits.codes import DRAWS, CodeCircuit
from invdiff.circuits.evidence import of_noisy, of_pixels, product
from invdiff.circuits.images import Cells, ImageCircuit
from invdiff.circuits.inputs import Spot
from invdiff.priors.schedules import Discrete
from invdiff.priors.wrappers import _Wrapper
from invdiff.protocols import Noise, Prior

SHARE_LEAST, SHARE_FALL = 0.8, 2.0  # of the denoiser's weight, published: 0.8 + 0.2 exp(-2 t / T)
SCHEDULE = Discrete()  # whose t(sigma) that is: linear betas, T = 1000
SIGMA_STOP = 5.0  # above it DDIM's images gained on validation slices in every figure; at 1 they lost structure again
DEVIATION = 0.5  # of images in prior units, EDM's sigma_data, for priors that do not say theirs


def share(sigma: Tensor) -> Tensor:
    """The denoiser's weight in the geometric mean, 0.8 + 0.2 exp(-2 t(sigma) / T): (s) -> (s)."""
    t = SCHEDULE.label(sigma) / SCHEDULE.steps
    return SHARE_LEAST + (1 - SHARE_LEAST) * (-SHARE_FALL * t).exp()


class _Steering(_Wrapper, ABC):
    """What both kinds of steering are: the prior itself at low noise, changed from outside the known pixels at high.

    Args:
        prior: any Prior of one channel.
        circuit: of what is coarse in its images.
        known: pixels (s 1 h w) in prior units; where they are unknown any finite value.
        mask: where they are known: bool (s 1 h w), of size 1 where all are alike.
        sigma_stop: noise level below which nothing is steered, prior units.

    Raises:
        ValueError: shapes that do not fit, more than one channel, or a circuit of another unit or range.
    """

    def __init__(
        self, prior: Prior, circuit: ImageCircuit | CodeCircuit, known: Tensor, mask: Tensor, sigma_stop: float
    ) -> None:
        super().__init__(prior)
        check_range(circuit, self.info)
        self.mask, self.known = _checked(prior, known, mask, sigma_stop)
        self.sigma_stop = sigma_stop
        self.deviation: float = getattr(self.info, "sigma_data", 0.0) or DEVIATION

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The prior's, steered where sigma is above ``sigma_stop``: x (s 1 h w), sigma () or (s).

        Raises:
            ValueError: images that the known pixels are not of.
        """
        _check_slices(x, self.known)
        plain = self.prior.denoise(x, sigma)
        levels = sigma.to(x).expand(len(x))
        above = levels > self.sigma_stop
        if not bool(above.any()):
            return plain
        steered = above[:, None, None, None] & ~self.mask
        return torch.where(steered, plain + self.change(x, levels, plain), plain)

    @abstractmethod
    def change(self, x: Tensor, sigma: Tensor, plain: Tensor) -> Tensor:
        """What is added to the denoised image ``plain`` of x (s 1 h w) at sigma (s)."""


class Steered(_Steering):
    """The weighted geometric mean of a denoiser's Gaussian and a circuit's posterior, at high noise.

    The circuit is over cells, the means of blocks of pixels. It has soft evidence of every cell from x alone, for the
    mean over n pixels of x = x_0 + sigma n is the cell's with noise sigma / n^1/2, and from the pixels that are known;
    its posterior N(mu, s^2) of each cell is exact. The denoiser's of x_0 is N(D, v), v = d^2 sigma^2 / (d^2 + sigma^2),
    with one error for all pixels of a cell. The product of the powers a and 1 - a, a = ``share(sigma)``, has

        cell = (a D / v + (1 - a) mu / s^2) / (a / v + (1 - a) / s^2),

    and of what is smaller than a cell, of which the circuit knows nothing, the denoiser's remains: the cells'
    differences are added to D, linearly between their centres. Known pixels stay as the denoiser gives them: what
    they are is for the sampler to say. Below ``sigma_stop`` this is the prior itself. What else is known of the cells
    (an example, measurements of something else than pixels) is ``evidence``: see ``invdiff.circuits.evidence``.

    It goes outside ``Chunked`` and ``Averaged``, since the known pixels are those of all slices as they stand. The
    published steering, by codes, ends at sigma 93, 59 or 25, after the first 5, 10 or 20 % of the steps of a run from
    157.

    Args:
        prior: any Prior of one channel.
        circuit: over the cells of its images.
        known: pixels (s 1 h w) in prior units; where they are unknown any finite value.
        mask: where they are known: bool (s 1 h w), of size 1 where all are alike.
        sigma_stop: noise level below which nothing is steered, prior units.
        evidence: of the cells besides, prior units (s v), v by rows; none if None.

    Raises:
        ValueError: shapes that do not fit, more than one channel, or a circuit of another unit or range.
    """

    def __init__(
        self,
        prior: Prior,
        circuit: ImageCircuit,
        known: Tensor,
        mask: Tensor,
        sigma_stop: float = SIGMA_STOP,
        evidence: Spot | None = None,
    ) -> None:
        super().__init__(prior, circuit, known, mask, sigma_stop)
        self.circuit = circuit.to(known)
        info = circuit.info
        self.pixels = info.pooled(known).number
        self.seen = of_pixels(info, self.known, self.mask)
        if evidence is not None:
            if evidence.value.shape != self.pixels.shape or evidence.variance.shape != self.pixels.shape:
                raise ValueError(f"the evidence is {tuple(evidence.value.shape)}; {tuple(self.pixels.shape)} is wanted")
            self.seen = product(self.seen, Spot(*(part.to(known) for part in evidence)))

    def change(self, x: Tensor, sigma: Tensor, plain: Tensor) -> Tensor:
        """The cells' way to the geometric mean, spread over their pixels."""
        info, (h, w) = self.circuit.info, x.shape[2:]
        said = self.posterior(x, sigma)
        whole = info.pooled(torch.where(self.mask, self.known, plain))
        cells = whole.mean.unflatten(1, (info.rows, info.columns))
        way = theirs_share(sigma, self.deviation, said.variance) * (said.mean - cells)
        return info.spread(way.masked_fill((self.pixels == 0).view_as(way), 0.0), h, w)

    def posterior(self, x: Tensor, sigma: Tensor) -> Cells:
        """What the circuit says of the cells given x (s 1 h w) at sigma (s) and the known pixels, prior units."""
        return self.circuit.posterior(product(of_noisy(self.circuit.info, x, sigma), self.seen))


class SteeredByCodes(_Steering):
    """The weighted geometric mean of a denoiser's Gaussian and that of decoded codes, at high noise.

    The encoder says of the denoised image, with the known pixels put in, what each patch's code may be; the circuit's
    posterior of all codes given that is drawn from jointly, and the draws are decoded: their mean and variance at every
    pixel are N(mu, s^2) in the formula of ``Steered``. The draws' noise is frozen from the seed, so that this is a
    function of x and sigma. Derivatives in x do not pass through the codes, which are discrete.

    Args:
        prior: any Prior of one channel.
        circuit: over codes.
        known: pixels (s 1 h w) in prior units; where they are unknown any finite value.
        mask: where they are known: bool (s 1 h w).
        noise: keyed noise, such as ``invdiff.noise.KeyedNoise(seed)``.
        sigma_stop: noise level below which nothing is steered, prior units.
        dtype: of the autoencoder's convolutions, such as bfloat16; that of the images if None.
        draws: of codes, that are decoded.

    Raises:
        ValueError: as ``Steered``.
    """

    def __init__(
        self,
        prior: Prior,
        circuit: CodeCircuit,
        known: Tensor,
        mask: Tensor,
        noise: Noise,
        sigma_stop: float = SIGMA_STOP,
        dtype: torch.dtype | None = None,
        draws: int = DRAWS,
    ) -> None:
        super().__init__(prior, circuit, known, mask, sigma_stop)
        self.dtype, self.draws = dtype, draws
        self.circuit = circuit.to(known)
        self.noise = noise
        self.covered = circuit.info.put(circuit.info.cut(torch.ones_like(known), 0.0), *known.shape[2:]).bool()

    def change(self, x: Tensor, sigma: Tensor, plain: Tensor) -> Tensor:
        """The pixels' way to the geometric mean, of those that whole patches cover."""
        with torch.no_grad():
            evidence = self.circuit.evidence(torch.where(self.mask, self.known, plain), self.mask, self.dtype)
            said = self.circuit.posterior(evidence, self.noise, self.draws, self.dtype)
            mu, s2 = (self.circuit.info.put(v, *x.shape[2:]) for v in said)
        there = theirs_share(sigma, self.deviation, torch.where(self.covered, s2, math.inf))
        return there * (mu - plain)


def theirs_share(sigma: Tensor, deviation: float, variance: Tensor) -> Tensor:
    """How far the geometric mean lies from the denoiser's towards N(., variance) (s ...), at sigma (s)."""
    level = sigma.view(-1, *[1] * (variance.ndim - 1))
    a, v = share(level), (deviation * level).square() / (deviation**2 + level.square())
    tiny = torch.finfo(v.dtype).tiny
    return (1 - a) / (a * variance / v + (1 - a)).clamp_min(tiny)  # so written, variance 0 and infinity are 1 and 0


def _checked(prior: Prior, known: Tensor, mask: Tensor, sigma_stop: float) -> tuple[Tensor, Tensor]:
    """The mask as bool (s 1 h w), and the known pixels with 0 elsewhere."""
    if prior.channels != 1 or known.ndim != 4 or known.shape[1] != 1:
        raise ValueError(f"{prior.channels} channels, known pixels {tuple(known.shape)}; 1 and (s 1 h w) are wanted")
    if mask.ndim != 4 or any(m not in (1, n) for m, n in zip(mask.shape, known.shape, strict=True)):
        raise ValueError(f"a mask {tuple(mask.shape)} does not broadcast to {tuple(known.shape)}")
    if sigma_stop < 0:
        raise ValueError(f"sigma_stop is {sigma_stop}; 0 or more is wanted")
    full = mask.bool().expand_as(known)
    return full, torch.where(full, known, 0.0)


def _check_slices(x: Tensor, known: Tensor) -> None:
    if x.shape != known.shape:
        raise ValueError(
            f"the images are {tuple(x.shape)}, the known pixels {tuple(known.shape)}: a steered prior is for "
            "its own slices; it goes outside a chunked one"
        )


def check_range(circuit: ImageCircuit | CodeCircuit, info: Any) -> None:
    """Refuse a circuit whose images are of another unit or range than the prior's.

    Raises:
        ValueError: with both.
    """
    c = circuit.info
    if info is not None and (c.unit, c.low, c.high) != (info.unit, info.low, info.high):
        raise ValueError(
            f"circuit {c.name!r} is of {c.low:g} to {c.high:g} {c.unit}, prior {info.name!r} of {info.low:g} to "
            f"{info.high:g} {info.unit}; a circuit of the prior's range is wanted"
        )
