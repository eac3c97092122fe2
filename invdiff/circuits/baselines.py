"""Circuits that need no EM, to judge others by: independent variables, and the Bayesian network of Chow & Liu."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from invdiff.circuits.circuit import Circuit
from invdiff.circuits.inputs import Categorical, Inputs
from invdiff.circuits.learning import _probabilities, k_means_start
from invdiff.circuits.structure import Structure, chow_liu_parents, mutual_information


def factorised(inputs: Inputs, x: Tensor, pseudocount: float) -> Circuit:
    """Independent variables: a circuit of one region with one state.

    Args:
        inputs: of the wanted family, one group and one state.
        x: data (n v).
        pseudocount: see ``invdiff.circuits.learning.fitted``.
    """
    structure = Structure((-1,), (0,) * x.shape[1])
    return k_means_start(structure, inputs, x, 1, pseudocount, seed=0).circuit


def chow_liu(x: Tensor, levels: int, pseudocount: float, bins: int = 8) -> Circuit:
    """The tree of greatest likelihood over discrete variables (Chow & Liu 1968), as a circuit whose states are levels.

    Args:
        x: levels (n v), int64, complete.
        levels: C.
        pseudocount: images' worth of counts that every level of a parent has more, spread as the child's marginal.
        bins: of the histograms of the mutual information.
    """
    v = x.shape[1]
    parents = chow_liu_parents(mutual_information(x, bins))
    structure = Structure.sorted_by_depth(parents, range(v))
    place = torch.tensor(structure.owner)
    hot = torch.nn.functional.one_hot(x.T, levels).float()[place.argsort()]
    above = hot[[max(0, p) for p in structure.parent]]
    weights = _probabilities(above.transpose(1, 2) @ hot, pseudocount)
    root = _probabilities(hot[0].sum(0)[None, None], pseudocount)[0, 0]
    table = torch.full((levels, levels), -math.inf).fill_diagonal_(0.0)
    return Circuit(structure, Categorical(table.expand(v, -1, -1)), root, weights)


def bits_per_dimension(circuit: Circuit, x: Tensor, batch: int = 64) -> float:
    """-log2 p(x) / v, the mean over images; of Gaussian inputs that of a density in their unit."""
    total = sum(float(circuit.log_likelihood(part).double().sum()) for part in x.split(batch))
    return -total / (x.numel() * math.log(2))
