"""``invdiff train``: train a prior from a TOML file, with checkpoints, resume and an exported folder."""

from __future__ import annotations

import csv
import platform
import time
import tomllib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from invdiff.config import build
from invdiff.files import whole_file
from invdiff.priors.model import PriorInfo, fast_dtype, save
from invdiff.priors.network import UNetConfig
from invdiff.priors.training import TrainingConfig, pack, read_slices, start, train, unpack

STATE_FILE = "state.pt"
EVERY_IMAGES = 4_000  # images between checkpoints and log lines


def run(config_file: Path, data: Path, out: Path, resume: bool, device: str = "cpu") -> None:
    """Train the prior of ``config_file`` on the files of ``data``; writes ``state.pt``, ``log.csv``, ``prior/``.

    Raises:
        ValueError: a wrong key, no data, a folder that holds another run, or nothing to resume.
    """
    document = tomllib.loads(config_file.read_text())
    sizes = build(UNetConfig, document.get("network", {}), "network")
    config = build(TrainingConfig, document.get("training", {}), "training")
    source = {"files": "*.h5", "groups": [], "scale": 1.0, **document.get("data", {})}
    slices = read_slices(sorted(data.glob(source["files"])), source["groups"], source["scale"])
    pixel_mm = (float(slices.pixel_mm.min()), float(slices.pixel_mm.max()))
    info = build(PriorInfo, {"pixel_mm": pixel_mm, **document.get("prior", {})}, "prior")
    state_file = out / STATE_FILE
    if state_file.exists() and not resume:
        raise ValueError(f"{out} holds a run already; give --resume to go on with it, or another folder")
    if resume and not state_file.exists():
        raise ValueError(f"{out} holds no {STATE_FILE} to resume from")
    out.mkdir(parents=True, exist_ok=True)
    recorded = {"training": asdict(config), "network": asdict(sizes), "prior": asdict(info)}
    if resume:
        stored = torch.load(state_file, weights_only=True)
        # A longer or shorter run may go on from the same state; anything else would be another run.
        _refuse_other(stored["config"], recorded, free=("training", "images"))
        first = unpack(stored, config, sizes)
    else:
        first = start(config, sizes)
    target = torch.device(device)
    began, before = time.monotonic(), first.seen
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("training", total=config.images, completed=first.seen)
        total, count, mark = 0.0, 0, first.seen + EVERY_IMAGES
        for state in train(first, slices, config, info, target, fast_dtype(target)):
            total, count = total + state.loss, count + 1
            progress.update(task, completed=state.seen, description=f"loss {state.loss:.4f}")
            if state.seen >= mark or state.seen >= config.images:
                with whole_file(state_file) as part:
                    torch.save({**pack(state), "config": recorded}, part)
                rate = (state.seen - before) / (time.monotonic() - began)
                _log(
                    out / "log.csv",
                    {"seen": state.seen, "step": state.step, "loss": total / count, "images_per_s": rate},
                )
                extra = {
                    "images_seen": state.seen,
                    "training": recorded["training"],
                    "machine": platform.machine(),
                    "slices": len(slices.images),
                    "subjects": int(slices.subject.max()) + 1,
                }
                save(out / "prior", state.average, info, extra)
                total, count, mark = 0.0, 0, state.seen + EVERY_IMAGES


def _refuse_other(stored: dict[str, Any], wanted: dict[str, Any], free: tuple[str, str]) -> None:
    for table, fields in wanted.items():
        for name, value in fields.items():
            old = stored[table][name]
            if old != value and (table, name) != free:
                raise ValueError(f"the checkpoint has {table}.{name} = {old}, the configuration {value}")


def _log(path: Path, row: dict[str, float]) -> None:
    fresh = not path.exists()
    with path.open("a", newline="") as f:
        writer = csv.DictWriter(f, fieldnames=list(row))
        if fresh:
            writer.writeheader()
        writer.writerow(row)
