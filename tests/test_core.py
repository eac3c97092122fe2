"""linalg, problem, run, config, metrics: properties and closed forms."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from invdiff.config import build, find, parse_override, with_overrides
from invdiff.linalg import (
    BLOCK,
    cg,
    difference,
    difference_adjoint,
    haar,
    haar_adjoint,
    inner,
    plus_roughness,
    power_norm,
    shrink,
)
from invdiff.metrics import compare, nmse, psnr
from invdiff.noise import geometric, karras
from invdiff.priors import GaussianPrior, NoPrior
from invdiff.problem import prepare
from invdiff.protocols import Space
from invdiff.reconstruction import reconstruct
from invdiff.run import checkpointed, fingerprint, iterate, load_state
from invdiff.samplers import CGLS, DDS, REDDiff
from invdiff.samplers.dds import DDSState
from invdiff.units import hu_affine, hu_from_mu, mu_from_hu


def hermitian(n: int, slices: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(5)
    a = torch.randn(slices, n, n, dtype=torch.complex128, generator=g)
    return a @ a.mH + 0.5 * torch.eye(n), torch.randn(slices, n, dtype=torch.complex128, generator=g)


def test_cg_solves_a_hermitian_system_in_n_steps() -> None:
    m, b = hermitian(9, 4)
    x = cg(lambda v: (m @ v[..., None])[..., 0], b, iterations=9)
    torch.testing.assert_close(x, torch.linalg.solve(m, b), atol=1e-8, rtol=1e-8)


def test_cg_slices_are_independent_unless_joint() -> None:
    m, b = hermitian(7, 3)
    one = cg(lambda v: (m[1:2] @ v[..., None])[..., 0], b[1:2], iterations=3)
    apart = cg(lambda v: (m @ v[..., None])[..., 0], b, iterations=3)
    joint = cg(lambda v: (m @ v[..., None])[..., 0], b, iterations=3, joint=True)
    torch.testing.assert_close(apart[1:2], one)
    assert (joint[1:2] - one).abs().max() > 1e-3


def test_cg_beyond_convergence_and_on_a_singular_system_stays_put() -> None:
    g = torch.Generator().manual_seed(1)
    a = torch.randn(6, 20, generator=g)
    b = a.T @ torch.randn(6, generator=g)
    few, many = (cg(lambda v: (a.T @ (a @ v.T)).T, b[None], iterations=k) for k in (10, 500))
    torch.testing.assert_close(few, many, atol=1e-4, rtol=1e-4)
    assert torch.equal(cg(lambda v: v, torch.zeros(2, 3)), torch.zeros(2, 3))


@pytest.mark.parametrize("joint", [False, True])
def test_cg_leaves_what_it_is_given_and_gradients_change_nothing(joint: bool) -> None:
    """Without gradients it works in place, on its own tensors alone; more slices than are summed at once."""
    g = torch.Generator().manual_seed(3)
    m = torch.randn(5, 5, generator=g)
    m = m @ m.T + torch.eye(5)
    b, start = torch.randn(BLOCK + 3, 5, generator=g), torch.randn(BLOCK + 3, 5, generator=g)
    kept, begun = b.clone(), start.clone()
    for x0 in (None, start):
        with torch.no_grad():
            x = cg(lambda v: v @ m, b, x0, iterations=4, joint=joint)
            torch.testing.assert_close(cg(lambda v: v, b, x0, iterations=2, joint=joint), b)
        assert torch.equal(b, kept) and torch.equal(start, begun)
        torch.testing.assert_close(cg(lambda v: v @ m, b, x0, iterations=4, joint=joint), x)
    each = (b * start).sum(1, keepdim=True)
    torch.testing.assert_close(inner(b, start, joint), each.sum(0, keepdim=True) if joint else each)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_roughness_is_the_difference_and_its_adjoint(dim: int) -> None:
    x, v = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(4))
    wanted = x + 0.7 * difference_adjoint(difference(v, dim), dim)
    torch.testing.assert_close(plus_roughness(x.clone(), v, 0.7, dim), wanted)
    assert torch.equal(plus_roughness(x[:1].clone(), v[:1], 0.7, 0), x[:1])


@pytest.mark.parametrize("slices", [1, 2, 3, 5, 8, 13])
def test_haar_is_orthonormal_but_for_the_mean(slices: int) -> None:
    g = torch.Generator().manual_seed(6)
    x, v = torch.randn(2, 4, slices, 3, dtype=torch.float64, generator=g)
    details = haar(x, 1)
    left, right = (details * v).sum(), (x * haar_adjoint(v, 1)).sum()
    torch.testing.assert_close(left, right, rtol=1e-13, atol=1e-13)
    lost = x - haar_adjoint(details, 1)  # one direction of all slices
    assert torch.linalg.matrix_rank(lost.movedim(1, 0).flatten(1)) == 1
    torch.testing.assert_close(details.square().sum() + lost.square().sum(), x.square().sum())
    if slices in (2, 8):
        torch.testing.assert_close(lost, x.mean(1, keepdim=True).expand_as(x))
        assert float(haar(torch.full((4, slices, 3), 2.5), 1).abs().max()) == 0


def test_haar_of_a_step_is_one_detail() -> None:
    x = torch.cat([torch.zeros(4, 1), torch.ones(4, 1)])
    assert (haar(x, 0).abs() > 1e-6).sum() == 1 and float(haar(x, 0)[1]) == pytest.approx(-(2**0.5))


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_difference_has_an_exact_adjoint_and_free_ends(dim: int) -> None:
    g = torch.Generator().manual_seed(3)
    x, v = torch.randn(2, 4, 5, 7, dtype=torch.float64, generator=g)[:, :3]
    left, right = (difference(x, dim) * v).sum(), (x * difference_adjoint(v, dim)).sum()
    torch.testing.assert_close(left, right, rtol=1e-13, atol=1e-13)
    assert float(difference(torch.full((3, 4, 5), 2.5), dim).abs().max()) == 0


def test_power_norm_is_the_spectral_norm() -> None:
    a = torch.randn(8, 13, generator=torch.Generator().manual_seed(0))
    start = torch.randn(13, generator=torch.Generator().manual_seed(1))
    assert power_norm(lambda v: a.T @ (a @ v), start, 200) == pytest.approx(
        float(torch.linalg.matrix_norm(a, 2)), rel=1e-4
    )


def test_shrink_minimises_its_objective_and_keeps_phase() -> None:
    x = torch.tensor([3.0 - 4.0j, 0.1 + 0.0j, 0.0j])
    torch.testing.assert_close(shrink(x, 1.0), torch.tensor([2.4 - 3.2j, 0.0j, 0.0j]))


@pytest.mark.parametrize("grid", [karras, geometric])
def test_grids_fall_to_zero(grid: Any) -> None:
    s = grid(7, 50.0, 0.02)
    assert len(s) == 8 and s[0] == pytest.approx(50) and s[-2] == pytest.approx(0.02) and s[-1] == 0
    assert all(a > b for a, b in itertools.pairwise(s))


def test_hu_and_attenuation() -> None:
    hu = torch.tensor([-1000.0, 0.0, 1000.0, -3024.0])
    torch.testing.assert_close(mu_from_hu(hu), torch.tensor([0.0, 0.0193, 0.0386, 0.0]))
    torch.testing.assert_close(hu_from_mu(mu_from_hu(hu[:3])), hu[:3])
    slope, intercept = hu_affine(0.02)
    torch.testing.assert_close(slope * hu[:3] + intercept, mu_from_hu(hu[:3], 0.02))


class InHU(GaussianPrior):
    """The Gaussian prior with a stated range."""

    info = NoPrior("HU", -1000.0, 1400.0).info


def test_prepare_is_the_affine_map_it_says(world: Any) -> None:
    class Attenuation(type(world.operator)):  # type: ignore[misc]
        unit = "1/mm"

    A = Attenuation(world.operator.matrix * 3.7, world.operator.shape)
    prior = InHU(world.prior.mean, world.prior.variances, world.prior.vectors)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(A.domain.shape, generator=g)
    hu = 1200 * x + 200
    y = A.forward(0.02 * (1 + hu / 1000))
    got = prepare(y, A, prior, 0.013, mu_water=0.02)
    torch.testing.assert_close(got.problem.operator.forward(x), got.problem.y, atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(got.to_physical(x), hu)
    assert got.problem.sigma_y == pytest.approx(0.013 / (0.02 * 1.2) / got.norm, rel=1e-5)
    assert got.norm == pytest.approx(3.7, rel=0.02)
    assert power_norm(got.problem.operator.normal, x, 100) == pytest.approx(1.0, rel=0.02)


def test_scaled_operator_keeps_adjoint_and_solve(world: Any) -> None:
    scaled = prepare(
        world.problem.y, type(world.operator)(world.operator.matrix * 5, world.operator.shape), world.prior, 0.1
    )
    A = scaled.problem.operator
    g = torch.Generator().manual_seed(4)
    x, y = torch.randn(A.domain.shape, generator=g), torch.randn(A.range.shape, generator=g)
    torch.testing.assert_close((A.forward(x) * y).sum(), (x * A.adjoint(y)).sum(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(A.normal(A.solve(x, 0.3)) + 0.3 * A.solve(x, 0.3), x, rtol=1e-3, atol=1e-3)


def test_rescaling_the_operator_changes_nothing(world: Any) -> None:
    def run(factor: float) -> Tensor:
        A = type(world.operator)(world.operator.matrix * factor, world.operator.shape)
        sampler = DDS(steps=5, sigma_max=4.0)
        return reconstruct(world.problem.y * factor, A, world.prior, sampler, 0.05 * factor, seed=2).x

    for factor in (1e-3, 1e3):
        torch.testing.assert_close(run(factor), run(1.0), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": torch.zeros(5, 19)}, r"shape \(5, 19\); the operator gives \(5, 20\)"),
        ({"y": torch.zeros(5, 20).double()}, "float64"),
        ({"y": torch.full((5, 20), float("nan"))}, "NaN or infinite"),
        ({"sigma_y": -1.0}, "sigma_y is -1.0"),
    ],
)
def test_prepare_refuses(change: dict[str, Any], message: str, world: Any) -> None:
    given = {"y": world.problem.y, "sigma_y": 0.1} | change
    with pytest.raises(ValueError, match=message):
        prepare(given["y"], world.operator, world.prior, given["sigma_y"])


def test_prepare_refuses_a_prior_that_does_not_fit(world: Any) -> None:
    class Tesla(type(world.operator)):  # type: ignore[misc]
        unit = "T"

    prior = InHU(world.prior.mean, world.prior.variances)
    with pytest.raises(ValueError, match="in HU, the operator acts on T"):
        prepare(world.problem.y, Tesla(world.operator.matrix, world.operator.shape), prior, 0.1)
    two = GaussianPrior(torch.zeros(2, 3, 7), torch.ones(42))
    with pytest.raises(ValueError, match="1 channels; the prior has 2"):
        prepare(world.problem.y, world.operator, two, 0.1)

    class Complex:
        domain = Space((1, 1, 2, 3), torch.complex64)
        range = Space((1, 4), torch.float32)

    with pytest.raises(ValueError, match="RealChannels or KnownPhase"):
        prepare(torch.zeros(1, 4), Complex(), world.prior, 0.1)  # type: ignore[arg-type]


def test_record_says_what_was_run(world: Any) -> None:
    result = reconstruct(world.problem.y, world.operator, world.prior, CGLS(steps=42), sigma_y=0.05, seed=0)
    assert result.record["sampler"] == {"kind": "CGLS", "steps": 42}
    # 20 measurements fitted exactly: chi^2 per measurement is zero, not one
    assert max(result.record["chi2"]) < 1e-4


def test_progress_wraps_the_states_and_chunk_does_not_matter(world: Any) -> None:
    seen: list[int] = []

    def progress(states: Any) -> Any:
        for state in states:
            seen.append(state.i)
            yield state

    sampler = REDDiff(steps=3)
    whole = reconstruct(world.problem.y, world.operator, world.prior, sampler, progress=progress).x
    assert seen == [0, 1, 2, 3]
    assert torch.equal(whole, reconstruct(world.problem.y, world.operator, world.prior, sampler, chunk=2).x)


def test_checkpoint_resumes_bit_equal_and_another_run_is_refused(world: Any, tmp_path: Path) -> None:
    sampler, path = DDS(steps=9, sigma_max=3.0), tmp_path / "run.checkpoint"
    key = fingerprint(repr(sampler), world.problem.y, 0)
    *_, whole = iterate(sampler, world.problem)
    interrupted = checkpointed(iterate(sampler, world.problem), path, key, every=4)
    for state in interrupted:
        if state.i == 6:
            break
    interrupted.close()  # type: ignore[attr-defined]
    state = load_state(path, DDSState, key)
    assert state.i == 6
    *_, end = iterate(sampler, world.problem, state)
    assert torch.equal(end.x, whole.x)
    with pytest.raises(ValueError, match="another run"):
        load_state(path, DDSState, fingerprint(repr(DDS(steps=10)), world.problem.y, 0))
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"not what torch.save writes"):
        load_state(path, DDSState, key)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.checkpoint", "run.checkpoint.previous"]


def test_fingerprint_sees_every_value() -> None:
    a = torch.arange(4.0)
    keys = {
        fingerprint(a),
        fingerprint(a + 1e-6),
        fingerprint(a.double()),
        fingerprint(a.view(2, 2)),
        fingerprint(a, 0),
    }
    assert len(keys) == 5
    assert fingerprint(a, "x") == fingerprint(a.clone(), "x")


def test_config_names_the_right_keys() -> None:
    assert build(DDS, {"steps": 7, "eta": 1}, "dds") == DDS(steps=7, eta=1)
    with pytest.raises(ValueError, match=r"dds has no field 'step'; its fields are: steps, eta"):
        build(DDS, {"step": 7}, "dds")
    with pytest.raises(ValueError, match=r"dds.steps is 'many' \(str\); int is wanted"):
        build(DDS, {"steps": "many"}, "dds")
    with pytest.raises(ValueError, match="no sampler 'ddss'; there are: cgls, copaint, daps, ddim, ddnm, ddpm, dds"):
        find("samplers", "ddss")
    assert parse_override("sampler.rho=2.5") == ("sampler", "rho", 2.5)
    assert parse_override("sampler.order=random") == ("sampler", "order", "random")
    assert with_overrides({"run": {"seed": 1}}, ["run.seed=0"]) == {"run": {"seed": 0}}
    with pytest.raises(ValueError, match="'rho=2' is not an override"):
        parse_override("rho=2")


def test_metrics_are_the_published_ones() -> None:
    from skimage.metrics import normalized_root_mse, peak_signal_noise_ratio

    g = torch.Generator().manual_seed(0)
    truth = 50 + 900 * torch.rand(8, 1, 9, 11, generator=g) - 500
    image = truth + 30 * torch.randn(truth.shape, generator=g) + 4
    got = compare(image, truth, "HU")
    a, b = image.numpy().astype(float), truth.numpy().astype(float)
    assert got.psnr == pytest.approx(peak_signal_noise_ratio(b, a, data_range=2000), abs=1e-6)
    assert got.rmse == pytest.approx(np.sqrt(np.mean((a - b) ** 2)), rel=1e-6)
    assert got.bias == pytest.approx(np.mean(a - b), rel=1e-6)
    assert nmse(a, b) == pytest.approx(normalized_root_mse(b, a) ** 2, rel=1e-6)
    assert got.data_range == 2000 and got.ssim_planes["axial"] == pytest.approx(got.ssim)
    assert compare(truth, truth, "HU").psnr == psnr(b, b, 1.0) == float("inf")
    padded = truth.clone()
    padded[0, 0, 0] = -3024.0
    air = truth.clone()
    air[0, 0, 0] = -1000.0
    assert compare(image, padded, "HU").rmse == pytest.approx(compare(image, air, "HU").rmse)
    with pytest.raises(ValueError, match="the truth is empty"):
        compare(image, torch.full_like(image, -1000.0), "HU")
    with pytest.raises(ValueError, match="the shapes are"):
        compare(image[:2], truth, "HU")
