"""A network prior: its description, its denoiser, and the folder it is stored in."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from invdiff.config import find, registered
from invdiff.files import sha256_of, whole_file
from invdiff.priors.edm import edm_denoise
from invdiff.priors.network import UNet, UNetConfig

SHIPPED = Path(__file__).parent / "weights"
WEIGHTS_FILE = "weights.safetensors"
CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class PriorInfo:
    """What a prior is: travels with its weights, in ``config.json``.

    Args:
        name: name of the prior.
        unit: physical unit of the images it was trained on, such as ``HU``.
        low: physical value that is -1 in prior units.
        high: physical value that is +1 in prior units.
        sigma_min: smallest noise level it was trained at, in prior units.
        sigma_max: largest noise level it was trained at, in prior units.
        sigma_data: the EDM preconditioning's data deviation, in prior units.
        pixel_mm: smallest and largest pixel size of the training slices, in mm; zeros where there were none.
        parameterisation: what the network predicts; ``edm`` is F of Karras et al.
    """

    name: str
    unit: str
    low: float
    high: float
    sigma_min: float
    sigma_max: float
    sigma_data: float
    pixel_mm: tuple[float, float]
    parameterisation: str = "edm"

    def __post_init__(self) -> None:
        object.__setattr__(self, "pixel_mm", tuple(self.pixel_mm))
        if not self.low < self.high:
            raise ValueError(f"the range of prior {self.name!r} is [{self.low}, {self.high}]; low must be below high")
        if self.parameterisation != "edm":
            raise ValueError(f"parameterisation {self.parameterisation!r} is not known; this version reads 'edm'")


class NetworkPrior:
    """A trained network as a Prior: ``denoise`` on whatever device the network is on.

    Args:
        network: F of the EDM parameterisation, (s c h w), (s) -> (s c h w).
        info: what it was trained on.
        autocast: dtype of the network's arithmetic (``torch.bfloat16``), or None for float32 throughout.
        sha256: hash of the weights, for records.
    """

    def __init__(
        self, network: UNet, info: PriorInfo, autocast: torch.dtype | None = None, sha256: str | None = None
    ) -> None:
        self.network = network
        self.info = info
        self.autocast = autocast
        self.sha256 = sha256
        self.channels = network.config.image_channels

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """E[x_0 | x_sigma = x] by the network: x (s c h w) in prior units, sigma () or (s)."""
        context = nullcontext() if self.autocast is None else torch.autocast(x.device.type, dtype=self.autocast)
        with context:
            return edm_denoise(self.network, x, sigma, self.info.sigma_data)

    def to(self, device: torch.device | str, autocast: torch.dtype | None = None) -> NetworkPrior:
        """The same prior with its weights on ``device``, computing in ``autocast``.

        The network is moved in place (weights are not copied); channels-last, which is faster for inference.
        """
        network = self.network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return NetworkPrior(network, self.info, autocast, self.sha256)


def fast_dtype(device: torch.device | str) -> torch.dtype | None:
    """bfloat16 where the device computes in it natively, else None (float32)."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else None
    if kind == "cpu":
        return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else None
    return None


def save(folder: Path, network: UNet, info: PriorInfo, extra: dict[str, Any] | None = None) -> None:
    """Write ``weights.safetensors`` and ``config.json`` into ``folder``, each renamed into place.

    Args:
        folder: made if missing.
        network: the network; its weights are stored as float16: half the file, a smaller error than bf16 arithmetic's.
        info: what it was trained on.
        extra: more keys for config.json, such as training figures.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().half().cpu().contiguous() for name, value in network.state_dict().items()}
    weights = folder / WEIGHTS_FILE
    with whole_file(weights) as part:
        save_file(tensors, part)
    sha256 = sha256_of([weights])
    document = {"prior": asdict(info), "network": asdict(network.config), "sha256": sha256, **(extra or {})}
    with whole_file(folder / CONFIG_FILE) as part:
        part.write_text(json.dumps(document, indent=2) + "\n")


def load(name_or_folder: str | Path) -> NetworkPrior:
    """Load a shipped prior by name, one that an entry point makes, or one from its folder.

    Args:
        name_or_folder: ``"ct"``, the name of an entry point of ``invdiff.priors`` (a function without arguments), or
            a folder with ``weights.safetensors`` and ``config.json``.

    Returns:
        The prior, float32, on the CPU; ``.to(device, dtype)`` moves it.

    Raises:
        ValueError: no such prior, a file missing, or weights that are not those the config names.
    """
    from safetensors.torch import load_file

    name = str(name_or_folder)
    if name in registered("priors") and name not in shipped():
        made: NetworkPrior = find("priors", name)()
        return made
    folder = SHIPPED / name if name in shipped() else Path(name_or_folder)
    if not (folder / CONFIG_FILE).is_file() or not (folder / WEIGHTS_FILE).is_file():
        raise ValueError(
            f"no prior {name!r}: give one of {', '.join({*shipped(), *registered('priors')})}, "
            f"or a folder with {CONFIG_FILE} and {WEIGHTS_FILE}"
        )
    document = json.loads((folder / CONFIG_FILE).read_text())
    sha256 = sha256_of([folder / WEIGHTS_FILE])
    if sha256 != document["sha256"]:
        raise ValueError(
            f"{folder / WEIGHTS_FILE} has sha256 {sha256[:12]}..., {CONFIG_FILE} names {document['sha256'][:12]}..."
        )
    network = UNet(UNetConfig(**document["network"]))
    network.load_state_dict(load_file(folder / WEIGHTS_FILE))  # copied into float32 parameters
    network.eval().requires_grad_(False)
    return NetworkPrior(network, PriorInfo(**document["prior"]), None, sha256)


def ct() -> NetworkPrior:
    """The shipped CT prior: axial slices in HU."""
    return load("ct")


def shipped() -> list[str]:
    """Names of the priors in the package."""
    return sorted(p.parent.name for p in SHIPPED.glob(f"*/{CONFIG_FILE}"))
