"""Dropout on the weights of attention: which of them stay, by their place and a seed.

Nothing is drawn one after the other. A weight has a number of its own, which Philox4x32 (Salmon et
al., SC 2011, 10 rounds) makes of its place, so that every implementation, tile, thread and device
drops the same weights, and a backward those of its forward::

    words = philox(counter = (j // 4, i, h, 0), key = the seed's low and high 32 bits)
    weight (h, i, j) stays  <=>  words[j % 4] >= p 2^32

with key j, query row i and head h, the query heads of all batch entries counted through. What stays
is divided by 1 - p, as ``F.dropout`` and SDPA do. ``kept`` is the definition; the CPU kernel and
``triton_random.py`` make the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

LOW = 0xFFFFFFFF
ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
STEPS = (0x9E3779B9, 0xBB67AE85)
"""What Philox4x32 multiplies by, and what each round adds to its key."""

MOST_SEEDS = 2**63 - 1
"""Seeds are numbers from 0 up to this one, which is none."""


@dataclass(frozen=True)
class Dropout:
    """Which weights of a call, or of a part of it, are dropped.

    Attributes:
        p: the share that is dropped, more than 0 and less than 1.
        seed: ``()`` int64, on the device of the call.
        heads: H of the whole call.
        head: the number of the part's first head among those of all batch entries.
        row: the part's first query row.
        key: the part's first key.
    """

    p: float
    seed: Tensor
    heads: int
    head: int = 0
    row: int = 0
    key: int = 0

    @property
    def threshold(self) -> int:
        """A weight stays where its number is at least this; below 2^32."""
        return min(round(self.p * 2**32), LOW)

    @property
    def scale(self) -> float:
        """What stays is multiplied by it."""
        return 1 / (1 - self.p)

    def part(self, *, batch: int = 0, head: int = 0, row: int = 0, key: int = 0) -> Dropout:
        """The dropout of a part of this part, which begins at these places in it."""
        first = self.head + batch * self.heads + head
        return replace(self, head=first, row=self.row + row, key=self.key + key)

    def numbers(self, *sizes: int) -> Tensor:
        """The numbers of heads of this part.

        Args:
            sizes: batch entries, and heads of each, perhaps in several axes.

        Returns:
            int64 of ``sizes``.
        """
        batch, *split = sizes
        device = self.seed.device
        heads = torch.arange(int(torch.Size(split).numel()), device=device).view(split)
        entries = torch.arange(batch, device=device).view(-1, *[1] * len(split))
        return self.head + entries * self.heads + heads

    def kept(self, heads: Tensor, rows: int, keys: int) -> Tensor:
        """Which weights of the part stay.

        Args:
            heads: of ``numbers``.
            rows: how many query rows, from the first.
            keys: how many keys, from the first.

        Returns:
            ``(*heads.shape, rows, keys)`` bool.
        """
        # Whole groups of four keys, from that of the first key on; the ends are cut off below.
        first, device = self.key // 4, heads.device
        groups = torch.arange(first, -(-(self.key + keys) // 4), device=device)
        row = torch.arange(self.row, self.row + rows, device=device)[:, None]
        nothing = torch.zeros_like(self.seed)
        # Four of (*heads.shape, rows, groups); stacked last they are the keys in order.
        words = philox((groups, row, heads[..., None, None], nothing), self.seed)
        stays = torch.stack([word >= self.threshold for word in words], -1).flatten(-2)
        return stays[..., self.key - 4 * first :][..., :keys]

    def weigh(self, weights: Tensor) -> Tensor:
        """Weights ``(B, H, rows, keys)`` of the part as dropout leaves them."""
        batch, heads, rows, keys = weights.shape
        stays = self.kept(self.numbers(batch, heads), rows, keys)
        return torch.where(stays, weights * self.scale, 0)


Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox(counter: Words, seed: Tensor) -> Words:
    """Four numbers of 32 bits, each in an int64, of the four words of a counter.

    Args:
        counter: int64 below 2^32, broadcast against one another.
        seed: ``()`` int64, the key.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = seed & LOW, seed >> 32 & LOW
    for _ in range(ROUNDS):
        # A product may overflow int64; all of its 64 bits are right all the same.
        a, b = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (b >> 32 & LOW) ^ c1 ^ k0, b & LOW, (a >> 32 & LOW) ^ c3 ^ k1, a & LOW
        k0, k1 = k0 + STEPS[0] & LOW, k1 + STEPS[1] & LOW
    return c0, c1, c2, c3
