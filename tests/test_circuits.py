"""Circuits against the sum over every value and every state, in float64, and against a Bayesian network."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from invdiff.circuits import (
    MISSING,
    Categorical,
    Circuit,
    DiscretisedLogistic,
    Gaussian,
    Spot,
    Structure,
    chow_liu,
    hidden_chow_liu,
    quad_tree,
)
from invdiff.circuits.inputs import inverse_cdf
from invdiff.circuits.structure import chow_liu_parents, mutual_information
from invdiff.noise import KeyedNoise

LEVELS = 3
STRUCTURES: dict[str, Structure] = {
    "one region": Structure((-1,), (0, 0, 0)),
    "quad-tree": quad_tree(2, 3),
    "quad-tree, 1 x 5": quad_tree(1, 5),
    "a variable a region": Structure.sorted_by_depth([1, 4, 1, 4, -1], range(5)),
    "tied": Structure.sorted_by_depth([1, 4, 1, 4, -1], range(5)).tied("depth", "all"),
    "tied in part": Structure((-1, 0, 0, 1), (1, 3, 2, 3, 0, 2), (0, 1, 1, 0), (0, 1, 1, 0, 2, 2)),
}
FAMILIES = ("categorical", "logistic")


def random_circuit(structure: Structure, family: str = "categorical", states: int = 2, seed: int = 0) -> Circuit:
    g = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    groups = len(set(structure.input_groups)) or structure.variables
    sums = len(set(structure.sum_groups)) or structure.regions
    inputs: Any = {
        "categorical": lambda: Categorical((2 * noise(groups, states, LEVELS)).log_softmax(-1)),
        "logistic": lambda: DiscretisedLogistic(1 + noise(groups, states), 0.3 * noise(groups, states) - 0.5, LEVELS),
        "gaussian": lambda: Gaussian(noise(groups, states), 0.3 * noise(groups, states) - 0.5),
    }[family]()
    return Circuit(structure, inputs, noise(states).softmax(-1), (2 * noise(sums, states, states)).softmax(-1))


class BruteForce:
    """p(states, x) written out: joint (K^r, C^v), with the states and the values of each row and column."""

    def __init__(self, circuit: Circuit) -> None:
        s, k = circuit.structure, circuit.states
        sums, group = s.sum_groups or range(s.regions), s.input_groups or range(s.variables)
        self.states = torch.tensor(list(itertools.product(range(k), repeat=s.regions)))
        self.x = torch.tensor(list(itertools.product(range(LEVELS), repeat=s.variables)))
        self.of_states = circuit.root[self.states[:, 0]].clone()
        for r in range(1, s.regions):
            self.of_states *= circuit.weights[sums[r], self.states[:, s.parent[r]], self.states[:, r]]
        self.circuit, self.group = circuit, group
        self.joint = self.of_states[:, None] * self.likelihood(circuit.inputs.table.exp())  # type: ignore[attr-defined]

    def likelihood(self, table: Tensor) -> Tensor:
        s, out = self.circuit.structure, torch.ones(len(self.states), len(self.x), dtype=torch.float64)
        for v in range(s.variables):
            out *= table[self.group[v]][self.states[:, s.owner[v]]][:, self.x[:, v]]
        return out

    def weight(self, w: Tensor) -> Tensor:
        """prod_v w_v(x_v): (v C) -> (C^v)."""
        return torch.stack([w[v][self.x[:, v]] for v in range(len(w))]).prod(0)


def soft(circuit: Circuit, images: int = 4, seed: int = 1) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(images, circuit.structure.variables, LEVELS, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", STRUCTURES)
def test_likelihood_is_the_sum_over_states_and_adds_up_to_one(name: str, family: str) -> None:
    circuit = random_circuit(STRUCTURES[name], family)
    brute = BruteForce(circuit)
    p = circuit.log_likelihood(brute.x).exp()
    torch.testing.assert_close(p, brute.joint.sum(0), rtol=1e-12, atol=0)
    assert abs(float(p.sum()) - 1) < 1e-12
    assert p.std() > 0.1 * p.mean()  # no flat table, of which all of this would be true


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", STRUCTURES)
def test_posterior_under_soft_evidence_is_exact(name: str, family: str) -> None:
    circuit = random_circuit(STRUCTURES[name], family)
    brute, w = BruteForce(circuit), soft(circuit)
    marginals, without = circuit.marginals(w), circuit.marginals(w, own=False)
    found = circuit.posterior(w)
    for b in range(len(w)):
        p = brute.joint.sum(0) * brute.weight(w[b].exp())
        assert abs(float(found.log_evidence[b] - p.sum().log())) < 1e-11
        for v in range(circuit.structure.variables):
            exact = torch.stack([p[brute.x[:, v] == c].sum() for c in range(LEVELS)]) / p.sum()
            torch.testing.assert_close(marginals[b, v], exact, rtol=1e-10, atol=1e-12)
            mean = (exact * torch.arange(LEVELS)).sum()
            assert abs(float(found.mean[b, v] - mean)) < 1e-11
            spread = (exact * (torch.arange(LEVELS) - mean).square()).sum()
            assert abs(float(found.variance[b, v] - spread)) < 1e-11
    assert (marginals - without).abs().max() > 0.05  # the factor w / f matters


def test_without_its_own_evidence_it_is_another_draw_of_the_same_state() -> None:
    circuit = random_circuit(STRUCTURES["quad-tree"])
    brute, w = BruteForce(circuit), soft(circuit, 1)
    states = (brute.joint * brute.weight(w[0].exp())).sum(1)
    got = circuit.marginals(w, own=False)[0]
    for v, r in enumerate(circuit.structure.owner):
        f = circuit.inputs.table.exp()[v][brute.states[:, r]]  # type: ignore[attr-defined]
        torch.testing.assert_close(got[v], (states[:, None] * f).sum(0) / states.sum(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", STRUCTURES)
def test_missing_values_are_summed_out(name: str) -> None:
    circuit = random_circuit(STRUCTURES[name])
    brute = BruteForce(circuit)
    x = brute.x[7::31].clone()
    x[:, 0], x[1::2, -1] = MISSING, MISSING
    p = circuit.log_likelihood(x).exp()
    for row, got in zip(x, p, strict=True):
        fits = ((brute.x == row) | (row == MISSING)).all(1)
        assert abs(float(got - brute.joint.sum(0)[fits].sum())) < 1e-12
    nothing = torch.full((1, circuit.structure.variables), MISSING)
    assert abs(float(circuit.log_likelihood(nothing))) < 1e-12
    known = circuit.marginals(x)
    certain = torch.nn.functional.one_hot(x.clamp_min(0), LEVELS).double()
    torch.testing.assert_close(known[x != MISSING], certain[x != MISSING], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", STRUCTURES)
def test_most_probable_values_and_states(name: str, family: str) -> None:
    circuit = random_circuit(STRUCTURES[name], family)
    brute, w = BruteForce(circuit), soft(circuit)
    x, states = circuit.most_probable(w)
    for b in range(len(w)):
        p = brute.joint * brute.weight(w[b].exp())
        row, column = divmod(int(p.argmax()), p.shape[1])
        assert torch.equal(x[b], brute.x[column]) and torch.equal(states[b], brute.states[row])
    known = brute.x[5:6]
    assert torch.equal(circuit.most_probable(known)[0], known)


def test_samples_are_joint() -> None:
    circuit = random_circuit(STRUCTURES["a variable a region"], states=3, seed=2)
    brute, w = BruteForce(circuit), soft(circuit, 1)
    n = 40_000
    x = circuit.sample(w.expand(n, -1, -1), KeyedNoise(3))
    p = brute.joint.sum(0) * brute.weight(w[0].exp())
    p = p / p.sum()
    code = (x * LEVELS ** torch.arange(x.shape[1] - 1, -1, -1)).sum(1)
    share = torch.bincount(code, minlength=len(p)) / n
    assert float((share - p).abs().max()) < 5 * float((p / n).sqrt().max())
    # Independent draws of the exact marginals are another distribution
    single = [torch.stack([p[brute.x[:, v] == c].sum() for c in range(LEVELS)]) for v in range(5)]
    independent = torch.stack([single[v][brute.x[:, v]] for v in range(5)]).prod(0)
    assert float((share - independent).abs().sum()) > 5 * float((share - p).abs().sum())


def test_samples_are_keyed_and_keep_what_is_known() -> None:
    circuit = random_circuit(STRUCTURES["quad-tree"], states=3)
    x = torch.full((6, 6), MISSING)
    x[:, 4] = torch.tensor([0, 1, 2, 0, 1, 2])
    noise = KeyedNoise(5)
    drawn = circuit.sample(x, noise, 2, 1)
    assert torch.equal(drawn[:, 4], x[:, 4]) and bool((drawn >= 0).all())
    assert torch.equal(drawn[2:4], circuit.sample(x[2:4], KeyedNoise(5, first=2), 2, 1))
    assert not torch.equal(drawn, circuit.sample(x, noise, 3, 1))


def test_inverse_cdf_ends() -> None:
    p = torch.tensor([[0.0, 0.5, 0.5, 0.0]]).expand(4, -1)
    assert inverse_cdf(p, torch.tensor([-40.0, -1e-3, 1e-3, 40.0])).tolist() == [1, 1, 2, 2]


def gaussian_mixture(circuit: Circuit) -> tuple[Tensor, Tensor, Tensor]:
    """Probability (K^r), and mean and variance (K^r v), of every setting of the states."""
    s = circuit.structure
    states = torch.tensor(list(itertools.product(range(circuit.states), repeat=s.regions)))
    p = circuit.root[states[:, 0]].clone()
    for r in range(1, s.regions):
        p *= circuit.weights[r, states[:, s.parent[r]], states[:, r]]
    inputs: Any = circuit.inputs
    at = torch.stack([inputs.mean[v][states[:, s.owner[v]]] for v in range(s.variables)], 1)
    log_std = torch.stack([inputs.log_std[v][states[:, s.owner[v]]] for v in range(s.variables)], 1)
    return p, at, (2 * log_std).exp()


def test_gaussian_inputs_are_a_mixture_of_gaussians() -> None:
    circuit = random_circuit(STRUCTURES["quad-tree"], "gaussian")
    p, mean, variance = gaussian_mixture(circuit)
    g = torch.Generator().manual_seed(4)
    value = torch.randn(3, 6, generator=g, dtype=torch.float64)
    tau = torch.rand(3, 6, generator=g, dtype=torch.float64)
    tau[:, 1], tau[:, 2] = math.inf, 0.0
    found = circuit.posterior(Spot(value, tau))
    for b in range(3):
        total = variance + torch.where(tau[b].isinf(), 0.0, tau[b])
        log_n = -0.5 * ((value[b] - mean).square() / total + (2 * math.pi * total).log())
        weight = p * log_n.where(tau[b].isfinite(), 0.0).sum(1).exp()
        gain = torch.where(tau[b].isinf(), 0.0, variance / (variance + tau[b]))
        weight, evidence = weight / weight.sum(), weight.sum().log()
        middle = mean + gain * (value[b] - mean)
        exact = (weight[:, None] * middle).sum(0)
        spread = (weight[:, None] * ((1 - gain) * variance + (middle - exact).square())).sum(0)
        assert abs(float(found.log_evidence[b] - evidence)) < 1e-11
        torch.testing.assert_close(found.mean[b], exact, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(found.variance[b], spread, rtol=1e-9, atol=1e-12)
    # Data are soft evidence without variance, NaN is none
    known = torch.where(tau == 0, value, torch.nan)
    torch.testing.assert_close(
        circuit.log_likelihood(known), circuit.log_likelihood(Spot(value, torch.where(tau == 0, tau, math.inf)))
    )
    drawn = circuit.sample(known[:1].expand(20_000, -1), KeyedNoise(1))
    exact_posterior = circuit.posterior(known[:1])
    assert (drawn.mean(0) - exact_posterior.mean[0]).abs().max() < 0.03
    assert (drawn.var(0) - exact_posterior.variance[0]).abs().max() < 0.05
    assert bool((drawn[:, 2] == value[0, 2]).all())


def test_gaussian_most_probable() -> None:
    circuit = random_circuit(STRUCTURES["quad-tree"], "gaussian")
    p, mean, variance = gaussian_mixture(circuit)
    value = torch.linspace(-1, 1, 6, dtype=torch.float64)
    tau = torch.tensor([0.3, math.inf, 0.1, 0.0, 2.0, 0.5], dtype=torch.float64)
    gain = torch.where(tau.isinf(), 0.0, variance / (variance + tau))
    at = mean + gain * (value - mean)
    log_w = -0.5 * (value - at).square() / tau
    height = p.log() - 0.5 * ((at - mean).square() / variance + variance.log()).sum(1)
    height = height + log_w.where(tau.isfinite() & (tau > 0), 0.0).sum(1)
    got, _ = circuit.most_probable(Spot(value[None], tau[None]))
    torch.testing.assert_close(got[0], at[height.argmax()])


def test_the_logistic_is_the_difference_of_its_distribution_function() -> None:
    mean, scale, count = torch.tensor([[2.3, -4.0]]).double(), torch.tensor([[0.7, 0.2]]).double(), 6
    table = DiscretisedLogistic(mean, scale.log(), count).table.exp()
    edges = torch.cat([torch.tensor([-math.inf]), torch.arange(count - 1) + 0.5, torch.tensor([math.inf])]).double()
    cdf = ((edges - mean[..., None]) / scale[..., None]).sigmoid()
    torch.testing.assert_close(table, cdf.diff(), rtol=1e-9, atol=1e-14)
    far = DiscretisedLogistic(torch.tensor([[-900.0]]), torch.tensor([[0.0]]), count).table
    assert bool(torch.isfinite(far).all())


def network_likelihood(x: Tensor, parents: list[int], data: Tensor) -> Tensor:
    """prod_v p(x_v | x_parent), of relative frequencies, by looping."""
    out = np.ones(len(x))
    for i, row in enumerate(x.tolist()):
        for v, p in enumerate(parents):
            fits = np.ones(len(data), bool) if p < 0 else (data[:, p] == row[p]).numpy()
            out[i] *= (data[fits, v] == row[v]).double().mean()
    return torch.from_numpy(out)


def chain_data(n: int = 400, v: int = 5) -> Tensor:
    """Variables that follow each other along the chain 3 - 0 - 4 - 1 - 2."""
    rng = np.random.default_rng(0)
    x, before = np.zeros((n, v), np.int64), rng.integers(LEVELS, size=n)
    for number in (3, 0, 4, 1, 2):
        before = np.where(rng.random(n) < 0.7, before, rng.integers(LEVELS, size=n))
        x[:, number] = before
    return torch.from_numpy(x)


def test_a_tree_of_levels_is_the_bayesian_network() -> None:
    data = chain_data()
    parents = chow_liu_parents(mutual_information(data, LEVELS))
    edges = {frozenset((v, p)) for v, p in enumerate(parents) if p >= 0}
    assert edges == {frozenset(e) for e in ((3, 0), (0, 4), (4, 1), (1, 2))}
    assert parents[4] == -1  # the centre of the chain
    circuit = chow_liu(data, LEVELS, pseudocount=0.0).to(torch.empty(0, dtype=torch.float64))
    x = data[:60]
    torch.testing.assert_close(
        circuit.log_likelihood(x).exp(), network_likelihood(x, parents, data), rtol=1e-4, atol=1e-9
    )


def test_mutual_information_is_that_of_the_joint_histogram() -> None:
    x = chain_data(200)
    got = mutual_information(x, LEVELS)
    joint = np.zeros((LEVELS, LEVELS))
    np.add.at(joint, (x[:, 0].numpy(), x[:, 4].numpy()), 1 / 200)
    terms = joint * np.log(joint / joint.sum(1, keepdims=True) / joint.sum(0))
    assert abs(got[0, 4] - terms.sum()) < 1e-6 and abs(got[4, 0] - got[0, 4]) < 1e-6
    single = np.bincount(x[:, 1].numpy()) / 200
    assert abs(got[1, 1] + (single * np.log(single)).sum()) < 1e-6


@pytest.mark.parametrize(("h", "w"), [(1, 1), (2, 3), (5, 4), (8, 8), (7, 1)])
def test_quad_trees_are_smooth_and_decomposable(h: int, w: int) -> None:
    check_scopes(quad_tree(h, w))
    assert quad_tree(h, w).variables == h * w


def test_quad_tree_of_four_by_four() -> None:
    """Five regions: the whole and its quarters, with the pixels of each quarter on it."""
    s = quad_tree(4, 4)
    assert s.parent == (-1, 0, 0, 0, 0)
    corners = {frozenset(s.scopes[r]) for r in range(1, 5)}
    assert corners == {frozenset({a, a + 1, a + 4, a + 5}) for a in (0, 2, 8, 10)}


def check_scopes(s: Structure) -> None:
    children = [[c for c in range(s.regions) if s.parent[c] == r] for r in range(s.regions)]
    owned = [[v for v in range(s.variables) if s.owner[v] == r] for r in range(s.regions)]
    for r in range(s.regions):
        parts = [s.scopes[c] for c in children[r]] + [frozenset({v}) for v in owned[r]]
        assert sum(map(len, parts)) == len(s.scopes[r]) == len(frozenset().union(*parts)) > 0
    assert s.scopes[0] == frozenset(range(s.variables))


def test_hidden_chow_liu_has_a_region_a_variable_along_the_tree() -> None:
    s = hidden_chow_liu(chain_data(), LEVELS)
    check_scopes(s)
    assert s.owner[4] == 0 and sorted(s.owner) == list(range(5))
    assert s.near(s.owner[3], 3) == [3, 0, 4]


def flat_circuit(variables: int, states: int, probability: float) -> Circuit:
    inputs = Gaussian(torch.zeros(variables, states), torch.zeros(variables, states))
    return Circuit(quad_tree(2, 2), inputs, torch.full((2,), probability), torch.full((1, 2, 2), probability))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Structure((0,), (0,)), "no tree with the root first"),
        (lambda: Structure((-1, -1), (0, 1)), "no tree with the root first"),
        (lambda: Structure((-1, 0, 1, 0), (2, 3)), "depths .0, 1, 2, 1.; sorted"),
        (lambda: Structure((-1, 0), (0,)), "region 1 has neither variables nor regions"),
        (lambda: Structure((-1,), (1,)), r"hang on regions \(1\); there are 1"),
        (lambda: Structure((-1, 0), (1, 1), (0, 2)), r"sum_groups is \(0, 2\); 2 numbers without gaps"),
        (lambda: Structure.sorted_by_depth([1, 0], [0, 1]), "in a cycle"),
        (lambda: quad_tree(2, 2).tied(sums="rows"), "sums is 'rows'; one of none, depth"),
        (lambda: quad_tree(0, 3), "grid is 0 x 3"),
        (lambda: mutual_information(torch.zeros(5), 4), r"data \(5,\)"),
        (lambda: hidden_chow_liu(torch.full((3, 2), torch.nan)), "NaN or infinite"),
        (lambda: random_circuit(quad_tree(2, 2), "gaussian").marginals(torch.zeros(1, 4)), "have no levels"),
        (lambda: flat_circuit(4, 2, 1.0), "are not probabilities"),
        (lambda: flat_circuit(3, 2, 0.5), "inputs.mean is of 3 variables; 4 are"),
        (lambda: flat_circuit(4, 3, 0.5), r"root has shape \(2,\)"),
    ],
)  # fmt: skip
def test_what_is_no_circuit_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_float32_keeps_up_with_float64_on_many_variables() -> None:
    s = quad_tree(16, 16)
    double = random_circuit(s, states=5)
    x = torch.randint(LEVELS, (3, 256), generator=torch.Generator().manual_seed(0))
    single = double.to(torch.empty(0))
    assert (double.log_likelihood(x) - single.log_likelihood(x)).abs().max() < 1e-5 * 256
    w = soft(double, 2)
    assert (double.posterior(w).mean - single.posterior(w.float()).mean).abs().max() < 1e-4


def test_gradients_of_the_log_evidence_are_the_marginals() -> None:
    """d ln sum p w / d ln w = p(x_v = c | w): autograd against the pass down."""
    circuit = random_circuit(STRUCTURES["tied in part"])
    w = soft(circuit).requires_grad_()
    (gradient,) = torch.autograd.grad(circuit.log_likelihood(w).sum(), w)
    torch.testing.assert_close(gradient, circuit.marginals(w).detach(), rtol=1e-10, atol=1e-12)
