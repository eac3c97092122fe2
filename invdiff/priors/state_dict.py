"""Files of weights, opened so that none can run code, and put into networks with every mismatch named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from invdiff.files import existing_file, read_torch

ENTRIES = ("ema", "ema_state_dict", "model_ema", "state_dict", "model_state_dict", "model", "network", "net", "unet")
PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and of torch.compile
NAMED = 3  # weights that a message names


def state_dict_of(path: str | Path, entry: str = "") -> dict[str, Tensor]:
    """The weights in a file: safetensors, or what ``torch.save`` wrote where it holds tensors and plain values alone.

    Args:
        path: the file.
        entry: key of the weights in a checkpoint that holds more; the first of ``ENTRIES`` that is there if empty (an
            average over the training before the last weights).

    Returns:
        Tensors by name, on the CPU, without the prefixes that wrappers put before every name.

    Raises:
        ValueError: a pickle that could run code, a file that is truncated or something else, or no weights in it.
    """
    file = existing_file(path)
    found = _tensors_in(_content(file), entry)
    if not found:
        keys = ", ".join(ENTRIES) if not entry else repr(entry)
        raise ValueError(f"{file} holds no weights by name, neither at its top nor under {keys}")
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in found):
            found = {name.removeprefix(prefix): value for name, value in found.items()}
    return found


def _content(file: Path) -> Any:
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is truncated or no safetensors file: {error}") from error
    return read_torch(file)


def _tensors_in(content: Any, entry: str) -> dict[str, Tensor]:
    if not isinstance(content, Mapping):
        return {}
    for candidate in [content.get(entry)] if entry else [content, *(content.get(key) for key in ENTRIES)]:
        if isinstance(candidate, Mapping) and candidate and all(isinstance(v, Tensor) for v in candidate.values()):
            return dict(candidate)
    return {}


def load_weights(network: nn.Module, state: Mapping[str, Tensor], file: Path) -> None:
    """Copy weights into a network, all of them or none.

    Args:
        network: every parameter and buffer of it is wanted in ``state``.
        state: tensors by name.
        file: where they are from, for messages.

    Raises:
        ValueError: names or shapes that differ; the first few are named.
    """
    own = network.state_dict()
    missing = [name for name in own if name not in state]
    strange = [name for name in state if name not in own]
    if missing or strange:
        parts = [f"lacks {len(missing)} weights of the network ({_some(missing)})"] if missing else []
        parts += [f"has {len(strange)} that are none of its ({_some(strange)})"] if strange else []
        raise ValueError(f"{file} {' and '.join(parts)}")
    for name, value in own.items():
        if state[name].shape != value.shape:
            raise ValueError(
                f"{file} has {name} of shape {tuple(state[name].shape)}; the network's is {tuple(value.shape)}"
            )
    network.load_state_dict(state)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
