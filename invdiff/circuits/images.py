"""A circuit over the cells of a grid on an image, each the mean of a block of pixels, and its folder."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from invdiff.circuits.circuit import Circuit
from invdiff.circuits.inputs import FAMILIES, MISSING, Discrete, Inputs, Spot
from invdiff.circuits.structure import Structure
from invdiff.files import sha256_of, whole_file

SHIPPED = Path(__file__).parent / "weights"
WEIGHTS_FILE = "weights.safetensors"
CONFIG_FILE = "config.json"
LEAST_LOG = -30.0  # of a stored probability: less is nothing in float32 sums
HALVED = ("weights", "inputs.log_table")  # logarithms, stored as float16


class Pooled(NamedTuple):
    """Cells of images, (s v) each. mean: of the pixels that count, 0 where none do; number: how many those are."""

    mean: Tensor
    number: Tensor


@dataclass(frozen=True)
class GridInfo:
    """What a circuit over images is of: travels with its weights, in ``config.json``.

    Args:
        name: of the circuit.
        unit: physical unit of the images, such as ``HU``.
        low: physical value that is -1 in prior units.
        high: physical value that is +1.
        rows: of the grid.
        columns: of the grid.
        block: height and width of a cell in pixels.
        levels: into which [-1, 1] is divided, for discrete inputs, and for bits per dimension.
        within: standard deviation of a cell's pixels round their mean, prior units.
        pixel_mm: smallest and largest pixel size of the training slices; zeros where there were none.
    """

    name: str
    unit: str
    low: float
    high: float
    rows: int
    columns: int
    block: int
    levels: int
    within: float
    pixel_mm: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "pixel_mm", tuple(self.pixel_mm))
        if not self.low < self.high:
            raise ValueError(f"the range of circuit {self.name!r} is [{self.low}, {self.high}]; low < high is wanted")
        for name, least in (("rows", 1), ("columns", 1), ("block", 1), ("levels", 2), ("within", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; at least {least} is wanted")

    @property
    def width(self) -> float:
        """Of a level, in prior units."""
        return 2 / self.levels

    def levels_of(self, cells: Tensor) -> Tensor:
        """The levels of values in prior units, int64; ``MISSING`` where they are NaN."""
        level = ((cells.nan_to_num() + 1) / self.width).floor().long().clamp(0, self.levels - 1)
        return level.masked_fill(torch.isnan(cells), MISSING)

    def pooled(self, x: Tensor, counts: Tensor | None = None) -> Pooled:
        """Means over cells: x (s 1 h w), counts of its shape, 1 where a pixel counts (all if None)."""
        weight = torch.ones_like(x) if counts is None else counts.to(x).expand_as(x)
        value, number = (self._blocks(part) for part in (x * weight, weight))
        return Pooled(value / number.clamp_min(1), number)

    def cut(self, x: Tensor, value: float) -> Tensor:
        """The grid's pixels (s 1 rows*block columns*block) of images (s 1 h w), ``value`` beyond their edges."""
        h, w = x.shape[2:]
        top, left = (h - self.rows * self.block) // 2, (w - self.columns * self.block) // 2
        pad = (-left, self.columns * self.block - w + left, -top, self.rows * self.block - h + top)
        return torch.nn.functional.pad(x, pad, value=value)

    def put(self, x: Tensor, h: int, w: int) -> Tensor:
        """The grid's pixels in the middle of images (s 1 h w), 0 beyond the grid: the adjoint of ``cut`` with 0."""
        top, left = (h - x.shape[2]) // 2, (w - x.shape[3]) // 2
        return torch.nn.functional.pad(x, (left, w - left - x.shape[3], top, h - top - x.shape[2]))

    def _blocks(self, x: Tensor) -> Tensor:
        """Sums over cells: (s 1 h w) -> (s v)."""
        x = self.cut(x, 0.0)
        return x.reshape(len(x), self.rows, self.block, self.columns, self.block).sum((2, 4)).flatten(1)

    def spread(self, cells: Tensor, h: int, w: int) -> Tensor:
        """Cells at every pixel, linearly between their centres, 0 beyond the grid: (s rows columns) -> (s 1 h w)."""
        x = torch.nn.functional.interpolate(
            cells[:, None], scale_factor=self.block, mode="bilinear", align_corners=False
        )
        return self.put(x, h, w)


class Cells(NamedTuple):
    """What a circuit says of the cells of images, in prior units: (s rows columns) each."""

    mean: Tensor
    variance: Tensor


@dataclass(frozen=True, eq=False)
class ImageCircuit:
    """p(cells of an image): the grid lies in the middle of images of any size; cells outside them are not known.

    Args:
        circuit: over rows * columns variables, by rows.
        info: of the grid.
        sha256: of the weights, for records.

    Raises:
        ValueError: a circuit of another number of variables or levels.
    """

    circuit: Circuit
    info: GridInfo
    sha256: str = ""

    def __post_init__(self) -> None:
        variables = self.circuit.structure.variables
        if variables != self.info.rows * self.info.columns:
            raise ValueError(f"the circuit has {variables} variables, the grid {self.info.rows} x {self.info.columns}")
        inputs = self.circuit.inputs
        if isinstance(inputs, Discrete) and inputs.levels != self.info.levels:
            raise ValueError(f"the circuit has {inputs.levels} levels, its description {self.info.levels}")

    def to(self, like: Tensor) -> ImageCircuit:
        """The same in the dtype and on the device of ``like``."""
        return replace(self, circuit=self.circuit.to(like))

    def data(self, cells: Tensor) -> Tensor:
        """Values in prior units (s v), NaN where missing, as the circuit's data: levels, or themselves."""
        if not isinstance(self.circuit.inputs, Discrete):
            return cells
        return self.info.levels_of(cells)

    def evidence(self, spot: Spot) -> Any:
        """Gaussian evidence in prior units as the circuit's: ln w of every level (s v C), or itself."""
        if not isinstance(self.circuit.inputs, Discrete):
            return spot
        level = torch.arange(self.info.levels, dtype=spot.value.dtype, device=spot.value.device)
        centre = (level + 0.5) * self.info.width - 1
        known = torch.isfinite(spot.variance)
        variance = torch.where(known, spot.variance, 1.0).clamp_min((self.info.width / 4) ** 2)
        value = spot.value.clamp(-1, 1)  # the outer levels have the tails
        log_w = -0.5 * (value[..., None] - centre).square() / variance[..., None]
        return torch.where(known[..., None], log_w, 0.0)

    def posterior(self, spot: Spot) -> Cells:
        """Mean and variance of every cell given Gaussian evidence (s v), in prior units."""
        found = self.circuit.posterior(self.evidence(spot))
        mean, variance = found.mean, found.variance
        if isinstance(self.circuit.inputs, Discrete):
            width = self.info.width
            mean, variance = (mean + 0.5) * width - 1, (variance + 1 / 12) * width**2  # uniform within a level
        grid = (self.info.rows, self.info.columns)
        return Cells(mean.unflatten(1, grid), variance.unflatten(1, grid))


def save(folder: Path, circuit: ImageCircuit, extra: dict[str, Any] | None = None) -> None:
    """Write ``weights.safetensors`` and ``config.json`` into ``folder``, each renamed into place.

    Probabilities are stored as float16 logarithms, and are normalised again when read.

    Args:
        folder: made if missing.
        circuit: what is written.
        extra: more keys for config.json, such as training figures.

    Raises:
        ValueError: a folder that cannot be written to.
    """
    write_folder(folder, circuit.circuit, circuit.info, {}, extra or {})


def write_folder(
    folder: Path, circuit: Circuit, info: GridInfo, more: dict[str, Tensor], extra: dict[str, Any]
) -> None:
    """The files of ``save``, with more tensors beside the circuit's."""
    from safetensors.torch import save as to_bytes

    inputs = circuit.inputs
    tensors: dict[str, Tensor] = {"root": circuit.root, "weights": circuit.weights.log()}
    tensors |= {f"inputs.{name}": value for name, value in inputs.tensors.items()}
    tensors = {n: t.clamp_min(LEAST_LOG).half() if n in HALVED else t.float() for n, t in tensors.items()}
    for name in ("parent", "owner", "sum_groups", "input_groups"):
        tensors[name] = torch.tensor(getattr(circuit.structure, name), dtype=torch.int32)
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / WEIGHTS_FILE
    with whole_file(weights) as part:
        part.write_bytes(to_bytes({n: t.detach().cpu().contiguous() for n, t in {**tensors, **more}.items()}))
    family = {f.name: getattr(inputs, f.name) for f in fields(inputs) if f.name not in inputs.tensors}  # type: ignore[arg-type]
    document = {
        "circuit": asdict(info),
        "inputs": {"kind": inputs.kind, **family},
        "sha256": sha256_of([weights]),
        **extra,
    }
    with whole_file(folder / CONFIG_FILE) as part:
        part.write_text(json.dumps(document, indent=2) + "\n")


def shipped() -> list[str]:
    """Names of the circuits in the package, over cells and over codes."""
    return sorted(p.parent.name for p in SHIPPED.glob(f"*/{CONFIG_FILE}"))


def folder_of(name_or_folder: str | Path) -> Path:
    """The folder of a shipped circuit of that name, else the folder itself."""
    return SHIPPED / str(name_or_folder) if str(name_or_folder) in shipped() else Path(name_or_folder)


def load(name_or_folder: str | Path) -> ImageCircuit:
    """Load a shipped circuit by name, or one from the folder that ``invdiff train-circuit`` wrote.

    Returns:
        The circuit, float32, on the CPU; ``.to(x)`` moves it.

    Raises:
        ValueError: no such circuit, one over codes (``invdiff.circuits.codes.load`` reads those), a file missing, or
            weights that are not those the config names.
    """
    folder = folder_of(name_or_folder)
    circuit, info, sha256, document, _ = read_folder(folder, str(name_or_folder))
    if "autoencoder" in document:
        raise ValueError(f"{name_or_folder} is a circuit over codes; one over cells is wanted")
    return ImageCircuit(circuit, info, sha256)


def read_folder(folder: Path, name: str) -> tuple[Circuit, GridInfo, str, dict[str, Any], dict[str, Tensor]]:
    """The circuit, its description, the hash of its file, config.json, and the tensors that are not the circuit's.

    Raises:
        ValueError: as ``load``.
    """
    from safetensors.torch import load_file

    weights, config = folder / WEIGHTS_FILE, folder / CONFIG_FILE
    if not weights.is_file() or not config.is_file():
        known = f"one of {', '.join(shipped())}, or " if shipped() else ""
        raise ValueError(f"no circuit {name!r}: give {known}a folder with {CONFIG_FILE} and {WEIGHTS_FILE}")
    try:
        document = json.loads(config.read_text())
        sha256, info, inputs = document["sha256"], document["circuit"], dict(document["inputs"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{config} was not written by invdiff train-circuit: {error!r}") from error
    if sha256_of([weights]) != sha256:
        raise ValueError(f"{weights} has sha256 {sha256_of([weights])[:12]}..., {CONFIG_FILE} names {sha256[:12]}...")
    tensors = load_file(weights)
    try:
        circuit = _circuit(tensors, inputs, folder)
        return circuit, GridInfo(**info), sha256, document, tensors
    except (KeyError, TypeError) as error:
        raise ValueError(f"{weights} is not of a circuit of this version: {error}") from error


def _circuit(tensors: dict[str, Tensor], inputs: dict[str, Any], folder: Path) -> Circuit:
    """The circuit of a file's tensors, which are taken out."""
    kind = inputs.pop("kind")
    if kind not in FAMILIES:
        raise ValueError(f"{folder}: inputs of kind {kind!r}; one of {', '.join(FAMILIES)} is wanted")
    names = ("parent", "owner", "sum_groups", "input_groups")
    structure = Structure(*(tuple(tensors.pop(n).tolist()) for n in names))
    found = {n.removeprefix("inputs."): tensors.pop(n).float() for n in list(tensors) if n.startswith("inputs.")}
    if "log_table" in found:
        found["log_table"] = found["log_table"].log_softmax(-1)
    family: Inputs = FAMILIES[kind](**found, **inputs)
    return Circuit(structure, family, tensors.pop("root"), tensors.pop("weights").float().softmax(-1))


def bits(circuit: ImageCircuit, cells: Tensor, batch: int = 64) -> float:
    """Bits a cell of values in prior units (n v): of their levels, or of the density times a level's width."""
    from invdiff.circuits.baselines import bits_per_dimension

    width = 0.0 if isinstance(circuit.circuit.inputs, Discrete) else math.log2(circuit.info.width)
    return bits_per_dimension(circuit.circuit, circuit.data(cells), batch) - width
