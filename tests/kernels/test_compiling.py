"""A slice of the kernels, compiled for every architecture and held against ``compiled.csv``.

The whole table is compiled by ``python -m tests.kernels.compiling``; see there.
"""

from __future__ import annotations

import importlib.metadata

import pytest
from compiling import (
    SHARED_LIMIT,
    SLICE,
    Row,
    all_cases,
    compile_all,
    problems,
    read_compiled,
    version,
)

from distr_compile.lowering.tiles import FP32, HALF, Entry

# Instructions of a loop may move a little with a patch release of Triton; registers and spills of
# the committed rows are exact.
TOLERANCE = 0.05

INSTALLED = version(importlib.metadata.version("triton"))


# One of each vendor; the committed rows are of all.
@pytest.fixture(scope="module", params=["gfx942", "sm_90"])
def compiled(request: pytest.FixtureRequest) -> list[Row]:
    """Rows of the slice for one architecture."""
    rows, failed = compile_all(request.param, SLICE)
    assert not failed
    return rows


def test_kernels_fit_the_architecture(compiled: list[Row]) -> None:
    assert {row.kernel for row in compiled} >= {"_attention_fwd", "_group_kernel"}
    assert not {row.key: problems(row) for row in compiled if problems(row)}


def test_figures_are_the_committed_ones(compiled: list[Row]) -> None:
    committed = {row.key: row for row in read_compiled() if row.triton == INSTALLED}
    if not committed:
        pytest.skip(f"compiled.csv has no rows of Triton {INSTALLED}")
    for row in compiled:
        before = committed[row.key]
        exact = ("tile", "registers", "spill_bytes", "shared_bytes", "matrix")
        assert [getattr(row, name) for name in exact] == [
            getattr(before, name) for name in exact
        ], f"{row.key}: if that is meant, python -m tests.kernels.compiling --write"
        assert row.loop == pytest.approx(before.loop, rel=TOLERANCE)


@pytest.mark.parametrize("triton", sorted({row.triton for row in read_compiled()}))
def test_committed_rows_are_whole_and_without_problems(triton: str) -> None:
    rows = [row for row in read_compiled() if row.triton == triton]
    assert {row.architecture for row in rows} == set(SHARED_LIMIT)
    for architecture in SHARED_LIMIT:
        cases = {(c.dtype, c.value_dim, c.rank, c.variant) for c in all_cases()}
        assert {row.key[3:] for row in rows if row.architecture == architecture} == cases
    assert not {row.key: problems(row) for row in rows if problems(row)}


def test_the_slice_is_part_of_the_table() -> None:
    assert set(SLICE) <= set(all_cases())


@pytest.mark.parametrize(("table", "dtype"), [(HALF, "float16"), (FP32, "float32")])
def test_every_entry_of_the_tables_is_compiled(
    table: dict[str, tuple[Entry, ...]], dtype: str
) -> None:
    widths = {
        (case.value_dim, case.rank)
        for case in all_cases()
        if case.dtype == dtype and case.function == "attention_fwd"
    }
    for architecture in SHARED_LIMIT:
        entries = table[architecture]
        used = {next(e for e in entries if d <= e.value_dim and r <= e.rank) for d, r in widths}
        assert used == set(entries)
