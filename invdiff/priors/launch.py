"""One process or several: what a training asks of whoever launched it."""

from __future__ import annotations

import os
from typing import Protocol, cast

import torch
from torch import Tensor, nn


class Launcher(Protocol):
    """The processes that share a training.

    rank: number of this one; world: how many there are; device: where this one computes.
    """

    rank: int
    world: int
    device: torch.device

    def setup(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        """The network to call: its gradients are averaged over the processes."""
        ...

    def backward(self, loss: Tensor) -> None: ...

    def total(self, value: Tensor) -> Tensor:
        """The sum of ``value`` over the processes."""
        ...

    def wait(self) -> None:
        """Until every process is here."""
        ...


class Alone:
    """One process on one device."""

    rank = 0
    world = 1

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)

    def setup(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:  # noqa: ARG002
        return network

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def total(self, value: Tensor) -> Tensor:
        return value

    def wait(self) -> None:
        return


class Together:
    """This process among those that ``torchrun`` started, through Lightning Fabric's DDP.

    Args:
        device: kind of device, such as ``cpu`` or ``cuda``; each process takes its own.

    Raises:
        ValueError: lightning-fabric is not installed, or something other than torchrun started the process.
    """

    def __init__(self, device: str = "cpu") -> None:
        try:
            from lightning_fabric import Fabric
        except ImportError as error:
            raise ValueError('several processes need lightning-fabric: pip install "invdiff[train]"') from error
        if "LOCAL_WORLD_SIZE" not in os.environ:
            raise ValueError("WORLD_SIZE is set and LOCAL_WORLD_SIZE is not: start several processes with torchrun")
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // local
        self._fabric = Fabric(accelerator=device.split(":")[0], devices=local, num_nodes=nodes, strategy="ddp")
        self._fabric.launch()
        self.rank, self.world, self.device = self._fabric.global_rank, self._fabric.world_size, self._fabric.device

    def setup(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        wrapped: nn.Module = self._fabric.setup(network, optimizer)[0]
        return wrapped

    def backward(self, loss: Tensor) -> None:
        self._fabric.backward(loss)

    def total(self, value: Tensor) -> Tensor:
        summed = self._fabric.all_reduce(value, reduce_op="sum")
        return cast(Tensor, summed)

    def wait(self) -> None:
        self._fabric.barrier()


def launched(device: str) -> Launcher:
    """``Together`` under torchrun with more than one process, else ``Alone``."""
    return Together(device) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else Alone(device)
