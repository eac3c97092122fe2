"""``invdiff train --from``: a model out of measurements alone, with checkpoints, validation and exact resume."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from invdiff.config import build, find, read_toml
from invdiff.datasets import Measurements
from invdiff.files import whole_file
from invdiff.measured import Example, MeasuredLearning, Method
from invdiff.measured.ambient import AmbientMethod
from invdiff.pipelines.ambient import keep_scan
from invdiff.pipelines.devices import device_of, dtype_of
from invdiff.pipelines.measured_data import Collection, collect, files_of, held_out
from invdiff.pipelines.mri import MRIConfig
from invdiff.pipelines.train import Job, Way
from invdiff.pipelines.training_folder import check_folder
from invdiff.priors.launch import launched
from invdiff.priors.model import PriorInfo, save
from invdiff.priors.network import UNetConfig
from invdiff.priors.training import Task, TrainingState
from invdiff.run import fingerprint

TABLES = ("measured", "prior", "network", "training", "mri")
MODEL, CARD = "model", "README.md"
UNSAMPLED = 0.01  # share of k-space that may be sampled by no scan without a word
SMALLEST = 0.01  # noise level, prior units, where none is given and the scans' noise is below


@dataclass(frozen=True)
class MeasuredPlan:
    """A training on measurements, resolved."""

    method: Method
    learning: MeasuredLearning
    network: UNetConfig
    prior: Mapping[str, Any]
    mri: MRIConfig | None

    def info(self, pixel_mm: tuple[float, float] = (0.0, 0.0), noise: float = 0.0) -> PriorInfo:
        """The model's description; its smallest noise level is that of the scans where none is given."""
        known = {"pixel_mm": pixel_mm, "sigma_min": max(SMALLEST, noise), **self.prior}
        return build(PriorInfo, known, "prior")


def plan_of(config_file: Path) -> MeasuredPlan:
    """The plan that a TOML file describes.

    Raises:
        ValueError: no TOML, or a wrong table, method, key or value.
    """
    document = read_toml(config_file)
    for name, table in document.items():
        if name not in TABLES or not isinstance(table, dict):
            raise ValueError(f"{config_file} has {name!r}; the tables {', '.join(TABLES)} are known")
    fields = dict(document.get("measured", {}))
    method = find("methods", fields.pop("method", "forward-model"))
    plan = MeasuredPlan(
        build(method, fields, "measured"),
        build(MeasuredLearning, document.get("training", {}), "training"),
        build(UNetConfig, document.get("network", {}), "network"),
        document.get("prior", {}),
        build(MRIConfig, document["mri"], "mri") if "mri" in document else None,
    )
    plan.info()
    return plan


def run(
    config_file: Path,
    scans: Sequence[Path],
    out: Path,
    resume: bool,
    console: Console,
    way: Way,
    validation: Sequence[Path] | None = None,
    images: Path | None = None,
) -> None:
    """Train the model of ``config_file`` on measurements; keeps ``state.pt``, ``log.csv`` and ``model/`` in ``out``.

    Args:
        config_file: TOML; see docs/forward-models.md.
        scans: measurement files, or folders of them.
        out: folder of the run.
        resume: go on from its checkpoint.
        console: where the first process says how it goes.
        way: device and the like.
        validation: files or folders that only the validation sees, in the place of held-out scans.
        images: HDF5 file with the images of all slices, for methods that are shown them; see ``collect``.

    Raises:
        ValueError: a wrong key, scans that the method cannot learn from, a folder that holds another run.
        KeyboardInterrupt: after the step at which it came, with a checkpoint.
    """
    plan = plan_of(config_file)
    if images is not None and not plan.method.supervised:
        raise ValueError(f"the method {plan.method.name} is shown no images; --images {images} is for supervised ones")
    check_folder(out, resume)
    dtype, launcher = dtype_of(way.dtype, device_of(way.device)), launched(way.device)
    channels = plan.network.image_channels
    found, trained, judged = _read(plan, scans, validation, images)
    pixels = found.pixel_mm
    noise = max(e.sigma for e in trained + judged)
    info = plan.info((min(pixels), max(pixels)), noise * (1 + 1e-6))
    notes = plan.method.check(trained + judged, info)
    if found.unsampled > UNSAMPLED:
        notes.append(f"{100 * found.unsampled:.3g} % of k-space is sampled by no scan: the coils alone tell of it")
    recorded = {
        "training": asdict(plan.learning),
        "network": asdict(plan.network),
        "prior": asdict(info),
        "measured": {"method": plan.method.name, **asdict(plan.method)},  # type: ignore[call-overload]
        "data": {"trained": _digest(trained), "validated": _digest(judged)},
    }
    trained, judged = ([e.to(launcher.device) for e in some] for some in (trained, judged))
    extra = plan.method.extra(channels)
    parts = plan.learning, plan.network, extra, info, recorded, launcher, console, dtype
    job = MeasuredJob(out, *parts, plan.method, trained, judged, found.widest)
    for note in notes:
        job.say(f"note: {note}")
    job.begin(resume, way)


def _read(
    plan: MeasuredPlan, scans: Sequence[Path], validation: Sequence[Path] | None, images: Path | None
) -> tuple[Collection, list[Example], list[Example]]:
    """All scans, what of them is trained on, and what is validated on."""
    both = [*scans, *(validation or [])]
    found = collect(both, plan.info(), plan.network.image_channels, plan.mri, images)
    count = max(found.scan) + 1
    if validation is None:
        held = held_out(count, plan.learning.held_out, plan.learning.seed)
    else:
        first = len(files_of(scans))
        held = sorted({k for k, file in zip(found.scan, found.file, strict=True) if file >= first})
    trained, judged = found.where(sorted(set(range(count)) - set(held))), found.where(held)
    if plan.learning.patience and not judged:
        raise ValueError(
            f"training.patience is {plan.learning.patience} and nothing is validated on: held_out is "
            f"{plan.learning.held_out} of {count} scans; give --validation, or patience = 0"
        )
    return found, trained, judged


def _digest(examples: Sequence[Example]) -> str:
    return fingerprint(*(e.y for e in examples)) if examples else ""


@dataclass(frozen=True)
class MeasuredJob(Job):
    """The training of a model on measurements.

    Args:
        method: how it learns.
        examples: what is trained on.
        judged: what is validated on.
        widest: the slice of most views, through whose operator an ambient prior will see images.
    """

    config: MeasuredLearning
    method: Method
    examples: list[Example]
    judged: list[Example]
    widest: Measurements | None

    def task(self) -> Task[Any]:
        """The method's."""
        return self.method.task(self.examples, self.config, self.info)

    def opening(self) -> str:
        """How many scans' slices, and their noise."""
        views, sigmas = ([getattr(e, name) for e in self.examples] for name in ("views", "sigma"))
        return (
            f"training {self.info.name!r} by {self.method.name} on the measurements of {len(self.examples)} slices, "
            f"{min(views)} to {max(views)} views, noise {min(sigmas):.3g} to {max(sigmas):.3g}; held out: "
            f"{len(self.judged)}; {self.launcher.world} x {self.launcher.device.type}"
        )

    @property
    def validated(self) -> bool:
        """Whether any scans are held out."""
        return bool(self.judged)

    def judge(self, state: TrainingState) -> dict[float, float]:
        """The method's loss on the held-out scans."""
        return self.method.judge(state.average, self.judged, self.info, self.dtype)

    def export(self, state: TrainingState, judged: dict[float, float]) -> None:
        """``model/``, with its card."""
        info = self.method.exported(self.info, self.examples)
        more = {"measured": self.recorded["measured"], "slices": len(self.examples)}
        figures = {**self.figures(state, judged), **more}
        save(self.out / MODEL, state.average, info, figures)
        if self.widest is not None and self.method.name == AmbientMethod.name:
            keep_scan(self.out / MODEL, self.widest)
        with whole_file(self.out / MODEL / CARD) as part:
            part.write_text(card(info, self.method, self.examples, figures))


def card(info: PriorInfo, method: Method, examples: Sequence[Example], figures: Mapping[str, Any]) -> str:
    """The model's card: what it is, and whether it saw an image."""
    shape = " x ".join(str(n) for n in examples[0].operator.domain.shape[2:])
    losses = ", ".join(f"{loss:.4f} at {sigma}" for sigma, loss in figures["validation_loss"].items())
    views, sigmas = ([getattr(e, name) for e in examples] for name in ("views", "sigma"))
    low, high = info.pixel_mm
    if method.supervised:
        seen = "with the images beside the measurements, for comparison: **it saw images**, and the measurements of"
    else:
        seen = "on measurements alone: **it saw no image**, only the measurements of"
    return (
        f"# {info.name}\n\n"
        f"Trained by `{method.name}` {seen} {len(examples)} slices "
        f"({min(views)} to {max(views)} views or lines each, noise {min(sigmas):.3g} to "
        f"{max(sigmas):.3g} in prior units).\n\n{method.about()}\n\n"
        f"- Images: {shape} pixels of {low:.3g} to {high:.3g} mm, in {info.unit}, -1 and 1 at {info.low:g} and "
        f"{info.high:g}\n"
        f"- Noise levels: {info.sigma_min:.3g} to {info.sigma_max:.3g}\n"
        f"- Seen in training: {figures['images_seen']} images' measurements in {figures['steps']} steps\n"
        f"- Held-out loss by noise level: {losses or 'none was held out'}\n\n"
        "What no scan of the training sees it does not know. Not for diagnosis.\n"
    )
