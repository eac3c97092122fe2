"""``invdiff train-circuit``: a circuit from a TOML file, with checkpoints, validation, exact resume and its folder."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from invdiff.circuits import Circuit, Learned, Structure, full_batch, stepwise
from invdiff.circuits.learning import Counts
from invdiff.files import read_torch, whole_file
from invdiff.pipelines.circuit_over import Over, OverCells, OverCodes
from invdiff.pipelines.circuit_plan import CircuitPlan, plan_of
from invdiff.pipelines.train_autoencoder import STATE_FILE as AUTOENCODER_FILE
from invdiff.pipelines.train_autoencoder import AutoencoderJob, digest_of, refuse_other, write_log
from invdiff.pipelines.training_data import read_training
from invdiff.priors.model import PriorInfo, fast_dtype
from invdiff.priors.slices import Slices, check_enough, checked, digest, split

STATE_FILE = "state.pt"
STATE_FILES = (STATE_FILE, AUTOENCODER_FILE)
LOG_FILE = "log.csv"
CIRCUIT_FOLDER = "circuit"
FIXED = 2**31  # key of the draws for the structure and the start; steps are keyed from 0
FREE = (("training", "steps"),)  # a longer or shorter run may go on from the same state


def run(config_file: Path, data: Path, out: Path, resume: bool, console: Console) -> None:
    """Learn the circuit of ``config_file``; keeps ``state.pt``, ``log.csv`` and ``circuit/`` in ``out``.

    A circuit over codes has an autoencoder, which is trained first (``autoencoder.pt`` and ``autoencoder.csv``).

    Args:
        config_file: TOML; its tables are circuit, autoencoder, training and data.
        data: folder of slices.
        out: folder of the run.
        resume: go on from its checkpoint, bit-identically.
        console: where it says how it goes.

    Raises:
        ValueError: a wrong key, data that do not fit, a folder that holds another run, nothing to resume.
        KeyboardInterrupt: with a checkpoint of the last finished step.
    """
    plan = plan_of(config_file)
    _check_folder(out, resume)
    slices, judged = _read(plan, data)
    recorded = {
        "circuit": asdict(plan.circuit),
        "training": asdict(plan.training),
        "data": {**asdict(plan.data), "trained": digest(slices), "validated": digest(judged)},
    }
    out.mkdir(parents=True, exist_ok=True)
    over: Over = OverCells(plan, slices, judged)
    if plan.autoencoder is not None:
        dtype = fast_dtype("cpu")
        stage = AutoencoderJob(out, plan, judged, over.draws, recorded["data"], dtype, console)
        over = OverCodes(plan, slices, judged, *stage.run(), dtype)
        recorded["autoencoder"] = {**asdict(plan.autoencoder), "weights": digest_of(over.autoencoder)}
    job = Job(out, over, recorded, console)
    job.run(job.resumed() if (out / STATE_FILE).is_file() else job.fresh())


def _read(plan: CircuitPlan, data: Path) -> tuple[Slices, Slices]:
    """What is learned from, and what is validated on: other subjects."""
    c = plan.circuit
    everything = read_training(data, plan.data, c.unit)
    everything = checked(everything, PriorInfo(c.name, c.unit, c.low, c.high, 1.0, 2.0, 1.0, (0.0, 0.0)))
    slices, judged = split(everything, plan.training.held_out, plan.training.seed)
    if judged is None:
        raise ValueError(f"{data} holds {everything.subjects} subject; at least 2 are wanted, one to validate on")
    check_enough(slices)
    return slices, judged


class Standing(NamedTuple):
    """How a run stands. within: see ``GridInfo``; baselines: held-out bits a variable; rows: of the log so far."""

    learned: Learned
    within: float
    baselines: dict[str, float]
    rows: tuple[dict[str, float], ...] = ()


@dataclass(frozen=True)
class Job:
    """A circuit's training and its folder."""

    out: Path
    over: Over
    recorded: dict[str, Any]
    console: Console

    @property
    def plan(self) -> CircuitPlan:
        """What is wanted."""
        return self.over.plan

    def fresh(self) -> Standing:
        """The structure, the start of EM and the baselines, of the same draws."""
        drawn = self.over.drawn(FIXED, self.plan.training.images)
        if bool(torch.isnan(drawn.values).any()):
            raise ValueError("the slices are smaller than the grid; a circuit of fewer rows and columns is wanted")
        structure = self.over.tree(drawn.values)
        learned = self.over.start(structure, drawn)
        self._say(
            f"{structure.regions} regions in {len(structure.levels)} levels, {learned.circuit.states} states each"
        )
        baselines = self.over.baselines(drawn.values)
        said = ", ".join(f"{name} {value:.4f}" for name, value in baselines.items())
        self._say(f"held-out bits a {self.over.word}: {said}")
        return Standing(learned, drawn.within**0.5, baselines)

    def run(self, standing: Standing) -> None:
        """Every step, with a look at the validation and a checkpoint at multiples of ``every`` steps."""
        config, over = self.plan.training, self.over
        fixed = over.data(over.values(FIXED, config.images)) if config.full else None
        try:
            while standing.learned.step < config.steps:
                learned, value = self._step(standing.learned, fixed)
                standing = standing._replace(learned=learned)
                if learned.step % config.every == 0 or learned.step == config.steps:
                    standing = self._look(standing, value)
        except KeyboardInterrupt:
            self._save(standing)
            raise
        over.pictures(self.out / CIRCUIT_FOLDER, standing.learned.circuit)
        self._say(f"all {config.steps} steps are done: {self.out / CIRCUIT_FOLDER}")

    def _step(self, state: Learned, fixed: Tensor | None) -> tuple[Learned, float]:
        """One M-step, and the mean ln p(x) before it of what it saw."""
        config = self.plan.training
        if fixed is not None:
            circuit, value = full_batch(state.circuit, fixed.split(config.batch), config.pseudocount)
            return Learned(state.step + 1, circuit, state.memory), value
        x = self.over.data(self.over.values(state.step, config.batch))
        return stepwise(state, x, (state.step + 2) ** -config.power, config.images, config.pseudocount)

    def _look(self, standing: Standing, value: float) -> Standing:
        """Validate, log, write the circuit and the checkpoint."""
        learned, over = standing.learned, self.over
        width = math.log2(over.info(0.0).width) if self.plan.circuit.inputs == "gaussian" else 0.0
        seen = -value / math.log(2) / learned.circuit.structure.variables - width
        held_out = over.bits(learned.circuit, over.held_out)
        row = {"step": learned.step, "bits": seen, "held_out_bits": held_out}
        standing = standing._replace(rows=(*standing.rows, row))
        figures = {
            "steps": learned.step,
            "training": self.recorded["training"],
            "slices": len(over.slices.images),
            "subjects": over.slices.subjects,
            f"held_out_bits_per_{over.word}": {"circuit": held_out, **standing.baselines},
        }
        told = over.save(self.out / CIRCUIT_FOLDER, learned.circuit, standing.within, figures)
        with whole_file(self.out / CIRCUIT_FOLDER / "README.md") as part:
            part.write_text(told)
        write_log(self.out / LOG_FILE, standing.rows)
        self._save(standing)
        done = f"{learned.step} of {self.plan.training.steps} steps"
        self._say(f"{done}: {seen:.4f} bits a {over.word}, held out {held_out:.4f}")
        return standing

    def _save(self, standing: Standing) -> None:
        circuit = standing.learned.circuit
        document = {
            "config": self.recorded,
            "step": standing.learned.step,
            "structure": asdict(circuit.structure),
            "inputs": circuit.inputs.tensors,
            "root": circuit.root,
            "weights": circuit.weights,
            "memory": standing.learned.memory._asdict(),
            "standing": {"within": standing.within, "baselines": standing.baselines, "rows": standing.rows},
        }
        with whole_file(self.out / STATE_FILE) as part:
            torch.save(document, part)

    def resumed(self) -> Standing:
        """The standing that the folder's checkpoint holds.

        Raises:
            ValueError: the checkpoint of something else, or of another run.
        """
        path = self.out / STATE_FILE
        stored = read_torch(path)
        try:
            refuse_other(stored["config"], self.recorded, path, FREE)
            inputs = replace(self.plan.circuit.first_inputs(), **stored["inputs"])  # type: ignore[type-var]
            circuit = Circuit(Structure(**stored["structure"]), inputs, stored["root"], stored["weights"])
            learned = Learned(stored["step"], circuit, Counts(**stored["memory"]))
            return Standing(learned, **stored["standing"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} is not the checkpoint of a circuit's training: it lacks {error}") from error

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)


def _check_folder(out: Path, resume: bool) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; a folder is wanted")
    held = [name for name in STATE_FILES if (out / name).is_file()]
    if held and not resume:
        raise ValueError(f"{out} holds a run already; give --resume to go on with it, or another folder")
    if resume and not held:
        raise ValueError(f"{out} holds no {STATE_FILE} to resume from")
