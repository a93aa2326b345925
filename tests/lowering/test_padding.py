"""A sequence in a padded batch comes out as it does alone: the definition, the CPU, the kernels.

Each batch has entries with padding on the right, on the left and on both sides, and what is padded
holds large numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from distr_compile.estimators import ESTIMATORS, MOST_AUTO_BLOCKS, auto_grouping_block, most_blocks
from distr_compile.kernels.attention import reference
from distr_compile.kernels.counted import (
    Span,
    counted_rows,
    first_rows,
    spans,
    strict_spans,
)
from distr_compile.kernels.places import places
from distr_compile.kernels.roles import Asked
from distr_compile.lowering import cpu
from distr_compile.lowering import op as op_module
from distr_compile.lowering.call import call_of
from tests.kernels.cpu_kernel import require_kernel
from tests.walk import by_kernels as walked

assert op_module  # registers it
op: Any = torch.ops.distr.attention
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RANK, WIDTH, VALUES = 16, 32, 24

Run = Callable[..., Tensor]


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def bases() -> tuple[Tensor, Tensor]:
    A, B = (draw(2, WIDTH, RANK, seed=seed) / WIDTH**0.5 for seed in (7, 8))
    return A.float(), B.float()


def by_definition(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
    given = bases() if options["estimator"] == "calibrated" else None
    return reference.attention(q, k, v, mask, bases=given, **options)


def on_cpu(fused: bool, dtype: torch.dtype) -> Run:
    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
        q, k, v = (t.to(dtype) for t in (q, k, v))
        out = torch.full((*q.shape[:3], VALUES), torch.nan, dtype=dtype)
        given = bases() if options["estimator"] == "calibrated" else None
        cpu.run(call_of(q, k, v, mask, bases=given, out=out, **options), fused=fused)
        return out.double()

    return run


def by_kernels(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
    q, k, v = (t.float().to(DEVICE) for t in (q, k, v))
    out = torch.full((*q.shape[:3], VALUES), torch.nan, device=DEVICE)
    mask = None if mask is None else mask.to(DEVICE)
    return walked(q, k, v, mask, out=out, **options).double().cpu()


RUNS: dict[str, tuple[Run, float]] = {
    "definition": (by_definition, 1e-9),
    "products": (on_cpu(False, torch.float64), 1e-9),
    "products, fp32": (on_cpu(False, torch.float32), 1e-5),
    "fused": (on_cpu(True, torch.float32), 1e-5),
}
ESTIMATOR = {
    **{name: {"estimator": name} for name in ESTIMATORS},
    "projection, two rounds": {"estimator": "projection", "rounds": 2},
    "projection, block": {"estimator": "projection", "grouping_block": 48},
    "lsh-mean, block": {"estimator": "lsh-mean", "grouping_block": 50},
}
CAUSAL = ("", "by the call", "by the mask", "by a bias")
STRICT = {
    "strict": {"estimator": "projection", "strict": True},
    "strict, block": {"estimator": "projection", "strict": True, "grouping_block": 24},
    "strict, two rounds": {
        "estimator": "projection",
        "strict": True,
        "grouping_block": 40,
        "rounds": 2,
    },
}
"""Options of the forms in which a row depends on no later one."""


def padded_inputs(
    lengths: tuple[int, ...], tokens: int, heads: tuple[int, int] = (4, 2)
) -> tuple[list[Tensor], Tensor, list[slice]]:
    """Q, K and V, which keys are real, and where each entry's rows are: right, left, both."""
    real = []
    for i, n in enumerate(lengths):
        first = (0, tokens - n, (tokens - n) // 2)[i % 3]
        real.append(slice(first, first + n))
    keep = torch.zeros(len(lengths), 1, 1, tokens, dtype=torch.bool)
    for i, rows in enumerate(real):
        keep[i, ..., rows] = True
    H, Hk = heads
    sizes = ((H, WIDTH), (Hk, WIDTH), (Hk, VALUES))
    tensors = [draw(len(lengths), h, tokens, d, seed=s) for s, (h, d) in enumerate(sizes)]
    q, k, v = (torch.where(keep[:, 0, 0, None, :, None], t, 1e3 * t) for t in tensors)
    return [q, k, v], keep, real


def check(
    run: Run,
    tolerance: float,
    lengths: tuple[int, ...],
    tokens: int,
    causal: str = "",
    heads: tuple[int, int] = (4, 2),
    alone: Run | None = None,
    **options: Any,
) -> None:
    """Real rows of a padded batch beside each entry alone, which says "causal" in the call."""
    tensors, mask, real = padded_inputs(lengths, tokens, heads)
    options = {"rank": RANK, "scale": 0.2, "grouping_block": 0, **options}
    if causal in ("by the mask", "by a bias"):
        mask = mask & torch.ones(tokens, tokens, dtype=torch.bool).tril()
    if causal == "by a bias":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    together = run(*tensors, mask, is_causal=causal == "by the call", **options)
    for i, rows in enumerate(real):
        own = [t[i : i + 1, :, rows] for t in tensors]
        wanted = (alone or run)(*own, None, is_causal=bool(causal), **options)
        torch.testing.assert_close(together[i : i + 1, :, rows], wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize("estimator", ESTIMATOR)
@pytest.mark.parametrize("name", RUNS)
def test_a_padded_sequence_is_what_it_is_alone(name: str, estimator: str, causal: str) -> None:
    if name == "fused":
        require_kernel()
    run, tolerance = RUNS[name]
    check(run, tolerance, (20, 61, 130, 197), 200, causal, **ESTIMATOR[estimator])


@pytest.mark.parametrize("causal", ["", "by the mask"])
@pytest.mark.parametrize("estimator", ESTIMATOR)
def test_lengths_to_4096_and_their_own_blocks(estimator: str, causal: str) -> None:
    """The op, fp32: "auto" takes other blocks of 4096 rows than of any of these lengths."""
    require_kernel()
    given = bases() if estimator == "calibrated" else (None, None)

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
        out: Tensor = op(*(t.float() for t in (q, k, v)), mask, *given, **options)
        return out

    lengths = (20, 512, 1000) if causal else (20, 513, 3000, 4096, 2048)
    tokens = 4096 if not causal else 2048
    check(run, 1e-5, lengths, tokens, causal, heads=(2, 2), **ESTIMATOR[estimator])


@pytest.mark.parametrize("causal", ["by the call", "by the mask", "by a bias"])
@pytest.mark.parametrize("form", STRICT)
@pytest.mark.parametrize("name", RUNS)
def test_a_padded_sequence_in_the_strict_form(name: str, form: str, causal: str) -> None:
    if name == "fused":
        require_kernel()
    run, tolerance = RUNS[name]
    check(run, tolerance, (20, 61, 130, 197), 200, causal, **STRICT[form])


@pytest.mark.parametrize("causal", ["by the call", "by the mask"])
def test_lengths_to_4096_in_the_strict_form(causal: str) -> None:
    """The op, fp32: blocks of 512 rows from the first real one on."""
    require_kernel()

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
        out: Tensor = op(*(t.float() for t in (q, k, v)), mask, **options)
        return out

    lengths, tokens = ((20, 513, 3000, 4096, 2048), 4096)
    if causal == "by the mask":
        lengths, tokens = (20, 1100, 1500), 2048
    check(run, 1e-5, lengths, tokens, causal, heads=(2, 2), **STRICT["strict"])


@pytest.mark.parametrize(("causal", "workspace"), [("by the mask", 1), ("by a bias", 30_000)])
def test_kernels_in_the_strict_form(causal: str, workspace: int) -> None:
    def run(*tensors: Any, **more: Any) -> Tensor:
        return by_kernels(*tensors, workspace=workspace, **more)

    options = {"estimator": "projection", "strict": True, "grouping_block": 16}
    check(run, 1e-5, (40, 33), 50, causal, heads=(2, 1), **options)
    # The kernels alone are so far from the definition: 32 rows make a basis of rank 16.
    check(run, 5e-5, (40, 33), 50, causal, heads=(2, 1), alone=by_definition, **options)


@pytest.mark.parametrize("form", [*STRICT, "projection, block", "lsh-mean, block"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_gradients_of_real_rows(form: str, dtype: torch.dtype, tolerance: float) -> None:
    """Beside those of each sequence alone: by products in fp64, by the fused kernel in fp32."""
    require_kernel()
    options = {"rank": RANK, "scale": 0.2, **(STRICT | ESTIMATOR)[form]}
    options = {"grouping_block": 0, **options}
    tensors, keep, real = padded_inputs((61, 130, 77), 150)
    mask = keep & torch.ones(150, 150, dtype=torch.bool).tril()
    weights = draw(3, 4, 150, VALUES, seed=5).to(dtype)
    leaves = [t.to(dtype).requires_grad_() for t in tensors]
    out = op(*leaves, mask, **options)
    (out * weights).masked_fill(~keep[:, 0, 0, None, :, None], 0).sum().backward()
    for i, rows in enumerate(real):
        own = [t[i : i + 1, :, rows].to(dtype).detach().requires_grad_() for t in tensors]
        alone = op(*own, None, is_causal=True, **options)
        (alone * weights[i : i + 1, :, rows]).sum().backward()
        for mine, theirs in zip(leaves, own, strict=True):
            assert mine.grad is not None
            got = mine.grad[i : i + 1, :, rows]
            torch.testing.assert_close(got, theirs.grad, rtol=tolerance, atol=tolerance)


def test_the_first_row_that_counts_hangs_on_no_later_part_of_the_mask() -> None:
    """Of a mask of keys and of one of rows and keys; what is later changes nothing."""
    keep = of_lengths((0, 30), (7, 40), (13, 50), tokens=300)
    keep[2, ..., 200:] = True
    for mask in (keep, keep & torch.ones(300, 300, dtype=torch.bool).tril()):
        bias = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
        for each in (mask, bias):
            assert first_rows(each, 300, 300, 0) == [0, 7, 13]
            assert first_rows(each, 300, 300, 5) == [0, 2, 8] or mask.shape[2] > 1
    late = of_lengths((290, 300), (0, 0), tokens=300)
    assert first_rows(late, 300, 300, 0) == [290, 0], "an entry without any row begins with row 0"
    found = strict_spans(keep, (3, 300, 300), lambda n: 64, 0)
    assert found == [
        Span(slice(0, 1), 0, 300, 64),
        Span(slice(1, 2), 7, 300, 64),
        Span(slice(2, 3), 13, 300, 64),
    ]
    assert strict_spans(late, (2, 300, 300), lambda n: 64, 0) == [
        Span(slice(0, 1), 0, 300, 300),
        Span(slice(1, 2), 0, 300, 64),
    ]


CHANGES = [
    ("projection", "by the mask", 1 << 28, 0),
    ("projection", "by the call", 1 << 28, 20),
    ("projection", "by a bias", 1, 20),
    ("projection", "", 30_000, 20),
    ("lsh-signed", "by the mask", 1, 20),
    ("lsh-sample", "by the call", 30_000, 0),
    ("lsh-mean", "", 1 << 28, 30),
]


@pytest.mark.parametrize(("estimator", "causal", "workspace", "block"), CHANGES)
def test_kernels(estimator: str, causal: str, workspace: int, block: int) -> None:
    """Interpreted without a GPU, in chunks of heads, of entries and of blocks."""
    options = {"estimator": estimator, "grouping_block": block}

    def run(*tensors: Any, **more: Any) -> Tensor:
        return by_kernels(*tensors, workspace=workspace, **more)

    check(run, 2e-5, (40, 33), 50, causal, heads=(2, 1), alone=by_definition, **options)


def test_other_blocks_are_what_the_test_is_about() -> None:
    """Held to blocks that begin with row 0 and have the size of all rows, the check fails."""

    def as_if_none_were_padded(*tensors: Any, **options: Any) -> Tensor:
        options |= {"grouping_block": auto_grouping_block(tensors[0].shape[2], "projection")}
        return by_definition(*tensors, **options)

    with pytest.raises(AssertionError):
        check(
            as_if_none_were_padded, 1e-3, (512,), 600, estimator="projection", alone=by_definition
        )


def test_every_row_is_written_and_none_without_keys() -> None:
    """Entries without any real row, among others; what is padded is finite."""
    (q, k, v), keep, _ = padded_inputs((20, 30, 25), 40)
    keep[1] = False
    for estimator in ("projection", "lsh-mean"):
        options = {"rank": RANK, "scale": 0.2, "estimator": estimator, "grouping_block": 8}
        for run, _ in RUNS.values():
            out = run(q, k, v, keep, **options)
            assert out.isfinite().all()
            assert (out[1] == 0).all()


# --- where the blocks lie ---------------------------------------------------------------------


def of_lengths(*real: tuple[int, int], tokens: int) -> Tensor:
    keep = torch.zeros(len(real), 1, 1, tokens, dtype=torch.bool)
    for i, (first, stop) in enumerate(real):
        keep[i, ..., first:stop] = True
    return keep


def places_on_host(mask: Tensor, block: int, by_place: bool, causal_offset: int | None) -> Any:
    tokens = mask.shape[-1]
    counts = counted_rows(mask, tokens, tokens, 1, 1)
    sizes = (len(mask), tokens, tokens)
    return spans(
        mask, counts, sizes, lambda n: block, causal_offset=causal_offset, by_place=by_place
    )


def test_entries_alike_go_together() -> None:
    mask = of_lengths((0, 30), (0, 40), (0, 25), (10, 50), (10, 45), (0, 50), tokens=50)
    assert places_on_host(mask, 20, False, None) == [
        Span(slice(0, 3), 0, 40, 20),
        Span(slice(3, 5), 10, 50, 20),
        Span(slice(5, 6), 0, 50, 20),
    ]
    # A block that holds all real rows holds all others as well, if the places do not matter.
    assert places_on_host(mask, 64, False, None) == [Span(slice(0, 6), 0, 50, 50)]
    assert places_on_host(mask, 64, True, None) == [
        Span(slice(0, 3), 0, 50, 50),
        Span(slice(3, 5), 10, 50, 40),
        Span(slice(5, 6), 0, 50, 50),
    ]


def test_keys_that_no_row_of_a_block_sees_have_no_part() -> None:
    mask = of_lengths((0, 30), (0, 50), tokens=50) & torch.ones(50, 50, dtype=torch.bool).tril()
    seen = [span.seen for span in places_on_host(mask, 20, False, None)]
    assert seen == [(20, 50), (20, 40, 50)]
    asked = Asked("projection", 16, 20, given_block=20)
    queries, _ = counted_rows(mask, 50, 50, 1, 1)
    on_device = places(mask, queries, 2, 50, asked, keys_count=True)
    assert on_device.ends.tolist() == [[0, 50, 0, 30, 20], [0, 50, 0, 50, 20]]
    assert on_device.seen.tolist() == [[20, 30, 30], [20, 40, 50]]
    later = on_device.part(slice(0, 2), slice(2, 4))
    assert later.ends.tolist() == [[0, 0, 0, 0, 1], [40, 50, 40, 50, 20]]
    assert later.blocks == 1


@pytest.mark.parametrize("name", ESTIMATORS)
def test_auto_takes_tensors_and_makes_few_blocks(name: str) -> None:
    block_of = ESTIMATORS[name].auto_block
    rows = torch.tensor([1, 17, 100, 512, 513, 2047, 4096, 4097, 8192, 8193, 9001, 16385, 10**5])
    of_tensors = block_of(rows, torch.minimum, lambda x, y: y.clamp(min=x))
    assert of_tensors.tolist() == [auto_grouping_block(n, name) for n in rows.tolist()]
    sizes = [*range(1, 9000), *range(9000, 10**5, 97)]
    assert max(-(-n // block_of(n)) for n in sizes) <= MOST_AUTO_BLOCKS
    for limit in (1, 130, 700, 5000, 9000):
        some = range(1, limit + 1)
        blocks, rows_of_block = most_blocks(limit, name)
        assert blocks >= max(-(-n // block_of(n)) for n in some)
        assert rows_of_block == max(block_of(n) for n in some)
