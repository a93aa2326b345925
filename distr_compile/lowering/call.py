"""One call of ``torch.ops.distr.attention`` as values: its sizes, its scores, its approximation.

Who plans a call makes these values; only this module knows by which keywords the op takes them. On
real tensors they are one ``Call``, which is what implementations get.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distr_compile.estimators import DEFAULT_ESTIMATOR, ESTIMATORS, auto_grouping_block
from distr_compile.kernels.attention.dropout import Dropout
from distr_compile.kernels.roles import Asked
from distr_compile.kernels.rows import four_dimensions, sliced

KEYWORDS = (
    "float scale, bool is_causal=False, SymInt? causal_offset=None, SymInt rank, str estimator, "
    "SymInt grouping_block, int? rounds=None, bool strict=False, SymInt? min_seq_len=None, "
    "int? seed=None, float softcap=0.0, float dropout_p=0.0, int? site=None"
)
"""The keywords of the ops' schemas.

An integer that may be left out is optional, and None means the default of the function that runs:
AOTInductor hands over the default of such a keyword, and lists only those that were given.
"""

BHND = (0, 1, 2, 3)
"""Axes in memory as the op names them."""


class Shape(NamedTuple):
    """The sizes of a call, and whatever else its time depends on besides the approximation.

    Attributes:
        batch: B.
        num_heads, num_key_heads: H, and H_k, which divides H.
        num_queries, num_keys: N and M.
        head_dim, value_dim: d, the width of Q and K, and d_v.
        is_causal: row i sees keys ``j <= i`` only.
        mask: its four sizes and its dtype; None without one.
        dtype, device: of Q, K and V.
        causal_offset: row i sees keys ``j <= i + causal_offset``, where causal.
        softcap, sinks, dropout: whether there are any.
        order: how Q, K and V lie in memory: their axes B, H, N, d, outermost first, by number;
            ``~i`` for an axis i that was expanded, whose stride is 0.
        trained: whether gradients are recorded, so that its backward counts too.
    """

    batch: int
    num_heads: int
    num_key_heads: int
    num_queries: int
    num_keys: int
    head_dim: int
    value_dim: int
    is_causal: bool
    mask: tuple[tuple[int, ...], torch.dtype] | None
    dtype: torch.dtype
    device: torch.device
    causal_offset: int = 0
    softcap: bool = False
    sinks: bool = False
    order: tuple[tuple[int, ...], ...] = (BHND,) * 3
    trained: bool = False
    dropout: bool = False

    def resized(self, sizes: Mapping[str, int]) -> Shape:
        """The same with other numbers of queries and keys, those of the mask too."""
        changed = self._replace(**sizes)  # type: ignore[arg-type]
        if self.mask is None:
            return changed
        (*lead, rows, keys), dtype = self.mask
        rows = changed.num_queries if rows > 1 else 1
        keys = changed.num_keys if keys > 1 else 1
        return changed._replace(mask=((*lead, rows, keys), dtype))

    def to_json(self) -> dict[str, Any]:
        """The same as JSON has it, without the device."""
        plain: dict[str, Any] = {**self._asdict(), "dtype": str(self.dtype)[6:]}
        del plain["device"]
        if self.mask is not None:
            plain["mask"] = (self.mask[0], str(self.mask[1])[6:])
        return plain

    @classmethod
    def from_json(cls, plain: Mapping[str, Any], device: torch.device) -> Shape:
        """The shape that ``to_json`` said, on a device."""
        mask, order = plain["mask"], tuple(map(tuple, plain["order"]))
        if mask is not None:
            mask = (tuple(mask[0]), getattr(torch, mask[1]))
        dtype = getattr(torch, plain["dtype"])
        return cls(**{**plain, "mask": mask, "order": order, "dtype": dtype, "device": device})

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        is_causal: bool,
        causal_offset: int = 0,
        *,
        softcap: bool = False,
        sinks: bool = False,
        dropout: bool = False,
    ) -> Shape:
        """The shape of a call with these tensors, laid out as the op takes them."""
        batch, heads, queries, width = q.shape
        return cls(
            batch=batch,
            num_heads=heads,
            num_key_heads=k.shape[1],
            num_queries=queries,
            num_keys=k.shape[2],
            head_dim=width,
            value_dim=v.shape[3],
            is_causal=is_causal,
            mask=None if mask is None else (_four(mask.shape), mask.dtype),
            dtype=q.dtype,
            device=q.device,
            causal_offset=causal_offset,
            softcap=softcap,
            sinks=sinks,
            order=tuple(axes_in_memory(t.shape, t.stride()) for t in (q, k, v)),
            dropout=dropout,
        )

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to compute."""
        return min(self.batch, self.num_heads, self.num_queries, self.num_keys) < 1


def _four(sizes: Sequence[int]) -> tuple[int, ...]:
    return (*(1,) * (4 - len(sizes)), *sizes)


def axes_in_memory(sizes: Sequence[int], strides: Sequence[int]) -> tuple[int, ...]:
    """The axes of a tensor, outermost first, as ``Shape.order`` has them.

    Those of size 1, which lie anywhere, and expanded ones stay put.
    """
    lying = [size > 1 and stride > 0 for size, stride in zip(sizes, strides, strict=True)]
    moved = iter(sorted((i for i in range(len(sizes)) if lying[i]), key=lambda i: -strides[i]))
    return tuple(next(moved) if lying[i] else ~i if size > 1 else i for i, size in enumerate(sizes))


@dataclass(frozen=True)
class Approximation:
    """How Q and K become narrow in a call: what a policy's plan comes to at its shape.

    Attributes:
        estimator: name in :data:`distr_compile.estimators.ESTIMATORS`.
        rank: r, the columns left of the d of Q and K; d itself is exact attention.
        block: query rows that share one grouping; 0 leaves it to ``auto_grouping_block``.
        rounds: how often the estimator refines its basis.
        seed: names the random numbers of the estimator.
        strict: no row of the result depends on later rows; see the op.
    """

    estimator: str
    rank: int
    block: int = 0
    rounds: int = 1
    seed: int = 0
    strict: bool = False

    @classmethod
    def none(cls, head_dim: int) -> Approximation:
        """Exact attention at width ``head_dim``."""
        return cls(DEFAULT_ESTIMATOR, head_dim)

    def block_of(self, num_queries: int) -> int:
        """The query rows that share one grouping where there are ``num_queries`` of them."""
        return self.block or auto_grouping_block(num_queries, self.estimator, self.strict)


@dataclass(frozen=True)
class Scores:
    """What the weights are made of besides Q, K, mask and sinks.

    Attributes:
        scale: multiplies Q K^T: a number, or the graph node of one.
        is_causal: row i sees keys ``j <= i + offset`` only.
        offset: 0 where None.
        softcap: c > 0 turns a scaled score s into ``c * tanh(s / c)``.
        dropout_p: the share of the weights that is dropped.
    """

    scale: Any
    is_causal: bool = False
    offset: int | None = None
    softcap: float = 0.0
    dropout_p: float = 0.0

    def softmax(self, sinks: Tensor | None, dropout: Dropout | None) -> dict[str, Any]:
        """Scale, causality, soft cap, sinks and dropout as keywords of an implementation."""
        return {
            "scale": self.scale,
            "is_causal": self.is_causal,
            "causal_offset": self.offset or 0,
            "softcap": self.softcap,
            "sinks": sinks,
            "dropout": dropout,
        }


ALL = slice(None)


@dataclass(frozen=True)
class Call:
    """One call of the op on real tensors, or a part of one.

    Attributes:
        q: ``(B, H, N, d)``; k, v, mask and sinks as the op takes them.
        k, v, mask, sinks: see ``q``.
        scores: scale, causality and soft cap; the scale is a number.
        approximation: how Q and K become narrow; its rank is d where they do not.
        bases: A and B of an estimator that needs them, ``(H_k, d, r)``.
        out: ``(B, H, N, d_v)``, to be filled; of a whole call with unit last stride.
        key: names the geometry of the tensors and all options: for ``choose.plans``.
        dropout: says which weights are dropped.
        lse: ``(B, H, N)`` in the dtype of the arithmetic, to be filled with the logarithm of each
            row's sum of exponentials, sinks included; -inf where the row sees nothing. None where
            no backward follows.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    sinks: Tensor | None
    scores: Scores
    approximation: Approximation
    bases: tuple[Tensor, Tensor] | None
    out: Tensor
    key: Hashable = None
    dropout: Dropout | None = None
    lse: Tensor | None = None

    @property
    def softmax(self) -> dict[str, Any]:
        """The keywords of ``Scores.softmax``, with the sinks and the dropout of the call."""
        return self.scores.softmax(self.sinks, self.dropout)

    @property
    def is_prefix(self) -> bool:
        """Whether strict is asked of an estimator that has a form for it; others are so anyway."""
        how = self.approximation
        return how.strict and ESTIMATORS[how.estimator].strict == "prefix"

    @property
    def limit(self) -> int | None:
        """Row i sees keys ``j <= i + limit``; None for all."""
        return (self.scores.offset or 0) if self.scores.is_causal else None

    @property
    def rep(self) -> int:
        """Query heads of a key head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def asked(self) -> Asked:
        """What the estimator is asked for, where blocks begin with the first row."""
        how, num_queries = self.approximation, self.q.shape[2]
        return Asked(
            estimator=how.estimator,
            rank=how.rank,
            block=max(1, min(how.block_of(num_queries), num_queries)),
            rounds=how.rounds,
            seed=how.seed,
            causal_offset=(self.scores.offset or 0) if self.is_prefix else self.limit,
            strict=self.is_prefix,
            bases=self.bases,
            given_block=how.block,
        )

    @property
    def shape(self) -> Shape:
        """What the call's time, and who may compute it, depends on."""
        return Shape.of(
            self.q,
            self.k,
            self.v,
            self.mask,
            self.scores.is_causal,
            self.scores.offset or 0,
            softcap=self.scores.softcap > 0,
            sinks=self.sinks is not None,
            dropout=self.dropout is not None,
        )

    def exactly(self) -> Call:
        """The same at the full width."""
        return replace(self, approximation=Approximation.none(self.q.shape[3]), bases=None)

    def part(
        self,
        entries: slice = ALL,
        key_heads: slice = ALL,
        rows: slice = ALL,
        keys: slice = ALL,
    ) -> Call:
        """Some batch entries, key heads with their query heads, and query rows, to some keys.

        All tensors of it are views; a mask has four dimensions. It is not asked which of the keys
        the rows see.
        """
        first_head, last_head, _ = key_heads.indices(self.k.shape[1])
        heads = slice(first_head * self.rep, last_head * self.rep)
        row, key = rows.start or 0, keys.start or 0
        mask, bases, dropout = self.mask, self.bases, self.dropout
        if mask is not None:
            mask = sliced(four_dimensions(mask), entries, heads, rows, keys)
        if dropout is not None:
            dropout = dropout.part(batch=entries.start or 0, head=heads.start, row=row, key=key)
        if bases is not None:
            bases = (bases[0][key_heads], bases[1][key_heads])
        k, v = (t[entries if t.shape[0] > 1 else ALL, key_heads, keys] for t in (self.k, self.v))
        return replace(
            self,
            q=self.q[entries, heads, rows],
            k=k,
            v=v,
            mask=mask,
            sinks=None if self.sinks is None else self.sinks[heads],
            scores=replace(self.scores, offset=(self.scores.offset or 0) + row - key),
            bases=bases,
            out=self.out[entries, heads, rows],
            key=None,
            dropout=dropout,
            lse=None if self.lse is None else self.lse[entries, heads, rows],
        )


class Arguments(NamedTuple):
    """What the op's keywords say; see :func:`op_arguments`."""

    approximation: Approximation
    scores: Scores
    min_seq_len: int
    site: int


def op_arguments(
    approximation: Approximation, scores: Scores, min_seq_len: int = 0, site: int = -1
) -> dict[str, Any]:
    """The keyword arguments of ``torch.ops.distr.attention`` for a call.

    Args:
        approximation: how Q and K become narrow.
        scores: the rest of the softmax's input.
        min_seq_len: the op turns to exact attention where ``min(N, M)`` is below it.
        site: number of the call's site within its graph; -1 outside of graphs.

    Returns:
        A new dict. Offset, soft cap, dropout, seed and strictness are in it only where they are not
        the defaults of the schema.
    """
    always = {
        "scale": scores.scale,
        "is_causal": scores.is_causal,
        "rank": approximation.rank,
        "estimator": approximation.estimator,
        "grouping_block": approximation.block,
        "rounds": approximation.rounds,
        "min_seq_len": min_seq_len,
        "site": site,
    }
    sometimes = {
        "causal_offset": scores.offset,
        "softcap": scores.softcap or None,
        "dropout_p": scores.dropout_p or None,
        "seed": approximation.seed or None,
        "strict": approximation.strict or None,
    }
    return always | {name: value for name, value in sometimes.items() if value is not None}


def read_arguments(arguments: Mapping[str, Any]) -> Arguments:
    """The values that the op's keywords say, where defaults may be left out, or None."""
    arguments = {name: value for name, value in arguments.items() if value is not None}
    return Arguments(
        Approximation(
            estimator=arguments["estimator"],
            rank=arguments["rank"],
            block=arguments["grouping_block"],
            rounds=arguments.get("rounds", 1),
            seed=arguments.get("seed", 0),
            strict=arguments.get("strict", False),
        ),
        Scores(
            scale=arguments["scale"],
            is_causal=arguments.get("is_causal", False),
            offset=arguments.get("causal_offset"),
            softcap=arguments.get("softcap", 0.0),
            dropout_p=arguments.get("dropout_p", 0.0),
        ),
        arguments.get("min_seq_len", 0),
        arguments.get("site", -1),
    )


def call_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    out: Tensor,
    bases: tuple[Tensor, Tensor] | None = None,
    dropout: Dropout | None = None,
    lse: Tensor | None = None,
    **options: Any,
) -> Call:
    """The call of an implementation, of the op's keywords; exact where ``rank`` is left out.

    Args:
        q, k, v, mask, sinks: as the op takes them.
        out, bases, dropout, lse: of the call.
        **options: ``scale``, and whatever else shall differ from the op's defaults.

    Raises:
        TypeError: an option that is no keyword of the op.
    """
    known = {keyword.split()[1].partition("=")[0] for keyword in KEYWORDS.split(", ")}
    if unknown := options.keys() - known:
        raise TypeError(f"options: got {sorted(unknown)}; accepted: {sorted(known)}")
    defaults = {"rank": q.shape[3], "estimator": DEFAULT_ESTIMATOR, "grouping_block": 0}
    given = read_arguments(defaults | options)
    rest = (given.scores, given.approximation, bases, out)
    return Call(q, k, v, mask, sinks, *rest, dropout=dropout, lse=lse)
