"""Each posterior sampler against its own closed form, and the moves and draws that they share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import invdiff
from invdiff.noise import KeyedNoise, karras
from invdiff.operators import CartesianMRI, RealChannels
from invdiff.priors import GaussianPrior
from invdiff.problem import unconditional
from invdiff.protocols import Prior, Problem, Space
from invdiff.run import iterate, last
from invdiff.samplers import DAPS, DDNM, DDS, DEIS, DPS, DiffPIR, DPMpp2M, PiGDM, SplitGibbs
from invdiff.samplers.consistency import gaussian_draw, measurement_noise, nearest
from invdiff.samplers.daps import squared_norm
from invdiff.samplers.dps import misfit_gradient
from invdiff.samplers.gibbs import compensated_draw
from invdiff.samplers.moves import flow
from invdiff.samplers.solver import reverse_diffusion, start

SLICES = 2000  # Monte-Carlo error: 2.2 % of a deviation in the mean, 1.6 % in the deviation
SHAPE = (1, 6, 7)


@dataclass(frozen=True)
class Batched:
    """A matrix on flattened images, all slices in one product."""

    matrix: Tensor
    shape: tuple[int, ...]

    @property
    def domain(self) -> Space:
        return Space(self.shape, torch.float32)

    @property
    def range(self) -> Space:
        return Space((self.shape[0], self.matrix.shape[0]), torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.matrix.T

    def adjoint(self, y: Tensor) -> Tensor:
        return (y @ self.matrix).view(-1, *self.shape[1:])

    def vjp(self, x: Tensor, r: Tensor) -> Tensor:
        return self.adjoint(r)

    def normal(self, x: Tensor) -> Tensor:
        return self.adjoint(self.forward(x))

    def solve(self, rhs: Tensor, rho: float, x0: Tensor | None = None) -> Tensor:
        m = (self.matrix.T @ self.matrix).double() + rho * torch.eye(self.matrix.shape[1])
        return torch.linalg.solve(m, rhs.flatten(1).T.double()).T.to(rhs).view_as(rhs)


@dataclass(frozen=True)
class Quick:
    """Keyed by step and draw, all slices from one generator: much faster for many of them."""

    seed: int = 0

    def __call__(self, step: int, like: Tensor, draw: int = 0) -> Tensor:
        g = torch.Generator().manual_seed(1_000_003 * (step + 2) + 1009 * draw + self.seed)
        return torch.randn(like.shape, dtype=like.dtype, generator=g)


@dataclass(frozen=True)
class Probe:
    """Slice k gets the k-th unit vector at one draw, everything else zero: a method's response to that draw."""

    draw: int

    def __call__(self, step: int, like: Tensor, draw: int = 0) -> Tensor:
        flat = torch.eye(like.shape[0], like[0].numel(), dtype=like.dtype)
        return (flat if draw == self.draw else torch.zeros_like(flat)).view_as(like)


class Case(NamedTuple):
    """Many samples' problem of one y, and its posterior N(mean, covariance) in closed form."""

    problem: Problem
    mean: Tensor
    covariance: Tensor

    def score(self, x: Tensor) -> tuple[float, Tensor, float]:
        """Mean error in posterior deviations (rms), deviations over the posterior's, coverage of 90 % intervals."""
        x = x.flatten(1).double()
        deviation = self.covariance.diagonal().sqrt()
        off = (x.mean(0) - self.mean) / deviation
        ratio = x.std(0) / deviation
        ends = [torch.special.ndtr(off + side * 1.6449 * ratio) for side in (-1, 1)]
        return float(off.square().mean().sqrt()), ratio, float((ends[1] - ends[0]).mean())


def posterior(A: Tensor, y: Tensor, mean: Tensor, covariance: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Of N(mean, covariance) under y = A x + N(0, noise)."""
    gain = covariance @ A.T @ torch.linalg.inv(A @ covariance @ A.T + noise)
    return mean + gain @ (y - A @ mean), covariance - gain @ A @ covariance


def gaussian_case(world: Any, iid: float | None = None, widened: float = 0.0, slices: int = SLICES) -> Case:
    """The first slice of the Gaussian world, ``slices`` times; with ``iid``, white pixels of that deviation."""
    p, A = world.problem, world.operator.matrix
    prior = world.prior
    covariance = prior.covariance.double() if iid is None else iid**2 * torch.eye(42).double()
    if iid is None:  # in the prior's own axes its covariance is diagonal
        V = prior.vectors
        A, covariance = A @ V, torch.diag(prior.variances.double())
        mean = (V.T @ prior.mean.flatten()).view(SHAPE)
    else:
        mean = prior.mean
    same = GaussianPrior(mean, covariance.diagonal().float())
    operator = Batched(A, (slices, *SHAPE))
    problem = Problem(operator, p.y[:1].expand(slices, -1).contiguous(), p.sigma_y, same, Quick())
    noise = p.sigma_y**2 * torch.eye(20).double() + widened**2 * (A @ A.T).double()
    return Case(problem, *posterior(A.double(), p.y[0].double(), mean.flatten().double(), covariance, noise))


def in_pixels(case: Case, world: Any) -> Callable[[Tensor], tuple[float, Tensor, float]]:
    """``case.score`` of pixels instead of the prior's own axes."""
    V = world.prior.vectors.double()
    turned = case._replace(mean=V @ case.mean, covariance=V @ case.covariance @ V.T)
    return lambda x: turned.score(x.flatten(1).double() @ V.T)


def of(sampler: Any, problem: Problem) -> Tensor:
    return last(iterate(sampler, problem)).x


# Draws that methods share


def test_gaussian_draw_has_its_mean_and_covariance(make_world: Any) -> None:
    """Exactly, from its responses: covariance (A^T A / sigma_y^2 + I / r^2)^-1, for CG and for the operator's solve."""
    case = gaussian_case(make_world(slices=1), slices=42)
    A = case.problem.operator.matrix.double()
    x, r, sigma_y = case.problem.noise(0, torch.empty(42, *SHAPE)), 0.3, 0.05
    wanted = torch.linalg.inv(A.T @ A / sigma_y**2 + torch.eye(42) / r**2)
    for cg_steps in (0, 60):

        def draw(number: int, centre: Tensor = x, cg_steps: int = cg_steps) -> Tensor:
            problem = case.problem._replace(noise=Probe(number))
            return gaussian_draw(problem, centre, r, sigma_y, 0, 0, cg_steps).flatten(1).double()

        mean = draw(-1)
        data = case.problem.y.double() @ A / sigma_y**2 + x.flatten(1).double() / r**2
        torch.testing.assert_close(mean, data @ wanted, atol=1e-4, rtol=1e-4)
        responses = [draw(number) - mean for number in (0, 1)]
        covariance = sum(response.T @ response for response in responses)
        torch.testing.assert_close(covariance, wanted, atol=1e-4, rtol=0)


def test_compensated_draw_takes_the_widening_out(make_world: Any) -> None:
    """z = x + s A^T (y - A x) + rho (I - s A^T A)^1/2 n, s = rho^2 / sigma_y^2."""
    case = gaussian_case(make_world(slices=1), slices=42)
    A, sigma_y, rho = case.problem.operator.matrix.double(), 0.05, 0.05 / 2**0.5
    x = case.problem.noise(0, torch.empty(42, *SHAPE))

    def draw(number: int) -> Tensor:
        problem = case.problem._replace(noise=Probe(number))
        return compensated_draw(problem, x, rho, sigma_y, 0).flatten(1).double()

    flat = x.flatten(1).double()
    torch.testing.assert_close(draw(-1), flat + 0.5 * (case.problem.y - flat @ A.T) @ A, atol=1e-5, rtol=1e-5)
    response = draw(0) - draw(-1)
    torch.testing.assert_close(response.T @ response, rho**2 * (torch.eye(42) - 0.5 * A.T @ A), atol=1e-6, rtol=0)


def test_complex_measurements_have_unit_noise_in_each_component() -> None:
    y = torch.zeros(3, 4000, dtype=torch.complex64)
    operator = unconditional((3, 1, 2, 2), GaussianPrior(torch.zeros(1, 2, 2), torch.ones(4))).problem
    n = measurement_noise(operator._replace(y=y, noise=KeyedNoise(0)), 0, 0)
    assert n.real.std() == pytest.approx(1, abs=0.03) and n.imag.std() == pytest.approx(1, abs=0.03)


# Moves


class Bumps:
    """Every pixel an even mixture of N(-0.6, 0.2^2) and N(0.6, 0.2^2)."""

    channels = 1

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        total = 0.04 + sigma.square()
        return (0.04 * x + sigma.square() * 0.6 * torch.tanh(0.6 * x / total)) / total


@pytest.mark.parametrize(("move", "solver"), [("dpmpp2m", DPMpp2M(9, grid="karras")), ("deis3m", DEIS(9))])
def test_moves_of_the_plain_denoised_image_are_the_solvers(move: str, solver: Any) -> None:
    problem = unconditional((2, 1, 3, 4), Bumps(), KeyedNoise(0)).problem
    _, x_t = start(problem, solver.sigma_max)
    levels = karras(9, solver.sigma_max, solver.sigma_min)
    torch.testing.assert_close(flow(problem, x_t, levels, move), of(solver, problem), atol=1e-5, rtol=1e-5)


FAST = {
    "pigdm": PiGDM(eta=0.0, cg_steps=0),
    "diffpir": DiffPIR(lam=1.0, zeta=0.0, cg_steps=0),
    "ddnm": DDNM(eta=0.0, cg_steps=0),
    "dds": DDS(eta=0.0, lam=0.0, cg_steps=40, sigma_min=0.01),
}


@pytest.mark.parametrize("kind", FAST)
def test_higher_orders_serve_in_fewer_evaluations(kind: str, make_world: Any) -> None:
    """15 evaluations of either are nearer to their many-step limit than 30 of ddim to its own."""
    problem = gaussian_case(make_world(slices=1), slices=20).problem._replace(noise=Quick(3))

    def error(move: str, steps: int) -> float:
        sampler = replace(FAST[kind], move=move)
        limit = of(replace(sampler, steps=300), problem)
        return float((of(replace(sampler, steps=steps), problem) - limit).square().mean().sqrt() / limit.std())

    slow = error("ddim", 30)
    assert error("dpmpp2m", 15) < slow
    assert error("deis3m", 15) < slow


# PiGDM


@pytest.mark.parametrize("s", [3.0, 0.3, 0.03])
def test_pigdm_is_exact_for_white_pixels(s: float, make_world: Any) -> None:
    """D_y = E[x_0 | x_t, y]: x_t and y are two measurements of x_0."""
    world = make_world(slices=1)
    case = gaussian_case(world, iid=0.4, slices=4)
    problem, A = case.problem, case.problem.operator.matrix.double()
    x_t = s * problem.noise(0, torch.empty(4, *SHAPE))
    both, y = torch.cat([A, torch.eye(42)]), torch.cat([problem.y, x_t.flatten(1)], 1).double()
    noise = torch.diag(torch.cat([torch.full((20,), problem.sigma_y**2), torch.full((42,), s**2)])).double()
    mean, white = torch.full((42,), 0.3).double(), 0.16 * torch.eye(42).double()
    wanted = torch.stack([posterior(both, v, mean, white, noise)[0] for v in y])
    for cg_steps in (0, 60):
        got = PiGDM(prior_deviation=0.4, cg_steps=cg_steps).guided(problem, x_t, s).flatten(1).double()
        torch.testing.assert_close(got, wanted, atol=2e-4, rtol=1e-4)
    other = PiGDM(prior_deviation=1.0).guided(problem, x_t, s).flatten(1).double()
    assert s < 0.1 or (other - wanted).abs().max() > 0.01


@pytest.mark.parametrize("sampler", [PiGDM(eta=0.0, prior_deviation=0.4, steps=50), DAPS(steps=8, prior_deviation=0.4)])
def test_white_pixels_are_sampled_exactly(sampler: Any, make_world: Any) -> None:
    """PiGDM with its steps' small error, DAPS at any number of steps."""
    case = gaussian_case(make_world(slices=1), iid=0.4)
    off, ratio, coverage = case.score(of(sampler, case.problem))
    assert off < 0.06
    assert (ratio - 1).abs().max() < 0.08
    assert coverage == pytest.approx(0.9, abs=0.015)


# DPS


@pytest.mark.parametrize("squared", [False, True])
def test_dps_gradient_is_that_of_finite_differences(squared: bool, make_world: Any) -> None:
    matrix = make_world(slices=1).operator.matrix.double()

    @dataclass(frozen=True)
    class Curved:
        domain, range = Space((3, *SHAPE), torch.float64), Space((3, 20), torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            v = x.flatten(1) @ matrix.T
            return v + 0.5 * v.square() if squared else v

        def vjp(self, x: Tensor, r: Tensor) -> Tensor:
            slope = 1 + x.flatten(1) @ matrix.T if squared else 1.0
            return ((slope * r) @ matrix).view_as(x)

    g = torch.Generator().manual_seed(3)
    y, x_t, direction = (torch.randn(3, *shape, generator=g).double() for shape in ((20,), SHAPE, SHAPE))
    problem = Problem(Curved(), y, 0.05, Bumps(), KeyedNoise(0))
    s, h = 0.7, 1e-5

    def misfit(x: Tensor) -> Tensor:
        return (Curved().forward(Bumps().denoise(x, torch.tensor(s).double())) - y).norm(dim=1)

    with torch.no_grad():
        _, size, gradient = misfit_gradient(problem, x_t, s)
    torch.testing.assert_close(size.flatten(), misfit(x_t))
    wanted = (misfit(x_t + h * direction) - misfit(x_t - h * direction)) / (2 * h)
    torch.testing.assert_close((gradient * direction).flatten(1).sum(1), wanted, rtol=1e-6, atol=1e-8)


def test_dps_guidance_is_the_published_step_in_ve_form(make_world: Any) -> None:
    """One step of 1000 on an image of the paper's size, in VP form: x <- x' - scale d||r|| / dx, x = alpha x_ve."""
    problem = make_world(slices=2).problem
    sampler = DPS(steps=7, scale=0.01)
    state = sampler.init(problem)
    free = replace(sampler, scale=0.0).step(problem, state)
    s, s_next = sampler.sigma(0), sampler.sigma(1)
    _, misfit, gradient = misfit_gradient(problem, state.x_t, s)
    alpha, alpha_next = (1 + s**2) ** -0.5, (1 + s_next**2) ** -0.5
    published = alpha_next * free.x_t - 0.01 * gradient / alpha  # the gradient in x_vp is that in x_ve over alpha
    ours = alpha_next * sampler.step(problem, state).x_t
    size = 1000 / 7 * (42 / (3 * 256 * 256)) ** 0.5
    guidance = size * (published - alpha_next * free.x_t)
    torch.testing.assert_close(ours - alpha_next * free.x_t, guidance, atol=1e-5, rtol=1e-4)
    most = (misfit - 20**0.5 * problem.sigma_y) / gradient.square().sum((1, 2, 3), keepdim=True)
    for scale in (1e6, None):  # no further than where the misfit is the noise's
        far = replace(sampler, scale=scale).step(problem, state).x_t
        torch.testing.assert_close(free.x_t - far, most * gradient, atol=1e-4, rtol=1e-4)


# DiffPIR, DDNM


def test_diffpir_takes_the_proximal_step(world: Any) -> None:
    sampler = DiffPIR(steps=5, lam=3.0, sigma_max=2.0, cg_steps=60)
    A = world.operator.matrix.double()
    for problem, sigma_y in ((world.problem, 0.05), (world.problem._replace(sigma_y=0.0), 0.001)):
        state = sampler.init(problem)
        s = sampler.sigma(0)
        D = world.prior.denoise(state.x_t, torch.tensor(s))
        rho = 3.0 * sigma_y**2 / s**2
        rhs = problem.y.double() @ A + rho * D.flatten(1).double()
        wanted = torch.linalg.solve(A.T @ A + rho * torch.eye(42), rhs.T).T.float().view_as(D)
        torch.testing.assert_close(sampler.step(problem, state).x, wanted, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(
        nearest(world.operator, world.problem.y, D, 0.1, 0), nearest(world.operator, world.problem.y, D, 0.1, 60)
    )


def test_ddnm_noiseless_is_hard_consistency(world: Any) -> None:
    problem = world.problem._replace(sigma_y=0.0)
    sampler = DDNM(steps=8, sigma_max=3.0, cg_steps=60)
    state = sampler.init(problem)
    D = world.prior.denoise(state.x_t, torch.tensor(sampler.sigma(0)))
    x = sampler.step(problem, state).x
    pinv = torch.linalg.pinv(world.operator.matrix)
    wanted = D.flatten(1) + (problem.y - world.operator.forward(D)) @ pinv.T
    torch.testing.assert_close(x.flatten(1), wanted, atol=1e-3, rtol=1e-3)
    end = of(sampler, problem)
    assert (world.operator.forward(end) - problem.y).norm() < 1e-4 * problem.y.norm()
    nearly = of(sampler, problem._replace(sigma_y=1e-6))  # other noise, the same consistency
    assert (world.operator.forward(nearly) - problem.y).norm() < 1e-3 * problem.y.norm()


@pytest.mark.parametrize("eta", [1.0, 0.85, 0.5, 0.2])
@pytest.mark.parametrize("mu", [0.01, 0.3])
def test_ddnm_noise_and_that_of_the_data_are_white_together(eta: float, mu: float, make_world: Any) -> None:
    case = gaussian_case(make_world(slices=1), slices=42)
    N = (case.problem.operator.matrix.T @ case.problem.operator.matrix).double()
    sampler = DDNM(eta=eta, cg_steps=0)
    zero, unit = torch.zeros(42, *SHAPE), torch.eye(42).view(42, *SHAPE)

    def response(draw: int, e: Tensor) -> Tensor:
        return sampler.noise(case.problem._replace(noise=Probe(draw)), e, mu, 0).flatten(1).double()

    made = [response(-1, unit), response(0, zero), response(1, zero)]  # of the estimated noise, and of both draws
    shrunk = torch.linalg.inv(N + mu * torch.eye(42))
    brought = mu * N @ shrunk @ shrunk  # by y, over sigma'^2
    excess = sum(L.T @ L for L in made) + brought - torch.eye(42)
    wanted = max(0.0, 1 - 4 * eta**2) * brought
    torch.testing.assert_close(excess, wanted, atol=1e-5, rtol=0)


# DAPS


def test_daps_langevin_approaches_the_exact_draw(make_world: Any) -> None:
    case = gaussian_case(make_world(slices=1), slices=1000)
    A, r, sigma_y = case.problem.operator.matrix.double(), 0.1, 0.05
    guess = torch.full((1000, *SHAPE), 0.2)
    precision = A.T @ A / sigma_y**2 + torch.eye(42) / r**2
    covariance = torch.linalg.inv(precision)
    mean = covariance @ (A.T @ case.problem.y[0].double() / sigma_y**2 + torch.full((42,), 0.2) / r**2)
    sampler = DAPS(langevin_steps=200, langevin_rate=0.1)
    x = sampler._langevin(case.problem, guess, r, sigma_y, 0)
    off, ratio, _ = Case(case.problem, mean, covariance).score(x)
    assert off < 0.06
    assert (ratio - 1).abs().max() < 0.1


def test_the_curvature_of_a_nonlinear_operator_is_found(make_world: Any) -> None:
    matrix = make_world(slices=1).operator.matrix

    class Squared:
        def forward(self, x: Tensor) -> Tensor:
            return (x.flatten(1) @ matrix.T).square()

        def vjp(self, x: Tensor, r: Tensor) -> Tensor:
            return ((2 * (x.flatten(1) @ matrix.T) * r) @ matrix).view_as(x)

    g = torch.Generator().manual_seed(1)
    x, u = torch.randn(3, *SHAPE, generator=g), torch.randn(3, 20, generator=g)
    problem = Problem(Squared(), u, 0.1, Bumps(), KeyedNoise(0))
    value = torch.zeros(3)
    for _ in range(40):
        value, u = squared_norm(problem, x, u)
    wanted = [torch.linalg.matrix_norm(2 * (v @ matrix.T)[:, None] * matrix, 2) ** 2 for v in x.flatten(1)]
    torch.testing.assert_close(value.flatten(), torch.stack(wanted), rtol=0.02, atol=0)


@pytest.mark.parametrize("sigma_y", [0.05, 0.2])
def test_daps_samples_a_correlated_gaussian_within_its_bars(sigma_y: float, make_world: Any) -> None:
    world = make_world(slices=1, sigma_y=sigma_y)
    case = gaussian_case(world)
    off, ratio, coverage = in_pixels(case, world)(of(DAPS(cg_steps=0), case.problem))
    assert off < 0.2
    assert (ratio - 1).abs().max() < 0.12
    assert 0.88 < coverage < 0.93


# Split Gibbs


@pytest.mark.parametrize(("sigma_y", "most"), [(0.2, 0.06), (0.05, 0.15), (0.01, 0.3)])
def test_split_gibbs_samples_the_posterior(sigma_y: float, most: float, make_world: Any) -> None:
    world = make_world(slices=1, sigma_y=sigma_y)
    case = gaussian_case(world)
    off, ratio, coverage = in_pixels(case, world)(of(SplitGibbs(cg_steps=0), case.problem))
    assert off < most
    assert ratio.mean() == pytest.approx(1, abs=0.1)
    assert 0.88 < coverage < 0.93


def test_split_gibbs_is_exact_in_the_limit(make_world: Any) -> None:
    """Many sweeps and steps: mean and covariance are the posterior's within the Monte-Carlo error."""
    world = make_world(slices=1, sigma_y=0.1)
    case = gaussian_case(world)
    sampler = SplitGibbs(steps=250, keep=150, prior_steps=12, depth=0.05, cg_steps=0, rho_max=2.0)
    x = of(sampler, case.problem).flatten(1).double()
    off, ratio, coverage = in_pixels(case, world)(x)
    assert off < 0.05  # 0.022 is the Monte-Carlo error
    assert (ratio - 1).abs().max() < 0.07
    assert coverage == pytest.approx(0.9, abs=0.01)
    size = case.covariance.diagonal().max()
    assert (torch.cov(x.T) - case.covariance).abs().max() < 0.1 * size  # an entry's: sqrt(2 / 2000) = 0.03


def test_split_gibbs_leaves_the_likelihood_widened_above_the_noise(make_world: Any) -> None:
    """With rho_min 0.2 and sigma_y 0.05 the limit is the posterior under N(0, sigma_y^2 I + rho^2 A A^T)."""
    world = make_world(slices=1)
    sampler = SplitGibbs(steps=100, keep=60, prior_steps=12, depth=0.05, rho_max=1.0, rho_min=0.2, cg_steps=0)
    wide, narrow = (gaussian_case(world, widened=w) for w in (0.2, 0.0))
    x = of(sampler, wide.problem)
    off, ratio, _ = in_pixels(wide, world)(x)
    assert off < 0.06
    assert (ratio - 1).abs().max() < 0.1
    assert in_pixels(narrow, world)(x)[1].mean() > 1.3


def test_the_prior_step_keeps_the_variance_that_ancestral_steps_lose() -> None:
    """Of x given x + rho n = z, where the prior is wide: four steps."""
    prior: Prior = GaussianPrior(torch.zeros(1, 1, 4000), torch.ones(4000))
    z, rho, g = torch.zeros(1, 1, 1, 4000), 0.05, torch.Generator().manual_seed(0)
    levels = [rho, 0.029, 0.017, 0.01, 0.0]
    ours = ancestral = z
    for s, s_next in pairwise(levels):
        n, at = torch.randn(z.shape, generator=g), torch.tensor(s)
        ours = reverse_diffusion(ours, prior.denoise(ours, at), s, s_next, n)
        D, q = prior.denoise(ancestral, at), (s_next / s) ** 2
        ancestral = D + q * (ancestral - D) + s_next * (1 - q) ** 0.5 * n
    assert ours.var() / rho**2 == pytest.approx(0.96, abs=0.05)
    assert ancestral.var() / rho**2 < 0.6


# What the output says


def test_the_record_says_what_the_result_is(world: Any) -> None:
    y = world.operator.forward(world.truth)
    for sampler, wanted in (
        (SplitGibbs(steps=3, keep=1, prior_steps=2), "posterior sampler"),
        (DDNM(steps=2), "approximate sampler"),
    ):
        record = invdiff.reconstruct(y, world.operator, world.prior, sampler, sigma_y=0.05).record
        assert record["estimate"] == wanted
    assert invdiff.sample(world.prior, (2, 1, 6, 7), DEIS(2)).record["estimate"] == "prior sampler"


ORACLE = {
    "dds": DDS(steps=8, sigma_min=1e-4, lam=0.0),
    "dps": DPS(steps=8, sigma_min=1e-4),
    "pigdm": PiGDM(steps=8, sigma_min=1e-4),
    "diffpir": DiffPIR(steps=8, sigma_min=1e-4),
    "ddnm": DDNM(steps=8, sigma_min=1e-4),
    "daps": DAPS(steps=8, sigma_min=1e-4),
    "split-gibbs": SplitGibbs(steps=8, keep=2, rho_min=1e-4),
}


@pytest.mark.parametrize("kind", ORACLE)
def test_an_oracle_reaches_the_truth_of_complex_noiseless_data(kind: str) -> None:
    """Where the prior knows the answer, data of complex k-space must not move it: 60 dB of [-1, 1], values above 1."""
    shape = (2, 2, 9, 8)
    truth = 0.7 * torch.randn(shape, generator=torch.Generator().manual_seed(4))

    class Oracle:
        channels = 2

        def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
            return truth + 0 * x

    mask = (torch.arange(8) % 2 == 0).float().expand(9, 8)
    operator = CartesianMRI(mask, slices=2) @ RealChannels((2, 1, 9, 8))
    x = invdiff.reconstruct(operator(truth), operator, Oracle(), ORACLE[kind]).x
    assert truth.abs().max() > 1.5
    assert (x - truth).square().mean().sqrt() < 2e-3
