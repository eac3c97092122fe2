"""Prior-free MR baselines, each against its fixed point or another implementation; the wavelet under one of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from invdiff.noise import KeyedNoise
from invdiff.operators import CartesianMRI, Diagonal, KnownPhase, ParallelBeam, RealChannels, Whitened
from invdiff.operators.mri.simulate import birdcage_maps, simulate_kspace, smooth_phase
from invdiff.priors import NoPrior
from invdiff.problem import prepare
from invdiff.protocols import Problem
from invdiff.reconstruction import reconstruct
from invdiff.run import iterate, last
from invdiff.samplers import FBP, SENSE, TV, L1Wavelet, ZeroFilled
from invdiff.units import MU_WATER
from invdiff.wavelets import DB4, analysis, padding, synthesis


def noise(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return KeyedNoise(seed)(0, torch.empty(shape, dtype=dtype))


@pytest.mark.parametrize(("shape", "levels"), [((24, 40), 3), ((2, 4), 1), ((8, 24), 2)])
def test_the_wavelet_is_orthonormal(shape: tuple[int, int], levels: int) -> None:
    x, y = noise((2, 3, *shape)), noise((2, 3, *shape), 1)
    parts, others = analysis(x, levels), analysis(y, levels)
    torch.testing.assert_close(synthesis(parts), x, atol=1e-12, rtol=0)
    inside = sum((a * b).sum() for a, b in zip(parts, others, strict=True))
    assert float(inside) == pytest.approx(float((x * y).sum()), abs=1e-10)
    torch.testing.assert_close(sum(p.numel() for p in parts), x.numel())


def test_the_wavelet_is_pywavelets_where_the_image_ends_before_the_edge() -> None:
    """At three levels, coefficient by coefficient: periodic and zero-padded transforms then are the same."""
    pywt = pytest.importorskip("pywt")
    np.testing.assert_allclose(DB4, pywt.Wavelet("db4").rec_lo, atol=1e-12)
    x = torch.zeros(192, 256, dtype=torch.float64)
    x[80:110, 110:150] = noise((30, 40))
    theirs = pywt.wavedec2(x.numpy(), "db4", mode="zero", level=3)
    ours = analysis(x, 3)
    named = [[theirs[0]], *([right, down, both] for down, right, both in theirs[1:])]
    for mine, parts in zip(ours, named, strict=True):
        for a, b in zip(mine if len(parts) == 3 else [mine], parts, strict=True):
            sizes = [np.sort(np.abs(np.asarray(v)).ravel())[-400:] for v in (a, b)]
            np.testing.assert_allclose(*sizes, atol=1e-10)


def test_a_wavelet_kills_polynomials_and_says_what_sizes_it_takes() -> None:
    """Four vanishing moments: details of a cubic are zero but where the edges meet."""
    t = torch.linspace(-1, 1, 64, dtype=torch.float64)
    details = analysis((t**3 - t**2 + 2)[:, None] * (t**3 + 1), 1)[1]
    assert float(details[:, 4:28, 4:28].abs().max()) < 1e-10
    assert float(analysis((t**4)[:, None] * t, 1)[1][:, 4:28, 4:28].abs().max()) > 1e-8
    with pytest.raises(ValueError, match="images of 12 x 18 pixels have no 2 levels; multiples of 4"):
        analysis(torch.zeros(12, 18), 2)
    assert padding((12, 18), 2) == (0, 2)


def body(shape: tuple[int, int] = (43, 50)) -> Tensor:
    """Piecewise constant (1 1 h w) in [0, 1], background 0."""
    h, w = shape
    y, x = torch.meshgrid((torch.arange(h) - h / 2) / h, (torch.arange(w) - w / 2) / w, indexing="ij")
    image = torch.where(x.square() + y.square() < 0.15, 0.6, 0.0)
    image[(x - 0.1).abs() + (y + 0.1).abs() < 0.12] = 1.0
    return image[None, None]


def lines(shape: tuple[int, int], step: int = 3, centre: int = 8) -> Tensor:
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[:, ::step] = True
    mask[:, shape[1] // 2 - centre // 2 : shape[1] // 2 + centre // 2] = True
    return mask


def scanned(image: Tensor, sigma: float = 0.02, coils: int = 4, slices: int = 1) -> tuple[CartesianMRI, Tensor, Tensor]:
    shape = (image.shape[-2], image.shape[-1])
    operator = CartesianMRI(lines(shape), birdcage_maps(coils, shape), slices=slices)
    phase = smooth_phase(shape)
    return operator, simulate_kspace(image, operator, phase, sigma), phase


def end(sampler: Any, problem: Problem) -> Tensor:
    x: Tensor = last(iterate(sampler, problem)).x
    return x


def test_zero_filling_is_the_adjoint_in_the_scanners_unit() -> None:
    """Also through whitening, scaling and the normalisation of the problem."""
    operator, y, phase = scanned(body())
    wanted = operator.adjoint(y)
    torch.testing.assert_close(operator.zero_filled(y), wanted)
    torch.testing.assert_close((3 * operator).zero_filled(3 * y), wanted)
    weights = torch.full((1, 4, 1, 1), 0.2)
    torch.testing.assert_close(Whitened(operator, weights).zero_filled(0.2 * y), wanted)
    turned = operator @ KnownPhase(phase)
    real = turned.adjoint(y)
    for scale in (1.0, 7e-6):
        x = reconstruct(scale * y, turned, NoPrior("a.u.", -scale, scale), ZeroFilled()).x
        torch.testing.assert_close(x / scale, real, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="ZeroFilled needs a linear operator"):
        ZeroFilled().init(Problem(Nonlinear(), y, 0.0, NoPrior(), KeyedNoise()))


class Nonlinear:
    domain = None


def test_sense_is_tikhonovs_solution_and_inverts_what_the_coils_see() -> None:
    operator, y, phase = scanned(body(), sigma=0.01)
    turned = operator @ KnownPhase(phase)
    prepared = prepare(y, turned, NoPrior("a.u.", -0.5, 0.5), 0.01)
    sampler = SENSE(steps=200, deviation=0.3, sigma_floor=0.0)
    lam = (prepared.problem.sigma_y / 0.3) ** 2
    A = prepared.problem.operator
    wanted = A.solve(A.adjoint(prepared.problem.y), lam)
    torch.testing.assert_close(end(sampler, prepared.problem), wanted, atol=1e-4, rtol=0)
    other = A.solve(A.adjoint(prepared.problem.y), 100 * lam)
    assert float((other - wanted).abs().max()) > 0.05
    x = prepared.to_physical(end(SENSE(), prepared.problem))
    zero = prepared.to_physical(end(ZeroFilled(), prepared.problem))
    assert float((x - body()).square().mean()) < 0.2 * float((zero - body()).square().mean())


def test_l1_wavelet_is_sigpys() -> None:
    """The same objective to 1 %, also where sigpy's own W measures both images."""
    mri = pytest.importorskip("sigpy.mri")
    import sigpy

    lam, shape = 0.02, (96, 128)
    operator, y, _ = scanned(body(shape), sigma=0.02)
    app = mri.app.L1WaveletRecon(
        y[0].numpy(), birdcage_maps(4, shape).numpy(), lam, weights=lines(shape)[None].float().numpy(), max_iter=80,
        show_pbar=False,
    )  # fmt: skip
    theirs = torch.as_tensor(app.run())
    two = operator @ RealChannels(operator.domain.shape)
    problem = Problem(two, y, 0.0, NoPrior("a.u.", -1, 1, channels=2), KeyedNoise())
    sampler = L1Wavelet(steps=80, lam=lam, noise_weight=0.0, levels=3, spin=False, coarse=True)
    ours = end(sampler, problem)
    W = sigpy.linop.Wavelet(shape, wave_name="db4")

    def objective(x: Tensor) -> float:
        misfit = float((operator.forward(x[None, None]) - y).abs().square().sum()) / 2
        return misfit + lam * float(np.abs(W(x.numpy())).sum())

    complex_ours = torch.complex(ours[0, 0], ours[0, 1])
    zero = objective(torch.zeros_like(theirs))
    assert objective(complex_ours) == pytest.approx(objective(theirs), rel=0.01)
    own = [float(sampler.objective(problem, torch.stack([v.real, v.imag])[None])) for v in (complex_ours, theirs)]
    assert own[0] == pytest.approx(own[1], rel=0.01) and own[0] <= own[1] * (1 + 1e-4)
    assert objective(theirs) < 0.5 * zero  # there was something to minimise


@pytest.mark.parametrize("spin", [True, False])
def test_l1_wavelet_removes_aliasing_in_odd_sizes(spin: bool) -> None:
    operator, y, phase = scanned(body(), sigma=0.02)
    turned = operator @ KnownPhase(phase)
    prepared = prepare(y, turned, NoPrior("a.u.", -0.5, 0.5), 0.02)
    errors = [
        float((prepared.to_physical(end(s, prepared.problem)) - body()).square().mean())
        for s in (L1Wavelet(levels=3, spin=spin), SENSE(), ZeroFilled())
    ]
    assert errors[0] < 0.7 * errors[1] and errors[1] < errors[2]


@pytest.mark.parametrize("sampler", [L1Wavelet(steps=30, levels=2), TV(steps=15, lam=0.01, lam_z=0.01)])
def test_channels_are_shrunk_by_their_common_magnitude(sampler: Any) -> None:
    """A global phase turns the result of a complex image, and does nothing else."""
    x = torch.cat([body(), 0.5 * body().flip(-1)]) + 0.1 * noise((2, 1, 43, 50), dtype=torch.float32)
    z = torch.complex(x, 0.4 * x.flip(-2))
    operator = Diagonal(torch.ones(1, 1, 1, 1), z.shape, z.dtype) @ RealChannels(z.shape)

    def run(y: Tensor) -> Tensor:
        out = end(sampler, Problem(operator, y, 0.05, NoPrior("a.u.", -1, 1, channels=2), KeyedNoise()))
        return torch.complex(out[:, :1], out[:, 1:])

    turn = torch.polar(torch.tensor(1.0), torch.tensor(0.7))
    torch.testing.assert_close(run(turn * z), turn * run(z), atol=1e-4, rtol=0)
    single = end(
        sampler,
        Problem(Diagonal(torch.ones(1, 1, 1, 1), x.shape, x.dtype), x, 0.05, NoPrior("a.u.", -1, 1), KeyedNoise()),
    )
    real = run(torch.complex(x, torch.zeros_like(x)))
    torch.testing.assert_close(real.real, single, atol=1e-5, rtol=0)
    assert float(real.imag.abs().max()) < 1e-6


def test_what_is_not_measured_is_air_or_no_signal_for_fbp_and_zero_filling() -> None:
    """Whatever the prior's range: limited-angle FBP is the filter's of the line integrals themselves."""
    arc = ParallelBeam((1, 1, 24, 20), torch.linspace(0, 1.2, 9), pixel_mm=1.0)
    mu = torch.zeros(1, 1, 24, 20)
    mu[..., 8:15, 6:14] = MU_WATER
    y = arc(mu)
    x = reconstruct(y, arc, NoPrior("HU", -1000.0, 2000.0), FBP()).x
    torch.testing.assert_close((x / 1000 + 1) * MU_WATER, arc.pinv(y), atol=1e-6, rtol=0)
    scan, y, phase = scanned(body())
    turned = scan @ KnownPhase(phase)
    x = reconstruct(y, turned, NoPrior("a.u.", 0.0, 3.0), ZeroFilled()).x
    torch.testing.assert_close(x, turned.adjoint(y), atol=1e-5, rtol=0)
