"""The images that a circuit and its autoencoder learn from: drawn and changed at random, every choice keyed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from invdiff.circuits import GridInfo
from invdiff.pipelines.circuit_plan import CircuitTraining
from invdiff.priors.slices import GAMMA, Slices

CROPS_OF_ONE = 2  # crops that are cut from one drawn image


@dataclass(frozen=True)
class Draws:
    """Images in prior units, a subject at random and changed at random: keyed by (seed, step, item)."""

    slices: Slices
    info: GridInfo
    config: CircuitTraining

    def images(self, step: int, count: int) -> Iterator[Tensor]:
        """The draws (1 1 h w) of a step, one after the other."""
        for item in range(count):
            yield torch.from_numpy(self._image(np.random.default_rng((self.config.seed, step, item))))[None, None]

    def crops(self, step: int, count: int, size: int) -> Tensor:
        """Crops (count 1 size size) of the grid's pixels, two of each draw of a step, -1 beyond the images' edges."""
        rng, found = np.random.default_rng((self.config.seed, step)), list[Tensor]()
        for x in self.images(step, -(-count // CROPS_OF_ONE)):
            grid = self.info.cut(x, -1.0)
            for _ in range(CROPS_OF_ONE):
                top, left = (int(rng.integers(max(1, n - size + 1))) for n in grid.shape[2:])
                found.append(grid[:, :, top : top + size, left : left + size])
        return torch.cat(found[:count])

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


def judged_images(slices: Slices, info: GridInfo, most: int) -> Iterator[Tensor]:
    """At most so many slices (1 1 h w) in prior units, evenly over all, as they are."""
    index: Sequence[int] = np.unique(np.linspace(0, len(slices.images) - 1, most).round().astype(int)).tolist()
    middle, half = (info.high + info.low) / 2, (info.high - info.low) / 2
    for k in index:
        x = torch.from_numpy(slices.scale * np.asarray(slices.images[k], np.float32))
        yield (x[None, None] - middle) / half
