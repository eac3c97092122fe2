"""``invdiff inpaint``: voxels that a mask marks, filled in by a prior, steered by a circuit if wanted."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor

from invdiff.circuits.codes import CodeCircuit
from invdiff.circuits.images import ImageCircuit
from invdiff.circuits.inputs import Spot
from invdiff.config import build, find
from invdiff.datasets import Volume, read_nifti, read_volume
from invdiff.files import sha256_of, whole_file
from invdiff.noise import KeyedNoise
from invdiff.operators import Mask
from invdiff.pipelines.compare import PLACE_MM, corner_distance
from invdiff.pipelines.devices import device_of, dtype_of
from invdiff.pipelines.output import beside, check_writable, checkpoint_path, versions, write_volume
from invdiff.pipelines.pictures import panel
from invdiff.pipelines.reconstruct import Progress, RunConfig, kind_of, prior_of
from invdiff.pipelines.scans import notes_on
from invdiff.pipelines.steering import SteerConfig, check_steered, circuit_of, example_of
from invdiff.pipelines.tables import document_of
from invdiff.priors import Steered, SteeredByCodes
from invdiff.problem import prepare
from invdiff.protocols import Prior, Problem
from invdiff.reconstruction import run_record
from invdiff.run import checkpointed, fingerprint, guarded, iterate, last, load_state

TABLES: dict[str, tuple[str, ...]] = {
    "input": ("volume", "mask"), "prior": ("name",), "steer": (), "sampler": (), "run": (), "output": ("path",),
}  # fmt: skip
SIGMA_MAX = 100.0  # where runs start: what is far from the known is decided at high noise
# Slices that are filled in need not be neighbours, and pixels are known exactly
DEFAULTS: dict[str, dict[str, Any]] = {
    "dds": {"lam": 0.0, "anchor": 0.0, "cg_steps": 1},
    "ddnm": {"eta": 0.0, "cg_steps": 1},
    "repaint": {"cg_steps": 1},
    "reddiff": {"z_lam": 0.0},
}
COUPLED = ("diffusionmbir",)
QUANTILE = 0.999  # of the known non-zero voxels of an MR volume, which becomes 1


@dataclass(frozen=True)
class Inpainting:
    """What is filled in, with what, and where it goes."""

    volume: Path
    mask: Path
    out: Path
    prior: str
    sampler: Any
    steer: SteerConfig
    run: RunConfig

    @property
    def document(self) -> dict[str, Any]:
        """The resolved configuration."""
        return {
            "input": {"volume": str(self.volume), "mask": str(self.mask)},
            "prior": {"name": self.prior},
            "steer": self.steer.recorded(),
            "sampler": {"kind": kind_of(self.sampler), **asdict(self.sampler)},
            "run": asdict(self.run),
            "output": {"path": str(self.out)},
        }


def resolve(flags: Mapping[str, Mapping[str, Any]], overrides: Sequence[str]) -> Inpainting:
    """An Inpainting from command-line flags (table to key to value, None where not given) and ``table.key=value``.

    Raises:
        ValueError: a wrong table, key, kind or value; the right ones are listed.
    """
    document = document_of({}, flags, overrides, TABLES)
    table = dict(document["sampler"])
    name = str(table.pop("kind"))
    kind = find("samplers", name)
    if kind.estimate == "prior sampler" or not hasattr(kind, "sigma_max") or name in COUPLED:
        raise ValueError(
            f"{name!r} does not fill in slices from a prior, each for itself; "
            "a sampler that does is wanted, such as dds, ddnm, repaint or copaint"
        )
    table = {"sigma_max": SIGMA_MAX, **DEFAULTS.get(name, {}), **table}
    job = Inpainting(
        volume=Path(str(document["input"]["volume"])),
        mask=Path(str(document["input"]["mask"])),
        out=Path(str(document["output"]["path"])),
        prior=str(document["prior"]["name"]),
        sampler=build(kind, table, name),
        steer=build(SteerConfig, document["steer"], "steer"),
        run=build(RunConfig, document["run"], "run"),
    )
    check_steered(job.steer, job.sampler, name, job.prior)
    return job


def read_hole(path: Path, volume: Volume) -> Tensor:
    """The mask (s 1 h w), bool, of the voxels to be filled in: 1 in its file.

    Raises:
        ValueError: another grid than the volume's, values other than 0 and 1, or a mask that is empty or full.
    """
    mask = read_nifti(path, "a.u.")
    wanted, came = tuple(volume.data.shape), tuple(mask.data.shape)
    if came[0] != wanted[0] or came[2:] != wanted[2:] or came[1] != 1:
        raise ValueError(f"the mask {path} is {came}, the volume {wanted} (s c h w); one grid is wanted")
    distance = corner_distance(mask.affine, volume.affine, volume.data.shape)
    if distance > PLACE_MM:
        raise ValueError(f"the mask {path} lies up to {distance:.3g} mm from the volume; one grid is wanted")
    if not bool(((mask.data == 0) | (mask.data == 1)).all()):
        odd = mask.data[(mask.data != 0) & (mask.data != 1)]
        raise ValueError(f"the mask {path} holds {float(odd[0]):g}; 1 (fill in) and 0 (keep) alone are wanted")
    hole = mask.data != 0
    if not bool(hole.any()) or bool(hole.all()):
        said = "full: nothing is known" if bool(hole.any()) else "empty: there is nothing to fill in"
        raise ValueError(f"the mask {path} is {said}")
    return hole


def unit_scale(volume: Volume, known: Tensor, unit: str, name: str) -> float:
    """The volume's value of 1 in the prior's unit.

    Raises:
        ValueError: another unit than the prior's, or an MR volume without signal where it is known.
    """
    if volume.unit != unit:
        raise ValueError(f"the volume is in {volume.unit}, the prior in {unit}; a prior of its kind is wanted")
    if unit == "HU":
        return 1.0
    inside = volume.data[known & (volume.data != 0)]
    one = float(inside.quantile(QUANTILE)) if 0 < len(inside) < 2**24 else _quantile(inside)
    if one <= 0:
        raise ValueError(f"{name}: the {QUANTILE:g} quantile of its known voxels is {one:g}; magnitudes are wanted")
    return one


def own_scale(unit: str) -> Callable[[Volume], float]:
    """``unit_scale`` of a whole volume, by itself."""
    return lambda v: unit_scale(v, torch.ones_like(v.data, dtype=torch.bool), unit, "the example")


def _quantile(values: Tensor) -> float:
    """Of more values than ``Tensor.quantile`` takes."""
    return float(values.kthvalue(max(1, round(QUANTILE * len(values)))).values) if len(values) else 0.0


def run(job: Inpainting, resume: bool, progress: Progress) -> dict[str, Any]:
    """Fill in the marked voxels and write the volume, its record (.json) and a picture (.png); returns the record.

    The other voxels are those of the input, bit by bit. Slices without marked voxels are not computed.

    Raises:
        ValueError: input that does not fit; nothing is written then.
        DivergedError: NaN.
    """
    check_writable(job.out)
    volume = read_volume(job.volume)
    hole = read_hole(job.mask, volume)
    plain, weights = prior_of(job.prior, job.run)
    info: Any = plain.info  # type: ignore[attr-defined]
    one = unit_scale(volume, ~hole, info.unit, str(job.volume))
    some = hole.flatten(1).any(1)
    known = volume.data[some] / one
    circuit = circuit_of(job.steer, job.prior, info)
    cells = None if circuit is None else circuit.info
    example = None if cells is None else example_of(job.steer, cells, info, volume, some, own_scale(info.unit))
    prior, y, operator = _problem_parts(job, plain, circuit, known, hole[some], example)
    prepared = prepare(y, operator, prior, 0.0, KeyedNoise(job.run.seed))
    key = fingerprint(repr(job.sampler), y, hole[some], weights, job.run.seed, job.steer.key(circuit))
    began, path = time.monotonic(), checkpoint_path(job.out)
    end = last(_states(job, prepared.problem, key, path, resume, progress))
    x = prepared.to_physical(end.x).cpu() * one
    data = volume.data.clone()
    data[hole] = x[hole[some]]
    filled = replace(volume, data=data)
    record = {
        **run_record(prepared, job.sampler, end, job.run.seed),
        "config": job.document,
        "filled_voxels": int(hole.sum()),
        "slices": some.nonzero().flatten().tolist(),
        "one_in_file_units": one,
        "seconds": round(time.monotonic() - began, 2),
        "fingerprint": key,
        "prior_sha256": weights,
        "circuit_sha256": None if circuit is None else circuit.sha256,
        "volume_sha256": volume.source.get("sha256"),
        "mask_sha256": sha256_of([job.mask]),
        "notes": [*notes_on(plain, volume), "what was filled in is invented: the prior's guess, not a measurement"],
        "versions": versions(),
        "not_for_diagnosis": True,
    }
    write_volume(job.out, filled)
    with whole_file(beside(job.out, ".json")) as part:
        part.write_text(json.dumps(record, indent=2) + "\n")
    _picture(job, volume, hole, filled)
    path.unlink(missing_ok=True)
    return record


def _problem_parts(
    job: Inpainting,
    plain: Prior,
    circuit: ImageCircuit | CodeCircuit | None,
    known: Tensor,
    hole: Tensor,
    evidence: Spot | None,
) -> tuple[Prior, Tensor, Mask]:
    """The prior, steered if so wanted; the known pixels, 0 elsewhere, in the prior's physical unit; the mask."""
    device = device_of(job.run.device)
    operator = Mask(~hole, known.shape)
    y = operator.forward(known).to(device)
    if circuit is None:
        return plain, y, operator
    in_units = plain.info.in_prior_units(known).to(device)  # type: ignore[attr-defined]
    mask, stop = (~hole).to(device), job.steer.sigma_stop
    if isinstance(circuit, CodeCircuit):
        noise, dtype = KeyedNoise(job.run.seed), dtype_of(job.run.dtype, device)
        return SteeredByCodes(plain, circuit, in_units, mask, noise, stop, dtype), y, operator
    return Steered(plain, circuit, in_units, mask, stop, evidence), y, operator


def _states(job: Inpainting, problem: Problem, key: str, path: Path, resume: bool, progress: Progress) -> Iterator[Any]:
    state = None
    if resume:
        state = load_state(path, get_type_hints(type(job.sampler).init)["return"], key, problem.y.device)
    states = guarded(iterate(job.sampler, problem, state), job.sampler, problem)
    return progress(checkpointed(states, path, key, job.run.every), job.sampler.steps, kind_of(job.sampler))


def _picture(job: Inpainting, volume: Volume, hole: Tensor, filled: Volume) -> None:
    """The slice with the most marked voxels: as it was, with its hole, and filled in."""
    most = int(hole.flatten(1).sum(1).argmax())
    before, after = volume.data[most, 0], filled.data[most, 0]
    blank = torch.where(hole[most, 0], before[~hole[most, 0]].min(), before)
    rows = {"": {"volume": before, "what is kept": blank, "filled in": after}}
    panel(beside(job.out, ".png"), rows, volume.unit, title=f"slice {most + 1} of {len(hole)}, {job.prior}, invented")
