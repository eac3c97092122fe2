"""What ``invdiff reconstruct`` writes on how sure it is: maps beside the volume, and their pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from invdiff.calibration import covered
from invdiff.invented import Parts, Split
from invdiff.pipelines.pictures import CT_WINDOW, Picture, pictures
from invdiff.reconstruction import Result
from invdiff.uncertainty import Gather, Spread

SHARE = "1"  # the unit of a share
MOST_ERROR = 4.0  # standard deviations at which the picture of error over deviation ends
SHOWN = 0.995  # quantile of a map at which its picture ends
Beside = Callable[[str], Path]  # "-std.png" to recon-std.png


class Map(NamedTuple):
    """image: (s c h w); unit: its own."""

    image: Tensor
    unit: str


def map_names(gather: Gather | None, split: Split | None) -> list[str]:
    """Which maps a run will write, before it runs."""
    names = ["std", "low", "high"] if isinstance(gather, Spread) else []
    if split is not None:
        names += ["measured", "invented", "invented-share", *(["left-open"] if split.probes else [])]
    return names


def maps_of(result: Result, parts: Parts | None, unit: str) -> dict[str, Map]:
    """The maps of ``map_names``, on the CPU; those of a share within [0, 1]."""
    found: dict[str, tuple[Tensor | None, str]] = {
        "std": (result.std, unit), "low": (result.low, unit), "high": (result.high, unit)
    }  # fmt: skip
    if parts is not None:
        left_open = None if parts.left_open is None else parts.left_open.clamp(0, 1)
        found |= {"measured": (parts.measured, unit), "invented": (parts.invented, unit)}
        found |= {"invented-share": (parts.share, SHARE), "left-open": (left_open, SHARE)}
    return {name: Map(image.float().cpu(), own) for name, (image, own) in found.items() if image is not None}


def added_record(
    result: Result, parts: Parts | None, truth: Tensor | None
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """(tables of the record, notes for the user) on the samples and the split."""
    tables: dict[str, dict[str, Any]] = {k: dict(result.record[k]) for k in ("samples", "best") if k in result.record}
    notes = [text for table in tables.values() for text in table["meaning"]]
    if truth is not None and result.low is not None and result.high is not None:
        tables["samples"]["covered"] = covered((result.low.cpu(), result.high.cpu()), truth)
    if parts is not None:
        tables["invented"] = dict(parts.record)
        bound, wanted = parts.record["error_bound"], parts.record["tolerance"]
        if bound > wanted:
            notes.append(
                f"the split into measured and invented stopped after {parts.record['iterations']} iterations within "
                f"{bound:.2g} of the image's norm, not {wanted:g}: raise invented.iterations or invented.tolerance"
            )
    return tables, notes


def draw_maps(beside: Beside, maps: dict[str, Map], x: Tensor, unit: str, truth: Tensor | None) -> None:
    """The middle slice of the maps: ``-spread.png`` and ``-invented.png``, as far as there is something to show.

    Args:
        beside: where.
        maps: of ``maps_of``.
        x: the reconstruction (s c h w).
        unit: of it.
        truth: where known.
    """
    k = x.shape[0] // 2
    window = CT_WINDOW if unit == "HU" else (0.0, _end(x[k, 0]))
    title = f"slice {k + 1} of {x.shape[0]}, window {window[0]:g} to {window[1]:g} {unit}".rstrip()
    if "std" in maps:
        std = maps["std"].image[k, 0]
        row = [Picture("mean", x[k, 0], window), Picture("standard deviation", std, (0, _end(std)), "magma", unit)]
        if truth is not None:
            ratio = (x[k, 0] - truth[k, 0]).abs() / std.clamp_min(torch.finfo(std.dtype).tiny)
            row.append(Picture("|error| / deviation", ratio, (0, MOST_ERROR), "magma", "deviations"))
        pictures(beside("-spread.png"), [row], title)
    if "invented" in maps:
        measured, invented, share = (maps[n].image[k, 0] for n in ("measured", "invented", "invented-share"))
        row = parts_row(x[k, 0], measured, invented, share, window, unit)
        if "left-open" in maps:
            row.append(Picture("left open by the data", maps["left-open"].image[k, 0], (0, 1), "magma", "share"))
        pictures(beside("-invented.png"), [row], title)


def parts_row(
    x: Tensor, measured: Tensor, invented: Tensor, share: Tensor, window: tuple[float, float], unit: str, name: str = ""
) -> list[Picture]:
    """Pictures of a reconstruction, its parts and the share (h w), the first called ``name``."""
    span = _end(invented.abs())
    return [
        Picture(name or "reconstruction", x, window),
        Picture("measured", measured, window),
        Picture("invented", invented, (-span, span), "RdBu_r", unit),
        Picture("invented share of the local structure", share, (0, 1), "magma", "share"),
    ]


def _end(image: Tensor) -> float:
    """Where the grey scale of an image from 0 ends; 1 for an empty one."""
    return float(np.quantile(image.numpy(), SHOWN)) or 1.0
