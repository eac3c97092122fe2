"""Training: what is drawn, exact resume, several processes, fine-tuning, and what bad input gets."""

from __future__ import annotations

import csv
import itertools
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from invdiff.datasets import Volume, write_dicom, write_nifti
from invdiff.pipelines import train as pipeline
from invdiff.pipelines.training_data import DataConfig, read_training
from invdiff.priors import PriorInfo, load
from invdiff.priors.launch import Alone
from invdiff.priors.model import NetworkPrior
from invdiff.priors.network import UNet, UNetConfig
from invdiff.priors.slices import Slices, checked, draw_crop, read_slices, split
from invdiff.priors.training import (
    Denoising,
    TrainingConfig,
    learning_rate,
    pack,
    part_loss,
    start,
    train,
    unpack,
    validate,
)

SMALL = UNetConfig(unshuffle=2, channels=(8, 16), blocks=(1, 1), norm_groups=4)
INFO = PriorInfo("toy", "HU", -1000.0, 1000.0, 0.01, 50.0, 0.5, (1.0, 2.0))
TOY = TrainingConfig(images=40, crops=(16, 24), batches=(4, 2), shares=(0.5, 0.5), warmup=8, ema=10, rate=1e-2)
TOML = (
    '[prior]\nname = "toy"\nunit = "HU"\nlow = -1000\nhigh = 1000\nsigma_min = 0.01\nsigma_max = 20\nsigma_data = 0.5\n'
    "[network]\nchannels = [8, 8]\nblocks = [1, 1]\nnorm_groups = 4\n"
    "[training]\nimages = 24\nevery = 8\ncrops = [16]\nbatches = [4]\nshares = [1.0]\nheld_out = 0.34\n"
)


def slices_file(path: Path, subjects: int = 3, **others: Any) -> Path:
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as f:
        f["slices"] = rng.normal(0, 300, (4 * subjects, 24, 24)).astype(np.int16)
        f["subject"] = [f"s{k // 4}".encode() for k in range(4 * subjects)]
        f["pixel_mm"] = np.full(4 * subjects, 1.5, np.float32)
        for name, value in others.items():
            if name in f:
                del f[name]
            f[name] = value
    return path


@pytest.fixture
def words(tmp_path: Path) -> list[object]:
    """A configuration and its data, as the command takes them."""
    (tmp_path / "data").mkdir()
    slices_file(tmp_path / "data" / "a.h5")
    (tmp_path / "toy.toml").write_text(TOML)
    return ["train", tmp_path / "toy.toml", "--data", tmp_path / "data", "-o", tmp_path / "run"]


def command(*words: object, processes: int = 0) -> list[str]:
    """The command line of ``invdiff`` in a process of its own, or in several under torchrun."""
    many = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes else []
    return [sys.executable, *many, "-m", "invdiff.pipelines.cli", *map(str, words)]


ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def test_training_resumes_exactly(tmp_path: Path) -> None:
    slices = read_slices([slices_file(tmp_path / "a.h5")])
    *_, whole = train(start(TOY, SMALL), Denoising(slices, TOY, INFO), TOY, Alone(), None)
    part = next(itertools.islice(train(start(TOY, SMALL), Denoising(slices, TOY, INFO), TOY, Alone(), None), 4, None))
    torch.save(pack(part), tmp_path / "state.pt")
    resumed = unpack(torch.load(tmp_path / "state.pt", weights_only=True), TOY, SMALL)
    *_, end = train(resumed, Denoising(slices, TOY, INFO), TOY, Alone(), None)
    assert end.step == whole.step and end.seen == whole.seen >= 40
    for a, b in zip(end.average.parameters(), whole.average.parameters(), strict=True):
        assert torch.equal(a, b)


def test_workers_change_nothing(tmp_path: Path) -> None:
    slices = read_slices([slices_file(tmp_path / "a.h5")])
    config = replace(TOY, images=8)
    *_, alone = train(start(config, SMALL), Denoising(slices, config, INFO), config, Alone(), None)
    *_, helped = train(start(config, SMALL), Denoising(slices, config, INFO), config, Alone(), None, workers=1)
    assert alone.loss == helped.loss


def test_parts_of_a_step_make_the_whole(tmp_path: Path) -> None:
    slices = read_slices([slices_file(tmp_path / "a.h5")])
    for step in range(6):
        whole = Denoising(slices, TOY, INFO).part(step)
        for world in (2, 3, 5):  # more processes than items, too
            parts = [Denoising(slices, TOY, INFO).part(step, rank, world) for rank in range(world)]
            assert sum(float(p.weight.sum()) for p in parts) == pytest.approx(1)
            for k in range(len(whole.clean)):
                assert torch.equal(parts[k % world].clean[k // world], whole.clean[k])
                assert torch.equal(parts[k % world].noise[k // world], whole.noise[k])
                assert parts[k % world].sigma[k // world] == whole.sigma[k]


def test_gradients_of_the_parts_average_to_that_of_the_whole(tmp_path: Path) -> None:
    """What DDP averages, world times each part's loss, is the gradient of the batch's mean loss."""
    slices = read_slices([slices_file(tmp_path / "a.h5")])

    def gradient(world: int) -> torch.Tensor:
        total = torch.zeros(())
        for rank in range(world):
            network = start(TOY, SMALL).network
            loss = world * part_loss(network, Denoising(slices, TOY, INFO).part(0, rank, world), INFO, None)
            loss.backward()
            total = total + torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]) / world
        return total

    whole = gradient(1)
    for world in (2, 3, 5):
        torch.testing.assert_close(gradient(world), whole, atol=1e-6, rtol=1e-4)


def test_two_processes_train_as_one(words: list[object], tmp_path: Path) -> None:
    config = tmp_path / "toy.toml"
    config.write_text(TOML.replace("batches = [4]", "batches = [3]") + "warmup = 1\nrate = 1e-3\n")
    for name, processes in (("one", 0), ("two", 2)):
        line = command(*words[:-1], tmp_path / name, "--dtype", "float32", processes=processes)
        done = subprocess.run(line, capture_output=True, text=True, env=ONE_THREAD, timeout=240)
        assert done.returncode == 0, done.stderr
        assert f"{processes or 1} x cpu" in done.stdout
    logs = []
    for name in ("one", "two"):
        with (tmp_path / name / "log.csv").open(newline="") as f:
            logs.append(list(csv.DictReader(f)))
    assert len(logs[0]) == len(logs[1]) == 3
    for ours, theirs in zip(*logs, strict=True):
        for key in ours.keys() - {"images_per_s"}:
            assert float(ours[key]) == pytest.approx(float(theirs[key]), rel=1e-4), key
    fresh = start(pipeline.plan_of(config).config, pipeline.plan_of(config).network).network.state_dict()
    states = [torch.load(tmp_path / n / "state.pt", weights_only=True)["network"] for n in ("one", "two")]
    moved = [torch.cat([(s[key] - fresh[key]).flatten() for key in fresh]) for s in states]
    assert float(moved[0].abs().max()) > 5e-3
    assert float((moved[0] - moved[1]).norm() / moved[0].norm()) < 0.01  # of two random walks it would be 1.4


def test_a_killed_run_resumes_exactly(words: list[object], tmp_path: Path) -> None:
    quick = [*words[:-1]]
    config = tmp_path / "toy.toml"
    config.write_text(TOML.replace("images = 24", "images = 200").replace("every = 8", "every = 40"))
    whole = subprocess.run(command(*quick, tmp_path / "whole"), capture_output=True, text=True, env=ONE_THREAD)
    assert whole.returncode == 0, whole.stderr
    run = subprocess.Popen(command(*quick, tmp_path / "cut"), env=ONE_THREAD, stdout=subprocess.DEVNULL)
    began = time.monotonic()
    while not (tmp_path / "cut" / "state.pt").exists() and time.monotonic() - began < 60:
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert run.returncode == -signal.SIGKILL, "it was too quick to be killed"
    done = subprocess.run(command(*quick, tmp_path / "cut", "--resume"), capture_output=True, text=True, env=ONE_THREAD)
    assert done.returncode == 0, done.stderr
    a, b = (load_file(tmp_path / n / "prior" / "weights.safetensors") for n in ("whole", "cut"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    rows = [(tmp_path / n / "log.csv").read_text().splitlines() for n in ("whole", "cut")]
    assert [r.rsplit(",", 1)[0] for r in rows[0]] == [r.rsplit(",", 1)[0] for r in rows[1]]  # but for the speed
    assert not list((tmp_path / "cut").rglob(".part-*"))


def test_an_interrupt_finishes_the_step_and_keeps_it(words: list[object], tmp_path: Path, monkeypatch: Any) -> None:
    original, count = pipeline.train, itertools.count()

    def interrupted(*given: Any) -> Any:
        for state in original(*given):
            if next(count) == 2:
                os.kill(os.getpid(), signal.SIGINT)
            yield state

    given = words[1], words[3], words[5]
    quiet = pipeline.Console(quiet=True)
    monkeypatch.setattr(pipeline, "train", interrupted)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(*given, False, quiet, pipeline.Way())  # type: ignore[arg-type]
    finally:
        signal.signal(signal.SIGINT, handler)
    assert torch.load(tmp_path / "run" / "state.pt", weights_only=True)["step"] == 3
    monkeypatch.undo()
    pipeline.run(*given, True, quiet, pipeline.Way())  # type: ignore[arg-type]
    pipeline.run(words[1], words[3], tmp_path / "whole", False, quiet, pipeline.Way())  # type: ignore[arg-type]
    rows = [(tmp_path / n / "log.csv").read_text().splitlines() for n in ("whole", "run")]
    assert [r.rsplit(",", 1)[0] for r in rows[0]] == [r.rsplit(",", 1)[0] for r in rows[1]]  # but for the speed


def test_training_draws_by_subject_in_prior_units(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as f:  # one subject of 30 slices at 500 HU, one of a single slice at -500
        f["slices"] = np.concatenate([np.full((30, 16, 16), 500), np.full((1, 16, 16), -500)]).astype(np.int16)
        f["subject"] = [b"many"] * 30 + [b"one"]
        f["pixel_mm"] = np.ones(31, np.float32)
    config = TrainingConfig(images=1, crops=(8,), batches=(200,), shares=(1.0,))
    x = Denoising(read_slices([path]), config, INFO).part(0).clean
    assert set(x.unique().tolist()) == {0.5, -0.5}
    assert 0.35 < float((x[:, 0, 0, 0] < 0).float().mean()) < 0.65
    assert torch.equal(x, Denoising(read_slices([path]), config, INFO).part(0).clean)


def test_groups_are_drawn_by_the_power_of_their_subjects(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as f:  # sixteen subjects of contrast A at 500, one of contrast B, skull or not, at -500
        f["slices"] = np.concatenate([np.full((16, 8, 8), 500), np.full((2, 8, 8), -500)]).astype(np.int16)
        f["subject"] = [f"s{k}".encode() for k in range(17)] + [b"s16"]
        f["pixel_mm"] = np.ones(18, np.float32)
        f["contrast"] = [b"A"] * 16 + [b"B"] * 2
        f["skull"] = [b"no"] * 16 + [b"no", b"yes"]
    for power, wanted in ((0.0, 2 / 3), (0.5, 2 / 6), (1.0, 2 / 18)):
        config = TrainingConfig(crops=(8,), batches=(400,), shares=(1.0,), group_power=power)
        x = Denoising(read_slices([path], ("contrast", "skull")), config, INFO).part(0).clean
        assert float((x[:, 0, 0, 0] < 0).float().mean()) == pytest.approx(wanted, abs=0.08)


def test_contrast_changes_keep_the_rest(tmp_path: Path) -> None:
    slices = read_slices([slices_file(tmp_path / "a.h5")])
    plain = replace(TOY, warp=0.0, crops=(24,), batches=(1,), shares=(1.0,))
    same = [draw_crop(slices, plain, INFO, step, 0) for step in range(6)]
    other = [draw_crop(slices, replace(plain, gamma=1.0, brightness=0.2), INFO, step, 0) for step in range(6)]
    for a, b in zip(same, other, strict=True):
        # a monotonic change: the order of the grey values stays
        assert torch.equal(a.flatten().argsort(stable=True), b.flatten().argsort(stable=True))
        assert (a - b).abs().max() > 0.01


def test_larger_crops_get_more_noise(tmp_path: Path) -> None:
    slices = read_slices([slices_file(tmp_path / "a.h5")])
    medians = {}
    for growth in (0.0, 2.0):
        for crop in (8, 24):
            shares = (float(crop == 8), float(crop == 24))
            config = TrainingConfig(
                crops=(8, 24), batches=(300, 300), shares=shares, sigma_growth=growth, sigma_uniform=0.0
            )
            medians[growth, crop] = float(Denoising(slices, config, INFO).part(0).sigma.log().median())
    assert medians[0.0, 24] - medians[0.0, 8] == pytest.approx(0.0, abs=0.25)
    assert medians[2.0, 24] - medians[2.0, 8] == pytest.approx(2 * np.log(3), abs=0.25)


def test_learning_rate_rises_stays_and_falls() -> None:
    config = TrainingConfig(images=1000, warmup=100, decay=0.5, rate=1.0, final=0.1)
    rates = [learning_rate(config, k) for k in (0, 99, 300, 499, 750, 999)]
    assert rates == pytest.approx([0.01, 1.0, 1.0, 1.0, 0.5, 0.1], abs=0.01)


def test_whole_subjects_are_held_out(tmp_path: Path) -> None:
    slices = read_slices([slices_file(tmp_path / "a.h5", subjects=10)])
    ours, theirs = split(slices, 0.2, seed=0)
    assert theirs is not None and theirs.subjects == 2 and ours.subjects == 8
    assert not set(ours.subject) & set(theirs.subject)
    assert split(slices, 0.01, seed=0)[1].subjects == 1  # type: ignore[union-attr]
    assert split(slices, 0.0, seed=0)[1] is None


def test_validation_is_the_same_every_time_and_knows_better_networks(tmp_path: Path) -> None:
    slices = read_slices([slices_file(tmp_path / "a.h5")])

    class Perfect(torch.nn.Module):
        """F of N(0, 0.3^2): 300 HU in prior units of 1000."""

        def forward(self, x: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
            s2 = (8 * label).exp()[:, None, None, None]
            total = (s2 + 0.25).sqrt()
            return x * total * (0.09 / (0.09 + s2) - 0.25 / total.square()) * total / (s2.sqrt() * 0.5)

    fresh = UNet(SMALL).eval().requires_grad_(False)
    fresh.unet.out[-1].conv.weight.normal_(0, 0.5, generator=torch.Generator().manual_seed(0))
    perfect = Perfect()
    perfect.channels = 1  # type: ignore[assignment]
    losses = [
        validate(NetworkPrior(network, INFO), slices, INFO, torch.device("cpu"))  # type: ignore[arg-type]
        for network in (perfect, perfect, fresh)
    ]
    assert losses[0] == losses[1]
    assert all(losses[0][s] < losses[2][s] for s in losses[0])


def test_train_makes_a_prior_and_a_record(words: list[object], tmp_path: Path, here: Any) -> None:
    assert here(*words, "--resume") == (2, f"invdiff: {tmp_path / 'run'} holds no state.pt to resume from")
    assert here(*words)[0] == 0
    assert (tmp_path / "run" / "log.csv").read_text().startswith("seen,step,loss,val,val_0.02")
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "log.csv", "prior", "progress.png", "samples.png", "state.pt",
    }  # fmt: skip
    code, message = here(*words)
    assert code == 2 and "holds a run already; give --resume" in message
    config = tmp_path / "toy.toml"
    config.write_text(TOML.replace("images = 24", "images = 32"))
    assert here(*words, "--resume")[0] == 0
    config.write_text(TOML.replace("crops = [16]", "crops = [12]"))
    code, message = here(*words, "--resume")
    assert code == 2 and "is of another run: training.crops is (16,) there, (12,) now" in message
    config.write_text(TOML)
    (tmp_path / "other").mkdir()
    slices_file(tmp_path / "other" / "a.h5", subjects=4)
    assert "is of another run: data." in here(*words, "--resume", "--validation", tmp_path / "other")[1]
    slices_file(tmp_path / "data" / "b.h5", subject=[b"other"] * 12)
    assert "is of another run: data." in here(*words, "--resume")[1]
    (tmp_path / "data" / "b.h5").unlink()
    good = (tmp_path / "run" / "state.pt").read_bytes()
    for torn in (b"", b"junk", good[: len(good) // 2]):
        (tmp_path / "run" / "state.pt").write_bytes(torn)
        assert "state.pt is truncated or not what torch.save writes" in here(*words, "--resume")[1]
    (tmp_path / "run" / "state.pt").write_bytes(good)
    assert load(tmp_path / "run" / "prior").info.pixel_mm == (1.5, 1.5)
    dreamt = ["sample", "--prior", tmp_path / "run" / "prior", "--size", 16, "--count", 2, "--steps", 2]
    assert here(*dreamt, "-o", tmp_path / "sheet.png")[0] == 0


def test_another_folder_may_be_validated_on(words: list[object], tmp_path: Path, here: Any) -> None:
    (tmp_path / "other").mkdir()
    write_nifti(tmp_path / "other" / "ct.nii.gz", smooth((9, 20, 24), "HU"))
    (tmp_path / "toy.toml").write_text("[data]\nfiles = 'a*.h5'\nvalidation_files = '*.gz'\n" + TOML)
    assert here(*words, "--validation", tmp_path / "other")[0] == 0
    with (tmp_path / "run" / "log.csv").open(newline="") as f:
        assert all(float(row["val_0.5"]) > 0 for row in csv.DictReader(f))


def test_fine_tuning_starts_from_a_prior(words: list[object], tmp_path: Path, here: Any) -> None:
    assert here(*words)[0] == 0
    config = tmp_path / "tune.toml"
    start_from = f'[start]\nprior = "{tmp_path / "run" / "prior"}"\n'
    slow = "[training]\nimages = 4\ncrops = [16]\nbatches = [4]\nshares = [1.0]\nrate = 1e-9\n"
    config.write_text(start_from + slow)
    line = ["train", config, *words[2:-1], tmp_path / "tuned"]
    assert here(*line)[0] == 0
    first, tuned = (load(tmp_path / name / "prior") for name in ("run", "tuned"))
    assert tuned.info == first.info
    for a, b in zip(first.network.parameters(), tuned.network.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-3)
    config.write_text(start_from + slow + "[network]\nblocks = [2, 2]\n")
    assert "that of the prior to start from is another" in here(*line[:-1], tmp_path / "other")[1]
    config.write_text(start_from + slow + '[prior]\nunit = "a.u."\n')
    said = here(*line[:-1], tmp_path / "other")[1]
    assert "prior.unit is 'a.u.', that of the prior to start from is 'HU'" in said


def test_early_stop_keeps_the_best(words: list[object], tmp_path: Path, here: Any, monkeypatch: Any) -> None:
    config = tmp_path / "toy.toml"
    config.write_text(TOML.replace("images = 24", "images = 400") + "patience = 2\n")
    losses = iter([3.0, 1.0, 2.0, 2.0, 0.0])
    monkeypatch.setattr(pipeline, "validate", lambda *_: {0.1: next(losses)})
    assert here(*words)[0] == 0
    with (tmp_path / "run" / "log.csv").open(newline="") as f:
        assert [float(row["val"]) for row in csv.DictReader(f)] == [3.0, 1.0, 2.0, 2.0]
    assert load(tmp_path / "run" / "prior") is not None
    import json

    assert json.loads((tmp_path / "run" / "prior" / "config.json").read_text())["images_seen"] == 16


def smooth(shape: tuple[int, int, int], unit: str, seed: int = 0) -> Volume:
    data = torch.rand(shape, generator=torch.Generator().manual_seed(seed))[:, None]
    affine = np.diag([1.5, 1.5, 3.0, 1.0])
    return Volume(data * 1000 - 800 if unit == "HU" else data * 700, affine, unit)


def test_volumes_become_slices_in_the_priors_unit(tmp_path: Path) -> None:
    for name, shape in (("a", (5, 20, 24)), ("b", (4, 18, 16))):
        (tmp_path / name / "anat").mkdir(parents=True)
        write_nifti(tmp_path / name / "anat" / "t1.nii.gz", smooth(shape, "a.u."))
    write_nifti(tmp_path / "c.nii", smooth((3, 8, 8), "a.u."))
    slices = read_training(tmp_path, DataConfig(), "a.u.")
    assert [slices.images[k].shape for k in (0, 5, 9)] == [(20, 24), (18, 16), (8, 8)]
    assert slices.subjects == 3 and len(slices.images) == 12
    assert float(slices.pixel_mm[0]) == 1.5
    values = np.concatenate([image.ravel() for image in slices.images[:5]]).astype(float)
    assert np.quantile(values, 0.999) == pytest.approx(1.0, abs=2e-3)
    # crops larger than a slice are filled by its edge
    crop = draw_crop(slices, replace(TOY, crops=(32,), batches=(2,), shares=(1.0,)), INFO, 0, 0)
    assert crop.shape == (1, 32, 32)
    assert read_training(tmp_path, DataConfig(files="t1.nii.gz"), "a.u.").subjects == 2


@pytest.mark.parametrize("folder", ["", "patient"])
def test_dicom_series_are_read(folder: str, tmp_path: Path) -> None:
    if folder:
        (tmp_path / "data").mkdir()
    write_dicom(tmp_path / "data" / folder, smooth((4, 12, 10), "HU"))
    slices = read_training(tmp_path / "data", DataConfig(), "HU")
    assert len(slices.images) == 4 and slices.images[0].dtype == np.int16
    assert -801 < slices.images[0].min() < slices.images[0].max() < 201


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("no folder", "is not a folder; one with HDF5, NIfTI or DICOM files is wanted"),
        ("empty folder", "holds no HDF5, NIfTI or DICOM files"),
        ("no data set", "has no data set 'subject'; it has: pixel_mm, slices"),
        ("not hdf5", "is not an HDF5 file that can be read"),
        ("lengths", "the lengths are {'slices': 12, 'subject': 11, 'pixel_mm': 12}; (n h w) and n are wanted"),
        ("too few", "there are 4 slices to train on; at least 8 are wanted"),
        ("constant", "a.h5: all of its 12 slices are constant; images are wanted"),
        ("air in one file only", "its lowest values are"),
        ("two units under one name", "its values run from"),
        ("extreme int16", "its values run from"),
        ("no slice", "there are no slices"),
        ("nothing left to train on", "there are 4 slices to train on; at least 8 are wanted"),
        ("patience without validation", "training.patience is 2 and nothing is validated on"),
        ("negative magnitudes", "an image of magnitudes is wanted"),
        ("output below a file", "cannot be written: Not a directory"),
        ("table that is none", "has 'training'; the tables data, prior, network, training, start are known"),
        ("text for a number", "prior.low is 'a' (str); float is wanted"),
        ("text in a tuple", "training.crops is ['a'] (list); tuple[int, ...] is wanted"),
        ("zero ema", "ema is 0; at least 1 is wanted"),
        ("negative seed", "seed is -1; 0 or more is wanted"),
        ("pattern that is none", "'/x/*' is no pattern of file names"),
        ("no such device", "device 'nonesuch' is not available here"),
        ("half precision", "dtype 'float16' is too narrow for gradients"),
        ("small disk", "cannot be written"),
        ("nan", "a.h5 holds NaN or infinite values; finite ones are wanted"),
        ("other scale", "a.h5: its values run from"),
        ("mixed units", "is in a.u., the prior in HU; volumes of one unit are wanted"),
        ("two channels", "has 2 channels; 1 is wanted"),
        ("full disk", "MB free; this training keeps"),
        ("disk full at the first checkpoint", "state.pt cannot be written: No space left on device"),
        ("wrong table", "has 'netwrok'; the tables data, prior, network, training, start are known"),
        ("wrong field", "network has no field 'layers'; its fields are:"),
        ("colour", "network.image_channels is 3; slices have 1"),
        ("other parameterisation", "prior.parameterisation is 'eps'; training is in 'edm'"),
        ("no toml", "cannot be read as TOML"),
        ("no unit", "lacks prior.unit; HU or a.u. is wanted"),
        ("wrong dtype", "dtype 'float8'; one of auto, float32, bfloat16, float16 is wanted"),
        ("diverging", "the training loss is nan at step"),
    ],
)
def test_bad_input_gets_one_sentence(
    case: str, said: str, words: list[object], tmp_path: Path, here: Any, monkeypatch: Any, request: Any
) -> None:
    data, config = tmp_path / "data", tmp_path / "toy.toml"
    rng, more = np.random.default_rng(0), []
    if case == "no folder":
        words[3] = tmp_path / "nowhere"
    elif case == "empty folder":
        (data / "a.h5").unlink()
    elif case == "no data set":
        with h5py.File(data / "a.h5", "a") as f:
            del f["subject"]
    elif case == "not hdf5":
        (data / "a.h5").write_text("text")
    elif case == "lengths":
        slices_file(data / "a.h5", subject=[b"s"] * 11)
    elif case == "too few":
        slices_file(data / "a.h5", subjects=1)
    elif case == "constant":
        slices_file(data / "a.h5", slices=np.ones((12, 24, 24)) * np.arange(12)[:, None, None])
    elif case == "nan":
        slices_file(data / "a.h5", slices=np.where(rng.random((12, 24, 24)) < 0.1, np.nan, rng.random((12, 24, 24))))
    elif case == "air in one file only":
        slices_file(data / "b.h5", slices=rng.normal(-700, 300, (12, 24, 24)))
        slices_file(data / "a.h5", slices=rng.normal(400, 100, (12, 24, 24)))
    elif case == "two units under one name":
        (data / "other").mkdir()
        slices_file(data / "other" / "a.h5", slices=rng.random((12, 24, 24)) * 0.04)
    elif case == "extreme int16":
        slices_file(data / "a.h5", slices=rng.choice([-10240, 30000], (12, 24, 24)).astype(np.int16))
    elif case == "no slice":
        slices_file(data / "a.h5", slices=np.zeros((0, 24, 24)), subject=np.zeros(0, "S1"), pixel_mm=np.zeros(0))
    elif case == "nothing left to train on":
        slices_file(data / "a.h5", subjects=2)
    elif case == "patience without validation":
        config.write_text(TOML.replace("held_out = 0.34", "held_out = 0.0\npatience = 2"))
    elif case == "negative magnitudes":
        (data / "a.h5").unlink()
        config.write_text(TOML.replace("HU", "a.u."))
        write_nifti(data / "mr.nii", replace(smooth((9, 20, 20), "a.u."), data=-smooth((9, 20, 20), "a.u.").data))
    elif case == "output below a file":
        words[5] = config / "run"
    elif case == "table that is none":
        config.write_text("training = 5\n")
    elif case == "text for a number":
        config.write_text(TOML.replace("low = -1000", 'low = "a"'))
    elif case == "text in a tuple":
        config.write_text(TOML.replace("crops = [16]", 'crops = ["a"]'))
    elif case == "zero ema":
        config.write_text(TOML + "ema = 0\n")
    elif case == "negative seed":
        config.write_text(TOML + "seed = -1\n")
    elif case == "pattern that is none":
        config.write_text("[data]\nfiles = '/x/*'\n" + TOML)
    elif case == "no such device":
        more = ["--device", "nonesuch"]
    elif case == "half precision":
        more = ["--dtype", "float16"]
    elif case == "small disk":
        monkeypatch.setattr(pipeline.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1e12})())
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        monkeypatch.setattr(pipeline, "train", limited(pipeline.train, limits[1]))
        request.addfinalizer(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits))
    elif case == "other scale":
        slices_file(data / "a.h5", slices=rng.random((12, 24, 24)))
    elif case in ("mixed units", "two channels"):
        (data / "a.h5").unlink()
        write_nifti(data / "ct.nii", smooth((9, 20, 20), "HU"))
        volume = smooth((9, 20, 20), "a.u." if case == "mixed units" else "HU")
        two = replace(volume, data=volume.data.expand(-1, 2, -1, -1).clone()) if case == "two channels" else volume
        write_nifti(data / "mr.nii", two)
    elif case == "full disk":
        monkeypatch.setattr(pipeline.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1})())
    elif case == "disk full at the first checkpoint":

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(pipeline.torch, "save", full)
    elif case == "wrong table":
        config.write_text(TOML.replace("[network]", "[netwrok]"))
    elif case == "wrong field":
        config.write_text(TOML.replace("[network]", "[network]\nlayers = 3"))
    elif case == "colour":
        config.write_text(TOML.replace("[network]", "[network]\nimage_channels = 3"))
    elif case == "other parameterisation":
        config.write_text(TOML.replace("[prior]", "[prior]\nparameterisation = 'eps'"))
    elif case == "no toml":
        config.write_text("images: 3")
    elif case == "no unit":
        config.write_text(TOML.replace('unit = "HU"\n', ""))
    elif case == "wrong dtype":
        more = ["--dtype", "float8"]
    elif case == "diverging":
        config.write_text(TOML + "rate = 1e30\nwarmup = 1\n")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    code, message = here(*words, *more)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)  # or what pytest prints into a file is cut off too
    assert code == 2 and said in message, message
    assert message.startswith("invdiff: ") and "Traceback" not in message
    assert not list(tmp_path.rglob(".part-*")) and not list(tmp_path.rglob("state.pt"))


def limited(original: Any, hard: int) -> Any:
    """``train`` on a disk on which no file may grow beyond 2 kB from the first step on."""

    def steps(*given: Any) -> Any:
        for state in original(*given):
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
            yield state

    return steps


def test_constant_slices_of_a_varied_file_are_left_out(tmp_path: Path) -> None:
    slices = np.random.default_rng(0).normal(0, 300, (12, 24, 24))
    slices[[0, 11]] = -1000
    read = read_slices([slices_file(tmp_path / "a.h5", slices=slices)])
    assert len(checked(read, INFO).images) == 10
    assert isinstance(checked(read, INFO), Slices)
