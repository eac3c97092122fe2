"""Measured or invented: against singular values, on every kind of operator, and the command."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from torch import Tensor

import invdiff
from invdiff.datasets import Volume, write_measurements
from invdiff.invented import Split, local_share, measured_or_invented, open_variance, undetermined
from invdiff.operators import CartesianMRI, FanBeam, KnownPhase, Mask, ParallelBeam, RealChannels, Whitened
from invdiff.operators.linear import LinearOperatorBase
from invdiff.pipelines.simulate import Simulation, simulate
from invdiff.posterior import exact_posteriors, matrix_of
from invdiff.priors import GaussianPrior, NoPrior
from invdiff.protocols import Space

F8 = torch.float64
S, H, W = 3, 5, 6
EXACT = Split(sigma_floor=1e-9, tolerance=1e-9, iterations=2000)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=F8, generator=torch.Generator().manual_seed(seed))


def close(a: Tensor, b: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(a.double(), b.double(), atol=tolerance, rtol=0)


class Matrices(LinearOperatorBase):
    """One matrix (m n) a slice, applied slice by slice: a slice's numbers never depend on its batch."""

    def __init__(self, matrices: Tensor, shape: tuple[int, int, int]) -> None:
        self.matrices = matrices
        self.domain = Space((len(matrices), *shape), matrices.dtype)
        self.range = Space((len(matrices), matrices.shape[1]), matrices.dtype)

    def _forward(self, x: Tensor) -> Tensor:
        return torch.stack([m @ v.flatten().clone() for m, v in zip(self.matrices, x, strict=True)])

    def _adjoint(self, y: Tensor) -> Tensor:
        rows = [m.T @ v.clone() for m, v in zip(self.matrices, y, strict=True)]
        return torch.stack(rows).view(self.domain.shape)


def dense(measurements: int = 11) -> Matrices:
    m = rand(S, measurements, H * W) * torch.tensor([1.0, 0.3, 2.0], dtype=F8)[:, None, None]
    return Matrices(m, (1, H, W))


@pytest.mark.parametrize("mu", [0.5, 1e-2, 1e-4])
def test_the_split_is_that_of_the_singular_values(mu: float) -> None:
    A, x = dense(), rand(S, 1, H, W, seed=1) + 0.7
    found, used, bound = undetermined(A, x, mu, 1000, 1e-10)
    _, s, Vh = torch.linalg.svd(A.matrices, full_matrices=True)
    filters = torch.ones(S, H * W, dtype=F8)
    filters[:, : s.shape[1]] = mu / (s.square() + mu)
    wanted = Vh.mT @ (filters[..., None] * (Vh @ x.flatten(1)[..., None]))
    close(found.flatten(1), wanted[..., 0], 1e-9)
    assert 0 < used < 1000 and bound <= 1e-9


def test_without_noise_it_is_the_projection_on_the_null_space() -> None:
    A, x = dense(), rand(S, 1, H, W, seed=1) + 0.7
    found, _, _ = undetermined(A, x, 1e-7, 1000, 1e-6)
    wanted = x.flatten(1)[..., None] - torch.linalg.pinv(A.matrices) @ (A.matrices @ x.flatten(1)[..., None])
    close(found.flatten(1), wanted[..., 0], 1e-5)
    assert float(A.forward(found).norm() / A.forward(x).norm()) < 1e-6
    again, _, _ = undetermined(A, found, 1e-7, 1000, 1e-6)
    close(again, found, 1e-6)


def test_tolerance_bounds_the_error_and_a_slice_does_not_depend_on_the_others() -> None:
    A, x, mu = dense(), rand(S, 1, H, W, seed=1), 1e-4
    x[1] = torch.linalg.svd(A.matrices[1])[2][3].view(1, H, W)  # a singular vector: one iteration
    exact, _, _ = undetermined(A, x, mu, 1000, 1e-12)
    rough, used, bound = undetermined(A, x, mu, 1000, 0.05)
    errors = (rough - exact).flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1)
    assert bound <= 0.05 and float(errors.max()) <= 0.05
    costs = []
    for k in range(S):
        alone, own, _ = undetermined(Matrices(A.matrices[k : k + 1], (1, H, W)), x[k : k + 1], mu, 1000, 0.05)
        assert torch.equal(alone, rough[k : k + 1])
        costs.append(own)
    assert len(set(costs)) > 1 and max(costs) == used
    _, stopped, missed = undetermined(A, x, mu, 2, 0.05)
    assert stopped == 2 and missed > 0.05


def phase() -> Tensor:
    return 0.3 * torch.arange(H * W).view(H, W).float()


def lines() -> Tensor:
    return torch.tensor([1.0, 0, 0, 1, 1, 0]).expand(H, W).clone()


def maps() -> Tensor:
    return torch.complex(rand(2, H, W, seed=3), rand(2, H, W, seed=4))


OPERATORS: dict[str, Callable[[], LinearOperatorBase]] = {
    "mask": lambda: Mask(rand(H, W, seed=2) > 0, (S, 1, H, W), dtype=F8),
    "parallel": lambda: ParallelBeam((S, 1, H, W), [0.1, 0.9, 2.0], pixel_mm=0.7, dtype=F8),
    "fan": lambda: FanBeam((S, 1, H, W), [0.1, 0.9, 2.0, 4.0], 20.0, 30.0, dtype=F8),
    "weights": lambda: Whitened(
        ParallelBeam((S, 1, H, W), [0.1, 0.9, 2.0], detectors=7, pixel_mm=0.7, dtype=F8),
        rand(S, 1, 3, 7, seed=5).abs() + 0.1,
    ),
    "known phase": lambda: CartesianMRI(lines(), None, S, torch.complex128) @ KnownPhase(phase(), S, torch.complex128),
    "two channels": lambda: CartesianMRI(lines(), maps(), S, torch.complex128)
    @ RealChannels((S, 1, H, W), torch.complex128),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_against_its_own_matrix(name: str) -> None:
    """In physical units: P = (M^T M + (sigma_y / tau)^2 I)^-1 M^T M, whatever the norm."""
    A, sigma_y, tau = OPERATORS[name](), 0.03, 0.2
    prior = GaussianPrior(torch.zeros(A.domain.shape[1:]), torch.ones(math.prod(A.domain.shape[1:])))
    x = rand(*A.domain.shape, seed=6) + 0.4
    parts = measured_or_invented(x, A, prior, sigma_y, EXACT)
    M = matrix_of(A)
    gram = M.mT @ M
    P = torch.linalg.solve(gram + (sigma_y / tau) ** 2 * torch.eye(gram.shape[1]).double(), gram)
    close(parts.measured.flatten(1), (P @ x.flatten(1)[..., None])[..., 0], 1e-7)
    close(parts.measured + parts.invented, x, 1e-12)
    assert parts.share.shape == (S, 1, H, W)
    assert float(parts.share.min()) >= 0 and float(parts.share.max()) <= 1
    assert parts.record["error_bound"] <= 1e-9 and parts.record["iterations"] > 0


def test_units_and_reference() -> None:
    """HU through attenuation: air is nothing in either part, and the split is linear about it."""
    A = ParallelBeam((S, 1, H, W), [0.1, 0.9, 2.0], pixel_mm=2.0)
    air = torch.full((S, 1, H, W), -1000.0)
    parts = measured_or_invented(air, A, NoPrior(), 0.001)
    close(parts.measured, air, 1e-3)
    assert float(parts.share.max()) == 0 and parts.record["reference"] == pytest.approx(-1000, abs=1e-2)
    body = air.clone()
    body[:, :, 1:4, 2:5] = 40.0
    one, two = (measured_or_invented(v, A, NoPrior(), 0.001, EXACT) for v in (body, 2 * body + 1000))
    close(two.measured + 1000, 2 * (one.measured + 1000), 0.1)
    assert one.record["mu"] == pytest.approx((one.record["sigma_y_normalised"] / 0.2) ** 2)
    # Rays see the parts as they see the image: the measured one whole
    mu = 0.0193 * (1 + one.measured / 1000)
    seen, left = A.forward(mu.float()), A.forward((0.0193 * one.invented / 1000).float())
    assert float(left.norm() / seen.norm()) < 0.01
    assert measured_or_invented(body, A, NoPrior(), 0.001, reference=40.0).record["reference"] == 40.0


def test_a_hole_is_invented_and_nothing_else() -> None:
    keep = torch.ones(24, 26)
    keep[6:18, 8:20] = 0
    x = torch.randn(1, 1, 24, 26, generator=torch.Generator().manual_seed(0))
    x[..., 6:18, 8:20] = 0.5  # flat, and invented all the same
    prior = GaussianPrior(torch.zeros(1, 24, 26), torch.ones(24 * 26))
    parts = invdiff.measured_or_invented(x, Mask(keep, (1, 1, 24, 26)), prior, 1e-4, Split(window=3, probes=1))
    close(parts.invented, x * (1 - keep), 2e-4)
    assert float(parts.share[..., 7:17, 9:19].min()) > 0.99
    edge = torch.nn.functional.max_pool2d(1 - keep[None, None], 3, 1, 1)
    assert float(parts.share[edge == 0].max()) < 1e-4
    assert parts.left_open is not None
    close(parts.left_open[0, 0], 1 - keep, 1e-3)  # a diagonal operator: one probe is exact


def test_the_share_pixel_by_pixel() -> None:
    m, i = rand(2, 2, 5, 6, seed=1) + 3.0, rand(2, 2, 5, 6, seed=2)
    found = local_share(m, i, 3, 0.1)
    for s, r, c in [(0, 0, 0), (1, 2, 3), (0, 4, 5), (1, 0, 2)]:
        window = (s, slice(None), slice(max(0, r - 1), r + 2), slice(max(0, c - 1), c + 2))
        structure = m[window].var(dim=(1, 2), correction=0).sum()
        filled = i[window].square().mean(dim=(1, 2)).sum()
        assert float(found[s, 0, r, c]) == pytest.approx(float(filled / (structure + filled + 0.01)), abs=1e-12)
    close(local_share(m[:1], i[:1], 3, 0.1), found[:1], 1e-15)
    close(local_share(m + 100, i, 3, 0.1), found, 1e-9)  # the measured level does not count


def test_what_is_left_open_is_the_posterior_variance_of_a_white_image() -> None:
    A, tau, sigma_y = dense(), 0.7, 0.4
    prior = GaussianPrior(torch.zeros(1, H, W), torch.full((H * W,), tau**2))
    exact = exact_posteriors(torch.zeros(S, 11, dtype=F8), A, prior, sigma_y)
    wanted = torch.stack([p.deviation.square() for p in exact]) / tau**2
    probes = 400
    found = open_variance(A, wanted, (sigma_y / tau) ** 2, Split(tau=tau, tolerance=1e-6, probes=probes))
    assert float((found - wanted).abs().max()) < 4.5 * 0.5 / math.sqrt(probes)
    assert float((found - wanted).mean().abs()) < 0.01


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Split(tau=0), "tau is 0; a positive"),
        (lambda: Split(window=4), "window is 4 pixels; an odd"),
        (lambda: Split(iterations=0), "iterations is 0"),
        (lambda: Split(tolerance=math.nan), "tolerance is nan"),
        (lambda: measured_or_invented(torch.zeros(1, 1, H, W), dense(), NoPrior()), r"the image has shape \(1, 1, 5"),
        (lambda: measured_or_invented(torch.zeros(1), object(), NoPrior()), "object has no adjoint; a linear"),  # type: ignore[arg-type]
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


def scan_of(tmp_path: Path, views: int = 6) -> Path:
    data = torch.full((2, 1, 24, 20), -1000.0)
    data[:, :, 5:19, 4:16] = 40.0
    data[1, :, 8:11, 6:9] = 700.0
    affine = np.diag([-2.0, -2.0, 3.0, 1.0])
    affine[:3, 3] = [11.0, -7.0, 5.5]
    scan, _ = simulate(Volume(data, affine, "HU"), Simulation(views=views, photons=1e5))
    write_measurements(tmp_path / "scan.h5", [scan])
    return tmp_path / "scan.h5"


def test_the_command_writes_the_parts(tmp_path: Path, here: Any) -> None:
    out = tmp_path / "r.nii.gz"
    code, said = here("reconstruct", scan_of(tmp_path), "-o", out, "--prior", "none", "--sampler", "cgls",
                      "--invented", "invented.probes=2", "invented.window=5")  # fmt: skip
    assert code == 0, said
    names = ["", "-measured", "-invented", "-invented-share", "-left-open"]
    images = {n: nibabel.load(tmp_path / f"r{n}.nii.gz") for n in names}
    x, measured, invented, share, left_open = (np.asarray(v.dataobj) for v in images.values())
    for image in images.values():
        np.testing.assert_array_equal(image.affine, images[""].affine)
    np.testing.assert_allclose(measured + invented, x, atol=1e-3)
    for part in (share, left_open):
        assert part.min() >= 0 and part.max() <= 1
    assert np.abs(invented).max() > 10 and share.max() > 0.05
    record = json.loads((tmp_path / "r.json").read_text())
    found = record["invented"]
    assert found["tau"] == 0.2 and found["error_bound"] <= 0.01 and 0 < found["iterations"] <= 500
    assert found["mu"] == pytest.approx((found["sigma_y_normalised"] / 0.2) ** 2)
    assert found["reference"] == pytest.approx(-1000, abs=0.01) and len(found["mean_share"]) == 2
    assert record["config"]["invented"]["probes"] == 2
    assert (tmp_path / "r-invented.png").read_bytes().startswith(b"\x89PNG")


def test_a_split_that_stops_early_says_so(tmp_path: Path, here: Any) -> None:
    here("reconstruct", scan_of(tmp_path), "-o", tmp_path / "r.nii", "--prior", "none", "--sampler", "fbp",
         "invented.iterations=1")  # fmt: skip
    notes = json.loads((tmp_path / "r.json").read_text())["notes"]
    assert any("stopped after 1 iterations" in note and "raise invented.iterations" in note for note in notes)
