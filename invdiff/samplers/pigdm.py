"""PiGDM: pseudo-inverse guidance (Song, Vahdat, Mardani & Kautz, ICLR 2023)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from invdiff.protocols import Problem
from invdiff.samplers.checks import at_least, within
from invdiff.samplers.consistency import correction
from invdiff.samplers.moves import Guided
from invdiff.samplers.solver import MultistepState, denoised_with_pullback


@dataclass(frozen=True)
class PiGDM(Guided):
    """Guide by the score of y given x_t, with x_0 given x_t taken for N(D, r^2 I) (eq. 7, 8 of the paper).

    D_y = D + sigma^2 J^T A^T (r^2 A A^T + sigma_y^2 I)^-1 (y - A D), J the denoiser's derivative in x_t, r^2 = sigma^2
    p^2 / (sigma^2 + p^2) with p ``prior_deviation``: E[x_0 | x_t, y] exactly where the prior is iid Gaussian of
    deviation p; with eta 0 every move samples the posterior there, as its steps become many. Solved in image space:
    r^2 A^T (r^2 A A^T + sigma_y^2 I)^-1 = (A^T A + sigma_y^2 / r^2 I)^-1 A^T.

    D_y takes D's place in the whole move. The published move (algorithm 1) adds r^2 J^T A^T (...)^-1 (y - A D) to a
    DDIM step of the unguided D, whatever the step's length, and so guides the more the more steps there are.

    Not where pixels are strongly correlated, if the posterior matters: x_0 given x_t does not vary by r^2 in every
    direction (on such Gaussians the mean is 0.3 to 0.6 posterior deviations off, without fresh noise twice that). Not
    where memory or time is short: each step differentiates the network (about three times an evaluation), all slices
    at once. Not for non-linear operators: see ``DPS``.

    Args:
        steps: denoiser evaluations, each with its derivative. Published 20 and 100.
        move: ``ddim`` as published, ``dpmpp2m`` or ``deis3m``.
        cg_steps: CG steps of the solve; 0 is the operator's own ``solve``.
        sigma_max: first noise level, prior units. Published 157.
        sigma_min: last one above 0. Published 0.01.
        eta: share of fresh noise in [0, 1]. Published 1 (as DDPM's, which falls with the step).
        prior_deviation: p, standard deviation of the images about their mean, prior units. Published 1.
        sigma_floor: smallest sigma_y assumed, prior units with ||A|| = 1.
    """

    move: str = "dpmpp2m"
    eta: float = 0.85
    prior_deviation: float = 0.5
    sigma_floor: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, sigma_floor=0, prior_deviation=1e-6)
        within(self, eta=(0, 1))

    def step(self, problem: Problem, state: MultistepState) -> MultistepState:
        """One guided step: D_y, then the move."""
        return self.moved(problem, state, self.guided(problem, state.x_t, self.sigma(state.i)), self.eta)

    def guided(self, problem: Problem, x_t: Tensor, s: float) -> Tensor:
        """D_y (s c h w)."""
        A = problem.operator
        D, pullback = denoised_with_pullback(problem, x_t, s)
        share = 1 + (s / self.prior_deviation) ** 2  # sigma^2 / r^2
        mu = (max(problem.sigma_y, self.sigma_floor) / s) ** 2 * share
        return D + share * pullback(correction(A, A.adjoint(problem.y - A.forward(D)), mu, self.cg_steps))
