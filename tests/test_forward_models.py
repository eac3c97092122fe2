"""Diffusion with forward models: a linear-Gaussian world with its closed forms, the sampler, the conditions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from invdiff.measured import (
    CONTEXT,
    HELD,
    TARGET,
    Example,
    ForwardModelMethod,
    ForwardModelTask,
    MeasuredInfo,
    MeasuredLearning,
    example_of,
    lift,
    response_of,
    signal,
)
from invdiff.measured.examples import density_of
from invdiff.measured.forward import MeasuredPart
from invdiff.measured.model import unstacked
from invdiff.noise import KeyedNoise
from invdiff.priors import GaussianPrior, PriorInfo
from invdiff.priors.network import UNetConfig
from invdiff.protocols import Problem, Space
from invdiff.run import iterate, last
from invdiff.samplers import DDIM, ForwardModelDiffusion

H, W = 3, 4  # pixels of the world
N = H * W
SIGMA = 0.05
INFO = PriorInfo("toy", "", -1.0, 1.0, SIGMA, 80.0, 0.5, (0.0, 0.0))
LINEAR = ForwardModelMethod(lift_steps=2)  # lifts that are linear in y


@dataclass(frozen=True)
class Rows:
    """A matrix on flattened images, slice by slice; every row is a view."""

    matrix: Tensor
    slices: int = 1
    rest: Tensor | None = None  # of the whole

    @property
    def domain(self) -> Space:
        return Space((self.slices, 1, H, W), torch.float64)

    @property
    def range(self) -> Space:
        return Space((self.slices, len(self.matrix)), torch.float64)

    @property
    def views(self) -> tuple[int, ...]:
        return tuple(range(len(self.matrix)))

    def part(self, y: Tensor, index: Sequence[int]) -> Tensor:
        return y[..., list(index)]

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.matrix.T

    def adjoint(self, y: Tensor) -> Tensor:
        return (y @ self.matrix).view(-1, 1, H, W)

    def normal(self, x: Tensor) -> Tensor:
        return self.adjoint(self.forward(x))

    def whole(self, views: int) -> Rows:
        assert self.rest is not None
        return Rows(self.rest, self.slices)


def rows_of(count: int, seed: int) -> Tensor:
    """Random rows (count N), of norm about 1."""
    return torch.randn(count, N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / N**0.5


PRIOR = GaussianPrior.smooth((1, H, W), length=1.2, deviation=0.5, mean=0.2)
MEAN, COVARIANCE = PRIOR.mean.double().flatten(), PRIOR.covariance.double() + 1e-6 * torch.eye(N, dtype=torch.float64)
CONTEXT_ROWS, TARGET_ROWS, HELD_ROWS = 5, 7, 14
MATRIX = rows_of(CONTEXT_ROWS + TARGET_ROWS + HELD_ROWS, 3)
ROLES = torch.tensor([CONTEXT] * CONTEXT_ROWS + [TARGET] * TARGET_ROWS + [HELD] * HELD_ROWS)
A_C, A_T, A_N = MATRIX[ROLES == CONTEXT], MATRIX[ROLES == TARGET], MATRIX[ROLES == HELD]


def posterior(b_c: Tensor, b_t: Tensor, s: float, target: Tensor = A_T, sigma: float = SIGMA) -> Tensor:
    """E[x | y_C, y_T^s] (s N) from A^T y of either part (s N)."""
    precision = torch.linalg.inv(COVARIANCE)
    left = precision + A_C.T @ A_C / sigma**2 + target.T @ target / s**2
    right = (precision @ MEAN)[None] + b_c / sigma**2 + b_t / s**2
    return torch.linalg.solve(left, right.T).T


def posterior_covariance(matrix: Tensor, sigma: float = SIGMA) -> Tensor:
    return torch.linalg.inv(torch.linalg.inv(COVARIANCE) + matrix.T @ matrix / sigma**2)


class Linear(nn.Module):
    """The network of the world: any affine map of what it sees, one for the split and the noise level."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(4 * N, N, dtype=torch.float64)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return self.map(x.flatten(1)).view(-1, 1, H, W)


def part_of(zs: Tensor, s: float, operator: Rows) -> tuple[list[Example], MeasuredPart]:
    """Scans of the world from standard normal numbers (k, N + m + m): of the image, the noise, the target's noise."""
    m = len(operator.matrix)
    root = torch.linalg.cholesky(COVARIANCE)
    blank = example_of(operator, torch.zeros(operator.range.shape, dtype=torch.float64), SIGMA)
    examples = []
    for z in zs:
        x = MEAN + root @ z[:N]
        examples.append(replace(blank, y=(operator.matrix @ x + SIGMA * z[N : N + m])[None]))
    noise = [z[None, N + m :] for z in zs]
    weight = torch.full((len(zs),), 1 / len(zs))
    return examples, MeasuredPart(list(range(len(zs))), [ROLES] * len(zs), torch.full((len(zs),), s), noise, weight)


def solved(task: ForwardModelTask, part: MeasuredPart, signals: Tensor | None = None) -> Linear:
    """The network with the least loss: linear least squares; on signals (k N) in the place of y_N if given."""
    from invdiff.measured.forward import noisy_target

    examples = [task.examples[k] for k in part.which]
    noisy = [noisy_target(*each) for each in zip(examples, part.noise, part.sigma.tolist(), strict=True)]
    inputs = task.inputs(examples, part, noisy)
    seen = torch.cat([inputs.seen.flatten(1), torch.ones(len(examples), 1, dtype=torch.float64)], 1)
    keep = seen.square().sum(0) > 1e-18
    seen = seen[:, keep]
    spread = float(inputs.spread[0])
    wanted = torch.cat([e.y for e in examples])[:, ROLES == HELD] if signals is None else signals
    B = A_N if signals is None else torch.eye(N, dtype=torch.float64)
    residual = (wanted - inputs.skip.flatten(1) @ B.T) / spread
    # min over M of sum_k || B M seen_k - residual_k ||^2, B of full rank: M = B^+ residual^T seen (seen^T seen)^+
    inner = torch.linalg.lstsq(seen, residual, driver="gelsd").solution  # (inputs rows)
    solution = torch.linalg.lstsq(B, inner.T, driver="gelsd").solution  # (N inputs)
    net = Linear()
    full = torch.zeros(N, 4 * N + 1, dtype=torch.float64)
    full[:, keep] = solution
    with torch.no_grad():
        net.map.weight.copy_(full[:, :-1])
        net.map.bias.copy_(full[:, -1])
    return net


def exact_points(d: int) -> Tensor:
    """Points (2d d) over which the mean of any quadratic polynomial is that under N(0, I)."""
    root = d**0.5 * torch.eye(d, dtype=torch.float64)
    return torch.cat([root, -root])


def error_of(net: Linear, s: float, count: int = 300) -> float:
    """How far the network is from E[x | y_C, y_T^s], relative to how far that moves."""
    operator = Rows(MATRIX)
    m = len(MATRIX)
    zs = torch.randn(count, N + 2 * m, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    examples, part = part_of(zs, s, operator)
    task = ForwardModelTask(examples, LINEAR, MeasuredLearning(), INFO)
    noisy = [e.y + (s**2 - SIGMA**2) ** 0.5 * n for e, n in zip(examples, part.noise, strict=True)]
    x = signal(net, task.inputs(examples, part, noisy), part.sigma.double()).flatten(1).detach()
    b_c = torch.cat([e.y for e in examples])[:, ROLES == CONTEXT] @ A_C
    wanted = posterior(b_c, torch.cat(noisy)[:, ROLES == TARGET] @ A_T, s)
    return float((x - wanted).norm() / (wanted - wanted.mean(0)).norm())


@pytest.mark.parametrize("s", [0.06, 0.3, 2.0])
@pytest.mark.parametrize("weights", [(1.0, 0.0, 0.0), (1.0, 1.0, 0.0), (1.0, 0.5, 0.5), (1.0, 1.0, 1.0)])
def test_the_optimum_of_the_loss_is_the_conditional_mean(s: float, weights: tuple[float, float, float]) -> None:
    """Over all of p(x, noise): the loss is quadratic, so that a few points give its mean exactly."""
    m = len(MATRIX)
    examples, part = part_of(exact_points(N + 2 * m), s, Rows(MATRIX))
    method = replace(LINEAR, held_weight=weights[0], target_weight=weights[1], filtered=weights[2])
    task = ForwardModelTask(examples, method, MeasuredLearning(), INFO)
    net = solved(task, part)
    assert error_of(net, s) < 0.02
    loss = task.loss(net, part, None)
    gradient = torch.autograd.grad(loss, list(net.parameters()))
    with torch.no_grad():
        net.map.weight += 0.03 * torch.randn(net.map.weight.shape, dtype=torch.float64)
    other = torch.autograd.grad(task.loss(net, part, None), list(net.parameters()))
    assert float(gradient[0].norm()) < 2e-3 * float(other[0].norm())
    assert error_of(net, s) > 0.02  # the measure can fail


def test_the_loss_on_the_target_itself_would_copy_its_noise() -> None:
    """Without the correction of Noisier2Noise the optimum on the target is elsewhere."""
    s, m = 0.07, len(MATRIX)
    examples, part = part_of(exact_points(N + 2 * m), s, Rows(MATRIX))

    class Copied(ForwardModelTask):
        def misfit(
            self, example: Example, x: Tensor, noisy: Tensor, roles: Tensor, sigma: float, spread: Tensor
        ) -> Any:
            return example.misfit(x, example.y, roles == TARGET)

    found = []
    for task in (Copied, ForwardModelTask):
        made = task(examples, replace(LINEAR, held_weight=0.0, filtered=0.0), MeasuredLearning(), INFO)
        net = solved(made, part)  # the conditional mean, from the held-out rows
        gradients = torch.autograd.grad(made.loss(net, part, None), list(net.parameters()))
        found.append(float(torch.cat([g.flatten() for g in gradients]).norm()))
    assert found[0] > 10 * found[1]


def test_training_on_measurements_reaches_what_training_on_signals_does_as_scans_grow() -> None:
    s, m = 0.3, len(MATRIX)
    generator = torch.Generator().manual_seed(1)
    root = torch.linalg.cholesky(COVARIANCE)
    errors: dict[str, list[float]] = {"measurements": [], "signals": []}
    for count in (150, 500, 1500):
        zs = torch.randn(count, N + 2 * m, generator=generator, dtype=torch.float64)
        examples, part = part_of(zs, s, Rows(MATRIX))
        task = ForwardModelTask(examples, LINEAR, MeasuredLearning(), INFO)
        errors["measurements"].append(error_of(solved(task, part), s))
        errors["signals"].append(error_of(solved(task, part, MEAN + zs[:, :N] @ root.T), s))
    for found in errors.values():
        assert found[2] < 0.5 * found[0]  # as the root of the number of scans: 1/3
    assert errors["measurements"][2] < 0.06
    assert errors["measurements"][2] < 2 * errors["signals"][2]


class Exact:
    """E[x | y_C, y_T^s] in the place of the network: undoes the lifts that it is called with."""

    channels = 1

    def __init__(self, operator: Rows, target: Rows, sigma_y: float, info: MeasuredInfo) -> None:
        self.context, self.target, self.sigma_y, self.info = operator, target, sigma_y, info
        self.calls = 0

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.calls += 1
        s, seen = float(sigma), unstacked(x, 1).seen
        b_t = self._undone(seen[:, :1], self.target, s)
        precision = torch.linalg.inv(COVARIANCE)
        left, right = precision + self.target.matrix.T @ self.target.matrix / s**2, (precision @ MEAN) + b_t / s**2
        if bool(seen[:, 1].any()):
            A = self.context.matrix
            b_c = self._undone(seen[:, 1:2], self.context, self.sigma_y)
            left, right = left + A.T @ A / self.sigma_y**2, right + b_c / self.sigma_y**2
        return torch.linalg.solve(left, right.T).T.view(-1, 1, H, W)

    def _undone(self, image: Tensor, operator: Rows, s: float) -> Tensor:
        """A^H y (s N) of what the network is shown of its lift."""
        one, m = replace(operator, slices=1), len(operator.matrix)
        unit = torch.eye(m, dtype=torch.float64)
        found = lift(replace(operator, slices=m), unit, response_of(one), s, self.info.sigma_data)
        columns = (found.image / (self.info.sigma_data * found.recovered.sqrt())).flatten(1).T
        return torch.linalg.lstsq(columns, image.flatten(1).T, driver="gelsd").solution.T @ operator.matrix


def sampling(target: Tensor, slices: int, sigma_y: float = SIGMA, seed: int = 0, **info: Any) -> Problem:
    """The world's scan, context alone, with the exact conditional mean as its model."""
    operator, to = Rows(A_C, slices, target), Rows(target, slices)
    x = MEAN + torch.linalg.cholesky(COVARIANCE) @ torch.randn(N, generator=torch.Generator().manual_seed(8)).double()
    noise = torch.randn(CONTEXT_ROWS, generator=torch.Generator().manual_seed(9)).double()
    y = (A_C @ x + sigma_y * noise).expand(slices, -1).clone()
    density = density_of(replace(to, slices=1), response_of(replace(to, slices=1)))
    known = {"sigma_min": 0.003, "sigma_y": (SIGMA, SIGMA), "density": density, "dropped": 0.1, "views": 3, **info}
    about = MeasuredInfo(**{**vars(INFO), **known})
    return Problem(operator, y, sigma_y, Exact(operator, to, sigma_y, about), KeyedNoise(seed))


FAST = ForwardModelDiffusion(steps=6)


@pytest.mark.parametrize("move", ["dpmpp2m", "deis3m"])
def test_samples_have_the_posteriors_mean_and_covariance_where_the_target_sees(move: str) -> None:
    slices, sampler = 8000, ForwardModelDiffusion(steps=40, move=move, sigma_min=0.003)
    for target in (rows_of(16, 4), A_T):  # injective, and not
        problem = sampling(target, slices)
        x = last(iterate(sampler, problem)).x.flatten(1)
        seen = target if len(target) < N else torch.eye(N, dtype=torch.float64)
        wanted = seen @ posterior_covariance(A_C) @ seen.T
        found = torch.cov(seen @ x.T)
        assert float((found - wanted).norm() / wanted.norm()) < 0.05
        mean = posterior(problem.y[:1] @ A_C, torch.zeros(1, N).double(), 1e9)[0]
        assert float((seen @ (x.mean(0) - mean)).norm() / wanted.trace().sqrt()) < 0.03
        if len(target) < N:  # what neither sees stays at its mean
            whole = posterior_covariance(A_C)
            assert float((torch.cov(x.T) - whole).norm() / whole.norm()) > 0.05


def test_ddim_agrees_and_fresh_noise_keeps_the_spread() -> None:
    target = rows_of(16, 4)
    wanted = posterior_covariance(A_C)
    for sampler in (
        ForwardModelDiffusion(steps=80, move="ddim", sigma_min=0.003),
        ForwardModelDiffusion(steps=120, move="ddim", eta=0.4, sigma_min=0.003),
    ):
        x = last(iterate(sampler, sampling(target, 2500))).x.flatten(1)
        assert float((torch.cov(x.T) - wanted).norm() / wanted.norm()) < 0.1


def test_without_guidance_the_empty_context_is_not_asked_and_with_it_it_counts() -> None:
    problem = sampling(A_T, 3)
    plain = last(iterate(FAST, problem)).x
    assert problem.prior.calls == FAST.steps  # type: ignore[attr-defined]
    guided = last(iterate(replace(FAST, guidance=2.0), problem)).x
    assert problem.prior.calls == 3 * FAST.steps  # type: ignore[attr-defined]
    none = last(iterate(replace(FAST, guidance=0.0), problem)).x
    other = problem._replace(y=problem.y + 1)
    assert torch.equal(none, last(iterate(replace(FAST, guidance=0.0), other)).x)  # y has no say
    close = last(iterate(replace(FAST, guidance=1 + 1e-9), problem)).x
    torch.testing.assert_close(close, plain, atol=1e-6, rtol=0)
    assert float((guided - plain).abs().max()) > 1e-3


@pytest.mark.parametrize(
    "sampler",
    [FAST, replace(FAST, eta=0.5), replace(FAST, move="deis3m"), replace(FAST, guidance=1.5, consistency=0.1)],
)
def test_a_run_resumes_bit_equal_from_any_state(sampler: ForwardModelDiffusion) -> None:
    problem = sampling(A_T, 4)
    states = list(iterate(sampler, problem))
    for state in states[:-1]:
        end = last(iterate(sampler, problem, state))
        assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(end, states[-1], strict=True))
    again, other = (last(iterate(sampler, sampling(A_T, 4, seed=seed))).x for seed in (0, 1))
    assert torch.equal(again, states[-1].x) and float((again - other).abs().max()) > 1e-3


def test_consistency_fits_the_measurements() -> None:
    problem = sampling(A_T, 2)
    misfits = [
        float((problem.operator.forward(last(iterate(s, problem)).x) - problem.y).norm())
        for s in (FAST, replace(FAST, consistency=1.0))
    ]
    assert misfits[1] < 0.3 * misfits[0]


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("usual prior", "the prior 'GaussianPrior' is one of images"),
        ("usual sampler", "takes lifts of measurements and is no prior of images"),
        ("noisier", "a scan whitened alike is wanted"),
        ("noiseless", "a scan whitened alike is wanted"),
        ("guidance", "guidance is 2.0 and the model 'toy' knows no empty context"),
        ("no whole", "does not know what else could be measured"),
        ("nonlinear", "needs a linear operator"),
        ("nonlinear with consistency", "needs a linear operator"),
    ],
)
def test_sampling_refuses(case: str, said: str) -> None:
    from invdiff.measured import ForwardModel
    from invdiff.measured.model import extra_channels
    from invdiff.priors.network import UNet

    problem, sampler = sampling(A_T, 2), FAST
    if case == "usual prior":
        problem = problem._replace(prior=PRIOR)
    elif case == "usual sampler":
        config = UNetConfig(channels=(8, 8), blocks=(1, 1), norm_groups=4)
        model = ForwardModel(UNet(config, extra_channels(1)), problem.prior.info)  # type: ignore[attr-defined]
        problem, sampler = problem._replace(prior=model), DDIM(steps=2)  # type: ignore[assignment]
    elif case == "noisier":
        problem = problem._replace(sigma_y=10 * SIGMA)
    elif case == "noiseless":
        problem = problem._replace(sigma_y=0.0)
    elif case == "guidance":
        problem, sampler = sampling(A_T, 2, dropped=0.0), replace(FAST, guidance=2.0)
    elif case == "no whole":

        class Bare(Rows):
            whole = property()  # type: ignore[assignment]

        problem = problem._replace(operator=Bare(A_C, 2))
    elif case == "nonlinear":
        problem = problem._replace(operator=type("Squared", (), {"forward": lambda self, x: x * x})())
    elif case == "nonlinear with consistency":
        lifting = {"forward": lambda self, x: x * x, "lift": lambda self, y, chosen: y}
        problem, sampler = problem._replace(operator=type("Squared", (), lifting)()), replace(FAST, consistency=0.1)
    with pytest.raises(ValueError, match=said):
        list(iterate(sampler, problem))
