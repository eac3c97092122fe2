"""Raw MR data in place of a measurement file: what is done to it, every way to an image, and what bad input gets."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import nibabel
import numpy as np
import pytest
import torch
from torch import Tensor

from invdiff.datasets import (
    KSpace,
    read_kspace,
    read_measurements,
    read_volume,
    without_oversampling,
    write_bart,
    write_ismrmrd,
    write_measurements,
)
from invdiff.fourier import centred_fft
from invdiff.noise import KeyedNoise
from invdiff.operators import CartesianMRI, NonCartesianMRI
from invdiff.operators.mri.calibration import find_acs, noise_covariance
from invdiff.operators.mri.simulate import birdcage_maps, smooth_phase
from invdiff.operators.mri.trajectories import radial
from invdiff.pipelines.mri import MRIConfig
from invdiff.pipelines.raw_mr import RawConfig, measurements_of, rss_of, undersampled
from invdiff.pipelines.scans import image_of, scan_of
from invdiff.samplers import CGLS, SENSE

SLICES, COILS, H, W = 2, 5, 45, 52
PEAK, SIGMA = 700.0, 3.0
REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "val" / "raw_mr"
PHANTOMS = ("pulseq_gre_phantom_16ch.dat", "pulseq_se_phantom_32ch.dat", "twixtools_gre_phantom_2ch.dat")


def head(h: int = H, w: int = W) -> Tensor:
    """Ellipses (s 1 h w), softened a little, off centre, another lesion in each slice."""
    y, x = torch.meshgrid((torch.arange(h) - h / 2) / h, (torch.arange(w) - w / 2) / w, indexing="ij")
    image = torch.zeros(SLICES, 1, h, w)
    for k in range(SLICES):
        for radius, row, column, value in ((0.36, 0.0, 0.02, 0.5), (0.1, 0.1, -0.1 + 0.08 * k, 0.5)):
            distance = ((y - row) ** 2 + (x - column) ** 2).sqrt()
            image[k, 0] += value * PEAK * torch.sigmoid((radius - distance) * 120)
    return image


def axial() -> np.ndarray:
    affine = np.diag([-0.9, -1.1, 3.0, 1.0])
    affine[:3, 3] = [31.0, 17.0, 5.5]
    return affine


def coupling() -> Tensor:
    """What mixes the coils' noise: each its own size, neighbours correlated."""
    root = torch.diag(torch.linspace(0.5, 2.0, COILS)).to(torch.complex64)
    return root + 0.3j * torch.diag(torch.ones(COILS - 1), 1)


def noise_of(shape: tuple[int, ...], seed: int) -> Tensor:
    """Correlated noise (s coil ...)."""
    white = KeyedNoise(seed)(0, torch.empty(shape, dtype=torch.complex64)) * 2**0.5 * SIGMA
    return torch.einsum("vc,sc...->sv...", coupling(), white)


def covariance() -> Tensor:
    mixing = coupling().to(torch.complex128)
    return 2 * SIGMA**2 * mixing @ mixing.mH


def raw(readout: str = "h", seed: int = 3, h: int = H, w: int = W, **changes: Any) -> KSpace:
    """A fully sampled scan with its noise scan."""
    image = head(h, w) * torch.polar(torch.ones(h, w), smooth_phase((h, w), 1))
    data = centred_fft(birdcage_maps(COILS, (h, w)) * image) + noise_of((SLICES, COILS, h, w), seed)
    made = KSpace(
        data=data,
        mask=torch.ones(h, w, dtype=torch.bool),
        affine=axial(),
        noise=noise_of((1, COILS, 4000), 9)[0],
        readout=readout,
        source={"name": "made", "sha256": "a" * 64},
    )
    return replace(made, **changes)


def lines(kspace: KSpace, kept: Tensor) -> KSpace:
    return replace(kspace, data=kspace.data * kept, mask=kept.expand(kspace.image_shape).clone())


def rms(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().mean().sqrt())


# ---------------------------------------------------------------- noise, coils, maps


@pytest.mark.parametrize("source", ["scan", "edge"])
def test_noise_is_white_and_its_size_is_known(source: str) -> None:
    """What is left of pure noise has one deviation, the median of the coils', and no correlation."""
    silent = raw(data=noise_of((SLICES, COILS, H, W), 5))
    signal = raw()
    both = replace(signal, data=torch.cat([signal.data, silent.data])) if source == "scan" else silent
    scan = measurements_of(
        both, RawConfig(noise=source, calibration="") if source == "scan" else RawConfig(noise=source)
    )
    wanted = float((covariance().diagonal().real / 2).sqrt().median())
    assert scan.sigma_y == pytest.approx(wanted, rel=0.06) and scan.history["noise"]["sigma_y"] == scan.sigma_y
    left = noise_covariance(scan.y[-SLICES:].transpose(0, 1).flatten(1)) / (2 * scan.sigma_y**2)
    assert float((left - torch.eye(COILS)).abs().max()) < (0.06 if source == "scan" else 0.35)
    assert float((noise_covariance(silent.data.transpose(0, 1).flatten(1)) / (2 * wanted**2)).abs().max()) > 2


def test_the_scanners_unit_is_kept() -> None:
    """Whitening changes no image but for its noise; one coil is not changed at all."""
    plain, white = (image_of(measurements_of(raw(), RawConfig(noise=n)), SENSE(), how=MRIConfig("complex"))[0]
                    for n in ("none", "scan"))  # fmt: skip
    inside = head() > 0.3 * PEAK
    assert float(plain.data[inside].mean()) == pytest.approx(float(head()[inside].mean()), rel=0.02)
    assert 0.3 < float((white.data[inside] / plain.data[inside]).median()) < 3
    single = raw()
    single = replace(single, data=single.data[:, :1], noise=single.noise[:1] if single.noise is not None else None)
    scan = measurements_of(single)
    torch.testing.assert_close(scan.y, single.data, rtol=1e-5, atol=1e-4)
    assert scan.history["maps"] == {"from": "one coil"} and bool((scan.fields["maps"] == 1).all())


@pytest.mark.parametrize(
    ("facts", "variance"),
    [
        ({"dwell_us": 5.0, "noise_dwell_us": 10.0}, 2.0),
        ({"dwell_us": 5.0, "noise_dwell_us": 10.0, "averages": 3}, 2 / 3),
        ({"dwell_us": 5.0, "noise_bandwidth": 0.8}, 1.25),
        ({}, 1.0),
    ],
)
def test_a_noise_scan_of_another_bandwidth(facts: dict[str, Any], variance: float) -> None:
    plain = measurements_of(raw())
    changed = measurements_of(raw(source={"name": "made", **facts}))
    assert changed.sigma_y == pytest.approx(float(plain.sigma_y or 0) * variance**0.5)
    assert changed.history["noise"]["variance_factor"] == pytest.approx(variance)


def test_bandwidths_come_from_an_ismrmrd_file(tmp_path: Path) -> None:
    pytest.importorskip("ismrmrd")
    write_ismrmrd(tmp_path / "a.h5", raw(readout="w", source={"name": "x", "dwell_us": 4.0, "noise_dwell_us": 6.0}))
    again = read_kspace(tmp_path / "a.h5")
    assert (again.source["dwell_us"], again.source["noise_dwell_us"]) == (4.0, 6.0) and again.readout == "w"
    assert measurements_of(again).history["noise"]["variance_factor"] == pytest.approx(1.5)


def test_compression_keeps_the_image() -> None:
    whole, few = (measurements_of(raw(), RawConfig(compress=n)) for n in (0, 4))
    assert few.y.shape == (SLICES, 4, H, W) and few.history["coils"] == {"measured": COILS, "virtual": 4}
    a, b = (image_of(scan, SENSE(), how=MRIConfig("complex"))[0].data for scan in (whole, few))
    assert rms(a, b) < 0.02 * float(a.max())
    one = measurements_of(raw(), RawConfig(compress=1, acceleration=2.0, centre=0.05))  # too few lines for maps
    assert one.y.shape[1] == 1 and one.history["maps"] == {"from": "one coil"}


def test_a_calibration_scan_of_few_lines_gets_one_sentence() -> None:
    full = raw()
    with pytest.raises(ValueError, match=r"made has 5 fully sampled lines .*; coil maps want 8"):
        measurements_of(replace(full, calibration=full.data[..., H // 2 - 2 : H // 2 + 3, :]))


def test_maps_of_a_scan_of_their_own(tmp_path: Path) -> None:
    """Calibration lines give the same maps within k-space, beside it, and from another file."""
    pytest.importorskip("ismrmrd")
    full = raw(readout="w")
    acs = full.data[:, :, H // 2 - 8 : H // 2 + 8]
    fourths = lines(full, (torch.arange(H) % 4 == 0)[:, None])
    beside = measurements_of(replace(fourths, calibration=acs))
    within = torch.zeros(H, dtype=torch.bool)
    within[::4] = True
    within[H // 2 - 8 : H // 2 + 8] = True
    inside = measurements_of(lines(full, within[:, None]))
    torch.testing.assert_close(beside.fields["maps"], inside.fields["maps"])
    assert beside.history["maps"]["from"] == "calibration scan" and inside.history["maps"]["lines"] == [16, W]
    write_ismrmrd(tmp_path / "pre.h5", full)
    other = measurements_of(fourths, RawConfig(calibration=str(tmp_path / "pre.h5")))
    agreed = (other.fields["maps"].conj() * inside.fields["maps"]).sum(-3).abs()
    assert float(agreed[head()[:, 0] > 0.3 * PEAK].median()) > 0.999


@pytest.mark.parametrize("first", [0, 1])
def test_phase_where_only_a_scan_of_its_own_calibrates(first: int) -> None:
    """Every second line, with or without the middle one: the phase is that of a SENSE image, not of a folded one."""
    full = raw(readout="w")
    acs = full.data[:, :, H // 2 - 8 : H // 2 + 8]
    scan = measurements_of(replace(lines(full, (torch.arange(H) % 2 == first)[:, None]), calibration=acs))
    image, phase, _ = image_of(scan, SENSE())
    reference, true, _ = image_of(measurements_of(replace(full, calibration=acs)), SENSE(), how=MRIConfig("complex"))
    inside = head() > 0.3 * PEAK
    off = torch.polar(torch.ones(1), phase - true).angle().abs()[inside]
    assert float(off.median()) < 0.1
    assert rms(image.data[inside], reference.data[inside]) < 0.1 * float(reference.data[inside].mean())


# ---------------------------------------------------------------- undersampling, off the grid


@pytest.mark.parametrize("readout", ["h", "w"])
@pytest.mark.parametrize("kind", ["uniform", "random", "equispaced"])
def test_lines_that_are_left_out_run_along_the_readout(readout: str, kind: str) -> None:
    kspace, how = raw(readout), RawConfig(acceleration=2.0, mask=kind, centre=0.2, seed=4)
    few = undersampled(kspace, how)
    assert few.mask is not None
    dim = 0 if readout == "h" else 1
    assert torch.equal(few.mask.any(dim, keepdim=True).expand(H, W), few.mask) and not bool(few.mask.all())
    assert torch.equal(few.data, kspace.data * few.mask)
    scan, whole = measurements_of(kspace, how), measurements_of(kspace)
    torch.testing.assert_close(scan.y, whole.y * few.mask)  # the noise is that of the whole scan
    share = float(few.mask.float().mean())
    assert scan.history["undersampled"]["share"] == pytest.approx(share) and (kind == "uniform" or 0.45 < share < 0.55)
    acs = find_acs(few.mask)
    assert scan.history["maps"]["lines"] == [acs.bottom - acs.top, acs.right - acs.left]
    assert scan.fields["readout"] == readout


def test_padding_is_no_gap() -> None:
    """Columns that the scanner left empty at both ends are no lines that are missing."""
    columns = torch.arange(W)
    few = undersampled(lines(raw(), (columns >= 4) & (columns < W - 2)), RawConfig(acceleration=2.0))
    assert few.mask is not None and not bool(few.mask[:, :4].any()) and bool(few.mask[:, 4:].any())


@pytest.mark.parametrize("noise", ["scan", "edge"])
def test_off_the_grid(noise: str) -> None:
    """Spokes: the image to a few percent, maps from the gridded middle."""
    track = radial(50, samples=104)
    maps, phase = birdcage_maps(COILS, (H, W)), smooth_phase((H, W), 1)
    operator = NonCartesianMRI(track, (H, W), maps, slices=SLICES)
    clean = operator(head() * torch.polar(torch.ones(H, W), phase))
    kspace = raw(data=clean + noise_of(clean.shape, 8), mask=None, trajectory=track, shape=(H, W), readout=None)
    scan = measurements_of(kspace, RawConfig(noise=noise))
    assert scan.kind == "non-cartesian-mri" and scan.history["maps"]["from"] == "gridded centre of k-space"
    image, _, _ = image_of(scan, CGLS(steps=12), how=MRIConfig("complex"))
    inside = head() > 0.3 * PEAK
    gain = float((image.data[inside] / head()[inside]).median())
    assert 0.5 < gain < 2
    assert rms(image.data[inside] / gain, head()[inside]) < 0.08 * PEAK
    gridded = rss_of(kspace).data
    assert rms(gridded[inside], head()[inside]) < 0.12 * PEAK


def test_elliptical_k_space_has_noise_at_its_rim() -> None:
    y, x = torch.meshgrid((torch.arange(H) - H // 2) / (H / 2), (torch.arange(W) - W // 2) / (W / 2), indexing="ij")
    scan = measurements_of(lines(raw(readout=None, noise=None), torch.hypot(y, x) < 0.95))
    assert scan.history["noise"]["from"] == "edge of k-space"
    assert scan.sigma_y == pytest.approx(float((covariance().diagonal().real / 2).sqrt().median()), rel=0.15)


def test_history_stays_with_the_file(tmp_path: Path) -> None:
    scan = measurements_of(raw(), RawConfig(acceleration=2.0, centre=0.2, seed=4))
    write_measurements(tmp_path / "k.h5", [scan, replace(scan, history={})])
    first, second = read_measurements(tmp_path / "k.h5")
    assert first.history == json.loads(json.dumps(scan.history)) and not second.history


# ---------------------------------------------------------------- the command line


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """ISMRMRD with a readout that is oversampled twice, odd both ways."""
    pytest.importorskip("ismrmrd")
    wide = raw(readout="w")
    image = torch.zeros(SLICES, COILS, H, 2 * W + 1, dtype=torch.complex64)
    start = (2 * W + 1) // 2 - W // 2
    from invdiff.fourier import centred_ifft

    image[..., start : start + W] = centred_ifft(wide.data)
    affine = axial()
    affine[:3, 3] -= start * affine[:3, 0]
    noise = noise_of((SLICES, COILS, H, 2 * W + 1), 12) * (image == 0)
    data = centred_fft(image + noise)
    mask = torch.ones(H, 2 * W + 1, dtype=torch.bool)
    write_ismrmrd(tmp_path / "raw.h5", replace(wide, data=data, mask=mask, affine=affine, crop=(H, W)))
    return tmp_path / "raw.h5"


def test_the_whole_way(file: Path, tmp_path: Path, here: Any) -> None:
    """Straight from the file, through a measurement file and from a script: one image, in its place, like the truth."""
    how = ["raw.acceleration=2", "raw.centre=0.2"]
    go = ["--prior", "none", "--sampler", "sense", "mri.channels=complex"]
    assert here("reconstruct", file, *go, *how, "-o", tmp_path / "a.nii")[0] == 0
    assert here("convert", file, *how, "-o", tmp_path / "k.h5")[0] == 0
    assert here("reconstruct", tmp_path / "k.h5", *go, "-o", tmp_path / "b.nii")[0] == 0
    a, b = (nibabel.load(tmp_path / name) for name in ("a.nii", "b.nii"))
    np.testing.assert_array_equal(a.get_fdata(), b.get_fdata())
    np.testing.assert_allclose(a.affine, without_oversampling(read_kspace(file)).affine, atol=1e-4)
    np.testing.assert_allclose(read_volume(tmp_path / "a.nii").affine, axial(), atol=1e-3)
    script = image_of(scan_of(file, raw=RawConfig(acceleration=2.0, centre=0.2)), SENSE(), how=MRIConfig("complex"))[0]
    ours = read_volume(tmp_path / "a.nii").data
    torch.testing.assert_close(script.data, ours, rtol=1e-4, atol=1e-2)
    inside = head() > 0.3 * PEAK
    whole = image_of(scan_of(file), SENSE(), how=MRIConfig("complex"))[0].data
    assert rms(ours[inside], whole[inside]) < 0.06 * PEAK
    assert np.corrcoef(whole.ravel(), head().ravel())[0, 1] > 0.98
    records = [json.loads((tmp_path / f"{name}.json").read_text()) for name in "ab"]
    assert records[0]["history"] == records[1]["history"]
    assert records[0]["history"]["samples"] == {"read": [SLICES, COILS, H, 2 * W + 1], "kept": [SLICES, COILS, H, W]}
    assert records[0]["history"]["noise"]["from"] == "noise scan" and records[0]["mri"]["scale"] > 0
    assert records[0]["config"]["raw"]["acceleration"] == 2 and records[0]["source_sha256"]
    # five coils, half of the lines: least squares takes up to 1 / 2.5 of the noise into the image
    assert all(0.6 < chi2 < 1.1 for chi2 in records[0]["chi2"]), records[0]["chi2"]


def test_plan_reads_raw_files(file: Path, tmp_path: Path, here: Any) -> None:
    before = sorted(p.name for p in tmp_path.iterdir())
    assert here("plan", file, "--prior", "none", "--sampler", "zero-filled")[0] == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_sum_of_squares_and_dicom(file: Path, tmp_path: Path, here: Any) -> None:
    """Geometry and modality as pydicom reads them, of a reconstruction and of the plain image."""
    import pydicom

    assert here("convert", file, "-o", tmp_path / "rss")[0] == 0
    words = ["reconstruct", file, "--prior", "none", "--sampler", "zero-filled", "-o", tmp_path / "series"]
    assert here(*words)[0] == 0
    rss = rss_of(read_kspace(file))
    inside = head() > 0.3 * PEAK
    assert rms(rss.data[inside], head()[inside]) < 0.03 * PEAK
    for folder in ("rss", "series"):
        found = sorted((pydicom.dcmread(p) for p in (tmp_path / folder).iterdir()), key=lambda d: d.InstanceNumber)
        assert len(found) == SLICES and {d.Modality for d in found} == {"MR"}
        assert {d.SOPClassUID for d in found} == {"1.2.840.10008.5.1.4.1.1.4"}
        assert {(d.Rows, d.Columns) for d in found} == {(H, W)}
        first = found[0]
        assert [float(v) for v in first.PixelSpacing] == pytest.approx([1.1, 0.9], rel=1e-5)
        assert [float(v) for v in first.ImageOrientationPatient] == pytest.approx([1, 0, 0, 0, 1, 0], abs=1e-6)
        for k, one in enumerate(found):  # LPS
            assert [float(v) for v in one.ImagePositionPatient] == pytest.approx([-31, -17, 5.5 + 3 * k], abs=1e-3)
        assert float(first.SpacingBetweenSlices) == pytest.approx(3)
    pixels = found[0].pixel_array * float(found[0].RescaleSlope) + float(found[0].RescaleIntercept)
    assert np.corrcoef(pixels.ravel(), head()[0].numpy().ravel())[0, 1] > 0.98
    torch.testing.assert_close(read_volume(tmp_path / "rss").data, rss.data, rtol=0, atol=0.02)


def test_bart_is_a_folder(tmp_path: Path, here: Any) -> None:
    """Its record has a hash, though a folder has none; no noise in it, so none is assumed."""
    (tmp_path / "bart").mkdir()
    write_bart(tmp_path / "bart" / "k", raw())
    words = ["reconstruct", tmp_path / "bart", "--prior", "none", "--sampler", "zero-filled", "raw.noise=none"]
    assert here(*words, "-o", tmp_path / "a.nii")[0] == 0
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["history"]["noise"] == {"from": "none", "sigma_y": 0.0} and len(record["scan_sha256"]) == 64


# ---------------------------------------------------------------- bad input


def fastmri(path: Path, **changes: Any) -> Path:
    """A file of fastMRI's form: complex (s coil h w), a mask of columns."""
    k = raw().data.numpy()
    content: dict[str, Any] = {"kspace": k, "mask": np.ones(W, np.float32), **changes}
    with h5py.File(path, "w") as f:
        for key, value in content.items():
            f[key] = value
    return path


def broken(case: str, path: Path) -> Path:
    k = raw().data.numpy().copy()
    few = np.zeros(W, np.float32)
    few[::2] = 1
    if case == "nan":
        k[1, 2, 3, 4] = np.nan
    if case == "missing line":
        k[:, :, :, 20] = 0
    changes: dict[str, dict[str, Any]] = {
        "real": {"kspace": k.real},
        "empty mask": {"mask": np.zeros(W, np.float32)},
        "no lines": {"mask": few},
        "gaps": {"mask": few},
        "silent coil": {"kspace": np.concatenate([k[:, :1], 0 * k[:, :1]], 1)},
        "zero": {"kspace": 0 * k},
    }
    given = {"kspace": k, **changes.get(case, {})}
    if case == "key":
        path = fastmri(path)
        with h5py.File(path, "r+") as f:
            f.move("kspace", "k_space")
        return path
    return fastmri(path, **given)


@pytest.mark.parametrize(
    ("case", "words", "said"),
    [
        ("nan", [], "k-space has 1 of 23400 values that are NaN or infinite"),
        ("missing line", [], "hold nothing but zeros, the first in slice 0, index 20: lines are missing"),
        ("real", [], "kspace is float32, which is real; complex values are wanted"),
        ("empty mask", [], "the mask is zero throughout: nothing was sampled"),
        ("zero", [], "zero throughout"),
        ("key", [], "holds k_space, mask; kspace (fastMRI, Calgary-Campinas) or dataset (ISMRMRD) is wanted"),
        ("no lines", [], "coil maps want 8: raw.centre"),
        ("gaps", ["raw.acceleration=2"], "samples 50 % of its grid with gaps; raw.acceleration=2 is for fully sampled"),
        ("silent coil", [], "coil 1 has no noise"),
        ("fine", ["raw.noise=scan"], "has no noise scan; raw.noise=edge takes the edge of k-space"),
        ("fine", ["raw.noise=loud"], "raw.noise is 'loud'; one of auto, scan, edge, none is wanted"),
        ("fine", ["raw.compress=9"], "has 5 coils; raw.compress is 9"),
        ("fine", ["raw.frame=2"], "holds one frame; there is no frame 2"),
        ("fine", ["raw.acceleration=0.5"], "the acceleration is 0.5; at least 1 is wanted"),
        ("fine", ["raw.acceleration=2", "raw.mask=stars"], "no mask 'stars'; one of uniform, random"),
        ("fine", ["raw.accelerate=2"], "raw has no field 'accelerate'; its fields are: frame, noise"),
        ("fine", ["raw.acceleration=4", "raw.centre=0.1"], "coil maps want 8: raw.centre=0.2 keeps more lines"),
        ("fine", ["raw.calibration=nowhere.h5"], "nowhere.h5 is not there; a file is wanted"),
        ("fine", ["--index", "1"], "holds 1 scans; index 1 is not among 0 to 0"),
    ],
)
def test_bad_raw_data_gets_one_sentence_and_writes_nothing(
    case: str, words: list[str], said: str, tmp_path: Path, here: Any
) -> None:
    path = broken(case, tmp_path / "bad.h5")
    before = sorted(p.name for p in tmp_path.rglob("*"))
    for command in (["reconstruct", path, "--prior", "none", "--sampler", "sense", "-o", tmp_path / "out.nii"],
                    ["convert", path, "-o", tmp_path / "out.h5"]):  # fmt: skip
        if command[0] == "convert" and words[:1] == ["--index"]:
            continue
        code, message = here(*command, *words)
        assert code == 2 and said in message and "Traceback" not in message and message.count("invdiff:") == 1, message
        assert sorted(p.name for p in tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("coils", "has 2 slices of 3 coils and bad.h5 2 of 5; the same are wanted for its calibration"),
        ("view", "has a field of view of 40 x 40 mm, bad.h5 of 45 x 52 mm; the same is wanted"),
        ("centre", "does not sample the centre of k-space; it cannot calibrate bad.h5"),
    ],
)
def test_a_calibration_that_does_not_fit(case: str, said: str, tmp_path: Path, here: Any) -> None:
    k, mask = raw().data.numpy(), np.ones(W, np.float32)
    mask[20:33] = 0
    changes: dict[str, dict[str, Any]] = {
        "coils": {"kspace": k[:, :3]},
        "view": {"kspace": k[..., :40], "mask": np.ones(40, np.float32)},
        "centre": {"mask": mask},
    }
    other = fastmri(tmp_path / "other.h5", **changes[case])
    words = [broken("fine", tmp_path / "bad.h5"), f"raw.calibration={other}", "-o", tmp_path / "k.h5"]
    code, message = here("convert", *words)
    assert code == 2 and said in message, message
    assert not (tmp_path / "k.h5").exists()


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("maps", "the coil maps are not normalised: the sum of their squares is up to 3 away from 1"),
        ("coils", "the measurement has shape (2, 5, 45, 52); its operator gives (2, 3, 45, 52)"),
        ("mask", "the mask keeps nothing"),
        ("real", "complex64 is wanted"),
        ("raw", "the table raw is for raw MR data"),
        ("nan", "NaN"),
    ],
)
def test_bad_measurement_files(case: str, said: str, tmp_path: Path, here: Any) -> None:
    scan = measurements_of(raw())
    maps, mask = scan.fields["maps"], scan.fields["mask"]
    changes: dict[str, dict[str, Any]] = {
        "maps": {"fields": {**scan.fields, "maps": 2 * maps}},
        "coils": {
            "fields": {**scan.fields, "maps": maps[:, :3] / maps[:, :3].norm(dim=1, keepdim=True).clamp_min(1e-9)}
        },
        "mask": {"fields": {**scan.fields, "mask": torch.zeros_like(mask)}},
        "real": {"y": scan.y.real.contiguous()},
    }
    write_measurements(tmp_path / "bad.h5", [replace(scan, **changes.get(case, {}))])
    if case == "nan":
        with h5py.File(tmp_path / "bad.h5", "r+") as f:
            f["y"][0, 0, 0, 0] = np.nan
    before = sorted(p.name for p in tmp_path.rglob("*"))
    more = ["raw.compress=2"] if case == "raw" else []
    go = ["reconstruct", tmp_path / "bad.h5", "--prior", "none", "--sampler", "sense", "-o", tmp_path / "out.nii"]
    code, message = here(*go, *more)
    assert code == 2 and said in message and "Traceback" not in message, message
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("words", "said"), [
    (["sampler.rho=2"], "no table 'sampler' here; raw is wanted"),
    (["-o", "a.nii", "raw.compress=2"], "takes raw.frame alone"),
    (["-o", "a.txt"], "ends in '.txt'"),
])  # fmt: skip
def test_convert_says_no(words: list[str], said: str, tmp_path: Path, here: Any) -> None:
    words = [str(tmp_path / w) if w.startswith("a.") else w for w in words]
    out = [] if "-o" in words else ["-o", tmp_path / "k.h5"]
    code, message = here("convert", broken("fine", tmp_path / "bad.h5"), *out, *words)
    assert code == 2 and said in message, message
    assert [p.name for p in tmp_path.iterdir()] == ["bad.h5"]


def test_a_readout_with_gaps_is_not_cut(tmp_path: Path, here: Any) -> None:
    mask = torch.ones(H, W, dtype=torch.bool)
    mask[::2] = False
    with pytest.raises(ValueError, match="has gaps, so 45 cannot be cut to 20"):
        measurements_of(lines(raw(crop=(20, W)), mask))


# ---------------------------------------------------------------- real scanners


@pytest.mark.parametrize("name", PHANTOMS)
def test_real_phantoms(name: str) -> None:
    """SENSE with maps of all data is the sum of squares but for its shading; half of the lines are enough."""
    path = REAL / name
    if not path.is_file():
        pytest.skip(f"{name} is not at hand: it is no part of the package")
    pytest.importorskip("twixtools")
    kspace = read_kspace(path)
    whole = measurements_of(kspace, RawConfig(compress=min(8, kspace.data.shape[1])))
    assert whole.history["noise"]["from"] == "edge of k-space"
    operator = CartesianMRI(**whole.fields)
    reference, rss = operator.zero_filled(whole.y).abs(), rss_of(kspace)
    inside = rss.data > 0.25 * rss.data.quantile(0.95)
    shading = (reference / rss.data)[inside]
    assert float(torch.quantile(shading, 0.98) / torch.quantile(shading, 0.02)) < 8
    steps = torch.diff((reference / rss.data).clamp_min(1e-9).log(), dim=-1).abs()
    assert float(steps[inside[..., 1:] & inside[..., :-1]].median()) < 0.05
    outside = rss.data < 0.05 * rss.data.quantile(0.95)
    if bool(outside.any()):
        assert float(reference[outside].mean()) < 0.1 * float(reference[inside].mean())
    lines_kept = max(0.08, 10 / min(kspace.image_shape))
    half = measurements_of(kspace, RawConfig(acceleration=2.0, centre=lines_kept, compress=whole.y.shape[1]))
    folded = CartesianMRI(**half.fields).zero_filled(half.y).abs()
    image = image_of(half, SENSE(), how=MRIConfig("complex"))[0].data
    error, before = (
        float(((v - reference)[inside] ** 2).sum() / (reference[inside] ** 2).sum()) for v in (image, folded)
    )
    assert error < 0.05 and (error < 0.5 * before or kspace.data.shape[1] == 2)  # two coils at 2x: noise
