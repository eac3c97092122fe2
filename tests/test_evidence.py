"""Evidence of cells: a product of Gaussians, exactly; an example in a region, from nothing to a pin."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from invdiff.circuits import Categorical, Circuit, Gaussian, GridInfo, ImageCircuit, Spot, Structure
from invdiff.circuits.evidence import nothing, of_example, of_noisy, of_pixels, product, tempered
from invdiff.circuits.images import save
from invdiff.datasets import Volume, read_nifti, write_nifti
from invdiff.priors import Steered

ROWS, COLUMNS, BLOCK, H, W = 2, 3, 2, 5, 6
INF = math.inf


def info(levels: int = 100, within: float = 0.3) -> GridInfo:
    return GridInfo("toy", "HU", -1000.0, 2000.0, ROWS, COLUMNS, BLOCK, levels, within)


def pair() -> ImageCircuit:
    """Dark or bright images, 0.4 and 0.6."""
    v = ROWS * COLUMNS
    inputs = Gaussian(torch.tensor([[-0.6, 0.5]]), torch.tensor([[0.2, 0.3]]).log())
    structure = Structure((-1,), (0,) * v, (), (0,) * v)
    return ImageCircuit(Circuit(structure, inputs, torch.tensor([0.4, 0.6]), torch.full((1, 2, 2), 0.5)), info())


def levels_of_two() -> ImageCircuit:
    """The same with levels."""
    v, step = ROWS * COLUMNS, torch.arange(100.0)
    table = -0.5 * ((step - torch.tensor([[20.0], [75.0]])) / 12).square()
    inputs = Categorical(table.log_softmax(-1)[None])
    structure = Structure((-1,), (0,) * v, (), (0,) * v)
    return ImageCircuit(Circuit(structure, inputs, torch.tensor([0.4, 0.6]), torch.full((1, 2, 2), 0.5)), info())


def spot(seed: int, *variances: float) -> Spot:
    value = torch.randn(2, len(variances), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Spot(value, torch.tensor([variances, variances], dtype=torch.float64))


def test_the_product_of_gaussians() -> None:
    """ln of the product is the sum of the logarithms, but for a constant; no evidence is 1; what is exact counts."""
    a, b, c = spot(0, 0.3, 2.0, INF, 0.5), spot(1, 1.1, INF, INF, 0.0), spot(2, 0.7, 0.4, INF, 3.0)
    found = product(a, b, c)

    def log(e: Spot, x: float) -> Tensor:
        return -0.5 * (x - e.value).square() / e.variance

    change = [sum(log(e, x) for e in (a, b, c)) - log(found, x) for x in (-0.8, 0.1, 2.3)]  # type: ignore[operator]
    for other in change[1:]:
        torch.testing.assert_close(other[:, :2], change[0][:, :2])  # type: ignore[index]
    assert bool(torch.isinf(found.variance[:, 2]).all()) and bool(torch.isfinite(found.value).all())
    assert torch.equal(found.value[:, 3], b.value[:, 3]) and float(found.variance[:, 3].max()) == 0
    for e in (a, c):
        torch.testing.assert_close(product(e, nothing(e.value)).variance, e.variance)
        finite = torch.isfinite(e.variance)
        torch.testing.assert_close(product(nothing(e.value), e).value[finite], e.value[finite])


def test_a_power_of_evidence_is_it_so_many_times() -> None:
    a = spot(0, 0.3, 2.0, INF)
    for found in (tempered(a, 3.0), product(a, a, a)):
        torch.testing.assert_close(found.variance, a.variance / 3)
    assert bool(torch.isinf(tempered(a, 0.0).variance).all())
    pinned = tempered(a, INF).variance
    assert pinned[0].tolist() == [0.0, 0.0, INF]
    for bad in (-0.1, math.nan):
        with pytest.raises(ValueError, match="the strength of evidence is"):
            tempered(a, bad)


def test_cells_of_pixels_and_of_noise() -> None:
    """Known pixels, all of a cell or some; noise of a mean. The grid lies in the middle: the last row is no cell's."""
    x = torch.randn(2, 1, H, W, generator=torch.Generator().manual_seed(3))
    mask = torch.zeros(2, 1, H, W, dtype=torch.bool)
    mask[0, 0, 0:2, 0:2] = True
    mask[1, 0, 2, 5] = True
    mask[1, 0, 4] = True
    found, level = of_pixels(info(), x, mask), (2 / 100) ** 2 / 12
    assert torch.allclose(found.value[0, 0], x[0, 0, :2, :2].mean()) and found.value[1, 5] == x[1, 0, 2, 5]
    assert torch.allclose(found.variance[0, 0], torch.tensor(level))
    assert torch.allclose(found.variance[1, 5], torch.tensor(level + 0.3**2 * (1 - 1 / 4)))
    assert int(torch.isfinite(found.variance).sum()) == 2
    noisy = of_noisy(info(), x, torch.tensor([2.0, 3.0]))
    assert torch.allclose(noisy.variance, torch.tensor([[1.0], [2.25]]).expand(2, 6))


def region() -> Tensor:
    mask = torch.zeros(2, 1, H, W, dtype=torch.bool)
    mask[:, :, 2:4, 2:4] = True
    return mask


def flat() -> Any:
    class Flat:
        channels = 1

        def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
            return 0 * x

    return Flat()


def steered(circuit: ImageCircuit, level: float, strength: float | None) -> Steered:
    known = torch.zeros(2, 1, H, W)
    mask = torch.zeros_like(known, dtype=torch.bool)
    mask[0, 0, :2, :2] = True
    example = torch.full_like(known, level)
    evidence = None if strength is None else of_example(circuit.info, example, region(), strength)
    return Steered(flat(), circuit, known, mask, 1.0, evidence)


@pytest.mark.parametrize("make", [pair, levels_of_two])
def test_an_example_from_nothing_to_a_pin(make: Any) -> None:
    x = 20 * torch.randn(2, 1, H, W, generator=torch.Generator().manual_seed(1))
    sigma, circuit = torch.tensor([20.0, 35.0]), make()
    none, zero = (steered(circuit, 0.45, s).denoise(x, sigma) for s in (None, 0.0))
    assert torch.equal(none, zero)
    step = 0.02 / 2 if make is levels_of_two else 1e-6
    for level in (-0.69, 0.45):  # middles of levels
        pinned = steered(circuit, level, INF).posterior(x, sigma)
        assert float((pinned.mean[:, 1, 1] - level).abs().max()) <= step
        assert float(pinned.variance[:, 1, 1].max()) <= 1.05 * step**2
        strong = steered(circuit, level, 1e9).posterior(x, sigma)
        torch.testing.assert_close(strong.mean, pinned.mean, atol=1e-4, rtol=0)
        alone = pinned.mean[1] - (-0.6 if level < 0 else 0.5)  # nothing else is known there: the kind of all cells
        assert float(alone.abs().max()) < 0.15
    assert not torch.equal(none, steered(circuit, 0.45, 1.0).denoise(x, sigma))


def test_an_example_is_one_more_gaussian_of_its_cells() -> None:
    """The posterior of the mixture by hand, of independent cells given its kind."""
    x, sigma = 20 * torch.randn(2, 1, H, W, generator=torch.Generator().manual_seed(1)), torch.tensor([20.0, 35.0])
    s, strength, mean, std = pair(), 0.02, torch.tensor([-0.6, 0.5]), torch.tensor([0.2, 0.3])
    found = steered(s, 0.1, strength)
    own = Spot(torch.full((2, 6), 0.1), torch.full((2, 6), INF))
    own.variance[:, 4] = (2 / 100) ** 2 / 12 / strength
    e = product(of_noisy(s.info, x, sigma), of_pixels(s.info, found.known, found.mask), own)
    total = std.square() + e.variance[..., None]
    log_n = -0.5 * ((e.value[..., None] - mean).square() / total + total.log())
    weight = (log_n.sum(1) + torch.tensor([0.4, 0.6]).log()).softmax(-1)[:, None]
    wanted = (weight * (mean + std.square() / total * (e.value[..., None] - mean))).sum(-1)
    torch.testing.assert_close(found.posterior(x, sigma).mean.flatten(1), wanted, atol=1e-5, rtol=0)


def test_bad_examples_are_refused() -> None:
    x, empty = torch.zeros(2, 1, H, W), torch.zeros(2, 1, H, W, dtype=torch.bool)
    empty[:, :, 4] = True  # beyond the grid
    with pytest.raises(ValueError, match="holds no pixel of the circuit's grid"):
        of_example(info(), x, empty)
    with pytest.raises(ValueError, match=r"the region is .1, 1, 5, 6., the example .2, 1, 5, 6."):
        of_example(info(), x, region()[:1])
    with pytest.raises(ValueError, match=r"the evidence is .2, 5.; .2, 6. is wanted"):
        Steered(flat(), pair(), x, empty, 1.0, spot(0, *[0.1] * 5))


SHAPE = (3, 1, 10, 12)
FAST = ("sampler.steps=3", "sampler.sigma_max=40", "run.dtype=float32", "steer.sigma_stop=0.01", "--sampler", "ddnm")


def volume(level: float, unit: str = "HU", shift: float = 0.0) -> Volume:
    affine = np.array([[-1.5, 0, 0, 10 + shift], [0, -1.5, 0, 5], [0, 0, 3, -2], [0, 0, 0, 1.0]])
    return Volume(torch.full(SHAPE, level), affine, unit)


def folder(path: Path) -> list[object]:
    """A grey volume with a hole, examples dark and bright, and the words of the command."""
    hole = torch.zeros(SHAPE)
    hole[1, :, 2:8, 3:10] = 1
    part = hole.clone()
    part[:, :, :, :6] = 0
    info_of = GridInfo("toy", "HU", -1000.0, 2000.0, 5, 6, 2, 100, 0.1)
    inputs = Gaussian(torch.tensor([[-0.6, 0.6]]), torch.full((1, 2), math.log(0.2)))
    structure = Structure((-1,), (0,) * 30, (), (0,) * 30)
    circuit = Circuit(structure, inputs, torch.full((2,), 0.5), torch.full((1, 2, 2), 0.5))
    save(path / "circuit", ImageCircuit(circuit, info_of))
    for name, content in {
        "scan": volume(500.0), "dark": volume(-400.0), "bright": volume(1400.0), "far": volume(0.0, shift=3.0),
        "mask": replace(volume(0.0, "a.u."), data=hole), "part": replace(volume(0.0, "a.u."), data=part),
        "other": replace(volume(0.0, "a.u."), data=part.roll(1, 0)), "empty": volume(0.0, "a.u."),
    }.items():  # fmt: skip
        write_nifti(path / f"{name}.nii.gz", content)
    words = ["inpaint", path / "scan.nii.gz", "--mask", path / "mask.nii.gz", "--circuit", path / "circuit"]
    return [*words, "-o", path / "out.nii.gz", *FAST]


def test_two_examples_two_fillings(prior: str, tmp_path: Path, here: Any) -> None:
    words, found = folder(tmp_path), {}
    for name in ("dark", "bright"):
        for strength in ("0.0", "inf"):
            more = ("--like", tmp_path / f"{name}.nii.gz", "--like-region", tmp_path / "part.nii.gz")
            strong = f"steer.like_strength={strength}"
            assert here(*words, "--prior", prior, "--steer", "circuit", *more, strong) == (0, "")
            found[name, strength] = read_nifti(tmp_path / "out.nii.gz").data
            record = json.loads((tmp_path / "out.json").read_text())
            assert record["config"]["steer"]["like_strength"] == ("inf" if strength == "inf" else 0.0)
    assert here(*words, "--prior", prior, "--steer", "circuit") == (0, "")
    plain = read_nifti(tmp_path / "out.nii.gz").data
    assert torch.equal(found["dark", "0.0"], plain) and torch.equal(found["bright", "0.0"], plain)
    inside = read_nifti(tmp_path / "part.nii.gz").data != 0
    change = found["bright", "inf"][inside].mean() - found["dark", "inf"][inside].mean()
    assert 1000 < float(change) < 2400


@pytest.mark.parametrize(
    ("like", "where", "more", "message"),
    [
        ("far", "part", (), r"the example .*far.nii.gz lies up to 3 mm from the volume; one grid"),
        ("dark", "empty", (), "the example's region .* is empty; at least one voxel"),
        ("dark", "scan", (), "1 .inside. and 0 .outside. alone"),
        ("dark", "other", (), "is empty in the slices that are steered"),
        ("dark", "", (), "one of steer.like and steer.like_region alone says nothing"),
        ("dark", "part", ("steer.like_strength=-1.0",), "steer.like_strength is -1.0; 0 .none. to inf"),
        ("dark", "part", ("--steer", "none"), "an example for a circuit over cells; steer.kind circuit"),
        ("empty", "part", (), "the volume is in a.u., the prior in HU"),
    ],
)
def test_bad_examples_get_one_sentence(
    like: str, where: str, more: tuple[str, ...], message: str, prior: str, tmp_path: Path, here: Any
) -> None:
    words = [*folder(tmp_path), "--prior", prior, "--steer", "circuit", "--like", tmp_path / f"{like}.nii.gz"]
    words += ["--like-region", tmp_path / f"{where}.nii.gz"] if where else []
    code, said = here(*words, *more)
    assert code == 2 and re.search(message, said), said
    assert not (tmp_path / "out.nii.gz").exists()
