"""Learn a circuit over sinograms from CT slices, and complete a limited-angle one with it.

python examples/sinogram_circuit.py FOLDER -o RUN [--slices 600] [--steps 60]

FOLDER holds ct_axial_256_*.h5 (docs/training.md). Each slice is projected by a parallel beam, 120 views over a half
turn and 256 rays; the cells are 8 views x 8 rays. RUN/circuit is the circuit of invdiff.circuits.sinograms.completed.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor

from invdiff.circuits import Categorical, GridInfo, ImageCircuit, hidden_chow_liu, k_means_start, stepwise
from invdiff.circuits.images import bits, save
from invdiff.operators import ParallelBeam
from invdiff.pipelines.training_data import DataConfig, read_training
from invdiff.units import mu_from_hu

VIEWS, RAYS, BLOCK, LEVELS, HIGH = 120, 256, 8, 64, 9.0
POWER, HELD_OUT = 0.7, 0.1


def sinograms(folder: Path, count: int, views: int, rays: int) -> Tensor:
    """Line integrals (n 1 view ray) of slices evenly over all, every other one mirrored."""
    slices = read_training(folder, DataConfig(files="ct_axial_256_*.h5"), "HU")
    index = torch.linspace(0, len(slices.images) - 1, count).round().long().tolist()
    angles, found = [math.pi * k / views for k in range(views)], []
    pixel = torch.as_tensor(slices.pixel_mm)
    for number, k in enumerate(index):
        x = torch.from_numpy(slices.scale * slices.images[k].astype("float32"))[None, None].clamp_min(-1000)
        if not number:
            beam = ParallelBeam((1, 1, *x.shape[2:]), angles, rays)
        mm = float(pixel[k] if pixel.ndim == 1 and len(pixel) == len(slices.images) else pixel.float().mean())
        found.append(mm * beam(mu_from_hu(x.flip(-1) if number % 2 else x)))
    return torch.cat(found)


def learned(y: Tensor, states: int, steps: int, block: int = BLOCK, batch: int = 64) -> tuple[ImageCircuit, float]:
    """The circuit of sinograms, and its bits a cell on the last tenth of them."""
    rows, columns = y.shape[2] // block, y.shape[3] // block
    info = GridInfo("sinogram", "line integral", 0.0, HIGH, rows, columns, block, LEVELS, 0.0)
    x = y * 2 / HIGH - 1
    cells = info.pooled(x)
    within = float((info.pooled(x.square()).mean - cells.mean.square()).clamp_min(0).mean().sqrt())
    info = GridInfo("sinogram", "line integral", 0.0, HIGH, rows, columns, block, LEVELS, within)
    held = max(1, round(HELD_OUT * len(y)))
    level = info.levels_of(cells.mean)[:-held]
    start = Categorical(torch.zeros(1, 1, LEVELS).log_softmax(-1))
    state = k_means_start(hidden_chow_liu(cells.mean[:-held], 8), start, level, states, 1.0, seed=0)
    for step in range(steps):
        g = torch.Generator().manual_seed(step)
        chosen = torch.randint(len(level), (min(batch, len(level)),), generator=g)
        state, _ = stepwise(state, level[chosen], (step + 2) ** -POWER, len(level), 1.0)
    circuit = ImageCircuit(state.circuit, info)
    return circuit, bits(circuit, cells.mean[-held:])


def main() -> None:
    """Read, project, learn, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--slices", type=int, default=600)
    parser.add_argument("--states", type=int, default=32)
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    y = sinograms(arguments.folder, arguments.slices, VIEWS, RAYS)
    circuit, held_out = learned(y, arguments.states, arguments.steps)
    save(arguments.out / "circuit", circuit, {"held_out_bits_per_cell": held_out})
    print(f"{arguments.out / 'circuit'}: {held_out:.3f} bits a cell of sinograms held out")


if __name__ == "__main__":
    main()
