"""Evidence of cells from measurements that mix them, against posteriors in closed form; steered CT as a command."""

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

from invdiff.circuits import Circuit, Gaussian, GridInfo, ImageCircuit, Spot, Structure
from invdiff.circuits.images import save
from invdiff.circuits.measured import Moments, sites_of
from invdiff.datasets import Measurements, Volume, read_nifti, write_measurements, write_nifti
from invdiff.operators import CartesianMRI
from invdiff.pipelines.measured_cells import LEAST_NOISE, evidence_of, rays_of
from invdiff.pipelines.scans import operator_of
from invdiff.pipelines.simulate import Simulation, simulate
from invdiff.priors import PriorInfo
from invdiff.units import mu_from_hu

V = 6


def factor(seed: int, rows: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """B of fewer rows than cells, H and h of two slices."""
    g = torch.Generator().manual_seed(seed)
    b = torch.randn(rows, V, generator=g, dtype=torch.float64)
    y = torch.randn(2, rows, generator=g, dtype=torch.float64)
    return b, b.T @ b / 0.09, y @ b / 0.09


def gaussian(mean: Tensor, covariance: Tensor) -> Any:
    """A stand-in for a circuit: a dense Gaussian."""
    inverse = torch.linalg.inv(covariance)

    def said(e: Spot) -> Moments:
        p = 1 / e.variance
        found = [torch.linalg.inv(inverse + torch.diag(q)) for q in p]
        means = [c @ (inverse @ mean + q * v) for c, q, v in zip(found, p, e.value, strict=True)]
        return Moments(torch.stack(means), torch.stack([c.diagonal() for c in found]))

    return said


def exact(mean: Tensor, covariance: Tensor, H: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    inverse = torch.linalg.inv(covariance)
    found = torch.linalg.inv(inverse + H)
    return (h + inverse @ mean) @ found, found.diagonal()


def test_independent_cells_are_exact_at_once() -> None:
    mean, variance = torch.linspace(-1, 1, V).double(), torch.linspace(0.2, 1.4, V).double()
    _, H, h = factor(0)
    said = gaussian(mean, torch.diag(variance))
    found = said(sites_of(said, H, h, rounds=1))
    wanted, spread = exact(mean, torch.diag(variance), H, h)
    torch.testing.assert_close(found.mean, wanted)
    torch.testing.assert_close(found.variance, spread.expand(2, -1))


def test_a_gaussian_circuit_has_the_exact_means() -> None:
    mean, g = torch.linspace(-1, 1, V).double(), torch.Generator().manual_seed(4)
    root = torch.randn(V, V, generator=g, dtype=torch.float64)
    covariance = root @ root.T + 0.3 * torch.eye(V)
    _, H, h = factor(1)
    said = gaussian(mean, covariance)
    wanted, spread = exact(mean, covariance, H, h)
    found = said(sites_of(said, H, h, rounds=200))
    torch.testing.assert_close(found.mean, wanted, atol=1e-5, rtol=0)
    once = said(sites_of(said, H, h, rounds=1))
    assert float((once.mean - wanted).abs().max()) > 0.02  # cells that hang together are not exact at once
    assert float((found.variance.sqrt() / spread.sqrt()).log().abs().max()) < 0.7


def kinds(mean: Tensor, std: float) -> Circuit:
    """All cells of one of two kinds."""
    inputs = Gaussian(mean.double(), torch.full(mean.shape, math.log(std)).double())
    structure = Structure((-1,), (0,) * len(mean))
    return Circuit(structure, inputs, torch.tensor([0.3, 0.7]).double(), torch.full((1, 2, 2), 0.5).double())


def test_unmixed_measurements_are_evidence_themselves() -> None:
    """B diagonal: the sites are the likelihood, for any circuit; cells that were not measured have none."""
    circuit = kinds(torch.stack([torch.linspace(-1, 0, V), torch.linspace(1, 0, V)], 1), 0.3)
    H = torch.diag(torch.tensor([2.0, 0.0, 5.0, 0.7, 0.0, 9.0])).double()
    h = torch.randn(2, V, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * H.diagonal()

    def said(e: Spot) -> Moments:
        return Moments(*circuit.posterior(e)[:2])

    found = sites_of(said, H, h, rounds=5)
    torch.testing.assert_close(1 / found.variance, H.diagonal().expand(2, -1), atol=1e-9, rtol=1e-9)
    measured = H.diagonal() > 0
    torch.testing.assert_close(found.value[:, measured], (h / H.diagonal())[:, measured])
    assert bool((found.variance[:, ~measured] > 1e9).all()) and bool(torch.isfinite(found.value).all())


def test_two_kinds_are_told_apart_by_sums() -> None:
    """The mixture's posterior in closed form: sums alone say which kind it is, and so what every cell is."""
    mean, std = torch.tensor([[-0.6] * V, [0.6] * V]).T, 0.25
    circuit, (b, H, _) = kinds(mean, std), factor(3)
    for kind in (0, 1):
        c = mean[:, kind].double() + 0.1
        h = (c @ b.T @ b / 0.09).expand(2, -1)

        def said(e: Spot) -> Moments:
            return Moments(*circuit.posterior(e)[:2])

        found = said(sites_of(said, H, h, rounds=30))
        wanted, spread = exact(mean[:, kind].double(), std**2 * torch.eye(V).double(), H, h)
        torch.testing.assert_close(found.mean, wanted, atol=0.01, rtol=0)
        torch.testing.assert_close(found.variance, spread.expand(2, -1), atol=0.005, rtol=0.1)
    with pytest.raises(ValueError, match="are wanted"):
        sites_of(said, H, h[:, :-1])


class Toy:
    """A prior of CT's unit that says nothing."""

    channels = 1
    info = PriorInfo("toy", "HU", -1000.0, 2000.0, 0.01, 50.0, 0.5, (1.0, 2.0))

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        return x / (1 + sigma.square())


def grid(rows: int = 4, columns: int = 5, block: int = 4, within: float = 0.0) -> GridInfo:
    return GridInfo("toy", "HU", -1000.0, 2000.0, rows, columns, block, 100, within)


def blocks(seed: int = 0) -> tuple[Volume, Tensor]:
    """Two slices of 14 x 18 pixels that are constant in each cell of the grid round them, and the cells."""
    cells = 1.6 * torch.rand(2, 1, 4, 5, generator=torch.Generator().manual_seed(seed)) - 0.9  # above air
    x = cells.repeat_interleave(4, 2).repeat_interleave(4, 3)[:, :, 1:15, 1:19]
    affine = np.array([[-2.0, 0, 0, 5], [0, -2.0, 0, 7], [0, 0, 3, -4], [0, 0, 0, 1]])
    return Volume(1500 * x + 500, affine, "HU"), cells.flatten(1)


def test_rays_are_sums_of_cells() -> None:
    """Without detail r is B c; the noise is that of a mean; a lost ray takes its mean with it."""
    volume, cells = blocks()
    scan, _ = simulate(volume, Simulation(views=7, sigma=0.0, reduce=1))
    rays = rays_of(scan, grid(), Toy())
    torch.testing.assert_close(cells @ rays.matrix.T, rays.values, atol=3e-4, rtol=0)
    assert float(rays.values.abs().max()) > 0.05
    loud = replace(scan, sigma_y=0.2)
    noise = rays_of(loud, grid(), Toy()).variance
    torch.testing.assert_close(noise, torch.full_like(noise, (0.2**2 + LEAST_NOISE**2) / 4))
    detail = rays_of(loud, grid(within=0.3), Toy()).variance - noise
    torch.testing.assert_close(detail[0], 0.09 * rays.matrix.square().sum(1), atol=1e-6, rtol=1e-3)
    keep = torch.ones_like(scan.y, dtype=torch.bool)
    keep[1, 0, 3, 9] = False
    lost = rays_of(replace(loud, keep=keep), grid(), Toy()).variance
    assert int(torch.isinf(lost).sum()) == 1 and bool(torch.isfinite(lost[0]).all())


def test_evidence_of_a_scan_is_the_regression_on_it() -> None:
    """Independent Gaussian cells: with the evidence the circuit's posterior is the linear-Gaussian one."""
    volume, _ = blocks()
    scan, _ = simulate(volume, Simulation(views=5, arc=90.0, sigma=0.3, reduce=1))
    mean, std = torch.linspace(-0.5, 0.3, 20)[:, None], torch.linspace(0.2, 0.5, 20)[:, None]
    structure = Structure((-1,), (0,) * 20)
    circuit = ImageCircuit(
        Circuit(structure, Gaussian(mean, std.log()), torch.ones(1), torch.ones(1, 1, 1)), grid(within=0.1)
    )
    rays, said = rays_of(scan, circuit.info, Toy()), circuit.posterior(evidence_of(scan, circuit, Toy()))
    for k in range(2):
        b, w = rays.matrix.double(), 1 / rays.variance[k].double()
        precision = torch.diag(1 / std[:, 0].square().double()) + b.T @ (w[:, None] * b)
        wanted = torch.linalg.solve(precision, b.T @ (w * rays.values[k]) + (mean / std.square())[:, 0])
        torch.testing.assert_close(said.mean[k].flatten().double(), wanted, atol=2e-4, rtol=0)
        torch.testing.assert_close(
            said.variance[k].flatten().double(), torch.linalg.inv(precision).diagonal(), atol=1e-5, rtol=1e-3
        )


def test_views_are_thinned_and_the_wrong_scan_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    volume, cells = blocks()
    scan, _ = simulate(volume, Simulation(views=9, photons=1e6, reduce=1))
    monkeypatch.setattr("invdiff.pipelines.measured_cells.MOST_VIEWS", 5)
    rays, whole = rays_of(scan, grid(), Toy()), operator_of(replace(scan, sqrt_w=None, sigma_y=0.0))[0]
    assert len(rays.matrix) == 5 * (scan.y.shape[-1] // 4)
    clean = replace(scan, y=whole(mu_from_hu(volume.data)))
    torch.testing.assert_close(cells @ rays.matrix.T, rays_of(clean, grid(), Toy()).values, atol=3e-4, rtol=0)
    circuit = ImageCircuit(Circuit(Structure((-1,), (0,) * 9), Gaussian(torch.zeros(9, 1), torch.zeros(9, 1)),
                                   torch.ones(1), torch.ones(1, 1, 1)), grid(3, 3, 4))  # fmt: skip
    with pytest.raises(ValueError, match="the images are 14 x 18, the grid of circuit 'toy' 12 x 12; no more"):
        evidence_of(scan, circuit, Toy())
    k = CartesianMRI(torch.ones(14, 18), None, 2)
    y, affine = torch.randn(*k.range.shape, dtype=torch.complex64), np.diag([2.0, 2.0, 3.0, 1.0])
    with pytest.raises(ValueError, match="of kind 'cartesian-mri' cannot be steered; parallel- or fan-beam CT"):
        evidence_of(Measurements(y, "cartesian-mri", k.fields(), affine, "a.u.", 0.1), circuit, Toy())


def folder(path: Path) -> None:
    """A scan of few views, and a circuit that knows images to be dark or bright throughout."""
    volume, _ = blocks()
    write_nifti(path / "ct.nii.gz", volume)
    bright = replace(volume, data=1300 + volume.data / 50)
    write_measurements(path / "scan.h5", [simulate(bright, Simulation(views=3, arc=40.0, sigma=0.05, reduce=1))[0]])
    circuit = kinds(torch.tensor([[-0.6, 0.6]]).expand(20, 2).clone(), 0.1).to(torch.zeros(1))
    save(path / "circuit", ImageCircuit(circuit, grid(within=0.02)))


FAST = ("sampler.steps=3", "sampler.sigma_max=20", "run.dtype=float32")


def test_a_steered_scan_from_the_command_line(prior: str, tmp_path: Path, here: Any) -> None:
    folder(tmp_path)
    words = ("reconstruct", tmp_path / "scan.h5", "-o", tmp_path / "x.nii.gz", "--prior", prior, *FAST)
    found: dict[str, Tensor] = {}
    for how in ("none", "circuit"):
        assert here(*words, "--steer", how, "--circuit", tmp_path / "circuit", "steer.sigma_stop=0.01") == (0, "")
        found[how] = read_nifti(tmp_path / "x.nii.gz").data
        record = json.loads((tmp_path / "x.json").read_text())
    assert record["config"]["steer"]["kind"] == "circuit" and len(record["circuit_sha256"]) == 64
    assert here(*words) == (0, "")
    assert torch.equal(read_nifti(tmp_path / "x.nii.gz").data, found["none"])
    errors = [float((x - 1300).abs().mean()) for x in found.values()]
    assert errors[1] < 0.9 * errors[0]


def test_an_interrupted_steered_run_goes_on_bit_equal(prior: str, tmp_path: Path, here: Any, monkeypatch: Any) -> None:
    from invdiff.samplers import DDS

    folder(tmp_path)
    words = ["reconstruct", tmp_path / "scan.h5", "--prior", prior, *FAST, "--steer", "circuit"]
    words += ["--circuit", tmp_path / "circuit", "run.every=1"]
    assert here(*words, "-o", tmp_path / "whole.nii.gz")[0] == 0
    plain, calls = DDS.step, list[int]()

    def stop(*words: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(*words)

    monkeypatch.setattr(DDS, "step", stop)
    assert here(*words, "-o", tmp_path / "x.nii.gz")[0] == 130
    assert here(*words, "-o", tmp_path / "x.nii.gz", "steer.sigma_stop=0.3", "--resume")[0] == 2
    assert here(*words, "-o", tmp_path / "x.nii.gz", "--resume")[0] == 0
    assert torch.equal(read_nifti(tmp_path / "x.nii.gz").data, read_nifti(tmp_path / "whole.nii.gz").data)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--steer", "magic"), "steer is 'magic'; one of none, circuit, codes"),
        (("--steer", "circuit", "--circuit", "nowhere"), "no circuit 'nowhere'"),
        (("--steer", "circuit", "steer.sigma_stop=30"), "starts at sigma 20 and steering ends at 30"),
        (("--steer", "codes", "--circuit", "ct-codes"), "circuit 'ct-codes' is of|a scan says nothing of codes"),
        (("--steer", "circuit", "--sampler", "tv"), "'tv' has no prior to steer"),
        (("--steer", "circuit", "--prior", "none"), "no prior to steer"),
        (("--steer", "circuit", "--circuit", "SMALL"), "the images are 14 x 18, the grid of circuit"),
    ],
)
def test_bad_steering_gets_one_sentence(
    more: tuple[str, ...], message: str, prior: str, tmp_path: Path, here: Any
) -> None:
    folder(tmp_path)
    small = kinds(torch.tensor([[-0.6, 0.6]]).expand(9, 2).clone(), 0.1).to(torch.zeros(1))
    save(tmp_path / "small", ImageCircuit(small, grid(3, 3)))
    circuit = tmp_path / ("small" if "SMALL" in more else "circuit")
    words: list[object] = ["reconstruct", tmp_path / "scan.h5", "-o", tmp_path / "x.nii.gz", "--prior", prior]
    words += [] if "tv" in more else FAST
    code, said = here(*words, "--circuit", circuit, *(circuit if w == "SMALL" else w for w in more))
    assert code == 2 and re.search(message, said), said
    assert not (tmp_path / "x.nii.gz").exists()
