"""FLOPs of the ops from their shapes, for PyTorch's counter and its partitioner."""

from __future__ import annotations

from typing import Any

from distr_compile.estimators import auto_grouping_block, estimator_named
from distr_compile.lowering.call import Approximation
from distr_compile.lowering.checks import is_short
from distr_compile.lowering.saved import number_of_blocks


def attention_flops(
    q: tuple[int, ...],
    k: tuple[int, ...],
    v: tuple[int, ...],
    *_: Any,
    rank: int,
    estimator: str,
    grouping_block: int,
    rounds: int = 1,
    strict: bool = False,
    min_seq_len: int = 0,
    out_shape: Any = None,
    **__: Any,
) -> int:
    """FLOPs of one call from the shapes: both products of attention, and the estimator's own.

    A masked or causal call counts every score, as PyTorch's own formulas do; in the strict form of
    an estimator those of a block's own keys at the full width, whatever the offset and the mask.
    """
    batch, heads, num_queries, head_dim = q
    key_heads, num_keys = k[1:3]
    if is_short(num_queries, num_keys, min_seq_len):
        rank = head_dim
    products = 2 * batch * heads * num_queries * num_keys * (rank + v[3])
    if rank == head_dim:
        return products
    row = estimator_named(estimator)
    cost = (row.prefix_cost if strict else None) or row.cost
    factors = cost(
        num_queries,
        num_keys,
        head_dim,
        rank,
        block=grouping_block or auto_grouping_block(num_queries, estimator, strict),
        rounds=rounds,
        rep=heads // key_heads,
    )
    return products + batch * key_heads * factors.flops


def backward_flops(
    grad: tuple[int, ...],
    q: tuple[int, ...],
    k: tuple[int, ...],
    v: tuple[int, ...],
    *_: Any,
    rank: int,
    estimator: str,
    grouping_block: int,
    strict: bool = False,
    min_seq_len: int = 0,
    out_shape: Any = None,
    **__: Any,
) -> int:
    """FLOPs of a backward: the scores again, four more products, and those with A and B.

    Scores count as in ``attention_flops``; the exact scores of a strict form are not told apart.
    """
    batch, heads, num_queries, head_dim = q
    key_heads, num_keys = k[1:3]
    if is_short(num_queries, num_keys, min_seq_len):
        rank = head_dim
    products = 2 * batch * heads * num_queries * num_keys * (3 * rank + 2 * v[3])
    if rank == head_dim:
        return products
    how = Approximation(estimator, rank, grouping_block, strict=strict)
    rows = heads * num_queries + number_of_blocks(num_queries, how, False) * key_heads * num_keys
    return products + 2 * 2 * batch * rows * head_dim * rank
