"""The command line: simulate, reconstruct, compare, resume, and what bad input gets."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch

from invdiff.datasets import Measurements, Volume, read_measurements, read_volume, write_measurements, write_nifti
from invdiff.pipelines.compare import matched_truth
from invdiff.pipelines.reconstruct import Job, resolve
from invdiff.pipelines.scans import as_volume, operator_of
from invdiff.pipelines.simulate import Simulation, simulate, some_slices
from invdiff.priors import NoPrior
from invdiff.reconstruction import reconstruct
from invdiff.samplers import CGLS, DDS, TV


def body(shape: tuple[int, int, int] = (5, 40, 36), spacing: float = 2.0) -> Volume:
    """Soft tissue with a bone off the centre, in air; slices differ; NIfTI's usual axes with an oblique affine."""
    s, h, w = shape
    row, column = torch.meshgrid(torch.arange(h) - h / 2, torch.arange(w) - w / 2, indexing="ij")
    data = torch.full((s, 1, h, w), -1000.0)
    for k in range(s):
        data[k, 0][(row / 15) ** 2 + (column / 13) ** 2 < 1] = 40.0
        data[k, 0][(row - 4) ** 2 + (column + 5 - k / 2) ** 2 < 9] = 800.0
    c, t = np.cos(0.1), np.sin(0.1)
    affine = np.eye(4)
    affine[:3, :3] = np.array([[-c, t, 0], [-t, -c, 0], [0, 0, 1]]) @ np.diag([spacing, spacing, 3.0])
    affine[:3, 3] = [31.0, -17.0, 5.5]
    return Volume(data, affine, "HU")


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    path = tmp_path / "body.nii.gz"
    write_nifti(path, body())
    return path


def command(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "invdiff.pipelines.cli", *map(str, words)], capture_output=True, text=True
    )


def make_scan(tmp_path: Path, **how: Any) -> Path:
    scan, _ = simulate(body(), Simulation(**({"views": 12, "photons": 1e6} | how)))
    write_measurements(tmp_path / "scan.h5", [scan])
    return tmp_path / "scan.h5"


def test_the_whole_way(volume: Path, prior: str, tmp_path: Path, here: Any) -> None:
    scan, out = tmp_path / "scan.h5", tmp_path / "recon.nii.gz"
    assert here("simulate", volume, "--views", 60, "--photons", "1e6", "-o", scan)[0] == 0
    code, _ = here("reconstruct", scan, "--prior", prior, "--sampler", "tv", "-o", out,
                   "--truth", volume, "sampler.steps=40", "sampler.lam=1e-4", "sampler.lam_z=1e-4")  # fmt: skip
    assert code == 0
    ours, given = nibabel.load(out), nibabel.load(volume)
    np.testing.assert_allclose(ours.affine, given.affine, atol=1e-4)
    assert ours.shape == given.shape
    error = np.asarray(ours.dataobj) - np.asarray(given.dataobj)
    assert np.sqrt(np.mean(error**2)) < 60  # HU; FBP of the same scan has more than twice that
    record = json.loads((tmp_path / "recon.json").read_text())
    assert record["config"]["sampler"]["kind"] == "tv" and record["config"]["sampler"]["steps"] == 40
    assert record["seed"] == 0 and len(record["prior_sha256"]) == len(record["scan_sha256"]) == 64
    assert len(record["chi2"]) == 5 and record["versions"]["torch"] == torch.__version__
    assert (tmp_path / "recon.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.checkpoint*"))
    assert here("compare", out, volume)[0] == 0


def test_a_record_is_a_configuration_and_toml_does_the_same(prior: str, tmp_path: Path, here: Any) -> None:
    scan = make_scan(tmp_path)
    words = [
        "--prior",
        prior,
        "--sampler",
        "dds",
        "sampler.steps=3",
        "sampler.eta=0",
        "--seed",
        5,
        "--dtype",
        "float32",
    ]
    assert here("reconstruct", scan, "-o", tmp_path / "a.nii", *words)[0] == 0
    config = tmp_path / "job.toml"
    config.write_text(
        f'[input]\nscan = "{scan}"\n[prior]\nname = "{prior}"\n[output]\npath = "{tmp_path / "b.nii"}"\n'
        '[sampler]\nkind = "dds"\nsteps = 3\neta = 0\n[run]\nseed = 5\ndtype = "float32"\nchunk = 2\n'
    )
    assert here("reconstruct", config)[0] == 0
    a, b = (nibabel.load(tmp_path / n).get_fdata() for n in ("a.nii", "b.nii"))
    np.testing.assert_allclose(a, b, atol=0.3)  # HU: another chunk, other kernels
    assert here("reconstruct", config, "run.seed=6", "-o", tmp_path / "c.nii")[0] == 0
    assert np.abs(nibabel.load(tmp_path / "c.nii").get_fdata() - a).max() > 1


def test_dicom_out(prior: str, tmp_path: Path, here: Any) -> None:
    code, _ = here("reconstruct", make_scan(tmp_path), "--sampler", "fbp", "-o",
                   tmp_path / "series", "--prior", "none")  # fmt: skip
    assert code == 0
    assert here("reconstruct", tmp_path / "scan.h5", "--sampler", "fbp", "-o", tmp_path / "f.nii",
                "--prior", "none")[0] == 0  # fmt: skip
    series, nifti = read_volume(tmp_path / "series"), read_volume(tmp_path / "f.nii")
    np.testing.assert_allclose(series.affine, nifti.affine, atol=1e-3)
    assert float((series.data - nifti.data).abs().max()) < 1.0


def test_interrupt_leaves_a_checkpoint_that_resumes_bit_equal(prior: str, tmp_path: Path) -> None:
    scan = make_scan(tmp_path)
    words = ["reconstruct", str(scan), "--prior", prior, "--sampler", "dds", "sampler.steps=150", "run.every=3"]
    whole = [*words, "-o", str(tmp_path / "whole.nii")]
    cut = [*words, "-o", str(tmp_path / "cut.nii")]
    assert command(*whole).returncode == 0
    words = [sys.executable, "-m", "invdiff.pipelines.cli", *cut]
    # A suite started in the background ignores SIGINT, and its children would too
    run = subprocess.Popen(
        words, stderr=subprocess.PIPE, text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    )
    checkpoint = tmp_path / "cut.checkpoint"
    deadline = time.monotonic() + 60
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    said = run.communicate(timeout=60)[1]
    assert run.returncode == 130 and "--resume goes on" in " ".join(said.split())
    assert checkpoint.exists() and not (tmp_path / "cut.nii").exists()
    other = command(*cut, "--resume", "--seed", 9)
    assert other.returncode == 2 and "another run" in other.stderr
    done = command(*cut, "--resume")
    assert done.returncode == 0, done.stderr
    a, b = (np.asarray(nibabel.load(tmp_path / f"{n}.nii").dataobj) for n in ("whole", "cut"))
    assert np.array_equal(a, b)
    assert not checkpoint.exists()


def nan_volume(path: Path) -> None:
    data = np.zeros((6, 6, 6), np.float32)
    data[1, 2, 3] = np.nan
    nibabel.save(nibabel.Nifti1Image(data, np.eye(4)), path)


def bad_measurement(tmp_path: Path, **change: Any) -> Path:
    scan = read_measurements(make_scan(tmp_path))[0]
    write_measurements(tmp_path / "bad.h5", [replace(scan, **change)])
    return tmp_path / "bad.h5"


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("text as volume", "is not"),
        ("truncated gzip", "is not a whole NIfTI file"),
        ("nan voxels", "NaN or infinite"),
        ("unknown sampler", "no sampler 'magic'; there are: cgls, copaint, daps, ddim, ddnm, ddpm, dds"),
        ("unknown field", "dds has no field 'roh'; its fields are: steps, eta, cg_steps, rho"),
        ("wrong type", "dds.steps is 'many' (str); int is wanted"),
        ("wrong value", "DDS.eta is 3.0; a value in [0, 1] is wanted"),
        ("no such prior", "no prior 'nonesuch'"),
        ("degrees", "degrees"),
        ("shape", "the measurement has shape (5, 1, 11, "),
        ("prior unit", "is in a.u., the operator acts on 1/mm"),
        ("other checkpoint", "is truncated or not what torch.save writes"),
        ("no folder", "the folder"),
        ("output is a text file", "ends in '.txt'"),
        ("arc", "the arc is 400"),
        ("views", "views is 0"),
        ("slices", "slices '9:3'"),
        ("device", "device 'nonsense' is not available"),
        ("not a scan", "is not a whole file of measurements"),
        ("no prior to denoise", "no prior was given to denoise"),
    ],
)
def test_bad_input_gets_one_sentence_and_writes_nothing(
    case: str, said: str, volume: Path, prior: str, tmp_path: Path, here: Any
) -> None:
    scan = make_scan(tmp_path)
    out = tmp_path / "out.nii.gz"
    bad = tmp_path / "bad.nii.gz"
    go = ["reconstruct", scan, "-o", out, "--prior", prior]
    if case == "text as volume":
        bad.write_text("not a scan")
    elif case == "truncated gzip":
        bad.write_bytes(volume.read_bytes()[:-200])
    elif case == "nan voxels":
        nan_volume(bad)
    elif case == "other checkpoint":
        (tmp_path / "out.checkpoint").write_text("nothing")
    words: dict[str, list[Any]] = {
        "unknown sampler": [*go, "--sampler", "magic"],
        "unknown field": [*go, "sampler.roh=1"],
        "wrong type": [*go, "sampler.steps=many"],
        "wrong value": [*go, "sampler.eta=3.0"],
        "no such prior": [*go[:-1], "nonesuch"],
        "other checkpoint": [*go, "--resume"],
        "no folder": ["reconstruct", scan, "-o", tmp_path / "no" / "out.nii"],
        "output is a text file": ["reconstruct", scan, "-o", tmp_path / "out.txt"],
        "arc": ["simulate", volume, "-o", tmp_path / "s.h5", "--arc", 400],
        "views": ["simulate", volume, "-o", tmp_path / "s.h5", "--views", 0],
        "slices": ["simulate", volume, "-o", tmp_path / "s.h5", "--slices", "9:3"],
        "device": [*go, "--device", "nonsense"],
        "not a scan": ["reconstruct", volume, "-o", out],
        "no prior to denoise": [*go[:-1], "none"],
    }
    if case == "degrees":
        fields = dict(read_measurements(scan)[0].fields) | {"angles": tuple(float(15 * k) for k in range(12))}
        words[case] = ["reconstruct", bad_measurement(tmp_path, fields=fields), "-o", out, "--prior", prior]
    elif case == "shape":
        y = read_measurements(scan)[0].y[:, :, :11]
        words[case] = [
            "reconstruct",
            bad_measurement(tmp_path, y=y, sqrt_w=None, sigma_y=0.1),
            "-o",
            out,
            "--prior",
            prior,
        ]
    elif case == "prior unit":
        config = Path(prior) / "config.json"
        config.write_text(config.read_text().replace('"HU"', '"a.u."'))
        words[case] = go
    line = words.get(case, ["simulate", bad, "-o", tmp_path / "s.h5"])
    before = sorted(p.name for p in tmp_path.rglob("*"))
    code, message = here(*line)
    assert code == 2 and said in message and "Traceback" not in message, message
    assert message.startswith("invdiff: ") and message.count("invdiff: ") == 1
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_to(prior: str, tmp_path: Path, here: Any) -> None:
    scan, locked = make_scan(tmp_path), tmp_path / "locked"
    locked.mkdir(mode=0o500)
    code, message = here("reconstruct", scan, "-o", locked / "out.nii", "--prior", prior)
    assert code == 2 and "cannot be written" in message


def test_the_command_itself_exits_with_2(tmp_path: Path) -> None:
    done = command("simulate", tmp_path / "nothing.nii", "-o", tmp_path / "s.h5")
    assert done.returncode == 2 and "Traceback" not in done.stderr and "nothing.nii" in done.stderr


def test_simulation_measures_the_fine_grid() -> None:
    fine = body((2, 80, 72), spacing=1.0)
    scan, truth = simulate(fine, Simulation(views=9, reduce=2))
    assert tuple(truth.data.shape) == (2, 1, 40, 36) and truth.spacing_mm[1:] == pytest.approx((2.0, 2.0))
    operator, y, sigma_y = operator_of(scan)
    own = operator(0.0193 * (1 + truth.data / 1000))
    assert sigma_y == 0 and not torch.equal(y, own)
    assert float((y - own).norm() / own.norm()) < 0.02  # the same body, on another grid
    # Total mass does not depend on the view, nor on the grid
    mass = (y.sum(-1) * scan.fields["detector_mm"]).flatten()
    assert float(mass.std() / mass.mean()) < 0.02
    assert float(mass[0]) == pytest.approx(float(0.0193 * (1 + fine.data[0] / 1000).sum()), rel=0.01)


def test_photon_noise_is_white_after_weighting() -> None:
    volume = body((4, 40, 36))
    clean, _ = simulate(volume, Simulation(views=50))
    noisy, _ = simulate(volume, Simulation(views=50, photons=1e4))
    assert noisy.sqrt_w is not None
    z = noisy.sqrt_w * (noisy.y - clean.y)
    assert float(z.std()) == pytest.approx(1.0, abs=0.05)
    assert torch.equal(simulate(some_slices(volume, "1:3"), Simulation(views=50))[0].y, clean.y[1:3])


def test_truth_is_found_on_a_finer_grid_and_among_more_slices(tmp_path: Path) -> None:
    fine = body((6, 80, 72), spacing=1.0)
    write_nifti(tmp_path / "fine.nii", fine)
    _, coarse = simulate(some_slices(fine, "2:5"), Simulation(views=3, reduce=2))
    found = matched_truth(coarse, tmp_path / "fine.nii")
    torch.testing.assert_close(found.data, coarse.data)
    with pytest.raises(ValueError, match="different grids"):
        matched_truth(replace(coarse, affine=coarse.affine + np.eye(4, k=3) * 5), tmp_path / "fine.nii")


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("signs", list(itertools.product((1, -1), repeat=3)))
def test_the_world_stays_where_it_is(order: tuple[int, ...], signs: tuple[int, ...], tmp_path: Path) -> None:
    """48 axis orders and flips under an oblique affine, through read, simulate, reconstruct, write."""
    sizes, spacing = np.array([20, 23, 4])[list(order)], 2.0
    turn = np.linalg.qr(np.array([[1, 0.12, -0.05], [-0.1, 1, 0.08], [0.04, -0.07, 1]]))[0]
    affine = np.eye(4)
    affine[:3, :3] = (turn * np.sign(np.diag(turn)))[:, list(order)] * np.array(signs) * spacing
    affine[:3, 3] = [13.0, -41.0, 7.5]
    voxels = np.full(sizes, -1000.0, np.float32)
    landmark = tuple(int(n * share) for n, share in zip(sizes, (0.3, 0.6, 0.5), strict=True))
    voxels[landmark] = 1500.0
    nibabel.save(nibabel.Nifti1Image(voxels, affine), tmp_path / "in.nii")
    scan, _ = simulate(read_volume(tmp_path / "in.nii"), Simulation(views=40))
    operator, y, sigma_y = operator_of(scan)
    x = reconstruct(y, operator, NoPrior(), CGLS(steps=25), sigma_y).x
    write_nifti(tmp_path / "out.nii", as_volume(scan, x))
    out = nibabel.load(tmp_path / "out.nii")
    corners = np.array([[i, j, k, 1] for i in (0, sizes[0]) for j in (0, sizes[1]) for k in (0, sizes[2])]).T
    np.testing.assert_allclose(out.affine @ corners, affine @ corners, atol=1e-3)
    found = np.unravel_index(np.argmax(out.get_fdata()), out.shape)
    assert out.shape == tuple(sizes) and tuple(map(int, found)) == landmark


def test_resolve_lists_the_right_tables_and_fields(tmp_path: Path) -> None:
    job = resolve(tmp_path / "s.h5", {"output": {"path": "x.nii"}}, ["sampler.kind=tv", "sampler.lam=0.5"])
    assert job.sampler == TV(lam=0.5) and isinstance(job, Job)
    assert resolve(tmp_path / "s.h5", {"output": {"path": "x.nii"}}, []).sampler == DDS()
    with pytest.raises(ValueError, match="no table 'smapler'; there are: input, prior"):
        resolve(tmp_path / "s.h5", {"output": {"path": "x.nii"}}, ["smapler.rho=1"])
    with pytest.raises(ValueError, match="input has no field 'scna'"):
        resolve(tmp_path / "s.h5", {"output": {"path": "x.nii"}}, ["input.scna=1"])
    with pytest.raises(ValueError, match="no output was named"):
        resolve(tmp_path / "s.h5", {}, [])


def test_measurements_describe_their_operator() -> None:
    scan = Measurements(torch.zeros(2, 3), "nonesuch", {}, np.eye(4), "1/mm", sigma_y=0.0)
    with pytest.raises(ValueError, match=r"no operator 'nonesuch'; there are: .*fan.*parallel"):
        operator_of(scan)
    with pytest.raises(ValueError, match="cannot be made from its fields"):
        operator_of(replace(scan, kind="parallel", fields={"wings": 2}))
