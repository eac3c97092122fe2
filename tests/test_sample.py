"""Images without measurements: the Problem that has none, ``invdiff.sample``, and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.image
import nibabel
import numpy as np
import pytest
import torch
from torch import Tensor

import invdiff
from invdiff.pipelines.pictures import sheet
from invdiff.priors import Chunked, GaussianPrior, load
from invdiff.problem import Nothing, unconditional
from invdiff.protocols import Operator, Space
from invdiff.reconstruction import sample
from invdiff.run import DivergedError
from invdiff.samplers import DDS, Heun


def gaussian() -> GaussianPrior:
    return GaussianPrior.smooth((1, 5, 6), length=1.0, deviation=0.5, mean=-0.2)


def test_nothing_measures_nothing() -> None:
    operator = Nothing(Space((4, 1, 2, 3), torch.float32))
    x = torch.randn(4, 1, 2, 3)
    y = operator.forward(x)
    assert isinstance(operator, Operator) and (y.shape, y.dtype) == operator.range
    assert torch.equal(operator.vjp(x, y), torch.zeros(4, 1, 2, 3))


def test_sample_draws_images_that_depend_on_seed_and_number_alone() -> None:
    prior = gaussian()
    assert invdiff.sample is sample
    four = sample(prior, (4, 1, 5, 6), seed=3)
    assert four.x.shape == (4, 1, 5, 6) and four.x.dtype == torch.float32
    assert torch.equal(four.x, sample(prior, (4, 1, 5, 6), seed=3, chunk=2).x)
    assert torch.equal(four.x[:2], sample(prior, (2, 1, 5, 6), seed=3).x)
    assert (four.x - sample(prior, (4, 1, 5, 6), seed=4).x).abs().max() > 0.1
    record = four.record
    assert record["sampler"]["kind"] == "DPMpp2M" and record["seed"] == 3 and record["evaluations"] == 20


def test_a_broken_prior_is_found_without_measurements() -> None:
    class Broken:
        channels = 1

        def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
            return x * float("nan")

    with pytest.raises(DivergedError, match="NaN or infinite at step"):
        sample(Broken(), (2, 1, 5, 6), Heun(4))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: unconditional((3, 5, 6), gaussian()), r"shape is \(3, 5, 6\); \(s c h w\)"),
        (lambda: unconditional((0, 1, 5, 6), gaussian()), r"shape is \(0, 1, 5, 6\)"),
        (lambda: unconditional((2, 3, 5, 6), gaussian()), "has 3 channels; the prior has 1"),
        (lambda: sample(gaussian(), (1, 1, 2, 3), DDS()), "DDS reconstructs from measurements"),
        (lambda: DDS().init(unconditional((1, 1, 2, 3), gaussian()).problem), "needs a linear operator; Nothing"),
    ],
)
def test_what_does_not_fit_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_the_command_writes_sheet_record_and_volume(prior: str, tmp_path: Path, here: Any) -> None:
    out, volume = tmp_path / "sheet.png", tmp_path / "samples.nii.gz"
    code, said = here("sample", "--prior", prior, "--solver", "heun", "--steps", 3, "--count", 3, "--size", "17x24",
                      "--seed", 5, "--dtype", "float32", "--chunk", 2, "-o", out, "--volume", volume,
                      "sampler.sigma_max=40", "sampler.churn=1")  # fmt: skip
    assert code == 0, said
    record = json.loads((tmp_path / "sheet.json").read_text())
    assert record["config"]["sampler"] == {
        "kind": "heun", "steps": 3, "sigma_max": 40.0, "sigma_min": 0.01, "grid": "karras",
        "churn": 1.0, "churn_min": 0.05, "churn_max": 50.0, "churn_noise": 1.0,
    }  # fmt: skip
    assert record["seed"] == 5 and record["evaluations"] == 5 and record["unit"] == "HU"
    assert len(record["prior_sha256"]) == 64 and record["versions"]["torch"] == torch.__version__
    wanted = sample(Chunked(load(prior), 2), (3, 1, 17, 24), Heun(3, sigma_max=40.0, churn=1.0), seed=5).x
    stored = nibabel.load(volume)
    assert stored.shape == (24, 17, 3)  # columns, rows, images
    np.testing.assert_allclose(np.sort(np.asarray(stored.dataobj).ravel()), wanted.flatten().sort().values, atol=0.1)
    assert out.read_bytes().startswith(b"\x89PNG") and sorted(p.suffix for p in tmp_path.glob("s*.*")) == [
        ".gz", ".json", ".png"
    ]  # fmt: skip


def test_a_sheet_shows_every_image_in_every_window(tmp_path: Path) -> None:
    """Images of one grey each: every grey is found in the picture, of both windows."""
    values = torch.linspace(-150, 230, 11)
    sheet(tmp_path / "s.png", values[:, None, None].expand(11, 9, 14), "HU", {"a": (-1000, 2000), "b": (-160, 240)})
    shown = set(np.round(255 * matplotlib.image.imread(tmp_path / "s.png")[..., 0]).astype(int).ravel())
    for low, high in ((-1000, 2000), (-160, 240)):
        for value in values.tolist():
            grey = 255 * (value - low) / (high - low)
            assert any(abs(grey - g) <= 1 for g in shown), (low, value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--solver", "dds"], "'dds' does not sample without measurements; those that do: ddim, ddpm, deis3m, dpmpp2m"),
        (["--solver", "magic"], "'magic' does not sample without measurements; those that do: ddim"),
        (["--count", 0], "count is 0; 1 to 1024"),
        (["--size", "12by9"], "size is '12by9'; pixels are wanted, such as 256"),
        (["--size", "0x12"], "size is '0x12'; 8 to 4096"),
        (["--steps", 0], "DPMpp2M.steps is 0"),
        (["--prior", "nonesuch"], "no prior 'nonesuch'"),
        (["--prior", "none"], "no prior was given to denoise"),
        (["--device", "nonsense"], "device 'nonsense' is not available"),
        (["-o", "sheet.jpg"], "sheet.jpg ends in '.jpg'; .png is wanted"),
        (["-o", "no/such/sheet.png"], "is not there"),
        (["--volume", "x.dcm"], "x.dcm ends in '.dcm'; .nii or .nii.gz"),
        (["--volume", "no/such/x.nii"], "is not there"),
        (["sampler.order=3"], "DPMpp2M.order is 3"),
        (["sampler.roh=3"], "dpmpp2m has no field 'roh'; its fields are: steps, sigma_max"),
        (["images.count=many"], "images.count is 'many' (str); int is wanted"),
        (["images.depth=3"], "images has no field 'depth'; its fields are: count, size"),
        (["input.scan=x"], "no table 'input'; there are: prior, sampler, images, run, output"),
        (["run.seed=x"], "run.seed is 'x' (str); int is wanted"),
    ],
)
def test_bad_input_gets_one_sentence_and_writes_nothing(
    words: list[Any], said: str, prior: str, tmp_path: Path, here: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    code, message = here("sample", "--size", 16, "--steps", 2, "--prior", prior, *words)
    assert code == 2 and said in message and message.startswith("invdiff: ") and "Traceback" not in message, message
    assert sorted(tmp_path.rglob("*")) == before
