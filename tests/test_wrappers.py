"""Priors made of priors: each against the prior that it should be."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from invdiff.priors import Averaged, Chunked, Compiled, GaussianPrior, NoPrior, Offloaded, Precision, Superposed, load
from invdiff.priors.density import log_density

SIGMAS = torch.tensor([0.05, 0.4, 3.0])


def noisy(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Silent:
    """A prior that keeps its density to itself."""

    def __init__(self, prior: Any) -> None:
        self.channels, self.denoise = prior.channels, prior.denoise


def diagonal(mean: float, deviation: float, shape: tuple[int, int, int] = (1, 3, 4)) -> GaussianPrior:
    n = math.prod(shape)
    means = mean + 0.1 * torch.arange(n).view(shape)
    return GaussianPrior(means, deviation**2 * torch.linspace(0.5, 1.5, n))


@pytest.mark.parametrize("size", [1, 2, 7])
def test_chunks_make_the_whole(size: int) -> None:
    prior = GaussianPrior.smooth((1, 4, 5), 1.0, 0.5)
    x = noisy((5, 1, 4, 5))
    sigma = torch.linspace(0.1, 1, 5)
    assert torch.equal(Chunked(prior, size).denoise(x, sigma), prior.denoise(x, sigma))
    with pytest.raises(ValueError, match="at least 1 slice"):
        Chunked(prior, 0)


def test_offloaded_moves_chunks_there_and_back() -> None:
    """The device is "meta" here, which holds no numbers: the shapes and devices of what is moved are what is seen."""
    seen: list[tuple[str, str, int]] = []

    class There:
        channels, info = 1, "what it was trained on"

        def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
            seen.append((x.device.type, sigma.device.type, len(x)))
            return torch.full(x.shape, 0.5)

    prior = Chunked(Offloaded(There(), "meta"), 2)
    out = prior.denoise(torch.zeros(5, 1, 3, 4), torch.tensor(0.1))
    assert seen == [("meta", "meta", 2), ("meta", "meta", 2), ("meta", "meta", 1)]
    assert out.device.type == "cpu" and prior.info == There.info
    same = GaussianPrior.smooth((1, 4, 5), 1.0, 0.5)
    x = noisy((3, 1, 4, 5)).requires_grad_()
    assert torch.equal(Offloaded(same, "cpu").denoise(x, SIGMAS[0]), same.denoise(x, SIGMAS[0]))
    assert torch.autograd.grad(Offloaded(same, "cpu").denoise(x, SIGMAS[0]).sum(), x)[0].abs().max() > 0


class Erring:
    """Adds the same error to every image."""

    channels = 1

    def __init__(self, error: Tensor) -> None:
        self.error = error

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        return x / 2 + self.error


def test_averaging_cancels_what_flips_and_shifts_turn_round() -> None:
    x = noisy((2, 1, 6, 8))
    lopsided = Erring(torch.linspace(-1, 1, 8) + torch.linspace(-2, 2, 6)[:, None])
    turned = Averaged(lopsided, flips=(-1, -2)).denoise(x, SIGMAS[0])
    torch.testing.assert_close(turned, x / 2, atol=1e-5, rtol=1e-5)
    assert (Averaged(lopsided, flips=(-1,)).denoise(x, SIGMAS[0]) - x / 2).abs().max() > 0.5  # the rows' ramp stays
    grid = Erring(torch.where((torch.arange(6)[:, None] + torch.arange(8)) % 2 == 0, 0.3, -0.3))
    moved = Averaged(grid, flips=(), shifts=[(0, 1)])
    torch.testing.assert_close(moved.denoise(x, SIGMAS[0]), x / 2, atol=1e-5, rtol=1e-5)
    assert len(Averaged(grid, flips=(-1, -2), shifts=[(0, 1)]).copies) == 8
    symmetric = GaussianPrior(torch.zeros(1, 6, 8), torch.full((48,), 0.3))
    both = (Averaged(symmetric, (-1, -2), [(2, 3)]), symmetric)
    torch.testing.assert_close(*(p.denoise(x, SIGMAS[1]) for p in both))
    with pytest.raises(ValueError, match=r"flips is \(0,\)"):
        Averaged(symmetric, flips=(0,))


@pytest.mark.parametrize("sigma", [0.1, 0.8, 5.0])
def test_superposed_gaussians_are_the_mixture(sigma: float) -> None:
    """Two correlated Gaussians over two pixels, against E[x_0 | x] integrated over a grid."""
    c, s = math.cos(0.5), math.sin(0.5)
    vectors = torch.tensor([[c, -s], [s, c]])
    first = GaussianPrior(torch.tensor([[[0.8, -0.3]]]), torch.tensor([0.3, 0.02]), vectors)
    second = GaussianPrior(torch.tensor([[[-0.5, 0.4]]]), torch.tensor([0.05, 0.2]))
    weights = (0.7, 0.3)
    x = 0.5 * noisy((4, 1, 1, 2))
    got = Superposed([first, second], weights).denoise(x, torch.tensor(sigma))
    axis = torch.linspace(-4, 4, 801).double()
    points = torch.cartesian_prod(axis, axis)
    density = torch.zeros(len(points)).double()
    for w, p in zip(weights, (first, second), strict=True):
        d = points - p.mean.flatten().double()
        C = p.covariance.double()
        density += w * (-0.5 * (d @ torch.linalg.inv(C) * d).sum(1)).exp() / torch.det(C).sqrt()
    for k in range(len(x)):
        likely = density * (-(points - x[k].flatten()).square().sum(1) / (2 * sigma**2)).exp()
        wanted = (likely[:, None] * points).sum(0) / likely.sum()
        torch.testing.assert_close(got[k].flatten().double(), wanted, atol=1e-4, rtol=1e-4)


def test_density_from_the_denoiser_is_the_gaussians() -> None:
    """With a diagonal covariance one probe of signs is exact; the rest is the integral's error."""
    prior = diagonal(0.2, 0.5)
    x = noisy((3, 1, 3, 4))
    got = log_density(Silent(prior), x, SIGMAS, levels=24)
    torch.testing.assert_close(got, prior.log_density(x, SIGMAS), atol=0.02, rtol=1e-3)
    correlated = GaussianPrior.smooth((1, 3, 4), 1.0, 0.5)
    rough = log_density(Silent(correlated), x, SIGMAS, levels=24, probes=400)
    torch.testing.assert_close(rough, correlated.log_density(x, SIGMAS), atol=0.4, rtol=0.01)


def test_a_superposition_without_densities_finds_them() -> None:
    priors = [diagonal(0.2, 0.5), diagonal(-0.1, 0.3)]
    x = 0.4 * noisy((3, 1, 3, 4))
    exact = Superposed(priors, (0.6, 0.4))
    found = Superposed([Silent(p) for p in priors], (0.6, 0.4), levels=24)
    torch.testing.assert_close(found.denoise(x, SIGMAS), exact.denoise(x, SIGMAS), atol=5e-3, rtol=5e-3)
    torch.testing.assert_close(found.log_density(x, SIGMAS), exact.log_density(x, SIGMAS), atol=0.03, rtol=1e-3)
    alone = found.denoise(x[1:2], SIGMAS[1])
    torch.testing.assert_close(alone, found.denoise(x, SIGMAS)[1:2], atol=1e-5, rtol=1e-5)
    fixed = Superposed(priors, (0.9, 0.1), temperature=0.0).denoise(x, SIGMAS)
    torch.testing.assert_close(fixed, 0.9 * priors[0].denoise(x, SIGMAS) + 0.1 * priors[1].denoise(x, SIGMAS))


def test_gradients_of_a_superposition() -> None:
    """Exact with the priors' own densities; with integrated ones the shares are held fixed."""
    priors = [diagonal(0.2, 0.5), diagonal(-0.1, 0.3)]
    x = (0.4 * noisy((2, 1, 3, 4))).double()

    def total(prior: Any, at: Tensor) -> Tensor:
        return prior.denoise(at, torch.tensor(0.4)).sum()

    exact = Superposed(priors, (0.6, 0.4))
    leaf = x.clone().requires_grad_()
    total(exact, leaf).backward()
    step = torch.zeros_like(x)
    step[1, 0, 2, 3] = 1e-5
    assert leaf.grad is not None
    slope = (total(exact, x + step) - total(exact, x - step)) / 2e-5
    assert float(leaf.grad[1, 0, 2, 3]) == pytest.approx(float(slope), rel=1e-5)
    leaf = x.clone().requires_grad_()
    total(Superposed([Silent(p) for p in priors], (0.6, 0.4), levels=24), leaf).backward()
    logs = torch.stack(
        [math.log(w) + p.log_density(x, torch.tensor(0.4)) for w, p in zip((0.6, 0.4), priors, strict=True)]
    )
    gains = torch.stack([(p.variances / (p.variances + 0.16)).view(1, 1, 3, 4) for p in priors])
    wanted = (logs.softmax(0).view(2, 2, 1, 1, 1) * gains).sum(0)
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, wanted, atol=2e-3, rtol=2e-3)


def test_an_ill_fit_is_refused() -> None:
    one = diagonal(0.0, 1.0)
    with pytest.raises(ValueError, match="1 priors were given"):
        Superposed([one])
    with pytest.raises(ValueError, match=r"the weights are \[1.0\]; 2 positive numbers"):
        Superposed([one, one], [1.0])
    with pytest.raises(ValueError, match="equal ones are wanted"):
        Superposed([NoPrior("HU"), NoPrior("a.u.")])


def test_precision_and_compilation_cost_only_rounding() -> None:
    prior = load("ct")
    assert Precision(prior, torch.bfloat16).info is prior.info
    x = 0.3 * noisy((2, 1, 24, 40))
    exact = prior.denoise(x, SIGMAS[:2])
    rounded = Precision(prior, torch.bfloat16).denoise(x, SIGMAS[:2])
    assert rounded.dtype == torch.float32
    assert 0 < float((rounded - exact).square().mean().sqrt()) < 0.01
    compiled = Compiled(prior, backend="eager").denoise(x, SIGMAS[:2])
    torch.testing.assert_close(compiled, exact)
