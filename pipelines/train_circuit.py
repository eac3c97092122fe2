"""``invdiff train-circuit``: a circuit from a TOML file, with checkpoints, validation, exact resume and its folder."""

from __future__ import annotations

import csv
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from invdiff.circuits import (
    Categorical,
    Circuit,
    GridInfo,
    ImageCircuit,
    Learned,
    Structure,
    chow_liu,
    factorised,
    full_batch,
    k_means_start,
    stepwise,
)
from invdiff.circuits.images import bits, save
from invdiff.circuits.learning import Counts
from invdiff.circuits.structure import chow_liu_parents, mutual_information
from invdiff.files import read_torch, whole_file
from invdiff.pipelines.circuit_plan import CircuitPlan, Draws, judged_cells, plan_of
from invdiff.pipelines.training_data import read_training
from invdiff.priors.model import PriorInfo
from invdiff.priors.slices import Slices, check_enough, checked, digest, split

STATE_FILE = "state.pt"
LOG_FILE = "log.csv"
CIRCUIT_FOLDER = "circuit"
FIXED = 2**31  # key of the draws for the structure and the start; steps are keyed from 0
PSEUDOCOUNTS = (0.3, 3.0, 30.0)  # tried for the baselines, the best of which counts


def run(config_file: Path, data: Path, out: Path, resume: bool, console: Console) -> None:
    """Learn the circuit of ``config_file``; keeps ``state.pt``, ``log.csv`` and ``circuit/`` in ``out``.

    Args:
        config_file: TOML; its tables are circuit, training and data.
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
    job = Job(out, plan, slices, judged, recorded, console)
    job.run(job.resumed() if resume else job.fresh())


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
    """How a run stands. within: see ``GridInfo``; baselines: held-out bits a cell; rows: of the log so far."""

    learned: Learned
    within: float
    baselines: dict[str, float]
    rows: tuple[dict[str, float], ...] = ()


@dataclass(frozen=True)
class Job:
    """A circuit's training and its folder."""

    out: Path
    plan: CircuitPlan
    slices: Slices
    judged: Slices
    recorded: dict[str, Any]
    console: Console

    def fresh(self) -> Standing:
        """The structure, the K-means start and the baselines, of the same draws."""
        circuit, config = self.plan.circuit, self.plan.training
        cells, inside = Draws(self.slices, self.info(0.0), config).cells(FIXED, config.images)
        if bool(torch.isnan(cells).any()):
            raise ValueError("the slices are smaller than the grid; a circuit of fewer rows and columns is wanted")
        structure, info = circuit.tree(cells), self.info(inside**0.5)
        x = circuit.data(cells, info)
        learned = k_means_start(structure, circuit.first_inputs(), x, circuit.states, config.pseudocount, config.seed)
        self._say(f"{structure.regions} regions in {len(structure.levels)} levels, {circuit.states} states each")
        return Standing(learned, info.within, self._baselines(info.levels_of(cells), info))

    def info(self, within: float) -> GridInfo:
        """The circuit's description."""
        pixel = self.slices.pixel_mm
        return self.plan.circuit.info(within, (float(pixel.min()), float(pixel.max())))

    def _baselines(self, x: Tensor, info: GridInfo) -> dict[str, float]:
        """Held-out bits a cell of independent cells and of the Chow-Liu tree, each with its best pseudocount."""
        judged, found = self._judged(info), dict[str, float]()
        parents = chow_liu_parents(mutual_information(x, self.plan.circuit.bins))
        levels = Categorical(torch.zeros(1, 1, info.levels).log_softmax(-1))
        for pseudocount in PSEUDOCOUNTS:
            tree = chow_liu(x, info.levels, pseudocount, parents)
            for name, circuit in (("factorised", factorised(levels, x, pseudocount)), ("chow-liu", tree)):
                value = bits(ImageCircuit(circuit, info), judged)
                found[name] = min(value, found.get(name, value))
        self._say("held-out bits a cell: " + ", ".join(f"{name} {value:.4f}" for name, value in found.items()))
        return found

    def _judged(self, info: GridInfo) -> Tensor:
        return judged_cells(self.judged, info, self.plan.training.judged)

    def run(self, standing: Standing) -> None:
        """Every step, with a look at the validation and a checkpoint at multiples of ``every`` steps."""
        config, info = self.plan.training, self.info(standing.within)
        draws = Draws(self.slices, info, config)
        fixed = self.plan.circuit.data(draws.cells(FIXED, config.images)[0], info) if config.full else None
        judged = self._judged(info)
        try:
            while standing.learned.step < config.steps:
                learned, value = self._step(standing.learned, draws, fixed)
                standing = standing._replace(learned=learned)
                if learned.step % config.every == 0 or learned.step == config.steps:
                    standing = self._look(standing, value, judged)
        except KeyboardInterrupt:
            self._save(standing)
            raise
        self._say(f"all {config.steps} steps are done: {self.out / CIRCUIT_FOLDER}")

    def _step(self, state: Learned, draws: Draws, fixed: Tensor | None) -> tuple[Learned, float]:
        """One M-step, and the mean ln p(x) before it of what it saw."""
        config = self.plan.training
        if fixed is not None:
            circuit, value = full_batch(state.circuit, fixed.split(config.batch), config.pseudocount)
            return Learned(state.step + 1, circuit, state.memory), value
        x = self.plan.circuit.data(draws.cells(state.step, config.batch)[0], draws.info)
        return stepwise(state, x, (state.step + 2) ** -config.power, config.images, config.pseudocount)

    def _look(self, standing: Standing, value: float, judged: Tensor) -> Standing:
        """Validate, log, write the circuit and the checkpoint."""
        info, learned = self.info(standing.within), standing.learned
        circuit = ImageCircuit(learned.circuit, info)
        width = math.log2(info.width) if self.plan.circuit.inputs == "gaussian" else 0.0
        seen = -value / math.log(2) / learned.circuit.structure.variables - width
        row = {"step": learned.step, "bits": seen, "held_out_bits": bits(circuit, judged)}
        standing = standing._replace(rows=(*standing.rows, row))
        figures = {
            "steps": learned.step,
            "training": self.recorded["training"],
            "slices": len(self.slices.images),
            "subjects": self.slices.subjects,
            "held_out_bits_per_cell": {"circuit": row["held_out_bits"], **standing.baselines},
        }
        save(self.out / CIRCUIT_FOLDER, circuit, figures)
        with whole_file(self.out / CIRCUIT_FOLDER / "README.md") as part:
            part.write_text(card(circuit, self.recorded["circuit"], figures))
        with whole_file(self.out / LOG_FILE) as part, part.open("w", newline="") as f:
            writer = csv.DictWriter(f, list(row))
            writer.writeheader()
            writer.writerows(standing.rows)
        self._save(standing)
        self._say(
            f"{learned.step} of {self.plan.training.steps} steps: {seen:.4f} bits a cell, "
            f"held out {row['held_out_bits']:.4f}"
        )
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
            refuse_other(stored["config"], self.recorded, path)
            inputs = replace(self.plan.circuit.first_inputs(), **stored["inputs"])  # type: ignore[type-var]
            circuit = Circuit(Structure(**stored["structure"]), inputs, stored["root"], stored["weights"])
            learned = Learned(stored["step"], circuit, Counts(**stored["memory"]))
            return Standing(learned, **stored["standing"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} is not the checkpoint of a circuit's training: it lacks {error}") from error

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)


def refuse_other(stored: dict[str, Any], wanted: dict[str, Any], path: Path) -> None:
    """A longer or shorter run may go on from the same state; anything else would be another run."""
    for table, values in wanted.items():
        for name, value in values.items():
            if stored[table][name] != value and (table, name) != ("training", "steps"):
                raise ValueError(
                    f"{path} is of another run: {table}.{name} is {stored[table][name]} there, {value} now"
                )


def _check_folder(out: Path, resume: bool) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; a folder is wanted")
    if (out / STATE_FILE).exists() and not resume:
        raise ValueError(f"{out} holds a run already; give --resume to go on with it, or another folder")
    if resume and not (out / STATE_FILE).is_file():
        raise ValueError(f"{out} holds no {STATE_FILE} to resume from")


def card(circuit: ImageCircuit, config: dict[str, Any], figures: dict[str, Any]) -> str:
    """What is known of a circuit, as Markdown."""
    info, s = circuit.info, circuit.circuit.structure
    bits_of = figures["held_out_bits_per_cell"]
    rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in bits_of.items())
    low, high = info.pixel_mm
    how = (
        f"{config['structure']}, {s.regions} regions in {len(s.levels)} levels, K = {circuit.circuit.states}, "
        f"{circuit.circuit.inputs.kind} inputs"
    )
    learned = f"{figures['slices']} slices of {figures['subjects']} subjects (pixels of {low:.3g} to {high:.3g} mm)"
    return f"""# The circuit "{info.name}"

An exact density of {info.rows} x {info.columns} cells, each the mean of {info.block} x {info.block} pixels,
in {info.unit} from {info.low:g} to {info.high:g}: {how}.
Learned by `invdiff train-circuit` from {learned} in {figures["steps"]} steps of EM.

Bits a cell of {info.levels} levels, on subjects held out; the baselines each with their best pseudocount:

| model | bits |
|---|---|
{rows}

It steers a diffusion prior at high noise (`invdiff.priors.Steered`). It knows nothing of what is smaller than a cell.
Not for diagnosis.
"""
