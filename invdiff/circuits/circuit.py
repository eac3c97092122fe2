"""A circuit and its exact queries: one pass up, one pass down (Darwiche 2003; Peharz et al. 2020).

Shapes inside: r region (or v variable) first, then b (images), then k (state). Everything is in log space.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from invdiff.circuits.inputs import Discrete, Inputs, inverse_cdf
from invdiff.circuits.structure import Structure
from invdiff.protocols import Noise

SUM_TOLERANCE = 1e-3  # of weights that sum to 1, in float32 with many terms


class Up(NamedTuple):
    """The pass up. products: ln of each region's product (r b k), by depth; sums: ln of its value in each state of its
    parent, from depth 1; log_likelihood: (b).
    """

    products: list[Tensor]
    sums: list[Tensor]
    log_likelihood: Tensor


class Posterior(NamedTuple):
    """mean, variance: of each variable given the evidence, (b v); log_evidence: ln sum_x p(x) prod_v w_v(x_v), (b)."""

    mean: Tensor
    variance: Tensor
    log_evidence: Tensor


@dataclass(frozen=True, eq=False)
class Circuit:
    """p(x) = sum_k root[k] product_root[k](x); see ``invdiff.circuits.structure`` for the rest.

    Evidence is of the kind that ``inputs`` takes: data, with missing values, or independent soft evidence w_v(x_v).

    Args:
        structure: its regions and variables.
        inputs: what hangs below.
        root: probabilities of the root's states, (k).
        weights: W[k, j] of each group of sums, rows that sum to 1: (groups k k).

    Raises:
        ValueError: shapes that do not fit the structure, or weights that are no probabilities.
    """

    structure: Structure
    inputs: Inputs
    root: Tensor
    weights: Tensor

    def __post_init__(self) -> None:
        s, k = self.structure, self.inputs.states
        sums = len(set(s.sum_groups)) or s.regions
        groups = len(set(s.input_groups)) or s.variables
        if tuple(self.root.shape) != (k,) or tuple(self.weights.shape) != (sums, k, k):
            raise ValueError(
                f"the root has shape {tuple(self.root.shape)}, the weights {tuple(self.weights.shape)}; "
                f"({k},) and ({sums}, {k}, {k}) are wanted"
            )
        bad = [n for n, t in self.inputs.tensors.items() if t.shape[0] != groups]
        if bad:
            raise ValueError(f"inputs.{bad[0]} is of {self.inputs.tensors[bad[0]].shape[0]} variables; {groups} are")
        for name, p in (("root", self.root.detach()), ("weights", self.weights.detach())):
            if not bool((p >= 0).all()) or float((p.sum(-1) - 1).abs().max()) > SUM_TOLERANCE:
                raise ValueError(f"the {name} are not probabilities: none below 0 and sums of 1 are wanted")

    @property
    def states(self) -> int:
        """K."""
        return self.inputs.states

    def to(self, like: Tensor) -> Circuit:
        """The same in the dtype and on the device of ``like``."""
        return replace(self, inputs=self.inputs.to(like), root=self.root.to(like), weights=self.weights.to(like))

    @cached_property
    def _input_group(self) -> Tensor:
        groups = self.structure.input_groups or tuple(range(self.structure.variables))
        return torch.tensor(groups, device=self.root.device)

    @cached_property
    def _owner(self) -> Tensor:
        return torch.tensor(self.structure.owner, device=self.root.device)

    @cached_property
    def _parents(self) -> list[Tensor]:
        """Of the regions of each depth from 1, numbered within the depth above."""
        s = self.structure
        pairs = zip(s.levels, s.levels[1:], strict=False)
        return [torch.tensor(s.parent[a:b], device=self.root.device) - above for (above, _), (a, b) in pairs]

    @cached_property
    def _level_weights(self) -> list[Tensor]:
        """W of the regions of each depth from 1, (r k k)."""
        s = self.structure
        every = self.weights[list(s.sum_groups)] if s.sum_groups else self.weights
        return [every[a:b] for a, b in s.levels[1:]]

    def _leaves(self, values: Tensor) -> list[Tensor]:
        """ln of the product of the inputs of each region, by depth: (v b k) -> (r b k) each."""
        s = self.structure
        base = values.new_zeros(s.regions, *values.shape[1:]).index_add(0, self._owner, values)
        return list(base.split([b - a for a, b in s.levels]))

    def up(self, evidence: Any) -> Up:
        """The pass up."""
        products = self._leaves(self.inputs.log_evidence(evidence, self._input_group))
        sums: list[Tensor] = []
        for depth in range(len(products) - 1, 0, -1):
            value = log_product(products[depth], self._level_weights[depth - 1].transpose(1, 2))
            sums.insert(0, value)
            products[depth - 1] = products[depth - 1].index_add(0, self._parents[depth - 1], value)
        return Up(products, sums, (self.root.log() + products[0][0]).logsumexp(-1))

    def down(self, up: Up) -> tuple[list[Tensor], list[Tensor]]:
        """ln p(state | evidence) of each region, by depth; and of each below the root ln p(parent's state) - its sum.

        W[k, j] exp(second[k] + product[j]) is the flow of an edge: the posterior of both states.
        """
        states = [self.root.log() + up.products[0] - up.log_likelihood[None, :, None]]
        ratios: list[Tensor] = []
        for depth, weights in enumerate(self._level_weights):
            ratio = states[depth][self._parents[depth]] - up.sums[depth]
            ratios.append(torch.where(torch.isnan(ratio), -torch.inf, ratio))
            states.append(up.products[depth + 1] + log_product(ratios[-1], weights))
        return states, ratios

    def log_likelihood(self, evidence: Any) -> Tensor:
        """ln p(x) of data, ln p(known part) where some are missing, ln sum_x p(x) prod w of soft evidence: (b)."""
        return self.up(evidence).log_likelihood

    def posterior(self, evidence: Any) -> Posterior:
        """Mean and variance of each variable, its own evidence included: exact.

        p(x_v | w) = sum_k p(state k | w) f_k(x_v) w_v(x_v) / sum_x f_k(x) w_v(x).
        """
        up, states = self._states(evidence)
        return Posterior(*self.inputs.moments(evidence, states, self._input_group), up.log_likelihood)

    def marginals(self, evidence: Tensor, own: bool = True) -> Tensor:
        """p(x_v = level | evidence) of discrete variables, (b v C).

        Args:
            evidence: data or ln w.
            own: with the factor w_v(x_v) / sum_x f_k(x) w_v(x), which is exact; without it what pyjuice's
                ``conditional`` gives: the distribution of another value drawn in the same state.

        Raises:
            ValueError: the variables are real.
        """
        if not isinstance(self.inputs, Discrete):
            raise ValueError(f"{self.inputs.kind} variables have no levels; ask for their posterior mean and variance")
        return self.inputs.marginals(evidence, self._states(evidence)[1], self._input_group, own)

    def _states(self, evidence: Any) -> tuple[Up, Tensor]:
        """The pass up, and p(state | evidence) of each variable's region (v b k)."""
        up = self.up(evidence)
        return up, torch.cat(self.down(up)[0])[self._owner].exp()

    def sample(self, evidence: Any, noise: Noise, step: int = 0, draw: int = 0) -> Tensor:
        """One joint draw of all variables given the evidence: (b v), levels or real values.

        Args:
            evidence: data, whose missing values are drawn, or soft evidence.
            noise: standard normal, keyed by (seed, step, draw, image), such as ``invdiff.noise.KeyedNoise``.
            step: of the key.
            draw: of the key.
        """
        return self.samples(evidence, noise, step, range(draw, draw + 1))[0]

    def samples(self, evidence: Any, noise: Noise, step: int, draws: range) -> Tensor:
        """Several joint draws, of one pass up: (d b v); see ``sample``."""
        up = self.up(evidence)
        return torch.stack([self._drawn(up, evidence, noise, step, draw) for draw in draws])

    def _drawn(self, up: Up, evidence: Any, noise: Noise, step: int, draw: int) -> Tensor:
        """From the root down: (b v)."""
        s, b = self.structure, len(up.log_likelihood)
        normal = noise(step, self.root.new_empty(b, s.regions + s.variables), draw)
        chance = normal[:, : s.regions].T
        chosen = [inverse_cdf((self.root.log() + up.products[0]).softmax(-1), chance[:1])]
        for depth, (first, end) in enumerate(s.levels[1:]):
            above = chosen[depth][self._parents[depth]]
            rows = self._level_weights[depth][torch.arange(end - first)[:, None], above].log()
            chosen.append(inverse_cdf((rows + up.products[depth + 1]).softmax(-1), chance[first:end]))
        state = torch.cat(chosen)[self._owner].T
        return self.inputs.draw(evidence, state, normal[:, s.regions :], self._input_group)

    def most_probable(self, evidence: Any) -> tuple[Tensor, Tensor]:
        """The values and region states that are jointly most probable (MPE): (b v), and (b r).

        The most probable values alone, with the states summed out, are NP-hard to find.
        """
        peak, where = self.inputs.peak(evidence, self._input_group)
        products, choices = self._leaves(peak), list[Tensor]()
        for depth in range(len(products) - 1, 0, -1):
            best = (self._level_weights[depth - 1].log()[:, None] + products[depth][:, :, None]).max(-1)
            choices.insert(0, best.indices)
            products[depth - 1] = products[depth - 1].index_add(0, self._parents[depth - 1], best.values)
        states = [(self.root.log() + products[0]).argmax(-1)]
        for depth, choice in enumerate(choices):
            states.append(choice.gather(-1, states[depth][self._parents[depth]][..., None])[..., 0])
        every = torch.cat(states)
        return where.gather(-1, every[self._owner][..., None])[..., 0].T, every.T


def log_product(x: Tensor, weights: Tensor) -> Tensor:
    """ln(exp(x) weights) without overflow: (r b k), (r k j) -> (r b j)."""
    top = x.amax(-1, keepdim=True).detach()
    top = torch.where(torch.isfinite(top), top, 0.0)
    return ((x - top).exp() @ weights).log() + top
