"""What samplers of linear operators share: the image nearest to another that fits y, an exact draw, the ADMM sweep."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from invdiff.linalg import cg, couples, difference, difference_adjoint, haar, haar_adjoint, plus_roughness, shrink
from invdiff.protocols import Problem

SLICES = 0  # the axis along which the z-term couples
COUPLINGS = {"tv": (difference, difference_adjoint), "haar": (haar, haar_adjoint)}  # what is sparse, and its adjoint
MOST = 100  # CG iterations where the operator's own solve is asked for and mu is 0, which it does not take


def correction(A: Any, rhs: Tensor, mu: float | Tensor, cg_steps: int) -> Tensor:
    """(A^H A + mu I)^-1 rhs; for mu = 0 the solution of least norm.

    Args:
        A: a LinearOperator.
        rhs: (s c h w).
        mu: 0 or more; one for all, or (s 1 1 1).
        cg_steps: CG iterations from zero, one step length a slice unless A couples slices; 0 is A's own ``solve``,
            where mu is one.
    """
    if cg_steps == 0 and not isinstance(mu, Tensor) and mu > 0:
        return A.solve(rhs, mu)
    tolerance, weight = 10 * torch.finfo(rhs.dtype).eps, torch.as_tensor(mu, dtype=rhs.dtype, device=rhs.device)
    return cg(lambda v: torch.addcmul(A.normal(v), weight, v), rhs, None, cg_steps or MOST, tolerance, couples(A))


def nearest(A: Any, y: Tensor, x: Tensor, mu: float | Tensor, cg_steps: int) -> Tensor:
    """argmin_v ||A v - y||^2 + mu ||v - x||^2, slice by slice; for mu = 0 the v nearest to x of those that fit y best.

    Solved for v - x, from zero: where CG stops early, what y does not determine stays as it is in x.
    """
    return x + correction(A, A.adjoint(y - A.forward(x)), mu, cg_steps)


def measurement_noise(problem: Problem, step: int, draw: int) -> Tensor:
    """N(0, 1) in every real component of y: keyed complex noise has variance 1/2 in each."""
    n = problem.noise(step, problem.y, draw)
    return n * 2**0.5 if n.is_complex() else n


def gaussian_draw(
    problem: Problem, x: Tensor, deviation: float, sigma_y: float, step: int, draw: int, cg_steps: int
) -> Tensor:
    """A draw from exp(-||A v - y||^2 / 2 sigma_y^2 - ||v - x||^2 / 2 deviation^2), exact but for CG's error.

    Perturb and optimise (Papandreou & Yuille 2010; Orieux, Feron & Giovannelli 2012): noise of their own deviations is
    added to y and to x, then the least-squares problem of both is solved. Whitened noise is what y must have.

    Args:
        problem: A and y.
        x: centre (s c h w).
        deviation: of every pixel about x.
        sigma_y: of every real component of y, greater than 0.
        step: key of the noise.
        draw: key of the noise; ``draw + 1`` is used too.
        cg_steps: as in ``correction``.
    """
    moved = x + deviation * problem.noise(step, x, draw)
    y = problem.y + sigma_y * measurement_noise(problem, step, draw + 1)
    return nearest(problem.operator, y, moved, (sigma_y / deviation) ** 2, cg_steps)


def check_coupling(owner: object, coupling: str) -> None:
    """Refuse a name that is no coupling's."""
    if coupling not in COUPLINGS:
        raise ValueError(f"{type(owner).__name__}.coupling is {coupling!r}; one of {', '.join(COUPLINGS)} is wanted")


def admm_sweep(
    problem: Problem,
    x: Tensor,
    z: Tensor,
    u: Tensor,
    *,
    rho: float,
    lam: float,
    mu: float | Tensor,
    cg_steps: int,
    coupling: str = "tv",
) -> tuple[Tensor, Tensor, Tensor]:
    """One ADMM sweep on ||A v - y||^2 / 2 + lam ||D_z v||_1 + mu/2 ||v - x||^2, from x (methods: DiffusionMBIR, DDS).

    Args:
        problem: A and y.
        x: first guess and anchor (s c h w).
        z: split D_z x, same shape.
        u: its scaled dual, same shape.
        rho: penalty, greater than 0.
        lam: weight of the term across slices.
        mu: weight of the anchor, one for all or (s 1 1 1); 0 has none.
        cg_steps: CG iterations, with one step length for all slices, which D_z couples.
        coupling: what D_z is: ``tv`` differences of neighbours, ``haar`` the details of a Haar transform.

    Returns:
        The new x, z and u.
    """
    A, (across, back) = problem.operator, COUPLINGS[coupling]
    weight = torch.as_tensor(mu, dtype=x.dtype, device=x.device)

    def normal(v: Tensor) -> Tensor:
        out = torch.addcmul(A.normal(v), weight, v)
        if coupling == "tv":
            return plus_roughness(out, v, rho, SLICES)
        return out.add_(back(across(v, SLICES), SLICES), alpha=rho)

    def rhs() -> Tensor:
        out = torch.addcmul(A.adjoint(problem.y), weight, x)
        return out.add_(back(z - u, SLICES), alpha=rho)

    new = cg(normal, rhs(), x, cg_steps, joint=True)
    split = across(new, SLICES).add_(u)
    z = shrink(split, lam / rho)
    return new, z, split - z
