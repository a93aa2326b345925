"""Packed sequences: each is what the function gives of it alone."""

from __future__ import annotations

import inspect
import itertools
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

import distr_compile

LENGTHS = (17, 1, 0, 197, 33, 16)


def cumulated(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def packed(
    lengths: tuple[int, ...], heads: int, width: int, seed: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(lengths), heads, width, generator=generator).to(dtype)


def pieces(x: Tensor, lengths: tuple[int, ...]) -> list[Tensor]:
    """Each sequence as (1, heads, tokens, width), in memory of its own."""
    return [part.transpose(0, 1)[None].contiguous() for part in x.split(list(lengths))]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("options", [{}, {"rank": 20, "rounds": 2}, {"estimator": "lsh-sample"}])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
def test_each_sequence_is_what_it_is_alone(
    is_causal: bool, options: dict[str, Any], heads: tuple[int, int]
) -> None:
    q = packed(LENGTHS, heads[0], 40, 0)
    k, v = packed(LENGTHS, heads[1], 40, 1), packed(LENGTHS, heads[1], 24, 2)
    if "estimator" in options:
        q, k = q.repeat(1, 1, 2)[..., :64], k.repeat(1, 1, 2)[..., :64]
    bounds = cumulated(LENGTHS)
    window = (-1, 0) if is_causal else (-1, -1)
    got = distr_compile.attention_varlen(
        q, k, v, bounds, bounds, 197, 200, window_size=window, enable_gqa=True, **options
    )
    assert got.shape == (sum(LENGTHS), heads[0], 24)
    alone = [
        distr_compile.attention(*each, is_causal=is_causal, enable_gqa=True, **options)
        for each in zip(*(pieces(x, LENGTHS) for x in (q, k, v)), strict=True)
    ]
    wanted = torch.cat([each[0].transpose(0, 1) for each in alone])
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-6)
    exact = [
        F.scaled_dot_product_attention(*each, is_causal=is_causal, enable_gqa=True)
        for each in zip(*(pieces(x, LENGTHS) for x in (q, k, v)), strict=True)
    ]
    assert (alone[3] - exact[3]).abs().max() > 1e-3, "nothing was approximated"
    torch.testing.assert_close(alone[1], exact[1])


def test_exact_and_with_other_keys() -> None:
    keys = (40, 3, 7, 0, 50, 16)
    q, k, v = packed(LENGTHS, 2, 32, 0), packed(keys, 2, 32, 1), packed(keys, 2, 32, 2)
    used = torch.tensor([40, 3, 0, 0, 20, 16])
    got = distr_compile.attention_varlen(
        *(q, k, v, cumulated(LENGTHS), cumulated(keys), 197, 50),
        seqused_k=used,
        group_size=1,
        scale=0.3,
    )
    parts = zip(*map(pieces, (q, k, v), (LENGTHS, keys, keys)), used.tolist(), strict=True)
    wanted = [
        F.scaled_dot_product_attention(a, b[:, :, :n], c[:, :, :n], scale=0.3)[0].transpose(0, 1)
        for a, b, c, n in parts
    ]
    torch.testing.assert_close(got, torch.cat(wanted).nan_to_num())


def test_nothing_is_as_long_as_all_tokens() -> None:
    """No mask over all tokens: the largest tensor stays near what one sequence takes."""
    lengths = (256,) * 16
    q, k, v = (packed(lengths, 1, 32, seed) for seed in range(3))
    bounds = cumulated(lengths)

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        size = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            leaves = torch.utils._pytree.tree_leaves(out)
            self.size = max([self.size, *(t.numel() for t in leaves if isinstance(t, Tensor))])
            return out

    with Largest() as largest:
        distr_compile.attention_varlen(q, k, v, bounds, bounds, 256, 256, window_size=(-1, 0))
    assert largest.size <= 16 * 256 * 32


def test_the_arguments_are_those_of_pytorch() -> None:
    theirs = inspect.signature(varlen_attn).parameters
    ours = inspect.signature(distr_compile.attention_varlen).parameters
    assert list(ours)[:7] == list(theirs)[:7]
    assert theirs.keys() <= ours.keys()
    for name, parameter in theirs.items():
        assert ours[name].default == parameter.default, name
        assert ours[name].kind == parameter.kind, name


Q = packed((20, 30), 2, 32, 0)
BOUNDS = torch.tensor([0, 20, 50])
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "window": ({"window_size": (8, 0)}, "window_size: got (8, 0); accepted: (-1, -1) for all keys"),
    "paged": ({"block_table": Q}, "block_table: got Tensor; accepted: None; leave it out"),
    "no keys' bounds": ({"cu_seq_k": None}, "cu_seq_k: got None; accepted: a tensor like cu_seq_q"),
    "end": ({"cu_seq_q": BOUNDS - 1}, "cu_seq_q: got [-1, 19, 49]; accepted: integers that rise"),
    "floating": ({"cu_seq_q": BOUNDS.float()}, "cu_seq_q: got (3,) of torch.float32; accepted"),
    "falling": ({"cu_seq_k": torch.tensor([0, 60, 50])}, "cu_seq_k: got [0, 60, 50]; accepted"),
    "fewer": (
        {"cu_seq_k": BOUNDS[::2], "max_k": 50},
        "cu_seq_k: got 1 sequences; accepted: as many as",
    ),
    "too short": ({"max_q": 29}, "max_q: got 29; accepted: at least 30; give the length of"),
    "complex": ({"cu_seq_q": BOUNDS.to(torch.complex64)}, "cu_seq_q: got (3,) of torch.complex64"),
    "more values": (
        {"value": torch.cat([Q, Q])},
        "value: got 100 tokens; accepted: as many as key",
    ),
    "used, floating": (
        {"seqused_k": torch.tensor([1.5, 3])},
        "seqused_k: got (2,) of torch.float32; accepted: (2,), integers; leave it out",
    ),
    "used, bool": (
        {"seqused_k": torch.tensor([True, True])},
        "seqused_k: got (2,) of torch.bool; accepted: (2,), integers",
    ),
    "used, one number": (
        {"seqused_k": torch.tensor(3)},
        "seqused_k: got () of torch.int64; accepted: (2,), integers",
    ),
    "used": ({"seqused_k": torch.tensor([21, 3])}, "seqused_k: got [21, 3]; accepted: a number"),
    "axes": ({"query": Q[None]}, "query: got 4 dimensions; accepted: (tokens, heads, width)"),
    "causal": (
        {"cu_seq_k": torch.tensor([0, 30, 50]), "window_size": (-1, 0)},
        "window_size: got (-1, 0) for a sequence of 20 rows and 30 keys; accepted: as many keys",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name: str) -> None:
    changed, message = WRONG[name]
    given = {"query": Q, "key": Q, "value": Q, "cu_seq_q": BOUNDS, "cu_seq_k": BOUNDS}
    given |= {"max_q": 30, "max_k": 30, **changed}
    with pytest.raises(ValueError, match=re.escape(message)):
        distr_compile.attention_varlen(**given)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("query", None, "query: got None (NoneType); accepted: a tensor"),
        ("cu_seq_q", [0, 30], "cu_seq_q: got [0, 30] (list); accepted: a tensor of integers"),
        ("max_q", "a", "max_q: got 'a' (str); accepted: an integer"),
        ("window_size", 3, "window_size: got 3 (int); accepted: a pair of integers"),
        ("seqused_k", [1], "seqused_k: got [1] (list); accepted: a tensor of integers"),
        ("is_causal", True, "is_causal: got True (bool); accepted: no such argument; window_size"),
    ],
)
def test_other_types(name: str, value: Any, message: str) -> None:
    given = {"query": Q, "key": Q, "value": Q, "cu_seq_q": BOUNDS, "cu_seq_k": BOUNDS}
    with pytest.raises(TypeError, match=re.escape(message)):
        distr_compile.attention_varlen(**{**given, "max_q": 30, "max_k": 30, name: value})


def test_nested_tensors_are_refused() -> None:
    parts = [torch.randn(n, 2, 32) for n in (20, 30)]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged).transpose(1, 2)
    message = r"query: got a nested tensor; accepted: .*; call distr_compile.attention_varlen"
    with pytest.raises(ValueError, match=message):
        distr_compile.attention(nested, nested, nested)


@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_tensors_say_what_to_give(name: str, layout: torch.layout) -> None:
    lengths = (17, 33)
    given = dict(zip(("query", "key", "value"), [packed(lengths, 2, 40, 0)] * 3, strict=True))
    bounds = cumulated(lengths)
    nested = torch.nested.nested_tensor(list(given[name].split(list(lengths))), layout=layout)
    rest = {"cu_seq_q": bounds, "cu_seq_k": bounds, "max_q": 33, "max_k": 33}
    message = re.escape(
        f"{name}: got a nested tensor; accepted: (tokens, heads, width), a tensor with strides; of "
        "a jagged one give values() here, and offsets() as cu_seq_q and cu_seq_k"
    )
    with pytest.raises(ValueError, match=message):
        distr_compile.attention_varlen(**{**given, name: nested}, **rest)


def test_the_advice_about_jagged_tensors_holds() -> None:
    lengths = (17, 33)
    parts = [packed(lengths, 2, 40, seed) for seed in range(3)]
    q, k, v = (
        torch.nested.nested_tensor(list(t.split(list(lengths))), layout=torch.jagged) for t in parts
    )
    got = distr_compile.attention_varlen(
        *(t.values() for t in (q, k, v)), q.offsets(), k.offsets(), 33, 33
    )
    wanted = distr_compile.attention_varlen(*parts, *[cumulated(lengths)] * 2, 33, 33)
    assert torch.equal(got, wanted)


def test_the_longest_lengths_may_be_tensors() -> None:
    most = BOUNDS.diff().max()
    given = (Q, Q, Q, BOUNDS, BOUNDS)
    wanted = distr_compile.attention_varlen(*given, int(most), int(most))
    got = distr_compile.attention_varlen(*given, most, most)  # type: ignore[arg-type]
    assert torch.equal(got, wanted)


def test_without_sequences_sizes_dtypes_and_options_are_checked() -> None:
    none, q = torch.zeros(1, dtype=torch.int64), Q[:0].clone().requires_grad_()

    def run(*qkv: Tensor, **options: Any) -> Tensor:
        return distr_compile.attention_varlen(*qkv, none, none, 0, 0, **options)

    out = run(q, q, q[..., :8])
    assert out.shape == (0, Q.shape[1], 8)
    out.sum().backward()
    assert q.grad is not None
    assert q.grad.shape == q.shape
    with pytest.raises(ValueError, match=r"^estimator: got .lhs."):
        run(q, q, q, estimator="lhs")
    with pytest.raises(ValueError, match=r"q, k, v: got torch\.float32, torch\.float64"):
        run(q, q.double(), q)
    with pytest.raises(ValueError, match=r"k: got width 8; must be that of q"):
        run(q, q[..., :8], q)
