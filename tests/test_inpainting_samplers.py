"""RePaint and CoPaint: their published loops, and what they reach where the answer is a closed form."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from invdiff.linalg import inner
from invdiff.noise import KeyedNoise
from invdiff.operators import Mask
from invdiff.priors import GaussianPrior
from invdiff.protocols import Problem
from invdiff.run import iterate
from invdiff.samplers import DDIM, CoPaint, RePaint


def last(sampler: Any, problem: Problem) -> Tensor:
    *_, end = iterate(sampler, problem)
    x: Tensor = end.x
    return x


def masked(slices: int, h: int = 3, w: int = 4) -> tuple[Problem, Tensor, GaussianPrior]:
    """A smooth Gaussian image whose left half is known, without noise."""
    prior = GaussianPrior.smooth((1, h, w), 1.5, 0.5, 0.2)
    x = prior.draw(slices, KeyedNoise(7))
    mask = torch.zeros(h, w, dtype=torch.bool)
    mask[:, : w // 2] = True
    operator = Mask(mask, (slices, 1, h, w))
    return Problem(operator, operator.forward(x), 0.0, prior, KeyedNoise(0)), mask, prior


def test_the_path_is_the_published_schedule() -> None:
    """Against the loop of the paper's appendix, in steps from T down: a jump back at every multiple of its length."""
    for levels, jump, repeats in ((250, 10, 10), (12, 3, 2), (6, 2, 1)):
        jumps = dict.fromkeys(range(0, levels - jump, jump), repeats - 1)
        t, visited = levels, [levels]
        while t >= 1:
            t -= 1
            visited.append(t)
            if jumps.get(t, 0) > 0:
                jumps[t] -= 1
                visited += range(t + 1, t + jump + 1)
                t += jump
        down = [levels - a for a, b in itertools.pairwise(visited) if b < a]
        sampler = RePaint(levels=levels, jump=jump, repeats=repeats)
        assert list(sampler.path) == [*down, levels] and sampler.steps == len(down)
    assert RePaint(levels=250, jump=10, repeats=10).steps == 2410
    assert RePaint(levels=7, jump=3, repeats=2).path == (0, 1, 2, 3, 1, 2, 3, 4, 5, 6, 4, 5, 6, 7)


def test_repaint_keeps_the_known_pixels() -> None:
    problem, mask, _ = masked(3)
    x = last(RePaint(levels=8, jump=2, repeats=2), problem)
    assert (x - problem.y)[:, :, mask].abs().max() < 1e-6
    assert x[:, :, ~mask].std() > 0.05


def test_every_iterate_has_the_noise_of_its_level() -> None:
    """x_t - x_0 of the known pixels is N(0, sigma^2), behind resampling's jumps too."""
    problem, mask, _ = masked(400)
    sampler = RePaint(levels=6, jump=2, repeats=2, sigma_max=20.0)
    for state in list(iterate(sampler, problem))[1:-1]:
        deviation = (state.x_t - problem.y)[:, :, mask].std()
        assert abs(float(deviation) / sampler.sigma(state.i) - 1) < 0.05


def conditional(problem: Problem, prior: GaussianPrior, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (s n) and covariance (n n) of the unknown pixels given the known ones."""
    C, known = prior.covariance.double(), mask.flatten()
    gain = torch.linalg.solve(C[known][:, known], C[known][:, ~known]).T
    m = prior.mean.flatten().double()
    mean = m[~known] + (problem.y.flatten(1).double()[:, known] - m[known]) @ gain.T
    return mean, C[~known][:, ~known] - gain @ C[known][:, ~known]


def test_resampling_nears_the_posterior() -> None:
    problem, mask, prior = masked(600)
    mean, covariance = conditional(problem, prior, mask)
    errors, spreads = [], []
    for repeats in (1, 8):
        x = last(RePaint(levels=24, jump=4, repeats=repeats, sigma_max=20.0), problem)[:, :, ~mask][:, 0].double()
        errors.append(float((x - mean).square().mean() / covariance.diag().mean()))
        spreads.append(x)
    assert errors[1] < 0.7 * errors[0] and 0.6 < errors[1] < 1.6  # 1 of an exact draw


def test_copaint_without_a_rate_is_ddim() -> None:
    problem, _, _ = masked(3)
    plain = last(DDIM(steps=7, sigma_max=80.0, sigma_min=0.01), problem)
    torch.testing.assert_close(last(CoPaint(steps=7, rate=0.0), problem), plain, atol=1e-6, rtol=0)
    torch.testing.assert_close(last(CoPaint(steps=7, descents=0), problem), plain, atol=1e-6, rtol=0)


def test_copaint_fits_the_known_and_what_goes_with_it() -> None:
    problem, mask, prior = masked(40)
    mean, covariance = conditional(problem, prior, mask)
    plain, fitted = (last(s, problem) for s in (DDIM(steps=30), CoPaint(steps=30, rate=0.1)))
    known = [(x - problem.y)[:, :, mask].norm() for x in (plain, fitted)]
    assert known[1] < 0.2 * known[0]
    hidden = [(x[:, :, ~mask][:, 0] - mean).square().mean() / covariance.diag().mean() for x in (plain, fitted)]
    assert hidden[1] < 0.7 * hidden[0]


def test_copaint_never_raises_a_slices_loss() -> None:
    """Even where the rate is far too long: every slice backtracks for itself."""
    problem, _, _ = masked(4)
    sampler = CoPaint(steps=5, rate=30.0, sigma_max=5.0)
    state = sampler.init(problem)
    plain = problem.prior.denoise(state.x_t, torch.tensor(5.0))
    after = sampler.step(problem, state)

    def loss(x: Tensor) -> Tensor:
        r = problem.operator.forward(x) - problem.y
        return inner(r, r).flatten()

    assert bool((loss(after.x) < loss(plain)).all())
    alone = sampler.step(problem._replace(prior=problem.prior), state)
    assert torch.equal(alone.x, after.x)


def test_copaint_steps_down_the_gradient() -> None:
    """One descent is rate (1 + sigma^2)^1/2 times the gradient of finite differences."""
    problem, _, _ = masked(2)
    sampler = CoPaint(steps=3, descents=1, rate=1e-3, sigma_max=2.0)
    state, s = sampler.init(problem), torch.tensor(2.0)

    def loss(x: Tensor) -> Tensor:
        return (problem.operator.forward(problem.prior.denoise(x, s)) - problem.y).square().sum()

    gradient = torch.zeros_like(state.x_t)
    for k in range(gradient.numel()):
        bump = torch.zeros_like(gradient)
        bump.view(-1)[k] = 0.05
        gradient.view(-1)[k] = (loss(state.x_t + bump) - loss(state.x_t - bump)) / 0.1
    moved = state.x_t - 1e-3 * 5**0.5 * gradient
    torch.testing.assert_close(sampler.step(problem, state).x, problem.prior.denoise(moved, s), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RePaint(jump=0), "RePaint.jump is 0"),
        (lambda: RePaint(sigma_min=0.0), "0 < low < high"),
        (lambda: CoPaint(rate=-1.0), "CoPaint.rate is -1.0"),
    ],
)
def test_bad_fields_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
