"""Networks of others as priors: one call, one range of values, one convention of noise."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from invdiff.priors.description import Description
from invdiff.priors.model import NetworkPrior, PriorInfo
from invdiff.priors.network import padded
from invdiff.priors.parameterisation import Parameterisation

GREY_INPUTS = 3  # a network of colour images takes grey ones in each of its three channels


@dataclass(frozen=True)
class Call:
    """How a network is called, where it is not ``network(x, label)`` on images of any size.

    Args:
        inputs: image channels that it takes, without the constant ones; as many as the images have if 0.
        stride: heights and widths are padded to a multiple of this, 2^(levels - 1) for most U-Nets.
        size: the only (height, width) that it takes; any if empty.
        class_keyword: name of its argument for the class label; guided-diffusion says ``y``.
    """

    inputs: int = 0
    stride: int = 1
    size: tuple[int, ...] = ()
    class_keyword: str = "class_labels"

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", tuple(self.size))
        if self.inputs < 0 or self.stride < 1 or len(self.size) not in (0, 2):
            raise ValueError(
                f"inputs {self.inputs}, stride {self.stride}, size {self.size}: "
                "inputs from 0, a stride from 1 and a size of two numbers or none are wanted"
            )


class Adapted(nn.Module):
    """A network of another project behind the house's call: (s c h w), (s) -> (s c h w).

    Its output may be a tensor, a tuple that starts with it or an object with a ``sample``; of twice as many channels
    (a learned variance) the first half is used.

    Args:
        network: any module.
        description: of its images.
        call: how it is called.

    Raises:
        ValueError: channels that cannot be made to fit.
    """

    def __init__(self, network: nn.Module, description: Description, call: Call) -> None:
        super().__init__()
        self.network = network
        self.channels = description.channels
        self.inputs = call.inputs or description.channels
        self.constants = description.constants
        self.call = call
        self.class_label = description.class_label
        if self.inputs != self.channels and (self.inputs, self.channels) != (GREY_INPUTS, 1):
            raise ValueError(
                f"the network takes images of {self.inputs} channels, the description says {self.channels} "
                f"and constants {list(self.constants)}; as many, or 1 for a network of {GREY_INPUTS}, are wanted"
            )

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        s, _, h, w = x.shape
        if self.call.size and self.call.size != (h, w):
            raise ValueError(
                f"the images are {h} x {w}; the network takes {self.call.size[0]} x {self.call.size[1]} only"
            )
        whole = padded(x, self.call.stride)
        given = [whole.expand(-1, self.inputs, -1, -1)]
        given += [torch.full_like(whole[:, :1], value) for value in self.constants]
        named: dict[str, Any] = {}
        if self.class_label is not None:
            named[self.call.class_keyword] = torch.full((s,), self.class_label, device=x.device)
        out = _tensor(self.network(torch.cat(given, 1), label, **named))
        wanted = [(s, k * self.inputs, *whole.shape[2:]) for k in (1, 2)]
        if tuple(out.shape) not in wanted:
            raise ValueError(
                f"the network made {tuple(out.shape)} of images {tuple(whole.shape)}; "
                f"{wanted[0]}, or {wanted[1]} with a variance, is wanted"
            )
        image = out[:, : self.inputs, :h, :w]
        return image if self.inputs == self.channels else image.mean(1, keepdim=True)


def _tensor(out: Any) -> Tensor:
    found = getattr(out, "sample", out)
    found = found[0] if isinstance(found, tuple | list) else found
    if not isinstance(found, Tensor):
        raise ValueError(f"the network gives a {type(out).__name__}; a tensor, a tuple of them or .sample is wanted")
    return found


def check_class(description: Description, classes: int | None, weights: Path) -> None:
    """Refuse a class label that is missing, not wanted or that a network of so many classes (or none) does not have."""
    label = description.class_label
    if (classes is None) != (label is None) or (label or 0) >= (classes or 1):
        wanted = "none" if classes is None else f"one of 0 to {classes - 1}"
        raise ValueError(f"class_label is {label}; the network of {weights} wants {wanted}")


def adapt(
    network: nn.Module, description: Description, how: Parameterisation, call: Call | None = None, sha256: str = ""
) -> NetworkPrior:
    """Any network as a prior.

    The network itself is put into evaluation mode and its parameters are frozen; they are not copied.

    Args:
        network: any module, called ``network(x, label)``.
        description: unit, range and channels of its images; they travel with the prior.
        how: what it predicts, at which noise levels: ``EDM(0.5)``, ``Predicts("eps", Discrete())``, ...
        call: how it is called, if not like that.
        sha256: of its weights, for records.

    Raises:
        ValueError: channels or a range that do not fit.
    """
    low, high = how.sigma_range
    scale = (description.data_range[1] - description.data_range[0]) / 2
    info = PriorInfo(
        name=description.name or type(network).__name__,
        unit=description.unit,
        low=float(description.low),
        high=float(description.high),
        sigma_min=low / scale,
        sigma_max=high / scale,
        sigma_data=getattr(how, "sigma_data", 0.0) / scale,
        pixel_mm=description.pixel_mm,
        parameterisation=how.name,
    )
    adapted = Adapted(network, description, call or Call()).eval().requires_grad_(False)
    return NetworkPrior(adapted, info, None, sha256 or None, how, description.data_range)
