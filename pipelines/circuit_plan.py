"""What the TOML file of ``invdiff train-circuit`` says."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from invdiff.circuits import Categorical, DiscretisedLogistic, Gaussian, GridInfo, Structure, hidden_chow_liu, quad_tree
from invdiff.circuits.autoencoder import AutoencoderConfig
from invdiff.circuits.inputs import FAMILIES, Inputs
from invdiff.config import build, read_toml
from invdiff.pipelines.training_data import DataConfig

STRUCTURES = ("hidden-chow-liu", "quad-tree")
METHODS = ("stepwise", "full-batch")
STARTS = ("k-means", "distilled")
OVER = ("cells", "codes")
OF_THE_AUTOENCODER = ("block", "inputs", "levels")  # keys of the circuit that it decides
SIZE = 256  # height and width of a grid of codes, pixels, unless said
TABLES = ("data", "circuit", "autoencoder", "training")
START_SCALE = 4.0  # levels over the logistic's first scale


@dataclass(frozen=True)
class CircuitConfig:
    """Which circuit.

    Args:
        name: of the circuit.
        unit: physical unit of the images; HU or a.u.
        low: physical value that is -1 in prior units.
        high: physical value that is +1.
        over: ``cells``, the means of blocks of pixels, or ``codes`` of an autoencoder, whose stride is the block.
        rows: cells of the grid, downwards.
        columns: cells of the grid, across.
        block: height and width of a cell, pixels.
        structure: ``hidden-chow-liu``, from the data, or ``quad-tree``.
        states: K of every region.
        inputs: ``categorical``, ``logistic`` or ``gaussian``.
        levels: of discrete inputs, over [-1, 1].
        bins: of the histograms of the mutual information; codes are put into so many clusters for that.
        tie_sums: ``none``, or ``depth``: regions of one depth share their weights.
        tie_inputs: ``none``, or ``all``: all cells share their input distributions.
    """

    name: str
    unit: str
    low: float
    high: float
    over: str = "cells"
    rows: int = 32
    columns: int = 32
    block: int = 8
    structure: str = "hidden-chow-liu"
    states: int = 32
    inputs: str = "categorical"
    levels: int = 64
    bins: int = 8
    tie_sums: str = "none"
    tie_inputs: str = "none"

    def __post_init__(self) -> None:
        for name, words in (("over", OVER), ("structure", STRUCTURES), ("inputs", tuple(FAMILIES))):
            if getattr(self, name) not in words:
                raise ValueError(f"circuit.{name} is {getattr(self, name)!r}; one of {', '.join(words)} is wanted")
        if self.states < 1:
            raise ValueError(f"circuit.states is {self.states}; at least 1 is wanted")
        self.info(0.0, (0.0, 0.0))

    def info(self, within: float, pixel_mm: tuple[float, float]) -> GridInfo:
        """The circuit's description."""
        grid = (self.rows, self.columns, self.block)
        return GridInfo(self.name, self.unit, self.low, self.high, *grid, self.levels, within, pixel_mm)

    def first_inputs(self) -> Inputs:
        """One group and state of the family, from which a fit starts."""
        one = torch.zeros(1, 1)
        if self.inputs == "categorical":
            return Categorical(torch.zeros(1, 1, self.levels).log_softmax(-1))
        if self.inputs == "gaussian":
            return Gaussian(one, one, 1 / self.levels)
        return DiscretisedLogistic(one + self.levels / 2, one + np.log(self.levels / START_SCALE), self.levels)

    def data(self, cells: Tensor, info: GridInfo) -> Tensor:
        """Values in prior units as the family's data."""
        return cells if self.inputs == "gaussian" else info.levels_of(cells)

    def tree(self, cells: Tensor) -> Structure:
        """Of data (n v) in prior units, or of the grid."""
        grid = self.structure == "quad-tree"
        found = quad_tree(self.rows, self.columns) if grid else hidden_chow_liu(cells, self.bins)
        return found.tied(self.tie_sums, self.tie_inputs)


@dataclass(frozen=True)
class CircuitTraining:
    """How it learns.

    Args:
        start: of EM: ``k-means`` of the variables' numbers, or ``distilled`` from a teacher, which is the encoder for
            codes, and for cells the means of their quarters.
        method: ``stepwise``, on fresh draws, or ``full-batch``, again and again on ``images`` draws.
        steps: M-steps.
        batch: draws of a step (stepwise), or at once (full-batch).
        images: draws for the structure, the start, the baselines, and for full batches.
        pseudocount: images' worth of counts that every state has more.
        power: the rate of step i is (i + 2)^-power, stepwise.
        every: steps between looks at the validation, each with a checkpoint.
        held_out: share of the subjects that only the validation sees.
        judged: slices that it looks at, at most.
        flip: share of draws with left and right exchanged.
        shift: largest shift in pixels, each way.
        rotate: largest rotation in radians.
        zoom: largest relative change of size.
        gamma: share of draws whose grey values are raised to a random power.
        brightness: largest relative change of those draws' grey values.
        group_power: a group of slices is drawn in proportion to its subjects to this power.
        seed: of everything random.
    """

    start: str = "k-means"
    method: str = "stepwise"
    steps: int = 600
    batch: int = 64
    images: int = 4096
    pseudocount: float = 1.0
    power: float = 0.7
    every: int = 50
    held_out: float = 0.1
    judged: int = 400
    flip: float = 0.5
    shift: int = 8
    rotate: float = 0.1
    zoom: float = 0.1
    gamma: float = 0.0
    brightness: float = 0.0
    group_power: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        for name, words in (("method", METHODS), ("start", STARTS)):
            if getattr(self, name) not in words:
                raise ValueError(f"training.{name} is {getattr(self, name)!r}; one of {', '.join(words)} is wanted")
        for name in ("steps", "batch", "images", "every", "judged"):
            if getattr(self, name) < 1:
                raise ValueError(f"training.{name} is {getattr(self, name)}; at least 1 is wanted")
        for name in ("pseudocount", "flip", "shift", "rotate", "zoom", "gamma", "brightness", "group_power", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"training.{name} is {getattr(self, name)}; 0 or more is wanted")
        if not 0 < self.held_out < 1 or not 0 < self.power <= 1:
            raise ValueError(
                f"training.held_out is {self.held_out} and training.power {self.power}; "
                "a share in (0, 1) and a power in (0, 1] are wanted"
            )

    @property
    def full(self) -> bool:
        """Whether every M-step sees all draws."""
        return self.method == "full-batch"


@dataclass(frozen=True)
class AutoencoderPlan:
    """Which autoencoder, and how it is trained.

    Args:
        channels: features of each level, each of half the size of the one before.
        residual: residual layers of each level.
        codes: C.
        width: numbers in a code's vector.
        steps: of its training.
        batch: crops of a step.
        crop: height and width of the crops in pixels, a multiple of the stride.
        rate: of Adam, which falls linearly to a tenth.
        warm: steps over which the rate rises first.
        every: steps between looks at the validation, each with a checkpoint.
    """

    channels: tuple[int, ...] = (16, 32, 64, 96)
    residual: int = 1
    codes: int = 256
    width: int = 16
    steps: int = 2000
    batch: int = 16
    crop: int = 128
    rate: float = 1.5e-3
    warm: int = 100
    every: int = 200

    def __post_init__(self) -> None:
        object.__setattr__(self, "channels", tuple(self.channels))
        for name in ("steps", "batch", "crop", "every"):
            if getattr(self, name) < 1:
                raise ValueError(f"autoencoder.{name} is {getattr(self, name)}; at least 1 is wanted")
        if self.warm < 0:
            raise ValueError(f"autoencoder.warm is {self.warm}; 0 or more is wanted")
        if not self.rate > 0 or self.crop % self.sizes.stride:
            raise ValueError(
                f"autoencoder.rate is {self.rate} and autoencoder.crop {self.crop}; more than 0 and a multiple of the "
                f"stride {self.sizes.stride} are wanted"
            )

    @property
    def sizes(self) -> AutoencoderConfig:
        """Of the network."""
        return AutoencoderConfig(**{f.name: getattr(self, f.name) for f in fields(AutoencoderConfig)})


@dataclass(frozen=True)
class CircuitPlan:
    """A circuit's training, resolved; ``autoencoder`` where it is over codes."""

    circuit: CircuitConfig
    training: CircuitTraining
    data: DataConfig
    autoencoder: AutoencoderPlan | None = None

    def __post_init__(self) -> None:
        edge = self.circuit.block * min(self.circuit.rows, self.circuit.columns)
        if self.autoencoder is not None and self.autoencoder.crop > edge:
            raise ValueError(
                f"autoencoder.crop is {self.autoencoder.crop}; at most the grid's {edge} pixels are wanted"
            )


def plan_of(config_file: Path) -> CircuitPlan:
    """The plan that a TOML file describes.

    Raises:
        ValueError: no TOML, or a wrong table, key or value.
    """
    document = read_toml(config_file)
    for name in document:
        if name not in TABLES:
            raise ValueError(f"{config_file} has {name!r}; the tables {', '.join(TABLES)} are known")
    circuit, autoencoder = dict(document.get("circuit", {})), None
    if circuit.get("over") == "codes":
        autoencoder = build(AutoencoderPlan, document.get("autoencoder", {}), "autoencoder")
        circuit = _over_codes(circuit, autoencoder.sizes)
    elif "autoencoder" in document:
        raise ValueError(f'{config_file} has [autoencoder] and a circuit over cells; circuit.over = "codes" is wanted')
    return CircuitPlan(
        build(CircuitConfig, circuit, "circuit"),
        build(CircuitTraining, document.get("training", {}), "training"),
        build(DataConfig, document.get("data", {}), "data"),
        autoencoder,
    )


def _over_codes(circuit: dict[str, Any], sizes: AutoencoderConfig) -> dict[str, Any]:
    """The circuit's table with what its autoencoder decides."""
    for name in OF_THE_AUTOENCODER:
        if name in circuit:
            raise ValueError(f"circuit.{name} is given and the circuit is over codes; the autoencoder decides it")
    edge = max(1, SIZE // sizes.stride)
    return {"rows": edge, "columns": edge, **circuit, "block": sizes.stride, "levels": sizes.codes}
