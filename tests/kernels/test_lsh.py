"""The LSH prologue in Triton against the definition: in the interpreter, on a GPU if there is one.

Signs of sums near zero depend on rounding, so the two halves of the hash are compared apart: the
projected numbers with fp64, and the order with the reference's of the same numbers. The factors are
then compared with fp64 ones for the kernel's own order.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from distr_compile.kernels.attention import reference
from distr_compile.kernels.lsh import launch as lsh
from distr_compile.kernels.lsh.reference import order_of_projected
from distr_compile.kernels.random import projections

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# Triton's interpreter multiplies and adds bf16 as if it were integers.
DTYPES = [torch.float16, torch.float32, *([torch.bfloat16] if ON_GPU else [])]

SHAPES = [
    # B, H, Hk, N, M, d, group size, grouping block
    (1, 2, 2, 1, 1, 64, 2, 16),
    (2, 2, 1, 17, 5, 32, 2, 16),
    (1, 2, 2, 197, 131, 24, 2, 100),
    (2, 4, 2, 197, 60, 40, 2, 16),
    (1, 1, 1, 1000, 129, 72, 3, 1000),
    (1, 3, 1, 197, 197, 80, 5, 197),
    (1, 2, 1, 1000, 33, 96, 4, 100),
    (1, 1, 1, 100, 70, 192, 6, 100),
    (1, 1, 1, 130, 300, 128, 8, 64),
    (1, 1, 1, 40, 40, 256, 2, 32),
]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def blocks_of(Q: Tensor, block: int) -> list[Tensor]:
    return list(Q.split(block, dim=2))


def factors_of_order(
    Q: Tensor,
    K: Tensor,
    order: Tensor,
    sign: Tensor,
    group_size: int,
    estimator: str,
    block: int,
) -> tuple[Tensor, Tensor]:
    """Qhat and Khat by eq. 2 in the dtype of Q and K, for a given order and sign of the columns."""
    key_heads, rep = K.shape[1], Q.shape[1] // K.shape[1]
    Qhat, Khat = [], []
    for i, Q_block in enumerate(blocks_of(Q, block)):
        columns, signs = order[:, :, i], sign[:, :, i, None].to(Q.dtype)
        Q_block = Q_block * signs.repeat_interleave(rep, 1)
        of_queries = columns.repeat_interleave(rep, 1)[:, :, None].expand_as(Q_block)
        of_keys = columns[:, :, None].expand(-1, -1, K.shape[2], -1)
        groups = Q_block.gather(-1, of_queries).unflatten(-1, (-1, group_size))
        Qhat.append(groups[..., 0] if estimator == "lsh-sample" else groups.mean(-1))
        expanded = K.expand(Q.shape[0], key_heads, -1, -1) * signs
        Khat.append(expanded.gather(-1, of_keys).unflatten(-1, (-1, group_size)).sum(-1))
    return torch.cat(Qhat, 2), torch.stack(Khat, 2)


def assert_as_precise(got: Tensor, own: Tensor, exact: Tensor) -> None:
    """Error at most twice that of the formula in its own precision, and one rounding.

    Of fp32 on a GPU eight times: three tf32 products stand for one.
    """
    assert got.shape == exact.shape
    rounding = torch.finfo(got.dtype).eps / 2 * exact.abs().max()
    factor = 8 if ON_GPU and got.dtype == torch.float32 else 2
    bound = factor * (own.double() - exact).abs().max() + rounding
    assert (got.double() - exact).abs().max() <= bound


def projected_exactly(
    Q: Tensor, key_heads: int, block: int, seed: int, signed: bool
) -> tuple[Tensor, Tensor]:
    """``(B, H_k, num_blocks, d, 16)`` fp64: every p.q, and |p||q|."""
    numbers, sizes = [], []
    for Q_block in blocks_of(Q.double(), block):
        rows = Q_block.unflatten(1, (key_heads, -1)).transpose(2, 3).flatten(2, 3)
        P = projections(0, rows.shape[2], seed=seed).to(DEVICE, torch.float64)
        P[:, :signed] = 1
        numbers.append(rows.transpose(-1, -2) @ P)
        sizes.append(rows.norm(dim=2)[..., None] * P.norm(dim=0))
    return torch.stack(numbers, 2), torch.stack(sizes, 2)


def assert_signs_are_those_of_the_definition(
    Q: Tensor, key_heads: int, block: int, seed: int, num_chunks: int, signed: bool = False
) -> None:
    partial = lsh._project(Q, key_heads, block, seed, signed)
    assert partial.shape[3] == num_chunks
    got = partial.sum(3)
    exact, size = projected_exactly(Q, key_heads, block, seed, signed)
    assert (got - exact).abs().le(5e-5 * size).all()
    clear = (exact.abs() > 1e-4 * size) | (size == 0)  # a lone row can have a projection of 0
    assert clear.double().mean() > 0.99
    assert torch.equal((got > 0)[clear], (exact > 0)[clear])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_signs_are_those_of_the_definition(shape: tuple, dtype: torch.dtype) -> None:
    B, H, Hk, N, _, d, _, block = shape
    Q = draw(B, H, N, d, seed=N, dtype=dtype)
    num_chunks = math.ceil(min(block, N) * (H // Hk) / 512)
    for seed in (0, 2**31 + 7):
        assert_signs_are_those_of_the_definition(Q, Hk, block, seed, num_chunks)
    assert_signs_are_those_of_the_definition(Q, Hk, block, 3, num_chunks, signed=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_blocks_have_long_chunks(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lsh, "MAX_CHUNKS", 3)
    Q = draw(1, 3, 1100, 24, dtype=dtype)
    assert_signs_are_those_of_the_definition(Q, 1, 1000, 5, 3)


@pytest.mark.parametrize("width", [16, 24, 64, 72, 192])
@pytest.mark.parametrize("chunks", [1, 5])
def test_order_is_the_references_for_the_same_numbers(width: int, chunks: int) -> None:
    """Integers, so that sums are exact; with few signs, so that many columns tie."""
    generator = torch.Generator().manual_seed(width)
    partial = torch.randint(-4, 5, (2, 3, 2, chunks, width, 16), generator=generator).float()
    partial[0, :, :, :, :, 3:] = 1.0  # eight codes
    partial[1, 0, :, :, ::3] = 0.0  # zero is not positive
    partial[1, 1] = partial[1, 1, :, :, :1]  # one code
    partial[1, 2, 0, :, : width // 2] = torch.nan
    partial = partial.to(DEVICE)
    columns, places = lsh._order(partial, signed=False).unbind(-2)
    projected = partial.sum(3).transpose(-1, -2)
    wanted = order_of_projected(projected)
    assert torch.equal(columns.long(), wanted)
    assert torch.equal(places.long(), wanted.argsort(-1))

    columns, places = lsh._order(partial, signed=True).long().unbind(-2)
    turned = ~(projected[..., 0, :] > 0)
    wanted = order_of_projected(torch.where(turned[..., None, :], -projected, projected))
    assert torch.equal(torch.where(columns < 0, ~columns, columns), wanted)
    assert torch.equal(columns < 0, turned.gather(-1, wanted))
    assert torch.equal(torch.where(turned, ~places, places), wanted.argsort(-1))


@pytest.mark.parametrize("estimator", ["lsh-sample", "lsh-mean", "lsh-signed"])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(s, d) for i, s in enumerate(SHAPES) for j, d in enumerate(DTYPES) if ON_GPU or (i + j) % 2],
    ids=str,
)
def test_factors_are_sums_and_estimates_of_groups(
    shape: tuple, dtype: torch.dtype, estimator: str
) -> None:
    B, H, Hk, N, M, d, group_size, block = shape
    Q, K = draw(B, H, N, d, seed=1, dtype=dtype), draw(1, Hk, M, d, seed=2, dtype=dtype)
    options = {"grouping_block": block, "seed": 3}
    Qhat, Khat = lsh.lsh_factors(Q, K, rank=d // group_size, estimator=estimator, **options)
    order, sign = lsh.lsh_order(Q, Hk, signed=estimator == "lsh-signed", **options)
    assert Qhat.dtype == Khat.dtype == dtype
    assert torch.equal(order.sort(-1).values, torch.arange(d, device=DEVICE).expand_as(order))

    choice = (order, sign, group_size, estimator, block)
    exact = factors_of_order(Q.double(), K.double(), *choice)
    own = factors_of_order(Q, K, *choice)
    assert_as_precise(Qhat, own[0], exact[0])
    assert_as_precise(Khat, own[1], exact[1])


@pytest.mark.parametrize("estimator", ["lsh-mean", "lsh-signed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_factors_are_the_references(dtype: torch.dtype, estimator: str) -> None:
    """Numbers whose projections are exact, hence never on the wrong side of zero."""
    Q = draw(1, 4, 150, 64, seed=5).mul(4).round().to(dtype)
    K = draw(1, 2, 90, 64, seed=6, dtype=dtype)
    options = {"rank": 16, "estimator": estimator, "grouping_block": 64, "seed": 1}
    Qhat, Khat = lsh.lsh_factors(Q, K, **options)
    blocks = reference.estimate(Q.double(), K.double(), **options)
    eps = torch.finfo(dtype).eps
    for i, block in enumerate(blocks):
        got = Qhat[:, :, block.start : block.stop].double()
        torch.testing.assert_close(got, block.Qhat, rtol=eps, atol=0)
        torch.testing.assert_close(Khat[:, :, i].double(), block.Khat, rtol=eps, atol=4 * eps)


def views(x: Tensor) -> dict[str, Tensor]:
    """The same numbers in other places: each view stands in a buffer of NaN."""

    def inside(shape: tuple[int, ...], index: tuple) -> Tensor:
        buffer = x.new_full(shape, torch.nan)
        view = buffer[index]
        return view

    B, H, N, d = x.shape
    tokens_first = inside((B, N + 3, H, d + 5), (slice(None), slice(2, N + 2), slice(None)))
    cases = {
        "inside": inside((B + 1, H + 2, N + 3, d + 5), (slice(1, None), slice(2, None)))[
            :, :, 1 : N + 1, 3 : d + 3
        ],
        "tokens first": tokens_first[..., :d].transpose(1, 2),
        "columns apart": inside((B, H, N, 2 * d), (..., slice(1, None, 2))),
        "columns first": inside((B, H, d, N), (...,)).transpose(-1, -2),
    }
    for view in cases.values():
        view.copy_(x)
    return cases


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inputs_are_read_where_they_are(dtype: torch.dtype) -> None:
    Q, K = draw(2, 4, 70, 40, dtype=dtype), draw(2, 2, 50, 40, seed=1, dtype=dtype)
    options = {"rank": 10, "estimator": "lsh-mean", "grouping_block": 32, "seed": 0}
    wanted = lsh.lsh_factors(Q, K, **options)
    for (name, q), k in zip(views(Q).items(), views(K).values(), strict=True):
        for got, want in zip(lsh.lsh_factors(q, k, **options), wanted, strict=True):
            assert torch.equal(got, want), name


def test_expanded_inputs() -> None:
    Q = draw(1, 1, 33, 32).expand(2, 4, -1, -1)
    K = draw(1, 1, 20, 32, seed=1).expand(1, 2, -1, -1)
    options = {"rank": 16, "estimator": "lsh-sample", "grouping_block": 16, "seed": 0}
    wanted = lsh.lsh_factors(Q.contiguous(), K.expand(2, -1, -1, -1).contiguous(), **options)
    for got, want in zip(lsh.lsh_factors(Q, K, **options), wanted, strict=True):
        assert torch.equal(got, want)


def test_rows_may_lie_far_apart() -> None:
    """Offsets beyond 2^31 elements; of the 4 GiB only the pages of the rows are touched."""
    buffer = torch.empty(2**31 + 64, dtype=torch.float16, device=DEVICE)
    far = buffer.as_strided((1, 1, 3, 32), (0, 0, 2**30, 1))
    near = draw(1, 1, 3, 32, dtype=torch.float16)
    far.copy_(near)
    options = {"rank": 16, "estimator": "lsh-mean", "grouping_block": 2, "seed": 0}
    wanted = lsh.lsh_factors(near, near, **options)
    for got, want in zip(lsh.lsh_factors(far, far, **options), wanted, strict=True):
        assert torch.equal(got, want)


@pytest.fixture
def poisoned_memory() -> object:
    """Every fresh tensor begins as NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poisoned_memory")
def test_everything_is_written(dtype: torch.dtype) -> None:
    Q, K = draw(2, 2, 70, 24, dtype=dtype), draw(1, 1, 140, 24, seed=1, dtype=dtype)
    for estimator in ("lsh-sample", "lsh-mean"):
        options = {"rank": 12, "estimator": estimator, "grouping_block": 32, "seed": 0}
        assert all(t.isfinite().all() for t in lsh.lsh_factors(Q, K, **options))


@pytest.mark.parametrize("offset", [0, 5, 200, -40, -200])
@pytest.mark.usefixtures("poisoned_memory")
def test_causal_keys_are_written_where_a_row_sees_them(offset: int) -> None:
    block, N, M = 32, 400, 500
    Q, K = draw(1, 2, N, 64, dtype=torch.float16), draw(1, 1, M, 64, seed=1, dtype=torch.float16)
    options = {"rank": 32, "estimator": "lsh-mean", "grouping_block": block, "seed": 0}
    Qhat, Khat = lsh.lsh_factors(Q, K, **options)
    got_Qhat, got_Khat = lsh.lsh_factors(Q, K, is_causal=True, causal_offset=offset, **options)
    assert torch.equal(got_Qhat, Qhat)
    unwritten = 0
    for i in range(math.ceil(N / block)):
        last_row = min((i + 1) * block, N) - 1
        seen = min(max(last_row + offset + 1, 0), M)
        assert torch.equal(got_Khat[:, :, i, :seen], Khat[:, :, i, :seen])
        unwritten += int(got_Khat[:, :, i].isnan().any(-1).sum())
        assert not got_Khat[:, :, i, seen + 128 :].isfinite().any(), "work nobody needs"
    assert unwritten > 0


def test_heads_and_blocks_do_not_depend_on_each_other() -> None:
    """A caller may cut a call into heads and whole grouping blocks: the bits stay the same."""
    Q, K = draw(2, 4, 150, 32, dtype=torch.float16), draw(2, 2, 60, 32, seed=1, dtype=torch.float16)
    options = {"rank": 16, "estimator": "lsh-mean", "grouping_block": 64, "seed": 0}
    Qhat, Khat = lsh.lsh_factors(Q, K, **options)
    for b, h in ((0, 0), (1, 1)):
        for first, last in ((0, 1), (1, 3)):
            rows = slice(first * 64, min(last * 64, 150))
            part = lsh.lsh_factors(
                Q[b : b + 1, 2 * h : 2 * h + 2, rows], K[b : b + 1, h : h + 1], **options
            )
            assert torch.equal(part[0], Qhat[b : b + 1, 2 * h : 2 * h + 2, rows])
            assert torch.equal(part[1], Khat[b : b + 1, h : h + 1, first:last])


def test_runs_are_alike_and_seeds_are_not() -> None:
    Q, K = draw(1, 4, 1000, 64, dtype=torch.float16), draw(1, 2, 40, 64, dtype=torch.float16)
    options = {"rank": 16, "estimator": "lsh-mean", "grouping_block": 1000}
    first = lsh.lsh_factors(Q, K, seed=0, **options)
    for got, want in zip(lsh.lsh_factors(Q, K, seed=0, **options), first, strict=True):
        assert torch.equal(got, want)
    assert not torch.equal(lsh.lsh_factors(Q, K, seed=1, **options)[1], first[1])


@pytest.mark.parametrize(("N", "M"), [(0, 5), (5, 0), (0, 0)])
def test_nothing_to_do(N: int, M: int) -> None:
    Q, K = draw(1, 2, N, 32), draw(1, 2, M, 32)
    options = {"rank": 16, "estimator": "lsh-mean", "grouping_block": 16, "seed": 0}
    Qhat, Khat = lsh.lsh_factors(Q, K, **options)
    assert Qhat.shape == (1, 2, N, 16)
    assert Khat.shape == (1, 2, math.ceil(N / 16), M, 16)


def test_changes_of_the_inputs_are_seen() -> None:
    """Nothing outlives a call: the same tensors with other numbers give other factors."""
    Q, K = draw(1, 1, 40, 32), draw(1, 1, 9, 32)
    options = {"rank": 16, "estimator": "lsh-mean", "grouping_block": 64, "seed": 0}
    before = lsh.lsh_factors(Q, K, **options)
    Q.neg_()
    K.neg_()
    after = lsh.lsh_factors(Q, K, **options)
    fresh = lsh.lsh_factors(Q.clone(), K.clone(), **options)
    for got, want, old in zip(after, fresh, before, strict=True):
        assert torch.equal(got, want)
        assert not torch.equal(got, old)
