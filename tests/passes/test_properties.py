"""Random legal spellings of attention must be rewritten exactly, random near misses not at all.

A :class:`Spelling` is a draw of independent choices (layout, scale, soft cap, masks, sinks,
softmax, dropout, views, the side of the weights, repeated heads); :func:`attend` spells it out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from .capture import error, run, run_exact

FIXED = settings(
    max_examples=30,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)

MASKS = ("add", "iadd", "sub", "table", "fill", "fill_", "lowest", "where", "where_first", "causal")

MISSES = {
    "weights read twice": "weights-reused",
    "scores read twice": "weights-reused",
    "softmax over queries": "softmax-axis",
    "weights gated": "weights-edited",
    "weights clamped": "weights-edited",
    "heads mixed": "cross-head-mix",
    "heads of the weights permuted": "cross-head-mix",
    "second product": "two-products",
    "clamped": "scores-edited",
    "rectified": "scores-edited",
    "added inside the cap": "soft-cap",
    "per key": "scores-edited",
    "shifted before the sink": "sinks",
    "queries written": "in-place-write",
    "shown by 0": "scores-edited",
}


@dataclass(frozen=True)
class Spelling:
    batch: int
    heads: int
    repeats: int  # query heads per key head
    rows: int
    keys: int
    width: int
    value_width: int
    layout: str  # "4-D" | "3-D" | "5-D" | "einsum" | "tokens first" | "baddbmm"
    repeat: str  # "expand" | "interleave" | "materialised"
    scale: tuple[str, ...]
    has_cap: bool
    masks: tuple[str, ...]
    has_sink: bool
    softmax: str
    is_stabilised: bool
    dropout: str
    side: str  # of the weights in the product with V
    after: str
    is_written: bool
    miss: str = ""
    constant: float = field(default=0.17)


@st.composite
def spellings(draw: st.DrawFn, miss: bool = False) -> Spelling:
    def one(*values: Any) -> Any:
        return draw(st.sampled_from(values))

    def some(values: tuple[str, ...], most: int) -> tuple[str, ...]:
        return tuple(draw(st.lists(st.sampled_from(values), max_size=most, unique=True)))

    name = one(*sorted(MISSES)) if miss else ""
    return Spelling(
        batch=one(1, 2, 3),
        heads=one(1, 2, 3),
        repeats=one(1, 2),
        rows=one(16, 17, 20),
        keys=one(16, 17, 33),
        width=one(32, 40, 64),
        value_width=one(24, 32, 40),
        layout=one("4-D", "3-D", "5-D", "einsum", "tokens first", "baddbmm"),
        repeat=one("expand", "interleave", "materialised"),
        scale=some(("q", "k", "k under a view", "scores", "divided", "per head", "last"), 3),
        has_cap=one(False, False, True) or name == "added inside the cap",
        masks=some(MASKS, 3),
        has_sink=one(False, False, True) or name == "shifted before the sink",
        softmax=one("method", "function", "torch", "fp32", "fp32 type_as"),
        is_stabilised=one(False, False, True),
        dropout=one("", "", "off", "p=0"),
        side=one("left", "left", "right"),
        after=one("", "tokens", "view", "reshape"),
        is_written=one(False, False, True),
        miss=name,
    )


def inputs_of(s: Spelling) -> list[Tensor]:
    """Q, K, V in the layout's axes, then: bias, table, keep, per head, mixing matrix, sink."""
    generator = torch.Generator().manual_seed(s.rows * 1000 + s.keys)
    query_heads = s.heads * s.repeats

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    q = normal(s.batch, query_heads, s.rows, s.width)
    k = normal(s.batch, s.heads, s.keys, s.width)
    v = normal(s.batch, s.heads, s.keys, s.value_width)
    if s.layout == "tokens first":
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    keep = normal(s.batch, 1, s.rows, s.keys) > -0.7
    keep[..., 0] = True
    return [
        q,
        k,
        v,
        normal(s.batch, 1, s.rows, s.keys),
        normal(query_heads, s.rows, s.keys),
        keep,
        normal(query_heads, 1, 1).abs(),
        normal(query_heads, query_heads),
        normal(1, query_heads, 1, 1),
    ]


def repeat_heads(x: Tensor, s: Spelling, axis: int) -> Tensor:
    if s.repeats == 1:
        return x
    if s.repeat == "interleave":
        return x.repeat_interleave(s.repeats, dim=axis)
    if s.repeat == "materialised":
        return torch.stack([x] * s.repeats, axis + 1).flatten(axis, axis + 1)
    shape = list(x.shape)
    wide = x.unsqueeze(axis + 1).expand(*shape[: axis + 1], s.repeats, *shape[axis + 1 :])
    return wide.reshape(*shape[:axis], -1, *shape[axis + 1 :])


def masked(scores: Tensor, mask: str, s: Spelling, terms: list[Tensor]) -> Tensor:
    bias, table, keep = terms[:3]
    if mask == "add":
        return scores + bias
    if mask == "iadd":
        scores += bias
        return scores
    if mask == "sub":
        return torch.sub(scores, bias, alpha=0.5)
    if mask == "table":
        return table + scores
    if mask == "fill":
        return scores.masked_fill(~keep, float("-inf"))
    if mask == "fill_":
        return scores.masked_fill_(keep.logical_not(), float("-inf"))
    if mask == "lowest":
        return torch.masked_fill(scores, ~keep, torch.finfo(torch.float32).min)
    if mask == "where":
        return torch.where(keep, scores, -1e9)
    if mask == "where_first":
        return torch.where(keep == 0, torch.tensor(-torch.inf, dtype=scores.dtype), scores)
    seen = torch.ones(s.rows, s.keys, dtype=torch.bool).tril()
    return scores.masked_fill(seen.logical_not(), -torch.inf)


def scores_of(q: Tensor, k: Tensor, s: Spelling, terms: list[Tensor]) -> Tensor:
    """Scores as (batch, heads, rows, keys), or with one more axis in front of the heads."""
    shape = (s.batch, s.heads * s.repeats, s.rows, s.keys)
    if s.layout == "einsum":
        return torch.einsum("bhqd,bhkd->bhqk", q, k)
    if s.layout == "tokens first":
        return torch.einsum("bqhd, bkhd -> bhqk", q, k)
    if s.layout == "3-D":
        return torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)).view(shape)
    if s.layout == "baddbmm":
        zeros = torch.zeros(shape[0] * shape[1], s.rows, s.keys, dtype=q.dtype)
        q, k = q.flatten(0, 1), k.flatten(0, 1)
        return torch.baddbmm(zeros, q, k.transpose(1, 2), beta=0, alpha=0.7).view(shape)
    return torch.matmul(q, k.transpose(-2, -1))


def attend(s: Spelling, q: Tensor, k: Tensor, v: Tensor, *terms: Tensor) -> Any:
    bias, _, keep, per_head, mixing, sink = terms
    head_axis = 2 if s.layout == "tokens first" else 1
    if "k under a view" in s.scale:
        k = (k.flatten(-2) * 1.3).view(k.shape)
    k, v = (repeat_heads(x, s, head_axis) for x in (k, v))
    if "q" in s.scale:
        q = q * s.constant
    if "k" in s.scale:
        k = k / 1.5
    scores = scores_of(q, k, s, list(terms))
    if s.miss == "second product":
        scores = scores + scores_of(q.cos(), k, s, list(terms))
    if s.miss == "queries written":
        q.mul_(0.0)
    if "scores" in s.scale:
        scores = s.constant * scores
    if "per head" in s.scale:
        scores = scores * per_head
    if s.miss == "per key":
        scores = scores * torch.linspace(0.5, 1.5, s.keys, dtype=q.dtype)
    if s.miss == "clamped":
        scores = scores.clamp(-5, 5)
    if s.miss == "rectified":
        scores = F.relu(scores)
    if s.miss == "added inside the cap":
        scores = scores + bias
    if s.has_cap:
        scores = torch.tanh(scores / 5.0) * 5.0
    if s.miss == "heads mixed":
        scores = F.linear(scores.permute(0, 2, 3, 1), mixing).permute(0, 3, 1, 2)
    if "divided" in s.scale:
        scores = scores / 1.7
    if s.layout == "5-D":  # windows: a batch of batches
        scores = scores.unsqueeze(0)
    for mask in s.masks:
        scores = masked(scores, mask, s, list(terms))
    if s.miss == "shown by 0":
        scores = scores.masked_fill(~keep, 0.0)
    if s.is_written:
        scores.add_(bias)  # not rebound: the name stands for what is written
    if "last" in s.scale:
        scores = scores * 0.9
    extra = scores.sum() if s.miss == "scores read twice" else 0.0
    if s.miss == "shifted before the sink":
        scores = scores - scores.amax(dim=-1, keepdim=True)
    if s.has_sink:
        scores = torch.cat([scores, sink.expand(*scores.shape[:-1], 1)], -1)
    if s.is_stabilised:
        scores = scores - scores.amax(dim=-1, keepdim=True)
    if s.layout == "3-D" and s.miss != "heads of the weights permuted":
        scores = scores.reshape(-1, s.rows, scores.shape[-1])
    weights = softmax_of(scores, s, q)
    if s.has_sink:
        weights = weights[..., :-1]
    if s.layout == "5-D":
        weights = weights.squeeze(0)
    if s.dropout:
        weights = F.dropout(weights, 0.0 if s.dropout == "p=0" else 0.1, s.dropout == "p=0")
    if s.miss == "weights gated":
        weights = weights * 2.0
    if s.miss == "weights clamped":
        weights = weights.clamp(min=0.01)
    if s.miss == "heads of the weights permuted":
        weights = weights.permute(0, 2, 3, 1).flip(-1).permute(0, 3, 1, 2)
    if s.miss == "weights read twice":
        extra = weights.sum()
    return after(values_of(weights, v, s), s) + extra


def softmax_of(scores: Tensor, s: Spelling, q: Tensor) -> Tensor:
    dim = scores.dim() - 2 if s.miss == "softmax over queries" else -1
    if s.softmax == "method":
        return scores.softmax(dim=dim)
    if s.softmax == "torch":
        return torch.softmax(scores, dim)
    if s.softmax == "function":
        return F.softmax(scores, dim=dim)
    weights = F.softmax(scores, dim=dim, dtype=torch.float32)
    return weights.to(q.dtype) if s.softmax == "fp32" else weights.type_as(q)


def values_of(weights: Tensor, v: Tensor, s: Spelling) -> Tensor:
    """(batch, heads, rows, value width)."""
    if s.layout == "tokens first":
        if s.side == "right":
            return torch.einsum("bkhd,bhqk->bhqd", v, weights)
        return torch.einsum("bhqk,bkhd->bqhd", weights, v).transpose(1, 2)
    if s.layout == "einsum":
        return torch.einsum("bhqk,bhkd->bhqd", weights, v)
    if weights.dim() == 3:
        out = torch.bmm(weights, v.flatten(0, 1))
        return out.view(s.batch, -1, s.rows, s.value_width)
    if s.side == "right":
        return (v.transpose(-2, -1) @ weights.transpose(-2, -1)).transpose(-2, -1)
    return weights @ v


def after(out: Tensor, s: Spelling) -> Tensor:
    if s.after == "tokens":
        return out.transpose(1, 2).contiguous().view(s.batch, s.rows, -1)
    if s.after == "reshape":
        return out.transpose(1, 2).reshape(s.batch, s.rows, -1)
    if s.after == "view" and s.layout in {"4-D", "3-D"} and s.side == "left":
        return out.view(-1, s.value_width)
    return out


def check(output: Tensor, s: Spelling, inputs: list[Tensor]) -> None:
    """As close to fp64 as eager mode is."""
    expected = attend(s, *[x.clone() for x in inputs])
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    oracle = attend(s, *wide)
    assert error(output, oracle) <= 3 * error(expected, oracle) + 2e-6


@FIXED
@given(spellings())
def test_legal_spelling_is_rewritten_exactly(s: Spelling) -> None:
    inputs = inputs_of(s)
    capture = run(lambda *x: attend(s, *x), [x.clone() for x in inputs])
    assert (capture.row.decision, capture.row.reasons) == ("distr", ())
    assert len(capture.calls) == 1
    check(capture.output, s, inputs)
    exact = run_exact(lambda *x: attend(s, *x), [x.clone() for x in inputs])
    assert exact.row.sdpa == (not s.has_cap and not s.has_sink)
    check(exact.output, s, inputs)


@FIXED
@given(spellings(miss=True))
def test_near_miss_is_refused_and_unchanged(s: Spelling) -> None:
    inputs = inputs_of(s)
    capture = run(lambda *x: attend(s, *x), [x.clone() for x in inputs])
    assert capture.row.decision == "exact"
    assert capture.row.reasons[0].code == MISSES[s.miss]
    expected = attend(s, *[x.clone() for x in inputs])
    assert error(capture.output, expected) < 1e-6
