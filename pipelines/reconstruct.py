"""``invdiff reconstruct``: measurements to a volume on disk, with its record, its picture, and a way to resume."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor

from invdiff.config import build, find, read_toml, registered
from invdiff.datasets import Measurements, Volume, write_nifti
from invdiff.files import sha256_of, whole_file
from invdiff.invented import Split, measured_or_invented
from invdiff.noise import KeyedNoise
from invdiff.pipelines.budget import Budget, Work, budget_of, check, largest_chunk, of_operator
from invdiff.pipelines.compare import matched_truth
from invdiff.pipelines.devices import DTYPES, device_of, dtype_of
from invdiff.pipelines.memory import return_what_is_freed
from invdiff.pipelines.mri import MRIConfig, Way, as_seen_by, picture_row, way_of
from invdiff.pipelines.output import (
    beside,
    check_writable,
    checkpoint_path,
    is_nifti,
    map_path,
    versions,
    write_volume,
)
from invdiff.pipelines.pictures import panel
from invdiff.pipelines.raw_mr import RawConfig
from invdiff.pipelines.scans import as_volume, baseline_slice, notes_on, operator_of, scan_of
from invdiff.pipelines.steering import SIGMA_STOP_MEASURED, SteerConfig, check_steered, circuit_of, steered
from invdiff.pipelines.tables import document_of
from invdiff.pipelines.uncertainty import Map, added_record, draw_maps, map_names, maps_of
from invdiff.priors import Averaged, Chunked, NoPrior, Offloaded, load
from invdiff.priors.model import NetworkPrior
from invdiff.problem import Prepared, prepare
from invdiff.protocols import Prior
from invdiff.reconstruction import Result, gathered, record_of
from invdiff.run import checkpointed, fingerprint, forget, guarded, iterate, last, resumed
from invdiff.samplers import FBP, TV
from invdiff.uncertainty import BestOf, Gather, SeedsState, Spread, over_seeds
from invdiff.units import MU_WATER

SHIPPED = {"1/mm": "ct", "a.u.": "brain-mr"}  # by the unit of the image
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
class PriorConfig:
    """Which prior, and what is made of it.

    Args:
        name: of a shipped prior, a prior's folder, none, or auto: ct for CT, brain-mr for MR.
        flips: axes of the flipped copies of the image over which it is averaged: -1 columns, -2 rows.
        shifts: (rows, columns) of further copies; see ``invdiff.priors.Averaged``.
    """

    name: str = "auto"
    flips: tuple[int, ...] = ()
    shifts: tuple[tuple[int, int], ...] = ()

    def wrapped(self, prior: Prior) -> Prior:
        """The prior itself, or its average over the copies."""
        return Averaged(prior, self.flips, self.shifts) if self.flips or self.shifts else prior


@dataclass(frozen=True)
class Job:
    """One reconstruction, resolved: what is read, with what, and where it goes.

    gather: what becomes of several samples, None for one run; split: how measured and invented are told apart, if so.
    """

    scan: Path
    out: Path
    index: int
    prior: str
    sampler: Any
    run: RunConfig
    truth: Path | None = None
    averaged: PriorConfig = PriorConfig()
    gather: Gather | None = None
    split: Split | None = None
    mri: MRIConfig | None = None
    raw: RawConfig | None = None
    steer: SteerConfig = field(default_factory=SteerConfig)

    @property
    def document(self) -> dict[str, Any]:
        """The resolved configuration; as TOML or JSON it is the same run again."""
        copies = {k: v for k, v in asdict(self.averaged).items() if v and k != "name"}
        document = {
            "input": {"scan": str(self.scan), "index": self.index},
            "prior": {"name": self.prior, **copies},
            "sampler": {"kind": kind_of(self.sampler), **asdict(self.sampler)},
            "run": asdict(self.run),
            "output": {"path": str(self.out)},
        }
        if self.gather is not None:
            document["samples" if isinstance(self.gather, Spread) else "best"] = asdict(self.gather)
        document |= {} if self.steer.kind == "none" else {"steer": self.steer.recorded()}
        tables = {"mri": self.mri, "raw": self.raw}
        document |= {name: asdict(table) for name, table in tables.items() if table is not None}
        return document if self.split is None else {**document, "invented": asdict(self.split)}


def kind_of(sampler: Any) -> str:
    """The name that the sampler's class is registered by."""
    return next(k for k in registered("samplers") if find("samplers", k) is type(sampler))


TABLES: dict[str, tuple[str, ...]] = {
    "input": ("scan", "index"), "prior": (), "output": ("path", "truth"), "run": (), "sampler": (),
    "samples": (), "best": (), "invented": (), "mri": (), "raw": (), "steer": (),
}  # fmt: skip


def resolve(source: Path, flags: Mapping[str, Mapping[str, Any]], overrides: Sequence[str]) -> Job:
    """A Job from a measurement file or a TOML file, command-line flags and ``table.key=value`` overrides.

    Raises:
        ValueError: a wrong table, key, kind or value; the right ones are listed.
    """
    document = read_toml(source) if source.suffix == ".toml" else {"input": {"scan": str(source)}}
    document = document_of(document, flags, overrides, TABLES)
    if "scan" not in document["input"]:
        raise ValueError(f"{source} names no input.scan; the path of a measurement file is wanted")
    if "path" not in document.get("output", {}):
        raise ValueError("no output was named; give -o recon.nii.gz")
    sampler = dict(document.get("sampler", {}))
    kind = sampler.pop("kind", "dds")
    truth = document["output"].get("truth")
    prior = build(PriorConfig, document.get("prior", {}), "prior")
    prior.wrapped(NoPrior())
    steer = build(SteerConfig, {"sigma_stop": SIGMA_STOP_MEASURED, **document.get("steer", {})}, "steer")
    method = build(find("samplers", kind), sampler, kind)
    check_steered(steer, method, kind, prior.name)
    return Job(
        scan=Path(document["input"]["scan"]),
        out=Path(document["output"]["path"]),
        index=int(document["input"].get("index", 0)),
        prior=prior.name,
        sampler=method,
        run=build(RunConfig, document.get("run", {}), "run"),
        truth=None if truth is None else Path(truth),
        averaged=prior,
        gather=_gather_of(document),
        split=build(Split, document["invented"], "invented") if "invented" in document else None,
        mri=build(MRIConfig, document["mri"], "mri") if "mri" in document else None,
        raw=build(RawConfig, document["raw"], "raw") if "raw" in document else None,
        steer=steer,
    )


def _gather_of(document: Mapping[str, Any]) -> Gather | None:
    kinds: dict[str, type[Gather]] = {"samples": Spread, "best": BestOf}
    asked = [name for name in kinds if name in document]
    if len(asked) > 1:
        raise ValueError("both the spread of samples and the best of several were asked for; one of them is wanted")
    return build(kinds[asked[0]], document[asked[0]], asked[0]) if asked else None


def prior_for(name: str, scan: Measurements) -> str:
    """The prior's name; ``auto`` is the shipped one in the scan's unit."""
    return SHIPPED.get(scan.unit, "ct") if name == "auto" else name


def prior_of(name: str, run: RunConfig) -> tuple[Prior, str]:
    """The prior on its device, in chunks if ``run`` says of how many, and the hash of its weights ("" for none)."""
    if name == "none":
        return NoPrior(), ""
    device = device_of(run.device)
    network: NetworkPrior = load(name).to(device, dtype_of(run.dtype, device))
    prior: Prior = Offloaded(network, device) if run.offload else network
    return Chunked(prior, run.chunk) if run.chunk else prior, network.sha256 or ""


def way_of_job(scan: Measurements, job: Job) -> Way | None:
    """How a scan of complex images is made real, for which its operator is built; None for a scan of real ones.

    Raises:
        ValueError: settings of the job that do not fit the scan.
    """
    if "shape" in scan.fields and job.mri is None:  # a projector, whose matrices come after the check of memory
        return None
    operator, y, _ = operator_of(scan)
    several = job.gather is not None or job.split is not None
    return way_of(scan, operator, y.to(home_of(job.run)), job.sampler, job.mri, several)


def within_memory(scan: Measurements, job: Job, plain: Prior, way: Way | None) -> tuple[Prior, Budget, list[str]]:
    """The job's whole prior in chunks that fit, what the run will take, and what is to be noted of that.

    Args:
        scan: of the job.
        job: what is to be run.
        plain: of ``prior_of``.
        way: of ``way_of_job``.

    Raises:
        ValueError: a run that does not fit into the free memory.
    """
    run, device, home = job.run, device_of(job.run.device), home_of(job.run)
    bare = plain.prior if isinstance(plain, Chunked) else plain
    work = Work(job.sampler, job.averaged.wrapped, job.gather, job.split)
    given, shape = None, tuple(scan.fields["shape"]) if way is None else tuple(way.operator.domain.shape)
    if way is not None:
        given, bare, work = of_operator(way.operator, scan.fields), way.wrap(bare), replace(work, wrapped=lambda p: p)
    budget = budget_of(scan, work, bare, run.chunk, device, home, given)
    note = check(budget, device, home)
    return_what_is_freed(budget.image)
    if not run.chunk and not isinstance(bare, NoPrior):
        chunk = largest_chunk(bare, budget.chunk, shape[1:], home)
        bare = plain.prior if isinstance(plain, Chunked) else plain
        plain, budget = Chunked(bare, chunk), replace(budget, chunk=chunk)
    return job.averaged.wrapped(plain), budget, [note] if note else []


def home_of(run: RunConfig) -> torch.device:
    """Where the volume, the measurements and the sampler's state are."""
    return torch.device("cpu") if run.offload else device_of(run.device)


def run(job: Job, resume: bool, progress: Progress) -> dict[str, Any]:
    """Carry out a job: writes the volume, ``.json`` (record), ``.png`` (panel) and maps beside it; returns the record.

    While it runs ``<out>.checkpoint`` is kept up to date; an interrupt leaves it, and ``resume`` goes on from it
    bit-identically, from ``<out>.checkpoint.previous`` where the last one is torn.

    Raises:
        ValueError: input that does not fit; nothing is written then.
        DivergedError: NaN or a growing residual.
    """
    check_writable(job.out, map_names(job.gather, job.split))
    scan = as_seen_by(scan_of(job.scan, job.index, job.raw), job.sampler, job.mri)
    way = way_of_job(scan, job)
    grid = as_volume(scan, torch.zeros(()).expand(tuple(scan.fields["shape"])) if way is None else way.first)
    truth = None if job.truth is None else matched_truth(grid, job.truth)
    name = prior_for(job.prior, scan)
    plain, weights = prior_of(name, job.run)
    circuit = circuit_of(job.steer, name, plain.info)  # type: ignore[attr-defined]
    prior, budget, fitted = within_memory(scan, job, plain, way)
    prior = steered(job.steer, circuit, scan, prior, grid, torch.empty(0, device=home_of(job.run)))
    operator, y, sigma_y = operator_of(scan)
    if way is not None:
        operator, prior = way.operator, way.wrap(prior)
    mu_water = scan.mu_water or MU_WATER
    prepared = prepare(y.to(home_of(job.run)), operator, prior, sigma_y, KeyedNoise(job.run.seed), mu_water)
    changed = [repr(v) for v in (job.gather, job.averaged.flips, job.averaged.shifts) if v]
    changed += [] if way is None else [repr(way.record)]
    changed += [] if scan.keep is None else [fingerprint(scan.keep)]
    changed += [] if circuit is None else [job.steer.key(circuit)]
    key = fingerprint(repr(job.sampler), scan.kind, _plain(scan.fields), y, sigma_y, weights, job.run.seed, *changed)
    path = checkpoint_path(job.out)
    began = time.monotonic()
    end, resumption = _loop(job, prepared, key, path, resume, progress)
    result, parts = _result(job, prepared, end), None
    if job.split is not None:
        parts = measured_or_invented(result.x, operator, prior, sigma_y, job.split, mu_water=mu_water)
    seconds = time.monotonic() - began
    volume = as_volume(scan, (result.x if way is None else way.magnitude(result.x)).cpu())
    tables, notes = added_record(result, parts, None if truth is None else truth.data)
    record = {
        **result.record,
        **tables,
        **({} if way is None else {"mri": way.record}),
        **({"history": scan.history} if scan.history else {}),
        "config": job.document,
        "seconds": round(seconds, 2),
        "chunk": budget.chunk,
        "fingerprint": key,
        "prior_sha256": weights,
        **({} if circuit is None else {"circuit_sha256": circuit.sha256}),
        "scan_sha256": sha256_of([job.scan]) if job.scan.is_file() else scan.source_sha256,
        "source_sha256": scan.source_sha256,
        "notes": [*fitted, *resumption, *notes_on(prior, volume), *notes],
        "versions": versions(),
        "not_for_diagnosis": True,
    }
    maps = maps_of(result, parts, volume.unit)
    if way is not None:
        maps["phase"] = Map(way.angle(result.x).float().cpu(), "rad")
    _write(job, scan, volume, maps, truth, record, way)
    forget(path)
    return record


def _result(job: Job, prepared: Prepared, end: Any) -> Result:
    """What a run's last state says."""
    if job.gather is not None:
        return gathered(prepared, job.sampler, job.gather, end, job.run.seed)
    return Result(prepared.to_physical(end.x), record_of(prepared, job.sampler, end, job.run.seed))


def _write(
    job: Job,
    scan: Measurements,
    volume: Volume,
    maps: dict[str, Map],
    truth: Volume | None,
    record: dict[str, Any],
    way: Way | None = None,
) -> None:
    """The volume, its maps, its record and its pictures."""
    write_volume(job.out, volume)
    if is_nifti(job.out):
        for name, (image, unit) in maps.items():
            write_nifti(map_path(job.out, name), replace(volume, data=image, unit=unit))
    elif maps:
        record["notes"].append(
            f"a DICOM series holds the image alone: {', '.join(maps)} are written where the output is a NIfTI file"
        )
    with whole_file(beside(job.out, ".json")) as part:
        part.write_text(json.dumps(record, indent=2) + "\n")
    _picture(job, scan, volume, truth, way)
    draw_maps(lambda s: beside(job.out, s), maps, volume.data, volume.unit, None if truth is None else truth.data)


def _loop(
    job: Job, prepared: Prepared, key: str, path: Path, resume: bool, progress: Progress
) -> tuple[Any, list[str]]:
    """The last state, and a list of what is to be noted of how the run went on."""
    problem, sampler, gather = prepared.problem, job.sampler, job.gather
    state, steps, note = None, sampler.steps, ""
    if resume:
        kind = SeedsState if gather is not None else get_type_hints(type(sampler).init)["return"]
        state, note = resumed(path, kind, key, problem.y.device)
    if gather is None:
        states: Iterator[Any] = guarded(iterate(sampler, problem, state), sampler, problem)
    else:
        states, steps = over_seeds(sampler, problem, gather, state), steps * gather.count
    kept = checkpointed(states, path, key, job.run.every)
    return last(progress(kept, steps, kind_of(sampler))), [note] if note else []


def _picture(job: Job, scan: Measurements, volume: Volume, truth: Volume | None, way: Way | None) -> None:
    """The middle slice: truth where known, FBP and TV or for MR zero filling, ours, error."""
    middle = volume.data.shape[0] // 2
    title = f"slice {middle + 1} of {volume.data.shape[0]}"
    if way is not None:
        row = picture_row(way, volume, truth, type(job.sampler).__name__)
        panel(beside(job.out, ".png"), {"": row}, volume.unit, title=title)
        return
    pictures: dict[str, Tensor] = {} if truth is None else {"truth": truth.data[middle, 0]}
    for name, baseline in (("FBP", FBP()), ("TV", TV(lam_z=0.0))):
        if type(baseline) is not type(job.sampler):
            pictures[name] = baseline_slice(scan, baseline, middle)
    pictures[type(job.sampler).__name__] = volume.data[middle, 0]
    panel(beside(job.out, ".png"), {"": pictures}, volume.unit, title=title)


def _plain(fields: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Fields in an order and form whose ``repr`` is their content."""
    return [(k, fingerprint(v) if isinstance(v, Tensor) else v) for k, v in sorted(fields.items())]
