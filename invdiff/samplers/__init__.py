"""Samplers and prior-free baselines, one algorithm a file, all on the seams of ``invdiff.protocols``."""

from invdiff.samplers.classical import CGLS, FBP, TV
from invdiff.samplers.ddim import DDIM
from invdiff.samplers.dds import DDS
from invdiff.samplers.diffusionmbir import DiffusionMBIR
from invdiff.samplers.reddiff import REDDiff

__all__ = ["CGLS", "DDIM", "DDS", "FBP", "TV", "DiffusionMBIR", "REDDiff"]
