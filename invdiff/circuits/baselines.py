"""Circuits that need no EM, to judge others by: independent variables, and the Bayesian network of Chow & Liu."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from invdiff.circuits.circuit import Circuit
from invdiff.circuits.inputs import Categorical, Inputs
from invdiff.circuits.learning import _probabilities
from invdiff.circuits.starts import k_means_start
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


def chow_liu(x: Tensor, levels: int, pseudocount: float, parents: Sequence[int] | None = None) -> Circuit:
    """The tree of greatest likelihood over discrete variables (Chow & Liu 1968), as a circuit whose states are levels.

    Args:
        x: levels (n v), int64, complete.
        levels: C.
        pseudocount: images' worth of counts that every level of a parent has more, spread as the child's marginal.
        parents: of every variable, -1 for the root; of the mutual information of all levels if None.
    """
    v = x.shape[1]
    tree = chow_liu_parents(mutual_information(x, levels)) if parents is None else parents
    structure = Structure.sorted_by_depth(tree, range(v))
    sorted_x = x.T[torch.tensor(structure.owner).argsort()]
    above = sorted_x[[max(0, p) for p in structure.parent]]
    index = (torch.arange(v)[:, None] * levels + above) * levels + sorted_x
    counts = torch.bincount(index.flatten(), minlength=v * levels**2).float().view(v, levels, levels)
    root = _probabilities(counts[0].sum(0)[None, None], pseudocount)[0, 0]
    table = torch.full((levels, levels), -math.inf).fill_diagonal_(0.0)
    return Circuit(structure, Categorical(table.expand(v, -1, -1)), root, _probabilities(counts, pseudocount))


def bits_per_dimension(circuit: Circuit, x: Tensor, batch: int = 64) -> float:
    """-log2 p(x) / v, the mean over images; of Gaussian inputs that of a density in their unit."""
    total = sum(float(circuit.log_likelihood(part).double().sum()) for part in x.split(batch))
    return -total / (x.numel() * math.log(2))
