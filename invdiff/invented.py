"""Measured or invented: which part of an image the data determine, and which part only the prior can have filled in.

With A of norm 1, white noise sigma_y and mu = (sigma_y / tau)^2,

    measured = P (x - r),   invented = (I - P) (x - r),   P = (A^T A + mu I)^-1 A^T A.

P is the resolution of the best linear estimate for images that deviate by tau, pixel by pixel, from what was expected:
its error covariance is tau^2 (I - P). A direction of singular value s is measured by s^2 / (s^2 + mu): in whole where
noise moves y less than the image does, not at all in the null space of A. For mu to 0, P is the orthogonal projection
onto what A sees.

r is the operator's own zero (air for CT, no signal for MRI). A is linear about it and no other level: P (x - r) then
depends on the image through its noiseless measurements alone, and empty background has no energy in either part.

What it does not say: that the measured part is right (noise that was fitted is in it, and so is what the operator has
wrong), nor that the invented part is wrong: it is what the data could not have contradicted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from invdiff.linalg import cg_step, couples, inner
from invdiff.noise import KeyedNoise
from invdiff.priors.model import load
from invdiff.problem import prepare, prior_to_operator
from invdiff.protocols import Operator, Prior
from invdiff.units import MU_WATER

STEP = -5  # of the keyed noise: random signs
RECURSION = 0.5  # share of the tolerance that CG's own residual may use up; rounding has the rest


@dataclass(frozen=True)
class Split:
    """How an image is split, and how the shares are shown.

    Args:
        tau: deviation of an image from the reference, prior units. Between the 0.06 by which images deviate from
            their denoised ones (DDS's and RED-Diff's weight of 300), which shrinks the level of a whole body as if it
            were noise, and EDM's sigma_data of 0.5, which splits the same way at twice the cost (docs/uncertainty.md).
        sigma_floor: smallest sigma_y assumed, prior units with ||A|| = 1: the samplers' own. No model is exact.
        tolerance: bound on the error of either part, as a share of the norm of x - r, slice by slice.
        iterations: most CG iterations.
        window: side of the square over which energies are averaged, pixels, odd.
        contrast: structure below this is not worth a share: prior units; 0.005 is 7.5 HU for the prior ``ct``.
        probes: random sign images by which the share of every pixel's variance that the data leave open is estimated,
            for any image; each costs what the split costs; 0 leaves it out.
    """

    tau: float = 0.2
    sigma_floor: float = 1e-3
    tolerance: float = 0.01
    iterations: int = 500
    window: int = 9
    contrast: float = 0.005
    probes: int = 0

    def __post_init__(self) -> None:
        for name in ("tau", "sigma_floor", "tolerance", "contrast"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} is {value}; a positive number is wanted")
        if self.iterations < 1 or self.probes < 0:
            raise ValueError(
                f"iterations is {self.iterations} and probes {self.probes}; 1 and 0 are the least that is wanted"
            )
        if self.window < 1 or self.window % 2 == 0:
            raise ValueError(f"window is {self.window} pixels; an odd number is wanted")

    def mu(self, sigma_y: float) -> float:
        """(sigma_y / tau)^2 for a sigma_y in prior units with ||A|| = 1."""
        return (max(sigma_y, self.sigma_floor) / self.tau) ** 2


class Parts(NamedTuple):
    """An image in two parts, measured + invented = image, in the image's unit.

    measured: with the reference level in it; invented: signed, about 0 (s c h w). share: of the local structure that
    is invented, in [0, 1], see ``local_share`` (s 1 h w). left_open: share of each pixel's variance that the data do
    not determine, whatever the image, or None (s c h w): an estimate that scatters beyond [0, 1]. record: mu and all
    that made it, the iterations and the error bound reached.
    """

    measured: Tensor
    invented: Tensor
    share: Tensor
    left_open: Tensor | None
    record: dict[str, Any]


def measured_or_invented(
    x: Tensor,
    operator: Operator,
    prior: str | Prior = "ct",
    sigma_y: float = 0.0,
    split: Split | None = None,
    reference: float | None = None,
    mu_water: float = MU_WATER,
) -> Parts:
    """Split an image, such as ``invdiff.reconstruct(...).x``, into what was measured and what was filled in.

    Args:
        x: (s c h w) in the prior's unit (HU for ``ct``).
        operator: what ``invdiff.reconstruct`` was given; linear.
        prior: the same; only its unit and range are used.
        sigma_y: as given to ``invdiff.reconstruct``.
        split: how; ``Split()`` if None.
        reference: r, in the unit of x; the operator's zero if None.
        mu_water: attenuation of water in 1/mm, for CT.

    Raises:
        ValueError: a nonlinear operator, or an image that does not fit it.
    """
    how = Split() if split is None else split
    known = load(prior) if isinstance(prior, str) else prior
    if not hasattr(operator, "adjoint"):
        raise ValueError(f"{type(operator).__name__} has no adjoint; a linear operator is wanted to split an image")
    if tuple(x.shape) != tuple(operator.domain.shape):
        raise ValueError(f"the image has shape {tuple(x.shape)}; the operator takes {tuple(operator.domain.shape)}")
    nothing = torch.zeros(operator.range.shape, dtype=operator.range.dtype, device=x.device)
    problem, to_physical, unit, _ = prepare(nothing, operator, known, sigma_y, mu_water=mu_water)
    zero = prior_to_operator(known, operator, mu_water)[1]
    level = to_physical.offset - to_physical.scale * zero.offset / zero.scale if reference is None else reference
    A, mu = problem.operator, how.mu(problem.sigma_y)
    away = (x - level).to(operator.domain.dtype) / to_physical.scale
    invented, used, error = undetermined(A, away, mu, how.iterations, how.tolerance)
    record: dict[str, Any] = {
        "mu": mu, "tau": how.tau, "sigma_y_normalised": max(problem.sigma_y, how.sigma_floor),
        "reference": level, "unit": unit, "tolerance": how.tolerance, "error_bound": error, "iterations": used,
        "window": how.window, "contrast": how.contrast * to_physical.scale, "probes": how.probes,
    }  # fmt: skip
    share = local_share(away - invented, invented, how.window, how.contrast)
    record["mean_share"] = share.mean(dim=(1, 2, 3)).tolist()
    invented = to_physical.scale * invented
    left_open = open_variance(A, away, mu, how) if how.probes else None
    return Parts(x - invented, invented, share, left_open, record)


def undetermined(A: Any, x: Tensor, mu: float, iterations: int, tolerance: float) -> tuple[Tensor, int, float]:
    """(I - P) x = mu (A^T A + mu I)^-1 x by CG from x, so that a null space comes out whole; with its cost.

    A residual below ``tolerance`` mu |x| bounds a slice's error by ``tolerance`` |x|. Then the slice rests: what
    becomes of it does not depend on the others.

    Args:
        A: a LinearOperator, of which ``normal`` is used.
        x: (s c h w).
        mu: greater than 0.
        iterations: most iterations.
        tolerance: see above.

    Returns:
        The image, the iterations of the slowest slice, and the worst slice's bound on |error| / |x|.
    """

    def normal(v: Tensor) -> Tensor:
        out: Tensor = A.normal(v) + mu * v
        return out

    rhs = mu * x
    joint = couples(A)
    size = inner(rhs, rhs, joint)
    out, used = _rested_cg(normal, rhs, x, (RECURSION * tolerance) ** 2 * size, iterations, joint)
    left = rhs - normal(out)
    ratio = inner(left, left, joint) / size.clamp_min(torch.finfo(size.dtype).tiny)
    return out, used, float(ratio.max().sqrt())


def _rested_cg(
    normal: Callable[[Tensor], Tensor], rhs: Tensor, x: Tensor, goal: Tensor, iterations: int, joint: bool
) -> tuple[Tensor, int]:
    """CG in which a slice stops at its own goal, a squared residual norm; with the iterations used."""
    r = rhs - normal(x)
    p = r
    for k in range(iterations):
        if bool((inner(r, r, joint) <= goal).all()):
            return x, k
        x, r, p = cg_step(normal, x, r, p, goal, joint)
    return x, iterations


def local_share(measured: Tensor, invented: Tensor, window: int, contrast: float) -> Tensor:
    """E_i / (E_m + E_i + contrast^2) of every pixel, in [0, 1]: (s c h w), (s c h w) -> (s 1 h w).

    E_i is the mean of invented^2 over the window, E_m the variance of the measured part in it; both are summed over
    channels. The level of the measured part does not count, which every tissue has and which would outweigh all detail;
    an invented level does.

    Args:
        measured: the measured part.
        invented: the invented part.
        window: side in pixels, odd; what lies outside the image does not count.
        contrast: in the parts' unit.
    """

    def mean(v: Tensor) -> Tensor:
        return avg_pool2d(v, window, stride=1, padding=window // 2, count_include_pad=False)

    m, i = measured.double(), invented.double()
    m = m - m.mean(dim=(2, 3), keepdim=True)  # against cancellation
    structure = (mean(m.square()) - mean(m).square()).clamp_min(0).sum(1, keepdim=True)
    filled = mean(i.square()).sum(1, keepdim=True)
    return (filled / (structure + filled + contrast**2)).to(measured.dtype)


def open_variance(A: Any, like: Tensor, mu: float, split: Split) -> Tensor:
    """diag(I - P) by Hutchinson's estimate, mean of z (I - P) z over random signs z, (s c h w).

    It is the posterior variance of every pixel over tau^2, for an image of independent pixels of deviation tau. Each
    value scatters by at most 1 / (2 sqrt(probes)): average it over a window before it is looked at.

    Args:
        A: a LinearOperator.
        like: an element of its domain.
        mu: greater than 0.
        split: probes, iterations and tolerance.
    """
    total = torch.zeros_like(like)
    for k in range(split.probes):
        z = torch.where(KeyedNoise()(STEP, like, k) < 0, -1.0, 1.0).to(like.dtype)
        total = total + z * undetermined(A, z, mu, split.iterations, split.tolerance)[0]
    return total / split.probes
