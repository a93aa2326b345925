"""Masks, fills and scales that hang on constants only: what they are is computed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from distr_compile.passes import constants
from distr_compile.passes.constants import Constants
from distr_compile.passes.memory import Memory
from distr_compile.passes.vocabulary import shape_of

from .capture import error, run, run_exact
from .test_memory import graph_of

ROWS, KEYS = 24, 48

MASKS: dict[str, tuple[Callable[[Tensor], Tensor], float | None]] = {
    "tril": (lambda x: torch.ones(ROWS, KEYS, dtype=torch.bool).tril(), 0),
    "tril with a diagonal": (lambda x: torch.ones(ROWS, KEYS).tril(5) == 1, 5),
    "arange by keyword": (
        lambda x: torch.arange(KEYS) <= torch.arange(24, end=48)[:, None],
        24,
    ),
    "arange from one": (lambda x: torch.arange(1, KEYS + 1) <= torch.arange(ROWS)[:, None], None),
    "prefix": (lambda x: _written(lambda m: m[:, :8].fill_(True)), None),
    "prefix by setitem": (lambda x: _written(lambda m: m.__setitem__((slice(0, 3), 5), 1)), None),
    "written to what it was": (lambda x: _written(lambda m: m[:, 0].fill_(True)), 0),
    "window": (lambda x: _positions(lambda i, j: (j <= i) & (j > i - 7)), None),
    "window wider than all": (lambda x: _positions(lambda i, j: (j <= i) & (j > i - 64)), 0),
    "chunks": (lambda x: _positions(lambda i, j: (j <= i) & (i // 5 == j // 5)), None),
    "strict": (lambda x: _positions(lambda i, j: j < i), None),
    "reversed": (lambda x: _positions(lambda i, j: j >= i), None),
    "by cumsum": (
        lambda x: torch.ones(KEYS).cumsum(0) <= torch.ones(ROWS).cumsum(0)[:, None],
        0,
    ),
    "additive": (lambda x: torch.full((ROWS, KEYS), -torch.inf).triu(1), 0),
    "additive, finite": (lambda x: torch.full((ROWS, KEYS), -1e9).triu(3), 2),
    "additive, too weak": (lambda x: torch.full((ROWS, KEYS), -50.0).triu(1), None),
    "empty, then filled": (lambda x: torch.empty(ROWS, KEYS).fill_(-torch.inf).triu_(1), 0),
    "empty": (lambda x: torch.empty(ROWS, KEYS, dtype=torch.bool).tril(), None),
    "ones like an input": (lambda x: torch.ones_like(x, dtype=torch.bool).tril(), 0),
    "of an input": (lambda x: (x > -torch.inf).tril(), None),
    "of chance": (lambda x: (torch.rand(ROWS, KEYS) < 2).tril(), None),
    "everything": (lambda x: torch.ones(ROWS, KEYS, dtype=torch.bool), math.inf),
    "a bias of zeros": (lambda x: torch.zeros(ROWS, KEYS), math.inf),
    "all rows, but one key": (lambda x: _written(lambda m: m[:, :-1].fill_(True)), None),
    "one row differs": (lambda x: _written(lambda m: m[17, 30].fill_(True)), None),
    "one head differs": (
        lambda x: torch.stack([torch.ones(ROWS, KEYS).tril(k) == 1 for k in (0, 0, 1)])[None],
        None,
    ),
    "expanded": (lambda x: torch.ones(ROWS, KEYS).tril().bool().expand(2, 3, ROWS, KEYS), 0),
}


def _written(write: Callable[[Tensor], Any]) -> Tensor:
    mask = torch.ones(ROWS, KEYS, dtype=torch.bool).tril()
    write(mask)
    return mask


def _positions(rule: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    return rule(torch.arange(ROWS)[:, None], torch.arange(KEYS)[None, :])


@pytest.mark.parametrize("name", MASKS)
def test_offset_of_a_mask_of_constants(name: str) -> None:
    function, expected = MASKS[name]
    graph = graph_of(lambda x: (function(x), x + 1), _example())
    assert _offset(graph) == expected


@pytest.mark.parametrize("name", MASKS)
def test_computed_by_rows_it_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "BYTES", 4000)
    function, expected = MASKS[name]
    graph = graph_of(lambda x: (function(x), x + 1), _example())
    assert _offset(graph) in (expected, None)
    if name in {"tril", "arange by keyword", "additive", "expanded", "ones like an input"}:
        assert _offset(graph) == expected


def _example() -> Tensor:
    return torch.randn(ROWS, KEYS)


def _offset(graph: Any) -> float | None:
    output = next(n for n in graph.nodes if n.op == "output")
    mask = output.args[0][0]
    return Constants(Memory(graph)).offset(mask, output, (ROWS, KEYS))


def test_a_large_mask_stays_within_time_and_memory() -> None:
    """At 8,192 rows in chunks; what takes too long stays a mask."""

    def positions(x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.arange(8192)[:, None] >= torch.arange(8192), x + 1

    graph = graph_of(positions, torch.randn(3))
    output = next(n for n in graph.nodes if n.op == "output")
    mask = output.args[0][0]
    found = Constants(Memory(graph))
    found._seconds = 60.0  # a busy machine
    assert found.offset(mask, output, shape_of(mask)) == 0
    late = Constants(Memory(graph))
    late._seconds = 0.0
    start = time.perf_counter()
    assert late.offset(mask, output, shape_of(mask)) is None
    assert time.perf_counter() - start < 1.0


LONG = 3001


def _halves(i: Tensor, j: Tensor) -> Tensor:
    return (j <= i) & (i + i != torch.arange(LONG)[-1])


def _of_texts(start: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """As transformers does: row and key must be in the same text, which are counted."""

    def rule(i: Tensor, j: Tensor) -> Tensor:
        text = start.cumsum(-1)
        return (j <= i) & (text[i] == text[j])

    return rule


GLOBAL = [700 <= i < 710 for i in range(LONG)]


def _some_rows(i: Tensor, j: Tensor) -> Tensor:
    return (j <= i) | torch.tensor(GLOBAL)[:, None]


def _times(i: Tensor, j: Tensor) -> Tensor:
    time = torch.arange(0.0, 1.0, 1 / LONG)[:LONG]
    return (j <= i) | ((time >= 0.2) & (time < 0.21))[:, None]


def _one_row_written(i: Tensor, j: Tensor) -> Tensor:
    mask = j <= i
    mask[700, 2000] = True
    return mask


def _table_written(i: Tensor, j: Tensor) -> Tensor:
    rows = torch.zeros(LONG, dtype=torch.int64)
    rows[torch.arange(LONG) == 700] = 1
    return (j <= i) | (rows[:, None] > 0)


def _tenth(i: Tensor, j: Tensor) -> Tensor:
    text = ((torch.arange(LONG) & 63) == 63).cumsum(-1)
    return (j <= i) & (text[i] != 10)


def _as_transformers(i: Tensor, j: Tensor) -> Tensor:
    positions = torch.arange(LONG)[None]
    steps = torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1)
    text = (steps != 1).cumsum(-1)
    batch, i, j = torch.arange(1)[:, None, None, None], i[None, None], j[None, None]
    seen = i.new_ones((), dtype=torch.bool) & (positions[batch, j] <= positions[batch, i])
    return (seen & (text[batch, i] == text[batch, j])).expand(1, -1, LONG, LONG)


LARGE: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], int | None]] = {
    "causal": (lambda i, j: j <= i, 0),
    "as transformers": (_as_transformers, 0),
    "tril": (lambda i, j: torch.ones(LONG, LONG).tril() == 1, 0),
    "triu": (lambda i, j: torch.full((LONG, LONG), -torch.inf).triu(1), 0),
    "expanded": (lambda i, j: (j <= i).expand(2, 1, LONG, LONG), 0),
    "window": (lambda i, j: (j <= i) & (j > i - 2000), None),
    "narrow window": (lambda i, j: (j <= i) & (j > i - 7), None),
    "prefix": (lambda i, j: (j <= i) | (j < 3), None),
    "one row of many": (lambda i, j: (j <= i) & (i != 777), None),
    "one row from behind": (lambda i, j: (j <= i) & (i != LONG - 40), None),
    "the middle row": (_halves, None),
    "beyond the diagonal": (lambda i, j: (j <= i) & (i + j < LONG), None),
    "on the other diagonal": (lambda i, j: (j <= i) & (i + j != LONG), None),
    "a difference of two numbers": (lambda i, j: (j <= i) & (i + 1000 != 1900), None),
    "two texts": (_of_texts(torch.arange(LONG) == 1200), None),
    "many texts": (_of_texts((torch.arange(LONG) & 511) == 511), None),
    "the tenth text": (_tenth, None),
    "a row written to": (_one_row_written, None),
    "a row of a table written to": (_table_written, None),
    "rows of a list": (_some_rows, None),
    "rows by a time from 0 to 1": (_times, None),
    "a third of the rows": (lambda i, j: (j <= i) | (i + i == j[-1] - i), None),
    "a third, by bits": (lambda i, j: (j <= i) | (((i + i) ^ (j[-1] - i)) == 0), None),
}


@pytest.mark.parametrize("name", LARGE)
def test_a_large_mask_is_computed_where_it_could_differ(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The causal ones by a few rows; of the others each has one row, or more, that says so."""
    monkeypatch.setattr(constants, "BYTES", 1_000_000)
    rule, expected = LARGE[name]
    i, j = torch.arange(LONG)[:, None], torch.arange(LONG)
    said = rule(i, j)
    is_causal = ((said == 0 if said.is_floating_point() else said) == (j <= i)).all()
    assert is_causal == (expected == 0)

    def program(x: Tensor) -> tuple[Tensor, Tensor]:
        return rule(torch.arange(LONG)[:, None], torch.arange(LONG)), x + 1

    graph = graph_of(program, torch.randn(3))
    output = next(n for n in graph.nodes if n.op == "output")
    found, rows = Constants(Memory(graph)), []
    found._seconds = 60.0  # a busy machine
    timed = found._timed
    found._timed = lambda program, chunk: rows.append(chunk) or timed(program, chunk)  # type: ignore[method-assign,func-returns-value]
    assert found.offset(output.args[0][0], output, (LONG, LONG)) == expected
    if expected == 0:
        assert sum(chunk.stop - chunk.start for chunk in rows) < 200
        assert {0, LONG // 2, LONG - 1} <= {n for c in rows for n in range(c.start, c.stop)}


def test_layers_that_share_a_mask_compute_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen = torch.arange(q.shape[-2])[:, None] >= torch.arange(k.shape[-2])
        for _ in range(5):
            q = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen)
        seen = seen.clone()
        seen[0] = True  # the last one reads another mask
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, seen)

    computed = []
    timed = Constants._timed
    monkeypatch.setattr(
        Constants, "_timed", lambda self, *given: computed.append(1) or timed(self, *given)
    )
    inputs = [torch.randn(1, 2, 40, 32) for _ in range(3)]
    capture = run_exact(attend, inputs)
    assert [row.mask for row in capture.rows] == ["causal"] * 5 + ["bool"]
    assert len(computed) == 2 * 2  # tried and done
    assert error(capture.output, attend(*inputs)) < 1e-6


# -- symbolic sizes -------------------------------------------------------------------------------


def spelled(rule: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i, j = torch.arange(q.shape[-2])[:, None], torch.arange(k.shape[-2])
        return (q @ k.mT * 0.2).masked_fill(~rule(i, j), -torch.inf).softmax(-1) @ v

    return attend


@pytest.mark.parametrize("size", [4096, 8192])
@pytest.mark.parametrize("kind", ["window", "chunk", "prefix", "sum of two numbers"])
def test_what_is_causal_at_64_and_not_at_9000(size: int, kind: str) -> None:
    """Compiled with symbolic sizes at 64 tokens and run at 9,000."""
    rules = {
        "window": lambda i, j: (j <= i) & (j > i - size),
        "chunk": lambda i, j: (j <= i) & (i // size == j // size),
        "prefix": lambda i, j: (j <= i) | (i > size),
        "sum of two numbers": lambda i, j: (j <= i) & (j > i - 1000 - (size - 1000)),
    }
    inputs = [[torch.randn(1, 1, n, 32) for _ in range(3)] for n in (64, 9000)]
    attend = spelled(rules[kind])
    capture = run(attend, inputs[0], dynamic=True, again=[inputs[1]])
    assert capture.rows[0].mask == ("bool" if kind == "prefix" else "causal+bool")
    assert len(capture.graphs) == 1
    rows = slice(None, None, 500)
    assert error(capture.outputs[1][:, :, rows], attend(*inputs[1])[:, :, rows]) < 1e-5


def _narrow(dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda i, j: j.to(dtype).float() <= i.to(dtype).float()


def _doubled(i: Tensor, j: Tensor) -> Tensor:
    width = torch.full((), 1)
    for _ in range(7):
        width = width + width
    return (j <= i) & (j > i - width)


def _positions_doubled(i: Tensor, j: Tensor) -> Tensor:
    near, far = j + 1, i
    for _ in range(7):
        near = near + near
    return (j <= i) & (far < near)


def _beyond_any_position(i: Tensor, j: Tensor) -> Tensor:
    return (j <= i) & (i - 2**40 < j - (2**40 - 128))


@pytest.mark.parametrize(
    "rule",
    [
        lambda i, j: (j <= i) & (i - j - 40 - 40 - 40 <= 0),
        lambda i, j: (j <= i) & (j > torch.sub(i, 3, alpha=40)),
        _doubled,
        _positions_doubled,
        _beyond_any_position,
        lambda i, j: (j <= i) & (j > i.shape[0] - 140),
        _narrow(torch.int8),
        _narrow(torch.bfloat16),
    ],
    ids=[
        "a number thrice",
        "a number times another",
        "a number doubled",
        "positions doubled",
        "numbers beyond any position",
        "a number behind a size",
        "int8 positions",
        "bfloat16 positions",
    ],
)
def test_what_is_causal_at_64_and_not_at_700(rule: Callable[..., Tensor]) -> None:
    inputs = [[torch.randn(1, 1, n, 32) for _ in range(3)] for n in (64, 700)]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i, j = torch.arange(q.shape[-2])[:, None], torch.arange(k.shape[-2])
        return (q @ k.mT * 0.2).masked_fill(~rule(i, j), -1e9).softmax(-1) @ v

    capture = run(attend, inputs[0], dynamic=True, again=[inputs[1]])
    for output, given in zip(capture.outputs, inputs, strict=True):
        assert error(output, attend(*given)) < 1e-5


def test_a_window_that_the_caller_gives() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        i, j = torch.arange(q.shape[-2])[:, None], torch.arange(k.shape[-2])
        seen = (j <= i) & (j > i - 10 * window)
        return (q @ k.mT * 0.2).masked_fill(~seen, -1e9).softmax(-1) @ v

    inputs = [[*(torch.randn(1, 1, n, 32) for _ in range(3)), w] for n, w in ((24, 3), (200, 4))]
    capture = run(attend, inputs[0], dynamic=True, again=[inputs[1]])
    for output, given in zip(capture.outputs, inputs, strict=True):
        assert error(output, attend(*given)) < 1e-5


@pytest.mark.parametrize("dynamic", [False, True])
def test_causal_with_symbolic_sizes(dynamic: bool) -> None:
    inputs = [[torch.randn(1, 2, n, 32) for _ in range(3)] for n in (64, 100)]
    attend = spelled(lambda i, j: j <= i)
    capture = run(attend, inputs[0], dynamic=dynamic, again=[inputs[1]])
    assert {row.mask for row in capture.rows} == {"causal"}
    for output, given in zip(capture.outputs, inputs, strict=True):
        assert error(output, attend(*given)) < 1e-5


@pytest.mark.parametrize(
    "mask",
    [
        lambda n, m: torch.arange(m) <= torch.arange(n)[:, None] + (m - n),
        lambda n, m: torch.arange(n)[:, None] + (m - n) - torch.arange(m) >= 0,
        lambda n, m: torch.arange(n)[:, None] - torch.arange(m) >= 0,
        lambda n, m: (torch.arange(m)[None] - torch.arange(n)[:, None]) < 1,
    ],
)
def test_sums_that_stay_causal_with_symbolic_sizes(mask: Callable[[Any, Any], Tensor]) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        hidden = ~mask(q.shape[-2], k.shape[-2])
        return (q @ k.mT * 0.2).masked_fill(hidden, -torch.inf).softmax(-1) @ v

    inputs = [[torch.randn(1, 1, n, 32) for _ in range(3)] for n in (64, 100)]
    capture = run(attend, inputs[0], dynamic=True, again=[inputs[1]])
    assert {row.mask for row in capture.rows} == {"causal"}
    assert error(capture.outputs[1], attend(*inputs[1])) < 1e-5


def _of_batches(rule: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, i, j = (
            torch.arange(n)[place]
            for n, place in zip(q.shape[::2] + k.shape[2:3], _PLACES, strict=True)
        )
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, rule(b, i, j))

    return attend


_PLACES = ((..., None, None, None), (None, None, slice(None), None), (None, None, None))


@pytest.mark.parametrize(
    ("rule", "mask"),
    [
        (lambda b, i, j: (j <= i) & (b >= 0), "causal"),
        (lambda b, i, j: (j <= i) | (b > 5), "bool"),
        (lambda b, i, j: (j <= i) & (b + j < 40), "causal+bool"),
        (lambda b, i, j: (j <= i) & ((b == j) | (j != 30)), "causal+bool"),
        (lambda b, i, j: ((j > i) | (b + j >= 40)) != True, "bool"),  # noqa: E712
    ],
    ids=["all alike", "beyond the sixth", "batch and key", "one key of one batch", "in one"],
)
@pytest.mark.parametrize("sizes", [((3, 24), (9, 70)), ((3, 24), (9, 24))], ids=["both", "batch"])
def test_masks_of_a_symbolic_batch(rule: Callable[..., Tensor], mask: str, sizes: Any) -> None:
    """A mask that is the same for each text may be causal, whatever the number of texts."""
    inputs = [[torch.randn(b, 2, n, 32) for _ in range(3)] for b, n in sizes]
    attend = _of_batches(rule)
    capture = run_exact(attend, inputs[0], dynamic=True, again=[inputs[1]])
    assert {row.mask for row in capture.rows} == {mask}
    for output, given in zip(capture.outputs, inputs, strict=True):
        assert error(output, attend(*given)) < 1e-6


TABLE = [i == 20 for i in range(128)]


@pytest.mark.parametrize(
    "rule",
    [
        lambda b, i, j: (j <= i) & ~((b >= 3) & (i - j >= 30)),
        lambda b, i, j: (j <= i) | torch.tensor(TABLE)[: i.shape[2], None],
        lambda b, i, j: (
            (j <= i)
            | ((t := torch.arange(0.0, 1.0, 1 / 128)[: i.shape[2], None]) > 0.2) & (t < 0.25)
        ),
    ],
    ids=["batch and length at once", "a list", "fractions"],
)
def test_masks_that_differ_at_greater_sizes_only(rule: Callable[..., Tensor]) -> None:
    attend = _of_batches(rule)
    inputs = [[torch.randn(b, 2, n, 32) for _ in range(3)] for b, n in ((2, 24), (3, 25), (5, 70))]
    for how in (run, run_exact):
        capture = how(attend, inputs[0], again=inputs[1:], dynamic=None)
        for output, given in zip(capture.outputs, inputs, strict=True):
            assert error(output, attend(*given)) < 1e-6


def _narrow_by_a_write(n: int) -> Tensor:
    x = torch.zeros(n, dtype=torch.uint8)
    x[:] = torch.arange(n)
    return x[None] > x[:, None]


def _grown_by_writes(n: int) -> Tensor:
    i, j = torch.arange(n)[:, None], torch.arange(n)
    width = torch.ones(1, dtype=torch.int64)
    for _ in range(8):
        width[:] = width + width
    return (j > i) | (i - j >= width)


def _grown_through_a_view(n: int) -> Tensor:
    i, j = torch.arange(n)[:, None], torch.arange(n)
    width = torch.ones(1, dtype=torch.int64)
    seen = width[None]
    for _ in range(8):
        torch.add(width, width, out=width)
    return (j > i) | (i - j >= seen)


def _narrow_length(n: int) -> Tensor:
    return ~(torch.arange(n) < torch.full((1,), n, dtype=torch.bfloat16))


def _chain(n: int) -> Tensor:
    i, j, end = torch.arange(n)[:, None], torch.arange(n), torch.full((1,), n)
    return (j > i) | ((i + i > j + end + 20) & (j + j > 20 + end) & (i + 20 < end))


@pytest.mark.parametrize(
    "hidden", [_narrow_by_a_write, _grown_by_writes, _grown_through_a_view, _narrow_length, _chain]
)
def test_masks_that_differ_where_no_size_is_tried(hidden: Callable[[int], Tensor]) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * 0.2).masked_fill(hidden(q.shape[2]), -torch.inf).softmax(-1) @ v

    inputs = [[torch.randn(1, 1, n, 32) for _ in range(3)] for n in (32, 401)]
    capture = run(attend, inputs[0], dynamic=True, again=inputs[1:])
    for output, given in zip(capture.outputs, inputs, strict=True):
        assert error(output, attend(*given)) < 1e-5


def test_a_batch_that_is_larger_than_the_lengths() -> None:
    attend = _of_batches(lambda b, i, j: (j <= i) & ((b < i.shape[2]) | (j == 0)))
    inputs = [[torch.randn(b, 2, n, 32) for _ in range(3)] for b, n in ((3, 32), (60, 16))]
    for how in (run, run_exact):
        capture = how(attend, inputs[0], dynamic=True, again=inputs[1:])
        for output, given in zip(capture.outputs, inputs, strict=True):
            assert error(output, attend(*given)) < 1e-6


def test_a_large_table_of_which_one_row_is_read_is_not_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(constants, "BYTES", 1_000_000)
    made = []
    run_program = constants._Program.run
    monkeypatch.setattr(
        constants._Program, "run", lambda self, *given: made.append(1) or run_program(self, *given)
    )

    def last_row(x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones(LONG, LONG, dtype=torch.bool).tril()[LONG - 1 :], x + 1

    graph = graph_of(last_row, torch.randn(3))
    output = next(n for n in graph.nodes if n.op == "output")
    assert Constants(Memory(graph)).offset(output.args[0][0], output, (1, LONG)) is None
    assert not made


def test_a_mask_that_goes_by_how_many_more_keys_there_are() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, (j <= i) | (j > i[-1] + 100)
        )

    inputs = [[torch.randn(2, 2, m, 32) for m in (n, k, k)] for n, k in ((24, 30), (40, 300))]
    for tensor in inputs[0]:
        torch._dynamo.mark_dynamic(tensor, 2)
    capture = run(attend, inputs[0], again=inputs[1:])
    for output, given in zip(capture.outputs, inputs, strict=True):
        assert error(output, attend(*given)) < 1e-6


def test_a_symbolic_batch_of_long_texts() -> None:
    """Of one length, which is no number that anything is compared with: known within the time."""
    inputs = [[torch.randn(b, 1, 1500, 16) for _ in range(3)] for b in (2, 3)]
    for tensor in inputs[0]:
        torch._dynamo.mark_dynamic(tensor, 0)
    attend = _of_batches(lambda b, i, j: (j <= i) & (b >= 0))
    capture = run_exact(attend, inputs[0], again=[inputs[1]])
    assert len(capture.graphs) == 1
    assert capture.row.mask == "causal"
    assert error(capture.outputs[1], attend(*inputs[1])) < 1e-6


# -- numbers --------------------------------------------------------------------------------------


def test_a_fill_value_that_was_written_is_read_as_it_is() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        low = torch.full((), -1e9)
        low.fill_(0.0)
        return torch.where(keep, q @ k.mT * 0.2, low).softmax(-1) @ v

    q, k, v = (torch.randn(1, 2, 24, 32) for _ in range(3))
    keep = torch.rand(24, 24) > 0.3
    capture = run(attend, [q, k, v, keep])
    assert capture.codes == {"scores-edited"}
    assert error(capture.output, attend(q, k, v, keep)) < 1e-6


def test_a_fill_value_made_in_place_hides() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        low = torch.zeros(())
        low.sub_(1e9)
        return torch.where(keep, q @ k.mT * 0.2, low).softmax(-1) @ v

    q, k, v = (torch.randn(1, 2, 24, 32) for _ in range(3))
    keep = torch.rand(24, 24) > 0.3
    for capture in (run(attend, [q, k, v, keep]), run_exact(attend, [q, k, v, keep])):
        assert error(capture.output, attend(q, k, v, keep)) < 1e-5
    assert run(attend, [q, k, v, keep]).row.decision == "distr"
