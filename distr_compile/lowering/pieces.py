"""How PyTorch's products cut a call up: heads and keys in chunks, query rows in panels and tiles.

Forward and backward cut alike, and read the heads that are computed together through one kind of
views.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from distr_compile.kernels.attention.dropout import Dropout
from distr_compile.kernels.rows import four_dimensions, working
from distr_compile.lowering.call import Call

CHUNK = 1 << 20
"""Elements of the largest temporary: a tile of scores, a chunk of K or V, a panel of Q or O."""

PANEL_ROWS = 2048
"""Query rows that share one pass over the keys, so that Khat is made once for all of them."""

KEY_ROWS = 4096
"""Keys per step of the softmax; with ``CHUNK`` it leaves room for tiles of 256 query rows."""

WORKSPACE_MIB = 24
"""Most MiB of tensors alive beside inputs and output, for 4-byte arithmetic and d, d_v <= 256."""


@dataclass(frozen=True)
class Pieces:
    """How one call is cut up: keys per step, tokens per panel and per tile, key heads at a time."""

    keys: int
    panel: int
    tile: int
    heads: int


def pieces_of(call: Call, block: int, matrices: int) -> Pieces:
    """Cut a call up so that what is cut fits ``CHUNK``, and so do the ``matrices`` of a head."""
    rep, num_keys, width = call.rep, call.k.shape[2], max(call.q.shape[3], call.v.shape[3])
    # Keys first, then as many rows as leave each temporary within ``CHUNK``.
    keys = max(1, min(num_keys, KEY_ROWS, CHUNK // width))
    panel = max(1, min(block, PANEL_ROWS // rep, CHUNK // (rep * width)))
    tile = max(1, min(panel, CHUNK // (keys * rep)))
    largest = max(tile * rep * keys, keys * width, panel * rep * width, matrices)
    return Pieces(keys, panel, tile, heads_at_once(largest))


def heads_at_once(elements: int) -> int:
    """The key heads of which each has a temporary of so many elements."""
    return max(1, CHUNK // elements)


Some = tuple[slice, slice]
"""Batch entries and key heads that are computed together."""


def some_heads(entries: slice, key_heads: int, at_once: int) -> Iterator[Some]:
    """Batch entries and all key heads, at most ``at_once`` of them, but at least one, at a time."""
    per_batch, batches = min(key_heads, at_once), max(1, at_once // key_heads)
    for b in range(entries.start, entries.stop, batches):
        for h in range(0, key_heads, per_batch):
            yield slice(b, min(b + batches, entries.stop)), slice(h, h + per_batch)


@dataclass(frozen=True)
class Heads:
    """Views of the inputs and the output for the heads that are computed together.

    Q ``(b, h, rep, N, d)``, K ``(b or 1, h, M, d)``, V alike, out ``(b, h, rep, N, d_v)``, the
    mask ``(b, h, N, rep, M)`` with size 1 where it is broadcast, the sinks ``(h, rep)``, the
    logarithms of the sums of exponentials ``(b, h, rep, N)``, if they are asked for, and which
    weights are dropped; scale, soft cap and ``limit`` are those of the call.
    """

    Q: Tensor
    K: Tensor
    V: Tensor
    mask: Tensor | None
    sinks: Tensor | None
    out: Tensor
    lse: Tensor | None
    dropout: Dropout | None
    scale: float
    softcap: float
    limit: int | None

    @classmethod
    def of(cls, call: Call) -> Heads:
        """The views of a part of a call."""
        key_heads, rep = call.k.shape[1], call.rep
        # Query heads are split into (key head, query head of it): a view for any strides.
        Q, out = (t.unflatten(1, (key_heads, rep)) for t in (call.q, call.out))
        return cls(
            Q=Q,
            K=call.k,
            V=call.v,
            mask=None if call.mask is None else split_mask_heads(call.mask, key_heads, rep),
            sinks=None if call.sinks is None else _split_sinks(call.sinks, call.q.dtype, key_heads),
            out=out,
            lse=None if call.lse is None else call.lse.unflatten(1, (key_heads, rep)),
            dropout=call.dropout,
            scale=call.scores.scale,
            softcap=call.scores.softcap,
            limit=call.limit,
        )

    @property
    def factor(self) -> float:
        """What multiplies a product: the scale, divided by the soft cap for what tanh takes."""
        return self.scale / self.softcap if self.softcap else self.scale

    @property
    def is_plain(self) -> bool:
        """Whether PyTorch's softmax of the scores is all there is to a row that sees a key."""
        return self.sinks is None and self.lse is None and self.dropout is None


def drop(dropout: Dropout | None, weights: Tensor, row: int, key: int) -> None:
    """Make dropped weights of ``(b, h, tokens, rep, keys)`` 0, in place, and scale the others.

    ``row`` and ``key`` are the first of them, in the part that the dropout is of.
    """
    if dropout is None:
        return
    b, h, tokens, rep, keys = weights.shape
    part = dropout.part(row=row, key=key)
    # Of (b, h, rep, tokens, keys), where weights have tokens before rep.
    stays = part.kept(part.numbers(b, h, rep), tokens, keys).transpose(2, 3)
    weights.mul_(stays).mul_(dropout.scale)


def split_mask_heads(mask: Tensor, key_heads: int, rep: int) -> Tensor:
    """The mask as ``(B, H_k, N, rep, M)``, size 1 kept where it is broadcast."""
    mask = four_dimensions(mask)
    split = (key_heads, rep) if mask.shape[1] > 1 else (1, 1)
    split_mask: Tensor = mask.unflatten(1, split)
    return split_mask.transpose(2, 3)


def _split_sinks(sinks: Tensor, dtype: torch.dtype, key_heads: int) -> Tensor:
    """The sinks as ``(H_k, rep)`` in the working dtype of Q's ``dtype``."""
    split: Tensor = sinks.unflatten(0, (key_heads, -1))
    return split.to(torch.promote_types(dtype, torch.float32))


def units_of(t: Tensor, batch: int) -> Tensor:
    """``(b or 1, h, m, c)`` to ``(b h, m, c)`` in the working dtype."""
    return working(t).expand(batch, -1, -1, -1).flatten(0, 1)


def apply_mask(scores: Tensor, mask: Tensor) -> None:
    """Hide scores by a bool mask, or add a floating one, in place."""
    if mask.dtype == torch.bool:
        scores.masked_fill_(~mask, -torch.inf)
    else:
        scores.add_(mask)


def apply_causal(scores: Tensor, diagonal: int) -> None:
    """Let row i of ``(b, h, tokens, rep, keys)`` see ``j <= i + diagonal`` only.

    Columns up to ``diagonal`` are seen by every row and are not touched.
    """
    tokens, keys = scores.shape[2], scores.shape[4]
    common = min(max(diagonal + 1, 0), keys)
    row = torch.arange(tokens, device=scores.device)[:, None, None]
    column = torch.arange(common, keys, device=scores.device)
    scores[..., common:].masked_fill_(column > row + diagonal, -torch.inf)
