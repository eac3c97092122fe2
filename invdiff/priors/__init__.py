"""Priors: denoisers at every noise level, exact or trained."""

from invdiff.priors.absent import NoPrior
from invdiff.priors.gaussian import GaussianPrior
from invdiff.priors.model import NetworkPrior, PriorInfo, load, shipped
from invdiff.priors.wrappers import Chunked

__all__ = ["Chunked", "GaussianPrior", "NetworkPrior", "NoPrior", "PriorInfo", "load", "shipped"]
