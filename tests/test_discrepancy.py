"""The weight of the data, found from sigma_y: its quadrature, its fixed point, and what counts as a measurement."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from invdiff.linalg import lanczos
from invdiff.noise import KeyedNoise
from invdiff.operators import CartesianMRI, KnownPhase, ParallelBeam
from invdiff.priors import GaussianPrior
from invdiff.problem import prepare
from invdiff.protocols import Problem
from invdiff.reconstruction import reconstruct
from invdiff.run import iterate, last
from invdiff.samplers import DDS, DiffPIR, REDDiff
from invdiff.samplers.consistency import nearest
from invdiff.samplers.discrepancy import (
    degrees_of_freedom,
    first_rule,
    measurements,
    next_rule,
    probed_degrees_of_freedom,
    weight_of,
)
from tests.conftest import Dense


def test_a_few_lanczos_steps_integrate_every_function() -> None:
    """v^T f(M) v for f of several shapes, beside the eigenvectors'; a slice of zeros has no weight."""
    g = torch.Generator().manual_seed(0)
    root = torch.randn(37, 37, generator=g, dtype=torch.float64)
    M = root @ root.T
    v = torch.randn(3, 37, generator=g, dtype=torch.float64)
    v[2] = 0
    nodes, weights = lanczos(lambda x: x @ M, v, 30)
    e, q = torch.linalg.eigh(M)
    for f in (lambda t: 1 / (t + 0.5), lambda t: t**2, lambda t: torch.exp(-t / 10)):
        exact = ((v @ q).square() * f(e)).sum(1)
        assert float(((weights * f(nodes)).sum(1) - exact).abs().max()) < 1e-4 * float(exact.max())
    assert float(weights[2].abs().max()) == 0


def flat(m: int = 800, n: int = 600) -> tuple[Dense, torch.Tensor]:
    """A matrix of ||A|| = 1 with singular values from 1 down to 0.03, and these."""
    g = torch.Generator().manual_seed(1)
    q, _ = torch.linalg.qr(torch.randn(m, n, generator=g))
    values = torch.logspace(0, -1.5, n)
    return Dense(q * values, (6, 1, 60, n // 60)), values


def test_the_degrees_of_freedom_are_the_trace() -> None:
    A, values = flat(400, 300)
    problem = Problem(A, torch.zeros(6, 400), 0.1, None, KeyedNoise(0))  # type: ignore[arg-type]
    rules = [first_rule(problem._replace(noise=KeyedNoise(k)), 0.01, None) for k in range(5)]
    for mu in (1e-3, 0.03, 1.0):
        found = torch.stack([degrees_of_freedom(torch.cat([torch.full((6, 1), mu), r[:, 1:]], 1)) for r in rules])
        exact = float((values**2 / (values**2 + mu)).sum())
        assert float(found.mean()) == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize(("error", "sigma_y"), [(0.2, 0.05), (0.05, 0.05), (0.02, 0.002)])
@pytest.mark.parametrize("start", [1e-4, 10.0])
def test_the_fixed_point_finds_how_wrong_the_denoised_image_is(error: float, sigma_y: float, start: float) -> None:
    """D wrong by ``error`` in every pixel: mu = sigma_y^2 / error^2 from any start, and chi^2 is 1 - dof / M."""
    A, _ = flat()
    g = torch.Generator().manual_seed(2)
    truth = torch.randn(A.domain.shape, generator=g)
    D = truth + error * torch.randn(truth.shape, generator=g)
    y = A.forward(truth) + sigma_y * torch.randn(A.range.shape, generator=g)
    problem = Problem(A, y, sigma_y, None, KeyedNoise(0))  # type: ignore[arg-type]
    rule = first_rule(problem, sigma_y**2, None)
    rule[:, 0] = start
    for _ in range(30):
        x = nearest(A, y, D, weight_of(rule, D), 30)
        rule = next_rule(rule, problem, x, D, sigma_y**2)
    assert float((sigma_y / rule[:, 0].sqrt()).mean()) == pytest.approx(error, rel=0.12)
    chi2 = (A.forward(x) - y).square().flatten(1).sum(1) / sigma_y**2 / 800
    wanted = 1 - degrees_of_freedom(rule) / 800
    assert float((chi2 - wanted).mean().abs()) < 0.05


@pytest.mark.parametrize(
    "sampler", [REDDiff(steps=40), DDS(steps=40, lam=0.0), DiffPIR(steps=40)], ids=lambda s: type(s).__name__
)
@pytest.mark.parametrize("sigma_y", [0.01, 0.05, 0.2])
def test_nobody_has_to_guess(sampler: Any, sigma_y: float) -> None:
    """The whole method, smooth images: chi^2 within 0.15 of 1 - dof / M, dof by a probe of the method itself.

    (On scans, where D is nearer to right, it is within 0.1: ``benchmarks/no_tuning.py``.)
    """
    g = torch.Generator().manual_seed(3)
    A, _ = flat(800, 600)
    prior = GaussianPrior.smooth((1, 60, 10), length=2.0, deviation=0.5, mean=0.0)
    root = torch.linalg.cholesky(prior.covariance.double() + 1e-6 * torch.eye(600).double()).float()
    y = A.forward((torch.randn(6, 600, generator=g) @ root.T).view(A.domain.shape))
    y = y + sigma_y * torch.randn(y.shape, generator=g)
    problem = Problem(A, y, sigma_y, prior, KeyedNoise(0))

    def run(p: Problem) -> torch.Tensor:
        return last(iterate(sampler, p)).x

    x = run(problem)
    chi2 = (A.forward(x) - y).square().sum(1) / sigma_y**2 / 800
    wanted = 1 - probed_degrees_of_freedom(run, problem, x) / 800
    assert float((chi2 - wanted).mean().abs()) < 0.15


def test_lines_that_were_not_sampled_are_no_measurements() -> None:
    mask = torch.zeros(8, 6, dtype=torch.bool)
    mask[::2] = True
    A = CartesianMRI(mask, slices=3) @ KnownPhase(torch.full((8, 6), 0.3), slices=3)
    y = A.forward(torch.ones(3, 1, 8, 6))
    y[:, :, 1] = 2.0  # of what A never gives
    count, rest = measurements(Problem(A, y, 1.0, None, KeyedNoise(0)))  # type: ignore[arg-type]
    assert count.tolist() == [2 * 24] * 3
    assert rest.tolist() == pytest.approx([6 * 4.0] * 3)


def test_the_record_counts_what_was_measured() -> None:
    """Pure noise on a quarter of k-space, and no image to explain it: chi^2 is about 1, not a quarter."""
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[::4] = True
    A = CartesianMRI(mask, slices=2) @ KnownPhase(torch.zeros(64, 64), slices=2)
    noise = KeyedNoise(5)(0, torch.empty(A.range.shape, dtype=A.range.dtype)) * 2**0.5 * mask
    prior = GaussianPrior(torch.zeros(1, 64, 64), torch.full((4096,), 1e-8))
    chi2 = reconstruct(0.1 * noise, A, prior, DDS(steps=30, lam=0.0), sigma_y=0.1).record["chi2"]
    assert chi2 == pytest.approx([1.0, 1.0], abs=0.1)


def test_a_nonlinear_operator_is_weighed_by_its_misfit() -> None:
    """No degrees of freedom there: the misfit of the last image is about sigma_y^2 M."""

    class Square:
        domain, range = ParallelBeam((1, 1, 12, 12), [0.0], 12).domain, ParallelBeam((1, 1, 12, 12), [0.0], 12).domain

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (1 + 0.3 * x) ** 2 * x

        def vjp(self, x: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
            return r * ((1 + 0.3 * x) ** 2 + 0.6 * (1 + 0.3 * x) * x)

    prior = GaussianPrior(torch.zeros(1, 12, 12), torch.full((144,), 0.04))
    g = torch.Generator().manual_seed(4)
    A = Square()
    y = A.forward(0.2 * torch.randn(1, 1, 12, 12, generator=g)) + 0.3 * torch.randn(1, 1, 12, 12, generator=g)
    problem = prepare(y, A, prior, 0.3, KeyedNoise(0)).problem
    x = last(iterate(REDDiff(steps=300, newton_steps=0, rate=0.05), problem)).x
    assert float((A.forward(x) - y).square().mean() / 0.09) == pytest.approx(1.0, abs=0.3)
