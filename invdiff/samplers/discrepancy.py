"""How much the data weigh against the denoised image, found from sigma_y: nobody has to guess it.

An image x = argmin ||A x - y||^2 + mu ||x - D||^2 is the mean of what y leaves possible if D is wrong by r in every
pixel and mu = sigma_y^2 / r^2. Of all r, y is likeliest under the one at which (MacKay, "Bayesian interpolation", 1992)

    ||x - D||^2 = r^2 dof(mu),    dof(mu) = tr A (A^T A + mu I)^-1 A^T,

and there the fit is as good as it should be, by the discrepancy principle less what the fit itself takes up of the
noise (Wahba 1983): ||A x - y||^2 is about sigma_y^2 (M - dof), M the number of measurements. That equation itself is of
little use while the fit is too close: both of its sides are then what no image can fit. So the first one is solved, a
step of its fixed point at each step of the method, for each slice.

dof comes from one Hutchinson probe and a few Lanczos steps (Bai, Fahey & Golub 1996), once a run, for every mu at once;
D is held fixed in it, so that a method whose D follows x takes up more of the noise than that.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from invdiff.linalg import couples, inner, lanczos
from invdiff.protocols import Problem

LANCZOS = 20  # steps: dof to 1 % for projectors
PROBE = 98  # draw of the noise of step -1 that the probe is
FIRST = 0.3  # error of a denoised image, prior units, that the first step assumes
RANGE = (1e-3, 10.0)  # of that error, in all steps
MOST = 4.0  # factor by which mu changes at most in a step
GAIN = 0.7  # exponent of the correction where there is no dof: mu is then sought by the misfit
MU, COUNT, IDLE, TABLE = 0, 1, 2, 3  # columns of a rule: mu, measurements, ||y||^2 where A is 0, then the quadrature


def believed_variance(problem: Problem, floor: float) -> float:
    """sigma_y^2, with sigma_y at least ``floor``: no model of a scanner is exact."""
    return max(problem.sigma_y, floor) ** 2


def first_rule(problem: Problem, variance: float, given: float | None) -> Tensor:
    """The rule before the first step: mu, what does not change of it, and the quadrature, a row a slice.

    Slices that A couples share one row.

    Args:
        problem: A and y; a nonlinear operator has no dof, so that its rule is Morozov's own.
        variance: sigma_y^2 of one real component of y.
        given: mu / variance, where it is not to be found.

    Returns:
        (s, 3 + 2 LANCZOS), or (1, ...); (1, 1) with mu alone where it is given.
    """
    if given is not None:
        return torch.full((1, 1), given * variance, dtype=problem.y.dtype.to_real(), device=problem.y.device)
    A, joint = problem.operator, couples(problem.operator)
    count, idle = (n.sum(0, keepdim=True) if joint else n for n in measurements(problem))
    columns = [torch.full_like(count, variance / FIRST**2), count, idle]
    if not hasattr(A, "adjoint"):
        return torch.stack(columns, 1)
    start = A.adjoint(probe_of(problem))
    nodes, weights = lanczos(A.normal, start, LANCZOS, joint)
    return torch.cat([torch.stack(columns, 1), nodes.to(count), weights.to(count)], 1)


def probe_of(problem: Problem) -> Tensor:
    """1 or -1 in every real component of y, at random: Hutchinson's probe."""
    n = problem.noise(-1, problem.y, PROBE)
    return torch.complex(n.real.sign(), n.imag.sign()) if n.is_complex() else n.sign()


def weight_of(rule: Tensor, like: Tensor) -> Tensor:
    """mu of each slice, (s 1 ... 1) or one for all, with the axes of ``like``."""
    return rule[:, MU].view(-1, *[1] * (like.ndim - 1)).to(like)


def measurements(problem: Problem) -> tuple[Tensor, Tensor]:
    """How many real numbers y holds of each slice that depend on the image, (s), and ||y||^2 of the others, (s).

    Others are lines of k-space that were not sampled and rays that miss the image: A gives exactly 0 there, whatever
    the image (here: one of noise).
    """
    A, y = problem.operator, problem.y
    like = torch.empty(A.domain.shape, dtype=A.domain.dtype, device=y.device)
    used = A.forward(problem.noise(-1, like)).flatten(1) != 0
    rest = y.flatten(1).abs().square().where(~used, 0.0)
    return used.sum(1).to(rest) * (2 if y.is_complex() else 1), rest.sum(1)


def next_rule(rule: Tensor, problem: Problem, x: Tensor, D: Tensor, variance: float) -> Tensor:
    """The rule for the next step.

    Args:
        rule: that of this step.
        problem: A and y.
        x: this step's minimiser (s c h w).
        D: the denoised image that it was made from.
        variance: as in ``first_rule``.
    """
    if rule.shape[1] == 1:  # given
        return rule
    mu, tiny, joint = rule[:, MU], torch.finfo(rule.dtype).tiny, couples(problem.operator)
    if rule.shape[1] > TABLE:  # MacKay's fixed point
        change = x - D
        correction = variance * degrees_of_freedom(rule) / mu / inner(change, change, joint).flatten().clamp_min(tiny)
    else:
        residual = problem.operator.forward(x) - problem.y
        misfit = inner(residual, residual, joint).flatten() - rule[:, IDLE]
        correction = (variance * rule[:, COUNT] / misfit.clamp_min(tiny)) ** GAIN
    new = mu * correction.clamp(1 / MOST, MOST)
    return torch.cat([new.clamp(variance / RANGE[1] ** 2, variance / RANGE[0] ** 2)[:, None], rule[:, 1:]], 1)


def degrees_of_freedom(rule: Tensor) -> Tensor:
    """dof(mu) of each slice, (s), with D held fixed; 0 for a nonlinear operator."""
    nodes, weights = rule[:, TABLE:].chunk(2, 1)
    return (weights / (nodes.clamp_min(0) + rule[:, :1])).sum(1)


def probed_degrees_of_freedom(
    run: Callable[[Problem], Tensor], problem: Problem, x: Tensor, step: float = 0.1
) -> Tensor:
    """tr d(A x)/dy of a whole method, D's own answer to y included, by one Hutchinson probe: a second run.

    Args:
        run: from a problem to the method's image (s c h w).
        problem: with linear A.
        x: ``run(problem)``.
        step: of the probe, in sigma_y.

    Returns:
        (s), in real components of y.
    """
    A = problem.operator
    probe = probe_of(problem)
    size = step * problem.sigma_y
    change = A.forward(run(problem._replace(y=problem.y + size * probe))) - A.forward(x)
    return inner(change, probe).flatten() / size
