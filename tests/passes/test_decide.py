"""Per site: distr or exact, with every reason."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from distr_compile.estimators import ESTIMATORS, possible_group_sizes
from distr_compile.lowering.call import Approximation, Shape
from distr_compile.passes.decide import DTYPES, decide, decide_bare, flops
from distr_compile.passes.site import AttentionSite, Causal, Level
from distr_compile.passes.steps import AddStep, FillStep
from distr_compile.policy import LayerPlan
from distr_compile.reporting import Reason

FORCED = LayerPlan(estimator="lsh-mean", min_seq_len=0)
PROJECTION = LayerPlan(min_seq_len=0, estimator="projection")


def site(**fields: Any) -> AttentionSite:
    """2 x 4 heads x 128 tokens x width 64 in float32 on the CPU."""
    node = fx.Graph().placeholder("softmax")
    sizes = {"batch": 2, "num_heads": 4, "num_key_heads": 4, "num_queries": 128, "num_keys": 128}
    if (given := fields.pop("mask", None)) is not None:  # that of an SDPA call
        fields["steps"] = (AddStep(given, Level((2, 4, 128, 128)), node, 1),)
    return AttentionSite(
        anchor=node,
        form="matmul softmax matmul",
        output=node,
        **{"dtype": torch.float32, "device": torch.device("cpu"), "head_dim": 64, "value_dim": 64}
        | {"kind": "softmax"}
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
    assert (decision.is_distr, decision.reasons) == (True, ())
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


@pytest.mark.parametrize("head_dim", [16, 24, 32, 40, 64, 96])
@pytest.mark.parametrize("rank", [16, 20, 24, 32, 40, 48, 64, 96])
def test_ranks_that_fit_the_width(head_dim: int, rank: int) -> None:
    for plan, any_rank in ((FORCED, False), (PROJECTION, True)):
        decision = decide(site(head_dim=head_dim), replace(plan, rank=rank))
        fits = rank < head_dim and (any_rank or head_dim % rank == 0)
        assert [reason.code for reason in decision.reasons] == ([] if fits else ["rank"])
        assert decision.rank == rank


@pytest.mark.parametrize("group_size", [2, 3, 4, 5, 8])
def test_projection_rounds_the_rank_down(group_size: int) -> None:
    plan = replace(PROJECTION, group_size=group_size)
    assert codes(site(), plan) == ([] if group_size <= 4 else ["rank"])
    assert decide(site(), plan).rank == 64 // group_size


@pytest.mark.parametrize(
    ("plan", "width", "text"),
    [
        (
            replace(FORCED, rank=40),
            64,
            "rank: got 40 for head width 64; with lsh-mean it must be less than the width and "
            "divide it: one of 32, 16; projection or calibrated takes any from 16 to 63",
        ),
        (
            replace(FORCED, rank=64),
            64,
            "rank: got 64 for head width 64, which is exact attention; with lsh-mean it must be "
            "less than the width and divide it: one of 32, 16; projection or calibrated takes any "
            "from 16 to 63",
        ),
        (
            replace(FORCED, rank=20),
            24,
            "rank: got 20 for head width 24; with lsh-mean it must be less than the width and "
            "divide it: none does; projection or calibrated takes any from 16 to 23",
        ),
        (
            replace(PROJECTION, rank=99),
            64,
            "rank: got 99 for head width 64, which is exact attention; must be less than the "
            "width: 16 to 63",
        ),
        (
            replace(PROJECTION, rank=16),
            16,
            "rank: got 16 for head width 16, which is exact attention; no rank is less than this "
            "width and at least 16",
        ),
        (
            replace(PROJECTION, group_size=5),
            64,
            "group_size: got 5 for head width 64; must leave at least 16 columns: at most 4",
        ),
    ],
)
def test_the_text_for_a_rank_says_what_fits(plan: LayerPlan, width: int, text: str) -> None:
    assert decide(site(head_dim=width), plan).reasons == (Reason("rank", text),)


STRICT = replace(FORCED, causal="strict", grouping_block=64)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_strict_causality_leaves_what_looks_ahead_exact(estimator: str) -> None:
    plan = replace(STRICT, estimator=estimator)
    sees, how = ESTIMATORS[estimator].sees, ESTIMATORS[estimator].strict
    for anything_goes in (
        decide(site(), plan),
        decide(site(causal=Causal(0)), replace(plan, causal="block")),
    ):
        assert (anything_goes.reasons, anything_goes.strict) == ((), False)
        assert anything_goes.columns(64)["sees"] == sees
    decision = decide(site(causal=Causal(0), mask_kind="causal"), plan)
    text = f"causal is strict, and {estimator} sees {sees}"
    assert decision.reasons == ((Reason("looks-ahead", text),) if how == "never" else ())
    assert decision.strict == (how == "prefix")
    strictly = {"prefix": "earlier rows and keys only", "never": None}.get(how, sees)
    assert decision.columns(64).get("sees") == strictly


def mask(*shape: int) -> fx.Node:
    node = fx.Graph().placeholder("mask")
    node.meta["example_value"] = torch.zeros(shape)
    return node


@pytest.mark.parametrize(
    ("shape", "may_be_causal"),
    [((2, 1, 128, 128), True), ((128, 128), True), ((2, 1, 1, 128), False), ((128,), False)],
)
def test_strict_causality_with_a_mask_of_unknown_content(
    shape: tuple[int, ...], may_be_causal: bool
) -> None:
    """A mask with a row per query may be a causal one that came in as an input."""
    node, level = mask(*shape), Level((2, 4, 128, 128))
    given = site(kind="sdpa", mask=node, mask_kind="float")
    added = site(steps=(AddStep(node, level, node, 1),), mask_kind="float")
    filled = site(
        steps=(FillStep(node, level, node, -1e9, False, torch.float32),), mask_kind="bool"
    )
    for found in (given, added, filled):
        assert codes(found, FORCED) == []
        assert codes(found, STRICT) == (["looks-ahead"] if may_be_causal else [])
        prefix = decide(found, replace(PROJECTION, causal="strict", grouping_block=64))
        assert (prefix.is_distr, prefix.strict) == (True, may_be_causal)
    if may_be_causal:
        (reason,) = decide(given, STRICT).reasons
        assert reason.text.endswith('may be causal; causal = "block" if it is not')


def test_the_strict_form_behind_a_mask_needs_as_many_keys_as_queries() -> None:
    """With fewer, a causal mask may be aligned at the end: earlier keys by place are later ones."""
    strict, n = replace(PROJECTION, causal="strict", grouping_block=64), symbol(128)
    given = site(kind="sdpa", mask=mask(128, 128), mask_kind="float")
    for queries, keys, expected in [
        (100, 128, []),
        (128, 100, ["looks-ahead"]),
        (n, n, []),
        (n, 128, ["looks-ahead"]),
    ]:
        found = replace(given, num_queries=queries, num_keys=keys)
        assert codes(found, strict) == expected
        assert codes(found, PROJECTION) == []
        # Where the graph itself says causal, it says with which offset.
        causal = replace(found, steps=(), causal=Causal(0), mask_kind="causal")
        assert codes(causal, strict) == []


def test_the_strict_form_needs_a_second_block() -> None:
    strict = replace(PROJECTION, causal="strict", grouping_block="auto")
    for rows, block, expected in [
        (512, "auto", ["one-block"]),
        (513, "auto", []),
        (128, 128, ["one-block"]),
        (128, 127, []),
        (symbol(128), 128, []),
    ]:
        found = site(causal=Causal(0), mask_kind="causal", num_queries=rows, num_keys=rows)
        assert codes(found, replace(strict, grouping_block=block)) == expected
        assert codes(found, replace(strict, grouping_block=block, causal="block")) == []
        calibrated = replace(strict, grouping_block=block, estimator="calibrated")
        assert codes(found, calibrated) == []
        assert codes(replace(found, causal=None, mask_kind="none"), strict) == []


def test_strict_causality_with_masks_inside_a_fused_call() -> None:
    for kind in ("mha", "encoder"):
        assert codes(site(kind=kind, mask_kind="bool"), STRICT) == ["looks-ahead"]
        assert codes(site(kind=kind), STRICT) == []


def test_a_symbolic_width() -> None:
    (reason,) = decide(site(head_dim=symbol(64)), FORCED).reasons
    assert reason == Reason("rank", "the head width is not known while compiling")
    assert codes(site(head_dim=symbol(64)), replace(PROJECTION, rank=16)) == ["rank"]


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


def test_auto_refuses_no_length_here() -> None:
    """Who rewrites the site asks how fast it is."""
    assert codes(site(num_queries=20), LayerPlan()) == []
    decision = decide(site(num_queries=symbol(20)), LayerPlan())
    assert (decision.is_distr, decision.min_seq_len) == (True, 0)


@pytest.mark.parametrize("symbolic", ["num_queries", "num_keys"])
def test_a_symbolic_length_is_left_to_the_op(symbolic: str) -> None:
    plan = replace(FORCED, min_seq_len=100)
    decision = decide(site(**{symbolic: symbol(20)}), plan)
    assert (decision.is_distr, decision.min_seq_len) == (True, 100)
    # The other length is known to be too short.
    other = {"num_queries": "num_keys", "num_keys": "num_queries"}[symbolic]
    assert codes(site(**{symbolic: symbol(200), other: 99}), plan) == ["min-seq-len"]


def test_gradients_only_where_they_would_be_recorded() -> None:
    needs = site(requires_grad=True)
    (reason,) = decide(needs, FORCED).reasons
    assert reason.code == "gradients"
    assert 'the policy says training = "exact": set "approximate"' in reason.text
    assert codes(site(), FORCED) == []
    assert codes(needs, replace(FORCED, training="approximate")) == []


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn, torch.complex64])
def test_dtypes(dtype: torch.dtype) -> None:
    assert codes(site(dtype=dtype), FORCED) == ([] if dtype in DTYPES else ["dtype"])


def test_every_reason_is_collected() -> None:
    shared = Reason("shared-graph", "graph shared by layers a, b")
    hard = site(num_queries=4, num_keys=8, requires_grad=True, dtype=torch.complex64)
    plan = LayerPlan(estimator="lsh-mean", group_size=3, min_seq_len=64, causal="strict")
    hard = replace(hard, causal=Causal(0))
    decision = decide(hard, plan, (shared,))
    assert [reason.code for reason in decision.reasons] == [
        *("rank", "looks-ahead", "shared-graph", "decode", "min-seq-len", "gradients", "dtype"),
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


# --- the value that is decided ---


def test_the_approximation_has_what_the_plan_says() -> None:
    plan = LayerPlan(rank=24, rounds=2, grouping_block=16, min_seq_len=0, causal="strict")
    expected = Approximation("projection", 24, block=16, rounds=2)
    assert decide(site(), plan).approximation == expected
    assert decide(site(causal=Causal(0)), plan).approximation == replace(expected, strict=True)
    assert decide(site(), FORCED).approximation == Approximation("lsh-mean", 32)


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("causal", ["block", "strict"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("mask", [None, (2, 1, 1, 600), (600, 600)])
def test_a_bare_shape_is_decided_as_the_site_that_called(
    name: str, causal: Any, is_causal: bool, mask: tuple[int, ...] | None
) -> None:
    node = None
    if mask is not None:
        node = fx.Graph().placeholder("mask")
        node.meta["example_value"] = torch.empty(mask, dtype=torch.bool, device="meta")
    sizes = {"num_queries": 600, "num_keys": 600}
    causal_by = Causal(0) if is_causal else None
    made = site(**sizes, causal=causal_by, mask=node, mask_kind="bool" if mask else "none")
    shape = Shape(
        *(2, 4, 4, 600, 600, 64, 64, is_causal),
        None if mask is None else (mask, torch.bool),
        *(made.dtype, made.device),
    )
    for fields in ({"group_size": 2}, {"rank": 16, "grouping_block": 32}, {"group_size": 1}):
        for length in (0, 600, 601, "auto"):
            plan = LayerPlan(estimator=name, causal=causal, min_seq_len=length, **fields)
            decision = decide(made, plan)
            if "looks-ahead" in [reason.code for reason in decision.reasons]:
                continue  # of the site only: a candidate that it refuses is left out
            bare = decide_bare(shape, plan)
            assert bare == (decision.approximation if decision.is_distr else None)


def test_a_bare_decode_step_is_exact() -> None:
    shape = Shape(1, 4, 4, 15, 600, 64, 64, False, None, torch.float32, torch.device("cpu"))
    assert decide_bare(shape, FORCED) is None
    assert decide_bare(shape._replace(num_queries=16), FORCED) is not None
