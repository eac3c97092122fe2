"""finufft (extra ``[mri]``) behind the calls of our own gridding, for trajectories whose matrices would be large."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from invdiff.operators.mri.nufft import check_accuracy
from invdiff.operators.sparse import MatchedProduct

COARSE = 1.25  # oversampling: six times as fast as finufft's own 2 at 256^2
FINE = 2.0
COARSE_REACHES = {torch.float32: 2e-5, torch.float64: 1e-8}  # finest accuracy of the coarse grid


class Finufft:
    """The transform of one trajectory, on the CPU; data on other devices go there and back.

    Args:
        trajectory: (samples 2), row and column frequency in cycles per pixel.
        size: (h w) of the image.
        dtype: float32 or float64.
        accuracy: relative error.

    Raises:
        ValueError: finufft is not installed, or an accuracy that the dtype cannot hold.
    """

    def __init__(self, trajectory: Tensor, size: tuple[int, int], dtype: torch.dtype, accuracy: float) -> None:
        try:
            import finufft
        except ImportError as error:
            raise ValueError("finufft is not installed; engine='own' or pip install invdiff[mri] is wanted") from error
        check_accuracy(accuracy, dtype)
        self._factor = 1 / math.sqrt(math.prod(size))
        points = [(2 * math.pi * trajectory[:, a].cpu().double()).to(dtype).numpy().copy() for a in range(2)]
        how = {
            "dtype": "complex64" if dtype == torch.float32 else "complex128",
            "upsampfac": COARSE if accuracy >= COARSE_REACHES[dtype] else FINE,
            "nthreads": torch.get_num_threads(),
        }
        self._plans = [finufft.Plan(kind, size, 1, accuracy, sign, **how) for kind, sign in ((2, -1), (1, 1))]
        for plan in self._plans:
            plan.setpts(*points)

    def product(self, v: Tensor, transposed: bool) -> Tensor:
        """(k h w) -> (k samples), or back."""
        plan, source = self._plans[transposed], v.detach().resolve_conj().cpu().contiguous()
        done = [torch.from_numpy(plan.execute(one.numpy())) for one in source]
        return torch.stack(done).to(v.device) * self._factor

    def forward(self, images: Tensor) -> Tensor:
        """Samples of the centred orthonormal Fourier transform: (k h w) complex -> (k samples)."""
        out: Tensor = MatchedProduct.apply(images, self, False)
        return out

    def adjoint(self, samples: Tensor) -> Tensor:
        """The adjoint of ``forward``: (k samples) -> (k h w)."""
        out: Tensor = MatchedProduct.apply(samples, self, True)
        return out
