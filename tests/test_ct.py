"""CT against what it cannot share a mistake with: analytic line integrals, ASTRA, quantities known beforehand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from invdiff.operators import FanBeam, ParallelBeam, fbp
from invdiff.operators.ct.arc import arc_of
from invdiff.operators.ct.beam import BeamOperator
from invdiff.operators.ct.joseph import Rays
from invdiff.operators.sparse import transpose_by_counting, transpose_by_sorting

SIZE = 2, 1, 130, 110
PIXEL = 0.6
VIEWS = torch.linspace(-0.4, 5.6, 11, dtype=torch.float64)


class Ellipse(NamedTuple):
    """Middle and half axes in mm, turned by ``turn`` radians counter-clockwise, attenuation in 1/mm."""

    x: float
    y: float
    a: float
    b: float
    turn: float
    mu: float

    def local(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = math.cos(self.turn), math.sin(self.turn)
        return (x * cos + y * sin) / self.a, (y * cos - x * sin) / self.b

    def raster(self, size: tuple[int, int], pixel: float, fine: int = 8) -> Tensor:
        """(h w), the mean over fine x fine points of each pixel."""
        h, w = size[0] * fine, size[1] * fine
        x = (torch.arange(w, dtype=torch.float64) - (w - 1) / 2) * pixel / fine
        y = ((h - 1) / 2 - torch.arange(h, dtype=torch.float64)) * pixel / fine
        u, v = self.local(x[None, :] - self.x, y[:, None] - self.y)
        full = self.mu * (u**2 + v**2 <= 1).to(torch.float64)
        return full.reshape(size[0], fine, size[1], fine).mean((1, 3))

    def integrals(self, rays: Rays) -> Tensor:
        """Attenuation along each whole ray: chord of the unit circle in the ellipse's own coordinates."""
        px, py = self.local(rays.x - self.x, rays.y - self.y)
        dx, dy = self.local(rays.dx, rays.dy)
        dd, pd, pp = dx**2 + dy**2, px * dx + py * dy, px**2 + py**2
        root = (pd**2 - dd * (pp - 1)).clamp_min(0).sqrt()
        return self.mu * 2 * root / dd * torch.hypot(rays.dx, rays.dy)


DISC = Ellipse(5.3, -9.1, 14.2, 14.2, 0.0, 0.021)
ELLIPSE = Ellipse(-7.7, 11.4, 16.5, 8.3, 0.6, 0.034)


def parallel(**changes: object) -> ParallelBeam:
    fields = {"shape": SIZE, "angles": VIEWS, "detectors": 171, "pixel_mm": PIXEL, "detector_mm": 0.55}
    return ParallelBeam(**{**fields, "detector_offset_mm": 1.37, **changes})


def fan(**changes: object) -> FanBeam:
    fields = {"shape": SIZE, "angles": VIEWS, "source_origin_mm": 130.0, "source_detector_mm": 210.0}
    more = {"detectors": 190, "pixel_mm": PIXEL, "detector_mm": 0.93, "detector_offset_mm": -2.6}
    return FanBeam(**{**fields, **more, **changes})


BEAMS = {"parallel": parallel, "fan": fan}
FINE = {"shape": (2, 1, 198, 166), "pixel_mm": 0.4}  # pixels small enough for 1 %, of 20 to 40 a half axis


@pytest.fixture(params=BEAMS)
def beam(request: pytest.FixtureRequest) -> Callable[..., BeamOperator]:
    return BEAMS[request.param]


def written_rays(a: BeamOperator, u: Tensor) -> Rays:
    """The rays at detector coordinates u (v detector), from the words of the geometry's docstring alone."""
    cos, sin = a.angles.cos()[:, None], a.angles.sin()[:, None]
    if not isinstance(a, FanBeam):
        return Rays(u * cos, u * sin, sin.expand_as(u), -cos.expand_as(u))
    behind = a.source_detector_mm - a.source_origin_mm
    x, y = a.source_origin_mm * sin, -a.source_origin_mm * cos
    return Rays(x.expand_as(u), y.expand_as(u), u * cos - behind * sin - x, u * sin + behind * cos - y)


def analytic(a: BeamOperator, shape: Ellipse, fine: int = 9) -> Tensor:
    """(view detector), each element's mean over ``fine`` rays."""
    place = torch.arange(a.detectors * fine, dtype=torch.float64)
    u = (place - (a.detectors * fine - 1) / 2) * a.detector_mm / fine + a.detector_offset_mm
    integrals = shape.integrals(written_rays(a, u.expand(a.angles.numel(), -1)))
    return integrals.reshape(a.angles.numel(), a.detectors, fine).mean(-1)


def phantom(a: BeamOperator, first: Ellipse = DISC, second: Ellipse = ELLIPSE) -> Tensor:
    """(2 1 h w): another shape in each slice."""
    size = a.domain.shape[2:]
    return torch.stack([s.raster(size, a.pixel_mm) for s in (first, second)])[:, None].to(a.domain.dtype)


def test_line_integrals_in_every_view(beam: Callable[..., BeamOperator]) -> None:
    a = beam(**FINE)
    y = a(phantom(a)).double()
    for k, shape in enumerate((DISC, ELLIPSE)):
        exact = analytic(a, shape)
        error = torch.linalg.vector_norm(y[k, 0] - exact, dim=-1) / torch.linalg.vector_norm(exact, dim=-1)
        assert float(error.max()) < 0.01


@pytest.mark.parametrize("slip", ["mirrored", "upside down", "turned backwards", "shifted by half an element"])
def test_a_slip_in_the_geometry_would_be_seen(beam: Callable[..., BeamOperator], slip: str) -> None:
    a = beam(**FINE)
    x = phantom(a)
    y = {
        "mirrored": lambda: a(x.flip(3)),
        "upside down": lambda: a(x.flip(2)),
        "turned backwards": lambda: beam(**FINE, angles=-VIEWS)(x),
        "shifted by half an element": lambda: beam(**FINE, detector_offset_mm=a.detector_offset_mm + a.detector_mm / 2)(
            x
        ),
    }[slip]()
    exact = analytic(a, ELLIPSE)
    error = torch.linalg.vector_norm(y[1, 0] - exact, dim=-1) / torch.linalg.vector_norm(exact, dim=-1)
    assert float(error.max()) > 0.015


def test_mass_in_every_view_of_a_parallel_beam() -> None:
    a = parallel()
    mass = a(phantom(a)).sum(-1) * a.detector_mm
    assert torch.allclose(mass, phantom(a).sum((2, 3))[..., None] * PIXEL**2, rtol=2e-3)


def test_lengths_are_in_mm(beam: Callable[..., BeamOperator]) -> None:
    """All lengths doubled and the attenuation halved: the same measurements."""
    a = beam()
    twice = {"pixel_mm": 2 * a.pixel_mm, "detector_mm": 2 * a.detector_mm}
    twice["detector_offset_mm"] = 2 * a.detector_offset_mm
    if isinstance(a, FanBeam):
        twice |= {"source_origin_mm": 2 * a.source_origin_mm, "source_detector_mm": 2 * a.source_detector_mm}
    x = phantom(a)
    assert torch.allclose(beam(**twice)(x / 2), a(x), atol=1e-5)


def test_default_detector_sees_the_whole_image(beam: Callable[..., BeamOperator]) -> None:
    for offset in (0.0, 3.3):
        a = beam(detectors=None, detector_mm=None, detector_offset_mm=offset)
        wider = beam(detectors=a.detectors + 60, detector_mm=None, detector_offset_mm=offset)
        x = torch.ones(SIZE)
        assert torch.allclose(a(x).sum(-1), wider(x).sum(-1), rtol=1e-5)
        narrower = beam(detectors=a.detectors - 30, detector_mm=None, detector_offset_mm=offset)
        assert not torch.allclose(narrower(x).sum(-1), wider(x).sum(-1), rtol=1e-3)


def test_distant_fan_is_parallel() -> None:
    far = fan(source_origin_mm=1e6, source_detector_mm=1e6, detector_mm=0.55, detectors=171, detector_offset_mm=1.37)
    x = phantom(far)
    assert torch.allclose(far(x), parallel()(x), atol=2e-3)


@pytest.mark.parametrize("d", [torch.float32, torch.float64], ids=str)
def test_rows_on_the_fly_give_the_same_numbers(beam: Callable[..., BeamOperator], d: torch.dtype) -> None:
    stored, flying = beam(dtype=d), beam(dtype=d, memory_mb=1e-3)
    assert stored._matrices is not None
    assert flying._matrices is None
    x, y = phantom(stored), torch.rand(stored.range.shape, dtype=d)
    for a, b in ((stored(x), flying(x)), (stored.adjoint(y), flying.adjoint(y))):
        assert float((a - b).abs().max()) <= 10 * torch.finfo(d).eps * float(a.abs().max())


def test_rows_on_the_fly_in_chunks(beam: Callable[..., BeamOperator], monkeypatch: pytest.MonkeyPatch) -> None:
    stored = beam(dtype=torch.float64)
    monkeypatch.setattr("invdiff.operators.ct.beam.CHUNK_ENTRIES", 3 * 2 * 130 * stored.detectors)
    flying = beam(dtype=torch.float64, memory_mb=1e-3)
    assert len(list(flying._chunks(torch.device("cpu")))) == 4
    x, y = phantom(stored), torch.rand(stored.range.shape, dtype=torch.float64)
    assert torch.allclose(stored(x), flying(x), rtol=1e-13)
    assert torch.allclose(stored.adjoint(y), flying.adjoint(y), rtol=1e-12)
    assert torch.allclose(stored.pinv(y), flying.pinv(y), rtol=1e-12, atol=1e-13)


def test_both_ways_to_transpose_are_the_same(beam: Callable[..., BeamOperator]) -> None:
    a = beam()
    assert a._matrices is not None
    pixels = 130 * 110
    one, two = transpose_by_counting(a._matrices[0], pixels), transpose_by_sorting(a._matrices[0], pixels)
    for left, right in zip(one, two, strict=True):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)


def test_a_long_stack_is_each_slice_alone(beam: Callable[..., BeamOperator]) -> None:
    stack, single = (beam(shape=(s, 1, 9, 8), detectors=None, dtype=torch.float64) for s in (131, 1))
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(stack.domain.shape, dtype=torch.float64, generator=generator)
    y = torch.rand(stack.range.shape, dtype=torch.float64, generator=generator)
    assert torch.allclose(stack(x), torch.cat([single(v[None]) for v in x]), rtol=1e-12)
    assert torch.allclose(stack.adjoint(y), torch.cat([single.adjoint(v[None]) for v in y]), rtol=1e-12)


# FBP


def middle(a: BeamOperator, x: Tensor, shape: Ellipse) -> Tensor:
    """The values of (h w) inside 70 % of the shape."""
    inner = shape._replace(a=0.7 * shape.a, b=0.7 * shape.b, mu=1.0)
    return x[inner.raster(a.domain.shape[2:], a.pixel_mm) == 1]


def check_quantitative(a: BeamOperator, window: str = "ram-lak", tolerance: float = 0.01) -> None:
    y = torch.stack([analytic(a, DISC), analytic(a, ELLIPSE)])[:, None].to(a.domain.dtype)
    x = fbp(a, y, window)
    for k, shape in enumerate((DISC, ELLIPSE)):
        values = middle(a, x[k, 0], shape)
        assert values.numel() > 200
        assert abs(float(values.mean()) / shape.mu - 1) < tolerance
        assert float(values.std()) / shape.mu < 2 * tolerance
        error = x[k, 0] - phantom(a)[k, 0]
        assert float(error.square().mean().sqrt()) < 0.1 * shape.mu


HALF, FULL = torch.arange(200) * math.pi / 200, torch.arange(360) * math.tau / 360
# 2 atan of the half width of the detector seen by the fan: 0.44 rad either side
SCANS = {
    "parallel half turn": lambda: parallel(angles=HALF),
    "parallel half turn, both ends": lambda: parallel(angles=torch.linspace(0, math.pi, 201)),
    "parallel full turn": lambda: parallel(angles=FULL + 0.01),
    "parallel backwards, shuffled": lambda: parallel(angles=-HALF[torch.randperm(200)]),
    "parallel golden angle": lambda: parallel(angles=torch.remainder(torch.arange(233) * 2.39996, math.tau)),
    "parallel dense and sparse": lambda: parallel(angles=torch.cat([HALF[:100], HALF[100::2]])),
    "fan full turn": lambda: fan(angles=FULL),
    "fan full turn, both ends": lambda: fan(angles=torch.linspace(0, math.tau, 361)),
    "fan short scan": lambda: fan(angles=torch.linspace(0.3, 0.3 + math.pi + 0.9, 260)),
    "fan short scan across 0, backwards": lambda: fan(angles=torch.linspace(1.9, 1.9 - math.pi - 0.9, 260)),
    "fan 300 degrees": lambda: fan(angles=torch.linspace(0.3, 0.3 + math.radians(300), 340)),
}


@pytest.mark.parametrize("name", SCANS)
def test_fbp_is_quantitative(name: str) -> None:
    check_quantitative(SCANS[name]())


def test_fbp_with_hann_is_quantitative_and_smoother(beam: Callable[..., BeamOperator]) -> None:
    a = beam(angles=FULL)
    check_quantitative(a, "hann", 0.01)
    noise = torch.randn(a.range.shape, generator=torch.Generator().manual_seed(1))
    assert float(fbp(a, noise, "hann").std()) < 0.6 * float(fbp(a, noise).std())
    assert torch.equal(a.pinv(noise), fbp(a, noise))
    with pytest.raises(ValueError, match="window"):
        fbp(a, noise, "hamming")


def test_limited_arc_sums_over_the_measured_arc_alone() -> None:
    limited = arc_of(torch.arange(60, dtype=torch.float64) * math.radians(1.5), math.pi)
    assert abs(limited.length - math.radians(90)) < 1e-9
    assert torch.allclose(limited.shares, torch.full((60,), math.radians(1.5), dtype=torch.float64))
    few = arc_of(torch.arange(8, dtype=torch.float64) * math.pi / 8, math.pi)
    assert few.length == math.pi
    assert torch.allclose(few.shares, torch.full((8,), math.pi / 8, dtype=torch.float64))
    for period in (math.pi, math.tau):
        single = arc_of(torch.tensor([0.7], dtype=torch.float64), period)
        assert abs(float(single.shares.sum()) - period) < 1e-12
        repeated = arc_of(torch.tensor([0.7, 0.7, 0.7 + period], dtype=torch.float64), period)
        assert abs(float(repeated.shares.sum()) - period) < 1e-12


# ASTRA


@pytest.mark.parametrize("offset", [0.0, 1.37])
@pytest.mark.parametrize(("kind", "name", "tolerance"), [("parallel", "linear", 1e-4), ("fan", "line_fanflat", 0.01)])
def test_projection_against_astra(kind: str, name: str, tolerance: float, offset: float) -> None:
    astra = pytest.importorskip("astra", reason="astra-toolbox (extra [astra]) is not installed")
    from invdiff.operators.ct.astra_engine import astra_geometries

    a = BEAMS[kind](detector_offset_mm=offset)
    volume, projection = astra_geometries(a, vectors=offset != 0)
    projector = astra.create_projector(name, projection, volume)
    x = phantom(a)
    for k in range(2):
        number, sinogram = astra.create_sino(x[k, 0].numpy(), projector)
        astra.data2d.delete(number)
        ours, theirs = a(x)[k, 0], torch.from_numpy(sinogram)
        assert torch.linalg.vector_norm(ours - theirs) < tolerance * torch.linalg.vector_norm(theirs)
    astra.projector.delete(projector)


def test_fbp_against_astra() -> None:
    pytest.importorskip("astra", reason="astra-toolbox (extra [astra]) is not installed")
    from invdiff.operators.ct.astra_engine import astra_fbp

    a = parallel(angles=HALF, detector_offset_mm=0.0)
    y = a(phantom(a))
    kept = y.clone()
    theirs, ours = astra_fbp(a, y), fbp(a, y)
    assert torch.equal(y, kept)
    for k, shape in enumerate((DISC, ELLIPSE)):
        difference = middle(a, theirs[k, 0] - ours[k, 0], shape)
        assert float(difference.abs().mean()) < 0.01 * shape.mu


def test_astra_fbp_refuses_what_it_would_get_wrong() -> None:
    pytest.importorskip("astra", reason="astra-toolbox (extra [astra]) is not installed")
    from invdiff.operators.ct.astra_engine import astra_fbp

    for a, words in (
        (parallel(angles=HALF), "detector_offset_mm"),
        (parallel(angles=HALF[:90], detector_offset_mm=0.0), "evenly"),
        (fan(angles=FULL, detector_offset_mm=0.0), "needs a GPU"),
    ):
        with pytest.raises(ValueError, match=words):
            astra_fbp(a, torch.zeros(a.range.shape))


# what bad input gets


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"angles": [0.0, 90.0]}, "degrees"),
        ({"angles": [-4.0, 4.0]}, "degrees"),
        ({"angles": []}, "at least one"),
        ({"angles": [0.0, math.nan]}, "finite"),
        ({"shape": (2, 130, 110)}, "s c h w"),
        ({"shape": (2, 0, 130, 110)}, "at least 1"),
        ({"detectors": 0}, "detectors is 0"),
        ({"pixel_mm": 0.0}, "pixel_mm is 0"),
        ({"detector_mm": -1.0}, "detector_mm is -1"),
        ({"detector_offset_mm": math.inf}, "detector_offset_mm is inf"),
        ({"dtype": torch.complex64}, "complex64"),
        ({"dtype": "float3"}, "float3"),
        ({"memory_mb": 0}, "memory_mb is 0"),
    ],
)
def test_bad_input_is_refused(beam: Callable[..., BeamOperator], changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        beam(**changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"source_origin_mm": 51.0}, "source_origin_mm is 51"), ({"source_detector_mm": 120.0}, "at least source_origin")],
)
def test_bad_fan_is_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fan(**changes)


def test_angles_beyond_a_turn_are_taken_when_asked_for() -> None:
    x = phantom(parallel())
    once, again = parallel(angles=[0.3, 1.1]), parallel(angles=[0.3 + 4 * math.tau, 1.1 - math.tau], multi_turn=True)
    assert torch.allclose(once(x), again(x), atol=1e-5)
    assert again.split([1]).angles.tolist() == [1.1 - math.tau]
