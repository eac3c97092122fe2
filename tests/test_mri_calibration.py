"""Calibration of MR scans: ESPIRiT against sigpy and the truth, noise, coils, phase, scale, and what bad input gets."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from invdiff.noise import KeyedNoise
from invdiff.operators import CartesianMRI
from invdiff.operators.mri.calibration import (
    Region,
    check_maps,
    compress_coils,
    compression,
    edge_noise,
    filled_maps,
    find_acs,
    hann,
    image_scale,
    low_resolution_phase,
    mixed,
    noise_covariance,
    normalised_maps,
    prewhiten,
    prewhitening,
    root_sum_of_squares,
)
from invdiff.operators.mri.cartesian import centred_fft
from invdiff.operators.mri.espirit import espirit_maps
from invdiff.operators.mri.simulate import birdcage_maps, simulate_kspace, smooth_phase

SHAPE = (45, 52)


def disc(shape: tuple[int, int] = SHAPE, radius: float = 0.38) -> Tensor:
    """A magnitude image (h w): a disc off the centre with structure, background 0."""
    h, w = shape
    y, x = torch.meshgrid((torch.arange(h) - h / 2 - 1) / h, (torch.arange(w) - w / 2 + 2) / w, indexing="ij")
    image = 1 + 0.5 * torch.sin(20 * x) * torch.cos(14 * y)
    return torch.where(x.square() + y.square() < radius**2, image, 0.0)


def noise(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Complex, real components of deviation 1."""
    return math.sqrt(2) * KeyedNoise(seed)(0, torch.empty(shape, dtype=torch.complex64))


def agreement(a: Tensor, b: Tensor) -> Tensor:
    """|<a, b>| over the coils (... coil h w): 1 where unit maps are equal up to a phase."""
    return (a.conj() * b).sum(-3).abs()


@pytest.fixture(scope="module")
def scan() -> dict[str, Any]:
    image, maps = disc(), birdcage_maps(5, SHAPE)
    kspace = simulate_kspace(image[None, None], CartesianMRI(torch.ones(SHAPE), maps), smooth_phase(SHAPE), 2e-3)
    return {"image": image, "maps": maps, "kspace": kspace, "phase": smooth_phase(SHAPE)}


def test_espirit_is_sigpys_and_the_truth(scan: dict[str, Any]) -> None:
    mri = pytest.importorskip("sigpy.mri")
    found = espirit_maps(scan["kspace"], SHAPE, width=20, crop=0.0, iterations=100)
    app = mri.app.EspiritCalib(
        scan["kspace"][0].numpy(), calib_width=20, crop=0.0, output_eigenvalue=True, show_pbar=False
    )
    theirs, values = (torch.as_tensor(v) for v in app.run())
    inside = scan["image"] > 0
    assert float(agreement(theirs, found.maps[0, 0])[inside].min()) > 1 - 1e-4
    assert float((found.eigenvalues[0, 0] - values.squeeze())[inside].abs().max()) < 1e-3
    assert float(agreement(scan["maps"], found.maps[0, 0])[inside].min()) > 0.995
    assert float(agreement(scan["maps"].flip(0), found.maps[0, 0])[inside].min()) < 0.9  # other maps are not those


def test_maps_are_normalised_where_there_is_signal_and_zero_elsewhere(scan: dict[str, Any]) -> None:
    found = espirit_maps(scan["kspace"], SHAPE)
    maps = found.maps[0]
    check_maps(maps)
    power = maps.abs().square().sum(1)[0]
    assert torch.equal(power > 0, found.eigenvalues[0, 0] > 0.8)
    assert float(power[scan["image"] > 0].min()) > 0.999 and float((power == 0).float().mean()) > 0.1
    with pytest.raises(ValueError, match=r"not normalised: the sum of their squares is up to 0\.21 away from 1"):
        check_maps(1.1 * maps)
    whole = filled_maps(maps)
    assert float((whole.abs().square().sum(1) - 1).abs().max()) < 1e-5 and torch.equal(
        whole[maps != 0], maps[maps != 0]
    )
    with pytest.raises(ValueError, match="zero throughout"):
        check_maps(0 * maps)
    check_maps(normalised_maps(1.1 * maps))


def test_maps_come_from_slices_and_calibration_scans_of_their_own(scan: dict[str, Any]) -> None:
    """Slices alone or together; lines cut out of the grid; another grid for the maps."""
    two = torch.cat([scan["kspace"], 3 * scan["kspace"].flip(1)])
    both = espirit_maps(two, SHAPE).maps[0]
    torch.testing.assert_close(both[:1], espirit_maps(two[:1], SHAPE).maps[0], atol=1e-5, rtol=0)
    mask = torch.zeros(SHAPE, dtype=torch.bool)
    mask[:, 52 // 2 - 12 : 52 // 2 + 12] = True
    mask[:, 1::3] = True
    lines = find_acs(mask).of(scan["kspace"])
    inside = scan["image"] > 0
    cut = espirit_maps(lines, SHAPE).maps[0]
    assert float(agreement(cut, both[:1])[0, inside].min()) > 0.999
    fine = espirit_maps(lines, (90, 104)).maps[0, 0, :, ::2, ::2]
    assert float(agreement(fine, cut[0])[inside].min()) > 0.99


def test_two_sets_where_the_body_is_larger_than_the_field_of_view() -> None:
    """Half the field of view: two points fold onto one pixel, and two eigenvalues are 1 there, one elsewhere."""
    image, maps = disc((48, 52), 0.34), birdcage_maps(6, (48, 52))
    kspace = centred_fft(maps * image)[:, ::2].contiguous()  # every second row, zero frequency (24) among them
    found = espirit_maps(kspace[None], (24, 52), sets=2, crop=0.5)
    inner, outer = image[12:36], torch.cat([image[36:], image[:12]])  # what folds onto one pixel
    double, single = (inner > 0) & (outer > 0), (inner > 0) & (outer == 0)
    assert int(double.sum()) > 20 and int(single.sum()) > 100
    assert float(found.eigenvalues[1, 0][double].median()) > 0.8
    assert float(found.eigenvalues[1, 0][single].median()) < 0.5
    spanned = found.maps[:, 0, :, double]  # (set coil n): an orthonormal basis of both points' sensitivities
    truth = normalised_maps(maps)[:, 12:36][:, double]
    inside = torch.einsum("kcn,cn->kn", spanned.conj(), truth).abs().square().sum(0)
    assert float(inside.median()) > 0.98


@pytest.mark.parametrize("shape", [(17, 22), (16, 21)])
def test_acs_is_the_block_round_zero_frequency(shape: tuple[int, int]) -> None:
    h, w = shape
    mask = torch.zeros(h, w, dtype=torch.bool)
    mask[:, w // 2 - 3 : w // 2 + 4] = True
    mask[:, 0] = True
    assert find_acs(mask) == Region(0, h, w // 2 - 3, w // 2 + 4)
    assert find_acs(mask.T) == Region(w // 2 - 3, w // 2 + 4, 0, h)
    square = torch.zeros(h, w)
    square[h // 2 - 2 : h // 2 + 3, w // 2 - 4 : w // 2 + 4] = 1
    square[1, 1] = 1
    assert find_acs(square) == Region(h // 2 - 2, h // 2 + 3, w // 2 - 4, w // 2 + 4)
    other = mask.clone()
    other[:, w // 2 + 3] = False
    assert find_acs(torch.stack([mask, other])) == Region(0, h, w // 2 - 3, w // 2 + 3)
    with pytest.raises(ValueError, match="does not sample the centre"):
        find_acs(torch.zeros(h, w))


def test_whitening_makes_the_noise_white_and_leaves_the_signal_consistent(scan: dict[str, Any]) -> None:
    g = torch.Generator().manual_seed(3)
    mixing = torch.eye(5) + 0.4 * torch.randn(5, 5, generator=g, dtype=torch.complex64)
    coloured = mixing @ noise((5, 20000))
    covariance = noise_covariance(coloured)
    wanted = 2 * (mixing @ mixing.mH)
    assert float((covariance - wanted).abs().max() / wanted.abs().max()) < 0.05
    white = prewhiten(coloured[None], covariance)[0]
    torch.testing.assert_close(noise_covariance(white), 2 * torch.eye(5, dtype=torch.complex128), atol=1e-5, rtol=0)
    assert float(white.real.std()) == pytest.approx(1, abs=0.01)
    # The same matrix on maps and on data: whitening commutes with the scan
    W = prewhitening(covariance)
    turned = mixed(scan["maps"][None], W)
    plain = mixed(centred_fft(scan["maps"] * scan["image"])[None], W)
    torch.testing.assert_close(plain, centred_fft(turned * scan["image"]), atol=1e-4, rtol=1e-4)


def test_noise_from_the_edge_of_k_space(scan: dict[str, Any]) -> None:
    sigma = 0.05
    smooth = hann(SHAPE, Region(7, 38, 10, 43))  # an image whose k-space ends before the corners
    noisy = smooth * scan["kspace"] + sigma * noise(tuple(scan["kspace"].shape))
    covariance = noise_covariance(edge_noise(noisy))
    assert float(covariance.diagonal().real.mean()) == pytest.approx(2 * sigma**2, rel=0.15)
    mask = torch.zeros(SHAPE)
    mask[:, 20:30] = 1
    with pytest.raises(ValueError, match="corners of k-space; a noise scan is wanted"):
        edge_noise(noisy, mask)


def test_compressed_coils_give_the_same_image(scan: dict[str, Any]) -> None:
    """Orthonormal rows: white noise stays white; all coils lose nothing; a few keep the stated energy."""
    data = scan["kspace"]
    for coils in (5, 3):
        small, matrix = compress_coils(data, coils)
        identity = torch.eye(coils, dtype=matrix.dtype)
        torch.testing.assert_close(matrix @ matrix.mH, identity, atol=1e-12, rtol=0)
        assert small.shape[1] == coils
    torch.testing.assert_close(root_sum_of_squares(mixed(data, compression(data, 5))), root_sum_of_squares(data))
    for energy in (0.5, 0.9, 0.999):
        small, matrix = compress_coils(data, energy=energy)
        kept = float(small.abs().square().sum() / data.abs().square().sum())
        fewer = mixed(data, matrix[:-1])
        assert kept >= energy - 1e-5 and float(fewer.abs().square().sum() / data.abs().square().sum()) < energy
    # Maps and data by one matrix: the compressed scan is a scan of the compressed maps
    small, matrix = compress_coils(data, 3)
    torch.testing.assert_close(
        mixed(centred_fft(scan["maps"] * scan["image"])[None], matrix),
        centred_fft(mixed(scan["maps"][None], matrix) * scan["image"]),
        atol=1e-5, rtol=1e-4,
    )  # fmt: skip


def test_phase_of_the_low_resolution_image(scan: dict[str, Any]) -> None:
    region = Region(0, SHAPE[0], 26 - 6, 26 + 7)
    phase = low_resolution_phase(scan["kspace"], region, scan["maps"])
    away = torch.polar(torch.ones(SHAPE), phase[0] - scan["phase"]).angle()
    core = disc(radius=0.33) > 0
    assert phase.shape == (1, *SHAPE) and float(away[core].abs().max()) < 0.25
    assert float(scan["phase"].abs()[core].max()) > 0.5  # there is a phase to be found
    with pytest.raises(ValueError, match="5 coils without maps"):
        low_resolution_phase(scan["kspace"], region)
    window = hann(SHAPE, region)
    assert float(window[22, 26]) == 1 and float(window[:, :20].max()) == 0 and float(window[:, 33:].max()) == 0


def test_scale_is_a_quantile_of_the_foreground_and_moves_with_the_image() -> None:
    image = torch.cat([torch.zeros(5000), torch.linspace(0.5, 1.0, 2000)]).view(1, 1, 70, 100)
    assert image_scale(image) == pytest.approx(1 - 0.5 / 2000, abs=1e-3)
    noisy = image + 0.01 * KeyedNoise()(0, image)
    assert image_scale(noisy) == pytest.approx(image_scale(image), rel=0.03)
    assert image_scale(7e-6 * image) == pytest.approx(7e-6 * image_scale(image), rel=1e-6)
    assert image_scale(torch.polar(image, 3 * image)) == pytest.approx(image_scale(image), rel=1e-6)
    with pytest.raises(ValueError, match="the image is zero"):
        image_scale(0 * image)
    with pytest.raises(ValueError, match=r"quantile is 1\.5"):
        image_scale(image, 1.5)


@pytest.mark.parametrize("coils", [1, 4, 7])
def test_simulated_coils_are_normalised_smooth_and_different(coils: int) -> None:
    maps = birdcage_maps(coils, (31, 40))
    check_maps(maps)
    assert float(maps.abs().square().sum(0).min()) == pytest.approx(1, abs=1e-5)
    assert float(torch.diff(maps, dim=-1).abs().max()) < 0.3 and float(torch.diff(maps, dim=-2).abs().max()) < 0.3
    if coils > 1:
        assert float(agreement(maps[:, :8].roll(1, 0), maps[:, :8]).max()) < 0.99


def test_simulated_noise_has_the_stated_deviation_on_sampled_lines_alone() -> None:
    mask = torch.zeros(30, 41)
    mask[:, ::3] = 1
    operator = CartesianMRI(mask, birdcage_maps(3, (30, 41)), slices=2)
    image = torch.ones(2, 1, 30, 41)
    clean = simulate_kspace(image, operator)
    noisy = simulate_kspace(image, operator, sigma=0.3, noise=KeyedNoise(1))
    off = (noisy - clean)[..., mask != 0]
    assert float(off.real.std()) == pytest.approx(0.3, rel=0.05) == float(off.imag.std())
    assert not bool((noisy * (1 - mask)).any())
    assert torch.equal(noisy, simulate_kspace(image, operator, sigma=0.3, noise=KeyedNoise(1)))
    assert float(smooth_phase((30, 41), 1).abs().max()) == pytest.approx(math.pi / 2)
    assert float((smooth_phase((30, 41), 1) - smooth_phase((30, 41), 2)).abs().max()) > 0.1


GOOD = torch.ones(1, 4, 20, 21, dtype=torch.complex64)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: espirit_maps(GOOD.real, (20, 21)), "complex .s coil h w. is wanted"),
        (lambda: espirit_maps(GOOD * float("nan"), (20, 21)), "NaN or infinite"),
        (lambda: espirit_maps(0 * GOOD, (20, 21)), "calibration data are zero"),
        (lambda: espirit_maps(GOOD[..., :4], (20, 21), kernel=6), "4 calibration lines for kernels of 6"),
        (lambda: espirit_maps(GOOD, (20, 21), sets=5), "5 sets of maps for 4 coils"),
        (lambda: noise_covariance(noise((4, 3))), "3 samples of noise for 4 coils"),
        (lambda: noise_covariance(torch.ones(2, 9)), r"complex \(coil n\) is wanted"),
        (lambda: noise_covariance(noise((2, 9)) * torch.tensor([[1], [0]])), "coil 1 has no noise"),
        (lambda: prewhiten(GOOD, torch.zeros(4, 4)), "not positive definite"),
        (lambda: prewhiten(GOOD, torch.eye(3)), r"\(s, 3, ...\) is wanted"),
        (lambda: compress_coils(GOOD, 5), "5 virtual coils of 4"),
        (lambda: compress_coils(0 * GOOD), "the data are zero"),
        (lambda: check_maps(GOOD.real), "complex"),
        (lambda: birdcage_maps(0, (9, 9)), "0 coils"),
        (lambda: simulate_kspace(GOOD, CartesianMRI(torch.ones(20, 21))), "the image is complex"),
    ],
)
def test_bad_input_gets_one_sentence(call: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()
