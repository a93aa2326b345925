"""The op ``torch.ops.distr.attention``: what it accepts, what it promises, what runs it.

Importing this module registers the op. There is no arithmetic here: ``reference.py`` in
``kernels/attention`` defines the result, ``choose.py`` names what computes it, and ``sdpa.py``
computes what has to be exact because it is short.

The op is opaque to the compiler. Where gradients are recorded it is that of ``gradients.py``.

Layout: the output is a ``(B, H, N, d_v)`` view of memory in the order B, N, H, d_v, whatever the
strides of the inputs, because models go on with ``out.transpose(1, 2).reshape(B, N, H * d_v)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from distr_compile.kernels.plan import geometry
from distr_compile.lowering import choose, exactly, gradients, sdpa, sharded, tangents
from distr_compile.lowering.call import (
    KEYWORDS,
    Approximation,
    Arguments,
    Call,
    Scores,
    read_arguments,
)
from distr_compile.lowering.checks import is_short, validate
from distr_compile.lowering.flops import attention_flops
from distr_compile.lowering.registering import (
    LIBRARY,
    empty_output,
    lay_out,
    register,
    register_autocast,
)
from distr_compile.lowering.saved import dropout_of
from distr_compile.lowering.told import tell

SCHEMA = (
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask=None, Tensor? basis_q=None, "
    "Tensor? basis_k=None, Tensor? sinks=None, Tensor? dropout_seed=None, "
    f"*, {KEYWORDS}) -> Tensor"
)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    basis_q: Tensor | None = None,
    basis_k: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_seed: Tensor | None = None,
    *,
    scale: float,
    is_causal: bool = False,
    causal_offset: int | None = None,
    rank: int,
    estimator: str,
    grouping_block: int,
    rounds: int = 1,
    strict: bool = False,
    min_seq_len: int = 0,
    seed: int = 0,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    site: int = -1,
) -> Tensor:
    """What ``torch.ops.distr.attention`` runs on real tensors.

    Args:
        q: ``(B, H, N, d)``, fp32, fp16, bf16 or fp64, any strides.
        k: ``(B or 1, H_k, M, d)``; H_k divides H, query head h uses key head ``h // (H / H_k)``.
        v: ``(B or 1, H_k, M, d_v)``.
        mask: broadcastable to ``(B, H, N, M)``; bool (True = attend), or any floating dtype (added
            to the scaled scores).
        basis_q: A of ``calibrated``, and of no other estimator: ``(H_k, d, r)`` fp32. Where the
            call has kernels and half-precision inputs it is rounded to their dtype; else the
            products are fp32.
        basis_k: B, likewise.
        sinks: ``(H,)`` floating: a logit per head that adds to the denominator of the softmax only.
        dropout_seed: ``()`` int64, with ``dropout_p`` > 0: which weights are dropped follows from
            it and their places (``kernels/attention/dropout.py``). Whoever makes the call draws it.
        scale: multiplies Q K^T; give the scale of the original width d.
        is_causal: row i sees keys ``j <= i + causal_offset``, from the top left as in SDPA.
        causal_offset: 0 when None; only with ``is_causal``.
        rank: columns left of the d: d itself (exact, by our kernel where there is one), or fewer
            that are at least 16; the LSH estimators take divisors of d only.
        estimator: a name in ``estimators.ESTIMATORS``.
        grouping_block: query rows per grouping; 0 for ``estimators.auto_grouping_block``.
        rounds: how often the estimator refines its basis: 1, or 2 where it takes that.
        strict: no row of the result depends on later rows or keys, where no mask shows row i a key
            ``j > i + causal_offset``: the approximation neither, at the cost of exact scores for
            the keys of each grouping block and later ones. ``projection`` takes its basis from the
            blocks before (``Estimator.strict`` calls it the prefix form); ``calibrated`` is so
            anyway; others refuse. Also without ``is_causal``, where the mask says it.
        min_seq_len: exact attention where ``min(N, M)`` is below it; always where N < 16.
        seed: names the random numbers of the estimator.
        softcap: c > 0 turns a scaled score s into ``c * tanh(s / c)``, before mask and causality.
        dropout_p: from 0 to 1: the share of the weights that is dropped; the others are divided by
            1 - p. Sinks stay.
        site: number handed to who is ``listening`` (``told.py``).

    Returns:
        ``(B, H, N, d_v)`` in the dtype of q, memory in the order B, N, H, d_v. Rows that see no
        key, by a bool mask, a float mask of -inf or causality, are 0.

    Raises:
        ValueError: shapes, dtypes or options that do not fit together.
        NotImplementedError: a ``torch.func`` transform; as ``NoArithmeticError``, an estimator that
            nothing computes on the device.
    """
    key = None
    if q.device.type in choose.PLANNED:
        options = (scale, is_causal, causal_offset, rank, estimator, grouping_block, rounds)
        more = (strict, min_seq_len, seed, softcap, dropout_p)
        tensors = (q, k, v, mask, sinks, basis_q, basis_k, dropout_seed)
        key = (geometry(*tensors), options, more)
        plan = choose.plans.get(key)
        if plan is not None and not exactly.is_computing_exactly():
            out = empty_output(q, v)
            given = None if basis_q is None else (basis_q, basis_k)
            plan(q, k, v, mask, sinks, dropout_seed, given, out)
            return out
    approximation = Approximation(estimator, rank, grouping_block, rounds, seed, strict)
    scores = Scores(scale, is_causal, causal_offset, softcap, dropout_p)
    arguments = Arguments(approximation, scores, min_seq_len, site)
    bases = validate(q, k, v, mask, (basis_q, basis_k), (sinks, dropout_seed), arguments)
    if dropout_p == 1:
        return empty_output(q, v).zero_()
    dropout = dropout_of(q, dropout_p, dropout_seed)
    softmax = scores.softmax(sinks, dropout)
    if exactly.is_computing_exactly():
        return lay_out(exactly.attention(q, k, v, mask, **softmax))
    if is_short(q.shape[2], k.shape[2], min_seq_len):
        if rank < q.shape[3]:
            tell(site, None)
        return lay_out(sdpa.attention(q, k, v, mask, **softmax))
    out = empty_output(q, v)
    done = choose.run(Call(q, k, v, mask, sinks, scores, approximation, bases, out, key, dropout))
    is_exact = done.by == choose.EXACT and rank < q.shape[3]
    if handover := done.handover(is_exact=is_exact):
        tell(site, handover)
    return out


def _attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    basis_q: Tensor | None = None,
    basis_k: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_seed: Tensor | None = None,
    **options: Any,
) -> Tensor:
    rest = (sinks, dropout_seed)
    validate(q, k, v, mask, (basis_q, basis_k), rest, read_arguments(options))
    return empty_output(q, v)


def _attention_autograd(*tensors: Tensor | None, **options: Any) -> Tensor:
    """The op where autograd is on: by the recorded form where a gradient is asked for.

    A tangent is asked of PyTorch's products. Where nothing stands between here and the
    implementation, that is called outright: going through the dispatcher again would cost a third
    of the host time of a small call.
    """
    if tangents.are_carried(tensors):
        return _by_products(tensors, options)
    if gradients.are_recorded(tensors):
        sharded.prepare(tensors)
        return gradients.recorded(*tensors, **options)
    go: Callable[..., Tensor] = attention
    if not _are_plain(tensors):
        sharded.prepare(tensors)
        go = call
    with torch._C._AutoDispatchBelowAutograd():
        return go(*tensors, **options)


def _by_products(tensors: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
    """The op where forward-mode AD carries a tangent of an input: exact, with the tangent."""
    given: list[Any] = [*tensors, *[None] * (8 - len(tensors))]
    q, k, v, mask, basis_q, basis_k, sinks, seed = given
    arguments = read_arguments(options)
    validate(q, k, v, mask, (basis_q, basis_k), (sinks, seed), arguments)
    scores = arguments.scores
    if scores.dropout_p == 1:
        return empty_output(q, v).zero_()
    if arguments.approximation.rank < q.shape[3]:
        tell(arguments.site, tangents.HANDOVER)
    softmax = scores.softmax(sinks, dropout_of(q, scores.dropout_p, seed))
    return lay_out(tangents.attention(q, k, v, mask, **softmax))


def _are_plain(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether nothing stands between a call and ``attention``: subclass, negation, mode, kernel."""
    if torch._C._len_torch_dispatch_stack() or not all(
        t is None or (type(t) in (Tensor, Parameter) and not t.is_neg()) for t in tensors
    ):
        return False
    # Somebody may have put a kernel of their own in this one's place.
    device = tensors[0].device.type if tensors[0] is not None else "cpu"
    key = torch._C._dispatch_key_for_device(device)
    return not torch._C._dispatch_has_kernel_for_dispatch_key("distr::attention", key)


register("attention", SCHEMA, attention, _attention_fake, attention_flops)
LIBRARY.impl("attention", _attention_autograd, "Autograd")
register_autocast("attention")

call = torch.ops.distr.attention.default
"""The op as PyTorch dispatches it."""
