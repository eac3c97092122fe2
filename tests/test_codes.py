"""Circuits over the codes of an autoencoder, and steering by them."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from invdiff import circuits
from invdiff.circuits import Categorical, GridInfo, codes, factorised, full_batch, k_means_start, quad_tree
from invdiff.circuits.autoencoder import Autoencoder, AutoencoderConfig, train_autoencoder
from invdiff.circuits.codes import LEAST_DEVIATION, CodeCircuit, code_bits
from invdiff.noise import KeyedNoise
from invdiff.priors import SteeredByCodes
from invdiff.priors.steered import theirs_share

CONFIG = AutoencoderConfig((8, 12), 1, 9, 3)
INFO = GridInfo("toy", "a.u.", 0.0, 1.0, 3, 4, 4, 9, 0.0)
LEVELS = torch.tensor([-0.8, -0.2, 0.3, 0.9])


def images(step: int, count: int = 12) -> Tensor:
    """Patches of four grey levels; all of an image are of one level or the next."""
    g = torch.Generator().manual_seed(step)
    level = torch.randint(3, (count, 1), generator=g) + (torch.rand(count, 12, generator=g) < 0.3)
    cells = LEVELS[level].view(count, 1, 3, 4)
    return cells.repeat_interleave(4, 2).repeat_interleave(4, 3)


@cache
def learned() -> CodeCircuit:
    """Trained on the toy images, once for all tests."""
    autoencoder = train_autoencoder(CONFIG, images, 250, rate=5e-3)
    seen = autoencoder.codes(images(9001, 400))
    inputs = Categorical(torch.zeros(1, 1, CONFIG.codes).log_softmax(-1))
    circuit = k_means_start(quad_tree(3, 4), inputs, seen, 4, 0.3, seed=0).circuit
    for _ in range(25):
        circuit, _ = full_batch(circuit, [seen], 0.3)
    return CodeCircuit(autoencoder, circuit, INFO)


def test_the_autoencoder_learns_and_its_codes_say_which_patch() -> None:
    autoencoder, x = learned().autoencoder, images(5)
    found = autoencoder.codes(x)
    assert found.shape == (12, 12) and len(found.unique()) >= 4
    error = (autoencoder.decoded(found, 4) - x).abs().mean()
    assert error < 0.5 * (x - x.mean()).abs().mean()
    torch.testing.assert_close(autoencoder(x)[0], autoencoder.decoded(found, 4), atol=1e-5, rtol=0)
    vectors, book = autoencoder.vectors(x), autoencoder.net.quantizer.quantizer.embedding.weight
    by_hand = (vectors[3, 5] - book[7]).square().mean().sqrt()
    assert abs(float(autoencoder.distances(x)[3, 5, 7] - by_hand)) < 1e-5


def test_the_training_repeats_and_a_seed_is_a_seed() -> None:
    a, b, c = (train_autoencoder(CONFIG, images, 2, seed=s) for s in (0, 0, 1))
    same = [torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True)]
    assert all(same) and not torch.equal(next(a.parameters()), next(c.parameters()))
    with pytest.raises(FloatingPointError, match="at step 0; lower the rate"):
        train_autoencoder(CONFIG, lambda k: images(k) * float("nan"), 2)


def test_a_learned_circuit_knows_that_codes_go_together() -> None:
    circuit = learned()
    held = circuit.autoencoder.codes(images(777, 200))
    inputs = Categorical(torch.zeros(1, 1, CONFIG.codes).log_softmax(-1))
    alone = replace(circuit, circuit=factorised(inputs, circuit.autoencoder.codes(images(9001, 400)), 0.3))
    assert code_bits(circuit, held) < code_bits(alone, held) - 0.2


def test_the_evidence_is_sharp_where_pixels_are_known() -> None:
    circuit, x = learned(), images(3, 2)
    known = torch.zeros_like(x)
    known[:, :, :4, :4], known[:, :, :4, 4:6] = 1, 1  # the first patch, and half of the second
    w = circuit.evidence(x, known)
    rms = circuit.autoencoder.distances(x)
    torch.testing.assert_close(w[:, 0], -rms[:, 0] / 0.01)
    torch.testing.assert_close(w[:, 1], -rms[:, 1] / 0.755)
    torch.testing.assert_close(w[:, 2:], -rms[:, 2:] / 1.5)


def test_draws_are_joint_frozen_and_follow_the_known() -> None:
    circuit, x = learned(), images(8, 60)
    known = torch.zeros_like(x)
    known[:, :, :8] = 1
    blank = torch.where(known > 0, x, 0.0)
    w = torch.where(known[:, :, 2::4, 2::4].flatten(1)[..., None] > 0, circuit.evidence(blank, known), 0.0)
    said, again = (circuit.posterior(w, KeyedNoise(3)) for _ in range(2))
    assert torch.equal(said.mean, again.mean) and not torch.equal(said.mean, circuit.posterior(w, KeyedNoise(4)).mean)
    assert float(said.variance.min()) >= 0.999 * LEAST_DEVIATION**2
    hidden = (slice(None), slice(None), slice(8, 12))
    error = (said.mean - x)[hidden].square().mean()
    assert error < 0.5 * (x[hidden] - x[hidden].mean()).square().mean()
    with pytest.raises(ValueError, match="draws is 1"):
        circuit.posterior(w, KeyedNoise(0), 1)


def test_folder_round_trip(tmp_path: Path) -> None:
    circuit, x = learned(), images(6, 5)
    codes.save(tmp_path / "c", circuit)
    again = codes.load(tmp_path / "c")
    assert torch.equal(again.autoencoder.codes(x), circuit.autoencoder.codes(x)) and len(again.sha256) == 64
    assert abs(code_bits(again, again.autoencoder.codes(x)) - code_bits(circuit, again.autoencoder.codes(x))) < 0.01
    with pytest.raises(ValueError, match="is a circuit over codes"):
        circuits.load(tmp_path / "c")
    circuits.images.save(tmp_path / "d", circuits.ImageCircuit(circuit.circuit, circuit.info))
    with pytest.raises(ValueError, match="over the cells of an image"):
        codes.load(tmp_path / "d")


class Flat:
    channels = 1

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        return torch.full_like(x, 0.1) + 0 * x


def test_steering_is_the_geometric_mean_with_the_decoded_draws() -> None:
    circuit, known = learned(), images(4, 3)
    mask = torch.zeros_like(known, dtype=torch.bool)
    mask[:, :, :8] = True
    x, sigma, noise = 30 * torch.randn(known.shape), torch.tensor([30.0, 60.0, 10.0]), KeyedNoise(1)
    steered = SteeredByCodes(Flat(), circuit, known, mask, noise, sigma_stop=25.0)
    out = steered.denoise(x, sigma)
    said = circuit.posterior(circuit.evidence(torch.where(mask, known, 0.1), mask), noise)
    wanted = 0.1 + theirs_share(sigma, 0.5, said.variance) * (said.mean - 0.1)
    assert torch.equal(out[mask], torch.full_like(out[mask], 0.1))
    torch.testing.assert_close(out[:2][~mask[:2]], wanted[:2][~mask[:2]])
    assert torch.equal(out[2], torch.full_like(out[2], 0.1))  # below the stop
    assert torch.equal(out, steered.denoise(x, sigma))


def test_beyond_the_grid_nothing_is_steered() -> None:
    circuit = learned()
    known = torch.zeros(2, 1, 15, 18)
    steered = SteeredByCodes(Flat(), circuit, known, torch.zeros_like(known, dtype=torch.bool), KeyedNoise(0))
    change = (steered.denoise(torch.randn(known.shape), torch.tensor(50.0)) - 0.1).abs()
    inside = change[:, :, 1:13, 1:17].clone()
    change[:, :, 1:13, 1:17] = 0
    assert float(change.max()) == 0 and float(inside.min()) > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AutoencoderConfig(()), "at least one level"),
        (lambda: AutoencoderConfig(codes=1), "2 codes"),
        (lambda: replace(learned(), info=replace(INFO, block=8)), "of stride 4 with 9 codes and a circuit of 12"),
        (
            lambda: SteeredByCodes(Flat(), learned(), torch.zeros(1, 2, 12, 16), torch.zeros(1), KeyedNoise()),
            "1, 2, 12",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_any_size_of_patch() -> None:
    config = AutoencoderConfig((4, 4, 4), 1, 5, 2)
    x = torch.randn(2, 1, 24, 16)
    assert config.stride == 8 and Autoencoder(config).codes(x).shape == (2, 6)
