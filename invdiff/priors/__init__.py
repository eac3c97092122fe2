"""Priors: denoisers at every noise level, exact or trained."""

from invdiff.priors.absent import NoPrior
from invdiff.priors.gaussian import GaussianPrior
from invdiff.priors.model import NetworkPrior, PriorInfo, load, shipped
from invdiff.priors.wrappers import Averaged, Chunked, Compiled, Precision, Superposed

__all__ = [
    "Averaged",
    "Chunked",
    "Compiled",
    "GaussianPrior",
    "NetworkPrior",
    "NoPrior",
    "Precision",
    "PriorInfo",
    "Superposed",
    "load",
    "shipped",
]
