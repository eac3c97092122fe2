"""``invdiff train-circuit`` over codes: both stages resume bit-equal, what is shipped is whole, bad input is told."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from invdiff.circuits import bits_per_dimension, codes, shipped
from invdiff.circuits.autoencoder import AutoencoderConfig, autoencoder_step, start_autoencoder
from invdiff.circuits.codes import code_bits
from invdiff.noise import KeyedNoise
from invdiff.pipelines import train_autoencoder, train_circuit
from invdiff.pipelines.circuit_draws import Draws
from invdiff.pipelines.circuit_plan import plan_of
from invdiff.pipelines.train_autoencoder import reconstruction
from invdiff.priors.slices import Slices

CONFIG = """
[circuit]
name = "toy"
over = "codes"
unit = "HU"
low = -1000.0
high = 1000.0
rows = 3
columns = 4
states = 3
bins = 3
{circuit}

[autoencoder]
channels = [4, 6]
codes = 7
width = 3
steps = {steps}
batch = 5
crop = 8
rate = 0.002
warm = 3
every = 4
{autoencoder}

[training]
start = "{start}"
steps = 5
batch = 9
images = 40
every = 2
held_out = 0.3
shift = 1
"""
FILES = ("circuit/weights.safetensors", "circuit/config.json", "circuit/README.md", "log.csv", "autoencoder.csv")


def slices_file(path: Path) -> Path:
    rng = np.random.default_rng(0)
    coarse = rng.normal(0, 300, (16, 3, 4))
    x = np.repeat(np.repeat(coarse, 4, 1), 4, 2) + rng.normal(0, 40, (16, 12, 16)) - 300
    with h5py.File(path / "a.h5", "w") as f:
        f["slices"] = x.astype(np.int16)
        f["subject"] = np.repeat([f"s{k}".encode() for k in range(4)], 4)
        f["pixel_mm"] = np.full(16, 1.5, np.float32)
    return path


def config(path: Path, start: str = "distilled", steps: int = 10, circuit: str = "", autoencoder: str = "") -> Path:
    path.write_text(CONFIG.format(start=start, steps=steps, circuit=circuit, autoencoder=autoencoder))
    return path


def command(folder: Path, toml: Path, out: str, *more: str) -> tuple[object, ...]:
    return ("train-circuit", toml, "--data", slices_file(folder), "-o", folder / out, *more)


def test_both_stages_resume_bit_equal(tmp_path: Path, here: Any, monkeypatch: Any) -> None:
    toml = config(tmp_path / "c.toml")
    assert here(*command(tmp_path, toml, "a")) == (0, "")
    calls: dict[str, int] = {"autoencoder": 0, "circuit": 0}
    step, em = train_autoencoder.autoencoder_step, train_circuit.stepwise

    def signalled(*words: Any) -> Any:
        calls["autoencoder"] += 1
        if calls["autoencoder"] == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return step(*words)

    def stopped(*words: Any) -> Any:
        calls["circuit"] += 1
        if calls["circuit"] == 4:
            raise KeyboardInterrupt
        return em(*words)

    monkeypatch.setattr(train_autoencoder, "autoencoder_step", signalled)
    monkeypatch.setattr(train_circuit, "stepwise", stopped)
    code, said = here(*command(tmp_path, toml, "b"))
    assert code == 130 and "with --resume it goes on" in said and not (tmp_path / "b" / "state.pt").exists()
    assert here(*command(tmp_path, toml, "b", "--resume"))[0] == 130
    assert (tmp_path / "b" / "state.pt").exists()
    assert here(*command(tmp_path, toml, "b", "--resume")) == (0, "")
    assert calls == {"autoencoder": 10, "circuit": 6}  # each step once, but the one at which the circuit stopped
    for file in FILES:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    assert (tmp_path / "a" / "autoencoder.csv").read_text().count("\n") == 4
    made, document = codes.load(tmp_path / "a" / "circuit"), json.loads((tmp_path / "a" / FILES[1]).read_text())
    assert made.autoencoder.config == AutoencoderConfig((4, 6), 1, 7, 3) and (made.info.rows, made.info.block) == (3, 4)
    assert set(document["held_out_bits_per_code"]) == {"circuit", "factorised", "chow-liu"}
    assert document["reconstruction"]["used"] > 1 and (tmp_path / "a" / "circuit" / "samples.png").is_file()


def test_another_start_takes_over_the_autoencoder(tmp_path: Path, here: Any) -> None:
    """Its checkpoint depends on nothing of the circuit's learning; the circuit's does on the autoencoder."""
    for out, start in (("a", "distilled"), ("b", "k-means")):
        toml = config(tmp_path / f"{out}.toml", start)
        assert here(*command(tmp_path, toml, out, *(["--resume"] if out == "b" else [])))[0] == 0
        (tmp_path / "b").mkdir(exist_ok=True)
        (tmp_path / "b" / "autoencoder.pt").write_bytes((tmp_path / "a" / "autoencoder.pt").read_bytes())
    a, b = (codes.load(tmp_path / k / "circuit") for k in "ab")
    assert all(torch.equal(p, q) for p, q in zip(a.autoencoder.parameters(), b.autoencoder.parameters(), strict=True))
    assert not torch.equal(a.circuit.weights, b.circuit.weights)
    said = here(*command(tmp_path, config(tmp_path / "d.toml", "k-means", steps=11), "b", "--resume"))[1]
    assert "autoencoder.steps is 10 there, 11 now" in said
    assert "holds a run already" in here(*command(tmp_path, config(tmp_path / "c.toml"), "b"))[1]
    (tmp_path / "b" / "autoencoder.pt").unlink()
    said = here(
        *command(tmp_path, config(tmp_path / "e.toml", "k-means", 10, autoencoder="residual = 2"), "b", "--resume")
    )[1]
    assert "autoencoder.residual is 1 there, 2 now" in said


def test_a_code_book_is_used_though_it_starts_far_away() -> None:
    """Codes that nothing is near to are put where vectors are."""
    g = torch.Generator().manual_seed(0)
    x = (2 * torch.rand(12, 1, 3, 4, generator=g) - 1).repeat_interleave(4, 2).repeat_interleave(4, 3)
    state = start_autoencoder(AutoencoderConfig((4, 6), 1, 7, 3), 2e-3, seed=0)
    state.model.net.quantizer.quantizer.embedding.weight.fill_(1e3)
    for _ in range(10):
        state, loss = autoencoder_step(state, x, 2e-3, 60)
    assert loss < 10 and len(state.model.eval().codes(x).unique()) >= 5
    state.model.train().net.quantizer.quantizer.ema_cluster_size[:5] = 0
    state.model.net.quantizer.quantizer.embedding.weight[:5] = 1e3
    state.model.net.quantizer.quantizer.ema_w[:5] = 0
    for _ in range(13):
        state, _ = autoencoder_step(state, x, 2e-3, 60)
    assert float(state.model.book.abs().max()) < 100
    with pytest.raises(FloatingPointError, match="at step 23; lower the rate"):
        autoencoder_step(state, x * float("nan"), 2e-3, 60)


def test_crops_are_of_the_grid_and_keyed() -> None:
    x = np.arange(6 * 20 * 30).reshape(6, 20, 30).astype(np.float32)
    plan = plan_of(Path(__file__).parent.parent / "examples" / "train-circuit-ct-codes.toml")
    assert plan.autoencoder is not None and plan.circuit.block == plan.autoencoder.sizes.stride
    info = plan.circuit.info(0.0, (1.0, 1.0))
    draws = Draws(Slices(x, np.arange(6), np.ones(6, np.float32)), info, plan.training)
    crops = draws.crops(3, 5, 128)
    assert crops.shape == (5, 1, 128, 128) and torch.equal(crops[:3], draws.crops(3, 3, 128))
    assert not torch.equal(crops, draws.crops(4, 5, 128)) and bool((crops == -1).any())


@pytest.mark.parametrize(
    ("circuit", "autoencoder", "message"),
    [
        ("levels = 64", "", "circuit.levels is given and the circuit is over codes; the autoencoder decides it"),
        ("block = 4", "", "circuit.block is given"),
        ("", "crop = 10", "autoencoder.crop 10; more than 0 and a multiple of the stride 4"),
        ("", "crop = 16", "autoencoder.crop is 16; at most the grid's 12"),
        ("", "code = 3", "autoencoder has no field 'code'"),
        ("", "batch = 0", "autoencoder.batch is 0; at least 1"),
    ],
)
def test_bad_input_gets_one_sentence(circuit: str, autoencoder: str, message: str, tmp_path: Path, here: Any) -> None:
    toml = config(tmp_path / "c.toml", circuit=circuit)
    key = autoencoder.partition(" ")[0]
    lines = [w for w in toml.read_text().splitlines() if not key or not w.startswith(f"{key} =") or "[training]" in w]
    head, _, tail = "\n".join(lines).partition("[training]")
    toml.write_text(f"{head}{autoencoder}\n[training]{tail}")
    code, said = here(*command(tmp_path, toml, "a"))
    assert code == 2 and message in said, said


def test_cells_have_no_autoencoder(tmp_path: Path, here: Any) -> None:
    toml = config(tmp_path / "c.toml")
    toml.write_text(toml.read_text().replace('over = "codes"', ""))
    assert "[autoencoder] and a circuit over cells" in here(*command(tmp_path, toml, "a"))[1]
    toml.write_text(config(toml, "chance").read_text())
    assert "training.start is 'chance'; one of k-means, distilled" in here(*command(tmp_path, toml, "a"))[1]


@pytest.mark.parametrize("name", [n for n in shipped() if n.endswith("-codes")])
def test_what_is_shipped_is_whole(name: str, tmp_path: Path) -> None:
    """Codes of a body are decoded to what they were of, draws are images of the range, and saving loses little."""
    made = codes.load(name)
    info = made.info
    edge = info.rows * info.block
    assert edge == 256 and sum(p.stat().st_size for p in codes.folder_of(name).iterdir()) < 40e6
    row, column = torch.meshgrid(*[torch.linspace(-1, 1, edge)] * 2, indexing="ij")
    x = torch.where((row / 0.7).square() + (column / 0.6).square() < 1, -0.3, -1.0)[None, None]
    with torch.no_grad():
        decoded = made.autoencoder.decoded(made.autoencoder.codes(x), info.columns)
        assert float((decoded - x).abs().mean()) < 0.1
        free = torch.zeros(2, info.rows * info.columns, info.levels)
        drawn = made.circuit.sample(free, KeyedNoise(0))
        assert len(drawn.unique()) > 20
        assert reconstruction(made.autoencoder, x)["psnr"] > 15
    assert code_bits(made, drawn) < 8 and abs(code_bits(made, drawn) - bits_per_dimension(made.circuit, drawn)) < 1e-3
    codes.save(tmp_path / "c", made)
    assert torch.equal(codes.load(tmp_path / "c").autoencoder.codes(x), made.autoencoder.codes(x))


def test_both_kinds_are_shipped() -> None:
    assert {"brain-mr", "brain-mr-codes", "ct", "ct-codes"} <= set(shipped())
