"""HyperAttention (arXiv 2310.05869): near keys by hashing exactly, the others by a sample.

Queries and keys are sorted, each for themselves, by 7 signs of Gaussian projections; the buckets
stand in Gray order, so that neighbours differ in one sign. (The published code maps a bucket's bits
b to b xor (b >> 1), which is not its place in that order; we take the place.) Query block i attends
exactly to key block i. Of all keys, s are drawn uniformly with replacement in every head; those in
one's own block are hidden, the others stand for M / s keys each. The two softmaxes are merged by
their log-sum-exps.

The causal form cuts the sequence in halves, each causal in the same way, and later queries attend
to earlier keys as above. Of an odd length the earlier half is the longer one.

The authors take blocks and samples of 256, and are exact below 4096 tokens. The sizes here are for
shorter inputs, and ``pairs`` says which share of the N^2 scores is computed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from benchmarks.paper.rivals.layer import Layer, Rival

SIGNS = 7


@dataclass(frozen=True)
class Sizes:
    """How much of the scores is computed.

    Attributes:
        block: queries and keys of a block, b.
        samples: keys drawn in each head, s.
        min_seq_len: causal attention is exact up to it, other attention below it.
    """

    block: int
    samples: int
    min_seq_len: int


SHORT, LONG, SHORT_LIMIT = Sizes(32, 32, 64), Sizes(256, 256, 512), 1024


def sizes_for(tokens: int) -> Sizes:
    """What we take for so many tokens."""
    return SHORT if tokens <= SHORT_LIMIT else LONG


def hyper(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    sizes: Sizes | None = None,
    scale: float | None = None,
    seed: int = 0,
) -> Tensor:
    """Return HyperAttention, ``(B, H, N, d)``. Gradients take sorting and sample as constants.

    Args:
        q: ``(B, H, N, d)``, floating.
        k: ``(B, H, M, d)``; M = N if causal.
        v: ``(B, H, M, d)``.
        causal: row i sees keys j <= i only.
        sizes: ``sizes_for(N)`` if None.
        scale: multiplies Q K^T; ``1 / sqrt(d)`` if None.
        seed: of the projections and of the sample, which all examples of a batch share.
    """
    made = _Draws(Generator().manual_seed(seed), q)
    sizes = sizes or sizes_for(q.shape[2])
    q = q * (q.shape[3] ** -0.5 if scale is None else scale)
    return (_causal if causal else _full)(q, k, v, sizes, made)[0]


def pairs(tokens: int, sizes: Sizes, *, causal: bool = False) -> int:
    """How many scores a head of so many tokens computes; exact attention N^2, or N (N + 1) / 2."""
    if not causal:
        return _pairs(tokens, tokens, sizes)
    if tokens <= sizes.min_seq_len:
        return tokens * (tokens + 1) // 2
    later = tokens // 2
    earlier = tokens - later
    halves = (pairs(n, sizes, causal=True) for n in (earlier, later))
    return sum(halves) + _pairs(later, earlier, sizes)


def _pairs(queries: int, keys: int, sizes: Sizes) -> int:
    if queries < sizes.min_seq_len:
        return queries * keys
    blocks = range(0, queries, sizes.block)
    own = (min(sizes.block, queries - i) * max(0, min(sizes.block, keys - i)) for i in blocks)
    return sum(own) + queries * sizes.samples


class _Draws:
    """The random numbers of one call, in the order in which they are asked for."""

    def __init__(self, generator: Generator, like: Tensor) -> None:
        self.generator = generator
        self.heads = like.shape[1]
        self.device = like.device
        self.directions = torch.randn(like.shape[3], SIGNS, generator=generator).to(like)

    def bucket(self, t: Tensor) -> Tensor:
        """Of every token the place of its bucket in Gray order, ``(B, H, N)``."""
        bits = (t.detach() @ self.directions > 0).long()
        code = (bits << torch.arange(SIGNS, device=t.device)).sum(-1)
        place = code
        for shift in (1, 2, 4):
            place = place ^ (place >> shift)
        return place

    def sample(self, keys: int, samples: int) -> Tensor:
        """Places of sorted keys, ``(H, s)``."""
        drawn = torch.randint(keys, (self.heads, samples), generator=self.generator)
        return drawn.to(self.device)


def _causal(q: Tensor, k: Tensor, v: Tensor, sizes: Sizes, draws: _Draws) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp; Q is scaled already."""
    tokens = q.shape[2]
    if tokens <= sizes.min_seq_len:
        later = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).triu(1)
        return _softmax((q @ k.mT), later, v)
    half = tokens - tokens // 2
    first, second = ([t[:, :, s] for t in (q, k, v)] for s in (slice(half), slice(half, None)))
    earlier, earlier_log = _causal(*first, sizes, draws)
    own = _causal(*second, sizes, draws)
    across = _full(second[0], first[1], first[2], sizes, draws)
    later_rows, later_log = _merged(own, across)
    return torch.cat([earlier, later_rows], 2), torch.cat([earlier_log, later_log], 2)


def _full(q: Tensor, k: Tensor, v: Tensor, sizes: Sizes, draws: _Draws) -> tuple[Tensor, Tensor]:
    if q.shape[2] < sizes.min_seq_len:
        return _softmax(q @ k.mT, None, v)
    order_q, order_k = (draws.bucket(t).argsort(dim=-1, stable=True) for t in (q, k))
    q, k, v = _rows(q, order_q), _rows(k, order_k), _rows(v, order_k)
    found = _merged(_blocks(q, k, v, sizes.block), _sampled(q, k, v, sizes, draws))
    back = order_q.argsort(dim=-1)
    return _rows(found[0], back), _rows(found[1], back)


def _blocks(q: Tensor, k: Tensor, v: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Sorted queries on the sorted keys of the block with their number."""
    queries, keys = q.shape[2], k.shape[2]
    count = math.ceil(queries / block)

    def cut(t: Tensor) -> Tensor:
        t = t[:, :, : count * block]
        return F.pad(t, (0, 0, 0, count * block - t.shape[2])).unflatten(2, (count, block))

    none = (torch.arange(count * block, device=q.device) >= keys).view(count, 1, block)
    out, log = _softmax(cut(q) @ cut(k).mT, none, cut(v))
    return out.flatten(2, 3)[:, :, :queries], log.flatten(2, 3)[:, :, :queries]


def _sampled(q: Tensor, k: Tensor, v: Tensor, sizes: Sizes, draws: _Draws) -> tuple[Tensor, Tensor]:
    queries, keys = q.shape[2], k.shape[2]
    drawn = draws.sample(keys, sizes.samples)
    rows = torch.arange(queries, device=q.device)
    own = drawn[:, None] // sizes.block == rows[:, None] // sizes.block
    k, v = (_rows(t, drawn.expand(len(q), -1, -1)) for t in (k, v))
    out, log = _softmax(q @ k.mT, own, v)
    return out, log + math.log(keys / sizes.samples)


def _softmax(scores: Tensor, hidden: Tensor | None, v: Tensor) -> tuple[Tensor, Tensor]:
    """Output ``(..., d)`` and log-sum-exp ``(..., 1)``, which is -inf where nothing is seen."""
    if hidden is None:
        return scores.softmax(-1) @ v, scores.logsumexp(-1, keepdim=True)
    # Finite, so that rows that see nothing have gradients; they are given no weight.
    scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min / 2)
    blind = hidden.all(-1, keepdim=True)
    log = scores.logsumexp(-1, keepdim=True).masked_fill(blind, -torch.inf)
    return scores.softmax(-1) @ v, log


def _merged(one: tuple[Tensor, Tensor], two: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    log = torch.logaddexp(one[1], two[1])
    return one[0] * (one[1] - log).exp() + two[0] * (two[1] - log).exp(), log


def _rows(t: Tensor, order: Tensor) -> Tensor:
    """``(B, H, N, width)`` in the order ``(B, H, rows)``."""
    return t.gather(2, order[..., None].expand(-1, -1, -1, t.shape[3]))


class Hyper(Rival):
    """HyperAttention of one layer; no parameters. By default a call's length tells its sizes."""

    def __init__(self, layer: Layer, sizes: Sizes | None = None, seed: int = 0) -> None:
        super().__init__(layer)
        self.sizes = sizes
        self.seed = seed

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """See :meth:`Rival.attend`."""
        given = {"sizes": self.sizes, "scale": self.layer.scale, "seed": self.seed}
        return hyper(q, k, v, causal=self.layer.is_causal, **given)
