"""Pictures of a training while it runs: its losses, and what the prior dreams."""

from __future__ import annotations

import csv
from pathlib import Path

import torch

from invdiff.files import whole_file
from invdiff.pipelines.pictures import sheet
from invdiff.priors.model import NetworkPrior
from invdiff.reconstruction import sample
from invdiff.samplers import DPMpp2M

SAMPLES, SOLVER_STEPS = 8, 16  # cheap enough to be drawn at every validation


def plot(path: Path, log: Path, name: str) -> None:
    """Training loss, and the validation loss at every noise level, against the crops seen.

    Args:
        path: the PNG.
        log: the training's CSV.
        name: of the prior.
    """
    from matplotlib.figure import Figure

    with log.open(newline="") as f:
        rows = list(csv.DictReader(f))
    seen = [int(row["seen"]) for row in rows]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    axis.plot(seen, [float(row["loss"]) for row in rows], "k", label="training, all levels")
    for key in (k for k in rows[-1] if k.startswith("val_")):
        axis.plot(seen, [float(row[key]) for row in rows], ".-", label=f"validation, sigma {key.removeprefix('val_')}")
    axis.set(xlabel="crops seen", ylabel="EDM loss", yscale="log", title=f"training of {name!r}")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    with whole_file(path) as part:
        figure.savefig(part, format="png", dpi=110)


def dreams(path: Path, prior: NetworkPrior, size: int, device: torch.device) -> None:
    """A sheet of images of the prior alone, with the same noise at every call.

    Args:
        path: the PNG.
        prior: as far as it has been trained.
        size: height and width of the images, pixels.
        device: where the prior is.
    """
    info = prior.info
    x = sample(prior, (SAMPLES, 1, size, size), DPMpp2M(steps=SOLVER_STEPS), device=device).x[:, 0]
    title = f"samples of {info.name}, no scans of anyone, {SOLVER_STEPS} evaluations"
    sheet(path, x, info.unit, {"whole range": (info.low, info.high)}, title)
