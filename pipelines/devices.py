"""Devices and dtypes by name."""

from __future__ import annotations

import torch

from invdiff.priors.model import fast_dtype

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype_of(name: str, device: torch.device) -> torch.dtype | None:
    """The dtype of a network's arithmetic, None for float32; ``auto`` is bfloat16 where it is native.

    Raises:
        ValueError: another name.
    """
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r}; one of {', '.join(DTYPES)} is wanted")
    return fast_dtype(device) if name == "auto" else None if name == "float32" else DTYPES[name]


def device_of(name: str) -> torch.device:
    """The torch device of that name.

    Raises:
        ValueError: no such device on this machine.
    """
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} is not available here: {str(error).splitlines()[0]}") from error
