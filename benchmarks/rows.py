"""Reads the cells of attention in a file of results: what is compared in plots and tables.

    python -m benchmarks.rows DIR [...]

prints the table of each folder of results.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.arms import ESTIMATED, EXACT
from benchmarks.cells import speedup_limit

FLASH = "sdpa flash"
GROUP_SIZES = (2, 4)
TABLED = ("projection", "calibrated", "lsh-mean")
"""Estimators in tables and plots."""


def is_ours(arm: str) -> bool:
    """Whether our kernels compute it."""
    return arm == EXACT or arm in ESTIMATED


def is_attention(cell: dict[str, Any]) -> bool:
    """Whether it holds ways to compute one attention."""
    return "run" in cell and cell.get("kind", "attention") == "attention"


@dataclass(frozen=True)
class Row:
    """One shape.

    Attributes:
        cell: what the file says of it: batch, heads, key_heads, tokens, head_dim, dtype, ...
        times: median milliseconds of every arm that ran and gave a right result.
    """

    cell: dict[str, Any]
    times: dict[str, float]

    def best_sdpa(self) -> float | None:
        """The fastest backend of ``F.scaled_dot_product_attention``."""
        return min((ms for name, ms in self.times.items() if name.startswith("sdpa")), default=None)

    def best_exact(self) -> tuple[str, float] | None:
        """Name and time of the fastest exact arm, FlexAttention and our own kernel included."""
        exact = [(ms, name) for name, ms in self.times.items() if name not in ESTIMATED]
        return (min(exact)[1], min(exact)[0]) if exact else None

    def ours(self, group_size: int, estimator: str) -> float | None:
        """The approximation, prologue included."""
        return self.times.get(f"{estimator} G={group_size}")


def load(path: Path) -> tuple[dict[str, str], list[Row]]:
    """The environment of the latest run in the file, and the shapes that were measured in it.

    Raises:
        ValueError: the file has no cell.
    """
    data = json.loads(path.read_text(encoding="utf-8"))
    cells = [cell for cell in data["cells"].values() if is_attention(cell)]
    if not cells:
        raise ValueError(f"{path}: got no measured cell; run `make gpu` first")
    latest = max(cells, key=lambda cell: cell["run"])["environment"]
    rows = []
    for cell in cells:
        if cell["environment"] == latest:
            times = {
                name: arm["median_ms"]
                for name, arm in cell["arms"].items()
                if arm.get("is_right") and "median_ms" in arm
            }
            rows.append(Row({k: v for k, v in cell.items() if k != "arms"}, times))
    return data["environments"][latest], rows


def table(rows: list[Row]) -> str:
    """Markdown: milliseconds of FlashAttention-2 and of the best exact kernel, and our speedups.

    Of every estimator, with groups of 2 and of 4: over flash, and over the best exact kernel.
    """
    ours = [(estimator, size) for estimator in TABLED for size in GROUP_SIZES]
    names = [f"{estimator} G={size}: x flash, x best" for estimator, size in ours]
    columns = ["dtype", "B, H", "N", "d", "", "flash", "best exact", *names, "limits"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in sorted(rows, key=_order):
        cell, flash, best = row.cell, row.times.get(FLASH), row.best_exact()
        heads = f"{cell['heads']}"
        if cell["key_heads"] != cell["heads"]:
            heads += f"/{cell['key_heads']}"
        form = ["causal"] * cell["is_causal"] + [cell["mask"]] * (cell["mask"] != "none")
        columns = [
            cell["dtype"],
            f"{cell['batch']}, {heads}",
            str(cell["tokens"]),
            str(cell["head_dim"]),
            " ".join(form),
            "-" if flash is None else f"{flash:.3f}",
            "-" if best is None else f"{best[1]:.3f} ({best[0]})",
        ]
        for estimator, size in ours:
            ms = row.ours(size, estimator)
            over = [
                "-" if ms is None or other is None else f"{other / ms:.2f}"
                for other in (flash, best and best[1])
            ]
            columns.append(", ".join(over))
        limits = (f"{speedup_limit(cell['head_dim'], size):.2f}" for size in GROUP_SIZES)
        lines.append("| " + " | ".join([*columns, ", ".join(limits)]) + " |")
    return "\n".join(lines)


def _order(row: Row) -> tuple[Any, ...]:
    names = ("mask", "is_causal", "dtype", "head_dim", "batch", "heads", "key_heads", "tokens")
    return tuple(row.cell[name] for name in names)


def main() -> None:
    parser = argparse.ArgumentParser(description="tables of what was measured")
    parser.add_argument("folders", type=Path, nargs="+")
    for folder in parser.parse_args().folders:
        environment, rows = load(folder / "attention.json")
        print("; ".join(f"{name} {value}" for name, value in environment.items()))
        print(table(rows))


if __name__ == "__main__":
    main()
