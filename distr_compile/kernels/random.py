"""Random numbers that are hashed from their place, not drawn: the same on every device.

``triton_random.py`` makes them in the registers of a kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distr_compile.estimators import NUM_PROJECTIONS


def _fmix32(h: Tensor) -> Tensor:
    """MurmurHash3's 32-bit finaliser, on int64 tensors of numbers below 2^32."""
    # A product may overflow int64; its low 32 bits are right all the same.
    h = (h ^ (h >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
    h = (h ^ (h >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
    return h ^ (h >> 16)


def projections(start: int, stop: int, *, seed: int) -> Tensor:
    """Rows ``start`` to ``stop`` of the random projection matrix of section 3.2.

    Entry (row, p) is a hash of its place and the seed, so that a kernel makes it in registers
    instead of reading a table, and a row is the same on every device and for every block length; a
    short last block uses the first rows. With all arithmetic modulo 2^32::

        u = fmix32((16 row + p) * 0x9E3779B9 + fmix32(seed + 1))
        entry = (sum of the eight 4-bit digits of u) - 60

    A sum of eight uniform digits is nearly Gaussian (Irwin-Hall), of mean 0 and variance 170 here.
    The scale does not matter, as only the signs of the projected numbers are used.

    Returns:
        ``(stop - start, 16)`` float32 on the CPU: integers from -60 to 60, exact in every dtype.
    """
    place = torch.arange(start * NUM_PROJECTIONS, stop * NUM_PROJECTIONS, device="cpu")
    offset = _fmix32(torch.tensor((seed + 1) & 0xFFFFFFFF, device="cpu"))
    u = _fmix32((place * 0x9E3779B9 + offset) & 0xFFFFFFFF)
    digits = torch.stack([u >> shift & 0xF for shift in range(0, 32, 4)])
    return (digits.sum(0) - 60).float().view(-1, NUM_PROJECTIONS)


def start_columns(head_dim: int, rank: int, *, seed: int) -> Tensor:
    """Where the iteration of ``projection`` starts, the same for all heads and blocks.

    Entry (c, j) is number ``256 c + j`` of ``projections`` read row by row, so that a smaller rank
    or width uses a corner of the same matrix. Beyond 256 columns numbers occur in several rows,
    shifted, which serves as well.

    Returns:
        ``(head_dim, rank)`` float32 on the CPU: integers from -60 to 60.
    """
    numbers = projections(0, 16 * (head_dim - 1) + -(-rank // NUM_PROJECTIONS), seed=seed)
    return numbers.flatten().unfold(0, rank, 256)[:head_dim]


def seed_offset(seed: int) -> int:
    """fmix32(seed + 1) as a signed number: an int32 argument for every seed."""
    h = seed + 1 & 0xFFFFFFFF  # fmix32(0) is 0, far from the middle: not for the default seed
    h = (h ^ h >> 16) * 0x85EBCA6B & 0xFFFFFFFF
    h = (h ^ h >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
    h ^= h >> 16
    return h - 2**32 if h >= 2**31 else h
