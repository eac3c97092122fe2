"""Inpainting with and without steering: seven masks, four samplers, the same prior and the same seeds.

    python benchmarks/inpainting.py --data VAL --prior brain-mr -o table.json [--slices 4] [--steps 30]
        [--stops none,5,codes:25]

A stop is "none", a sigma_stop of steering by cells, or "codes:" and one of steering by codes. Prints the table as
Markdown; what is in the JSON file already is not computed again. Every number is of the hole alone but HaarPSI and the
feature distance, which are of the composited image.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage, stats
from torch import Tensor

from invdiff.circuits import codes
from invdiff.circuits import load as load_circuit
from invdiff.datasets import block_mean, pad_to_multiple, read_nifti, read_volume
from invdiff.files import whole_file
from invdiff.noise import KeyedNoise
from invdiff.operators import Mask
from invdiff.priors import Chunked, NetworkPrior, Steered, SteeredByCodes, load
from invdiff.priors.model import fast_dtype
from invdiff.protocols import Problem
from invdiff.run import iterate, last
from invdiff.samplers import DDNM, DDS, CoPaint, RePaint

SIZE = 256
SIGMA_MAX, SIGMA_MIN = 100.0, 0.02
QUANTILE = 0.999
CODES = "codes:"  # before the sigma_stop of steering by codes
MR = ("sub-03", "sub-14", "sub-27", "sub-52")
CT = ("LungFCP-01-0001", "C3L-00189", "totalsegmentator_dicom_j2k")
PLACES = (0.42, 0.5, 0.58, 0.35, 0.65)  # of slices in a volume, as shares of its depth
HAARPSI_C, HAARPSI_ALPHA = 30.0, 4.2  # Reisenhofer et al. 2018, for grey values up to 255
FEATURE_SIGMA = 0.05  # noise level that the encoder is told
METRICS = {"psnr": "PSNR, dB", "ssim": "SSIM", "haarpsi": "HaarPSI", "feature": "feature distance", "border": "border"}


def slices_of(data: Path, prior: str, count: int) -> Tensor:
    """Slices (n 1 256 256) in the prior's unit, one volume after the other."""
    found: list[list[Tensor]] = []
    for name in CT if prior == "ct" else MR:
        if prior == "ct":
            volume = read_volume(data / "ct" / name)
            x = block_mean(pad_to_multiple(volume, 2, -1000.0), 2).data
            background = -1000.0
        else:
            volume = read_nifti(data / "mr" / f"ds002748/{name}_T1w.nii.gz")
            x, background = volume.data / float(np.quantile(volume.data[volume.data != 0].numpy(), QUANTILE)), 0.0
        found.append([middle(x[int(p * len(x))][None], background) for p in PLACES])
    rows = [row[k] for k in range(len(PLACES)) for row in found]
    return torch.cat(rows[:count])


def middle(x: Tensor, background: float) -> Tensor:
    """Cropped or padded to 256 x 256 round the middle."""
    h, w = x.shape[2:]
    top, left = (h - SIZE) // 2, (w - SIZE) // 2
    pad = (-left, SIZE - w + left, -top, SIZE - h + top)
    return torch.nn.functional.pad(x, pad, value=background)


def holes(x: NDArray[np.float32], seed: int) -> dict[str, NDArray[np.bool_]]:
    """Seven masks (h w) of what is missing; ``x`` (h w), 0 to 1, says where a lesion can be."""
    rng = np.random.default_rng(seed)
    row, column = np.mgrid[:SIZE, :SIZE]
    centre, radius = (SIZE - 1) / 2, np.hypot(row - (SIZE - 1) / 2, column - (SIZE - 1) / 2)
    inside = ndimage.binary_erosion(ndimage.binary_fill_holes(ndimage.gaussian_filter(x, 3) > 0.1), iterations=12)
    noise = ndimage.gaussian_filter(rng.normal(size=(SIZE, SIZE)), 7)
    lesion = inside & (noise > np.quantile(noise[inside], 0.93)) if inside.any() else radius < 12
    strokes = np.zeros((SIZE, SIZE), bool)
    while strokes.mean() < 0.2:
        at, angle, width = rng.uniform(40, SIZE - 40, 2), rng.uniform(0, 2 * np.pi), rng.uniform(4, 9)
        for _ in range(24):
            angle += rng.normal(0, 0.35)
            at = (at + 5 * np.array([np.sin(angle), np.cos(angle)])).clip(0, SIZE - 1)
            strokes |= np.hypot(row - at[0], column - at[1]) < width
    return {
        "half": column > centre,
        "box": (abs(row - centre) < 48) & (abs(column - centre) < 48),
        "stripes": (column // 16) % 2 == 1,
        "expanding": (abs(row - centre) > 48) | (abs(column - centre) > 48),
        "free-form": strokes,
        "lesion": lesion,
        "truncated": radius > 64,
    }


def samplers(steps: int) -> dict[str, Any]:
    """Four ways, of about as many denoiser evaluations but for CoPaint's, which are differentiated too."""
    ends = {"sigma_max": SIGMA_MAX, "sigma_min": SIGMA_MIN}
    return {
        "DDIM projection": DDNM(steps=steps, eta=0.0, cg_steps=1, **ends),
        "RePaint": RePaint(levels=max(4, steps // 2), jump=2, repeats=2, cg_steps=1, **ends),
        "CoPaint": CoPaint(steps=max(2, steps // 2), descents=1, rate=0.1, **ends),
        "DDS": DDS(steps=steps, cg_steps=1, lam=0.0, anchor=0.0, **ends),
    }


def haarpsi(a: Tensor, b: Tensor) -> float:
    """Haar wavelet-based perceptual similarity of images (h w) of 0 to 255; 1 is equal."""
    a, b = (torch.nn.functional.avg_pool2d(v[None, None], 2) for v in (a, b))

    def coefficients(v: Tensor) -> Tensor:
        out = []
        for scale, turned in itertools.product((1, 2, 3), (False, True)):
            n = 2**scale
            kernel = torch.ones(n, n) / n
            kernel[: n // 2] *= -1
            padded = torch.nn.functional.pad(v, (n // 2 - 1, n // 2) * 2)
            out.append(torch.nn.functional.conv2d(padded, (kernel.T if turned else kernel)[None, None])[0, 0].abs())
        return torch.stack(out).view(3, 2, *out[0].shape)

    p, q = coefficients(a), coefficients(b)
    like = ((2 * p * q + HAARPSI_C) / (p.square() + q.square() + HAARPSI_C))[:2].mean(0)
    weight = torch.maximum(p[2], q[2])
    mean = float((torch.sigmoid(HAARPSI_ALPHA * like) * weight).sum() / weight.sum())
    return (np.log(mean / (1 - mean)) / HAARPSI_ALPHA) ** 2


def features(prior: NetworkPrior, x: Tensor) -> list[Tensor]:
    """Of the prior's own encoder, each level normalised over its channels: x (1 1 h w) in prior units."""
    kept: list[Tensor] = []
    network: Any = prior.network
    hooks = [b.register_forward_hook(lambda _m, _i, o: kept.append(o[0])) for b in network.unet.down_blocks]
    prior.denoise(x, torch.tensor(FEATURE_SIGMA))
    for hook in hooks:
        hook.remove()
    return [torch.nn.functional.normalize(f.float(), dim=1) for f in kept]


def judged(x: Tensor, truth: Tensor, hole: Tensor, prior: NetworkPrior) -> dict[str, float]:
    """Composited x and truth (1 1 h w) in prior units, hole (h w)."""
    from skimage.metrics import structural_similarity

    a, b = ((v[0, 0].clamp(-1, 1) + 1).numpy() / 2 for v in (x, truth))
    marked = hole.numpy()
    error = float(np.mean((a - b)[marked] ** 2))
    _, similar = structural_similarity(b, a, win_size=7, data_range=1.0, full=True)
    jumps = []
    for axis in (0, 1):
        across = np.diff(marked.astype(int), axis=axis) != 0
        jumps.append((np.diff(a, axis=axis) - np.diff(b, axis=axis))[across])
    pairs = zip(features(prior, x), features(prior, truth), strict=True)
    return {
        "psnr": -10 * np.log10(error),
        "ssim": float(similar[marked].mean()),
        "haarpsi": haarpsi(*(torch.from_numpy(255 * v) for v in (a, b))),
        "feature": float(sum((f - g).square().sum(1).mean() for f, g in pairs)),
        "border": float(np.sqrt(np.mean(np.concatenate(jumps) ** 2))),
    }


def runs(arguments: argparse.Namespace) -> Iterator[tuple[str, Callable[[], dict[str, float]]]]:
    """The name of each run, and how it is made."""
    prior = load(arguments.prior).to("cpu", fast_dtype("cpu"))
    circuit = load_circuit(arguments.circuit or arguments.prior)
    over_codes = codes.load(arguments.codes or f"{arguments.prior}-codes") if CODES in arguments.stops else None
    images = prior.info.in_prior_units(slices_of(arguments.data, arguments.prior, arguments.slices))
    kinds = {k: s for k, s in samplers(arguments.steps).items() if k in arguments.samplers.split(",")}
    for number, truth in enumerate(images.split(1)):
        marked = holes((truth[0, 0].numpy() + 1) / 2, number)
        for name, kind, stop in itertools.product(arguments.masks.split(","), kinds, arguments.stops.split(",")):
            hole, sampler = torch.from_numpy(marked[name]), kinds[kind]

            def made(
                truth: Tensor = truth, hole: Tensor = hole, sampler: Any = sampler, stop: str = stop, n: int = number
            ) -> dict[str, float]:
                operator = Mask(~hole, truth.shape)
                y = operator.forward(truth)
                used: Any = Chunked(prior, 1)
                known = ~hole[None, None]
                if stop.startswith(CODES) and over_codes is not None:
                    level = float(stop.removeprefix(CODES))
                    used = SteeredByCodes(used, over_codes, y, known, KeyedNoise(0, n), level, fast_dtype("cpu"))
                elif stop != "none":
                    used = Steered(used, circuit, y, known, float(stop))
                began = time.process_time()
                x = last(iterate(sampler, Problem(operator, y, 0.0, used, KeyedNoise(0, n)))).x
                seconds = time.process_time() - began
                x = torch.where(hole, x, truth)
                return {**judged(x, truth, hole, prior), "cpu_s": seconds}

            yield f"{number}|{name}|{kind}|{stop}", made


def table(found: dict[str, dict[str, float]], by: int = 2) -> str:
    """Means, and the mean change by steering with its 95 % interval over slices and masks, by sampler or mask."""
    keys = [k.split("|") for k in found]
    lines = ["| | sigma_stop | n | " + " | ".join(METRICS.values()) + " |", "|---|---|---|" + "---|" * len(METRICS)]
    for group in dict.fromkeys(k[by] for k in keys):
        for stop in dict.fromkeys(k[3] for k in keys):
            ours = [k for k in keys if k[by] == group and k[3] == stop and "|".join([*k[:3], "none"]) in found]
            if not ours:
                continue
            cells = []
            for metric in METRICS:
                values = np.array([found["|".join(k)][metric] for k in ours])
                plain = np.array([found["|".join([*k[:3], "none"])][metric] for k in ours])
                change = values - plain
                half = stats.t.ppf(0.975, len(change) - 1) * stats.sem(change) if len(change) > 1 else np.nan
                said = f"{values.mean():.4g}"
                cells.append(said if stop == "none" else f"{said} ({change.mean():+.3g} ± {half:.2g})")
            lines.append(f"| {group} | {stop} | {len(ours)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def every(runs: Iterator[tuple[str, Callable[[], dict[str, float]]]], out: Path) -> dict[str, dict[str, float]]:
    """The numbers of all runs; those that the JSON file ``out`` holds are not made again, the others are added."""
    found: dict[str, dict[str, float]] = json.loads(out.read_text()) if out.exists() else {}
    for name, made in runs:
        if name not in found:
            found[name] = made()
            print(name, {k: round(v, 4) for k, v in found[name].items()}, flush=True)
            with whole_file(out) as part:
                part.write_text(json.dumps(found))
    return found


def main() -> None:
    """Run what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--prior", default="brain-mr")
    parser.add_argument("--circuit", default="")
    parser.add_argument("--codes", default="", help="a circuit over codes, PRIOR-codes if not given")
    parser.add_argument("--slices", type=int, default=4)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--masks", default="half,box,stripes,expanding,free-form,lesion,truncated")
    parser.add_argument("--samplers", default="DDIM projection,RePaint,CoPaint,DDS")
    parser.add_argument("--stops", default="none,5")
    parser.add_argument("-o", "--out", type=Path, required=True)
    arguments = parser.parse_args()
    found = every(runs(arguments), arguments.out)
    print(table(found), table(found, by=1), sep="\n\n")


if __name__ == "__main__":
    main()
