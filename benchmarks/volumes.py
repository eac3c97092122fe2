"""Whole volumes: what `invdiff plan` predicts against what a run takes, and how that grows with depth.

python benchmarks/volumes.py [--size 64] [--depths 16 64 128 256] [--views 8] [--steps 5] [--sampler dds]
    [--prior toy] [--chunk 8] [--device cpu] [--threads 1]

Each depth is planned in one process and run in another. Columns: predicted and measured peak memory (resident set; on
a GPU that which torch allocated) and what the two say beyond a process that has loaded libraries, weights and
measurements ("beyond"); predicted and measured seconds of the steps; a slice's processor time (on a GPU its seconds)
and the share of that which is neither network nor projector: what else the machine does meanwhile is not in these.
"toy" is an untrained network of 16 channels: for the way, not the picture. At full size, on a quiet machine:
--size 256 --depths 64 128 256 512 --prior ct.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

MB = 1e6
COLUMNS = (
    "slices", "plan MB", "peak MB", "ratio", "plan beyond MB", "beyond MB", "ratio", "plan s", "s", "ratio",
    "CPU s / slice", "overhead %",
)  # fmt: skip


def make_scan(path: Path, size: int, depth: int, views: int) -> None:
    """A disc in air whose slices repeat every 8, with photon noise."""
    from invdiff.datasets import Volume, write_measurements
    from invdiff.pipelines.simulate import Simulation, simulate

    row, column = torch.meshgrid(torch.arange(size) - size / 2, torch.arange(size) - size / 2, indexing="ij")
    data = torch.full((8, 1, size, size), -1000.0)
    for k in range(8):
        data[k, 0][(row / 0.35) ** 2 + (column / 0.3) ** 2 < size**2] = 40.0 + 5 * k
    affine = np.diag([-384 / size, -384 / size, 3.0, 1.0])
    scan, _ = simulate(Volume(data, affine, "HU"), Simulation(views=views, photons=1e5))
    turns = depth // 8
    deep = replace(
        scan,
        y=scan.y.repeat(turns, 1, 1, 1),
        sqrt_w=None if scan.sqrt_w is None else scan.sqrt_w.repeat(turns, 1, 1, 1),
        fields={**scan.fields, "shape": (depth, 1, *tuple(scan.fields["shape"])[2:])},
    )
    write_measurements(path, [deep])


def make_toy(folder: Path) -> None:
    from invdiff.priors import PriorInfo
    from invdiff.priors.model import save
    from invdiff.priors.network import UNet, UNetConfig

    torch.manual_seed(0)
    info = PriorInfo("toy", "HU", -1000.0, 2000.0, 0.01, 50.0, 0.5, (1.0, 8.0))
    save(folder, UNet(UNetConfig(channels=(16, 16), blocks=(1, 1), norm_groups=4)), info)


def clock() -> float:
    """Seconds of this process alone; on a GPU of all."""
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def timed(owner: type, name: str, spent: dict[str, float]) -> None:
    """Add up the seconds of a method in ``spent[name]``."""
    method: Callable[..., Any] = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        began = clock()
        out = method(*args, **kwargs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        spent[name] = spent.get(name, 0.0) + clock() - began
        return out

    setattr(owner, name, wrapped)


def child(options: argparse.Namespace) -> dict[str, float]:
    """Plan or run one depth in this process."""
    from invdiff.operators.ct.beam import BeamOperator
    from invdiff.pipelines import plan, reconstruct
    from invdiff.pipelines.memory import held_bytes
    from invdiff.priors import NetworkPrior

    torch.set_num_threads(options.threads)
    scan, out = options.child
    flags = {
        "output": {"path": out},
        "prior": {"name": options.prior},
        "sampler": {"kind": options.sampler, "steps": options.steps},
        "run": {"chunk": options.chunk, "device": options.device},
    }
    job = reconstruct.resolve(Path(scan), flags, options.set)
    device = torch.device(options.device)
    if options.what == "plan":
        found = plan.run(job)
        return {"peak": found.peak, "beyond": found.budget.bytes, "seconds": found.seconds}
    within, held, spent = reconstruct.within_memory, 0, {}

    def note_held(*args: Any) -> Any:
        nonlocal held
        result = within(*args)
        held = held_bytes(device)
        return result

    reconstruct.within_memory = note_held
    loop = reconstruct._loop

    def from_here(*args: Any) -> Any:
        spent.clear()
        return loop(*args)

    reconstruct._loop = from_here
    timed(NetworkPrior, "denoise", spent)
    timed(BeamOperator, "_apply", spent)
    seconds = {}

    def progress(states: Any, *_: Any) -> Any:
        began, own = time.perf_counter(), clock()
        yield from states
        seconds.update(whole=time.perf_counter() - began, own=clock() - own, work=sum(spent.values()))

    reconstruct.run(job, False, progress)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    share = 1 - seconds["work"] / seconds["own"]
    whole, own = seconds["whole"], seconds["own"]
    return {"peak": peak, "beyond": peak - held, "seconds": whole, "own": own, "overhead": share}


def row(planned: dict[str, float], ran: dict[str, float], depth: int) -> str:
    pairs: list[float] = []
    for key, unit in (("peak", MB), ("beyond", MB), ("seconds", 1.0)):
        pairs += [planned[key] / unit, ran[key] / unit, planned[key] / ran[key]]
    values = [depth, *pairs, ran["own"] / depth, 100 * ran["overhead"]]
    return "| " + " | ".join(f"{v:.3g}" for v in values) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--depths", type=int, nargs="+", default=[16, 64, 128, 256], help="multiples of 8")
    parser.add_argument("--views", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--sampler", default="dds")
    parser.add_argument("--prior", default="toy")
    parser.add_argument("--chunk", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--set", nargs="*", default=[], metavar="table.key=value")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--what", choices=("plan", "run"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options)))
        return
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    with tempfile.TemporaryDirectory() as folder:
        prior = options.prior
        if prior == "toy":
            make_toy(Path(folder) / "toy")
            prior = str(Path(folder) / "toy")
        for depth in options.depths:
            scan = Path(folder) / "scan.h5"
            make_scan(scan, options.size, depth, options.views)
            told = [f"--{k}={getattr(options, k)}" for k in ("sampler", "steps", "chunk", "device", "threads")]
            command = [sys.executable, __file__, *told, f"--prior={prior}", "--set", *options.set]
            results = []
            for what in ("plan", "run"):
                words = [*command, "--child", str(scan), str(Path(folder) / "out.nii"), "--what", what]
                done = subprocess.run(words, capture_output=True, text=True, check=True)
                results.append(json.loads(done.stdout.splitlines()[-1]))
            print(row(results[0], results[1], depth), flush=True)


if __name__ == "__main__":
    main()
