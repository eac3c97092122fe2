"""A circuit over the codes of a vector-quantised autoencoder, one code a patch, and what it says of the pixels."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from invdiff.circuits.circuit import Circuit
from invdiff.circuits.images import GridInfo, read_folder, write_folder
from invdiff.protocols import Noise

WARM, SHARP = 0.1, 0.01  # temperatures of the encoder's evidence of an unknown and of a known patch, as published
DRAWS = 8  # code maps that are decoded, as published
LEAST_DEVIATION = 0.02  # of a pixel over the decoded draws, prior units: the decoder is no better than that
STEP = -4  # of the keyed noise: the draws of codes
PREFIX = "autoencoder."  # of its tensors in the file
COMMITMENT = 0.25  # of van den Oord et al. 2017


@dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes of the autoencoder (van den Oord, Vinyals & Kavukcuoglu 2017; MONAI's VQVAE).

    Args:
        channels: features of each level, each of half the size of the one before: 2^levels pixels make a code.
        residual: residual layers of each level.
        codes: C.
        width: numbers in a code's vector.
    """

    channels: tuple[int, ...] = (32, 64, 96, 96)
    residual: int = 1
    codes: int = 128
    width: int = 16

    def __post_init__(self) -> None:
        object.__setattr__(self, "channels", tuple(self.channels))
        if not self.channels or min(*self.channels, self.residual, self.width) < 1 or self.codes < 2:
            raise ValueError(f"{self}: at least one level, 2 codes and sizes from 1 are wanted")

    @property
    def stride(self) -> int:
        """Height and width in pixels of a code's patch."""
        return int(2 ** len(self.channels))


class Autoencoder(nn.Module):
    """Images (s 1 h w) in prior units, h and w multiples of the stride, to codes (s v), by rows, and back."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        from monai.networks.nets import VQVAE

        self.config = config
        levels = len(config.channels)
        self.net = VQVAE(
            spatial_dims=2,
            in_channels=1,
            out_channels=1,
            channels=config.channels,
            num_res_layers=config.residual,
            num_res_channels=config.channels,
            downsample_parameters=((2, 4, 1, 1),) * levels,
            upsample_parameters=((2, 4, 1, 1, 0),) * levels,
            num_embeddings=config.codes,
            embedding_dim=config.width,
            commitment_cost=COMMITMENT,
            decay=0.99,
            ddp_sync=False,
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The image decoded from its codes, and the commitment loss."""
        out, loss = self.net(x)
        return out, loss

    def vectors(self, x: Tensor) -> Tensor:
        """What the encoder makes of every patch: (s v width)."""
        encoded: Tensor = self.net.encode(x)
        return encoded.flatten(2).transpose(1, 2)

    def distances(self, x: Tensor) -> Tensor:
        """Root mean square distance of every patch's vector to every code's: (s v C)."""
        book = self.net.quantizer.quantizer.embedding.weight
        return torch.cdist(self.vectors(x), book.expand(len(x), -1, -1)) / self.config.width**0.5

    def codes(self, x: Tensor) -> Tensor:
        """The nearest code of every patch: int64 (s v)."""
        return self.distances(x).argmin(-1)

    def decoded(self, codes: Tensor, columns: int) -> Tensor:
        """Images (s 1 h w) of codes (s v) on a grid of so many columns."""
        out: Tensor = self.net.decode_samples(codes.unflatten(1, (-1, columns)))
        return out


def train_autoencoder(
    config: AutoencoderConfig, images: Callable[[int], Tensor], steps: int, rate: float = 1e-3, seed: int = 0
) -> Autoencoder:
    """Mean absolute error and commitment, by Adam; the code book starts from vectors of the first images.

    Args:
        config: sizes.
        images: of each step, (s 1 h w) in prior units.
        steps: how many.
        rate: of Adam, which falls linearly to a tenth.
        seed: of the first weights.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Autoencoder(config)
        _start_book(model, images(0))
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), rate)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - 0.9 * step / steps)
        x = images(step)
        out, commitment = model(x)
        loss = (out - x).abs().mean() + commitment
        value = float(loss.detach())
        if not math.isfinite(value):
            raise FloatingPointError(f"the autoencoder's loss is {value} at step {step}; lower the rate ({rate})")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


@torch.no_grad()
def _start_book(model: Autoencoder, x: Tensor) -> None:
    """Codes at vectors of patches drawn at random, a little apart where there are fewer."""
    vectors = model.vectors(x).flatten(0, 1)
    chosen = vectors[torch.randint(len(vectors), (model.config.codes,))]
    chosen = chosen + 0.01 * vectors.std() * torch.randn_like(chosen)
    quantizer: Any = model.net.quantizer.quantizer
    quantizer.embedding.weight.copy_(chosen)
    quantizer.ema_w.copy_(chosen)
    quantizer.ema_cluster_size.fill_(1.0)


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

    def evidence(self, x: Tensor, known: Tensor) -> Tensor:
        """ln w (s v C) of the codes: the encoder's distances at an image, over a temperature.

        The temperature falls from 0.1 to 0.01 with the share of a patch's pixels that are known, as published.

        Args:
            x: image (s 1 h w), prior units.
            known: 1 where its pixels are known, the same shape.
        """
        share = self.info.pooled(known.to(x)).mean
        temperature = WARM + share * (SHARP - WARM)
        return -self.autoencoder.distances(self.info.cut(x, -1.0)) / temperature[..., None]

    def posterior(self, evidence: Tensor, noise: Noise, draws: int = DRAWS) -> Pixels:
        """Mean and variance over decoded joint draws of the codes, of the grid's pixels (s 1 h w).

        Args:
            evidence: ln w (s v C).
            noise: keyed noise; the same seed is the same draws.
            draws: how many, at least 2.
        """
        if draws < 2:
            raise ValueError(f"draws is {draws}; at least 2 are wanted for a variance")
        codes = [self.circuit.sample(evidence, noise, STEP, draw) for draw in range(draws)]
        images = torch.stack([self.autoencoder.decoded(c, self.info.columns) for c in codes])
        return Pixels(images.mean(0), images.var(0).clamp_min(LEAST_DEVIATION**2))


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


def load(folder: str | Path) -> CodeCircuit:
    """Load what ``save`` wrote: float32, on the CPU.

    Raises:
        ValueError: no such folder, one of another kind, or weights that are not those the config names.
    """
    circuit, info, sha256, document, tensors = read_folder(Path(folder), str(folder))
    if "autoencoder" not in document:
        raise ValueError(f"{folder} is a circuit over the cells of an image; invdiff.circuits.load reads it")
    try:
        model = Autoencoder(AutoencoderConfig(**document["autoencoder"]))
        model.load_state_dict({n.removeprefix(PREFIX): t for n, t in tensors.items()})
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"{folder}: the autoencoder's weights do not fit its sizes: {error}") from error
    return CodeCircuit(model.eval().requires_grad_(False), circuit, info, sha256)


def code_bits(circuit: CodeCircuit, codes: Tensor) -> float:
    """Bits a code, the mean over images, of codes (n v)."""
    return -float(circuit.circuit.log_likelihood(codes).mean()) / (codes.shape[1] * math.log(2))
