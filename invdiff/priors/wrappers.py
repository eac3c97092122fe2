"""Priors made of priors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from invdiff.protocols import Prior


class Chunked:
    """The same prior, called on at most ``size`` slices at a time: memory independent of depth.

    Args:
        prior: any Prior.
        size: slices a call, at least 1.
    """

    def __init__(self, prior: Prior, size: int) -> None:
        if size < 1:
            raise ValueError(f"the chunk size is {size}; at least 1 slice is wanted")
        self.prior = prior
        self.size = size
        self.channels = prior.channels

    @property
    def info(self) -> Any:
        """The wrapped prior's description, if it has one."""
        return getattr(self.prior, "info", None)

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """As the prior's: x (s c h w), sigma () or (s)."""
        sigmas = sigma.expand(x.shape[0])
        pairs = zip(x.split(self.size), sigmas.split(self.size), strict=True)
        return torch.cat([self.prior.denoise(part, s) for part, s in pairs])
