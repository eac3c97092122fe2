"""A run's configuration from a file's tables, command-line flags and overrides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from invdiff.config import with_overrides

Tables = Mapping[str, Mapping[str, Any]]


def document_of(
    given: Tables, flags: Tables, overrides: Sequence[str], tables: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """The tables that a file gives, with flags over them and overrides over both.

    Args:
        given: of the file; empty without one.
        flags: table to key to value, None where not given.
        overrides: ``table.key=value``.
        tables: those that are known, and their keys; none listed is any.

    Raises:
        ValueError: an override of another form, or a table or key that is not known.
    """
    document: dict[str, Any] = dict(given)
    for table, values in flags.items():
        document[table] = {**document.get(table, {}), **{k: v for k, v in values.items() if v is not None}}
    document = with_overrides(document, overrides)
    check_tables(document, tables)
    return document


def check_tables(document: Mapping[str, Mapping[str, Any]], tables: Mapping[str, Sequence[str]]) -> None:
    """Refuse a table or a key that is not known; a table without listed keys takes any.

    Raises:
        ValueError: with the right ones.
    """
    for table, content in document.items():
        if table not in tables:
            raise ValueError(f"no table {table!r}; there are: {', '.join(tables)}")
        wrong = [k for k in content if tables[table] and k not in tables[table]]
        if wrong:
            raise ValueError(f"{table} has no field {wrong[0]!r}; its fields are: {', '.join(tables[table])}")
