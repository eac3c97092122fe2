"""What a reconstruction will take in memory, before it takes it, and how many slices the network takes at once.

A run's tensors grow with the number of slices and nothing else: two slices of the scan's size are run for a few steps
with a stand-in for the projector and for the network, and their tensors counted; one and two slices go through the
network. What a projector keeps is an estimate of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from invdiff.config import find
from invdiff.datasets import Measurements
from invdiff.invented import Split, measured_or_invented
from invdiff.measured import MeasuredInfo
from invdiff.operators import Mask, Whitened
from invdiff.operators.ct.beam import MEMORY_MB, BeamOperator
from invdiff.operators.linear import LinearOperatorBase
from invdiff.pipelines.memory import OWN_BYTES, Tally, free_bytes, out_of_memory
from invdiff.priors import Chunked, NoPrior
from invdiff.problem import Prepared, prepare, prior_to_operator
from invdiff.protocols import Prior, Space
from invdiff.run import iterate, residual_norms
from invdiff.uncertainty import BestOf, Gather, Spread

FEW = 2  # slices that are counted
STEPS = 3  # of the sampler that are counted
SIGMA_Y = 0.01  # noise, prior units, at which every sampler does all that it may have to
LEVEL = 1.0  # noise level, prior units, at which the network is tried
TINY_MB = 1e-6  # of the projector's memory: none of its matrices is built
HELD_SHARE = 1.5  # measured, where freed images stay with the allocator
AUTO_SHARE = 0.5  # of the free memory, at most, where the chunk is to be found
GB = 1e9


class Outline(LinearOperatorBase):
    """Stands in for an operator: its shapes and the copies that a projector makes, no physics."""

    def __init__(self, domain: Space, range_: Space, unit: str) -> None:
        self.domain, self.range, self.unit = domain, range_, unit

    def _forward(self, x: Tensor) -> Tensor:
        return self._copy(x, self.range)

    def _adjoint(self, y: Tensor) -> Tensor:
        return self._copy(y, self.domain)

    def pinv(self, y: Tensor) -> Tensor:
        """The adjoint."""
        return self.adjoint(y)

    def whole(self, views: int) -> Outline:  # noqa: ARG002
        """As large as what was measured."""
        return self

    unmeasured = whole

    def _copy(self, v: Tensor, space: Space) -> Tensor:
        if v.is_complex() != space.dtype.is_complex:
            v = v.real if v.is_complex() else torch.complex(v, torch.zeros_like(v))
        flat, size = v.flatten(1).clone(), math.prod(space.shape[1:])
        kept = flat[:, :size]
        product = torch.cat([kept, kept.new_zeros(len(kept), size - kept.shape[1])], 1)
        return torch.cat([product]).reshape(space.shape)


@dataclass
class StandIn:
    """Stands in for a prior, white noise of deviation 1: notes what is alive when it is called."""

    prior: Prior
    tally: Tally
    alive: int = 0
    differentiated: bool = False
    info: Any = field(init=False)
    channels: int = field(init=False)

    def __post_init__(self) -> None:
        info, self.channels = self.prior.info, self.prior.channels  # type: ignore[attr-defined]
        self.info = replace(info, sigma_y=(0.0, math.inf)) if isinstance(info, MeasuredInfo) else info

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """x / (1 + sigma^2)."""
        self.alive = max(self.alive, self.tally.alive)
        self.differentiated |= x.requires_grad
        return x / (1 + sigma.square()).view(-1, 1, 1, 1)


@dataclass(frozen=True)
class Volume:
    """Bytes of a run's tensors, each a slice.

    Args:
        peak: the most at once.
        at_denoiser: when the network is called.
        at_end: when the image is written.
        differentiated: the sampler differentiates the network, so that activations of all slices are alive.
    """

    peak: float
    at_denoiser: float
    at_end: float
    differentiated: bool


@dataclass(frozen=True)
class Work:
    """What is done with a scan.

    Args:
        sampler: whose states there are.
        wrapped: what is made of the chunked prior.
        gather: what becomes of several samples, None for one run.
        split: how measured and invented are told apart, if so.
    """

    sampler: Any
    wrapped: Callable[[Prior], Prior] = lambda prior: prior
    gather: Gather | None = None
    split: Split | None = None


def volume_of(work: Work, prior: Prior, operator: Outline, sqrt_w: Tensor | None, keep: Tensor | None = None) -> Volume:
    """Count the tensors of a short run.

    Args:
        work: what is run.
        prior: states range and unit; it is not called.
        operator: of a few slices.
        sqrt_w: ray weights of these slices, or None.
        keep: what was measured of these slices, with the axes of y, or None for all.
    """
    s = operator.domain.shape[0]
    with Tally() as tally:
        stand_in = StandIn(prior, tally)
        y = torch.ones(operator.range.shape, dtype=operator.range.dtype)
        whole: Any = operator if keep is None else Mask(keep, *operator.range) @ operator
        whole = whole if sqrt_w is None else Whitened(whole, sqrt_w)
        y = y if sqrt_w is None else sqrt_w * y
        sigma_y = SIGMA_Y * prior_to_operator(prior, operator)[1].scale  # of an operator of norm 1
        prepared = prepare(y, whole, work.wrapped(Chunked(stand_in, 1)), sigma_y)
        image, kept = _short_run(work, prepared)
        if work.split is not None:
            few = replace(work.split, iterations=FEW, probes=min(work.split.probes, 1))
            kept += measured_or_invented(image, whole, prior, sigma_y, few)[:-1]
        end = tally.alive
        del image, kept
    return Volume(tally.peak / s, stand_in.alive / s, end / s, stand_in.differentiated)


def _short_run(work: Work, prepared: Prepared) -> tuple[Tensor, tuple[Any, ...]]:
    """The image of a few steps and what else is kept to the end, both of the work's whole making."""
    problem, kept = prepared.problem, None
    gather: Any = work.gather
    if gather is not None:
        gather = replace(gather, density=0.0) if isinstance(gather, BestOf) else gather
        kept = gather.start(problem)
        for _ in range(2):  # what it starts with may share memory
            kept = gather.add(problem, kept, torch.zeros(problem.operator.domain.shape))
    for state in islice(iterate(work.sampler, problem), STEPS):
        residual_norms(problem, state.x)
    if gather is None:
        return prepared.to_physical(state.x).float(), ()
    kept = gather.add(problem, kept, state.x)
    ends = gather.summary(kept._replace(n=gather.count)) if isinstance(gather, Spread) else (kept.x,)
    maps = [prepared.to_physical(end).float() for end in ends]
    return maps[0], (*maps[1:], *kept)


def network_bytes(prior: Prior, shape: tuple[int, ...], device: torch.device, gradient: bool) -> tuple[float, float]:
    """Bytes that one call of the prior takes at most: (with no slice, more with each slice).

    Args:
        prior: on ``device``.
        shape: (c h w).
        device: where the network is.
        gradient: with the activations that a derivative needs.
    """
    sizes = []
    for n in (1, 2):
        x = torch.zeros(n, *called_with(prior, shape), device=device, requires_grad=gradient)
        with torch.set_grad_enabled(gradient), Tally() as tally:
            out = prior.denoise(x, torch.tensor(LEVEL, device=device))
            if gradient:
                torch.autograd.grad(out.sum(), x)
        sizes.append(tally.peak)
    more = max(0, sizes[1] - sizes[0])
    return max(0.0, sizes[0] - more), float(more)


def called_with(prior: Prior, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape (c h w) of what a prior of images of ``shape`` is called with: more channels for models of scans."""
    info = getattr(prior, "info", None)
    return (info.inputs(shape[0]), *shape[1:]) if isinstance(info, MeasuredInfo) else shape


def built(kind: str, fields: Mapping[str, Any]) -> Any:
    """The operator of that kind.

    Raises:
        ValueError: no such kind, or fields that it does not take.
    """
    made = find("operators", kind)
    try:
        return made(**fields)
    except TypeError as error:
        raise ValueError(f"operator {kind!r} cannot be made from its fields: {error}") from error


def projector_of(kind: str, fields: Mapping[str, Any]) -> tuple[Any, int, int]:
    """The operator of one slice without its matrices; what these take in bytes, and what building them takes besides.

    Raises:
        ValueError: as ``built``.
    """
    one_slice = {**fields, "shape": (1, *tuple(fields["shape"])[1:])}
    if not issubclass(find("operators", kind), BeamOperator):
        return built(kind, one_slice), 0, 0
    one = built(kind, {**one_slice, "memory_mb": TINY_MB})
    kept = one.matrix_bytes(MEMORY_MB)
    return one, kept, max(kept // 2, one.footprint_bytes())  # the rows of A are joined, which copies them


@dataclass(frozen=True)
class Budget:
    """Bytes that a run will take on top of what the process holds, in parts.

    Args:
        projector: matrices.
        building: more, while they are built.
        volume: of each slice.
        slices: of the volume.
        network: (with no slice, more with each slice of a chunk).
        chunk: slices denoised at once.
        image: of the whole volume, once.
        apart: the network is on another device than the volume.
        spread: what the allocator holds over what is alive.
    """

    projector: int
    building: int
    volume: Volume
    slices: int
    network: tuple[float, float]
    chunk: int
    image: int
    apart: bool = False
    spread: float = 1.0

    @property
    def activations(self) -> float:
        """Of one chunk; of all slices where the network is differentiated."""
        n = self.slices if self.volume.differentiated else min(self.chunk, self.slices)
        return self.network[0] + n * self.network[1]

    @property
    def bytes(self) -> int:
        """The most at once where the volume is."""
        s, v = self.slices, self.volume
        with_network = v.at_denoiser * s * self.spread + (0 if self.apart else self.activations)
        run = self.projector + max(v.peak * s * self.spread, with_network)
        end = self.projector * 2 + self.building + v.at_end * s  # the picture's slice has its own projector
        return int(max(self.projector + self.building, run, end))

    @property
    def on_device(self) -> int:
        """The most at once where the network is."""
        return int(self.activations) if self.apart else self.bytes


@dataclass(frozen=True)
class Shapes:
    """What of an operator is asked before there is one.

    Args:
        domain: of the whole volume, real.
        range: likewise.
        unit: of the image.
        kept: bytes that it keeps.
        building: more, while it is built.
    """

    domain: Space
    range: Space
    unit: str
    kept: int
    building: int


def outline_of(scan: Measurements) -> Shapes:
    """The shapes of a scan of real images, whose projector is not built.

    Raises:
        ValueError: fields that the operator does not take, or a y that does not fit it.
    """
    one, kept, building = projector_of(scan.kind, scan.fields)
    slices = int(scan.fields["shape"][0])
    if tuple(scan.y.shape[1:]) != tuple(one.range.shape[1:]):
        wanted = (slices, *one.range.shape[1:])
        raise ValueError(f"the measurement has shape {tuple(scan.y.shape)}; its operator gives {wanted}")
    whole = [Space((slices, *space.shape[1:]), space.dtype) for space in (one.domain, one.range)]
    return Shapes(whole[0], whole[1], one.unit, kept, building)


def of_operator(operator: Any, fields: Mapping[str, Any]) -> Shapes:
    """The shapes of an operator that is there, made of a scan's fields."""
    kept = sum(v.numel() * v.element_size() for v in fields.values() if isinstance(v, Tensor))
    return Shapes(operator.domain, operator.range, getattr(operator, "unit", ""), kept, 0)


def budget_of(
    scan: Measurements,
    work: Work,
    prior: Prior,
    chunk: int,
    device: torch.device,
    home: torch.device,
    given: Shapes | None = None,
) -> Budget:
    """What a run will take, counted on a few slices.

    Args:
        scan: read already.
        work: what is done with it.
        prior: on ``device``, not chunked.
        chunk: slices denoised at once; 0 is as many as half of the free memory holds.
        device: where the network is.
        home: where the volume is.
        given: the shapes of an operator that is there; those of the scan's projector if None.

    Raises:
        ValueError: a scan, a prior and a sampler that do not fit each other.
    """
    shapes = outline_of(scan) if given is None else given
    slices, *shape = shapes.domain.shape
    few = min(FEW, slices)
    spaces = [Space((few, *space.shape[1:]), space.dtype) for space in (shapes.domain, shapes.range)]
    whole = [None if v is None else with_axes(v, scan.y.ndim) for v in (scan.sqrt_w, scan.keep)]
    weights, keep = (v if v is None or len(v) == 1 else v[:few] for v in whole)
    volume = volume_of(work, prior, Outline(spaces[0], spaces[1], shapes.unit), weights, keep)
    silent = isinstance(prior, NoPrior)
    network = (0.0, 0.0) if silent else network_bytes(prior, tuple(shape), device, volume.differentiated)
    image = math.prod(shapes.domain.shape) * shapes.domain.dtype.itemsize
    spread = HELD_SHARE if home.type == "cpu" and image < OWN_BYTES[0] else 1.0
    parts = shapes.kept, shapes.building, volume, slices, network
    budget = Budget(*parts, chunk or slices, image, device != home, spread)
    free = free_bytes(device)
    while not chunk and free is not None and budget.chunk > 1 and budget.on_device > AUTO_SHARE * free:
        budget = replace(budget, chunk=math.ceil(budget.chunk / 2))
    return budget


def with_axes(value: Tensor, count: int) -> Tensor:
    """What broadcasts over measurements of so many axes, with as many itself."""
    return value.reshape(*[1] * (count - value.ndim), *value.shape)


def check(budget: Budget, device: torch.device, home: torch.device) -> str:
    """Refuse a run that does not fit into what is free; a note where that is not known, else "".

    Raises:
        ValueError: with what it would take and what there is.
    """
    for place, wanted in {home: budget.bytes, device: budget.on_device}.items():
        free = free_bytes(place)
        if free is None:
            return f"how much memory is free on {place} is not known here: the run was not checked against it"
        if wanted > free:
            raise ValueError(
                f"the run would take {wanted / GB:.3g} GB more on {place}, where {free / GB:.3g} GB are free; "
                "fewer slices or a smaller run.chunk take less"
            )
    return ""


def largest_chunk(prior: Prior, most: int, shape: tuple[int, ...], device: torch.device) -> int:
    """How many slices the prior denoises at once: ``most``, halved while memory does not suffice.

    Args:
        prior: on ``device``.
        most: first try, at least 1.
        shape: (c h w).
        device: where the images are.

    Raises:
        ValueError: not even one slice fits.
    """
    n = most
    while not _denoises(prior, (n, *called_with(prior, shape)), device):
        if n == 1:
            raise ValueError(f"the network does not take one slice of {shape[-2]} x {shape[-1]} pixels: no memory")
        n = math.ceil(n / 2)
    return n


def _denoises(prior: Prior, shape: tuple[int, ...], device: torch.device) -> bool:
    try:
        with torch.no_grad():
            prior.denoise(torch.zeros(shape, device=device), torch.tensor(LEVEL, device=device))
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return False
    return True
