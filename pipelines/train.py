"""``invdiff train``: a prior from a TOML file, with checkpoints, validation, exact resume and an exported folder."""

from __future__ import annotations

import shutil
import time
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from invdiff.files import read_torch, whole_file
from invdiff.pipelines.devices import device_of, dtype_of
from invdiff.pipelines.training_data import read_training
from invdiff.pipelines.training_folder import STATE_FILE, check_folder, interrupts, keep_log, log, refuse_other
from invdiff.pipelines.training_plan import Plan, plan_of
from invdiff.pipelines.training_report import dreams, plot
from invdiff.priors.launch import Launcher, launched
from invdiff.priors.model import NetworkPrior, PriorInfo, save
from invdiff.priors.network import UNetConfig
from invdiff.priors.slices import Slices, check_enough, checked, digest, split
from invdiff.priors.training import (
    SIGMAS,
    Denoising,
    Learning,
    Task,
    TrainingConfig,
    TrainingState,
    pack,
    start,
    train,
    unpack,
    validate,
)

LOG_FILE = "log.csv"
COPIES = 2 * 4 * 4  # bytes on disk a parameter: network, average, AdamW's two moments, float32, twice while renaming


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
    check_folder(out, resume)
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
    network = plan.network
    weights = None if plan.first is None else plan.first.network.state_dict()
    job = PriorJob(out, plan.config, network, 0, info, recorded, launcher, console, dtype, slices, judged)
    job.begin(resume, way, weights)


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
class Job(ABC):
    """A running training and its folder, whatever is trained.

    Args:
        out: its folder.
        config: how the network learns.
        network: its sizes.
        extra: channels that it sees beside the image's.
        info: what is trained.
        recorded: what a continuation must share.
        launcher: the processes.
        console: of the first one.
        dtype: of the network's arithmetic.
    """

    out: Path
    config: Learning
    network: UNetConfig
    extra: int
    info: PriorInfo
    recorded: dict[str, Any]
    launcher: Launcher
    console: Console
    dtype: torch.dtype | None

    @abstractmethod
    def task(self) -> Task[Any]:
        """What the network is trained for."""

    @abstractmethod
    def opening(self) -> str:
        """What is trained on what."""

    @property
    @abstractmethod
    def validated(self) -> bool:
        """Whether there is something to validate on."""

    @abstractmethod
    def judge(self, state: TrainingState) -> dict[float, float]:
        """The validation loss at some noise levels."""

    @abstractmethod
    def export(self, state: TrainingState, judged: dict[float, float]) -> None:
        """Write what was trained so far into a folder of its own."""

    def pictures(self, state: TrainingState) -> None:  # noqa: B027
        """Draw what can be drawn of it."""

    def begin(self, resume: bool, way: Way, weights: dict[str, Tensor] | None = None) -> None:
        """The whole training, fresh (with ``weights`` to start from) or resumed."""
        state, course = self._first(resume, weights)
        if self.launcher.rank == 0:
            _prepare(self.out, sum(p.numel() for p in state.network.parameters()))
            keep_log(self.out / LOG_FILE, state.seen)
            self.say(self.opening())
        self.run(state, course, way)

    def _first(self, resume: bool, weights: dict[str, Tensor] | None) -> tuple[TrainingState, Course]:
        """A fresh state, one that starts from a prior's weights, or the one to resume."""
        if not resume:
            return start(self.config, self.network, weights, self.extra), Course()
        stored = read_torch(self.out / STATE_FILE)
        try:
            refuse_other(stored["config"], self.recorded, self.out / STATE_FILE)
            return unpack(stored, self.config, self.network, self.extra), Course(**stored["course"])
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{self.out / STATE_FILE} is not the checkpoint of a training: it lacks {error}"
            ) from error

    def run(self, state: TrainingState, course: Course, way: Way) -> None:
        """Every step, with a checkpoint and a look at the validation at multiples of ``every`` images."""
        config = self.config
        steps = train(state, self.task(), config, self.launcher, self.dtype, way.workers, way.compiled)
        began, before = time.monotonic(), state.seen
        with self._progress(state.seen) as bar, interrupts() as caught:
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
        patience = self.config.patience
        if patience and course.stale >= patience:
            self.say(f"no better validation in the last {course.stale}: stopped at {state.seen} crops")
            return True
        if state.seen >= self.config.images:
            self.say(f"all {self.config.images} crops are seen")
            return True
        return False

    def _shared(self, value: float) -> float:
        """The sum of a number over the processes, so that all decide alike."""
        return float(self.launcher.total(torch.tensor(value, device=self.launcher.device)))

    def _look(self, state: TrainingState, course: Course, rate: float) -> Course:
        """Validate, log, write the prior, the checkpoint and the pictures: all by the first process."""
        first = self.launcher.rank == 0
        state.average.eval()
        judged = self.judge(state) if first and self.validated else {sigma: float("nan") for sigma in SIGMAS}
        mean = self._shared(float(np.mean(list(judged.values()))) if first else 0.0)
        better = not self.validated or mean < course.best
        loss = course.loss / course.steps
        course = Course(mean, 0) if better else Course(course.best, course.stale + 1)
        if first:
            named = {f"val_{sigma:g}": value for sigma, value in judged.items()}
            row = {"seen": state.seen, "step": state.step, "loss": loss, "val": mean}
            log(self.out / LOG_FILE, {**row, **named, "images_per_s": rate})
            if better or not self.config.patience:
                self.export(state, judged)
            self._save(state, course)
            plot(self.out / "progress.png", self.out / LOG_FILE, self.info.name)
            self.pictures(state)
            done = f"{state.seen} of {self.config.images} crops"
            self.say(f"{done}: loss {loss:.4f}, validation {mean:.4f}, {rate:.1f} crops/s")
        self.launcher.wait()
        return course

    def figures(self, state: TrainingState, judged: dict[float, float]) -> dict[str, Any]:
        """What config.json says of the training."""
        return {
            "images_seen": state.seen,
            "steps": state.step,
            "training": self.recorded["training"],
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
        bar.add_task("training", total=self.config.images, completed=seen)
        return bar


@dataclass(frozen=True)
class PriorJob(Job):
    """The training of a prior.

    Args:
        slices: what is trained on.
        judged: what is validated on, if anything.
    """

    config: TrainingConfig
    slices: Slices
    judged: Slices | None

    def task(self) -> Denoising:
        """Denoising of crops."""
        return Denoising(self.slices, self.config, self.info)

    def opening(self) -> str:
        """How many slices of how many subjects."""
        judged = "none" if self.judged is None else f"{len(self.judged.images)} of {self.judged.subjects} subjects"
        return (
            f"training {self.info.name!r} on {len(self.slices.images)} slices of {self.slices.subjects} subjects; "
            f"validation slices: {judged}; {self.launcher.world} x {self.launcher.device.type}"
        )

    @property
    def validated(self) -> bool:
        """Whether any slices are held out."""
        return self.judged is not None

    def judge(self, state: TrainingState) -> dict[float, float]:
        """The EDM loss of the averaged weights."""
        if self.judged is None:
            return {}
        return validate(self._prior(state), self.judged, self.info, self.launcher.device)

    def export(self, state: TrainingState, judged: dict[float, float]) -> None:
        """``prior/``."""
        more = {
            "started_from": self.recorded["start"]["sha256"],
            "slices": len(self.slices.images),
            "subjects": self.slices.subjects,
        }
        save(self.out / "prior", state.average, self.info, {**self.figures(state, judged), **more})

    def pictures(self, state: TrainingState) -> None:
        """What the prior dreams."""
        dreams(self.out / "samples.png", self._prior(state), max(self.config.crops), self.launcher.device)

    def _prior(self, state: TrainingState) -> NetworkPrior:
        return NetworkPrior(state.average, self.info, self.dtype)


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
