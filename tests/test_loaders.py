"""Priors from the files of other projects: equal to what those projects compute, and what is refused."""

from __future__ import annotations

import json
import pickle
import sys
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.networks.nets import DiffusionModelUNet
from monai.networks.schedulers import DDIMScheduler, DDPMScheduler, RFlowScheduler
from safetensors.torch import save_file
from torch import Tensor, nn

from invdiff.pipelines.reconstruct import RunConfig, prior_of
from invdiff.priors import (
    Chunked,
    Description,
    NetworkPrior,
    Predicts,
    PriorInfo,
    VarianceExploding,
    load,
    state_dict_of,
)
from invdiff.priors.adapted import Adapted
from invdiff.priors.model import save
from invdiff.priors.network import UNet, UNetConfig
from invdiff.problem import prepare
from invdiff.protocols import Space
from invdiff.reconstruction import reconstruct
from invdiff.samplers import DDS

BODY = Description("HU", -1000.0, 2000.0)
UNET: dict[str, Any] = {
    "spatial_dims": 2,
    "in_channels": 1,
    "out_channels": 1,
    "channels": [8, 16],
    "attention_levels": [False, True],
    "num_res_blocks": 1,
    "num_head_channels": 8,
    "norm_num_groups": 4,
}
SIDECAR = '[prior]\nunit = "HU"\nlow = -1000\nhigh = 2000\n'


def filled(network: nn.Module) -> Any:
    """The network with random weights everywhere: output layers start at zero."""
    g = torch.Generator().manual_seed(0)
    for p in network.parameters():
        p.data = 0.2 * torch.randn(p.shape, generator=g)
    return network.eval().requires_grad_(False)


def bundle(folder: Path, network: dict[str, Any], scheduler: dict[str, Any] | None, **more: Any) -> DiffusionModelUNet:
    """A MONAI bundle with references and code in it, as the published ones have."""
    (folder / "configs").mkdir(parents=True)
    (folder / "models").mkdir()
    document = {
        "imports": ["$import os"],
        "device": "$torch.device('cpu')",
        "size": 16,
        "dims": {"all": [2, 3]},
        "two": "@dims::all::0",
        "network_def": {"_target_": "monai.networks.nets.DiffusionModelUNet", **network},
        "network": "$@network_def.to(@device)",
        "load": "$@network.load_state_dict(torch.load('models/model.pt'))",
        **({} if scheduler is None else {"scheduler": scheduler}),
        **more,
    }
    (folder / "configs" / "inference.json").write_text(json.dumps(document))
    (folder / "configs" / "metadata.json").write_text(json.dumps({"version": "1", "network_data_format": {}}))
    made = filled(DiffusionModelUNet(**{**network, "spatial_dims": 2}))
    torch.save(made.state_dict(), folder / "models" / "model.pt")
    return made


def ddpm(**fields: Any) -> dict[str, Any]:
    return {"_target_": "monai.networks.schedulers.DDPMScheduler", **fields}


def noisy(sigma: float, size: tuple[int, int] = (8, 12)) -> Tensor:
    g = torch.Generator().manual_seed(4)
    return 0.3 * torch.randn(2, 1, *size, generator=g) + sigma * torch.randn(2, 1, *size, generator=g)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize(
    "schedule",
    [
        {},
        {"schedule": "scaled_linear_beta", "beta_start": 0.0015, "beta_end": 0.0205},
        {"schedule": "cosine"},
        {"schedule": "sigmoid_beta", "num_train_timesteps": 500},
    ],
)
def test_bundle_equals_monai(tmp_path: Path, prediction: str, schedule: dict[str, Any]) -> None:
    fields = {**schedule, "prediction_type": prediction}
    network = bundle(tmp_path / "b", {**UNET, "spatial_dims": "@two"}, ddpm(**fields, clip_sample=True))
    prior = load(tmp_path / "b", BODY)
    assert (prior.info.name, prior.info.unit, prior.info.low, prior.channels) == ("b", "HU", -1000.0, 1)
    scheduler = DDPMScheduler(**fields, clip_sample=False)
    for t in (0, 3, 250, 480):
        sigma = float(prior.how.schedule.sigmas[t])  # type: ignore[attr-defined]
        ab = scheduler.alphas_cumprod[t].double()
        assert sigma == pytest.approx(
            float(((1 - ab) / ab).sqrt()), rel=2e-3
        )  # MONAI rounds 1 - ab to single precision
        x = noisy(sigma)
        x_t = x / (1 + sigma**2) ** 0.5
        wanted = _x0(scheduler, network(x_t, torch.full((2,), t)), t, x_t)
        torch.testing.assert_close(prior.denoise(x, torch.tensor(sigma)), wanted, atol=1e-4 * max(1, sigma), rtol=1e-4)


def _x0(scheduler: DDPMScheduler, out: Tensor, t: int, x_t: Tensor) -> Tensor:
    """MONAI's own predicted original sample: the deterministic DDIM step gives it."""
    ddim = DDIMScheduler(
        num_train_timesteps=scheduler.num_train_timesteps, clip_sample=False, prediction_type=scheduler.prediction_type
    )
    ddim.alphas_cumprod = scheduler.alphas_cumprod
    ddim.set_timesteps(scheduler.num_train_timesteps)
    return ddim.step(out, t, x_t)[1]


def test_rectified_flow_bundle_equals_monai(tmp_path: Path) -> None:
    network = bundle(tmp_path / "b", UNET, {"_target_": "monai.networks.schedulers.RFlowScheduler"})
    (tmp_path / "b" / "invdiff.toml").write_text(SIDECAR)
    prior = load(tmp_path / "b")
    scheduler = RFlowScheduler(num_train_timesteps=1000)
    scheduler.set_timesteps(1000)
    for t in (1, 400, 900):
        sigma = t / (1000 - t)
        x = noisy(sigma)
        x_t = scheduler.add_noise(x, torch.zeros_like(x), torch.full((2,), t))  # (1 - t / 1000) x
        wanted = scheduler.step(network(x_t, torch.full((2,), t)), t, x_t)[1]
        torch.testing.assert_close(prior.denoise(x, torch.tensor(sigma)), wanted, atol=2e-4, rtol=2e-4)


def test_yaml_bundle_and_the_old_names(tmp_path: Path) -> None:
    """A bundle of MONAI Generative: YAML, num_channels, its names of weights."""
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    network = bundle(tmp_path / "b", UNET, ddpm())
    config = tmp_path / "b" / "configs" / "inference.json"
    document = json.loads(config.read_text())
    old = {("num_channels" if k == "channels" else k): v for k, v in UNET.items()}
    document["network_def"] = {"_target_": "generative.networks.nets.DiffusionModelUNet", **old}
    (tmp_path / "b" / "configs" / "common.yaml").write_text(
        yaml.safe_dump({"network_def": document.pop("network_def")})
    )
    config.write_text(json.dumps(document))
    renamed = {
        k.replace(".attn.to_", ".to_").replace(".attn.out_proj", ".proj_attn").replace(".postconv.", ".conv."): v
        for k, v in network.state_dict().items()
    }
    assert set(renamed) != set(network.state_dict())
    torch.save({"model": renamed, "epoch": 3}, tmp_path / "b" / "models" / "model.pt")
    prior = load(tmp_path / "b", BODY)
    x, label = noisy(0.5), torch.tensor([5.0, 700.0])
    assert torch.equal(prior.network(x, label), network(x, label))


def test_classes_learned_variance_colour_and_any_size(tmp_path: Path) -> None:
    arguments = {**UNET, "in_channels": 4, "out_channels": 6, "num_class_embeds": 5}
    network = bundle(tmp_path / "b", arguments, ddpm())
    prior = load(tmp_path / "b", Description("HU", -1000.0, 2000.0, (0.0, 1.0), class_label=2, constants=(0.25,)))
    x, label = noisy(0.5, (7, 9)), torch.tensor([5.0, 700.0])
    whole = torch.nn.functional.pad(x, (0, 1, 0, 1), mode="replicate")
    given = torch.cat([whole.expand(-1, 3, -1, -1), torch.full_like(whole, 0.25)], 1)
    wanted = network(given, label, class_labels=torch.tensor([2, 2]))[:, :3].mean(1, keepdim=True)[..., :7, :9]
    torch.testing.assert_close(prior.network(x, label), wanted)
    with pytest.raises(ValueError, match=r"class_label is None; the network of .* wants one of 0 to 4"):
        load(tmp_path / "b", Description("HU", 0.0, 1.0, constants=(0.25,)))
    with pytest.raises(ValueError, match=r"class_label is 5; .* wants one of 0 to 4"):
        load(tmp_path / "b", Description("HU", 0.0, 1.0, class_label=5, constants=(0.25,)))
    with pytest.raises(ValueError, match=r"images of 4 channels, the description says 1 and constants \[\]"):
        load(tmp_path / "b", Description("HU", 0.0, 1.0, class_label=2))


def refuse_bundle(tmp_path: Path, message: str, network: dict[str, Any], scheduler: Any, **more: Any) -> None:
    bundle(tmp_path / "b", UNET, scheduler, **more)
    config = tmp_path / "b" / "configs" / "inference.json"
    document = json.loads(config.read_text())
    document["network_def"].update(network)
    config.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "b", BODY)


@pytest.mark.parametrize(
    ("message", "network", "scheduler", "more"),
    [
        ("latent diffusion model", {}, ddpm(), {"autoencoder_def": {"_target_": "monai.networks.nets.AutoencoderKL"}}),
        ("spatial_dims 3; 2 is wanted", {"spatial_dims": 3}, ddpm(), {}),
        ("conditioned on a context", {"with_conditioning": True, "cross_attention_dim": 8}, ddpm(), {}),
        (
            r"'\$2 \+ 0', which leads to no plain value; code in a bundle is not run",
            {"spatial_dims": "$2 + 0"},
            ddpm(),
            {},
        ),
        ("'%other.json::dims'", {"spatial_dims": "%other.json::dims"}, ddpm(), {}),
        ("'@nowhere'", {"channels": "@nowhere"}, ddpm(), {}),
        ("'@circle'", {"channels": "@circle"}, ddpm(), {"circle": "@circle"}),
        ("MONAI makes no DiffusionModelUNet .*colour", {"colour": True}, ddpm(), {}),
        ("MONAI makes no DiffusionModelUNet .*multiple", {"norm_num_groups": 5}, ddpm(), {}),
        ("0 different objects of DDPMScheduler or", {}, None, {}),
        ("2 different objects of DDPM", {}, ddpm(), {"other": ddpm(schedule="cosine")}),
        ("schedule 'bent' with prediction_type 'epsilon'", {}, ddpm(schedule="bent"), {}),
        ("prediction_type 'flow'", {}, ddpm(prediction_type="flow"), {}),
        ("sig_range", {}, ddpm(schedule="sigmoid_beta", sig_range=3), {}),
    ],
)
def test_bundles_that_are_refused(
    tmp_path: Path, message: str, network: dict[str, Any], scheduler: Any, more: dict[str, Any]
) -> None:
    refuse_bundle(tmp_path, message, network, scheduler, **more)


def test_code_in_a_bundle_does_not_run(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    refuse_bundle(tmp_path, "is not run", {"channels": f"$open({str(trap)!r}, 'w').close()"}, ddpm())
    assert not trap.exists()


def test_weights_of_a_bundle_are_one_file_that_fits(tmp_path: Path) -> None:
    network = bundle(tmp_path / "b", UNET, ddpm())
    model = tmp_path / "b" / "models" / "model.pt"
    state = network.state_dict()
    torch.save({k: v for k, v in state.items() if "conv_in" not in k}, model)
    with pytest.raises(ValueError, match=r"lacks 2 weights of the network \(conv_in.conv.weight, conv_in.conv.bias\)"):
        load(tmp_path / "b", BODY)
    torch.save({**state, **{f"more{k}": torch.ones(1) for k in range(5)}}, model)
    with pytest.raises(ValueError, match=r"has 5 that are none of its \(more0, more1, more2, \.\.\.\)"):
        load(tmp_path / "b", BODY)
    torch.save({**state, "conv_in.conv.bias": torch.ones(3)}, model)
    with pytest.raises(ValueError, match=r"conv_in.conv.bias of shape \(3,\); the network's is \(8,\)"):
        load(tmp_path / "b", BODY)
    model.unlink()
    with pytest.raises(ValueError, match="holds no weights; one file"):
        load(tmp_path / "b", BODY)
    for name in ("a.pt", "b.safetensors"):
        (tmp_path / "b" / "models" / name).touch()
    with pytest.raises(ValueError, match=r"holds a.pt, b.safetensors; one file"):
        load(tmp_path / "b", BODY)


def test_what_a_folder_does_not_say_is_asked_for(tmp_path: Path) -> None:
    bundle(tmp_path / "b", UNET, ddpm())
    with pytest.raises(
        ValueError, match=r"write into .*invdiff.toml the lines \[prior\], unit = \"HU\", low = -1000.0"
    ):
        load(tmp_path / "b")
    sidecar = tmp_path / "b" / "invdiff.toml"
    sidecar.write_text(SIDECAR + 'data_range = [0, 1]\nname = "hands"\npixel_mm = [0.5, 1]\n[schedule]\nkind = "edm"\n')
    prior = load(tmp_path / "b")
    assert (prior.info.name, prior.info.pixel_mm, prior.data_range) == ("hands", (0.5, 1), (0, 1))
    assert prior.info.parameterisation == "edm" and prior.info.sigma_data == 1.0  # of [0, 1] images, in prior units
    first = prior.sha256
    for text, message in (
        (SIDECAR + "range = 2", "invdiff.toml: prior has no field 'range'"),
        ('[prior]\nunit = "HU"\nlow = -1000', "invdiff.toml: prior lacks 'high'"),
        (SIDECAR + "[other]", "has 'other'; the tables prior, schedule and network are known"),
        ('unit = "HU"', "has 'unit'"),
        ("[prior", "cannot be read as TOML"),
        (SIDECAR + "data_range = [1]", "tuple\\[float, float\\] is wanted"),
        (SIDECAR + '[schedule]\npredicts = "noise"', "invdiff.toml: predicts 'noise' is not known"),
    ):
        sidecar.write_text(text)
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "b")
    sidecar.write_text(SIDECAR)
    assert load(tmp_path / "b").sha256 != first  # a run is not resumed under another description


def test_weights_alone_with_a_stated_network(tmp_path: Path) -> None:
    network = filled(DiffusionModelUNet(**UNET))
    state = {f"module.{k}": v for k, v in network.state_dict().items()}
    torch.save({"ema": state, "model": {k: 0 * v for k, v in state.items()}, "step": 7}, tmp_path / "w.pt")
    arguments = "\n".join(f"{k} = {json.dumps(v)}" for k, v in UNET.items())
    schedule = '[schedule]\npredicts = "score"\nkind = "ve"\nsigma_max = 378.0\n'
    whole = f'{SIDECAR}{schedule}[network]\nweights = "w.pt"\nkind = "DiffusionModelUNet"\n{arguments}\n'
    (tmp_path / "invdiff.toml").write_text(whole)
    prior = load(tmp_path)
    x, label = noisy(0.5), torch.tensor([0.1, 3.0])
    assert torch.equal(prior.network(x, label), network(x, label))
    assert prior.how == Predicts("score", VarianceExploding(sigma_max=378.0)) and prior.info.sigma_max == 378.0
    for wrong, message in (
        (whole.replace('"w.pt"', '"v.pt"'), "names the weights 'v.pt', which are not there"),
        (whole.replace('kind = "DiffusionModelUNet"', 'kind = "os.system"'), "network.kind 'os.system'"),
        (whole.replace(schedule, ""), r"lacks the table \[schedule\]"),
    ):
        (tmp_path / "invdiff.toml").write_text(wrong)
        with pytest.raises(ValueError, match=message):
            load(tmp_path)


class Trap:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("way", ["zip", "legacy", "pickle"])
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path: Path, way: str) -> None:
    trap = tmp_path / "trap"
    file = tmp_path / ("edm.pkl" if way == "pickle" else "model.pt")
    if way == "pickle":
        file.write_bytes(pickle.dumps({"ema": Trap(trap)}))
    else:
        torch.save({"ema": Trap(trap)}, file, _use_new_zipfile_serialization=way == "zip")
    with pytest.raises(ValueError, match=r"is a pickle that holds more than tensors.*could run code and is refused"):
        state_dict_of(file)
    with pytest.raises(ValueError, match=r"is a file; a folder is wanted.*a pickle can run code"):
        load(file)
    assert not trap.exists()
    pickle.loads(file.read_bytes()) if way == "pickle" else torch.load(file, weights_only=False)
    assert trap.exists()  # the trap is one


def test_files_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "w.pt"
    torch.save({"a": torch.ones(1000)}, file)
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"these are no weights"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"w.pt is (truncated|a pickle)"):
            state_dict_of(file)
    save_file({"a": torch.ones(1000)}, tmp_path / "w.safetensors")
    whole = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "w.safetensors").write_bytes(whole[:200])
    with pytest.raises(ValueError, match="truncated or no safetensors file"):
        state_dict_of(tmp_path / "w.safetensors")
    torch.save({"step": 3, "optimizer": {"lr": 0.1}}, file)
    with pytest.raises(ValueError, match="holds no weights by name, neither at its top nor under ema"):
        state_dict_of(file)
    torch.save({"generator": {"a": torch.ones(1)}, "net": {"a": torch.zeros(1)}}, file)
    assert float(state_dict_of(file, "generator")["a"]) == 1 and float(state_dict_of(file)["a"]) == 0
    with pytest.raises(ValueError, match="nor under 'critic'"):
        state_dict_of(file, "critic")
    torch.save({"network": nn.Linear(2, 2)}, file)
    with pytest.raises(ValueError, match=r"more than tensors \(torch.nn.modules.linear.Linear\)"):
        state_dict_of(file)
    torch.save({"model": {"a": torch.ones(1)}, "lr": np.float64(0.1)}, file)
    with pytest.raises(ValueError, match="more than tensors"):
        state_dict_of(file)


def test_own_folders_are_checked(tmp_path: Path) -> None:
    info = PriorInfo("toy", "HU", -1000.0, 1000.0, 0.01, 50.0, 0.5, (1.0, 2.0))
    save(tmp_path / "p", UNet(UNetConfig(unshuffle=2, channels=(8, 16), blocks=(1, 1), norm_groups=4)), info)
    with pytest.raises(ValueError, match="has the parameterisation 'eps'; 'edm' is wanted"):
        save(tmp_path / "q", UNet(UNetConfig()), replace(info, parameterisation="eps"))
    with pytest.raises(ValueError, match="states its own unit and range"):
        load(tmp_path / "p", BODY)
    with pytest.raises(ValueError, match="'ct' states its own unit and range"):
        load("ct", BODY)
    config = tmp_path / "p" / "config.json"
    document = json.loads(config.read_text())
    for wrong, message in (
        ("{", "cannot be read as JSON"),
        ("{}", "lacks 'prior'"),
        (json.dumps({**document, "prior": {**document["prior"], "parameterisation": "eps"}}), "'eps'; 'edm' is wanted"),
        (
            json.dumps({**document, "prior": {**document["prior"], "parameterisation": "E"}}),
            "'E' is not known; there are",
        ),
        (
            json.dumps({**document, "network": {**document["network"], "blocks": [2, 1]}}),
            "lacks .* weights of the network",
        ),
    ):
        config.write_text(wrong)
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "p")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ValueError,
        match=r"no prior .*empty.* another known format \(ambient, diffusers, forward-model, invdiff, monai, weights\)",
    ):
        load(tmp_path / "empty")


@dataclass(frozen=True)
class Rows:
    """A linear operator on images in ``unit``: every second row of them."""

    shape: tuple[int, int, int, int]
    unit: str

    @property
    def domain(self) -> Space:
        return Space(self.shape, torch.float32)

    @property
    def range(self) -> Space:
        return Space((*self.shape[:2], self.shape[2] // 2, self.shape[3]), torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, ::2]

    def adjoint(self, y: Tensor) -> Tensor:
        return torch.stack([y, torch.zeros_like(y)], 3).flatten(2, 3)

    def vjp(self, x: Tensor, r: Tensor) -> Tensor:
        return self.adjoint(r)

    def normal(self, x: Tensor) -> Tensor:
        return self.adjoint(self.forward(x))


def test_reconstruction_with_a_foreign_prior_and_ill_fits(tmp_path: Path) -> None:
    bundle(tmp_path / "b", UNET, ddpm(schedule="scaled_linear_beta"))
    (tmp_path / "b" / "invdiff.toml").write_text(SIDECAR)
    operator = Rows((2, 1, 10, 9), "HU")
    truth = torch.full((2, 1, 10, 9), 40.0)
    y = operator.forward(truth)
    result = reconstruct(y, operator, str(tmp_path / "b"), DDS(steps=4), sigma_y=1.0)
    assert result.x.shape == truth.shape and bool(torch.isfinite(result.x).all())
    assert result.record["prior"]["parameterisation"] == "eps" and result.record["unit"] == "HU"
    torch.testing.assert_close(operator.forward(result.x), y, atol=30.0, rtol=0)  # prior units hold: HU come back
    prior, sha256 = prior_of(str(tmp_path / "b"), RunConfig())  # the way of the command line
    assert isinstance(prior, Chunked) and len(sha256) == 64
    with pytest.raises(ValueError, match="the prior 'b' is in HU, the operator acts on T/m"):
        prepare(y, Rows((2, 1, 10, 9), "T/m"), prior, 1.0)
    two = Rows((2, 2, 10, 9), "HU")
    with pytest.raises(ValueError, match="operator has 2 channels; the prior has 1"):
        prepare(two.forward(torch.zeros(2, 2, 10, 9)), two, prior, 1.0)


def test_the_examples_of_the_docs_work(tmp_path: Path) -> None:
    text = (Path(__file__).parent.parent / "docs" / "plugins.md").read_text()
    names: dict[str, Any] = {}
    exec(text.split("<!-- example -->\n```python\n")[1].split("```")[0], names)
    assert names["denoised"].shape == (2, 1, 50, 61) and names["prior"].info.unit == "HU"
    toml = "[prior]" + text.split("```toml\n[prior]")[1].split("```")[0]
    (tmp_path / "invdiff.toml").write_text(toml)
    table = tomllib.loads(toml)["network"]
    arguments = {k: v for k, v in table.items() if k not in ("weights", "kind")}
    torch.save(filled(DiffusionModelUNet(**arguments)).state_dict(), tmp_path / table["weights"])
    assert load(tmp_path).data_range == (0, 1)


# diffusers

SIZES: dict[str, Any] = {
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
}


@pytest.fixture
def diffusers() -> Any:
    return pytest.importorskip("diffusers", reason="diffusers is not installed")


def pipeline(folder: Path, diffusers: Any, scheduler: Any, **sizes: Any) -> Any:
    """A pipeline folder, written by diffusers itself."""
    network = filled(diffusers.UNet2DModel(**{**SIZES, **sizes}))
    network.save_pretrained(folder / "unet")
    if scheduler is not None:
        scheduler.save_pretrained(folder / "scheduler")
    return network


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"])
def test_pipeline_equals_diffusers(tmp_path: Path, diffusers: Any, prediction: str, betas: str) -> None:
    scheduler = diffusers.DDPMScheduler(beta_schedule=betas, prediction_type=prediction, clip_sample=False)
    network = pipeline(tmp_path / "d", diffusers, scheduler)
    prior = load(tmp_path / "d", BODY)
    for t in (0, 3, 250, 900):
        ab = scheduler.alphas_cumprod[t].double()
        sigma = float(((1 - ab) / ab).sqrt())
        x = noisy(sigma)
        x_t = (ab.sqrt() * x).float()
        wanted = scheduler.step(network(x_t, t).sample, t, x_t).pred_original_sample
        torch.testing.assert_close(prior.denoise(x, torch.tensor(sigma)), wanted, atol=1e-4 * max(1, sigma), rtol=1e-4)


def test_edm_flow_and_score_schedulers(tmp_path: Path, diffusers: Any) -> None:
    edm = diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.4)
    network = pipeline(tmp_path / "edm", diffusers, edm)
    x, sigma = noisy(0.7), torch.tensor(0.7)
    out = network(edm.precondition_inputs(x, sigma), edm.precondition_noise(sigma).expand(2)).sample
    wanted = edm.precondition_outputs(x, out, sigma)
    torch.testing.assert_close(load(tmp_path / "edm", BODY).denoise(x, sigma), wanted, atol=1e-4, rtol=1e-4)

    network = pipeline(tmp_path / "flow", diffusers, diffusers.FlowMatchEulerDiscreteScheduler())
    t = 0.7 / 1.7
    wanted = x / 1.7 - t * network(x / 1.7, torch.full((2,), 1000 * t)).sample
    torch.testing.assert_close(load(tmp_path / "flow", BODY).denoise(x, sigma), wanted, atol=1e-4, rtol=1e-4)

    ve = diffusers.ScoreSdeVeScheduler(sigma_min=0.01, sigma_max=50.0)
    network = pipeline(tmp_path / "ve", diffusers, ve, time_embedding_type="fourier")
    wanted = x + 0.49 * network(x, sigma.expand(2)).sample
    torch.testing.assert_close(load(tmp_path / "ve", BODY).denoise(x, sigma), wanted, atol=1e-4, rtol=1e-4)


def test_trained_betas_old_attention_and_whole_steps(tmp_path: Path, diffusers: Any) -> None:
    betas = np.linspace(0.001, 0.04, 50)
    scheduler = diffusers.DDIMScheduler(num_train_timesteps=50, trained_betas=betas.tolist(), clip_sample=False)
    folder = tmp_path / "d"
    network = pipeline(folder, diffusers, scheduler, time_embedding_type="learned", num_train_timesteps=50)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = network.state_dict()
    for new, name in old.items():
        state = {k.replace(f".{new}.", f".{name}."): v for k, v in state.items()}
    assert set(state) != set(network.state_dict())
    save_file(state, folder / "unet" / "diffusion_pytorch_model.safetensors")
    prior = load(folder, BODY)
    ab = scheduler.alphas_cumprod[20].double()
    sigma = float(((1 - ab) / ab).sqrt())
    x = noisy(sigma)
    scheduler.set_timesteps(50)
    x_t = (ab.sqrt() * x).float()
    wanted = scheduler.step(network(x_t, 20).sample, 20, x_t).pred_original_sample
    torch.testing.assert_close(prior.denoise(x, torch.tensor(sigma)), wanted, atol=1e-3, rtol=1e-3)


def test_a_network_folder_without_a_scheduler(tmp_path: Path, diffusers: Any) -> None:
    network = filled(diffusers.UNet2DModel(**SIZES, num_class_embeds=3))
    network.save_pretrained(tmp_path, safe_serialization=False)  # a .bin of tensors
    (tmp_path / "invdiff.toml").write_text(SIDECAR + "class_label = 1\n")
    with pytest.raises(ValueError, match=r"scheduler_config.json is not there .* write the table \[schedule\]"):
        load(tmp_path)
    (tmp_path / "invdiff.toml").write_text(SIDECAR + 'class_label = 1\n[schedule]\npredicts = "eps"\n')
    prior = load(tmp_path)
    x, label = noisy(0.5), torch.tensor([5.0, 700.0])
    wanted = network(x, label, class_labels=torch.tensor([1, 1])).sample
    assert torch.equal(prior.network(x, label), wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "LCMScheduler"}, "is of LCMScheduler with prediction_type 'epsilon', which is not read"),
        ({"prediction_type": "flow_prediction"}, "prediction_type 'flow_prediction'"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr True"),
        ({"beta_schedule": "laplace"}, "beta_schedule 'laplace'; there are: linear"),
    ],
)
def test_schedulers_that_are_refused(tmp_path: Path, diffusers: Any, change: dict[str, Any], message: str) -> None:
    pipeline(tmp_path / "d", diffusers, diffusers.DDPMScheduler())
    file = tmp_path / "d" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "d", BODY)


def test_other_networks_of_diffusers_are_refused(tmp_path: Path, diffusers: Any) -> None:
    pipeline(tmp_path / "d", diffusers, diffusers.DDPMScheduler())
    file = tmp_path / "d" / "unet" / "config.json"
    config = json.loads(file.read_text())
    for change, message in (
        ({"_class_name": "UNet2DConditionModel"}, "is of a UNet2DConditionModel; a UNet2DModel"),
        ({"class_embed_type": "timestep"}, "class_embed_type 'timestep' is not read"),
        ({"layers_per_block": 2}, "lacks .* weights of the network"),
        ({"block_out_channels": [8]}, "diffusers makes no UNet2DModel"),
    ):
        file.write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "d", BODY)
    file.write_text("[")
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        load(tmp_path / "d", BODY)


def test_without_diffusers_the_way_to_get_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel", **SIZES}))
    (tmp_path / "invdiff.toml").write_text(SIDECAR + '[schedule]\npredicts = "eps"\n')
    (tmp_path / "diffusion_pytorch_model.safetensors").touch()
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match=r'not installed: pip install "invdiff\[diffusers\]"'):
        load(tmp_path)


def test_the_first_layer_stays_in_full_precision(tmp_path: Path) -> None:
    """Under bfloat16 the input's noise of a small sigma survives."""
    bundle(tmp_path / "b", UNET, ddpm())
    prior = load(tmp_path / "b", BODY).to("cpu", torch.bfloat16)
    assert isinstance(prior, NetworkPrior) and isinstance(prior.network, Adapted)
    x = noisy(0.01)
    out = prior.denoise(x, torch.tensor(0.01))
    assert (
        out.dtype == torch.float32 and float((out - prior.to("cpu").denoise(x, torch.tensor(0.01))).abs().max()) < 0.01
    )
