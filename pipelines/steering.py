"""The ``[steer]`` table: which circuit steers a prior, down to which noise, and what else it is told."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from invdiff.circuits import load as load_circuit
from invdiff.circuits.evidence import of_example
from invdiff.circuits.images import ImageCircuit
from invdiff.circuits.inputs import Spot
from invdiff.datasets import Volume, read_volume
from invdiff.files import sha256_of
from invdiff.pipelines.regions import check_grid, read_region
from invdiff.priors.steered import SIGMA_STOP, check_range


@dataclass(frozen=True)
class SteerConfig:
    """How the prior is steered.

    Args:
        kind: ``none`` or ``circuit``.
        circuit: name of a shipped circuit or its folder; the prior's name if empty.
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
        if self.kind not in ("none", "circuit"):
            raise ValueError(f"steer is {self.kind!r}; none or circuit is wanted")
        if bool(self.like) != bool(self.like_region):
            raise ValueError("one of steer.like and steer.like_region alone says nothing; both or none are wanted")
        if self.like and self.kind == "none":
            raise ValueError("steer.like is an example for a circuit; steer.kind circuit is wanted")
        if not self.like_strength >= 0:
            raise ValueError(f"steer.like_strength is {self.like_strength}; 0 (none) to inf (pinned) is wanted")

    def recorded(self) -> dict[str, Any]:
        """The table as JSON holds it."""
        strength = "inf" if math.isinf(self.like_strength) else self.like_strength
        more = {"like": self.like, "like_region": self.like_region, "like_strength": strength} if self.like else {}
        return {"kind": self.kind, "circuit": self.circuit, "sigma_stop": self.sigma_stop, **more}

    def key(self, circuit: ImageCircuit | None) -> str:
        """What of it changes the answer: of the run's fingerprint."""
        if circuit is None:
            return ""
        files = [sha256_of([Path(p)]) if Path(p).is_file() else p for p in (self.like, self.like_region) if p]
        return " ".join([circuit.sha256, str(self.sigma_stop), *files, *([str(self.like_strength)] if files else [])])


def circuit_of(steer: SteerConfig, prior: str, info: Any) -> ImageCircuit | None:
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
    circuit = load_circuit(steer.circuit or prior)
    check_range(circuit, info)
    return circuit


def example_of(
    steer: SteerConfig, circuit: ImageCircuit, info: Any, volume: Volume, some: Tensor, one: Callable[[Volume], float]
) -> Spot | None:
    """The evidence that the example gives of the cells of some slices, None without an example.

    Args:
        steer: the table.
        circuit: over the cells.
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
    return of_example(circuit.info, pixels, region, steer.like_strength)
