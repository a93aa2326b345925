"""Table 2: the block sizes (l, m) that the paper's rule gives for its three GPUs.

    python -m benchmarks.paper.block_sizes

``lowering/paper_rule.py`` says what we had to add to the rule. The best sizes were measured on the
GPUs by the paper; here nothing is timed.
"""

from __future__ import annotations

from functools import partial

from benchmarks.paper.script import NOT_MEASURED, Cells, Script, markdown
from benchmarks.store import Cell
from distr_compile.lowering.paper_rule import CARDS, paper_blocks

WIDTHS = (32, 64, 128)
PUBLISHED = {
    "RTX 4090": {
        "flash": ((128, 128), (128, 128), (128, 32)),
        "ours": ((256, 64), (128, 128), (128, 32)),
        "best": ((128, 128), (128, 128), (128, 32)),
    },
    "RTX 3090": {
        "flash": ((128, 128), (128, 128), (128, 32)),
        "ours": ((256, 64), (128, 128), (128, 32)),
        "best": ((128, 128), (128, 128), (128, 32)),
    },
    "L40": {
        "flash": ((128, 128), (128, 128), (128, 32)),
        "ours": ((256, 64), (128, 128), (128, 32)),
        "best": ((256, 64), (128, 128), (128, 32)),
    },
}
"""GPU -> method -> (l, m) at each of ``WIDTHS``; "ours" is the paper's own rule."""


def cells(quick: bool) -> Cells:
    names = list(CARDS)[: 2 if quick else None]
    return {name: partial(cell, name) for name in names}


def cell(name: str) -> Cell:
    return {"blocks": [list(paper_blocks(CARDS[name], d)) for d in WIDTHS]}


def table(found: dict[str, Cell]) -> str:
    rows: list[list[object]] = []
    for name, published in PUBLISHED.items():
        for method, sizes in published.items():
            rows.append([name, f"paper, {method}", *map(_pair, sizes)])
        c = found.get(name)
        ours = map(_pair, c["blocks"]) if c else [NOT_MEASURED] * len(WIDTHS)
        rows.append([name, "`paper_blocks`", *ours])
    return markdown(rows, ["GPU", "by", *(f"d = {d}" for d in WIDTHS)])


def _pair(sizes: tuple[int, int]) -> str:
    return f"({sizes[0]}, {sizes[1]})"


SCRIPT = Script(
    "block_sizes", "Table 2: block sizes", cells, table, ("distr_compile/lowering/paper_rule.py",)
)

if __name__ == "__main__":
    SCRIPT.main()
