"""Files and folders that are whole or absent, and their hashes."""

from __future__ import annotations

import glob
import hashlib
import os
import pickle
import re
import shutil
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

_BINARY = (b"\x80", b"PK")  # how pickles and the archives of torch.save begin
_NOT_TORCH = (
    OSError, RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError, OverflowError, struct.error,
)  # fmt: skip


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


def read_torch(path: Path, device: torch.device | str = "cpu") -> Any:
    """What ``torch.save`` wrote to a file, where it holds tensors and plain values alone.

    Raises:
        ValueError: a pickle that could run code (it does not), or a file that is truncated or something else.
    """
    try:
        with warnings.catch_warnings():
            # Both announce what the refusal below says
            warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
            warnings.filterwarnings("ignore", "'torch.load' received a zip file", UserWarning)
            return torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f" ({named[1]})" if named else ""
        if not path.read_bytes().startswith(_BINARY):
            raise ValueError(f"{path} is truncated or not what torch.save writes") from error
        raise ValueError(
            f"{path} is a pickle that holds more than tensors{what}; it could run code and is refused: convert it to "
            "safetensors, or save its state_dict alone, where you trust it"
        ) from error
    except _NOT_TORCH as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is truncated or not what torch.save writes: {reason}") from error


def remove_parts(path: Path) -> None:
    """Remove what killed processes left half-written beside ``path``, which one process at a time may write."""
    for part in path.parent.glob(f".part-*-{glob.escape(path.name)}"):
        part.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    if not path.parent.is_dir():
        raise ValueError(f"{path} cannot be written: the folder {path.parent} is not there")
    return path.with_name(f".part-{os.getpid()}-{path.name}")
