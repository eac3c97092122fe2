"""Where EM starts from: states told by a teacher, against exact counts and against other starts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from invdiff.circuits import Categorical, bits_per_dimension, distilled_start, full_batch, k_means_start, quad_tree
from invdiff.circuits.starts import clustered, counted_start

CODES, STATES, VARIABLES = 7, 3, 15
ONE = Categorical(torch.zeros(1, 1, CODES, dtype=torch.float64).log_softmax(-1))


def caused(n: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (n v), whose numbers are names, of a hidden cause (n), and a teacher's features (n v 11)."""
    g = torch.Generator().manual_seed(seed)
    cause = torch.randint(STATES, (n,), generator=g)
    names = torch.stack([torch.randperm(CODES, generator=torch.Generator().manual_seed(v)) for v in range(VARIABLES)])
    which = (2 * cause[:, None] + (torch.rand(n, VARIABLES, generator=g) < 0.4)).where(
        torch.rand(n, VARIABLES, generator=g) < 0.7, torch.randint(CODES, (n, VARIABLES), generator=g)
    )
    x = names[torch.arange(VARIABLES), which]
    features = torch.zeros(n, VARIABLES, 11, dtype=torch.float64)
    features[:, :, 4] = 5.0 * cause[:, None]
    return x, cause, features + 0.1 * torch.randn(features.shape, generator=g, dtype=torch.float64)


def mixture(x: Tensor, cause: Tensor) -> Tensor:
    """ln p(x) of the mixture whose parameters are the counts with the cause known: (n)."""
    hot = torch.nn.functional.one_hot(x, CODES).double()
    total = torch.zeros(len(x), dtype=torch.float64)
    for z in range(STATES):
        table = hot[cause == z].mean(0)
        total += (cause == z).double().mean() * (hot * table).sum(-1).prod(-1)
    return total.log()


def test_a_teacher_that_knows_the_cause_gives_the_exact_counts() -> None:
    x, cause, teacher = caused(400)
    assert len(cause.unique()) == STATES
    found = distilled_start(quad_tree(3, 5), ONE, x, teacher, STATES, 0.0, seed=2).circuit
    torch.testing.assert_close(found.log_likelihood(x), mixture(x, cause), rtol=1e-4, atol=1e-4)
    share = torch.bincount(cause).double() / 400
    torch.testing.assert_close(found.root.sort().values, share.sort().values, rtol=1e-5, atol=1e-5)
    told = counted_start(quad_tree(3, 5), ONE, x, cause.expand(found.structure.regions, -1), STATES, 0.0).circuit
    torch.testing.assert_close(told.root, share, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(told.log_likelihood(x), found.log_likelihood(x), rtol=1e-6, atol=1e-6)


def test_a_distilled_start_beats_chance_and_the_codes_numbers() -> None:
    x, _, teacher = caused(300)
    held, structure = caused(300, 1)[0], quad_tree(3, 5)
    g = torch.Generator().manual_seed(0)
    chance = torch.randint(STATES, (structure.regions, 300), generator=g)
    starts = [
        distilled_start(structure, ONE, x, teacher, STATES, 0.3, seed=2),
        k_means_start(structure, ONE, x, STATES, 0.3, seed=2),
        counted_start(structure, ONE, x, chance, STATES, 0.3),
    ]
    bits = []
    for start in starts:
        circuit, row = start.circuit, [bits_per_dimension(start.circuit, held)]
        for _ in range(3):
            circuit, _ = full_batch(circuit, [x], 0.3)
        bits.append([*row, bits_per_dimension(circuit, held)])
    assert bits[0][0] < bits[1][0] - 0.05 and bits[1][0] < bits[2][0]
    assert bits[0][1] < bits[2][1] - 0.05  # after the same steps, too


def test_the_teachers_rotation_and_offset_change_nothing() -> None:
    x, _, teacher = caused(120)
    turn = torch.linalg.qr(torch.randn(11, 11, generator=torch.Generator().manual_seed(5), dtype=torch.float64)).Q
    plain, turned = (
        distilled_start(quad_tree(3, 5), ONE, x, f, STATES, 0.3, seed=2).circuit for f in (teacher, teacher @ turn + 9)
    )
    torch.testing.assert_close(plain.weights, turned.weights)


def test_tied_sums_share_their_counts() -> None:
    x, _, teacher = caused(120)
    found = distilled_start(quad_tree(3, 5).tied("depth", "all"), ONE, x, teacher, STATES, 0.3, seed=2).circuit
    assert len(found.weights) == len(found.structure.levels) and found.inputs.table.shape[0] == 1  # type: ignore[attr-defined]


def test_clusters_are_those_of_the_vectors() -> None:
    g = torch.Generator().manual_seed(0)
    vectors = (9 * torch.randn(3, 4, generator=g)).repeat(5, 1) + 0.01 * torch.randn(15, 4, generator=g)
    found = clustered(vectors, 3, seed=1).view(5, 3)
    assert torch.equal(found, found[:1].expand(5, -1)) and len(found.unique()) == 3
    assert len(clustered(vectors[:2], 3, seed=1)) == 2


def test_bad_teachers_get_one_sentence() -> None:
    x, _, teacher = caused(20)
    with pytest.raises(ValueError, match=r"features are \(20, 14, 11\), the data \(20, 15\)"):
        distilled_start(quad_tree(3, 5), ONE, x, teacher[:, 1:], STATES, 0.3, seed=0)
    with pytest.raises(ValueError, match="2 images for 3 states"):
        distilled_start(quad_tree(3, 5), ONE, x[:2], teacher[:2], STATES, 0.3, seed=0)
