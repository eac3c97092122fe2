"""A circuit over the codes of a vector-quantised autoencoder, one code a patch, and what it says of the pixels."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from invdiff.circuits.autoencoder import Autoencoder, AutoencoderConfig
from invdiff.circuits.circuit import Circuit
from invdiff.circuits.images import GridInfo, folder_of, read_folder, write_folder
from invdiff.protocols import Noise

# Temperatures of the encoder's evidence of an unknown and of a known patch; published, of other codes: 0.1 and 0.01.
# At 0.1 what the denoiser sees outvotes the known patches; 1.5 was best on validation slices of both shipped circuits.
WARM, SHARP = 1.5, 0.01
AT_ONCE = 16  # images that are encoded or decoded at once
DRAWS = 4  # code maps that are decoded; 8 are published and gave the same on validation slices in more time
LEAST_DEVIATION = 0.02  # of a pixel over the decoded draws, prior units: the decoder is no better than that
STEP = -4  # of the keyed noise: the draws of codes
PREFIX = "autoencoder."  # of its tensors in the file


class Pixels(NamedTuple):
    """What the codes say of the pixels of images, prior units: (s 1 h w) each."""

    mean: Tensor
    variance: Tensor


@dataclass(frozen=True, eq=False)
class CodeCircuit:
    """p(codes of an image), with the autoencoder that makes pixels of them; the grid lies in the middle of images.

    Args:
        autoencoder: of stride ``info.block``.
        circuit: over rows * columns categorical variables of ``info.levels`` codes.
        info: of the grid; ``levels`` is the number of codes.
        sha256: of the weights, for records.

    Raises:
        ValueError: parts that do not fit each other.
    """

    autoencoder: Autoencoder
    circuit: Circuit
    info: GridInfo
    sha256: str = ""

    def __post_init__(self) -> None:
        config, info = self.autoencoder.config, self.info
        ours = (config.stride, config.codes, self.circuit.structure.variables)
        if ours != (info.block, info.levels, info.rows * info.columns):
            raise ValueError(
                f"an autoencoder of stride {ours[0]} with {ours[1]} codes and a circuit of {ours[2]} variables do not "
                f"fit a grid of {info.rows} x {info.columns} cells of {info.block} pixels with {info.levels} codes"
            )

    def to(self, like: Tensor) -> CodeCircuit:
        """The same in the dtype and on the device of ``like``; the autoencoder is moved in place."""
        return replace(self, autoencoder=self.autoencoder.to(like), circuit=self.circuit.to(like))

    def evidence(self, x: Tensor, known: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """ln w (s v C) of the codes: the encoder's distances at an image, over a temperature.

        The temperature falls linearly from ``WARM`` to ``SHARP`` with the share of a patch's pixels that are known.

        Args:
            x: image (s 1 h w), prior units.
            known: 1 where its pixels are known, the same shape.
            dtype: of the encoder's convolutions; that of x if None.
        """
        share = self.info.pooled(known.to(x)).mean
        temperature = WARM + share * (SHARP - WARM)
        parts = self.info.cut(x, -1.0).split(AT_ONCE)
        apart = torch.cat([self.autoencoder.distances(part, dtype) for part in parts])
        return -apart / temperature[..., None]

    def posterior(self, evidence: Tensor, noise: Noise, draws: int = DRAWS, dtype: torch.dtype | None = None) -> Pixels:
        """Mean and variance over decoded joint draws of the codes, of the grid's pixels (s 1 h w).

        Args:
            evidence: ln w (s v C).
            noise: keyed noise; the same seed is the same draws.
            draws: how many, at least 2.
            dtype: of the decoder's convolutions; that of the evidence if None.
        """
        if draws < 2:
            raise ValueError(f"draws is {draws}; at least 2 are wanted for a variance")
        found = self.circuit.samples(evidence, noise, STEP, range(draws)).transpose(0, 1)
        said = []
        for some in found.split(max(1, AT_ONCE // draws)):
            images = self.autoencoder.decoded(some.flatten(0, 1), self.info.columns, dtype).unflatten(0, some.shape[:2])
            said.append((images.mean(1), images.var(1).clamp_min(LEAST_DEVIATION**2)))
        return Pixels(*(torch.cat(parts) for parts in zip(*said, strict=True)))


def save(folder: Path, circuit: CodeCircuit, extra: dict[str, Any] | None = None) -> None:
    """Write both parts into one folder, as ``invdiff.circuits.images.save``; the autoencoder in float32.

    Args:
        folder: made if missing.
        circuit: what is written.
        extra: more keys for config.json, such as training figures.

    Raises:
        ValueError: a folder that cannot be written to.
    """
    more = {f"{PREFIX}{name}": t for name, t in circuit.autoencoder.state_dict().items()}
    told = {"autoencoder": asdict(circuit.autoencoder.config), **(extra or {})}
    write_folder(folder, circuit.circuit, circuit.info, more, told)


def load(name_or_folder: str | Path) -> CodeCircuit:
    """Load a shipped circuit over codes by name, or the folder of one: float32, on the CPU.

    Raises:
        ValueError: no such circuit, one over cells (``invdiff.circuits.load`` reads those), a file missing, or weights
            that are not those the config names.
    """
    folder = folder_of(name_or_folder)
    circuit, info, sha256, document, tensors = read_folder(folder, str(name_or_folder))
    if "autoencoder" not in document:
        raise ValueError(f"{name_or_folder} is a circuit over the cells of an image; one over codes is wanted")
    try:
        model = Autoencoder(AutoencoderConfig(**document["autoencoder"]))
        model.load_state_dict({n.removeprefix(PREFIX): t for n, t in tensors.items()})
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"{folder}: the autoencoder's weights do not fit its sizes: {error}") from error
    return CodeCircuit(model.eval().requires_grad_(False), circuit, info, sha256)


def code_bits(circuit: CodeCircuit, codes: Tensor) -> float:
    """Bits a code, the mean over images, of codes (n v)."""
    return -float(circuit.circuit.log_likelihood(codes).mean()) / (codes.shape[1] * math.log(2))
