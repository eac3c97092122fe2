"""Milliseconds of a circuit's exact queries, beside closed forms of the same densities.

python benchmarks/circuits.py [--batch 4] [--repeats 5]

The shipped circuits; a hidden Markov chain against forward-backward in plain numpy (the same numbers, checked); and a
Gaussian of as many variables, conditioned by Cholesky: what a mean and a covariance alone would cost. Best of the
repeats, one machine, one run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from invdiff.circuits import Categorical, Circuit, Spot, Structure, load, shipped
from invdiff.noise import KeyedNoise

CHAIN, STATES, LEVELS = 256, 32, 64


def best(made: Callable[[], Any], repeats: int, batch: int) -> float:
    """Milliseconds an image."""
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        made()
        times.append(time.perf_counter() - began)
    return 1e3 * min(times[1:]) / batch


def chain(batch: int, repeats: int) -> list[tuple[str, float, float]]:
    """A chain as a circuit, and by forward-backward."""
    g = torch.Generator().manual_seed(0)
    A = torch.rand(CHAIN, STATES, STATES, generator=g).softmax(-1)
    table = (3 * torch.randn(CHAIN, STATES, LEVELS, generator=g)).log_softmax(-1)
    p = torch.full((STATES,), 1 / STATES)
    structure = Structure((-1, *range(CHAIN - 1)), tuple(range(CHAIN)))
    circuit = Circuit(structure, Categorical(table), p, A)
    log_w = torch.randn(batch, CHAIN, LEVELS, generator=g)
    parts = [v.double().numpy() for v in (p, A, table.exp())]

    def plain() -> tuple[float, np.ndarray]:
        for w in log_w.exp().double().numpy():
            f = np.einsum("tkc,tc->tk", parts[2], w)
            out = forward_backward(parts[0], parts[1], f)
        return out

    found, wanted = circuit.log_likelihood(log_w)[-1], plain()[0]
    assert abs(float(found) - wanted) < 1e-3 * abs(wanted)
    ours = best(lambda: circuit.posterior(log_w), repeats, batch)
    return [(f"hidden Markov chain, {CHAIN} variables, K = {STATES}: posterior", ours, best(plain, repeats, batch))]


def forward_backward(p: np.ndarray, A: np.ndarray, f: np.ndarray) -> tuple[float, np.ndarray]:
    """ln p(evidence) and p(state | evidence) (t k): p the first state's, A[t] leads from t - 1 to t, f (t k) of w."""
    alpha, beta, scale = np.empty_like(f), np.ones_like(f), np.empty(len(f))
    for t in range(len(f)):
        alpha[t] = (p if t == 0 else alpha[t - 1] @ A[t]) * f[t]
        scale[t] = alpha[t].sum()
        alpha[t] /= scale[t]
    for t in range(len(f) - 2, -1, -1):
        beta[t] = A[t + 1] @ (f[t + 1] * beta[t + 1]) / scale[t + 1]
    return float(np.log(scale).sum()), alpha * beta


def dense(variables: int, batch: int, repeats: int) -> float:
    """Mean and variance of every variable of a Gaussian given independent evidence, by Cholesky, image by image."""
    g = torch.Generator().manual_seed(0)
    root = torch.randn(variables, variables, generator=g) / variables**0.5
    precision = torch.linalg.inv(root @ root.T + 0.1 * torch.eye(variables))
    e = Spot(torch.randn(batch, variables, generator=g), torch.rand(batch, variables, generator=g) + 0.1)

    def made() -> None:
        for value, variance in zip(*e, strict=True):
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(precision + torch.diag(1 / variance)))
            _ = inverse @ (value / variance), inverse.diagonal()

    return best(made, repeats, batch)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    batch, repeats = arguments.batch, arguments.repeats
    torch.set_grad_enabled(False)
    print("| | ms an image | closed form, ms | ratio |\n|---|---|---|---|")
    for name in shipped():
        circuit = load(name).circuit
        v, levels = circuit.structure.variables, load(name).info.levels
        g = torch.Generator().manual_seed(0)
        x, log_w = torch.randint(levels, (batch, v), generator=g), torch.randn(batch, v, levels, generator=g)
        queries: dict[str, Callable[[], Any]] = {
            "likelihood of data": lambda c=circuit, x=x: c.log_likelihood(x),
            "likelihood of soft evidence": lambda c=circuit, w=log_w: c.log_likelihood(w),
            "posterior mean and variance": lambda c=circuit, w=log_w: c.posterior(w),
            "marginals": lambda c=circuit, w=log_w: c.marginals(w),
            "joint sample": lambda c=circuit, w=log_w: c.sample(w, KeyedNoise(0)),
        }
        closed = dense(v, batch, repeats)
        for query, made in queries.items():
            ours = best(made, repeats, batch)
            beside = f"{closed:.1f} | {ours / closed:.2f}" if query.startswith("posterior") else "|"
            print(f"| `{name}`, {v} variables, K = {circuit.states}: {query} | {ours:.1f} | {beside} |", flush=True)
    for name, ours, closed in chain(batch, repeats):
        print(f"| {name} | {ours:.1f} | {closed:.1f} | {ours / closed:.2f} |")


if __name__ == "__main__":
    main()
