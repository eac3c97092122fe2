"""KSpace: what it refuses, and that turning and cutting it leave every point where it was in the world."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from invdiff.datasets import KSpace, upright, without_oversampling
from invdiff.datasets.kspace import exchanged
from invdiff.fourier import centred_fft, centred_ifft
from invdiff.metrics import fastmri_metrics


def oblique(angles=(20.0, -15.0, 35.0), signs=(1, 1, 1), order=(0, 1, 2), spacing=(1.3, 0.7, 4.0)) -> np.ndarray:
    """Columns w, h, s: a rotated frame with given signs and order."""
    affine = np.eye(4)
    axes = np.eye(3)[:, list(order)] * np.array(signs)
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() @ axes * np.array(spacing)
    affine[:3, 3] = (12.0, -31.0, 57.0)
    return affine


def point(shape, voxel, affine=None, coils=2, **more) -> KSpace:
    """k-space of one bright voxel (s, h, w), sampled in full."""
    s, h, w = shape
    image = torch.zeros(s, coils, h, w, dtype=torch.complex64)
    image[voxel[0], :, voxel[1], voxel[2]] = torch.tensor([1.0 + 2.0j, 3.0 - 1.0j])[:coils]
    data = centred_fft(image)
    image += 1e-3  # a little everywhere: no slice is empty
    data = centred_fft(image) + 1e-6
    return KSpace(data, torch.ones(h, w, dtype=torch.bool), oblique() if affine is None else affine, **more)


def image_of(kspace: KSpace) -> torch.Tensor:
    return centred_ifft(kspace.data)


def brightest(kspace: KSpace) -> np.ndarray:
    """Where in the world (RAS mm) the brightest voxel lies."""
    image = image_of(kspace).abs().square().sum(1)
    s, h, w = np.unravel_index(int(image.argmax()), image.shape)
    return (kspace.affine @ [w, h, s, 1])[:3]


@pytest.mark.parametrize(("h", "w"), [(8, 11), (7, 10)])
@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, 1, 1), (1, -1, -1), (-1, -1, 1)])
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (1, 2, 0), (2, 0, 1), (0, 2, 1), (2, 1, 0)])
def test_upright_keeps_the_world(h, w, signs, order):
    """Turned or not, the point is where it was, and columns and rows run as on a DICOM screen."""
    turn = (5.0, -8.0, 10.0)
    scan = point((3, h, w), (1, 2, 8), oblique(turn, signs, order))
    turned = upright(scan)
    assert np.allclose(brightest(turned), brightest(scan), atol=1e-4)
    bright = [image.flatten(2)[1, :, int(image[1, 0].abs().argmax())] for image in map(image_of, (scan, turned))]
    assert float((bright[0] - bright[1]).abs().max()) < 1e-4  # no phase added
    screen = {0: (-1, -2), 1: (0, -2), 2: (0, 1)}[int(np.abs(scan.affine[:3, 2]).argmax())]
    column, row = turned.affine[:3, 0], turned.affine[:3, 1]
    for axis, (world, name) in zip((column, row), zip(screen, "wh", strict=True), strict=True):
        assert np.abs(axis).argmax() == abs(world) % 3, name
        assert axis[abs(world) % 3] < 0, name  # left, posterior, inferior: against RAS
    assert torch.equal(upright(turned).data, turned.data)


def test_upright_of_a_trajectory_keeps_the_world():
    """The signal of a point at samples off the grid, before and after: the same voxel explains it."""
    g = torch.Generator().manual_seed(3)
    h, w, row, column = 9, 12, 2, 10
    track = torch.rand(60, 2, generator=g) - 0.5

    def signal(points, at):
        return torch.exp(-2j * torch.pi * (points[:, 0] * at[0] + points[:, 1] * at[1]))

    data = signal(track, (row - h // 2, column - w // 2))[None, None].to(torch.complex64)
    scan = KSpace(data, None, oblique(signs=(1, -1, 1), order=(1, 0, 2)), trajectory=track, shape=(h, w))
    turned = upright(scan)
    where = (np.linalg.inv(turned.affine) @ scan.affine @ [column, row, 0, 1]).round(6)
    n, m = turned.image_shape
    assert (n, m) == (w, h)
    again = signal(turned.trajectory, (where[1] - n // 2, where[0] - m // 2))
    assert float((again - turned.data[0, 0]).abs().max()) < 1e-4


@pytest.mark.parametrize("h", [7, 10])
@pytest.mark.parametrize(("w", "m"), [(16, 8), (15, 7), (14, 9), (16, 11)])
def test_without_oversampling_cuts_the_field_of_view(h, w, m):
    scan = point((2, h, w), (1, 3, w // 2 - 2), crop=(h, m))
    cut = without_oversampling(scan)
    assert cut.data.shape == (2, 2, h, m) and cut.mask.shape == (h, m) and cut.spacing_mm == scan.spacing_mm
    assert np.allclose(brightest(cut), brightest(scan), atol=1e-4)
    a, b = map(image_of, (scan, cut))
    start = w // 2 - m // 2
    assert float((a[..., start : start + m] - b).abs().max()) < 1e-5
    across = without_oversampling(exchanged(scan))  # the readout along the rows
    assert torch.allclose(exchanged(across).data, cut.data, atol=1e-5)
    assert np.allclose(exchanged(across).affine, cut.affine)


def test_without_oversampling_keeps_noise_white_and_lines_apart():
    g = torch.Generator().manual_seed(1)
    data = torch.randn(1, 3, 40, 64, dtype=torch.complex64, generator=g)
    mask = torch.zeros(40, 64, dtype=torch.bool)
    mask[::3] = True
    noise, acs = data[0, :, 0], torch.randn(1, 3, 9, 11, dtype=torch.complex64, generator=g)
    scan = KSpace(data * mask, mask, oblique(), crop=(36, 32), noise=noise, calibration=acs)
    cut = without_oversampling(scan)
    assert cut.data.shape[2:] == (40, 32) and cut.calibration.shape[2:] == (9, 5)
    assert bool((cut.data[:, :, ~cut.mask[:, 0]] == 0).all()) and torch.equal(cut.mask[:, :1], mask[:, :1])
    power = cut.data[:, :, ::3].abs().square().mean()
    assert float(power) == pytest.approx(1.0, rel=0.1)
    alone = without_oversampling(replace(scan, data=torch.where(torch.arange(40)[:, None] == 3, scan.data, 0j) + 0j,
                                         mask=mask & (torch.arange(40)[:, None] == 3)))  # fmt: skip
    assert torch.allclose(alone.data[:, :, 3], cut.data[:, :, 3], atol=1e-6)
    assert without_oversampling(replace(scan, crop=None)).data is scan.data
    gaps = mask.clone()
    gaps[0, 5] = False
    with pytest.raises(ValueError, match="has gaps, so 64 cannot be cut to 32"):
        without_oversampling(replace(scan, data=scan.data * gaps, mask=gaps))


def broken(**changes):
    """A good scan with some fields replaced."""
    g = torch.Generator().manual_seed(2)
    fields = {
        "data": torch.randn(2, 3, 5, 8, dtype=torch.complex64, generator=g),
        "mask": torch.ones(5, 8, dtype=torch.bool),
        "affine": np.eye(4),
        "source": {"name": "scan.h5"},
    }
    return {**fields, **{k: v(fields["data"].clone()) if callable(v) else v for k, v in changes.items()}}


def put(index, value):
    def change(data):
        data[index] = value
        return data

    return change


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": put((0, 1, 2, 3), float("nan"))}, "1 of 240 values that are NaN"),
        ({"data": lambda d: d.real}, "torch.float32, which is real; complex"),
        ({"data": lambda d: d.to(torch.complex128)}, "torch.complex64 is wanted"),
        ({"data": lambda d: d * 0}, "is zero throughout"),
        ({"data": lambda d: d[0]}, r"\(s coil h w\)"),
        (
            {"data": put((1, slice(None), 2), 0)},
            r"1 of 10 rows .* nothing but zeros.* in slice 1, index 2: lines are miss",
        ),
        ({"data": put((slice(None), slice(None), slice(None), 7), 0)}, "2 of 16 columns"),
        ({"mask": torch.zeros(5, 8, dtype=torch.bool)}, "zero throughout: nothing was sampled"),
        ({"mask": torch.ones(2, 5, 8, dtype=torch.bool) * torch.tensor([[[True]], [[False]]])}, "in 1 of 2 slices"),
        ({"mask": torch.ones(8, 5, dtype=torch.bool)}, r"\(8, 5\) for k-space of \(2, 3, 5, 8\)"),
        ({"mask": torch.ones(5, 8)}, "torch.float32"),
        ({"mask": torch.arange(5)[:, None].expand(5, 8) > 0}, "values at 16 places that the mask says"),
        ({"mask": None}, "one of mask and trajectory"),
        ({"noise": torch.ones(4, 9, dtype=torch.complex64)}, r"noise scan is \(4, 9\) and k-space has 3 coils"),
        ({"noise": torch.ones(3, 9)}, "noise scan is torch.float32"),
        ({"calibration": torch.ones(2, 4, 5, 5, dtype=torch.complex64)}, "calibration scan .* 2 slices and 3 coils"),
        ({"calibration": torch.full((2, 3, 5, 5), complex(0, float("inf")))}, "calibration scan has 150 of 150"),
        ({"affine": np.zeros((4, 4))}, "affine"),
        ({"crop": (0, 4)}, r"crop is \(0, 4\)"),
        ({"mask": None, "trajectory": torch.zeros(7, 2), "shape": (5, 8)}, "trajectory is"),
        (
            {"mask": None, "trajectory": torch.full((7, 2), 0.7), "shape": (5, 8), "data": lambda d: d[..., 0, :7]},
            "leaves",
        ),
        ({"mask": None, "trajectory": torch.zeros(7, 2), "data": lambda d: d[..., 0, :7]}, r"\(h w\) and None"),
    ],
)
def test_kspace_says_no(changes, message):
    KSpace(**broken())
    with pytest.raises(ValueError, match=message) as caught:
        KSpace(**broken(**changes))
    assert "\n" not in str(caught.value)
    if "affine" not in changes:
        assert "scan.h5" in str(caught.value)


def test_fastmri_metrics_are_the_published_ones():
    """Against a second implementation, from the definitions and skimage."""
    from skimage.metrics import normalized_root_mse, peak_signal_noise_ratio, structural_similarity

    g = torch.Generator().manual_seed(5)
    target = torch.rand(3, 1, 19, 24, generator=g) * torch.tensor([0.3, 1.0, 2.0])[:, None, None, None]
    estimate = target + 0.1 * torch.randn(target.shape, generator=g)
    a, b = target[:, 0].double().numpy(), estimate[:, 0].double().numpy()
    found = fastmri_metrics(target, estimate)
    peak = a.max()
    slices = [structural_similarity(x, y, data_range=peak) for x, y in zip(a, b, strict=True)]
    assert found.nmse == pytest.approx(normalized_root_mse(a, b, normalization="euclidean") ** 2, rel=1e-6)
    assert found.psnr == pytest.approx(peak_signal_noise_ratio(a, b, data_range=peak), abs=1e-6)
    assert found.ssim == pytest.approx(float(np.mean(slices)), abs=1e-6)
    each = [peak_signal_noise_ratio(x, y, data_range=x.max()) for x, y in zip(a, b, strict=True)]
    assert abs(found.psnr - np.mean(each)) > 1.0  # of a slice, it is another number
    assert fastmri_metrics(target[:, 0], estimate[:, 0]) == found


@pytest.mark.parametrize(
    ("target", "estimate", "message"),
    [
        (torch.ones(2, 1, 9, 9), torch.ones(2, 1, 9, 8), "the same"),
        (torch.ones(2, 2, 9, 9), torch.ones(2, 2, 9, 9), "the same"),
        (torch.ones(2, 9, 9, dtype=torch.complex64), torch.ones(2, 9, 9), "magnitudes"),
        (torch.ones(2, 6, 9), torch.ones(2, 6, 9), "at least 7 x 7"),
        (torch.zeros(2, 9, 9), torch.ones(2, 9, 9), "maximum is 0.0"),
        (torch.full((2, 9, 9), torch.nan), torch.ones(2, 9, 9), "maximum is nan"),
    ],
)
def test_fastmri_metrics_say_no(target, estimate, message):
    with pytest.raises(ValueError, match=message):
        fastmri_metrics(target, estimate)
