"""A file of weights alone, beside an ``invdiff.toml`` that states the network that they are of."""

from __future__ import annotations

from pathlib import Path

from invdiff.files import sha256_of
from invdiff.priors.description import SIDECAR, Description, describes_network, sidecar_of
from invdiff.priors.diffusers_format import unet2d
from invdiff.priors.model import NetworkPrior
from invdiff.priors.monai_format import diffusion_unet

NETWORKS = {"DiffusionModelUNet": diffusion_unet, "UNet2DModel": unet2d}


def read(folder: Path, description: Description | None) -> NetworkPrior | None:
    """The prior of a folder whose ``invdiff.toml`` has a table ``[network]``; None for another folder.

    The table has ``weights`` (a file in the folder), ``kind`` (one of ``NETWORKS``) and the arguments of that class.

    Raises:
        ValueError: a missing table or key, a kind that is not known, arguments or weights that do not fit.
    """
    if not describes_network(folder):
        return None
    sidecar = sidecar_of(folder, description)
    arguments = dict(sidecar.network)
    weights, kind = arguments.pop("weights", None), arguments.pop("kind", None)
    if kind not in NETWORKS or not isinstance(weights, str):
        raise ValueError(
            f"{folder / SIDECAR}: network.weights is {weights!r} and network.kind {kind!r}; the name of a file and "
            f"one of {', '.join(NETWORKS)} are wanted"
        )
    if sidecar.schedule is None:
        raise ValueError(
            f"{folder / SIDECAR} lacks the table [schedule], such as "
            'predicts = "eps", kind = "discrete", betas = "linear"'
        )
    file = folder / weights
    if not file.is_file():
        raise ValueError(f"{folder / SIDECAR} names the weights {weights!r}, which are not there")
    return NETWORKS[kind](arguments, file, sidecar.prior, sidecar.schedule, sha256_of([file, folder / SIDECAR]))
