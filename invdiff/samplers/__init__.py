"""Samplers, unconditional solvers and prior-free baselines, one algorithm a file, on the seams of ``protocols``."""

from invdiff.samplers.classical import CGLS, FBP, TV
from invdiff.samplers.copaint import CoPaint
from invdiff.samplers.daps import DAPS
from invdiff.samplers.ddim import DDIM
from invdiff.samplers.ddnm import DDNM
from invdiff.samplers.ddpm import DDPM
from invdiff.samplers.dds import DDS
from invdiff.samplers.deis import DEIS
from invdiff.samplers.diffpir import DiffPIR
from invdiff.samplers.diffusionmbir import DiffusionMBIR
from invdiff.samplers.dpmpp import DPMpp2M
from invdiff.samplers.dps import DPS
from invdiff.samplers.forward_model import ForwardModelDiffusion
from invdiff.samplers.ghvb import GHVB
from invdiff.samplers.gibbs import SplitGibbs
from invdiff.samplers.heun import Heun
from invdiff.samplers.l1wavelet import L1Wavelet
from invdiff.samplers.one_step import OneStep
from invdiff.samplers.pigdm import PiGDM
from invdiff.samplers.reddiff import REDDiff
from invdiff.samplers.repaint import RePaint
from invdiff.samplers.sense import SENSE
from invdiff.samplers.solver import Solver
from invdiff.samplers.zero_filled import ZeroFilled

__all__ = [
    "CGLS",
    "DAPS",
    "DDIM",
    "DDNM",
    "DDPM",
    "DDS",
    "DEIS",
    "DPS",
    "FBP",
    "GHVB",
    "SENSE",
    "TV",
    "CoPaint",
    "DPMpp2M",
    "DiffPIR",
    "DiffusionMBIR",
    "ForwardModelDiffusion",
    "Heun",
    "L1Wavelet",
    "OneStep",
    "PiGDM",
    "REDDiff",
    "RePaint",
    "Solver",
    "SplitGibbs",
    "ZeroFilled",
]
