"""The ``[steer]`` table: which circuit steers a prior, down to which noise, and what else it is told."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from invdiff.circuits import codes
from invdiff.circuits import load as load_circuit
from invdiff.circuits.codes import CodeCircuit
from invdiff.circuits.evidence import of_example, product
from invdiff.circuits.images import GridInfo, ImageCircuit
from invdiff.circuits.inputs import Spot
from invdiff.datasets import Measurements, Volume, read_volume
from invdiff.files import sha256_of
from invdiff.pipelines.measured_cells import check_covered, evidence_of
from invdiff.pipelines.regions import check_grid, read_region
from invdiff.priors import Steered
from invdiff.priors.steered import SIGMA_STOP, check_range
from invdiff.protocols import Prior

STEERED = ("none", "circuit", "codes")
SIGMA_STOP_MEASURED = 1.0  # of CT: see docs/inpainting.md


@dataclass(frozen=True)
class SteerConfig:
    """How the prior is steered.

    Args:
        kind: ``none``, ``circuit`` (over cells) or ``codes`` (a circuit over the codes of an autoencoder).
        circuit: name of a shipped circuit or its folder; if empty the prior's name, with ``-codes`` for codes.
        sigma_stop: noise level below which nothing is steered, prior units.
        like: an example on the volume's grid, which a region is to be like; none if empty.
        like_region: NIfTI on the volume's grid: 1 where the example counts.
        like_strength: 1 counts the example's pixels as known, 0 not at all, ``inf`` pins the cells to it.
    """

    kind: str = "none"
    circuit: str = ""
    sigma_stop: float = SIGMA_STOP
    like: str = ""
    like_region: str = ""
    like_strength: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in STEERED:
            raise ValueError(f"steer is {self.kind!r}; one of {', '.join(STEERED)} is wanted")
        if bool(self.like) != bool(self.like_region):
            raise ValueError("one of steer.like and steer.like_region alone says nothing; both or none are wanted")
        if self.like and self.kind != "circuit":
            raise ValueError("steer.like is an example for a circuit over cells; steer.kind circuit is wanted")
        if not self.like_strength >= 0:
            raise ValueError(f"steer.like_strength is {self.like_strength}; 0 (none) to inf (pinned) is wanted")

    def recorded(self) -> dict[str, Any]:
        """The table as JSON holds it."""
        strength = "inf" if math.isinf(self.like_strength) else self.like_strength
        more = {"like": self.like, "like_region": self.like_region, "like_strength": strength} if self.like else {}
        return {"kind": self.kind, "circuit": self.circuit, "sigma_stop": self.sigma_stop, **more}

    def key(self, circuit: ImageCircuit | CodeCircuit | None) -> str:
        """What of it changes the answer: of the run's fingerprint."""
        if circuit is None:
            return ""
        files = [sha256_of([Path(p)]) if Path(p).is_file() else p for p in (self.like, self.like_region) if p]
        return " ".join([circuit.sha256, str(self.sigma_stop), *files, *([str(self.like_strength)] if files else [])])


def circuit_of(steer: SteerConfig, prior: str, info: Any) -> ImageCircuit | CodeCircuit | None:
    """The circuit, None for kind none.

    Args:
        steer: the table.
        prior: whose name the circuit's is if none is given.
        info: of the prior.

    Raises:
        ValueError: no such circuit, or one of another unit or range than the prior's.
    """
    if steer.kind == "none":
        return None
    over_codes = steer.kind == "codes"
    name = steer.circuit or (f"{prior}-codes" if over_codes else prior)
    circuit = codes.load(name) if over_codes else load_circuit(name)
    check_range(circuit, info)
    return circuit


def example_of(
    steer: SteerConfig, cells: GridInfo, info: Any, volume: Volume, some: Tensor, one: Callable[[Volume], float]
) -> Spot | None:
    """The evidence that the example gives of the cells of some slices, None without an example.

    Args:
        steer: the table.
        cells: of the circuit.
        info: of the prior.
        volume: on whose grid the example lies.
        some: which slices, bool (s).
        one: the value of 1 in the prior's unit of a volume.

    Raises:
        ValueError: another grid or unit, or a region that is empty where the slices are.
    """
    if not steer.like:
        return None
    example = read_volume(Path(steer.like))
    check_grid(example, volume, f"the example {steer.like}")
    region = read_region(Path(steer.like_region), volume, "the example's region")[some]
    if not bool(region.any()):
        raise ValueError(f"the example's region {steer.like_region} is empty in the slices that are steered")
    pixels = info.in_prior_units(example.data[some] / one(example))
    return of_example(cells, pixels, region, steer.like_strength)


def check_steered(steer: SteerConfig, sampler: Any, name: str, prior: str) -> None:
    """Refuse a sampler that has nothing to steer, or that starts below where steering ends.

    Args:
        steer: the table.
        sampler: a sampler.
        name: of it.
        prior: name of the prior.

    Raises:
        ValueError: with the reason.
    """
    if steer.kind == "none":
        return
    if prior == "none" or not hasattr(sampler, "sigma_max"):
        raise ValueError(f"{name!r} has no prior to steer; a sampler with a prior is wanted, such as dds with ct")
    if sampler.sigma(0) <= steer.sigma_stop:
        raise ValueError(
            f"the sampler starts at sigma {sampler.sigma(0):g} and steering ends at {steer.sigma_stop:g}: "
            "a larger sampler.sigma_max or a smaller steer.sigma_stop is wanted"
        )


def steered(
    steer: SteerConfig,
    circuit: ImageCircuit | CodeCircuit | None,
    scan: Measurements,
    prior: Prior,
    grid: Volume,
    like: Tensor,
) -> Prior:
    """The prior of a scan's images, steered by what the scan says of the cells; itself without a circuit.

    Args:
        steer: the table.
        circuit: see ``circuit_of``.
        scan: CT.
        prior: of its images.
        grid: an image of the scan, whose place and unit an example must have.
        like: any tensor on the device of the images.

    Raises:
        ValueError: a circuit over codes, another kind of scan, images beyond the circuit's grid, an example that does
            not fit.
    """
    if circuit is None:
        return prior
    if isinstance(circuit, CodeCircuit):
        raise ValueError("a scan says nothing of codes, of which no pixel is known; steer.kind circuit is wanted")
    check_covered(scan, circuit.info)
    evidence, shape = evidence_of(scan, circuit, prior), tuple(scan.fields["shape"])
    some = torch.ones(shape[0], dtype=torch.bool)
    example = example_of(steer, circuit.info, prior.info, grid, some, lambda v: in_unit(v, grid.unit))  # type: ignore[attr-defined]
    whole = evidence if example is None else product(evidence, example)
    nothing = torch.zeros(shape, device=like.device)
    return Steered(prior, circuit, nothing, torch.zeros_like(nothing, dtype=torch.bool), steer.sigma_stop, whole)


def in_unit(example: Volume, unit: str) -> float:
    """1, of an example in that unit.

    Raises:
        ValueError: it is in another.
    """
    if example.unit != unit:
        raise ValueError(f"the example is in {example.unit}, the image in {unit}; one unit is wanted")
    return 1.0
