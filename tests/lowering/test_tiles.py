"""The tables of tiles, and the paper's rule against the paper's table."""

from __future__ import annotations

import itertools

import pytest
import torch

from distr_compile.kernels.attention.triton_fwd import Tile
from distr_compile.lowering import paper_rule, tiles
from distr_compile.lowering.architecture import NEAREST
from distr_compile.lowering.paper_rule import CARDS, Card, paper_blocks
from distr_compile.lowering.tiles import FP32, HALF, tile_for

# Table 2, rows "ours": the same for all three cards.
TABLE_2 = {32: (256, 64), 64: (128, 128), 128: (128, 32)}

ARCHITECTURES = {"sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "gfx942", "default"}


def some_tile(architecture: str = "sm_90", **changed: object) -> Tile:
    call = {"value_dim": 64, "rank": 32, "is_causal": False, "has_mask": False}
    return tile_for(architecture, **{**call, "dtype": torch.float16, **changed})


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("head_dim", TABLE_2)
def test_the_rule_gives_table_2(card: str, head_dim: int) -> None:
    assert paper_blocks(CARDS[card], head_dim) == TABLE_2[head_dim]


@pytest.mark.parametrize(
    ("constant", "without"),
    [("WARPS", 8), ("MAX_REGISTERS", 10**6), ("MAX_ASPECT", 2), ("MAX_ASPECT", 8)],
)
def test_every_assumption_is_needed_for_table_2(
    constant: str, without: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paper_rule, constant, without)
    assert {d: paper_blocks(CARDS["L40"], d) for d in TABLE_2} != TABLE_2


def test_the_rule_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="head_dim: got 128 at 4 bytes"):
        paper_blocks(Card(shared_bytes=16 * 1024, tensor_cores=4), 128, element_bytes=4)


def test_every_architecture_has_a_table() -> None:
    assert set(HALF) == set(FP32) == ARCHITECTURES
    assert set(NEAREST.values()) <= ARCHITECTURES


@pytest.mark.parametrize("table", [HALF, FP32], ids=["half", "fp32"])
@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_tables_are_well_formed(
    table: dict[str, tuple[tiles.Entry, ...]], architecture: str
) -> None:
    entries = table[architecture]
    widths = [entry[:2] for entry in entries]
    assert widths[-1] == (256, 256)
    assert widths == sorted(set(widths))  # so that no entry hides a later one
    for entry in entries:
        assert all(size & (size - 1) == 0 for size in entry[:2])
        for tile in filter(None, (entry.tile, entry.causal, entry.masked)):
            assert tile.block_m in (16, 32, 64, 128)
            assert tile.block_n in (16, 32, 64, 128)
            assert tile.num_warps in (4, 8)
            assert tile.num_warps == 4 or tile.block_m == 128  # 16 rows for every warp
            assert tile.num_stages in (1, 2, 3)


def test_widths_are_rounded_up() -> None:
    for value_dim, rank in itertools.product((1, 16, 33, 80, 96, 128, 192, 256), repeat=2):
        up = [max(16, 1 << (n - 1).bit_length()) for n in (value_dim, rank)]
        for architecture in ARCHITECTURES:
            for flags in ({}, {"is_causal": True}, {"has_mask": True}, {"dtype": torch.float32}):
                assert some_tile(architecture, value_dim=value_dim, rank=rank, **flags) == (
                    some_tile(architecture, value_dim=up[0], rank=up[1], **flags)
                )


@pytest.mark.parametrize(
    ("is_causal", "has_mask", "tile"), [(0, 0, 16), (1, 0, 32), (0, 1, 64), (1, 1, 64)]
)
def test_a_mask_decides_before_causality(
    is_causal: bool, has_mask: bool, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = tiles.Entry(64, 64, Tile(16), causal=Tile(32), masked=Tile(64))
    monkeypatch.setitem(HALF, "sm_90", (entry,))
    assert some_tile(is_causal=is_causal, has_mask=has_mask) == Tile(tile)


def test_bf16_has_the_tiles_of_fp16_and_fp32_its_own() -> None:
    assert some_tile(dtype=torch.bfloat16) == some_tile() != some_tile(dtype=torch.float32)


def test_an_unknown_architecture_takes_the_default() -> None:
    assert some_tile("sm_75") == some_tile("default")


def test_widths_beyond_the_table_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got value_dim 512 and rank 32; must be at most 256"):
        some_tile(value_dim=512)
