"""What a training step through the operator costs over that of an ordinary prior with the same network and batch.

python benchmarks/measured_cost.py [--channels 32 64 96] [--blocks 1] [--batch 4] [--size 64] [--steps 20]

Steps of both kinds take turns on one thread, and the ratio of the summed times of each is printed, for CT of 45 views
and for MR of eight coils at fourfold acceleration; and what share of a step lifts take.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from invdiff.measured import ForwardModelMethod, MeasuredLearning, alike, example_of
from invdiff.noise import KeyedNoise
from invdiff.operators import CartesianMRI, ParallelBeam, RealChannels
from invdiff.operators.mri.simulate import birdcage_maps
from invdiff.priors import PriorInfo
from invdiff.priors.edm import edm_denoise, edm_loss
from invdiff.priors.launch import Alone
from invdiff.priors.model import fast_dtype
from invdiff.priors.network import UNet, UNetConfig
from invdiff.priors.training import start, train
from invdiff.problem import ScaledLinear

SIGMA, VIEWS, COILS, KEPT = 0.02, 45, 8, 16
SCANS = 12
LEVEL, DEVIATION = 0.3, 0.5  # of the noise that is taken off, of the images
WARM = 4  # steps before the clock counts


def scan(name: str, size: int, k: int) -> Any:
    """A scan of noise: what it shows does not matter for the time."""
    shape = (1, 1, size, size)
    if name == "ct":
        angles = (math.pi * torch.rand(VIEWS, generator=torch.Generator().manual_seed(k))).tolist()
        operator: Any = ParallelBeam(shape, angles)
    else:
        mask = torch.zeros(size, size, dtype=torch.bool)
        mask[torch.randperm(size, generator=torch.Generator().manual_seed(k))[: KEPT * size // 64]] = True
        operator = CartesianMRI(mask, birdcage_maps(COILS, (size, size))) @ RealChannels(shape)
    operator = ScaledLinear(operator, operator.norm())
    image = KeyedNoise(k)(0, torch.empty(operator.domain.shape))
    y = operator.forward(image)
    return example_of(operator, y + SIGMA * KeyedNoise(k)(1, y), SIGMA)


class Plain:
    """The task of an ordinary prior: images under noise."""

    def __init__(self, images: Tensor, batch: int, deviation: float) -> None:
        self.images, self.batch, self.deviation = images, batch, deviation

    def part(self, step: int, rank: int = 0, world: int = 1) -> Tensor:  # noqa: ARG002
        """The batch of a step."""
        which = torch.randint(len(self.images), (self.batch,), generator=torch.Generator().manual_seed(step))
        return self.images[which]

    def count(self, step: int) -> int:  # noqa: ARG002
        """Images of a step."""
        return self.batch

    def loss(self, network: nn.Module, part: Tensor, autocast: torch.dtype | None) -> Tensor:
        """EDM's."""
        sigma = torch.full((self.batch,), LEVEL)
        noisy = part + LEVEL * torch.randn_like(part)
        with torch.autocast("cpu", dtype=autocast or torch.float32, enabled=autocast is not None):
            x = edm_denoise(network, noisy, sigma, self.deviation)  # type: ignore[arg-type]
        return edm_loss(x, part, sigma, self.deviation).mean()


def turns(one: Iterator[Any], other: Iterator[Any], steps: int) -> tuple[float, float]:
    """Seconds of the steps of each, which take turns."""
    spent = [0.0, 0.0]
    for k in range(2 * steps + WARM):
        began = time.perf_counter()
        next((one, other)[k % 2])
        if k >= WARM:
            spent[k % 2] += time.perf_counter() - began
    return spent[0], spent[1]


def timed(f: Callable[[], Any], repeats: int) -> float:
    """Seconds of a call."""
    f()
    began = time.perf_counter()
    for _ in range(repeats):
        f()
    return (time.perf_counter() - began) / repeats


def main() -> None:
    """Print the ratios."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--channels", type=int, nargs="+", default=[32, 64, 96], help="of the network's levels")
    words.add_argument("--blocks", type=int, default=1, help="of each level")
    words.add_argument("--batch", type=int, default=4, help="images of a step")
    words.add_argument("--size", type=int, default=64, help="pixels of an edge")
    words.add_argument("--steps", type=int, default=20, help="of each kind")
    args = words.parse_args()
    torch.set_num_threads(1)
    dtype, learning = fast_dtype("cpu"), MeasuredLearning(images=10**9, batch=args.batch)
    for name, channels in (("ct", 1), ("mr", 2)):
        network = UNetConfig(channels, 2, tuple(args.channels), (args.blocks,) * len(args.channels))
        examples = alike([scan(name, args.size, k) for k in range(SCANS)])
        info = PriorInfo(name, "a.u.", -1.0, 1.0, 2 * SIGMA, 20.0, DEVIATION, (1.0, 1.0))
        method = ForwardModelMethod()
        task = method.task(examples, learning, info)
        through = train(start(learning, network, None, method.extra(channels)), task, learning, Alone(), dtype)
        images = torch.randn(32, channels, args.size, args.size)
        plain = train(start(learning, network), Plain(images, args.batch, DEVIATION), learning, Alone(), dtype)
        ours, theirs = turns(through, plain, args.steps)
        example, some = examples[0], torch.arange(examples[0].views) % 2
        lift = partial(example.lift, example.y, some, SIGMA, DEVIATION, method.lift_steps)
        lifts = 2 * args.batch * timed(lift, args.steps)
        parameters = sum(p.numel() for p in UNet(network).parameters())
        print(
            f"{name}: {parameters / 1e6:.2f} million weights, {args.size} x {args.size}, batch {args.batch}: "
            f"{ours / theirs:.2f} times ({1e3 * ours / args.steps:.0f} and {1e3 * theirs / args.steps:.0f} ms a step); "
            f"lifts {100 * lifts * args.steps / ours:.0f} % of it",
            flush=True,
        )


if __name__ == "__main__":
    main()
