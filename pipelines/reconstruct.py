"""``invdiff reconstruct``: measurements to a volume on disk, with its record, its picture, and a way to resume."""

from __future__ import annotations

import json
import platform
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor

from invdiff.config import build, find, registered, with_overrides
from invdiff.datasets import Measurements, Volume, read_htc2022, read_measurements, write_dicom, write_nifti
from invdiff.files import sha256_of, whole_file
from invdiff.noise import KeyedNoise
from invdiff.operators import Whitened
from invdiff.pipelines.budget import Budget, budget_of, built, check, largest_chunk
from invdiff.pipelines.compare import matched_truth
from invdiff.pipelines.pictures import panel
from invdiff.priors import Chunked, NoPrior, Offloaded, load
from invdiff.priors.model import NetworkPrior, fast_dtype
from invdiff.problem import Prepared, prepare
from invdiff.protocols import Prior
from invdiff.reconstruction import reconstruct, record_of
from invdiff.run import checkpointed, fingerprint, forget, guarded, iterate, last, resumed
from invdiff.samplers import FBP, TV
from invdiff.units import MU_WATER

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Progress = Callable[[Iterator[Any], int, str], Iterator[Any]]


@dataclass(frozen=True)
class RunConfig:
    """How a run is carried out; none of it but the seed changes the answer beyond rounding.

    Args:
        seed: of all noise.
        device: such as ``cpu`` or ``cuda``.
        dtype: of the network's arithmetic: auto (bfloat16 where it is native), float32, bfloat16, float16.
        chunk: slices denoised at once; 0 finds how many fit, by halving (the record says how many).
        offload: keep the volume and the projector in host memory; only the network and its chunk are on ``device``.
        every: steps between checkpoints.
    """

    seed: int = 0
    device: str = "cpu"
    dtype: str = "auto"
    chunk: int = 8
    offload: bool = False
    every: int = 25

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r}; one of {', '.join(DTYPES)} is wanted")
        if self.chunk < 0 or self.every < 1:
            raise ValueError(f"chunk {self.chunk} and every {self.every}; at least 0 and 1 are wanted")


@dataclass(frozen=True)
class Job:
    """One reconstruction, resolved: what is read, with what, and where it goes."""

    scan: Path
    out: Path
    index: int
    prior: str
    sampler: Any
    run: RunConfig
    truth: Path | None = None

    @property
    def document(self) -> dict[str, Any]:
        """The resolved configuration; as TOML or JSON it is the same run again."""
        return {
            "input": {"scan": str(self.scan), "index": self.index},
            "prior": {"name": self.prior},
            "sampler": {"kind": kind_of(self.sampler), **asdict(self.sampler)},
            "run": asdict(self.run),
            "output": {"path": str(self.out)},
        }


def kind_of(sampler: Any) -> str:
    """The name that the sampler's class is registered by."""
    return next(k for k in registered("samplers") if find("samplers", k) is type(sampler))


TABLES = {"input": ("scan", "index"), "prior": ("name",), "output": ("path", "truth"), "run": (), "sampler": ()}


def resolve(source: Path, flags: Mapping[str, Mapping[str, Any]], overrides: Sequence[str]) -> Job:
    """A Job from a measurement file or a TOML file, command-line flags and ``table.key=value`` overrides.

    Raises:
        ValueError: a wrong table, key, kind or value; the right ones are listed.
    """
    if source.suffix == ".toml":
        try:
            document: dict[str, Any] = tomllib.loads(source.read_text())
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ValueError(f"{source} cannot be read as TOML: {error}") from error
    else:
        document = {"input": {"scan": str(source)}}
    for table, values in flags.items():
        document[table] = {**document.get(table, {}), **{k: v for k, v in values.items() if v is not None}}
    document = with_overrides(document, overrides)
    check_tables(document, TABLES)
    if "scan" not in document["input"]:
        raise ValueError(f"{source} names no input.scan; the path of a measurement file is wanted")
    if "path" not in document.get("output", {}):
        raise ValueError("no output was named; give -o recon.nii.gz")
    sampler = dict(document.get("sampler", {}))
    kind = sampler.pop("kind", "dds")
    truth = document["output"].get("truth")
    return Job(
        scan=Path(document["input"]["scan"]),
        out=Path(document["output"]["path"]),
        index=int(document["input"].get("index", 0)),
        prior=document.get("prior", {}).get("name", "ct"),
        sampler=build(find("samplers", kind), sampler, kind),
        run=build(RunConfig, document.get("run", {}), "run"),
        truth=None if truth is None else Path(truth),
    )


def check_tables(document: Mapping[str, Mapping[str, Any]], tables: Mapping[str, Sequence[str]]) -> None:
    """Refuse a table or a key that is not known; a table without listed keys takes any.

    Raises:
        ValueError: with the right ones.
    """
    for table, content in document.items():
        if table not in tables:
            raise ValueError(f"no table {table!r}; there are: {', '.join(tables)}")
        wrong = [k for k in content if tables[table] and k not in tables[table]]
        if wrong:
            raise ValueError(f"{table} has no field {wrong[0]!r}; its fields are: {', '.join(tables[table])}")


def operator_of(scan: Measurements) -> tuple[Any, Tensor, float]:
    """The whitened operator, the whitened y and its sigma_y, of a scan's description.

    Raises:
        ValueError: an unknown kind, fields it does not take, or a y that does not fit it.
    """
    operator = built(scan.kind, scan.fields)
    if tuple(scan.y.shape) != tuple(operator.range.shape):
        raise ValueError(
            f"the measurement has shape {tuple(scan.y.shape)}; its operator gives {tuple(operator.range.shape)}"
        )
    if scan.sqrt_w is None:
        return operator, scan.y, float(scan.sigma_y or 0.0)
    return Whitened(operator, scan.sqrt_w), scan.sqrt_w * scan.y, 1.0


def prior_of(name: str, run: RunConfig) -> tuple[Prior, str]:
    """The prior on its device, in chunks if ``run`` says of how many, and the hash of its weights ("" for none)."""
    if name == "none":
        return NoPrior(), ""
    device = device_of(run.device)
    network: NetworkPrior = load(name).to(device, dtype_of(run.dtype, device))
    prior: Prior = Offloaded(network, device) if run.offload else network
    return Chunked(prior, run.chunk) if run.chunk else prior, network.sha256 or ""


def within_memory(scan: Measurements, sampler: Any, prior: Prior, run: RunConfig) -> tuple[Prior, Budget, list[str]]:
    """The prior of ``prior_of`` in chunks that fit, what the run will take, and what is to be noted of that.

    Raises:
        ValueError: a run that does not fit into the free memory.
    """
    device, home = device_of(run.device), home_of(run)
    bare = prior.prior if isinstance(prior, Chunked) else prior
    budget = budget_of(scan, sampler, bare, run.chunk, device, home)
    note = check(budget, device, home)
    if not run.chunk and not isinstance(bare, NoPrior):
        chunk = largest_chunk(bare, budget.chunk, tuple(scan.fields["shape"])[1:], home)
        prior, budget = Chunked(bare, chunk), replace(budget, chunk=chunk)
    return prior, budget, [note] if note else []


def home_of(run: RunConfig) -> torch.device:
    """Where the volume, the measurements and the sampler's state are."""
    return torch.device("cpu") if run.offload else device_of(run.device)


def dtype_of(name: str, device: torch.device) -> torch.dtype | None:
    """The dtype of a network's arithmetic, None for float32; ``auto`` is bfloat16 where it is native.

    Raises:
        ValueError: another name.
    """
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r}; one of {', '.join(DTYPES)} is wanted")
    return fast_dtype(device) if name == "auto" else None if name == "float32" else DTYPES[name]


def device_of(name: str) -> torch.device:
    """The torch device of that name.

    Raises:
        ValueError: no such device on this machine.
    """
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} is not available here: {str(error).splitlines()[0]}") from error


def run(job: Job, resume: bool, progress: Progress) -> dict[str, Any]:
    """Carry out a job: writes the volume, ``.json`` (record) and ``.png`` (panel) beside it; returns the record.

    While it runs ``<out>.checkpoint`` is kept up to date; an interrupt leaves it, and ``resume`` goes on from it
    bit-identically, from ``<out>.checkpoint.previous`` where the last one is torn.

    Raises:
        ValueError: input that does not fit; nothing is written then.
        DivergedError: NaN or a growing residual.
    """
    check_writable(job.out)
    scan = scan_of(job)
    empty = as_volume(scan, torch.zeros(tuple(scan.fields["shape"])))
    truth = None if job.truth is None else matched_truth(empty, job.truth)
    prior, weights = prior_of(job.prior, job.run)
    prior, budget, notes = within_memory(scan, job.sampler, prior, job.run)
    operator, y, sigma_y = operator_of(scan)
    prepared = prepare(
        y.to(home_of(job.run)), operator, prior, sigma_y, KeyedNoise(job.run.seed), scan.mu_water or MU_WATER
    )
    key = fingerprint(repr(job.sampler), scan.kind, _plain(scan.fields), y, sigma_y, weights, job.run.seed)
    path = checkpoint_path(job.out)
    began = time.monotonic()
    state, note = _loop(job, prepared, key, path, resume, progress)
    seconds = time.monotonic() - began
    x = prepared.to_physical(state.x).cpu()
    volume = as_volume(scan, x)
    record = {
        **record_of(prepared, job.sampler, state, job.run.seed),
        "config": job.document,
        "seconds": round(seconds, 2),
        "chunk": budget.chunk,
        "fingerprint": key,
        "prior_sha256": weights,
        "scan_sha256": sha256_of([job.scan]),
        "source_sha256": scan.source_sha256,
        "notes": [*notes, *note, *notes_on(prior, volume)],
        "versions": versions(),
        "not_for_diagnosis": True,
    }
    write_volume(job.out, volume)
    with whole_file(beside(job.out, ".json")) as part:
        part.write_text(json.dumps(record, indent=2) + "\n")
    _picture(job, scan, volume, truth)
    forget(path)
    return record


def notes_on(prior: Prior, volume: Volume) -> list[str]:
    """What a user should know of how the prior fits the scan."""
    low, high = prior.info.pixel_mm  # type: ignore[attr-defined]
    pixel = volume.spacing_mm[1]
    if not high or low <= pixel <= high:
        return []
    return [f"the pixels are {pixel:.3g} mm; the prior was trained on {low:.3g} to {high:.3g} mm"]


def _loop(job: Job, prepared: Prepared, key: str, path: Path, resume: bool, progress: Progress) -> Any:
    """The last state, and what is to be noted of how the run went on."""
    problem, sampler = prepared.problem, job.sampler
    state, note = None, ""
    if resume:
        kind = get_type_hints(type(sampler).init)["return"]
        state, note = resumed(path, kind, key, problem.y.device)
    states = guarded(iterate(sampler, problem, state), sampler, problem)
    kept = checkpointed(states, path, key, job.run.every)
    return last(progress(kept, sampler.steps, kind_of(sampler))), [note] if note else []


def scan_of(job: Job) -> Measurements:
    """The scan that a job names."""
    scans = [read_htc2022(job.scan)] if job.scan.suffix == ".mat" else read_measurements(job.scan)
    if not 0 <= job.index < len(scans):
        raise ValueError(f"{job.scan} holds {len(scans)} scans; index {job.index} is not among 0 to {len(scans) - 1}")
    return scans[job.index]


def as_volume(scan: Measurements, x: Tensor) -> Volume:
    """An image (s c h w) in HU at the scan's place in the world, to be stored in its source's axis order."""
    return Volume(x.float(), scan.affine, "HU", scan.storage, {"name": "reconstruction", "sha256": scan.source_sha256})


def _picture(job: Job, scan: Measurements, volume: Volume, truth: Volume | None) -> None:
    """The middle slice: truth where known, FBP, TV, ours, error."""
    middle = volume.data.shape[0] // 2
    pictures: dict[str, Tensor] = {} if truth is None else {"truth": truth.data[middle, 0]}
    for name, baseline in (("FBP", FBP()), ("TV", TV(lam_z=0.0))):
        if type(baseline) is not type(job.sampler):
            pictures[name] = baseline_slice(scan, baseline, middle)
    pictures[type(job.sampler).__name__] = volume.data[middle, 0]
    title = f"slice {middle + 1} of {volume.data.shape[0]}"
    panel(beside(job.out, ".png"), {"": pictures}, volume.unit, title=title)


def baseline_slice(scan: Measurements, sampler: Any, index: int) -> Tensor:
    """One slice (h w) in HU by a prior-free baseline, on the CPU."""
    operator, y, sigma_y = operator_of(some_slices(scan, index))
    return reconstruct(y, operator, NoPrior(), sampler, sigma_y, mu_water=scan.mu_water or MU_WATER).x[0, 0]


def some_slices(scan: Measurements, index: int, count: int = 1) -> Measurements:
    """The scan of ``count`` slices from ``index`` on."""
    rows = slice(index, index + count)
    weights = scan.sqrt_w if scan.sqrt_w is None or scan.sqrt_w.shape[0] == 1 else scan.sqrt_w[rows]
    affine = scan.affine.copy()
    affine[:, 3] += index * affine[:, 2]
    fields = {**scan.fields, "shape": (count, *tuple(scan.fields["shape"])[1:])}
    return replace(scan, y=scan.y[rows], sqrt_w=weights, fields=fields, affine=affine)


def write_volume(out: Path, volume: Volume) -> None:
    """NIfTI for a path that ends in .nii or .nii.gz, else a folder of DICOM files."""
    if out.name.endswith((".nii", ".nii.gz")):
        write_nifti(out, volume)
    else:
        write_dicom(out, volume)


def check_writable(out: Path) -> None:
    """Refuse an output that cannot be written before any work is done.

    Raises:
        ValueError: with the path and why.
    """
    if out.suffix and not out.name.endswith((".nii", ".nii.gz")):
        raise ValueError(f"{out} ends in {out.suffix!r}; .nii, .nii.gz or a folder name for DICOM is wanted")
    probe(out)


def probe(out: Path) -> None:
    """Refuse a path whose folder is not there or cannot be written to.

    Raises:
        ValueError: with the path and why.
    """
    if not out.parent.is_dir():
        raise ValueError(f"{out} cannot be written: the folder {out.parent} is not there")
    with whole_file(out.parent / f"{out.name}.checkpoint.probe") as part:
        part.touch()
    (out.parent / f"{out.name}.checkpoint.probe").unlink()


def beside(out: Path, suffix: str) -> Path:
    """``recon.nii.gz`` and ".png" to ``recon.png``."""
    name = out.name
    for ending in (".nii.gz", ".nii"):
        name = name.removesuffix(ending)
    return out.with_name(name + suffix)


def checkpoint_path(out: Path) -> Path:
    """Where an unfinished run is kept."""
    return beside(out, ".checkpoint")


def versions() -> dict[str, str]:
    """Of Python and the packages that the numbers depend on."""
    return {"python": platform.python_version(), **{p: version(p) for p in ("invdiff", "torch", "monai", "numpy")}}


def _plain(fields: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Fields in an order and form whose ``repr`` is their content."""
    return [(k, fingerprint(v) if isinstance(v, Tensor) else v) for k, v in sorted(fields.items())]
