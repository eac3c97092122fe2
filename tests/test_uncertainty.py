"""Many samples in little memory: exact statistics, bit-equal samples, resume, the best of several, the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from torch import Tensor

import invdiff
from invdiff.calibration import covered, rank_interval, student_interval
from invdiff.datasets import Volume, read_measurements, read_volume, write_measurements, write_nifti
from invdiff.noise import KeyedNoise
from invdiff.pipelines import reconstruct as pipeline
from invdiff.pipelines.scans import operator_of
from invdiff.pipelines.simulate import Simulation, simulate
from invdiff.priors import Averaged, Chunked, load
from invdiff.priors.density import log_density
from invdiff.protocols import Problem
from invdiff.reconstruction import reconstruct
from invdiff.run import DivergedError, fingerprint, iterate, last, load_state, residual_norms, save_state
from invdiff.samplers import DDS, SplitGibbs
from invdiff.uncertainty import BestOf, SeedsState, Spread, SpreadState, meaning, over_seeds

SAMPLER = DDS(steps=4, lam=0.0)


def spread_of(samples: Tensor, level: float, problem: Problem) -> Any:
    """The summary of samples (n s c h w) that are added one after the other, and the last state."""
    gather = Spread(len(samples), level)
    state = gather.start(problem)
    for x in samples:
        state = gather.add(problem, state, x)
    return gather.summary(state), state


def draws(count: int, shape: tuple[int, ...] = (5, 1, 6, 7)) -> Tensor:
    """Skewed, off zero: an interval by rank is not a Gaussian's."""
    return 3 + torch.randn(count, *shape, generator=torch.Generator().manual_seed(count)).exp()


@pytest.mark.parametrize("level", [0.5, 0.9, 0.95])
@pytest.mark.parametrize("count", [2, 8, 19, 25, 40])
def test_statistics_are_those_of_all_samples(count: int, level: float, world: Any) -> None:
    samples = draws(count)
    found, state = spread_of(samples, level, world.problem)
    exact = samples.double()
    torch.testing.assert_close(found.mean.double(), exact.mean(0), atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(found.std.double(), exact.std(0), atol=2e-6, rtol=1e-5)  # n - 1, not n
    by_rank = count >= {0.5: 3, 0.9: 19, 0.95: 39}[level]
    low, high = (rank_interval if by_rank else student_interval)(exact, level)
    torch.testing.assert_close(found.low.double(), low, atol=5e-6, rtol=1e-5)
    torch.testing.assert_close(found.high.double(), high, atol=5e-6, rtol=1e-5)
    assert Spread(count, level).by_rank is by_rank and len(state.low) == len(state.high) == Spread(count, level).kept


def test_memory_does_not_grow_with_the_samples_but_by_their_tails() -> None:
    assert [Spread(n).kept for n in (8, 18, 19, 20, 39, 40, 64, 200)] == [0, 0, 1, 2, 2, 3, 4, 11]
    assert [Spread(n, 0.95).kept for n in (38, 39, 79)] == [0, 1, 2]


def test_equal_samples_have_no_spread_and_slices_are_for_themselves(world: Any) -> None:
    samples = draws(20)
    whole, _ = spread_of(samples, 0.9, world.problem)
    part, _ = spread_of(samples[:, 1:3], 0.9, world.only([1, 2]))
    for a, b in zip(whole, part, strict=True):
        assert torch.equal(a[1:3], b)
    same, _ = spread_of(samples[:1].expand(20, -1, -1, -1, -1), 0.9, world.problem)
    assert float(same.std.abs().max()) == 0 and torch.equal(same.low, samples[0]) and torch.equal(same.high, samples[0])


def test_a_summary_wants_all_samples(world: Any) -> None:
    gather = Spread(3)
    with pytest.raises(ValueError, match="1 samples were added; 3 are wanted"):
        gather.summary(gather.add(world.problem, gather.start(world.problem), draws(1)[0]))


@pytest.mark.parametrize("sampler", [SAMPLER, DDS(steps=3), SplitGibbs(steps=3, keep=1, prior_steps=2)])
def test_each_sample_is_that_of_its_seed_bit_for_bit(sampler: Any, world: Any) -> None:
    """At a low level all samples of few are kept, in order."""
    problem = world.problem._replace(noise=KeyedNoise(7))
    gather = Spread(3, 0.01)
    end = last(over_seeds(sampler, problem, gather))
    alone = torch.stack([last(iterate(sampler, problem._replace(noise=KeyedNoise(7 + k)))).x for k in range(3)])
    state = SpreadState(**end.kept)
    assert gather.kept == 2 and torch.equal(torch.cat([state.low, state.high[1:]]), alone.sort(0).values)
    assert torch.equal(end.residuals, torch.stack([residual_norms(problem, x) for x in alone]))
    assert (end.i, end.done, end.current) == (3 * sampler.steps, 3, {})


@pytest.mark.parametrize("gather", [Spread(3, 0.5), BestOf(3)])
def test_every_state_goes_on_bit_for_bit_from_its_file(gather: Any, world: Any, tmp_path: Path) -> None:
    key = fingerprint("a run")
    states = list(over_seeds(SAMPLER, world.problem, gather))
    assert [s.i for s in states] == list(range(3 * SAMPLER.steps + 1))
    wanted = states[-1]
    for state in states:
        save_state(tmp_path / "c.checkpoint", state, key)
        begun = load_state(tmp_path / "c.checkpoint", SeedsState, key)
        rest = list(over_seeds(SAMPLER, world.problem, gather, begun))
        end = rest[-1] if rest else begun
        for name, value in wanted.kept.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(end.kept[name])), (state.i, name)
        assert torch.equal(wanted.residuals, end.residuals) and end.i == wanted.i


def test_a_diverged_sample_says_its_seed(world: Any) -> None:
    class Broken:
        channels = 1

        def __init__(self) -> None:
            self.calls = 0

        def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
            self.calls += 1
            return world.prior.denoise(x, sigma) * (float("nan") if self.calls > SAMPLER.steps else 1)

    with pytest.raises(DivergedError, match=r"NaN or infinite at step .*, in the sample of seed 1"):
        last(over_seeds(SAMPLER, world.problem._replace(prior=Broken()), Spread(3)))


def singles(world: Any, seeds: range) -> list[Tensor]:
    return [reconstruct(world.problem.y, world.operator, world.prior, SAMPLER, 0.05, s).x for s in seeds]


def test_reconstruct_with_samples(world: Any) -> None:
    given = (world.problem.y, world.operator, world.prior, SAMPLER, 0.05)
    found = invdiff.reconstruct(*given, seed=4, samples=5)
    images = torch.stack(singles(world, range(4, 9)))
    torch.testing.assert_close(found.x, images.mean(0), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.std, images.std(0), atol=1e-6, rtol=0)
    low, high = student_interval(images, 0.9)
    torch.testing.assert_close(found.low, low, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.high, high, atol=1e-5, rtol=0)
    said = found.record["samples"]
    assert said["seeds"] == [4, 5, 6, 7, 8] and said["interval"] == "student" and said["count"] == 5
    assert "19" in said["meaning"][1] and np.shape(said["chi2"]) == (5, 5)
    single = reconstruct(*given, seed=6)
    assert single.std is single.low is single.high is None
    np.testing.assert_allclose(said["chi2"][2], single.record["chi2"], rtol=1e-5)
    assert found.record["steps"] == 5 * SAMPLER.steps and found.record["estimate"] == "approximate sampler"
    assert reconstruct(*given, samples=Spread(3, 0.5)).record["samples"]["interval"] == "rank"


def test_in_physical_units_the_deviation_is_scaled_and_not_shifted(prior: str) -> None:
    scan, _ = simulate(body(), Simulation(views=5, photons=1e5))
    operator, y, sigma_y = operator_of(scan)
    found = reconstruct(y, operator, load(prior), SAMPLER, sigma_y, samples=3)
    images = torch.stack([reconstruct(y, operator, load(prior), SAMPLER, sigma_y, k).x for k in range(3)])
    assert found.std is not None and float(images.std(0).max()) > 1
    torch.testing.assert_close(found.std, images.std(0), atol=0.05, rtol=1e-3)
    torch.testing.assert_close(found.x, images.mean(0), atol=0.05, rtol=0)


def test_meaning_speaks_of_the_estimate() -> None:
    assert "says nothing of how sure" in meaning(Spread(20), "point estimate")[0]
    assert len(meaning(Spread(20), "posterior sampler")) == 1 and "Student" in meaning(Spread(5), "")[1]
    assert meaning(BestOf(3, 0.1, True), "") == [
        "the best of 3 by the residual and the prior's density, slices of one sample"
    ]


def test_the_best_by_residual_slice_by_slice_or_whole(world: Any) -> None:
    given = (world.problem.y, world.operator, world.prior, SAMPLER, 0.05)
    images = torch.stack(singles(world, range(4)))
    norms = torch.stack([(world.operator.forward(x) - world.problem.y).norm(dim=1) for x in images])
    best = reconstruct(*given, samples=BestOf(4))
    which = norms.argmin(0)
    assert len(set(which.tolist())) > 1 and best.std is None
    assert torch.equal(best.x, images[which, torch.arange(5)])
    assert best.record["best"]["chosen_seeds"] == which.tolist()
    whole = reconstruct(*given, samples=BestOf(4, whole=True))
    one = int(norms.square().sum(1).argmin())
    assert torch.equal(whole.x, images[one]) and whole.record["best"]["chosen_seeds"] == [one] * 5


def test_the_density_speaks_for_likelier_images(world: Any) -> None:
    gather, problem = BestOf(2, 0.1), world.problem
    likely, unlikely = world.truth, world.truth + torch.tensor([[0.3, -0.3] * 3 + [0.3]])
    score = gather.score(problem, unlikely)
    fit = residual_norms(problem, unlikely).square() / (2 * 0.05**2)
    torch.testing.assert_close(score, fit - log_density(world.prior, unlikely, torch.tensor(0.1)))
    state = gather.start(problem)
    for x in (unlikely, likely, likely):
        state = gather.add(problem, state, x)
    assert torch.equal(state.x, likely) and state.which.tolist() == [1] * 5  # the first of equals


def body() -> Volume:
    data = torch.full((3, 1, 20, 18), -1000.0)
    data[:, :, 4:16, 3:14] = 40.0
    data[1, :, 7:10, 5:8] = 700.0
    c, s = np.cos(0.1), np.sin(0.1)
    affine = np.eye(4)
    affine[:3, :3] = np.array([[-c, s, 0], [-s, -c, 0], [0, 0, 1]]) @ np.diag([2.0, 2.0, 3.0])
    affine[:3, 3] = [31.0, -17.0, 5.5]
    return Volume(data, affine, "HU")


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    write_measurements(tmp_path / "scan.h5", [simulate(body(), Simulation(views=6, photons=1e5))[0]])
    return tmp_path / "scan.h5"


def words(scan: Path, prior: str, out: Path, *more: object) -> list[object]:
    return ["reconstruct", scan, "-o", out, "--prior", prior, "--dtype", "float32", "sampler.steps=4", *more]


def voxels(path: Path) -> Any:
    return np.asarray(nibabel.load(path).dataobj)


def test_the_command_writes_mean_deviation_and_interval(scan: Path, prior: str, tmp_path: Path, here: Any) -> None:
    write_nifti(tmp_path / "body.nii", body())
    code, said = here(*words(scan, prior, tmp_path / "r.nii.gz", "--samples", 4, "--seed", 5, "samples.level=0.5",
                             "--truth", tmp_path / "body.nii"))  # fmt: skip
    assert code == 0, said
    for k in range(5, 9):
        assert here(*words(scan, prior, tmp_path / f"{k}.nii", "--seed", k))[0] == 0
    images = torch.from_numpy(np.stack([voxels(tmp_path / f"{k}.nii") for k in range(5, 9)]))
    low, high = rank_interval(images, 0.5)
    wanted = {"": images.mean(0), "-std": images.std(0), "-low": low, "-high": high}
    for name, value in wanted.items():
        image = nibabel.load(tmp_path / f"r{name}.nii.gz")
        np.testing.assert_allclose(np.asarray(image.dataobj), value, atol=2e-3)
        np.testing.assert_allclose(image.affine, body().affine, atol=1e-4)
    record = json.loads((tmp_path / "r.json").read_text())
    found = record["samples"]
    assert found["seeds"] == [5, 6, 7, 8] and found["level"] == 0.5 and found["interval"] == "rank"
    assert record["config"]["samples"] == {"count": 4, "level": 0.5} and any("not proven" in n for n in record["notes"])
    ours = [read_volume(tmp_path / f"r-{name}.nii.gz").data for name in ("low", "high")]
    assert found["covered"] == pytest.approx(covered((ours[0], ours[1]), body().data), abs=0.01)
    assert read_volume(tmp_path / "r-std.nii.gz").unit == "HU"
    assert (tmp_path / "r-spread.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.checkpoint*")) and not list(tmp_path.glob(".part*"))


def test_interrupted_between_and_within_samples_it_goes_on_bit_for_bit(scan: Path, prior: str, tmp_path: Path) -> None:
    def job(name: str) -> pipeline.Job:
        flags = {"output": {"path": str(tmp_path / name)}, "prior": {"name": prior}, "samples": {"count": 3}}
        return pipeline.resolve(scan, flags, ["sampler.steps=4", "run.every=3", "run.dtype=float32"])

    def stopping(after: int) -> pipeline.Progress:
        def progress(states: Any, steps: int, name: str) -> Any:
            assert steps == 12
            for k, state in enumerate(states):
                if k == after:
                    raise KeyboardInterrupt
                yield state

        return progress

    pipeline.run(job("whole.nii"), False, stopping(99))
    for after in (5, 8):  # within the second sample, between two
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(job("cut.nii"), False, stopping(after))
        assert sorted(p.name for p in tmp_path.glob("cut*")) == ["cut.checkpoint", "cut.checkpoint.previous"]
        with pytest.raises(ValueError, match="another run"):
            pipeline.run(replace(job("cut.nii"), gather=Spread(4)), True, stopping(99))
        pipeline.run(job("cut.nii"), True, stopping(99))
        for name in ("", "-std", "-low", "-high"):
            assert np.array_equal(voxels(tmp_path / f"whole{name}.nii"), voxels(tmp_path / f"cut{name}.nii")), name
        for path in tmp_path.glob("cut*"):
            path.unlink()


def test_dicom_holds_the_mean_alone_and_a_point_estimate_says_so(
    scan: Path, prior: str, tmp_path: Path, here: Any
) -> None:
    code, said = here(*words(scan, prior, tmp_path / "series", "--samples", 2, "--sampler", "reddiff", "--invented"))
    assert code == 0, said
    record = json.loads((tmp_path / "series.json").read_text())
    assert record["samples"]["interval"] == "student"
    for text in ("a DICOM series holds the image alone: std, low", "says nothing of how sure", "Student's"):
        assert any(text in note for note in record["notes"]), text
    assert not list(tmp_path.glob("*.nii*")) and len(list((tmp_path / "series").iterdir())) == 3
    assert (tmp_path / "series-spread.png").exists() and (tmp_path / "series-invented.png").exists()


def test_the_command_keeps_the_best(scan: Path, prior: str, tmp_path: Path, here: Any) -> None:
    code, said = here(*words(scan, prior, tmp_path / "best.nii", "--best-of", 2, "best.density=0.5"))
    assert code == 0, said
    record = json.loads((tmp_path / "best.json").read_text())
    chosen = record["best"]["chosen_seeds"]
    assert set(chosen) <= {0, 1} and record["config"]["best"] == {"count": 2, "density": 0.5, "whole": False}
    assert any("the best of 2 by the residual and the prior's density" in note for note in record["notes"])
    assert not (tmp_path / "best-std.nii").exists()
    assert here(*words(scan, prior, tmp_path / "one.nii", "--seed", chosen[1]))[0] == 0
    best, one = (read_volume(tmp_path / f"{n}.nii").data for n in ("best", "one"))
    assert torch.equal(best[1], one[1])


def test_the_command_averages_copies(scan: Path, prior: str, tmp_path: Path, here: Any) -> None:
    more = ["prior.flips=[-1]", "prior.shifts=[[1, 2]]"]
    code, said = here(*words(scan, prior, tmp_path / "r.nii", *more))
    assert code == 0, said
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["config"]["prior"] == {"name": prior, "flips": [-1], "shifts": [[1, 2]]}
    operator, y, sigma_y = operator_of(read_measurements(scan)[0])
    averaged = Averaged(Chunked(load(prior), 8), (-1,), ((1, 2),))
    wanted = reconstruct(y, operator, averaged, DDS(steps=4), sigma_y).x
    np.testing.assert_allclose(read_volume(tmp_path / "r.nii").data, wanted, atol=0.01)
    assert here(*words(scan, prior, tmp_path / "plain.nii"))[0] == 0
    plain = json.loads((tmp_path / "plain.json").read_text())
    assert plain["fingerprint"] != record["fingerprint"] and plain["config"]["prior"] == {"name": prior}


def test_deterministic_methods_have_a_spread_of_zero(scan: Path, tmp_path: Path, here: Any) -> None:
    assert here("reconstruct", scan, "-o", tmp_path / "f.nii", "--prior", "none", "--sampler", "fbp",
                "--samples", 2)[0] == 0  # fmt: skip
    assert voxels(tmp_path / "f-std.nii").max() == 0
    np.testing.assert_array_equal(voxels(tmp_path / "f-low.nii"), voxels(tmp_path / "f.nii"))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--samples", 1], "1 samples have no spread; 2 or more are wanted"),
        (["samples.level=1.5"], "level is 1.5; a number between 0 and 1"),
        (["samples.cuont=3"], "samples has no field 'cuont'; its fields are: count, level"),
        (["--samples", 3, "--best-of", 3], "one of them is wanted"),
        (["--best-of", 0], "the best of 0 samples is none"),
        (["best.density=-1"], "the density's noise level is -1"),
        (["invented.tau=0"], "tau is 0; a positive number"),
        (["invented.windw=3"], "invented has no field 'windw'; its fields are: tau"),
        (["prior.flips=[3]"], "flips is (3,); -1 (columns)"),
        (["prior.flips=-1"], "prior.flips is -1 (int)"),
        (["prior.shifts=[[1]]"], "prior.shifts is [[1]]"),
        (["--samples", 2, "-o", "taken.nii"], "taken-std.nii is a folder"),
    ],
)
def test_bad_input_gets_one_sentence_and_writes_nothing(
    more: list[Any], said: str, scan: Path, prior: str, tmp_path: Path, here: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken-std.nii").mkdir()
    before = sorted(tmp_path.rglob("*"))
    code, message = here(*words(scan, prior, Path("out.nii"), *more))
    assert code == 2 and said in message and message.startswith("invdiff: "), message
    assert sorted(tmp_path.rglob("*")) == before
