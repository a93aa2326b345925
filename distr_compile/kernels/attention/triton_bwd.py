"""Attention backward in Triton: gradients by Q, K and V, A and B held constant.

What ``lowering/cpu_backward.py`` says, in three launches: delta, the sums of dO times O; dV and dK,
a tile of keys against all rows that see it; dQ, a tile of rows against all keys that it sees. Each
number is summed by one program in one order: no atomics, equal bits every time.

In the second launch scores are transposed, S^T = Khat Qhat^T, so that P^T and dS^T are the left
operands of dV = P^T dO and dKhat = dS^T Qhat as they come. Of each grouping block dKhat is summed,
and at its end dK += dKhat B^T: nothing of a block is written to memory. In the third,
dQ = dQhat A^T ends a tile, which lies inside of one block.

Precision as in ``triton_fwd.py``. P and dS are rounded to the inputs' dtype for their products;
the products with A and B are of fp32 numbers, by one tf32 product where the inputs are of 16 bits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from distr_compile.kernels.attention.dropout import Dropout
from distr_compile.kernels.attention.triton_arguments import dropped, power_of_two, strides
from distr_compile.kernels.attention.triton_bwd_kernels import _delta, _keys_bwd, _queries_bwd
from distr_compile.kernels.blocks import Places
from distr_compile.kernels.padding import cdiv
from distr_compile.kernels.plan import launch

COLUMNS = 32
"""Columns of dQ that are made at a time: more of A would take too many registers. In fp32 also the
columns of both factors that scores and dP are summed over at a time: of more than that the two
halves which three tf32 products want would."""


@dataclass(frozen=True)
class Cut:
    """How one of the kernels is cut up.

    Attributes:
        rows: query rows of a step of dV and dK, or of a program of dQ; a power of two, at least
            16.
        keys: keys of a program of dV and dK, or of a step of dQ, likewise.
        num_warps: warps of a program.
        num_stages: tiles in flight.
    """

    rows: int
    keys: int
    num_warps: int = 8
    num_stages: int = 2

    def fitted(self, block: int, num_keys: int) -> dict[str, int]:
        """The arguments of a kernel; tiles are smaller for short blocks and few keys."""
        return {
            "BLOCK_M": min(self.rows, power_of_two(block)),
            "BLOCK_N": min(self.keys, power_of_two(num_keys)),
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


@dataclass(frozen=True)
class BackwardTile:
    """How both are cut up; any tile gives the same gradients up to rounding."""

    for_keys: Cut
    for_queries: Cut

    def keys_cut(self, has_places: bool) -> Cut:
        """That of dV and dK: where a mask places the blocks, half the rows leave it registers."""
        rows = max(16, self.for_keys.rows // 2) if has_places else self.for_keys.rows
        return replace(self.for_keys, rows=rows)


Bases = tuple[Tensor, Tensor]


def attention_bwd(
    Qhat: Tensor,
    Khat: Tensor,
    V: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    grad: Tensor,
    *,
    scale: float,
    is_causal: bool = False,
    causal_offset: int = 0,
    grouping_block: int,
    softcap: float = 0.0,
    bases: Bases | None = None,
    dropout: Dropout | None = None,
    tile: BackwardTile,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    delta: Tensor | None = None,
    places: Places | None = None,
) -> None:
    """Gradients of softmax(scale * Qhat Khat^T + mask) V by Q, K and V; Qhat is Q A, and Khat K B.

    Inputs are trusted. Of Qhat, Khat, V and grad one whose last stride is not 1 is copied first.

    Args:
        Qhat: ``(B, H, N, r)`` fp16, bf16 or fp32; all others but lse and bases alike.
        Khat: ``(B or 1, H_k, L, M, r)``, one for each grouping block, or L = 1.
        V: ``(B or 1, H_k, M, d_v)``.
        mask: broadcastable to ``(B, H, N, M)``, bool or floating; it gets no gradient.
        out: ``(B, H, N, d_v)``, the result of the forward.
        lse: ``(B, H, N)`` fp32, the logarithm of each row's sum of exponentials; -inf where the row
            sees nothing.
        grad: ``(B, H, N, d_v)``, the gradient of ``out``.
        scale: multiplies the scores.
        is_causal: row i sees keys ``j <= i + causal_offset``.
        causal_offset: see ``is_causal``.
        grouping_block: query rows per Khat.
        softcap: c > 0 made the scaled scores s ``c * tanh(s / c)``; 0 did not.
        bases: A and B ``(B or 1, H_k, L, d, r)`` fp32; None where Q and K are Qhat and Khat.
        dropout: says which weights were dropped; its part begins at a key that four divides.
        tile: how to cut the work up.
        dq: ``(B, H, N, d)`` with unit last stride, is filled.
        dk: ``(B or 1, H_k, M, d)`` likewise; with a batch of 1 it is the sum over all entries, and
            then dv and V have a batch of 1 too.
        dv: ``(B or 1, H_k, M, d_v)`` likewise.
        delta: ``(B, H, N)`` fp32 contiguous, is filled with the sums of ``grad`` times ``out``.
        places: where the blocks lie, in the place of ``grouping_block``: L is the number that it
            says. Every row uses a block of it.
    """
    batch, heads, num_queries, _ = Qhat.shape
    key_heads, blocks, num_keys = Khat.shape[1:4]
    d = dk.shape[-1]
    Qhat, Khat, V, grad, out = (
        t if t.stride(-1) == 1 else t.contiguous() for t in (Qhat, Khat, V, grad, out)
    )
    # The kernels find lse and delta by the number of a row through entries and heads.
    lse = lse.contiguous()
    if delta is None:
        delta = torch.empty_like(lse)
    if mask is not None:
        mask = mask.expand(batch, heads, num_queries, num_keys)
    # The kernels read their rows as r numbers one after another.
    A, B = (None, None) if bases is None else (t.contiguous() for t in bases)
    block = max(1, num_queries if blocks == 1 else grouping_block)
    if places:
        block = max(1, places.rows)
    # Tiles are no longer than the longest block.
    length = min(block, num_queries)
    # What both kernels take; only ``BLOCK_R`` differs, see ``_padded_rank``.
    options: dict[str, Any] = {
        **dropped(dropout),
        **_described(Qhat, Khat, V, mask, grad, d),
        "scale": float(scale),
        "causal_offset": min(max(causal_offset, -num_queries), num_keys),
        "grouping_block": block,
        "IS_CAUSAL": is_causal,
        "SOFTCAP": float(softcap),
    }
    seed = None if dropout is None else dropout.seed
    inputs = {"Qhat": Qhat, "Khat": Khat, "V": V, "Mask": mask, "Seed": seed, "Grad": grad}
    inputs |= {"Lse": lse, "Delta": delta, "Ends": places.ends if places else None}
    with torch.cuda.device_of(Qhat):
        if num_queries and batch * heads:
            _launch_delta(out, grad, delta)
        # Also where there are no query rows: dK and dV become 0.
        if num_keys and dk.shape[0] * key_heads:
            cut = tile.keys_cut(places is not None).fitted(length, num_keys)
            launch(
                _keys_bwd,
                (cdiv(num_keys, cut["BLOCK_N"]), dk.shape[0] * key_heads),
                **inputs,
                B=B,
                BLOCK_C=COLUMNS,
                DK=dk,
                DV=dv,
                key_heads=key_heads,
                shares=batch // dk.shape[0],  # entries of Q for each of K and V
                blocks=blocks,
                **strides("b", "bhl", B),
                **strides("dk", "bhm", dk),
                **strides("dv", "bhm", dv),
                **options | {"BLOCK_R": _padded_rank(options["BLOCK_R"], cut["BLOCK_N"])},
                **cut,
            )
        # Also where there are no keys: dQ becomes 0.
        if num_queries and batch * heads:
            cut = tile.for_queries.fitted(length, num_keys)
            tiles_per_block = cdiv(block, cut["BLOCK_M"])
            # The last block may be shorter, and take fewer tiles.
            last = cdiv(num_queries - (blocks - 1) * block, cut["BLOCK_M"])
            tiles = (blocks - 1) * tiles_per_block + last
            if places:
                tiles = cdiv(num_queries, cut["BLOCK_M"]) + blocks - 1
            launch(
                _queries_bwd,
                (tiles, batch * heads),
                **inputs,
                A=A,
                DQ=dq,
                tiles_per_block=tiles_per_block,
                BLOCK_C=min(options["BLOCK_D"], COLUMNS),
                KEYS_FIT=num_keys % cut["BLOCK_N"] == 0,
                **strides("a", "bhl", A),
                **strides("dq", "bhn", dq),
                **options,
                **cut,
            )


def _padded_rank(rank: int, num_keys: int) -> int:
    """Columns of dKhat: more than a tile has keys.

    Triton shares dKhat among the warps by columns then. Where it is no wider than long each warp
    gets all columns of some keys, in dV too, and more registers than there are.
    """
    return rank if torch.version.hip else max(rank, 2 * num_keys)


def _launch_delta(out: Tensor, grad: Tensor, delta: Tensor) -> None:
    batch, heads, num_queries, d_v = out.shape
    num_rows = batch * heads * num_queries
    launch(
        _delta,
        (cdiv(num_rows, 32),),
        Out=out,
        Grad=grad,
        Delta=delta,
        num_rows=num_rows,
        heads=heads,
        num_queries=num_queries,
        **strides("o", "bhn", out),
        **strides("g", "bhn", grad),
        D_V=d_v,
        BLOCK_M=32,
        BLOCK_V=power_of_two(d_v),
        num_warps=4,
    )


def _described(
    Qhat: Tensor,
    Khat: Tensor,
    V: Tensor,
    mask: Tensor | None,
    grad: Tensor,
    head_dim: int,
) -> dict[str, Any]:
    """Arguments of both kernels that follow from the tensors, and how they are compiled."""
    r, d_v = Qhat.shape[3], V.shape[3]
    half, is_amd = Qhat.dtype != torch.float32, bool(torch.version.hip)
    return {
        "heads": Qhat.shape[1],
        "rep": Qhat.shape[1] // Khat.shape[1],
        "num_queries": Qhat.shape[2],
        "num_keys": Khat.shape[3],
        **strides("q", "bhn", Qhat),
        **strides("k", "bhlm", Khat),
        **strides("v", "bhm", V),
        **strides("m", "bhnm", mask),
        **strides("g", "bhn", grad),
        "R": r,
        "D": head_dim,
        "D_V": d_v,
        "BLOCK_R": power_of_two(r),
        "BLOCK_D": power_of_two(head_dim),
        "BLOCK_V": power_of_two(d_v),
        "BY_COLUMNS": not (half or is_amd),  # where a product is three tf32 ones
        "PRECISION": "ieee" if is_amd else "tf32x3",
        # Results of 16 bits have no more precision than a tf32 number.
        "BASIS_PRECISION": "ieee" if is_amd else "tf32" if half else "tf32x3",
        "enable_fp_fusion": True,
    }
