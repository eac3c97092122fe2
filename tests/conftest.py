"""Toys that several test files share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from invdiff.noise import KeyedNoise
from invdiff.priors import GaussianPrior, PriorInfo
from invdiff.priors.model import save
from invdiff.priors.network import UNet, UNetConfig
from invdiff.protocols import Problem, Space

torch.set_num_threads(1)  # small arrays: where the machine is shared, a second thread costs more than it gives


@dataclass(frozen=True)
class Dense:
    """A matrix on flattened images, applied slice by slice: a slice's numbers never depend on its batch."""

    matrix: Tensor
    shape: tuple[int, int, int, int]

    @property
    def domain(self) -> Space:
        return Space(self.shape, torch.float32)

    @property
    def range(self) -> Space:
        return Space((self.shape[0], self.matrix.shape[0]), torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.matrix @ v.clone() for v in x.flatten(1)])

    def adjoint(self, y: Tensor) -> Tensor:
        return torch.stack([self.matrix.T @ v.clone() for v in y]).view(-1, *self.shape[1:])

    def vjp(self, x: Tensor, r: Tensor) -> Tensor:
        return self.adjoint(r)

    def normal(self, x: Tensor) -> Tensor:
        return self.adjoint(self.forward(x))

    def pinv(self, y: Tensor) -> Tensor:
        return self.adjoint(y)

    def solve(self, rhs: Tensor, rho: float, x0: Tensor | None = None) -> Tensor:
        m = self.matrix.T @ self.matrix + rho * torch.eye(self.matrix.shape[1])
        return torch.stack([torch.linalg.solve(m, v) for v in rhs.flatten(1)]).view_as(rhs)


@dataclass(frozen=True)
class World:
    """A linear-Gaussian problem whose every answer is a closed form."""

    problem: Problem
    operator: Dense
    prior: GaussianPrior
    truth: Tensor

    def only(self, index: list[int], first: int = 0, chunked: Problem | None = None) -> Problem:
        """The problem of some slices."""
        p = self.problem if chunked is None else chunked
        operator = Dense(self.operator.matrix, (len(index), *self.operator.shape[1:]))
        noise = KeyedNoise(p.noise.seed, first)  # type: ignore[attr-defined]
        return p._replace(operator=operator, y=p.y[index], noise=noise)


def build_world(slices: int = 5, sigma_y: float = 0.05, seed: int = 0) -> World:
    """Slices of 6 x 7 pixels, 20 measurements each, ||A|| = 1, a smooth prior with a mean that is not zero."""
    h, w, m = 6, 7, 20
    g = torch.Generator().manual_seed(11)
    matrix = torch.randn(m, h * w, generator=g)
    matrix = matrix / torch.linalg.matrix_norm(matrix, 2)
    prior = GaussianPrior.smooth((1, h, w), length=1.5, deviation=0.4, mean=0.3)
    root = torch.linalg.cholesky(prior.covariance.double() + 1e-6 * torch.eye(h * w).double()).float()
    truth = (prior.mean.flatten() + torch.randn(slices, h * w, generator=g) @ root.T).view(slices, 1, h, w)
    operator = Dense(matrix, (slices, 1, h, w))
    y = operator.forward(truth) + sigma_y * torch.randn(slices, m, generator=g)
    return World(Problem(operator, y, sigma_y, prior, KeyedNoise(seed)), operator, prior, truth)


@pytest.fixture
def world() -> World:
    return build_world()


@pytest.fixture
def make_world() -> Callable[..., World]:
    """``make_world(slices=5, sigma_y=0.05, seed=0)``."""
    return build_world


@pytest.fixture
def prior(tmp_path: Path) -> str:
    """An untrained network in a prior's folder: enough to test the way, not the picture."""
    torch.manual_seed(0)
    info = PriorInfo("toy", "HU", -1000.0, 2000.0, 0.01, 50.0, 0.5, (1.0, 2.0))
    save(tmp_path / "toy", UNet(UNetConfig(channels=(8, 8), blocks=(1, 1), norm_groups=4)), info)
    return str(tmp_path / "toy")


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """``here(*words)``: the command in this process (importing torch anew takes seconds): exit code and stderr."""
    from invdiff.pipelines import cli

    def run(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["invdiff", *map(str, words)])
        monkeypatch.setattr(cli, "errors", cli.Console(stderr=True))
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0), " ".join(capsys.readouterr().err.split())

    return run
