"""Derives the entries of ``BREAK_EVEN`` in ``lowering/dispatch.py`` from measurements.

    python -m benchmarks.break_even DIR [...]

prints one line per head width and rank, to be pasted there. The approximation wins from the least
measured length on from which it is at least as fast as the best backend of SDPA in every cell that
was measured: every dtype, batch and number of heads, without a mask. That keeps what the dispatch
promises (device time at most ``PROMISE`` times that of the best SDPA and 2 us): a length at which
the approximation would only nearly be as fast is left to exact attention.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from benchmarks.rows import GROUP_SIZES, Row, load

PROMISE, SLACK_MS = 1.02, 0.002

Widths = tuple[int, int]  # head width, rank


def break_even(rows: Iterable[Row]) -> dict[Widths, tuple[int | None, int | None]]:
    """(d, r) -> least winning length without and with causality; None where there is none."""
    ratios: dict[tuple[Widths, bool], dict[int, float]] = defaultdict(dict)
    for row in rows:
        best, d, n = row.best_sdpa(), row.cell["head_dim"], row.cell["tokens"]
        for group_size in GROUP_SIZES:
            ms = row.ours(group_size)
            if ms is None or best is None or row.cell["mask"] != "none":
                continue
            worst = ratios[(d, d // group_size), row.cell["is_causal"]]
            worst[n] = max(worst.get(n, 0.0), ms / best)
    widths = dict.fromkeys(pair for pair, _ in sorted(ratios))
    return {w: (_least(ratios[w, False]), _least(ratios[w, True])) for w in widths}


def _least(ratios: dict[int, float]) -> int | None:
    least = None
    for length in sorted(ratios, reverse=True):
        if ratios[length] > 1:
            break
        least = length
    return least


def broken(rows: Iterable[Row], entries: dict[Widths, tuple[int | None, int | None]]) -> list[str]:
    """Cells where these entries would choose the approximation and break the promise."""
    found = []
    for row in rows:
        best, d = row.best_sdpa(), row.cell["head_dim"]
        for group_size in GROUP_SIZES:
            least = entries.get((d, d // group_size), (None, None))[row.cell["is_causal"]]
            ms = row.ours(group_size)
            if least is None or ms is None or best is None or row.cell["tokens"] < least:
                continue
            if ms > PROMISE * best + SLACK_MS:
                found.append(f"{row.cell}, G = {group_size}: {ms} ms, best SDPA {best} ms")
    return found


def lines(
    architecture: str, entries: dict[Widths, tuple[int | None, int | None]], source: str
) -> list[str]:
    """Lines to paste; widths that never win have none."""
    return [
        f'    ("{architecture}", {d}, {r}): BreakEven({tokens}, {causal}, "{source}"),'
        for (d, r), (tokens, causal) in entries.items()
        if tokens is not None or causal is not None
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="entries of BREAK_EVEN, from measurements")
    parser.add_argument("folders", type=Path, nargs="+")
    for folder in parser.parse_args().folders:
        environment, rows = load(folder / "attention.json")
        entries = break_even(rows)
        for line in lines(environment["architecture"], entries, f"{folder}/attention.json"):
            print(line)
        for (d, r), (tokens, causal) in entries.items():
            if tokens is None and causal is None:
                print(f"    # d = {d}, r = {r}: never as fast as the best SDPA")
        for cell in broken(rows, entries):
            print(f"    # breaks the promise: {cell}")


if __name__ == "__main__":
    main()
