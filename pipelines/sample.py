"""``invdiff sample``: images of the prior alone, as a sheet (.png), its record (.json) and, if wanted, a volume."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from invdiff.config import build, find, registered
from invdiff.datasets import Volume, write_nifti
from invdiff.files import whole_file
from invdiff.pipelines.output import probe, versions
from invdiff.pipelines.pictures import CT_WINDOW, sheet
from invdiff.pipelines.reconstruct import (
    Progress,
    RunConfig,
    home_of,
    kind_of,
    prior_of,
)
from invdiff.pipelines.tables import document_of
from invdiff.protocols import Prior
from invdiff.reconstruction import sample
from invdiff.samplers import Solver

TABLES: dict[str, tuple[str, ...]] = {
    "prior": ("name",),
    "sampler": (),
    "images": (),
    "run": (),
    "output": ("path", "volume"),
}
MOST_IMAGES = 1024  # of one sheet
SIDE_PIXELS = (8, 4096)  # least and greatest height and width
PIXEL_MM = 1.0  # of the volume: a sample has no scale of its own


@dataclass(frozen=True)
class ImagesConfig:
    """How many images of what size.

    Args:
        count: images.
        size: their height and width in pixels, such as ``256`` or ``192x256``.
    """

    count: int = 8
    size: str = "256"

    def __post_init__(self) -> None:
        if not 1 <= self.count <= MOST_IMAGES:
            raise ValueError(f"count is {self.count}; 1 to {MOST_IMAGES} images are wanted")
        low, high = SIDE_PIXELS
        if not all(low <= side <= high for side in self.pixels):
            raise ValueError(f"size is {self.size!r}; {low} to {high} pixels a side are wanted")

    @property
    def pixels(self) -> tuple[int, int]:
        """Height and width.

        Raises:
            ValueError: a size that is neither a number nor two.
        """
        match = re.fullmatch(r"(\d{1,6})(?:x(\d{1,6}))?", self.size)
        if match is None:
            raise ValueError(f"size is {self.size!r}; pixels are wanted, such as 256, or height x width as 192x256")
        return int(match[1]), int(match[2] or match[1])


@dataclass(frozen=True)
class Sampling:
    """What is drawn, with what, and where it goes: the sheet ``out`` (.png) and a ``volume`` (NIfTI) if not None."""

    out: Path
    prior: str
    solver: Solver
    images: ImagesConfig
    run: RunConfig
    volume: Path | None = None

    def __post_init__(self) -> None:
        if self.out.suffix != ".png":
            raise ValueError(f"{self.out} ends in {self.out.suffix!r}; .png is wanted")
        if self.volume is not None and not self.volume.name.endswith((".nii", ".nii.gz")):
            raise ValueError(f"{self.volume} ends in {self.volume.suffix!r}; .nii or .nii.gz is wanted")

    @property
    def document(self) -> dict[str, Any]:
        """The resolved configuration."""
        return {
            "prior": {"name": self.prior},
            "sampler": {"kind": kind_of(self.solver), **asdict(self.solver)},
            "images": asdict(self.images),
            "run": asdict(self.run),
            "output": {"path": str(self.out), "volume": None if self.volume is None else str(self.volume)},
        }


def solvers() -> list[str]:
    """Names of the registered samplers that need no measurements."""
    return [kind for kind in registered("samplers") if _is_solver(find("samplers", kind))]


def _is_solver(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Solver)


def resolve(flags: Mapping[str, Mapping[str, Any]], overrides: Sequence[str]) -> Sampling:
    """A Sampling from command-line flags (table to key to value, None where not given) and ``table.key=value``.

    Raises:
        ValueError: a wrong table, key, kind or value; the right ones are listed.
    """
    document = document_of({}, flags, overrides, TABLES)
    table = dict(document["sampler"])
    kind = table.pop("kind")
    if kind not in solvers():
        raise ValueError(f"{kind!r} does not sample without measurements; those that do: {', '.join(solvers())}")
    images = dict(document["images"])
    if "size" in images:
        images["size"] = str(images["size"])  # 256 is a number in TOML's notation
    volume = document["output"].get("volume")
    return Sampling(
        out=Path(str(document["output"]["path"])),
        prior=str(document["prior"]["name"]),
        solver=build(find("samplers", kind), table, kind),
        images=build(ImagesConfig, images, "images"),
        run=build(RunConfig, document["run"], "run"),
        volume=None if volume is None else Path(str(volume)),
    )


def run(job: Sampling, progress: Progress) -> dict[str, Any]:
    """Draw the images and write the sheet, its record and the volume; returns the record.

    Raises:
        ValueError: input that does not fit; nothing is written then.
        DivergedError: NaN.
    """
    for path in (job.out, job.volume):
        if path is not None:
            probe(path)
    prior, weights = prior_of(job.prior, job.run)
    kind = kind_of(job.solver)
    began = time.monotonic()
    result = sample(
        prior,
        (job.images.count, prior.channels, *job.images.pixels),
        job.solver,
        job.run.seed,
        device=home_of(job.run),
        progress=lambda states: progress(states, job.solver.steps, kind),
    )
    record = {
        **result.record,
        "config": job.document,
        "seconds": round(time.monotonic() - began, 2),
        "prior_sha256": weights,
        "versions": versions(),
        "not_for_diagnosis": True,
    }
    x, unit = result.x.cpu(), result.record["unit"]
    if job.volume is not None:
        affine = np.diag([-PIXEL_MM, -PIXEL_MM, PIXEL_MM, 1.0])
        write_nifti(job.volume, Volume(x.float(), affine, unit, source={"name": job.volume.name}))
    with whole_file(job.out.with_suffix(".json")) as part:
        part.write_text(json.dumps(record, indent=2) + "\n")
    _picture(job, x, prior, unit)
    return record


def _picture(job: Sampling, x: Tensor, prior: Prior, unit: str) -> None:
    """The first channel of every image, over the prior's range, and for HU in the soft-tissue window too."""
    info = prior.info  # type: ignore[attr-defined]
    views = {"whole range": (info.low, info.high)} | ({"soft tissue": CT_WINDOW} if unit == "HU" else {})
    title = (
        f"samples of {info.name}, no scans of anyone: {kind_of(job.solver)}, {job.solver.steps} steps, "
        f"{job.solver.evaluations} evaluations, seed {job.run.seed}"
    )
    sheet(job.out, x[:, 0], unit, views, title)
