"""Attention over sequences that lie one behind the other, each for itself."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from distr_compile.functional import attention, check_tensors, number_of
from distr_compile.policy.errors import check_type, sentence, shown

_ALL, _CAUSAL = (-1, -1), (-1, 0)


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = _ALL,
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    return_aux: None = None,
    block_table: None = None,
    num_splits: None = None,
    **options: Any,
) -> Tensor:
    """Compute :func:`distr_compile.attention` of each sequence of a packed batch.

    The arguments are named as those of ``torch.nn.attention.varlen.varlen_attn``. Bases and
    grouping blocks are of a sequence, so that its rows are what they would be alone, and no mask
    over all tokens is made. The lengths are read on the host.

    Args:
        query: ``(T_q, H, d)``, the tokens of all sequences.
        key: ``(T_k, H_k, d)``.
        value: ``(T_k, H_k, d_v)``.
        cu_seq_q: ``(S + 1,)``, integers: sequence i has the rows from ``cu_seq_q[i]`` up to
            ``cu_seq_q[i + 1]``; the first is 0 and the last T_q.
        cu_seq_k: likewise, of keys and values.
        max_q: at least the largest number of rows of a sequence.
        max_k: at least the largest number of keys.
        scale: multiplies Q K^T; ``1 / sqrt(d)`` if None.
        window_size: ``(-1, -1)`` for all keys of the sequence; ``(-1, 0)`` for causal attention,
            of sequences that have as many keys as rows.
        enable_gqa: H may be a multiple of H_k.
        seqused_k: ``(S,)``, integers: so many of a sequence's keys count.
        return_aux: None only, as for ``block_table`` and ``num_splits``.
        block_table: see ``return_aux``.
        num_splits: see ``return_aux``.
        options: ``group_size``, ``rank``, ``estimator``, ``rounds``, ``grouping_block`` and
            ``causal``, as of :func:`distr_compile.attention`.

    Returns:
        ``(T_q, H, d_v)`` in the dtype of ``query``; rows of a sequence without keys are 0.

    Raises:
        ValueError: sizes that do not fit together, a nested tensor, a sliding window, or what
            :func:`distr_compile.attention` raises.
        TypeError: no tensor or number where there must be one; ``is_causal`` or ``attn_mask``.
    """
    unsupported = {
        "return_aux": return_aux,
        "block_table": block_table,
        "num_splits": num_splits,
    }
    for name, given in unsupported.items():
        if given is not None:
            advice = "leave it out, or call torch.nn.attention.varlen.varlen_attn"
            raise ValueError(sentence(name, type(given).__name__, "None", advice))
    if "is_causal" in options or "attn_mask" in options:
        name = "is_causal" if "is_causal" in options else "attn_mask"
        advice = "window_size=(-1, 0) is causal attention; masks are for distr_compile.attention"
        raise TypeError(sentence(name, shown(options[name]), "no such argument", advice))
    check_tensors(query, key, value)
    accepted, advice = "an integer", "give the length of the longest sequence"
    max_q = number_of("max_q", max_q, accepted, advice, whole=True)
    max_k = number_of("max_k", max_k, accepted, advice, whole=True)
    check_type("window_size", window_size, (tuple, list), "a pair of integers", "leave it out")
    if tuple(window_size) not in (_ALL, _CAUSAL):
        accepted = "(-1, -1) for all keys, (-1, 0) for causal attention"
        advice = "keep sliding windows exact: torch.nn.attention.varlen.varlen_attn"
        raise ValueError(sentence("window_size", str(window_size), accepted, advice))
    _check_packed(query, key, value)
    if cu_seq_k is None:
        advice = "give cu_seq_q again where both have the same sequences"
        raise ValueError(sentence("cu_seq_k", "None", "a tensor like cu_seq_q", advice))
    rows = _bounds("cu_seq_q", cu_seq_q, len(query), "max_q", max_q)
    keys = _bounds("cu_seq_k", cu_seq_k, len(key), "max_k", max_k)
    if len(rows) != len(keys):
        got, accepted = f"{len(keys)} sequences", f"as many as cu_seq_q has, {len(rows)}"
        raise ValueError(sentence("cu_seq_k", got, accepted, "give the bounds of each sequence"))
    keys = _used(keys, seqused_k)
    is_causal = tuple(window_size) == _CAUSAL
    out = []
    # Without sequences one of no tokens is computed, so that dtypes, sizes and options are checked.
    pairs = list(zip(rows, keys, strict=True)) or [((0, 0), (0, 0))]
    for (first, last), (first_key, last_key) in pairs:
        if is_causal and last - first != last_key - first_key:
            got = f"(-1, 0) for a sequence of {last - first} rows and {last_key - first_key} keys"
            advice = "call distr_compile.attention on it, with a mask that says which keys it sees"
            accepted = "as many keys as rows, as nothing tells which come first"
            raise ValueError(sentence("window_size", got, accepted, advice))
        one = attention(
            query[first:last].transpose(0, 1),
            key[first_key:last_key].transpose(0, 1),
            value[first_key:last_key].transpose(0, 1),
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
            **options,
        )
        out.append(one.transpose(0, 1))
    return torch.cat(out)


def _check_packed(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Refuse tensors that do not have the axes of packed ones, and values of other keys."""
    for name, t in (("query", query), ("key", key), ("value", value)):
        if t.is_nested:
            advice = "of a jagged one give values() here, and offsets() as cu_seq_q and cu_seq_k"
            accepted = "(tokens, heads, width), a tensor with strides"
            raise ValueError(sentence(name, "a nested tensor", accepted, advice))
        if t.dim() != 3:
            advice = "put the sequences one behind the other"
            got = f"{t.dim()} dimensions"
            raise ValueError(sentence(name, got, "(tokens, heads, width)", advice))
    if len(value) != len(key):
        accepted = f"as many as key has, {len(key)}"
        advice = "give the value of each key"
        raise ValueError(sentence("value", f"{len(value)} tokens", accepted, advice))


def _bounds(
    name: str, cumulated: Tensor, tokens: int, limit: str, most: int
) -> list[tuple[int, int]]:
    """First and last row of each sequence, checked."""
    check_type(name, cumulated, Tensor, "a tensor of integers", "give torch.tensor([0, ...])")
    bounds = cumulated.tolist() if _is_list(cumulated) else []
    rising = all(a <= b for a, b in itertools.pairwise(bounds))
    if not bounds or bounds[0] != 0 or bounds[-1] != tokens or not rising:
        got = str(bounds) if bounds else f"{tuple(cumulated.shape)} of {cumulated.dtype}"
        accepted = f"integers that rise from 0 to the number of tokens, {tokens}"
        raise ValueError(sentence(name, got, accepted, "cumulate the lengths, with a 0 in front"))
    pairs = list(itertools.pairwise(bounds))
    longest = max((b - a for a, b in pairs), default=0)
    if most < longest:
        advice = "give the length of the longest sequence"
        raise ValueError(sentence(limit, str(most), f"at least {longest}", advice))
    return pairs


def _is_list(t: Tensor) -> bool:
    """Whether a tensor is a list of integers."""
    is_whole = not (t.is_floating_point() or t.is_complex() or t.dtype == torch.bool)
    return is_whole and t.dim() == 1 and t.layout == torch.strided


def _used(keys: list[tuple[int, int]], used: Tensor | None) -> list[tuple[int, int]]:
    if used is None:
        return keys
    check_type("seqused_k", used, Tensor, "a tensor of integers", "leave it out to use all")
    if not _is_list(used):
        got, accepted = f"{tuple(used.shape)} of {used.dtype}", f"({len(keys)},), integers"
        raise ValueError(sentence("seqused_k", got, accepted, "leave it out to use all"))
    counts = used.tolist()
    if len(counts) != len(keys) or any(
        not 0 <= n <= b - a for n, (a, b) in zip(counts, keys, strict=True)
    ):
        accepted = "a number of keys for each sequence, at most those it has"
        raise ValueError(sentence("seqused_k", str(counts), accepted, "leave it out to use all"))
    return [(a, a + n) for n, (a, _) in zip(counts, keys, strict=True)]
