"""The ``invdiff`` command. Bad input: one sentence on stderr and exit code 2; an interrupt: 130."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

BAD_INPUT = 2  # exit code, as typer's own for a wrong option
INTERRUPTED = 130  # exit code, as a shell's for SIGINT

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"max_content_width": 100},
)
console = Console()
errors = Console(stderr=True)

Device = Annotated[str, typer.Option(help="Such as cpu or cuda.")]
Samples = Annotated[
    int | None, typer.Option(help="Run so many seeds: their mean, -std, and interval, -low and -high.")
]  # fmt: skip
BestOf = Annotated[int | None, typer.Option(help="Run so many seeds and keep each slice's best.")]
Invented = Annotated[
    bool, typer.Option("--invented", help="Tell -measured from -invented, with the -invented-share.")
]  # fmt: skip


def show_progress(states: Iterator[Any], steps: int, name: str) -> Iterator[Any]:
    """A bar with the time left round the states of a run."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(
        *columns,
        TextColumn("left"),
        TimeRemainingColumn(),
        console=errors,
        transient=True,
        disable=not errors.is_terminal,
    ) as bar:
        task = bar.add_task(name, total=steps)
        for state in states:
            done = getattr(state, "done", None)  # samples, where several are drawn
            bar.update(task, completed=state.i, description=name if done is None else f"{name}, {done} samples done")
            yield state


@app.command()
def demo(out: Annotated[Path, typer.Option(help="Folder for the pictures and volumes.")] = Path("demo")) -> None:
    """Reconstruct real scans that come with the dependencies, with the shipped priors; about 3 minutes on 2 cores."""
    from invdiff.pipelines import demo as pipeline

    pipeline.run(out, console, show_progress)


CT_ONLY = ("views", "arc", "first", "photons", "sigma", "reduce", "metal", "field")  # options of simulate
MR_ONLY = ("acceleration", "coils", "mask", "centre", "noise", "phase", "true_maps")


@app.command()
def simulate(
    context: typer.Context,
    volume: Annotated[Path, typer.Argument(help="CT or MR volume: NIfTI, a DICOM file or a folder of a series.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Measurement file to write (.h5).")],
    operator: Annotated[str, typer.Option(help="parallel or fan for CT, mri.")] = "parallel",
    views: Annotated[int, typer.Option(help="Number of projections.")] = 20,
    arc: Annotated[float, typer.Option(help="Degrees that they span.")] = 180.0,
    first: Annotated[float, typer.Option(help="Angle of the first view, degrees.")] = 0.0,
    photons: Annotated[float, typer.Option(help="Photons a ray; 0 is noiseless.")] = 0.0,
    sigma: Annotated[float, typer.Option(help="Gaussian noise on the line integrals instead.")] = 0.0,
    reduce: Annotated[int, typer.Option(help="Volume pixels to one of the reconstruction; 0 chooses.")] = 0,
    metal: Annotated[Path | None, typer.Option(help="NIfTI on the volume's grid: rays through its 1 are lost.")] = None,
    field: Annotated[float, typer.Option(help="Diameter in mm that the detector sees; 0 is all.")] = 0.0,
    acceleration: Annotated[float, typer.Option(help="MRI: samples of the grid to one taken.")] = 4.0,
    coils: Annotated[int, typer.Option(help="MRI: coils about the image.")] = 8,
    mask: Annotated[str, typer.Option(help="MRI: uniform, random, equispaced, poisson, radial.")] = "equispaced",
    centre: Annotated[float, typer.Option(help="MRI: share of lines in the sampled centre.")] = 0.08,
    noise: Annotated[float, typer.Option(help="MRI: noise of k-space, percent of the image's scale.")] = 1.0,
    phase: Annotated[bool, typer.Option(help="MRI: a smooth random phase.")] = True,
    true_maps: Annotated[bool, typer.Option("--true-maps", help="MRI: store the true coils, not ESPIRiT's.")] = False,
    slices: Annotated[str, typer.Option(help="Such as 10:26, from the feet; all by default.")] = ":",
    seed: Annotated[int, typer.Option(help="Of the noise, the mask and the phase.")] = 0,
) -> None:
    """Measure a volume, as a measurement file: line integrals of CT or k-space of MR, with noise."""
    from invdiff.datasets import read_volume, write_measurements
    from invdiff.pipelines import simulate as pipeline
    from invdiff.pipelines.regions import read_region

    _refuse_options(context, CT_ONLY if operator == "mri" else MR_ONLY, operator)
    whole = read_volume(volume)
    chosen, solid = pipeline.some_slices(whole, slices), None
    if metal is not None:
        marked = replace(whole, data=read_region(metal, whole, "the metal's region").float())
        solid = pipeline.some_slices(marked, slices).data != 0
    if operator == "mri":
        from invdiff.pipelines import mri

        scan, truth = mri.simulate(
            chosen, mri.MRSimulation(acceleration, coils, mask, centre, noise, phase, true_maps, seed)
        )
        share = float(scan.fields["mask"].float().mean())
        taken = f"k-space of {coils} coils, {100 * share:.3g} % of the grid, of"
    else:
        how = pipeline.Simulation(operator, views, arc, first, photons, sigma, reduce, seed=seed, field=field)
        scan, truth = pipeline.simulate(chosen, how, solid)
        taken = f"{views} views over {arc:g} degrees of"
    write_measurements(out, [scan])
    s, _, h, w = truth.data.shape
    console.print(f"{out}: {taken} {s} slices, for reconstruction at {h} x {w} pixels of {truth.spacing_mm[1]:.3g} mm")


def _refuse_options(context: typer.Context, names: tuple[str, ...], operator: str) -> None:
    """Options that were given and that another operator takes.

    Raises:
        ValueError: with the first of them.
    """
    given = [n for n in names if context.get_parameter_source(n).name == "COMMANDLINE"]  # type: ignore[union-attr]
    if given:
        raise ValueError(f"--{given[0].replace('_', '-')} is not an option of the operator {operator!r}")


@app.command()
def reconstruct(
    scan: Annotated[
        Path, typer.Argument(help="Measurements (.h5), raw data (MR, HTC2022 .mat), or a TOML file that names them.")
    ],
    overrides: Annotated[list[str] | None, typer.Argument(help="table.key=value, such as sampler.rho=0.02.")] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="NIfTI file, or a folder name for DICOM.")] = None,
    prior: Annotated[str | None, typer.Option(help="ct, brain-mr, a folder, none; by the scan if not given.")] = None,
    sampler: Annotated[str | None, typer.Option(help="dds, tv, fbp, sense, l1wavelet, zero-filled, ...")] = None,
    truth: Annotated[Path | None, typer.Option(help="The true volume, for the picture and the numbers.")] = None,
    index: Annotated[int | None, typer.Option(help="Which scan of the file.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of all noise.")] = None,
    device: Annotated[str | None, typer.Option(help="Such as cpu or cuda.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Network arithmetic: auto, float32, bfloat16, float16.")] = None,
    chunk: Annotated[int | None, typer.Option(help="Slices denoised at once; 0 finds how many.")] = None,
    steer: Annotated[str | None, typer.Option(help="none, or circuit: CT, at high noise.")] = None,
    circuit: Annotated[str | None, typer.Option(help="A shipped circuit or its folder; as the prior if not given.")] = (
        None
    ),
    samples: Samples = None,
    best_of: BestOf = None,
    invented: Invented = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint of an interrupted run.")] = False,
) -> None:
    """Reconstruct a measurement file into a volume, its record (.json) and its picture (.png)."""
    from invdiff.pipelines import compare as comparison
    from invdiff.pipelines import output
    from invdiff.pipelines import reconstruct as pipeline

    flags: dict[str, dict[str, Any]] = {
        "output": {"path": None if out is None else str(out), "truth": None if truth is None else str(truth)},
        "prior": {"name": prior},
        "sampler": {"kind": sampler},
        "input": {"index": index},
        "run": {"seed": seed, "device": device, "dtype": dtype, "chunk": chunk},
        "steer": {"kind": steer, "circuit": circuit},
    }
    flags |= _how_sure(samples, best_of, invented)
    job = pipeline.resolve(scan, flags, overrides or [])
    try:
        record = pipeline.run(job, resume, show_progress)
    except KeyboardInterrupt:
        kept = output.checkpoint_path(job.out)
        errors.print(
            f"interrupted; {kept} holds the run: the same command with --resume goes on"
            if kept.exists()
            else "interrupted"
        )
        raise typer.Exit(INTERRUPTED) from None
    chi2 = record["chi2"]
    fit = "" if chi2 is None else f", chi2 per measurement {sum(chi2) / len(chi2):.3g}"
    console.print(f"{job.out}: {record['steps']} steps in {record['seconds']:g} s{fit}")
    for note in record["notes"]:
        console.print(f"note: {note}")
    if job.truth is not None:
        console.print(comparison.table(comparison.run(job.out, job.truth), str(job.out)))


@app.command()
def convert(
    raw: Annotated[Path, typer.Argument(help="Raw MR data: ISMRMRD, fastMRI, Calgary-Campinas, twix, BART.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="raw.key=value, such as raw.compress=8.")] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Measurement file (.h5), or NIfTI or a folder.")] = Path(
        "k.h5"
    ),
) -> None:
    """Raw MR data to a measurement file; to NIfTI or DICOM: the root of the coils' sum of squares."""
    from invdiff.pipelines import raw_mr as pipeline

    console.print(pipeline.convert(raw, out, overrides or []), highlight=False, soft_wrap=True)


@app.command()
def plan(
    scan: Annotated[Path, typer.Argument(help="As for reconstruct: measurements, raw data, or a TOML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="table.key=value, such as run.chunk=4.")] = None,
    prior: Annotated[str | None, typer.Option(help="ct, brain-mr, a folder, none; by the scan if not given.")] = None,
    sampler: Annotated[str | None, typer.Option(help="dds, reddiff, diffusionmbir, tv, cgls, fbp, ...")] = None,
    device: Annotated[str | None, typer.Option(help="Such as cpu or cuda.")] = None,
    chunk: Annotated[int | None, typer.Option(help="Slices denoised at once; 0 finds how many.")] = None,
    samples: Samples = None,
    best_of: BestOf = None,
    invented: Invented = False,
) -> None:
    """What a reconstruction will take in memory and time; exit code 2 where it does not fit. Writes nothing."""
    from invdiff.pipelines import plan as pipeline
    from invdiff.pipelines.reconstruct import resolve

    flags: dict[str, dict[str, Any]] = {
        "output": {"path": "recon.nii.gz"},
        "prior": {"name": prior},
        "sampler": {"kind": sampler},
        "run": {"device": device, "chunk": chunk},
    }
    flags |= _how_sure(samples, best_of, invented)
    for line in pipeline.run(resolve(scan, flags, overrides or [])).lines():
        console.print(line, highlight=False, soft_wrap=True)


@app.command()
def sample(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="table.key=value, such as sampler.sigma_max=40.")
    ] = None,
    prior: Annotated[str, typer.Option(help="A shipped prior, or a prior's folder.")] = "ct",
    solver: Annotated[str, typer.Option(help="ddim, ddpm, heun, dpmpp2m, deis3m, ghvb.")] = "dpmpp2m",
    steps: Annotated[int | None, typer.Option(help="Of the solver; its default if not given.")] = None,
    count: Annotated[int, typer.Option(help="Images to draw.")] = 8,
    size: Annotated[str, typer.Option(help="Pixels: 256, or height x width as 192x256.")] = "256",
    seed: Annotated[int, typer.Option(help="Of all noise.")] = 0,
    out: Annotated[Path, typer.Option("-o", "--out", help="The sheet (.png); its record (.json) beside it.")] = Path(
        "sheet.png"
    ),
    volume: Annotated[Path | None, typer.Option(help="The images as slices of a NIfTI file too.")] = None,
    device: Device = "cpu",
    dtype: Annotated[str | None, typer.Option(help="Network arithmetic: auto, float32, bfloat16, float16.")] = None,
    chunk: Annotated[int | None, typer.Option(help="Images denoised at once.")] = None,
) -> None:
    """Draw images of a prior alone, without measurements: what it believes in, as a sheet."""
    from invdiff.pipelines import sample as pipeline

    flags: dict[str, dict[str, Any]] = {
        "prior": {"name": prior},
        "sampler": {"kind": solver, "steps": steps},
        "images": {"count": count, "size": size},
        "run": {"seed": seed, "device": device, "dtype": dtype, "chunk": chunk},
        "output": {"path": str(out), "volume": None if volume is None else str(volume)},
    }
    job = pipeline.resolve(flags, overrides or [])
    record = pipeline.run(job, show_progress)
    console.print(f"{job.out}: {job.images.count} images, {record['evaluations']} evaluations, {record['seconds']:g} s")


@app.command()
def inpaint(
    volume: Annotated[Path, typer.Argument(help="The volume: NIfTI, a DICOM file or a folder of a DICOM series.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="table.key=value, such as sampler.steps=100.")] = None,
    mask: Annotated[Path, typer.Option(help="NIfTI on the volume's grid: 1 is filled in, 0 is kept.")] = Path(
        "mask.nii.gz"
    ),
    prior: Annotated[str, typer.Option(help="A shipped prior, or a prior's folder.")] = "brain-mr",
    sampler: Annotated[str, typer.Option(help="dds, ddnm, repaint, copaint, ...")] = "dds",
    steer: Annotated[
        str, typer.Option(help="none, circuit (by its exact posterior at high noise) or codes (one over codes).")
    ] = "none",
    circuit: Annotated[str | None, typer.Option(help="A shipped circuit or its folder; as the prior if not given.")] = (
        None
    ),
    like: Annotated[Path | None, typer.Option(help="An example on the volume's grid, for the circuit.")] = None,
    like_region: Annotated[Path | None, typer.Option(help="NIfTI on it: 1 where the example counts.")] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="NIfTI file, or a folder name for DICOM.")] = Path(
        "inpainted.nii.gz"
    ),
    seed: Annotated[int, typer.Option(help="Of all noise.")] = 0,
    device: Device = "cpu",
    dtype: Annotated[str | None, typer.Option(help="Network arithmetic: auto, float32, bfloat16, float16.")] = None,
    chunk: Annotated[int | None, typer.Option(help="Slices denoised at once.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint of an interrupted run.")] = False,
) -> None:
    """Fill in the voxels that a mask marks; the others stay as they are, bit by bit."""
    from invdiff.pipelines import inpaint as pipeline
    from invdiff.pipelines import output

    flags: dict[str, dict[str, Any]] = {
        "input": {"volume": str(volume), "mask": str(mask)},
        "prior": {"name": prior},
        "steer": {
            "kind": steer,
            "circuit": circuit,
            "like": None if like is None else str(like),
            "like_region": None if like_region is None else str(like_region),
        },
        "sampler": {"kind": sampler},
        "run": {"seed": seed, "device": device, "dtype": dtype, "chunk": chunk},
        "output": {"path": str(out)},
    }
    job = pipeline.resolve(flags, overrides or [])
    try:
        record = pipeline.run(job, resume, show_progress)
    except KeyboardInterrupt:
        kept = output.checkpoint_path(job.out)
        said = f"; {kept} holds the run: the same command with --resume goes on" if kept.exists() else ""
        errors.print(f"interrupted{said}")
        raise typer.Exit(INTERRUPTED) from None
    console.print(
        f"{job.out}: {record['filled_voxels']} voxels of {len(record['slices'])} slices filled in, "
        f"{record['seconds']:g} s"
    )
    for note in record["notes"]:
        console.print(f"note: {note}")


@app.command()
def compare(
    image: Annotated[Path, typer.Argument(help="The reconstruction: NIfTI or DICOM.")],
    volume: Annotated[Path, typer.Argument(help="The volume that it should be, on its own grid or a finer one.")],
) -> None:
    """PSNR, SSIM, NMSE, RMSE and bias of a reconstruction, over the volume and in three planes."""
    from invdiff.pipelines import compare as pipeline

    console.print(pipeline.table(pipeline.run(image, volume), str(image)))


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="TOML file, such as examples/train-ct.toml.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the run.")],
    data: Annotated[Path | None, typer.Option(help="Folder with HDF5 slices, NIfTI files or DICOM series.")] = None,
    scans: Annotated[
        list[Path] | None, typer.Option("--from", help="Measurements (.h5) or folders of them: no image is needed.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="HDF5 with the images of all slices of --from, for supervised methods alone.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the folder's checkpoint.")] = False,
    validation: Annotated[Path | None, typer.Option(help="Folder to validate on, instead of some of DATA.")] = None,
    workers: Annotated[int, typer.Option(help="Processes that draw crops; on a GPU a few.")] = 0,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the network; pays on a GPU.")] = False,
    dtype: Annotated[str, typer.Option(help="Network arithmetic: auto, float32, bfloat16.")] = "auto",
    device: Device = "cpu",
) -> None:
    """Train a prior on images, or a model on measurements alone; checkpoints, validation, exact resume, torchrun."""
    from invdiff.pipelines import train as pipeline
    from invdiff.pipelines import train_measured
    from invdiff.pipelines.training_folder import STATE_FILE

    way = pipeline.Way(device, dtype, workers, compiled)
    if (data is None) == (not scans):
        raise ValueError("--data FOLDER of images or --from MEASUREMENTS: one of them is wanted")
    if images is not None and not scans:
        raise ValueError("--images goes with --from MEASUREMENTS, for methods that are shown images")
    try:
        if data is not None:
            pipeline.run(config, data, out, resume, console, way, validation)
        else:
            held = None if validation is None else [validation]
            train_measured.run(config, scans or [], out, resume, console, way, held, images)
    except KeyboardInterrupt:
        kept = (out / STATE_FILE).exists()
        errors.print(f"interrupted; {out} holds the run: with --resume it goes on" if kept else "interrupted")
        raise typer.Exit(INTERRUPTED) from None


def _how_sure(samples: int | None, best_of: int | None, invented: bool) -> dict[str, dict[str, Any]]:
    """The tables that these options stand for."""
    asked = {"samples": samples, "best": best_of}
    tables: dict[str, dict[str, Any]] = {table: {"count": n} for table, n in asked.items() if n is not None}
    return {**tables, "invented": {}} if invented else tables


@app.command("train-circuit")
def train_circuit(
    config: Annotated[Path, typer.Argument(help="TOML file, such as examples/train-circuit-brain-mr.toml.")],
    data: Annotated[Path, typer.Option(help="Folder with HDF5 slices, NIfTI files or DICOM series.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the run.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the folder's checkpoint.")] = False,
) -> None:
    """Learn a probabilistic circuit over cells or codes of images, which steers a prior (invdiff inpaint --steer)."""
    from invdiff.pipelines import train_circuit as pipeline

    try:
        pipeline.run(config, data, out, resume, console)
    except KeyboardInterrupt:
        kept = any((out / name).exists() for name in pipeline.STATE_FILES)
        errors.print(f"interrupted; {out} holds the run: with --resume it goes on" if kept else "interrupted")
        raise typer.Exit(INTERRUPTED) from None


def main() -> None:
    """The entry point: errors of the user's making become one sentence and exit code 2."""
    from invdiff.run import DivergedError

    try:
        app(standalone_mode=True)
    except (ValueError, FloatingPointError, DivergedError, OSError) as error:
        errors.print(f"invdiff: {error}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(BAD_INPUT)
    except KeyboardInterrupt:
        errors.print("interrupted")
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
