"""One sparse primitive for projectors and gridding: compressed rows, their transpose, and the product with columns."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from scipy.sparse import csr_matrix
from torch import Tensor


class Rows(NamedTuple):
    """A sparse matrix in compressed rows: row i holds ``weight[k]`` at ``column[k]``, ptr[i] <= k < ptr[i+1]."""

    column: Tensor
    ptr: Tensor
    weight: Tensor


def transpose(rows: Rows, columns: int) -> Rows:
    """The same matrix turned over, in rows again.

    Args:
        rows: a matrix with ``columns`` columns.
        columns: how many rows the result has.
    """
    turn = transpose_by_counting if rows.column.device.type == "cpu" else transpose_by_sorting
    return turn(rows, columns)


def transpose_by_counting(rows: Rows, columns: int) -> Rows:
    """``transpose`` by scipy, on the CPU alone, five times as fast there."""
    arrays = rows.weight.numpy(), rows.column.numpy(), rows.ptr.numpy()
    turned = csr_matrix(arrays, (rows.ptr.numel() - 1, columns)).tocsc()
    return Rows(*(torch.from_numpy(v) for v in (turned.indices, turned.indptr, turned.data)))


def transpose_by_sorting(rows: Rows, columns: int) -> Rows:
    """``transpose`` by torch, on any device."""
    lengths = rows.ptr.diff()
    numbers = torch.arange(lengths.numel(), dtype=torch.int32, device=rows.ptr.device)
    owner = torch.repeat_interleave(numbers, lengths, output_size=rows.column.numel())
    order = torch.sort(rows.column, stable=True).indices
    counts = torch.bincount(rows.column, minlength=columns)
    return Rows(owner[order], pointer(counts), rows.weight[order])


def join(parts: list[Rows]) -> Rows:
    """Matrices of the same columns, one below the other."""
    lengths = torch.cat([part.ptr.diff() for part in parts])
    return Rows(torch.cat([p.column for p in parts]), pointer(lengths), torch.cat([p.weight for p in parts]))


def multiply(rows: Rows, x: Tensor) -> Tensor:
    """The product with (n k), a column for each slice: (m k), on the device of ``x``.

    One kernel on CPU and GPU: an embedding table ``x`` whose rows are summed with weights.
    """
    column, ptr, weight = (v.to(x.device) for v in rows)
    return torch.nn.functional.embedding_bag(
        column, x, ptr, mode="sum", per_sample_weights=weight, include_last_offset=True
    )


def pointer(lengths: Tensor) -> Tensor:
    """Where each row starts, from the rows' lengths, and where the last one ends: int32."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


class Matched(Protocol):
    """A matrix and its transpose: ``product(v, transposed)``, (n k) -> (m k) or back."""

    def product(self, v: Tensor, transposed: bool) -> Tensor: ...


class MatchedProduct(torch.autograd.Function):
    """A v or A^T v, whose backward is the other one of the pair, to any order."""

    @staticmethod
    def forward(v: Tensor, pair: Matched, transposed: bool) -> Tensor:
        """The product itself."""
        return pair.product(v, transposed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Matched, bool], output: Tensor) -> None:
        """Keep the pair, nothing of the data."""
        del output
        ctx.pair, ctx.transposed = inputs[1], inputs[2]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        """The stored transpose of the gradient."""
        return MatchedProduct.apply(g, ctx.pair, not ctx.transposed), None, None
