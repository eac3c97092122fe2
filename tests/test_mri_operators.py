"""MRI operators against exact sums, sigpy and finufft; masks, trajectories, density, off-resonance."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from invdiff import config
from invdiff.datasets import Measurements, read_measurements, write_measurements
from invdiff.noise import KeyedNoise
from invdiff.operators import (
    CartesianMRI,
    CartesianMRI3D,
    KnownPhase,
    LinearOperatorBase,
    NonCartesianMRI,
    OffResonance,
    RealChannels,
)
from invdiff.operators.mri.cartesian import centred_fft, centred_ifft
from invdiff.operators.mri.density import density_compensation
from invdiff.operators.mri.masks import (
    acceleration,
    equispaced_mask,
    partial_fourier_mask,
    poisson_mask,
    radial_mask,
    random_mask,
    spiral_mask,
    uniform_mask,
)
from invdiff.operators.mri.nufft import fast_size, kernel
from invdiff.operators.mri.trajectories import radial, spiral
from invdiff.priors import GaussianPrior
from invdiff.protocols import Problem
from invdiff.run import iterate, last
from invdiff.samplers import CGLS, SENSE

S, COILS, H, W, SAMPLES = 3, 5, 20, 13, 77
DOUBLE = torch.complex128


def rand(*shape: int, seed: int = 1, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def on(*shape: int, seed: int = 3) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.6


def scattered(*shape: int, seed: int = 4) -> Tensor:
    return torch.rand((*shape, 2), generator=torch.Generator().manual_seed(seed)).double() - 0.5


def relative(a: Tensor, b: Tensor) -> float:
    return float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b))


def waves(k: Tensor, n: int) -> Tensor:
    """exp(-2 pi i k r) / sqrt(n) for r = -(n // 2) ...: (samples n)."""
    r = torch.arange(n, dtype=torch.float64) - n // 2
    return torch.exp(-2j * math.pi * torch.outer(k, r)) / math.sqrt(n)


def exact(x: Tensor, k: Tensor) -> Tensor:
    """The sum itself: (... h w) and (samples 2) -> (... samples)."""
    h, w = x.shape[-2:]
    return torch.einsum("mh,...hw,mw->...m", waves(k[:, 0], h), x, waves(k[:, 1], w))


def grid_points(h: int, w: int) -> Tensor:
    k = [(torch.arange(n, dtype=torch.float64) - n // 2) / n for n in (h, w)]
    return torch.stack(torch.meshgrid(*k, indexing="ij"), -1).flatten(0, 1)


def bump(h: int, w: int) -> Tensor:
    """A smooth image that is zero at the edges: (1 1 h w)."""
    y, x = torch.linspace(-1, 1, h).double()[:, None], torch.linspace(-1, 1, w).double()
    disc = torch.sigmoid(14 * (0.65 - torch.hypot(y, x + 0.1))) + 0.5 * torch.exp(-(((y - 0.2) ** 2 + x**2) * 30))
    return disc[None, None]


def test_frames_have_masks_of_their_own_and_share_maps() -> None:
    mask, maps, x = on(S, H, W), rand(COILS, H, W), rand(S, 1, H, W)
    whole = CartesianMRI(mask, maps, dtype=DOUBLE)
    for k in range(S):
        alone = CartesianMRI(mask[k], maps, dtype=DOUBLE)
        assert relative(whole(x)[k : k + 1], alone(x[k : k + 1])) < 1e-14
        assert relative(whole.normal(x)[k : k + 1], alone.normal(x[k : k + 1])) < 1e-14
    spokes, x = scattered(S, SAMPLES), rand(S, 1, H, W)
    moving = NonCartesianMRI(spokes, (H, W), maps, dtype=DOUBLE)
    for k in range(S):
        alone = NonCartesianMRI(spokes[k], (H, W), maps, dtype=DOUBLE)
        assert relative(moving(x)[k : k + 1], alone(x[k : k + 1])) < 1e-14


@pytest.mark.parametrize("at_once", [1, 2, COILS])
def test_coils_at_once_change_nothing(at_once: int) -> None:
    def three(n: int | None) -> list[LinearOperatorBase]:
        maps, volume = rand(COILS, H, W), rand(COILS, S, H, W)
        return [
            CartesianMRI(on(S, H, W), maps, dtype=DOUBLE, coils_at_once=n),
            CartesianMRI3D(on(S, H, W), volume, DOUBLE, coils_at_once=n),
            NonCartesianMRI(scattered(SAMPLES), (H, W), maps, S, DOUBLE, toeplitz=True, coils_at_once=n),
        ]

    for a, b in zip(three(at_once), three(None), strict=True):
        x, y = rand(*a.domain.shape), rand(*a.range.shape, seed=2)
        for f, v in (("forward", x), ("adjoint", y), ("normal", x)):
            assert relative(getattr(a, f)(v), getattr(b, f)(v)) < 1e-13


@pytest.mark.parametrize("mask", [on(W).expand(H, W), on(H)[:, None].expand(H, W), torch.ones(H, W), on(H, W)])
def test_normal_without_shifts_for_every_kind_of_mask(mask: Tensor) -> None:
    a = CartesianMRI(mask, rand(COILS, H, W), S, DOUBLE)
    x = rand(S, 1, H, W)
    assert relative(a.normal(x), a.adjoint(a(x))) < 1e-13


def test_normal_of_many_slices_goes_in_tiles() -> None:
    n = 160  # a coil image of 400 KiB: tiles of 2 coils and of 1 slice
    a = CartesianMRI(on(S, n, n - 3), rand(COILS, n, n - 3), dtype=DOUBLE)
    x = rand(S, 1, n, n - 3)
    assert relative(a.normal(x), a.adjoint(a(x))) < 1e-13


def test_three_dimensions_against_the_sum() -> None:
    x = rand(S, 1, H, W)
    k = [(torch.arange(n, dtype=torch.float64) - n // 2) / n for n in (S, H, W)]
    full = CartesianMRI3D(torch.ones(S, H, W), dtype=DOUBLE)
    wanted = torch.einsum("ps,kh,lw,schw->pckl", waves(k[0], S), waves(k[1], H), waves(k[2], W), x)
    assert relative(full(x), wanted) < 1e-13
    maps, mask = rand(COILS, S, H, W), on(S, H, W)
    many = CartesianMRI3D(mask, maps, DOUBLE)(x)
    for c in range(COILS):
        assert relative(many[:, c : c + 1], mask[:, None] * full(maps[c][:, None] * x)) < 1e-13


def test_conjugate_gradients_on_coupled_slices_reach_the_solution() -> None:
    a = CartesianMRI3D(on(S, 6, 5), rand(COILS, S, 6, 5)) @ RealChannels((S, 1, 6, 5))
    assert a.coupled
    x = rand(*a.domain.shape, dtype=torch.float32) * torch.tensor([1.0, 30.0, 5.0]).view(S, 1, 1, 1)
    prior = GaussianPrior.smooth((2, 6, 5), length=1.5, deviation=0.4)
    problem = Problem(a, a(x), 0.0, prior, KeyedNoise(0))
    sampler = CGLS(steps=60)
    state = sampler.init(problem)
    for _ in range(sampler.steps):
        state = sampler.step(problem, state)
    assert relative(state.x, x) < 1e-3
    sense = SENSE(steps=60, sigma_floor=0.1, deviation=0.5)
    wanted = a.solve(a.adjoint(problem.y), (0.1 / 0.5) ** 2)
    assert relative(last(iterate(sense, problem)).x, wanted) < 1e-4
    assert relative(a.solve(a.normal(x) + 0.1 * x, 0.1), x) < 1e-4


@pytest.mark.parametrize("engine", ["own", "finufft"])
@pytest.mark.parametrize("accuracy", [1e-2, 1e-4, 1e-6, 1e-12])
def test_transform_is_as_accurate_as_asked(engine: str, accuracy: float) -> None:
    if engine == "finufft":
        pytest.importorskip("finufft")
    for size in ((H, W), (9, 32), (2, 3)):
        x, k = rand(2, 1, *size), scattered(SAMPLES)
        k[0], k[1] = torch.tensor([-0.5, 0.5]), 0.0
        a = NonCartesianMRI(k, size, slices=2, dtype=DOUBLE, accuracy=accuracy, engine=engine)
        assert relative(a(x), exact(x, k)) < 1.5 * accuracy
    if accuracy >= 1e-6:
        single = NonCartesianMRI(k, size, slices=2, accuracy=accuracy)
        assert relative(single(x.to(torch.complex64)), exact(x, k).to(torch.complex64)) < 2.5 * accuracy


def test_on_the_grid_it_is_the_centred_fft() -> None:
    x, maps = rand(2, 1, H, W), rand(COILS, H, W)
    a = NonCartesianMRI(grid_points(H, W), (H, W), maps, 2, DOUBLE, 1e-13)
    b = CartesianMRI(torch.ones(H, W), maps, 2, DOUBLE)
    assert relative(a(x), b(x).flatten(2)) < 1e-12
    assert relative(a.adjoint(b(x).flatten(2)), b.normal(x)) < 1e-12


@pytest.mark.parametrize("accuracy", [1e-3, 1e-6])
def test_the_spread_function_is_the_normal_operator(accuracy: float) -> None:
    x, maps, k = rand(S, 1, H, W), rand(COILS, H, W), scattered(SAMPLES)
    quick, plain = (NonCartesianMRI(k, (H, W), maps, S, DOUBLE, accuracy, toeplitz=t) for t in (True, False))
    assert relative(quick.normal(x), plain.normal(x)) < 3 * accuracy
    w = [waves(k[:, a], n) for a, n in enumerate((H, W))]
    dense = torch.einsum("mh,mw->mhw", *w).flatten(1)
    wanted = (maps.conj() * ((maps * x).flatten(2) @ (dense.mH @ dense).T).view(S, COILS, H, W)).sum(1, keepdim=True)
    assert relative(quick.normal(x), wanted) < 3 * accuracy


@pytest.mark.filterwarnings("default")
def test_agrees_with_sigpy() -> None:
    sigpy = pytest.importorskip("sigpy")
    from sigpy.mri.linop import Sense

    x, maps = rand(1, 1, H, W, dtype=torch.complex64), rand(COILS, H, W, dtype=torch.complex64)
    mask, k = on(H, W), scattered(SAMPLES)
    theirs = Sense(maps.numpy(), weights=mask.numpy().astype(np.float32))
    ours = CartesianMRI(mask, maps)
    y = rand(*ours.range.shape, dtype=torch.complex64, seed=2)
    assert relative(torch.from_numpy(theirs(x[0, 0].numpy())), ours(x)[0]) < 1e-4
    assert relative(torch.from_numpy(theirs.H(mask.numpy() * y[0].numpy())), ours.adjoint(y)[0, 0]) < 1e-4
    at = (k * torch.tensor([H, W])).numpy()  # sigpy: cycles per field of view
    off = NonCartesianMRI(k, (H, W), maps, accuracy=1e-5)
    samples = rand(*off.range.shape, dtype=torch.complex64, seed=2)
    transform = sigpy.linop.NUFFT((COILS, H, W), at, oversamp=2, width=6)
    assert relative(torch.from_numpy(transform((maps * x[0]).numpy())), off(x)[0]) < 1e-4
    back = (maps.conj() * torch.from_numpy(transform.H(samples[0].numpy()))).sum(0)
    assert relative(back, off.adjoint(samples)[0, 0]) < 1e-4


def test_own_and_finufft_agree() -> None:
    pytest.importorskip("finufft")
    x, maps, k = (
        rand(S, 1, H, W, dtype=torch.complex64),
        rand(COILS, H, W, dtype=torch.complex64),
        scattered(S, SAMPLES),
    )
    own, theirs = (NonCartesianMRI(k, (H, W), maps, accuracy=2e-5, engine=e) for e in ("own", "finufft"))
    y = own(x)
    assert relative(theirs(x), y) < 1e-4
    assert relative(theirs.adjoint(y), own.adjoint(y)) < 1e-4
    v = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(theirs(v).abs().square().sum() / 2, v)
    assert relative(g, theirs.adjoint(theirs(x))) < 1e-6


def test_kernel_and_sizes() -> None:
    assert kernel(1e-4) == (1.25, 7)
    assert kernel(1e-13)[0] == 2.0
    assert [fast_size(n) for n in (7, 13, 22, 320, 331)] == [8, 14, 24, 320, 336]


def test_density_is_one_on_the_grid_and_a_ramp_on_spokes() -> None:
    w = density_compensation(grid_points(H, W), (H, W))
    assert float((w - 1).abs().max()) < 0.06
    spokes, samples, n = 101, 128, 64  # at the edge spokes are as far apart as the grid's points
    w = density_compensation(radial(spokes, samples, golden=False), (n, n)).view(spokes, samples)
    radius = (torch.arange(samples) - samples // 2).abs() / samples
    ramp = math.pi * radius / spokes * n**2 / samples  # area of a half ring's share in cells
    inside = (radius > 0.05) & (radius < 0.45)
    assert float((w.mean(0) / ramp - 1)[inside].abs().max()) < 0.05


@pytest.mark.parametrize("coils", [None, 4])
def test_gridding_gives_the_image_back_in_scale(coils: int | None) -> None:
    n, x = 48, bump(48, 40).to(DOUBLE)
    maps = (
        None if coils is None else 1 + 0.3 * torch.fft.ifft2(torch.nn.functional.pad(rand(coils, 3, 3), (0, 37, 0, 45)))
    )
    a = NonCartesianMRI(radial(90, 2 * n), (n, 40), maps, dtype=DOUBLE)
    assert relative(a.pinv(a(x)), x) < 0.05
    assert relative(a.adjoint(a(x)), x) > 1
    curve = spiral(12, 1500, 4)
    b = NonCartesianMRI(curve, (n, 40), maps, dtype=DOUBLE)
    assert relative(b.pinv(b(x)), x) < 0.08


def test_trajectories() -> None:
    k = radial(5, 12).view(5, 12, 2)
    assert float(k.abs().max()) <= 0.5
    assert float(k[:, 6].abs().max()) == 0
    angles = torch.atan2(k[:, -1, 0], k[:, -1, 1]).rad2deg() % 180
    assert torch.allclose(angles, torch.arange(5).double() * 111.246 % 180, atol=0.01)
    assert torch.equal(radial(3, 12, first=2).view(3, 12, 2), k[2:])
    even = radial(6, 7, golden=False).view(6, 7, 2)
    assert torch.allclose(torch.atan2(even[:, -1, 0], even[:, -1, 1]), torch.arange(6).double() * math.pi / 6)
    turns = spiral(3, 400, 2.5).view(3, 400, 2)
    radius = turns.norm(dim=-1)
    assert float(radius.max()) < 0.5
    assert torch.allclose(radius, 0.5 * torch.arange(400).double().expand(3, -1) / 400)
    angle = torch.atan2(turns[0, :, 0], turns[0, :, 1])
    assert float(angle.diff().remainder(2 * math.pi)[1:].sum()) == pytest.approx(2 * math.pi * 2.5 * 398 / 400)


def test_off_resonance_is_the_exact_sum() -> None:
    field = 60 * bump(H, W)[0, 0] - 20  # Hz
    x, maps = rand(S, 1, H, W), rand(COILS, H, W)
    k, t = scattered(SAMPLES), torch.linspace(-0.002, 0.02, SAMPLES).double()
    precession = torch.exp(-2j * math.pi * t[:, None, None] * field)
    dense = torch.einsum("mh,mw->mhw", waves(k[:, 0], H), waves(k[:, 1], W)) * precession
    wanted = torch.einsum("mhw,schw->scm", dense, maps * x)
    for tolerance in (1e-2, 1e-5):
        a = OffResonance(NonCartesianMRI(k, (H, W), maps, S, DOUBLE, 1e-9), field, t, tolerance=tolerance)
        assert relative(a(x), wanted) < tolerance
    assert a.terms > OffResonance(a.operator, field, t, tolerance=1e-1).terms
    assert relative(a.operator(x), wanted) > 0.3
    mask = on(H, W)
    t = torch.linspace(0, 0.015, H).double()  # rows read one after the other
    rows, columns = (waves((torch.arange(n).double() - n // 2) / n, n) for n in (H, W))
    dense = torch.einsum("kh,lw,khw->klhw", rows, columns, torch.exp(-2j * math.pi * t[:, None, None] * field))
    wanted = mask * torch.einsum("klhw,schw->sckl", dense, maps * x)
    b = OffResonance(CartesianMRI(mask, maps, S, DOUBLE), field.expand(S, H, W), t[:, None], tolerance=1e-6)
    assert relative(b(x), wanted) < 1e-6


def test_split_keeps_lines_and_readouts() -> None:
    maps, x, mask = rand(COILS, H, W), rand(S, 1, H, W), on(S, H, W)
    mask[:, :, 3] = False
    columns = CartesianMRI(mask, maps, dtype=DOUBLE)
    rows = CartesianMRI(mask, maps, dtype=DOUBLE, readout="w")
    assert columns.views == tuple(j for j in range(W) if j != 3)
    assert rows.views == tuple(range(H))
    volume = CartesianMRI3D(mask, dtype=DOUBLE)
    spokes = NonCartesianMRI(radial(6, 14), (H, W), maps, S, DOUBLE, samples_per_readout=14)
    assert spokes.views == tuple(range(6))
    bent = OffResonance(spokes, 30 * bump(H, W)[0, 0], torch.linspace(0, 0.01, 14).double().repeat(6), tolerance=1e-6)
    for a in (columns, rows, 2 * volume, spokes, bent):
        index = [5, 0, 4]
        assert relative(a.split(index)(x), a.part(a(x), index)) < 1e-5
        parts = [a.split([v]).normal(x) for v in a.views]
        assert relative(torch.stack(parts).sum(0), a.normal(x)) < 1e-5
    assert float(columns.split([5])(x)[..., 4].abs().max()) == 0
    assert spokes.split([4, 1]).range.shape == (S, COILS, 28)
    with pytest.raises(ValueError, match="keeps nothing"):
        columns.split([3])
    for wrong in ([], [-1], [W]):
        with pytest.raises(ValueError, match="at least one, from 0 up"):
            columns.split(wrong)
    with pytest.raises(ValueError, match=r"readouts \[6\] of 6"):
        spokes.split([6])


@pytest.mark.parametrize("kind", ["cartesian-mri", "cartesian-mri-3d", "non-cartesian-mri"])
def test_fields_go_through_the_measurement_file(kind: str, tmp_path: Path) -> None:
    maps = rand(COILS, H, W, dtype=torch.complex64)
    a: LinearOperatorBase = {
        "cartesian-mri": lambda: CartesianMRI(on(S, H, W), maps, readout="w", coils_at_once=2),
        "cartesian-mri-3d": lambda: CartesianMRI3D(on(S, H, W), readout="s"),
        "non-cartesian-mri": lambda: NonCartesianMRI(scattered(S, 78), (H, W), maps, samples_per_readout=6),
    }[kind]()
    x = rand(S, 1, H, W, dtype=torch.complex64)
    write_measurements(tmp_path / "k.h5", [Measurements(a(x), a.kind, a.fields(), np.eye(4), "a.u.", sigma_y=0.1)])
    (scan,) = read_measurements(tmp_path / "k.h5")
    again = config.find("operators", scan.kind)(**scan.fields)
    assert torch.equal(again(x), scan.y)
    assert again.views == a.views


def test_partial_fourier_with_a_known_phase_beats_zero_filling() -> None:
    h, w = 64, 50
    y, x = torch.linspace(-1, 1, h).double()[:, None], torch.linspace(-1, 1, w).double()
    truth = bump(h, w) * (1 + 0.4 * torch.sign(torch.sin(9 * x + 3 * y)))
    phase = 1.5 * y + 0.8 * x * y - x**2
    full = centred_fft(torch.polar(truth, phase.expand_as(truth)))
    mask = partial_fourier_mask((h, w), 5 / 8)
    k = mask * full
    half = int(mask[0].sum()) - w // 2  # lines on both sides of the middle
    window = torch.zeros(w).double()
    window[w // 2 - half + 1 : w // 2 + half] = torch.hann_window(2 * half + 1, periodic=False).double()[1:-1]
    low = centred_ifft(window * k)
    a = CartesianMRI(mask, dtype=DOUBLE)
    zero_filled = a.pinv(k).abs()
    real = a @ KnownPhase(low.angle()[:, 0], dtype=DOUBLE)
    constrained = real.solve(real.adjoint(k), 1e-3)
    assert relative(constrained, truth) < 0.1 * relative(zero_filled, truth)


LINES: dict[str, Callable[..., Tensor]] = {"random": random_mask, "equispaced": equispaced_mask}
POINTS: dict[str, Callable[..., Tensor]] = {"poisson": poisson_mask, "radial": radial_mask, "spiral": spiral_mask}


@pytest.mark.parametrize("name", [*LINES, *POINTS])
@pytest.mark.parametrize("factor", [2, 4, 7.5])
def test_masks_reach_their_acceleration_and_obey_their_seed(name: str, factor: float) -> None:
    shape, make = (96, 131), {**LINES, **POINTS}[name]
    for seed in (0, 1, 2):
        mask = make(shape, factor, seed=seed)
        assert mask.shape == shape
        assert mask.dtype == torch.bool
        assert abs(acceleration(mask) / factor - 1) < 0.05
        assert torch.equal(mask, make(shape, factor, seed=seed))
        assert bool(mask[48, 65])
    assert not torch.equal(mask, make(shape, factor, seed=3)) or name == "equispaced"


@pytest.mark.parametrize("name", LINES)
def test_line_masks_keep_whole_lines_and_the_centre(name: str) -> None:
    for readout, axis in (("h", 0), ("w", 1)):
        mask = LINES[name]((90, 120), 4, 0.1, seed=5, readout=readout)
        assert torch.equal(mask, mask.narrow(axis, 0, 1).expand_as(mask))
        lines = mask.select(axis, 0)
        n = len(lines)
        count = round(0.1 * n)
        assert bool(lines[(n - count + 1) // 2 :][:count].all())
        assert int(lines.sum()) == pytest.approx(n / 4, abs=1)


def test_equispaced_is_the_published_rule() -> None:
    n, factor, share = 368, 4, 0.08
    mask = equispaced_mask((4, n), factor, share, seed=2)[0]
    low = round(n * share)
    spacing = factor * (low - n) / (low * factor - n)  # adjusted so that the centre does not lower the acceleration
    found = {int(mask.nonzero()[0])}
    for offset in found:
        wanted = np.zeros(n, bool)
        wanted[np.around(np.arange(offset, n - 1, spacing)).astype(int)] = True
        wanted[(n - low + 1) // 2 :][:low] = True
        assert np.array_equal(mask.numpy(), wanted)
    offsets = {int(equispaced_mask((4, n), factor, share, seed=s)[0].nonzero()[0]) for s in range(30)}
    assert offsets == set(range(round(spacing)))


def test_uniform_is_a_lattice_through_the_middle() -> None:
    mask = uniform_mask((11, 40), 3)[0]
    assert mask.nonzero().flatten().tolist() == list(range(2, 40, 3))
    assert bool(mask[20])
    centred = uniform_mask((40, 11), 3, 0.2, readout="w")[:, 0]
    assert int(centred.sum()) == 13 + 5
    assert acceleration(uniform_mask((5, 12), 1)) == 1


def test_poisson_points_keep_their_distance() -> None:
    mask = poisson_mask((90, 120), 8, 0.05, seed=1)
    y, x = torch.meshgrid(torch.arange(90) - 45, torch.arange(120) - 60, indexing="ij")
    radius = torch.hypot(y / 45, x / 60)
    assert not bool(mask[radius > 1].any())
    far = (mask & (radius > 0.7)).nonzero().double()
    apart = torch.cdist(far, far).fill_diagonal_(1e9)
    assert float(apart.min()) > 2.5
    near, outer = mask[radius < 0.15].double().mean(), mask[(radius > 0.7) & (radius < 0.9)].double().mean()
    assert near > 5 * outer
    square = poisson_mask((90, 120), 8, 0.05, seed=1, elliptical=False)
    assert bool(square[radius > 1].any())


def test_partial_fourier_covers_one_half() -> None:
    mask = partial_fourier_mask((9, 20), 0.625)[0]
    assert mask.nonzero().flatten().tolist() == list(range(13))
    end = partial_fourier_mask((21, 9), 0.51, "w", from_end=True)[:, 0]
    assert end.nonzero().flatten().tolist() == list(range(10, 21))
    for n in (6, 7):  # the line of zero frequency is always there
        assert bool(partial_fourier_mask((n, n), 0.501, from_end=True)[0, n // 2])


@pytest.mark.parametrize(
    "bad",
    [
        lambda: random_mask((50, 60), 0.5),
        lambda: random_mask((50, 60), 8, 0.3),
        lambda: random_mask((50, 60), 1000, 0.0),
        lambda: equispaced_mask((50, 60), 8, 0.3),
        lambda: equispaced_mask((50, 60), math.nan),
        lambda: equispaced_mask((50, 60), 4, 1.0),
        lambda: random_mask((50, 60), 4, readout="x"),
        lambda: random_mask((50,), 4),
        lambda: uniform_mask((50, 60), 0),
        lambda: poisson_mask((50, 60), 1.05),
        lambda: poisson_mask((50, 60), 50, 0.4),
        lambda: radial_mask((50, 60), 500),
        lambda: spiral_mask((50, 60), 1.1),
        lambda: spiral_mask((50, 60), 4, interleaves=0),
        lambda: partial_fourier_mask((50, 60), 0.5),
        lambda: acceleration(torch.zeros(3, 4)),
        lambda: CartesianMRI(torch.zeros(H, W)),
        lambda: CartesianMRI(torch.stack([torch.ones(H, W), torch.zeros(H, W)])),
        lambda: CartesianMRI(torch.ones(H, W), readout="s"),
        lambda: CartesianMRI(torch.ones(H, W), rand(COILS, H, W), coils_at_once=0),
        lambda: CartesianMRI(torch.ones(H, W), math.inf * rand(COILS, H, W)),
        lambda: CartesianMRI3D(torch.ones(H, W)),
        lambda: CartesianMRI3D(torch.zeros(S, H, W)),
        lambda: CartesianMRI3D(torch.ones(S, H, W), rand(COILS, H, W)),
        lambda: NonCartesianMRI(scattered(SAMPLES) * 2, (H, W)),
        lambda: NonCartesianMRI(scattered(SAMPLES) * math.nan, (H, W)),
        lambda: NonCartesianMRI(torch.zeros(SAMPLES, 3), (H, W)),
        lambda: NonCartesianMRI(scattered(SAMPLES), (1, H, W)),
        lambda: NonCartesianMRI(scattered(SAMPLES), (H, W), rand(COILS, H, W + 1)),
        lambda: NonCartesianMRI(scattered(SAMPLES), (H, W), accuracy=1e-9),
        lambda: NonCartesianMRI(scattered(SAMPLES), (H, W), engine="fft"),
        lambda: NonCartesianMRI(scattered(SAMPLES), (H, W), samples_per_readout=5),
        lambda: NonCartesianMRI(scattered(S, SAMPLES), (H, W), slices=S + 1),
        lambda: NonCartesianMRI(scattered(SAMPLES), (H, W), dtype=torch.float32),
        lambda: OffResonance(CartesianMRI(torch.ones(H, W)), torch.zeros(H, W + 1), torch.zeros(H, 1)),
        lambda: OffResonance(CartesianMRI(torch.ones(H, W)), torch.zeros(H, W), torch.zeros(H)),
        lambda: OffResonance(CartesianMRI(torch.ones(H, W)), math.nan * torch.zeros(H, W), torch.zeros(H, 1)),
        lambda: OffResonance(CartesianMRI(torch.ones(H, W)), torch.zeros(H, W), torch.zeros(H, 1), segments=0),
        lambda: OffResonance(CartesianMRI(torch.ones(H, W)), rand(H, W).real * 100, torch.arange(H)[:, None]),
        lambda: radial(0, 10),
        lambda: spiral(2, 10, 0.0),
        lambda: density_compensation(scattered(SAMPLES), (H, W), 0),
        lambda: density_compensation(torch.zeros(5), (H, W)),
    ],
)
def test_bad_input_is_refused(bad: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"wanted|possible|keeps|differ"):
        bad()


def test_a_missing_finufft_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "finufft", None)
    with pytest.raises(ValueError, match=r"pip install invdiff\[mri\]"):
        NonCartesianMRI(scattered(SAMPLES), (H, W), engine="finufft")
