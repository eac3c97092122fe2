"""How near the unconditional solvers come to a prior with few denoiser evaluations.

python benchmarks/solvers.py [--prior ct] [--images 12] [--size 64] [--threads 1]

Two tables, at most 5, 10, 20 and 50 evaluations each (Heun takes two a step, but one in the last: 5, 9, 19, 49):

1. An exact Gaussian prior with a power spectrum like an image's. Every solver is affine there, so the mean and
   covariance of what it samples follow exactly from its responses to each step's noise, and so does the 2-Wasserstein
   distance to the prior. For solvers without fresh noise also the RMS distance to the exact end point of the
   probability-flow ODE from the same start noise. Both over the prior's RMS deviation: 0 is perfect, 1 is useless.
2. A trained prior: RMS distance to Heun's solution with 399 evaluations from the same start noise, in its own unit.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from invdiff.priors import GaussianPrior, NetworkPrior, load
from invdiff.problem import unconditional
from invdiff.protocols import Noise
from invdiff.reconstruction import sample
from invdiff.run import iterate, last
from invdiff.samplers import DDIM, DDPM, DEIS, GHVB, DPMpp2M, Heun, Solver

BUDGETS = (5, 10, 20, 50)  # denoiser evaluations
REFERENCE = Heun(steps=200)
CHECK = DEIS(steps=200)  # how far the reference itself can be trusted
SIDE = 32  # pixels of the exact prior's images
DEVIATION = 0.5  # of a pixel, prior units: that of shipped priors' training data
MEAN = -0.3
SOLVERS: dict[str, Solver] = {
    f"{name}, {grid}": replace(solver, grid=grid)
    for name, solver in {
        "DDPM": DDPM(),
        "DDIM": DDIM(),
        "Heun": Heun(),
        "DPM-Solver++(2M)": DPMpp2M(),
        "DEIS(3M)": DEIS(),
        "GHVB 1.8": GHVB(order=2, beta=0.8),
        "GHVB 2.8": GHVB(order=3, beta=0.8),
    }.items()
    for grid in ("karras", "geometric")
}


@dataclass(frozen=True)
class Impulse:
    """Noise that is 1 at one step and 0 elsewhere."""

    at: int

    def __call__(self, step: int, like: Tensor, draw: int = 0) -> Tensor:
        return torch.full_like(like, float(step == self.at and draw == 0))


def within_budget(solver: Solver, budget: int) -> Solver:
    """The solver with the most steps that take at most ``budget`` evaluations."""
    steps = max(k for k in range(1, budget + 1) if replace(solver, steps=k).evaluations <= budget)
    return replace(solver, steps=steps)


def image_like() -> GaussianPrior:
    """Independent coefficients with variances as 1 / frequency^2 over a SIDE x SIDE band, and one mean for all."""
    f = torch.arange(SIDE, dtype=torch.float32)
    variances = 1 / (1 + f[:, None].square() + f.square()).flatten()
    return GaussianPrior(torch.full((1, SIDE, SIDE), MEAN), variances * (DEVIATION**2 / variances.mean()))


def run(solver: Solver, prior: GaussianPrior, noise: Noise) -> Tensor:
    """What the solver makes of that noise, one image (n)."""
    problem = unconditional((1, 1, SIDE, SIDE), prior, noise).problem
    return last(iterate(solver, problem)).x.flatten().double()


def exact_distances(solver: Solver, prior: GaussianPrior) -> tuple[float, float | None]:
    """(2-Wasserstein distance, RMS distance to the exact end point or None with fresh noise), over the deviation."""
    c = prior.variances.double()
    scale = float(c.mean().sqrt())
    mean = run(solver, prior, Impulse(-2))
    responses = torch.stack([run(solver, prior, Impulse(k)) - mean for k in range(-1, solver.steps)])
    shift = mean - MEAN
    deviation = responses.square().sum(0).sqrt()
    wasserstein = float((shift.square() + (deviation - c.sqrt()).square()).mean().sqrt()) / scale
    if bool((responses[1:] != 0).any()):
        return wasserstein, None
    shrink = (c / (c + solver.sigma_max**2)).sqrt()
    off = mean - (MEAN - MEAN * shrink)  # of the image of zero noise
    return wasserstein, float(
        ((responses[0] - solver.sigma_max * shrink).square() + off.square()).mean().sqrt()
    ) / scale


def exact_table(prior: GaussianPrior) -> list[str]:
    """Lines of the first table."""
    lines = [_head("solver, grid", [f"W2 at {b}" for b in BUDGETS] + [f"RMS at {b}" for b in BUDGETS])]
    for name, solver in SOLVERS.items():
        pairs = [exact_distances(within_budget(solver, b), prior) for b in BUDGETS]
        cells = [f"{w:.4f}" for w, _ in pairs] + ["" if r is None else f"{r:.4f}" for _, r in pairs]
        lines.append(_row(name, cells))
    return lines


def trained_table(prior: NetworkPrior, images: int, size: int) -> list[str]:
    """Lines of the second table."""
    shape = (images, prior.channels, size, size)
    wanted = sample(prior, shape, REFERENCE).x
    lines = [_head(f"solver, grid (RMS, {prior.info.unit})", [f"at {b}" for b in BUDGETS])]
    for name, solver in SOLVERS.items():
        if isinstance(solver, DDPM):
            continue
        errors = [sample(prior, shape, within_budget(solver, b)).x - wanted for b in BUDGETS]
        lines.append(_row(name, [f"{float(e.square().mean().sqrt()):.1f}" for e in errors]))
    other = float((sample(prior, shape, CHECK).x - wanted).square().mean().sqrt())
    unit = prior.info.unit
    return [
        *lines,
        f"\n{images} images of {size} x {size}, deviation {float(wanted.std()):.0f} {unit}. "
        f"DEIS(3M) with {CHECK.evaluations} evaluations is {other:.1f} {unit} from the reference.",
    ]


def _head(first: str, columns: list[str]) -> str:
    return _row(first, columns) + "\n|" + "---|" * (len(columns) + 1)


def _row(first: str, cells: list[str]) -> str:
    return f"| {first} | " + " | ".join(cells) + " |"


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prior", default="ct")
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("\n".join(exact_table(image_like())) + "\n", flush=True)
    prior = load(options.prior)  # float32: the rounding of bfloat16 would hide the smaller distances
    print("\n".join(trained_table(prior, options.images, options.size)))


if __name__ == "__main__":
    main()
