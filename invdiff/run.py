"""The one loop, and generators round it: guarded, checkpointed."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from invdiff.files import read_torch, remove_parts, whole_file
from invdiff.linalg import inner
from invdiff.protocols import Problem, Sampler, State

S = TypeVar("S", bound=State)
GROWTH = 10.0  # a residual this many times above its start is a diverged run


class TornError(ValueError):
    """A checkpoint that is not whole."""


class DivergedError(ArithmeticError):
    """A run whose image became NaN or whose residual grew tenfold."""


def iterate(sampler: Sampler[S], problem: Problem, state: S | None = None) -> Iterator[S]:
    """Yield the state after ``init`` (or ``state``, when resuming) and after every step, without gradients."""
    with torch.no_grad():
        current = sampler.init(problem) if state is None else state
    yield current
    while current.i < sampler.steps:
        with torch.no_grad():
            current = sampler.step(problem, current)
        yield current


def last(states: Iterable[S]) -> S:
    """Run to the end, keeping only the last state in memory."""
    return deque(states, maxlen=1).pop()


def residual_norms(problem: Problem, x: Tensor) -> Tensor:
    """||A x - y|| of each slice, (s)."""
    r = problem.operator.forward(x) - problem.y
    return inner(r, r).flatten().sqrt()


def guarded(states: Iterable[S], sampler: Sampler[S], problem: Problem, every: int = 5) -> Iterator[S]:
    """Stop with the step and sigma when an image is not finite or a residual has grown tenfold.

    Args:
        states: from ``iterate``.
        sampler: whose states they are; its ``sigma(i)`` is quoted.
        problem: whose residual is watched.
        every: steps between looks; the last state is always looked at.

    Raises:
        DivergedError: with the step, sigma and the residual.
    """
    zero = inner(problem.y, problem.y).flatten().sqrt()
    for state in states:
        if state.i % every == 0 or state.i == sampler.steps:
            now = residual_norms(problem, state.x)
            where = f"at step {state.i} of {sampler.steps}, sigma {sampler.sigma(state.i):.4g}"
            if not bool(torch.isfinite(now).all() and torch.isfinite(state.x).all()):
                raise DivergedError(f"the image became NaN or infinite {where}")
            start = torch.maximum(zero, torch.full_like(zero, torch.finfo(zero.dtype).tiny))
            worst = float((now / start).max())
            if worst > GROWTH:
                raise DivergedError(f"the residual grew to {worst:.3g} times the measurement's norm {where}")
        yield state


def fingerprint(*parts: Any) -> str:
    """A hash of everything that fixes a run: tensors by their bytes, tables by theirs, the rest by ``repr``."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, dict):
            part = (tuple(part), fingerprint(*part.values()))
        if isinstance(part, Tensor):
            digest.update(repr((tuple(part.shape), part.dtype)).encode())
            flat = part.detach().cpu().contiguous()
            digest.update((torch.view_as_real(flat) if flat.is_complex() else flat).flatten().numpy().data)
        else:
            digest.update(repr(part).encode())
        digest.update(b"|")
    return digest.hexdigest()


def checkpointed(states: Iterable[S], path: Path, key: str, every: int = 25) -> Iterator[S]:
    """Write every ``every``-th state to ``path`` (beside, then renamed), and the last one when interrupted.

    The one before is kept under ``previous_path``; what a killed run left half-written is removed first.

    Args:
        states: from ``iterate``.
        path: the checkpoint file.
        key: ``fingerprint`` of the run.
        every: steps between checkpoints.
    """
    state, kept = None, -1
    remove_parts(path)
    try:
        for state in states:
            if state.i and state.i % every == 0:
                save_state(path, state, key)
                kept = state.i
            yield state
    except (KeyboardInterrupt, GeneratorExit):
        if state is not None and state.i != kept:
            save_state(path, state, key)
        raise


def previous_path(path: Path) -> Path:
    """Where the checkpoint before the one at ``path`` is kept."""
    return path.with_name(f"{path.name}.previous")


def save_state(path: Path, state: State, key: str) -> None:
    """Write a state (a NamedTuple of tensors and ints), its digest and the run's fingerprint; keep the one before."""
    fields: dict[str, Any] = {name: getattr(state, name) for name in type(state)._fields}  # type: ignore[attr-defined]
    with whole_file(path) as part:
        torch.save({"key": key, "digest": fingerprint(*fields.values()), "state": fields}, part)
        if path.exists():
            path.replace(previous_path(path))


def load_state(path: Path, kind: type[S], key: str, device: torch.device | str = "cpu") -> S:
    """Read the state that ``save_state`` wrote.

    Raises:
        TornError: truncated, changed on the way, or no checkpoint at all.
        ValueError: the checkpoint of another run.
    """
    try:
        document = read_torch(path, device)
    except ValueError as error:
        raise TornError(str(error)) from error
    try:
        stored, digest, fields = document["key"], document["digest"], document["state"]
    except (KeyError, TypeError) as error:
        raise TornError(f"{path} is not the checkpoint of a run: it lacks {error}") from error
    if stored != key:
        raise ValueError(
            f"{path} is the checkpoint of another run ({stored[:12]}..., not {key[:12]}...): "
            "the sampler, operator, measurements, prior and seed must be the same"
        )
    if fingerprint(*fields.values()) != digest:
        raise TornError(f"{path} does not hold what was written to it")
    return kind(**fields)


def resumed(path: Path, kind: type[S], key: str, device: torch.device | str = "cpu") -> tuple[S | None, str]:
    """The newest whole state of a run, None where there is none yet; and a note, "" where ``path`` itself held it.

    Raises:
        TornError: ``path`` is torn, and no checkpoint before it is whole.
        ValueError: the checkpoint of another run.
    """
    before = previous_path(path)
    if not path.exists() and not before.exists():
        return None, f"{path} was not there: the run began anew"
    try:
        return load_state(path, kind, key, device), ""
    except TornError as torn:
        if not before.exists():
            raise
        try:
            state = load_state(before, kind, key, device)
        except TornError:
            raise torn from None
        return state, f"{path} was torn: the run went on from the checkpoint before it, step {state.i}"


def forget(path: Path) -> None:
    """Remove the checkpoint of a finished run and the one before it."""
    for one in (path, previous_path(path)):
        one.unlink(missing_ok=True)
