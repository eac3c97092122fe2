"""Ways to learn from measurements: what a training of ``invdiff train --from`` asks of one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from invdiff.measured.examples import Example
from invdiff.priors.model import PriorInfo
from invdiff.priors.training import Learning, Task


@dataclass(frozen=True)
class MeasuredLearning(Learning):
    """How a network is trained on measurements: ``Learning``, and how many scans make a batch.

    Args:
        batch: images of a step.
    """

    batch: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch < 1:
            raise ValueError(f"batch is {self.batch}; at least 1 is wanted")


class Method(ABC):
    """A way to learn from measurements: a frozen dataclass, whose fields are the table ``[measured]``.

    Registered as an entry point of ``invdiff.methods``, by the name that ``measured.method`` gives.
    """

    name: ClassVar[str]
    supervised: ClassVar[bool] = False  # is shown images

    @abstractmethod
    def extra(self, channels: int) -> int:
        """Channels that the network sees beside as many as the image has."""

    @abstractmethod
    def check(self, examples: Sequence[Example], info: PriorInfo) -> list[str]:
        """Refuse examples from which this method cannot learn; notes on the others.

        Raises:
            ValueError: one sentence.
        """

    @abstractmethod
    def task(self, examples: Sequence[Example], learning: MeasuredLearning, info: PriorInfo) -> Task[Any]:
        """What the network is trained for."""

    @abstractmethod
    def judge(
        self, network: nn.Module, examples: Sequence[Example], info: PriorInfo, autocast: torch.dtype | None
    ) -> dict[float, float]:
        """A loss on held-out scans at some noise levels, with the same draws at every call; no image is known."""

    @abstractmethod
    def exported(self, info: PriorInfo, examples: Sequence[Example]) -> PriorInfo:
        """What the trained model says of itself, of the kind that its reader tells it by."""

    def about(self) -> str:
        """What the model's card says of the way that it was trained: a sentence."""
        return (self.__doc__ or "").strip().split("\n\n")[0]
