"""What the TOML file of ``invdiff train-circuit`` says, and the draws of cells that a circuit learns from."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from invdiff.circuits import Categorical, DiscretisedLogistic, Gaussian, GridInfo, Structure, hidden_chow_liu, quad_tree
from invdiff.circuits.inputs import FAMILIES, Inputs
from invdiff.config import build
from invdiff.pipelines.training_data import DataConfig
from invdiff.priors.slices import GAMMA, Slices

STRUCTURES = ("hidden-chow-liu", "quad-tree")
METHODS = ("stepwise", "full-batch")
TABLES = ("data", "circuit", "training")
START_SCALE = 4.0  # levels over the logistic's first scale


@dataclass(frozen=True)
class CircuitConfig:
    """Which circuit.

    Args:
        name: of the circuit.
        unit: physical unit of the images; HU or a.u.
        low: physical value that is -1 in prior units.
        high: physical value that is +1.
        rows: cells of the grid, downwards.
        columns: cells of the grid, across.
        block: height and width of a cell, pixels.
        structure: ``hidden-chow-liu``, from the data, or ``quad-tree``.
        states: K of every region.
        inputs: ``categorical``, ``logistic`` or ``gaussian``.
        levels: of discrete inputs, over [-1, 1].
        bins: of the histograms of the mutual information.
        tie_sums: ``none``, or ``depth``: regions of one depth share their weights.
        tie_inputs: ``none``, or ``all``: all cells share their input distributions.
    """

    name: str
    unit: str
    low: float
    high: float
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
        for name, words in (("structure", STRUCTURES), ("inputs", tuple(FAMILIES))):
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
        if self.method not in METHODS:
            raise ValueError(f"training.method is {self.method!r}; one of {', '.join(METHODS)} is wanted")
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
class CircuitPlan:
    """A circuit's training, resolved."""

    circuit: CircuitConfig
    training: CircuitTraining
    data: DataConfig


def plan_of(config_file: Path) -> CircuitPlan:
    """The plan that a TOML file describes.

    Raises:
        ValueError: no TOML, or a wrong table, key or value.
    """
    try:
        document = tomllib.loads(config_file.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{config_file} cannot be read as TOML: {error}") from error
    for name in document:
        if name not in TABLES:
            raise ValueError(f"{config_file} has {name!r}; the tables {', '.join(TABLES)} are known")
    return CircuitPlan(
        build(CircuitConfig, document.get("circuit", {}), "circuit"),
        build(CircuitTraining, document.get("training", {}), "training"),
        build(DataConfig, document.get("data", {}), "data"),
    )


@dataclass(frozen=True)
class Draws:
    """Images in prior units, a subject at random and changed at random: keyed by (seed, step, item)."""

    slices: Slices
    info: GridInfo
    config: CircuitTraining

    def cells(self, step: int, count: int) -> tuple[Tensor, float]:
        """The cells (count v) of the draws of a step, and the mean variance of their pixels round them."""
        found, inside = [], 0.0
        for item in range(count):
            x = torch.from_numpy(self._image(np.random.default_rng((self.config.seed, step, item))))[None, None]
            mean = cells_of(self.info, x)
            known = ~torch.isnan(mean)
            square = self.info.pooled(x.square()).mean - mean.square()
            inside += float(square[known].mean()) / count
            found.append(mean)
        return torch.cat(found), inside

    def _image(self, rng: np.random.Generator) -> NDArray[np.float32]:
        """(h w) in prior units."""
        c, members = self.config, self.slices.members
        chances = np.array([len(subjects) for subjects in members]) ** c.group_power
        subjects = members[int(rng.choice(len(chances), p=chances / chances.sum()))]
        image = self.slices.images[int(rng.choice(subjects[int(rng.integers(len(subjects)))]))]
        x = self.slices.scale * self._moved(np.asarray(image, np.float32), rng)
        share = (x - self.info.low) / (self.info.high - self.info.low)
        if rng.random() < c.gamma:
            power = np.exp(rng.uniform(*np.log(GAMMA)))
            share = (1 + c.brightness * rng.uniform(-1, 1)) * np.maximum(share, 0) ** power
        return (2 * share - 1).astype(np.float32)

    def _moved(self, image: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
        """Flipped, shifted, rotated and resized, to the nearest pixel; what is missing repeats the edge."""
        c, (h, w) = self.config, image.shape
        if rng.random() < c.flip:
            image = image[:, ::-1]
        angle, size = c.rotate * rng.uniform(-1, 1), 1 + c.zoom * rng.uniform(-1, 1)
        down, right = rng.uniform(-c.shift, c.shift, 2)
        y, x = np.arange(h) - (h - 1) / 2, np.arange(w) - (w - 1) / 2
        cos, sin = np.cos(angle) / size, np.sin(angle) / size
        row = cos * y[:, None] - sin * x + (h - 1) / 2 + down
        column = sin * y[:, None] + cos * x + (w - 1) / 2 + right
        return image[row.round().astype(np.int64).clip(0, h - 1), column.round().astype(np.int64).clip(0, w - 1)]


def cells_of(info: GridInfo, x: Tensor) -> Tensor:
    """Cells (s v) of images (s 1 h w), NaN outside them."""
    pooled = info.pooled(x)
    return pooled.mean.masked_fill(pooled.number == 0, torch.nan)


def judged_cells(slices: Slices, info: GridInfo, most: int) -> Tensor:
    """Cells (n v) of at most so many slices, evenly over all, as they are."""
    index: Sequence[int] = np.unique(np.linspace(0, len(slices.images) - 1, most).round().astype(int)).tolist()
    middle, half = (info.high + info.low) / 2, (info.high - info.low) / 2
    images = [torch.from_numpy(slices.scale * np.asarray(slices.images[k], np.float32)) for k in index]
    return torch.cat([cells_of(info, (x[None, None] - middle) / half) for x in images])
