"""Priors: the network for any size, the folder, exact resume of training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from invdiff.priors import GaussianPrior, PriorInfo, load, shipped
from invdiff.priors.edm import draw_sigma, edm_denoise, edm_loss
from invdiff.priors.model import NetworkPrior, save
from invdiff.priors.network import UNet, UNetConfig

SMALL = UNetConfig(unshuffle=2, channels=(8, 16), blocks=(1, 1), norm_groups=4)
INFO = PriorInfo("toy", "HU", -1000.0, 1000.0, 0.01, 50.0, 0.5, (1.0, 2.0))


def small_network(seed: int = 0) -> UNet:
    torch.manual_seed(seed)
    network = UNet(SMALL).eval().requires_grad_(False)
    for p in network.parameters():  # the output layer starts at zero: fill it, or every output is zero
        if float(p.abs().max()) == 0:
            p.copy_(0.1 * torch.randn(p.shape))
    return network


def test_edm_denoise_is_exact_for_a_gaussian() -> None:
    """For N(0, sigma_data^2) the optimal F is zero, and D the closed form."""

    class Zero(torch.nn.Module):
        def forward(self, x: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(x)

    x = torch.randn(3, 1, 4, 5, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.1, 1.0, 7.0])
    prior = GaussianPrior(torch.zeros(1, 4, 5), torch.full((20,), 0.25))
    torch.testing.assert_close(edm_denoise(Zero(), x, sigma, 0.5), prior.denoise(x, sigma))


def test_edm_weight_makes_the_loss_that_of_f() -> None:
    class Constant(torch.nn.Module):
        def forward(self, x: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
            return torch.full_like(x, 0.3)

    g = torch.Generator().manual_seed(2)
    clean, sigma = torch.randn(2, 1, 3, 7, generator=g), torch.tensor([0.05, 3.0])
    s = sigma[:, None, None, None]
    noisy = clean + s * torch.randn(clean.shape, generator=g)
    total = (s.square() + 0.25).sqrt()
    target = (clean - noisy * 0.25 / total.square()) / (s * 0.5 / total)
    wanted = (target - 0.3).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(
        edm_loss(edm_denoise(Constant(), noisy, sigma, 0.5), clean, sigma, 0.5), wanted, rtol=1e-4, atol=1e-5
    )


def test_training_sigmas_cover_the_range() -> None:
    g = torch.Generator().manual_seed(0)
    s = draw_sigma(torch.rand(20000, generator=g), torch.randn(20000, generator=g), -1.0, 1.0, 0.002, 100.0, 0.2)
    assert float(s.min()) >= 0.002 and float(s.max()) <= 100
    assert float(s.log().median()) == pytest.approx(-1.0, abs=0.1)
    assert float((s > 30).float().mean()) == pytest.approx(0.2 * np.log(100 / 30) / np.log(50000), rel=0.3)


@pytest.mark.parametrize("size", [(16, 16), (17, 19), (8, 30), (5, 6)])
def test_network_takes_any_size(size: tuple[int, int]) -> None:
    prior = NetworkPrior(small_network(), INFO)
    x = torch.randn(2, 1, *size, generator=torch.Generator().manual_seed(1))
    out = prior.denoise(x, torch.tensor(0.5))
    assert out.shape == x.shape and bool(torch.isfinite(out).all())
    assert (out[0] - x[0]).abs().max() > 1e-3


def test_slices_are_independent_and_gradients_flow() -> None:
    prior = NetworkPrior(small_network(), INFO)
    x = torch.randn(3, 1, 12, 20, generator=torch.Generator().manual_seed(1))
    sigma = torch.tensor([0.1, 0.5, 2.0])
    together = prior.denoise(x, sigma)
    torch.testing.assert_close(prior.denoise(x[1:2], sigma[1]), together[1:2], atol=1e-4, rtol=1e-4)
    leaf = x.clone().requires_grad_()
    prior.denoise(leaf, sigma)[0].sum().backward()
    assert leaf.grad is not None
    assert float(leaf.grad[0].abs().max()) > 0 and float(leaf.grad[1:].abs().max()) == 0


def test_folder_round_trip_and_what_is_refused(tmp_path: Path) -> None:
    network = small_network()
    save(tmp_path / "toy", network, INFO, {"images_seen": 12})
    prior = load(tmp_path / "toy")
    x = torch.randn(1, 1, 16, 18, generator=torch.Generator().manual_seed(1))
    # weights are stored as float16
    wanted = NetworkPrior(network, INFO).denoise(x, torch.tensor(0.3))
    torch.testing.assert_close(prior.denoise(x, torch.tensor(0.3)), wanted, atol=5e-3, rtol=5e-3)
    assert prior.info == INFO
    assert sorted(p.name for p in (tmp_path / "toy").iterdir()) == ["config.json", "weights.safetensors"]
    with pytest.raises(ValueError, match=r"no prior 'nonesuch': give one of brain-mr, ct"):
        load("nonesuch")
    config = tmp_path / "toy" / "config.json"
    document = json.loads(config.read_text())
    config.write_text(json.dumps(document | {"sha256": "0" * 64}))
    with pytest.raises(ValueError, match=r"config.json names 000000000000"):
        load(tmp_path / "toy")
    with pytest.raises(ValueError, match="low must be below high"):
        PriorInfo("x", "HU", 1.0, 1.0, 0.1, 1.0, 0.5, (1.0, 2.0))


def test_shipped_prior_denoises_what_it_says() -> None:
    assert "ct" in shipped()
    prior = load("ct")
    assert (prior.info.unit, prior.info.low, prior.info.high) == ("HU", -1000.0, 2000.0)
    # A soft-tissue disc in air: a prior that learned anything takes most of the noise away
    h = torch.arange(96.0) - 48
    disc = torch.where(h[:, None] ** 2 + h**2 < 30**2, 40.0, -1000.0)
    x = ((disc - 500) / 1500)[None, None]
    noisy = x + 0.2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    error = (prior.denoise(noisy, torch.tensor(0.2)) - x).square().mean().sqrt()
    assert float(error) < 0.05  # a quarter of the noise
