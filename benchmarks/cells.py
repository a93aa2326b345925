"""The shapes that are measured, in the order of their weight, and what each must cost at least."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from distr_compile.estimators import ESTIMATORS, auto_grouping_block

BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
HEADS = ((4, 32), (1, 10))  # (batch, heads): a model's, and the paper's
LENGTHS = (197, 512, 1024, 2048, 4096, 8192, 16384, 32768)
PROLOGUE_LENGTHS = (2048, 4096, 20480, 40960)  # of the paper's section 4.8


@dataclass(frozen=True)
class Cell:
    """One shape of attention.

    Attributes:
        batch: B.
        heads: H, query heads.
        key_heads: H_k.
        tokens: N = M.
        head_dim: d = d_v.
        dtype: a name in torch.
        is_causal: rows see the keys up to their own.
        mask: "none", "padding" (bool, per batch element) or "bias" (floating, per head and row).
    """

    batch: int
    heads: int
    key_heads: int
    tokens: int
    head_dim: int
    dtype: str = "float16"
    is_causal: bool = False
    mask: str = "none"

    @property
    def key(self) -> str:
        """Its name in the files of results."""
        heads = (
            f"{self.heads}" if self.heads == self.key_heads else f"{self.heads}/{self.key_heads}"
        )
        parts = [self.dtype, f"B{self.batch}", f"H{heads}", f"N{self.tokens}", f"d{self.head_dim}"]
        parts += ["causal"] if self.is_causal else []
        parts += [self.mask] if self.mask != "none" else []
        return " ".join(parts)

    @property
    def scale(self) -> float:
        """What the scores are multiplied by."""
        return self.head_dim**-0.5

    @property
    def exact_flops(self) -> float:
        """4 B H N M d, half of it if causal: what exact attention multiplies and adds."""
        return self._scores * 4 * self.head_dim

    def flops(self, rank: int, estimator: str = "lsh-mean") -> float:
        """What is really done at width ``rank``: both products, and what makes Qhat and Khat."""
        products = self._scores * 2 * (rank + self.head_dim)
        return products + self.prologue_flops(rank, estimator)

    def prologue_flops(self, rank: int, estimator: str = "lsh-mean") -> float:
        """What the estimator costs, as it says itself."""
        if rank == self.head_dim:
            return 0
        cost = ESTIMATORS[estimator].cost(
            self.tokens,
            self.tokens,
            self.head_dim,
            rank,
            auto_grouping_block(self.tokens, estimator),
            rep=self.heads // self.key_heads,
        )
        return self.batch * self.key_heads * cost.flops

    @property
    def bytes(self) -> float:
        """Each input read once, the output written once."""
        rows = self.batch * self.tokens * (2 * self.heads + 2 * self.key_heads)
        mask = {
            "none": 0,
            "padding": self.batch * self.tokens,
            "bias": self.heads * self.tokens**2 * BYTES[self.dtype],
        }
        return rows * self.head_dim * BYTES[self.dtype] + mask[self.mask]

    @property
    def _scores(self) -> float:
        return self.batch * self.heads * self.tokens**2 / (2 if self.is_causal else 1)


def speedup_limit(head_dim: int, group_size: int) -> float:
    """What is left to win if only the two products cost time: 2d / (d / G + d)."""
    return 2 * head_dim / (head_dim / group_size + head_dim)


def deciding(device: str) -> list[Cell]:
    """The shapes that the targets are about; without a GPU, of one width."""
    widths = (64, 128) if device == "cuda" else (64,)
    shapes = itertools.product(widths, (8192, 16384, 4096), HEADS)
    return _fit(device, (Cell(b, h, h, n, d) for d, n, (b, h) in shapes))


FIRST = (Cell(4, 32, 32, 8192, 128), Cell(4, 32, 32, 4096, 128))
"""What the first minutes on a GPU are for."""

SECOND = (
    replace(FIRST[0], tokens=16384),
    Cell(1, 10, 10, 8192, 128),
    replace(FIRST[0], head_dim=64),
    replace(FIRST[0], is_causal=True),
    replace(FIRST[0], key_heads=8),
    replace(FIRST[0], dtype="bfloat16"),
)
"""What comes after it: one thing each is otherwise than in ``FIRST``."""


FIRST_TILES = ((FIRST[0], 64), (replace(FIRST[0], head_dim=64), 32), (FIRST[0], 32))
"""Shapes and ranks to try other tiles on."""

PAPER = tuple(Cell(1, 10, 10, n, 128) for n in PROLOGUE_LENGTHS)
"""Shapes of the paper's section 4.8."""


def first_tiles(device: str) -> list[tuple[Cell, int]]:
    """``FIRST_TILES``, or one tiny case of them."""
    if device == "cuda":
        return list(FIRST_TILES)
    return [(cell, 16) for cell in short_run(device, (cell for cell, _ in FIRST_TILES))]


def short_run(device: str, cells: Iterable[Cell]) -> list[Cell]:
    """The cells of a run of minutes; the smallest that have their forms, without a GPU."""
    if device == "cuda":
        return list(cells)
    small = (
        replace(cell, heads=cell.heads // cell.key_heads, key_heads=1, head_dim=32, tokens=48)
        for cell in _fit(device, cells)
    )
    return list(dict.fromkeys(small))


def variants(device: str) -> list[Cell]:
    """One shape of everything else that the kernel does."""
    plain = Cell(4, 32, 32, 4096, 128)
    shared = replace(plain, key_heads=8, tokens=8192)
    return _fit(
        device,
        [
            replace(plain, tokens=8192, is_causal=True),
            shared,
            replace(shared, is_causal=True),
            replace(plain, mask="padding"),
            replace(plain, mask="bias"),
            replace(plain, tokens=8192, dtype="bfloat16"),
        ],
    )


def training(device: str) -> list[Cell]:
    """Shapes whose backward is measured, too."""
    plain = Cell(4, 32, 32, 4096, 128)
    shapes = (plain, replace(plain, is_causal=True), replace(plain, head_dim=64))
    return _fit(device, [*shapes, replace(plain, key_heads=8), replace(plain, tokens=8192)])


def prologue(device: str) -> list[Cell]:
    """Shapes for the share of the prologue: the paper's, then those of the targets."""
    ours = [Cell(4, 32, 32, n, d) for n in (4096, 8192) for d in (64, 128)]
    return _fit(device, [*PAPER, *ours])


def sweep(device: str) -> list[Cell]:
    """All lengths, widths, dtypes, with and without causality; the common ones first."""
    axes = itertools.product(
        HEADS, ("float16", "bfloat16"), (False, True), (64, 128, 32), reversed(LENGTHS)
    )
    cells = _fit(device, (Cell(b, h, h, n, d, t, c) for (b, h), t, c, d, n in axes))
    return cells if device == "cuda" else cells[::12]


def tiles(device: str) -> list[Cell]:
    """Shapes to try other tiles on."""
    axes = itertools.product((False, True), (128, 64))
    return _fit(device, (Cell(4, 32, 32, 8192, d, is_causal=c) for c, d in axes))


def _fit(device: str, cells: Iterable[Cell]) -> list[Cell]:
    """The cells; tiny ones in place of them without a GPU, where kernels are interpreted."""
    small: Iterator[Cell] = (
        replace(
            cell,
            batch=1,
            heads=2,
            key_heads=2 if cell.heads == cell.key_heads else 1,
            tokens=37 if cell.tokens % 64 else 64,
            # The interpreter cannot add bfloat16.
            dtype="float32" if cell.dtype == "bfloat16" else cell.dtype,
        )
        for cell in cells
    )
    return list(dict.fromkeys(cells if device == "cuda" else small))
