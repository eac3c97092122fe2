"""Files and folders that are whole or absent, and their hashes."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write to; takes its place at the end, and is removed if writing fails.

    Raises:
        ValueError: the folder is not there or cannot be written to, or ``path`` is a folder.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder; the name of a file is wanted")
    part = _beside(path)
    try:
        yield part
        part.replace(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A new folder beside ``path`` to fill; takes its place at the end, and is removed if writing fails.

    Raises:
        ValueError: ``path`` is a file or a folder that is not empty, or its parent cannot be written to.
    """
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise ValueError(f"{path} exists already; a new or empty folder is wanted")
    part = _beside(path)
    try:
        part.mkdir()
        yield part
        part.replace(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def sha256_of(paths: Sequence[Path]) -> str:
    """The SHA-256 of one file, or of the hexadecimal SHA-256 of several, joined in their order."""
    digests = []
    for path in paths:
        with path.open("rb") as f:
            digests.append(hashlib.file_digest(f, "sha256").hexdigest())
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def existing_file(path: str | Path) -> Path:
    """``path`` as a Path.

    Raises:
        ValueError: nothing is there, or something other than a file, or it cannot be read.
    """
    result = Path(path)
    if not result.is_file():
        raise ValueError(f"{result} is {'a folder' if result.is_dir() else 'not there'}; a file is wanted")
    return readable(result)


def readable(path: Path) -> Path:
    """``path`` itself.

    Raises:
        ValueError: there is no permission to read it.
    """
    if not os.access(path, os.R_OK):
        raise ValueError(f"{path} cannot be read: permission denied")
    return path


def _beside(path: Path) -> Path:
    if not path.parent.is_dir():
        raise ValueError(f"{path} cannot be written: the folder {path.parent} is not there")
    return path.with_name(f".part-{os.getpid()}-{path.name}")
