"""MONAI bundles: a 2D ``DiffusionModelUNet`` on images, read from the bundle's configuration as data.

A bundle's configuration is a program: values that start with ``$`` are Python. None is evaluated here; what the network
and its schedule are made of must be plain values or references (``@name``) to plain values.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from invdiff.files import sha256_of
from invdiff.priors.adapted import Call, adapt, check_class
from invdiff.priors.description import SIDECAR, Description, describes_network, sidecar_of
from invdiff.priors.model import NetworkPrior
from invdiff.priors.network import FullPrecision
from invdiff.priors.parameterisation import Parameterisation, Predicts
from invdiff.priors.schedules import Discrete, Flow
from invdiff.priors.state_dict import load_weights, state_dict_of

METADATA = Path("configs") / "metadata.json"
UNET = "DiffusionModelUNet"
DEPTH = 20  # references that lead to references
BETAS = {"linear_beta": "linear", "scaled_linear_beta": "scaled-linear", "sigmoid_beta": "sigmoid", "cosine": "cosine",
         "linear": "linear", "scaled_linear": "scaled-linear", "sigmoid": "sigmoid"}  # fmt: skip
PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
BETA_SCHEDULERS = ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler")
# Names of weights in MONAI Generative, from which MONAI's network came
OLD_NAMES = ((r"\.(to_[qkv])\.(weight|bias)$", r".attn.\1.\2"), (r"\.proj_attn\.", ".attn.out_proj."),
             (r"\.upsampler\.conv\.", ".upsampler.postconv."))  # fmt: skip


def read(folder: Path, description: Description | None) -> NetworkPrior | None:
    """The prior of a MONAI bundle; None for a folder of another kind.

    Args:
        folder: with ``configs/metadata.json``, other configurations beside it and weights in ``models/``.
        description: of the images; from ``invdiff.toml`` if None.

    Raises:
        ValueError: a latent or 3-D network, code as arguments, a scheduler that is not known, no description,
            or weights that do not fit.
    """
    if not (folder / METADATA).is_file() or describes_network(folder):
        return None
    files = _configurations(folder)
    document: dict[str, Any] = {}
    for file in files:
        document |= _document(file)
    targets = list(_targets(document))
    latent = [t for t in targets if re.search("autoencoder|vqvae|vqgan", t["_target_"], re.IGNORECASE)]
    if latent:
        raise ValueError(
            f"{folder} is a latent diffusion model ({latent[0]['_target_']}): its network sees an autoencoder's codes, "
            "not images, so it gives no E[x_0 | x_sigma] of an image; a network on images is wanted"
        )
    arguments = _only(targets, (UNET,), document, folder)
    sidecar = sidecar_of(folder, description)
    how = sidecar.schedule or parameterisation(
        _only(targets, (*BETA_SCHEDULERS, "RFlowScheduler"), document, folder), folder
    )
    weights = _weights(folder)
    sidecars = [p for p in (folder / SIDECAR,) if p.is_file()]
    return diffusion_unet(arguments, weights, sidecar.prior, how, sha256_of([weights, *files, *sidecars]))


def diffusion_unet(
    arguments: Mapping[str, Any], weights: Path, prior: Description, how: Parameterisation, sha256: str
) -> NetworkPrior:
    """The prior of a ``DiffusionModelUNet`` with these arguments and weights, its first layer in full precision.

    Raises:
        ValueError: arguments that MONAI refuses, a network that is not 2D or wants a context, weights that do not fit.
    """
    from monai.networks.nets import DiffusionModelUNet

    known = {("channels" if k == "num_channels" else k): v for k, v in arguments.items() if not k.startswith("_")}
    if known.get("spatial_dims") != 2:
        raise ValueError(f"the network of {weights} has spatial_dims {known.get('spatial_dims')}; 2 is wanted")
    if known.get("with_conditioning"):
        raise ValueError(f"the network of {weights} is conditioned on a context; one without is wanted")
    try:
        network = DiffusionModelUNet(**known)
    except (TypeError, ValueError) as error:
        raise ValueError(f"MONAI makes no {UNET} for {weights}: {error}") from error
    load_weights(network, _renamed(state_dict_of(weights), set(network.state_dict())), weights)
    network.conv_in = FullPrecision(network.conv_in)
    check_class(prior, known.get("num_class_embeds"), weights)
    levels = len(network.block_out_channels)
    return adapt(network, prior, how, Call(known["in_channels"] - len(prior.constants), 2 ** (levels - 1)), sha256)


def parameterisation(scheduler: Mapping[str, Any], folder: Path) -> Parameterisation:
    """What a network trained with this MONAI scheduler predicts.

    Raises:
        ValueError: a schedule or prediction that is not known.
    """
    steps = int(scheduler.get("num_train_timesteps", 1000))
    if scheduler["_target_"].endswith("RFlowScheduler"):
        return Predicts("velocity-to-data", Flow(label_scale=float(steps)))
    shape = scheduler.get("schedule", scheduler.get("beta_schedule", "linear_beta"))
    predicts = scheduler.get("prediction_type", "epsilon")
    bent = [k for k in ("sig_range", "s") if k in scheduler]
    if shape not in BETAS or predicts not in PREDICTIONS or bent:
        raise ValueError(
            f"{folder} has the schedule {shape!r} with prediction_type {predicts!r}{', '.join(['', *bent])}, which is "
            f"not read: write the table [schedule] into {folder / SIDECAR}"
        )
    ends = float(scheduler.get("beta_start", 1e-4)), float(scheduler.get("beta_end", 2e-2))  # MONAI's defaults
    return Predicts(PREDICTIONS[predicts], Discrete(BETAS[shape], *ends, steps))


def _configurations(folder: Path) -> list[Path]:
    """The bundle's configurations; what inference says comes last and holds."""
    found = [p for p in (folder / "configs").iterdir() if p.suffix in (".json", ".yaml", ".yml")]
    return sorted((p for p in found if p.name != METADATA.name), key=lambda p: (p.stem == "inference", p.name))


def _document(file: Path) -> dict[str, Any]:
    try:
        document = json.loads(file.read_text()) if file.suffix == ".json" else _yaml(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    return document if isinstance(document, dict) else {}


def _yaml(file: Path) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ValueError('PyYAML is not installed: pip install "invdiff[bundles]"') from error
    try:
        return yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


def _targets(value: Any) -> Iterator[dict[str, Any]]:
    """Every object that a configuration defines."""
    if isinstance(value, dict) and isinstance(value.get("_target_"), str):
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else []:
        yield from _targets(part)


def _only(
    targets: list[dict[str, Any]], names: tuple[str, ...], document: Mapping[str, Any], folder: Path
) -> dict[str, Any]:
    """The one definition of an object of these classes, its references resolved."""
    found: list[dict[str, Any]] = []
    for target in targets:
        if target["_target_"].rpartition(".")[2] in names:
            resolved = {k: _resolved(v, document, folder) for k, v in target.items() if k != "_desc_"}
            if resolved not in found:
                found.append(resolved)
    if len(found) != 1:
        raise ValueError(
            f"{folder} defines {len(found)} different objects of {' or '.join(names)} in its configurations; one is "
            f"wanted (or the tables [network] and [schedule] in {folder / SIDECAR})"
        )
    return found[0]


def _resolved(value: Any, document: Mapping[str, Any], folder: Path, depth: int = 0) -> Any:
    """A value with the ``@name::part`` references in it replaced; code and macros are refused."""
    if isinstance(value, list):
        return [_resolved(v, document, folder, depth) for v in value]
    if not isinstance(value, str) or value[:1] not in ("@", "$", "%"):
        return value
    try:
        if not value.startswith("@") or depth == DEPTH:
            raise LookupError(value)
        found: Any = document
        for part in re.split("::|#", value[1:]):
            found = found[int(part) if isinstance(found, list) else part]
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder} defines its network or scheduler by {value!r}, which leads to no plain value; code in a bundle "
            f"is not run: write the tables [network] and [schedule] into {folder / SIDECAR}"
        ) from error
    return _resolved(found, document, folder, depth + 1)


def _weights(folder: Path) -> Path:
    models = folder / "models"
    found = sorted(p for p in models.glob("*") if p.suffix in (".pt", ".pth", ".safetensors"))
    chosen = [p for p in found if p.stem == "model"] or found
    if len(chosen) != 1:
        names = ", ".join(p.name for p in chosen) or "no weights"
        raise ValueError(f"{models} holds {names}; one file of weights, model.pt or model.safetensors, is wanted")
    return chosen[0]


def _renamed(state: Mapping[str, Any], wanted: set[str]) -> dict[str, Any]:
    """Weights of MONAI Generative under the names that MONAI has now."""
    renamed = {}
    for name, value in state.items():
        candidates = [name, *(re.sub(old, new, name) for old, new in OLD_NAMES)]
        renamed[next((c for c in candidates if c in wanted), name)] = value
    return renamed
