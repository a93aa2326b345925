"""Cells of forward and backward of ``make gpu``: what is called, checked and told; on the CPU."""

from __future__ import annotations

import pytest
import torch

from benchmarks import arms, both_ways, cells, stages, targets
from benchmarks.cells import Cell
from tests.kernels.cpu_kernel import require_kernel

CELLS = [
    Cell(1, 4, 2, 150, 32, "float32"),
    Cell(2, 2, 2, 64, 64, "float32", is_causal=True),
]


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.key)
def test_gradients_are_checked(cell: Cell) -> None:
    require_kernel()
    inputs = arms.make_inputs(cell, "cpu")
    table = both_ways.make_arms(cell, inputs)
    ours = [name for name in table if not name.startswith("sdpa")]
    sizes = [size for size in (2, 4) if cell.head_dim // size >= 16]
    assert len(ours) == 1 + 3 * len(sizes)
    for name in ours:
        found = table[name].call()
        told = both_ways.errors(cell, inputs, table[name], found)
        assert told["is_right"], (name, told)
        for i in range(3):
            wrong = [t.clone() for t in found]
            wrong[i][0, 0, -1] *= 1.5
            told = both_ways.errors(cell, inputs, table[name], tuple(wrong))
            assert not told["is_right"], (name, i, told)
            assert told["max_error"] > told["allowed_error"]
    exact = table[arms.EXACT].call()
    leaves = [t.detach().requires_grad_() for t in (inputs.q, inputs.k, inputs.v)]
    gqa = cell.heads != cell.key_heads
    options = {"is_causal": cell.is_causal, "scale": cell.scale, "enable_gqa": gqa}
    out = torch.nn.functional.scaled_dot_product_attention(*leaves, **options)
    wanted = torch.autograd.grad(out, leaves, both_ways._grad(cell, inputs))
    for mine, theirs in zip(exact, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_limits_count_products() -> None:
    """Of the backward's five products three have the narrow width; of both ways' seven, four."""
    assert [round(both_ways.limits(size)["backward"], 2) for size in (2, 4)] == [1.43, 1.82]
    both = [both_ways.limits(size)["forward and backward"] for size in (2, 4)]
    assert both == [7 / 5, 7 / 4]


def test_the_table_has_the_limits_beside() -> None:
    told = {"sdpa flash": 3.0, "sdpa cudnn": 2.0, "projection G=2": 1.6, "calibrated G=4": 1.0}
    found = {name: {"median_ms": ms, "is_right": True} for name, ms in told.items()}
    found["lsh-mean G=2"] = {"median_ms": 0.1, "is_right": False}
    cell = {"batch": 4, "heads": 32, "tokens": 4096, "head_dim": 128, "is_causal": True}
    text = "\n".join(both_ways.table([{**cell, "arms": found}]))
    assert "at most 1.43 (G = 2), 1.82 (G = 4), both together 1.40, 1.75" in text
    row = text.splitlines()[-1]
    assert row.startswith("| B4 H32 N4096 d128 causal | sdpa cudnn 2.000 ms | not measured |")
    nothing = "not measured"
    wanted = [nothing, "2.00", nothing, nothing, "1.25", f"{nothing} |"]
    assert row.split(" | ")[3:] == wanted
    assert both_ways.table([])[0].endswith("1.75: not measured")


def test_it_is_a_stage() -> None:
    assert "training" in stages.STAGES
    assert "training" in targets.MEASURED_IN
    assert len(cells.training("cuda")) == 5
    assert len({cell.tokens for cell in cells.training("cpu")}) == 1
