"""A vector-quantised autoencoder of images and its training, step by step (van den Oord et al. 2017)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from invdiff.circuits.starts import lloyd

COMMITMENT = 0.25  # of van den Oord et al. 2017
PLAIN = 0.15  # share of the steps before the vectors are quantised at all
REVIVE_EVERY = 20  # steps between looks for codes that are not used
REVIVE_UNTIL = 0.8  # share of the steps after which the code book is left to settle
ROUNDS = 10  # of the K-means by which the code book starts
DEAD = 0.03  # of the even share of a step's vectors: a code that has fewer, in the running mean, is not used
FINAL_RATE = 0.1  # of the first, at the end


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

    def encoded(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """What the encoder makes of every patch, convolutions in ``dtype``: (s width rows columns), of x's dtype."""
        with torch.autocast(x.device.type, dtype, enabled=dtype is not None):
            found: Tensor = self.net.encode(x)
        return found.to(x.dtype)

    def made(self, vectors: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The image (s 1 h w) that the decoder makes of vectors (s width rows columns)."""
        with torch.autocast(vectors.device.type, dtype, enabled=dtype is not None):
            found: Tensor = self.net.decode(vectors)
        return found.to(vectors.dtype)

    def vectors(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """What the encoder makes of every patch, by rows: (s v width)."""
        return self.encoded(x, dtype).flatten(2).transpose(1, 2)

    @property
    def book(self) -> Tensor:
        """The codes' vectors: (C width)."""
        found: Tensor = self.net.quantizer.quantizer.embedding.weight
        return found

    def apart(self, vectors: Tensor) -> Tensor:
        """Root mean square distance of vectors (s v width) to every code's: (s v C)."""
        return torch.cdist(vectors, self.book.expand(len(vectors), -1, -1)) / self.config.width**0.5

    def nearest(self, vectors: Tensor) -> Tensor:
        """The code nearest to each of vectors (s v width): int64 (s v)."""
        return self.apart(vectors).argmin(-1)

    def distances(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Root mean square distance of every patch's vector to every code's: (s v C)."""
        return self.apart(self.vectors(x, dtype))

    def codes(self, x: Tensor) -> Tensor:
        """The nearest code of every patch: int64 (s v)."""
        return self.distances(x).argmin(-1)

    def decoded(self, codes: Tensor, columns: int, dtype: torch.dtype | None = None) -> Tensor:
        """Images (s 1 h w) of codes (s v) on a grid of so many columns, convolutions in ``dtype``."""
        return self.made(self.net.quantizer.embed(codes.unflatten(1, (-1, columns))), dtype)


class AutoencoderState(NamedTuple):
    """An autoencoder that is being trained; a step changes the model and the optimizer in place.

    step: steps so far.
    """

    step: int
    model: Autoencoder
    optimizer: torch.optim.Adam


def start_autoencoder(config: AutoencoderConfig, rate: float, seed: int) -> AutoencoderState:
    """First weights from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Autoencoder(config)
    return AutoencoderState(0, model.train(), optimizer_of(model, rate))


def optimizer_of(model: Autoencoder, rate: float) -> torch.optim.Adam:
    """Adam over all but the code book, which is a running mean."""
    return torch.optim.Adam((p for p in model.parameters() if p.requires_grad), rate)


def autoencoder_step(
    state: AutoencoderState, x: Tensor, rate: float, steps: int, warm: int = 0, dtype: torch.dtype | None = None
) -> tuple[AutoencoderState, float]:
    """One step on images x (s 1 h w): mean absolute error and commitment, by Adam; the code book is a running mean.

    Of the steps the first 15 % do not quantise; then the code book starts from a K-means of the vectors. Every 20 steps
    until four fifths are done, codes that are hardly used are put where vectors lie far from every code.

    Args:
        state: of the step before; changed in place.
        x: in prior units.
        rate: of Adam, which falls linearly to a tenth.
        steps: of the whole training.
        warm: steps over which the rate rises first; without it all of the decoder's units can die at once.
        dtype: of the convolutions, such as bfloat16; that of x if None.

    Returns:
        The new state, and the loss before the step.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    step, model, optimizer = state
    for group in optimizer.param_groups:
        group["lr"] = rate * (1 - (1 - FINAL_RATE) * step / steps) * min(1.0, (step + 1) / max(1, warm))
    first, vectors = int(PLAIN * steps), model.encoded(x, dtype)
    if step == first:
        _start_book(model, vectors.detach(), step)
    elif step % REVIVE_EVERY == 0 and first < step < REVIVE_UNTIL * steps:
        _revive(model, vectors.detach(), step)
    chosen, commitment = (vectors, 0.0) if step < first else model.net.quantize(vectors)
    loss = (model.made(chosen, dtype) - x).abs().mean() + commitment
    value = float(loss.detach())
    if not math.isfinite(value):
        raise FloatingPointError(f"the autoencoder's loss is {value} at step {step}; lower the rate ({rate})")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return AutoencoderState(step + 1, model, optimizer), value


def train_autoencoder(
    config: AutoencoderConfig, images: Callable[[int], Tensor], steps: int, rate: float = 1e-3, seed: int = 0
) -> Autoencoder:
    """All steps, from the start, without a stop between; see ``autoencoder_step``.

    Args:
        config: sizes.
        images: of each step, (s 1 h w) in prior units.
        steps: how many.
        rate: of Adam, which falls linearly to a tenth.
        seed: of the first weights.
    """
    state = start_autoencoder(config, rate, seed)
    for step in range(steps):
        state, _ = autoencoder_step(state, images(step), rate, steps)
    return state.model.eval().requires_grad_(False)


@torch.no_grad()
def _start_book(model: Autoencoder, encoded: Tensor, step: int) -> None:
    """Codes at the centres of a K-means of vectors (s width h w), a little apart where there are fewer."""
    vectors, config = encoded.movedim(1, -1).flatten(0, -2), model.config
    generator = torch.Generator().manual_seed(step)
    order = torch.randperm(len(vectors), generator=generator).repeat(1 + config.codes // len(vectors))
    centres = vectors[order[: config.codes]]
    centres = centres + 0.01 * vectors.std() * torch.randn(centres.shape, generator=generator)
    centres = lloyd(vectors[None], centres[None], ROUNDS)[0]
    _put(model, torch.arange(config.codes), centres, len(vectors) / config.codes)


@torch.no_grad()
def _revive(model: Autoencoder, encoded: Tensor, step: int) -> None:
    """Codes that are hardly used, at vectors (s width h w) drawn in proportion to the square of their distance."""
    vectors, quantizer = encoded.movedim(1, -1).flatten(0, -2), model.net.quantizer.quantizer
    even = len(vectors) / model.config.codes
    dead = (quantizer.ema_cluster_size < DEAD * even).nonzero().flatten()
    chance = torch.cdist(vectors, quantizer.embedding.weight).amin(1).double().square().cpu().numpy()
    count = min(len(dead), int((chance > 0).sum()))
    if count:
        drawn = np.random.default_rng(step).choice(len(vectors), count, replace=False, p=chance / chance.sum())
        _put(model, dead[:count], vectors[torch.from_numpy(drawn)], 3 * DEAD * even)


def _put(model: Autoencoder, index: Tensor, vectors: Tensor, size: float) -> None:
    """Codes of these numbers at vectors (k width), as though so many had been seen of each."""
    quantizer: Any = model.net.quantizer.quantizer
    quantizer.embedding.weight[index] = vectors
    quantizer.ema_cluster_size[index] = size
    quantizer.ema_w[index] = size * vectors
