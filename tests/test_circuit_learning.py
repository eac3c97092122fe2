"""Learning circuits: EM against autograd and closed forms, the K-means start, the command, exact resume."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor

from invdiff.circuits import (
    MISSING,
    Categorical,
    Circuit,
    DiscretisedLogistic,
    Gaussian,
    GridInfo,
    ImageCircuit,
    Spot,
    Structure,
    bits_per_dimension,
    chow_liu,
    expected_counts,
    factorised,
    fitted,
    full_batch,
    hidden_chow_liu,
    k_means_start,
    load,
    quad_tree,
    stepwise,
)
from invdiff.circuits.images import bits, save
from invdiff.pipelines.circuit_draws import Draws
from invdiff.pipelines.circuit_over import OverCells
from invdiff.pipelines.circuit_plan import CircuitConfig, CircuitPlan, CircuitTraining, plan_of
from invdiff.pipelines.training_data import DataConfig
from invdiff.priors.slices import Slices

LEVELS = 5
DOUBLE = torch.empty(0, dtype=torch.float64)
ONE: dict[str, Any] = {
    "categorical": Categorical(torch.zeros(1, 1, LEVELS).log_softmax(-1)),
    "logistic": DiscretisedLogistic(torch.full((1, 1), 2.0), torch.zeros(1, 1), LEVELS),
    "gaussian": Gaussian(torch.zeros(1, 1), torch.zeros(1, 1), 0.05),
}


def walk(n: int, v: int, seed: int = 0) -> Tensor:
    """Levels of a random walk along the variables: strongly dependent neighbours."""
    rng = np.random.default_rng(seed)
    steps = rng.integers(-1, 2, (n, v))
    steps[:, 0] = rng.integers(LEVELS, size=n)
    return torch.from_numpy(np.clip(steps.cumsum(1), 0, LEVELS - 1))


def data_of(kind: str, x: Tensor) -> Tensor:
    g = torch.Generator().manual_seed(0)
    return x.double() / 2 + 0.1 * torch.randn(x.shape, generator=g).double() if kind == "gaussian" else x


def started(kind: str, structure: Structure, x: Tensor, states: int = 3) -> Circuit:
    return k_means_start(structure, ONE[kind].to(DOUBLE), x, states, 0.1, seed=0).circuit


@pytest.mark.parametrize("ties", [("none", "none"), ("depth", "all")])
def test_counts_are_the_gradients_of_the_log_likelihood(ties: tuple[str, str]) -> None:
    """Flows are d ln p / d ln parameter (Darwiche 2003)."""
    x = walk(40, 6)
    x[3, 2] = MISSING
    circuit = started("categorical", quad_tree(2, 3).tied(*ties), walk(40, 6, 1))
    leaves = [t.log().requires_grad_() for t in (circuit.root, circuit.weights)]
    table = circuit.inputs.log_table.clone().requires_grad_()  # type: ignore[attr-defined]
    root, weights = (t.exp() for t in leaves)
    copy = Circuit(circuit.structure, Categorical(table), root, weights)
    exact = torch.autograd.grad(copy.log_likelihood(x).sum(), [*leaves, table])
    counts, log_likelihood = expected_counts(circuit, x)
    for got, wanted in zip((counts.root, counts.weights, counts.inputs), exact, strict=True):
        if got.shape[0] == circuit.structure.regions and not circuit.structure.sum_groups:
            got, wanted = got[1:], wanted[1:]  # the root has no parent
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(log_likelihood, circuit.log_likelihood(x))
    assert abs(float(counts.root.sum()) - 40) < 1e-9


@pytest.mark.parametrize("kind", ONE)
@pytest.mark.parametrize("name", ["quad-tree", "hidden-chow-liu"])
def test_full_batch_em_never_loses(kind: str, name: str) -> None:
    x = data_of(kind, walk(300, 6))
    structure = quad_tree(2, 3) if name == "quad-tree" else hidden_chow_liu(x)
    circuit, values = started(kind, structure, x), list[float]()
    for _ in range(12):
        circuit, value = full_batch(circuit, x.split(70), pseudocount=0.0)
        values.append(value)
    assert all(b > a - 1e-6 for a, b in itertools.pairwise(values))
    assert values[-1] > values[0] + 0.05


@pytest.mark.parametrize("kind", ONE)
def test_batches_make_no_difference_to_a_full_batch(kind: str) -> None:
    x = data_of(kind, walk(100, 6))
    circuit = started(kind, quad_tree(2, 3), x)
    whole, parts = full_batch(circuit, [x], 0.5), full_batch(circuit, x.split(33), 0.5)
    torch.testing.assert_close(whole[0].weights, parts[0].weights, rtol=1e-10, atol=1e-12)
    assert abs(whole[1] - parts[1]) < 1e-10


def test_one_state_is_fitted_in_closed_form() -> None:
    x = data_of("gaussian", walk(200, 4))
    found = factorised(ONE["gaussian"].to(DOUBLE), x, 0.0)
    inputs: Any = found.inputs
    torch.testing.assert_close(inputs.mean[:, 0], x.mean(0))
    torch.testing.assert_close(inputs.log_std[:, 0].exp(), x.std(0, correction=0))
    levels = walk(200, 4)
    table = factorised(ONE["categorical"].to(DOUBLE), levels, 0.0).inputs.table.exp()  # type: ignore[attr-defined]
    share = torch.nn.functional.one_hot(levels, LEVELS).double().mean(0)
    torch.testing.assert_close(table[:, 0], share, rtol=1e-9, atol=1e-12)
    assert abs(bits_per_dimension(factorised(ONE["categorical"], levels, 0.0), levels) - entropy(share)) < 1e-5


def entropy(share: Tensor) -> float:
    return float(-torch.special.xlogy(share, share).sum(-1).mean() / math.log(2))


def test_the_logistic_is_fitted_to_its_own_draws() -> None:
    true = DiscretisedLogistic(torch.tensor([[6.3]]).double(), torch.tensor([[0.4]]).double(), 16)
    first = DiscretisedLogistic(torch.tensor([[8.0]]).double(), torch.tensor([[1.0]]).double(), 16)
    counts = 1e6 * true.table.exp()
    for _ in range(5):
        first = first.fitted(counts, 0.0)
    assert abs(float(first.mean - true.mean)) < 1e-3 and abs(float(first.log_scale - true.log_scale)) < 1e-3


def test_a_pseudocount_keeps_every_level_possible() -> None:
    x = walk(50, 4).clamp_max(LEVELS - 2)
    x = torch.cat([x, torch.zeros_like(x)])
    circuit = started("categorical", quad_tree(2, 2), x)
    counts, _ = expected_counts(circuit, x)
    never = torch.full((1, 4), LEVELS - 1)
    assert float(fitted(circuit, counts, 1.0).log_likelihood(never)) > -40
    assert float(fitted(circuit, counts, 0.0).log_likelihood(never)) < -1000
    with pytest.raises(ValueError, match="pseudocount is -1"):
        fitted(circuit, counts, -1.0)


def test_learned_dependence_beats_independence_and_the_tree_of_levels() -> None:
    """On held-out data, with a hidden cause that no tree of the variables alone carries."""
    rng = np.random.default_rng(0)

    def draws(n: int) -> Tensor:
        cause = rng.integers(2, size=(n, 1))
        noisy = np.where(rng.random((n, 9)) < 0.75, 4 * cause, rng.integers(LEVELS, size=(n, 9)))
        return torch.from_numpy(noisy)

    x, held = draws(800), draws(400)
    circuit = started("categorical", hidden_chow_liu(x), x, states=2)
    for _ in range(30):
        circuit, _ = full_batch(circuit, [x], 0.5)
    levels = ONE["categorical"].to(DOUBLE)
    learned, tree, alone = (
        bits_per_dimension(c, held) for c in (circuit, chow_liu(x, LEVELS, 1.0), factorised(levels, x, 1.0))
    )
    assert learned < tree - 0.05 and tree < alone - 0.05


def test_stepwise_em_gets_where_full_batches_get() -> None:
    x = walk(600, 6)
    state = k_means_start(quad_tree(2, 3), ONE["categorical"].to(DOUBLE), x, 3, 0.1, seed=0)
    full = state.circuit
    for _ in range(60):
        full, _ = full_batch(full, [x], 0.1)
    before, rng = bits_per_dimension(state.circuit, x), np.random.default_rng(0)
    for i in range(300):
        some = torch.from_numpy(rng.choice(600, 60, replace=False))
        state, _ = stepwise(state, x[some], (i + 2) ** -0.7, 600, 0.1)
    after, best = bits_per_dimension(state.circuit, x), bits_per_dimension(full, x)
    assert after - best < 0.2 * (before - best)
    # A rate of 1 on everything is a full batch
    whole, _ = stepwise(state, x, 1.0, 600, 0.1)
    torch.testing.assert_close(whole.circuit.weights, full_batch(state.circuit, [x], 0.1)[0].weights)
    with pytest.raises(ValueError, match="rate is 0"):
        stepwise(state, x, 0.0, 600, 0.1)


def test_the_start_is_better_than_chance() -> None:
    x = walk(300, 12)
    circuit = started("categorical", quad_tree(3, 4), x, states=4)
    alone = bits_per_dimension(factorised(ONE["categorical"].to(DOUBLE), x, 0.1), x)
    assert bits_per_dimension(circuit, x) < alone - 0.2
    with pytest.raises(ValueError, match="3 images for 4 states"):
        started("categorical", quad_tree(3, 4), x[:3], states=4)


def toy_info(**change: Any) -> GridInfo:
    fields = {"name": "toy", "unit": "HU", "low": -1000.0, "high": 1000.0, "rows": 3, "columns": 4, "block": 2}
    return GridInfo(**{**fields, "levels": LEVELS, "within": 0.1, **change})


@pytest.mark.parametrize("kind", ONE)
def test_folder_round_trip(kind: str, tmp_path: Path) -> None:
    x = data_of(kind, walk(80, 12)).float() if kind == "gaussian" else walk(80, 12)
    circuit = k_means_start(quad_tree(3, 4).tied("depth"), ONE[kind], x, 3, 0.1, seed=0).circuit
    ours = ImageCircuit(circuit, toy_info())
    save(tmp_path / "c", ours, {"steps": 3})
    theirs = load(tmp_path / "c")
    assert theirs.info == ours.info and theirs.circuit.structure == circuit.structure
    assert (theirs.circuit.log_likelihood(x) - circuit.log_likelihood(x)).abs().max() < 0.05
    save(tmp_path / "d", theirs)
    assert (load(tmp_path / "d").circuit.log_likelihood(x) - theirs.circuit.log_likelihood(x)).abs().max() < 0.02
    (tmp_path / "c" / "weights.safetensors").write_bytes((tmp_path / "c" / "weights.safetensors").read_bytes() + b" ")
    with pytest.raises(ValueError, match="has sha256"):
        load(tmp_path / "c")
    with pytest.raises(ValueError, match="no circuit 'nowhere'"):
        load("nowhere")
    (tmp_path / "d" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="was not written by invdiff train-circuit"):
        load(tmp_path / "d")


def test_pooling_in_the_middle_of_any_image() -> None:
    """Cells against loops, for images larger and smaller than the grid, and of pixels that count alone."""
    info = toy_info()
    for h, w in ((6, 8), (9, 13), (5, 6)):
        x = torch.randn(2, 1, h, w, generator=torch.Generator().manual_seed(h))
        counts = (torch.rand(2, 1, h, w, generator=torch.Generator().manual_seed(w)) < 0.6).float()
        top, left = (h - 6) // 2, (w - 8) // 2
        found = info.pooled(x, counts)
        for row in range(3):
            for column in range(4):
                inside = [
                    (r, c)
                    for r in range(top + 2 * row, top + 2 * row + 2)
                    for c in range(left + 2 * column, left + 2 * column + 2)
                    if 0 <= r < h and 0 <= c < w and counts[1, 0, r, c]
                ]
                assert int(found.number[1, 4 * row + column]) == len(inside)
                mean = sum(float(x[1, 0, r, c]) for r, c in inside) / max(1, len(inside))
                assert abs(float(found.mean[1, 4 * row + column]) - mean) < 1e-6


def test_spreading_is_linear_between_centres() -> None:
    info = toy_info()
    ramp = torch.arange(3.0)[:, None] + 10 * torch.arange(4.0)
    x = info.spread(ramp[None], 6, 8)[0, 0]
    row, column = (torch.arange(6.0) - 0.5) / 2, (torch.arange(8.0) - 0.5) / 2
    torch.testing.assert_close(x[1:5, 1:7], (row[:, None] + 10 * column)[1:5, 1:7])
    larger = info.spread(ramp[None], 9, 13)[0, 0]
    torch.testing.assert_close(larger[1:7, 2:10], x)
    assert float(larger[0].abs().max()) == 0
    torch.testing.assert_close(info.spread(ramp[None], 5, 6)[0, 0], x[1:6, 1:7])


def test_discrete_evidence_is_that_of_the_levels() -> None:
    circuit = ImageCircuit(started("categorical", quad_tree(3, 4), walk(80, 12)), toy_info())
    g = torch.Generator().manual_seed(0)
    value = torch.rand(2, 12, generator=g, dtype=torch.float64) * 2 - 1
    variance = torch.full_like(value, 0.3)
    variance[:, 5] = math.inf
    found = circuit.posterior(Spot(value, variance))
    centre = (torch.arange(LEVELS).double() + 0.5) * 2 / LEVELS - 1
    w = -0.5 * (value[..., None] - centre).square() / variance[..., None]
    p = circuit.circuit.marginals(w)
    torch.testing.assert_close(found.mean.flatten(1), p @ centre)
    spread = (p * (centre - (p @ centre)[..., None]).square()).sum(-1) + (2 / LEVELS) ** 2 / 12
    torch.testing.assert_close(found.variance.flatten(1), spread)
    cells = torch.tensor([[-1.0, -0.61, -0.59, 0.0, 0.99, 1.0, 7.0, -3.0, math.nan]])
    assert circuit.info.levels_of(cells).tolist() == [[0, 0, 1, 2, 4, 4, 4, 0, MISSING]]


def test_bits_of_a_density_are_those_of_narrow_levels() -> None:
    g = torch.Generator().manual_seed(0)
    cells = 0.25 * torch.randn(3000, 12, generator=g)
    info = toy_info(levels=64)
    smooth = ImageCircuit(factorised(ONE["gaussian"], cells, 0.0), info)
    first = DiscretisedLogistic(torch.full((1, 1), 32.0), torch.full((1, 1), 1.6), 64)
    levels = ImageCircuit(factorised(first, info.levels_of(cells), 0.0), info)
    exact = math.log2(0.25 * math.sqrt(2 * math.pi * math.e)) - math.log2(2 / 64)
    assert abs(bits(smooth, cells) - exact) < 0.02
    assert 0 < bits(levels, cells) - exact < 0.1  # a logistic is no Gaussian


CONFIG = """
[circuit]
name = "toy"
unit = "HU"
low = -1000.0
high = 1000.0
rows = 4
columns = 5
block = 3
states = 3
levels = 8
{circuit}

[training]
steps = {steps}
batch = 9
images = 40
every = 2
held_out = 0.3
shift = 1
{training}
"""


def slices_file(path: Path, subjects: int = 4) -> Path:
    rng = np.random.default_rng(0)
    coarse = rng.normal(0, 300, (4 * subjects, 4, 5))
    x = np.repeat(np.repeat(coarse, 3, 1), 3, 2) + rng.normal(0, 40, (4 * subjects, 12, 15)) - 500
    with h5py.File(path / "a.h5", "w") as f:
        f["slices"] = x.astype(np.int16)
        f["subject"] = np.repeat([f"s{k}".encode() for k in range(subjects)], 4)
        f["pixel_mm"] = np.full(4 * subjects, 1.5, np.float32)
    return path


def config(path: Path, steps: int = 6, circuit: str = "", training: str = "") -> Path:
    path.write_text(CONFIG.format(steps=steps, circuit=circuit, training=training))
    return path


@pytest.mark.parametrize("way", ['method = "stepwise"', 'method = "full-batch"'])
@pytest.mark.parametrize("family", ["categorical", "gaussian"])
def test_the_command_learns_and_resumes_bit_equal(way: str, family: str, tmp_path: Path, here: Any) -> None:
    data = slices_file(tmp_path)
    inputs = f'inputs = "{family}"\nstructure = "quad-tree"'
    whole = config(tmp_path / "whole.toml", 6, inputs, way)
    part = config(tmp_path / "part.toml", 4, inputs, way)
    assert here("train-circuit", whole, "--data", data, "-o", tmp_path / "a") == (0, "")
    assert here("train-circuit", part, "--data", data, "-o", tmp_path / "b")[0] == 0
    assert here("train-circuit", whole, "--data", data, "-o", tmp_path / "b", "--resume")[0] == 0
    for file in ("circuit/weights.safetensors", "circuit/config.json", "circuit/README.md", "log.csv"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    made = load(tmp_path / "a" / "circuit")
    assert made.circuit.structure == quad_tree(4, 5) and made.info.pixel_mm == (1.5, 1.5)
    assert (tmp_path / "a" / "log.csv").read_text().count("\n") == 4
    assert 0.03 < made.info.within < 0.3  # 40 HU of noise, and edges that a shift brings into cells


def test_an_interrupted_run_goes_on_bit_equal(tmp_path: Path, here: Any, monkeypatch: Any) -> None:
    data, toml = slices_file(tmp_path), config(tmp_path / "c.toml", 5)
    assert here("train-circuit", toml, "--data", data, "-o", tmp_path / "a")[0] == 0
    from invdiff.pipelines import train_circuit

    plain, calls = train_circuit.stepwise, list[int]()

    def stop(*words: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return plain(*words)

    monkeypatch.setattr(train_circuit, "stepwise", stop)
    code, said = here("train-circuit", toml, "--data", data, "-o", tmp_path / "b")
    assert code == 130 and "with --resume it goes on" in said
    assert here("train-circuit", toml, "--data", data, "-o", tmp_path / "b", "--resume")[0] == 0
    assert len(calls) == 6  # three before the interrupt, and two after it
    file = "circuit/weights.safetensors"
    assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize(
    ("circuit", "training", "subjects", "message"),
    [
        ('inputs = "beta"', "", 4, "circuit.inputs is 'beta'; one of categorical, logistic, gaussian"),
        ('structure = "chain"', "", 4, "circuit.structure is 'chain'; one of hidden-chow-liu, quad-tree"),
        ("state = 4", "", 4, "circuit has no field 'state'"),
        ('tie_sums = "rows"', "", 4, "sums is 'rows'; one of none, depth"),
        ("", 'method = "sgd"', 4, "training.method is 'sgd'; one of stepwise, full-batch"),
        ("", "power = 2.0", 4, "training.power 2.0"),
        ("", "", 1, "holds 1 subject; at least 2"),
        ("bins = 1", "", 4, "in 1 bins"),
    ],
)
def test_bad_input_gets_one_sentence(
    circuit: str, training: str, subjects: int, message: str, tmp_path: Path, here: Any
) -> None:
    data = slices_file(tmp_path, subjects)
    toml = config(tmp_path / "c.toml", 2, circuit, training)
    code, said = here("train-circuit", toml, "--data", data, "-o", tmp_path / "a")
    assert code == 2 and message in said
    assert not (tmp_path / "a" / "circuit").exists()


def test_another_run_is_refused(tmp_path: Path, here: Any) -> None:
    data, toml = slices_file(tmp_path), config(tmp_path / "c.toml", 2)
    assert "holds no state.pt" in here("train-circuit", toml, "--data", data, "-o", tmp_path / "a", "--resume")[1]
    assert here("train-circuit", toml, "--data", data, "-o", tmp_path / "a")[0] == 0
    assert "holds a run already" in here("train-circuit", toml, "--data", data, "-o", tmp_path / "a")[1]
    other = config(tmp_path / "d.toml", 2, "", "pseudocount = 2.0")
    said = here("train-circuit", other, "--data", data, "-o", tmp_path / "a", "--resume")[1]
    assert "training.pseudocount is 1.0 there, 2.0 now" in said
    small = config(tmp_path / "e.toml", 2).read_text().replace("rows = 4", "rows = 6")
    (tmp_path / "e.toml").write_text(small)
    assert (
        "smaller than the grid" in here("train-circuit", tmp_path / "e.toml", "--data", data, "-o", tmp_path / "b")[1]
    )


def cells_of(draws: Draws, step: int, count: int) -> Tensor:
    return torch.cat([draws.info.pooled(x).mean for x in draws.images(step, count)])


def test_draws_are_keyed_and_move_the_image() -> None:
    x = np.random.default_rng(0).normal(0, 300, (6, 12, 15)).astype(np.float32)
    slices = Slices(x, np.array([0, 0, 1, 1, 2, 2]), np.ones(6, np.float32))
    info = toy_info(rows=4, columns=5, block=3)
    still = {"flip": 0.0, "shift": 0, "rotate": 0.0, "zoom": 0.0}
    plain = {tuple(info.pooled(torch.from_numpy(k)[None, None] / 1000).mean[0].tolist()) for k in x}
    cells = cells_of(Draws(slices, info, CircuitTraining(**still)), 3, 8)
    assert all(min(np.abs(np.array(row) - np.array(p)).max() for p in plain) < 1e-5 for row in cells.tolist())
    one = Slices(x[:1], np.zeros(1, np.int64), np.ones(1, np.float32))
    grid = CircuitConfig("toy", "HU", -1000.0, 1000.0, rows=4, columns=5, block=3, levels=LEVELS)
    over = OverCells(CircuitPlan(grid, CircuitTraining(**still), DataConfig()), one, one)
    inside = (x[0] / 1000).reshape(4, 3, 5, 3).var((1, 3)).mean()
    assert abs(over.drawn(0, 3).within - inside) < 1e-6
    moved = Draws(slices, info, CircuitTraining())
    assert torch.equal(cells_of(moved, 3, 8)[:5], cells_of(moved, 3, 5))
    assert not torch.equal(cells_of(moved, 3, 5), cells_of(moved, 4, 5))
    assert (cells_of(moved, 3, 8) - cells).abs().max() > 0.05
    flipped = cells_of(Draws(slices, info, CircuitTraining(**{**still, "flip": 1.0})), 3, 8)
    back = flipped.view(8, 4, 5).flip(-1).flatten(1)
    assert all(min(np.abs(np.array(row) - np.array(p)).max() for p in plain) < 1e-5 for row in back.tolist())


def test_the_example_is_a_plan() -> None:
    plan = plan_of(Path(__file__).parent.parent / "examples" / "train-circuit-brain-mr.toml")
    assert plan.circuit.name == "brain-mr" and plan.circuit.rows * plan.circuit.block == 256
