"""Steering against closed forms: Gaussians, mixtures, and the prior that needs none."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import invdiff.circuits
from invdiff.circuits import MISSING, Circuit, Gaussian, GridInfo, ImageCircuit, Structure, codes, shipped
from invdiff.circuits import load as load_circuit
from invdiff.noise import KeyedNoise
from invdiff.priors import Chunked, GaussianPrior, PriorInfo, Steered
from invdiff.priors import load as load_prior
from invdiff.priors.schedules import Discrete
from invdiff.priors.steered import check_range, share
from invdiff.problem import unconditional
from invdiff.run import iterate
from invdiff.samplers import DDIM

H, W = 4, 5
MEAN, STD = torch.tensor([[-0.6, 0.5]]), torch.tensor([[0.2, 0.35]])


def grid(rows: int, columns: int, block: int, within: float = 0.0) -> GridInfo:
    return GridInfo("toy", "a.u.", 0.0, 1.0, rows, columns, block, 10_000, within)


def independent(mean: Tensor, std: float) -> ImageCircuit:
    """Independent Gaussian pixels."""
    v = mean.numel()
    inputs = Gaussian(mean.reshape(v, 1), torch.full((v, 1), math.log(std)))
    return ImageCircuit(Circuit(Structure((-1,), (0,) * v), inputs, torch.ones(1), torch.ones(1, 1, 1)), grid(H, W, 1))


def mixture(rows: int = H, columns: int = W, block: int = 1, within: float = 0.0) -> ImageCircuit:
    """All cells of one of two kinds together, each with probability 0.3 and 0.7."""
    structure = Structure((-1,), (0,) * (rows * columns), (), (0,) * (rows * columns))
    circuit = Circuit(structure, Gaussian(MEAN, STD.log()), torch.tensor([0.3, 0.7]), torch.full((1, 2, 2), 0.5))
    return ImageCircuit(circuit, grid(rows, columns, block, within))


def image(slices: int = 3, seed: int = 0, h: int = H, w: int = W) -> Tensor:
    return torch.randn(slices, 1, h, w, generator=torch.Generator().manual_seed(seed))


class Flat:
    """A denoiser that says 0.25 everywhere: what steering adds is seen alone."""

    channels = 1

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        return torch.full_like(x, 0.25) + 0 * x


NOTHING = torch.zeros(3, 1, H, W, dtype=torch.bool)


def test_the_share_is_the_published_one() -> None:
    """0.8 + 0.2 exp(-2 t / T) at the sigmas of the linear schedule."""
    for step in (0, 400, 905, 999):
        sigma = Discrete().sigmas[step : step + 1]
        wanted = 0.8 + 0.2 * math.exp(-2 * step / 1000)
        assert abs(float(share(sigma)) - wanted) < 1e-6
    assert abs(float(share(torch.tensor([1e4]))) - 0.8271) < 1e-4  # t stops at T - 1


def test_a_circuit_that_knows_no_more_than_the_denoiser_changes_nothing() -> None:
    mean = torch.linspace(-0.5, 0.5, H * W).view(1, H, W)
    prior = GaussianPrior(mean, torch.full((H * W,), 0.3**2))
    x, sigma = 40 * image(), torch.tensor([30.0, 50.0, 90.0])
    steered = Steered(prior, independent(mean, 0.3), torch.zeros(3, 1, H, W), NOTHING)
    torch.testing.assert_close(steered.denoise(x, sigma), prior.denoise(x, sigma), atol=1e-5, rtol=0)


def test_the_geometric_mean_of_gaussians() -> None:
    """Of the powers a and 1 - a of N(D, v) and N(mu, s^2), pixel by pixel."""
    mean, std, sigma, d = torch.linspace(-0.5, 0.5, H * W).view(1, H, W), 0.3, 2.0, 0.5
    x = 2 * image()
    steered = Steered(Flat(), independent(mean, std), torch.zeros(3, 1, H, W), NOTHING, sigma_stop=1.0)
    gain = std**2 / (std**2 + sigma**2)
    mu, s2, v = mean + gain * (x - mean), (1 - gain) * std**2, d**2 * sigma**2 / (d**2 + sigma**2)
    a = float(share(torch.tensor([sigma])))
    wanted = (a * 0.25 / v + (1 - a) * mu / s2) / (a / v + (1 - a) / s2)
    torch.testing.assert_close(steered.denoise(x, torch.tensor(sigma)), wanted, atol=1e-5, rtol=0)


def exact_mixture(value: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Posterior mean and variance of the mixture given Gaussian evidence (n v)."""
    total = STD[0].square() + variance[..., None]
    log_n = torch.where(torch.isinf(total), 0.0, -0.5 * ((value[..., None] - MEAN[0]).square() / total + total.log()))
    weight = (log_n.sum(1) + torch.tensor([0.3, 0.7]).log()).softmax(-1)[:, None]
    gain = STD[0].square() / total
    mean = MEAN[0] + gain * (value[..., None] - MEAN[0])
    middle = (weight * mean).sum(-1)
    return middle, (weight * ((1 - gain) * STD[0].square() + (mean - middle[..., None]).square())).sum(-1)


def test_known_pixels_tell_of_the_others() -> None:
    """The exact posterior of a mixture given the noisy image and what is known of it."""
    known = torch.full((3, 1, H, W), -0.7)
    known[1] = 0.6
    mask = NOTHING.clone()
    mask[:2, :, 1:3, 2] = True
    steered = Steered(Flat(), mixture(), known, mask)
    sigma, x = torch.tensor([30.0, 60.0, 90.0]), 60 * image()
    said = steered.posterior(x, sigma)
    noisy, n2 = x.flatten(1), sigma[:, None].square().expand(3, H * W)
    pixel = (2 / 10_000) ** 2 / 12  # of a level: what a value is known to
    tau = torch.where(mask.flatten(1), 1 / (1 / n2 + 1 / pixel), n2)
    value = torch.where(mask.flatten(1), tau * (noisy / n2 + known.flatten(1) / pixel), noisy)
    mean, variance = exact_mixture(value, tau)
    torch.testing.assert_close(said.mean.flatten(1), mean, atol=1e-4, rtol=0)
    torch.testing.assert_close(said.variance.flatten(1), variance, atol=1e-5, rtol=1e-3)
    out = steered.denoise(x, sigma)
    free = ~mask[:2].flatten(1)
    assert bool((out[0].flatten()[free[0]] < 0.1).all()) and bool((out[1].flatten()[free[1]] > 0.3).all())
    assert torch.equal(out[mask], torch.full_like(out[mask], 0.25))  # known pixels are the sampler's affair


def test_cells_of_blocks_have_less_noise_and_partly_known_ones_some_doubt() -> None:
    within, sigma = 0.2, torch.tensor([30.0, 30.0, 50.0])
    circuit = mixture(2, 3, 2, within)
    x, known = 30 * image(3, 1, 4, 6), image(3, 2, 4, 6)
    mask = torch.zeros(3, 1, 4, 6, dtype=torch.bool)
    mask[1, 0, 0, :3] = True  # of the first cell two pixels of four, of the second one
    said = Steered(Flat(), circuit, known, mask).posterior(x, sigma)
    cell = x.view(3, 2, 2, 3, 2).mean((2, 4)).flatten(1)
    n2 = (sigma[:, None].square() / 4).expand(3, 6).clone()
    value = cell.clone()
    for k, (count, seen) in enumerate(((2, known[1, 0, 0, :2].mean()), (1, known[1, 0, 0, 2]))):
        doubt = (2 / 10_000) ** 2 / 12 + within**2 * (1 / count - 1 / 4)
        n2[1, k] = 1 / (4 / 30.0**2 + 1 / doubt)
        value[1, k] = n2[1, k] * (cell[1, k] * 4 / 30.0**2 + seen / doubt)
    mean, variance = exact_mixture(value, n2)
    torch.testing.assert_close(said.mean.flatten(1), mean, atol=1e-5, rtol=0)
    torch.testing.assert_close(said.variance.flatten(1), variance, atol=1e-5, rtol=1e-4)


def test_an_image_larger_than_the_grid_is_steered_in_its_middle() -> None:
    circuit = mixture(2, 3, 2)
    x = 30 * image(2, 3, 9, 11)
    steered = Steered(Flat(), circuit, torch.zeros_like(x), torch.zeros_like(x, dtype=torch.bool))
    change = steered.denoise(x, torch.tensor(30.0)) - 0.25
    edge = change.clone()
    edge[:, :, 2:6, 2:8] = 0
    assert float(edge.abs().max()) == 0 and float(change.abs().min(0).values[0, 2:6, 2:8].min()) > 0
    inside = Steered(Flat(), circuit, torch.zeros(2, 1, 4, 6), torch.zeros(2, 1, 4, 6, dtype=torch.bool))
    wanted = inside.denoise(x[:, :, 2:6, 2:8], torch.tensor(30.0)) - 0.25
    torch.testing.assert_close(change[:, :, 2:6, 2:8], wanted)


def test_below_the_stop_it_is_the_prior_itself() -> None:
    prior = GaussianPrior.smooth((1, H, W), 1.5, 0.4)
    steered = Steered(prior, mixture(), torch.zeros(3, 1, H, W), NOTHING, sigma_stop=20.0)
    x, sigma = 20 * image(), torch.tensor([20.0, 21.0, 5.0])
    plain, out = prior.denoise(x, sigma), steered.denoise(x, sigma)
    assert torch.equal(out[[0, 2]], plain[[0, 2]]) and (out[1] - plain[1]).abs().max() > 1e-3
    assert torch.equal(steered.denoise(x, torch.tensor(3.0)), prior.denoise(x, torch.tensor(3.0)))


def test_a_pure_function_of_each_slice_that_wraps_a_chunked_prior() -> None:
    prior = GaussianPrior.smooth((1, H, W), 1.5, 0.4)
    known, mask = image(3, 4), NOTHING.clone()
    mask[1, :, :, :2] = True
    steered = Steered(Chunked(prior, 2), mixture(), known, mask)
    x, sigma = 30 * image(), torch.tensor([30.0, 60.0, 90.0])
    out = steered.denoise(x, sigma)
    assert torch.equal(out, steered.denoise(x, sigma))
    for k in range(3):
        alone = Steered(prior, mixture(), known[k : k + 1], mask[k : k + 1])
        torch.testing.assert_close(alone.denoise(x[k : k + 1], sigma[k]), out[k : k + 1], atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="goes outside a chunked one"):
        Chunked(steered, 2).denoise(x, sigma)


def test_it_is_differentiable() -> None:
    """Autograd against differences, through the circuit."""
    circuit = mixture()
    known = torch.zeros(1, 1, H, W, dtype=torch.float64)
    mask = NOTHING[:1].clone()
    mask[..., 0] = True
    steered = Steered(Flat(), circuit, known, mask, sigma_stop=0.5)
    x = image(1).double()
    assert torch.autograd.gradcheck(lambda v: steered.denoise(v, torch.tensor(1.5).double()), x.requires_grad_())


def test_steering_leads_a_sampler_to_what_goes_with_the_known() -> None:
    """A base prior of two kinds; one pixel tells which, and the plain sampler does not listen."""
    known, mask = torch.full((40, 1, H, W), -0.6), torch.zeros(40, 1, H, W, dtype=torch.bool)
    mask[:, :, 0, 0] = True
    base = exact_prior()
    sampler = DDIM(steps=60, sigma_max=100.0)
    shares = []
    for prior in (base, Steered(base, mixture(), known, mask, sigma_stop=1.0)):
        *_, end = iterate(sampler, unconditional((40, 1, H, W), prior, KeyedNoise(1)).problem)
        shares.append(float((end.x.mean((1, 2, 3)) < 0).float().mean()))
    assert shares[0] < 0.35 and shares[1] > shares[0] + 0.15  # at most 0.2 of the weight is the circuit's


def exact_prior() -> Any:
    from invdiff.priors.gaussian import GaussianMixturePrior

    parts = [
        GaussianPrior(torch.full((1, H, W), float(m)), torch.full((H * W,), float(s) ** 2))
        for m, s in zip(MEAN[0], STD[0], strict=True)
    ]
    return GaussianMixturePrior(parts, [0.3, 0.7])


class Described(Flat):
    info = PriorInfo("other", "a.u.", 0.0, 2.0, 0.01, 100.0, 0.5, (0.0, 0.0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Steered(Described(), mixture(), torch.zeros(3, 1, H, W), NOTHING), "1 a.u., prior 'other' of 0 to 2"),
        (lambda: Steered(Flat(), mixture(), torch.zeros(3, 2, H, W), NOTHING), r"known pixels \(3, 2, 4, 5\)"),
        (lambda: Steered(Flat(), mixture(), torch.zeros(3, 1, H, W), NOTHING[:2]), r"a mask \(2, 1, 4, 5\)"),
        (lambda: Steered(Flat(), mixture(), torch.zeros(3, 1, H, W), NOTHING, -1.0), "sigma_stop is -1.0"),
        (lambda: ImageCircuit(mixture().circuit, grid(2, 3, 1)), "20 variables, the grid 2 x 3"),
        (lambda: grid(0, 3, 1), "rows is 0"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_circuit_fits_the_prior_of_its_name_and_beats_its_baselines(name: str) -> None:
    over_codes = name.endswith("-codes")
    circuit = codes.load(name) if over_codes else load_circuit(name)
    check_range(circuit, load_prior(name.removesuffix("-codes")).info)
    x = torch.full((1, circuit.info.rows * circuit.info.columns), MISSING)
    assert abs(float(circuit.circuit.log_likelihood(x))) < 1e-2
    folder = Path(invdiff.circuits.__file__).parent / "weights" / name
    told = json.loads((folder / "config.json").read_text())
    bits = told["held_out_bits_per_code" if over_codes else "held_out_bits_per_cell"]
    assert bits["circuit"] < bits["chow-liu"] < bits["factorised"]
    assert sum(f.stat().st_size for f in folder.iterdir()) < 40e6


def test_brain_mr_is_shipped() -> None:
    assert "brain-mr" in shipped()
