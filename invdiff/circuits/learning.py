"""Learning a circuit's parameters: EM by accumulated flows, full-batch or stepwise."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from invdiff.circuits.circuit import Circuit


class Counts(NamedTuple):
    """Expected counts (sums of flows). images: how many they are of, (); root: (k); weights: (groups k k); inputs: see
    ``Inputs.counts``.
    """

    images: Tensor
    root: Tensor
    weights: Tensor
    inputs: Tensor

    def plus(self, other: Counts) -> Counts:
        """The counts of both."""
        return Counts(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, factor: float) -> Counts:
        """So many times the counts."""
        return Counts(*(factor * a for a in self))


def expected_counts(circuit: Circuit, x: Tensor) -> tuple[Counts, Tensor]:
    """The E-step: how often each state, edge and value was used by data x (b v), and ln p(x) of each (b)."""
    s = circuit.structure
    up = circuit.up(x)
    states, ratios = circuit.down(up)
    flows = [circuit.weights.new_zeros(1, circuit.states, circuit.states)]
    for product, ratio, weights in zip(up.products[1:], ratios, circuit._level_weights, strict=True):
        top = product.amax(-1, keepdim=True)
        flows.append(weights * ((ratio + top).exp().transpose(1, 2) @ (product - top).exp()))
    every = torch.cat(flows)
    if s.sum_groups:
        group = torch.tensor(s.sum_groups, device=every.device)
        every = torch.zeros_like(circuit.weights).index_add(0, group, every)
    owned = torch.cat(states)[circuit._owner].exp()
    groups = len(set(s.input_groups)) or s.variables
    inputs = circuit.inputs.counts(x, owned, circuit._input_group, groups)
    images = circuit.root.new_tensor(float(len(x)))
    return Counts(images, states[0][0].exp().sum(0), every, inputs), up.log_likelihood


def fitted(circuit: Circuit, counts: Counts, pseudocount: float) -> Circuit:
    """The M-step: the parameters of greatest likelihood given expected counts.

    Args:
        circuit: whose structure and family of inputs are kept.
        counts: of as many images as there are: a pseudocount is weighed against them.
        pseudocount: images' worth of counts that every state has more, spread as the mean of all states is (and a
            tenth of them evenly); 0 is plain likelihood.

    Raises:
        ValueError: a pseudocount below 0.
    """
    if pseudocount < 0:
        raise ValueError(f"the pseudocount is {pseudocount}; 0 or more is wanted")
    return replace(
        circuit,
        inputs=circuit.inputs.fitted(counts.inputs, pseudocount),
        root=_probabilities(counts.root[None, None], pseudocount)[0, 0],
        weights=_probabilities(counts.weights, pseudocount),
    )


def _probabilities(counts: Tensor, pseudocount: float) -> Tensor:
    """Rows (g k j) that sum to 1; a row without counts is the mean of its group."""
    tiny = torch.finfo(counts.dtype).tiny
    total = counts.sum(1, keepdim=True)
    mean = (total + tiny) / (total + tiny).sum(-1, keepdim=True)
    even = 1 / counts.shape[-1]
    out = counts + max(pseudocount, 1e-6) * (0.9 * mean + 0.1 * even)
    return out / out.sum(-1, keepdim=True)


def full_batch(circuit: Circuit, batches: Iterable[Tensor], pseudocount: float) -> tuple[Circuit, float]:
    """One EM step over all batches of data: the new circuit, and the old one's mean ln p(x) an image.

    Without a pseudocount the likelihood never falls.

    Raises:
        ValueError: there are no batches.
    """
    total: Counts | None = None
    likelihood = 0.0
    for x in batches:
        counts, log_likelihood = expected_counts(circuit, x)
        total = counts if total is None else total.plus(counts)
        likelihood += float(log_likelihood.sum())
    if total is None:
        raise ValueError("there are no data to learn from")
    return fitted(circuit, total, pseudocount), likelihood / float(total.images)


class Learned(NamedTuple):
    """A circuit that is being learned. step: M-steps so far; memory: running mean counts an image."""

    step: int
    circuit: Circuit
    memory: Counts


def stepwise(state: Learned, x: Tensor, rate: float, images: int, pseudocount: float) -> tuple[Learned, float]:
    """One step of stepwise EM (Cappé & Moulines 2009): the running counts move by ``rate`` to those of a mini-batch.

    Args:
        state: of the step before.
        x: the mini-batch (b v).
        rate: in (0, 1]; 1 forgets everything before.
        images: in the whole data, against which the pseudocount weighs.
        pseudocount: see ``fitted``.

    Returns:
        The new state, and the batch's mean ln p(x) an image before it.
    """
    if not 0 < rate <= 1:
        raise ValueError(f"the rate is {rate}; a value in (0, 1] is wanted")
    counts, log_likelihood = expected_counts(state.circuit, x)
    memory = state.memory.times(1 - rate).plus(counts.times(rate / len(x)))
    circuit = fitted(state.circuit, memory.times(images), pseudocount)
    return Learned(state.step + 1, circuit, memory), float(log_likelihood.mean())
