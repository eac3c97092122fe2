"""Raw k-space of real scanners: SENSE of all data, and every way from 2, 3 and 4 times fewer lines.

python benchmarks/raw_mr.py --data FOLDER --out RESULTS

FOLDER holds twix files of fully sampled phantoms. Noise and coil maps come from the data themselves: the noise from the
edge of k-space, the maps of an undersampled scan from its own calibration lines. The reference is the SENSE image of
all data, which is as noisy as the scan; errors are those of the magnitude where the reference's coil maps are.
The prior brain-mr knows heads and no phantoms: its rows show what a prior costs and gives where it does not belong.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from invdiff.datasets import read_kspace
from invdiff.files import whole_file
from invdiff.metrics import nmse, psnr
from invdiff.pipelines.mri import MRIConfig
from invdiff.pipelines.pictures import panel
from invdiff.pipelines.raw_mr import LEAST, RawConfig, measurements_of, rss_of
from invdiff.pipelines.reconstruct import RunConfig, prior_of
from invdiff.pipelines.scans import image_of
from invdiff.samplers import DDS, SENSE, TV, L1Wavelet, REDDiff, ZeroFilled

ACCELERATIONS = (2.0, 3.0, 4.0)
CENTRE = 0.08  # share of the lines that calibrate; more where that is fewer than ESPIRiT wants
SHOWN = 3.0  # times fewer lines, in the picture
COMPLEX = MRIConfig("complex")


def ways() -> dict[str, tuple[Any, bool]]:
    """Name to sampler, and whether it takes the prior."""
    return {
        "zero-filled": (ZeroFilled(), False),
        "SENSE": (SENSE(), False),
        "L1-wavelet": (L1Wavelet(), False),
        "TV": (TV(lam=4e-3), False),
        "DDS": (DDS(), True),
        "RED-Diff": (REDDiff(), True),
    }


def main() -> None:
    """Reconstruct everything; print the table as it comes; write the pictures and the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ways", nargs="*", default=list(ways()))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    prior, _ = prior_of("brain-mr", RunConfig())
    chosen = {name: way for name, way in ways().items() if name in options.ways}
    rows: dict[str, dict[str, torch.Tensor]] = {}
    numbers: dict[str, dict[str, tuple[float, float, float]]] = {}
    print("| scan | lines | " + " | ".join(chosen) + " |\n|---|---" + "|---" * len(chosen) + "|")
    for path in sorted(options.data.glob("*.dat")):
        kspace = read_kspace(path)
        whole = measurements_of(kspace)
        reference, _, _ = image_of(whole, SENSE(), how=COMPLEX)
        inside = torch.as_tensor(whole.fields["maps"]).abs().sum(-3).reshape(reference.data.shape) > 0
        target = reference.data[inside].numpy()
        peak = float(target.max())
        lines = min(reference.data.shape[2:])
        how = RawConfig(centre=max(CENTRE, LEAST / lines))
        for acceleration in ACCELERATIONS:
            scan = measurements_of(kspace, RawConfig(acceleration=acceleration, centre=how.centre))
            key = f"{path.stem}, {acceleration:g}x"
            row = {"RSS, all data": rss_of(kspace).data[0, 0], "SENSE, all data": reference.data[0, 0]}
            numbers[key] = {}
            for name, (sampler, generative) in chosen.items():
                began = time.perf_counter()
                image, _, _ = image_of(scan, sampler, prior if generative else None, COMPLEX)
                seconds = time.perf_counter() - began
                ours = image.data[inside].numpy()
                numbers[key][name] = (psnr(ours, target, peak), nmse(ours, target), seconds)
                row[name] = image.data[0, 0]
            if acceleration == SHOWN:
                rows[path.stem.split("_phantom")[0]] = row
            cells = " | ".join(f"{p:.1f} / {n:.4f} ({s:.0f} s)" for p, n, s in numbers[key].values())
            kept = scan.history["maps"]["lines"]
            print(f"| {path.stem.replace('_', ' ')} | {acceleration:g}x, {min(kept)} ACS | {cells} |", flush=True)
    panel(options.out / "raw_mr.png", rows, "a.u.", truth="SENSE, all data", title=f"{SHOWN:g} times fewer lines")
    with whole_file(options.out / "raw_mr.json") as part:
        part.write_text(json.dumps(numbers, indent=1))


if __name__ == "__main__":
    main()
