"""The generic suite over every registered sampler, and each method against its closed form."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from invdiff.config import find, registered
from invdiff.linalg import difference
from invdiff.noise import KeyedNoise
from invdiff.priors import Chunked, GaussianPrior
from invdiff.problem import ScaledLinear, unconditional
from invdiff.protocols import Problem
from invdiff.run import DivergedError, guarded, iterate
from invdiff.samplers import (
    CGLS,
    DAPS,
    DDIM,
    DDNM,
    DDPM,
    DDS,
    DEIS,
    DPS,
    FBP,
    GHVB,
    SENSE,
    TV,
    CoPaint,
    DiffPIR,
    DiffusionMBIR,
    DPMpp2M,
    Heun,
    L1Wavelet,
    PiGDM,
    REDDiff,
    RePaint,
    SplitGibbs,
    ZeroFilled,
)

# A short run of every registered sampler, slices coupled where the method can
SHORT: dict[str, Any] = {
    "ddim": DDIM(steps=6, eta=0.3),
    "ddpm": DDPM(steps=6),
    "heun": Heun(steps=6, churn=3.0),
    "dpmpp2m": DPMpp2M(steps=6),
    "deis3m": DEIS(steps=6),
    "ghvb": GHVB(steps=6, order=3),
    "dds": DDS(steps=6, sigma_max=5.0),
    "reddiff": REDDiff(steps=6, z_lam=0.5, draws=2, newton_steps=0),
    "diffusionmbir": DiffusionMBIR(steps=6),
    "dps": DPS(steps=6),
    "pigdm": PiGDM(steps=6),
    "diffpir": DiffPIR(steps=6),
    "ddnm": DDNM(steps=6),
    "daps": DAPS(steps=4, ode_steps=3),
    "repaint": RePaint(levels=4, jump=2, repeats=2),
    "copaint": CoPaint(steps=4),
    "split-gibbs": SplitGibbs(steps=5, keep=2, prior_steps=2, rho_min=0.03),
    "fbp": FBP(),
    "cgls": CGLS(steps=4),
    "tv": TV(steps=4),
    "zero-filled": ZeroFilled(),
    "sense": SENSE(steps=4),
    "l1wavelet": L1Wavelet(steps=5, levels=2),
}
# Other ways through the same samplers that the suite runs too
WAYS: dict[str, Any] = {
    **SHORT,
    "reddiff, newton": REDDiff(steps=6, z_lam=0.5),
    "dds, noiseless": DDS(steps=6, anchor=0.0),
    "dds, haar": DDS(steps=6, coupling="haar"),
    "diffusionmbir, haar": DiffusionMBIR(steps=6, coupling="haar"),
    "dds, dpmpp2m": DDS(steps=6, move="dpmpp2m", eta=0.2),
    "pigdm, deis3m": PiGDM(steps=6, move="deis3m"),
    "diffpir, solve": DiffPIR(steps=6, cg_steps=0, move="deis3m", zeta=0.0),
    "ddnm, dpmpp2m": DDNM(steps=6, move="dpmpp2m", eta=0.0),
    "dps, ddim": DPS(steps=6, ancestral=False),
    "daps, langevin": DAPS(steps=4, langevin_steps=5, move="dpmpp2m"),
    "ghvb, 1": GHVB(steps=6, order=1, grid="geometric"),
}
SOLVERS = ("ddim", "ddpm", "heun", "dpmpp2m", "deis3m", "ghvb")
GUIDED = ("dps", "pigdm", "diffpir", "ddnm", "daps", "repaint", "copaint", "split-gibbs")
UNCOUPLED: dict[str, Any] = {
    **{kind: SHORT[kind] for kind in (*SOLVERS, *GUIDED)},
    "daps, langevin": WAYS["daps, langevin"],
    "dds": replace(SHORT["dds"], lam=0.0),
    "reddiff": replace(SHORT["reddiff"], z_lam=0.0, order="mini-batch"),
    "reddiff, newton": REDDiff(steps=6),
    "fbp": FBP(),
    "cgls": SHORT["cgls"],
    "tv": replace(SHORT["tv"], lam_z=0.0),
    "zero-filled": ZeroFilled(),
    "sense": SHORT["sense"],
    "l1wavelet": SHORT["l1wavelet"],
}


def last(sampler: Any, problem: Problem, state: Any = None) -> Any:
    *_, end = iterate(sampler, problem, state)
    return end


def test_every_registered_sampler_is_tested() -> None:
    assert set(registered("samplers")) == {
        *SHORT,
        "forward-model",
        "one-step",
    }  # which have no prior: test_measured_*.py


@pytest.mark.parametrize("kind", SHORT)
def test_every_sampler_says_what_its_result_is(kind: str) -> None:
    words = ("posterior sampler", "approximate sampler", "point estimate", "prior sampler")
    assert find("samplers", kind).estimate in words
    assert (find("samplers", kind).estimate == "prior sampler") == (kind in SOLVERS)


@pytest.mark.parametrize("kind", WAYS)
def test_resume_after_any_step_is_bit_equal(kind: str, world: Any) -> None:
    sampler = WAYS[kind]
    states = list(iterate(sampler, world.problem))
    for state in states[:-1]:
        end = last(sampler, world.problem, state)
        for ours, theirs in zip(end, states[-1], strict=True):
            assert torch.equal(torch.as_tensor(ours), torch.as_tensor(theirs))


@pytest.mark.parametrize("kind", SHORT)
def test_states_hold_only_tensors_and_ints_and_start_afresh(kind: str, world: Any) -> None:
    sampler = SHORT[kind]
    first, second = last(sampler, world.problem), last(sampler, world.problem)
    assert all(isinstance(v, Tensor | int) for v in first)
    assert torch.equal(first.x, second.x)  # nothing is remembered from the first volume
    assert first.i == sampler.steps
    assert sampler.sigma(0) >= sampler.sigma(sampler.steps) >= 0


@pytest.mark.parametrize("kind", WAYS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_chunks_are_bit_equal(kind: str, size: int, world: Any) -> None:
    whole = last(WAYS[kind], world.problem)
    chunked = last(WAYS[kind], world.problem._replace(prior=Chunked(world.prior, size)))
    assert torch.equal(whole.x, chunked.x)


@pytest.mark.parametrize("kind", UNCOUPLED)
def test_uncoupled_slices_do_not_know_of_each_other(kind: str, world: Any) -> None:
    whole = last(UNCOUPLED[kind], world.problem).x
    part = last(UNCOUPLED[kind], world.only([2, 3], first=2)).x
    torch.testing.assert_close(part, whole[2:4], rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["dds", "reddiff", "tv", "diffusionmbir"])
def test_coupled_slices_do(kind: str, world: Any) -> None:
    whole = last(SHORT[kind], world.problem).x
    part = last(SHORT[kind], world.only([2, 3], first=2)).x
    assert (part - whole[2:4]).abs().max() > 1e-6


@pytest.mark.parametrize("kind", [*SOLVERS, *GUIDED, "dds", "reddiff", "diffusionmbir"])
def test_seed_zero_is_a_seed(kind: str, world: Any) -> None:
    zero, again, one = (last(SHORT[kind], world.problem._replace(noise=KeyedNoise(s))).x for s in (0, 0, 1))
    assert torch.equal(zero, again)
    assert (zero - one).abs().max() > 1e-4


def test_noise_is_keyed_by_slice_step_and_draw() -> None:
    like = torch.zeros(4, 1, 3, 5)
    noise = KeyedNoise(0)(7, like)
    assert torch.equal(noise[2:], KeyedNoise(0, first=2)(7, like[2:]))
    for other in (KeyedNoise(1)(7, like), KeyedNoise(0)(8, like), KeyedNoise(0)(7, like, draw=1)):
        assert (noise - other).abs().max() > 0.1


def test_ddim_samples_the_prior() -> None:
    prior = GaussianPrior.smooth((1, 5, 6), length=1.0, deviation=0.5, mean=-0.2)
    slices = 3000
    problem = unconditional((slices, 1, 5, 6), prior, KeyedNoise(3)).problem
    x = last(DDIM(steps=60, sigma_max=20.0, sigma_min=0.005), problem).x.flatten(1)
    covariance = torch.cov(x.T)
    # Monte Carlo error of an entry of the covariance: about variance * sqrt(2 / slices) = 0.0065
    assert (covariance - prior.covariance).abs().max() < 0.035
    assert (x.mean(0) + 0.2).abs().max() < 0.05


def reddiff_fixed_point(world: Any, sampler: REDDiff) -> Tensor:
    """Minimiser of ||Ax-y||^2/2 sigma_y^2 + (x-m)^T K (x-m)/2, K = lam mean_t sigma_t^2 (C + sigma_t^2)^-1."""
    A, prior = world.operator.matrix.double(), world.prior
    u = (torch.arange(4000).double() + 0.5) / 4000
    s2 = (math.log(sampler.sigma_max) + (math.log(sampler.sigma_min) - math.log(sampler.sigma_max)) * u).exp().square()
    gains = sampler.lam * (s2 / (prior.variances.double()[:, None] + s2)).mean(1)
    V = prior.vectors.double()
    K = (V * gains) @ V.T
    m = prior.mean.flatten().double()
    left = A.T @ A / world.problem.sigma_y**2 + K
    right = world.problem.y.double() @ A / world.problem.sigma_y**2 + K @ m
    return torch.linalg.solve(left, right.T).T


@pytest.mark.parametrize(
    "way",
    [
        {"newton_steps": 0, "steps": 3000, "rate": 0.05, "final_rate": 1e-3, "draws": 24},
        {"newton_steps": 30, "steps": 600, "rate": 0.5, "final_rate": 2e-3, "draws": 24},
    ],
)
def test_reddiff_reaches_its_fixed_point(way: dict[str, Any], make_world: Any) -> None:
    world = make_world(slices=1)
    sampler = REDDiff(lam=60.0, order="mini-batch", sigma_max=5.0, sigma_min=0.02, **way)
    wanted = reddiff_fixed_point(world, sampler)
    got = last(sampler, world.problem).x.flatten(1).double()
    scale = (wanted - world.prior.mean.flatten()).norm()
    assert (got - wanted).norm() / scale < 0.01
    # The prior matters here: without it the minimiser is elsewhere
    assert (wanted - reddiff_fixed_point(world, replace(sampler, lam=6.0))).norm() / scale > 0.05


@pytest.mark.parametrize("order", ["descending", "ascending", "random", "mini-batch"])
def test_reddiff_orders(order: str, world: Any) -> None:
    """Levels of the name's order; in a mini-batch one a draw, all different and over the whole range."""
    levels: list[float] = []

    class Counted(GaussianPrior):
        def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
            levels.append(float(sigma))
            return super().denoise(x, sigma)

    prior = Counted(world.prior.mean, world.prior.variances, world.prior.vectors)
    sampler = REDDiff(steps=5, draws=4, order=order, newton_steps=0)
    last(sampler, world.problem._replace(prior=prior))
    steps = [levels[4 * i : 4 * i + 4] for i in range(5)]
    firsts = [step[0] for step in steps]
    if order == "mini-batch":
        share = [math.log(s / sampler.sigma_max) / math.log(sampler.sigma_min / sampler.sigma_max) for s in steps[2]]
        assert [int(4 * u) for u in share] == [0, 1, 2, 3]
    else:
        assert all(len(set(step)) == 1 for step in steps)
        grid = pytest.approx([sampler.sigma(i) for i in range(5)])
        assert (firsts == grid) == (order == "descending") and (firsts[::-1] == grid) == (order == "ascending")
    assert len(set(firsts)) == 5


def test_reddiff_identity(world: Any) -> None:
    """With linear weights sigma_t (eps_theta - eps) = x - D: the regulariser's gradient is lam (x - D)."""
    x, noise, s = world.truth, world.problem.noise(0, world.truth), 0.7
    x_t = x + s * noise
    D = world.prior.denoise(x_t, torch.tensor(s))
    torch.testing.assert_close(s * ((x_t - D) / s - noise), x - D, atol=1e-5, rtol=0)


def squared_problem(world: Any) -> Problem:
    """y = (A x)^2 without noise, a nonlinear operator known by its vjp."""

    class Squared:
        domain, range = world.operator.domain, world.operator.range

        def forward(self, x: Tensor) -> Tensor:
            return world.operator.forward(x).square()

        def vjp(self, x: Tensor, r: Tensor) -> Tensor:
            return world.operator.adjoint(2 * world.operator.forward(x) * r)

    y = world.operator.forward(world.truth).square()
    return world.problem._replace(operator=Squared(), y=y, sigma_y=0.01)


NONLINEAR = {
    "reddiff": REDDiff(steps=300, rate=0.05, sigma_floor=0.01, newton_steps=0, lam=1.0),
    "dps": DPS(steps=100, ancestral=False),
    "daps": DAPS(steps=40, langevin_steps=50, sigma_max=3.0),
}


@pytest.mark.parametrize("kind", NONLINEAR)
def test_a_nonlinear_operator(kind: str, world: Any) -> None:
    problem = squared_problem(world)
    x = last(NONLINEAR[kind], problem).x
    blind = last(DDIM(steps=20), problem).x
    misfit = [(problem.operator.forward(v) - problem.y).norm() for v in (blind, x)]
    assert misfit[1] < 0.2 * misfit[0]


def test_linear_methods_refuse_a_nonlinear_operator(world: Any) -> None:
    problem = squared_problem(world)
    for sampler in (DDS(), TV(), REDDiff(), PiGDM(), DiffPIR(), DDNM(), DAPS(), SplitGibbs()):
        with pytest.raises(ValueError, match="Squared has no adjoint"):
            last(sampler, problem)


def test_cgls_finds_the_least_squares_solution(world: Any) -> None:
    x = last(CGLS(steps=42), world.problem).x.flatten(1)
    wanted = torch.linalg.lstsq(world.operator.matrix, world.problem.y.T, driver="gelsd").solution.T
    torch.testing.assert_close(x, wanted, atol=2e-3, rtol=1e-3)


def tv_value(sampler: TV, problem: Problem, x: Tensor) -> float:
    plane = (difference(x, 2).square() + difference(x, 3).square()).sqrt().sum()
    data = (problem.operator.forward(x) - problem.y).square().sum() / 2
    return float(data + sampler.lam * plane + sampler.lam_z * difference(x, 0).abs().sum())


def test_tv_reaches_its_minimum_whatever_the_penalty(world: Any) -> None:
    sampler = TV(steps=400, lam=0.01, lam_z=0.02, rho=0.1)
    x = last(sampler, world.problem).x
    value = tv_value(sampler, world.problem, x)
    other = tv_value(sampler, world.problem, last(replace(sampler, rho=0.02, steps=1500), world.problem).x)
    assert abs(value - other) < 1e-3 * value
    g = torch.Generator().manual_seed(2)
    for size in (1e-2, 1e-3):
        for _ in range(20):
            moved = x + size * torch.randn(x.shape, generator=g)
            assert tv_value(sampler, world.problem, moved) > value - 1e-5 * value


def test_dds_noiseless_matches_the_data(world: Any) -> None:
    y = world.operator.forward(world.truth)
    problem = world.problem._replace(y=y, sigma_y=0.0)
    x = last(DDS(steps=15, cg_steps=30, lam=0.0, eta=0.0, sigma_max=5.0), problem).x
    assert (world.operator.forward(x) - y).norm() < 1e-3 * y.norm()
    blind = last(DDIM(steps=15, sigma_max=5.0), problem).x
    assert (x - world.truth).norm() < 0.7 * (blind - world.truth).norm()


def test_dds_anchor_gives_the_regularised_solution_at_every_noise(world: Any) -> None:
    """With enough CG steps the consistency is (A^T A + mu)^-1 (A^T y + mu D), mu = anchor sigma_y^2."""
    sampler = DDS(steps=4, cg_steps=60, lam=0.0, anchor=20.0, sigma_max=3.0)
    start = sampler.init(world.problem)
    s = sampler.sigma(0)
    D = world.prior.denoise(start.x_t, torch.tensor(s))
    mu = 20.0 * world.problem.sigma_y**2
    wanted = world.operator.solve(world.operator.adjoint(world.problem.y) + mu * D, mu)
    torch.testing.assert_close(sampler.step(world.problem, start).x, wanted, atol=1e-3, rtol=1e-3)


class FrozenToy:
    """The frozen-noise toy: 16 slices of 32 x 32, a projector-like operator of norm 1, an iid Gaussian prior."""

    @staticmethod
    def problem() -> Problem:
        from invdiff.operators import ParallelBeam

        shape = (16, 1, 32, 32)
        A = ParallelBeam(shape, [k * math.pi / 8 for k in range(8)])
        g = torch.Generator().manual_seed(0)
        scaled = ScaledLinear(A, A.norm())
        y = scaled.forward(torch.rand(shape, generator=g))
        prior = GaussianPrior(torch.zeros(1, 32, 32), torch.full((1024,), 0.25))
        return Problem(scaled, y, 0.0, prior, KeyedNoise(0))


def test_mbir_default_rho_does_not_freeze_noise_and_a_large_one_does() -> None:
    problem = FrozenToy.problem()
    good = last(DiffusionMBIR(steps=200), problem).x
    frozen = last(DiffusionMBIR(steps=200, rho=0.3), problem).x
    assert good.std() < 2
    assert frozen.std() > 10 * good.std()


def test_a_diverging_run_stops_with_step_and_sigma(world: Any) -> None:
    sampler = REDDiff(steps=50, rate=1e4, newton_steps=0)
    with pytest.raises(DivergedError, match=r"step \d+ of 50, sigma"):
        list(guarded(iterate(sampler, world.problem), sampler, world.problem))

    class Broken:
        channels = 1

        def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
            return x * float("nan")

    dds = SHORT["dds"]
    broken = world.problem._replace(prior=Broken())
    with pytest.raises(DivergedError, match="NaN or infinite at step"):
        list(guarded(iterate(dds, broken), dds, broken))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DDS(steps=0), "DDS.steps is 0"),
        (lambda: DDS(eta=1.5), "DDS.eta is 1.5"),
        (lambda: DDS(rho=0.0), "rho is 0 with lam above 0"),
        (lambda: DDS(sigma_min=9.0, sigma_max=1.0), "noise levels from 1.0 to 9.0"),
        (lambda: REDDiff(weight="cubic"), "'cubic'; one of linear"),
        (lambda: REDDiff(order="up"), "'up'; one of descending, ascending, random, mini-batch"),
        (lambda: DDS(coupling="db4"), "DDS.coupling is 'db4'; one of tv, haar"),
        (lambda: DDS(move="euler"), "DDS.move is 'euler'; one of ddim, dpmpp2m, deis3m"),
        (lambda: PiGDM(move="heun"), "PiGDM.move is 'heun'"),
        (lambda: PiGDM(prior_deviation=0.0), "PiGDM.prior_deviation is 0.0"),
        (lambda: DiffPIR(zeta=1.5), "DiffPIR.zeta is 1.5"),
        (lambda: DDNM(eta=-0.1), "DDNM.eta is -0.1"),
        (lambda: DPS(scale=-1.0), "DPS.scale is -1.0"),
        (lambda: DAPS(ode_steps=0), "DAPS.ode_steps is 0"),
        (lambda: SplitGibbs(steps=5, keep=5), "SplitGibbs.keep is 5 of 5 steps"),
        (lambda: DiffusionMBIR(lam=-1.0), "DiffusionMBIR.lam is -1.0"),
        (lambda: TV(cg_steps=0), "TV.cg_steps is 0"),
    ],
)
def test_bad_fields_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
