"""Killed, torn and resumed: a run ends at the same bits."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from invdiff.datasets import write_measurements
from invdiff.pipelines.simulate import Simulation, simulate
from invdiff.run import TornError, checkpointed, forget, iterate, last, load_state, previous_path, resumed
from invdiff.samplers import DDS
from invdiff.samplers.dds import DDSState
from invdiff.uncertainty import SeedsState, Spread, over_seeds

KEY = "the run"
SAMPLER = DDS(steps=9, sigma_max=3.0)

# One run by itself, without the command line's imports: a checkpoint every step, resumed if there is one
ALONE = """
import sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from conftest import build_world
from invdiff.run import checkpointed, iterate, last, resumed
from invdiff.samplers.dds import DDS, DDSState
torch.set_num_threads(1)
path, out, sampler, problem = Path(sys.argv[2]), Path(sys.argv[3]), DDS(steps=600, sigma_max=3.0), build_world().problem
state, note = resumed(path, DDSState, "k")
end = last(checkpointed(iterate(sampler, problem, state), path, "k", every=1))
torch.save(end.x, out)
"""


def states_on_disk(world: Any, path: Path) -> None:
    """Checkpoints of steps 8 and, before it, 4."""
    for state in checkpointed(iterate(SAMPLER, world.problem), path, KEY, every=4):
        if state.i == 8:
            return


def test_a_checkpoint_cut_anywhere_gives_way_to_the_one_before(world: Any, tmp_path: Path) -> None:
    path = tmp_path / "run.checkpoint"
    wanted = last(iterate(SAMPLER, world.problem)).x
    states_on_disk(world, path)
    whole = path.read_bytes()
    assert resumed(path, DDSState, KEY)[0].i == 8 and resumed(path, DDSState, KEY)[1] == ""  # type: ignore[union-attr]
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(TornError):
            load_state(path, DDSState, KEY)
        state, note = resumed(path, DDSState, KEY)
        assert state is not None and state.i == 4 and "was torn" in note and "step 4" in note
        assert torch.equal(last(iterate(SAMPLER, world.problem, state)).x, wanted)
    path.unlink()  # killed between the two renames
    assert resumed(path, DDSState, KEY)[0].i == 4  # type: ignore[union-attr]


def test_a_changed_byte_is_seen(world: Any, tmp_path: Path) -> None:
    path = tmp_path / "run.checkpoint"
    states_on_disk(world, path)
    whole = path.read_bytes()
    x = load_state(path, DDSState, KEY).x.numpy().tobytes()
    place = whole.index(x) + len(x) // 2
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(TornError, match="does not hold what was written"):
        load_state(path, DDSState, KEY)
    assert resumed(path, DDSState, KEY)[0].i == 4  # type: ignore[union-attr]


def test_a_changed_byte_within_a_sample_is_seen(world: Any, tmp_path: Path) -> None:
    """States over seeds hold tables of tensors."""
    path, gather = tmp_path / "run.checkpoint", Spread(3)
    wanted = last(over_seeds(SAMPLER, world.problem, gather)).kept["mean"]
    for state in checkpointed(over_seeds(SAMPLER, world.problem, gather), path, KEY, every=5):
        if state.i == 15:  # within the second sample
            break
    whole = path.read_bytes()
    for part in (state.current["x_t"], state.kept["mean"]):
        held = part.numpy().tobytes()
        place = whole.index(held) + len(held) // 2
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(TornError, match="does not hold what was written"):
            load_state(path, SeedsState, KEY)
        before, note = resumed(path, SeedsState, KEY)
        assert before is not None and (before.i, before.done) == (10, 1) and "step 10" in note
        assert torch.equal(last(over_seeds(SAMPLER, world.problem, gather, before)).kept["mean"], wanted)


def test_two_torn_checkpoints_are_refused_and_none_is_a_new_run(world: Any, tmp_path: Path) -> None:
    path = tmp_path / "run.checkpoint"
    state, note = resumed(path, DDSState, KEY)
    assert state is None and "began anew" in note
    states_on_disk(world, path)
    with pytest.raises(ValueError, match="another run"):
        resumed(path, DDSState, "another key")
    path.write_bytes(b"torn")
    with pytest.raises(ValueError, match="another run"):
        resumed(path, DDSState, "another key")
    previous_path(path).write_bytes(b"")
    with pytest.raises(TornError, match=r"run\.checkpoint is truncated"):
        resumed(path, DDSState, KEY)
    forget(path)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_run_left_half_written_is_removed(world: Any, tmp_path: Path) -> None:
    path = tmp_path / "run.checkpoint"
    (tmp_path / ".part-1-run.checkpoint").write_bytes(b"half")
    (tmp_path / ".part-1-other.checkpoint").write_bytes(b"half")
    states_on_disk(world, path)
    assert {p.name for p in tmp_path.iterdir()} == {
        "run.checkpoint", "run.checkpoint.previous", ".part-1-other.checkpoint"
    }  # fmt: skip


def killed(words: list[str], delay: float, watched: Path) -> bool:
    """Run a command and kill it after ``delay`` seconds, counted from when ``watched`` is there; whether it was."""
    run = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not watched.exists() and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    try:
        run.wait(delay)
    except subprocess.TimeoutExpired:
        run.kill()
    return run.wait() == -signal.SIGKILL


def test_two_kills_and_the_same_bits(tmp_path: Path) -> None:
    def words(name: str) -> list[str]:
        here, path, out = (str(p) for p in (Path(__file__).parent, tmp_path / f"{name}.run", tmp_path / f"{name}.pt"))
        return [sys.executable, "-c", ALONE, here, path, out]

    assert subprocess.run(words("whole")).returncode == 0
    moments = random.Random(0)
    for _ in range(2):
        assert killed(words("cut"), moments.uniform(0.05, 0.4), tmp_path / "cut.run")
    state, _ = resumed(tmp_path / "cut.run", DDSState, "k")
    assert state is not None and 0 < state.i < 600
    assert subprocess.run(words("cut")).returncode == 0
    assert torch.equal(torch.load(tmp_path / "cut.pt"), torch.load(tmp_path / "whole.pt"))
    assert not list(tmp_path.glob(".part-*"))


# The command with its imports done once: the first line runs here, every other one in a process of its own, whose id
# and exit code are answered
FORKS = """
import json, os, sys, torch
from invdiff.pipelines import cli
torch.set_num_threads(1)
out = os.fdopen(os.dup(1), "w")
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
def command(line):
    sys.argv = ["invdiff", *json.loads(line)]
    try:
        cli.main()
    except SystemExit as end:
        return end.code or 0
    return 0
print(command(sys.stdin.readline()), file=out, flush=True)
for line in iter(sys.stdin.readline, ""):
    pid = os.fork()
    if pid == 0:
        os._exit(command(line))
    print(pid, file=out, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=out, flush=True)
"""


def forked(server: subprocess.Popen[str], words: list[str], delay: float | None = None) -> int:
    """Run a command in a process of its own, kill it after ``delay`` seconds, and return its exit code."""
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(json.dumps(words) + "\n")
    server.stdin.flush()
    pid = int(server.stdout.readline())
    if delay is not None:
        time.sleep(delay)
        with contextlib.suppress(ProcessLookupError):  # it had ended
            os.kill(pid, signal.SIGKILL)
    return int(server.stdout.readline())


@pytest.mark.slow
@pytest.mark.parametrize("more", [["sampler.steps=150"], ["sampler.steps=30", "--samples", "5"]])
def test_twenty_kills_of_a_volume_and_the_same_bytes(
    more: list[str], prior: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Killed at a random moment of the whole command, from reading to its last file; resumed each time."""
    from tests.test_pipelines import body

    scan, _ = simulate(body((12, 40, 36)), Simulation(views=12, photons=1e6))
    write_measurements(tmp_path / "scan.h5", [scan])
    command = ["reconstruct", str(tmp_path / "scan.h5"), "--prior", prior, *more, "run.every=2", "run.chunk=4"]
    command += ["--dtype", "float32", "-o"]
    server = subprocess.Popen([sys.executable, "-c", FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with server:
        assert server.stdin is not None and server.stdout is not None
        server.stdin.write(json.dumps([*command, str(tmp_path / "whole.nii")]) + "\n")
        server.stdin.flush()
        assert server.stdout.readline() == "0\n"
        wanted = sorted(tmp_path.glob("whole*.nii"))
        assert len(wanted) == (4 if "--samples" in more else 1)
        began = time.monotonic()
        assert forked(server, [*command, str(tmp_path / "whole.nii")]) == 0
        seconds, moments, steps = time.monotonic() - began, random.Random(4), []
        for k in range(20):
            out = tmp_path / f"cut{k}.nii"
            cut = forked(server, [*command, str(out)], moments.uniform(0, seconds)) == -signal.SIGKILL
            steps.append(step_of(tmp_path / f"cut{k}.checkpoint") if cut else "ended")
            assert forked(server, [*command, str(out), "--resume"]) == 0
            for one in wanted:
                assert one.with_name(one.name.replace("whole", f"cut{k}")).read_bytes() == one.read_bytes(), one.name
        server.stdin.close()
    record_property("steps", steps)  # of the checkpoints that the killed runs left
    assert len({s for s in steps if isinstance(s, int)}) >= 10
    assert not list(tmp_path.glob("*.checkpoint*"))


def step_of(path: Path) -> int | None:
    """The step that a checkpoint holds, None where there is none."""
    return int(torch.load(path, weights_only=True)["state"]["i"]) if path.exists() else None
