"""What a training's TOML file says: tables to objects, and the prior it starts from."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from invdiff.config import build, read_toml
from invdiff.pipelines.training_data import DataConfig
from invdiff.priors import load
from invdiff.priors.model import NetworkPrior, PriorInfo
from invdiff.priors.network import UNet, UNetConfig
from invdiff.priors.training import TrainingConfig

RENAMED = ("name", "pixel_mm")  # what a fine-tuned prior may state otherwise
TABLES = ("data", "prior", "network", "training", "start")


@dataclass(frozen=True)
class Plan:
    """A training, resolved: what is trained, how, on what, and from which weights.

    Raises:
        ValueError: no unit is stated.
    """

    network: UNetConfig
    config: TrainingConfig
    data: DataConfig
    prior: dict[str, Any]
    first: NetworkPrior | None

    def __post_init__(self) -> None:
        if "unit" not in self.prior and self.first is None:
            raise ValueError("the configuration lacks prior.unit; HU or a.u. is wanted")

    @property
    def unit(self) -> str:
        """Physical unit of the images."""
        return str(self.prior["unit"] if self.first is None else self.first.info.unit)

    def info(self, pixel_mm: tuple[float, float]) -> PriorInfo:
        """The trained prior's description."""
        known = {"pixel_mm": pixel_mm, **({} if self.first is None else asdict(self.first.info))}
        return build(PriorInfo, {**known, **self.prior}, "prior")


def plan_of(config_file: Path) -> Plan:
    """The plan that a TOML file describes.

    Raises:
        ValueError: no TOML, a wrong table, key or value, or a prior to start from whose network is another.
    """
    document = read_toml(config_file)
    for name, table in document.items():
        if name not in TABLES or not isinstance(table, dict):
            raise ValueError(f"{config_file} has {name!r}; the tables {', '.join(TABLES)} are known")
    first = _first_prior(document)
    sizes = {**({} if first is None else asdict(cast(UNet, first.network).config)), **document.get("network", {})}
    plan = Plan(
        build(UNetConfig, sizes, "network"),
        build(TrainingConfig, document.get("training", {}), "training"),
        build(DataConfig, document.get("data", {}), "data"),
        document.get("prior", {}),
        first,
    )
    if first is not None and plan.network != first.network.config:
        raise ValueError(f"the network is {document['network']}, that of the prior to start from is another")
    if plan.network.image_channels != 1:
        raise ValueError(f"network.image_channels is {plan.network.image_channels}; slices have 1")
    if plan.prior.get("parameterisation", "edm") != "edm":
        raise ValueError(f"prior.parameterisation is {plan.prior['parameterisation']!r}; training is in 'edm'")
    return plan


def _first_prior(document: dict[str, Any]) -> NetworkPrior | None:
    """The prior that ``start.prior`` names."""
    if "start" not in document:
        return None
    if list(document["start"]) != ["prior"] or not isinstance(document["start"]["prior"], str):
        raise ValueError(f"start is {document['start']}; start.prior, the name or folder of a prior, is wanted")
    name = document["start"]["prior"]
    first = load(name)
    if not isinstance(first.network, UNet):
        raise ValueError(f"{name!r} is a foreign network; a prior that invdiff train made is wanted")
    for key, value in document.get("prior", {}).items():
        old = getattr(first.info, key, value)
        if key not in RENAMED and value != old:
            raise ValueError(f"prior.{key} is {value!r}, that of the prior to start from is {old!r}")
    return first
