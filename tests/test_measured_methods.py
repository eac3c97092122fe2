"""Every method of ``invdiff train --from`` through the command: an ambient prior, one step, images, scenes."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from invdiff import reconstruct
from invdiff.datasets import Measurements, read_measurements, write_measurements
from invdiff.measured import ForwardModel
from invdiff.measured.ambient import AmbientPrior
from invdiff.measured.model import extra_channels
from invdiff.measured.nonlinear import NonlinearExample, nonlinear_example_of
from invdiff.noise import KeyedNoise
from invdiff.operators import CartesianMRI, ParallelBeam, VolumeRenderer
from invdiff.operators.mri.simulate import birdcage_maps
from invdiff.pipelines.measured_data import collect
from invdiff.pipelines.scans import operator_of
from invdiff.priors import GaussianPrior, PriorInfo, load
from invdiff.priors.network import UNet, UNetConfig
from invdiff.samplers import DDS, ForwardModelDiffusion, OneStep, REDDiff
from invdiff.units import MU_WATER

SIZE, VIEWS, SCANS = 14, 9, 5
INFO = PriorInfo("toy", "HU", -1000.0, 1000.0, 0.05, 20.0, 0.5, (0.0, 0.0))
TOML = (
    '[measured]\nmethod = "METHOD"\nunseen = 0.5\n[prior]\nname = "toy"\nunit = "HU"\nlow = -1000\nhigh = 1000\n'
    "sigma_max = 20\nsigma_data = 0.5\n[network]\nchannels = [8, 8]\nblocks = [1, 1]\nnorm_groups = 4\n"
    "[training]\nimages = 8\nevery = 4\nbatch = 2\nheld_out = 0.2\n"
)


def write_scans(folder: Path) -> None:
    """CT scans of one slice each by random views, and their images in 1/mm."""
    g, scans, images = torch.Generator().manual_seed(1), [], []
    for k in range(SCANS):
        angles = (math.pi * torch.rand(VIEWS + k, generator=g)).tolist()
        A = ParallelBeam((1, 1, SIZE, SIZE), angles, pixel_mm=20.0)
        x = MU_WATER * (1 + 0.2 * torch.randn(1, 1, SIZE, SIZE, generator=g))
        y = A(x) + 0.02 * torch.randn(A.range.shape, generator=g)
        affine = np.diag([20.0, 20.0, 5.0, 1.0])
        scans.append(Measurements(y, "parallel", A.fields(), affine, "1/mm", 0.02, None, MU_WATER, True))
        images.append(x)
    write_measurements(folder / "scans.h5", scans)
    with h5py.File(folder / "images.h5", "w") as file:
        file["images"] = torch.cat(images).numpy()


def trained(folder: Path, here: Any, method: str, *more: object) -> Any:
    write_scans(folder)
    (folder / "toy.toml").write_text(TOML.replace("METHOD", method))
    words = ["train", folder / "toy.toml", "--from", folder / "scans.h5", "-o", folder / "run", *more]
    code, said = here(*words)
    assert (code, said) == (0, "")
    return load(folder / "run" / "model")


def test_images_fit_their_scans(tmp_path: Path) -> None:
    """What is shown to a supervised method is what was measured: in prior units, A truth is y but for the noise."""
    write_scans(tmp_path)
    found = collect([tmp_path / "scans.h5"], INFO, 1, None, tmp_path / "images.h5")
    for example in found.examples:
        assert example.truth is not None
        left = example.y - example.operator.forward(example.truth)
        assert float(left.square().mean().sqrt()) == pytest.approx(example.sigma, rel=0.2)
    assert found.widest is not None and found.widest.y.shape[2] == VIEWS + SCANS - 1
    with h5py.File(tmp_path / "few.h5", "w") as file:
        file["images"] = np.zeros((SCANS - 1, 1, SIZE, SIZE), np.float32)
    with h5py.File(tmp_path / "flat.h5", "w") as file:
        file["images"] = np.zeros((SCANS, SIZE, SIZE), np.float32)
    for name, said in (("few", "fewer than the slices"), ("flat", "is wanted"), ("scans", "no HDF5 file with images")):
        with pytest.raises(ValueError, match=said):
            collect([tmp_path / "scans.h5"], INFO, 1, None, tmp_path / f"{name}.h5")


def test_an_ambient_prior_serves_the_usual_samplers(tmp_path: Path, here: Any) -> None:
    prior = trained(tmp_path, here, "ambient")
    assert isinstance(prior, AmbientPrior)
    kept = read_measurements(tmp_path / "run" / "model" / "scan.h5")[0]
    assert not bool(kept.y.any())  # the folder holds an operator, nobody's scan
    assert kept.y.shape[2] == VIEWS + SCANS - 1
    operator, y, sigma = operator_of(read_measurements(tmp_path / "scans.h5")[0])
    for sampler in (REDDiff(steps=2), DDS(steps=2)):
        x = reconstruct(y, operator, prior, sampler, sigma).x
        assert bool(torch.isfinite(x).all())
    with pytest.raises(ValueError, match=r"trained by ambient|is one of images"):
        reconstruct(y, operator, prior, ForwardModelDiffusion(steps=2), sigma)


@pytest.mark.parametrize("method", ["ssdu", "supervised"])
def test_one_step_models_give_an_image_and_no_samples(tmp_path: Path, here: Any, method: str) -> None:
    more = ["--images", tmp_path / "images.h5"] if method == "supervised" else []
    model = trained(tmp_path, here, method, *more)
    assert isinstance(model, ForwardModel)
    said = (tmp_path / "run" / "model" / "README.md").read_text()
    assert ("**it saw images**" in said, "**it saw no image**" in said) == (method == "supervised", method == "ssdu")
    operator, y, sigma = operator_of(read_measurements(tmp_path / "scans.h5")[1])
    images = [reconstruct(v, operator, model, OneStep(), sigma, seed=k).x for k, v in enumerate((y, y, 0.9 * y))]
    assert torch.equal(images[0], images[1])
    assert 1e-3 < float((images[0] - images[2]).norm() / images[0].norm()) < 1
    with pytest.raises(ValueError, match=f"trained by {method}; the sampler forward-model wants one of forward-model"):
        reconstruct(y, operator, model, ForwardModelDiffusion(steps=2), sigma)
    with pytest.raises(ValueError, match="it serves the sampler one-step alone"):
        reconstruct(y, operator, model, DDS(steps=2), sigma)
    with pytest.raises(ValueError, match="is one of images; the sampler one-step wants a model of invdiff train"):
        reconstruct(y, operator, GaussianPrior(torch.zeros(1), torch.ones(1)), OneStep(), sigma)
    words = ("--sampler", "one-step", "--prior", tmp_path / "run" / "model", "-o", tmp_path / "x.nii.gz")
    code, said = here("reconstruct", tmp_path / "scans.h5", *words)
    assert code == 0 and (tmp_path / "x.nii.gz").exists(), said


def test_complex_scans_are_learned_from_and_reconstructed_in_one_step(tmp_path: Path, here: Any) -> None:
    """A network of two channels: the sampler wants the model, as baselines without a prior do not."""
    g, scans = torch.Generator().manual_seed(2), []
    for k in range(SCANS):
        mask = torch.zeros(SIZE, SIZE, dtype=torch.bool)
        mask[:, torch.randperm(SIZE, generator=g)[:6]] = True
        mask[:, SIZE // 2 - 1 : SIZE // 2 + 1] = True
        A = CartesianMRI(mask, birdcage_maps(3, (SIZE, SIZE)))
        x = torch.polar(0.5 + 0.1 * torch.randn(1, 1, SIZE, SIZE, generator=g), torch.full((1, 1, SIZE, SIZE), 0.3))
        y = A(x) + 0.02 * mask * KeyedNoise(k)(0, torch.empty(A.range.shape, dtype=A.range.dtype))
        scans.append(Measurements(y, "cartesian-mri", A.fields(), np.eye(4), "a.u.", 0.02, None, None, True))
    write_measurements(tmp_path / "k.h5", scans)
    toml = TOML.replace("METHOD", "ssdu").replace('"HU"', '"a.u."').replace("1000", "1")
    toml = toml.replace("[network]\n", "[network]\nimage_channels = 2\n") + '[mri]\nchannels = "complex"\n'
    (tmp_path / "toy.toml").write_text(toml)
    code, said = here("train", tmp_path / "toy.toml", "--from", tmp_path / "k.h5", "-o", tmp_path / "run")
    assert code == 0, said
    write_measurements(tmp_path / "one.h5", scans[:1])
    words = ("--sampler", "one-step", "--prior", tmp_path / "run" / "model", "-o", tmp_path / "x.nii.gz")
    code, said = here("reconstruct", tmp_path / "one.h5", *words, "mri.channels=complex")
    assert code == 0 and (tmp_path / "x.nii.gz").exists(), said


def test_a_supervised_forward_model_samples(tmp_path: Path, here: Any) -> None:
    model = trained(tmp_path, here, "forward-model-supervised", "--images", tmp_path / "images.h5")
    operator, y, sigma = operator_of(read_measurements(tmp_path / "scans.h5")[1])
    x = reconstruct(y, operator, model, ForwardModelDiffusion(steps=2), sigma).x
    assert bool(torch.isfinite(x).all())


def test_supervised_methods_want_images_and_others_none(tmp_path: Path, here: Any) -> None:
    write_scans(tmp_path)
    (tmp_path / "toy.toml").write_text(TOML.replace("METHOD", "supervised"))
    code, said = here("train", tmp_path / "toy.toml", "--from", tmp_path / "scans.h5", "-o", tmp_path / "run")
    assert code == 2 and "a supervised method wants one of every scan: --images FILE" in said
    code, said = here(
        "train", tmp_path / "toy.toml", "--data", tmp_path, "--images", tmp_path / "images.h5", "-o", tmp_path / "run"
    )
    assert code == 2 and "--images goes with --from" in said
    (tmp_path / "toy.toml").write_text(TOML.replace("METHOD", "ssdu"))
    words = ("train", tmp_path / "toy.toml", "--from", tmp_path / "scans.h5", "--images", tmp_path / "images.h5")
    code, said = here(*words, "-o", tmp_path / "run")
    assert code == 2 and "the method ssdu is shown no images" in said and not (tmp_path / "run").exists()


D, H, W = 3, 5, 6
SCENE = PriorInfo("scenes", "a.u.", -1.0, 1.0, 0.05, 20.0, 0.5, (0.0, 0.0))


def scene_file(path: Path, count: int = 4) -> Path:
    scans = []
    for k in range(count):
        g = torch.Generator().manual_seed(k)
        A = VolumeRenderer((1, 4 * D, H, W), 6.28 * torch.rand(1, 5, generator=g).double(), size=(7, 4), samples=9)
        y = A(0.5 * torch.randn(A.domain.shape, generator=g))
        y = y + 0.05 * torch.randn(y.shape, generator=g)
        scans.append(Measurements(y, A.kind, A.fields(), np.eye(4), "a.u.", 0.05, None, None, True))
    write_measurements(path, scans)
    return path


def test_scenes_are_examples_whose_parts_are_their_cameras(tmp_path: Path) -> None:
    example = collect([scene_file(tmp_path / "scenes.h5")], SCENE, 4 * D, None).examples[1]
    assert isinstance(example, NonlinearExample)
    g = torch.Generator().manual_seed(5)
    x, chosen = torch.randn(example.operator.domain.shape, generator=g), torch.tensor([0, 1, 0, 1, 1])
    whole = (example.operator.forward(x) - example.y)[:, [1, 3, 4]].square().mean()
    torch.testing.assert_close(example.misfit(x, example.y, chosen), whole)
    other = example.y.clone()
    other[:, [0, 2]] = 7.0
    assert float(example.misfit(x, other, chosen)) == pytest.approx(float(whole))
    ours, theirs = (example.lift(y, chosen, 0.05, 0.5) for y in (example.y, other))
    assert torch.equal(ours.image, theirs.image)
    assert float((example.lift(example.y, 1 - chosen, 0.05, 0.5).image - ours.image).abs().max()) > 1e-4
    assert float(ours.kept.max()) < 1e-5  # features recover nothing
    with pytest.raises(ValueError, match="no lift of its own"):
        nonlinear_example_of(Blind(), example.y, 0.05)


class Blind:
    """An operator with views and without a lift."""

    views = (0, 1)


def test_scenes_are_sampled_from_one_picture(tmp_path: Path, here: Any) -> None:
    """Through the command that trains; samples see the picture given, are keyed, and differ from one another."""
    toml = TOML.replace("METHOD", "forward-model").replace('"HU"', '"a.u."').replace("1000", "1")
    toml = toml.replace("[network]\n", f"[network]\nimage_channels = {4 * D}\nunshuffle = 1\n")
    (tmp_path / "toy.toml").write_text(toml)
    scans = scene_file(tmp_path / "scenes.h5")
    assert here("train", tmp_path / "toy.toml", "--from", scans, "-o", tmp_path / "run") == (0, "")
    model = load(tmp_path / "run" / "model")
    fields = {"size": (7, 4), "samples": 9}
    A, y = VolumeRenderer((2, 4 * D, H, W), [0.4], **fields), read_measurements(scans)[0].y[:, :1].repeat(2, 1, 1, 1, 1)
    sampler = ForwardModelDiffusion(steps=4, target="unmeasured", views=3)
    one, again, other = (reconstruct(v, A, model, sampler, 0.05, seed=2).x for v in (y, y, 1 - y))
    assert torch.equal(one, again)
    assert float((one - other).abs().max()) > 1e-3
    assert float((one[0] - one[1]).abs().max()) > 1e-4
    with pytest.raises(ValueError, match="at least 2 are wanted"):
        reconstruct(y, A, model, replace(sampler, views=1), 0.05)


def test_cameras_of_the_whole_go_round() -> None:
    a = VolumeRenderer((1, 4 * D, H, W), [0.4, 3.0], size=(7, 4))
    assert a.whole(4).azimuth.tolist() == pytest.approx([0.4 + k * math.pi / 2 for k in range(4)])
    assert a.unmeasured(4).azimuth.tolist() == pytest.approx([0.4 + k * math.pi / 2 for k in (1, 2, 3)])


def test_the_networks_of_all_methods_are_alike() -> None:
    network = UNet(UNetConfig(channels=(8, 8), blocks=(1, 1), norm_groups=4), extra_channels(1))
    assert network.unet.conv_in.layer.conv.in_channels == 4 * (1 + extra_channels(1))
