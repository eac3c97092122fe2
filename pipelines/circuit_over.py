"""What a circuit ranges over: cells of an image, or codes of an autoencoder. Their numbers, bits, and folders."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from invdiff.circuits import (
    Categorical,
    Circuit,
    GridInfo,
    ImageCircuit,
    Learned,
    Structure,
    bits_per_dimension,
    chow_liu,
    codes,
    distilled_start,
    factorised,
    images,
    k_means_start,
)
from invdiff.circuits.autoencoder import Autoencoder
from invdiff.circuits.starts import clustered
from invdiff.circuits.structure import chow_liu_parents, mutual_information
from invdiff.noise import KeyedNoise
from invdiff.pipelines.circuit_draws import Draws, judged_images
from invdiff.pipelines.circuit_plan import CircuitPlan
from invdiff.pipelines.pictures import panel
from invdiff.priors.slices import Slices

PSEUDOCOUNTS = (0.3, 3.0, 30.0)  # tried for the baselines, the best of which counts
AT_ONCE = 16  # images that are encoded at once
SHOWN = 4  # images of a picture
WITHIN_DRAWS = 64  # draws by which the pixels' deviation within a cell is measured, for codes


class Drawn(NamedTuple):
    """values: (n v), cells in prior units or codes; teacher: (n v d); within: mean variance of a cell's pixels."""

    values: Tensor
    teacher: Tensor
    within: float


@dataclass(frozen=True)
class Over(ABC):
    """A circuit's variables, in the images that it learns from and in those that it is validated on."""

    plan: CircuitPlan
    slices: Slices
    judged: Slices

    word: ClassVar[str]
    kinds: ClassVar[str]

    @property
    @abstractmethod
    def each(self) -> str:
        """What a variable is of."""

    @property
    @abstractmethod
    def told(self) -> str:
        """What its card says beside the numbers."""

    def info(self, within: float) -> GridInfo:
        """The circuit's description."""
        pixel = self.slices.pixel_mm
        return self.plan.circuit.info(within, (float(pixel.min()), float(pixel.max())))

    @cached_property
    def draws(self) -> Draws:
        """Of images."""
        return Draws(self.slices, self.info(0.0), self.plan.training)

    @abstractmethod
    def drawn(self, step: int, count: int) -> Drawn:
        """Draws of a step, and what a teacher tells of them."""

    @abstractmethod
    def values(self, step: int, count: int) -> Tensor:
        """The values of ``drawn`` alone."""

    @cached_property
    @abstractmethod
    def held_out(self) -> Tensor:
        """Values (n v) of the validation slices."""

    @abstractmethod
    def data(self, values: Tensor) -> Tensor:
        """Values as the circuit's data."""

    @abstractmethod
    def levels(self, values: Tensor) -> Tensor:
        """Values as numbers from 0, int64."""

    @abstractmethod
    def grouped(self, values: Tensor) -> Tensor:
        """Values as what the mutual information of the baseline's tree is of."""

    @abstractmethod
    def tree(self, values: Tensor) -> Structure:
        """The circuit's structure."""

    @abstractmethod
    def bits(self, circuit: Circuit, values: Tensor) -> float:
        """Bits a variable."""

    @abstractmethod
    def save(self, folder: Path, circuit: Circuit, within: float, figures: dict[str, Any]) -> str:
        """Write the circuit's folder; returns its card."""

    @abstractmethod
    def pictures(self, folder: Path, circuit: Circuit) -> None:
        """Write what shows a learned circuit, beside its weights."""

    def start(self, structure: Structure, drawn: Drawn) -> Learned:
        """The circuit from which EM starts."""
        circuit, config = self.plan.circuit, self.plan.training
        x, inputs = self.data(drawn.values), circuit.first_inputs()
        how = (circuit.states, config.pseudocount, config.seed)
        if config.start == "distilled":
            return distilled_start(structure, inputs, x, drawn.teacher, *how)
        return k_means_start(structure, inputs, x, *how)

    def baselines(self, values: Tensor) -> dict[str, float]:
        """Held-out bits of independent variables and of the Chow-Liu tree, each with its best pseudocount."""
        levels, found = self.plan.circuit.levels, dict[str, float]()
        x = self.levels(values)
        parents = chow_liu_parents(mutual_information(self.grouped(values), self.plan.circuit.bins))
        blank = Categorical(torch.zeros(1, 1, levels).log_softmax(-1))
        for pseudocount in PSEUDOCOUNTS:
            tree = chow_liu(x, levels, pseudocount, parents)
            for name, circuit in (("factorised", factorised(blank, x, pseudocount)), ("chow-liu", tree)):
                value = self.bits(circuit, self.held_out)
                found[name] = min(value, found.get(name, value))
        return found


@dataclass(frozen=True)
class OverCells(Over):
    """Means of blocks of pixels, in prior units."""

    word = "cell"

    def drawn(self, step: int, count: int) -> Drawn:
        """The teacher tells the means of a cell's quarters, or the cells themselves where blocks are odd."""
        info, found, teacher, inside = self.draws.info, list[Tensor](), list[Tensor](), 0.0
        parts = 1 if info.block % 2 else 2
        fine = replace(info, rows=parts * info.rows, columns=parts * info.columns, block=info.block // parts)
        for x in self.draws.images(step, count):
            mean = self._cells(x)
            known = ~torch.isnan(mean)
            inside += float((info.pooled(x.square()).mean - mean.square())[known].mean()) / count
            quarters = fine.pooled(x).mean.view(1, info.rows, parts, info.columns, parts)
            teacher.append(quarters.transpose(2, 3).reshape(1, info.rows * info.columns, -1))
            found.append(mean)
        return Drawn(torch.cat(found), torch.cat(teacher), inside)

    def values(self, step: int, count: int) -> Tensor:
        """Cells (n v)."""
        return torch.cat([self._cells(x) for x in self.draws.images(step, count)])

    @cached_property
    def held_out(self) -> Tensor:
        """Cells (n v)."""
        found = judged_images(self.judged, self.draws.info, self.plan.training.judged)
        return torch.cat([self._cells(x) for x in found])

    def _cells(self, x: Tensor) -> Tensor:
        """(s v) of images (s 1 h w), NaN outside them."""
        pooled = self.draws.info.pooled(x)
        return pooled.mean.masked_fill(pooled.number == 0, torch.nan)

    def data(self, values: Tensor) -> Tensor:
        """Levels, or the cells themselves."""
        return self.plan.circuit.data(values, self.draws.info)

    def levels(self, values: Tensor) -> Tensor:
        """Of the cells."""
        return self.draws.info.levels_of(values)

    def grouped(self, values: Tensor) -> Tensor:
        """Their levels."""
        return self.levels(values)

    def tree(self, values: Tensor) -> Structure:
        """Of the cells."""
        return self.plan.circuit.tree(values)

    def bits(self, circuit: Circuit, values: Tensor) -> float:
        """Bits a cell of levels."""
        return images.bits(ImageCircuit(circuit, self.draws.info), values)

    def save(self, folder: Path, circuit: Circuit, within: float, figures: dict[str, Any]) -> str:
        """As ``invdiff.circuits.load`` reads it."""
        ours = ImageCircuit(circuit, self.info(within))
        images.save(folder, ours, figures)
        return card(ours, asdict(self.plan.circuit), figures, self)

    def pictures(self, folder: Path, circuit: Circuit) -> None:
        """None: cells are no images."""

    @property
    def each(self) -> str:
        """What a cell is."""
        return f"the mean of {self.plan.circuit.block} x {self.plan.circuit.block} pixels"

    kinds = "levels"

    @property
    def told(self) -> str:
        """Of its use."""
        use = "It steers a diffusion prior at high noise (`invdiff.priors.Steered`). "
        return use + "It knows nothing of what is smaller than a cell."


@dataclass(frozen=True)
class OverCodes(Over):
    """Codes of an autoencoder, a patch of pixels each."""

    autoencoder: Autoencoder
    reconstruction: dict[str, float]
    dtype: torch.dtype | None

    word = "code"

    def drawn(self, step: int, count: int) -> Drawn:
        """The teacher is the encoder."""
        vectors, inside = list[Tensor](), 0.0
        for k, x in enumerate(self.draws.images(step, count)):
            if k < WITHIN_DRAWS:
                inside += float((self.draws.info.pooled(x.square()).mean - self.draws.info.pooled(x).mean ** 2).mean())
            vectors.append(self._vectors(x))
        found = torch.cat(vectors)
        return Drawn(self.autoencoder.nearest(found), found, inside / min(count, WITHIN_DRAWS))

    def values(self, step: int, count: int) -> Tensor:
        """Codes (n v)."""
        every = torch.cat([self.draws.info.cut(x, -1.0) for x in self.draws.images(step, count)])
        return torch.cat([self.autoencoder.nearest(self._vectors(x)) for x in every.split(AT_ONCE)])

    @torch.no_grad()
    def _vectors(self, x: Tensor) -> Tensor:
        return self.autoencoder.vectors(self.draws.info.cut(x, -1.0), self.dtype)

    @cached_property
    def held_out(self) -> Tensor:
        """Codes (n v)."""
        found = judged_images(self.judged, self.draws.info, self.plan.training.judged)
        return torch.cat([self.autoencoder.nearest(self._vectors(x)) for x in found])

    def data(self, values: Tensor) -> Tensor:
        """The codes."""
        return values

    def levels(self, values: Tensor) -> Tensor:
        """The codes."""
        return values

    def grouped(self, values: Tensor) -> Tensor:
        """Clusters of the codes by their vectors: codes' numbers are names, and there are too many for histograms."""
        return self._cluster[values]

    @cached_property
    def _cluster(self) -> Tensor:
        """The cluster of every code."""
        return clustered(self.autoencoder.book, self.plan.circuit.bins, self.plan.training.seed)

    def tree(self, values: Tensor) -> Structure:
        """Of the clusters."""
        return self.plan.circuit.tree(self.grouped(values))

    def bits(self, circuit: Circuit, values: Tensor) -> float:
        """Bits a code."""
        return bits_per_dimension(circuit, values)

    def save(self, folder: Path, circuit: Circuit, within: float, figures: dict[str, Any]) -> str:
        """As ``invdiff.circuits.codes.load`` reads it."""
        ours = codes.CodeCircuit(self.autoencoder, circuit, self.info(within))
        codes.save(folder, ours, {**figures, "reconstruction": self.reconstruction})
        return card(ours, asdict(self.plan.circuit), figures, self)

    @property
    def each(self) -> str:
        """What a code is of."""
        return f"of a patch of {self.plan.circuit.block} x {self.plan.circuit.block} pixels"

    kinds = "codes"

    @property
    def told(self) -> str:
        """Of the autoencoder."""
        said, plan = self.reconstruction, self.plan.autoencoder
        steps = 0 if plan is None else plan.steps
        return f"""The autoencoder (van den Oord, Vinyals & Kavukcuoglu 2017; MONAI's VQVAE) was trained on the
same slices in {steps} steps. Held-out slices, decoded from their codes: {said["psnr"]:.2f} dB over the range, SSIM
{said["ssim"]:.3f}, {said["used"]:.0f} of {self.plan.circuit.levels} codes in use, perplexity {said["perplexity"]:.1f}.

![joint draws of the circuit, decoded](samples.png)

Joint draws of the circuit, decoded. It steers a diffusion prior at high noise (`invdiff.priors.SteeredByCodes`)."""

    @torch.no_grad()
    def pictures(self, folder: Path, circuit: Circuit) -> None:
        """Joint draws of the circuit, decoded, in its folder; beside that folder held-out images and them decoded.

        The held-out images stay with the run: what a card is published with shows no subject.
        """
        info = self.info(0.0)
        shown = judged_images(self.judged, info, SHOWN)
        x = torch.cat([info.cut(one, -1.0) for one in shown])
        decoded = self.autoencoder.decoded(self.autoencoder.codes(x), info.columns)
        free = torch.zeros(2 * SHOWN, info.rows * info.columns, info.levels)
        drawn = self.autoencoder.decoded(circuit.sample(free, KeyedNoise(0)), info.columns)
        for path, rows in (
            (folder / "samples.png", {"drawn": drawn[:SHOWN], "": drawn[SHOWN:]}),
            (folder.parent / "decoded.png", {"held out": x, "decoded": decoded}),
        ):
            shades = {name: (part[:, 0] + 1) / 2 * (info.high - info.low) + info.low for name, part in rows.items()}
            named = {name: {f"{k + 1}": one for k, one in enumerate(part)} for name, part in shades.items()}
            panel(path, named, info.unit, (info.low, info.high), title=info.name)


def card(ours: ImageCircuit | codes.CodeCircuit, config: dict[str, Any], figures: dict[str, Any], over: Over) -> str:
    """What is known of a circuit, as Markdown."""
    info, circuit, s, word = ours.info, ours.circuit, ours.circuit.structure, over.word
    bits_of = figures["held_out_bits_per_" + word]
    rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in bits_of.items())
    low, high = info.pixel_mm
    how = (
        f"{config['structure']}, {s.regions} regions in {len(s.levels)} levels, K = {circuit.states}, "
        f"{circuit.inputs.kind} inputs"
    )
    learned = f"{figures['slices']} slices of {figures['subjects']} subjects (pixels of {low:.3g} to {high:.3g} mm)"
    return f"""# The circuit "{info.name}"

An exact density of {info.rows} x {info.columns} {word}s, each {over.each},
in {info.unit} from {info.low:g} to {info.high:g}: {how}.
Learned by `invdiff train-circuit` from {learned} in {figures["steps"]} steps of EM.

Bits a {word} of {info.levels} {over.kinds}, on subjects held out; the baselines each with their best pseudocount:

| model | bits |
|---|---|
{rows}

{over.told}
Not for diagnosis.
"""
