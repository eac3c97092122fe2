"""Input distributions: what a variable is like in each of the K states of its region.

Every family answers for data and for independent soft evidence w_v(x) >= 0 of every variable. Shapes inside: v
variable first, then b (images), then k (state). ``group`` (v) says whose parameters a variable has.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

MISSING = -1  # a discrete value that is not known
LOGISTIC_STEPS = 5  # of Fisher scoring in an M-step of the logistic: better, not best, is enough for EM
FISHER = (1 / 3, (3 + math.pi**2) / 9)  # information of a logistic's mean (times scale^2) and ln scale
LEAST_SCALE = 0.05  # of a logistic, in levels: narrower ones differ in nothing


class Spot(NamedTuple):
    """Gaussian evidence N(value; x, variance): variance 0 is a known value, infinity none; both (b v)."""

    value: Tensor
    variance: Tensor


class Inputs(ABC):
    """A family of input distributions; a frozen dataclass of tensors (groups first, states second)."""

    kind: ClassVar[str]

    @property
    @abstractmethod
    def states(self) -> int:
        """K."""

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The parameters by name."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    def to(self, like: Tensor) -> Any:
        """The same with parameters in the dtype and on the device of ``like``."""
        return replace(self, **{k: v.to(like) for k, v in self.tensors.items()})  # type: ignore[type-var]

    @abstractmethod
    def log_evidence(self, evidence: Any, group: Tensor) -> Tensor:
        """ln sum_x w_v(x) f_k(x), or ln f_k(x) of data: (v b k)."""

    @abstractmethod
    def moments(self, evidence: Any, states: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance (b v) of each variable, given probabilities (v b k) of its states and its own evidence."""

    @abstractmethod
    def draw(self, evidence: Any, state: Tensor, normal: Tensor, group: Tensor) -> Tensor:
        """Values (b v) of f_k w_v normalised in state k (b v), by standard normal noise (b v)."""

    @abstractmethod
    def peak(self, evidence: Any, group: Tensor) -> tuple[Tensor, Tensor]:
        """The largest ln f_k(x) w_v(x) over x, and where it is: (v b k) each."""

    @abstractmethod
    def counts(self, x: Tensor, states: Tensor, group: Tensor, groups: int) -> Tensor:
        """Sufficient statistics (groups k statistic) of data x (b v) in states (v b k), summed over images."""

    @abstractmethod
    def fitted(self, counts: Tensor, pseudocount: float) -> Any:
        """The distributions of greatest likelihood given counts, with a share of the mean of all states."""


class Discrete(Inputs):
    """Families over levels 0 to C - 1, known by their table. Data are int64 (b v), evidence ln w (b v C) real."""

    @property
    @abstractmethod
    def table(self) -> Tensor:
        """ln f_k(level): (groups k C)."""

    @cached_property
    def _kept(self) -> Tensor:
        """f_k(level), where no derivative by the parameters is asked for: half of a pass went into making it."""
        return self.table.exp()

    def probabilities(self, group: Tensor) -> Tensor:
        """f_k(level) of variables (v k C)."""
        parameters = self.tensors.values()
        f = self.table.exp() if any(p.requires_grad for p in parameters) else self._kept
        return f if in_order(group, len(f)) else f[group]

    @property
    def levels(self) -> int:
        """C."""
        return self.table.shape[-1]

    @property
    def states(self) -> int:
        """K."""
        return self.table.shape[1]

    def log_evidence(self, evidence: Tensor, group: Tensor) -> Tensor:
        """ln sum_x w(x) f_k(x) of soft evidence (b v C); ln f_k(x) of data (b v), 0 where it is ``MISSING``."""
        if evidence.is_floating_point():
            top = _finite(evidence.amax(-1, keepdim=True)).detach()
            f = self.probabilities(group).transpose(1, 2)
            return ((evidence - top).exp().transpose(0, 1) @ f).log() + top.transpose(0, 1)
        table = self.table.transpose(1, 2)
        x = evidence.T
        return table[group[:, None], x.clamp_min(0)].where((x != MISSING)[..., None], 0.0)

    def marginals(self, evidence: Tensor, states: Tensor, group: Tensor, own: bool = True) -> Tensor:
        """p(x_v = level): sum_k states_k f_k(x) w(x) / f_k-evidence; without w and that if not ``own``: (b v C)."""
        table = self.probabilities(group)
        if not own:
            return (states @ table).transpose(0, 1)
        w = self._log_weights(evidence)
        top = _finite(w.amax(-1, keepdim=True)).detach()
        scaled = (w - top).exp().transpose(0, 1)
        total = (scaled @ table.transpose(1, 2)).clamp_min(torch.finfo(w.dtype).tiny)
        return (scaled * ((states / total) @ table)).transpose(0, 1)

    def moments(self, evidence: Tensor, states: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance in levels."""
        p = self.marginals(evidence, states, group)
        level = torch.arange(self.levels, dtype=p.dtype, device=p.device)
        mean = p @ level
        return mean, (p * (level - mean[..., None]).square()).sum(-1)

    def draw(self, evidence: Tensor, state: Tensor, normal: Tensor, group: Tensor) -> Tensor:
        """Levels (b v), int64, by the inverse of their cumulative distribution."""
        table = self.table[group[None], state]
        return inverse_cdf((table + self._log_weights(evidence)).softmax(-1), normal)

    def peak(self, evidence: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
        """ln f_k(x) w(x) at its most probable level, and that level."""
        w = self._log_weights(evidence).transpose(0, 1)
        found = (w[:, :, None] + self.table[group][:, None]).max(-1)
        return found.values, found.indices

    def counts(self, x: Tensor, states: Tensor, group: Tensor, groups: int) -> Tensor:
        """How often each level was seen: (groups k C)."""
        known = (x.T != MISSING)[..., None]
        index = (group[:, None] * self.levels + x.T.clamp_min(0)).reshape(-1)
        flat = states.new_zeros(groups * self.levels, self.states)
        flat = flat.index_add(0, index, (states * known).reshape(-1, self.states))
        return flat.view(groups, self.levels, self.states).transpose(1, 2)

    def _log_weights(self, evidence: Tensor) -> Tensor:
        """ln w (b v C) of soft evidence or of data."""
        if evidence.is_floating_point():
            return evidence
        level = torch.arange(self.levels, device=evidence.device)
        allowed = (evidence[..., None] == level) | (evidence == MISSING)[..., None]
        return torch.zeros_like(allowed, dtype=self.table.dtype).masked_fill(~allowed, -math.inf)


@dataclass(frozen=True, eq=False)
class Categorical(Discrete):
    """A free table of probabilities.

    Args:
        log_table: ln f_k(level), (groups k C), normalised over the levels.
    """

    kind = "categorical"
    log_table: Tensor

    @property
    def table(self) -> Tensor:
        """ln f_k(level): (groups k C)."""
        return self.log_table

    def fitted(self, counts: Tensor, pseudocount: float) -> Categorical:
        """Relative counts; each state has ``pseudocount`` more, spread as the mean of all states is, and evenly."""
        return Categorical(_smoothed(counts, pseudocount).log())


@dataclass(frozen=True, eq=False)
class DiscretisedLogistic(Discrete):
    """A logistic distribution over the line, whose mass in each unit interval is a level's (Salimans et al. 2017).

    The lowest and the highest level have the tails.

    Args:
        mean: in levels, (groups k).
        log_scale: ln of the scale in levels, (groups k).
        count: levels.
    """

    kind = "logistic"
    mean: Tensor
    log_scale: Tensor
    count: int

    @property
    def table(self) -> Tensor:
        """ln f_k(level), by differences of ln sigmoid that do not cancel: (groups k C)."""
        edge = torch.arange(self.count - 1, dtype=self.mean.dtype, device=self.mean.device) + 0.5
        z = (edge - self.mean[..., None]) / self.log_scale.exp()[..., None]
        below, above = torch.nn.functional.logsigmoid(z), torch.nn.functional.logsigmoid(-z)
        width = z[..., 1:] - z[..., :-1]
        inside = below[..., 1:] + above[..., :-1] + torch.log(-torch.expm1(-width))
        return torch.cat([below[..., :1], inside, above[..., -1:]], -1)

    def fitted(self, counts: Tensor, pseudocount: float) -> DiscretisedLogistic:
        """Fisher scoring from the present parameters, every step kept only where the likelihood grows."""
        weight = _smoothed(counts, pseudocount)
        mean, log_scale = self.mean, self.log_scale
        rate = torch.ones_like(mean)
        for _ in range(LOGISTIC_STEPS):
            with torch.enable_grad():
                a, b = mean.detach().requires_grad_(), log_scale.detach().requires_grad_()
                now = (weight * DiscretisedLogistic(a, b, self.count).table).sum(-1)
                da, db = torch.autograd.grad(now.sum(), (a, b))
            new_mean = mean + rate * (da * log_scale.exp().square() / FISHER[0]).clamp(-self.count, self.count)
            new_scale = (log_scale + rate * (db / FISHER[1]).clamp(-1, 1)).clamp_min(math.log(LEAST_SCALE))
            then = (weight * DiscretisedLogistic(new_mean, new_scale, self.count).table).sum(-1)
            better = then >= now.detach()
            mean, log_scale = torch.where(better, new_mean, mean), torch.where(better, new_scale, log_scale)
            rate = torch.where(better, rate, rate / 2)
        return DiscretisedLogistic(mean, log_scale, self.count)


@dataclass(frozen=True, eq=False)
class Gaussian(Inputs):
    """Normal distributions. Data are real (b v), NaN where missing; soft evidence is a ``Spot``.

    Args:
        mean: (groups k).
        log_std: (groups k).
        least_std: standard deviation below which none is fitted.
    """

    kind = "gaussian"
    mean: Tensor
    log_std: Tensor
    least_std: float = 1e-2

    @property
    def states(self) -> int:
        """K."""
        return self.mean.shape[1]

    def log_evidence(self, evidence: Tensor | Spot, group: Tensor) -> Tensor:
        """ln N(value; mean_k, std_k^2 + variance), 0 where nothing is known."""
        e = _spot(evidence)
        variance = self._variance(group) + e.variance.T[..., None]
        known = torch.isfinite(e.variance.T)[..., None]
        z2 = (torch.where(known, e.value.T[..., None], 0.0) - self.mean[group][:, None]).square() / variance
        return torch.where(known, -0.5 * (z2 + torch.log(2 * math.pi * variance)), 0.0)

    def moments(self, evidence: Tensor | Spot, states: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
        """Of the mixture of the states' posteriors."""
        mean, variance = self._posterior(_spot(evidence), group)
        middle = (states * mean).sum(-1)
        spread = (states * (variance + (mean - middle[..., None]).square())).sum(-1)
        return middle.T, spread.T

    def draw(self, evidence: Tensor | Spot, state: Tensor, normal: Tensor, group: Tensor) -> Tensor:
        """Real values (b v)."""
        mean, variance = (p.gather(-1, state.T[..., None])[..., 0].T for p in self._posterior(_spot(evidence), group))
        return mean + variance.sqrt() * normal

    def peak(self, evidence: Tensor | Spot, group: Tensor) -> tuple[Tensor, Tensor]:
        """ln f_k(x) w(x) at the posterior's mean; w is 1 at a known value, as it is there for data."""
        e = _spot(evidence)
        mean, _ = self._posterior(e, group)
        variance, tau = self._variance(group), e.variance.T[..., None]
        log_f = -0.5 * ((mean - self.mean[group][:, None]).square() / variance + torch.log(2 * math.pi * variance))
        soft = torch.isfinite(tau) & (tau > 0)
        tau, value = torch.where(soft, tau, 1.0), torch.where(soft, e.value.T[..., None], 0.0)
        log_w = -0.5 * ((value - mean).square() / tau + torch.log(2 * math.pi * tau))
        return log_f + torch.where(soft, log_w, 0.0), mean

    def counts(self, x: Tensor, states: Tensor, group: Tensor, groups: int) -> Tensor:
        """Sums of 1, x and x^2: (groups k 3)."""
        known = ~torch.isnan(x.T)[..., None]
        value = torch.where(known, x.T[..., None], 0.0)
        weight = states * known
        sums = torch.stack([(weight * value**power).sum(1) for power in range(3)], -1)
        return sums.new_zeros(groups, *sums.shape[1:]).index_add(0, group, sums)

    def fitted(self, counts: Tensor, pseudocount: float) -> Gaussian:
        """Weighted mean and deviation; each state has ``pseudocount`` more of all states' mean."""
        total = counts.sum(1, keepdim=True)
        tiny = torch.finfo(counts.dtype).tiny
        counts = counts + pseudocount * total / total[..., :1].clamp_min(tiny)
        mean = counts[..., 1] / counts[..., 0].clamp_min(tiny)
        variance = counts[..., 2] / counts[..., 0].clamp_min(tiny) - mean.square()
        return replace(self, mean=mean, log_std=variance.clamp_min(self.least_std**2).log() / 2)

    def _variance(self, group: Tensor) -> Tensor:
        """(v 1 k)."""
        return (2 * self.log_std).exp()[group][:, None]

    def _posterior(self, e: Spot, group: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of f_k w normalised: (v b k)."""
        variance, tau = self._variance(group), e.variance.T[..., None]
        prior = self.mean[group][:, None]
        known = torch.isfinite(tau)
        gain = torch.where(known, variance / (variance + torch.where(known, tau, 1.0)), 0.0)
        value = torch.where(known, e.value.T[..., None], 0.0)
        return torch.where(gain == 1, value, prior + gain * (value - prior)), (1 - gain) * variance


FAMILIES: dict[str, type[Inputs]] = {k.kind: k for k in (Categorical, DiscretisedLogistic, Gaussian)}


def _spot(evidence: Tensor | Spot) -> Spot:
    if isinstance(evidence, Spot):
        return evidence
    missing = torch.isnan(evidence)
    variance = torch.zeros_like(evidence).masked_fill(missing, math.inf)
    return Spot(evidence.masked_fill(missing, 0.0), variance)


def _smoothed(counts: Tensor, pseudocount: float) -> Tensor:
    """Probabilities over the last axis: the counts, and a pseudocount shared as the states' mean and evenly."""
    total = counts.sum(1, keepdim=True)
    tiny = torch.finfo(counts.dtype).tiny
    mean = total / total.sum(-1, keepdim=True).clamp_min(tiny)
    even = 1 / counts.shape[-1]
    out = counts + pseudocount * (0.9 * mean + 0.1 * even) + tiny
    return out / out.sum(-1, keepdim=True)


def in_order(group: Tensor, count: int) -> bool:
    """Whether ``group`` is 0, 1, ..., count - 1: whether choosing by it chooses nothing."""
    return len(group) == count and bool((group == torch.arange(count, device=group.device)).all())


def _finite(top: Tensor) -> Tensor:
    return torch.where(torch.isfinite(top), top, 0.0)


def inverse_cdf(p: Tensor, normal: Tensor) -> Tensor:
    """Numbers drawn of probabilities p (... c) by standard normal noise (...): int64 (...)."""
    total = p.cumsum(-1)
    below_one = torch.special.ndtr(normal.to(p.dtype)).clamp_max(1 - torch.finfo(p.dtype).eps)
    chance = below_one[..., None] * total[..., -1:]
    return (chance >= total[..., :-1]).sum(-1)
