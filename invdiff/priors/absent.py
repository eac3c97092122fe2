"""A range without a prior: for prior-free baselines, which still work in prior units."""

from __future__ import annotations

from torch import Tensor

from invdiff.priors.model import PriorInfo

SIGMAS = (1e-6, 1e6)  # any noise level: there is nothing to denoise with
CT_RANGE = (-1000.0, 2000.0)  # HU: air to dense bone


class NoPrior:
    """States unit and range; refuses to denoise.

    Args:
        unit: physical unit of the image.
        low: physical value that is -1 in prior units.
        high: physical value that is +1.
        channels: of the image.
    """

    def __init__(
        self, unit: str = "HU", low: float = CT_RANGE[0], high: float = CT_RANGE[1], channels: int = 1
    ) -> None:
        self.channels = channels
        self.info = PriorInfo("none", unit, low, high, SIGMAS[0], SIGMAS[1], 1.0, (0.0, 0.0))

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Refused.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"no prior was given to denoise {tuple(x.shape)} at sigma {sigma.tolist()}; name one, such as ct"
        )
