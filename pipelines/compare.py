"""``invdiff compare``: a reconstruction against the volume it should be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from invdiff.datasets import Volume, block_mean, pad_to_multiple, read_volume
from invdiff.metrics import Comparison, compare

PLACE_MM = 0.05  # corners of matching grids lie this near


def matched_truth(image: Volume, path: Path) -> Volume:
    """The volume at ``path``, averaged in the plane and cut to the slices of ``image``.

    Raises:
        ValueError: another unit, or a grid that whole blocks of pixels and whole slices do not bring to the image's.
    """
    truth = read_volume(path)
    if truth.unit != image.unit:
        raise ValueError(f"{path} is in {truth.unit}, the reconstruction in {image.unit}")
    ratio = image.spacing_mm[1] / truth.spacing_mm[1]
    factor = round(ratio)
    if factor < 1 or abs(ratio - factor) > 0.01:
        raise ValueError(
            f"{path} has pixels of {truth.spacing_mm[1]:g} mm, the reconstruction of {image.spacing_mm[1]:g} mm: "
            "a whole multiple is wanted"
        )
    air = float(truth.data.min())
    coarse = block_mean(pad_to_multiple(truth, factor, max(air, -1000.0) if truth.unit == "HU" else air), factor)
    start = np.linalg.solve(coarse.affine, image.affine @ np.array([0.0, 0.0, 0.0, 1.0]))[2]
    first, count = round(float(start)), image.data.shape[0]
    cut = coarse.data[max(first, 0) : first + count]
    affine = coarse.affine.copy()
    affine[:, 3] += first * affine[:, 2]
    if cut.shape != image.data.shape or corner_distance(affine, image.affine, image.data.shape) > PLACE_MM:
        raise ValueError(
            f"{path} and the reconstruction lie on different grids: {tuple(coarse.data.shape)} and "
            f"{tuple(image.data.shape)} (s c h w), or at different places"
        )
    return replace(coarse, data=cut, affine=affine)


def corner_distance(a: Any, b: Any, shape: tuple[int, ...]) -> float:
    """Largest distance in mm between the corners of a grid (s c h w) under two affines."""
    s, _, h, w = shape
    corners = np.array([[x, y, z, 1] for x in (0, w - 1) for y in (0, h - 1) for z in (0, s - 1)], dtype=float).T
    return float(np.abs(a @ corners - b @ corners).max())


def run(image: Path, truth: Path) -> Comparison:
    """Compare two volumes on disk."""
    ours = read_volume(image)
    if ours.unit != "HU" and read_volume(truth).unit == "HU":
        ours = replace(ours, unit="HU")  # a NIfTI does not say its unit; the reference does
    return compare(ours.data, matched_truth(ours, truth).data, ours.unit)


def table(result: Comparison, title: str) -> Table:
    """The numbers as a table, with the data range stated."""
    out = Table(title=title, caption=f"data range {result.data_range:g} {result.unit}; SSIM window 7 x 7")
    for name in ("measure", "volume", *result.psnr_planes):
        out.add_column(name, justify="left" if name == "measure" else "right")

    def shown(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    out.add_row("PSNR, dB", f"{result.psnr:.2f}", *(f"{v:.2f}" for v in result.psnr_planes.values()))
    out.add_row("SSIM", "", *(shown(v) for v in result.ssim_planes.values()))
    out.add_row("NMSE", f"{result.nmse:.5f}")
    out.add_row(f"RMSE, {result.unit}", f"{result.rmse:.2f}")
    out.add_row(f"bias, {result.unit}", f"{result.bias:+.2f}")
    return out
