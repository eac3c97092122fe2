"""MRI operators: our NUFFT against finufft and sigpy at equal error, and the Cartesian normal operator against FFTs.

    OMP_NUM_THREADS=1 python benchmarks/nufft.py

Golden-angle spokes with twofold readout oversampling; SENSE forward and adjoint with the maps, each method at
the cheapest setting that reaches the error. All take turns, so that a busy machine is as busy for one as for another.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from invdiff.operators import CartesianMRI, NonCartesianMRI
from invdiff.operators.mri.masks import poisson_mask, random_mask
from invdiff.operators.mri.trajectories import radial

BAR = 1.3  # both: times the fastest, times the bare FFTs
CHECKED = 300  # samples compared with the sum itself
TILE = 2  # coils of the bare FFTs in tiles, which stay in the cache
SIGPY = {"oversamp": 1.5, "width": 6}  # the cheapest of 1.25 to 2 and 4 to 7 below 1e-4

Calls = dict[str, Callable[[], object]]


def in_turns(calls: Calls, repeats: int) -> dict[str, float]:
    """Median processor seconds of each call; the first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            start = time.process_time()
            call()
            if turn:
                seconds[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def error(y: Tensor, x: Tensor, maps: Tensor, k: Tensor) -> float:
    """Relative error in the 2-norm of samples (coil samples) of an image (h w), over some of them."""
    some = torch.randperm(len(k), generator=torch.Generator().manual_seed(0))[:CHECKED]
    waves = []
    for axis, n in enumerate(x.shape):
        r = torch.arange(n, dtype=torch.float64) - n // 2
        waves.append(torch.exp(-2j * math.pi * k[some, axis : axis + 1] * r) / math.sqrt(n))
    exact = torch.einsum("mh,chw,mw->cm", waves[0], (maps * x).to(torch.complex128), waves[1])
    return float(torch.linalg.vector_norm(y[:, some] - exact) / torch.linalg.vector_norm(exact))


def sigpy_calls(maps: Tensor, k: Tensor, image: np.ndarray, samples: np.ndarray) -> tuple[Calls, Calls]:
    """Its SENSE operator, maps and NUFFT, at the cheapest setting below the error."""
    from sigpy import linop

    at = k.numpy() * maps.shape[-1]
    operator = linop.NUFFT(maps.shape, at, **SIGPY) * linop.Multiply(maps.shape[1:], maps.numpy())
    return {"sigpy": lambda: operator(image)}, {"sigpy": lambda: operator.H(samples)}


def finufft_calls(
    maps: Tensor, k: Tensor, image: np.ndarray, samples: np.ndarray, accuracy: float
) -> tuple[Calls, Calls]:
    """Bare plans that take all coils at once, on the coarse grid, with the maps in numpy."""
    import finufft

    coils, n = maps.shape[:2]
    how = {"dtype": "complex64", "upsampfac": 1.25, "nthreads": torch.get_num_threads()}
    plans = [finufft.Plan(kind, (n, n), coils, accuracy, sign, **how) for kind, sign in ((2, -1), (1, 1))]
    for plan in plans:
        plan.setpts(*(np.ascontiguousarray(2 * np.pi * k.numpy()[:, a], dtype=np.float32) for a in range(2)))
    own, back = maps.numpy() / np.float32(n), maps.numpy().conj() / np.float32(n)
    forward = {"finufft, bare plan": lambda: plans[0].execute(own * image)}
    return forward, {"finufft, bare plan": lambda: (back * plans[1].execute(samples)).sum(0)}


def non_cartesian(options: argparse.Namespace) -> bool:
    """Print the table of NUFFTs; whether the bar is met."""
    n, coils, accuracy = options.size, options.coils, options.accuracy
    generator = torch.Generator().manual_seed(1)
    x, maps = (torch.randn(*s, n, n, dtype=torch.complex64, generator=generator) for s in ((1, 1), (coils,)))
    k = radial(options.spokes, 2 * n)
    engines = {e: NonCartesianMRI(k, (n, n), maps, accuracy=accuracy, engine=e) for e in ("own", "finufft")}
    quick = NonCartesianMRI(k, (n, n), maps, accuracy=accuracy, toeplitz=True)
    y = engines["own"](x)
    forward: Calls = {name: lambda a=a: a(x)[0] for name, a in engines.items()}
    adjoint: Calls = {name: lambda a=a: a.adjoint(y) for name, a in engines.items()}
    image, samples = x[0, 0].numpy(), y[0].numpy()
    for more in (finufft_calls(maps, k, image, samples, accuracy), sigpy_calls(maps, k, image, samples)):
        forward, adjoint = forward | more[0], adjoint | more[1]
    errors = {name: error(torch.as_tensor(call()), x[0, 0], maps, k) for name, call in forward.items()}
    calls = {f"{name} forward": call for name, call in forward.items()}
    calls |= {f"{name} adjoint": call for name, call in adjoint.items()}
    calls |= {"normal": lambda: engines["own"].normal(x), "spread": lambda: quick.normal(x)}
    times = in_turns(calls, options.repeats)
    print(f"{n}^2, {coils} coils, {options.spokes} spokes of {2 * n}, {torch.get_num_threads()} thread(s), medians\n")
    print("| | forward ms | adjoint ms | times the fastest | error |\n|---|---|---|---|---|")
    least = {way: min(times[f"{name} {way}"] for name in errors) for way in ("forward", "adjoint")}
    for name, e in errors.items():
        f, a = (times[f"{name} {way}"] for way in ("forward", "adjoint"))
        ratios = f"{f / least['forward']:.2f}, {a / least['adjoint']:.2f}"
        print(f"| {name} | {1e3 * f:.1f} | {1e3 * a:.1f} | {ratios} | {e:.1e} |")
    print(f"\nnormal {1e3 * times['normal']:.1f} ms, by the spread function {1e3 * times['spread']:.1f} ms\n")
    return all(times[f"own {way}"] <= BAR * least[way] for way in least) and errors["own"] <= accuracy


def cartesian(options: argparse.Namespace) -> bool:
    """Print the table of normal operators; whether the bar is met."""
    n, coils, s = options.size, options.coils, options.slices
    x, maps = torch.randn(s, 1, n, n, dtype=torch.complex64), torch.randn(coils, n, n, dtype=torch.complex64)
    k = torch.randn(s, coils, n, n, dtype=torch.complex64)
    masks = {"points": poisson_mask((n, n), 4), "lines": random_mask((n, n), 4)}
    tiles = [part for one in k.split(1) for part in one.split(TILE, 1)]

    def pair(v: Tensor) -> Tensor:
        return torch.fft.ifft2(torch.fft.fft2(v))

    calls: Calls = {"FFT pairs, all at once": lambda: pair(k), "FFT pairs, in tiles": lambda: [pair(v) for v in tiles]}
    for name, mask in masks.items():
        a = CartesianMRI(mask, maps, s)
        calls[name] = lambda a=a: a.normal(x)
        calls[f"{name}, adjoint of forward"] = lambda a=a: a.adjoint(a(x))
    times = in_turns(calls, options.repeats)
    bare = min(seconds for name, seconds in times.items() if name.startswith("FFT"))
    print(
        f"Cartesian normal, {n}^2, {coils} coils, {s} slice(s)\n\n| | ms | times the faster FFT pairs |\n|---|---|---|"
    )
    for name, seconds in times.items():
        print(f"| {name} | {1e3 * seconds:.2f} | {seconds / bare:.2f} |")
    print()
    return all(times[name] <= BAR * bare for name in masks)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--coils", type=int, default=8)
    parser.add_argument("--spokes", type=int, default=64)
    parser.add_argument("--slices", type=int, default=1)
    parser.add_argument("--accuracy", type=float, default=1e-4)
    parser.add_argument("--repeats", type=int, default=25)
    options = parser.parse_args()
    met = [non_cartesian(options), cartesian(options)]
    raise SystemExit(0 if all(met) else 1)


if __name__ == "__main__":
    main()
