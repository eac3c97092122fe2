"""The first stage of ``invdiff train-circuit`` over codes: the autoencoder, with checkpoints and exact resume."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from invdiff.circuits.autoencoder import (
    Autoencoder,
    AutoencoderState,
    autoencoder_step,
    optimizer_of,
    start_autoencoder,
)
from invdiff.files import read_torch, whole_file
from invdiff.metrics import psnr, ssim
from invdiff.pipelines.circuit_draws import Draws, judged_images
from invdiff.pipelines.circuit_plan import AutoencoderPlan, CircuitPlan
from invdiff.pipelines.training_folder import interrupts
from invdiff.priors.slices import Slices

STATE_FILE = "autoencoder.pt"
LOG_FILE = "autoencoder.csv"
FIRST = 2**30  # key of its first draws; those of the circuit are keyed from 0
MOST_JUDGED = 64  # validation slices that it looks at
OF_THE_IMAGES = ("unit", "low", "high", "rows", "columns")  # keys of the circuit that its images depend on
OF_THE_DRAWS = ("held_out", "flip", "shift", "rotate", "zoom", "gamma", "brightness", "group_power", "seed")


class Standing(NamedTuple):
    """How the stage stands. rows: of the log so far."""

    state: AutoencoderState
    rows: tuple[dict[str, float], ...] = ()


@dataclass(frozen=True)
class AutoencoderJob:
    """An autoencoder's training and its files in the run's folder.

    Args:
        out: the run's folder.
        plan: with an autoencoder.
        judged: to validate on.
        draws: of images.
        data: what is recorded of the slices.
        dtype: of the convolutions; float32 if None.
        console: where it says how it goes.
    """

    out: Path
    plan: CircuitPlan
    judged: Slices
    draws: Draws
    data: dict[str, Any]
    dtype: torch.dtype | None
    console: Console

    @property
    def config(self) -> AutoencoderPlan:
        """Of the autoencoder.

        Raises:
            ValueError: the circuit is over cells.
        """
        if self.plan.autoencoder is None:
            raise ValueError("the circuit is over cells, which need no autoencoder")
        return self.plan.autoencoder

    @property
    def recorded(self) -> dict[str, Any]:
        """What its result depends on."""
        circuit, training = asdict(self.plan.circuit), asdict(self.plan.training)
        images = {**{k: circuit[k] for k in OF_THE_IMAGES}, **{k: training[k] for k in OF_THE_DRAWS}}
        return {"autoencoder": asdict(self.config), "images": images, "data": self.data}

    def run(self) -> tuple[Autoencoder, dict[str, float]]:
        """Every step that is left; the autoencoder, and the figures of its last look at the validation.

        Raises:
            ValueError: the checkpoint of something else.
            KeyboardInterrupt: after the step at which it came, with a checkpoint.
        """
        config, standing = self.config, self._standing()
        held_out = self._held_out()
        with interrupts() as caught:
            while standing.state.step < config.steps:
                x = self.draws.crops(FIRST + standing.state.step, config.batch, config.crop)
                state, loss = autoencoder_step(standing.state, x, config.rate, config.steps, config.warm, self.dtype)
                standing = standing._replace(state=state)
                if state.step % config.every == 0 or state.step == config.steps:
                    standing = self._look(standing, loss, held_out)
                if caught:
                    self._save(standing)
                    raise KeyboardInterrupt
        figures = {k: v for k, v in standing.rows[-1].items() if k not in ("step", "loss")}
        return standing.state.model.eval().requires_grad_(False), figures

    def _held_out(self) -> Tensor:
        info = self.draws.info
        return torch.cat([info.cut(x, -1.0) for x in judged_images(self.judged, info, MOST_JUDGED)])

    def _look(self, standing: Standing, loss: float, held_out: Tensor) -> Standing:
        """Validate, log, and write the checkpoint."""
        state = standing.state
        row = {"step": state.step, "loss": loss, **reconstruction(state.model.eval(), held_out)}
        state.model.train()
        standing = standing._replace(rows=(*standing.rows, row))
        write_log(self.out / LOG_FILE, standing.rows)
        self._save(standing)
        self.console.print(
            f"autoencoder, {state.step} of {self.config.steps} steps: loss {loss:.4f}, held out {row['psnr']:.2f} dB, "
            f"SSIM {row['ssim']:.3f}, {row['used']:.0f} codes in use, perplexity {row['perplexity']:.1f}",
            highlight=False,
            soft_wrap=True,
        )
        return standing

    def _save(self, standing: Standing) -> None:
        step, model, optimizer = standing.state
        document = {
            "config": self.recorded,
            "step": step,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "rows": standing.rows,
        }
        with whole_file(self.out / STATE_FILE) as part:
            torch.save(document, part)

    def _standing(self) -> Standing:
        """The first, or that of the folder's checkpoint."""
        path, config = self.out / STATE_FILE, self.config
        if not path.is_file():
            return Standing(start_autoencoder(config.sizes, config.rate, self.plan.training.seed))
        stored = read_torch(path)
        try:
            refuse_other(stored["config"], self.recorded, path)
            model = Autoencoder(config.sizes)
            model.load_state_dict(stored["model"])
            optimizer = optimizer_of(model.train(), config.rate)
            optimizer.load_state_dict(stored["optimizer"])
            return Standing(AutoencoderState(stored["step"], model, optimizer), tuple(stored["rows"]))
        except (KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"{path} is not the checkpoint of an autoencoder's training: {error}") from error


def refuse_other(
    stored: dict[str, Any], wanted: dict[str, Any], path: Path, free: tuple[tuple[str, str], ...] = ()
) -> None:
    """Refuse the checkpoint of another run: all but ``free`` (table, key) must be as it was.

    Raises:
        ValueError: what differs, with both values.
    """
    for table, values in wanted.items():
        for name, value in values.items():
            if stored[table][name] != value and (table, name) not in free:
                raise ValueError(
                    f"{path} is of another run: {table}.{name} is {stored[table][name]} there, {value} now"
                )


def write_log(path: Path, rows: Sequence[dict[str, float]]) -> None:
    """The rows so far, as CSV."""
    with whole_file(path) as part, part.open("w", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def digest_of(model: Autoencoder) -> str:
    """A hash of its weights."""
    found = hashlib.blake2b(digest_size=16)
    for value in model.state_dict().values():
        found.update(value.contiguous().numpy().data)
    return found.hexdigest()


@torch.no_grad()
def reconstruction(model: Autoencoder, x: Tensor) -> dict[str, float]:
    """How well images x (s 1 h w) are decoded from their codes, and how many of those are used.

    psnr (dB), ssim: means over images, of [-1, 1], clamped; perplexity: 2 to the entropy of all codes, in bits.
    """
    pairs, used = list[tuple[float, float]](), torch.zeros(model.config.codes, dtype=torch.int64)
    for one in x.split(1):
        found = model.codes(one)
        used += found.flatten().bincount(minlength=model.config.codes)
        decoded = model.decoded(found, one.shape[3] // model.config.stride)
        a, b = (np.asarray(v[0, 0].clamp(-1, 1)) for v in (decoded, one))
        pairs.append((psnr(a, b, 2.0), ssim(a, b, 2.0) or 0.0))
    share = used.double() / used.sum()
    quality = np.mean(pairs, axis=0)
    return {
        "psnr": float(quality[0]),
        "ssim": float(quality[1]),
        "perplexity": float(torch.special.entr(share).sum().exp()),
        "used": float((used > 0).sum()),
    }
