"""Every parameterisation on every schedule, against the closed form: a network that is perfect in its own terms."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from invdiff.priors import (
    EDM,
    Call,
    Continuous,
    Description,
    Discrete,
    Flow,
    GaussianPrior,
    NetworkPrior,
    Predicts,
    VarianceExploding,
    adapt,
)
from invdiff.priors.parameterisation import Parameterisation, parameterisation_of

SIZE = (5, 7)


def gaussian(channels: int = 1, size: tuple[int, int] = SIZE) -> GaussianPrior:
    """Means and variances that differ from pixel to pixel, in prior units."""
    g = torch.Generator().manual_seed(3)
    shape = (channels, *size)
    return GaussianPrior(
        0.3 + 0.2 * torch.randn(shape, generator=g), 0.02 + 0.3 * torch.rand(math.prod(shape), generator=g)
    )


# How the authors of each process define it: alpha and sigma of a label, written apart from the code that is tested.


def ddpm(betas: np.ndarray, scale: float = 1.0) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    def levels(label: Tensor) -> tuple[Tensor, Tensor]:
        ab = np.cumprod(1 - betas.astype(np.float64))
        sigma = np.exp(
            np.interp(label.double().numpy() / scale, np.arange(len(ab)), np.log(np.sqrt(1 - ab) / np.sqrt(ab)))
        )
        s = torch.from_numpy(sigma).float()
        return 1 / (1 + s**2).sqrt(), s

    return levels


def cosine_betas(steps: int) -> np.ndarray:
    def bar(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    return np.array([min(1 - bar((i + 1) / steps) / bar(i / steps), 0.999) for i in range(steps)])


def sde(label: Tensor) -> tuple[Tensor, Tensor]:
    t = label.double() / 999
    ab = torch.exp(-0.1 * t - 19.9 * t**2 / 2)
    return ab.sqrt().float(), ((1 - ab) / ab).sqrt().float()


def flow(scale: float, reverse: bool) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    def levels(label: Tensor) -> tuple[Tensor, Tensor]:
        t = label.double() / scale
        t = 1 - t if reverse else t
        return (1 - t).float(), (t / (1 - t)).float()

    return levels


def exploding(inverse: Callable[[Tensor], Tensor]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    return lambda label: (torch.ones_like(label), inverse(label))


LINEAR = np.linspace(1e-4, 0.02, 1000)
SCALED = np.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2
SIGMOID = 1 / (1 + np.exp(-np.linspace(-6, 6, 1000))) * (0.02 - 1e-4) + 1e-4
SCHEDULES: dict[str, tuple[Any, Callable[[Tensor], tuple[Tensor, Tensor]]]] = {
    "linear": (Discrete(), ddpm(LINEAR)),
    "scaled-linear": (Discrete("scaled-linear", 0.0015, 0.0195), ddpm(SCALED)),
    "cosine": (Discrete("cosine"), ddpm(cosine_betas(1000))),
    "cosine-4000": (Discrete("cosine", steps=4000, label_scale=0.25), ddpm(cosine_betas(4000), 0.25)),
    "sigmoid": (Discrete("sigmoid"), ddpm(SIGMOID)),
    "values": (Discrete(values=tuple(SCALED[:300]), steps=300), ddpm(SCALED[:300])),
    "continuous": (Continuous(), sde),
    "ve": (VarianceExploding(0.01, 378.0), exploding(lambda v: v)),
    "ve-log": (VarianceExploding(0.002, 80.0, "log"), exploding(torch.exp)),
    "ve-log/4": (VarianceExploding(0.002, 80.0, "log/4"), exploding(lambda v: (4 * v).exp())),
    "flow": (Flow(), flow(1, False)),
    "flow-1000": (Flow(label_scale=1000.0), flow(1000, False)),
    "flow-reversed": (Flow(data_at_one=True), flow(1, True)),
}
CASES = [
    (schedule, predicts)
    for schedule in SCHEDULES
    for predicts in ("eps", "x0", "v", "score", "scaled-score", "velocity", "velocity-to-data")
    if (predicts != "v" or SCHEDULES[schedule][0].process == "vp")
    and (not predicts.startswith("velocity") or SCHEDULES[schedule][0].process == "flow")
]


@dataclass
class Ideal:
    """E[x_0 | x_t] of a Gaussian in a network's own values ``scale * prior units + offset``."""

    prior: GaussianPrior
    scale: float = 1.0
    offset: float = 0.0

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.prior.denoise((x - self.offset) / self.scale, sigma / self.scale) * self.scale + self.offset


class Perfect(nn.Module):
    """A network that predicts perfectly, by the definitions of ``predicts`` and of the process."""

    def __init__(self, ideal: Ideal, predicts: str, levels: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.ideal, self.predicts, self.levels = ideal, predicts, levels

    def forward(self, x_t: Tensor, label: Tensor) -> Tensor:
        alpha, sigma = (v[:, None, None, None] for v in self.levels(label))
        x = x_t / alpha
        x0 = self.ideal.denoise(x, sigma[:, 0, 0, 0])
        n = (x - x0) / sigma
        return {
            "eps": n,
            "x0": x0,
            "v": alpha * n - (1 - alpha**2).sqrt() * x0,
            "score": (alpha * x0 - x_t) / (alpha * sigma) ** 2,
            "scaled-score": (alpha * x0 - x_t) / (alpha * sigma),
            "velocity": n - x0,
            "velocity-to-data": x0 - n,
        }[self.predicts]


class PerfectEDM(nn.Module):
    """F of EDM for N(0, C): (D - c_skip x) / c_out with the paper's c_in, c_out, c_skip, c_noise."""

    def __init__(self, ideal: Ideal, sigma_data: float) -> None:
        super().__init__()
        self.ideal, self.sigma_data = ideal, sigma_data

    def forward(self, seen: Tensor, label: Tensor) -> Tensor:
        sigma = (4 * label)[:, None, None, None].exp()
        total = (sigma**2 + self.sigma_data**2).sqrt()
        x = seen * total
        out = sigma * self.sigma_data / total
        return (self.ideal.denoise(x, sigma[:, 0, 0, 0]) - x * self.sigma_data**2 / total**2) / out


def description(data_range: tuple[float, float] = (-1.0, 1.0)) -> Description:
    return Description("HU", -1000.0, 2000.0, data_range)


def noisy(prior: GaussianPrior, sigma: Tensor, size: tuple[int, int] = SIZE) -> Tensor:
    g = torch.Generator().manual_seed(1)
    shape = (len(sigma), prior.channels, *size)
    return (
        prior.mean
        + 0.4 * torch.randn(shape, generator=g)
        + sigma[:, None, None, None] * torch.randn(shape, generator=g)
    )


def levels_between(how: Parameterisation) -> Tensor:
    low, high = how.sigma_range
    return torch.logspace(math.log10(low * 1.001), math.log10(high * 0.999), 9)


def assert_closed_form(adapted: NetworkPrior, prior: GaussianPrior, x: Tensor, sigma: Tensor) -> None:
    """To 1e-4; beyond sigma 100 to 1e-6 sigma, what single precision leaves of x itself."""
    error = (adapted.denoise(x, sigma) - prior.denoise(x, sigma)).abs().amax((1, 2, 3))
    assert bool((error < 1e-6 * sigma.clamp(min=100)).all()), (error, sigma)


@pytest.mark.parametrize(("schedule", "predicts"), CASES)
@pytest.mark.parametrize("data_range", [(-1.0, 1.0), (0.0, 1.0), (-1.3, 4.1)])
def test_every_parameterisation_gives_the_closed_form(
    schedule: str, predicts: str, data_range: tuple[float, float]
) -> None:
    prior = gaussian()
    how, levels = SCHEDULES[schedule]
    scale, offset = (data_range[1] - data_range[0]) / 2, (data_range[1] + data_range[0]) / 2
    parameterisation = Predicts(predicts, how)
    adapted = adapt(Perfect(Ideal(prior, scale, offset), predicts, levels), description(data_range), parameterisation)
    sigma = levels_between(parameterisation) / scale
    x = noisy(prior, sigma)
    assert_closed_form(adapted, prior, x, sigma)
    assert_closed_form(adapted, prior, x[:4], sigma[4])
    assert adapted.info.sigma_min == pytest.approx(how.sigma_range[0] / scale)
    assert adapted.info.sigma_max == pytest.approx(how.sigma_range[1] / scale)
    assert adapted.info.parameterisation == predicts


@pytest.mark.parametrize("data_range", [(-1.0, 1.0), (0.0, 1.0)])
def test_edm_gives_the_closed_form(data_range: tuple[float, float]) -> None:
    prior, how = gaussian(), EDM(0.6)
    scale, offset = (data_range[1] - data_range[0]) / 2, (data_range[1] + data_range[0]) / 2
    adapted = adapt(PerfectEDM(Ideal(prior, scale, offset), 0.6), description(data_range), how)
    sigma = levels_between(how) / scale
    assert_closed_form(adapted, prior, noisy(prior, sigma), sigma)
    assert adapted.info.sigma_data == pytest.approx(0.6 / scale)


def test_a_wrong_parameterisation_is_far_off() -> None:
    """The comparison above can fail."""
    prior = gaussian()
    network = Perfect(Ideal(prior), "eps", ddpm(LINEAR))
    sigma = torch.tensor([0.5, 3.0])
    x = noisy(prior, sigma)
    for wrong in (
        Predicts("v", Discrete()),
        Predicts("eps", Discrete("cosine")),
        Predicts("eps", Flow(label_scale=999.0)),
    ):
        off = adapt(network, description(), wrong).denoise(x, sigma) - prior.denoise(x, sigma)
        assert float(off.abs().max()) > 0.05


def test_labels_of_whole_steps_are_those_steps() -> None:
    how = Discrete("scaled-linear", 0.0015, 0.0195)
    steps = torch.tensor([0, 1, 7, 500, 998, 999])
    labels = how.label(how.sigmas[steps].float())
    torch.testing.assert_close(labels, steps.float(), atol=2e-3, rtol=0)
    whole = Discrete("scaled-linear", 0.0015, 0.0195, integers=True).label(1.001 * how.sigmas[steps].float())
    assert whole.dtype == torch.int64 and torch.equal(whole, steps)


def test_a_network_of_whole_steps_is_exact_on_them() -> None:
    prior, how = gaussian(), Discrete(integers=True)
    sigma = how.sigmas[[0, 3, 200, 999]].float()

    class Embedded(Perfect):
        def forward(self, x_t: Tensor, label: Tensor) -> Tensor:
            assert label.dtype == torch.int64
            return super().forward(x_t, label)

    adapted = adapt(Embedded(Ideal(prior), "eps", ddpm(LINEAR)), description(), Predicts("eps", how))
    x = noisy(prior, sigma)
    torch.testing.assert_close(adapted.denoise(x, sigma), prior.denoise(x, sigma), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("schedule", "predicts"), CASES)
def test_beyond_the_training_the_image_stays_sensible(schedule: str, predicts: str) -> None:
    """Above, nearly the mean; below, x as sigma falls; continuous at both ends; no NaN even at 0."""
    prior, (how, levels) = gaussian(), SCHEDULES[schedule]
    adapted = adapt(Perfect(Ideal(prior), predicts, levels), description(), Predicts(predicts, how))
    low, high = how.sigma_range
    above = torch.tensor([high, 1.0001 * high, 10 * high, 1000 * high])
    out = adapted.denoise(noisy(prior, above), above)
    assert (
        float((out - prior.mean).abs().max()) < 6 * 0.32 / high + 2e-3 + 1e-6 * high
    )  # what is left of x at the last level
    below = torch.tensor([0.0, 0.1 * low, 0.9999 * low, low])
    x = noisy(prior, below)
    out = adapted.denoise(x, below)
    torch.testing.assert_close(out, prior.denoise(x, below), atol=2e-3 + 50 * low**2, rtol=0)
    assert torch.equal(out[0], x[0])


@pytest.mark.parametrize("predicts", ["eps", "x0", "v"])
def test_slices_are_independent_and_gradients_flow(predicts: str) -> None:
    prior = gaussian()
    adapted = adapt(Perfect(Ideal(prior), predicts, ddpm(LINEAR)), description(), Predicts(predicts, Discrete()))
    sigma = torch.tensor([0.1, 0.5, 2.0])
    leaf = noisy(prior, sigma).requires_grad_()
    adapted.denoise(leaf, sigma)[0].sum().backward()
    other = leaf.detach().clone().requires_grad_()
    prior.denoise(other, sigma)[0].sum().backward()
    assert leaf.grad is not None and other.grad is not None
    torch.testing.assert_close(leaf.grad, other.grad, atol=1e-4, rtol=0)
    assert float(leaf.grad[1:].abs().max()) == 0


class Answer(nn.Module):
    """Wraps a perfect network in the habits of others; remembers nothing."""

    def __init__(self, perfect: nn.Module, how: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.perfect, self.how = perfect, how

    def forward(self, x: Tensor, label: Tensor) -> Any:
        return self.how(self.perfect(x, label))


@dataclass
class Sample:
    sample: Tensor


@pytest.mark.parametrize(
    "habit",
    [
        lambda out: (out, "state"),
        lambda out: Sample(out),
        lambda out: torch.cat([out, 7 + 0 * out], 1),  # a learned variance
    ],
)
@pytest.mark.parametrize("channels", [1, 2])
def test_habits_of_other_networks(habit: Callable[[Tensor], Any], channels: int) -> None:
    prior = gaussian(channels)
    described = Description("a.u.", 0.0, 1.0, channels=channels)
    network = Answer(Perfect(Ideal(prior), "eps", ddpm(LINEAR)), habit)
    adapted = adapt(network, described, Predicts("eps", Discrete()))
    sigma = torch.tensor([0.02, 0.7, 90.0])
    x = noisy(prior, sigma)
    assert adapted.channels == channels
    torch.testing.assert_close(adapted.denoise(x, sigma), prior.denoise(x, sigma), atol=1e-4, rtol=0)


def test_class_label_constants_colour_and_stride() -> None:
    """One network of everything: three colours, two condition maps, classes, and sizes that 4 divides."""
    prior = gaussian(1, (8, 8))

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.perfect = Perfect(Ideal(prior), "eps", ddpm(LINEAR))

        def forward(self, x: Tensor, label: Tensor, y: Tensor) -> Tensor:
            assert x.shape[1:] == (5, 8, 8) and y.tolist() == [3] * len(x)
            assert torch.equal(x[:, 3:], torch.tensor([0.5, -2.0])[None, :, None, None].expand(len(x), 2, 8, 8))
            colours = [self.perfect(x[:, k : k + 1], label) + shift for k, shift in enumerate((-0.1, 0.1, 0.0))]
            return torch.cat([*colours, torch.zeros_like(x[:, :3])], 1)

    described = Description("a.u.", 0.0, 1.0, class_label=3, constants=(0.5, -2.0))
    adapted = adapt(Odd(), described, Predicts("eps", Discrete()), Call(inputs=3, stride=4, class_keyword="y"))
    sigma = torch.tensor([0.02, 0.7])
    x = noisy(prior, sigma, (8, 8))[..., :5, :7]
    whole = torch.nn.functional.pad(x, (0, 1, 0, 3), mode="replicate")
    torch.testing.assert_close(adapted.denoise(x, sigma), prior.denoise(whole, sigma)[..., :5, :7], atol=1e-4, rtol=0)


def test_what_does_not_fit_is_refused() -> None:
    network = Perfect(Ideal(gaussian()), "eps", ddpm(LINEAR))
    eps = Predicts("eps", Discrete())
    with pytest.raises(ValueError, match=r"images of 4 channels, the description says 1 and constants \[\]"):
        adapt(network, description(), eps, Call(inputs=4))
    prior = adapt(network, description(), eps, Call(size=(5, 7)))
    with pytest.raises(ValueError, match="images are 5 x 8; the network takes 5 x 7 only"):
        prior.denoise(torch.zeros(1, 1, 5, 8), torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"shape \(1, 2, 5, 7\); \(s, 1, h, w\) is wanted"):
        prior.denoise(torch.zeros(1, 2, 5, 7), torch.tensor(1.0))
    cropped = adapt(Answer(network, lambda out: out[..., 1:]), description(), eps)
    with pytest.raises(ValueError, match=r"made \(1, 1, 5, 6\) of images \(1, 1, 5, 7\)"):
        cropped.denoise(torch.zeros(1, 1, 5, 7), torch.tensor(1.0))
    with pytest.raises(ValueError, match="gives a dict"):
        adapt(Answer(network, lambda out: {"out": out}), description(), eps).denoise(
            torch.zeros(1, 1, 5, 7), torch.tensor(1.0)
        )
    for schedule, predicts in ((Flow(), "v"), (Discrete(), "velocity"), (VarianceExploding(), "v")):
        with pytest.raises(ValueError, match=f"does not predict '{predicts}'"):
            Predicts(predicts, schedule)
    with pytest.raises(ValueError, match="'epsilon' is not known; there are: eps, x0"):
        Predicts("epsilon", Discrete())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Discrete("lin"), "betas 'lin' are not known"),
        (lambda: Discrete(beta_start=0.0), r"all must be in \(0, 1\)"),
        (lambda: Discrete(values=(0.1, 0.2)), "2 betas were given for 1000 steps"),
        (lambda: Discrete(steps=1), "at least 2"),
        (lambda: Discrete(label_scale=0.0), "label_scale is 0.0"),
        (lambda: Continuous(t_min=0.0), "0 < t_min < 1"),
        (lambda: VarianceExploding(2.0, 1.0), "0 < sigma_min < sigma_max"),
        (lambda: VarianceExploding(label_of="step"), "label_of is 'step'"),
        (lambda: Flow(t_max=1.0), "t_max < 1 is wanted"),
        (lambda: EDM(0.0), "sigma_data > 0"),
        (lambda: Call(stride=0), "a stride from 1"),
        (lambda: Description("", 0.0, 1.0), "unit is ''"),
        (lambda: Description("HU", "low", 1.0), "low is 'low'; finite numbers"),  # type: ignore[arg-type]
        (lambda: Description("HU", 0.0, math.inf), "high is inf"),
        (lambda: Description("HU", 0.0, 1.0, (1.0, -1.0)), r"data_range is \[1.0, -1.0\]"),
        (lambda: Description("HU", 0.0, 1.0, (1.0, 1.0)), "two different values"),
        (lambda: Description("HU", 0.0, 1.0, channels=0), "channels is 0"),
        (lambda: Description("HU", 0.0, 1.0, class_label=-1), "class_label is -1"),
        (lambda: parameterisation_of({"kind": "spiral"}), "no schedule 'spiral'; there are: edm, discrete"),
        (lambda: parameterisation_of({"kind": "ve"}), "lacks 'predicts'"),
        (lambda: parameterisation_of({"kind": "edm", "predicts": "eps"}), "'eps' with kind 'edm'"),
        (lambda: parameterisation_of({"predicts": "eps", "beta": 1.0}), "schedule has no field 'beta'"),
    ],
)
def test_values_that_make_no_sense_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_tables_name_parameterisations() -> None:
    assert parameterisation_of({"predicts": "v", "betas": "cosine"}) == Predicts("v", Discrete("cosine"))
    assert parameterisation_of({"kind": "edm", "sigma_data": 0.3}) == EDM(0.3)
    assert parameterisation_of({"kind": "flow", "predicts": "velocity"}) == Predicts("velocity", Flow())


def test_moving_keeps_everything() -> None:
    prior = gaussian()
    how = Predicts("x0", VarianceExploding())
    adapted = adapt(Perfect(Ideal(prior, 0.5, 0.5), "x0", SCHEDULES["ve"][1]), description((0.0, 1.0)), how)
    moved = adapted.to("cpu")
    assert isinstance(moved, NetworkPrior) and moved.how == how and moved.data_range == (0.0, 1.0)
    x, sigma = noisy(prior, torch.tensor([0.4])), torch.tensor(0.4)
    assert torch.equal(moved.denoise(x, sigma), adapted.denoise(x, sigma))
