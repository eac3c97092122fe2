"""The generic suite over every registered operator and every wrapper: properties, not shapes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from invdiff import config
from invdiff.noise import KeyedNoise
from invdiff.operators import (
    Blur,
    CartesianMRI,
    CartesianMRI3D,
    FanBeam,
    Gaussian,
    KnownPhase,
    LinearOperatorBase,
    Mask,
    NonCartesianMRI,
    Normalised,
    OffResonance,
    ParallelBeam,
    RealChannels,
    TransmissionPoisson,
    Whitened,
    gaussian_kernel,
    stack,
)
from invdiff.operators.mask import Diagonal
from invdiff.protocols import LinearOperator, Space

S, C, H, W = 2, 3, 10, 7
COILS, VIEWS, DETECTORS, READOUT = 4, 5, 13, 11
Factory = Callable[[torch.dtype], LinearOperatorBase]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def rand(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def on(*shape: int, seed: int = 3) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.6


def element(space: Space, seed: int) -> Tensor:
    return rand(*space.shape, dtype=space.dtype, seed=seed)


def parallel(d: torch.dtype, memory_mb: float = 2048.0) -> ParallelBeam:
    angles = [0.1, 0.9, 1.7, 3.5, -2.2]
    return ParallelBeam((S, C, H, W), angles, DETECTORS, 0.7, 0.9, 0.31, memory_mb=memory_mb, dtype=d)


def fan(d: torch.dtype, memory_mb: float = 2048.0) -> FanBeam:
    angles = [0.2, 1.3, 2.9, 4.4, -0.7]
    return FanBeam((S, C, H, W), angles, 20.0, 33.0, DETECTORS, 0.7, 1.4, -0.43, memory_mb=memory_mb, dtype=d)


def mri(d: torch.dtype, coils: int | None = None) -> CartesianMRI:
    maps = None if coils is None else rand(coils, H, W, dtype=d.to_complex(), seed=5)
    return CartesianMRI(on(S, H, W), maps, dtype=d.to_complex())


def mri_3d(d: torch.dtype, coils: int | None = None, at_once: int | None = None) -> CartesianMRI3D:
    maps = None if coils is None else rand(coils, S, H, W, dtype=d.to_complex(), seed=5)
    return CartesianMRI3D(on(S, H, W), maps, d.to_complex(), "w", at_once)


def trajectory(*axes: int) -> Tensor:
    return torch.rand(*axes, VIEWS * READOUT, 2, generator=torch.Generator().manual_seed(6)).double() - 0.5


def off_grid(
    d: torch.dtype, coils: int | None = None, accuracy: float = 1e-4, engine: str = "own", toeplitz: bool = False
) -> NonCartesianMRI:
    maps = None if coils is None else rand(coils, H, W, dtype=d.to_complex(), seed=5)
    return NonCartesianMRI(trajectory(), (H, W), maps, S, d.to_complex(), accuracy, engine, toeplitz, READOUT)


def frames(d: torch.dtype) -> NonCartesianMRI:
    """A trajectory and maps for each slice, two coils at once, the point spread function as exact as the dtype."""
    maps, exact = rand(S, COILS, H, W, dtype=d.to_complex(), seed=5), 1e-6 if d == torch.float32 else 1e-14
    return NonCartesianMRI(trajectory(S), (H, W), maps, None, d.to_complex(), exact, toeplitz=True, coils_at_once=3)


def kernel(h: int, w: int) -> Tensor:
    """Nothing about it is symmetric; its middle outweighs the rest, so that it can be inverted."""
    rest = rand(h, w, seed=8)
    rest[h // 2, w // 2] = 1.5 * rest.abs().sum()
    return rest / rest.abs().sum()


REGISTERED: dict[str, list[Factory]] = {
    "mask": [
        lambda d: Mask(on(H, W), (S, C, H, W), d),
        lambda d: Mask(on(S, H, W), (S, C, H, W), d.to_complex()),
        lambda d: Mask(on(S, C, H, W), dtype=d),
    ],
    "blur": [
        lambda d: Blur(kernel(4, 3), (S, C, H, W), "zero", d),
        lambda d: Blur(kernel(4, 3), (S, C, H, W), "circular", d),
        lambda d: Blur(kernel(3, 6), (S, C, H, W), "zero", d.to_complex()),
        lambda d: Blur(kernel(3, 6), (S, C, H, W), "circular", d.to_complex()),
    ],
    "parallel": [parallel, lambda d: parallel(d, memory_mb=1e-6)],
    "fan": [fan, lambda d: fan(d, memory_mb=1e-6)],
    "cartesian-mri": [
        mri,
        lambda d: mri(d, COILS),
        lambda d: CartesianMRI(on(H, W), rand(S, COILS, H, W, dtype=d.to_complex(), seed=5), dtype=d.to_complex()),
        lambda d: CartesianMRI(on(H, W), None, S, d.to_complex()),
        lambda d: CartesianMRI(on(W).expand(H, W), rand(COILS, H, W, dtype=d.to_complex()), S, d.to_complex(), "w", 3),
        lambda d: CartesianMRI(torch.ones(H, W), rand(COILS, H, W, dtype=d.to_complex()), S, d.to_complex()),
    ],
    "cartesian-mri-3d": [mri_3d, lambda d: mri_3d(d, COILS), lambda d: mri_3d(d, COILS, 3)],
    "non-cartesian-mri": [
        off_grid,
        lambda d: off_grid(d, COILS),
        lambda d: off_grid(d, COILS, engine="finufft"),
        frames,
    ],
    "real-channels": [lambda d: RealChannels((S, C, H, W), d.to_complex())],
    "known-phase": [
        lambda d: KnownPhase(rand(S, H, W, seed=7), dtype=d.to_complex()),
        lambda d: KnownPhase(rand(H, W, seed=7), S, d.to_complex()),
    ],
}


def rays_and_views() -> Tensor:
    """Some rays are missing, and all of one view."""
    kept = on(VIEWS, DETECTORS)
    kept[2] = False
    return kept


def weights(d: torch.dtype) -> Tensor:
    return rand(S, C, VIEWS, DETECTORS, dtype=d, seed=9).abs()


def coil_factor(d: torch.dtype) -> LinearOperatorBase:
    return Diagonal(rand(COILS, 1, 1, dtype=d.to_complex(), seed=4), (S, COILS, H, W), d.to_complex())


WRAPPERS: dict[str, Factory] = {
    "diagonal": lambda d: Diagonal(rand(C, 1, W, dtype=d.to_complex()), (S, C, H, W), d.to_complex()),
    "adjoint": lambda d: mri(d, COILS).H,
    "adjoint-ct": lambda d: parallel(d).H,
    "scaled": lambda d: -1.7 * mri(d),
    "normalised": lambda d: Normalised(fan(d)),
    "whitened": lambda d: Whitened(parallel(d), weights(d)),
    "whitened-by-operator": lambda d: Whitened(mri(d, COILS), coil_factor(d)),
    "off-resonance": lambda d: OffResonance(mri(d, COILS), rand(S, H, W) * 30, torch.linspace(0, 0.02, H)[:, None]),
    "off-resonance-off-grid": lambda d: OffResonance(off_grid(d), 9 * rand(H, W), rand(VIEWS * READOUT) / 100, 2),
    "mri-3d-phase": lambda d: 0.3 * mri_3d(d, COILS) @ KnownPhase(rand(H, W, seed=7), S, d.to_complex()),
    "mri-real": lambda d: mri(d) @ RealChannels((S, 1, H, W), d.to_complex()),
    "mri-phase": lambda d: mri(d, COILS) @ KnownPhase(rand(H, W, seed=7), S, d.to_complex()),
    "masked": lambda d: Mask(on(S, C, VIEWS, DETECTORS), dtype=d) @ parallel(d),
    "masked-view-lost": lambda d: Mask(rays_and_views(), (S, C, VIEWS, DETECTORS), d) @ fan(d),
    "masked-mri": lambda d: Mask(on(S, COILS, H, W), dtype=d.to_complex()) @ mri(d, COILS),
    "masked-mri-3d": lambda d: Mask(on(H, W), (S, 1, H, W), d.to_complex()) @ mri_3d(d),
    "masked-off-grid": lambda d: Mask(on(VIEWS * READOUT), off_grid(d).range.shape, d.to_complex()) @ off_grid(d),
    "masked-mask": lambda d: Mask(on(H, W), (S, C, H, W), d) @ Mask(on(S, H, W, seed=8), (S, C, H, W), d),
    "masked-whitened": lambda d: Whitened(Mask(on(S, VIEWS, DETECTORS), fan(d).range.shape, d) @ fan(d), weights(d)),
    "stack": lambda d: stack([parallel(d), 0.5 * fan(d), Mask(on(H, W), (S, C, H, W), d)]),
}
CASES = {f"{kind}-{i}": make for kind, makes in REGISTERED.items() for i, make in enumerate(makes)} | WRAPPERS
# FBP, gridding, passed through, 50 steps
OTHER_PINV = ("parallel", "fan", "non-cartesian", "normalised", "whitened", "mri-phase", "mri-3d-phase", "adjoint-ct")
OTHER_PINV += ("off-resonance-off-grid", "masked-off-grid")  # too badly conditioned for its 50 steps
OTHER_PINV += ("masked-view-lost", "masked-whitened")
PINV_IS_LEAST_SQUARES = [name for name in CASES if name != "masked" and not name.startswith(OTHER_PINV)]


@pytest.fixture(params=CASES)
def make(request: pytest.FixtureRequest) -> Factory:
    return CASES[request.param]


@pytest.fixture
def double(make: Factory) -> LinearOperatorBase:
    return make(torch.float64)


def relative(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference over the largest absolute value."""
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-300))


def real_inner(a: Tensor, b: Tensor) -> float:
    return float((a.conj() * b).real.sum(dtype=torch.float64))


def check_adjoint(a: LinearOperator, tolerance: float, device: str = "cpu") -> None:
    for seed in (11, 12, 13):
        x, y = element(a.domain, seed).to(device), element(a.range, seed + 50).to(device)
        ax, aty = a.forward(x), a.adjoint(y)
        size = float(torch.linalg.vector_norm(ax) * torch.linalg.vector_norm(y))
        assert size > 0
        assert abs(real_inner(ax, y) - real_inner(x, aty)) <= tolerance * size


def dense(a: LinearOperatorBase) -> Tensor:
    """The matrix over the reals, columns by real and imaginary unit images."""
    columns = []
    count = math.prod(a.domain.shape)
    for unit in (1, 1j) if a.domain.dtype.is_complex else (1,):
        for k in range(count):
            x = torch.zeros(count, dtype=a.domain.dtype)
            x[k] = unit
            y = a.forward(x.reshape(a.domain.shape)).flatten()
            columns.append(torch.view_as_real(y).flatten() if y.is_complex() else y)
    return torch.stack(columns, 1)


def test_every_registered_operator_is_tested_and_named_as_registered() -> None:
    classes = {kind: config.find("operators", kind) for kind in config.registered("operators")}
    assert {kind for kind, a in classes.items() if issubclass(a, LinearOperatorBase)} == set(REGISTERED)
    for kind, makes in REGISTERED.items():
        for factory in makes:
            operator = factory(torch.float32)
            assert type(operator) is config.find("operators", kind)
            assert operator.kind == kind


def test_declared_spaces(make: Factory) -> None:
    for d in (torch.float32, torch.float64):
        a = make(d)
        assert isinstance(a, LinearOperator)
        y = a(element(a.domain, 1))
        assert (tuple(y.shape), y.dtype) == a.range
        assert a.domain.dtype.to_real() == a.range.dtype.to_real() == d
        x = a.adjoint(element(a.range, 2))
        assert (tuple(x.shape), x.dtype) == a.domain
        assert a.domain.shape[0] == a.range.shape[0] == S


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("d", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["float32", "float64"]
)
def test_adjoint(make: Factory, d: torch.dtype, tolerance: float, device: str) -> None:
    check_adjoint(make(d), tolerance, device)
    check_adjoint(make(d).to(device), tolerance, device)


def test_linear(double: LinearOperatorBase) -> None:
    for f, space in ((double.forward, double.domain), (double.adjoint, double.range)):
        u, v = element(space, 1), element(space, 2)
        assert relative(f(2.5 * u - 0.75 * v), 2.5 * f(u) - 0.75 * f(v)) < 1e-12
        assert float(f(torch.zeros_like(u)).abs().max()) == 0


def test_normal_and_vjp(double: LinearOperatorBase) -> None:
    x, r = element(double.domain, 1), element(double.range, 2)
    assert relative(double.normal(x), double.adjoint(double.forward(x))) < 1e-12
    assert relative(double.vjp(x, r), double.adjoint(r)) == 0


@pytest.mark.parametrize(
    ("d", "tolerance"), [(torch.float32, 3e-5), (torch.float64, 1e-11)], ids=["float32", "float64"]
)
def test_solve(make: Factory, d: torch.dtype, tolerance: float) -> None:
    a = make(d)
    rho = 0.05 * a.norm() ** 2
    rhs = element(a.domain, 1) * torch.tensor([1.0, 300.0], dtype=d).reshape(S, *[1] * (len(a.domain.shape) - 1))
    for start in (None, element(a.domain, 2)):
        x = a.solve(rhs, rho, start)
        residual = a.normal(x) + rho * x - rhs
        for k in [slice(None)] if a.coupled else range(S):
            assert torch.linalg.vector_norm(residual[k]) <= tolerance * torch.linalg.vector_norm(rhs[k])


def test_slices_touch_one_another_only_where_the_operator_says_so(double: LinearOperatorBase) -> None:
    rhs = element(double.domain, 1)
    other = torch.cat([rhs[:1], 100 * element(double.domain, 2)[1:]])
    for f in (double.forward, double.normal, lambda v: double.solve(v, 0.4, iterations=3)):
        one, two = f(rhs), f(other)
        assert (relative(one[0], two[0]) < 1e-13) == (not double.coupled)
        assert relative(one[1], two[1]) > 1e-3


def test_same_call_twice_and_nothing_remembered(double: LinearOperatorBase) -> None:
    x, y = element(double.domain, 1), element(double.range, 2)
    kept = {name: id(value) for name, value in vars(double).items()}
    inputs = x.clone(), y.clone()
    first = double.forward(x), double.adjoint(y), double.pinv(y), double.solve(x, 0.3)
    double.forward(3 * x + 1), double.adjoint(-y), double.norm()
    for before, after in zip(first, (double(x), double.adjoint(y), double.pinv(y), double.solve(x, 0.3)), strict=True):
        assert torch.equal(before, after)
    assert torch.equal(x, inputs[0])
    assert torch.equal(y, inputs[1])
    assert {name: id(value) for name, value in vars(double).items()} == kept


def test_autograd_is_the_adjoint(double: LinearOperatorBase) -> None:
    x = element(double.domain, 1).requires_grad_()
    r = element(double.range, 2)
    (gradient,) = torch.autograd.grad((r.conj() * double(x)).real.sum(), x)
    assert relative(gradient, double.adjoint(r)) < 1e-12
    y = r.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((x.detach().conj() * double.adjoint(y)).real.sum(), y)
    assert relative(gradient, double(x.detach())) < 1e-12


def test_second_derivative_is_the_normal_operator(double: LinearOperatorBase) -> None:
    x = element(double.domain, 1).requires_grad_()
    v = element(double.domain, 2)
    (first,) = torch.autograd.grad(double(x).abs().square().sum() / 2, x, create_graph=True)
    (second,) = torch.autograd.grad((v.conj() * first).real.sum(), x)
    assert relative(second, double.normal(v)) < 1e-11


def test_norm_is_the_largest_singular_value(double: LinearOperatorBase) -> None:
    largest = float(torch.linalg.matrix_norm(dense(double), ord=2))
    assert 0.98 * largest < double.norm(100) < (1 + 1e-9) * largest


def test_another_shape_or_dtype_is_refused(double: LinearOperatorBase) -> None:
    x, y = element(double.domain, 1), element(double.range, 2)
    for wrong in (x[:1], x[..., :-1], x.to(torch.complex64 if x.is_complex() else torch.float32)):
        with pytest.raises(ValueError, match="is wanted"):
            double.forward(wrong)
        with pytest.raises(ValueError, match="is wanted"):
            double.solve(wrong, 1.0)
    with pytest.raises(ValueError, match="is wanted"):
        double.adjoint(y[..., :-1])
    for rho in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="rho is"):
            double.solve(x, rho)


def test_moved_operator_is_another_one(double: LinearOperatorBase) -> None:
    moved = double.to("meta")
    assert moved is not double
    assert double.device.type == "cpu"
    if not isinstance(double, RealChannels):
        assert moved.device.type == "meta"


@pytest.mark.parametrize("name", [n for n in CASES if n not in WRAPPERS])
def test_fields_make_the_same_operator(name: str) -> None:
    for d in (torch.float32, torch.float64):
        a = CASES[name](d)
        fields = a.fields()
        plain = json.loads(json.dumps({k: v for k, v in fields.items() if not isinstance(v, Tensor)}))
        again = type(a)(**{**fields, **plain})
        assert (again.domain, again.range) == (a.domain, a.range)
        x = element(a.domain, 1)
        assert relative(again(x), a(x)) < 10 * torch.finfo(d).eps


@pytest.mark.parametrize("name", PINV_IS_LEAST_SQUARES)
def test_pinv_is_least_squares(name: str) -> None:
    a = CASES[name](torch.float64)
    y = element(a.range, 2)
    x = a.pinv(y)
    scale = torch.linalg.vector_norm(a.adjoint(y))
    assert torch.linalg.vector_norm(a.adjoint(a(x) - y)) < 2e-5 * scale
    matrix = dense(a)
    if a.domain.dtype.is_complex:
        x, y = torch.cat([x.real.flatten(), x.imag.flatten()]), y
    flat = torch.view_as_real(y).flatten() if y.is_complex() else y.flatten()
    # not pinv: the SVD may fail on singular values that repeat, slice by slice and part by part
    exact = torch.linalg.lstsq(matrix, flat[:, None], rcond=1e-9, driver="gelsy").solution[:, 0]
    residuals = [torch.linalg.vector_norm(matrix @ v - flat) for v in (x.flatten(), exact)]
    assert residuals[0] <= residuals[1] + 1e-4 * torch.linalg.vector_norm(flat)


def test_pinv_passes_through_wrappers() -> None:
    a = parallel(torch.float64)
    y, w = element(a.range, 2), weights(torch.float64) + 0.1
    assert relative((4 * a).pinv(4 * y), a.pinv(y)) < 1e-13
    assert relative(Whitened(a, w).pinv(w * y), a.pinv(y)) < 1e-13
    n = Normalised(a)
    assert relative(n.pinv(n.scale * y), a.pinv(y)) < 1e-13
    b = mri(torch.float64) @ RealChannels((S, 1, H, W), torch.complex128)
    k = element(b.range, 3)
    assert relative(b.pinv(k), b.inner.pinv(mri(torch.float64).adjoint(k))) < 1e-13


class WrongAdjoint(ParallelBeam):
    """One weight in a hundred off by 3 %: small enough to look right in a picture."""

    def _adjoint(self, y: Tensor) -> Tensor:
        return super()._adjoint(y) * (1 + 0.03 * (torch.arange(W) == 3))


def test_the_suite_catches_a_wrong_adjoint() -> None:
    wrong = WrongAdjoint((S, C, H, W), [0.1, 0.9], DETECTORS, dtype=torch.float64)
    with pytest.raises(AssertionError):
        check_adjoint(wrong, 1e-5)


def test_algebra() -> None:
    a, b = mri(torch.float64, COILS), RealChannels((S, 1, H, W), torch.complex128)
    x, y = element(b.domain, 1), element(a.range, 2)
    assert torch.equal((a @ b)(x), a(b(x)))
    assert torch.equal((a @ b).H(y), b.adjoint(a.adjoint(y)))
    assert a.H.H is a
    assert relative((a / 4)(b(x)), a(b(x)) / 4) < 1e-14
    with pytest.raises(ValueError, match="the same is wanted"):
        b @ a
    with pytest.raises(ValueError, match="finite number other than 0"):
        a * 0.0


def test_normalised_has_norm_one() -> None:
    a = parallel(torch.float64)
    n = Normalised(a)
    assert abs(n.norm(200) - 1) < 0.02
    assert n.unit == a.unit == "1/mm"
    assert Normalised(a, norm=8.0).scale == 0.125
    with pytest.raises(ValueError, match="norm is"):
        Normalised(Mask(torch.zeros(H, W)))


def test_whitened_whitens_and_refuses() -> None:
    a, w = parallel(torch.float64), weights(torch.float64)
    x = element(a.domain, 1)
    white = Whitened(a, w)
    assert relative(white(x), w * a(x)) < 1e-14
    assert torch.equal(white.whiten(a(x)), white(x))
    for bad in (-w, w[..., :-1], w / 0, w.to(torch.complex128)):
        with pytest.raises(ValueError, match=r"wanted|broadcast"):
            Whitened(a, bad)


def test_stack_parts() -> None:
    a, m = parallel(torch.float64), Mask(on(H, W), (S, C, H, W), torch.float64)
    both = stack([a, m])
    x = element(a.domain, 1)
    first, second = both.parts(both(x))
    assert torch.equal(first, a(x))
    assert torch.equal(second, m(x))
    with pytest.raises(ValueError, match="at least one"):
        stack([])
    with pytest.raises(ValueError, match="the same is wanted"):
        stack([a, parallel(torch.float32)])


def test_split_gives_the_chosen_views() -> None:
    index = [3, 0]
    for a in (parallel(torch.float64), fan(torch.float64), fan(torch.float64, 1e-6)):
        x = element(a.domain, 1)
        white = 2 * Whitened(a, weights(torch.float64))
        for whole in (a, white):
            assert relative(whole.split(index)(x), whole(x)[..., index, :]) < 1e-13
            assert whole.views == tuple(range(VIEWS))
            assert relative(whole.part(whole(x), index), whole(x)[..., index, :]) == 0
    with pytest.raises(ValueError, match="no views"):
        Mask(on(H, W)).split([0])


def test_centred_fft_against_the_sum() -> None:
    x = element(Space((S, 1, H, W), torch.complex128), 1)
    full = CartesianMRI(torch.ones(H, W), None, S, torch.complex128)

    def matrix(n: int) -> Tensor:
        k = torch.arange(n, dtype=torch.float64) - n // 2
        return torch.exp(-2j * torch.pi * torch.outer(k, k) / n) / math.sqrt(n)

    assert relative(full(x), matrix(H) @ x @ matrix(W)) < 1e-12


def test_single_coil_and_mask_solve_in_closed_form() -> None:
    calls = 0

    class Counted(CartesianMRI):
        def _forward(self, x: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return super()._forward(x)

    a = Counted(on(S, H, W), dtype=torch.complex128)
    b = a @ RealChannels((S, 1, H, W), torch.complex128)
    rhs = element(b.domain, 1)
    x = (0.5 * b).solve(rhs, 0.2)
    assert calls == 0
    assert relative((0.5 * b).normal(x) + 0.2 * x, rhs) < 1e-12


@pytest.mark.parametrize(("k_h", "k_w"), [(4, 3), (1, 6), (13, 9)])
def test_blur_is_the_convolution(k_h: int, k_w: int) -> None:
    from scipy.signal import convolve2d

    k = rand(k_h, k_w, seed=6)
    x = rand(S, C, H, W)
    full = torch.stack([torch.from_numpy(convolve2d(v, k)) for v in x.flatten(0, 1).numpy()])  # all offsets
    cut = full[:, k_h // 2 : k_h // 2 + H, k_w // 2 : k_w // 2 + W].view(S, C, H, W)
    assert relative(Blur(k, (S, C, H, W), dtype=torch.float64)(x), cut) < 1e-13
    if k_h > H:
        return
    round_ = torch.zeros(S * C, H, W, dtype=torch.float64)
    for i in range(full.shape[1]):
        for j in range(full.shape[2]):
            round_[:, (i - k_h // 2) % H, (j - k_w // 2) % W] += full[:, i, j]
    assert relative(Blur(k, (S, C, H, W), "circular", torch.float64)(x), round_.view(S, C, H, W)) < 1e-13


def test_blur_by_a_gaussian_keeps_the_mean_and_has_its_width() -> None:
    k = gaussian_kernel(1.2)
    assert k.shape == (9, 9)
    assert abs(float(k.sum()) - 1) < 1e-12
    x = torch.zeros(S, C, 21, 24, dtype=torch.float64)
    x[..., 10, 11] = 1
    rows = Blur(k, x.shape, dtype=torch.float64)(x)[0, 0].sum(1)
    offsets = torch.arange(21).double() - 10
    assert abs(float((rows * offsets).sum())) < 1e-12
    assert abs(float((rows * offsets.square()).sum().sqrt()) - 1.2) < 0.03


@pytest.mark.parametrize(
    "bad",
    [
        lambda: Mask(torch.full((H, W), 0.5)),
        lambda: Mask(torch.ones(H)),
        lambda: Mask(torch.ones(H, W), (S, C, H, W + 1)),
        lambda: CartesianMRI(torch.ones(H, W), torch.ones(COILS, H, W)),
        lambda: CartesianMRI(torch.ones(H, W), rand(COILS, H, W + 1, dtype=torch.complex64)),
        lambda: CartesianMRI(torch.ones(S, H, W), slices=S + 1),
        lambda: CartesianMRI(torch.ones(S, H, W), rand(S + 1, COILS, H, W, dtype=torch.complex64)),
        lambda: CartesianMRI(torch.ones(H, W), dtype=torch.float32),
        lambda: CartesianMRI(2 * torch.ones(H, W)),
        lambda: RealChannels((S, 1, H, W), torch.float32),
        lambda: RealChannels((1, H, W)),
        lambda: Blur(torch.ones(3), (S, C, H, W)),
        lambda: Blur(torch.full((3, 3), math.inf), (S, C, H, W)),
        lambda: Blur(torch.ones(3, W + 1), (S, C, H, W), "circular"),
        lambda: Blur(torch.ones(3, 3), (S, C, H, W), "mirror"),
        lambda: Blur(torch.ones(3, 3), (H, W)),
        lambda: gaussian_kernel(0.0),
        lambda: KnownPhase(torch.full((H, W), math.nan)),
        lambda: KnownPhase(torch.ones(S, H, W), slices=S + 1),
        lambda: Gaussian(-1.0),
        lambda: TransmissionPoisson(0.0),
    ],
)
def test_bad_input_is_refused(bad: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"wanted|other than 0 and 1|broadcast|differ"):
        bad()


def test_gaussian_noise_is_keyed_and_of_its_sigma() -> None:
    for dtype in (torch.float32, torch.complex64):
        clean = torch.zeros(S, 150, 170, dtype=dtype)
        y, sqrt_w = Gaussian(0.3).sample(clean, KeyedNoise(0))
        parts = torch.view_as_real(y) if y.is_complex() else y
        assert sqrt_w is None
        assert abs(float(parts.std()) - 0.3) < 0.004
        alone, _ = Gaussian(0.3).sample(clean[1:], KeyedNoise(0, first=1))
        assert torch.equal(alone[0], y[1])


def test_poisson_noise_is_whitened_to_one_and_keyed_by_slice() -> None:
    clean = torch.linspace(0, 4, S * 150 * 170).reshape(S, 150, 170)
    model = TransmissionPoisson(1e5)
    y, sqrt_w = model.sample(clean, KeyedNoise(0))
    white = sqrt_w * (y - clean)
    assert abs(float(white.mean())) < 0.02
    assert abs(float(white.std()) - model.sigma_y) < 0.01
    alone, _ = model.sample(clean[1:], KeyedNoise(0, first=1))
    assert torch.equal(alone[0], y[1])
    assert not torch.equal(model.sample(clean, KeyedNoise(1))[0], y)
    same, _ = model.sample(torch.ones(S, 3, 50), KeyedNoise(0))
    assert not torch.equal(same[0], same[1])


def test_poisson_counts_are_floored_at_one() -> None:
    y, sqrt_w = TransmissionPoisson(50.0).sample(torch.full((S, 3, 5), 40.0), KeyedNoise(0))
    assert torch.allclose(y, torch.full_like(y, math.log(50.0)))
    assert torch.equal(sqrt_w, torch.ones_like(y))
