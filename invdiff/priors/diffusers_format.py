"""Folders of Hugging Face diffusers: a ``UNet2DModel``, alone or in a pipeline with its scheduler."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from invdiff.files import sha256_of
from invdiff.priors.adapted import Call, adapt, check_class
from invdiff.priors.description import SIDECAR, Description, describes_network, sidecar_of
from invdiff.priors.model import NetworkPrior
from invdiff.priors.network import FullPrecision
from invdiff.priors.parameterisation import EDM, Parameterisation, Predicts
from invdiff.priors.schedules import Discrete, Flow, VarianceExploding
from invdiff.priors.state_dict import load_weights, state_dict_of

WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
BETAS = {"linear": "linear", "scaled_linear": "scaled-linear", "squaredcos_cap_v2": "cosine", "sigmoid": "sigmoid"}
BETA_SCHEDULERS = ("DDPM", "DDIM", "PNDM", "DPMSolverMultistep", "DPMSolverSinglestep", "DEISMultistep",
                   "UniPCMultistep", "EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete")  # fmt: skip
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # names before 0.15


def read(folder: Path, description: Description | None) -> NetworkPrior | None:
    """The prior of a diffusers folder; None for a folder of another kind.

    Args:
        folder: with ``config.json`` and weights, or with those in ``unet/`` and ``scheduler/scheduler_config.json``.
        description: of the images; from ``invdiff.toml`` if None.

    Raises:
        ValueError: another network than ``UNet2DModel``, a scheduler that is not known, no description, weights that do
            not fit, or no diffusers installed.
    """
    inner = folder / "unet" if (folder / "unet" / "config.json").is_file() else folder
    if not (inner / "config.json").is_file() or describes_network(folder):
        return None
    config = _json(inner / "config.json")
    kind = config.get("_class_name")
    if kind is None:
        return None
    if kind != "UNet2DModel":
        raise ValueError(
            f"{inner / 'config.json'} is of a {kind}; a UNet2DModel, on images and without text, is wanted"
        )
    scheduler = folder / "scheduler" / "scheduler_config.json"
    sidecar = sidecar_of(folder, description)
    how = sidecar.schedule or parameterisation(scheduler)
    weights = next((inner / name for name in WEIGHTS if (inner / name).is_file()), inner / WEIGHTS[0])
    read_files = [weights, inner / "config.json", *(p for p in (scheduler, folder / SIDECAR) if p.is_file())]
    return unet2d(config, weights, sidecar.prior, how, sha256_of(read_files))


def unet2d(
    config: Mapping[str, Any], weights: Path, prior: Description, how: Parameterisation, sha256: str
) -> NetworkPrior:
    """The prior of a ``UNet2DModel`` with these arguments and weights, its first layer in full precision.

    Raises:
        ValueError: arguments that diffusers refuses, weights or a class label that do not fit, or no diffusers.
    """
    try:
        from diffusers import UNet2DModel
    except ImportError as error:
        raise ValueError(
            f'{weights} needs diffusers, which is not installed: pip install "invdiff[diffusers]"'
        ) from error
    if config.get("class_embed_type") is not None:
        raise ValueError(f"class_embed_type {config['class_embed_type']!r} is not read; numbered classes or none are")
    try:
        network: Any = UNet2DModel(**{k: v for k, v in config.items() if not k.startswith("_")})
    except (TypeError, ValueError) as error:
        raise ValueError(f"diffusers makes no UNet2DModel for {weights}: {error}") from error
    load_weights(network, {_modern(k): v for k, v in state_dict_of(weights).items()}, weights)
    network.conv_in = FullPrecision(network.conv_in)
    sizes = network.config
    check_class(prior, sizes.num_class_embeds, weights)
    if sizes.time_embedding_type == "learned" and isinstance(how, Predicts) and isinstance(how.schedule, Discrete):
        how = replace(how, schedule=replace(how.schedule, integers=True))
    call = Call(sizes.in_channels - len(prior.constants), 2 ** (len(sizes.down_block_types) - 1))
    return adapt(network, prior, how, call, sha256)


def _modern(name: str) -> str:
    """A weight's name as diffusers has it now: attention layers had others."""
    return re.sub(r"\.(query|key|value|proj_attn)\.(weight|bias)$", lambda m: f".{OLD_ATTENTION[m[1]]}.{m[2]}", name)


def parameterisation(file: Path) -> Parameterisation:
    """What a network trained with this scheduler predicts.

    Raises:
        ValueError: no such file, or a scheduler that is not known.
    """
    if not file.is_file():
        raise ValueError(
            f"{file} is not there to say what the network predicts: add it, or write the table [schedule] into "
            f'{file.parent.parent / SIDECAR}, such as predicts = "eps", kind = "discrete", betas = "linear"'
        )
    config = _json(file)
    kind = str(config.get("_class_name", "")).removesuffix("Scheduler")
    steps, predicts = config.get("num_train_timesteps", 1000), config.get("prediction_type", "epsilon")
    if kind == "ScoreSdeVe":
        low, high = _numbers(config, file, "sigma_min", "sigma_max")
        return Predicts("score", VarianceExploding(low, high))
    if kind in ("EDMEuler", "EDMDPMSolverMultistep") and predicts == "epsilon":
        return EDM(*_numbers(config, file, "sigma_data", "sigma_min", "sigma_max"))
    if kind == "FlowMatchEulerDiscrete":
        return Predicts("velocity", Flow(label_scale=float(steps)))
    special = {"timestep_type": "continuous", "use_flow_sigmas": True, "rescale_betas_zero_snr": True}
    odd = [f"{k} {v!r}" for k, v in special.items() if config.get(k) == v]
    if kind not in BETA_SCHEDULERS or predicts not in PREDICTIONS or odd:
        raise ValueError(
            f"{file} is of {kind}Scheduler with prediction_type {predicts!r}{', '.join(['', *odd])}, which is not "
            f"read: write the table [schedule] into {file.parent.parent / SIDECAR}"
        )
    return Predicts(PREDICTIONS[predicts], _betas(config, file, steps))


def _numbers(config: Mapping[str, Any], file: Path, *names: str) -> list[float]:
    for name in names:
        if not isinstance(config.get(name), int | float):
            raise ValueError(f"{file} has {name} = {config.get(name)!r}; a number is wanted")
    return [float(config[name]) for name in names]


def _betas(config: Mapping[str, Any], file: Path, steps: int) -> Discrete:
    if config.get("trained_betas") is not None:
        return Discrete(values=tuple(config["trained_betas"]), steps=len(config["trained_betas"]))
    for key in ("beta_schedule", "beta_start", "beta_end"):
        if key not in config:
            raise ValueError(f"{file} lacks {key!r}")
    if config["beta_schedule"] not in BETAS:
        raise ValueError(f"{file} has the beta_schedule {config['beta_schedule']!r}; there are: {', '.join(BETAS)}")
    return Discrete(BETAS[config["beta_schedule"]], config["beta_start"], config["beta_end"], steps)


def _json(file: Path) -> dict[str, Any]:
    try:
        document = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(document, dict):
        raise ValueError(f"{file} holds no object; a JSON object is wanted")
    return document
