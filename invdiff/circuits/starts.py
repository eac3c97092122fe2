"""Where EM starts from: a hard state of every region in every image, found by clustering, and the counts of those."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from invdiff.circuits.circuit import Circuit
from invdiff.circuits.inputs import Inputs
from invdiff.circuits.learning import Counts, Learned, fitted
from invdiff.circuits.structure import ROOT, Structure

FEATURES = 24  # variables near a region by which its images are clustered
ROUNDS = 8  # of K-means
REGIONS_AT_ONCE = 64  # of K-means
OF_A_VARIABLE = 8  # principal components of a variable's teacher features that are kept
OF_A_REGION = 16  # principal components of those of a region's variables together, by which it is clustered


def k_means_start(
    structure: Structure, inputs: Inputs, x: Tensor, states: int, pseudocount: float, seed: int
) -> Learned:
    """Parameters from hard states: each region's images are clustered by the variables nearest to it in the tree.

    The variables' own numbers are what is clustered: for levels, not for codes, whose numbers are names.

    Args:
        structure: of the circuit.
        inputs: of the wanted family, one state will do; its parameters are only where the fit starts from.
        x: data (n v), complete.
        states: K.
        pseudocount: see ``fitted``; of images.
        seed: of the clusters' first centres.

    Raises:
        ValueError: fewer images than states.
    """
    _check_enough(x, states)
    first, out = _first_centres(structure, len(x), states, seed), []
    values, near = x.to(inputs_dtype(inputs)).T, _near(structure)
    for some, start in zip(near.split(REGIONS_AT_ONCE), first.split(REGIONS_AT_ONCE), strict=True):
        out.append(_k_means(values[some].transpose(1, 2), start))
    return counted_start(structure, inputs, x, torch.cat(out), states, pseudocount)


def distilled_start(
    structure: Structure, inputs: Inputs, x: Tensor, teacher: Tensor, states: int, pseudocount: float, seed: int
) -> Learned:
    """Parameters from states that a teacher tells (latent variable distillation: Liu, Zhang & Van den Broeck 2023).

    The teacher's features of the variables nearest to a region, by their principal components, are clustered into the
    region's states; input tables and sum weights are the counts of those, smoothed.

    Args:
        structure: of the circuit.
        inputs: as ``k_means_start``.
        x: data (n v), complete.
        teacher: features (n v d) of every variable of the same images, such as an encoder's vectors.
        states: K.
        pseudocount: see ``fitted``; of images.
        seed: of the clusters' first centres.

    Raises:
        ValueError: fewer images than states, or features of other images or variables.
    """
    _check_enough(x, states)
    if teacher.ndim != 3 or teacher.shape[:2] != x.shape:
        raise ValueError(
            f"the teacher's features are {tuple(teacher.shape)}, the data {tuple(x.shape)}; (n v d), (n v) are wanted"
        )
    n, v, d = teacher.shape
    kept = _principal(teacher.reshape(1, n * v, d), OF_A_VARIABLE)[0].view(n, v, -1).transpose(0, 1)
    generator, out = torch.Generator().manual_seed(seed), []
    for near in _near(structure):
        features = _principal(kept[near].transpose(0, 1).reshape(1, n, -1), OF_A_REGION)
        out.append(_k_means(features, _far_apart(features[0], states, generator)[None]))
    return counted_start(structure, inputs, x, torch.cat(out), states, pseudocount)


def counted_start(
    structure: Structure, inputs: Inputs, x: Tensor, assigned: Tensor, states: int, pseudocount: float
) -> Learned:
    """The parameters of greatest likelihood were every region's state known: relative counts.

    Args:
        structure: of the circuit.
        inputs: as ``k_means_start``.
        x: data (n v), complete.
        assigned: state (r n) of every region in every image.
        states: K.
        pseudocount: see ``fitted``; of images.
    """
    hot = torch.nn.functional.one_hot(assigned, states).to(inputs_dtype(inputs))
    above = hot[[0 if p == ROOT else p for p in structure.parent]]
    weights = above.transpose(1, 2) @ hot
    if structure.sum_groups:
        group = torch.tensor(structure.sum_groups)
        weights = weights.new_zeros(max(structure.sum_groups) + 1, states, states).index_add(0, group, weights)
    groups = structure.input_groups or tuple(range(structure.variables))
    wide = _broadcast(inputs, max(groups) + 1, states)
    counted = wide.counts(x, hot[list(structure.owner)], torch.tensor(groups), max(groups) + 1)
    counts = Counts(hot.new_tensor(float(len(x))), hot[0].sum(0), weights, counted)
    even = hot.new_full(weights.shape, 1 / states)
    blank = Circuit(structure, wide, hot.new_full((states,), 1 / states), even)
    return Learned(0, fitted(blank, counts, pseudocount), counts.times(1 / len(x)))


def lloyd(features: Tensor, centres: Tensor, rounds: int) -> Tensor:
    """Centres (r k f) of a K-means of features (r n f), after so many rounds from ``centres``; empty ones stay."""
    for _ in range(rounds):
        hot = torch.nn.functional.one_hot(torch.cdist(features, centres).argmin(-1), centres.shape[1]).to(features)
        size = hot.sum(1)[..., None]
        centres = torch.where(size > 0, hot.transpose(1, 2) @ features / size.clamp_min(1), centres)
    return centres


def clustered(vectors: Tensor, count: int, seed: int) -> Tensor:
    """The K-means cluster (n) of each of vectors (n f); at most ``count`` clusters."""
    first = _far_apart(vectors, min(count, len(vectors)), torch.Generator().manual_seed(seed))
    return _k_means(vectors[None], first[None])[0]


def inputs_dtype(inputs: Inputs) -> torch.dtype:
    """Of its parameters."""
    return next(iter(inputs.tensors.values())).dtype


def _broadcast(inputs: Inputs, groups: int, states: int) -> Inputs:
    """The inputs of one group and state for so many of both."""
    wide = {k: t.expand(groups, states, *t.shape[2:]).contiguous() for k, t in inputs.tensors.items()}
    return replace(inputs, **wide)  # type: ignore[type-var]


def _check_enough(x: Tensor, states: int) -> None:
    if len(x) < states:
        raise ValueError(f"there are {len(x)} images for {states} states; at least as many are wanted")


def _near(structure: Structure) -> Tensor:
    """The variables by which every region is clustered: (r f)."""
    count = min(FEATURES, structure.variables)
    return torch.tensor([structure.near(r, count) for r in range(structure.regions)])


def _first_centres(structure: Structure, images: int, states: int, seed: int) -> Tensor:
    """The images (r k) from which every region's clusters start."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(images, generator=generator)[:states] for _ in range(structure.regions)])


def _far_apart(features: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Images (k) of features (n f), each drawn by its squared distance to the others: Arthur & Vassilvitskii 2007."""
    chosen = torch.randint(len(features), (1,), generator=generator)
    apart = features.new_full((len(features),), torch.inf)
    while len(chosen) < count:
        apart = torch.minimum(apart, (features - features[chosen[-1]]).square().sum(-1))
        chance = torch.where(apart.sum() > 0, apart, torch.ones_like(apart))
        chosen = torch.cat([chosen, torch.multinomial(chance, 1, generator=generator)])
    return chosen


def _k_means(features: Tensor, first: Tensor) -> Tensor:
    """The cluster (r n) of every image by its features (r n f), from the images ``first`` (r k)."""
    centres = features.gather(1, first[..., None].expand(-1, -1, features.shape[-1]))
    return torch.cdist(features, lloyd(features, centres, ROUNDS)).argmin(-1)


def _principal(x: Tensor, count: int) -> Tensor:
    """The first principal components of x (r n f), at most ``count``: (r n c)."""
    x = x - x.mean(1, keepdim=True)
    if x.shape[-1] <= count:
        return x
    _, directions = torch.linalg.eigh((x.transpose(1, 2) @ x).double())
    return x @ directions[..., -count:].to(x)
