"""DDNM and DDNM+: the range from the data, the null space from the prior (Wang, Yu & Zhang, ICLR 2023)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from invdiff.protocols import Problem
from invdiff.samplers.checks import within
from invdiff.samplers.consistency import correction, nearest
from invdiff.samplers.moves import Guided
from invdiff.samplers.solver import MultistepState, denoised


@dataclass(frozen=True)
class DDNM(Guided):
    """x = D + A^+ (y - A D), then noise again (DDNM, algorithm 1); with noisy y, as DDNM+, without its spectrum.

    With sigma_y > 0 the correction brings y's noise into x. DDNM+ (eq. 17 to 19) shrinks it by a factor lambda for
    each singular value S, min(1, sigma' S / sigma_y) for the next level sigma', and takes lambda^2 sigma_y^2 / S^2 out
    of the variance of the noise added, so that x_t has noise sigma' in every direction, as the denoiser expects. Here
    lambda = S^2 / (S^2 + mu), mu = sigma_y^2 / sigma'^2, and the correction is (N + mu)^-1 A^T, N = A^T A, for which CG
    is enough. It brings in the variance sigma'^2 mu N / (N + mu)^2, at most a quarter of sigma'^2. Noise of

        w = (N + mu)^-1 (mu a + N b),    a = eta n + (1 - eta^2)^1/2 e,    b = eta m + (1 - eta^2)^1/2 e,

    with e the estimated noise (x_t - D) / sigma, n and m fresh and of correlation kappa, has covariance I - 2 eta^2
    (1 - kappa) mu N / (N + mu)^2: kappa = 1 - 1 / (2 eta^2) makes the sum sigma'^2 I exactly, for eta from 1/2 up
    (below, kappa = -1 leaves at most (1 - 4 eta^2) / 4 of sigma'^2 too much, where S^2 is near mu). For sigma_y = 0, mu
    is 0, w is a, and this is DDNM, with CG for the pseudo-inverse.

    Not for a calibrated posterior: y's noise is taken for fresh in every step, though it is the same, and the spread
    comes out 5 to 25 % narrow. Not noiseless with badly conditioned operators, unless ``cg_steps`` stays small. Not
    for non-linear operators.

    Args:
        steps: denoiser evaluations. Published 100.
        move: ``ddim`` as published; ``dpmpp2m`` or ``deis3m`` follow the ODE of the corrected image, with no noise to
            account for where eta is 0.
        cg_steps: CG steps of the correction, and of w; 0 is the operator's own ``solve``.
        sigma_max: first noise level, prior units. Published 157.
        sigma_min: last one above 0. Published 0.01.
        eta: share of fresh noise in [0, 1]. Published 0.85.
    """

    steps: int = 100
    eta: float = 0.85

    def __post_init__(self) -> None:
        super().__post_init__()
        within(self, eta=(0, 1))

    def step(self, problem: Problem, state: MultistepState) -> MultistepState:
        """Algorithm 1, with DDNM+'s noise."""
        i, _, x_t, past = state
        s, s_next = self.sigma(i), self.sigma(i + 1)
        D = denoised(problem, x_t, s)
        mu = (problem.sigma_y / (s_next or s)) ** 2
        x = nearest(problem.operator, problem.y, D, mu, self.cg_steps)
        if self.move == "ddim" and s_next > 0 and mu > 0:
            return MultistepState(i + 1, x, x + s_next * self.noise(problem, (x_t - D) / s, mu, i), past)
        return self.moved(problem, state, x, self.eta, D)

    def noise(self, problem: Problem, e: Tensor, mu: float, i: int) -> Tensor:
        """w of step i, which y's noise makes white, from the estimated noise e (s c h w)."""
        A, n = problem.operator, problem.noise(i, e)
        kappa = max(-1.0, 1 - 1 / (2 * self.eta**2)) if self.eta > 0 else 1.0
        m = kappa * n + (1 - kappa**2) ** 0.5 * problem.noise(i, e, draw=1)
        a = self.eta * n + (1 - self.eta**2) ** 0.5 * e
        return a + correction(A, self.eta * A.normal(m - n), mu, self.cg_steps)
