"""The folder of a training: its log, what it may be resumed with, and an interrupt that waits for the step."""

from __future__ import annotations

import csv
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from invdiff.files import whole_file

STATE_FILE = "state.pt"
FREE = (("training", "images"),)  # what may change between a run and its continuation


def log(path: Path, row: dict[str, float]) -> None:
    fresh = not path.exists()
    try:
        with path.open("a", newline="") as f:
            writer = csv.DictWriter(f, fieldnames=list(row))
            if fresh:
                writer.writeheader()
            writer.writerow(row)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror or error}") from error


def keep_log(path: Path, seen: int) -> None:
    """Drop the rows behind the checkpoint that is resumed, which are written again, and what a kill tore."""
    if not path.exists():
        return
    head, *rows = path.read_text().splitlines(keepends=True) or [""]
    whole = [r for r in rows if r.endswith("\n") and r.count(",") == head.count(",")]
    with whole_file(path) as part:
        part.write_text(head + "".join(r for r in whole if int(r.split(",")[0]) <= seen))


def refuse_other(stored: dict[str, Any], wanted: dict[str, Any], path: Path) -> None:
    """A longer or shorter run may go on from the same state; anything else would be another run."""
    for table, fields in wanted.items():
        for name, value in fields.items():
            old = stored[table][name]
            if old != value and (table, name) not in FREE:
                raise ValueError(f"{path} is of another run: {table}.{name} is {old} there, {value} now")


def check_folder(out: Path, resume: bool) -> None:
    state_file = out / STATE_FILE
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; a folder is wanted")
    if state_file.exists() and not resume:
        raise ValueError(f"{out} holds a run already; give --resume to go on with it, or another folder")
    if resume and not state_file.is_file():
        raise ValueError(f"{out} holds no {STATE_FILE} to resume from")


@contextmanager
def interrupts() -> Iterator[list[int]]:
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
