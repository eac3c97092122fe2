"""Pictures of a training while it runs: its losses, and what the prior dreams."""

from __future__ import annotations

import csv
from pathlib import Path

import torch

from invdiff.files import whole_file
from invdiff.priors.model import NetworkPrior

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


def sheet(path: Path, prior: NetworkPrior, size: int, device: torch.device) -> None:
    """TEMPORARY until invdiff.sample stands."""
