"""Training on measurements: lifts, splits, what a step draws, exact resume, the command, and what is refused."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from invdiff.datasets import Measurements, write_measurements
from invdiff.measured import (
    CONTEXT,
    HELD,
    TARGET,
    Example,
    ForwardModel,
    ForwardModelMethod,
    ForwardModelTask,
    MeasuredLearning,
    Splitting,
    alike,
    example_of,
    inputs_of,
    lift,
    nothing,
    response_of,
    signal,
)
from invdiff.measured.conditions import unseen
from invdiff.measured.examples import view_of
from invdiff.measured.forward import noisy_target
from invdiff.measured.response import falling, noise_of
from invdiff.noise import KeyedNoise
from invdiff.operators import CartesianMRI, FanBeam, Gaussian, Mask, ParallelBeam, RealChannels, Whitened
from invdiff.operators.mri.simulate import birdcage_maps
from invdiff.priors import PriorInfo, load
from invdiff.priors.edm import edm_denoise
from invdiff.priors.launch import Alone
from invdiff.priors.network import UNetConfig
from invdiff.priors.training import pack, start, train, unpack

SMALL = UNetConfig(unshuffle=2, channels=(8, 16), blocks=(1, 1), norm_groups=4)
INFO = PriorInfo("toy", "", -1.0, 1.0, 0.02, 50.0, 0.5, (1.0, 1.0))
LEARNING = MeasuredLearning(images=12, batch=3, warmup=4, ema=4, rate=1e-2)
METHOD = ForwardModelMethod(lift_steps=2)


def projections(seed: int, views: int = 9, size: tuple[int, int] = (13, 12), sigma: float = 0.01) -> Example:
    """A scan of a random image by random views."""
    g = torch.Generator().manual_seed(seed)
    A = ParallelBeam((1, 1, *size), (torch.rand(views, generator=g) * math.pi).tolist())
    y = A(torch.randn(1, 1, *size, generator=g)) / 10
    return example_of(A / 10, y + sigma * torch.randn(y.shape, generator=g), sigma, f"scan {seed}")


def lines(seed: int, size: tuple[int, int] = (13, 12), coils: int = 3, kept: int = 6) -> Any:
    """An operator of random lines, on two real channels."""
    mask = torch.zeros(size, dtype=torch.bool)
    mask[:, torch.randperm(size[1], generator=torch.Generator().manual_seed(seed))[:kept]] = True
    return CartesianMRI(mask, birdcage_maps(coils, size) if coils > 1 else None) @ RealChannels((1, 1, *size))


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return alike([projections(k, views) for k, views in enumerate((9, 7, 11, 9))])


def test_every_measurement_knows_its_view() -> None:
    for operator in (projections(0).operator, lines(1), Whitened(lines(2), torch.ones(1, 3, 13, 12))):
        view = view_of(operator)
        y = operator.forward(torch.randn(operator.domain.shape, generator=torch.Generator().manual_seed(0)))
        example = Example(operator, y, 0.0, view, len(operator.views))
        for number, name in enumerate(operator.views):
            chosen = torch.arange(len(operator.views)) == number
            ours = operator.adjoint(example.mask(chosen) * y)
            theirs = operator.split([name]).adjoint(operator.part(y, [name]))
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_of_a_unitary_operator_the_inputs_are_edms() -> None:
    operator = lines(0, coils=1, kept=12)
    x = torch.randn(operator.domain.shape, generator=torch.Generator().manual_seed(0))
    for s in (0.03, 0.5, 7.0):
        seen = lift(operator, operator.forward(x), response_of(operator), s, 0.5)
        inputs, level = inputs_of(nothing(x), seen, 0.5), torch.tensor([s])
        torch.testing.assert_close(inputs.seen[:, :2], x / (s**2 + 0.25) ** 0.5, atol=1e-3, rtol=1e-3)

        def network(v: Tensor, label: Tensor) -> Tensor:
            return (v[:, :2] + label).tanh()

        edm = edm_denoise(network, x, level, 0.5)  # type: ignore[arg-type]
        torch.testing.assert_close(signal(network, inputs, level), edm, atol=2e-3, rtol=2e-3)  # type: ignore[arg-type]


def test_lifts_scale_with_y_and_steps_bring_them_nearer(examples: list[Example]) -> None:
    A, d = examples[2].operator, 0.5
    g = torch.Generator().manual_seed(3)
    x = torch.nn.functional.avg_pool2d(torch.randn(1, 1, 13, 12, generator=g), 3, 1, 1)
    chosen, s = torch.arange(11) % 2 == 0, 0.05
    y = A.forward(x)
    for steps in (1, 2):
        one, two, both = (examples[2].lift(v, chosen, s, d, steps).image for v in (y, y.flip(-1), 2 * y - y.flip(-1)))
        torch.testing.assert_close(2 * one - two, both, atol=1e-5, rtol=1e-4)
    one, two = (examples[2].lift(v, chosen, s, d, 3).image for v in (y, -3 * y))
    torch.testing.assert_close(-3 * one, two, atol=1e-5, rtol=1e-4)
    b = A.adjoint(examples[2].mask(chosen) * y)
    columns = [A.adjoint(examples[2].mask(chosen) * A.forward(e.view(1, 1, 13, 12))).flatten() for e in torch.eye(156)]
    rough = through(torch.eye(156).view(156, 1, 13, 12), 1 / falling(13, 12, x)).flatten(1)
    best = torch.linalg.solve(torch.stack(columns) + s**2 / d**2 * rough, b.flatten()).view_as(x)
    errors = [float((examples[2].lift(y, chosen, s, d, n).image - best).norm() / best.norm()) for n in (1, 3, 12)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.3  # a tolerance ends them


def through(x: Tensor, by: Tensor) -> Tensor:
    """x under a filter over the frequencies of ``rfft2``."""
    return torch.fft.irfft2(by * torch.fft.rfft2(x), s=x.shape[-2:])


@pytest.mark.parametrize("under", [0.0, 0.4])
def test_of_a_unitary_operator_more_steps_are_wieners_filter_and_know_their_error(under: float) -> None:
    A, d, s = lines(0, coils=1, kept=12), 0.5, 0.3
    power = falling(13, 12, torch.zeros(()))
    draw = KeyedNoise(4)
    x, n, m = (torch.cat([draw(k, torch.zeros(A.domain.shape), i) for i in range(300)]) for k in range(3))
    x = d * through(x, power.sqrt())
    response = response_of(A)
    found = [
        lift(A, A.forward(one + under * more) + s * A.forward(noise), response, s, d, 3, under=under)
        for one, more, noise in zip(x.split(1), m.split(1), n.split(1), strict=True)
    ]
    best = through(x + under * m + s * n, power / (power + (under**2 + s**2) / d**2))
    image = torch.cat([one.image for one in found])
    torch.testing.assert_close(image, best, atol=2e-3, rtol=2e-3)
    error = float((image - x).square().mean())
    assert abs(float(1 - found[0].recovered) * d**2 / error - 1) < 0.15


def test_of_bodies_more_steps_leave_less() -> None:
    size = (32, 30)
    A = ParallelBeam((1, 1, *size), [math.pi * k / 24 for k in range(24)]) / 40
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, 32), torch.linspace(-1, 1, 30), indexing="ij")
    x = ((rows / 0.8).square() + (columns / 0.6).square() < 1).float()[None, None] - 1
    x[..., 12:16, 10:20] = 0.4
    y = A(x)
    for s in (0.01, 0.1, 1.0):
        example = example_of(A, y + s * KeyedNoise(1)(0, y), s)
        one, two = (float((example.lift(example.y, torch.ones(24), s, 0.5, n).image - x).norm()) for n in (2, 3))
        assert two < 0.75 * one


def test_lifts_undo_the_weights_of_photon_counts() -> None:
    """Where the noise is small the lift is that of the scan before whitening; rays of weight 0 are left out."""
    size = (16, 15)
    A = ParallelBeam((1, 1, *size), [math.pi * k / 20 for k in range(20)]) / 20
    x = torch.zeros(1, 1, *size)
    x[..., 3:12, 4:11] = 0.7
    y = A(x)
    w = (-8 * y).exp() + 1e-3
    plain, weighted = example_of(A, y, 1e-3), example_of(Whitened(A, w), w * y, 1e-3)
    chosen = torch.ones(20)
    one, two = (e.lift(e.y, chosen, 1e-4, 0.5, 2).image for e in (plain, weighted))
    noisy = weighted.lift(weighted.y, chosen, 1e3, 0.5, 1).image  # at such noise they are kept
    left = noisy / noisy.norm() * one.norm()
    assert float((two - one).norm()) < 0.15 * float(one.norm()) < float((left - one).norm())
    w[:, :, :3] = 0
    dark = example_of(Whitened(A, w), w * y, 1e-3)
    spoilt = dark.lift(dark.y, chosen, 1e-4, 0.5, 2).image
    assert bool(torch.isfinite(spoilt).all())


def test_a_targets_noise_is_that_of_rows_without_weights() -> None:
    """What is asked of a sampler, whose target nobody took: rays that are noisier themselves stay as they are."""
    size, s, sigma = (16, 15), 0.3, 0.02
    A = ParallelBeam((1, 1, *size), [math.pi * k / 20 for k in range(20)]) / 20
    x = torch.zeros(1, 1, *size)
    x[..., 3:12, 4:11] = 0.7
    y = A(x)
    w = (-3 * y).exp()
    w = w / w.square().mean().sqrt()
    plain, weighted = example_of(A, y, sigma), example_of(Whitened(A, w), w * y, sigma)
    n = KeyedNoise(3)(0, y)
    noisy = noisy_target(weighted, n, s)
    torch.testing.assert_close(noisy - w * y, ((w * s) ** 2 - sigma**2).sqrt() * n, atol=1e-6, rtol=1e-4)
    whole = w * y + w * s * n  # as if its own noise were counted in
    ours = weighted.lift(whole, torch.ones(20), s, 0.5, 3, least=sigma).image
    theirs, others = (plain.lift(v, torch.ones(20), s, 0.5, 3).image for v in (y + s * n, y))
    assert float((ours - theirs).norm()) < 0.02 * float(theirs.norm()) < 0.1 * float((others - theirs).norm())
    dark = Whitened(A, torch.where(w < 0.5, 0.01 * w, w))
    levels = noise_of(dark, s, sigma)
    assert bool((levels[w < 0.5] == sigma).all()) and float(levels[w >= 0.5].min()) > sigma
    assert noise_of(A, s, sigma) == s


def test_coverage_is_the_share_that_is_seen(examples: list[Example]) -> None:
    some, more = (torch.arange(11) < n for n in (3, 9))
    covered = [float(examples[2].lift(examples[2].y, c, 0.05, 0.5).coverage.mean()) for c in (some * 0, some, more)]
    assert covered[0] == 0 < covered[1] < covered[2] <= 1
    noisy = float(examples[2].lift(examples[2].y, more, 5.0, 0.5).coverage.mean())
    assert noisy < 0.1 * covered[2]


def test_splits_have_a_target_and_something_held_out_and_depend_on_their_key_alone() -> None:
    how = Splitting(dropped=0.3)
    counts = []
    for k in range(300):
        views = 2 + k % 30
        roles = how.draw(views, (0, k, 1))
        assert torch.equal(roles, how.draw(views, (0, k, 1)))
        counts.append([int((roles == role).sum()) for role in (CONTEXT, TARGET, HELD)])
        assert counts[-1][1] >= 1 and counts[-1][2] >= 1 and sum(counts[-1]) == views
    empty = sum(c[0] == 0 for c in counts[60:])
    assert 0.2 < empty / len(counts[60:]) < 0.45
    other = [how.draw(30, (0, k, 1)) for k in range(50)]
    assert len({tuple(r.tolist()) for r in other}) > 45
    touched = torch.stack([r == HELD for r in other]).double().mean(0)
    assert float(touched.min()) > 0.1  # every view is held out now and then


def test_scans_of_few_and_of_many_views_are_scaled_alike() -> None:
    few, many = alike([projections(0, 4), projections(0, 40)])
    assert few.density == pytest.approx(many.density)
    x = torch.randn(1, 1, 13, 12, generator=torch.Generator().manual_seed(0))
    rows = [float(e.operator.forward(x).square().mean()) for e in (few, many)]
    assert rows[0] == pytest.approx(rows[1], rel=0.25)
    for e, raw in ((few, projections(0, 4)), (many, projections(0, 40))):
        torch.testing.assert_close(e.y / e.sigma, raw.y / raw.sigma)


def test_parts_of_a_step_make_the_whole_and_their_gradients_too(examples: list[Example]) -> None:
    task = ForwardModelTask(examples, METHOD, LEARNING, INFO)

    def gradient(world: int) -> Tensor:
        total = torch.zeros(())
        for rank in range(world):
            network = start(LEARNING, SMALL, None, METHOD.extra(1)).network
            (world * task.loss(network, task.part(5, rank, world), None)).backward()
            grads = [p.grad.flatten() for p in network.parameters() if p.grad is not None]
            total = total + torch.cat(grads) / world
        return total

    whole = gradient(1)
    torch.testing.assert_close(gradient(4), whole, atol=1e-6, rtol=1e-3)  # one of four has no item
    levels = torch.cat([task.part(k).sigma for k in range(30)])
    assert float(levels.min()) >= INFO.sigma_min * (1 - 1e-6) and float(levels.max()) <= INFO.sigma_max
    assert float(levels.log().std()) > 0.8


def test_the_network_sees_nothing_of_what_is_held_out(examples: list[Example]) -> None:
    task = ForwardModelTask(examples, METHOD, LEARNING, INFO)
    part = task.item(1, 4, 0)
    held = examples[1].mask(part.roles[0] == HELD)
    spoilt = replace(examples[1], y=examples[1].y + 100 * held)
    seen = [task.inputs([e], part, [e.y]).stacked() for e in (examples[1], spoilt)]
    assert torch.equal(seen[0], seen[1])


def test_training_resumes_exactly_with_batches_of_different_views(examples: list[Example], tmp_path: Path) -> None:
    task, extra = METHOD.task(examples, LEARNING, INFO), METHOD.extra(1)
    *_, whole = train(start(LEARNING, SMALL, None, extra), task, LEARNING, Alone(), None)
    part = next(itertools.islice(train(start(LEARNING, SMALL, None, extra), task, LEARNING, Alone(), None), 1, None))
    torch.save(pack(part), tmp_path / "state.pt")
    resumed = unpack(torch.load(tmp_path / "state.pt", weights_only=True), LEARNING, SMALL, extra)
    *_, end = train(resumed, task, LEARNING, Alone(), None, workers=1)
    for a, b in zip(end.average.parameters(), whole.average.parameters(), strict=True):
        assert torch.equal(a, b)
    judged = METHOD.judge(whole.average, examples[:2], INFO, None)
    assert judged == METHOD.judge(whole.average, examples[:2], INFO, None) and len(judged) > 2


def test_what_no_scan_sees_is_found() -> None:
    dense = [projections(k, 40) for k in range(2)]
    limited = replace(dense[0], operator=ParallelBeam((1, 1, 13, 12), [math.pi / 2 * k / 30 for k in range(30)]))
    assert unseen(dense) < 0.06 < 0.12 < unseen([limited])
    one = example_of(lines(0, coils=1, kept=6), torch.zeros(1, 1, 13, 12, dtype=torch.complex64), 0.0)
    assert unseen([one]) == pytest.approx(0.5, abs=0.08)
    other = [example_of(lines(k, coils=1, kept=6), one.y, 0.0) for k in range(12)]
    assert unseen(other) < 0.02


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("coverage", "% of the image space are seen by no scan"),
        ("noise above the levels", "no smaller noise level than the scans' own is wanted"),
        ("one noise and another", "scans whitened alike are wanted"),
        ("noisy and noiseless", "scans whitened alike are wanted"),
        ("grids", "one grid is wanted"),
        ("context", "the network would copy it; 0 is wanted"),
        ("one view", "has 1 views; 2 at least are wanted to split them"),
        ("no views", "has no views to split"),
        ("none", "there are no scans to train on"),
        ("shares", "two shares in [0, 1], the lesser first, are wanted"),
        ("weights", "one above 0"),
    ],
)
def test_training_refuses(case: str, said: str, examples: list[Example]) -> None:
    method, scans, info = METHOD, list(examples), replace(INFO, sigma_min=0.1)

    def tried() -> None:
        nonlocal method, scans, info
        if case == "coverage":
            scans = [example_of(lines(0, coils=1), torch.zeros(1, 1, 13, 12, dtype=torch.complex64), 0.0)]
        elif case == "noise above the levels":
            info = replace(INFO, sigma_min=1e-6)
        elif case == "one noise and another":
            scans = [*examples, replace(examples[0], sigma=10 * examples[0].sigma)]
        elif case == "noisy and noiseless":
            scans = [*examples, replace(examples[0], sigma=0.0)]
        elif case == "grids":
            scans = [*examples, *alike([projections(7, 9, (12, 12))], examples[0].density)]
        elif case == "context":
            method = replace(METHOD, context_weight=1.0)
        elif case == "one view":
            projections(0, 1)
        elif case == "no views":
            example_of(RealChannels((1, 1, 4, 5)), torch.zeros(1, 1, 4, 5, dtype=torch.complex64), 0.0)
        elif case == "none":
            scans = []
        elif case == "shares":
            Splitting(context=(0.8, 0.2))
        elif case == "weights":
            ForwardModelMethod(held_weight=0.0, target_weight=0.0)
        method.check(scans, info)

    with pytest.raises(ValueError, match=said.replace("[", r"\[").replace("]", r"\]")):
        tried()
    METHOD.check(examples, replace(INFO, sigma_min=0.1))


def test_operators_know_what_else_could_be_measured() -> None:
    for beam in (ParallelBeam, FanBeam):
        far: dict[str, Any] = {} if beam is ParallelBeam else {"source_origin_mm": 50.0, "source_detector_mm": 90.0}
        A = beam((1, 1, 13, 12), [0.3, 1.2, 5.0], **far)
        angles = A.whole(6).angles.sort().values  # type: ignore[attr-defined]
        assert angles.diff().tolist() == pytest.approx([A.period / 6] * 5)
        assert len(A.whole(10_000).views) == math.ceil(A.period / 2 * 13)
        left = A.unmeasured(6).angles  # type: ignore[attr-defined]
        assert 3 <= len(left) < 6 and not bool(torch.isin(left, A.angles).any())
    B = lines(0)
    assert B.whole(100).views == tuple(range(12)) and len(B.whole(5).views) == 5
    assert set(B.unmeasured(100).views) == set(range(12)) - set(B.views)
    y = torch.randn(1, 1, 13, 12, generator=torch.Generator().manual_seed(0))
    mask = Mask(y[0, 0] > 0)
    torch.testing.assert_close(mask.forward(y) + mask.unmeasured(1).forward(y), mask.whole(1).forward(y))
    weights = torch.rand(A.range.shape) + 0.5
    whole = Whitened(A, weights).whole(6)
    torch.testing.assert_close(whole.forward(y), weights.square().mean().sqrt() * A.whole(6).forward(y))
    with pytest.raises(ValueError, match="has no whole of 5 views"):
        RealChannels((1, 1, 4, 5)).whole(5)


TOML = (
    '[prior]\nname = "toy"\nunit = "HU"\nlow = -1000\nhigh = 1000\nsigma_max = 20\nsigma_data = 0.5\n'
    "[network]\nchannels = [8, 8]\nblocks = [1, 1]\nnorm_groups = 4\n"
    "[training]\nimages = 12\nevery = 4\nbatch = 2\nheld_out = 0.2\n"
)


def scan_file(path: Path, count: int = 6, views: int = 12, size: int = 14, sigma: float = 0.02, **others: Any) -> Path:
    """CT scans of two random slices each, by random views."""
    scans = []
    for k in range(count):
        g = torch.Generator().manual_seed(k)
        A = ParallelBeam((2, 1, size, size), (torch.rand(views, generator=g) * math.pi).tolist(), pixel_mm=20.0)
        y = A(0.02 + 0.004 * torch.randn(2, 1, size, size, generator=g))
        noisy, _ = Gaussian(sigma).sample(y, KeyedNoise(k))
        affine = np.diag([20.0, 20.0, 5.0, 1.0])
        scans.append(Measurements(noisy, "parallel", A.fields(), affine, "1/mm", sigma_y=sigma, mu_water=0.02))
    write_measurements(path, scans)
    return path


@pytest.fixture
def words(tmp_path: Path) -> list[object]:
    (tmp_path / "toy.toml").write_text(TOML)
    (tmp_path / "scans").mkdir()
    scan_file(tmp_path / "scans" / "a.h5")
    return ["train", tmp_path / "toy.toml", "--from", tmp_path / "scans", "-o", tmp_path / "run"]


def test_the_command_trains_resumes_and_its_model_samples(words: list[object], tmp_path: Path, here: Any) -> None:
    assert here(*words)[0] == 0
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"log.csv", "model", "progress.png", "state.pt"}
    assert "it saw no image" in (tmp_path / "run" / "model" / "README.md").read_text()
    (tmp_path / "toy.toml").write_text(TOML.replace("images = 12", "images = 8"))
    assert here(*words[:-1], tmp_path / "cut")[0] == 0
    (tmp_path / "toy.toml").write_text(TOML)
    assert here(*words[:-1], tmp_path / "cut", "--resume")[0] == 0
    models = [load(tmp_path / name / "model") for name in ("run", "cut")]
    assert all(isinstance(m, ForwardModel) for m in models)
    rates = [(tmp_path / n / "log.csv").read_text().splitlines()[1] for n in ("run", "cut")]
    assert rates[0].rsplit(",", 1)[0] == rates[1].rsplit(",", 1)[0]
    scan = scan_file(tmp_path / "test.h5", count=1, views=5)
    line = ["reconstruct", scan, "--sampler", "forward-model", "--prior", tmp_path / "run" / "model"]
    assert here(*line, "-o", tmp_path / "x.nii.gz", "--samples", 2, "sampler.steps=3")[0] == 0
    assert (tmp_path / "x.nii.gz").exists() and (tmp_path / "x-std.nii.gz").exists()


def test_two_processes_train_as_one(words: list[object], tmp_path: Path) -> None:
    """Under the launcher of priors: three scans of a batch, of other views each, on one process and on two."""
    (tmp_path / "toy.toml").write_text(TOML.replace("batch = 2", "batch = 3") + "warmup = 1\n")
    scan_file(tmp_path / "scans" / "b.h5", count=2, views=9)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    found = []
    for name, many in (("one", []), ("two", launch)):
        line = [sys.executable, *many, "-m", "invdiff.pipelines.cli", *map(str, words[:-1]), str(tmp_path / name)]
        done = subprocess.run([*line, "--dtype", "float32"], capture_output=True, text=True, env=env, timeout=240)
        assert done.returncode == 0, done.stderr
        assert f"{2 if many else 1} x cpu" in done.stdout
        weights = load_file(tmp_path / name / "model" / "weights.safetensors")
        log = (tmp_path / name / "log.csv").read_text().splitlines()
        found.append((weights, [float(row.rsplit(",", 1)[0].rsplit(",", 1)[1]) for row in log[1:]]))
    (ours, one), (theirs, two) = found
    assert len(one) > 1 and one == pytest.approx(two, rel=1e-4)
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], atol=1e-5, rtol=1e-3)


def test_validation_scans_are_not_trained_on(words: list[object], tmp_path: Path, here: Any) -> None:
    """All of FOLDER's 6 scans of two slices are, and none is held out of them."""
    other = scan_file(tmp_path / "other.h5", count=2, views=9)
    assert here(*words, "--validation", other)[0] == 0
    said = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "the measurements of 12 slices (12 to 12 views" in said and "none was held out" not in said


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("both", "--data FOLDER of images or --from MEASUREMENTS: one of them is wanted"),
        ("neither", "--data FOLDER of images or --from MEASUREMENTS: one of them is wanted"),
        ("not there", "is not there; a measurement file or a folder of them is wanted"),
        ("empty", "holds no measurement files"),
        ("other noise", "scans whitened alike are wanted"),
        ("other grid", "one grid is wanted"),
        ("one view", "has 1 views; 2 at least are wanted"),
        ("same few views", "are seen by no scan"),
        ("channels", "of 1 channels; network.image_channels is 2"),
        ("method", "no method 'gsure'; there are:"),
        ("field", "measured has no field 'share'"),
        ("table", "has 'data'; the tables measured, prior, network, training, mri are known"),
        ("unit", "the prior 'toy' is in a.u., the operator acts on 1/mm"),
        ("low sigma_min", "no smaller noise level than the scans' own is wanted"),
    ],
)
def test_bad_input_gets_one_sentence(case: str, said: str, words: list[object], tmp_path: Path, here: Any) -> None:
    config, folder = tmp_path / "toy.toml", tmp_path / "scans"
    if case == "both":
        words += ["--data", folder]
    elif case == "neither":
        del words[2:4]
    elif case == "not there":
        words[3] = tmp_path / "nowhere.h5"
    elif case == "empty":
        (folder / "a.h5").unlink()
    elif case == "other noise":
        scan_file(folder / "b.h5", 1, sigma=0.5)
    elif case == "other grid":
        scan_file(folder / "b.h5", 1, size=16)
    elif case == "one view":
        scan_file(folder / "b.h5", 1, views=1)
    elif case == "same few views":
        scan_file(folder / "a.h5", 1, views=3)
    elif case == "channels":
        config.write_text(TOML.replace("[network]", "[network]\nimage_channels = 2"))
    elif case == "method":
        config.write_text(TOML + '[measured]\nmethod = "gsure"\n')
    elif case == "field":
        config.write_text(TOML + "[measured]\nshare = 1\n")
    elif case == "table":
        config.write_text(TOML + "[data]\nscale = 1\n")
    elif case == "unit":
        config.write_text(TOML.replace("HU", "a.u."))
    elif case == "low sigma_min":
        config.write_text(TOML.replace("sigma_max", "sigma_min = 1e-5\nsigma_max"))
    code, message = here(*words)
    assert code == 2 and said in message, message
    assert "Traceback" not in message and not list(tmp_path.rglob("state.pt"))
