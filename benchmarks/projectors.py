"""Parallel-beam forward and adjoint: invdiff against ASTRA's CPU projector and deepinv's Tomography, in one run.

    python benchmarks/projectors.py --make-env     # once: deepinv in an environment of its own
    python benchmarks/projectors.py --threads 2

deepinv requires torchvision, which replaces or does not fit a CPU-only torch. Its environment therefore shares the
torch of this one and gets an empty stand-in for torchvision: ``Tomography`` does not use it.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import json
import math
import statistics
import subprocess
import sys
import sysconfig
import time
import types
import venv
from collections.abc import Callable
from pathlib import Path

ENVIRONMENT = Path.home() / ".cache" / "invdiff" / "deepinv-env"
DEEPINV = ["deepinv==0.5.0", "torchmetrics==1.9.0", "lightning-utilities", "natsort"]  # without their dependencies
SMALL = ["requests", "tqdm"]
BARS = {"ASTRA linear, slice by slice": 15, "deepinv Tomography": 40}
CHUNK = 16  # slices at once for deepinv's parallel mode, which holds every rotated view in memory

Times = dict[str, tuple[float, float]]


def medians(forward: Callable[[], object], adjoint: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median seconds of each, after one call that is not counted."""
    result = []
    for call in (forward, adjoint):
        call()
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        result.append(statistics.median(seconds))
    return result[0], result[1]


def ours_and_astra(options: argparse.Namespace) -> Times:
    """Both on the same images and sinograms; ASTRA links the tensors without a copy."""
    import astra
    import torch

    from invdiff.operators import ParallelBeam
    from invdiff.operators.ct.astra_engine import astra_geometries

    torch.set_num_threads(options.threads)
    n, s = options.size, options.slices
    angles = torch.arange(options.views) * math.pi / options.views
    operator = ParallelBeam((s, 1, n, n), angles, detectors=math.ceil(1.5 * n))
    x = torch.rand(operator.domain.shape)
    y = operator(x)
    volume, projection = astra_geometries(operator)
    projector = astra.create_projector("linear", projection, volume)
    sinogram, image = torch.zeros_like(y), torch.zeros_like(x)

    def forward() -> None:
        for k in range(s):
            astra.projector.direct_FP(projector, x[k, 0], out=sinogram[k, 0])

    def adjoint() -> None:
        for k in range(s):
            astra.projector.direct_BP(projector, y[k, 0], out=image[k, 0])

    times = {
        "invdiff": medians(lambda: operator(x), lambda: operator.adjoint(y), 5 * options.repeats),
        "ASTRA linear, slice by slice": medians(forward, adjoint, options.repeats),
    }
    for name, a, b in (("forward", sinogram, y), ("adjoint", image, operator.adjoint(y))):
        print(f"{name}: largest relative difference to ASTRA {float((a - b).abs().max() / b.abs().max()):.1e}")
    return times


class _Stub(types.ModuleType):
    """A module whose every name is an empty class."""

    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _NoTorchvision:
    """Finds torchvision and all below it as ``_Stub``."""

    def find_spec(self, name: str, *_: object) -> importlib.machinery.ModuleSpec | None:
        mine = name.split(".")[0] == "torchvision"
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if mine else None  # type: ignore[arg-type]

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Stub(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to run."""


def deepinv_worker(options: argparse.Namespace) -> None:
    """Run in deepinv's environment: the faster of its two modes, as JSON on the last line."""
    sys.meta_path.insert(0, _NoTorchvision())  # type: ignore[arg-type]
    import deepinv
    import torch

    torch.set_num_threads(options.threads)
    x = torch.rand(options.slices, 1, options.size, options.size)
    found = []
    for parallel in (False, True):
        physics = deepinv.physics.Tomography(
            angles=options.views, img_width=options.size, circle=False, parallel_computation=parallel, normalize=False
        )
        parts = x.split(CHUNK if parallel else options.slices)
        sinograms = [physics.A(part) for part in parts]
        found.append(
            medians(
                lambda parts=parts, physics=physics: [physics.A(p) for p in parts],
                lambda sinograms=sinograms, physics=physics: [physics.A_adjoint(p) for p in sinograms],
                max(2, options.repeats // 2),
            )
        )
        del sinograms
    print(json.dumps([min(f[k] for f in found) for k in range(2)]))


def run_deepinv(options: argparse.Namespace, python: Path) -> tuple[float, float]:
    """The worker's times, from a process of its own."""
    numbers = [f"--{name}={getattr(options, name)}" for name in ("size", "views", "slices", "threads", "repeats")]
    done = subprocess.run(
        [str(python), __file__, "--deepinv-worker", *numbers], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise SystemExit(f"deepinv's process failed:\n{done.stderr[-2000:]}")
    forward, adjoint = json.loads(done.stdout.splitlines()[-1])
    return forward, adjoint


def make_environment(folder: Path) -> None:
    """deepinv without its dependencies, beside the torch that runs this script."""
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    where = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    (Path(where) / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [python, "-m", "pip", "install", "--quiet"]
    subprocess.run([*install, "--no-deps", *DEEPINV], check=True)
    subprocess.run([*install, *SMALL], check=True)


def report(times: Times, options: argparse.Namespace) -> bool:
    """Print the table; whether every bar that was measured is met."""
    print(
        f"\n{options.size}^2, {options.views} views over 180 degrees, {options.slices} slices, "
        f"{options.threads} thread(s), medians\n"
    )
    print("| | forward ms | adjoint ms | forward ratio | adjoint ratio | bar |")
    print("|---|---|---|---|---|---|")
    base, good = times["invdiff"], True
    for name, (forward, adjoint) in times.items():
        ratios = forward / base[0], adjoint / base[1]
        bar = BARS.get(name)
        good &= bar is None or min(ratios) >= bar
        cells = [f"{1e3 * forward:.1f}", f"{1e3 * adjoint:.1f}", *(f"{r:.1f}" for r in ratios), str(bar or "")]
        print(f"| {name} | {' | '.join(cells)} |")
    return good


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--views", type=int, default=60)
    parser.add_argument("--slices", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--env", type=Path, default=ENVIRONMENT, help="folder of deepinv's environment")
    parser.add_argument("--make-env", action="store_true", help="make deepinv's environment and stop")
    parser.add_argument("--deepinv-worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.deepinv_worker:
        deepinv_worker(options)
        return
    if options.make_env:
        make_environment(options.env)
        return
    times = ours_and_astra(options)
    python = options.env / "bin" / "python"
    if python.is_file():
        times["deepinv Tomography"] = run_deepinv(options, python)
    else:
        print(f"deepinv was not measured: no environment at {options.env}; --make-env makes one")
    raise SystemExit(0 if report(times, options) else 1)


if __name__ == "__main__":
    main()
