"""What MR scans need on the way from k-space to an image: phase, scale and channels; and simulated scans."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from invdiff.datasets import Measurements, Volume
from invdiff.fourier import centred_fft
from invdiff.measured import MeasuredInfo
from invdiff.noise import KeyedNoise
from invdiff.operators import CartesianMRI, KnownPhase, RealChannels
from invdiff.operators.mri.calibration import (
    QUANTILE,
    Region,
    check_maps,
    filled_maps,
    find_acs,
    image_scale,
    low_resolution_phase,
)
from invdiff.operators.mri.espirit import espirit_maps
from invdiff.operators.mri.grappa import grappa
from invdiff.operators.mri.simulate import birdcage_maps, simulate_kspace, smooth_phase
from invdiff.priors import MagnitudePhase, NoPrior, Rescaled
from invdiff.protocols import Prior
from invdiff.samplers import CGLS, FBP, SENSE, TV, L1Wavelet, ZeroFilled

CHANNELS = ("magnitude", "complex")
MASKS = ("uniform", "random", "equispaced", "poisson", "radial")
PRIOR_FREE = (FBP, CGLS, TV, ZeroFilled, SENSE, L1Wavelet)
CENTRE = 0.125  # share of either axis of k-space whose image gives the phase, where no grid says what was sampled
LEAST_HALF = 6  # of its width, samples: in a small image that share is too blurred for a phase that varies
PHASE_LINES = 4  # fewer lines about the centre of k-space say nothing of the phase
SENSE_RHO, SENSE_STEPS = 1e-2, 20  # of the image that says it then; the normal operator's norm is at most 1
UNIT = "a.u."


@dataclass(frozen=True)
class MRIConfig:
    """How an MR image is made real for a prior.

    Args:
        channels: ``magnitude``, one channel under the phase of the low-resolution image, which then is fixed; or
            ``complex``, real and imaginary part, the prior on the magnitude under a smooth phase that is estimated
            from the image at every step.
        deviation: of the imaginary part after turning, prior units, for ``complex``; see ``MagnitudePhase``.
        width: of the narrowest low pass of the phase, pixels, for ``complex``.
        quantile: of the zero-filled image that is 1 in the prior's a.u.
        grappa: complete a Cartesian scan's k-space by GRAPPA before anything else, for prior-free samplers:
            ``zero-filled`` is then the GRAPPA image.
    """

    channels: str = "magnitude"
    deviation: float = 0.02
    width: float = 5.0
    quantile: float = QUANTILE
    grappa: bool = False

    def __post_init__(self) -> None:
        if self.channels not in CHANNELS:
            raise ValueError(f"mri.channels is {self.channels!r}; one of {', '.join(CHANNELS)} is wanted")


class Way(NamedTuple):
    """From a scan to images that a sampler sees, and back.

    operator: on real images; wrap: a prior in its own unit to one of them in the scanner's; record: how; phase: in
    radians (s 1 h w), of one channel, None for two; first: the zero-filled magnitude (s 1 h w), in the scanner's unit.
    """

    operator: Any
    wrap: Callable[[Prior], Prior]
    record: dict[str, Any]
    phase: Tensor | None
    first: Tensor

    def magnitude(self, x: Tensor) -> Tensor:
        """The magnitude (s 1 h w) of a result (s c h w)."""
        return x.abs() if self.phase is not None else torch.hypot(x[:, :1], x[:, 1:])

    def angle(self, x: Tensor) -> Tensor:
        """The phase (s 1 h w) of a result, in radians, within [-pi, pi]."""
        if self.phase is None:
            return torch.atan2(x[:, 1:], x[:, :1])
        turned = torch.polar(torch.ones_like(x), self.phase.to(x)) * torch.where(x < 0, -1.0, 1.0)
        return turned.angle()


def completed(scan: Measurements, sampler: Any) -> Measurements:
    """The scan with k-space filled by GRAPPA, its mask full.

    Raises:
        ValueError: a scan that is not Cartesian, a sampler that weighs the data, or anything that ``grappa`` refuses.
    """
    if scan.kind != CartesianMRI.kind or not isinstance(sampler, PRIOR_FREE):
        raise ValueError(
            "mri.grappa is for cartesian-mri and prior-free samplers; "
            f"this is {scan.kind} with {type(sampler).__name__}"
        )
    mask = scan.fields["mask"]
    return replace(scan, y=grappa(scan.y, mask), fields={**scan.fields, "mask": torch.ones_like(mask)})


def as_seen_by(scan: Measurements, sampler: Any, how: MRIConfig | None = None) -> Measurements:
    """The scan as a sampler is to have it: completed by GRAPPA if asked, and for generative ones with maps everywhere.

    Those maps are ``filled_maps``; prior-free samplers keep maps that are cut to the body: for them outside is zero,
    which helps them.

    Raises:
        ValueError: maps that are not normalised, or anything that ``completed`` refuses.
    """
    if how is not None and how.grappa:
        scan = completed(scan, sampler)
    maps = scan.fields.get("maps")
    if not isinstance(maps, Tensor):
        return scan
    check_maps(maps)
    whole = maps if isinstance(sampler, PRIOR_FREE) else filled_maps(maps)
    return replace(scan, fields={**scan.fields, "maps": whole})


def way_of(
    scan: Measurements, operator: Any, y: Tensor, sampler: Any, asked: MRIConfig | None, several: bool
) -> Way | None:
    """How a scan of complex images is reconstructed; None for a scan of real ones.

    Args:
        scan: as read.
        operator: of it, whitened where the scan says so, on complex images.
        y: its measurements, whitened where the operator is.
        sampler: that will run; the prior-free ones get a range about zero and no prior.
        asked: channels and scale, ``MRIConfig()`` if None.
        several: whether samples are summed up or the image is split, which is for one channel.

    Raises:
        ValueError: measurements without signal, or settings that do not fit the scan or each other; from ``wrap``, a
            prior that is not of MR images.
    """
    if not operator.domain.dtype.is_complex:
        if asked is not None:
            raise ValueError(f"the table mri is for scans of complex images; this one is of kind {scan.kind!r}")
        return None
    how = MRIConfig() if asked is None else asked
    if several and how.channels != "magnitude":
        raise ValueError(
            f"samples and the split are of one channel; mri.channels is {how.channels!r}, 'magnitude' is wanted"
        )
    first = operator.zero_filled(y)
    scale = image_scale(first, how.quantile)
    wanted = how.channels
    phase = _phase_of(scan, operator, y, first)[:, None] if wanted == "magnitude" else None
    adaptor = RealChannels(operator.domain.shape) if phase is None else KnownPhase(phase[:, 0].cpu())
    record = {"channels": wanted, "scale": scale, "quantile": how.quantile, "unit": scan.unit, "grappa": how.grappa}
    if wanted == "complex":
        record |= {"deviation": how.deviation, "width": how.width}
    wrap = partial(_prior_of, sampler=sampler, scale=scale, how=how)
    return Way(operator @ adaptor, wrap, record, phase, first.abs())


def _prior_of(prior: Prior, sampler: Any, scale: float, how: MRIConfig) -> Prior:
    """The prior in the scanner's unit, for the channels; only a range for samplers and priors without one."""
    info = prior.info  # type: ignore[attr-defined]
    if isinstance(sampler, PRIOR_FREE) or isinstance(prior, NoPrior):
        return NoPrior(UNIT, -scale / 2, scale / 2, 1 if how.channels == "magnitude" else 2)
    if info.unit != UNIT:
        raise ValueError(f"the prior {info.name!r} is in {info.unit}, the scan in {UNIT}; an MR prior is wanted")
    scaled = Rescaled(prior, scale)
    if isinstance(info, MeasuredInfo):  # it was trained on these very channels
        return scaled
    return scaled if how.channels == "magnitude" else MagnitudePhase(scaled, how.deviation, how.width)


def _phase_of(scan: Measurements, operator: Any, y: Tensor, first: Tensor) -> Tensor:
    """The phase (s h w) of the low-resolution image: of the calibration lines on a grid, else of a first image.

    On a grid without such lines that is a SENSE image: the zero-filled one is folded.
    """
    mask, maps = scan.fields.get("mask"), scan.fields.get("maps")
    if isinstance(mask, Tensor) and scan.y.shape[-2:] == mask.shape[-2:] == first.shape[-2:]:
        region = _calibration_lines(mask)
        if region is not None:
            return low_resolution_phase(scan.y, region, maps)
        first = operator.solve(operator.adjoint(y), SENSE_RHO, iterations=SENSE_STEPS)
    h, w = first.shape[-2:]
    half = [min(max(LEAST_HALF, round(CENTRE * n / 2)), n // 2) for n in (h, w)]
    centre = Region(h // 2 - half[0], h // 2 + half[0], w // 2 - half[1], w // 2 + half[1])
    return low_resolution_phase(centred_fft(first), centre).cpu()


def _calibration_lines(mask: Tensor) -> Region | None:
    """The fully sampled centre of k-space, if it is wide enough for a phase."""
    try:
        region = find_acs(mask)
    except ValueError:
        return None
    return region if min(region.bottom - region.top, region.right - region.left) >= PHASE_LINES else None


@dataclass(frozen=True)
class MRSimulation:
    """How a magnitude volume is scanned.

    Args:
        acceleration: samples of the full grid to one that is taken.
        coils: on a circle about the image.
        mask: uniform, random, equispaced, poisson or radial, of ``invdiff.operators.mri.masks``.
        centre: share of lines in the fully sampled centre.
        noise: standard deviation of a real component in percent of the volume's scale (its 99.9 % quantile).
        phase: whether the image has a smooth random phase.
        true_maps: store the coils as simulated, not as ESPIRiT finds them in the noisy centre.
        seed: of mask, phase and noise.
    """

    acceleration: float = 4.0
    coils: int = 8
    mask: str = "equispaced"
    centre: float = 0.08
    noise: float = 1.0
    phase: bool = True
    true_maps: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.mask not in MASKS:
            raise ValueError(f"no mask {self.mask!r}; one of {', '.join(MASKS)} is wanted")
        if not (math.isfinite(self.acceleration) and self.acceleration >= 1):
            raise ValueError(f"the acceleration is {self.acceleration}; at least 1 is wanted")
        if self.coils < 1:
            raise ValueError(f"{self.coils} coils; at least 1 is wanted")
        if not 0 < self.centre <= 1:
            raise ValueError(f"the centre is {self.centre} of the lines; above 0 and at most 1 is wanted")
        if not (math.isfinite(self.noise) and self.noise >= 0):
            raise ValueError(f"noise is {self.noise} percent; zero or more is wanted")


def simulate(volume: Volume, how: MRSimulation, mask: Tensor | None = None) -> tuple[Measurements, Volume]:
    """Scan a magnitude volume; also the truth, which is the volume without negative values.

    The same grid is used for both, unlike for CT: the samples of an MR scan are the image's Fourier coefficients. What
    the reconstruction does not know is the phase, the noise and, unless ``true_maps``, the coils.

    Args:
        volume: in a.u.
        how: coils, noise and all else.
        mask: (h w) bool in the place of the one that ``how`` names.

    Raises:
        ValueError: a volume that is not in a.u., or a centre that is too small for ESPIRiT.
    """
    if volume.unit != UNIT:
        raise ValueError(f"the volume is in {volume.unit}; MR is simulated from {UNIT}")
    truth = replace(volume, data=volume.data.clamp_min(0))
    s, _, h, w = truth.data.shape
    taken = mask_of(how, (h, w)) if mask is None else mask
    coils = birdcage_maps(how.coils, (h, w))
    sigma = how.noise / 100 * image_scale(truth.data)
    phase = smooth_phase((h, w), how.seed) if how.phase else None
    operator = CartesianMRI(taken, coils, slices=s)
    y = simulate_kspace(truth.data, operator, phase, sigma, KeyedNoise(how.seed))
    maps = coils
    if not how.true_maps:
        acs = find_acs(taken).of(y)
        maps = espirit_maps(acs, (h, w)).maps[0] if how.coils > 1 else torch.ones_like(coils)
    fields = CartesianMRI(taken, maps, slices=s).fields()
    sha = str(volume.source.get("sha256", ""))
    scan = Measurements(
        y, "cartesian-mri", fields, truth.affine, UNIT, sigma, simulated=True, source_sha256=sha, storage=truth.storage
    )
    return scan, truth


def mask_of(how: MRSimulation, shape: tuple[int, int]) -> Tensor:
    """The sampling mask (h w), bool, that a simulation names; lines are read along rows' axis h.

    Raises:
        ValueError: no such kind, or an acceleration and a centre that do not go together.
    """
    from invdiff.operators.mri import masks

    R, centre, seed = how.acceleration, how.centre, how.seed
    if how.mask == "uniform" and round(R) != R:
        raise ValueError(f"the acceleration of a uniform mask is {R}; a whole number is wanted")
    makers: dict[str, Callable[[], Tensor]] = {
        "uniform": lambda: masks.uniform_mask(shape, round(R), centre),
        "random": lambda: masks.random_mask(shape, R, centre, seed),
        "equispaced": lambda: masks.equispaced_mask(shape, R, centre, seed),
        "poisson": lambda: masks.poisson_mask(shape, R, centre, seed),
        "radial": lambda: masks.radial_mask(shape, R, seed),
    }
    return makers[how.mask]()


def picture_row(way: Way, volume: Volume, truth: Volume | None, name: str) -> Mapping[str, Tensor]:
    """The middle slice (h w) of the truth where known, of the zero-filled image and of ours, in that order."""
    middle = volume.data.shape[0] // 2
    row = {} if truth is None else {"truth": truth.data[middle, 0]}
    return {**row, "zero-filled": way.first[middle, 0].cpu(), name: volume.data[middle, 0]}
