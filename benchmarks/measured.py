"""Learning from measurements beside learning from images, on CT and MR slices of other subjects and on made-up scenes.

python benchmarks/measured.py --data FOLDER --out RESULTS [--only ct mr scenes] [--images 20000]   runs what is missing
python benchmarks/measured.py --out RESULTS --table                                                prints the tables

FOLDER has train/ and val/. Scans are simulated from train/ (see ``measured_data.py``), 64 x 64: CT of 30 to 60 of 180
views at random with 2e4 photons a ray, MR of eight coils at fourfold random acceleration. The images are then hidden,
but from the methods called supervised. All networks are the same, and so are the batches and how many examples they
see. Judged on val/: mean PSNR and SSIM over slices; of eight samples the share of truths in their 90 % interval
(Student's; 0.9 is right) and the deviation of (truth - mean) / (s sqrt(1 + 1/8)) (1.18 is right for Gaussians, as of
Student's t with 7 degrees of freedom), over the pixels of the body. A second call goes on where the first one stopped.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import measured_data as source
import numpy as np
import torch
from torch import Tensor

from invdiff.calibration import covered, student_interval
from invdiff.datasets import Measurements
from invdiff.files import whole_file
from invdiff.metrics import psnr, ssim
from invdiff.pipelines.mri import MRIConfig, as_seen_by, way_of
from invdiff.pipelines.scans import operator_of
from invdiff.priors import NoPrior, load
from invdiff.priors.model import fast_dtype
from invdiff.reconstruction import reconstruct
from invdiff.samplers import CGLS, DDS, FBP, TV, ForwardModelDiffusion, OneStep, REDDiff

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
METHODS = ("forward-model", "forward-model-supervised", "ssdu", "supervised", "ambient")
OF = {"ct": METHODS, "mr": METHODS[:4], "scenes": METHODS[:1]}
CONTEXTS = {"ct": ("20 views", "6 views"), "mr": ("4x",)}
PEAK = {"ct": 2000.0, "mr": 1.0}
SAMPLES, STEPS, LEVEL = 8, 20, 0.9
CONSISTENCY = 0.1  # deviation of the model's images before their solve with the scan, prior units
SEED = 77  # of the judged scans' noise
BODY = {"ct": -700.0, "mr": 0.1}  # pixels above count for the coverage: air is known
TV_GRID = {"ct": (3e-4, 1e-3, 3e-3, 1e-2), "mr": (3e-4, 1e-3, 3e-3)}
CT_SLICES, MR_SLICES = 4, 2  # of each volume


def config_of(name: str, method: str, out: Path, images: int | None) -> Path:
    """The committed configuration of an example with another method and number of examples seen, in ``out``."""
    text = (EXAMPLES / f"train-{name}-measured.toml").read_text().replace('"forward-model"', f'"{method}"')
    if method == "ambient":
        text = text.replace("sigma_min = 0.01", "sigma_min = 0.02")
    if images is not None:
        text = "".join(f"images = {images}\n" if s.startswith("images =") else s + "\n" for s in text.splitlines())
    path = out / f"{name}-{method}.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def train(name: str, method: str, out: Path, images: int | None) -> None:
    """``invdiff train --from``, from its checkpoint if there is one."""
    run = out / "runs" / f"{name}-{method}"
    if (run / "done").exists():
        return
    config = config_of(name, method, out / "configs", images)
    words = [sys.executable, "-P", "-m", "invdiff.pipelines.cli", "train", str(config)]
    words += ["--from", str(out / f"{name}.h5"), "-o", str(run)]
    words += ["--images", str(out / f"{name}-images.h5")] if "supervised" in method else []
    words += ["--resume"] if (run / "state.pt").exists() else []
    print(" ".join(words[4:]), flush=True)
    subprocess.run(words, check=True)
    (run / "done").touch()


def judged(name: str, data: Path) -> source.Slices:
    """Slices of other subjects."""
    if name == "ct":
        return source.judged_ct(data / "val" / "ct", CT_SLICES)
    return source.judged_mr(data / "val" / "mr", MR_SLICES)


def scans_of(name: str, slices: source.Slices, context: str) -> list[Measurements]:
    """A scan of each slice."""
    if name == "mr":
        return list(source.mr_scans(slices, SEED))
    return list(source.ct_scans(slices, source.spread_views(len(slices.fine), int(context.split()[0])), SEED))


class Problem(NamedTuple):
    """A scan some times over: operator on real images, y, its noise, and the prior as it serves them."""

    operator: Any
    y: Tensor
    sigma: float
    prior: Any


def problem_of(scan: Measurements, count: int, prior: Any, sampler: Any) -> Problem:
    """The scan ``count`` times over, for as many samples; complex images as two channels, in the prior's unit."""
    whole = as_seen_by(_copies(scan, count), sampler)
    operator, y, sigma = operator_of(whole)
    if not operator.domain.dtype.is_complex:
        return Problem(operator, y, sigma, prior)
    way = way_of(whole, operator, y, sampler, MRIConfig(channels="complex"), False)
    assert way is not None
    return Problem(way.operator, y, sigma, way.wrap(prior))


def _copies(scan: Measurements, count: int) -> Measurements:
    fields = dict(scan.fields)
    if "shape" in fields:
        fields["shape"] = (count, *tuple(fields["shape"])[1:])
    else:
        fields["slices"] = count
    y = scan.y.repeat(count, *[1] * (scan.y.ndim - 1))
    sqrt_w = None if scan.sqrt_w is None else scan.sqrt_w.repeat(count, *[1] * (scan.y.ndim - 1))
    return replace(scan, y=y, sqrt_w=sqrt_w, fields=fields)


def visible(x: Tensor) -> Tensor:
    """An image (s c h w) as it is compared: HU, or the magnitude of two channels (s 1 h w)."""
    return torch.hypot(x[:, :1], x[:, 1:]) if x.shape[1] == 2 else x


def samples_of(scan: Measurements, model: Any) -> Tensor:
    """Eight samples (s c h w) of a forward model."""
    sampler = ForwardModelDiffusion(steps=STEPS, consistency=CONSISTENCY)
    return point(scan, model, sampler, SAMPLES)


def point(scan: Measurements, prior: Any, sampler: Any, count: int = 1) -> Tensor:
    """The image, or images, of a sampler: (s c h w)."""
    made = problem_of(scan, count, prior, sampler)
    return reconstruct(made.y, made.operator, made.prior, sampler, made.sigma, seed=SEED).x


def scored(images: list[Tensor], truth: Tensor, name: str) -> dict[str, float]:
    """Mean PSNR and SSIM of one image (1 c h w) a slice."""
    pairs = [(visible(x)[0, 0].numpy(), t[0].numpy()) for x, t in zip(images, truth, strict=True)]
    return {
        "psnr": float(np.mean([psnr(a, b, PEAK[name]) for a, b in pairs])),
        "ssim": float(np.mean([ssim(a, b, PEAK[name]) or 0.0 for a, b in pairs])),
    }


def spread_of(samples: list[Tensor], truth: Tensor, name: str) -> dict[str, float]:
    """Coverage and z-scores of samples (k c h w) a slice, and the PSNR of single ones."""
    inside, z, single = [], [], []
    for x, t in zip(samples, truth, strict=True):
        seen, body = visible(x)[:, 0], t[0] > BODY[name]
        inside.append(covered(student_interval(seen[:, body], LEVEL), t[0][body]))
        deviation = seen[:, body].std(0) * (1 + 1 / len(seen)) ** 0.5
        z.append(((t[0][body] - seen[:, body].mean(0)) / deviation.clamp_min(1e-6)).square().mean())
        single += [psnr(one.numpy(), t[0].numpy(), PEAK[name]) for one in seen[:2]]
    return {
        "coverage": float(np.mean(inside)),
        "z": float(torch.stack(z).mean().sqrt()),
        "psnr_single": float(np.mean(single)),
    }


def tuned(scans: list[Measurements], nothing: NoPrior, truth: Tensor, name: str) -> dict[str, float]:
    """TV with the weight that is best on every fourth slice by the PSNR against the truth, which favours TV."""
    some = {
        lam: scored([point(s, nothing, TV(lam=lam)) for s in scans[::4]], truth[::4], name)["psnr"]
        for lam in TV_GRID[name]
    }
    lam = max(some, key=lambda v: some[v])
    return {**scored([point(s, nothing, TV(lam=lam)) for s in scans], truth, name), "lam": lam}


def judge(name: str, context: str, method: str, out: Path, slices: source.Slices) -> dict[str, float]:
    """One row of the table."""
    scans, truth = scans_of(name, slices, context), slices.truth
    range_ = (-1000.0, 1000.0) if name == "ct" else (-1.0, 1.0)
    nothing = NoPrior("HU" if name == "ct" else "a.u.", *range_, 1 if name == "ct" else 2)
    began = time.process_time()
    if method == "fbp" or method == "cgls":
        found = scored([point(s, nothing, FBP() if method == "fbp" else CGLS()) for s in scans], truth, name)
    elif method == "tv":
        found = tuned(scans, nothing, truth, name)
    else:
        model = load(out / "runs" / f"{name}-{method.split('+')[0]}" / "model").to("cpu", fast_dtype("cpu"))
        if method.startswith("forward"):
            samples = [samples_of(s, model) for s in scans]
            means = [visible(x).mean(0, keepdim=True) for x in samples]
            found = {**scored(means, truth, name), **spread_of(samples, truth, name)}
        elif method.startswith("ambient"):
            sampler: Callable[[], Any] = REDDiff if method.endswith("reddiff") else DDS
            found = scored([point(s, model, sampler()) for s in scans], truth, name)
        else:
            found = scored([point(s, model, OneStep()) for s in scans], truth, name)
    return {**found, "cpu_s": (time.process_time() - began) / len(scans)}


def rows_of(name: str) -> tuple[str, ...]:
    """What is compared."""
    ambient = ("ambient+reddiff", "ambient+dds") if "ambient" in OF[name] else ()
    return ("fbp" if name == "ct" else "cgls", "tv", *OF[name][:4], *ambient)


def evaluate(name: str, data: Path, out: Path) -> None:
    """Every row that is missing, a JSON file each."""
    slices = judged(name, data)
    for context in CONTEXTS[name]:
        for method in rows_of(name):
            path = out / "rows" / f"{name}-{context.replace(' ', '-')}-{method}.json"
            folder = out / "runs" / f"{name}-{method.split('+')[0]}"
            if path.exists() or (method.split("+")[0] in METHODS and not (folder / "model").is_dir()):
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            found = judge(name, context, method, out, slices)
            with whole_file(path) as part:
                part.write_text(json.dumps(found))
            print(path.stem, found, flush=True)


def table(out: Path) -> None:
    """Markdown tables of all rows."""
    for name, contexts in CONTEXTS.items():
        for context in contexts:
            print(f"\n{name.upper()}, {context}\n\n| method | PSNR dB | SSIM | one sample dB | in 90 % | z |")
            print("| --- | --- | --- | --- | --- | --- |")
            for method in rows_of(name):
                path = out / "rows" / f"{name}-{context.replace(' ', '-')}-{method}.json"
                if path.exists():
                    r = json.loads(path.read_text())
                    more = [
                        f"{r[k]:{f}}" if k in r else ""
                        for k, f in (("psnr_single", ".2f"), ("coverage", ".2f"), ("z", ".2f"))
                    ]
                    print(f"| {method} | {r['psnr']:.2f} | {r['ssim']:.3f} | {' | '.join(more)} |")


def main() -> None:
    """Simulate, train, judge, print."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--data", type=Path, help="folder with train/ and val/")
    words.add_argument("--out", type=Path, required=True, help="folder of scans, runs and rows")
    words.add_argument("--only", nargs="+", choices=list(OF), default=list(OF), help="what of it")
    words.add_argument("--images", type=int, help="examples that each training sees, if not as configured")
    words.add_argument("--table", action="store_true", help="print the tables alone")
    args = words.parse_args()
    torch.set_num_threads(1)
    if not args.table:
        source.write_all(args.data, args.out)
        for name in args.only:
            for method in OF[name]:
                train(name, method, args.out, args.images)
            if name in CONTEXTS:
                evaluate(name, args.data, args.out)
    table(args.out)


if __name__ == "__main__":
    main()
