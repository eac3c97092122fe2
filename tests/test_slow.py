"""Full reconstructions with the shipped prior, and a training that learns. Run by: pytest -m slow"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydicom.data import get_testdata_file
from rich.console import Console

from invdiff.datasets import block_mean, read_volume
from invdiff.metrics import compare
from invdiff.pipelines.reconstruct import RunConfig, prior_of
from invdiff.pipelines.scans import operator_of
from invdiff.pipelines.simulate import Simulation, simulate
from invdiff.pipelines.train import Way, run
from invdiff.pipelines.training_data import DataConfig, read_training
from invdiff.priors import NoPrior, PriorInfo, load
from invdiff.priors.launch import Alone
from invdiff.priors.network import UNetConfig
from invdiff.priors.slices import Slices
from invdiff.priors.training import Denoising, TrainingConfig, start, train, validate
from invdiff.reconstruction import reconstruct
from invdiff.samplers import DDS, FBP, TV, REDDiff

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent
VAL = ROOT.parent / "shared" / "data" / "val" / "ct"
MR = VAL.parent / "mr"


def test_a_real_head_from_30_views_beats_tv() -> None:
    path = get_testdata_file("J2K_pixelrep_mismatch.dcm", download=False)
    scan, truth = simulate(read_volume(str(path)), Simulation(views=30, photons=1e5))
    operator, y, sigma_y = operator_of(scan)
    prior, _ = prior_of("ct", RunConfig())
    ours = compare(reconstruct(y, operator, prior, REDDiff(), sigma_y).x, truth.data, "HU").psnr
    tv = max(
        compare(reconstruct(y, operator, NoPrior(), TV(lam=w, lam_z=0.0), sigma_y).x, truth.data, "HU").psnr
        for w in (1e-4, 3e-4, 1e-3)
    )
    fbp = compare(reconstruct(y, operator, NoPrior(), FBP(), sigma_y).x, truth.data, "HU").psnr
    assert ours > tv + 1 > fbp + 4


@pytest.mark.skipif(
    not VAL.is_dir(), reason="the validation scans are not beside this checkout (../shared/data/val/ct)"
)
@pytest.mark.parametrize("sampler", [REDDiff(steps=30), DDS(steps=30)])
def test_neighbouring_chest_slices_from_20_views_beat_tv(sampler: REDDiff | DDS) -> None:
    volume = read_volume(VAL / "LungFCP-01-0001")
    four = type(volume)(volume.data[12:16], volume.affine, "HU")
    scan, truth = simulate(four, Simulation(views=20, photons=1e5))
    assert torch.equal(truth.data, block_mean(type(four)(four.data.clamp_min(-1000), four.affine, "HU"), 2).data)
    operator, y, sigma_y = operator_of(scan)
    prior, _ = prior_of("ct", RunConfig())
    ours = compare(reconstruct(y, operator, prior, sampler, sigma_y).x, truth.data, "HU").psnr
    tv = compare(reconstruct(y, operator, NoPrior(), TV(lam=1e-4, lam_z=1e-4), sigma_y).x, truth.data, "HU").psnr
    assert ours > tv + 1


def test_training_learns_to_denoise() -> None:
    """Constant images of two levels: the best denoiser averages over the image, far below the pixel's own noise."""
    images = torch.tensor([-0.5, 0.5])[:, None, None].expand(2, 32, 32).numpy() * 1000
    slices = Slices(images, torch.arange(2).numpy(), torch.ones(2).numpy())
    config = TrainingConfig(images=16_000, crops=(16,), batches=(16,), shares=(1.0,), warmup=200, ema=300, rate=2e-3)
    info = PriorInfo("toy", "HU", -1000.0, 1000.0, 0.01, 5.0, 0.5, (1.0, 1.0))
    sizes = UNetConfig(channels=(16, 32), blocks=(1, 1), norm_groups=8)
    losses = [s.loss for s in train(start(config, sizes), Denoising(slices, config, info), config, Alone(), None)]
    assert sum(losses[-20:]) < 0.1 * sum(losses[:20])


@pytest.mark.skipif(not MR.is_dir(), reason="the validation scans are not beside this checkout (../shared/data/val/mr)")
def test_fine_tuning_on_one_date_helps_at_another(tmp_path: Path) -> None:
    """Three scans of one patient, then the same patient's other date: every noise level's loss falls."""
    (tmp_path / "data").mkdir()
    for name in ("T1W", "T2W", "FLAIR"):
        (tmp_path / "data" / f"{name}.nii.gz").symlink_to(MR / "ljubljana_ms_patient01" / f"study1_{name}.nii.gz")
    config = tmp_path / "tune.toml"
    config.write_text((ROOT / "examples" / "fine-tune.toml").read_text() + "held_out = 0.0\n")
    run(config, tmp_path / "data", tmp_path / "run", False, Console(quiet=True), Way())
    before, after = load("brain-mr"), load(tmp_path / "run" / "prior")
    data = DataConfig(files="study2_*.nii.gz")
    other = read_training(MR / "ljubljana_ms_patient01", data, before.info.unit)
    losses = [validate(prior, other, before.info, torch.device("cpu")) for prior in (before, after)]
    gains = {sigma: 1 - losses[1][sigma] / losses[0][sigma] for sigma in losses[0]}
    assert min(gains.values()) > 0, gains
    assert sum(gains.values()) / len(gains) > 0.03, gains
