"""Exact posteriors of linear problems with Gaussian and Gaussian-mixture priors, in float64: what samplers are held to.

y = M x + sigma_y n and x ~ sum_k w_k N(m_k, R_k R_k^T) give, with B = M R / sigma_y and r = (y - M m) / sigma_y,

    x | y ~ sum_k w'_k N(m_k + R K^-1 B^T r, R K^-1 R^T),   K = I + B^T B,
    w'_k  ~ w_k N(y; M m_k, M C_k M^T + sigma_y^2 I).

Square roots throughout: a covariance with directions of zero variance is one like any other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from invdiff.priors.gaussian import GaussianMixturePrior, GaussianPrior
from invdiff.protocols import LinearOperator, Noise

STEP = -4  # of the keyed noise: a draw from a posterior
REACH = 40.0  # deviations beyond the outermost mean within which quantiles are looked for
HALVINGS = 70  # of the bracket of a quantile: float64 has no more


@dataclass(frozen=True)
class Posterior:
    """sum_k w_k N(m_k, R_k R_k^T) on images (c h w), all float64.

    Args:
        weights: w_k, (k), of sum 1.
        means: m_k, (k n).
        roots: R_k, (k n n).
        shape: (c h w), n in all.
        log_evidence: ln p(y).
    """

    weights: Tensor
    means: Tensor
    roots: Tensor
    shape: tuple[int, int, int]
    log_evidence: float

    @property
    def mean(self) -> Tensor:
        """E[x | y], (c h w)."""
        return (self.weights @ self.means).view(self.shape)

    @property
    def covariance(self) -> Tensor:
        """Cov[x | y], (n n): within the components and between them."""
        apart = self.means - self.weights @ self.means
        return torch.einsum("k,kij->ij", self.weights, self.roots @ self.roots.mT) + (apart.T * self.weights) @ apart

    @property
    def deviation(self) -> Tensor:
        """Standard deviation of every pixel, (c h w)."""
        apart = self.means - self.weights @ self.means
        variance = self.weights @ (self.roots.square().sum(-1) + apart.square())
        return variance.sqrt().view(self.shape)

    def cdf(self, x: Tensor) -> Tensor:
        """P(pixel <= x | y) for every pixel: x (... c h w) -> (... c h w)."""
        total = torch.zeros_like(x, dtype=torch.float64)
        for w, m, s in self._marginals():
            total += w * torch.special.ndtr((x - m) / s)
        return total

    def quantile(self, level: float) -> Tensor:
        """Below which every pixel is with probability ``level``, by bisection of ``cdf``, (c h w).

        Raises:
            ValueError: a level outside (0, 1).
        """
        if not 0 < level < 1:
            raise ValueError(f"level is {level}; a number between 0 and 1 is wanted")
        edges = [(m - REACH * s, m + REACH * s) for _, m, s in self._marginals()]
        low = torch.stack([e[0] for e in edges]).amin(0)
        high = torch.stack([e[1] for e in edges]).amax(0)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            below = self.cdf(middle) < level
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def distance(self, x: Tensor) -> Tensor:
        """E|X - x| of every pixel under the posterior: x (... c h w) -> (... c h w)."""
        total = torch.zeros_like(x, dtype=torch.float64)
        for w, m, s in self._marginals():
            total += w * _folded_mean(x - m, s)
        return total

    def spread(self) -> Tensor:
        """E|X - X'| / 2 of every pixel for two independent draws, (c h w): the least CRPS that can be expected."""
        parts = list(self._marginals())
        total = torch.zeros(self.shape, dtype=torch.float64)
        for w, m, s in parts:
            for v, n, t in parts:
                total += w * v / 2 * _folded_mean(m - n, (s**2 + t**2).sqrt())
        return total

    def draw(self, count: int, noise: Noise) -> Tensor:
        """Independent samples, (count c h w): sample k depends on its key alone.

        Args:
            count: of samples.
            noise: keyed noise such as ``invdiff.noise.KeyedNoise(seed)``.
        """
        like = torch.empty(count, self.means.shape[1], dtype=torch.float64)
        n, chance = noise(STEP, like), torch.special.ndtr(noise(STEP, like[:, :1], draw=1))
        which = (chance > self.weights.cumsum(0)[:-1]).sum(1)
        images = self.means[:, None] + n @ self.roots.mT
        return images[which, torch.arange(count)].view(count, *self.shape)

    def _marginals(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(weight, mean (c h w), deviation (c h w), never 0) of each component."""
        tiny = torch.finfo(torch.float64).tiny
        for w, m, root in zip(self.weights, self.means, self.roots, strict=True):
            yield w, m.view(self.shape), root.square().sum(-1).sqrt().clamp_min(tiny).view(self.shape)


def matrix_of(operator: LinearOperator) -> Tensor:
    """The operator of each slice as a real matrix (s m n) float64; a complex measurement is two rows (``as_rows``).

    Exact to the rounding of the operator's dtype. One application a pixel: for small images.

    Raises:
        ValueError: a complex domain.
    """
    shape, dtype = operator.domain
    if dtype.is_complex:
        raise ValueError("the operator acts on complex images; wrap it in RealChannels or KnownPhase")
    columns = []
    for j in range(math.prod(shape[1:])):
        x = torch.zeros(shape, dtype=dtype).flatten(1)
        x[:, j] = 1
        columns.append(as_rows(operator.forward(x.view(shape))))
    return torch.stack(columns, -1)


def as_rows(y: Tensor) -> Tensor:
    """Measurements as real vectors, (s m) float64: real and imaginary parts in turn where complex."""
    return (torch.view_as_real(y.resolve_conj()) if y.is_complex() else y).flatten(1).double()


def exact_posteriors(
    y: Tensor, operator: LinearOperator, prior: GaussianPrior | GaussianMixturePrior, sigma_y: float
) -> list[Posterior]:
    """p(x | y) of every slice.

    Args:
        y: measurements, the shape of ``operator.range``.
        operator: linear, from real images; with ray weights ``Whitened(operator, sqrt_w)`` and 1 for ``sigma_y``.
        prior: its units are the operator's.
        sigma_y: standard deviation of one real component of the noise, positive.

    Raises:
        ValueError: a sigma_y that is not positive, a complex domain, or images that are not the prior's.
    """
    if not (math.isfinite(sigma_y) and sigma_y > 0):
        raise ValueError(f"sigma_y is {sigma_y}; a positive number is wanted")
    if isinstance(prior, GaussianMixturePrior):
        parts, shares = prior.components, prior.weights
    else:
        parts, shares = [prior], [1.0]
    weights = torch.tensor(shares, dtype=torch.float64)
    c, h, w = parts[0].mean.shape
    if tuple(operator.domain.shape[1:]) != (c, h, w):
        raise ValueError(f"the operator takes {tuple(operator.domain.shape[1:])}, the prior is for {(c, h, w)}")
    found = []
    for matrix, row in zip(matrix_of(operator), as_rows(y), strict=True):
        given = [_condition(matrix, row, sigma_y, p) for p in parts]
        logs = weights.log() + torch.stack([log for _, _, log in given])
        means, roots = (torch.stack([g[k] for g in given]) for k in (0, 1))
        found.append(Posterior(logs.softmax(0), means, roots, (c, h, w), float(logs.logsumexp(0))))
    return found


def _condition(matrix: Tensor, y: Tensor, sigma_y: float, prior: GaussianPrior) -> tuple[Tensor, Tensor, Tensor]:
    """(mean (n), root (n n), ln evidence ()) of one Gaussian given y (m) = matrix (m n) x + sigma_y n."""
    m, root = prior.mean.double().flatten(), prior.root()
    B, r = matrix @ root / sigma_y, (y - matrix @ m) / sigma_y
    L = torch.linalg.cholesky(torch.eye(len(m)).double() + B.T @ B)
    narrowed = torch.linalg.solve_triangular(L, root.T, upper=False).T  # R L^-T
    b = torch.linalg.solve_triangular(L, (B.T @ r)[:, None], upper=False)[:, 0]
    determinant = L.diagonal().log().sum() + len(y) * math.log(sigma_y * math.sqrt(2 * math.pi))
    return m + narrowed @ b, narrowed, (b.square().sum() - r.square().sum()) / 2 - determinant


def _folded_mean(offset: Tensor, deviation: Tensor) -> Tensor:
    """E|offset + deviation n|, n ~ N(0, 1)."""
    z = offset / deviation
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    return 2 * deviation * density + offset * torch.special.erf(z / math.sqrt(2))
