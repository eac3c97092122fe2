"""The command line for MR: simulate, reconstruct with every way, NIfTI and DICOM out, and what bad input gets."""

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

from invdiff.datasets import Volume, read_measurements, read_volume, write_measurements, write_nifti
from invdiff.operators import CartesianMRI
from invdiff.operators.mri.calibration import image_scale
from invdiff.operators.mri.grappa import grappa
from invdiff.operators.mri.masks import uniform_mask
from invdiff.operators.mri.simulate import birdcage_maps, simulate_kspace
from invdiff.pipelines.mri import MRIConfig, MRSimulation, completed, simulate, way_of
from invdiff.priors import PriorInfo
from invdiff.priors.model import save
from invdiff.priors.network import UNet, UNetConfig
from invdiff.samplers import DDS, SENSE, ZeroFilled

SHAPE = (3, 40, 46)
PEAK = 700.0


def head(shape: tuple[int, int, int] = SHAPE) -> Volume:
    """A magnitude phantom with an off-centre lesion, slices that differ, in an oblique world."""
    s, h, w = shape
    y, x = torch.meshgrid((torch.arange(h) - h / 2) / h, (torch.arange(w) - w / 2) / w, indexing="ij")
    data = torch.zeros(s, 1, h, w)
    for k in range(s):
        data[k, 0][(y / 0.42) ** 2 + (x / 0.36) ** 2 < 1] = 0.5 * PEAK
        data[k, 0][(y - 0.1) ** 2 + (x + 0.1 - 0.05 * k) ** 2 < 0.01] = PEAK
    c, t = np.cos(0.1), np.sin(0.1)
    affine = np.eye(4)
    affine[:3, :3] = np.array([[-c, t, 0], [-t, -c, 0], [0, 0, 1]]) @ np.diag([0.9, 0.9, 3.0])
    affine[:3, 3] = [31.0, -17.0, 5.5]
    return Volume(data, affine, "a.u.")


def lines(step: int = 2, centre: int = 14) -> Tensor:
    mask = torch.zeros(SHAPE[1:], dtype=torch.bool)
    mask[:, ::step] = True
    mask[:, 23 - centre // 2 : 23 + centre // 2] = True
    return mask


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    measured, _ = simulate(head(), MRSimulation(coils=4, noise=0.5), lines())
    write_measurements(tmp_path / "k.h5", [measured])
    write_nifti(tmp_path / "truth.nii.gz", head())
    return tmp_path / "k.h5"


@pytest.fixture
def magnitude_prior(tmp_path: Path) -> str:
    torch.manual_seed(0)
    info = PriorInfo("toy-mr", "a.u.", 0.0, 1.0, 0.01, 50.0, 0.5, (0.8, 1.0))
    save(tmp_path / "toy-mr", UNet(UNetConfig(channels=(8, 8), blocks=(1, 1), norm_groups=4)), info)
    return str(tmp_path / "toy-mr")


@pytest.mark.parametrize("channels", ["magnitude", "complex"])
@pytest.mark.parametrize("kind", ["sense", "l1wavelet", "tv"])
def test_the_whole_way(kind: str, channels: str, scan: Path, tmp_path: Path, here: Any) -> None:
    out = tmp_path / "recon.nii.gz"
    code, said = here("reconstruct", scan, "--prior", "none", "--sampler", kind, "-o", out,
                      "--truth", tmp_path / "truth.nii.gz", f"mri.channels={channels}")  # fmt: skip
    assert code == 0, said
    image, given = nibabel.load(out), nibabel.load(tmp_path / "truth.nii.gz")
    np.testing.assert_allclose(image.affine, given.affine, atol=1e-4)
    ours, truth = (np.asarray(v.dataobj) for v in (image, given))
    assert ours.shape == truth.shape and ours.min() >= 0
    assert np.sqrt(np.mean((ours - truth) ** 2)) < 0.06 * PEAK
    phase = np.asarray(nibabel.load(tmp_path / "recon-phase.nii.gz").dataobj)
    assert phase.shape == ours.shape and np.abs(phase).max() <= np.pi + 1e-5 and phase[truth > 0].std() > 0.1
    record = json.loads((tmp_path / "recon.json").read_text())
    assert record["mri"]["channels"] == channels and record["unit"] == "a.u."
    assert record["mri"]["scale"] == pytest.approx(PEAK, rel=0.15)
    assert record["config"]["mri"]["channels"] == channels
    assert (tmp_path / "recon.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("channels", ["magnitude", "complex"])
def test_a_prior_in_its_own_unit_serves_any_scanner(
    channels: str, scan: Path, magnitude_prior: str, tmp_path: Path, here: Any
) -> None:
    """The answer moves with the scanner's unit, and the data are matched."""
    measured = read_measurements(scan)[0]
    small = replace(measured, y=1e-6 * measured.y, sigma_y=1e-6 * measured.sigma_y)
    write_measurements(tmp_path / "small.h5", [small])
    images = []
    for name in ("k", "small"):
        words = ["reconstruct", tmp_path / f"{name}.h5", "--prior", magnitude_prior, "--sampler", "dds",
                 "-o", tmp_path / f"{name}.nii", "--dtype", "float32", "sampler.steps=3"]  # fmt: skip
        code, said = here(*words, f"mri.channels={channels}")
        assert code == 0, said
        images.append(np.asarray(nibabel.load(tmp_path / f"{name}.nii").dataobj))
    np.testing.assert_allclose(1e6 * images[1], images[0], atol=0.01 * PEAK)
    record = json.loads((tmp_path / "k.json").read_text())
    half = record["mri"]["scale"] / 2
    wanted = (0.0, 2 * half) if channels == "magnitude" else (-half, half)
    assert (record["prior"]["low"], record["prior"]["high"]) == pytest.approx(wanted)
    assert len(record["prior_sha256"]) == 64


def test_zero_filling_and_dicom(scan: Path, tmp_path: Path, here: Any) -> None:
    measured = read_measurements(scan)[0]
    for out in ("z.nii", "series"):
        assert here("reconstruct", scan, "--prior", "none", "--sampler", "zero-filled", "-o", tmp_path / out)[0] == 0
    operator = CartesianMRI(**measured.fields)
    series, nifti = read_volume(tmp_path / "series"), read_volume(tmp_path / "z.nii")
    away = operator.adjoint(measured.y).abs() - nifti.data  # the part under another phase than the estimated one
    assert float(away.min()) > -1e-3 * PEAK and float(away.max()) < 0.15 * PEAK
    np.testing.assert_allclose(series.affine, nifti.affine, atol=1e-3)
    assert series.unit == "a.u." and float((series.data - nifti.data).abs().max()) < 1e-3 * PEAK
    import pydicom

    first = pydicom.dcmread(sorted((tmp_path / "series").iterdir())[0])
    assert first.Modality == "MR" and first.ImageComments == "NOT FOR DIAGNOSTIC USE"


def test_simulation_knows_its_scale_noise_and_coils() -> None:
    volume, mask = head(), lines()
    clean, truth = simulate(volume, MRSimulation(coils=4, noise=0.0, true_maps=True), mask)
    noisy, _ = simulate(volume, MRSimulation(coils=4, noise=2.0, true_maps=True), mask)
    assert clean.sigma_y == 0 and noisy.sigma_y == pytest.approx(0.02 * image_scale(truth.data))
    off = (noisy.y - clean.y)[..., mask]
    assert float(off.real.std()) == pytest.approx(noisy.sigma_y, rel=0.03)
    full, _ = simulate(volume, MRSimulation(coils=4, noise=0.0, true_maps=True), torch.ones_like(mask))
    image = CartesianMRI(**full.fields).adjoint(full.y)
    torch.testing.assert_close(image.abs(), truth.data, atol=1e-3 * PEAK, rtol=0)
    assert float(image.angle()[truth.data > 0].std()) > 0.1
    plain, _ = simulate(volume, MRSimulation(coils=4, noise=0.0, phase=False, true_maps=True), torch.ones_like(mask))
    torch.testing.assert_close(CartesianMRI(**plain.fields).adjoint(plain.y).real, truth.data, atol=0.7, rtol=0)
    estimated, _ = simulate(volume, MRSimulation(coils=4, noise=0.5), mask)
    agreed = (estimated.fields["maps"].conj() * clean.fields["maps"]).sum(-3).abs()
    assert float(agreed[truth.data[:, 0] > 0].median()) > 0.999
    assert simulate(volume, MRSimulation(coils=1, noise=0.5), mask)[0].y.shape == (3, 1, 40, 46)


def test_generative_samplers_hear_the_data_everywhere(scan: Path) -> None:
    from invdiff.pipelines.mri import as_seen_by

    measured = read_measurements(scan)[0]
    assert bool((measured.fields["maps"].abs().sum(1) == 0).any())
    assert torch.equal(as_seen_by(measured, SENSE()).fields["maps"], measured.fields["maps"])
    power = as_seen_by(measured, DDS()).fields["maps"].abs().square().sum(1)
    torch.testing.assert_close(power, torch.ones_like(power), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("ct prior", "the scan in a.u.; an MR prior is wanted"),
        ("channels", "mri.channels is 'both'; one of magnitude, complex is wanted"),
        ("field", "mri has no field 'channel'"),
        ("samples", "mri.channels is 'complex', 'magnitude' is wanted"),
        ("maps", "the coil maps are not normalised"),
        ("empty", "nothing was measured that could give it a scale"),
        ("coils", "the measurement has shape"),
        ("real", "float32; (3, 4, 40, 46) complex64 is wanted"),
        ("ct option", "--views is not an option of the operator 'mri'"),
        ("mr option", "--coils is not an option of the operator 'parallel'"),
        ("acceleration", "the acceleration is 0.5"),
        ("mask", "no mask 'stars'; one of uniform, random"),
        ("hu", "the volume is in HU; MR is simulated from a.u."),
    ],
)
def test_bad_input_gets_one_sentence_and_writes_nothing(
    case: str, said: str, scan: Path, prior: str, tmp_path: Path, here: Any
) -> None:
    measured, truth = read_measurements(scan)[0], tmp_path / "truth.nii.gz"
    changes: dict[str, dict[str, Any]] = {
        "maps": {"fields": {**measured.fields, "maps": 2 * measured.fields["maps"]}},
        "empty": {"y": 0 * measured.y},
        "coils": {"y": measured.y[:, :3]},
        "real": {"y": measured.y.real.contiguous()},
    }
    write_measurements(tmp_path / "bad.h5", [replace(measured, **changes.get(case, {}))])
    write_nifti(tmp_path / "hu.nii", replace(head(), unit="HU"))
    go = ["reconstruct", tmp_path / "bad.h5", "-o", tmp_path / "out.nii"]
    cases: dict[str, list[Any]] = {
        "ct prior": [*go, "--prior", prior],
        "channels": [*go, "mri.channels=both"],
        "field": [*go, "mri.channel=both"],
        "samples": [*go, "--prior", "none", "--samples", 3, "mri.channels=complex"],
        "ct option": ["simulate", truth, "-o", tmp_path / "s.h5", "--operator", "mri", "--views", 9],
        "mr option": ["simulate", truth, "-o", tmp_path / "s.h5", "--coils", 9],
        "acceleration": ["simulate", truth, "-o", tmp_path / "s.h5", "--operator", "mri", "--acceleration", 0.5],
        "mask": ["simulate", truth, "-o", tmp_path / "s.h5", "--operator", "mri", "--mask", "stars"],
        "hu": ["simulate", tmp_path / "hu.nii", "-o", tmp_path / "s.h5", "--operator", "mri"],
    }
    before = sorted(p.name for p in tmp_path.rglob("*"))
    code, message = here(*cases.get(case, [*go, "--prior", "none", "--sampler", "sense"]))
    assert code == 2 and said in message and "Traceback" not in message, message
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("mask", ["uniform", "random", "equispaced", "poisson", "radial"])
def test_the_command_simulates(mask: str, scan: Path, tmp_path: Path, here: Any) -> None:
    pytest.importorskip("invdiff.operators.mri.masks")
    out = tmp_path / "s.h5"
    words = ["simulate", tmp_path / "truth.nii.gz", "-o", out, "--operator", "mri", "--coils", 3, "--slices", "1:3"]
    code, said = here(*words, "--acceleration", 2, "--centre", 0.3, "--mask", mask)
    assert code == 0, said
    measured = read_measurements(out)[0]
    assert measured.y.shape == (2, 3, 40, 46) and measured.unit == "a.u."
    assert float(measured.fields["mask"].float().mean()) == pytest.approx(0.5, abs=0.16)


def test_a_real_scan_takes_no_mri_table(scan: Path) -> None:
    measured = read_measurements(scan)[0]
    operator = CartesianMRI(**measured.fields)
    way = way_of(measured, operator, measured.y, SENSE(), None, False)
    assert way is not None and way.operator.domain.shape == (3, 1, 40, 46)
    assert way_of(measured, way.operator, measured.y, SENSE(), None, False) is None
    with pytest.raises(ValueError, match="the table mri is for scans of complex images"):
        way_of(measured, way.operator, measured.y, SENSE(), MRIConfig(), False)


def test_grappa_fills_what_was_not_sampled() -> None:
    """Samples stay; uniform three-fold undersampling is undone to a fraction of the zero-filled error."""
    pytest.importorskip("pygrappa")
    shape = (64, 60)
    x = torch.zeros(2, 1, *shape)
    x[:, 0, 16:50, 14:44] = 1
    x[0, 0, 25:30, 20:40] = 0.3
    coils = birdcage_maps(8, shape)
    full = simulate_kspace(x, CartesianMRI(torch.ones(shape, dtype=torch.bool), coils, slices=2), None, 0.002)
    mask = uniform_mask(shape, 3, 0.2)
    filled = grappa(full * mask, mask)
    assert torch.equal(filled * mask, full * mask)
    error = (filled - full).flatten(1).norm(dim=1) / (full * mask - full).flatten(1).norm(dim=1)
    assert float(error.max()) < 0.35
    with pytest.raises(ValueError, match="at least 2 coils"):
        grappa(full[:, :1] * mask, mask)
    with pytest.raises(ValueError, match="the kernel is \\(4, 5\\)"):
        grappa(full * mask, mask, (4, 5))


def test_grappa_through_the_pipeline(scan: Path) -> None:
    measured = read_measurements(scan)[0]
    done = completed(measured, ZeroFilled())
    assert bool(done.fields["mask"].all()) and torch.equal(done.y * measured.fields["mask"], measured.y)
    with pytest.raises(ValueError, match="prior-free samplers; this is cartesian-mri with DDS"):
        completed(measured, DDS())
