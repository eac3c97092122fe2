"""Linear algebra on callables: conjugate gradients, operator norm, finite differences, shrinkage. No images."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ROUNDING = 16.0  # relative residual, in machine epsilons, at which CG has nothing left to gain


def inner(a: Tensor, b: Tensor, joint: bool = False) -> Tensor:
    """Re<a, b>, real: over all axes but the first, kept as size 1, or over every axis if ``joint``.

    Args:
        a: (s ...), real or complex.
        b: the same shape.
        joint: one number for all slices, for slices that are coupled.

    Returns:
        (s 1 ... 1), or (1 ... 1) if ``joint``.
    """
    dims = tuple(range(0 if joint else 1, a.ndim))
    product = (a.conj() * b).real if a.is_complex() else a * b
    return product.sum(dim=dims, keepdim=True) if dims else product


def couples(operator: object) -> bool:
    """Whether a linear operator couples slices (3D encoding), so that CG on its normal equations must be ``joint``."""
    return bool(getattr(operator, "coupled", False))


def cg(
    normal: Callable[[Tensor], Tensor],
    rhs: Tensor,
    x0: Tensor | None = None,
    iterations: int = 50,
    tolerance: float = 0.0,
    joint: bool = False,
) -> Tensor:
    """Conjugate gradients for M x = rhs with M Hermitian and positive (semi)definite (Hestenes & Stiefel, 1952).

    Args:
        normal: x -> M x.
        rhs: (s ...), real or complex.
        x0: first guess; zero if None.
        iterations: most iterations.
        tolerance: stop once every residual norm is below this times that of ``rhs``; 0 runs all iterations.
        joint: one step length for all slices (slices coupled by M), else one a slice.

    Returns:
        x, the shape of ``rhs``. A slice whose residual is zero keeps its value.
    """
    x = torch.zeros_like(rhs) if x0 is None else x0
    r = rhs if x0 is None else rhs - normal(x0)
    p = r
    size = inner(rhs, rhs, joint)
    goal, floor = tolerance**2 * size, cg_floor(size)
    for _ in range(iterations):
        if tolerance > 0 and bool((inner(r, r, joint) <= goal).all()):
            break
        x, r, p = cg_step(normal, x, r, p, floor, joint)
    return x


def cg_floor(size: Tensor) -> Tensor:
    """Squared residual norm below which CG only amplifies rounding, from that of the right-hand side."""
    return (ROUNDING * torch.finfo(size.dtype).eps) ** 2 * size


def cg_step(
    normal: Callable[[Tensor], Tensor], x: Tensor, r: Tensor, p: Tensor, floor: Tensor, joint: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """One iteration of ``cg`` from (x, residual, direction); slices whose squared residual is at ``floor`` rest."""
    rr = inner(r, r, joint)
    q = normal(p)
    curvature = inner(p, q, joint)
    moves = (rr > floor) & (curvature > 0)
    alpha = torch.where(moves, rr / curvature.where(moves, 1.0), 0.0)
    new = r - alpha * q
    beta = torch.where(moves, inner(new, new, joint) / rr.where(moves, 1.0), 0.0)
    return x + alpha * p, new, new + beta * p


def power_norm(normal: Callable[[Tensor], Tensor], start: Tensor, iterations: int = 50) -> float:
    """The largest singular value of A by power iterations on A^H A.

    Args:
        normal: x -> A^H A x.
        start: a random element of the domain.
        iterations: number of applications.

    Returns:
        ||A||, from below: within about 1 % after 50 iterations for projectors.
    """
    x = start / torch.linalg.vector_norm(start)
    value = torch.zeros(())
    for _ in range(iterations):
        x = normal(x)
        value = torch.linalg.vector_norm(x)
        if value == 0:
            return 0.0
        x = x / value
    return float(value.sqrt())


def difference(x: Tensor, dim: int) -> Tensor:
    """Forward difference along ``dim``, last one zero (Neumann ends): same shape."""
    return torch.diff(x, dim=dim, append=x.narrow(dim, x.shape[dim] - 1, 1))


def difference_adjoint(v: Tensor, dim: int) -> Tensor:
    """The exact adjoint of ``difference``: same shape."""
    n = v.shape[dim]
    inside = v.narrow(dim, 0, n - 1)
    zero = torch.zeros_like(v.narrow(dim, 0, 1))
    return torch.cat([zero, inside], dim) - torch.cat([inside, zero], dim)


def shrink(x: Tensor, threshold: float | Tensor) -> Tensor:
    """Soft threshold, the proximal map of ``threshold`` |x|: towards zero by ``threshold``, phase kept."""
    size = x.abs()
    return x * ((size - threshold).clamp_min(0) / size.clamp_min(torch.finfo(size.dtype).tiny))
