"""Learning a circuit's parameters: EM by accumulated flows, full-batch or stepwise, from a K-means start."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from invdiff.circuits.circuit import Circuit
from invdiff.circuits.inputs import Inputs
from invdiff.circuits.structure import ROOT, Structure

FEATURES = 24  # variables near a region by which its K-means start clusters images
ROUNDS = 8  # of that K-means
REGIONS_AT_ONCE = 64  # of that K-means


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


def k_means_start(
    structure: Structure, inputs: Inputs, x: Tensor, states: int, pseudocount: float, seed: int
) -> Learned:
    """Parameters from hard states: each region's images are clustered by the variables nearest to it in the tree.

    Args:
        structure: of the circuit.
        inputs: of the wanted family, one state will do; its parameters are only where the fit starts from.
        x: data (n v), complete.
        states: K.
        pseudocount: see ``fitted``; of images.
        seed: of the clusters' first centres.

    Raises:
        ValueError: fewer images than states.
    """
    n = len(x)
    if n < states:
        raise ValueError(f"there are {n} images for {states} states; at least as many are wanted")
    assigned = _clusters(structure, x.to(inputs_dtype(inputs)), states, seed)
    hot = torch.nn.functional.one_hot(assigned, states).to(inputs_dtype(inputs))
    above = hot[[0 if p == ROOT else p for p in structure.parent]]
    weights = above.transpose(1, 2) @ hot
    if structure.sum_groups:
        group = torch.tensor(structure.sum_groups)
        weights = weights.new_zeros(max(structure.sum_groups) + 1, states, states).index_add(0, group, weights)
    groups = structure.input_groups or tuple(range(structure.variables))
    wide = _broadcast(inputs, max(groups) + 1, states)
    counted = wide.counts(x, hot[list(structure.owner)], torch.tensor(groups), max(groups) + 1)
    counts = Counts(hot.new_tensor(float(n)), hot[0].sum(0), weights, counted)
    even = hot.new_full(weights.shape, 1 / states)
    blank = Circuit(structure, wide, hot.new_full((states,), 1 / states), even)
    return Learned(0, fitted(blank, counts, pseudocount), counts.times(1 / n))


def inputs_dtype(inputs: Inputs) -> torch.dtype:
    """Of its parameters."""
    return next(iter(inputs.tensors.values())).dtype


def _broadcast(inputs: Inputs, groups: int, states: int) -> Inputs:
    """The inputs of one group and state for so many of both."""
    wide = {k: t.expand(groups, states, *t.shape[2:]).contiguous() for k, t in inputs.tensors.items()}
    return replace(inputs, **wide)  # type: ignore[type-var]


def _clusters(structure: Structure, x: Tensor, states: int, seed: int) -> Tensor:
    """The cluster of every image at every region, (r n)."""
    count = min(FEATURES, structure.variables)
    near = torch.tensor([structure.near(r, count) for r in range(structure.regions)])
    generator = torch.Generator().manual_seed(seed)
    first = torch.stack([torch.randperm(len(x), generator=generator)[:states] for _ in range(structure.regions)])
    out = []
    for some, start in zip(near.split(REGIONS_AT_ONCE), first.split(REGIONS_AT_ONCE), strict=True):
        features = x.T[some].transpose(1, 2)
        centres = features.gather(1, start[..., None].expand(-1, -1, count))
        for _ in range(ROUNDS):
            hot = torch.nn.functional.one_hot(torch.cdist(features, centres).argmin(-1), states).to(features)
            size = hot.sum(1)[..., None]
            centres = torch.where(size > 0, hot.transpose(1, 2) @ features / size.clamp_min(1), centres)
        out.append(torch.cdist(features, centres).argmin(-1))
    return torch.cat(out)
