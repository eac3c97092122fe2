"""GRAPPA: lines that were not sampled, interpolated from their neighbours in all coils."""

from __future__ import annotations

import torch
from torch import Tensor

from invdiff.operators.mri.calibration import find_acs


def grappa(kspace: Tensor, mask: Tensor, kernel: tuple[int, int] = (5, 5), ridge: float = 0.01) -> Tensor:
    """k-space completed by GRAPPA (Griswold et al. 2002), through pygrappa: kernels fitted to the fully sampled centre.

    Its noise is no longer white, and is largest where most was interpolated: not for samplers that weigh the data.

    Args:
        kspace: (s coil h w) complex, at least 2 coils, 0 where not sampled.
        mask: bool, (h w) or (s h w), best a regular one: each pattern of neighbours has its kernel.
        kernel: samples (h w) that a new one is made of; odd.
        ridge: Tikhonov weight of the fit, over the norm of the calibration matrix.

    Returns:
        (s coil h w), the samples as they were.

    Raises:
        ValueError: one coil, an even kernel, a centre smaller than the kernel, or pygrappa is not installed.
    """
    try:
        from pygrappa import mdgrappa
    except ImportError as error:
        raise ValueError("GRAPPA needs pygrappa: pip install invdiff[mri]") from error
    if kspace.ndim != 4 or kspace.shape[1] < 2:
        raise ValueError(f"k-space is {tuple(kspace.shape)}; (s coil h w) of at least 2 coils is wanted")
    if min(kernel) < 1 or any(k % 2 == 0 for k in kernel):
        raise ValueError(f"the kernel is {kernel}; odd numbers of samples are wanted")
    centre = find_acs(mask).of(kspace)
    if any(n < k for n, k in zip(centre.shape[2:], kernel, strict=True)):
        raise ValueError(
            f"the fully sampled centre is {tuple(centre.shape[2:])}; at least the kernel {kernel} is wanted"
        )
    filled = [
        torch.from_numpy(mdgrappa(one.numpy(), acs.numpy(), kernel_size=kernel, coil_axis=0, lamda=ridge))
        for one, acs in zip(kspace.cpu(), centre.cpu(), strict=True)
    ]
    return torch.stack(filled).to(kspace)
