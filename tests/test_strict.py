"""The strict form of ``projection``, in which no row depends on later ones, from end to end.

The definition is held against NumPy in fp64, which takes everything apart; the CPU and the kernels
(interpreted without a GPU) against the definition. And in all of them, and through
``torch.compile``: what comes later is changed, and what came earlier stays what it was, bit by bit.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import distr_compile
from distr_compile import estimators
from distr_compile.estimators import ESTIMATORS
from distr_compile.kernels.attention import cpu as kernel
from distr_compile.kernels.attention import reference
from distr_compile.kernels.counted import counted_before
from distr_compile.kernels.projection import launch as projection
from distr_compile.kernels.projection.launch import projection_factors
from distr_compile.kernels.random import start_columns
from distr_compile.kernels.roles import prefix_edge
from distr_compile.lowering import cpu, pieces
from distr_compile.lowering import op as op_module
from distr_compile.lowering.call import call_of
from tests.walk import by_kernels

assert op_module  # registers it
op: Any = torch.ops.distr.attention
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPTIONS: dict[str, Any] = {"estimator": "projection", "strict": True, "scale": 0.2}

Array = np.ndarray[Any, Any]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def qkv(
    B: int = 2, H: int = 4, Hk: int = 2, N: int = 50, M: int = 60, d: int = 32, dv: int = 24
) -> list[Tensor]:
    return [draw(B, H, N, d), draw(B, Hk, M, d, seed=1), draw(B, Hk, M, dv, seed=2)]


# --- the definition ------------------------------------------------------------------------------


def naive_first(sees: Array, offset: int) -> int:
    """The first row of (H, N, M) that sees a key which is no later, by any head."""
    for i in range(sees.shape[1]):
        if sees[:, i, : max(i + offset + 1, 0)].any():
            return i
    return 0


def naive_counts(
    sees: Array, start: int, edge: int, *, block: int, offset: int, first: int
) -> tuple[Array, Array]:
    """Rows and keys before a block that count, from what each row (rep, N) sees, one by one."""
    num_queries, num_keys = sees.shape[1:]

    def stop_of(row: int) -> int:
        return first + ((row - first) // block + 1) * block

    def edge_after(row: int) -> int:
        return min(max(min(stop_of(row), num_queries) + offset, 0), num_keys)

    keys = np.zeros(num_keys, bool)
    for j in range(edge):
        row = next(i for i in range(first, num_queries) if edge_after(i) > j)
        keys[j] = sees[:, first : stop_of(row), j].any()
    rows = np.zeros(sees.shape[:2], bool)
    for h, i in itertools.product(range(len(sees)), range(first, start)):
        rows[h, i] = sees[h, i, : edge_after(i)].any()
        if num_queries == num_keys and offset >= 0:
            rows[h, i] &= keys[i]
    return rows[:, :start], keys[:edge]


def naive_scores(
    Q: Array, earlier: Array, K: Array, counted_keys: Array, *, rank: int, rounds: int, seed: int
) -> Array:
    """Q A B^T K^T with the span and its least squares by S itself; the ridge is d rows of Q."""
    d = Q.shape[1]
    gram = np.linalg.norm(earlier.T @ earlier)
    ridge = 2.0**-18 * 4.0 ** np.floor(np.log2(gram) / 2) if gram else 1.0
    longer = np.vstack([earlier, np.sqrt(ridge) * np.eye(d)])
    X = start_columns(d, rank, seed=seed).double().numpy()
    some = K[counted_keys] if counted_keys.any() else np.eye(d)
    S = longer @ some.T
    for _ in range(rounds):
        X, _ = np.linalg.qr(some.T @ (S.T @ (longer @ X)))
    coefficients, *_ = np.linalg.lstsq(longer @ X, longer, rcond=None)
    return Q @ X @ coefficients @ K.T


def naive_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    rank: int,
    grouping_block: int,
    scale: float,
    is_causal: bool = False,
    causal_offset: int = 0,
    rounds: int = 1,
    seed: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    **_: Any,
) -> Tensor:
    B, H, N = q.shape[:3]
    Hk, M = k.shape[1:3]
    rep, block, offset = H // Hk, grouping_block, causal_offset
    Q, K, V = (t.double().numpy() for t in (q, k, v))
    bias = np.zeros((B, H, N, M))
    if mask is not None:
        full = mask.expand(B, H, N, M)
        bias = full.double().numpy()
        if mask.dtype == torch.bool:
            bias = np.where(full.numpy(), 0.0, -np.inf)
    out = np.zeros((B, H, N, V.shape[3]))
    for b, h in np.ndindex(B, H):
        g = h // rep
        heads = slice(g * rep, (g + 1) * rep)
        S = Q[b, h] @ K[b, g].T
        first = 0 if mask is None else naive_first(bias[b] > -1e30, offset)
        for start in range(first + block, N, block):
            edge = min(max(start + offset, 0), M)
            if edge == 0:
                continue
            rows, keys = naive_counts(
                bias[b, heads] > -1e30, start, edge, block=block, offset=offset, first=first
            )
            place = slice(start, min(start + block, N))
            S[place, :edge] = naive_scores(
                Q[b, h, place],
                Q[b, heads, :start][rows],
                K[b, g, :edge],
                keys,
                rank=rank,
                rounds=rounds,
                seed=seed,
            )
        S = S * scale
        if softcap:
            S = softcap * np.tanh(S / softcap)
        S = S + bias[b, h]
        if is_causal:
            S[np.arange(M) > np.arange(N)[:, None] + offset] = -np.inf
        for i in range(N):
            seen = np.isfinite(S[i])
            if seen.any():
                sink = -np.inf if sinks is None else float(sinks[h])
                top = max(S[i, seen].max(), sink)
                weights = np.exp(S[i] - top)
                out[b, h, i] = weights @ V[b, g] / (weights.sum() + np.exp(sink - top))
    return torch.from_numpy(out)


def masks(kind: str, B: int, H: int, N: int, M: int) -> Tensor | None:
    padding = torch.arange(M) >= torch.arange(B)[:, None] * (M // 5)  # on the left
    if kind == "padding":
        return padding[:, None, None]
    if kind == "causal, padding":
        return torch.ones(N, M, dtype=torch.bool).tril(M - N) & padding[:, None, None]
    if kind == "blind rows":
        mask = torch.ones(N, M, dtype=torch.bool).tril()
        mask[[30, 41]] = False
        return mask
    if kind == "any":
        return draw(B, H, N, M, seed=5) > 0.3
    if kind == "bias":
        return draw(1, H, N, M, seed=6).masked_fill(~padding[0], -torch.inf)
    return None


CASES: dict[str, tuple[tuple[int, ...], dict[str, Any], str]] = {
    # B, H, Hk, N, M, d; options; mask
    "one row": ((1, 1, 1, 1, 1, 24), {"grouping_block": 16, "is_causal": True}, ""),
    "17 rows": ((2, 2, 1, 17, 17, 24), {"grouping_block": 8, "is_causal": True}, ""),
    "197 rows": ((1, 2, 1, 197, 197, 80), {"grouping_block": 50, "is_causal": True}, ""),
    "1000 rows": ((1, 1, 1, 1000, 1000, 40), {"grouping_block": 300, "is_causal": True}, ""),
    "one block": ((1, 2, 2, 40, 40, 24), {"grouping_block": 64, "is_causal": True}, ""),
    "cached keys": ((1, 2, 1, 40, 55, 40), {"is_causal": True, "causal_offset": 15}, ""),
    "all keys cached": ((1, 2, 2, 40, 20, 40), {"is_causal": True, "causal_offset": 20}, ""),
    "late": ((1, 2, 1, 60, 50, 40), {"is_causal": True, "causal_offset": -30}, ""),
    "fewer keys": ((2, 2, 1, 60, 35, 24), {"is_causal": True}, ""),
    "padding": ((3, 2, 1, 60, 60, 24), {"is_causal": True}, "padding"),
    "padding, late": ((3, 2, 1, 60, 60, 24), {"is_causal": True, "causal_offset": -7}, "padding"),
    "a causal mask": ((2, 2, 1, 50, 50, 24), {"rounds": 2}, "causal, padding"),
    "a mask, cached keys": ((3, 4, 2, 50, 64, 24), {"seed": 3}, "causal, padding"),
    "any mask": ((2, 4, 2, 50, 64, 24), {"is_causal": True}, "any"),
    "bias": ((1, 2, 1, 40, 40, 24), {"softcap": 1.5}, "bias"),
    "sinks": ((1, 2, 2, 40, 40, 24), {"is_causal": True, "sinks": draw(2, seed=9)}, ""),
    "sinks, all keys cached": (
        (1, 2, 2, 40, 20, 24),
        {"is_causal": True, "causal_offset": 20, "sinks": draw(2, seed=9)},
        "",
    ),
    "blind rows": ((1, 2, 1, 50, 50, 24), {}, "blind rows"),
    "neither": ((1, 4, 4, 50, 70, 40), {}, ""),
}


def case(name: str) -> tuple[list[Tensor], dict[str, Any]]:
    """Q, K, V and mask in fp32, and the options."""
    sizes, options, kind = CASES[name]
    B, H, Hk, N, M, d = sizes
    mask = masks(kind, B, H, N, M)
    inputs = [*qkv(B, H, Hk, N, M, d), *([] if mask is None else [mask])]
    return inputs, {**OPTIONS, "rank": d // 2 + 3, "grouping_block": 24, **options}


def wide(inputs: list[Tensor]) -> list[Tensor]:
    return [t if t.dtype == torch.bool else t.double() for t in inputs]


@pytest.mark.parametrize("name", CASES)
def test_the_definition_is_that_of_numpy(name: str) -> None:
    inputs, options = case(name)
    got = reference.attention(*wide(inputs), **options)
    torch.testing.assert_close(got, naive_attention(*inputs, **options), rtol=1e-7, atol=1e-7)


def test_the_first_block_and_own_keys_are_exact_the_rest_is_not() -> None:
    q, k, _ = qkv(N=60)
    blocks = reference.estimate(
        q, k, rank=16, estimator="projection", grouping_block=20, strict=True
    )
    assert [(b.start, b.stop, b.Khat.shape[2]) for b in blocks] == [
        (0, 20, 0),
        (20, 40, 20),
        (40, 60, 40),
    ]
    error = (reference.scores(q, k, blocks) - q @ k.repeat_interleave(2, 1).mT).abs().amax((0, 1))
    exact = torch.arange(60) >= torch.arange(60)[:, None] // 20 * 20
    assert error[exact].max() < 1e-5
    assert error[~exact].min() > 1e-3
    assert [prefix_edge(start, 60, -30) for start in (0, 20, 40)] == [0, 0, 10]


def test_low_rank_keys_are_exact() -> None:
    """Also for query rows that the basis has never seen."""
    q, _, v = qkv(B=1, N=90, M=90)
    k = draw(1, 2, 90, 12) @ draw(12, 32, seed=3)
    options = {"scale": 0.1, "is_causal": True}
    got = reference.attention(*wide([q, k, v]), rank=16, grouping_block=30, **OPTIONS | options)
    exact = reference.attention(*wide([q, k, v]), rank=32, **options)
    torch.testing.assert_close(got, exact, rtol=0, atol=1e-6)


def test_without_a_mask_all_rows_count() -> None:
    assert counted_before(None, 5, 5, 1, 1, block=2, causal_offset=0) == (None, None)


# --- CPU and kernels ------------------------------------------------------------------------------


def run_cpu(q: Tensor, k: Tensor, v: Tensor, *mask: Tensor, **options: Any) -> Tensor:
    out = q.new_full((*q.shape[:3], v.shape[3]), torch.nan)
    cpu.run(call_of(q, k, v, *mask, out=out, **options), fused=kernel.available(q.dtype))
    return out


def run_kernels(
    q: Tensor, k: Tensor, v: Tensor, *mask: Tensor, sinks: Tensor | None = None, **options: Any
) -> Tensor:
    q, k, v, *mask = (t.to(DEVICE) for t in (q, k, v, *mask))
    out = q.new_full((*q.shape[:3], v.shape[3]), torch.nan)
    sinks = None if sinks is None else sinks.to(DEVICE)
    return by_kernels(q, k, v, *mask, sinks=sinks, out=out, **options).cpu()


def check(run: Callable[..., Tensor], name: str, dtype: torch.dtype = torch.float32) -> None:
    """Within four times the error of the definition in fp32, with the condition of S in it.

    That error hangs on the last bits: inputs moved by less than one rounding change it from 2e-6 to
    1.4e-4 ("17 rows"). So it is the largest of nine, the inputs as they are and moved eight times.
    """
    inputs, options = case(name)
    inputs = [t if t.dtype == torch.bool else t.to(dtype) for t in inputs]
    got = run(*inputs, **options)
    exact = reference.attention(*wide(inputs), **options)
    single = [t if t.dtype == torch.bool else t.float() for t in inputs]
    moved = [[_nearly(t, seed) for t in single] for seed in range(8)]
    own = max((reference.attention(*x, **options) - exact).abs().max() for x in (single, *moved))
    rounding = torch.finfo(dtype).eps * exact.abs().max()
    assert got.dtype == dtype
    assert (got - exact).abs().max() <= 4 * own + 2 * rounding


def _nearly(t: Tensor, seed: int) -> Tensor:
    """The same numbers, each moved by less than one rounding in fp32."""
    if t.dtype == torch.bool:
        return t
    noise = torch.rand(t.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return t * (1 + torch.finfo(torch.float32).eps * noise)


@pytest.mark.parametrize("cut", ["whole", "small"])
@pytest.mark.parametrize("name", CASES)
def test_cpu(name: str, cut: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if cut == "small":
        monkeypatch.setattr(pieces, "CHUNK", 2048)
        monkeypatch.setattr(pieces, "PANEL_ROWS", 24)
        monkeypatch.setattr(pieces, "KEY_ROWS", 20)
    check(run_cpu, name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cpu_in_half_precision(dtype: torch.dtype) -> None:
    check(run_cpu, "padding", dtype)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("17 rows", torch.float32),
        ("one row", torch.float32),
        ("cached keys", torch.float16),
        ("all keys cached", torch.float32),
        ("late", torch.float32),
        ("a causal mask", torch.float32),
        ("bias", torch.float32),
        ("sinks", torch.float32),
        ("sinks, all keys cached", torch.float32),
        ("blind rows", torch.float32),
    ],
)
def test_kernels(name: str, dtype: torch.dtype) -> None:
    check(run_kernels, name, dtype)


def test_a_small_workspace_changes_nothing() -> None:
    """A byte: a block of a head at a time, each with sums over all rows before it."""
    inputs = qkv(B=1, H=2, Hk=2, N=36, M=36)
    options = {**OPTIONS, "rank": 16, "grouping_block": 16, "is_causal": True}
    results = [run_kernels(*inputs, workspace=w, **options) for w in (1, 1 << 28)]
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)  # PyTorch's sigmoid rounds


def test_factors_of_rows_in_many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Earlier blocks of several chunks each, keys cut inside a chunk, the last block short."""
    monkeypatch.setattr(projection, "CHUNK_ROWS", 48)
    q, k = draw(1, 2, 160, 32).half(), draw(1, 1, 150, 32, seed=1).half()
    options: dict[str, Any] = {"rank": 16, "grouping_block": 60, "causal_offset": -11}
    first, second = (
        projection_factors(q.to(DEVICE), k.to(DEVICE), seed=0, earlier=n, **options) for n in (1, 2)
    )
    blocks = reference.estimate(
        q.double(), k.double(), estimator="projection", strict=True, **options
    )
    for i, block in enumerate(blocks[1:]):
        edge = block.Khat.shape[2]
        rows = slice(60 * i, 60 * i + block.stop - block.start)
        got, wanted = (
            Q.double().cpu() @ K.double().cpu().mT
            for Q, K in ((first[0][:, :, rows], first[1][:, :, i, :edge]), (block.Qhat, block.Khat))
        )
        assert (got - wanted).norm() < 2e-3 * wanted.norm()
    # The same bits, however a caller cuts.
    assert torch.equal(second[0], first[0][:, :, 60:])
    assert torch.equal(second[1][:, :, 0, :109], first[1][:, :, 1, :109])


# --- nothing looks ahead --------------------------------------------------------------------------

RUNS: dict[str, Callable[..., Tensor]] = {
    "definition": reference.attention,
    "CPU": run_cpu,
    "kernels": run_kernels,
    "op": op,
}


def moved(run: Callable[..., Tensor], cut: int, kind: str, **options: Any) -> float:
    """How far the rows before ``cut`` move when all that comes after is changed."""
    offset = 7 if kind == "cached keys" else 0
    q, k, v = qkv(B=1, H=2, Hk=1, N=44, M=44 + offset)
    mask: list[Tensor] = []
    if kind == "mask":
        mask = [torch.ones(44, 44, dtype=torch.bool).tril()]
        mask[0][:, 3:9] = False
    elif kind == "bias":
        mask = [draw(44, 44).masked_fill(~torch.ones(44, 44).tril().bool(), -torch.inf)]
    else:
        options |= {"is_causal": True, "causal_offset": offset}
    options = {**OPTIONS, "rank": 16, "grouping_block": 20, **options}
    before = run(q, k, v, *mask, **options)
    q, k, v, *mask = (t.clone() for t in (q, k, v, *mask))
    for t, first in ((q, cut), (k, cut + offset), (v, cut + offset)):
        t[:, :, first:] = 30 * draw(*t.shape, seed=8)[:, :, first:]
    if mask:  # rows from the cut on
        mask[0][cut:, 10:20] = mask[0].new_tensor(False if kind == "mask" else -torch.inf)
    after = run(q, k, v, *mask, **options)
    assert not torch.equal(after[:, :, cut:], before[:, :, cut:])
    return (after - before)[:, :, :cut].abs().max().item()


@pytest.mark.parametrize(
    ("name", "kind", "cut"),
    [
        (name, kind, cut)
        for name in RUNS
        for kind in ("causal", "cached keys", "mask", "bias")
        for cut in (20, 33, 40)
        if name != "kernels" or (kind, cut) in (("causal", 33), ("mask", 40))
    ],
)
def test_no_later_token_moves_an_earlier_row(name: str, kind: str, cut: int) -> None:
    """At the edges of a grouping block, and inside of one."""
    assert moved(RUNS[name], cut, kind) == 0


@pytest.mark.parametrize("name", ["definition", "CPU", "kernels", "op"])
def test_more_tokens_move_no_earlier_row(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of "auto" lie where they lie, however long the sequence becomes."""
    monkeypatch.setattr(estimators, "PREFIX_BLOCK", 20)
    options = {**OPTIONS, "rank": 16, "grouping_block": 0, "is_causal": True}
    tokens = 44 if name == "kernels" else 144
    q, k, v = qkv(B=1, H=2, Hk=1, N=tokens + 13, M=tokens + 13)
    longest = RUNS[name](q, k, v, **options)
    for rows in (tokens, tokens + 1):
        fewer = RUNS[name](q[:, :, :rows], k[:, :, :rows], v[:, :, :rows], **options)
        torch.testing.assert_close(fewer, longest[:, :, :rows], rtol=0, atol=2e-6)
    exact = RUNS[name](q, k, v, **{**options, "rank": 32, "strict": False})
    assert (longest - exact)[:, :, 20:].norm() > 1e-2 * exact[:, :, 20:].norm()


@pytest.mark.parametrize("name", ["definition", "CPU", "op"])
@pytest.mark.parametrize("kind", ["causal", "mask"])
def test_the_test_can_fail(name: str, kind: str) -> None:
    """The block's own rows are seen without ``strict``."""
    assert moved(RUNS[name], 33, kind, strict=False) > 1e-3


class Decoder(nn.Module):
    """Two layers over tokens, causal by a flag or by the mask that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(50, 64)
        self.qkv = nn.Linear(64, 192)
        self.out = nn.Linear(64, 64)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        x: Tensor = self.tokens(ids)
        for _ in range(2):
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 32)).permute(2, 0, 3, 1, 4)
            o = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
            x = x + self.out(o.transpose(1, 2).flatten(2))
        return x


@pytest.mark.parametrize("causal", ["strict", "block"])
@pytest.mark.parametrize("masked", [False, True])
def test_through_torch_compile(masked: bool, causal: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Decoder().eval()
    policy = {"default": {"causal": causal, "min_seq_len": 0, "grouping_block": 24}}
    options = {"policy": policy, "compiler": "eager"}
    compiled = torch.compile(model, backend="distr", options=options)
    ids = torch.randint(50, (2, 100))
    mask = [torch.ones(100, 100, dtype=torch.bool).tril()] if masked else []
    with torch.no_grad():
        before, exact = compiled(ids, *mask), model(ids, *mask)
        for cut in (48, 60):
            other = ids.clone()
            other[:, cut:] = (ids[:, cut:] + 1) % 50
            after = compiled(other, *mask)
            stays = torch.equal(after[:, :cut], before[:, :cut])
            assert stays or causal == "block"
            assert not torch.equal(after[:, cut:], before[:, cut:])
        assert stays == (causal == "strict")  # 60 is inside a block
    assert 1e-4 < (before - exact).norm() / exact.norm() < 0.1
    sees = {
        "strict": "earlier rows and keys only",
        "block": "all query rows of the grouping block and all keys",
    }
    rows = distr_compile.report(compiled).rows
    assert [(row.decision, row.sees) for row in rows] == 2 * [("distr", sees[causal])]


# --- what the op says -----------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["lsh-sample", "lsh-mean", "lsh-signed"])
def test_lsh_refuses(estimator: str) -> None:
    q, k, v = qkv()
    options = {"rank": 16, "grouping_block": 16, "scale": 1.0, "estimator": estimator}
    message = f"strict: got True; with {estimator} must be False"
    with pytest.raises(ValueError, match=message):
        reference.attention(q, k, v, strict=True, **options)
    message += (
        ", as it sees all query rows of the grouping block: take one of projection, calibrated"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        op(q, k, v, strict=True, **options)


def test_calibrated_is_strict_anyway() -> None:
    q, k, v = qkv()
    bases = draw(2, 32, 20), draw(2, 32, 20, seed=1)
    options = {"rank": 20, "grouping_block": 0, "scale": 0.1, "estimator": "calibrated"}
    calls = [op(q, k, v, None, *bases, strict=s, is_causal=True, **options) for s in (True, False)]
    assert torch.equal(*calls)


def test_short_calls_are_exact() -> None:
    q, k, v = qkv(N=40, M=40)
    options = {**OPTIONS, "rank": 16, "grouping_block": 16, "is_causal": True}
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.2, enable_gqa=True)
    torch.testing.assert_close(op(q, k, v, min_seq_len=41, **options), exact)


def test_flops() -> None:
    q, k, v = qkv(B=2, H=4, Hk=2, N=50, M=50)
    options = {**OPTIONS, "rank": 20, "grouping_block": 16, "is_causal": True}
    with FlopCounterMode(display=False) as counter:
        op(q, k, v, **options)
    sizes = {"num_queries": 50, "num_keys": 50, "head_dim": 32, "rank": 20, "block": 16, "rep": 2}
    prefix_cost = ESTIMATORS["projection"].prefix_cost
    assert prefix_cost is not None
    products = 2 * 2 * 4 * 50 * 50 * (20 + 24)
    assert counter.get_total_flops() == products + 4 * prefix_cost(**sizes).flops
