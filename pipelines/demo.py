"""``invdiff demo``: real scans that come with the dependencies, reconstructed here; nothing is downloaded."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from invdiff.datasets import read_volume, write_nifti
from invdiff.files import whole_file
from invdiff.metrics import compare
from invdiff.noise import KeyedNoise
from invdiff.operators import CartesianMRI, KnownPhase
from invdiff.operators.mri.calibration import image_scale
from invdiff.operators.mri.masks import uniform_mask
from invdiff.operators.mri.simulate import simulate_kspace
from invdiff.pipelines.output import versions
from invdiff.pipelines.pictures import panel
from invdiff.pipelines.reconstruct import RunConfig, prior_of
from invdiff.pipelines.scans import operator_of
from invdiff.pipelines.simulate import Simulation, simulate
from invdiff.priors import NoPrior
from invdiff.reconstruction import reconstruct
from invdiff.samplers import DDS, FBP, TV, REDDiff

CT_FILES = {"head": "J2K_pixelrep_mismatch.dcm", "spine": "CT_small.dcm"}  # in pydicom's wheel
MR_FILE = "example4d.nii.gz"  # in nibabel's wheel
VIEWS, PHOTONS = 30, 1e5
ACCELERATION, CENTRE = 3, 0.12  # of the MR sampling: one line in three, and this share of the middle
MR_SIGMA = 0.01  # noise of k-space, of what is 1 for the prior
Progress = Callable[[Iterator[Any], int, str], Iterator[Any]]


def run(out: Path, console: Console, progress: Progress) -> None:
    """Write a picture, the volumes and the numbers of each example into ``out``.

    Raises:
        ValueError: ``out`` cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{out} cannot be made: {error.strerror}") from error
    began = time.monotonic()
    numbers: dict[str, Any] = {
        "versions": versions(),
        "ct": _ct(out, console, progress),
        "mr": _mr(out, console, progress),
    }
    with whole_file(out / "demo.json") as part:
        part.write_text(json.dumps(numbers, indent=2) + "\n")
    console.print(f"done in {time.monotonic() - began:.0f} s: pictures and volumes are in {out}")


def _ct(out: Path, console: Console, progress: Progress) -> dict[str, Any]:
    from pydicom.data import get_testdata_file

    prior, _ = prior_of("ct", RunConfig())
    rows: dict[str, dict[str, torch.Tensor]] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for name, file in CT_FILES.items():
        path = get_testdata_file(file, download=False)
        if path is None:
            raise ValueError(f"pydicom's test file {file} is not installed; reinstall pydicom")
        scan, truth = simulate(read_volume(str(path)), Simulation(views=VIEWS, photons=PHOTONS))
        h, w = truth.data.shape[2:]
        console.print(f"CT, {name}: pydicom's {file}, {VIEWS} views of {h} x {w} pixels, {PHOTONS:g} photons a ray")
        operator, y, sigma_y = operator_of(scan)
        rows[name], numbers[name] = {"truth": truth.data[0, 0]}, {}
        for label, sampler, used in (
            ("FBP", FBP(), NoPrior()),
            ("TV", TV(lam_z=0.0), NoPrior()),
            ("DDS", DDS(lam=0.0), prior),
            ("RED-Diff", REDDiff(), prior),
        ):
            x = reconstruct(y, operator, used, sampler, sigma_y, progress=_bar(progress, sampler, label)).x
            rows[name][label] = x[0, 0]
            numbers[name][label] = compare(x, truth.data, "HU")._asdict()
            found = numbers[name][label]
            console.print(f"  {label:9} PSNR {found['psnr']:.2f} dB, RMSE {found['rmse']:.1f} HU")
        write_nifti(out / f"ct-{name}.nii.gz", replace(truth, data=x))
    panel(out / "ct.png", rows, "HU", title=f"{VIEWS} views over 180 degrees, {PHOTONS:g} photons a ray")
    return numbers


def _mr(out: Path, console: Console, progress: Progress) -> dict[str, Any]:
    import nibabel

    prior, _ = prior_of("brain-mr", RunConfig())
    volume = read_volume(Path(nibabel.__file__).parent / "tests" / "data" / MR_FILE)
    volume = replace(volume, data=volume.data[:, :1].clone())
    s, _, h, w = volume.data.shape
    one = image_scale(volume.data)  # is 1 in the prior's unit
    console.print(f"MR: nibabel's {MR_FILE}, {s} slices, one k-space line in {ACCELERATION}, {MR_SIGMA:.0%} noise")
    coil = CartesianMRI(uniform_mask((h, w), ACCELERATION, CENTRE, readout="w"), slices=s)
    y = simulate_kspace(volume.data / one, coil, sigma=MR_SIGMA, noise=KeyedNoise(0))
    operator = coil @ KnownPhase(torch.zeros(h, w), slices=s)
    none = NoPrior("a.u.", 0.0, 1.0)
    pictures: dict[str, torch.Tensor] = {"truth": volume.data[s // 2, 0]}
    numbers: dict[str, Any] = {}
    for label, sampler, used in (
        ("zero-filled", FBP(), none),
        ("TV", TV(lam=2e-3, lam_z=2e-3), none),
        ("RED-Diff", REDDiff(steps=30), prior),
    ):
        bar = _bar(progress, sampler, label)
        x = one * reconstruct(y, operator, used, sampler, MR_SIGMA, progress=bar).x
        pictures[label] = x[s // 2, 0]
        numbers[label] = compare(x, volume.data, "a.u.")._asdict()
        console.print(f"  {label:11} PSNR {numbers[label]['psnr']:.2f} dB")
    write_nifti(out / "mr-brain.nii.gz", replace(volume, data=x))
    panel(out / "mr.png", {"brain": pictures}, "a.u.", title=f"one k-space line in {ACCELERATION}")
    return numbers


def _bar(progress: Progress, sampler: Any, label: str) -> Callable[[Iterator[Any]], Iterator[Any]]:
    """The progress bar of one sampler, as ``reconstruct`` wants it."""
    return lambda states: progress(states, sampler.steps, label)
