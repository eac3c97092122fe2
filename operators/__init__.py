"""The physics: operators from images to measurements, linear ones with exact adjoints; geometry in mm."""

from invdiff.operators.blur import Blur, gaussian_kernel
from invdiff.operators.channels import KnownPhase, RealChannels
from invdiff.operators.compose import Normalised, Whitened, stack
from invdiff.operators.ct.fan import FanBeam
from invdiff.operators.ct.fbp import fbp
from invdiff.operators.ct.parallel import ParallelBeam
from invdiff.operators.ct.shadow import metal_shadow, within_field
from invdiff.operators.linear import LinearOperatorBase
from invdiff.operators.mask import Diagonal, Mask
from invdiff.operators.mri.cartesian import CartesianMRI, CartesianMRI3D
from invdiff.operators.mri.noncartesian import NonCartesianMRI
from invdiff.operators.mri.off_resonance import OffResonance
from invdiff.operators.noise import Gaussian, TransmissionPoisson
from invdiff.operators.nonlinear import NonlinearOperatorBase
from invdiff.operators.render import VolumeRenderer

__all__ = [
    "Blur",
    "CartesianMRI",
    "CartesianMRI3D",
    "Diagonal",
    "FanBeam",
    "Gaussian",
    "KnownPhase",
    "LinearOperatorBase",
    "Mask",
    "NonCartesianMRI",
    "NonlinearOperatorBase",
    "Normalised",
    "OffResonance",
    "ParallelBeam",
    "RealChannels",
    "TransmissionPoisson",
    "VolumeRenderer",
    "Whitened",
    "fbp",
    "gaussian_kernel",
    "metal_shadow",
    "stack",
    "within_field",
]
