"""Per site: distr or exact, with every reason."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from distr_compile.estimators import possible_group_sizes
from distr_compile.lowering import dispatch
from distr_compile.lowering.dispatch import BreakEven
from distr_compile.passes import decide as decisions
from distr_compile.passes.decide import DTYPES, decide, flops
from distr_compile.passes.site import AttentionSite
from distr_compile.policy import LayerPlan
from distr_compile.reporting import Reason

FORCED = LayerPlan(min_seq_len=0)


def site(**fields: Any) -> AttentionSite:
    """2 x 4 heads x 128 tokens x width 64 in float32 on the CPU."""
    node = fx.Graph().placeholder("softmax")
    sizes = {"batch": 2, "num_heads": 4, "num_key_heads": 4, "num_queries": 128, "num_keys": 128}
    return AttentionSite(
        kind="softmax",
        anchor=node,
        form="matmul softmax matmul",
        output=node,
        **{"dtype": torch.float32, "device": torch.device("cpu"), "head_dim": 64, "value_dim": 64}
        | sizes
        | fields,
    )


def symbol(size: int) -> torch.SymInt:
    """A symbolic size with a hint."""
    environment = ShapeEnv()
    tensor = torch.empty(size, 7)
    with torch._subclasses.FakeTensorMode(shape_env=environment) as mode:
        fake = mode.from_tensor(tensor, static_shapes=False)
    assert isinstance(fake.shape[0], torch.SymInt)
    return fake.shape[0]


def codes(*args: Any, **kwargs: Any) -> list[str]:
    return [reason.code for reason in decide(*args, **kwargs).reasons]


def test_no_reason_means_distr() -> None:
    decision = decide(site(), FORCED)
    assert (decision.decision, decision.is_distr, decision.reasons) == ("distr", True, ())
    assert (decision.rank, decision.min_seq_len, decision.plan) == (32, 0, FORCED)


@pytest.mark.parametrize("head_dim", [16, 24, 32, 40, 48, 64, 72, 80, 96, 128, 256])
@pytest.mark.parametrize("group_size", [2, 3, 4, 5, 8, 16])
def test_group_sizes_that_fit_the_width(head_dim: int, group_size: int) -> None:
    plan = replace(FORCED, group_size=group_size)
    fits = head_dim % group_size == 0 and head_dim // group_size >= 16
    assert codes(site(head_dim=head_dim), plan) == ([] if fits else ["rank"])
    assert fits == (group_size in possible_group_sizes(head_dim))
    if fits:
        assert decide(site(head_dim=head_dim), plan).rank == head_dim // group_size


def test_the_text_for_a_group_size_says_what_fits() -> None:
    (reason,) = decide(site(), replace(FORCED, group_size=3)).reasons
    assert reason.text == (
        "group_size: got 3 for head width 64; must divide the width and leave at least 16 columns: "
        "one of 1, 2, 4"
    )


def test_a_symbolic_width() -> None:
    (reason,) = decide(site(head_dim=symbol(64)), FORCED).reasons
    assert reason == Reason("rank", "the head width is not known while compiling")


@pytest.mark.parametrize(
    ("queries", "keys", "limit", "expected"),
    [
        (128, 128, 128, []),
        (128, 128, 129, ["min-seq-len"]),
        (128, 64, 65, ["min-seq-len"]),
        (64, 128, 65, ["min-seq-len"]),
        (16, 1, 0, []),
        (15, 128, 0, ["decode"]),
        (1, 128, 2, ["decode", "min-seq-len"]),
    ],
)
def test_lengths(queries: int, keys: int, limit: int, expected: list[str]) -> None:
    plan = replace(FORCED, min_seq_len=limit)
    assert codes(site(num_queries=queries, num_keys=keys), plan) == expected


def test_auto_on_a_cpu_is_exact() -> None:
    (reason,) = decide(site(), LayerPlan()).reasons
    assert reason.code == "not-faster"
    assert reason.text == "min_seq_len is auto: not known to be faster on cpu; 0 forces it"


def test_auto_on_a_gpu_goes_by_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decisions, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(dispatch, "architecture", lambda device: "sm_90")
    monkeypatch.setitem(dispatch.BREAK_EVEN, ("sm_90", 64, 32), BreakEven(100, 200, "f.json"))
    gpu = site(device=torch.device("cuda"), dtype=torch.bfloat16)
    assert codes(gpu, LayerPlan()) == []
    (reason,) = decide(replace(gpu, num_keys=99), LayerPlan()).reasons
    assert reason.text == "min(N_q, N_k) is 99, min_seq_len is 100 (auto, f.json)"
    assert codes(replace(gpu, is_causal=True), LayerPlan()) == ["min-seq-len"]
    assert decide(replace(gpu, num_queries=symbol(128)), LayerPlan()).min_seq_len == 100
    monkeypatch.setitem(dispatch.BREAK_EVEN, ("sm_90", 32, 16), BreakEven(100, None, "f.json"))
    assert codes(replace(gpu, head_dim=32), LayerPlan()) == []
    assert codes(replace(gpu, head_dim=32, is_causal=True), LayerPlan()) == ["not-faster"]
    for unknown in (replace(gpu, head_dim=128), replace(gpu, dtype=torch.float32)):
        assert codes(unknown, LayerPlan()) == ["not-faster"]
    (reason,) = decide(gpu, LayerPlan(group_size=4)).reasons
    assert "not known to be faster on sm_90 in bfloat16 at width 64, G = 4" in reason.text
    assert codes(gpu, LayerPlan(group_size=3)) == ["rank", "not-faster"]


@pytest.mark.parametrize("symbolic", ["num_queries", "num_keys"])
def test_a_symbolic_length_is_left_to_the_op(symbolic: str) -> None:
    plan = replace(FORCED, min_seq_len=100)
    decision = decide(site(**{symbolic: symbol(20)}), plan)
    assert (decision.decision, decision.min_seq_len) == ("distr", 100)
    # The other length is known to be too short.
    other = {"num_queries": "num_keys", "num_keys": "num_queries"}[symbolic]
    assert codes(site(**{symbolic: symbol(200), other: 99}), plan) == ["min-seq-len"]


def test_gradients_only_where_they_would_be_recorded() -> None:
    needs = site(requires_grad=True)
    assert codes(needs, FORCED, grad_mode=True) == ["gradients"]
    assert codes(needs, FORCED, grad_mode=False) == codes(site(), FORCED, grad_mode=True) == []


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn, torch.complex64])
def test_dtypes(dtype: torch.dtype) -> None:
    assert codes(site(dtype=dtype), FORCED) == ([] if dtype in DTYPES else ["dtype"])


def test_every_reason_is_collected() -> None:
    shared = Reason("shared-graph", "graph shared by layers a, b")
    hard = site(num_queries=4, num_keys=8, requires_grad=True, dtype=torch.complex64)
    plan = LayerPlan(group_size=3, min_seq_len=64)
    decision = decide(hard, plan, (shared,), grad_mode=True)
    assert [reason.code for reason in decision.reasons] == [
        *("rank", "shared-graph", "decode", "min-seq-len", "gradients", "dtype"),
    ]
    assert not decision.is_distr
    assert decision.min_seq_len == 0


def test_group_size_1_is_said_without_the_lengths() -> None:
    plan = LayerPlan(group_size=1, min_seq_len=10**6)
    assert codes(site(num_queries=1), plan) == ["group-size-1"]


def test_flops() -> None:
    assert flops(site()) == 2 * 2 * 4 * 128 * 128 * (64 + 64)
    one = site(num_queries=symbol(50), num_keys=70, value_dim=32)
    assert flops(one) == 2 * 2 * 4 * 50 * 70 * (64 + 32)
