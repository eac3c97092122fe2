"""Probabilistic circuits: tractable densities whose posteriors under soft evidence are exact."""

from invdiff.circuits.baselines import bits_per_dimension, chow_liu, factorised
from invdiff.circuits.circuit import Circuit, Posterior
from invdiff.circuits.images import GridInfo, ImageCircuit, load, shipped
from invdiff.circuits.inputs import MISSING, Categorical, DiscretisedLogistic, Gaussian, Spot
from invdiff.circuits.learning import Learned, expected_counts, fitted, full_batch, stepwise
from invdiff.circuits.starts import distilled_start, k_means_start
from invdiff.circuits.structure import Structure, hidden_chow_liu, quad_tree

__all__ = [
    "MISSING",
    "Categorical",
    "Circuit",
    "DiscretisedLogistic",
    "Gaussian",
    "GridInfo",
    "ImageCircuit",
    "Learned",
    "Posterior",
    "Spot",
    "Structure",
    "bits_per_dimension",
    "chow_liu",
    "distilled_start",
    "expected_counts",
    "factorised",
    "fitted",
    "full_batch",
    "hidden_chow_liu",
    "k_means_start",
    "load",
    "quad_tree",
    "shipped",
    "stepwise",
]
