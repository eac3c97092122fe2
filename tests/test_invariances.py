"""Scale that nobody guesses: a perfect denoiser gives the truth, and the answer moves with the problem."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import invdiff
from invdiff.config import find, registered
from invdiff.metrics import psnr
from invdiff.noise import KeyedNoise
from invdiff.operators import CartesianMRI, Mask, ParallelBeam, RealChannels
from invdiff.priors import GaussianPrior, PriorInfo
from invdiff.problem import Prepared, prepare
from invdiff.protocols import Noise, Space
from invdiff.run import iterate, last
from invdiff.samplers import (
    CGLS,
    DAPS,
    DDNM,
    DDS,
    DPS,
    FBP,
    SENSE,
    TV,
    CoPaint,
    DiffPIR,
    DiffusionMBIR,
    L1Wavelet,
    PiGDM,
    REDDiff,
    RePaint,
    Solver,
    SplitGibbs,
)
from invdiff.units import MU_WATER, mu_from_hu

# Every sampler that reconstructs, with a short run down to sigma_min 1e-4. A term across slices biases even a perfect
# denoiser (see DDS), and is left out.
ORACLE: dict[str, Any] = {
    "dds": DDS(steps=8, lam=0.0, sigma_min=1e-4),
    "reddiff": REDDiff(steps=30, sigma_min=1e-4),
    "diffusionmbir": DiffusionMBIR(steps=20, lam=0.0, sigma_min=1e-4),
    "dps": DPS(steps=8, sigma_min=1e-4),
    "pigdm": PiGDM(steps=8, sigma_min=1e-4),
    "diffpir": DiffPIR(steps=8, sigma_min=1e-4),
    "ddnm": DDNM(steps=8, sigma_min=1e-4),
    "repaint": RePaint(levels=6, jump=2, repeats=2, sigma_min=1e-4),
    "copaint": CoPaint(steps=6, sigma_min=1e-4),
    "daps": DAPS(steps=8, sigma_min=1e-4),
    "split-gibbs": SplitGibbs(steps=12, keep=2, rho_min=1e-4),
}
# No denoiser: no oracle
PRIOR_FREE: dict[str, Any] = {
    "fbp": FBP(),
    "cgls": CGLS(steps=4),
    "tv": TV(steps=20),
    "sense": SENSE(steps=6),
    "l1wavelet": L1Wavelet(steps=12, levels=2),
}
# Short runs for the metamorphic tests. Badly conditioned CG amplifies the rounding of float32 (to 6e-4 at worst here,
# and to 1e-12 in float64): with these steps the scale alone is seen
SHORT: dict[str, Any] = {
    "dds": DDS(steps=6),
    "dds, uncoupled": DDS(steps=6, lam=0.0),
    "dds, haar": DDS(steps=6, coupling="haar"),
    "reddiff": REDDiff(steps=8, z_lam=0.5),
    "reddiff, adam": REDDiff(steps=12, newton_steps=0, order="mini-batch"),
    "diffusionmbir": DiffusionMBIR(steps=12),
    "dps": DPS(steps=10, scale=0.5),
    "pigdm": PiGDM(steps=12, move="ddim"),
    "diffpir": DiffPIR(steps=6, cg_steps=8),
    "ddnm": DDNM(steps=6, cg_steps=5),
    "repaint": RePaint(levels=4, jump=2, repeats=2, cg_steps=5),
    "copaint": CoPaint(steps=4),
    "daps": DAPS(steps=5, cg_steps=8),
    "daps, langevin": DAPS(steps=4, langevin_steps=8),
    "split-gibbs": SplitGibbs(steps=6, keep=2, cg_steps=8),
    **PRIOR_FREE,
}
COUPLED = (
    "dds",
    "dds, haar",
    "reddiff",
    "diffusionmbir",
    "tv",
)  # DiffusionMBIR's rho does at any lam
TOLERANCE = 1e-4  # of the image's span
FACTORS = (1e-3, 1e3)


def test_every_reconstructing_sampler_is_held_to_this() -> None:
    kinds = {k for k in registered("samplers") if not issubclass(find("samplers", k), Solver)}
    adjoint = "zero-filled"  # is A^H y: a picture of k-space, and of a sinogram one whose residual is a diverged run's
    models = {"forward-model", "one-step"}  # want a model of scans, not a prior: test_forward_models.py
    assert kinds - {adjoint, *models} == {*ORACLE, *PRIOR_FREE} == {name.partition(",")[0] for name in SHORT}
    assert all(find("samplers", k).estimate == "point estimate" for k in PRIOR_FREE)


class Oracle:
    """Knows the truth, whatever it is asked."""

    def __init__(self, truth: Tensor, unit: str, low: float, high: float) -> None:
        self.info = PriorInfo("oracle", unit, low, high, 1e-6, 1e3, 0.5, (0.0, 0.0))
        self.channels, self.truth = truth.shape[1], self.info.in_prior_units(truth)

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.truth + 0 * x


@dataclass(frozen=True)
class Case:
    operator: Any
    truth: Tensor
    y: Tensor
    prior: Oracle
    span: float


def complex_mri() -> Case:
    """Three coils, a random mask, an image of size 1e-4 as scanners give."""
    g = torch.Generator().manual_seed(0)
    truth = 3e-5 * torch.randn(3, 2, 18, 22, generator=g)
    maps = torch.randn(3, 18, 22, generator=g, dtype=torch.complex64)
    mask = torch.rand(18, 22, generator=g) < 0.4
    operator = CartesianMRI(mask, maps, slices=3) @ RealChannels((3, 1, 18, 22))
    return Case(operator, truth, operator(truth), Oracle(truth, "a.u.", -1e-4, 1e-4), 2e-4)


def hu_ct() -> Case:
    """Tissue in air with a pixel of metal, far beyond the prior's range."""
    g = torch.Generator().manual_seed(1)
    truth = torch.full((3, 1, 20, 24), -1000.0)
    truth[:, :, 4:16, 5:19] = 40 + 20 * torch.randn(3, 1, 12, 14, generator=g)
    truth[:, 0, 8, 9] = 4000.0
    operator = ParallelBeam(tuple(truth.shape), [k * math.pi / 7 for k in range(7)], pixel_mm=1.7)
    return Case(operator, truth, operator(mu_from_hu(truth)), Oracle(truth, "HU", -1000.0, 2000.0), 3000.0)


def zero_to_two() -> Case:
    g = torch.Generator().manual_seed(2)
    truth = 2 * torch.rand(3, 1, 14, 17, generator=g)
    operator = Mask(torch.rand(14, 17, generator=g) < 0.5, truth.shape)
    return Case(operator, truth, operator(truth), Oracle(truth, "", 0.0, 2.0), 2.0)


@pytest.mark.parametrize("world", [complex_mri, hu_ct, zero_to_two])
@pytest.mark.parametrize("kind", ORACLE)
def test_a_perfect_denoiser_gives_the_truth(kind: str, world: Callable[[], Case]) -> None:
    case = world()
    x = invdiff.reconstruct(case.y, case.operator, case.prior, ORACLE[kind]).x
    assert psnr(x.double().numpy(), case.truth.double().numpy(), case.span) >= 60


@pytest.mark.parametrize("kind", ["dds", "reddiff", "ddnm", "diffpir"])
def test_a_clamp_would_be_seen(kind: str) -> None:
    """The same with a denoiser that clamps to its range: the metal is lost."""
    case = hu_ct()
    case.prior.truth = case.prior.truth.clamp(-1, 1)
    x = invdiff.reconstruct(case.y, case.operator, case.prior, ORACLE[kind]).x
    assert psnr(x.double().numpy(), case.truth.double().numpy(), case.span) < 60


# Metamorphic: a square image under 7 views, a smooth Gaussian prior

SIDE = 12
SHAPE = (4, 1, SIDE, SIDE)
SIGMA = 0.05  # of line integrals of about 1


class Ranged(GaussianPrior):
    """A Gaussian process in prior units, over a stated physical range."""

    info: PriorInfo


def gaussian(unit: str = "HU", low: float = -1000.0, high: float = 2000.0) -> Ranged:
    prior = Ranged.smooth((1, SIDE, SIDE), length=1.5, deviation=0.4)
    assert isinstance(prior, Ranged)
    prior.info = PriorInfo("gaussian", unit, low, high, 1e-6, 1e3, 0.5, (0.0, 0.0))
    return prior


def beam(turned: float = 0.0) -> ParallelBeam:
    return ParallelBeam(SHAPE, [0.1 + turned + k * math.pi / 7 for k in range(7)], detectors=19, pixel_mm=1.7)


def unitless() -> Any:
    """The same geometry on images of any unit."""
    return beam() @ Mask(torch.ones(SIDE, SIDE), SHAPE)


def measured(operator: Any, image: Tensor, sigma: float) -> Tensor:
    y: Tensor = operator(image)
    return y + sigma * torch.randn(y.shape, generator=torch.Generator().manual_seed(3))


def moved(got: Tensor, wanted: Tensor) -> float:
    """Largest difference over the span of what is wanted."""
    return float((got - wanted).abs().max() / (wanted.max() - wanted.min()))


@pytest.mark.parametrize("kind", SHORT)
def test_the_scale_of_y_and_a_does_not_matter(kind: str) -> None:
    """y, A and sigma_y times c: the same image."""
    prior, operator, sampler = gaussian(), beam(), SHORT[kind]
    truth = prior.info.in_physical_units(prior.draw(4, KeyedNoise(5)))
    y = measured(operator, mu_from_hu(truth), SIGMA)
    x = invdiff.reconstruct(y, operator, prior, sampler, SIGMA).x
    for c in FACTORS:
        assert moved(invdiff.reconstruct(c * y, c * operator, prior, sampler, c * SIGMA).x, x) < TOLERANCE


@pytest.mark.parametrize("kind", SHORT)
def test_the_image_moves_with_its_unit(kind: str) -> None:
    """The prior's range times c: with y times c, and with A over c instead, the image times c."""
    prior, operator, sampler = gaussian("a.u.", 0.0, 2.0), unitless(), SHORT[kind]
    y = measured(operator, prior.info.in_physical_units(prior.draw(4, KeyedNoise(5))), sigma := 3.0)
    x = invdiff.reconstruct(y, operator, prior, sampler, sigma).x
    for c in FACTORS:
        other = gaussian("a.u.", 0.0, 2.0 * c)
        assert moved(invdiff.reconstruct(c * y, operator, other, sampler, c * sigma).x / c, x) < TOLERANCE
        assert moved(invdiff.reconstruct(y, operator / c, other, sampler, sigma).x / c, x) < TOLERANCE


@pytest.mark.parametrize("kind", sorted(set(SHORT) - {"fbp"}))
def test_the_image_moves_with_a_constant(kind: str) -> None:
    """The prior's range and the body 500 HU up: the image 500 HU up. Not FBP's, whose air stays where it is."""
    prior, operator, sampler, up = gaussian(), beam(), SHORT[kind], 500.0
    y = measured(operator, mu_from_hu(prior.info.in_physical_units(prior.draw(4, KeyedNoise(5)))), SIGMA)
    x = invdiff.reconstruct(y, operator, prior, sampler, SIGMA).x
    shifted = y + operator(torch.full(SHAPE, MU_WATER * up / 1000))
    got = invdiff.reconstruct(shifted, operator, gaussian(low=up - 1000.0, high=up + 2000.0), sampler, SIGMA).x
    assert moved(got - up, x) < TOLERANCE


def test_fbp_does_not_know_the_priors_range() -> None:
    """Air stays where it is: other ranges, the same image, of all angles and of a wedge of them."""
    operator = beam()
    y = measured(operator, mu_from_hu(gaussian().info.in_physical_units(gaussian().draw(4, KeyedNoise(5)))), SIGMA)
    for index in (operator.views, operator.views[: len(operator.views) // 3]):
        part, seen = operator.split(index), operator.part(y, index)
        x, other = (
            invdiff.reconstruct(seen, part, gaussian(low=low, high=high), FBP(), SIGMA).x
            for low, high in ((-1000.0, 2000.0), (-300.0, 900.0))
        )
        assert moved(other, x) < TOLERANCE


@dataclass(frozen=True)
class Changed:
    """Keyed noise, changed: as an image where it is one, else as a sinogram."""

    image: Callable[[Tensor], Tensor]
    sinogram: Callable[[Tensor], Tensor] = lambda n: n
    inner: ClassVar[KeyedNoise] = KeyedNoise(0)

    def __call__(self, step: int, like: Tensor, draw: int = 0) -> Tensor:
        n = self.inner(step, like, draw)
        return self.image(n) if like.shape == Space(SHAPE, like.dtype).shape else self.sinogram(n)

    def uniform(self, step: int, draw: int = 0) -> float:
        return self.inner.uniform(step, draw)


def problem_of(y: Tensor, operator: Any, noise: Noise) -> Prepared:
    return prepare(y, operator, gaussian(), SIGMA, noise)


@pytest.mark.parametrize("kind", SHORT)
def test_slices_move_with_their_noise(kind: str) -> None:
    """Any order where they are uncoupled, the reverse order where they are coupled."""
    sampler, operator = SHORT[kind], beam()
    if kind == "reddiff, adam":  # its noise levels are drawn by KeyedNoise alone
        sampler = replace(sampler, order="descending")
    prior = gaussian()
    y = measured(operator, mu_from_hu(prior.info.in_physical_units(prior.draw(4, KeyedNoise(5)))), SIGMA)
    order = [3, 2, 1, 0] if kind in COUPLED else [2, 0, 3, 1]

    def permuted(v: Tensor) -> Tensor:
        return v[order]

    x = last(iterate(sampler, problem_of(y, operator, KeyedNoise(0)).problem)).x
    got = last(iterate(sampler, problem_of(y[order], operator, Changed(permuted, permuted)).problem)).x
    assert moved(got, x[order]) < TOLERANCE
    if "fbp" not in kind and kind not in PRIOR_FREE:  # without their noise keys they would not
        other = last(iterate(sampler, problem_of(y[order], operator, KeyedNoise(0)).problem)).x
        assert moved(other, x[order]) > TOLERANCE


@pytest.mark.parametrize("kind", [k for k in SHORT if k not in ("tv", "l1wavelet")])
def test_the_image_turns_with_the_geometry(kind: str) -> None:
    """Every angle 90 degrees on, the same sinogram: the image turned. Not TV, whose forward differences prefer two
    of the four directions, nor wavelets, whose grid begins in a corner."""
    sampler = SHORT[kind]
    if kind == "reddiff, adam":
        sampler = replace(sampler, order="descending")
    prior = gaussian()
    y = measured(beam(), mu_from_hu(prior.info.in_physical_units(prior.draw(4, KeyedNoise(5)))), SIGMA)

    def turned(v: Tensor) -> Tensor:
        return v.rot90(1, (-2, -1))

    x = last(iterate(sampler, problem_of(y, beam(), KeyedNoise(0)).problem)).x
    got = last(iterate(sampler, problem_of(y, beam(math.pi / 2), Changed(turned)).problem)).x
    assert moved(got, turned(x)) < TOLERANCE
    assert moved(got, x) > 0.01
