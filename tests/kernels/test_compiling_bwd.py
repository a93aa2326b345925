"""A slice of the backward kernels, compiled for every architecture; and the committed table."""

from __future__ import annotations

import importlib.metadata

import pytest

from tests.kernels.compiling import SHARED_LIMIT, version
from tests.kernels.compiling_bwd import FEW, Row, cases, in_a_process, read_compiled

INSTALLED = version(importlib.metadata.version("triton"))


@pytest.mark.parametrize("architecture", ["sm_90", "gfx942"])
def test_kernels_fit_the_architecture(architecture: str) -> None:
    rows = in_a_process(architecture, few=True)
    assert {row.kernel for row in rows} == {"_keys_bwd", "_queries_bwd"}
    assert not {row[1:8]: row.problems for row in rows if row.problems}
    committed = [row for row in read_compiled() if row[:2] == (INSTALLED, architecture)]
    if committed:
        assert set(rows) <= set(committed), "python -m tests.kernels.compiling_bwd --write"


def test_committed_rows_are_whole_and_without_problems() -> None:
    rows = read_compiled()
    assert set(FEW) <= set(cases())
    for of in {row[:2] for row in rows}:
        assert of[1] in SHARED_LIMIT
        some = [row for row in rows if row[:2] == of]
        assert len(some) == 2 * len(cases())
        found = {(row.dtype, row.head_dim, row.rank, row.variant) for row in some}
        assert found == {tuple(vars(case).values()) for case in cases()}
    assert not {row[1:8]: row.problems for row in rows if row.problems}
    assert all(isinstance(row, Row) for row in rows)
    assert rows
