"""TOML tables and ``a.b=value`` to objects: ``kind`` names an entry point, the other keys are its fields."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def fields_of(kind: type) -> list[str]:
    """Names that ``kind``'s constructor takes, for a dataclass."""
    return [f.name for f in dataclasses.fields(kind) if f.init]


def build(kind: type[T], table: Mapping[str, Any], name: str) -> T:
    """Make the dataclass ``kind`` from the keys of ``table``.

    Raises:
        ValueError: a key that is not a field (the right ones are listed), a missing one, or a value of another type.
    """
    if not isinstance(table, Mapping):
        raise ValueError(f"{name} is {table!r}; a table of fields is wanted")
    known = {f.name: f for f in dataclasses.fields(kind) if f.init}  # type: ignore[arg-type]
    hints = get_type_hints(kind)
    for key, value in table.items():
        if key not in known:
            raise ValueError(f"{name} has no field {key!r}; its fields are: {', '.join(known)}")
        if not _fits(value, hints[key]):
            raise ValueError(f"{name}.{key} is {value!r} ({type(value).__name__}); {_said(hints[key])} is wanted")
    missing = [k for k, f in known.items() if k not in table and _required(f)]
    if missing:
        raise ValueError(f"{name} lacks {missing[0]!r}; its fields are: {', '.join(known)}")
    return kind(**table)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of TOML or JSON can be the value of a field so annotated."""
    origin, inside = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in inside)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            return False
        wanted = [inside[0]] * len(value) if inside[-1] is Ellipsis else inside
        return len(wanted) == len(value) and all(_fits(v, h) for v, h in zip(value, wanted, strict=True))
    return isinstance(value, hint) if isinstance(hint, type) else True


def _said(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def parse_override(text: str) -> tuple[str, str, Any]:
    """``sampler.rho=2.5`` to ("sampler", "rho", 2.5); the value in TOML's notation, bare words are strings.

    Raises:
        ValueError: not of the form table.key=value.
    """
    path, equals, value = text.partition("=")
    table, dot, key = path.partition(".")
    if not equals or not dot or not table or not key:
        raise ValueError(f"{text!r} is not an override; table.key=value is wanted, such as sampler.rho=0.02")
    try:
        return table, key, tomllib.loads(f"v = {value}")["v"]
    except tomllib.TOMLDecodeError:
        return table, key, value


def with_overrides(document: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of ``document`` with every override set in its table."""
    result = {k: dict(v) if isinstance(v, Mapping) else v for k, v in document.items()}
    for text in overrides:
        table, key, value = parse_override(text)
        result.setdefault(table, {})[key] = value
    return result


def read_toml(path: Path) -> dict[str, Any]:
    """The content of a TOML file.

    Raises:
        ValueError: it is none, or cannot be read.
    """
    try:
        return tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path} cannot be read as TOML: {error}") from error


def registered(group: str) -> list[str]:
    """Names of the entry points ``invdiff.<group>``, sorted."""
    return sorted({e.name for e in entry_points(group=f"invdiff.{group}")})


def find(group: str, kind: str) -> Any:
    """The object that the entry point ``kind`` of ``invdiff.<group>`` names.

    Raises:
        ValueError: no such entry point; the right ones are listed.
    """
    for entry in entry_points(group=f"invdiff.{group}"):
        if entry.name == kind:
            return entry.load()
    raise ValueError(f"no {group.rstrip('s')} {kind!r}; there are: {', '.join(registered(group))}")
