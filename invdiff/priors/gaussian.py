"""An exact prior: a stationary or general Gaussian whose denoiser is a closed form. For tests and benches."""

from __future__ import annotations

import math

import torch
from torch import Tensor


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
    def smooth(cls, shape: tuple[int, int, int], length: float, deviation: float, mean: float = 0.0) -> GaussianPrior:
        """A squared-exponential process on a (c h w) grid, channels independent.

        Args:
            shape: (c h w).
            length: correlation length in pixels.
            deviation: standard deviation of every pixel.
            mean: mean of every pixel.
        """
        c, h, w = shape
        row, column = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        points = torch.stack([row, column], -1).reshape(-1, 2).double()
        plane = deviation**2 * torch.exp(-torch.cdist(points, points).square() / (2 * length**2))
        values, vectors = torch.linalg.eigh(torch.block_diag(*[plane] * c))
        return cls(torch.full(shape, mean), values.clamp_min(0).float(), vectors.float())

    @property
    def covariance(self) -> Tensor:
        """C, (n n)."""
        v = torch.eye(len(self.variances)) if self.vectors is None else self.vectors
        return (v * self.variances) @ v.T

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The posterior mean: x (s c h w), sigma () or (s) -> (s c h w)."""
        centred = (x - self.mean.to(x)).flatten(1)
        c = self.variances.to(x)
        gain = c / (c + sigma.to(x).expand(x.shape[0])[:, None].square())
        if self.vectors is None:
            shrunk = gain * centred
        else:
            v = self.vectors.to(x)
            # One product a slice, on a copy (BLAS rounds by alignment): a slice does not depend on its batch
            shrunk = torch.stack([v @ (g * (v.T @ row.clone())) for g, row in zip(gain, centred, strict=True)])
        return self.mean.to(x) + shrunk.view_as(x)

    def log_density(self, x: Tensor, sigma: Tensor) -> Tensor:
        """ln N(x; m, C + sigma^2 I) of each slice: x (s c h w), sigma () or (s) -> (s)."""
        centred = (x - self.mean.to(x)).flatten(1)
        along = centred if self.vectors is None else centred @ self.vectors.to(x)
        total = self.variances.to(x) + sigma.to(x).expand(x.shape[0])[:, None].square()
        return -0.5 * (along.square() / total + total.log() + math.log(2 * math.pi)).sum(1)
