"""Priors: denoisers at every noise level, exact or trained."""

from invdiff.priors.absent import NoPrior
from invdiff.priors.adapted import Call, adapt
from invdiff.priors.description import Description
from invdiff.priors.gaussian import GaussianMixturePrior, GaussianPrior
from invdiff.priors.magnitude import MagnitudePhase, Rescaled
from invdiff.priors.model import NetworkPrior, PriorInfo, load, shipped
from invdiff.priors.parameterisation import EDM, Predicts
from invdiff.priors.schedules import Continuous, Discrete, Flow, VarianceExploding
from invdiff.priors.state_dict import state_dict_of
from invdiff.priors.steered import Steered, SteeredByCodes
from invdiff.priors.wrappers import Averaged, Chunked, Compiled, Offloaded, Precision, Superposed

__all__ = [
    "EDM",
    "Averaged",
    "Call",
    "Chunked",
    "Compiled",
    "Continuous",
    "Description",
    "Discrete",
    "Flow",
    "GaussianMixturePrior",
    "GaussianPrior",
    "MagnitudePhase",
    "NetworkPrior",
    "NoPrior",
    "Offloaded",
    "Precision",
    "Predicts",
    "PriorInfo",
    "Rescaled",
    "Steered",
    "SteeredByCodes",
    "Superposed",
    "VarianceExploding",
    "adapt",
    "load",
    "shipped",
    "state_dict_of",
]
