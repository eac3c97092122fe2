"""What the files of other projects do not say of their images, and the file in which a user says it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from invdiff.config import build, read_toml
from invdiff.priors.parameterisation import Parameterisation, parameterisation_of

SIDECAR = "invdiff.toml"


@dataclass(frozen=True)
class Description:
    """What the images of a network were: what no file of another project states. As a table, it is ``[prior]``.

    Args:
        unit: physical unit of the images, such as ``HU``.
        low: physical value that the training mapped to the first value of ``data_range``.
        high: physical value that it mapped to the second.
        data_range: the network's own values of ``low`` and ``high``; images of mean m and deviation s that were
            standardised have ((low - m) / s, (high - m) / s).
        pixel_mm: smallest and largest pixel size of the training, in mm; zeros where it is not known.
        channels: of the images to reconstruct; 1 serves a network of colour images too (the three are given the same
            image and their mean is taken).
        class_label: number of the class, for networks that want one.
        constants: values that fill the further input channels, for networks that were conditioned on maps.
        name: of the prior, for records; the folder's if empty.

    Raises:
        ValueError: a value that is not of its kind.
    """

    unit: str
    low: float
    high: float
    data_range: tuple[float, float] = (-1.0, 1.0)
    pixel_mm: tuple[float, float] = (0.0, 0.0)
    channels: int = 1
    class_label: int | None = None
    constants: tuple[float, ...] = ()
    name: str = ""

    def __post_init__(self) -> None:
        for name in ("data_range", "pixel_mm", "constants"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        numbers = {"low": (self.low,), "high": (self.high,), "constants": self.constants}
        pairs = {"data_range": self.data_range, "pixel_mm": self.pixel_mm}
        for name, values in {**numbers, **pairs}.items():
            if not all(isinstance(v, int | float) and math.isfinite(v) for v in values):
                raise ValueError(f"{name} is {getattr(self, name)!r}; finite numbers are wanted")
        for name, pair in pairs.items():
            if len(pair) != 2 or pair[0] > pair[1]:
                raise ValueError(f"{name} is {list(pair)}; two values, the smaller first, are wanted")
        if self.data_range[0] == self.data_range[1]:
            raise ValueError(f"data_range is {list(self.data_range)}; two different values are wanted")
        if not isinstance(self.unit, str) or not self.unit:
            raise ValueError(f"unit is {self.unit!r}; the name of one, such as HU, is wanted")
        if self.channels < 1:
            raise ValueError(f"channels is {self.channels}; at least 1 is wanted")
        if self.class_label is not None and (not isinstance(self.class_label, int) or self.class_label < 0):
            raise ValueError(f"class_label is {self.class_label!r}; a whole number from 0 is wanted")


@dataclass(frozen=True)
class Sidecar:
    """``invdiff.toml`` beside foreign files.

    Args:
        prior: unit and range of the images.
        schedule: what the network predicts on which schedule, where the files do not say or are wrong.
        network: ``weights``, ``kind`` and the arguments of the network, for weights alone; empty if not given.
    """

    prior: Description
    schedule: Parameterisation | None
    network: dict[str, Any]


def sidecar_of(folder: Path, description: Description | None) -> Sidecar:
    """What the user says of a foreign folder: its ``invdiff.toml``, ``description`` in the place of ``[prior]``.

    Raises:
        ValueError: neither is there (the message says what to write), or a table or key that is not known.
    """
    tables = tables_of(folder)
    for name, table in tables.items():
        if name not in ("prior", "schedule", "network") or not isinstance(table, dict):
            raise ValueError(f"{folder / SIDECAR} has {name!r}; the tables prior, schedule and network are known")
    if description is None and "prior" not in tables:
        raise ValueError(
            f"{folder} does not say what its images are: write into {folder / SIDECAR} the lines [prior], "
            'unit = "HU", low = -1000.0, high = 2000.0 and data_range = [-1.0, 1.0], with the unit of the training '
            "images and with low and high the values in it that the training mapped to those of data_range"
        )
    try:
        prior = description or build(Description, tables["prior"], "prior")
        schedule = parameterisation_of(tables["schedule"]) if "schedule" in tables else None
    except ValueError as error:
        raise ValueError(f"{folder / SIDECAR}: {error}") from error
    return Sidecar(replace(prior, name=prior.name or folder.resolve().name), schedule, tables.get("network", {}))


def describes_network(folder: Path) -> bool:
    """Whether the user states the network itself, so that the folder's other files do not matter."""
    return "network" in tables_of(folder)


def tables_of(folder: Path) -> dict[str, Any]:
    """The content of ``invdiff.toml``, empty where there is none.

    Raises:
        ValueError: it is no TOML.
    """
    path = folder / SIDECAR
    if not path.is_file():
        return {}
    return read_toml(path)
