"""``invdiff train``: a prior from a TOML file, with checkpoints, validation, exact resume and an exported folder."""

from __future__ import annotations

import csv
import shutil
import signal
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from invdiff.config import build
from invdiff.files import whole_file
from invdiff.pipelines.reconstruct import dtype_of
from invdiff.pipelines.training_data import DataConfig, read_training
from invdiff.pipelines.training_report import dreams, plot
from invdiff.priors import load
from invdiff.priors.launch import Launcher, launched
from invdiff.priors.model import NetworkPrior, PriorInfo, save
from invdiff.priors.network import UNet, UNetConfig
from invdiff.priors.slices import Slices, checked, split
from invdiff.priors.training import TrainingConfig, TrainingState, pack, start, train, unpack, validate

STATE_FILE = "state.pt"
LOG_FILE = "log.csv"
COPIES = (
    2 * 4 * 4
)  # bytes on disk a parameter: network, average and AdamW's two moments in float32, twice while renaming
RENAMED = ("name", "pixel_mm")  # what a fine-tuned prior may state otherwise
TABLES = ("data", "prior", "network", "training", "start")


@dataclass(frozen=True)
class Plan:
    """A training, resolved: what is trained, how, on what, and from which weights."""

    network: UNetConfig
    config: TrainingConfig
    data: DataConfig
    prior: dict[str, Any]
    first: NetworkPrior | None

    def info(self, pixel_mm: tuple[float, float]) -> PriorInfo:
        """The trained prior's description."""
        known = {"pixel_mm": pixel_mm, **({} if self.first is None else asdict(self.first.info))}
        return build(PriorInfo, {**known, **self.prior}, "prior")


class Course(NamedTuple):
    """How a run stands: the best mean validation loss so far, and how many validations ago that was."""

    best: float = float("inf")
    stale: int = 0


def plan_of(config_file: Path) -> Plan:
    """The plan that a TOML file describes.

    Raises:
        ValueError: no TOML, a wrong table, key or value, or a prior to start from whose network is another.
    """
    try:
        document = tomllib.loads(config_file.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{config_file} cannot be read as TOML: {error}") from error
    wrong = [table for table in document if table not in TABLES]
    if wrong:
        raise ValueError(f"{config_file} has a table {wrong[0]!r}; there are: {', '.join(TABLES)}")
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
    if list(document["start"]) != ["prior"]:
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


def run(
    config_file: Path,
    data: Path,
    out: Path,
    resume: bool,
    console: Console,
    device: str = "cpu",
    validation: Path | None = None,
    workers: int = 0,
    compiled: bool = False,
    dtype: str = "auto",
) -> None:
    """Train the prior of ``config_file``; keeps ``state.pt``, ``log.csv``, pictures and ``prior/`` in ``out``.

    Raises:
        ValueError: a wrong key, data that do not fit, a folder that holds another run, nothing to resume, a full disk.
        KeyboardInterrupt: after the step at which it came, with a checkpoint.
    """
    plan = plan_of(config_file)
    _check_folder(out, resume)
    unit = plan.prior.get("unit", None if plan.first is None else plan.first.info.unit)
    if unit is None:
        raise ValueError(f"{config_file} lacks prior.unit; HU or a.u. is wanted")
    everything = read_training(data, plan.data, unit)
    info = plan.info((float(everything.pixel_mm.min()), float(everything.pixel_mm.max())))
    slices, judged = split(
        checked(everything, info), plan.config.held_out if validation is None else 0, plan.config.seed
    )
    if validation is not None:
        # the pattern names the training's files; what is validated on may be of another format
        judged = checked(read_training(validation, replace(plan.data, files="", groups=()), unit), info)
    launcher = launched(device)
    recorded = {"training": asdict(plan.config), "network": asdict(plan.network), "prior": asdict(info)}
    state, course = _first(plan, out / STATE_FILE if resume else None, recorded)
    job = Job(out, plan, info, slices, judged, recorded, launcher, console, dtype_of(dtype, launcher.device))
    if launcher.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        _check_disk(out, sum(p.numel() for p in state.network.parameters()))
        job.keep_log(state.seen)
        job.say(job.opening())
    job.run(state, course, workers, compiled)


@dataclass(frozen=True)
class Job:
    """A running training and its folder."""

    out: Path
    plan: Plan
    info: PriorInfo
    slices: Slices
    judged: Slices | None
    recorded: dict[str, Any]
    launcher: Launcher
    console: Console
    dtype: torch.dtype | None

    def opening(self) -> str:
        """What is trained on what."""
        judged = "none" if self.judged is None else f"{len(self.judged.images)} of {self.judged.subjects} subjects"
        return (
            f"training {self.info.name!r} on {len(self.slices.images)} slices of {self.slices.subjects} subjects; "
            f"validation slices: {judged}; {self.launcher.world} x {self.launcher.device.type}"
        )

    def run(self, state: TrainingState, course: Course, workers: int, compiled: bool) -> None:
        """Every step, with a checkpoint and a look at the validation after every ``every`` images."""
        config = self.plan.config
        steps = train(state, self.slices, config, self.info, self.launcher, self.dtype, workers, compiled)
        mark, losses, began, before = state.seen + config.every, [], time.monotonic(), state.seen
        with self._progress(state.seen) as bar, _interrupts() as stopped:
            for state in steps:
                losses.append(state.loss)
                bar.update(bar.task_ids[0], completed=state.seen, description=f"loss {state.loss:.4f}")
                if state.seen >= mark or state.seen >= config.images:
                    rate = (state.seen - before) / (time.monotonic() - began)
                    course = self._look(state, course, float(np.mean(losses)), rate)
                    mark, losses = state.seen + config.every, []
                    if config.patience and course.stale >= config.patience:
                        self.say(f"no better validation for {course.stale} looks: stopped at {state.seen} crops")
                        return
                if stopped:
                    if self.launcher.rank == 0:
                        self._save(state, course)
                    raise KeyboardInterrupt

    def _look(self, state: TrainingState, course: Course, loss: float, rate: float) -> Course:
        """Validate, log, write the checkpoint, the prior and the pictures; only the first process writes."""
        device = self.launcher.device
        prior = NetworkPrior(state.average.eval(), self.info, self.dtype)
        judged = {} if self.judged is None else validate(prior, self.judged, self.info, device)
        mean = float(np.mean(list(judged.values()))) if judged else float("nan")
        better = not judged or mean < course.best
        course = Course(mean, 0) if better else Course(course.best, course.stale + 1)
        if self.launcher.rank == 0:
            named = {f"val_{sigma:g}": value for sigma, value in judged.items()}
            self._log(
                {"seen": state.seen, "step": state.step, "loss": loss, "val": mean, **named, "images_per_s": rate}
            )
            if better or not self.plan.config.patience:
                save(self.out / "prior", state.average, self.info, self._figures(state, judged))
            plot(self.out / "progress.png", self.out / LOG_FILE, self.info.name)
            dreams(self.out / "samples.png", prior, max(self.plan.config.crops), device)
            self._save(state, course)
            done = f"{state.seen} of {self.plan.config.images} crops"
            self.say(f"{done}: loss {loss:.4f}, validation {mean:.4f}, {rate:.1f} crops/s")
        self.launcher.wait()
        return course

    def _figures(self, state: TrainingState, judged: dict[float, float]) -> dict[str, Any]:
        """What config.json says of the training."""
        return {
            "images_seen": state.seen,
            "steps": state.step,
            "training": self.recorded["training"],
            "started_from": None if self.plan.first is None else self.plan.first.sha256,
            "slices": len(self.slices.images),
            "subjects": self.slices.subjects,
            "validation_loss": {f"{sigma:g}": value for sigma, value in judged.items()},
        }

    def _save(self, state: TrainingState, course: Course) -> None:
        with whole_file(self.out / STATE_FILE) as part:
            try:
                torch.save({**pack(state), "config": self.recorded, "course": course._asdict()}, part)
            except RuntimeError as error:  # torch's writer says so where the disk is full
                raise OSError(str(error).splitlines()[0]) from error

    def say(self, text: str) -> None:
        if self.launcher.rank == 0:
            self.console.print(text, highlight=False, soft_wrap=True)

    def _progress(self, seen: int) -> Progress:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        shown = self.launcher.rank == 0 and self.console.is_terminal
        bar = Progress(*columns, console=self.console, disable=not shown)
        bar.add_task("training", total=self.plan.config.images, completed=seen)
        return bar

    def _log(self, row: dict[str, float]) -> None:
        path = self.out / LOG_FILE
        fresh = not path.exists()
        with path.open("a", newline="") as f:
            writer = csv.DictWriter(f, fieldnames=list(row))
            if fresh:
                writer.writeheader()
            writer.writerow(row)

    def keep_log(self, seen: int) -> None:
        """Drop the rows behind the checkpoint that is resumed: they are written again."""
        path = self.out / LOG_FILE
        if not path.exists():
            return
        head, *rows = path.read_text().splitlines(keepends=True)
        with whole_file(path) as part:
            part.write_text(head + "".join(r for r in rows if int(r.split(",")[0]) <= seen))


def _first(plan: Plan, state_file: Path | None, recorded: dict[str, Any]) -> tuple[TrainingState, Course]:
    """A fresh state, one that starts from a prior's weights, or the one to resume."""
    if state_file is None:
        weights = None if plan.first is None else plan.first.network.state_dict()
        return start(plan.config, plan.network, weights), Course()
    stored = torch.load(state_file, weights_only=True)
    # A longer or shorter run may go on from the same state; anything else would be another run.
    _refuse_other(stored["config"], recorded, free=("training", "images"))
    return unpack(stored, plan.config, plan.network), Course(**stored.get("course", {}))


def _refuse_other(stored: dict[str, Any], wanted: dict[str, Any], free: tuple[str, str]) -> None:
    for table, fields in wanted.items():
        for name, value in fields.items():
            old = stored[table].get(name, value)
            if old != value and (table, name) != free:
                raise ValueError(f"the checkpoint has {table}.{name} = {old}, the configuration {value}")


def _check_folder(out: Path, resume: bool) -> None:
    state_file = out / STATE_FILE
    if state_file.exists() and not resume:
        raise ValueError(f"{out} holds a run already; give --resume to go on with it, or another folder")
    if resume and not state_file.exists():
        raise ValueError(f"{out} holds no {STATE_FILE} to resume from")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; a folder is wanted")


def _check_disk(out: Path, parameters: int) -> None:
    free, needed = shutil.disk_usage(out).free, COPIES * parameters
    if free < needed:
        raise ValueError(f"{out} has {free / 1e6:.0f} MB free; this training keeps {needed / 1e6:.0f} MB there")


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """A list that a first Ctrl-C fills, so that a step is finished before it stops; a second one stops at once."""
    caught: list[int] = []

    def note(number: int, _frame: object) -> None:
        caught.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    old = signal.signal(signal.SIGINT, note)
    try:
        yield caught
    finally:
        signal.signal(signal.SIGINT, old)
