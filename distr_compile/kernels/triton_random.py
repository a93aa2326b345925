"""The random numbers of ``random.py``, and of dropout, in the registers of a kernel."""

# Triton's decorators and the kernels under them cannot be typed.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _fmix32(h):
    """MurmurHash3's 32-bit finaliser, of uint32."""
    h ^= h >> 16
    h *= 0x85EBCA6B
    h ^= h >> 13
    h *= 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def random_numbers(place, offset):
    """Entries of ``projections`` in ``random.py``, at ``place`` = row * 16 + column.

    ``offset`` is fmix32(seed + 1) as int32.
    """
    u = _fmix32(place.to(tl.uint32) * 0x9E3779B9 + offset.to(tl.uint32))
    # Add the eight digits: in pairs, one sum per byte, then all four bytes into the highest.
    pairs = (u & 0x0F0F0F0F) + ((u >> 4) & 0x0F0F0F0F)
    return ((pairs * 0x01010101) >> 24).to(tl.int32) - 60


@triton.jit
def is_kept(
    seed,
    threshold,
    head,
    rows,
    first_key,
    BLOCK: tl.constexpr,
    BY_FOUR: tl.constexpr,
):
    """Which weights of BLOCK keys from ``first_key`` on stay, as ``attention/dropout.py`` says.

    Args:
        seed: int64.
        threshold: as int32.
        head: the number of the head.
        rows: the numbers of the rows, ``(rows,)``.
        first_key: its number.
        BLOCK: a multiple of 4.
        BY_FOUR: ``first_key`` is a multiple of 4: a number is made once, else four times.

    Returns:
        ``(rows, BLOCK)``.
    """
    rows = rows.to(tl.uint32)[:, None]
    head = head.to(tl.uint32)
    first_key = first_key.to(tl.uint32)
    if BY_FOUR:
        groups = (first_key // 4 + tl.arange(0, BLOCK // 4).to(tl.uint32))[None, :]
        groups, row = tl.broadcast(groups, rows)
        zero = groups * 0
        w0, w1, w2, w3 = tl.philox(seed, groups, row, zero + head, zero)
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(rows.shape[0], BLOCK)
    else:
        keys = (first_key + tl.arange(0, BLOCK).to(tl.uint32))[None, :]
        keys, row = tl.broadcast(keys, rows)
        zero = keys * 0
        w0, w1, w2, w3 = tl.philox(seed, keys // 4, row, zero + head, zero)
        low = tl.where(keys % 2 == 0, w0, w1)
        high = tl.where(keys % 2 == 0, w2, w3)
        words = tl.where(keys % 4 < 2, low, high)
    return words >= threshold.to(tl.uint32, bitcast=True)
