"""How work is rounded up to tiles, and tiles dealt out to programs."""

from __future__ import annotations

BLOCKS_PER_PROGRAM = 8
"""Most grouping blocks for which one program makes Khat of its tile of K."""


def cdiv(number: int, size: int) -> int:
    """The parts of at most ``size`` that ``number`` is cut into."""
    return -(-number // size)


def padded(width: int, least: int) -> int:
    """The width of a tile that holds ``width`` columns: a power of two, and at least ``least``."""
    return max(least, 1 << (width - 1).bit_length())
