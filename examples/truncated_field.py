"""Outpainting of a truncated field of view: the detector is narrower than the body.

python examples/truncated_field.py CT -o FOLDER [--field 200] [--steps 20] [--steer]

CT: a volume (NIfTI, DICOM file or folder). Its middle slice is measured by 120 views with 1e5 photons a ray, of which
the rays within a disc of FIELD mm are kept; the image reconstructed is of the whole body. Prints the error inside the
field and beside it, of FBP and of DDS, and writes a picture. The same from the command line:

    invdiff simulate CT -o scan.h5 --views 120 --field 200 --photons 1e5
    invdiff reconstruct scan.h5 -o recon.nii.gz
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from invdiff.circuits import load as load_circuit
from invdiff.datasets import Volume, read_volume
from invdiff.noise import KeyedNoise
from invdiff.pipelines.measured_cells import evidence_of
from invdiff.pipelines.pictures import panel
from invdiff.pipelines.scans import operator_of
from invdiff.pipelines.simulate import Simulation, simulate, some_slices
from invdiff.priors import Steered, load
from invdiff.problem import prepare
from invdiff.protocols import Prior
from invdiff.run import iterate, last
from invdiff.samplers import DDS, FBP


def disc(scan: Any, field_mm: float) -> Tensor:
    """The pixels of the scanned field of view: bool (h w)."""
    (h, w), pixel = scan.fields["shape"][2:], scan.fields["pixel_mm"]
    y, x = torch.meshgrid(torch.arange(h) - (h - 1) / 2, torch.arange(w) - (w - 1) / 2, indexing="ij")
    return torch.hypot(x, y) * pixel <= field_mm / 2


def reconstructed(scan: Any, prior: Prior, sampler: Any, circuit: Any = None) -> Tensor:
    """The image (s 1 h w) in HU."""
    operator, y, sigma_y = operator_of(scan)
    used: Any = prior
    if circuit is not None:
        nothing = torch.zeros(operator.domain.shape)
        used = Steered(prior, circuit, nothing, nothing.bool(), 1.0, evidence_of(scan, circuit, prior))
    prepared = prepare(y, operator, used, sigma_y, KeyedNoise(0))
    return prepared.to_physical(last(iterate(sampler, prepared.problem)).x)


def run(volume: Volume, prior: Prior, field_mm: float, steps: int, circuit: Any = None) -> dict[str, Any]:
    """The images, and the root of the mean square error in HU inside the field and beside it."""
    scan, truth = simulate(volume, Simulation(views=120, photons=1e5, field=field_mm))
    inside = disc(scan, field_mm).expand(truth.data.shape)
    images = {"truth": truth.data, "FBP": reconstructed(scan, prior, FBP())}
    images["DDS"] = reconstructed(scan, prior, DDS(steps=steps))
    if circuit is not None:
        images["DDS, steered"] = reconstructed(scan, prior, DDS(steps=steps), circuit)
    errors = {
        name: [float((x - truth.data)[part].square().mean().sqrt()) for part in (inside, ~inside)]
        for name, x in images.items()
    }
    return {"images": images, "errors": errors, "kept": float(scan.keep.float().mean())}


def main() -> None:
    """Read, simulate, reconstruct, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("volume", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--field", type=float, default=200.0)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--steer", action="store_true")
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    volume = read_volume(arguments.volume)
    middle = volume.data.shape[0] // 2
    circuit = load_circuit("ct") if arguments.steer else None
    found = run(some_slices(volume, f"{middle}:{middle + 1}"), load("ct"), arguments.field, arguments.steps, circuit)
    print(f"{100 * found['kept']:.0f} % of the rays; error inside and beside the field, HU:")
    for name, (inside, beside) in found["errors"].items():
        print(f"{name:14s} {inside:6.0f} {beside:6.0f}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    panel(arguments.out / "truncated.png", {"": {k: v[0, 0] for k, v in found["images"].items()}}, "HU")


if __name__ == "__main__":
    main()
