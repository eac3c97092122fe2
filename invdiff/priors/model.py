"""A network prior: its description, its denoiser, and the folder it is stored in."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from invdiff.config import build, find, registered
from invdiff.files import sha256_of, whole_file
from invdiff.priors.description import Description
from invdiff.priors.network import UNet, UNetConfig
from invdiff.priors.parameterisation import PREDICTS, Parameterisation, denoise, unbounded
from invdiff.priors.state_dict import load_weights, state_dict_of

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
        sigma_data: the EDM preconditioning's data deviation, in prior units; 0 for other parameterisations.
        pixel_mm: smallest and largest pixel size of the training slices, in mm; zeros where there were none.
        parameterisation: what the network predicts; ``edm`` is F of Karras et al., the others are those of
            ``Predicts``.
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
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(
                f"prior {self.name!r} has noise levels from {self.sigma_min} to {self.sigma_max}; "
                "0 < sigma_min < sigma_max is wanted"
            )
        if self.parameterisation not in PREDICTS:
            raise ValueError(
                f"parameterisation {self.parameterisation!r} is not known; there are: {', '.join(PREDICTS)}"
            )

    def in_prior_units(self, x: Tensor) -> Tensor:
        """Physical values in prior units: -1 and +1 at the ends of the range."""
        return (x - (self.high + self.low) / 2) / ((self.high - self.low) / 2)

    def in_physical_units(self, x: Tensor) -> Tensor:
        """Prior units in the physical unit."""
        return x * ((self.high - self.low) / 2) + (self.high + self.low) / 2


class NetworkPrior:
    """A trained network as a Prior: ``denoise`` on whatever device the network is on.

    Args:
        network: (s c h w), (s) -> (s c h w); ``invdiff.priors.adapt`` makes it of any module.
        info: what it was trained on.
        autocast: dtype of the network's arithmetic (``torch.bfloat16``), or None for float32 throughout.
        sha256: hash of the weights and of what was read with them, for records.
        how: what the network computes; F of EDM with ``info.sigma_data``, at any noise level, if None.
        data_range: the network's values of -1 and 1 in prior units.
    """

    def __init__(
        self,
        network: nn.Module,
        info: PriorInfo,
        autocast: torch.dtype | None = None,
        sha256: str | None = None,
        how: Parameterisation | None = None,
        data_range: tuple[float, float] = (-1.0, 1.0),
    ) -> None:
        self.network = network
        self.info = info
        self.autocast = autocast
        self.sha256 = sha256
        self.how = unbounded(info.sigma_data) if how is None else how
        self.data_range = data_range
        self.channels: int = network.channels  # type: ignore[assignment]

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """E[x_0 | x_sigma = x] by the network: x (s c h w) in prior units, sigma () or (s).

        Beyond the noise levels of the training see ``invdiff.priors.parameterisation.denoise``.

        Raises:
            ValueError: images of other channels than the prior's, or of a size that the network does not take.
        """
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise ValueError(f"the images have shape {tuple(x.shape)}; (s, {self.channels}, h, w) is wanted")
        scale, offset = (self.data_range[1] - self.data_range[0]) / 2, (self.data_range[1] + self.data_range[0]) / 2
        context = nullcontext() if self.autocast is None else torch.autocast(x.device.type, dtype=self.autocast)
        with context:
            return (denoise(self.network, self.how, x * scale + offset, sigma * scale) - offset) / scale

    def to(self, device: torch.device | str, autocast: torch.dtype | None = None) -> NetworkPrior:
        """The same prior with its weights on ``device``, computing in ``autocast``.

        The network is moved in place (weights are not copied); channels-last, which is faster for inference.
        """
        network = self.network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return NetworkPrior(network, self.info, autocast, self.sha256, self.how, self.data_range)


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

    Raises:
        ValueError: another parameterisation than EDM, which ``load`` would not read; weights that float16 does not
            hold; a folder that cannot be written to.
    """
    from safetensors.torch import save as to_bytes

    _refuse_other_than_edm(info, folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().half().cpu().contiguous() for name, value in network.state_dict().items()}
    weights = folder / WEIGHTS_FILE
    bad = [name for name, value in tensors.items() if not bool(torch.isfinite(value).all())]
    if bad:
        raise ValueError(f"{folder}: the weights {bad[0]!r} are not finite in float16; the training has diverged")
    with whole_file(weights) as part:
        part.write_bytes(to_bytes(tensors))  # not save_file: its files are nobody else's to read
    sha256 = sha256_of([weights])
    document = {"prior": asdict(info), "network": asdict(network.config), "sha256": sha256, **(extra or {})}
    with whole_file(folder / CONFIG_FILE) as part:
        part.write_text(json.dumps(document, indent=2) + "\n")


def load(name_or_folder: str | Path, description: Description | None = None) -> NetworkPrior:
    """Load a shipped prior by name, one that an entry point makes, or one from its folder.

    Args:
        name_or_folder: ``"ct"``, the name of an entry point of ``invdiff.priors`` (a function without arguments), or
            a folder that one of the entry points of ``invdiff.prior_formats`` reads.
        description: unit and range of the images, for folders that do not state them; in the place of the table
            ``[prior]`` of an ``invdiff.toml`` in the folder.

    Returns:
        The prior, float32, on the CPU; ``.to(device, dtype)`` moves it.

    Raises:
        ValueError: no such prior, a file missing, or weights that are not those the config names.
    """
    name, folder = str(name_or_folder), Path(name_or_folder)
    named = name in registered("priors") or name in shipped()
    if named and description is not None:
        raise ValueError(f"the prior {name!r} states its own unit and range; a description is for folders of others")
    if name in shipped():
        return _own(SHIPPED / name)
    if named:
        made: NetworkPrior = find("priors", name)()
        return made
    if folder.is_file():
        raise ValueError(
            f"{folder} is a file; a folder is wanted: for weights alone a new one with the file and an invdiff.toml "
            "that states the network, and a pickled network (.pkl) is not opened, because a pickle can run code"
        )
    for kind in registered("prior_formats") if folder.is_dir() else []:
        read: NetworkPrior | None = find("prior_formats", kind)(folder, description)
        if read is not None:
            return read
    known = ", ".join(registered("prior_formats"))
    raise ValueError(
        f"no prior {name!r}: give one of {', '.join(sorted({*shipped(), *registered('priors')}))}, "
        f"or a folder with {CONFIG_FILE} and {WEIGHTS_FILE} or of another known format ({known})"
    )


def read_own(folder: Path, description: Description | None) -> NetworkPrior | None:
    """A folder with ``weights.safetensors`` and ``config.json``, as ``save`` writes it; None for another folder.

    Raises:
        ValueError: a description, which the folder has itself; or files that do not fit each other.
    """
    if not (folder / CONFIG_FILE).is_file() or not (folder / WEIGHTS_FILE).is_file():
        return None
    if description is not None:
        raise ValueError(f"{folder} states its own unit and range; a description is for folders of others")
    return _own(folder)


def _own(folder: Path) -> NetworkPrior:
    weights = folder / WEIGHTS_FILE
    try:
        document = json.loads((folder / CONFIG_FILE).read_text())
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG_FILE} cannot be read as JSON: {error}") from error
    if not isinstance(document, dict):
        raise ValueError(f"{folder / CONFIG_FILE} holds no table; it was not written by invdiff train")
    lacking = [key for key in ("prior", "network", "sha256") if key not in document]
    if lacking:
        raise ValueError(f"{folder / CONFIG_FILE} lacks {lacking[0]!r}; it was not written by invdiff train")
    sha256 = sha256_of([weights])
    if sha256 != document["sha256"]:
        raise ValueError(
            f"{weights} has sha256 {sha256[:12]}..., {CONFIG_FILE} names {str(document['sha256'])[:12]}..."
        )
    info = build(PriorInfo, document["prior"], f"{folder / CONFIG_FILE}: prior")
    _refuse_other_than_edm(info, folder)
    network = UNet(build(UNetConfig, document["network"], f"{folder / CONFIG_FILE}: network"))
    load_weights(network, state_dict_of(weights), weights)  # copied into float32 parameters
    return NetworkPrior(network.eval().requires_grad_(False), info, None, sha256)


def _refuse_other_than_edm(info: PriorInfo, folder: Path) -> None:
    if info.parameterisation != "edm":
        raise ValueError(f"the prior of {folder} has the parameterisation {info.parameterisation!r}; 'edm' is wanted")


def ct() -> NetworkPrior:
    """The shipped CT prior: axial slices in HU."""
    return _own(SHIPPED / "ct")


def brain_mr() -> NetworkPrior:
    """The shipped brain MR prior: axial magnitude slices, T1, T2 and FLAIR, with and without skull."""
    return _own(SHIPPED / "brain-mr")


def shipped() -> list[str]:
    """Names of the priors in the package."""
    return sorted(p.parent.name for p in SHIPPED.glob(f"*/{CONFIG_FILE}"))
