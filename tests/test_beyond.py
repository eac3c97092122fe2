"""Sinograms completed by a circuit, against closed forms; the examples run."""

from __future__ import annotations

import importlib.util
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from invdiff.circuits import Categorical, Circuit, Gaussian, GridInfo, ImageCircuit, Structure
from invdiff.circuits.sinograms import completed, weights_of
from invdiff.datasets import Volume
from invdiff.priors import load as load_prior

ROWS, COLUMNS, BLOCK = 2, 3, 2
V = ROWS * COLUMNS
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def info(levels: int, within: float = 0.0) -> GridInfo:
    return GridInfo("toy", "line integral", 0.0, 4.0, ROWS, COLUMNS, BLOCK, levels, within)


def tree(levels: int = 3) -> Circuit:
    """Six variables of two states along a tree, random."""
    g = torch.Generator().manual_seed(0)
    structure = Structure((-1, 0, 0, 1, 1, 2), tuple(range(V)))
    table = torch.randn(V, 2, levels, generator=g, dtype=torch.float64).log_softmax(-1)
    weights = torch.randn(V, 2, 2, generator=g, dtype=torch.float64).softmax(-1)
    return Circuit(structure, Categorical(table), torch.tensor([0.3, 0.7]).double(), weights)


def views(level: list[int], levels: int = 3) -> Tensor:
    """A sinogram (1 1 5 8), larger than the grid, whose cells are in the middles of these levels."""
    x = (torch.tensor(level).double() + 0.5) * 4 / levels
    y = torch.full((1, 1, 5, 8), 0.7, dtype=torch.float64)
    y[:, :, :4, 1:7] = x.view(1, 1, ROWS, COLUMNS).repeat_interleave(2, 2).repeat_interleave(2, 3)
    return y


def test_missing_cells_are_the_posterior_by_enumeration() -> None:
    """Mean and variance of every missing cell over all 3^6 sinograms, given the cells that were measured."""
    circuit, known = tree(), {0: 2, 3: 0, 4: 1}
    everything = torch.tensor(list(itertools.product(range(3), repeat=V)))
    p = circuit.log_likelihood(everything).exp()
    assert abs(float(p.sum()) - 1) < 1e-9
    for variable, level in known.items():
        # the circuit's evidence of a level is Gaussian round its middle, of a quarter of its width at least
        w = torch.exp(-0.5 * ((everything[:, variable] - level) / 0.25) ** 2 / max(1.0, 16 / 12))
        p = p * w
    p = p / p.sum()
    value = (everything.double() + 0.5) * 2 / 3 - 1
    mean = (p[:, None] * value).sum(0)
    variance = (p[:, None] * (value - mean).square()).sum(0) + (2 / 3) ** 2 / 12
    y, keep = views([2, 1, 1, 0, 1, 0]), torch.zeros(1, 1, 5, 8, dtype=torch.bool)
    for variable in known:
        r, c = 2 * (variable // COLUMNS), 1 + 2 * (variable % COLUMNS)
        keep[:, :, r : r + 2, c : c + 2] = True
    found = completed(ImageCircuit(circuit, info(3, 0.2)), y, keep)
    assert torch.equal(found.y[keep], y[keep]) and float(found.sd[keep].max()) == 0
    for variable in set(range(V)) - set(known):
        sd = found.sd[0, 0, 2 * (variable // COLUMNS), 1 + 2 * (variable % COLUMNS)]
        assert abs(float(sd) - 2 * math.sqrt(4 * float(variance[variable]) + 0.04)) < 1e-5
    # cells at the corners are not mixed with others there: linear between centres, constant beyond
    corner = found.y[0, 0, 0, 5 + 1]
    assert abs(float(corner) - (2 + 2 * float(mean[2]))) < 1e-5
    assert bool(torch.isinf(found.sd[:, :, 4]).all()) and float(found.y[:, :, 4].abs().max()) == 0


def test_what_is_not_known_has_no_weight() -> None:
    """Rays of a missing cell count together as the cell does; measured ones as their noise; others not at all."""
    inputs = Gaussian(torch.zeros(V, 1).double(), torch.full((V, 1), math.log(0.3)).double())
    structure = Structure((-1,), (0,) * V)
    one = torch.ones(1).double()
    circuit = ImageCircuit(Circuit(structure, inputs, one, one.view(1, 1, 1)), info(50))
    keep = torch.zeros(1, 1, 5, 8, dtype=torch.bool)
    keep[:, :, 0:2] = True
    found = completed(circuit, views([0] * V), keep)
    w = weights_of(found, torch.tensor(0.5).double())
    assert torch.allclose(w[keep], torch.tensor(2.0).double())
    cell = w[0, 0, 2:4, 1:3].square().sum()
    assert abs(float(cell) - 4 / (4 * (2 * 0.3) ** 2 + 0.25)) < 1e-6
    assert float(w[0, 0, 4].max()) == 0


def body() -> Volume:
    x = torch.full((1, 1, 32, 32), -1000.0)
    x[:, :, 6:27, 3:29] = 30.0
    x[:, :, 12:16, 14:20] = 700.0
    return Volume(x, np.diag([6.0, 6.0, 5.0, 1.0]), "HU")


def test_the_truncated_field_example_runs(prior: str) -> None:
    found = example("truncated_field").run(body(), load_prior(prior), 90.0, 2)
    assert set(found["images"]) == {"truth", "FBP", "DDS"} and 0.2 < found["kept"] < 0.5
    inside, beside = found["errors"]["DDS"]
    assert found["errors"]["truth"] == [0.0, 0.0] and inside < beside


def test_the_sinogram_example_learns() -> None:
    """More steps know held-out sinograms better; all are of two shapes."""
    g = torch.Generator().manual_seed(0)
    shapes = 4 + 3 * torch.randn(2, 1, 16, 24, generator=g).cumsum(-1).tanh()
    y = shapes[torch.randint(2, (60,), generator=g)] + 0.1 * torch.randn(60, 1, 16, 24, generator=g)
    learn = example("sinogram_circuit").learned
    circuit, bits = learn(y, states=4, steps=6)
    assert bits < 3.0 and circuit.info.rows == 2 and circuit.info.columns == 3
    keep = torch.ones(16, 24, dtype=torch.bool)
    keep[8:] = False
    found = completed(circuit, y[:4], keep)
    error = (circuit.info.pooled(found.y - y[:4]).mean[:, 3:]).abs().max()
    assert float(error) < 0.5


@pytest.mark.parametrize("name", sorted(p.stem for p in EXAMPLES.glob("*.py")))
def test_examples_say_how_they_are_run(name: str) -> None:
    assert f"python examples/{name}.py" in (example(name).__doc__ or "")
