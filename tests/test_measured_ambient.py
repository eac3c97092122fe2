"""Ambient priors, one-step reconstruction and supervised twins: optima in a linear-Gaussian world, draws, refusals.

Lifts are of one step there, so that they are linear in y and an affine network can reach the optimum.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from invdiff.config import build
from invdiff.measured import (
    CONTEXT,
    HELD,
    TARGET,
    Example,
    Lift,
    MeasuredLearning,
    example_of,
    inputs_of,
    nothing,
    signal,
)
from invdiff.measured.ambient import AmbientMethod, AmbientPrior, corrupted, joined
from invdiff.measured.forward import MeasuredPart
from invdiff.measured.model import extra_channels
from invdiff.measured.nonlinear import nonlinear_example_of
from invdiff.measured.one_step import (
    LEVEL,
    OneStepMethod,
    SupervisedForwardModelMethod,
    SupervisedOneStepMethod,
)
from invdiff.operators import LinearOperatorBase, Mask, VolumeRenderer
from invdiff.priors.model import PriorInfo
from invdiff.protocols import Space

H, W = 2, 3
N = H * W
INFO = PriorInfo("toy", "a.u.", -1.0, 1.0, 0.02, 20.0, 0.5, (0.0, 0.0))
LEARNING = MeasuredLearning(images=1, batch=1)


class Rows(LinearOperatorBase):
    """A matrix whose every row is a view."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.domain = Space((1, 1, H, W), torch.float32)
        self.range = Space((1, len(matrix), 1), torch.float32)

    def _forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1) @ self.matrix.T)[..., None]

    def _adjoint(self, y: Tensor) -> Tensor:
        return (y[..., 0] @ self.matrix).view(self.domain.shape)

    @property
    def views(self) -> tuple[int, ...]:
        return tuple(range(len(self.matrix)))


class Affine(nn.Module):
    """F as an affine map of all that the network sees, whitened as the first batch is so that its fit is quick."""

    def __init__(self) -> None:
        super().__init__()
        self.channels = 1
        self.linear = nn.Linear((1 + extra_channels(1)) * N, N)
        nn.init.zeros_(self.linear.weight)
        self.white: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        flat = x.flatten(1)
        if self.white is None:
            mean = flat.mean(0)
            _, size, basis = torch.linalg.svd((flat - mean).double(), full_matrices=False)
            kept = size > 1e-5 * size[0]
            root = basis[kept].T / size[kept] * len(flat) ** 0.5
            padded = torch.zeros(flat.shape[1], flat.shape[1])
            padded[:, : root.shape[1]] = root.float()
            self.white = mean, padded
        mean, root = self.white
        return self.linear((flat - mean) @ root).view(-1, 1, H, W)


def world() -> tuple[Tensor, Tensor]:
    """Mean and covariance of the images, smooth."""
    places = torch.stack(torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")).flatten(1).T.float()
    covariance = 0.25 * torch.exp(-torch.cdist(places, places).square() / 4) + 0.01 * torch.eye(N)
    return torch.linspace(-0.3, 0.4, N), covariance


def draws(count: int, *sizes: int) -> list[Tensor]:
    """Numbers (count, size) whose mean is 0 and whose covariance, jointly, is the identity: not only on average.

    A quadratic loss knows no more than these, so that its minimum over few draws is that over all of them.
    """
    g = torch.Generator().manual_seed(1)
    raw = torch.randn(count, sum(sizes), generator=g, dtype=torch.float64)
    q, _ = torch.linalg.qr(raw - raw.mean(0))
    return [part.float() for part in (count**0.5 * q).split(list(sizes), 1)]


def matrix(rows: int) -> Tensor:
    m = torch.randn(rows, N, generator=torch.Generator().manual_seed(5))
    return m / torch.linalg.matrix_norm(m, 2)


def scans_of(operator: Any, white: Tensor, noise: Tensor, sigma: float) -> list[Example]:
    """Scans of images of the world, made of white numbers (s N), with the noise (s m)."""
    mean, covariance = world()
    x = (mean + white @ torch.linalg.cholesky(covariance).T).view(-1, 1, 1, H, W)
    first = example_of(operator, operator.forward(x[0]), sigma)
    mask = first.mask(torch.ones(first.views))
    return [
        replace(first, y=operator.forward(v) + sigma * mask * n.view(first.y.shape), truth=v)
        for v, n in zip(x, noise, strict=True)
    ]


def trained(task: Any, roles: Tensor, sigma: float, noise: list[Tensor]) -> Affine:
    """The network at the minimum of the task's loss over all its examples, split alike: a quadratic, by LBFGS."""
    count, network = len(task.examples), Affine()
    part = MeasuredPart(
        list(range(count)), [roles] * count, torch.full((count,), sigma), noise, torch.full((count,), 1 / count)
    )
    optimizer = torch.optim.LBFGS(
        network.parameters(), max_iter=40, history_size=50, tolerance_grad=1e-9, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = task.loss(network, part, None)
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    return network


def posterior_mean(rows: Tensor, z: Tensor, noise: Tensor) -> Tensor:
    """E[x | z] for z = rows x + noise of a covariance: z (s m) -> (s N)."""
    mean, covariance = (v.double() for v in world())
    rows = rows.double()
    gain = covariance @ rows.T @ torch.linalg.inv(rows @ covariance @ rows.T + noise.double())
    return mean + (z.double() - rows @ mean) @ gain.T


def off(found: Tensor, wanted: Tensor) -> float:
    """Distance over the spread of what is wanted, of all images."""
    found, wanted = found.flatten(1).double(), wanted.flatten(1)
    return float((found - wanted).norm() / (wanted - wanted.mean(0)).norm())


SIGMA_Y, SIGMA, COUNT = 0.05, 0.4, 40


@pytest.mark.parametrize("kind", ["dense", "mask"])
def test_the_ambient_optimum_is_the_denoiser_of_what_the_operator_sees(kind: str) -> None:
    """E[x_0 | A_S (x_0 + sigma n) + n_y], in closed form; a mask also needs the corrected loss on what is shown."""
    operator: Any = Rows(matrix(14)) if kind == "dense" else Mask(torch.ones(H, W))
    rows = operator.matrix if kind == "dense" else torch.eye(N)
    shown = 5
    m = len(rows)
    white, n_y, n = draws(COUNT, N, m, N)
    method = AmbientMethod(seen_weight=0.0 if kind == "dense" else 1.0, lift_steps=1)
    examples = scans_of(operator, white, n_y, SIGMA_Y) if kind == "dense" else masked(white, n_y)
    roles = torch.full((m,), HELD)
    roles[:shown] = TARGET
    if kind == "dense":
        method.check(examples, INFO)
    task = method.task(examples, LEARNING, INFO)
    noise = [v.view(1, 1, H, W) for v in n]
    network = trained(task, roles, SIGMA, noise)
    chosen = roles == TARGET
    noisy = [e.y + SIGMA * e.operator.forward(v) for e, v in zip(examples, noise, strict=True)]
    inputs = joined([corrupted(e, y, chosen, SIGMA, 0.5) for e, y in zip(examples, noisy, strict=True)], 0.5)
    with torch.no_grad():
        found = inputs.skip + inputs.spread * network(inputs.seen, torch.zeros(COUNT))
    a = rows[:shown]
    covariance = SIGMA_Y**2 * torch.eye(shown) + SIGMA**2 * a @ a.T
    wanted = posterior_mean(a, torch.cat(noisy).flatten(1)[:, :shown], covariance)
    assert off(found, wanted) < 0.02
    assert off(inputs.skip, wanted) > 0.1  # the lift alone is not it


class Pixels(Mask):
    """A mask whose pixels are views."""

    @property
    def views(self) -> tuple[int, ...]:
        return tuple(range(N))

    def part(self, y: Tensor, index: Any) -> Tensor:
        return y.flatten(1)[:, list(index)]


def masked(white: Tensor, noise: Tensor, sigma: float = SIGMA_Y) -> list[Example]:
    return scans_of(Pixels(torch.ones(H, W)), white, noise, sigma)


def test_without_the_correction_the_shown_part_is_copied_with_its_noise() -> None:
    """The naive loss on what is shown has another optimum; the corrected one was held to the right one above."""
    sigma = 0.3  # of the scan and of the images: half of what the network sees as noise is the scan's own
    white, n_y, n = draws(COUNT, N, N, N)
    noise = [v.view(1, 1, H, W) for v in n]
    roles = torch.full((N,), HELD)
    roles[: N - 2] = TARGET
    errors = []
    for told in (sigma, 1e-6):  # the second is told that there is no noise, so that nothing is corrected
        examples = [replace(e, sigma=told) for e in masked(white, n_y, sigma)]
        network = trained(
            AmbientMethod(seen_weight=1.0, lift_steps=1).task(examples, LEARNING, INFO), roles, sigma, noise
        )
        z = [e.y + sigma * v for e, v in zip(examples, noise, strict=True)]
        lifts = [corrupted(e, y, roles == TARGET, sigma, 0.5) for e, y in zip(examples, z, strict=True)]
        inputs = joined(lifts, 0.5)
        wanted = posterior_mean(
            torch.eye(N)[: N - 2], torch.cat(z).flatten(1)[:, : N - 2], 2 * sigma**2 * torch.eye(N - 2)
        )
        with torch.no_grad():
            errors.append(off(inputs.skip + inputs.spread * network(inputs.seen, torch.zeros(COUNT)), wanted))
    assert errors[0] < 0.02 < 0.2 < errors[1]


@pytest.mark.parametrize("supervised", [False, True])
def test_the_one_step_optimum_is_the_posterior_mean(supervised: bool) -> None:
    """E[x | y_C] in closed form, from held-out measurements as from images: what SSDU and Noise2Noise rest on."""
    rows = matrix(14)
    white, n_y = draws(COUNT, N, len(rows))
    examples = scans_of(Rows(rows), white, n_y, SIGMA_Y)
    roles = torch.full((len(rows),), HELD)
    roles[:4] = CONTEXT
    method = (SupervisedOneStepMethod if supervised else OneStepMethod)(lift_steps=1)
    method.check(examples, INFO)
    network = trained(method.task(examples, LEARNING, INFO), roles, LEVEL, [torch.zeros(())] * COUNT)
    with torch.no_grad():
        lifts = [e.lift(e.y, roles == CONTEXT, e.sigma, INFO.sigma_data) for e in examples]
        context = Lift(*(torch.cat(field) for field in zip(*lifts, strict=True)))
        inputs = inputs_of(context, nothing(context.image), INFO.sigma_data)
        found = signal(network, inputs, torch.full((COUNT,), LEVEL))
    y = torch.cat([e.y for e in examples]).flatten(1)[:, :4]
    assert off(found, posterior_mean(rows[:4], y, SIGMA_Y**2 * torch.eye(4))) < 0.02


def test_supervised_forward_model_has_the_optimum_of_measurements() -> None:
    """E[x | y_C, y_T^s], in closed form."""
    rows = matrix(14)
    white, n_y, eps = draws(COUNT, N, len(rows), len(rows))
    examples = scans_of(Rows(rows), white, n_y, SIGMA_Y)
    roles = torch.full((len(rows),), HELD)
    roles[:3], roles[3:6] = CONTEXT, TARGET
    task = SupervisedForwardModelMethod(lift_steps=1).task(examples, LEARNING, INFO)
    noise = [v.view(1, -1, 1) for v in eps]
    network = trained(task, roles, SIGMA, noise)
    part = MeasuredPart(
        list(range(COUNT)), [roles] * COUNT, torch.full((COUNT,), SIGMA), noise, torch.full((COUNT,), 1.0)
    )
    more = (SIGMA**2 - SIGMA_Y**2) ** 0.5
    noisy = [e.y + more * n for e, n in zip(examples, noise, strict=True)]
    inputs = task.inputs(examples, part, noisy)
    with torch.no_grad():
        found = inputs.skip + inputs.spread * network(inputs.seen, torch.zeros(COUNT))
    z = torch.cat([torch.cat([e.y[:, :3], y[:, 3:6]], 1) for e, y in zip(examples, noisy, strict=True)]).flatten(1)
    covariance = torch.diag(torch.tensor([SIGMA_Y**2] * 3 + [SIGMA**2] * 3))
    assert off(found, posterior_mean(rows[:6], z, covariance)) < 0.02


def test_everything_random_is_keyed_by_the_step_and_the_item() -> None:
    white, n_y = draws(COUNT, N, 14)
    examples = scans_of(Rows(matrix(14)), white, n_y, SIGMA_Y)
    learning = MeasuredLearning(images=8, batch=5)
    for method in (AmbientMethod(), OneStepMethod(), SupervisedForwardModelMethod()):
        task = method.task(examples, learning, INFO)
        whole, halves = task.part(3), [task.part(3, rank, 2) for rank in (0, 1)]
        for k in range(5):
            half = halves[k % 2]
            assert half.which[k // 2] == whole.which[k]
            assert torch.equal(half.roles[k // 2], whole.roles[k])
            assert torch.equal(half.noise[k // 2], whole.noise[k])
        assert sum(float(h.weight.sum()) for h in halves) == pytest.approx(1)
        assert [r.tolist() for r in task.part(4).roles] != [r.tolist() for r in whole.roles]
        with torch.no_grad():
            network = Affine()
            network.white = torch.zeros(4 * N), torch.eye(4 * N)
            shares = sum(float(task.loss(network, half, None)) for half in halves)
            assert shares == pytest.approx(float(task.loss(network, whole, None)), rel=1e-5)


def test_splits_leave_something_on_both_sides() -> None:
    for views in (2, 3, 17):
        for step in range(30):
            roles = OneStepMethod(context=(0.0, 1.0)).draw(views, (step,))
            assert 1 <= int((roles == CONTEXT).sum()) <= views - 1
            assert int((roles == HELD).sum()) + int((roles == CONTEXT).sum()) == views
            roles = AmbientMethod(target=(0.0, 1.0)).splitting.draw(views, (step,))
            assert 1 <= int((roles == TARGET).sum()) <= views - 1
            assert not int((roles == CONTEXT).sum())


def test_an_ambient_prior_is_a_prior() -> None:
    """Slices independent, differentiable, levels alike or one a slice; with an operator that sees all it is EDM's."""
    white, n_y = draws(COUNT, N, N)
    example = replace(masked(white, n_y)[0], sigma=0.0)
    info = AmbientMethod(lift_steps=1).exported(INFO, [example])
    network = Affine()
    nn.init.normal_(network.linear.weight, std=0.1)
    network.white = torch.zeros(4 * N), torch.eye(4 * N)
    prior = AmbientPrior(network, info, example)
    x = torch.randn(3, 1, H, W, generator=torch.Generator().manual_seed(3))
    one, two = prior.denoise(x, torch.tensor(0.3)), prior.denoise(x, torch.tensor([0.3, 0.7, 0.3]))
    assert torch.allclose(one[[0, 2]], two[[0, 2]])
    assert not torch.allclose(one[1], two[1])
    assert torch.allclose(prior.denoise(x[1:2], torch.tensor(0.3)), one[1:2], atol=1e-6)
    at = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(prior.denoise(at, torch.tensor(0.3)).sum(), at)
    assert float(gradient.abs().min()) > 0
    nn.init.zeros_(network.linear.weight)
    nn.init.zeros_(network.linear.bias)
    skip = 0.25 / (0.25 + 0.09)
    assert torch.allclose(prior.denoise(x, torch.tensor(0.3)), skip * x, atol=2e-3)
    with pytest.raises(ValueError, match="is wanted"):
        prior.denoise(x[..., :-1], torch.tensor(0.3))


def test_what_cannot_be_learned_from_is_refused() -> None:
    white, n_y = draws(COUNT, N, 14)
    examples = scans_of(Rows(matrix(14)), white, n_y, SIGMA_Y)
    with pytest.raises(ValueError, match="orthonormal rows"):
        AmbientMethod(seen_weight=1.0).check(examples, INFO)
    AmbientMethod(seen_weight=1.0).check(masked(white, n_y[:, :N]), INFO)
    with pytest.raises(ValueError, match="has no field 'context'"):
        build(AmbientMethod, {"context": (0.1, 0.2)}, "measured")
    with pytest.raises(ValueError, match=r"target is \[0.9, 0.2\]"):
        AmbientMethod(target=(0.9, 0.2))
    with pytest.raises(ValueError, match="seen_weight is -1"):
        AmbientMethod(seen_weight=-1.0)
    with pytest.raises(ValueError, match="context is"):
        OneStepMethod(context=(0.9, 0.2))
    blind = [replace(e, truth=None) for e in examples]
    for method in (SupervisedOneStepMethod(), SupervisedForwardModelMethod()):
        with pytest.raises(ValueError, match="has no image"):
            method.check(blind, replace(INFO, sigma_min=0.1))
    scene = VolumeRenderer((1, 8, H, W), [0.1, 2.0], size=(4, 5))
    seen = nonlinear_example_of(scene, scene(torch.zeros(scene.domain.shape)), 0.02)
    with pytest.raises(ValueError, match="linear one is wanted"):
        AmbientMethod().check([seen], INFO)
