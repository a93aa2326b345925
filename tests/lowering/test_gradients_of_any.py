"""Gradients of the op against autograd of the definition, whatever its options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distr_compile.estimators import ESTIMATORS
from distr_compile.kernels.attention import reference
from distr_compile.lowering.checks import is_short
from tests.lowering.test_gradients import _constant_bases, bases, draw, leaves, op  # noqa: F401


@st.composite
def calls(drawn: st.DrawFn) -> tuple[tuple[int, ...], str, dict[str, Any], bool]:
    """Sizes as in ``CASES``, the kind of mask, options, and whether there are sinks."""
    number = st.integers
    rep, key_heads, batch = drawn(number(1, 3)), drawn(number(1, 2)), drawn(number(1, 2))
    rows, keys = drawn(number(1, 80)), drawn(number(1, 230))
    head_dim = 2 * drawn(number(16, 30))
    sizes = (batch, rep * key_heads, key_heads, rows, keys, head_dim, drawn(number(1, 50)))
    estimator = drawn(st.sampled_from(sorted(ESTIMATORS)))
    options = {
        "estimator": estimator,
        "rank": drawn(st.sampled_from([head_dim // 2, head_dim])),
        "grouping_block": drawn(st.sampled_from([0, 7, 16, 33])),
        "softcap": drawn(st.sampled_from([0.0, 1.5])),
        "scale": drawn(st.sampled_from([0.1, 0.3])),
        "seed": drawn(st.sampled_from([0, 5])),
        "min_seq_len": drawn(st.sampled_from([0, 30])),
    }
    if estimator == "projection":
        options["rounds"] = drawn(number(1, 2))
    if drawn(st.booleans()):
        options |= {"is_causal": True, "causal_offset": drawn(number(-20, 100))}
        if estimator == "projection" and options["grouping_block"] >= 16:
            options["strict"] = drawn(st.booleans())
    mask = drawn(st.sampled_from(["", "bool", "keys", "rows", "all"]))
    return sizes, mask, options, drawn(st.booleans())


@given(calls())
@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@pytest.mark.usefixtures("_constant_bases")
def test_any_options(call: tuple[tuple[int, ...], str, dict[str, Any], bool]) -> None:
    """In fp64, and of given bases also in fp32, by the fused kernel where it computes the call.

    The bases of ``projection`` are the call's own, held constant; the condition of its Gram
    matrices is felt, as in ``test_in_double_precision``. Of fewer rows or keys than the rank, A and
    B have columns that rounding alone makes: they leave the scores alone, but not the gradients of
    Q and K outside of what the rows span. There each row's gradient is compared along the row,
    which is the sum over its scores s of s dL/ds.
    """
    (B, H, Hk, N, M, d, dv), kind, options, has_sinks = call
    shapes = {"keys": (B, 1, 1, M), "rows": (H, N, 1), "all": (B, H, N, M), "bool": (B, 1, N, M)}
    is_given = options["estimator"] == "calibrated"
    A, Bb = bases(Hk, d, options["rank"]) if is_given else (None, None)
    q, k, v = draw(B, H, N, d), draw(B, Hk, M, d, seed=1), draw(B, Hk, M, dv, seed=2)
    mask = draw(*shapes[kind], seed=3) if kind else None
    mask = mask > -0.5 if mask is not None and kind == "bool" else mask
    sinks = draw(H, seed=4) if has_sinks else None
    weights = draw(B, H, N, dv, seed=9)
    wanted = leaves([q, k, v, mask, None, None, sinks])
    defined = {name: x for name, x in options.items() if name != "min_seq_len"}
    exact = is_short(N, M, options["min_seq_len"]) or options["rank"] == d
    if exact:
        defined |= {"rank": d, "estimator": "lsh-mean", "strict": False}
    given_bases = (A.double(), Bb.double()) if is_given and not exact else None
    out = reference.attention(q, k, v, mask, sinks=sinks, bases=given_bases, **defined)
    expected = torch.autograd.grad(out, wanted, weights)
    rows = min(options["grouping_block"] or N, N)
    is_thin = min(rows, N % rows or rows, M) < options["rank"] or "is_causal" in options
    is_along_rows = options["estimator"] == "projection" and not exact and is_thin
    double = 1e-7 if options["estimator"] == "projection" else 1e-11
    for dtype, bound in ((torch.float64, double), (torch.float32, 1e-4)):
        if dtype == torch.float32 and not is_given:
            continue  # a hash of fp32 numbers may group other columns
        for mask_grad in (True, False):
            cast = [
                t if t is None or t.dtype == torch.bool else t.detach().to(dtype)
                for t in (q, k, v, mask, A, Bb, sinks)
            ]
            cast[4:6] = A, Bb
            asked = leaves(cast, "" if mask_grad else "without gradient")
            got = torch.autograd.grad(op(*cast, **options), asked, weights.to(dtype))
            kept = [
                g for g, leaf in zip(expected, wanted, strict=True) if mask_grad or leaf is not mask
            ]
            for i, (mine, theirs) in enumerate(zip(got, kept, strict=True)):
                if is_along_rows and i < 2:
                    mine, theirs = ((x * (q, k)[i]).sum(-1) for x in (mine, theirs))
                assert (mine.double() - theirs).norm() <= bound * (theirs.norm() + 1)
