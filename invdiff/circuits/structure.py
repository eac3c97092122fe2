"""Structures of circuits: trees of regions, each a vector of sums over products of what lies below it.

A region is a latent variable of K states. In state k it is the product, over the regions and the variables that hang
on it, of theirs; a child region in its parent's state k is sum_j W[k, j] times its own product in state j. Every sum
mixes functions of one scope (smooth) and every product multiplies functions of disjoint scopes (decomposable),
because each variable hangs on exactly one region and the regions are a tree.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ROOT = -1  # parent of the root
TIES_OF_SUMS = ("none", "depth")
TIES_OF_INPUTS = ("none", "all")
PAIRS_AT_ONCE = 2**24  # numbers of a block of joint histograms


@dataclass(frozen=True)
class Structure:
    """A tree of regions, sorted by depth, and the region on which each variable hangs.

    Args:
        parent: of each region, ``ROOT`` for the first; a parent precedes its children.
        owner: region of each variable.
        sum_groups: regions of one number share their sum weights; each its own if empty.
        input_groups: variables of one number share their input distributions; each its own if empty.

    Raises:
        ValueError: no tree, regions that are not sorted by depth, a region without variables (its sums would not be
            smooth), an owner that is none, groups that are not numbered from 0.
    """

    parent: tuple[int, ...]
    owner: tuple[int, ...]
    sum_groups: tuple[int, ...] = ()
    input_groups: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        n = len(self.parent)
        if not n or self.parent[0] != ROOT or any(not 0 <= p < r for r, p in enumerate(self.parent) if r):
            raise ValueError(f"the parents {_short(self.parent)} are no tree with the root first")
        if list(self.depth) != sorted(self.depth):
            raise ValueError(f"the regions have depths {_short(self.depth)}; sorted ones are wanted")
        if not self.owner or any(not 0 <= r < n for r in self.owner):
            raise ValueError(f"the variables hang on regions {_short(self.owner)}; there are {n}, from 0")
        childless = set(range(n)) - set(self.parent) - set(self.owner)
        if childless:
            raise ValueError(f"region {min(childless)} has neither variables nor regions: its scope is empty")
        for name, groups, count in (
            ("sum_groups", self.sum_groups, n),
            ("input_groups", self.input_groups, len(self.owner)),
        ):
            if groups and (len(groups) != count or set(groups) != set(range(max(groups) + 1))):
                raise ValueError(f"{name} is {_short(groups)}; {count} numbers without gaps from 0 are wanted")

    @classmethod
    def sorted_by_depth(cls, parent: Sequence[int], owner: Sequence[int]) -> Structure:
        """The structure of regions in any order, the root among them.

        Raises:
            ValueError: no root, several of them, or a cycle.
        """
        depth = [0] * len(parent)
        for r in range(len(parent)):
            at = r
            while parent[at] != ROOT:
                at, depth[r] = parent[at], depth[r] + 1
                if depth[r] > len(parent):
                    raise ValueError(f"region {r} is in a cycle; a tree is wanted")
        order = sorted(range(len(parent)), key=lambda r: (depth[r], r))
        place = {old: new for new, old in enumerate(order)}
        return cls(
            tuple(ROOT if parent[old] == ROOT else place[parent[old]] for old in order),
            tuple(place[r] for r in owner),
        )

    @property
    def regions(self) -> int:
        """How many there are."""
        return len(self.parent)

    @property
    def variables(self) -> int:
        """How many there are."""
        return len(self.owner)

    @cached_property
    def depth(self) -> tuple[int, ...]:
        """Of each region, 0 the root's."""
        depth = [0]
        for p in self.parent[1:]:
            depth.append(depth[p] + 1)
        return tuple(depth)

    @cached_property
    def levels(self) -> tuple[tuple[int, int], ...]:
        """First region and the one behind the last of each depth."""
        depth = np.array(self.depth)
        edges = [*np.searchsorted(depth, np.arange(depth[-1] + 1)).tolist(), len(depth)]
        return tuple(itertools.pairwise(edges))

    @cached_property
    def scopes(self) -> tuple[frozenset[int], ...]:
        """Variables below each region."""
        below: list[set[int]] = [set() for _ in self.parent]
        for v, r in enumerate(self.owner):
            below[r].add(v)
        for r in range(len(self.parent) - 1, 0, -1):
            below[self.parent[r]] |= below[r]
        return tuple(frozenset(s) for s in below)

    def tied(self, sums: str = "none", inputs: str = "none") -> Structure:
        """The same tree with shared parameters.

        Args:
            sums: ``none``, or ``depth``: regions of one depth share their weights.
            inputs: ``none``, or ``all``: all variables share their input distributions.

        Raises:
            ValueError: another word.
        """
        for name, word, words in (("sums", sums, TIES_OF_SUMS), ("inputs", inputs, TIES_OF_INPUTS)):
            if word not in words:
                raise ValueError(f"{name} is {word!r}; one of {', '.join(words)} is wanted")
        return replace(
            self,
            sum_groups=self.depth if sums == "depth" else (),
            input_groups=(0,) * self.variables if inputs == "all" else (),
        )

    def near(self, region: int, count: int) -> list[int]:
        """The ``count`` variables nearest to a region in the tree (all if there are no more), nearest first."""
        seen, front, found = {region}, [region], list[int]()
        while front and len(found) < count:
            found += [v for r in front for v in self._owned[r]]
            front = [n for r in front for n in self._next[r] if n not in seen]
            seen.update(front)
        return found[:count]

    @cached_property
    def _owned(self) -> list[list[int]]:
        owned: list[list[int]] = [[] for _ in self.parent]
        for v, r in enumerate(self.owner):
            owned[r].append(v)
        return owned

    @cached_property
    def _next(self) -> list[list[int]]:
        beside: list[list[int]] = [[] for _ in self.parent]
        for r, p in enumerate(self.parent[1:], 1):
            beside[r].append(p)
            beside[p].append(r)
        return beside


def _short(values: Sequence[int], most: int = 8) -> str:
    return f"({', '.join(map(str, values[:most]))}{', ...' if len(values) > most else ''})"


def quad_tree(h: int, w: int) -> Structure:
    """Every rectangle of an h x w grid is the product of its four quarters (halves where it is one wide).

    Variables are numbered by rows: (row, column) is row * w + column.

    Raises:
        ValueError: an empty grid.
    """
    if h < 1 or w < 1:
        raise ValueError(f"the grid is {h} x {w}; at least 1 x 1 is wanted")
    parent, owner = [ROOT], [0] * (h * w)
    todo = [(0, 0, h, 0, w)]
    while todo:
        region, top, bottom, left, right = todo.pop()
        for a, b in _halves(top, bottom):
            for c, d in _halves(left, right):
                if (b - a) * (d - c) == 1:
                    owner[a * w + c] = region
                else:
                    todo.append((len(parent), a, b, c, d))
                    parent.append(region)
    return Structure.sorted_by_depth(parent, owner)


def _halves(low: int, high: int) -> list[tuple[int, int]]:
    middle = (low + high + 1) // 2
    return [(low, middle), (middle, high)] if high - low > 1 else [(low, high)]


def hidden_chow_liu(x: Tensor, bins: int = 8) -> Structure:
    """A region for every variable, along the maximum spanning tree of mutual information, rooted at its centre.

    Hidden Chow-Liu trees (Liu & Van den Broeck, NeurIPS 2021) over the tree of Chow & Liu (1968).

    Args:
        x: data (n v), real or integer; n at least 2.
        bins: of equal width between each variable's extremes, of the histograms.

    Raises:
        ValueError: another shape, or fewer than 2 bins.
    """
    parent = chow_liu_parents(mutual_information(x, bins))
    return Structure.sorted_by_depth(parent, range(len(parent)))


def mutual_information(x: Tensor, bins: int) -> NDArray[np.float64]:
    """Of every two variables, in nats, from their joint histogram: (n v) -> (v v), the entropies on the diagonal.

    Raises:
        ValueError: another shape, values that are not finite, or fewer than 2 bins.
    """
    if x.ndim != 2 or len(x) < 2 or bins < 2:
        raise ValueError(f"data {tuple(x.shape)} in {bins} bins; (n v) with n from 2 and at least 2 bins are wanted")
    if not bool(torch.isfinite(x.float()).all()):
        raise ValueError("the data hold NaN or infinite values; finite ones are wanted")
    n, v = x.shape
    low, high = x.amin(0).double(), x.amax(0).double()
    share = (x.double() - low) / (high - low).clamp_min(torch.finfo(torch.float64).tiny)
    hot = torch.nn.functional.one_hot((share * bins).long().clamp_max(bins - 1), bins).float().view(n, v * bins)
    single = (hot.sum(0).double() / n).view(v, bins)
    rows = max(1, PAIRS_AT_ONCE // (v * bins * bins))
    out = np.zeros((v, v))
    for first in range(0, v, rows):
        some = hot[:, first * bins : (first + rows) * bins]
        joint = (some.T @ hot).view(-1, bins, v, bins).double() / n
        product = single[first : first + rows, :, None, None] * single
        out[first : first + rows] = torch.special.xlogy(joint, joint / product.where(joint > 0, 1)).sum((1, 3)).numpy()
    return out


def chow_liu_parents(information: NDArray[np.float64]) -> list[int]:
    """The parent of every variable in the maximum spanning tree rooted at its centre, ``ROOT`` for the root."""
    from scipy.sparse.csgraph import breadth_first_order, minimum_spanning_tree

    v = len(information)
    if v == 1:
        return [ROOT]
    cost = information.max() - information + 1.0  # positive: 0 is no edge there
    np.fill_diagonal(cost, 0)
    tree = minimum_spanning_tree(cost)

    def walk(start: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        order, before = breadth_first_order(tree, start, directed=False)
        return order, before

    end, (order, before) = int(walk(0)[0][-1]), (np.empty(0, np.int32),) * 2
    order, before = walk(end)
    path = [int(order[-1])]
    while path[-1] != end:
        path.append(int(before[path[-1]]))
    _, before = walk(path[len(path) // 2])
    return [ROOT if p < 0 else int(p) for p in before]
