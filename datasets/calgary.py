"""Calgary-Campinas raw multi-channel brains (Souza et al. 2018; MC-MRRec challenge): HDF5, hybrid (x, ky, kz)."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from invdiff.datasets.fastmri import load_keys
from invdiff.datasets.kspace import KSpace
from invdiff.datasets.orientation import centred_affine
from invdiff.files import existing_file, sha256_of

SPACING_MM = (1.0, 1.0, 1.0)  # of all its volumes
MEASURED = 0.85  # of kz: the rest was zero-filled by the scanner, and is not exactly zero in the files


def read_calgary_campinas(path: str | Path, measured: float = MEASURED) -> KSpace:
    """Slices (s = x) of 2D k-space, rows ky and columns kz.

    The file holds (x, ky, kz, 2 coils), real and imaginary parts in turn, already transformed along x. The zero
    frequency is in the middle (the challenge's masks are centred discs in the file's order), and the challenge takes
    the magnitude of numpy's ``ifft2`` without shifts, which has the head in the middle too: so each sample gets the
    phase that moves the image by half the field of view. The scanner filled the last 15 % of kz with zeros, which are
    not exactly zero in the files. Nothing is known of the volume's place or orientation but that its voxels are 1 mm
    wide.

    Args:
        path: a file with the key kspace.
        measured: part of kz that was measured; 1 takes all that is not zero.

    Raises:
        ValueError: no HDF5 or a truncated file, no key kspace, another shape, a part that is not in (0, 1], anything
            that ``KSpace`` refuses.
    """
    path = existing_file(path)
    values = load_keys(path, ("kspace",))[0]["kspace"]
    if values.ndim != 4 or values.shape[3] % 2 or values.dtype.kind != "f" or 0 in values.shape:
        raise ValueError(
            f"{path.name}: kspace is {values.dtype} of {values.shape}; real (x, ky, kz, 2 coils) is wanted"
        )
    if not 0 < measured <= 1:
        raise ValueError(f"{measured} of kz was measured; a part in (0, 1] is wanted")
    values = values.astype(np.float32)
    data = torch.complex(*(torch.from_numpy(values[..., n::2].copy()) for n in (0, 1))).permute(0, 3, 1, 2)
    s, _, h, w = data.shape
    h_phase, w_phase = (_half_view(n) for n in (h, w))
    data = data * (h_phase[:, None] * w_phase)
    data[..., math.ceil(w * measured) :] = 0
    sampled = (data != 0).any(1)
    mask = sampled[0] if bool((sampled == sampled[:1]).all()) else sampled
    source = {"name": path.name, "format": "calgary-campinas", "sha256": sha256_of([path])}
    return KSpace(data=data, mask=mask, affine=centred_affine((s, h, w), SPACING_MM), source=source)


def _half_view(n: int) -> Tensor:
    """Phases (n,) that move an image of n pixels by n // 2: +1 and -1 in turn where n is even."""
    turns = (torch.arange(n, dtype=torch.float64) - n // 2) * (n // 2) / n
    return torch.exp(2j * math.pi * turns).to(torch.complex64)
