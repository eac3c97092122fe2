"""The network that ships: MONAI's DiffusionModelUNet behind a pixel-unshuffle, for images of any size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NOISE_LABEL_SCALE = 250.0  # ln(sigma) is the noise label; x250 spans the range MONAI's sinusoidal embedding is made for
HEAD_CHANNELS = 32  # most channels of one attention head in the middle block


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of the network.

    Args:
        image_channels: channels c of the image.
        unshuffle: factor of the pixel-unshuffle; 1 is none.
        channels: features of each level, finest first; multiples of ``norm_groups``.
        blocks: residual blocks of each level.
        norm_groups: groups of the group normalisation.
    """

    image_channels: int = 1
    unshuffle: int = 2
    channels: tuple[int, ...] = (64, 96, 128, 128)
    blocks: tuple[int, ...] = (1, 1, 1, 1)
    norm_groups: int = 16

    def __post_init__(self) -> None:
        object.__setattr__(self, "channels", tuple(self.channels))
        object.__setattr__(self, "blocks", tuple(self.blocks))
        if len(self.channels) != len(self.blocks):
            raise ValueError(f"channels {self.channels} and blocks {self.blocks} must have one value a level each")
        if min(self.image_channels, self.unshuffle, self.norm_groups, *self.channels, *self.blocks) < 1:
            raise ValueError(f"{self}: every size must be at least 1")
        if any(c % self.norm_groups for c in self.channels):
            raise ValueError(f"channels {self.channels} must be multiples of norm_groups {self.norm_groups}")

    @property
    def stride(self) -> int:
        """Heights and widths are padded to a multiple of this."""
        return int(self.unshuffle * 2 ** (len(self.channels) - 1))


def padded(x: Tensor, stride: int) -> Tensor:
    """x (s c h w) with its last row and column repeated, to a height and width that ``stride`` divides."""
    h, w = x.shape[-2:]
    return F.pad(x, (0, -w % stride, 0, -h % stride), mode="replicate")


class FullPrecision(nn.Module):
    """Runs a layer in float32 under autocast: bf16 would round away the noise of small sigmas at the input."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return self.layer(x.float())


class UNet(nn.Module):
    """A U-Net that takes any height and width: (s c h w) and noise label (s) -> (s c h w).

    Pads at the bottom and the right by repeating the edge, to a multiple of ``config.stride``, and crops again.

    Args:
        config: sizes.
        extra: channels that it sees beside the image's and does not give: (s c + extra h w) -> (s c h w).
    """

    def __init__(self, config: UNetConfig, extra: int = 0) -> None:
        super().__init__()
        from monai.networks.nets import DiffusionModelUNet

        self.config = config
        self.channels = config.image_channels
        features = config.image_channels * config.unshuffle**2
        self.unet = DiffusionModelUNet(
            spatial_dims=2,
            in_channels=features + extra * config.unshuffle**2,
            out_channels=features,
            channels=config.channels,
            num_res_blocks=config.blocks,
            attention_levels=(False,) * len(config.channels),
            norm_num_groups=config.norm_groups,
            num_head_channels=math.gcd(HEAD_CHANNELS, config.channels[-1]),
            use_flash_attention=True,
        )
        self.unet.conv_in = FullPrecision(self.unet.conv_in)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        whole = padded(x, self.config.stride)
        features: Any = self.unet(F.pixel_unshuffle(whole, self.config.unshuffle), label * NOISE_LABEL_SCALE)
        return F.pixel_shuffle(features, self.config.unshuffle)[..., :h, :w]
