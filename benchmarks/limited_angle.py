"""Limited-angle CT (60 views over 90 degrees, 1e5 photons a ray) of real scans, steered by circuits and not.

python benchmarks/limited_angle.py --data FOLDER --out table.json [--stops none,1,blind2,sinogram] [--sinogram CIRCUIT]

FOLDER holds DICOM series, one a sub-folder; the middle slice of each is measured at 512 x 512 and reconstructed at
256 x 256. A second call runs what is missing. Same prior, same noise, same seed. A stop is ``none``, the sigma down to
which the circuit over the image steers, ``blind`` and that where the scan gives it no evidence, or ``sinogram``: a
circuit over sinograms (examples/sinogram_circuit.py) completes the half turn, and nothing else is steered.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from ct_table import middle
from inpainting import every

from invdiff.circuits import load as load_circuit
from invdiff.circuits.sinograms import completed, weights_of
from invdiff.datasets import read_volume
from invdiff.metrics import compare
from invdiff.noise import KeyedNoise
from invdiff.operators import ParallelBeam, Whitened
from invdiff.pipelines.measured_cells import evidence_of
from invdiff.pipelines.scans import operator_of
from invdiff.pipelines.simulate import Simulation, simulate
from invdiff.priors import Chunked, NoPrior, Steered, load
from invdiff.priors.model import fast_dtype
from invdiff.problem import prepare
from invdiff.run import iterate, last
from invdiff.samplers import DDS, FBP, REDDiff

SAMPLERS = {"DDS": lambda steps: DDS(steps=steps), "RED-Diff": lambda steps: REDDiff(steps=steps)}


def half_turn(scan: Any, circuit: Any) -> tuple[torch.Tensor, Any, float]:
    """y, operator and sigma_y of the completed sinogram: all 120 views, weighted by what is known of them."""
    y = torch.cat([scan.y, torch.zeros_like(scan.y)], 2)
    keep = torch.arange(y.shape[2])[:, None] < scan.y.shape[2]
    sigma = torch.cat([1 / scan.sqrt_w, torch.ones_like(scan.sqrt_w)], 2)
    found = completed(circuit, y, keep)
    w = weights_of(found, torch.where(keep, sigma, 1e-3))
    angles = [math.radians(1.5 * k) for k in range(y.shape[2])]
    whole = ParallelBeam(**{**scan.fields, "angles": angles})
    return w * found.y, Whitened(whole, w), 1.0


def runs(arguments: argparse.Namespace) -> Iterator[tuple[str, Callable[[], dict[str, float]]]]:
    """The name of each run, and how it is made."""
    prior, circuit = load("ct").to("cpu", fast_dtype("cpu")), load_circuit(arguments.circuit)
    for folder in sorted(p for p in arguments.data.iterdir() if p.is_dir()):
        scan, truth = simulate(middle(read_volume(folder), 1), Simulation(views=60, arc=90.0, photons=1e5))
        operator, y, sigma_y = operator_of(scan)
        shape = truth.data.shape
        nothing = torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)

        def judged(
            sampler: Any, used: Any, parts: tuple[Any, ...] = (y, operator, sigma_y), truth: Any = truth
        ) -> dict[str, float]:
            began = time.process_time()
            prepared = prepare(parts[0], parts[1], used, parts[2], KeyedNoise(0))
            x = prepared.to_physical(last(iterate(sampler, prepared.problem)).x)
            found = compare(x, truth.data, "HU")
            return {"psnr": found.psnr, "ssim": found.ssim, "cpu_s": time.process_time() - began}

        yield f"{folder.name}|FBP|none", lambda judged=judged: judged(FBP(), NoPrior())
        if "sinogram" in arguments.stops:
            yield (
                f"{folder.name}|FBP|sinogram",
                lambda judged=judged, scan=scan: judged(
                    FBP(), prior, half_turn(scan, load_circuit(arguments.sinogram))
                ),
            )
        for name, stop in [(n, s) for s in arguments.stops.split(",") for n in SAMPLERS]:
            sampler = SAMPLERS[name](arguments.steps)

            def made(
                judged: Any = judged, sampler: Any = sampler, stop: str = stop, scan: Any = scan, no: Any = nothing
            ):
                used: Any = Chunked(prior, 1)
                if stop == "sinogram":
                    return judged(sampler, used, half_turn(scan, load_circuit(arguments.sinogram)))
                if stop.startswith("blind"):
                    used = Steered(used, circuit, *no, float(stop[5:]))
                elif stop != "none":
                    used = Steered(used, circuit, *no, float(stop), evidence_of(scan, circuit, prior))
                return judged(sampler, used)

            yield f"{folder.name}|{name}|{stop}", made


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--circuit", default="ct")
    parser.add_argument("--sinogram", default="")
    parser.add_argument("--stops", default="none,1")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("-o", "--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    found = every(runs(arguments), arguments.out)
    series = list(dict.fromkeys(k.split("|")[0] for k in found))
    print(
        "| | steered to sigma | "
        + " | ".join(f"{s}: dB, SSIM" for s in series)
        + " |\n|---|---|"
        + "---|" * len(series)
    )
    for how in dict.fromkeys(tuple(k.split("|")[1:]) for k in found):
        cells = [found.get("|".join([s, *how])) for s in series]
        shown = ["" if c is None else f"{c['psnr']:.2f}, {c['ssim']:.3f}" for c in cells]
        print(f"| {how[0]} | {how[1]} | " + " | ".join(shown) + " |")


if __name__ == "__main__":
    main()
