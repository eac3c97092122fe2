"""Operators without some of their measurements: what is left is the operator of what is left."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from invdiff.datasets import Measurements, Volume, read_measurements, read_nifti, write_measurements, write_nifti
from invdiff.noise import KeyedNoise
from invdiff.operators import CartesianMRI, FanBeam, Mask, ParallelBeam, Whitened, metal_shadow, within_field
from invdiff.pipelines.scans import operator_of, some_slices
from invdiff.pipelines.simulate import Simulation, simulate
from invdiff.priors import GaussianPrior
from invdiff.problem import prepare
from invdiff.run import iterate, last
from invdiff.samplers import DDS, REDDiff

S, H, W, VIEWS, DETECTORS = 2, 10, 13, 7, 17
ANGLES = [0.1, 0.5, 0.9, 1.4, 1.9, 2.3, 2.8]


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def beam(angles: list[float], s: int = S, dtype: torch.dtype = torch.float64) -> ParallelBeam:
    return ParallelBeam((s, 1, H, W), angles, DETECTORS, 0.9, dtype=dtype)


def views_kept(*lost: int) -> Tensor:
    keep = torch.ones(VIEWS, DETECTORS, dtype=torch.bool)
    keep[list(lost)] = False
    return keep


def test_missing_views_are_those_of_fewer_angles() -> None:
    rest = [0, 2, 3, 6]
    whole, few = beam(ANGLES), beam([ANGLES[k] for k in rest])
    a = Mask(views_kept(1, 4, 5), whole.range.shape, torch.float64) @ whole
    x, y = rand(S, 1, H, W), rand(S, 1, VIEWS, DETECTORS, seed=1)
    torch.testing.assert_close(a(x)[:, :, rest], few(x))
    assert float(a(x)[:, :, [1, 4, 5]].abs().max()) == 0
    torch.testing.assert_close(a.adjoint(y), few.adjoint(y[:, :, rest]))
    torch.testing.assert_close(a.normal(x), few.normal(x))
    torch.testing.assert_close(a.pinv(y), few.pinv(y[:, :, rest]))
    torch.testing.assert_close(a.solve(x, 0.3), few.solve(x, 0.3))
    assert a.views == tuple(rest)
    assert abs(a.norm() / few.norm() - 1) < 1e-12
    part = a.split([3, 0])
    torch.testing.assert_close(part(x), a(x)[:, :, [3, 0]])


def test_lost_k_space_is_k_space_never_sampled() -> None:
    keep = rand(S, H, W, seed=3) > 0.2
    keep[:, H // 2] = True
    for maps in (None, rand(3, H, W, dtype=torch.complex128)):
        whole = CartesianMRI(torch.ones(H, W), maps, S, torch.complex128)
        a, few = Mask(keep, whole.range.shape, torch.complex128) @ whole, CartesianMRI(keep, maps, S, torch.complex128)
        x, y = rand(S, 1, H, W, dtype=torch.complex128), rand(*whole.range.shape, seed=2, dtype=torch.complex128)
        for name in ("forward", "normal"):
            torch.testing.assert_close(getattr(a, name)(x), getattr(few, name)(x))
        for name in ("adjoint", "pinv", "zero_filled"):
            torch.testing.assert_close(getattr(a, name)(y), getattr(few, name)(y), atol=1e-6, rtol=1e-5)
        assert a.views == few.views
        torch.testing.assert_close(a.split(a.views[:3])(x), few.split(few.views[:3])(x))
        torch.testing.assert_close(a.part(y, a.views[:3]), few.part(y, few.views[:3]))


def test_a_sampler_sees_the_operator_of_what_is_left() -> None:
    """DDS and RED-Diff: bit by bit nothing depends on how the rays were left out, but for rounding."""
    rest, g = [0, 2, 3, 6], torch.float32
    whole, few = beam(ANGLES, dtype=g), beam([ANGLES[k] for k in rest], dtype=g)
    masked = Mask(views_kept(1, 4, 5), whole.range.shape, g) @ whole
    prior = GaussianPrior.smooth((1, H, W), length=2.0, deviation=0.4, mean=0.1)
    y = masked(0.3 + 0.2 * rand(S, 1, H, W, dtype=g))
    for sampler in (DDS(steps=4, cg_steps=6, anchor=1.0), REDDiff(steps=4, newton_steps=6, lam=1.0)):
        found = []
        for operator, data in ((masked, y), (few, y[:, :, rest].contiguous())):
            prepared = prepare(data, operator, prior, 0.05, KeyedNoise(0))
            found.append(last(iterate(sampler, prepared.problem)).x)
        torch.testing.assert_close(*found, atol=2e-5, rtol=1e-4)


def test_the_shadow_of_metal_is_every_ray_that_meets_it() -> None:
    """Moving what is inside the metal changes no measurement; anywhere else it changes one."""
    region = torch.zeros(S, H, W, dtype=torch.bool)
    region[0, 3:5, 6:9] = True
    region[1, 8, 1] = True
    angles = [0.2, 1.3, 2.9, 4.4, -0.7]
    for a in (beam(ANGLES), FanBeam((S, 1, H, W), angles, 40.0, 66.0, DETECTORS, 0.9, 2.0, dtype=torch.float64)):
        shadow = metal_shadow(a, region)
        kept = Mask(~shadow, dtype=torch.float64) @ a
        x, more = rand(S, 1, H, W), torch.zeros(S, 1, H, W, dtype=torch.float64)
        more[region[:, None]] = 5.0
        assert torch.equal(kept(x + more)[~shadow], a(x + more)[~shadow])
        torch.testing.assert_close(kept(more), torch.zeros(a.range.shape, dtype=torch.float64), atol=0, rtol=0)
        seen = a(more) != 0
        assert torch.equal(seen, shadow) and 0 < float(shadow.double().mean()) < 0.6
    with pytest.raises(ValueError, match="the region holds no pixel; at least one"):
        metal_shadow(a, torch.zeros(H, W))
    with pytest.raises(ValueError, match=r"the region is .9, 13.; one that broadcasts"):
        metal_shadow(a, torch.ones(H - 1, W))


def test_a_disc_about_the_axis_is_what_a_narrow_detector_sees() -> None:
    a, angles = beam(ANGLES), [0.2, 1.3, 2.9]
    centred = (torch.arange(DETECTORS) - 8) * 0.9
    assert torch.equal(within_field(a, 6.0), (centred.abs() <= 3.0).expand(VIEWS, -1))
    fan = FanBeam((S, 1, H, W), angles, 40.0, 66.0, DETECTORS, 0.9, 2.0, dtype=torch.float64)
    u = (torch.arange(DETECTORS) - 8) * 2.0
    wanted = 40.0 * torch.sin(torch.atan(u / 66.0).abs()) <= 3.0
    assert torch.equal(within_field(fan, 6.0), wanted.expand(3, -1))
    for bad in (0.0, math.inf):
        with pytest.raises(ValueError, match="positive number"):
            within_field(a, bad)
    with pytest.raises(ValueError, match="no ray comes within"):
        within_field(ParallelBeam((1, 1, 4, 5), [0.3], 6), 0.2)


def test_fbp_bridges_missing_rays() -> None:
    """A sinogram that is linear along the detector comes back whole, and its FBP with it."""
    a = beam(ANGLES)
    u = torch.arange(DETECTORS, dtype=torch.float64)
    y = (0.3 * u + torch.arange(VIEWS)[:, None]).expand(a.range.shape).clone()
    keep = rand(VIEWS, DETECTORS, seed=5) > 0
    keep[:, [0, -1]] = True
    m = Mask(keep, a.range.shape, torch.float64) @ a
    torch.testing.assert_close(m.pinv(m.outer(y)), a.pinv(y))  # type: ignore[attr-defined]
    keep[:, :4] = False
    flat = a.interpolated(y, keep.expand(a.range.shape))
    first = keep.int().argmax(-1)
    assert torch.equal(flat[0, 0, :, 0], y[0, 0, torch.arange(VIEWS), first])
    assert torch.equal(a.interpolated(y, torch.zeros_like(y, dtype=torch.bool)), torch.zeros_like(y))


def scan(**more: Any) -> Measurements:
    a = beam(ANGLES, dtype=torch.float32)
    affine = np.diag([0.9, 0.9, 2.0, 1.0])
    return Measurements(rand(*a.range.shape, dtype=torch.float32), "parallel", a.fields(), affine, "1/mm", **more)


def test_a_file_says_what_was_kept(tmp_path: Path) -> None:
    keep = rand(S, 1, VIEWS, DETECTORS, seed=4) > 0
    for noise in ({"sigma_y": 0.1}, {"sqrt_w": rand(1, 1, VIEWS, DETECTORS, dtype=torch.float32).abs()}):
        before = scan(keep=keep, **noise)
        write_measurements(tmp_path / "scan.h5", [before])
        (after,) = read_measurements(tmp_path / "scan.h5")
        assert after.keep is not None and torch.equal(after.keep, keep)
        operator, y, _ = operator_of(after)
        plain, _, _ = operator_of(replace(after, keep=None))
        x = rand(S, 1, H, W, dtype=torch.float32)
        torch.testing.assert_close(operator(x), torch.where(keep, plain(x), 0.0))
        assert float(y[~keep].abs().max()) == 0 and isinstance(operator, Whitened) == ("sqrt_w" in noise)
        one, own, _ = operator_of(some_slices(after, 1))
        torch.testing.assert_close(one(x[1:]), operator(x)[1:])
        assert torch.equal(own, y[1:])
    for bad, message in (
        (keep.float(), "bool that fits y of"),
        (keep[..., 1:], "bool that fits y of"),
        (keep & (torch.arange(S) == 0).view(S, 1, 1, 1), r"leaves nothing of slices \[1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            scan(keep=bad, sigma_y=0.1)


def body() -> Volume:
    x = torch.full((3, 1, 24, 20), -1000.0)
    x[:, :, 5:19, 4:16] = 40.0
    x[1, :, 9:12, 7:9] = 900.0
    affine = np.array([[-2.0, 0, 0, 5], [0, -2.0, 0, 7], [0, 0, 3, -4], [0, 0, 0, 1]])
    return Volume(x, affine, "HU")


def test_simulated_rays_behind_metal_do_not_say_what_it_is() -> None:
    region = torch.zeros(3, 1, 24, 20, dtype=torch.bool)
    region[1, :, 9:12, 7:9] = True
    how = Simulation(views=9, photons=1e4, reduce=2, field=30.0)
    one, truth = simulate(body(), how, region)
    other, _ = simulate(replace(body(), data=body().data.masked_fill(region, 3000.0)), how, region)
    assert one.keep is not None and torch.equal(one.y, other.y) and torch.equal(one.keep, other.keep)
    assert truth.data.shape == (3, 1, 12, 10)
    field = within_field(operator_of(replace(one, keep=None))[0].inner, 30.0)
    assert torch.equal(one.keep[0, 0], field) and not torch.equal(one.keep[1, 0], field)
    plain, _ = simulate(body(), replace(how, field=0.0))
    assert plain.keep is None and torch.equal(plain.y[one.keep], one.y[one.keep])


def test_lost_rays_from_the_command_line(prior: str, tmp_path: Path, here: Any) -> None:
    volume = body()
    region = replace(volume, data=(volume.data == 900).float(), unit="a.u.")
    write_nifti(tmp_path / "ct.nii.gz", volume)
    write_nifti(tmp_path / "metal.nii.gz", region)
    made = ("simulate", tmp_path / "ct.nii.gz", "-o", tmp_path / "scan.h5", "--views", 9, "--sigma", 0.01)
    lost = ("--metal", tmp_path / "metal.nii.gz", "--field", 36, "--slices", "1:3")
    assert here(*made, *lost) == (0, "")
    (found,) = read_measurements(tmp_path / "scan.h5")
    assert found.keep is not None and not torch.equal(found.keep[0], found.keep[1])
    words = ("reconstruct", tmp_path / "scan.h5", "-o", tmp_path / "x.nii.gz", "--prior", prior, "sampler.steps=3")
    assert here(*words, "run.dtype=float32") == (0, "")
    assert read_nifti(tmp_path / "x.nii.gz").data.shape == (2, 1, 24, 20)
    first = json.loads((tmp_path / "x.json").read_text())["fingerprint"]
    write_measurements(tmp_path / "scan.h5", [replace(found, keep=None)])
    assert here(*words, "run.dtype=float32") == (0, "")
    assert json.loads((tmp_path / "x.json").read_text())["fingerprint"] != first
    write_nifti(tmp_path / "metal.nii.gz", replace(region, data=0 * region.data))
    code, said = here(*made, *lost)
    assert code == 2 and "is empty; at least one voxel" in said
