"""What the ops accept: shapes, dtypes and options that fit together, and the words where not.

Of symbolic sizes only relations are asked, which become guards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from distr_compile.estimators import ESTIMATORS, MIN_QUERIES, MIN_RANK, arithmetic
from distr_compile.lowering.call import Approximation, Arguments

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def is_short(num_queries: int, num_keys: int, min_seq_len: int) -> bool:
    """Whether a call is exact because of its length."""
    return num_queries < MIN_QUERIES or min(num_queries, num_keys) < max(min_seq_len, 1)


def role(q: Tensor) -> Literal["cpu", "gpu"]:
    """Which arithmetic of an estimator a call asks for."""
    return "gpu" if q.is_cuda and q.dtype != torch.float64 else "cpu"


def validate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bases: tuple[Tensor | None, Tensor | None],
    rest: tuple[Tensor | None, Tensor | None],
    arguments: Arguments,
) -> tuple[Tensor, Tensor] | None:
    """Refuse what the ops cannot do; of symbolic sizes only relations are asked.

    Args:
        q: as the op ``attention`` takes it; k, v and mask too.
        k: see ``q``.
        v: see ``q``.
        mask: see ``q``.
        bases: ``basis_q`` and ``basis_k``.
        rest: ``sinks`` and ``dropout_seed``.
        arguments: what the keywords say.

    Returns:
        A and B where the estimator needs them, else None.

    Raises:
        ValueError: shapes, dtypes or options that do not fit together.
        NoArithmeticError: an estimator that nothing computes on the device.
    """
    how, scores = arguments.approximation, arguments.scores
    estimator, rounds = how.estimator, how.rounds
    sinks, dropout_seed = rest
    tensors = [t for t in (q, k, v, mask, sinks, dropout_seed) if t is not None]
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dim() != 4:
            raise ValueError(
                f"{name}: got {t.dim()} dimensions; must be (batch, heads, tokens, width): "
                "add or flatten leading dimensions"
            )
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(
            f"q, k, v: got {q.dtype}, {k.dtype}, {v.dtype}; must have one dtype of "
            f"{', '.join(map(str, DTYPES))}: cast them"
        )
    if any(t.device != q.device for t in tensors):
        raise ValueError(
            "q, k, v, mask, sinks, dropout_seed: got devices "
            f"{', '.join(str(t.device) for t in tensors)}; must be one: move them"
        )
    arithmetic(estimator, role(q))  # raises where there is none
    accepted = ESTIMATORS[estimator].rounds
    if rounds not in accepted:
        raise ValueError(
            f"rounds: got {rounds}; with {estimator} must be {' or '.join(map(str, accepted))}"
        )
    if how.strict and ESTIMATORS[estimator].strict == "never":
        able = ", ".join(e.name for e in ESTIMATORS.values() if e.strict != "never")
        raise ValueError(
            f"strict: got True; with {estimator} must be False, as it sees "
            f"{ESTIMATORS[estimator].sees}: take one of {able}"
        )
    if scores.offset is not None and not scores.is_causal:
        raise ValueError("causal_offset: got a value without is_causal; set is_causal=True with it")
    if not scores.softcap >= 0:
        raise ValueError(f"softcap: got {scores.softcap}; must be > 0, or 0 for none")
    _validate_sizes(q, k, v, how, arguments.min_seq_len)
    if sinks is not None:
        _require(
            sinks.dim() == 1 and sinks.is_floating_point() and sinks.shape[0] == q.shape[1],
            lambda: (
                f"sinks: got {tuple(sinks.shape)} of {sinks.dtype}; must be floating, one per head "
                f"of q: ({q.shape[1]},)"
            ),
        )
    if mask is not None:
        _validate_mask(q, k, mask)
    _validate_dropout(scores.dropout_p, dropout_seed)
    return _validate_bases(q, k, *bases, how.rank, estimator)


def _validate_sizes(q: Tensor, k: Tensor, v: Tensor, how: Approximation, min_seq_len: int) -> None:
    rank, estimator, grouping_block = how.rank, how.estimator, how.block
    batch, heads, _, head_dim = q.shape
    k_batch, key_heads, num_keys, k_width = k.shape
    v_batch, v_heads, v_tokens, _ = v.shape
    for name, got in (("k", k_batch), ("v", v_batch)):
        _require(
            (got == batch) | (got == 1),
            lambda name=name, got=got: (  # type: ignore[misc]
                f"{name}: got batch size {got}; must be that of q, {batch}, or 1"
            ),
        )
    _require(k_width == head_dim, lambda: f"k: got width {k_width}; must be that of q, {head_dim}")
    _require(
        (v_heads == key_heads) & (v_tokens == num_keys),
        lambda: (
            f"v: got {v_heads} heads of {v_tokens} tokens; must be as in k, {key_heads} heads of "
            f"{num_keys}"
        ),
    )
    _require(key_heads >= 1, lambda: "k: got 0 heads; must be at least 1")
    _require(
        heads % key_heads == 0,
        lambda: f"k: got {key_heads} heads; must divide the {heads} heads of q",
    )
    if ESTIMATORS[estimator].divides:
        narrower, words = head_dim % max(rank, 1) == 0, "a divisor of it that is"
    else:
        narrower, words = rank < head_dim, "less and"
    _require(
        (rank == head_dim) | ((rank >= MIN_RANK) & narrower),
        lambda: (
            f"rank: got {rank} for head_dim {head_dim}; must be head_dim (exact) or, with "
            f"{estimator}, {words} at least {MIN_RANK}"
        ),
    )
    _require(
        grouping_block >= 0,
        lambda: f"grouping_block: got {grouping_block}; must be rows >= 1, or 0 for auto",
    )
    _require(min_seq_len >= 0, lambda: f"min_seq_len: got {min_seq_len}; must be >= 0")


def _validate_bases(
    q: Tensor,
    k: Tensor,
    basis_q: Tensor | None,
    basis_k: Tensor | None,
    rank: int,
    estimator: str,
) -> tuple[Tensor, Tensor] | None:
    """A and B where the estimator needs them, else None."""
    if ESTIMATORS[estimator].needs == "nothing":
        if basis_q is not None or basis_k is not None:
            names = ", ".join(e.name for e in ESTIMATORS.values() if e.needs == "bases")
            raise ValueError(
                f"basis_q, basis_k: got a tensor with {estimator}; accepted with {names} only: "
                "leave them out"
            )
        return None
    if basis_q is None or basis_k is None:
        raise ValueError(
            f"basis_q, basis_k: got None with {estimator}; must be two tensors of (key heads, "
            "head_dim, rank): take them from a file that distr calibrate wrote"
        )
    wanted = (k.shape[1], q.shape[3], rank)
    for name, basis in (("basis_q", basis_q), ("basis_k", basis_k)):
        if basis.dtype != torch.float32 or basis.device != q.device:
            raise ValueError(
                f"{name}: got {basis.dtype} on {basis.device}; must be torch.float32 on "
                f"{q.device}: cast or move it"
            )
        fits = basis.dim() == 3 and all(
            got == size for got, size in zip(basis.shape, wanted, strict=True)
        )
        _require(
            fits,
            lambda name=name, basis=basis: (  # type: ignore[misc]
                f"{name}: got {tuple(basis.shape)}; must be (key heads, head_dim, rank) = {wanted}"
            ),
        )
    return basis_q, basis_k


def _validate_dropout(p: float, seed: Tensor | None) -> None:
    if not 0 <= p <= 1:
        raise ValueError(f"dropout_p: got {p}; must be from 0 to 1")
    if (p > 0) != (seed is not None):
        got, accepted = ("a tensor", "None") if p == 0 else ("None", "() of torch.int64")
        raise ValueError(
            f"dropout_seed: got {got} with dropout_p {p}; must be {accepted}: draw a seed for "
            "dropout_p > 0, torch.randint(2**63 - 1, (), device=q.device)"
        )
    if seed is not None and (seed.dim() != 0 or seed.dtype != torch.int64):
        raise ValueError(
            f"dropout_seed: got {tuple(seed.shape)} of {seed.dtype}; must be () of torch.int64"
        )


def _validate_mask(q: Tensor, k: Tensor, mask: Tensor) -> None:
    if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        raise ValueError(
            f"mask: got {mask.dtype}; must be torch.bool (True = attend) or floating (added): "
            "use mask.bool()"
        )
    full = (*q.shape[:3], k.shape[2])
    fits: bool | torch.SymBool = mask.dim() <= 4
    for got, wanted in zip(reversed(mask.shape), reversed(full), strict=False):
        fits = fits & ((got == 1) | (got == wanted))
    _require(
        fits,
        lambda: (
            f"mask: got {tuple(mask.shape)}; must broadcast to (batch, heads, queries, keys) = "
            f"{full}"
        ),
    )


def _require(condition: bool | torch.SymBool, message: Callable[[], str]) -> None:
    """Raise ValueError unless ``condition``; of symbols it becomes a guard on the relation."""
    if condition is not True:
        torch._check_value(condition, message)
