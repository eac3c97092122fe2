"""Linear algebra on callables: conjugate gradients, operator norm, finite differences, shrinkage. No images."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ROOT_HALF = 0.5**0.5
BLOCK = 8  # slices whose products are held at once: they stay in a cache
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
    dims = tuple(range(1, a.ndim))
    parts = []
    for one, other in zip(a.split(BLOCK), b.split(BLOCK), strict=True):
        product = (one.conj() * other).real if a.is_complex() else one * other
        parts.append(product.sum(dim=dims, keepdim=True) if dims else product)
    each = torch.cat(parts)
    return each.sum(0, keepdim=True) if joint else each


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

    Without gradients four images are held beside ``rhs`` and ``x0``, and what ``normal`` takes.
    """
    overwrite = not torch.is_grad_enabled()
    size = inner(rhs, rhs, joint)
    goal, floor = tolerance**2 * size, cg_floor(size)
    x = torch.zeros_like(rhs) if x0 is None else x0.clone()
    r = rhs.clone() if x0 is None else rhs - normal(x0)
    p, rr = r.clone(), size if x0 is None else inner(r, r, joint)
    del rhs, x0
    for _ in range(iterations):
        if tolerance > 0 and bool((rr <= goal).all()):
            break
        x, r, p, rr = _cg_step(normal, x, r, p, rr, floor, joint, overwrite)
    return x


def cg_floor(size: Tensor) -> Tensor:
    """Squared residual norm below which CG only amplifies rounding, from that of the right-hand side."""
    return (ROUNDING * torch.finfo(size.dtype).eps) ** 2 * size


def cg_step(
    normal: Callable[[Tensor], Tensor], x: Tensor, r: Tensor, p: Tensor, floor: Tensor, joint: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """One iteration of ``cg`` from (x, residual, direction); slices whose squared residual is at ``floor`` rest."""
    return _cg_step(normal, x, r, p, inner(r, r, joint), floor, joint, overwrite=False)[:3]


def _cg_step(
    normal: Callable[[Tensor], Tensor],
    x: Tensor,
    r: Tensor,
    p: Tensor,
    rr: Tensor,
    floor: Tensor,
    joint: bool,
    overwrite: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The new x, r, p and ||r||^2, rr being the old one; with ``overwrite`` the three are where the old ones were."""
    out_x, out_r, out_p = (x, r, p) if overwrite else (None, None, None)
    q = normal(p)
    curvature = inner(p, q, joint)
    moves = (rr > floor) & (curvature > 0)
    alpha = torch.where(moves, rr / curvature.where(moves, 1.0), 0.0).to(x.dtype)
    x = torch.addcmul(x, alpha, p, out=out_x)
    new = torch.addcmul(r, -alpha, q, out=out_r)
    size = inner(new, new, joint)
    beta = torch.where(moves, size / rr.where(moves, 1.0), 0.0).to(x.dtype)
    return x, new, torch.addcmul(new, beta, p, out=out_p), size


def lanczos(
    normal: Callable[[Tensor], Tensor], start: Tensor, steps: int, joint: bool = False
) -> tuple[Tensor, Tensor]:
    """Gauss quadrature of v^H f(M) v for every f at once (Golub & Meurant, "Matrices, moments and quadrature", 1994).

    Args:
        normal: x -> M x, M Hermitian, slice by slice.
        start: v (s ...).
        steps: of Lanczos, which keeps three vectors; their loss of orthogonality does the quadrature no harm.
        joint: M couples slices: one quadrature for all of them.

    Returns:
        Nodes and weights (s, steps), or (1, steps) if ``joint``, float64: v^H f(M) v is about sum weights
        f(nodes). Weights of v = 0 are 0.
    """
    size = inner(start, start, joint)
    tiny = torch.finfo(size.dtype).tiny
    v, before, beta = start / size.sqrt().clamp_min(tiny), torch.zeros_like(start), torch.zeros_like(size)
    diagonal, off = [], []
    for _ in range(steps):
        w = normal(v) - beta * before
        alpha = inner(v, w, joint)
        w = w - alpha * v
        diagonal.append(alpha.flatten())
        beta = inner(w, w, joint).sqrt()
        beta = beta.where(beta > ROUNDING * torch.finfo(beta.dtype).eps * diagonal[0].abs().view_as(beta), 0.0)
        off.append(beta.flatten())
        before, v = v, torch.where(beta > 0, w / beta.clamp_min(tiny), torch.zeros_like(w))
    jacobi = torch.diag_embed(torch.stack(diagonal, 1).double())
    jacobi = jacobi + torch.diag_embed(torch.stack(off, 1).double()[:, :-1], -1)  # eigh reads this half alone
    nodes, vectors = torch.linalg.eigh(jacobi)
    return nodes, size.flatten().double()[:, None] * vectors[:, 0].square()


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
    zero = torch.zeros_like(v.narrow(dim, 0, 1))
    padded = torch.cat([zero, v.narrow(dim, 0, n - 1), zero], dim)
    return padded.narrow(dim, 0, n) - padded.narrow(dim, 1, n)


def plus_roughness(x: Tensor, v: Tensor, weight: float, dim: int) -> Tensor:
    """x + weight D^T D v with D = ``difference`` along ``dim``, where x was: little is held besides."""
    a, b = x.movedim(dim, 0), v.movedim(dim, 0)
    for k in range(0, len(b) - 1, BLOCK):
        d = torch.diff(b[k : k + BLOCK + 1], dim=0).mul_(weight)
        a[k + 1 : k + 1 + len(d)].add_(d)
        a[k : k + len(d)].sub_(d)
    return x


def haar(x: Tensor, dim: int) -> Tensor:
    """Details of the orthonormal Haar transform along ``dim``, coarsest first after a 0 for the mean: same shape.

    All levels; of an odd number the last value goes on to the next level as it is.
    """
    a, details = x.movedim(dim, 0), []
    while len(a) > 1:
        half = len(a) // 2
        even, odd = a[: 2 * half : 2], a[1 : 2 * half : 2]
        details.append((even - odd) * ROOT_HALF)
        a = torch.cat([(even + odd) * ROOT_HALF, a[2 * half :]])
    return torch.cat([torch.zeros_like(a), *reversed(details)]).movedim(0, dim)


def haar_adjoint(v: Tensor, dim: int) -> Tensor:
    """The exact adjoint of ``haar``: same shape. Of its details it makes what they are of, but for the mean."""
    details, lengths = v.movedim(dim, 0), [v.shape[dim]]
    while lengths[-1] > 1:
        lengths.append(lengths[-1] - lengths[-1] // 2)
    a, done = torch.zeros_like(details[:1]), 1
    for half in (n // 2 for n in reversed(lengths[:-1])):
        low, high, done = a[:half], details[done : done + half], done + half
        pairs = torch.stack([low + high, low - high], 1).flatten(0, 1) * ROOT_HALF
        a = torch.cat([pairs, a[half:]])
    return a.movedim(0, dim)


def shrink(x: Tensor, threshold: float | Tensor) -> Tensor:
    """Soft threshold, the proximal map of ``threshold`` |x|: towards zero by ``threshold``, phase kept."""
    if not x.is_complex():
        limit = torch.as_tensor(threshold, dtype=x.dtype, device=x.device)
        return x - x.clamp(-limit, limit)
    size = x.abs()
    return x * ((size - threshold).clamp_min(0) / size.clamp_min(torch.finfo(size.dtype).tiny))
