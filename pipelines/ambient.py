"""The folder of an ambient prior: network and description, and the scan through whose operator it sees images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from invdiff.datasets import Measurements, write_measurements
from invdiff.measured.ambient import AmbientMethod, AmbientPrior
from invdiff.measured.model import method_of, read_network
from invdiff.pipelines.measured_data import collect
from invdiff.pipelines.mri import MRIConfig
from invdiff.priors.description import Description

SCAN = "scan.h5"


def keep_scan(folder: Path, scan: Measurements) -> None:
    """Write a scan into the ``folder`` of a model, without its measurements: those are nobody's to publish."""
    write_measurements(folder / SCAN, [replace(scan, y=torch.zeros_like(scan.y), history={}, source_sha256="")])


def read(folder: Path, description: Description | None) -> AmbientPrior | None:
    """A folder that a training on measurements exported with the method ``ambient``; None for another folder.

    Raises:
        ValueError: a description, which the folder has itself; or files that do not fit each other.
    """
    if method_of(folder) != AmbientMethod.name:
        return None
    network, info, sha256 = read_network(folder, description)
    mri = MRIConfig(channels="complex") if network.channels == 2 else None
    example = collect([folder / SCAN], info, network.channels, mri).examples[0]
    return AmbientPrior(network, info, example, None, sha256)
