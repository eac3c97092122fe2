"""Draws docs/like.png, two examples in the same hole: python docs/like.py FOLDER (of benchmarks/inpainting.py)"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
from inpainting import slices_of

from invdiff import circuits
from invdiff.circuits.evidence import of_example
from invdiff.noise import KeyedNoise
from invdiff.operators import Mask
from invdiff.priors import Chunked, Steered, load
from invdiff.priors.model import fast_dtype
from invdiff.protocols import Problem
from invdiff.run import iterate, last
from invdiff.samplers import DDNM

STEPS, SIGMA_STOP = 16, 0.5


def filled(image: Tensor, hole: Tensor, example: Tensor | None) -> Tensor:
    """One filling (h w) of ``image`` (1 1 h w), like ``example`` where one is given."""
    prior, circuit = load("brain-mr").to("cpu", fast_dtype("cpu")), circuits.load("brain-mr")
    evidence = None if example is None else of_example(circuit.info, example, hole)
    operator = Mask(~hole, image.shape)
    y = operator.forward(image)
    steered = Steered(Chunked(prior, 1), circuit, y, ~hole, SIGMA_STOP, evidence)
    sampler = DDNM(steps=STEPS, eta=0.0, cg_steps=1, sigma_max=100.0, sigma_min=0.03)
    x = last(iterate(sampler, Problem(operator, y, 0.0, steered, KeyedNoise(0)))).x
    return torch.where(hole, x, image)[0, 0]


def main() -> None:
    """Two subjects' slices as examples for a third one's hole."""
    torch.set_grad_enabled(False)
    prior = load("brain-mr")
    every = prior.info.in_prior_units(slices_of(Path(sys.argv[1]), "brain-mr", 12))
    image, examples = every[-2:-1], (every[-1:], every[4:5])
    hole = torch.zeros_like(image, dtype=torch.bool)
    hole[:, :, 84:172, 84:172] = True
    pictures = {"kept": torch.where(hole, -1.0, image)[0, 0], "no example": filled(image, hole, None)}
    for name, example in zip("AB", examples, strict=True):
        pictures[f"example {name}"] = torch.where(hole, example, -1.0)[0, 0]
        pictures[f"filled in like {name}"] = filled(image, hole, example)
    figure, axes = plt.subplots(1, len(pictures), figsize=(2 * len(pictures), 2.3), layout="constrained")
    for axis, (title, picture) in zip(axes, pictures.items(), strict=True):
        axis.imshow(picture, cmap="gray", vmin=-1, vmax=1)
        axis.set_title(title, fontsize=8)
        axis.axis("off")
    figure.savefig(Path(__file__).parent / "like.png", dpi=100)


if __name__ == "__main__":
    main()
