"""Raw CT data: the geometry of the readers against known objects, and one sentence for what is no sinogram."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.io
import tifffile
import torch

from invdiff.datasets import read_htc2022, read_measurements, read_tiff_sinogram, write_measurements
from invdiff.datasets.sinogram import noise_sigma, rotation_axis
from invdiff.operators.ct.fan import FanBeam
from invdiff.operators.ct.parallel import ParallelBeam

RAW = Path(__file__).resolve().parents[2] / "shared" / "data" / "val" / "raw_ct"
HTC = RAW / "htc2022"
NEUTRON = RAW / "neutron_sinogram_360.tif"


def disc_sinogram(angles: torch.Tensor, detectors: int, axis: float, pixel: float = 1.0) -> torch.Tensor:
    """Analytic line integrals of two off-centre discs, the rotation axis ``axis`` pixels from the detector's middle."""
    u = (torch.arange(detectors).double() - (detectors - 1) / 2 - axis) * pixel
    result = torch.zeros(len(angles), detectors, dtype=torch.float64)
    for x, y, radius, mu in ((6.0, 9.0, 11.0, 0.02), (-14.0, -4.0, 5.0, 0.05)):
        d = u - (x * angles.cos() + y * angles.sin())[:, None]
        result += 2 * mu * (radius**2 - d**2).clamp_min(0).sqrt()
    return result


@pytest.mark.parametrize("turn", [math.pi, 2 * math.pi])
@pytest.mark.parametrize("axis", [-4.3, 0.0, 2.75])
def test_rotation_axis(turn, axis):
    angles = torch.arange(90).double() * (turn / 90)
    found = rotation_axis(disc_sinogram(angles, 83, axis)[None, None], angles)
    assert found == pytest.approx(axis, abs=0.15 if turn < 4 else 0.05)


def test_rotation_axis_needs_opposite_views():
    angles = torch.arange(90).double() * (math.pi / 180)
    with pytest.raises(ValueError, match="give its offset"):
        rotation_axis(disc_sinogram(angles, 83, 0.0)[None, None], angles)


@pytest.mark.parametrize("sigma", [0.002, 0.05])
def test_noise_sigma(sigma):
    angles = torch.arange(120).double() * (math.pi / 240)
    noise = torch.randn(120, 83, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    found = noise_sigma((disc_sinogram(angles, 83, 0.0) + sigma * noise)[None, None])
    assert found == pytest.approx(sigma, rel=0.1)
    with pytest.raises(ValueError, match="2 views"):
        noise_sigma(torch.zeros(1, 1, 2, 9))


def test_tiff_reconstructs_in_place(tmp_path):
    """Intensities with dead pixels and an axis off the middle: the discs come back where they are, in 1/mm."""
    angles = torch.arange(180).double() * (2 * math.pi / 180)
    intensity = 5e4 * torch.exp(-disc_sinogram(angles, 91, 3.5, pixel=0.8)).numpy()
    intensity[20:30, 40] = 0
    tifffile.imwrite(tmp_path / "a.tif", intensity.round().astype(np.uint16))
    scan = read_tiff_sinogram(tmp_path / "a.tif", detector_mm=0.8, arc=2 * math.pi, open_beam=5e4)
    assert scan.kind == "parallel" and scan.unit == "1/mm" and not scan.simulated and scan.mu_water is None
    assert scan.fields["detector_offset_mm"] == pytest.approx(-3.5 * 0.8, abs=0.1 * 0.8)
    x = ParallelBeam(**scan.fields).pinv(scan.y)[0, 0]
    middle = (91 - 1) / 2
    for right, up, mu in ((6.0, 9.0, 0.02), (-14.0, -4.0, 0.05)):
        row, column = round(middle - up / 0.8), round(middle + right / 0.8)
        assert float(x[row - 2 : row + 3, column - 2 : column + 3].mean()) == pytest.approx(mu, rel=0.05)
    write_measurements(tmp_path / "a.h5", [scan])
    assert read_measurements(tmp_path / "a.h5")[0].fields == scan.fields


def test_tiff_of_line_integrals_and_given_angles(tmp_path):
    angles = torch.linspace(0.1, 1.0, 7).double()
    lines = disc_sinogram(angles, 41, 0.0).float().numpy()
    tifffile.imwrite(tmp_path / "a.tif", lines)
    scan = read_tiff_sinogram(tmp_path / "a.tif", detector_mm=1.0, angles=angles, axis=1.25)
    assert np.array_equal(scan.y[0, 0].numpy(), lines)
    assert scan.fields["angles"] == tuple(angles.tolist()) and scan.fields["detector_offset_mm"] == -1.25


@pytest.mark.parametrize(
    ("image", "options", "message"),
    [
        (np.ones((6, 9), np.float32), {}, "one of arc and angles"),
        (np.ones((6, 9), np.float32), {"arc": 180.0}, "radians of at most 2 pi"),
        (np.ones((6, 9), np.float32), {"angles": [0.0, 1.0]}, r"\(2,\) angles for 6 rows"),
        (np.ones((6, 9), np.float32), {"arc": 1.0}, "give its offset"),
        (np.ones((6, 9), np.float32), {"arc": 1.0, "detector_mm": 0.0}, "detector_mm is 0.0"),
        (np.ones((6, 9), np.float32), {"arc": 1.0, "open_beam": -1.0}, "open_beam is -1.0"),
        (np.zeros((6, 9), np.float32), {"arc": 1.0, "open_beam": 5.0}, "54 of 54 intensities"),
        (np.full((6, 9), np.nan, np.float32), {"arc": 1.0}, "54 values that are NaN"),
        (np.ones((6, 9, 3), np.uint8), {"arc": 1.0}, "one grey image"),
    ],
)
def test_tiff_says_no(tmp_path, image, options, message):
    tifffile.imwrite(tmp_path / "a.tif", image)
    with pytest.raises(ValueError, match=message):
        read_tiff_sinogram(tmp_path / "a.tif", **{"detector_mm": 1.0, **options})


def test_tiff_truncated_or_none(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.ones((60, 90), np.float32))
    content = (tmp_path / "a.tif").read_bytes()
    for part in (content[:6], content[:300], content[: len(content) // 2], b"text" * 99, b""):
        (tmp_path / "a.tif").write_bytes(part)
        with pytest.raises(ValueError, match="not a whole TIFF file"):
            read_tiff_sinogram(tmp_path / "a.tif", detector_mm=1.0, arc=1.0, axis=0.0)
    with pytest.raises(ValueError, match="not there"):
        read_tiff_sinogram(tmp_path / "none.tif", detector_mm=1.0, arc=1.0)


def test_neutron_scan():
    """Over a full turn the centre of mass is, on average, on the axis: a second way to find it."""
    if not NEUTRON.is_file():
        pytest.skip("the neutron sinogram is not at hand")
    scan = read_tiff_sinogram(NEUTRON, detector_mm=0.1, arc=2 * math.pi, open_beam=47000)
    y = scan.y[0, 0].double()
    assert y.shape == (459, 503) and float(y.max()) < 8  # dead pixels would be at 10.8
    u = torch.arange(503).double() - 251
    centre = float(((y * u).sum(dim=1) / y.sum(dim=1)).mean())
    axis = -scan.fields["detector_offset_mm"] / 0.1
    assert axis == pytest.approx(centre, abs=0.5) and abs(axis) > 4


def struct(**changes: object) -> dict[str, object]:
    rng = np.random.default_rng(0)
    parameters = {
        "distanceSourceOrigin": 410.66,
        "distanceSourceDetector": 553.74,
        "angles": np.arange(6) * 0.5 + 30,
        "numDetectorsPost": 56,
        "pixelSizePost": 0.2,
    }
    data = {"type": "2d", "sinogram": rng.random((6, 56)), "parameters": parameters}
    for key, value in changes.items():
        (parameters if key in parameters else data)[key] = value
    data["parameters"] = {k: v for k, v in parameters.items() if v is not None}
    return {k: v for k, v in data.items() if v is not None}


def test_htc_struct(tmp_path):
    content = struct()
    scipy.io.savemat(tmp_path / "a.mat", {"CtDataLimited": content})
    scan = read_htc2022(tmp_path / "a.mat", size=64)
    fan = FanBeam(**scan.fields)
    assert fan.domain.shape == (1, 1, 64, 64) and fan.range.shape == scan.y.shape == (1, 1, 6, 56)
    assert np.allclose(scan.fields["angles"], np.deg2rad(np.arange(6) * 0.5 + 30))
    assert np.array_equal(scan.y[0, 0].numpy(), content["sinogram"].astype(np.float32))
    assert scan.spacing_mm[1] == pytest.approx(0.2 * 410.66 / 553.74 * 512 / 64)
    assert np.allclose(scan.affine @ (31.5, 31.5, 0, 1), (0, 0, 0, 1))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"x": np.ones(3)}, "holds x; one struct with a sinogram"),
        ({"a": struct(), "b": struct()}, "holds a, b; one struct"),
        ({"a": struct(angles=np.arange(5.0))}, r"\(6, 56\) for 5 angles"),
        ({"a": struct(numDetectorsPost=55)}, "55 pixels"),
        ({"a": struct(distanceSourceOrigin=None)}, "distanceSourceOrigin is missing"),
        ({"a": struct(pixelSizePost=-1.0)}, "pixelSizePost is -1.0"),
        ({"a": struct(pixelSizePost="big")}, "pixelSizePost is 'big'"),
        ({"a": struct(sinogram=np.full((6, 56), np.inf))}, "336 of 336 values of y are NaN or infinite"),
        ({"a": struct(sinogram="text")}, "sinogram"),
    ],
)
def test_htc_says_no(tmp_path, content, message):
    scipy.io.savemat(tmp_path / "a.mat", content)
    with pytest.raises(ValueError, match=message):
        read_htc2022(tmp_path / "a.mat")


def test_htc_truncated_or_none(tmp_path):
    scipy.io.savemat(tmp_path / "a.mat", {"CtDataLimited": struct()}, do_compression=True)
    content = (tmp_path / "a.mat").read_bytes()
    damaged = bytearray(content)
    damaged[len(content) // 2] ^= 0xFF
    for part in (b"", content[:60], content[:140], content[: len(content) // 2], bytes(damaged), b"text" * 99):
        (tmp_path / "a.mat").write_bytes(part)
        with pytest.raises(ValueError, match=r"a\.mat"):
            read_htc2022(tmp_path / "a.mat")
    with pytest.raises(ValueError, match="0 x 0"):
        read_htc2022(tmp_path / "a.mat", size=0)


@pytest.mark.parametrize(
    ("name", "truth"),
    [
        ("htc2022_ta_sparse_example.mat", "htc2022_ta_full_recon_fbp_seg.png"),
        ("ta_category7.mat", "ta_category7.png"),
    ],
)
def test_htc_geometry_against_the_truth(name, truth):
    """The truth, projected, is what was measured; mirrored, turned or shifted by two pixels it is not."""
    if not (HTC / name).is_file():
        pytest.skip(f"{name} is not at hand")
    import matplotlib.image

    size = 128
    image = matplotlib.image.imread(HTC / truth)
    image = torch.from_numpy(np.array(image[..., 0] if image.ndim == 3 else image, dtype=np.float32))
    image = image.reshape(size, 4, size, 4).mean(dim=(1, 3))
    scan = read_htc2022(HTC / name, size)
    fan = FanBeam(**scan.fields)

    def misfit(x: torch.Tensor) -> SimpleNamespace:
        q = fan.forward(x[None, None].contiguous())
        mu = float((q * scan.y).sum() / (q * q).sum())
        return SimpleNamespace(mu=mu, relative=float((mu * q - scan.y).norm() / scan.y.norm()))

    right = misfit(image)
    assert right.relative < 0.06 and right.mu == pytest.approx(0.0345, rel=0.03)
    for wrong in (image.flip(0), image.flip(1), image.flip(0, 1), image.T, image.rot90()):
        assert misfit(wrong).relative > 2 * right.relative
    for shift, axis in ((2, 0), (-2, 0), (2, 1), (-2, 1)):
        assert misfit(image.roll(shift, axis)).relative > right.relative
    assert scan.sigma_y == pytest.approx(0.0078, rel=0.05)
