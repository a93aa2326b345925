"""The op as PyTorch sees it: schema, fake tensors, compilation, autocast, FLOPs, errors."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from distr_compile.estimators import ESTIMATORS
from distr_compile.kernels.attention import reference
from distr_compile.lowering.flops import attention_flops
from distr_compile.lowering.told import Listener, listening
from distr_compile.reporting import Handover

op: Any = torch.ops.distr.attention

OPTIONS: dict[str, Any] = {
    "scale": 0.2,
    "rank": 16,
    "estimator": "lsh-mean",
    "grouping_block": 0,
}


def qkv(
    B: int = 2,
    H: int = 4,
    Hk: int = 2,
    N: int = 20,
    M: int = 24,
    d: int = 32,
    dv: int = 32,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(B * H * N + M)
    shapes = ((B, H, N, d), (B, Hk, M, d), (B, Hk, M, dv))
    q, k, v = (torch.randn(s, generator=generator).to(dtype) for s in shapes)
    return q, k, v


SINKS = torch.tensor([0.5, -2.0, 3.0, -torch.inf])

CALLS: dict[str, tuple[dict[str, Any], Any, dict[str, Any]]] = {
    # name: sizes, mask shape (None, or shape and dtype), options
    "plain": ({}, None, {}),
    "sample": ({}, None, {"estimator": "lsh-sample", "grouping_block": 8, "seed": 3}),
    "narrow v": ({"dv": 24}, None, {}),
    "causal": ({}, None, {"is_causal": True}),
    "causal offset": ({}, None, {"is_causal": True, "causal_offset": 4}),
    "bool mask": ({}, ((2, 1, 1, 24), torch.bool), {}),
    "float mask": ({}, ((20, 24), torch.float32), {}),
    "float mask, causal": ({}, ((4, 20, 1), torch.float32), {"is_causal": True}),
    "exact by rank": ({}, ((2, 4, 20, 24), torch.float32), {"rank": 32}),
    "exact, short": ({"N": 5}, None, {"is_causal": True, "causal_offset": 19}),
    "exact, mask and causal": (
        {"N": 5, "dv": 48},
        ((1, 24), torch.bool),
        {"is_causal": True, "causal_offset": 3},
    ),
    "min_seq_len": ({}, None, {"min_seq_len": 22}),
    "bfloat16": ({"dtype": torch.bfloat16}, ((20, 24), torch.float32), {}),
    "soft cap": ({}, ((2, 1, 20, 24), torch.bool), {"softcap": 1.5}),
    "sinks": ({}, None, {"sinks": SINKS, "is_causal": True, "causal_offset": 4}),
    "exact, soft cap and sinks": ({"N": 5}, None, {"sinks": SINKS, "softcap": 1.5}),
    "exact by rank, half, sinks": ({"dtype": torch.bfloat16}, None, {"sinks": SINKS, "rank": 32}),
    "one head": ({"H": 1, "Hk": 1, "B": 1}, None, {}),
    "projection": ({}, ((2, 1, 1, 24), torch.bool), {"estimator": "projection", "rank": 20}),
    "projection, two rounds": (
        {"dtype": torch.bfloat16, "d": 48},
        None,
        {"estimator": "projection", "rounds": 2, "is_causal": True, "grouping_block": 8},
    ),
    "half the rank of 96": ({"d": 96, "dv": 96, "Hk": 4}, None, {"rank": 48}),
}


def call_of(name: str) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    sizes, mask_kind, options = CALLS[name]
    args: tuple[Tensor, ...] = qkv(**sizes)
    if mask_kind is not None:
        shape, dtype = mask_kind
        values = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        args = (*args, values > -0.7 if dtype == torch.bool else values.to(dtype))
    return args, OPTIONS | options


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name: str) -> None:
    args, options = call_of(name)
    torch.library.opcheck(op.default, args, options)


@pytest.mark.parametrize("name", CALLS)
def test_value_and_layout(name: str) -> None:
    """Equal to the definition where approximate, to fp64 softmax attention where exact."""
    args, options = call_of(name)
    got = op(*args, **options)
    definition = {k: v for k, v in options.items() if k != "min_seq_len"}
    if name.startswith("exact") or name == "min_seq_len":
        definition["rank"] = args[0].shape[-1]
    wide = [t if t.dtype == torch.bool else t.double() for t in args]
    wanted = reference.attention(*wide, **definition)
    # The condition of the Gram matrices is felt in what projection makes of them.
    # Of width 96 the scores are up to 15: fp32 itself is off by 10 roundings then, on average.
    roundings = 32 if "projection" in name else 16 if "96" in name else 8
    rounding = torch.finfo(got.dtype).eps * roundings
    torch.testing.assert_close(got.double(), wanted, rtol=rounding, atol=rounding)
    B, H, N, _ = args[0].shape
    assert got.shape == (B, H, N, args[2].shape[-1])
    assert got.transpose(1, 2).is_contiguous()
    assert got.dtype == args[0].dtype


def test_works_under_inference_mode() -> None:
    q, k, v = qkv()
    wanted = op(q, k, v, **OPTIONS)
    with torch.inference_mode():
        assert torch.equal(op(q, k, v, **OPTIONS), wanted)


@pytest.mark.parametrize(
    "dtypes",
    list(
        itertools.product(
            (torch.float64, torch.float32, torch.bfloat16, torch.float16),
            (torch.float64, torch.float32, torch.bfloat16),
        )
    ),
    ids=str,
)
@pytest.mark.parametrize("tokens", [8, 20])
def test_float_masks_of_other_dtypes(dtypes: tuple[torch.dtype, torch.dtype], tokens: int) -> None:
    """On the exact path too: SDPA itself makes garbage of an fp32 mask beside fp64 inputs."""
    dtype, mask_dtype = dtypes
    q, k, v = qkv(N=tokens, dtype=dtype)
    mask = torch.randn(tokens, 24, generator=torch.Generator().manual_seed(0)).to(mask_dtype)
    got = op(q, k, v, mask, **OPTIONS)
    rank = 32 if tokens < 16 else 16
    wanted = reference.attention(
        q.double(), k.double(), v.double(), mask.double(), scale=0.2, rank=rank
    )
    tolerance = max(torch.finfo(dtype).eps, 1e-15) * 8
    torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("tokens", [8, 20])
def test_rows_that_see_nothing_are_zero(tokens: int) -> None:
    q, k, v = qkv(N=tokens)
    hidden = torch.zeros(tokens, 24, dtype=torch.bool)
    minus_infinity = torch.full((tokens, 24), -torch.inf)
    assert (op(q, k, v, hidden, **OPTIONS) == 0).all()
    assert (op(q, k, v, minus_infinity, **OPTIONS) == 0).all()
    causal = op(q, k, v, is_causal=True, causal_offset=-3, **OPTIONS)
    assert (causal[:, :, :3] == 0).all()
    assert (causal[:, :, 3:] != 0).all()


@pytest.mark.parametrize("causal", [False, True])
def test_batch_of_one_is_broadcast(causal: bool) -> None:
    q, k, v = qkv()
    for tokens in (8, 20):
        part = q[:, :, :tokens]
        got = op(part, k[:1], v[:1], is_causal=causal, **OPTIONS)
        wide = [t[:1].expand(2, -1, -1, -1).clone() for t in (k, v)]
        torch.testing.assert_close(got, op(part, *wide, is_causal=causal, **OPTIONS))


# --- compilation -------------------------------------------------------------------------------


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, estimator: str) -> Tensor:
    out: Tensor = op(
        (q * 2).transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        mask,
        scale=q.shape[-1] ** -0.5,
        rank=16,
        estimator=estimator,
        grouping_block=0,
    )
    return out.transpose(1, 2).flatten(2) + 1


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("estimator", ["lsh-mean", "projection"])
def test_compiled_equals_eager(estimator: str, backend: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(attend, backend=counter, fullgraph=True, dynamic=dynamic)
    lengths = (33, 40, 57) if dynamic else (33,)
    with torch.no_grad():
        for length in lengths:
            q, k, v = qkv(B=3, H=4, Hk=2, N=length, M=length + 2, d=48, dv=40)
            q, k, v = (t.transpose(1, 2).contiguous() for t in (q, k, v))
            mask = torch.rand(3, 1, length, length + 2) > 0.3
            torch.testing.assert_close(
                compiled(q, k, v, mask, estimator), attend(q, k, v, mask, estimator)
            )
    assert counter.frame_count == 1, "sizes were specialised"


def test_compiled_graph_decides_short_sequences_at_run_time() -> None:
    torch._dynamo.reset()

    def short(q: Tensor) -> Tensor:
        scale = q.shape[-1] ** -0.5
        out: Tensor = op(
            q,
            q,
            q,
            scale=scale,
            rank=16,
            estimator="lsh-mean",
            grouping_block=0,
            min_seq_len=30,
            site=7,
        )
        return out

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(short, backend=counter, fullgraph=True, dynamic=True)
    seen: list[tuple[int, Handover | None]] = []
    with torch.no_grad(), listening(Listener(lambda *told: seen.append(told))):
        for length in (20, 40, 29, 31, 17):
            q = torch.randn(2, 3, length, 64)
            torch.testing.assert_close(compiled(q[..., :32]), short(q[..., :32]))
    assert counter.frame_count == 1
    assert seen == [(7, None)] * 6  # three short lengths, each compiled and eager


def test_compiled_autocast() -> None:
    torch._dynamo.reset()
    q, k, v = qkv()

    def call() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out: Tensor = op(q, k, v, **OPTIONS)
            return out

    got = torch.compile(call, backend="aot_eager", fullgraph=True)()
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, call())


def test_errors_reach_the_user_when_compiling() -> None:
    torch._dynamo.reset()
    q, k, v = qkv()
    compiled = torch.compile(
        lambda q, k, v: op(q, k, v, **OPTIONS | {"rank": 12}), backend="aot_eager", fullgraph=True
    )
    with pytest.raises(Exception, match=r"rank: got 12 for head_dim 32; must be head_dim"):
        compiled(q, k, v)


# --- autocast ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_as_for_sdpa(dtype: torch.dtype) -> None:
    q, k, v = qkv(Hk=4)
    bias = torch.randn(20, 24)
    visible = bias > 0
    for mask in (None, bias, visible):
        low = mask.to(dtype) if mask is bias else mask
        wanted = op(q.to(dtype), k.to(dtype), v.to(dtype), low, **OPTIONS)
        with torch.autocast("cpu", dtype=dtype):
            got = op(q, k, v, mask, **OPTIONS)
            sdpa = F.scaled_dot_product_attention(q, k, v, mask)
        assert got.dtype == sdpa.dtype == dtype
        assert torch.equal(got, wanted)
    with torch.autocast("cpu", dtype=dtype):
        mixed = op(q, k.to(dtype), v, **OPTIONS)
        assert mixed.dtype == dtype
        assert op(q.double(), k.double(), v.double(), **OPTIONS).dtype == torch.float64
        assert F.scaled_dot_product_attention(q.double(), k.double(), v.double()).dtype == (
            torch.float64
        )
    with torch.autocast("cpu", enabled=False):
        assert op(q, k, v, **OPTIONS).dtype == torch.float32


# --- counting ----------------------------------------------------------------------------------


def test_exact_calls_are_counted() -> None:
    q, k, v = qkv()
    outer: list[tuple[int, Handover | None]] = []
    inner: list[tuple[int, Handover | None]] = []
    op(q[:, :, :4], k, v, **OPTIONS)  # no sink: nothing happens
    with listening(Listener(lambda *told: outer.append(told))):
        op(q, k, v, site=1, **OPTIONS)
        op(q, k, v, site=2, min_seq_len=20, **OPTIONS)
        op(q, k, v, site=3, min_seq_len=21, **OPTIONS)
        op(q[:, :, :15], k, v, site=4, **OPTIONS)
        op(q, k[:, :, :5], v[:, :, :5], site=5, min_seq_len=6, **OPTIONS)
        op(q, k, v, site=6, **OPTIONS | {"rank": 32})  # exact by wish, not by length
        with listening(Listener(lambda *told: inner.append(told))):
            op(q[:, :, :1], k, v, site=8, **OPTIONS)
        op(q[:, :, :1], k, v, site=9, **OPTIONS)
    op(q[:, :, :1], k, v, site=10, **OPTIONS)
    assert outer == [(3, None), (4, None), (5, None), (9, None)]
    assert inner == [(8, None)]


def flops_of(*args: Tensor, **options: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        op(*args, **OPTIONS | options)
    return counter.get_total_flops()


def test_flops() -> None:
    q, k, v = qkv(B=2, H=4, Hk=2, N=20, M=24, d=32, dv=48)
    products = 2 * 2 * 4 * 20 * 24 * (16 + 48)
    hashing = 2 * 16 * 2 * 4 * 20 * 32
    query_sums = 2 * 2 * 4 * 20 * 32 * 16  # as products with 0/1 matrices
    key_sums = 2 * 2 * 2 * 24 * 32 * 16
    assert flops_of(q, k, v) == products + hashing + query_sums + key_sums
    assert flops_of(q, k, v, grouping_block=8) == products + hashing + query_sums + 3 * key_sums
    exact = 2 * 2 * 4 * 20 * 24 * (32 + 48)
    assert flops_of(q, k, v, rank=32) == exact
    assert flops_of(q, k, v, min_seq_len=21) == exact
    mask = torch.ones(20, 24, dtype=torch.bool)
    assert flops_of(q, k, v, mask, is_causal=True) == flops_of(q, k, v)
    with FlopCounterMode(display=False) as counter:
        F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    assert counter.get_total_flops() == exact, "the formula agrees with PyTorch's"


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("block", [0, 8])
def test_flops_of_projection(rounds: int, block: int) -> None:
    """From shapes alone, without running it: the table's cost for every key head."""
    sizes = {"num_queries": 20, "num_keys": 24, "head_dim": 32, "rank": 20}
    cost = ESTIMATORS["projection"].cost(**sizes, block=block or 20, rounds=rounds, rep=2)
    shapes = (2, 4, 20, 32), (2, 2, 24, 32), (2, 2, 24, 48)
    options = {"rank": 20, "estimator": "projection", "grouping_block": block, "rounds": rounds}
    assert attention_flops(*shapes, **options) == (
        2 * 2 * 4 * 20 * 24 * (20 + 48) + 2 * 2 * cost.flops
    )


# --- refusals ----------------------------------------------------------------------------------


Q, K, V = qkv()
BAD: dict[str, tuple[tuple[Tensor, ...], dict[str, Any], str]] = {
    "rank": ((Q, K, V), {"rank": 8}, "rank: got 8 for head_dim 32; must be head_dim"),
    "rank 0": ((Q, K, V), {"rank": 0}, "rank: got 0 for head_dim 32"),
    "rank of projection": (
        (Q, K, V),
        {"rank": 15, "estimator": "projection"},
        "rank: got 15 for head_dim 32; must be head_dim (exact) or, with projection, less and at",
    ),
    "rank above the width": (
        (Q, K, V),
        {"rank": 33, "estimator": "projection"},
        "rank: got 33 for head_dim 32; must be head_dim (exact)",
    ),
    "rounds": ((Q, K, V), {"rounds": 2}, "rounds: got 2; with lsh-mean must be 1"),
    "rounds of projection": (
        (Q, K, V),
        {"rounds": 3, "estimator": "projection"},
        "rounds: got 3; with projection must be 1 or 2",
    ),
    "estimator": ((Q, K, V), {"estimator": "svd"}, "estimator: got 'svd'; must be one of lsh-"),
    "block": ((Q, K, V), {"grouping_block": -1}, "grouping_block: got -1; must be rows >= 1"),
    "min_seq_len": ((Q, K, V), {"min_seq_len": -1}, "min_seq_len: got -1; must be >= 0"),
    "softcap": ((Q, K, V), {"softcap": -1.0}, "softcap: got -1.0; must be > 0"),
    "sinks": ((Q, K, V), {"sinks": torch.zeros(3)}, "sinks: got (3,) of torch.float32; must be"),
    "offset": ((Q, K, V), {"causal_offset": 1}, "causal_offset: got a value without is_causal"),
    "rank of q": ((Q[0], K, V), {}, "q: got 3 dimensions; must be (batch, heads, tokens, width)"),
    "batch of k": ((Q[:1], K, V[:1]), {}, "k: got batch size 2; must be that of q, 1, or 1"),
    "batch of v": ((Q[:1], K[:1], V), {}, "v: got batch size 2"),
    "width": ((Q, K[..., :16], V), {}, "k: got width 16; must be that of q, 32"),
    "tokens": ((Q, K, V[:, :, 1:]), {}, "v: got 2 heads of 23 tokens; must be as in k, 2"),
    "heads": ((Q[:, :3], K, V), {}, "k: got 2 heads; must divide the 3 heads of q"),
    "no heads": ((Q, K[:, :0], V[:, :0]), {}, "k: got 0 heads"),
    "dtype": ((Q, K.double(), V), {}, "q, k, v: got torch.float32, torch.float64, torch.float32"),
    "int": ((Q.int(), K.int(), V.int()), {}, "q, k, v: got torch.int32"),
    "device": (
        (Q, K.to("meta"), V),
        {},
        "q, k, v, mask, sinks, dropout_seed: got devices cpu, meta",
    ),
    "mask size": ((Q, K, V, torch.ones(19, 24)), {}, "mask: got (19, 24); must broadcast to"),
    "mask dims": ((Q, K, V, torch.ones(1, 2, 4, 20, 24)), {}, "mask: got (1, 2, 4, 20, 24)"),
    "mask type": ((Q, K, V, torch.ones(24).int()), {}, "mask: got torch.int32; must be torch.bool"),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_say_what_is_accepted(name: str) -> None:
    args, options, message = BAD[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        op(*args, **OPTIONS | options)


@pytest.mark.parametrize("rank", [16, 20, 31, 32])
@pytest.mark.parametrize("rounds", [1, 2])
def test_projection_takes_any_rank(rank: int, rounds: int) -> None:
    """As fake tensors, which are checked as real ones are."""
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in (Q, K, V)]
        options = {"rank": rank, "estimator": "projection", "rounds": rounds}
        assert op(*fakes, **OPTIONS | options).shape == Q.shape


def test_function_transforms_are_refused_not_wrong() -> None:
    q, k, v = qkv()

    def total(x: Tensor) -> Tensor:
        out: Tensor = op(x, k, v, **OPTIONS).sum() + x.sum()
        return out

    for call in (
        lambda: torch.func.grad(total)(q),
        lambda: torch.func.jvp(total, (q,), (torch.ones_like(q),)),
        lambda: torch.vmap(total)(q[None]),
    ):
        with pytest.raises(NotImplementedError, match=r"inside a torch\.func transform"):
            call()


def test_a_kernel_in_its_place_is_called() -> None:
    """Whoever registers another implementation for a device gets every call of it."""
    q, k, v = (torch.randn(1, 2, 20, 32) for _ in "qkv")
    options = {"scale": 0.2, "rank": 16, "estimator": "projection", "grouping_block": 0}
    before = torch.ops.distr.attention(q, k, v, **options)
    library = torch.library.Library("distr", "IMPL")
    library.impl("attention", lambda q, k, v, *_, **__: torch.full_like(v, 7), "CPU")
    try:
        assert (torch.ops.distr.attention(q, k, v, **options) == 7).all()
    finally:
        library._destroy()
    assert torch.equal(torch.ops.distr.attention(q, k, v, **options), before)
