"""Panels: truth, baselines, ours and the error, in a stated window."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from invdiff.files import whole_file
from invdiff.metrics import HU_WINDOW

CT_WINDOW = (-160.0, 240.0)  # HU: soft tissue, level 40, width 400
SHEET_COLUMNS = 8  # images in a row
SHEET_IMAGE_INCHES = 2.0
SHEET_LEAST_INCHES = 6.0  # so that the title fits
SHEET_GAP = 2  # pixels between images
ERROR_SHARE = 0.5  # the error picture spans this share of the window to either side


def panel(
    path: Path,
    rows: Mapping[str, Mapping[str, Tensor]],
    unit: str,
    window: tuple[float, float] | None = None,
    truth: str = "truth",
    title: str = "",
) -> None:
    """Write a PNG: one row of pictures for each of ``rows``, then the error of each row's last picture.

    Args:
        path: the PNG.
        rows: row label to (picture label to image (h w) in physical units). The last picture of a row is ours; where
            a row has ``truth``, its error is drawn beside it and the others' RMSE is in their titles.
        unit: of the images.
        window: least and greatest shown value; for HU soft tissue, else from each row's first picture.
        truth: label of the reference.
        title: above all.
    """
    from matplotlib.figure import Figure

    columns = max(len(row) + (truth in row) for row in rows.values())
    figure = Figure(figsize=(2.6 * columns, 2.9 * len(rows) + 0.4), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for line, (label, images) in zip(axes, rows.items(), strict=True):
        arrays = {name: image.detach().float().cpu().numpy() for name, image in images.items()}
        low, high = window or (
            CT_WINDOW if unit == "HU" else (0.0, float(np.quantile(next(iter(arrays.values())), 0.995)))
        )
        for axis, (name, array) in zip(line, arrays.items(), strict=False):
            axis.imshow(array, cmap="gray", vmin=low, vmax=high)
            note = ""
            if truth in arrays and name != truth:
                note = f"\nRMSE {_rmse(array, arrays[truth], unit):.4g} {unit}"
            axis.set_title((f"{label}: " if axis is line[0] and label else "") + name + note, fontsize=9)
        if truth in arrays:
            name, array = list(arrays.items())[-1]
            span = ERROR_SHARE * (high - low)
            axis = line[len(arrays)]
            shown = axis.imshow(array - arrays[truth], cmap="RdBu_r", vmin=-span, vmax=span)
            axis.set_title(f"error of {name}", fontsize=9)
            figure.colorbar(shown, ax=axis, shrink=0.7, label=unit)
    stated = f"window {low:g} to {high:g} {unit}" if window or unit == "HU" else f"unit {unit}"
    figure.suptitle(f"{title}  ({stated}; not for diagnosis)".strip(), fontsize=10)
    with whole_file(path) as part:
        figure.savefig(part, format="png", dpi=110)


class Picture(NamedTuple):
    """title: above it; image: (h w); window: least and greatest shown value; bar: what its colour bar says, "" none."""

    title: str
    image: Tensor
    window: tuple[float, float]
    colours: str = "gray"
    bar: str = ""


def pictures(path: Path, rows: Sequence[Sequence[Picture]], title: str = "") -> None:
    """Write a PNG: rows of pictures, each in its own window.

    Args:
        path: the PNG.
        rows: from above to below, each from left to right.
        title: above all.
    """
    from matplotlib.figure import Figure

    columns = max(len(row) for row in rows)
    figure = Figure(figsize=(2.9 * columns, 2.8 * len(rows) + 0.5), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for line, row in zip(axes, rows, strict=True):
        for axis, (name, image, (low, high), colours, bar) in zip(line, row, strict=False):
            shown = axis.imshow(image.detach().float().cpu().numpy(), cmap=colours, vmin=low, vmax=high)
            axis.set_title(name, fontsize=9)
            if bar:
                figure.colorbar(shown, ax=axis, shrink=0.7, label=bar)
    figure.suptitle(f"{title}  (not for diagnosis)".strip(), fontsize=10)
    with whole_file(path) as part:
        figure.savefig(part, format="png", dpi=110)


def sheet(path: Path, images: Tensor, unit: str, views: Mapping[str, tuple[float, float]], title: str = "") -> None:
    """Write a PNG: all images in rows, once in each of ``views``, the views one below the other.

    Args:
        path: the PNG.
        images: (n h w), in ``unit``.
        unit: of the images.
        views: name to least and greatest shown value.
        title: above all.
    """
    from matplotlib.figure import Figure

    tiles = _tiled(images.detach().float().cpu().numpy())
    across = max(SHEET_LEAST_INCHES, SHEET_IMAGE_INCHES * tiles.shape[1] // (images.shape[2] + SHEET_GAP))
    tall = across * tiles.shape[0] / tiles.shape[1] + 0.3
    figure = Figure(figsize=(across, tall * len(views) + 0.4), layout="constrained")
    for axis, (name, (low, high)) in zip(figure.subplots(len(views), squeeze=False).flat, views.items(), strict=True):
        axis.set_axis_off()
        axis.imshow(tiles, cmap="gray", vmin=low, vmax=high)
        axis.set_title(f"{name}: window {low:g} to {high:g} {unit}".rstrip(), fontsize=9)
    figure.suptitle(f"{title}  (not for diagnosis)".strip(), fontsize=10, wrap=True)
    with whole_file(path) as part:
        figure.savefig(part, format="png", dpi=110)


def _tiled(images: NDArray[np.float32]) -> NDArray[np.float32]:
    """(n h w) as one picture, at most ``SHEET_COLUMNS`` in a row; NaN, which is drawn white, between them."""
    rows = -(-len(images) // SHEET_COLUMNS)
    columns = -(-len(images) // rows)
    padded = np.full((rows * columns, images.shape[1] + SHEET_GAP, images.shape[2] + SHEET_GAP), np.nan, np.float32)
    padded[: len(images), SHEET_GAP:, SHEET_GAP:] = images
    h, w = padded.shape[1:]
    grid: NDArray[np.float32] = padded.reshape(rows, columns, h, w).swapaxes(1, 2).reshape(rows * h, columns * w)
    return grid


def _rmse(image: NDArray[np.float32], truth: NDArray[np.float32], unit: str) -> float:
    """As ``invdiff compare`` has it: HU below air count as air."""
    floor = HU_WINDOW[0] if unit == "HU" else -np.inf
    return float(np.sqrt(np.mean((image.clip(floor) - truth.clip(floor)) ** 2)))
