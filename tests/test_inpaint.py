"""``invdiff inpaint``: what is known stays bit by bit, what is marked is filled in, bad input gets one sentence."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from invdiff.circuits import Categorical, Circuit, Gaussian, GridInfo, ImageCircuit, Structure, codes
from invdiff.circuits.autoencoder import Autoencoder, AutoencoderConfig
from invdiff.circuits.images import save
from invdiff.datasets import Storage, Volume, read_nifti, write_nifti
from invdiff.priors import PriorInfo
from invdiff.priors.model import save as save_prior
from invdiff.priors.network import UNet, UNetConfig

SHAPE = (4, 1, 18, 21)
FAST = ("sampler.steps=3", "sampler.sigma_max=40", "run.dtype=float32")


def scan(unit: str = "HU", factor: float = 1.0) -> Volume:
    g = torch.Generator().manual_seed(0)
    smooth = torch.nn.functional.avg_pool2d(torch.randn(*SHAPE[:2], 22, 25, generator=g), 5, 1)
    x = 900 * smooth - 300 if unit == "HU" else factor * smooth.abs()
    affine = np.array([[-1.5, 0, 0, 10], [0, -1.5, 0, 5], [0, 0, 3, -2], [0, 0, 0, 1.0]])
    return Volume(x, affine, unit, storage=STORED)


STORED = Storage((2, 0, 1), (False, True, False))  # the file keeps its axes in another order


def hole() -> Tensor:
    mask = torch.zeros(SHAPE)
    mask[1, :, 5:12, 8:15] = 1
    mask[3, :, 2:4, 3:] = 1
    return mask


def files(folder: Path, mask: Tensor | None = None, volume: Volume | None = None, **place: Any) -> tuple[Path, Path]:
    volume = scan() if volume is None else volume
    write_nifti(folder / "scan.nii.gz", volume)
    marks = replace(volume, data=hole() if mask is None else mask, unit="a.u.", **place)
    write_nifti(folder / "mask.nii.gz", marks)
    return folder / "scan.nii.gz", folder / "mask.nii.gz"


def circuit_folder(folder: Path, low: float = -1000.0, high: float = 2000.0, unit: str = "HU") -> Path:
    """Bright or dark images, which no network has to learn."""
    info = GridInfo("toy", unit, low, high, 4, 5, 4, 100, 0.05)
    inputs = Gaussian(torch.tensor([[-0.9, 0.9]]), torch.full((1, 2), math.log(0.05)))
    structure = Structure((-1,), (0,) * 20, (), (0,) * 20)
    circuit = Circuit(structure, inputs, torch.full((2,), 0.5), torch.full((1, 2, 2), 0.5))
    save(folder / "circuit", ImageCircuit(circuit, info))
    return folder / "circuit"


def codes_folder(folder: Path, low: float = -1000.0, high: float = 2000.0) -> Path:
    """Two codes, bright and dark, that go together all over the image; the decoder is of an untrained network."""
    torch.manual_seed(0)
    model = Autoencoder(AutoencoderConfig((4, 4), 1, 2, 3))
    inputs = Categorical(torch.tensor([[[0.999, 0.001], [0.001, 0.999]]]).log())
    structure = Structure((-1,), (0,) * 20, (), (0,) * 20)
    circuit = Circuit(structure, inputs, torch.full((2,), 0.5), torch.full((1, 2, 2), 0.5))
    info = GridInfo("toy", "HU", low, high, 4, 5, 4, 2, 0.0)
    codes.save(folder / "codes", codes.CodeCircuit(model.eval(), circuit, info))
    return folder / "codes"


def words(folder: Path, prior: str, *more: object, out: str = "out.nii.gz") -> list[object]:
    volume, mask = folder / "scan.nii.gz", folder / "mask.nii.gz"
    return ["inpaint", volume, "--mask", mask, "--prior", prior, "-o", folder / out, *FAST, *more]


@pytest.mark.parametrize("sampler", ["ddnm", "dds", "copaint"])
def test_the_known_voxels_are_kept_bit_by_bit(sampler: str, prior: str, tmp_path: Path, here: Any) -> None:
    volume, _ = files(tmp_path)
    assert here(*words(tmp_path, prior, "--sampler", sampler)) == (0, "")
    before, after = read_nifti(volume), read_nifti(tmp_path / "out.nii.gz")
    marked = hole() != 0
    assert torch.equal(after.data[~marked], before.data[~marked])
    assert bool((after.data[marked] != before.data[marked]).all())
    assert np.allclose(after.affine, before.affine) and after.storage == before.storage
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["slices"] == [1, 3] and record["filled_voxels"] == int(marked.sum())
    assert (tmp_path / "out.png").is_file() and not list(tmp_path.glob("*.checkpoint"))


def test_repaint_and_what_was_there_does_not_matter(prior: str, tmp_path: Path, here: Any) -> None:
    """The marked voxels' own values never reach the result."""
    found = []
    for name, value in (("a", 0.0), ("b", 700.0)):
        (tmp_path / name).mkdir()
        volume = scan()
        volume.data[hole() != 0] = value
        files(tmp_path / name, volume=volume)
        how = ("--sampler", "repaint", "sampler.levels=3", "sampler.jump=1", "sampler.repeats=2")
        more = [w for w in words(tmp_path / name, prior, *how) if w != "sampler.steps=3"]
        assert here(*more) == (0, "")
        found.append(read_nifti(tmp_path / name / "out.nii.gz").data)
    assert torch.equal(found[0], found[1])


def test_steering_follows_what_is_known(prior: str, tmp_path: Path, here: Any) -> None:
    """A circuit of dark and bright images: a bright surrounding makes a bright filling."""
    circuit, means = circuit_folder(tmp_path), []
    for level in (-800.0, 1800.0):
        files(tmp_path, volume=replace(scan(), data=torch.full(SHAPE, level) + scan().data / 100))
        for steer in ("none", "circuit"):
            more = ("--sampler", "ddnm", "--steer", steer, "--circuit", circuit, "steer.sigma_stop=0.01")
            assert here(*words(tmp_path, prior, *more)) == (0, "")
            means.append(float(read_nifti(tmp_path / "out.nii.gz").data[hole() != 0].mean()))
    record = json.loads((tmp_path / "out.json").read_text())
    assert len(record["circuit_sha256"]) == 64 and record["config"]["steer"]["sigma_stop"] == 0.01
    plain, steered = means[2] - means[0], means[3] - means[1]
    assert steered > plain + 500


def test_codes_steer_and_the_known_stays(prior: str, tmp_path: Path, here: Any) -> None:
    volume, _ = files(tmp_path)
    folder, found = codes_folder(tmp_path), []
    for steer in ("none", "codes", "codes"):
        how = ("--sampler", "ddnm", "--steer", steer, "--circuit", folder, "steer.sigma_stop=1.0")
        assert here(*words(tmp_path, prior, *how, "run.chunk=1")) == (0, "")
        found.append(read_nifti(tmp_path / "out.nii.gz").data)
        assert torch.equal(found[-1][hole() == 0], read_nifti(volume).data[hole() == 0])
    assert torch.equal(found[1], found[2]) and not torch.equal(found[0], found[1])
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["config"]["steer"]["kind"] == "codes" and len(record["circuit_sha256"]) == 64


def test_magnitudes_have_no_unit(tmp_path: Path, here: Any) -> None:
    torch.manual_seed(0)
    info = PriorInfo("toy", "a.u.", 0.0, 1.0, 0.01, 50.0, 0.5, (1.0, 2.0))
    save_prior(tmp_path / "toy", UNet(UNetConfig(channels=(8, 8), blocks=(1, 1), norm_groups=4)), info)
    found = []
    for factor in (1.0, 300.0):
        files(tmp_path, volume=scan("a.u.", factor))
        assert here(*words(tmp_path, str(tmp_path / "toy"))) == (0, "")
        found.append(read_nifti(tmp_path / "out.nii.gz").data / factor)
    torch.testing.assert_close(found[0], found[1], atol=1e-3, rtol=1e-3)


def test_an_interrupted_run_goes_on_bit_equal(prior: str, tmp_path: Path, here: Any, monkeypatch: Any) -> None:
    from invdiff.samplers import DDNM

    files(tmp_path)
    circuit = circuit_folder(tmp_path)
    steered = ("--sampler", "ddnm", "--steer", "circuit", "--circuit", circuit, "steer.sigma_stop=1.0")
    assert here(*words(tmp_path, prior, *steered, out="whole.nii.gz"))[0] == 0
    plain, calls = DDNM.step, list[int]()

    def stop(*words: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(*words)

    monkeypatch.setattr(DDNM, "step", stop)
    code, said = here(*words(tmp_path, prior, *steered, "run.every=1"))
    assert code == 130 and "with --resume goes on" in said
    assert here(*words(tmp_path, prior, *steered, "--resume"))[0] == 0
    assert len(calls) == 4
    assert torch.equal(read_nifti(tmp_path / "out.nii.gz").data, read_nifti(tmp_path / "whole.nii.gz").data)


def shifted() -> Any:
    affine = scan().affine.copy()
    affine[0, 3] += 4.0
    return affine


@pytest.mark.parametrize(
    ("change", "more", "message"),
    [
        ({"mask": torch.zeros(SHAPE)}, (), "is empty: there is nothing to fill in"),
        ({"mask": torch.ones(SHAPE)}, (), "is full: nothing is known"),
        ({"mask": 0.5 * hole()}, (), "holds 0.5; 1 .fill in. and 0 .keep. alone"),
        ({"mask": hole()[:3]}, (), r"is .3, 1, 18, 21., the volume .4, 1, 18, 21."),
        ({"affine": shifted()}, (), "lies up to 4 mm from the volume; one grid"),
        ({"volume": scan("a.u.")}, (), "the volume is in a.u., the prior in HU"),
        ({}, ("--sampler", "ddim"), "'ddim' does not fill in slices from a prior"),
        ({}, ("--sampler", "diffusionmbir"), "each for itself; a sampler that does"),
        ({}, ("--sampler", "cgls"), "'cgls' does not fill in"),
        ({}, ("--steer", "magic"), "steer is 'magic'; one of none, circuit, codes"),
        ({}, ("--steer", "circuit", "steer.sigma_stop=60"), "starts at sigma 40 and steering ends at 60"),
        ({}, ("--steer", "circuit", "--circuit", "nowhere"), "no circuit 'nowhere'"),
        ({}, ("--steer", "codes", "--circuit", "nowhere"), "no circuit 'nowhere'"),
        ({}, ("--steer", "codes", "steer.sigma_stop=60"), "starts at sigma 40 and steering ends at 60"),
        ({}, ("--steer", "circuit", "--circuit", "CODES"), "is a circuit over codes; one over cells is wanted"),
        ({}, ("--steer", "codes", "--circuit", "CELLS"), "over the cells of an image; one over codes is wanted"),
        ({}, ("--steer", "codes", "--circuit", "OTHER-CODES"), "circuit 'toy' is of 0 to 1 HU, prior 'toy' of -1000"),
        ({}, ("--steer", "circuit", "--circuit", "OTHER"), "circuit 'toy' is of 0 to 1 HU, prior 'toy' of -1000 to"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_sentence(
    change: dict[str, Any], more: tuple[str, ...], message: str, prior: str, tmp_path: Path, here: Any
) -> None:
    files(tmp_path, **change)
    made = {
        "OTHER": lambda: circuit_folder(tmp_path, 0.0, 1.0),
        "CELLS": lambda: circuit_folder(tmp_path),
        "CODES": lambda: codes_folder(tmp_path),
        "OTHER-CODES": lambda: codes_folder(tmp_path, 0.0, 1.0),
    }
    code, said = here(*words(tmp_path, prior, *(made[w]() if w in made else w for w in more)))
    assert code == 2 and re.search(message, said), said
    assert not (tmp_path / "out.nii.gz").exists() and not (tmp_path / "out.json").exists()
