"""The definition of DistrAttention in plain PyTorch, which every other implementation must match.

Written to be read beside the paper (arXiv 2507.17245, section 3), not to be fast: the whole matrix
of scores is materialised. Shapes use B batch, H query heads, H_k key heads, N query rows, M key
rows, d head width, r = d / G the width left by groups of G (the paper's G*) columns, d_v value
width.

A call goes through four steps:

1. ``projections`` in ``kernels/random.py``: the fixed random matrix that turns a column of Q into
   N' = 16 numbers (3.2).
2. ``group_columns`` in ``kernels/lsh/reference.py``: hash the d columns of one block of Q and sort
   them by the hash (3.2).
3. ``estimate``: per grouping block of query rows (3.3), Q of width d becomes Qhat of width r and
   K becomes Khat (eq. 2): ``kernels/lsh/reference.py``. The estimators ``projection`` and
   ``calibrated``, which are not the paper's, replace steps 2 and 3: ``reference.py`` in the folders
   of their names. The table of estimators says which module computes which.
4. ``attention``: softmax(scale * Qhat Khat^T + mask) V, with a soft cap and sinks where a model
   has them, and with dropout on the weights, of which ``dropout.py`` says which stay.

Works in any floating dtype, fp64 included. Steps 3 and 4 are evaluated in the dtype of the inputs,
the hash in at least fp32, so that a low precision does not change which columns are grouped.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from distr_compile.estimators import arithmetic, auto_grouping_block, estimator_named
from distr_compile.kernels.attention.dropout import Dropout
from distr_compile.kernels.counted import counted_rows, spans, strict_spans
from distr_compile.kernels.roles import Asked, Block
from distr_compile.kernels.rows import four_dimensions


def estimate(
    Q: Tensor,
    K: Tensor,
    mask: Tensor | None = None,
    *,
    rank: int,
    estimator: str = "lsh-mean",
    grouping_block: int = 0,
    rounds: int = 1,
    seed: int = 0,
    is_causal: bool = False,
    causal_offset: int = 0,
    bases: tuple[Tensor, Tensor] | None = None,
    strict: bool = False,
) -> list[Block]:
    """Replace the width d of Q and K by ``rank``, separately for each block of query rows.

    ``lsh-sample`` (the paper's choice, eq. 2) and ``lsh-mean``: in each group G_j, Qhat has one
    column standing for all of the group's columns, the first of them in sorted order or their mean,
    and Khat the sum of the group's columns of K. ``lsh-signed``: likewise with the mean, of columns
    of Q and K that ``group_columns`` has turned, which changes no product of Q and K.

    ``projection``: Qhat = Q A and Khat = K B with the bases of ``projection_bases`` in
    ``kernels/projection/reference.py``. The query heads of a key head share them. Keys and queries
    that ``counted_rows`` leaves out, and with ``is_causal`` keys that no row of the block sees, do
    not influence them; all rows are multiplied all the same.

    ``calibrated``: Qhat = Q A and Khat = K B with bases that are given, all rows in one block.

    ``strict``: no row depends on later ones. ``calibrated`` is so by itself. ``projection`` takes
    the bases of a block from the query rows before it and the keys before it, those that
    ``prefix_edge`` and ``counted_before`` say, and approximates the scores of these keys only.

    Args:
        Q: ``(B, H, N, d)``.
        K: ``(B or 1, H_k, M, d)``, H_k divides H.
        mask: as in ``attention``. It says which rows and keys count, and where the blocks begin;
            ``calibrated`` does not look at it.
        rank: r; a divisor of d, for ``projection`` any up to d.
        estimator: a name in ``estimators.ESTIMATORS``.
        grouping_block: l, query rows per grouping; 0 chooses by ``auto_grouping_block``, of the
            rows from the first that counts to the last.
        rounds: of ``projection``: 1, or 2 for nearly the best possible basis.
        seed: names the random numbers.
        is_causal: row i sees keys ``j <= i + causal_offset``; only ``projection`` looks at it.
        causal_offset: see ``is_causal``.
        bases: A and B of ``calibrated``, ``(H_k, d, r)``.
        strict: see above; what is earlier goes by ``causal_offset``, also without ``is_causal``.

    Raises:
        ValueError: unknown estimator, or a rank, rounds, ``bases`` or ``strict`` that it does not
            take.
        NoArithmeticError: a row of the table that has no definition.
    """
    key_heads, num_keys = K.shape[1:3]
    batch, heads, num_queries, head_dim = Q.shape
    _check_estimator(estimator, rank, rounds, strict, head_dim, bases is not None)
    module = arithmetic(estimator, "definition", "factors")
    counts: tuple[Tensor | None, Tensor | None] = None, None
    if mask is not None:
        mask = four_dimensions(mask)
        # Given bases have one block of all rows, and the strict form asks the mask itself.
        if bases is None and not strict:
            counts = counted_rows(mask, num_queries, num_keys, key_heads, heads // key_heads)
    offset = causal_offset if is_causal or strict else None
    blocks: list[Block] = []

    def block_of(rows: int) -> int:
        return grouping_block or auto_grouping_block(rows, estimator, strict)

    sizes = (batch, num_queries, num_keys)
    if strict and bases is None:
        found = strict_spans(mask, sizes, block_of, causal_offset)
    else:
        found = spans(mask, counts, sizes, block_of, causal_offset=offset, by_place=True)
    for span in found:
        asked = Asked(
            estimator=estimator,
            rank=rank,
            block=span.block,
            rounds=rounds,
            seed=seed,
            causal_offset=offset,
            bases=bases,
            strict=strict,
            first=span.first,
            stop=span.stop,
            seen=span.seen,
        )
        # A batch of size 1 stands for every entry.
        q, k = (t if t.shape[0] == 1 else t[span.entries] for t in (Q, K))
        some = mask if mask is None or mask.shape[0] == 1 else mask[span.entries]
        made = module.factors(q.unflatten(1, (key_heads, -1)), k, some, asked)
        blocks += (replace(block, entries=span.entries) for block in made)
    return blocks


def _check_estimator(
    estimator: str, rank: int, rounds: int, strict: bool, head_dim: int, has_bases: bool
) -> None:
    known = estimator_named(estimator)
    if not 1 <= rank <= head_dim or (known.divides and head_dim % rank):
        accepted = "divide head_dim" if known.divides else "be at most head_dim"
        raise ValueError(f"rank: got {rank} for head_dim {head_dim}; must {accepted}")
    if rounds not in known.rounds:
        accepted = " or ".join(map(str, known.rounds))
        raise ValueError(f"rounds: got {rounds}; with {estimator} must be {accepted}")
    if strict and known.strict == "never":
        raise ValueError(f"strict: got True; with {estimator} must be False: it sees {known.sees}")
    if has_bases != (known.needs == "bases"):
        got, accepted = ("two matrices", "None") if has_bases else ("None", "A and B")
        raise ValueError(f"bases: got {got}; with {estimator} must be {accepted}")


def scores(Q: Tensor, K: Tensor, blocks: list[Block]) -> Tensor:
    """S as ``blocks`` approximate it, ``(B, H, N, M)``: neither scaled nor masked.

    Args:
        Q: ``(B, H, N, d)``, at least one row.
        K: ``(B or 1, H_k, M, d)``.
        blocks: of ``estimate``; rows of none of them are 0.
    """
    rep, num_keys = Q.shape[1] // K.shape[1], K.shape[2]
    S = Q.new_zeros(*Q.shape[:3], num_keys)
    for b in blocks:
        known = b.Khat.shape[2]  # M, or with strict the keys before the block
        hat = b.Qhat @ b.Khat.repeat_interleave(rep, dim=1).mT
        q, k = (t if t.shape[0] == 1 else t[b.entries] for t in (Q, K))
        # The keys from there on are scored exactly: none, but with strict.
        exact = q[:, :, b.start : b.stop] @ k[:, :, known:].repeat_interleave(rep, dim=1).mT
        S[b.entries, :, b.start : b.stop] = torch.cat([hat, exact], dim=3)
    return S


def masked_softmax(scores: Tensor, sinks: Tensor | None = None) -> Tensor:
    """Softmax over the last dimension; a row that is -inf everywhere sees nothing and becomes 0.

    A sink is one more score in every row of its head: it has a share of the softmax and no value,
    so that the weights of the row sum to less than 1.

    Args:
        scores: ``(B, H, N, M)``.
        sinks: ``(H,)`` floating, in the units of the scores.

    Returns:
        ``(B, H, N, M)``, without the sinks' share.
    """
    # Without a sink the softmax of such a row would be NaN.
    sees_nothing = (scores == -torch.inf).all(-1, keepdim=True)
    num_keys = scores.shape[-1]
    if sinks is not None:
        # The sinks as one more key, (B, H, N, 1); its weight is cut off below.
        column = sinks.to(scores.dtype)[:, None, None].expand_as(scores[..., :1])
        scores = torch.cat([scores, column], dim=-1)
    return scores.softmax(-1)[..., :num_keys].masked_fill(sees_nothing, 0)


def attention(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float,
    is_causal: bool = False,
    causal_offset: int = 0,
    rank: int,
    estimator: str = "lsh-mean",
    grouping_block: int = 0,
    rounds: int = 1,
    seed: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    bases: tuple[Tensor, Tensor] | None = None,
    strict: bool = False,
    dropout: Dropout | None = None,
) -> Tensor:
    """softmax(scale * Qhat Khat^T + mask) V, the scores of each grouping block from ``estimate``.

    Args:
        Q: ``(B, H, N, d)``.
        K: ``(B or 1, H_k, M, d)``, H_k divides H; query head h uses key head ``h // (H / H_k)``.
        V: ``(B or 1, H_k, M, d_v)``.
        mask: broadcastable to ``(B, H, N, M)``; bool (True = attend) or floating (added as it is).
        scale: multiplies the scores; it is the scale of the exact scores, of width d.
        is_causal: row i sees keys ``j <= i + causal_offset``, counted from the top left.
        causal_offset: see ``is_causal``.
        rank: r, see ``estimate``; ``rank == d`` is exact attention.
        estimator: see ``estimate``.
        grouping_block: see ``estimate``.
        rounds: see ``estimate``.
        seed: see ``estimate``.
        softcap: c > 0 replaces the scaled scores s by ``c * tanh(s / c)``, before the mask; 0 does
            not.
        sinks: ``(H,)`` floating, one more score per row that has no key and no value, in the units
            of the scaled scores; neither scaled nor capped.
        bases: see ``estimate``.
        strict: see ``estimate``.
        dropout: says which weights are dropped, after the softmax.

    Returns:
        ``(B, H, N, d_v)``; rows that see no key are 0.

    Raises:
        ValueError: see ``estimate``.
    """
    _, heads, num_queries, head_dim = Q.shape
    rep, num_keys = heads // K.shape[1], K.shape[2]
    if rank == head_dim:
        blocks = [Block(0, num_queries, Q, K)]  # Q and K in the places of Qhat and Khat
    else:
        blocks = estimate(
            Q,
            K,
            mask,
            rank=rank,
            estimator=estimator,
            grouping_block=grouping_block,
            rounds=rounds,
            seed=seed,
            is_causal=is_causal,
            causal_offset=causal_offset,
            bases=bases,
            strict=strict,
        )
    # (B, H, N, M): scaled and capped, then hidden by mask and causality.
    S = scores(Q, K, blocks) * scale
    if softcap:
        S = softcap * torch.tanh(S / softcap)
    if mask is not None:
        S = S.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else S + mask
    if is_causal:
        visible = torch.ones(num_queries, num_keys, dtype=torch.bool, device=Q.device)
        S = S.masked_fill(~visible.tril(causal_offset), -torch.inf)
    P = masked_softmax(S, sinks)
    P = P if dropout is None else dropout.weigh(P)
    return (P.to(V.dtype) @ V.repeat_interleave(rep, dim=1)).to(Q.dtype)
