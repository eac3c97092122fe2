"""The one loop, and generators round it: guarded, checkpointed."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from invdiff.files import read_torch, whole_file
from invdiff.linalg import inner
from invdiff.protocols import Problem, Sampler, State

S = TypeVar("S", bound=State)
GROWTH = 10.0  # a residual this many times above its start is a diverged run


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


def measurements(problem: Problem) -> tuple[Tensor, Tensor]:
    """How many real numbers y holds of each slice that depend on the image, (s), and ||y||^2 of the others, (s).

    Others are lines of k-space that were not sampled and rays that miss the image: A gives exactly 0 there, whatever
    the image (here: one of noise).
    """
    A, y = problem.operator, problem.y
    like = torch.empty(A.domain.shape, dtype=A.domain.dtype, device=y.device)
    used = A.forward(problem.noise(-1, like)).flatten(1) != 0
    rest = y.flatten(1).abs().square().where(~used, 0.0)
    return used.sum(1).to(rest) * (2 if y.is_complex() else 1), rest.sum(1)


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
    """A hash of everything that fixes a run: tensors by their bytes, the rest by ``repr``."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            digest.update(repr((tuple(part.shape), part.dtype)).encode())
            flat = part.detach().cpu().contiguous()
            digest.update((torch.view_as_real(flat) if flat.is_complex() else flat).numpy().tobytes())
        else:
            digest.update(repr(part).encode())
        digest.update(b"|")
    return digest.hexdigest()


def checkpointed(states: Iterable[S], path: Path, key: str, every: int = 25) -> Iterator[S]:
    """Write every ``every``-th state to ``path`` (beside, then renamed), and the last one when interrupted.

    Args:
        states: from ``iterate``.
        path: the checkpoint file.
        key: ``fingerprint`` of the run.
        every: steps between checkpoints.
    """
    state = None
    try:
        for state in states:
            if state.i and state.i % every == 0:
                save_state(path, state, key)
            yield state
    except (KeyboardInterrupt, GeneratorExit):
        if state is not None:
            save_state(path, state, key)
        raise


def save_state(path: Path, state: State, key: str) -> None:
    """Write a state (a NamedTuple of tensors and ints) and the run's fingerprint."""
    fields: dict[str, Any] = {name: getattr(state, name) for name in type(state)._fields}  # type: ignore[attr-defined]
    with whole_file(path) as part:
        torch.save({"key": key, "state": fields}, part)


def load_state(path: Path, kind: type[S], key: str, device: torch.device | str = "cpu") -> S:
    """Read the state that ``save_state`` wrote.

    Raises:
        ValueError: not a checkpoint, or the checkpoint of another run.
    """
    document = read_torch(path, device)
    try:
        stored, fields = document["key"], document["state"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not the checkpoint of a run: it lacks {error}") from error
    if stored != key:
        raise ValueError(
            f"{path} is the checkpoint of another run ({stored[:12]}..., not {key[:12]}...): "
            "the sampler, operator, measurements, prior and seed must be the same"
        )
    return kind(**fields)
