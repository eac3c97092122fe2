"""Memory and time before they are taken: counted, predicted, refused; and the chunk that fits."""

from __future__ import annotations

import json
from collections import deque
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from invdiff.config import find, registered
from invdiff.datasets import Measurements, write_measurements
from invdiff.invented import Split
from invdiff.measured import MeasuredInfo
from invdiff.operators import ParallelBeam
from invdiff.operators.ct.beam import MEMORY_MB
from invdiff.pipelines import budget, memory, plan
from invdiff.pipelines.budget import Outline, Work, budget_of, largest_chunk, network_bytes, volume_of
from invdiff.pipelines.memory import Tally, free_bytes, held_bytes, out_of_memory
from invdiff.pipelines.reconstruct import resolve
from invdiff.pipelines.simulate import Simulation, simulate
from invdiff.priors import Chunked, GaussianPrior, PriorInfo
from invdiff.problem import prepare
from invdiff.protocols import Space
from invdiff.run import iterate
from invdiff.samplers import DDS, DPS, TV, Solver
from invdiff.uncertainty import BestOf, Spread
from tests.test_pipelines import body

CPU = torch.device("cpu")
IMAGE = 4 * 40 * 36  # bytes of a slice


class Ranged(GaussianPrior):
    info = PriorInfo("gaussian", "HU", -1000.0, 2000.0, 1e-6, 1e3, 0.5, (0.0, 0.0))


def white() -> Ranged:
    return Ranged(torch.zeros(1, 40, 36), torch.full((1440,), 0.25))


@pytest.fixture
def scan() -> Measurements:
    return simulate(body((6, 40, 36)), Simulation(views=12, photons=1e6))[0]


def test_a_tally_counts_what_is_alive() -> None:
    given = torch.ones(1000)
    with Tally() as tally:
        a = given * 2
        view = a.view(10, 100)[1:]
        assert tally.alive == tally.peak == 4000
        del a
        assert tally.alive == 4000  # the view holds it
        b = view + 1
        del view
        assert (tally.alive, tally.peak) == (3600, 7600)
        given.mul_(2)  # makes nothing
        del b
    assert (tally.alive, tally.peak) == (0, 7600)


@pytest.mark.parametrize("slices", [4, 7])
@pytest.mark.parametrize("kind", ["dds", "reddiff", "split-gibbs", "ddnm", "dps", "tv"])
def test_two_slices_tell_of_many(kind: str, slices: int, scan: Measurements) -> None:
    """The peak of a whole run with its projector, counted, is within 15 % of what two slices with a stand-in say."""
    sampler = find("samplers", kind)()
    prior = white()
    fields = {**scan.fields, "shape": (slices, 1, 40, 36)}
    found = budget_of(replace(scan, y=scan.y[:1].expand(slices, -1, -1, -1).contiguous(), sqrt_w=None, sigma_y=0.01,
                              fields=fields), Work(sampler), prior, 1, CPU, CPU)  # fmt: skip
    operator = ParallelBeam(**fields)
    with Tally() as tally:
        y = scan.y[:1].expand(slices, -1, -1, -1).clone()
        problem = prepare(y, operator, Chunked(prior, 1), 0.01).problem
        deque(islice(iterate(sampler, problem), 4), maxlen=1)
    if kind == "reddiff":  # FBP's tables are most of it here
        assert tally.peak < found.bytes - found.projector
        return
    assert found.volume.peak * slices == pytest.approx(tally.peak, rel=0.15)
    assert found.volume.differentiated == (kind == "dps")


@pytest.mark.parametrize("kind", [k for k in registered("samplers") if not issubclass(find("samplers", k), Solver)])
def test_every_sampler_is_counted(kind: str) -> None:
    outline = Outline(Space((2, 1, 40, 36), torch.float32), Space((2, 1, 12, 54), torch.float32), "1/mm")
    prior = white()
    if kind in ("forward-model", "one-step"):  # which want a model of scans, here only described
        method = {"forward-model": kind, "one-step": "ssdu"}[kind]
        prior.info = MeasuredInfo("toy", "HU", -1000.0, 2000.0, 0.01, 50.0, 0.5, (0.0, 0.0), method=method)
    volume = volume_of(Work(find("samplers", kind)()), prior, outline, torch.ones(2, 1, 12, 54))
    assert IMAGE < volume.at_end <= volume.peak < 60 * IMAGE
    assert volume.at_denoiser <= volume.peak
    if kind == "dds":  # its state of 4, what it denoised, the vectors of CG and what these products take
        assert volume.peak < 13 * IMAGE


def test_an_outline_is_linear_with_an_exact_adjoint() -> None:
    for sizes in ((12, 54), (60, 54)):
        a = Outline(Space((2, 1, 40, 36), torch.float32), Space((2, 1, *sizes), torch.float32), "")
        g = torch.Generator().manual_seed(0)
        x, y = torch.randn(a.domain.shape, generator=g), torch.randn(a.range.shape, generator=g)
        torch.testing.assert_close((a.forward(x) * y).sum(), (x * a.adjoint(y)).sum())


def test_network_memory_grows_by_the_slice() -> None:
    class Layers:
        channels = 1

        def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
            wide = x.expand(-1, 8, -1, -1) * torch.ones(1)
            return (wide.sin()).sum(1, keepdim=True)

    kept, more = network_bytes(Layers(), (1, 40, 36), CPU, gradient=False)
    assert more == pytest.approx(16 * IMAGE, rel=0.1) and kept < 100
    assert network_bytes(Layers(), (1, 40, 36), CPU, gradient=True)[1] > more


def test_the_projector_is_estimated_without_being_built(scan: Measurements) -> None:
    one, kept, building = budget.projector_of(scan.kind, scan.fields)
    assert one._matrices is None
    real = ParallelBeam(**scan.fields)._matrices
    assert real is not None
    held = sum(t.numel() * t.element_size() for rows in real for t in rows)
    assert kept == pytest.approx(held, rel=0.2) and building > 0
    assert one.matrix_bytes(kept / 2**20 / 2) == 0 < one.matrix_bytes(MEMORY_MB)


def test_free_memory_is_known_on_linux_and_unknown_elsewhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, scan: Measurements
) -> None:
    if memory.MEMINFO.is_file():
        assert held_bytes(CPU) > 10**7 and (free_bytes(CPU) or 0) > 10**6
    found = budget_of(scan, Work(DDS()), white(), 2, CPU, CPU)
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    assert free_bytes(CPU) is None and free_bytes(torch.device("meta")) is None
    assert "was not checked" in budget.check(found, CPU, CPU)
    (tmp_path / "meminfo").write_text("MemTotal:  9 kB\nMemAvailable:   1000000 kB\n")
    assert free_bytes(CPU) == 1_024_000_000 and budget.check(found, CPU, CPU) == ""
    (tmp_path / "meminfo").write_text("MemAvailable:   100 kB\n")
    with pytest.raises(ValueError, match=r"would take [\d.e-]+ GB more on cpu, where 0.000102 GB are free"):
        budget.check(found, CPU, CPU)


class Greedy:
    """Takes no more than ``most`` slices."""

    channels = 1

    def __init__(self, most: int, error: Exception) -> None:
        self.most, self.error, self.tried = most, error, list[int]()

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.tried.append(len(x))
        if len(x) > self.most:
            raise self.error
        return x


CPU_FULL = RuntimeError("[enforce fail at alloc_cpu.cpp] . DefaultCPUAllocator: can't allocate memory: you tried to")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), CPU_FULL, MemoryError()])
def test_the_chunk_is_found_by_halving(error: Exception) -> None:
    prior = Greedy(5, error)
    assert largest_chunk(prior, 37, (1, 3, 4), CPU) == 5 and prior.tried == [37, 19, 10, 5]
    with pytest.raises(ValueError, match="does not take one slice of 3 x 4 pixels"):
        largest_chunk(Greedy(0, error), 3, (1, 3, 4), CPU)


def test_other_errors_are_not_taken_for_memory() -> None:
    assert not out_of_memory(RuntimeError("shapes"))
    with pytest.raises(RuntimeError, match="shapes"):
        largest_chunk(Greedy(1, RuntimeError("shapes")), 3, (1, 3, 4), CPU)


def test_a_chunk_of_zero_is_what_half_of_the_free_memory_holds(
    monkeypatch: pytest.MonkeyPatch, scan: Measurements
) -> None:
    monkeypatch.setattr(budget, "network_bytes", lambda *_: (0.0, 1e8))
    monkeypatch.setattr(budget, "free_bytes", lambda _: 5e8)
    assert budget_of(scan, Work(DDS()), white(), 0, CPU, CPU).chunk == 2  # of 6: 6, 3, 2
    assert budget_of(scan, Work(DDS()), white(), 4, CPU, CPU).chunk == 4
    monkeypatch.setattr(budget, "free_bytes", lambda _: None)
    assert budget_of(scan, Work(DDS()), white(), 0, CPU, CPU).chunk == 6
    monkeypatch.setattr(budget, "network_bytes", lambda *_: (0.0, 1e8))
    whole = budget_of(scan, Work(DPS()), white(), 1, CPU, CPU)
    assert whole.activations == 6e8  # of every slice: the network is differentiated


def test_the_network_apart_counts_where_it_is(monkeypatch: pytest.MonkeyPatch, scan: Measurements) -> None:
    monkeypatch.setattr(budget, "network_bytes", lambda *_: (0.0, 1e9))
    together = budget_of(scan, Work(DDS()), white(), 2, CPU, CPU)
    apart = budget_of(scan, Work(DDS()), white(), 2, torch.device("meta"), CPU)
    assert together.bytes > 2e9 > apart.bytes and apart.on_device == 2e9
    monkeypatch.setattr(budget, "free_bytes", lambda place: 1e9 if place.type == "meta" else 1e12)
    with pytest.raises(ValueError, match=r"2 GB more on meta, where 1 GB are free"):
        budget.check(apart, torch.device("meta"), CPU)


def test_the_plan_of_a_run(prior: str, scan: Measurements, tmp_path: Path, here: Any) -> None:
    write_measurements(tmp_path / "scan.h5", [scan])
    job = resolve(tmp_path / "scan.h5", {"output": {"path": "r.nii"}, "prior": {"name": prior}}, ["sampler.steps=6"])
    found = plan.run(job)
    assert found.peak > found.budget.bytes > 6 * 5 * IMAGE and found.seconds > 0 and found.steps == 6
    assert "peak memory" in found.lines()[0] and "6 steps of 6 slices" in found.lines()[0]
    before = sorted(tmp_path.rglob("*"))
    assert here("plan", tmp_path / "scan.h5", "--prior", prior, "sampler.steps=3")[0] == 0
    assert here("plan", tmp_path / "scan.h5", "--prior", "none", "--sampler", "tv")[0] == 0
    assert sorted(tmp_path.rglob("*")) == before


def test_samples_and_the_split_are_counted(scan: Measurements) -> None:
    """What is kept of samples is alive when the network is called: for 40 of them 2 + 2 x (3 + 1) images a slice."""

    def counted(**more: Any) -> budget.Volume:
        return budget_of(scan, Work(DDS(), **more), white(), 2, CPU, CPU).volume

    plain, several, split = counted(), counted(gather=Spread(40)), counted(split=Split())
    assert Spread(40).kept == 3
    assert several.at_denoiser - plain.at_denoiser == pytest.approx(10 * IMAGE, rel=0.01)
    assert several.peak > plain.peak and several.at_end > plain.at_end + 3 * IMAGE
    assert split.at_end == pytest.approx(plain.at_end + 3 * IMAGE, rel=0.01)  # measured, invented, share
    assert counted(gather=BestOf(2, density=0.5)).differentiated is False


def test_the_plan_of_samples_takes_so_many_runs(prior: str, scan: Measurements, tmp_path: Path, here: Any) -> None:
    write_measurements(tmp_path / "scan.h5", [scan])
    flags = {"output": {"path": "r.nii"}, "prior": {"name": prior}, "samples": {"count": 5}, "invented": {}}
    assert plan.run(resolve(tmp_path / "scan.h5", flags, ["sampler.steps=4"])).steps == 20
    assert here("plan", tmp_path / "scan.h5", "--prior", prior, "sampler.steps=2", "--samples", 3, "--invented")[0] == 0


def test_a_run_that_does_not_fit_is_refused_before_it_starts(
    prior: str, scan: Measurements, tmp_path: Path, here: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_measurements(tmp_path / "scan.h5", [scan])
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemAvailable: 100 kB\n")
    monkeypatch.setattr(memory, "MEMINFO", meminfo)
    for words in (["plan"], ["reconstruct", "-o", tmp_path / "r.nii"]):
        code, said = here(words[0], tmp_path / "scan.h5", *words[1:], "--prior", prior)
        assert code == 2 and "GB more on cpu, where 0.000102 GB are free" in said and said.count("invdiff:") == 1
    assert not list(tmp_path.glob("r.*"))


def test_chunk_zero_and_offload_give_the_same_image(prior: str, scan: Measurements, tmp_path: Path, here: Any) -> None:
    write_measurements(tmp_path / "scan.h5", [scan])
    go = ["reconstruct", tmp_path / "scan.h5", "--prior", prior, "sampler.steps=2", "--dtype", "float32"]
    for name, more in {"a": ["--chunk", 6], "b": ["--chunk", 0], "c": ["--chunk", 6, "run.offload=true"]}.items():
        assert here(*go, *more, "-o", tmp_path / f"{name}.nii")[0] == 0
    a, b, c = ((tmp_path / f"{n}.nii").read_bytes() for n in "abc")
    assert a == b == c
    record = json.loads((tmp_path / "b.json").read_text())
    assert record["chunk"] == 6 and record["config"]["run"]["chunk"] == 0
    code, said = here(*go, "run.chunk=-1", "-o", tmp_path / "d.nii")
    assert code == 2 and "chunk -1" in said


def test_a_baseline_needs_no_network(scan: Measurements) -> None:
    from invdiff.priors import NoPrior

    found = budget_of(scan, Work(TV()), NoPrior(), 0, CPU, CPU)
    assert found.activations == 0 and found.bytes > 0
