"""The generic suite over every registered operator that is not linear, and what is the renderer's own."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from invdiff import config
from invdiff.operators import LinearOperatorBase, NonlinearOperatorBase, VolumeRenderer
from invdiff.protocols import LinearOperator, Operator, Space

S, D, H, W = 2, 3, 5, 6
Factory = Callable[[torch.dtype], NonlinearOperatorBase]


def element(space: Space, seed: int) -> Tensor:
    return torch.randn(space.shape, dtype=space.dtype, generator=torch.Generator().manual_seed(seed))


def azimuths(*shape: int) -> Tensor:
    return 6.28 * torch.rand(shape, generator=torch.Generator().manual_seed(4)).double()


NONLINEAR: dict[str, list[Factory]] = {
    "volume-renderer": [
        lambda d: VolumeRenderer((S, 4 * D, H, W), azimuths(5), 0.3, (7, 4), samples=9, dtype=d),
        lambda d: VolumeRenderer((S, 2 * D, H, W), azimuths(S, 3), -0.7, (4, 7), 2.5, 1.2, 8, 1, 0.2, d),
    ]
}
CASES = {f"{kind}-{i}": make for kind, makes in NONLINEAR.items() for i, make in enumerate(makes)}


@pytest.fixture(params=CASES)
def make(request: pytest.FixtureRequest) -> Factory:
    return CASES[request.param]


@pytest.fixture
def double(make: Factory) -> NonlinearOperatorBase:
    return make(torch.float64)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-300))


def test_every_registered_nonlinear_operator_is_tested() -> None:
    classes = {kind: config.find("operators", kind) for kind in config.registered("operators")}
    assert {kind for kind, a in classes.items() if not issubclass(a, LinearOperatorBase)} == set(NONLINEAR)
    for kind, makes in NONLINEAR.items():
        assert {type(f(torch.float32)) for f in makes} == {classes[kind]}
        assert classes[kind].kind == kind


def test_declared_spaces(make: Factory) -> None:
    for d in (torch.float32, torch.float64):
        a = make(d)
        assert isinstance(a, Operator)
        assert not isinstance(a, LinearOperator)
        x = element(a.domain, 1)
        y = a(x)
        assert (tuple(y.shape), y.dtype) == a.range
        g = a.vjp(x, y)
        assert (tuple(g.shape), g.dtype) == a.domain
        assert a.domain.shape[0] == a.range.shape[0] == S


def test_vjp_is_the_derivative(double: NonlinearOperatorBase) -> None:
    """<J v, r> by central differences is <v, J^H r>; and the operator is not linear, else this would say little."""
    x, v, r = 0.5 * element(double.domain, 1), element(double.domain, 2), element(double.range, 3)
    step = 1e-5
    change = (double(x + step * v) - double(x - step * v)) / (2 * step)
    size = float(torch.linalg.vector_norm(change) * torch.linalg.vector_norm(r))
    assert abs(float((change * r).sum() - (v * double.vjp(x, r)).sum())) < 1e-7 * size
    assert relative(double.vjp(x + 0.3 * v, r), double.vjp(x, r)) > 1e-2


def test_vjp_has_derivatives_of_its_own(double: NonlinearOperatorBase) -> None:
    """The Hessian of <A x, r> is symmetric and what finite differences of the vjp say."""
    x, v, r = 0.5 * element(double.domain, 1), element(double.domain, 2), element(double.range, 3)
    at = x.clone().requires_grad_()
    (product,) = torch.autograd.grad((double.vjp(at, r) * v).sum(), at)
    step = 1e-5
    assert relative(product, (double.vjp(x + step * v, r) - double.vjp(x - step * v, r)) / (2 * step)) < 1e-6
    assert not double.vjp(x, r).requires_grad
    assert not x.requires_grad


def test_slices_are_independent_and_nothing_is_remembered(double: NonlinearOperatorBase) -> None:
    x, r = element(double.domain, 1), element(double.range, 2)
    kept, first = {k: id(v) for k, v in vars(double).items()}, (double(x), double.vjp(x, r))
    other = torch.cat([x[:1], element(double.domain, 3)[1:]])
    assert relative(double(other)[:1], first[0][:1]) < 1e-13
    assert relative(double(other)[1:], first[0][1:]) > 1e-3
    assert torch.equal(double(x), first[0])
    assert torch.equal(double.vjp(x, r), first[1])
    assert {k: id(v) for k, v in vars(double).items()} == kept


def test_views_are_chosen_alike_on_both_sides(double: NonlinearOperatorBase) -> None:
    x, index = element(double.domain, 1), [2, 0]
    y = double(x)
    assert relative(double.split(index)(x), double.part(y, index)) < 1e-13
    assert relative(double.split(index)(x), double.part(y, index[::-1])) > 1e-3
    assert double.split(index).views == (0, 1)


def test_fields_make_the_same_operator(make: Factory) -> None:
    a = make(torch.float64)
    fields = a.fields()
    plain = json.loads(json.dumps({k: v for k, v in fields.items() if not isinstance(v, Tensor)}))
    again = type(a)(**{**fields, **plain})
    x = element(a.domain, 1)
    assert torch.equal(again(x), a(x))
    assert a.to("meta") is not a


def test_another_shape_or_dtype_is_refused(double: NonlinearOperatorBase) -> None:
    x, r = element(double.domain, 1), element(double.range, 2)
    for wrong in (x[:1], x[..., :-1], x.float()):
        with pytest.raises(ValueError, match="is wanted"):
            double(wrong)
    with pytest.raises(ValueError, match="is wanted"):
        double.vjp(x, r[..., :-1])


N = 12


def cameras(azimuth: list[float], **more: object) -> VolumeRenderer:
    fields = {"elevation": 0.0, "size": (24, 24), "samples": 96, "dtype": torch.float64} | more
    return VolumeRenderer((1, 4 * N, N, N), azimuth, **fields)  # type: ignore[arg-type]


def ball(d: float, h: float, w: float, colour: tuple[float, float, float], a: VolumeRenderer) -> Tensor:
    axis = (2 * torch.arange(N).double() + 1 - N) / N
    grid = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"))
    inside = ((grid - torch.tensor([d, h, w])[:, None, None, None]).square().sum(0) < 0.3**2).double()
    return a.image_of(20 * inside[None], torch.tensor(colour).double()[None, :, None, None, None].expand(1, 3, N, N, N))


def place(y: Tensor) -> tuple[float, float]:
    """Where darkness is, (row, column) in half widths from the middle."""
    dark = (0.9 - y.mean(0)).clamp_min(0)  # the box is not quite clear where it is empty
    axis = (2 * torch.arange(24).double() - 23) / 24
    return float((dark.sum(1) * axis).sum() / dark.sum()), float((dark.sum(0) * axis).sum() / dark.sum())


def test_a_uniform_fog_obeys_beer_and_lambert() -> None:
    """Through the middle of the box, the light of the background is exp(-2 sigma), the rest of the fog's colour."""
    a = cameras([0.0], size=(1, 1), samples=400, background=0.7)
    sigma, colour = 0.8, 0.3
    fog = a.image_of(torch.full((1, N, N, N), sigma).double(), torch.full((1, 3, N, N, N), colour, dtype=torch.float64))
    passed = math.exp(-sigma * 2 * (1 - 1 / (4 * N)))  # interpolation fades to nothing over the outermost half voxels
    assert torch.allclose(a(fog), torch.full_like(a(fog), passed * 0.7 + (1 - passed) * colour), atol=0.02)
    density, tint = a.density_and_colour(fog)
    assert torch.allclose(density, torch.full_like(density, sigma), rtol=1e-6)
    assert torch.allclose(tint, torch.full_like(tint, colour), rtol=1e-6)


def test_projection_is_that_of_a_pinhole() -> None:
    """A ball at (h, w, d) appears at distance / (distance + depth) of its place, from every side."""
    turns = [0.0, math.pi / 2, math.pi, 0.7]
    a = cameras(turns)
    black = ball(0.25, -0.5, 0.4, (0.0, 0.0, 0.0), a)
    axis, mass = (2 * torch.arange(N).double() + 1 - N) / N, a.density_and_colour(black)[0][0, 0]
    d, h, w = (float((mass.sum(other) * axis).sum() / mass.sum()) for other in ((1, 2), (0, 2), (0, 1)))
    pictures = a(black)[0]
    for picture, t in zip(pictures, turns, strict=True):
        across, depth = w * math.cos(t) - d * math.sin(t), w * math.sin(t) + d * math.cos(t)
        wanted = [v * 4 / (4 + depth) / 1.5 for v in (h, across)]
        assert place(picture) == pytest.approx(wanted, abs=0.04)


def test_a_camera_above_sees_what_is_behind_higher_up() -> None:
    rows = []
    for d in (-0.6, 0.6):
        a = cameras([0.0], elevation=0.6)
        rows.append(place(a(ball(d, 0.0, 0.0, (0.0, 0.0, 0.0), a))[0, 0])[0])
    assert rows[0] > 0.1 > -0.1 > rows[1]


def test_what_is_in_front_hides() -> None:
    """Red before blue is red from the front and blue from behind; linear superposition would mix them."""
    a = cameras([0.0, math.pi])
    near, far = ball(-0.5, 0.0, 0.0, (1.0, 0.0, 0.0), a), ball(0.5, 0.0, 0.0, (0.0, 0.0, 1.0), a)
    dense = far[:, :N] > near[:, :N]
    both = torch.where(dense.repeat(1, 4, 1, 1), far, near)
    front, back = a(both)[0, :, :, 11:13, 11:13].mean((-2, -1))
    assert front[0] > 0.9 > 0.15 > front[2]
    assert back[2] > 0.9 > 0.15 > back[0]


def test_the_lift_shows_a_ball_along_its_ray() -> None:
    """Voxels on the ray of the ball get its colour, voxels beside it the background; distances grow with depth."""
    a = cameras([0.0])
    lifted = a.lift(a(ball(0.0, 0.0, 0.0, (1.0, 0.0, 0.0), a)))[0].unflatten(0, (4, N))
    green = lifted[1]
    assert float(green[:, N // 2 - 1 : N // 2 + 1, N // 2 - 1 : N // 2 + 1].max()) < 0.2
    assert float(green[:, 0].min()) > 0.9
    assert bool((lifted[3].diff(dim=0) > 0).all())
    moved = torch.linspace(0, 1, 24 * 24 * 3, dtype=torch.float64).view(1, 1, 3, 24, 24)
    colours = a.lift(moved).unflatten(1, (4, N))[:, :3]
    assert relative(a.lift(2 * moved).unflatten(1, (4, N))[:, :3], 2 * colours) < 1e-12


def test_wrong_renderers_are_refused() -> None:
    for fields in (
        {"azimuth": azimuths(5, 3)},
        {"azimuth": [math.nan]},
        {"distance": 1.5},
        {"samples": 1},
        {"elevation": 2.0},
        {"colours": 4},
    ):
        with pytest.raises(ValueError, match="wanted"):
            VolumeRenderer(**{"shape": (S, 4 * D, H, W), "azimuth": [0.0], **fields})  # type: ignore[arg-type]
    a = NONLINEAR["volume-renderer"][0](torch.float64)
    with pytest.raises(ValueError, match="is wanted"):
        a.lift(element(a.range, 1)[:, :2])  # type: ignore[attr-defined]
