"""``invdiff train``: a prior from a TOML file, with checkpoints, validation, exact resume and an exported folder."""

from __future__ import annotations

import csv
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from invdiff.files import read_torch, whole_file
from invdiff.pipelines.devices import device_of, dtype_of
from invdiff.pipelines.training_data import read_training
from invdiff.pipelines.training_plan import Plan, plan_of
from invdiff.pipelines.training_report import dreams, plot
from invdiff.priors.launch import Launcher, launched
from invdiff.priors.model import NetworkPrior, PriorInfo, save
from invdiff.priors.slices import Slices, check_enough, checked, digest, split
from invdiff.priors.training import SIGMAS, Denoising, TrainingState, pack, start, train, unpack, validate

STATE_FILE = "state.pt"
LOG_FILE = "log.csv"
COPIES = 2 * 4 * 4  # bytes on disk a parameter: network, average, AdamW's two moments, float32, twice while renaming
FREE = (("training", "images"),)  # what may change between a run and its continuation


class Course(NamedTuple):
    """How a run stands.

    best: least mean validation loss so far; stale: validations since then; loss, steps: sum of the losses of so many
    steps since the last validation.
    """

    best: float = float("inf")
    stale: int = 0
    loss: float = 0.0
    steps: int = 0


@dataclass(frozen=True)
class Way:
    """How a training is carried out; none of it changes the result beyond rounding.

    Args:
        device: such as ``cpu`` or ``cuda``; under torchrun each process takes its own of that kind.
        dtype: of the network's arithmetic: auto (bfloat16 where it is native), float32, bfloat16.
        workers: processes that draw crops beside each training process.
        compiled: compile the network.
    """

    device: str = "cpu"
    dtype: str = "auto"
    workers: int = 0
    compiled: bool = False

    def __post_init__(self) -> None:
        if self.dtype == "float16":
            raise ValueError("dtype 'float16' is too narrow for gradients; one of auto, float32, bfloat16 is wanted")
        if self.workers < 0:
            raise ValueError(f"workers is {self.workers}; 0 or more is wanted")


def run(
    config_file: Path, data: Path, out: Path, resume: bool, console: Console, way: Way, validation: Path | None = None
) -> None:
    """Train the prior of ``config_file``; keeps ``state.pt``, ``log.csv``, pictures and ``prior/`` in ``out``.

    Args:
        config_file: TOML; see docs/training.md.
        data: folder of what is trained on.
        out: folder of the run.
        resume: go on from its checkpoint.
        console: where the first process says how it goes.
        way: device and the like.
        validation: folder of what is validated on, in the place of held-out subjects.

    Raises:
        ValueError: a wrong key, data that do not fit, a folder that holds another run, nothing to resume, a full disk.
        KeyboardInterrupt: after the step at which it came, with a checkpoint.
    """
    plan = plan_of(config_file)
    _check_folder(out, resume)
    dtype = dtype_of(way.dtype, device_of(way.device))
    launcher = launched(way.device)
    slices, judged, info = _read(plan, data, validation)
    recorded = {
        "training": asdict(plan.config),
        "network": asdict(plan.network),
        "prior": asdict(info),
        "data": {**asdict(plan.data), "trained": digest(slices), "validated": digest(judged)},
        "start": {"sha256": None if plan.first is None else plan.first.sha256},
    }
    state, course = _first(plan, out / STATE_FILE if resume else None, recorded)
    job = Job(out, plan, info, slices, judged, recorded, launcher, console, dtype)
    if launcher.rank == 0:
        _prepare(out, sum(p.numel() for p in state.network.parameters()))
        _keep_log(out / LOG_FILE, state.seen)
        job.say(job.opening())
    job.run(state, course, way)


def _read(plan: Plan, data: Path, validation: Path | None) -> tuple[Slices, Slices | None, PriorInfo]:
    """What is trained on, what is validated on, and the prior's description."""
    everything = read_training(data, plan.data, plan.unit)
    info = plan.info((float(everything.pixel_mm.min()), float(everything.pixel_mm.max())))
    everything = checked(everything, info)
    if validation is None:
        slices, judged = split(everything, plan.config.held_out, plan.config.seed)
    else:
        other = replace(plan.data, files=plan.data.validation_files or plan.data.files, groups=())
        slices, judged = everything, checked(read_training(validation, other, plan.unit), info)
    check_enough(slices)
    if plan.config.patience and judged is None:
        raise ValueError(
            f"training.patience is {plan.config.patience} and nothing is validated on: held_out is "
            f"{plan.config.held_out} of {everything.subjects} subjects; give --validation, or patience = 0"
        )
    return slices, judged, info


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

    def run(self, state: TrainingState, course: Course, way: Way) -> None:
        """Every step, with a checkpoint and a look at the validation at multiples of ``every`` images."""
        config = self.plan.config
        task = Denoising(self.slices, config, self.info)
        steps = train(state, task, config, self.launcher, self.dtype, way.workers, way.compiled)
        began, before = time.monotonic(), state.seen
        with self._progress(state.seen) as bar, _interrupts() as caught:
            while not self._done(state, course):
                last = state.seen // config.every
                state = next(steps)
                course = course._replace(loss=course.loss + state.loss, steps=course.steps + 1)
                bar.update(bar.task_ids[0], completed=state.seen, description=f"loss {state.loss:.4f}")
                if state.seen // config.every > last or state.seen >= config.images:
                    course = self._look(state, course, (state.seen - before) / (time.monotonic() - began))
                if self._shared(float(bool(caught))):
                    if self.launcher.rank == 0:
                        self._save(state, course)
                    raise KeyboardInterrupt

    def _done(self, state: TrainingState, course: Course) -> bool:
        patience = self.plan.config.patience
        if patience and course.stale >= patience:
            self.say(f"no better validation in the last {course.stale}: stopped at {state.seen} crops")
            return True
        if state.seen >= self.plan.config.images:
            self.say(f"all {self.plan.config.images} crops are seen")
            return True
        return False

    def _shared(self, value: float) -> float:
        """The sum of a number over the processes, so that all decide alike."""
        return float(self.launcher.total(torch.tensor(value, device=self.launcher.device)))

    def _look(self, state: TrainingState, course: Course, rate: float) -> Course:
        """Validate, log, write the prior, the checkpoint and the pictures: all by the first process."""
        first = self.launcher.rank == 0
        prior = NetworkPrior(state.average.eval(), self.info, self.dtype)
        judged = {sigma: float("nan") for sigma in SIGMAS}
        if first and self.judged is not None:
            judged = validate(prior, self.judged, self.info, self.launcher.device)
        mean = self._shared(float(np.mean(list(judged.values()))) if first else 0.0)
        better = self.judged is None or mean < course.best
        loss = course.loss / course.steps
        course = Course(mean, 0) if better else Course(course.best, course.stale + 1)
        if first:
            named = {f"val_{sigma:g}": value for sigma, value in judged.items()}
            row = {"seen": state.seen, "step": state.step, "loss": loss, "val": mean}
            _log(self.out / LOG_FILE, {**row, **named, "images_per_s": rate})
            if better or not self.plan.config.patience:
                save(self.out / "prior", state.average, self.info, self._figures(state, judged))
            self._save(state, course)
            plot(self.out / "progress.png", self.out / LOG_FILE, self.info.name)
            dreams(self.out / "samples.png", prior, max(self.plan.config.crops), self.launcher.device)
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
            "started_from": self.recorded["start"]["sha256"],
            "slices": len(self.slices.images),
            "subjects": self.slices.subjects,
            "validation_loss": {f"{sigma:g}": value for sigma, value in judged.items() if np.isfinite(value)},
        }

    def _save(self, state: TrainingState, course: Course) -> None:
        with whole_file(self.out / STATE_FILE) as part:
            try:
                torch.save({**pack(state), "config": self.recorded, "course": course._asdict()}, part)
            except RuntimeError as error:  # torch's writer says so where the disk is full
                raise OSError(str(error).splitlines()[0]) from error

    def say(self, text: str) -> None:
        """One line from the first process."""
        if self.launcher.rank == 0:
            self.console.print(text, highlight=False, soft_wrap=True)

    def _progress(self, seen: int) -> Progress:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        shown = self.launcher.rank == 0 and self.console.is_terminal
        bar = Progress(*columns, console=self.console, disable=not shown)
        bar.add_task("training", total=self.plan.config.images, completed=seen)
        return bar


def _log(path: Path, row: dict[str, float]) -> None:
    fresh = not path.exists()
    try:
        with path.open("a", newline="") as f:
            writer = csv.DictWriter(f, fieldnames=list(row))
            if fresh:
                writer.writeheader()
            writer.writerow(row)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror or error}") from error


def _keep_log(path: Path, seen: int) -> None:
    """Drop the rows behind the checkpoint that is resumed, which are written again, and what a kill tore."""
    if not path.exists():
        return
    head, *rows = path.read_text().splitlines(keepends=True) or [""]
    whole = [r for r in rows if r.endswith("\n") and r.count(",") == head.count(",")]
    with whole_file(path) as part:
        part.write_text(head + "".join(r for r in whole if int(r.split(",")[0]) <= seen))


def _first(plan: Plan, state_file: Path | None, recorded: dict[str, Any]) -> tuple[TrainingState, Course]:
    """A fresh state, one that starts from a prior's weights, or the one to resume."""
    if state_file is None:
        weights = None if plan.first is None else plan.first.network.state_dict()
        return start(plan.config, plan.network, weights), Course()
    stored = read_torch(state_file)
    try:
        _refuse_other(stored["config"], recorded, state_file)
        return unpack(stored, plan.config, plan.network), Course(**stored["course"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{state_file} is not the checkpoint of a training: it lacks {error}") from error


def _refuse_other(stored: dict[str, Any], wanted: dict[str, Any], path: Path) -> None:
    """A longer or shorter run may go on from the same state; anything else would be another run."""
    for table, fields in wanted.items():
        for name, value in fields.items():
            old = stored[table][name]
            if old != value and (table, name) not in FREE:
                raise ValueError(f"{path} is of another run: {table}.{name} is {old} there, {value} now")


def _check_folder(out: Path, resume: bool) -> None:
    state_file = out / STATE_FILE
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; a folder is wanted")
    if state_file.exists() and not resume:
        raise ValueError(f"{out} holds a run already; give --resume to go on with it, or another folder")
    if resume and not state_file.is_file():
        raise ValueError(f"{out} holds no {STATE_FILE} to resume from")


def _prepare(out: Path, parameters: int) -> None:
    """Make the folder, see that it has room, and remove what a killed run left half-written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        for part in out.rglob(".part-*"):
            part.unlink()
    except OSError as error:
        raise ValueError(f"{out} cannot be written: {error.strerror or error}") from error
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
