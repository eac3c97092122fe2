"""Exact priors: Gaussians and their mixtures, whose denoisers and densities are closed forms. For tests and benches."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from invdiff.priors.wrappers import Superposed
from invdiff.protocols import Noise

STEP = -3  # of the keyed noise: the draw of an image; measurements are drawn at -2, samplers start at -1


class GaussianPrior:
    """N(mean, C) on images of one size, every slice alike; C given by its orthonormal eigenvectors.

    D(x, sigma) = m + V diag(c / (c + sigma^2)) V^T (x - m), the exact E[x_0 | x_sigma = x].

    Args:
        mean: (c h w).
        variances: eigenvalues of C, (n) with n = c h w, non-negative.
        vectors: eigenvectors in columns, (n n); the identity if None.
    """

    def __init__(self, mean: Tensor, variances: Tensor, vectors: Tensor | None = None) -> None:
        if variances.shape != (mean.numel(),):
            raise ValueError(f"variances has shape {tuple(variances.shape)}; ({mean.numel()},) is wanted")
        if bool((variances < 0).any()):
            raise ValueError(f"the smallest variance is {float(variances.min())}; none may be negative")
        self.mean = mean
        self.variances = variances
        self.vectors = vectors
        self.channels = mean.shape[0]

    @classmethod
    def smooth(
        cls, shape: tuple[int, int, int], length: float, deviation: float, mean: float | Tensor = 0.0
    ) -> GaussianPrior:
        """A squared-exponential process on a (c h w) grid, channels independent.

        Args:
            shape: (c h w).
            length: correlation length in pixels.
            deviation: standard deviation of every pixel.
            mean: mean of every pixel, or an image that broadcasts to ``shape``.
        """
        c, h, w = shape
        row, column = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        points = torch.stack([row, column], -1).reshape(-1, 2).double()
        plane = deviation**2 * torch.exp(-torch.cdist(points, points).square() / (2 * length**2))
        values, vectors = torch.linalg.eigh(torch.block_diag(*[plane] * c))
        middle = torch.as_tensor(mean, dtype=torch.float32).expand(shape).clone()
        return cls(middle, values.clamp_min(0).float(), vectors.float())

    @property
    def covariance(self) -> Tensor:
        """C, (n n)."""
        v = torch.eye(len(self.variances)) if self.vectors is None else self.vectors
        return (v * self.variances) @ v.T

    def root(self) -> Tensor:
        """R with C = R R^T, (n n) float64."""
        c = self.variances.double().sqrt()
        return torch.diag(c) if self.vectors is None else self.vectors.double() * c

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The posterior mean: x (s c h w), sigma () or (s) -> (s c h w)."""
        c = self.variances.to(x)
        gain = c / (c + sigma.to(x).expand(x.shape[0])[:, None].square())
        return self._image(gain * self._coefficients(x))

    def log_density(self, x: Tensor, sigma: Tensor) -> Tensor:
        """ln N(x; m, C + sigma^2 I) of each slice: x (s c h w), sigma () or (s) -> (s)."""
        total = self.variances.to(x) + sigma.to(x).expand(x.shape[0])[:, None].square()
        return -0.5 * (self._coefficients(x).square() / total + total.log() + math.log(2 * math.pi)).sum(1)

    def draw(self, slices: int, noise: Noise) -> Tensor:
        """Images from the prior, (s c h w) float32: slice k depends on its key alone.

        Args:
            slices: s.
            noise: keyed noise such as ``invdiff.noise.KeyedNoise(seed)``.
        """
        n = noise(STEP, torch.empty(slices, len(self.variances)))
        return self._image(self.variances.float().sqrt() * n)

    # One product a slice, on a copy (BLAS rounds by alignment): a slice does not depend on its batch

    def _coefficients(self, x: Tensor) -> Tensor:
        """V^T (x - m): (s c h w) -> (s n)."""
        centred = (x - self.mean.to(x)).flatten(1)
        if self.vectors is None:
            return centred
        v = self.vectors.to(x)
        return torch.stack([v.T @ row.clone() for row in centred])

    def _image(self, coefficients: Tensor) -> Tensor:
        """m + V times the coefficients: (s n) -> (s c h w)."""
        if self.vectors is not None:
            v = self.vectors.to(coefficients)
            coefficients = torch.stack([v @ row.clone() for row in coefficients])
        return self.mean.to(coefficients) + coefficients.view(-1, *self.mean.shape)


class GaussianMixturePrior(Superposed):
    """sum_k w_k N(m_k, C_k): ``Superposed`` Gaussians, which is their exact mixture, with draws.

    Its log density at noise level sigma is that of sum_k w_k N(m_k, C_k + sigma^2 I), its denoiser the exact mean.

    Args:
        components: two or more, for images of one shape.
        weights: w_k, positive; normalised; equal if None.

    Raises:
        ValueError: fewer than two components, shapes that differ, weights that do not fit.
    """

    def __init__(self, components: Sequence[GaussianPrior], weights: Sequence[float] | None = None) -> None:
        super().__init__(components, weights)
        shapes = sorted({tuple(p.mean.shape) for p in components})
        if len(shapes) > 1:
            raise ValueError(f"the components are for images of {shapes}; one shape is wanted")
        self.components = list(components)
        self.weights = [w / sum(self.weights) for w in self.weights]

    def draw(self, slices: int, noise: Noise) -> Tensor:
        """Images from the mixture, (s c h w) float32: slice k depends on its key alone.

        Args:
            slices: s.
            noise: keyed noise such as ``invdiff.noise.KeyedNoise(seed)``.
        """
        chance = torch.special.ndtr(noise(STEP, torch.empty(slices, 1, dtype=torch.float64), draw=1))
        which = (chance > torch.tensor(self.weights, dtype=torch.float64).cumsum(0)[:-1]).sum(1)
        images = torch.stack([p.draw(slices, noise) for p in self.components])
        return images[which, torch.arange(slices)]
