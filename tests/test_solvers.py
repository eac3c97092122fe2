"""Unconditional solvers: order of convergence against closed forms, equivalences, and what they sample."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from invdiff.noise import KeyedNoise, noise_levels
from invdiff.priors import GaussianPrior
from invdiff.problem import Nothing, unconditional
from invdiff.protocols import Noise, Prior, Problem, Space
from invdiff.run import iterate
from invdiff.samplers import DDIM, DDPM, DEIS, GHVB, DPMpp2M, Heun, Solver
from invdiff.samplers.deis import adams_weights

VARIANCES = torch.tensor([1.0, 0.5, 0.25, 0.1, 0.05, 0.02], dtype=torch.float64)
MEAN = 0.3
LOW = 0.05  # sigma_min here: well above 0, so that the order is seen, and below every deviation
INTERVALS = (80, 160, 320)

# Solver and its order; the same on every smooth grid
ORDERS: dict[str, tuple[Solver, int]] = {
    "ddim": (DDIM(), 1),
    "heun": (Heun(), 2),
    "dpmpp2m": (DPMpp2M(), 2),
    "deis, 2": (DEIS(order=2), 2),
    "deis3m": (DEIS(), 3),
    "deis, 4": (DEIS(order=4), 4),
    "ghvb, 1": (GHVB(order=1, beta=0.8), 1),
    "ghvb": (GHVB(), 2),
    "ghvb, 2, strong": (GHVB(order=2, beta=0.4), 2),
    "ghvb, 3": (GHVB(order=3), 3),
    "ghvb, 4": (GHVB(order=4, beta=0.6), 4),
}


def gaussian(shape: tuple[int, int, int] = (1, 2, 3)) -> GaussianPrior:
    return GaussianPrior(
        torch.full(shape, MEAN, dtype=torch.float64), VARIANCES.repeat_interleave(math.prod(shape) // 6)
    )


class TwoBumps:
    """Every pixel an even mixture of N(-0.6, 0.2^2) and N(0.6, 0.2^2): a denoiser that is not linear in x."""

    channels = 1
    centre, variance = 0.6, 0.04

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        total = self.variance + sigma.square()
        side = torch.tanh(self.centre * x / total)  # difference of the two responsibilities
        return (self.variance * x + sigma.square() * self.centre * side) / total

    def cdf(self, x: Tensor, sigma: float) -> Tensor:
        """Of the mixture at noise sigma; the probability-flow ODE keeps it constant along every path."""
        deviation = (self.variance + sigma**2) ** 0.5
        return sum(torch.special.ndtr((x - m) / deviation) for m in (-self.centre, self.centre)) / 2  # type: ignore[return-value]


def problem_of(prior: Prior, slices: int = 3, noise: Noise | None = None, size: tuple[int, int] = (2, 3)) -> Problem:
    """Without measurements, in float64."""
    problem = unconditional((slices, 1, *size), prior, noise).problem
    return problem._replace(operator=Nothing(Space((slices, 1, *size), torch.float64)))


def ends(solver: Solver, problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """x_t at sigma_max, x_t at sigma_min, and the result."""
    states = list(iterate(solver, problem))
    return states[0].x_t, states[-2].x_t, states[-1].x


def slope(solver: Solver, error: Any, intervals: tuple[int, ...] = INTERVALS) -> float:
    """Minus the slope of ln error over ln intervals, by least squares, the error at sigma_min."""
    n = torch.tensor(intervals, dtype=torch.float64).log()
    e = torch.tensor([error(replace(solver, steps=k + 1, sigma_min=LOW)) for k in intervals], dtype=torch.float64).log()
    return -float(((n - n.mean()) * (e - e.mean())).sum() / (n - n.mean()).square().sum())


@pytest.mark.parametrize("grid", ["karras", "geometric"])
@pytest.mark.parametrize("kind", ORDERS)
def test_order_on_a_gaussian(kind: str, grid: str) -> None:
    """Against x(s) - m = (x(s_0) - m) sqrt((c + s^2) / (c + s_0^2)) along every eigenvector."""
    solver, order = ORDERS[kind]

    def error(s: Solver) -> float:
        start, end, _ = ends(s, problem_of(gaussian()))
        shrink = ((VARIANCES + s.sigma_min**2) / (VARIANCES + s.sigma_max**2)).sqrt().view(1, 2, 3)
        return float((end - MEAN - (start - MEAN) * shrink).abs().max())

    assert slope(replace(solver, grid=grid), error) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("kind", ORDERS)
def test_order_on_a_field_that_is_not_linear(kind: str) -> None:
    solver, order = ORDERS[kind]
    prior = TwoBumps()

    def error(s: Solver) -> float:
        start, end, _ = ends(s, problem_of(prior))
        return float((prior.cdf(end, s.sigma_min) - prior.cdf(start, s.sigma_max)).abs().max())

    assert slope(solver, error) == pytest.approx(order, abs=0.4)


@dataclass(frozen=True)
class Impulse:
    """Noise that is 1 at one step and 0 elsewhere: a solver's linear response to that step's noise."""

    at: int

    def __call__(self, step: int, like: Tensor, draw: int = 0) -> Tensor:
        return torch.full_like(like, float(step == self.at and draw == 0))


def variance_of(solver: Solver) -> Tensor:
    """Exact variance of x_t at sigma_min for each of VARIANCES: the responses' squares, summed."""
    prior = gaussian()
    mean = ends(solver, problem_of(prior, 1, Impulse(-2)))[1]
    responses = [ends(solver, problem_of(prior, 1, Impulse(k)))[1] - mean for k in range(-1, solver.steps - 1)]
    return torch.stack(responses).square().sum(0).flatten()


def ddpm_variance(solver: DDPM) -> Tensor:
    """The recursion v' = g^2 v + s'^2 (1 - q), g = q + (1 - q) c / (c + s^2), q = (s'/s)^2, down to sigma_min."""
    v = torch.full_like(VARIANCES, solver.sigma_max**2)
    for i in range(solver.steps - 1):
        s, s_next = solver.sigma(i), solver.sigma(i + 1)
        q = (s_next / s) ** 2
        v = (q + (1 - q) * VARIANCES / (VARIANCES + s**2)) ** 2 * v + s_next**2 * (1 - q)
    return v


def test_ddpm_has_its_closed_form_variance_and_weak_order_one() -> None:
    short = DDPM(steps=12, sigma_min=LOW)
    torch.testing.assert_close(variance_of(short), ddpm_variance(short), rtol=1e-10, atol=0)

    def error(s: Solver) -> float:
        return float((ddpm_variance(s) - VARIANCES - s.sigma_min**2).abs().max())  # type: ignore[arg-type]

    assert slope(DDPM(), error) == pytest.approx(1, abs=0.1)


def test_ddpm_draws_that_variance() -> None:
    """A finite number of steps, 4000 draws of each eigenvalue: the relative error is sqrt(2 / 4000) = 2 %."""
    solver = DDPM(steps=10, sigma_min=LOW)
    prior = gaussian((1, 6, 4000))
    _, end, _ = ends(solver, problem_of(prior, 1, KeyedNoise(1), (6, 4000)))
    wanted = ddpm_variance(solver)
    assert (end.var(dim=(0, 1, 3)) / wanted - 1).abs().max() < 0.1
    assert ((VARIANCES + LOW**2) / wanted - 1).abs().max() > 0.2  # ten steps are seen to be few
    assert ((end.mean(dim=(0, 1, 3)) - MEAN).abs() / wanted.sqrt()).max() < 4 / 4000**0.5


@pytest.mark.parametrize(
    "solver",
    [DDIM(200), DDIM(200, eta=0.2), DDPM(200), Heun(40), Heun(60, churn=20.0), DPMpp2M(50), DEIS(50), GHVB(50)],
    ids=repr,
)
def test_samples_have_the_priors_mean_and_variance(solver: Solver) -> None:
    solver = replace(solver, sigma_min=0.005)
    prior = gaussian((1, 6, 2000))
    *_, x = ends(solver, problem_of(prior, 1, KeyedNoise(2), (6, 2000)))
    # Monte Carlo: sqrt(2 / 2000) = 3 % of a variance; the rest is what the steps leave
    assert (x.var(dim=(0, 1, 3)) / VARIANCES - 1).abs().max() < 0.17
    assert ((x.mean(dim=(0, 1, 3)) - MEAN).abs() / VARIANCES.sqrt()).max() < 0.1


@pytest.mark.parametrize(
    ("one", "other", "tolerance"),
    [
        (DPMpp2M(9, order=1), DDIM(9, grid="geometric"), 1e-12),
        (DEIS(9, order=1), DDIM(9), 1e-12),
        (GHVB(9, order=1, beta=1.0), DDIM(9), 1e-12),
        (GHVB(9, order=2, beta=1e-7), DDIM(9), 1e-5),
        (GHVB(9, order=2, beta=1.0), DEIS(9, order=2), 1e-12),
        (GHVB(9, order=3, beta=1.0), DEIS(9, order=3), 1e-12),
        (GHVB(9, order=4, beta=1.0), DEIS(9, order=4), 1e-12),
        (Heun(9, churn=30.0, churn_min=90.0, churn_max=91.0), Heun(9), 0.0),
        (Heun(1), DDIM(1), 1e-12),
        (DDPM(1), DDIM(1), 1e-12),
        (DPMpp2M(2), DDIM(2), 1e-12),
    ],
    ids=repr,
)
def test_limits_are_other_solvers(one: Solver, other: Solver, tolerance: float) -> None:
    ours, theirs = (ends(s, problem_of(TwoBumps()))[2] for s in (one, other))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


def test_orders_differ() -> None:
    results = [ends(s, problem_of(TwoBumps()))[2] for s in (DDIM(9), DPMpp2M(9), DEIS(9), GHVB(9), Heun(9), DDPM(9))]
    for i, a in enumerate(results):
        assert all((a - b).abs().max() > 1e-4 for b in results[:i])


def test_steps_are_the_papers() -> None:
    """One step of each against its formula, written out here once more, from the middle of a run."""
    problem = problem_of(TwoBumps())
    prior = problem.prior

    def D(x: Tensor, s: float) -> Tensor:  # noqa: N802
        return prior.denoise(x, torch.tensor(s, dtype=torch.float64))

    heun = Heun(8, churn=2.0, churn_noise=1.01)
    _, _, before, after, *_ = iterate(heun, problem)
    s, s_next = heun.sigma(2), heun.sigma(3)
    s_hat = s * 1.25
    x_hat = before.x_t + math.sqrt(s_hat**2 - s**2) * 1.01 * problem.noise(2, before.x_t)
    d = (x_hat - D(x_hat, s_hat)) / s_hat
    euler = x_hat + (s_next - s_hat) * d
    wanted = x_hat + (s_next - s_hat) * (d / 2 + (euler - D(euler, s_next)) / (2 * s_next))
    torch.testing.assert_close(after.x_t, wanted, rtol=1e-12, atol=1e-12)

    ddpm = DDPM(8)
    _, _, before, after, *_ = iterate(ddpm, problem)
    s, s_next = ddpm.sigma(2), ddpm.sigma(3)
    x, x0 = before.x_t, D(before.x_t, s)
    noise = s_next * math.sqrt(1 - s_next**2 / s**2) * problem.noise(2, x)
    torch.testing.assert_close(after.x_t, x0 + (s_next**2 / s**2) * (x - x0) + noise, rtol=1e-12, atol=1e-12)

    two = DPMpp2M(8)
    _, first, before, after, *_ = iterate(two, problem)
    s0, s, s_next = (two.sigma(k) for k in (1, 2, 3))
    h0, h = math.log(s0 / s), math.log(s / s_next)
    x0 = D(before.x_t, s)
    bar = (1 + h / (2 * h0)) * x0 - h / (2 * h0) * D(first.x_t, s0)
    torch.testing.assert_close(after.x_t, s_next / s * before.x_t - math.expm1(-h) * bar, rtol=1e-12, atol=1e-12)


def test_adams_weights() -> None:
    assert adams_weights([1.0], 0.5) == [1.0]
    assert adams_weights([3.0, 4.0, 5.0], 2.0) == pytest.approx([23 / 12, -16 / 12, 5 / 12])
    assert adams_weights([0.0, -1.0, -2.0, -3.0], 1.0) == pytest.approx([55 / 24, -59 / 24, 37 / 24, -9 / 24])
    levels, end = [7.0, 9.0, 14.0], 4.0  # exact for every quadratic, on any spacing
    for power in range(3):
        mean = (end ** (power + 1) - levels[0] ** (power + 1)) / (power + 1) / (end - levels[0])
        assert sum(w * s**power for w, s in zip(adams_weights(levels, end), levels, strict=True)) == pytest.approx(mean)


@pytest.mark.parametrize("b", [0.2, 0.8, 1.0])
def test_ghvb_has_the_published_coefficients_on_equal_steps(b: float) -> None:
    """Of the paper's velocity, v / beta: AB_k and (1 - beta) / beta times AB_{k-1} of the differences."""
    published = {
        2: [(2 + b) / 2, -(2 - b) / 2],
        3: [(18 + 5 * b) / 12, -(24 - 8 * b) / 12, (6 - b) / 12],
        4: [(46 + 9 * b) / 24, -(78 - 19 * b) / 24, (42 - 5 * b) / 24, -(10 - b) / 24],
    }
    for order, wanted in published.items():
        levels = [float(k) for k in range(order)]
        low, high = adams_weights(levels[:-1], -1.0), adams_weights(levels, -1.0)
        differences = [a - c for a, c in zip([*low, 0.0], [0.0, *low], strict=True)]
        assert [b * h + (1 - b) * d for h, d in zip(high, differences, strict=True)] == pytest.approx(wanted)


@pytest.mark.parametrize("kind", ORDERS)
def test_evaluations_are_counted_and_the_last_step_is_the_denoiser(kind: str) -> None:
    calls: list[float] = []

    class Counted(TwoBumps):
        def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
            calls.append(float(sigma))
            return super().denoise(x, sigma)

    solver = replace(ORDERS[kind][0], steps=7)
    prior = Counted()
    _, end, x = ends(solver, problem_of(prior))
    assert len(calls) == solver.evaluations
    assert calls[-1] == pytest.approx(solver.sigma_min) and solver.sigma(7) == 0
    assert torch.equal(x, prior.denoise(end, torch.tensor(solver.sigma(6), dtype=torch.float64)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DPMpp2M(steps=0), "DPMpp2M.steps is 0"),
        (lambda: DEIS(grid="cosine"), "no noise grid 'cosine'; one of karras, geometric"),
        (lambda: DDPM(sigma_min=9.0, sigma_max=1.0), "noise levels from 1.0 to 9.0"),
        (lambda: DDIM(eta=1.1), r"DDIM.eta is 1.1; a value in \[0, 1\]"),
        (lambda: DPMpp2M(order=3), r"DPMpp2M.order is 3; a value in \[1, 2\]"),
        (lambda: DEIS(order=0), r"DEIS.order is 0; a value in \[1, 4\]"),
        (lambda: GHVB(order=5), r"GHVB.order is 5; a value in \[1, 4\]"),
        (lambda: GHVB(beta=0.0), r"GHVB.beta is 0.0; a value in \(0, 1\]"),
        (lambda: GHVB(beta=1.2), r"GHVB.beta is 1.2; a value in \(0, 1\]"),
        (lambda: Heun(churn=-1.0), "Heun.churn is -1.0"),
        (lambda: Heun(churn_min=2.0, churn_max=1.0), "Heun.churn_max is 1.0; at least 2.0"),
        (lambda: noise_levels("linear", 5, 1.0, 0.1), "no noise grid 'linear'"),
    ],
)
def test_bad_fields_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
