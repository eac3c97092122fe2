"""Exact posteriors, the measures of calibration, and the test bench: what must pass and what must not."""

from __future__ import annotations

import importlib.util
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from invdiff.calibration import (
    LEVELS,
    calibrate,
    covered,
    crps,
    half_difference,
    rank_interval,
    student_interval,
)
from invdiff.config import find, registered
from invdiff.linalg import cg
from invdiff.noise import KeyedNoise
from invdiff.operators import CartesianMRI, Mask, ParallelBeam, RealChannels, Whitened
from invdiff.posterior import Posterior, as_rows, exact_posteriors, matrix_of
from invdiff.priors import Chunked, GaussianMixturePrior, GaussianPrior, Superposed
from invdiff.protocols import Problem

BENCH = Path(__file__).resolve().parent.parent / "benchmarks" / "posterior.py"


def bench_module() -> Any:
    spec = importlib.util.spec_from_file_location("posterior_bench", BENCH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


bench = bench_module()


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(a: Tensor, b: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(a.double(), b.double(), atol=tolerance, rtol=0)


def two_pixels() -> GaussianMixturePrior:
    c, s = math.cos(0.5), math.sin(0.5)
    vectors = torch.tensor([[c, -s], [s, c]])
    first = GaussianPrior(torch.tensor([[[0.8, -0.3]]]), torch.tensor([0.3, 0.02]), vectors)
    second = GaussianPrior(torch.tensor([[[-0.5, 0.4]]]), torch.tensor([0.05, 0.2]))
    return GaussianMixturePrior([first, second], (0.7 * 3, 0.3 * 3))


def fan_out(shape: tuple[int, int, int], seed: int = 1) -> tuple[GaussianMixturePrior, Any]:
    """A correlated mixture, its second part smoother and elsewhere, and a sparse-view operator of two slices."""
    ramp = 0.1 * torch.arange(math.prod(shape)).view(shape) / 10
    parts = [GaussianPrior.smooth(shape, 1.0, 0.4, ramp), GaussianPrior.smooth(shape, 2.0, 0.3, -ramp)]
    return GaussianMixturePrior(parts, (0.3, 0.7)), ParallelBeam((2, *shape), [0.1, 1.0, 2.3], 7)


def test_posterior_against_brute_force() -> None:
    """Two pixels, one measurement of both: every moment, quantile and distance integrated over a grid."""
    prior, sigma_y = two_pixels(), 0.3
    A = Mask(torch.tensor([[1, 0]]), (1, 1, 1, 2))
    y = torch.tensor([[[[0.1, 0.0]]]])
    (posterior,) = exact_posteriors(y, A, prior, sigma_y)
    step = 0.008
    axis = torch.arange(-3.5, 3.5, step).double()
    points = torch.cartesian_prod(axis, axis)
    density = torch.zeros(len(points)).double()
    for w, p in zip(prior.weights, prior.components, strict=True):
        d, C = points - p.mean.flatten().double(), p.covariance.double()
        density += w * (-0.5 * (d @ torch.linalg.inv(C) * d).sum(1)).exp() / (2 * math.pi * torch.det(C).sqrt())
    # A masked pixel is measured too, as 0: a constant factor of the likelihood
    for pixel, value in ((points[:, 0], 0.1), (torch.zeros(()), 0.0)):
        density = density * (-((pixel - value) ** 2) / (2 * sigma_y**2)).exp() / (sigma_y * math.sqrt(2 * math.pi))
    assert abs(posterior.log_evidence - math.log(float(density.sum()) * step**2)) < 1e-4
    density = density / density.sum()
    mean = density @ points
    close(posterior.mean.flatten(), mean, 1e-4)
    centred = points - mean
    close(posterior.covariance, (density[:, None] * centred).T @ centred, 1e-4)
    close(posterior.deviation.flatten().square(), posterior.covariance.diagonal(), 1e-12)
    at = torch.tensor([[[0.3, -0.2]]]).double()
    marginals = density.view(len(axis), len(axis)).sum(1), density.view(len(axis), len(axis)).sum(0)
    for k, marginal in enumerate(marginals):
        distances = (axis - at.flatten()[k]).abs()
        close(posterior.distance(at).flatten()[k], marginal @ distances, 1e-3)
        half = marginal @ (axis[:, None] - axis).abs() @ marginal / 2
        close(posterior.spread().flatten()[k], half, 1e-4)
        for level in (0.05, 0.5, 0.9):
            below = marginal[axis <= posterior.quantile(level).flatten()[k]].sum()
            assert abs(float(below) - level) < 1.5 * step
    close(posterior.cdf(posterior.quantile(0.3)), torch.full((1, 1, 2), 0.3).double(), 1e-7)  # a 0.3 of float32


def test_two_equal_parts_are_one_gaussian_and_that_is_the_textbooks() -> None:
    shape = (1, 5, 6)
    single = GaussianPrior.smooth(shape, 1.5, 0.4, 0.3)
    _, A = fan_out(shape)
    y, sqrt_w = A(single.draw(2, KeyedNoise(0))), 1 + rand(*A.range.shape).abs().float()
    white = Whitened(A, sqrt_w)
    double = exact_posteriors(white.whiten(y), white, GaussianMixturePrior([single, single], (0.2, 0.8)), 1.0)
    for k, (one, two) in enumerate(zip(exact_posteriors(white.whiten(y), white, single, 1.0), double, strict=True)):
        for name in ("mean", "covariance", "deviation"):
            close(getattr(one, name), getattr(two, name), 1e-12)
        assert abs(one.log_evidence - two.log_evidence) < 1e-9
        # Poisson weights are a noise covariance like any other: the gain in measurement space, unwhitened
        M, C = matrix_of(A)[k], single.covariance.double()
        noise = torch.diag(sqrt_w[k].flatten().double() ** -2)
        gain = C @ M.T @ torch.linalg.inv(M @ C @ M.T + noise)
        m = single.mean.flatten().double()
        close(one.mean.flatten(), m + gain @ (as_rows(y)[k] - M @ m), 1e-5)
        close(one.covariance, C - gain @ M @ C, 1e-6)


def test_a_matrix_is_its_operator() -> None:
    g = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 3, 4, 5, dtype=torch.complex64, generator=g)
    A = CartesianMRI(torch.rand(4, 5, generator=g) < 0.6, maps) @ RealChannels((2, 1, 4, 5))
    x = rand(2, 2, 4, 5).float()
    M = matrix_of(A)
    assert M.shape == (2, 2 * 3 * 4 * 5, 2 * 4 * 5)
    assert (M[0] - M[1]).abs().max() > 0.1
    close(torch.einsum("smn,sn->sm", M, x.flatten(1).double()), as_rows(A(x)), 1e-5)
    with pytest.raises(ValueError, match="wrap it in RealChannels"):
        matrix_of(A.outer)
    single = GaussianPrior.smooth((1, 5, 6), 1.5, 0.4)
    _, ct = fan_out((1, 5, 6))
    with pytest.raises(ValueError, match=r"sigma_y is 0\.0"):
        exact_posteriors(torch.zeros(ct.range.shape), ct, single, 0.0)
    with pytest.raises(ValueError, match=r"takes \(2, 4, 5\), the prior is for \(1, 5, 6\)"):
        exact_posteriors(A(x), A, single, 1.0)


def test_draws_are_from_the_posterior() -> None:
    prior, A = fan_out((1, 4, 5))
    x = prior.draw(2, KeyedNoise(3))
    y = A(x) + 1.5 * rand(*A.range.shape).float()
    for posterior in exact_posteriors(y, A, prior, 1.5):
        assert 0.02 < float(posterior.weights[0]) < 0.98
        samples = posterior.draw(10_000, KeyedNoise(1)).flatten(1)
        size = float(posterior.deviation.max())
        close(samples.mean(0), posterior.mean.flatten(), 0.03 * size)
        close(torch.cov(samples.T), posterior.covariance, 0.05 * size**2)
        close((samples < posterior.quantile(0.1).flatten()).double().mean(0), torch.full((20,), 0.1), 0.015)
    few = posterior.draw(2, KeyedNoise(1, first=5))
    close(few, posterior.draw(7, KeyedNoise(1))[5:], 1e-12)


def test_truth_posterior_and_measurement_agree_over_many_truths() -> None:
    """Draw x, then y, then ask how far down its own posterior each truth lies: uniform, if all three are right."""
    prior, _ = fan_out((1, 4, 5))
    many = ParallelBeam((300, 1, 4, 5), [0.1, 1.0, 2.3], 7)
    x = prior.draw(300, KeyedNoise(4))
    y = many(x) + 0.8 * KeyedNoise(9)(0, torch.empty(many.range.shape))
    found = exact_posteriors(y, many, prior, 0.8)
    levels = torch.stack([p.cdf(t.double()) for p, t in zip(found, x, strict=True)])
    for q in (0.1, 0.5, 0.8):  # 300 truths of 20 correlated pixels: a deviation of about 0.015
        assert abs(float((levels < q).double().mean()) - q) < 0.04
    nearest = [float((p.weights.max() > 0.9).double()) for p in found]
    assert sum(nearest) < len(nearest)  # some are ambiguous


def test_mixture_prior_is_the_superposition_and_draws_its_parts() -> None:
    prior, _ = fan_out((1, 4, 5))
    x, sigma = rand(5, 1, 4, 5).float(), torch.tensor([0.05, 0.1, 0.5, 2.0, 9.0])
    again = Superposed(prior.components, (3.0, 7.0))
    close(prior.denoise(x, sigma), again.denoise(x, sigma), 1e-6)
    close(prior.log_density(x, sigma), again.log_density(x, sigma), 1e-4)
    assert torch.equal(Chunked(prior, 2).denoise(x, sigma), prior.denoise(x, sigma))
    draws = prior.draw(8_000, KeyedNoise(0))
    assert torch.equal(draws[7:9], prior.draw(2, KeyedNoise(0, first=7)))
    mean = sum(w * p.mean for w, p in zip(prior.weights, prior.components, strict=True))
    close(draws.mean(0), mean, 0.03)
    spread = sum(
        w * (p.covariance + torch.outer((p.mean - mean).flatten(), (p.mean - mean).flatten()))
        for w, p in zip(prior.weights, prior.components, strict=True)
    )
    close(torch.cov(draws.flatten(1).T), spread, 0.02)
    close(torch.cov(prior.components[0].draw(8_000, KeyedNoise(0)).flatten(1).T), prior.components[0].covariance, 0.015)
    with pytest.raises(ValueError, match="one shape is wanted"):
        GaussianMixturePrior([prior.components[0], GaussianPrior.smooth((1, 5, 4), 1.0, 1.0)])


TRUTHS = 20_000  # as many ensembles: a coverage's Monte-Carlo deviation is at most 0.0035


@pytest.mark.parametrize("kind", ["gaussian", "exponential"])
@pytest.mark.parametrize("count", [39, 79, 100])
def test_rank_intervals_cover_what_they_say_whatever_the_distribution(kind: str, count: int) -> None:
    every = rand(count + 1, TRUTHS, seed=2)
    if kind == "exponential":
        every = every.abs().exp()
    samples, truth = every[1:], every[0]
    for level in LEVELS:
        assert abs(covered(rank_interval(samples, level), truth) - level) < 0.011


def test_few_samples() -> None:
    """Of 16 samples quantiles cover too little; Student's interval covers what it says, ranks refuse."""
    every = rand(17, TRUTHS, seed=3)
    samples, truth = every[1:], every[0]
    for level in LEVELS:
        assert abs(covered(student_interval(samples, level), truth) - level) < 0.011
        naive = torch.quantile(samples, torch.tensor([(1 - level) / 2, (1 + level) / 2]).double(), dim=0)
        assert covered((naive[0], naive[1]), truth) < level - 0.03
    assert abs(covered(rank_interval(samples, 0.8), truth) - 0.8) < 0.015  # between ranks: a little wide
    with pytest.raises(ValueError, match="16 samples for an interval of 90%; 19 or more"):
        rank_interval(samples, 0.9)
    for bad in (0.0, 1.0):
        with pytest.raises(ValueError, match="between 0 and 1"):
            student_interval(samples, bad)
    with pytest.raises(ValueError, match="2 or more"):
        student_interval(samples[:1], 0.5)


@pytest.mark.parametrize("count", [2, 5, 16])
def test_crps_is_fair_and_the_gaussians(count: int) -> None:
    """Gneiting & Raftery 2007, eq. 21: CRPS(N(0, 1), y) = y (2 Phi(y) - 1) + 2 phi(y) - 1 / sqrt(pi)."""
    samples = rand(count, TRUTHS, seed=4)
    for truth in (0.0, 1.3, -2.0):
        phi = math.exp(-(truth**2) / 2) / math.sqrt(2 * math.pi)
        wanted = truth * math.erf(truth / math.sqrt(2)) + 2 * phi - 1 / math.sqrt(math.pi)
        got = crps(samples, torch.full((TRUTHS,), truth).double())
        assert abs(float(got.mean()) - wanted) < 0.02
    pairs = (samples[:, None] - samples).abs().sum((0, 1)) / (2 * count * (count - 1))
    close(half_difference(samples), pairs, 1e-12)
    close(crps(samples[:1], samples[1]), (samples[0] - samples[1]).abs(), 1e-12)


def test_calibration_in_numbers() -> None:
    """Samples of known faults: the measures are those faults."""
    root = torch.diag(torch.tensor([0.5, 1.0, 2.0])).double()
    posterior = Posterior(torch.ones(1).double(), torch.tensor([[1.0, -2.0, 0.5]]).double(), root[None], (1, 1, 3), 0.0)
    n = rand(3999, 1, 1, 3)
    exact = posterior.mean + posterior.deviation * n
    good = calibrate([exact], [posterior])
    assert good.missed() == []
    close(torch.tensor(good.coverage), torch.tensor(LEVELS), 0.01)
    assert abs(good.crps_ratio - 1) < 0.01
    assert abs(good.crps - 3.5 / 3 / math.sqrt(math.pi)) < 0.02
    wrong = calibrate([posterior.mean + posterior.deviation * (0.5 * n + 0.4)], [posterior])
    assert abs(wrong.bias - 0.4) < 0.02
    assert abs(wrong.ratio - 0.5) < 0.02
    assert abs(wrong.ratio_median - 0.5) < 0.02
    z = torch.special.ndtri((1 + torch.tensor(LEVELS).double()) / 2)
    wanted = torch.special.ndtr(0.5 * z + 0.4) - torch.special.ndtr(-0.5 * z + 0.4)
    close(torch.tensor(wrong.coverage), wanted, 0.02)
    at_90 = f"90 % coverage {wrong.coverage[2]:.3f}"
    assert wrong.missed() == [f"mean off by {wrong.bias:.2f} std", f"std ratio {wrong.ratio:.2f}", at_90]
    point = calibrate([posterior.mean.expand(39, 1, 1, 3)], [posterior])
    assert (point.error, point.bias, point.ratio, point.coverage[3]) == (0, 0, 0, 0)
    few = [calibrate([posterior.draw(39, KeyedNoise(s))], [posterior]) for s in range(300)]
    assert abs(math.sqrt(sum(c.error**2 for c in few) / 300) - few[0].floor) < 0.01
    with pytest.raises(ValueError, match="39 or more are wanted"):
        calibrate([exact[:38]], [posterior])


SMALL = [
    ("inpainting", "process", "white"),
    ("sparse CT", "mixture", "Poisson"),
    ("multi-coil MRI", "mixture", "white"),
]


@pytest.fixture(scope="module", params=SMALL, ids=lambda cell: ", ".join(cell))
def case(request: pytest.FixtureRequest) -> Any:
    return bench.build(*request.param)


def test_the_bench_passes_exact_samples_and_no_others(case: Any) -> None:
    exact, evaluations = bench.draw("exact", case)
    assert evaluations == 0
    assert calibrate(exact, case.posteriors).missed() == []
    halved = [p.mean + 0.5 * (x - p.mean) for x, p in zip(exact, case.posteriors, strict=True)]
    shifted = [x + 0.5 * p.deviation for x, p in zip(exact, case.posteriors, strict=True)]
    assert any("std ratio" in text for text in calibrate(halved, case.posteriors).missed())
    assert any("mean off" in text for text in calibrate(shifted, case.posteriors).missed())
    blind, _ = bench.draw("prior", case)
    assert len(calibrate(blind, case.posteriors).missed()) >= 2


class Perturbed(NamedTuple):
    i: int
    x: Tensor


@dataclass(frozen=True)
class PerturbAndSolve:
    """Exact with one Gaussian: solve for a prior draw and noisier data (Papandreou & Yuille 2010), as a sampler would.

    Sees only what every sampler sees: the problem in prior units.
    """

    steps: int = 1

    def sigma(self, i: int) -> float:
        return 0.0

    def init(self, problem: Problem) -> Perturbed:
        return Perturbed(0, problem.prior.prior.draw(len(problem.y), problem.noise))  # type: ignore[attr-defined]

    def step(self, problem: Problem, state: Perturbed) -> Perturbed:
        A, R, s = problem.operator, problem.prior.prior.root().float(), problem.sigma_y  # type: ignore[attr-defined]
        shape = state.x.shape
        scale = s * math.sqrt(2) if problem.y.is_complex() else s
        r = problem.y + scale * problem.noise(0, problem.y) - A.forward(state.x)

        def normal(z: Tensor) -> Tensor:
            return z + A.normal((z @ R.T).view(shape)).flatten(1) @ R / s**2

        z = cg(normal, A.adjoint(r).flatten(1) @ R / s**2, iterations=150, tolerance=1e-5)
        return Perturbed(1, state.x + (z @ R.T).view(shape))


CELLS = [(task, noise) for task, kind in bench.TASKS.items() for noise in kind.noises]


@pytest.mark.parametrize(("task", "noise"), CELLS)
def test_a_true_sampler_of_the_prepared_problem_passes(task: str, noise: str) -> None:
    """Units, weights, norms and complex noise are the same on both sides; half the noise, or twice, is not."""
    same = bench.build(task, "process", noise, truths=2)
    samples, calls = bench.draw(PerturbAndSolve(), same)
    assert calls == 0
    assert calibrate(samples, same.posteriors).missed() == []
    for factor in (0.5, 2.0):
        wrong, _ = bench.draw(PerturbAndSolve(), same._replace(sigma_y=factor * same.sigma_y))
        assert any("std ratio" in text for text in calibrate(wrong, same.posteriors).missed())


def test_the_bench_knows_every_sampler_that_measures_and_counts_its_calls() -> None:
    names = bench.candidates()
    assert set(names) >= {"exact", "prior", "dds", "reddiff", "diffusionmbir", "fbp", "cgls", "tv"}
    assert "ddim" not in names
    assert set(bench.SETTINGS) <= set(registered("samplers"))
    tiny = bench.build("blur", "process", "white", truths=1, samples=3)
    samples, calls = bench.draw(type(names["dds"])(steps=7, lam=0.0), tiny)
    assert (len(samples), samples[0].shape, calls) == (1, (3, 1, bench.H, bench.W), 7)


def test_a_cell_is_a_file_and_a_row(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(bench, "TASKS", {"blur": bench.TASKS["blur"]})
    monkeypatch.setattr(bench, "SAMPLES", 39)

    class Point(type(bench.candidates()["fbp"])):  # type: ignore[misc]
        estimate = "point estimate"

    class Diverges(Point):
        def step(self, problem: Any, state: Any) -> Any:
            return state._replace(i=1, x=state.x + math.nan)

    made = {"exact": "exact", "point": Point(), "diverges": Diverges()}
    monkeypatch.setattr(bench, "candidates", lambda: made)
    bench.run(tmp_path, list(made))
    first = capsys.readouterr().out
    bench.run(tmp_path, list(made))
    assert capsys.readouterr().out == ""  # all cells are there
    assert len(list(tmp_path.glob("*.json"))) == 6
    bench.table(tmp_path)
    printed = capsys.readouterr().out
    rows = [text.split("|") for text in printed.splitlines() if text.startswith("|")]
    assert {len(r) for r in rows if len(r) > len(bench.SHORT) + 2} == {len(bench.HEAD) + 2}
    assert len([r for r in rows if len(r) == len(bench.SHORT) + 2]) == 2 + 3
    assert all(text in printed for text in first.splitlines())
    assert printed.count("became NaN or infinite") == 2
    assert "2 of 2" in printed
    assert printed.count("| point estimate |\n") == 3


CLAIMING = [k for k in registered("samplers") if getattr(find("samplers", k), "estimate", "") == bench.CLAIM]


@pytest.mark.parametrize("kind", CLAIMING)
def test_a_sampler_that_claims_the_posterior_samples_it(kind: str) -> None:
    tiny = bench.build("sparse CT", "process", "white", truths=2)
    samples, _ = bench.draw(bench.candidates()[kind], tiny)
    assert calibrate(samples, tiny.posteriors).missed() == []
