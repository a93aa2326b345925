"""The random numbers of ``random.py`` in the registers of a kernel."""

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
