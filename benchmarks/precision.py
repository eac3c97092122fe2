"""What faster arithmetic costs a prior, and what averaging buys: bfloat16, compiled, 8-bit weights, flips.

python benchmarks/precision.py --data FOLDER [--prior ct] [--threads 1] [--compile]

Slices below FOLDER as in benchmarks/denoising.py. The error is the RMS difference to the float32 network's output, in
prior units, and what it does to the denoising PSNR. 8-bit weights are stored as int8 with a scale a filter, or as
float8_e4m3, and computed with in bfloat16: PyTorch has no 8-bit convolutions that this network could use.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import numpy as np
import torch
from denoising import psnr, slices, volumes
from torch import Tensor

from invdiff.noise import KeyedNoise
from invdiff.priors import Averaged, Compiled, NetworkPrior, load
from invdiff.protocols import Prior

SIGMAS = (0.02, 0.2, 1.0)
COUNT, REPEATS = 4, 5
INT8 = 127.0


def rounded(prior: NetworkPrior, kind: str) -> NetworkPrior:
    """The prior with its weights (not biases) rounded to 8 bits, computing in bfloat16."""
    network = copy.deepcopy(prior.network)
    with torch.no_grad():
        for value in network.parameters():
            if value.ndim < 2:
                continue
            peak = value.abs().amax(dim=tuple(range(1, value.ndim)), keepdim=True).clamp_min(1e-12)
            if kind == "int8":
                value.copy_((value / peak * INT8).round() * peak / INT8)
            else:
                value.copy_((value / peak * INT8).to(torch.float8_e4m3fn).to(value.dtype) * peak / INT8)
    return NetworkPrior(network, prior.info, torch.bfloat16)


def timed(prior: Prior, noisy: list[Tensor], sigma: float) -> tuple[list[Tensor], float]:
    """(denoised, least seconds an image)."""
    level, best = torch.tensor(sigma), float("inf")
    with torch.no_grad():
        out = [prior.denoise(x, level) for x in noisy]
        for _ in range(REPEATS):
            began = time.perf_counter()
            for x in noisy:
                prior.denoise(x, level)
            best = min(best, time.perf_counter() - began)
    return out, best / len(noisy)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--prior", default="ct")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="compile too: minutes on a CPU")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    exact = load(options.prior)
    network = copy.deepcopy(exact.network)
    ways: dict[str, Prior] = {
        "float32": exact,
        "float32, channels-last": NetworkPrior(network, exact.info).to("cpu"),
        "bfloat16": NetworkPrior(copy.deepcopy(exact.network), exact.info, torch.bfloat16),
        "bfloat16, channels-last": NetworkPrior(network, exact.info).to("cpu", torch.bfloat16),
        "int8 weights, bfloat16": rounded(exact, "int8"),
        "float8 weights, bfloat16": rounded(exact, "float8"),
    }
    fast = ways["bfloat16, channels-last"]
    ways["the same, averaged over a flip"] = Averaged(fast, (-1,))
    ways["the same, averaged over 4 flips"] = Averaged(fast, (-1, -2))
    if options.compile:
        ways["bfloat16, channels-last, compiled"] = Compiled(fast)
    found = [a for p in volumes(options.data).values() for a in slices(p, exact.info)]
    chosen = [found[k] for k in np.linspace(0, len(found) - 1, COUNT).round().astype(int)]
    clean = [torch.from_numpy(a)[None, None] for a in chosen]
    print("| arithmetic | " + " | ".join(f"error, dPSNR at sigma {s}" for s in SIGMAS) + " | time over float32 |")
    print("|---" * (len(SIGMAS) + 2) + "|")
    reference: dict[float, tuple[list[Tensor], float]] = {}
    for name, prior in ways.items():
        cells, seconds = [], 0.0
        for sigma in SIGMAS:
            noisy = [x + sigma * KeyedNoise(7, first=k)(0, x) for k, x in enumerate(clean)]
            out, each = timed(prior, noisy, sigma)
            seconds += each
            base, _ = reference.setdefault(sigma, (out, each))
            error = float(torch.stack([(a - b).square().mean() for a, b in zip(out, base, strict=True)]).mean().sqrt())
            gain = psnr([a[0, 0].numpy() for a in out], chosen) - psnr([a[0, 0].numpy() for a in base], chosen)
            cells.append(f"{error:.1e}, {gain:+.2f} dB")
        print(f"| {name} | {' | '.join(cells)} | {seconds / sum(v[1] for v in reference.values()):.2f} |", flush=True)


if __name__ == "__main__":
    main()
