"""A and B of ``projection`` from the CPU kernel against PyTorch's, both held to fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from distr_compile.kernels.projection import cpu as cpu_projection
from distr_compile.kernels.projection import library
from distr_compile.kernels.projection.cpu import start_from
from distr_compile.kernels.roles import Asked
from tests.kernels.cpu_kernel import require_kernel


@pytest.fixture(autouse=True)
def kernel() -> None:
    require_kernel()


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def in_groups(
    Q: Tensor, K: Tensor, counts: tuple[Tensor | None, Tensor | None], at_once: int, **options: Any
) -> list[tuple[Tensor, Tensor]]:
    """A and B of every block, ``at_once`` blocks a call."""
    rank, blocks = options.pop("rank"), -(-Q.shape[3] // options["block"])
    start, carry, found = start_from(Q.shape[-1], rank, options.pop("seed")), None, []
    for first in range(0, blocks, at_once):
        number = min(at_once, blocks - first)
        AT, B, carry = library.projection_bases(
            Q, K, *counts, start, carry, first_block=first, blocks=number, **options
        )
        assert (B[..., rank:] == 0).all()
        found += [(AT[:, i].mT, B[:, i, :, :rank]) for i in range(number)]
    return found


CASES: dict[str, dict[str, Any]] = {
    "plain": {"d": 64, "rank": 32},
    "two rounds": {"d": 128, "rank": 64, "rounds": 2, "rep": 1},
    "odd sizes": {"d": 72, "rank": 23, "causal_offset": 3, "block": 33},
    "strict": {"d": 64, "rank": 16, "strict": True, "causal_offset": 0, "rep": 3, "block": 64},
    "strict, shifted": {"d": 40, "rank": 17, "strict": True, "causal_offset": -30, "block": 50},
    "several pieces": {"d": 40, "rank": 17, "N": 5000, "M": 4100, "block": 2500},
    "a long key": {"d": 32, "rank": 32, "M": 9000, "N": 40},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_same_product_of_bases(name: str, counted: bool, dtype: torch.dtype) -> None:
    case = {"N": 300, "M": 200, "rep": 2, "block": 100, "rounds": 1, "strict": False, **CASES[name]}
    d, N, M, rep = (case.pop(size) for size in ("d", "N", "M", "rep"))
    options: dict[str, Any] = {"causal_offset": None, "seed": 0, **case}
    decay = torch.logspace(0, -1, d)
    Q, K = (draw(2, 3, rep, N, d) * decay).to(dtype), (draw(1, 3, M, d, seed=1) * decay).to(dtype)
    counts: tuple[Tensor | None, Tensor | None] = (None, None)
    if counted:
        counts = (draw(2, 3, rep, N) > -1, draw(1, 1, M) > -0.5)
    rows = {"panel": 2048, "key_rows": 4096}
    asked = Asked("projection", **options, **rows)
    exact = list(cpu_projection.bases(Q.double(), K.double(), *counts, asked))
    same = list(cpu_projection.bases(Q, K, *counts, asked))
    got = in_groups(Q, K, counts, 2, **options)
    assert len(got) == len(exact)
    for i, ((A, B), (A1, B1), (A2, B2)) in enumerate(zip(exact, same, got, strict=True)):
        if options["strict"] and i * options["block"] + options["causal_offset"] <= 0:
            continue  # no rows or keys before the block: of no use
        product = A @ B.mT
        limit, error = (
            ((a.double() @ b.double().mT) - product).norm() / product.norm()
            for a, b in ((A1, B1), (A2, B2))
        )
        assert error <= 2 * limit + 1e-6
        # Balanced alike: a wrong power of two would be at least 2. Directions that rounding fills
        # in, where few keys count, are anybody's.
        assert 0.8 < A2.norm() / A.norm() < 1.25
        assert 0.8 < B2.norm() / B.norm() < 1.25


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(1, 1e6), (1e6, 1), (1e-6, 1), (1e-30, 1e25), (1e15, 1e-10)])
def test_rows_of_very_different_size(sizes: tuple[float, float], dtype: torch.dtype) -> None:
    """The first 150 keys of one size, the others of another; in units that change on the way."""
    size = torch.where(torch.arange(400) < 150, *sizes)[:, None]
    Q, K = draw(1, 1, 1, 100, 32).to(dtype), (draw(1, 1, 400, 32, seed=1) * size).to(dtype)
    options: dict[str, Any] = {"rank": 16, "rounds": 1, "seed": 0, "block": 100, "strict": False}
    wide = Q.double(), K.double(), None, None
    rows = {"panel": 100, "key_rows": 400}
    ((A, B),) = cpu_projection.bases(*wide, Asked("projection", **options, **rows))
    ((A1, B1),) = in_groups(Q, K, (None, None), 1, causal_offset=None, **options)
    product = A @ B.mT
    assert ((A1.double() @ B1.double().mT) - product).norm() <= 1e-5 * product.norm()


@pytest.mark.parametrize("strict", [False, True])
def test_bits_do_not_depend_on_threads_nor_groups(strict: bool) -> None:
    Q, K = draw(1, 2, 2, 300, 40), draw(1, 2, 300, 40, seed=1)
    options = {"causal_offset": 0, "strict": strict, "block": 64, "rounds": 1}
    before, found = torch.get_num_threads(), []
    try:
        for threads, at_once in ((1, 5), (2, 5), (3, 2), (1, 1)):
            torch.set_num_threads(threads)
            found.append(in_groups(Q, K, (None, None), at_once, rank=16, seed=3, **options))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for (A, B), (A1, B1) in zip(found[0], other, strict=True):
            assert torch.equal(A, A1)
            assert torch.equal(B, B1)


@pytest.mark.parametrize("value", [0.0, 1.0, 1e15, 1e-30, 1e-44])
def test_degenerate_rows_give_finite_bases(value: float) -> None:
    """Constant rows, of rank 1: what is missing of a basis is filled up."""
    rows = torch.full((1, 1, 1, 50, 32), value)
    for rank in (16, 31, 32):
        options = {"block": 50, "rounds": 2, "causal_offset": None, "strict": False}
        for K in (rows[0], draw(1, 1, 50, 32)):
            ((A, B),) = in_groups(rows, K, (None, None), 1, rank=rank, seed=0, **options)
            assert A.isfinite().all()
            assert B.isfinite().all()
            torch.testing.assert_close(A.mT @ B, torch.eye(rank)[None], rtol=0, atol=2e-3)
