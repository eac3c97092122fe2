"""Priors of MR images: in another unit, and of complex images under a phase, against closed forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from invdiff.noise import KeyedNoise
from invdiff.operators import Diagonal, RealChannels
from invdiff.priors import GaussianPrior, MagnitudePhase, NoPrior, PriorInfo, Rescaled
from invdiff.problem import prepare
from invdiff.reconstruction import reconstruct
from invdiff.samplers import DDS

H, W = 24, 30
SIGMAS = torch.tensor([0.05, 0.4, 3.0])


class Stated:
    """A Gaussian prior of magnitudes with a range: its mean is zero signal outside a disc, bright inside."""

    channels = 1

    def __init__(self, low: float = 0.0, high: float = 1.0) -> None:
        y, x = torch.meshgrid(torch.arange(H) - H / 2, torch.arange(W) - W / 2, indexing="ij")
        self.mean = torch.where(y.square() + x.square() < 90, 0.6, -1.0)[None]
        self.gaussian = GaussianPrior(self.mean, torch.linspace(0.02, 0.3, H * W))
        self.info = PriorInfo("toy", "a.u.", low, high, 1e-3, 100.0, 0.5, (0.8, 1.0))

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.gaussian.denoise(x, sigma)


def noise(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return KeyedNoise(seed)(0, torch.empty(shape))


def channels(z: Tensor) -> Tensor:
    return torch.cat([z.real, z.imag], 1)


def test_rescaled_changes_the_range_alone() -> None:
    prior = Stated()
    scaled = Rescaled(prior, 40.0)
    assert (scaled.info.low, scaled.info.high, scaled.info.unit) == (0.0, 40.0, "a.u.")
    assert scaled.info.sigma_min == prior.info.sigma_min and prior.info.high == 1.0
    x = noise((3, 1, H, W))
    assert torch.equal(scaled.denoise(x, SIGMAS), prior.denoise(x, SIGMAS))
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="a positive number is wanted"):
            Rescaled(prior, bad)
    with pytest.raises(ValueError, match="GaussianPrior states no range"):
        Rescaled(prior.gaussian, 2.0)


@pytest.mark.parametrize("scale", [3e-6, 900.0])
def test_a_reconstruction_moves_with_the_scanners_unit(scale: float) -> None:
    prior = Stated()
    x = (prior.gaussian.draw(2, KeyedNoise(1)) + 1) / 2
    operator = Diagonal(torch.rand(1, 1, H, W, generator=torch.Generator().manual_seed(0)), x.shape, x.dtype)
    y = operator(x)
    one = reconstruct(y, operator, Rescaled(prior, 1.0), DDS(steps=5), 0.01).x
    other = reconstruct(scale * y, operator, Rescaled(prior, scale), DDS(steps=5), scale * 0.01).x
    torch.testing.assert_close(other / scale, one, atol=1e-4, rtol=0)


@pytest.mark.parametrize("angle", [0.0, 2.1, -3.0])
@pytest.mark.parametrize("low_high", [(0.0, 1.0), (-1.0, 5.0)])
def test_under_a_constant_phase_it_is_the_priors_closed_form(angle: float, low_high: tuple[float, float]) -> None:
    """The real part is denoised by the prior, the imaginary part shrunk as a Gaussian, at every noise level."""
    prior = Stated(*low_high)
    two = MagnitudePhase(Rescaled(prior, 7.0), deviation=0.1)
    half = (low_high[1] - low_high[0]) / 2
    zero = -(low_high[1] + low_high[0]) / 2 / half  # no signal, in the prior's units
    assert (two.info.low, two.info.high) == (-7.0 * half, 7.0 * half) and two.channels == 2
    real = (prior.gaussian.draw(3, KeyedNoise(1)) - zero).abs() + 0.5
    checks = torch.where((torch.arange(H)[:, None] + torch.arange(W)) % 2 == 0, 0.2, -0.2)  # no low pass has them
    turn = torch.polar(torch.tensor(1.0), torch.tensor(angle))
    out = two.denoise(channels(torch.complex(real, checks.expand_as(real)) * turn), SIGMAS)
    shrunk = checks * (0.01 / (0.01 + SIGMAS.square()))[:, None, None, None]
    wanted = torch.complex(prior.denoise(real + zero, SIGMAS) - zero, shrunk.expand_as(real)) * turn
    torch.testing.assert_close(out, channels(wanted), atol=2e-4, rtol=0)


def test_a_global_phase_turns_the_answer_and_a_call_remembers_nothing() -> None:
    two = MagnitudePhase(Stated(), 0.1)
    x = noise((3, 2, H, W), 5) + 1
    z = torch.complex(x[:, :1], x[:, 1:])
    out = two.denoise(x, SIGMAS)
    turn = torch.polar(torch.tensor(1.0), torch.tensor(1.3))
    turned = two.denoise(channels(z * turn), SIGMAS)
    torch.testing.assert_close(turned, channels(torch.complex(out[:, :1], out[:, 1:]) * turn), atol=1e-3, rtol=0)
    assert torch.equal(two.denoise(x, SIGMAS), out)
    torch.testing.assert_close(two.denoise(x[1:2], SIGMAS[1]), out[1:2], atol=1e-6, rtol=0)


def test_a_smooth_phase_is_found_in_noise() -> None:
    """Most of the noise goes, and the phase is known better than from a pixel."""
    prior = Stated()
    two = MagnitudePhase(prior, deviation=0.02, width=2.0)
    magnitude = (prior.gaussian.draw(1, KeyedNoise(2)) + 1).abs()
    phase = torch.linspace(-1, 1, W) * torch.linspace(0.5, 1, H)[:, None]
    truth = torch.polar(magnitude, phase.expand_as(magnitude))
    sigma = torch.tensor(0.3)
    noisy = channels(truth) + sigma * noise((1, 2, H, W), 3)
    body = prior.mean[None] > 0
    error = (two.denoise(noisy, sigma) - channels(truth)).square().sum(1, keepdim=True)[body].mean().sqrt()
    assert float(error) < 0.9 * float(sigma)  # noise alone: 1.41 sigma
    angle = two.phasor(noisy, sigma[None]) * torch.polar(torch.ones_like(phase), -phase)
    assert float(angle.angle()[body].abs().mean()) < 0.15


def test_it_is_differentiable_even_where_there_is_nothing() -> None:
    prior = Stated()
    two = MagnitudePhase(prior, 0.1)
    x = (noise((2, 2, H, W), 4) + 0.5).double().requires_grad_()
    direction = noise((2, 2, H, W), 6).double()
    sigma = torch.tensor([0.2, 0.7], dtype=torch.float64)
    (gradient,) = torch.autograd.grad((two.denoise(x, sigma) * direction).sum(), x)
    step = 1e-6 * noise((2, 2, H, W), 7).double()
    ends = [two.denoise(x.detach() + k * step, sigma) for k in (1, -1)]
    change = ((ends[0] - ends[1]) * direction).sum() / 2
    assert float((gradient * step).sum()) == pytest.approx(float(change), rel=1e-4)
    nothing = torch.zeros(1, 2, H, W, requires_grad=True)
    two.denoise(nothing, torch.tensor(0.1)).sum().backward()
    assert nothing.grad is not None and bool(torch.isfinite(nothing.grad).all())


def test_a_complex_image_is_reconstructed_in_the_scanners_unit() -> None:
    """Half the pixels measured: what is missing comes from the magnitude prior, under the right phase."""
    prior, scale = Stated(), 250.0
    magnitude = scale * (prior.gaussian.draw(1, KeyedNoise(2)) + 1).abs() / 2
    truth = torch.polar(magnitude, torch.full_like(magnitude, 0.8))
    kept = (torch.arange(H)[:, None] + 2 * torch.arange(W)) % 3 != 0
    operator = Diagonal(kept[None, None].float(), truth.shape, truth.dtype) @ RealChannels(truth.shape)
    two = MagnitudePhase(Rescaled(prior, scale))
    x = reconstruct(operator.outer(truth), operator, two, DDS(steps=20, eta=0.0, lam=0.0), 0.0).x
    missing = ~kept & (prior.mean[0] > 0)
    error = (torch.complex(x[:, :1], x[:, 1:]) - truth).abs()[0, 0][missing]
    assert float(error.mean()) < 0.3 * scale  # deviations of 0.25 of the scale remain unknown
    assert prepare(operator.outer(truth), operator, two, 0.0).to_physical == (scale / 2, 0.0)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: MagnitudePhase(NoPrior("a.u.", 0, 1, channels=2)), "the prior has 2 channels"),
        (lambda: MagnitudePhase(Stated().gaussian), "states no range"),
        (lambda: MagnitudePhase(Stated(), deviation=-1), "deviation -1"),
        (lambda: MagnitudePhase(Stated()).denoise(torch.zeros(1, 1, H, W), SIGMAS[0]), r"\(s, 2, h, w\) is wanted"),
    ],
)
def test_bad_input_gets_one_sentence(call: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()
