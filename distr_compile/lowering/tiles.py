"""Tiles of the attention kernel: data, per architecture, dtype and widths. Nothing is autotuned.

Chosen from what the kernel compiles to (``tests/kernels/compiled.csv``), not from times: among the
tiles that spill no register, those with the fewest instructions per score that still leave eight
warps on a multiprocessor. On sm_90 two thread blocks of four warps come before one of eight, whose
two groups of warps take turns at products and exponentials in step: a model of the issue slots of
one multiprocessor ranks them so, and no GPU has been asked yet. Shared memory stays within what a
thread block can have.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from distr_compile.kernels.attention.triton_bwd import BackwardTile, Cut
from distr_compile.kernels.attention.triton_fwd import Tile


class Entry(NamedTuple):
    """Tiles for all widths up to ``value_dim`` and ``rank``.

    Attributes:
        value_dim: d_v, the width of V and of the output.
        rank: r, the width of Qhat and Khat; d where the attention is exact.
        tile: without a mask.
        causal: with a causal mask, which is a second loop; None is ``tile``.
        masked: with a mask or bias, a third operand of the loop; None is ``tile``.
    """

    value_dim: int
    rank: int
    tile: Tile
    causal: Tile | None = None
    masked: Tile | None = None


def _tma(block_m: int, block_n: int, num_warps: int, num_stages: int = 2) -> Tile:
    """A tile for Hopper and later; tensor descriptors hold no addresses in registers."""
    return Tile(block_m, block_n, num_warps, num_stages, use_tma=True)


_AMPERE = (
    Entry(64, 32, Tile(128, 64, 4, 2)),
    Entry(128, 64, Tile(128, 64, 8, 2)),
    Entry(128, 128, Tile(128, 64, 8, 2), causal=Tile(128, 32, 8, 2)),
    Entry(256, 64, Tile(32, 64, 4, 2)),
)

HALF = {
    "sm_80": (*_AMPERE, Entry(256, 128, Tile(32, 64, 4, 2)), Entry(256, 256, Tile(32, 32, 4, 2))),
    "sm_86": (*_AMPERE, Entry(256, 256, Tile(32, 32, 4, 2))),
    "sm_89": (*_AMPERE, Entry(256, 256, Tile(32, 32, 4, 2))),
    "sm_90": (
        Entry(32, 16, _tma(128, 128, 4), causal=_tma(128, 64, 4), masked=_tma(128, 64, 4)),
        Entry(32, 32, _tma(128, 64, 4)),
        # Two thread blocks a multiprocessor, and three stages: tensor cores and exponentials of one
        # run beside those of the other. With a bias the narrow tile spills.
        Entry(
            64,
            64,
            _tma(128, 128, 4, 3),
            causal=_tma(128, 64, 4, 3),
            masked=_tma(128, 64, 4, 3),
        ),
        Entry(128, 64, _tma(128, 64, 4, 3), masked=_tma(128, 128, 8)),
        Entry(128, 128, _tma(128, 128, 8)),
        Entry(256, 256, _tma(128, 64, 8)),
    ),
    "sm_100": (
        Entry(128, 128, _tma(128, 128, 8)),
        Entry(256, 256, _tma(128, 64, 8)),
    ),
    "gfx942": (
        Entry(64, 64, Tile(128, 64, 4, 2)),
        Entry(128, 128, Tile(128, 64, 4, 2), masked=Tile(128, 32, 4, 2)),
        Entry(256, 128, Tile(128, 32, 8, 2)),
        Entry(256, 256, Tile(64, 32, 4, 1)),
    ),
    "default": (  # at most 48 KiB of shared memory
        Entry(64, 64, Tile(64, 64, 4, 2)),
        Entry(128, 128, Tile(64, 32, 4, 2)),
        Entry(256, 256, Tile(32, 32, 4, 1)),
    ),
}
"""Tiles of fp16 and bf16; an architecture's entries go from narrow to wide, the first fit holds."""

# Of width 256 with r > 128 every tile spills, these 200 to 300 bytes a thread; smaller ones too.
_FP32_WIDE = (
    Entry(128, 128, Tile(16, 32, 4, 2)),
    Entry(256, 256, Tile(16, 32, 4, 1)),
)
_FP32_AMPERE = (
    Entry(64, 32, Tile(64, 32, 4, 2)),
    Entry(64, 64, Tile(32, 64, 4, 1)),
    Entry(128, 64, Tile(32, 32, 4, 2)),
    *_FP32_WIDE,
)

FP32 = {
    "sm_80": _FP32_AMPERE,
    "sm_86": _FP32_AMPERE,
    "sm_89": _FP32_AMPERE,
    "sm_90": (
        Entry(64, 64, Tile(64, 32, 4, 2)),
        Entry(128, 64, Tile(64, 16, 4, 2)),
        *_FP32_WIDE,
    ),
    "sm_100": _FP32_AMPERE,
    "gfx942": (
        Entry(64, 64, Tile(64, 32, 4, 2)),
        Entry(128, 128, Tile(64, 32, 4, 1)),
        Entry(256, 256, Tile(32, 16, 4, 1)),
    ),
    "default": _FP32_AMPERE,
}
"""Tiles of fp32: twice the bytes, and on NVIDIA three products for one."""


def has_descriptors(architecture: str, dtype: torch.dtype) -> bool:
    """Whether a tile of this architecture and dtype loads by tensor descriptors."""
    table = FP32 if dtype == torch.float32 else HALF
    return any(entry.tile.use_tma for entry in table.get(architecture, table["default"]))


def tile_for(
    architecture: str,
    *,
    value_dim: int,
    rank: int,
    is_causal: bool,
    dtype: torch.dtype,
    has_mask: bool,
) -> Tile:
    """The tile for one call of ``attention_fwd``; widths are rounded up to those of the table.

    Args:
        architecture: as ``architecture.architecture`` names it; unknown ones get "default".
        value_dim: d_v.
        rank: r.
        is_causal: with a causal mask.
        dtype: of the inputs, fp16, bf16 or fp32.
        has_mask: with a mask, a bias or dropout; it decides before ``is_causal``.

    Raises:
        ValueError: the widths are beyond the table.
    """
    table = FP32 if dtype == torch.float32 else HALF
    entries = table.get(architecture, table["default"])
    for entry in entries:
        if value_dim <= entry.value_dim and rank <= entry.rank:
            special = entry.masked if has_mask else entry.causal if is_causal else None
            return special or entry.tile
    raise ValueError(
        f"widths: got value_dim {value_dim} and rank {rank}; must be at most "
        f"{entries[-1].value_dim} and {entries[-1].rank}: keep this layer exact"
    )


class BackwardEntry(NamedTuple):
    """Tiles of the backward for all widths up to ``width``, of Q and V, and up to ``rank``."""

    width: int
    rank: int
    tile: BackwardTile


_SMALL_BACKWARD = (BackwardEntry(128, 128, BackwardTile(Cut(32, 32, 4, 1), Cut(32, 32, 4, 1))),)

BACKWARD_HALF = {
    "gfx942": _SMALL_BACKWARD,
    "default": (
        BackwardEntry(64, 32, BackwardTile(Cut(64, 16, 4), Cut(64, 32))),
        BackwardEntry(128, 128, BackwardTile(Cut(64, 32), Cut(64, 32))),
    ),
}
"""Tiles of the backward in fp16 and bf16."""

BACKWARD_FP32 = {
    "gfx942": _SMALL_BACKWARD,
    "default": (
        BackwardEntry(64, 64, BackwardTile(Cut(64, 16, 8, 1), Cut(32, 32, 8, 1))),
        BackwardEntry(128, 128, BackwardTile(Cut(32, 16, 8, 1), Cut(32, 32, 8, 1))),
    ),
}
"""Likewise in fp32, where three products of tf32 stand for one. None of r <= 64 spills."""


def backward_tile_for(
    architecture: str, *, width: int, rank: int, dtype: torch.dtype
) -> BackwardTile:
    """The tile for one call of ``attention_bwd``; widths are rounded up to those of the table.

    Args:
        architecture: as ``architecture.architecture`` names it; unknown ones get "default".
        width: the larger one of d and d_v.
        rank: r.
        dtype: of the inputs, fp16, bf16 or fp32.

    Raises:
        ValueError: the widths are beyond the table.
    """
    table = BACKWARD_FP32 if dtype == torch.float32 else BACKWARD_HALF
    entries = table.get(architecture, table["default"])
    for entry in entries:
        if width <= entry.width and rank <= entry.rank:
            return entry.tile
    raise ValueError(
        f"widths: got {width} and rank {rank}; must be at most {entries[-1].width} and "
        f"{entries[-1].rank}: keep this layer exact"
    )
