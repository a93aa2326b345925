"""Attention as a function to call, with the conventions of SDPA: no graph, no policy file."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from distr_compile.estimators import ESTIMATORS
from distr_compile.kernels.attention.dropout import MOST_SEEDS
from distr_compile.lowering import op
from distr_compile.lowering.call import Approximation, Scores, Shape, op_arguments
from distr_compile.passes.decide import decide_bare, may_be_causal, rank_fault
from distr_compile.policy import LayerPlan
from distr_compile.policy.errors import check_type, sentence, shown
from distr_compile.policy.plan import OPTIONS


class _Unsaid(int):
    """A default that can be told from the same number given by a caller."""


_TWO = _Unsaid(2)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    group_size: int = _TWO,
    rank: int | None = None,
    estimator: str = "projection",
    rounds: int = 1,
    grouping_block: int | Literal["auto"] = "auto",
    causal: Literal["block", "strict"] = "block",
) -> Tensor:
    """Compute softmax(Q K^T) V with Q and K made narrower, as DistrAttention (arXiv 2507.17245).

    The first arguments are those of ``F.scaled_dot_product_attention``, so that one name is all a
    caller changes. What is left out of the scores is for the caller to judge: nothing is measured,
    and a call is approximated whether or not that is faster. Only with fewer than 16 query rows,
    where there is nothing to group over, the result is exact.

    Gradients flow to Q, K, V and a floating mask as if what made Q and K narrow were constant: they
    are those of the approximation at the same groups or basis, as docs/training.md describes.

    Args:
        query: ``(B, H, N, d)`` or ``(B, N, d)``, fp32, fp16, bf16 or fp64, any strides.
        key: ``(B, H_k, M, d)`` or ``(B, M, d)``; leading sizes of 1 are broadcast, of all three.
        value: ``(B, H_k, M, d_v)`` or ``(B, M, d_v)``.
        attn_mask: it broadcasts to ``(B, H, N, M)``, or ``(B, N, M)``; bool (True attends) or
            floating (added to the scaled scores).
        dropout_p: from 0 to 1: the share of the weights that is dropped, as a seed says that is
            drawn from PyTorch's generator of the device.
        is_causal: row i sees keys ``j <= i`` only, counted from the top left. A mask may stand
            beside it, which SDPA refuses; a key is then seen where both let it.
        scale: multiplies Q K^T; ``1 / sqrt(d)`` if None.
        enable_gqa: H may be a multiple of H_k; query head h uses key head ``h // (H / H_k)``.
        group_size: columns of Q and K merged into one, G* in the paper; 1 is exact attention. At
            least 16 columns must be left.
        rank: columns left of the d of Q and K, in the place of ``group_size``.
        estimator: how Q and K become narrow, a name in ``distr_compile.estimators.ESTIMATORS``
            that needs no bases.
        rounds: how often the estimator refines its basis.
        grouping_block: query rows that share one grouping, or "auto".
        causal: "strict" lets no row depend on later rows, where ``is_causal`` is set or the mask
            has a row per query and may be causal. A mask over fewer keys than queries does not
            tell which come first: such a call is exact. With "block", the narrow Q and K of a
            grouping block are made from all of its rows.

    Returns:
        ``(B, H, N, d_v)``, or ``(B, N, d_v)``, in the dtype of ``query``. Rows that see no key
        are 0.

    Raises:
        ValueError: sizes, dtypes or options that do not fit together; ``group_size`` and ``rank``
            both given.
        TypeError: no tensor, number or bool where there must be one.
        NotImplementedError: a transform of ``torch.func``.
    """
    q, k, v, arguments = planned(
        query,
        key,
        value,
        attn_mask,
        dropout_p,
        is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
        group_size=group_size,
        rank=rank,
        estimator=estimator,
        rounds=rounds,
        grouping_block=grouping_block,
        causal=causal,
    )
    rest = (None, None, None, drawn_seed(q)) if dropout_p else ()
    out: Tensor = op.call(q, k, v, attn_mask, *rest, **arguments)
    return out if query.dim() == 4 else out.squeeze(0)


def planned(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    *,
    scale: float | None,
    enable_gqa: bool,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """What ``attention`` calls the op with: Q, K and V of four axes, and the op's keywords.

    The mask goes beside them as it is. All arguments of ``attention`` are given.

    Raises:
        ValueError: as ``attention``, and TypeError.
    """
    plan = _plan(**options)
    for name, flag in (("is_causal", is_causal), ("enable_gqa", enable_gqa)):
        check_type(name, flag, bool, "True or False", "give one of these")
    share = number_of("dropout_p", dropout_p, "a number from 0 to 1", "give 0.0 for none")
    if scale is not None:
        scale = number_of("scale", scale, "a number, or None", "multiply a tensor into query")
    q, k, v = four_axes(query, key, value, attn_mask, enable_gqa)
    approximation = approximated(q, k, v, attn_mask, plan, is_causal)
    if isinstance(approximation, str):
        raise ValueError(approximation)
    scale = max(q.shape[3], 1) ** -0.5 if scale is None else scale
    scores = Scores(scale, is_causal, dropout_p=share)
    return q, k, v, op_arguments(approximation, scores)


def approximated(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, plan: LayerPlan, is_causal: bool
) -> Approximation | str:
    """What a call comes to, as far as its tensors tell; of how fast it is nothing is asked.

    Args:
        q: ``(B, H, N, d)``; k, v and mask as the op takes them.
        k: see ``q``.
        v: see ``q``.
        mask: see ``q``.
        plan: what is asked for; "auto" for ``min_seq_len`` counts as 0.
        is_causal: row i sees keys ``j <= i`` only.

    Returns:
        The approximation, of rank d where the call is exact; or why the plan cannot stand here.
    """
    (batch, heads, queries, width), (_, key_heads, keys, _) = q.shape, k.shape
    shape = Shape(
        batch=batch,
        num_heads=heads,
        num_key_heads=key_heads,
        num_queries=queries,
        num_keys=keys,
        head_dim=width,
        value_dim=v.shape[3],
        is_causal=is_causal,
        mask=None if mask is None else (tuple(mask.shape), mask.dtype),
        dtype=q.dtype,
        device=q.device,
    )
    if plan.is_exact:
        return Approximation.none(width)
    if fault := rank_fault(width, plan):
        return f"{fault}; or take exact attention: group_size = 1"
    if plan.causal == "strict" and (is_causal or may_be_causal(shape)):
        row = ESTIMATORS[plan.estimator]
        if row.strict == "never":
            able = " or ".join(
                e.name for e in ESTIMATORS.values() if e.strict != "never" and e.needs == "nothing"
            )
            got = f"'strict' with estimator {plan.estimator!r}, which sees {row.sees}"
            return sentence(
                "causal", got, "'block' with it", f"take estimator={able!r}, or causal='block'"
            )
        if row.strict == "prefix" and not is_causal and keys < queries:
            return Approximation.none(width)
    return decide_bare(shape, plan) or Approximation.none(width)


def drawn_seed(q: Tensor) -> Tensor:
    """A seed for the dropout of a call: ``()`` int64, from PyTorch's generator of q's device."""
    return torch.randint(MOST_SEEDS, (), dtype=torch.int64, device=q.device)


def _plan(*, group_size: int, rank: int | None, **fields: Any) -> LayerPlan:
    """The options as a plan, each checked as a policy checks it."""
    if rank is None:
        fields["group_size"] = int(group_size) if group_size is _TWO else group_size
    elif group_size is not _TWO:
        got = f"{shown(group_size)} beside rank {shown(rank)}"
        accepted = "one of group_size and rank"
        raise ValueError(sentence("group_size", got, accepted, "leave one of them out"))
    else:
        fields["rank"] = rank
    for name, value in fields.items():
        option = OPTIONS[name]
        if not option.accepts(value):
            raise ValueError(sentence(name, shown(value), option.accepted, "give one of these"))
    row = ESTIMATORS[fields["estimator"]]
    if fields["rounds"] not in row.rounds:
        accepted = f"{' or '.join(map(str, row.rounds))} with estimator {row.name!r}"
        raise ValueError(sentence("rounds", str(fields["rounds"]), accepted, "give one of these"))
    if row.needs == "bases":
        accepted = ", ".join(e.name for e in ESTIMATORS.values() if e.needs == "nothing")
        advice = "use its bases through a policy and torch.compile(backend='distr')"
        raise ValueError(sentence("estimator", repr(row.name), accepted, advice))
    return LayerPlan(**fields, min_seq_len=0)


def check_tensors(query: object, key: object, value: object) -> None:
    """Refuse what is no tensor, and tensors whose memory has no strides.

    Nested ones are for the caller to refuse, who knows what to give instead.

    Raises:
        TypeError: the first of them that is none, by its name.
        ValueError: the first that is sparse, or in the format of MKL-DNN.
    """
    for name, t in (("query", query), ("key", key), ("value", value)):
        check_type(name, t, Tensor, "a tensor", "give Q, K and V as for SDPA")
        check_layout(name, t)


def check_layout(name: str, t: Any) -> None:
    """Refuse a tensor whose memory has no strides, other than a nested one.

    Raises:
        ValueError: it is sparse, or in the format of MKL-DNN.
    """
    if not t.is_nested and t.layout != torch.strided:
        advice = f"give {name}.to_dense()"
        raise ValueError(sentence(name, f"a tensor of {t.layout}", "a tensor with strides", advice))


def number_of(key: str, value: Any, accepted: str, advice: str, *, whole: bool = False) -> Any:
    """A number, also of numpy or in a tensor of one that records no gradient, as PyTorch takes it.

    Raises:
        TypeError: it is none, or ``whole`` asks for an integer.
    """
    kinds = (int, torch.SymInt) if whole else (int, float, torch.SymInt, torch.SymFloat)
    if not isinstance(value, kinds):
        is_one = getattr(value, "ndim", None) == 0 and not getattr(value, "requires_grad", False)
        value = value.item() if is_one else value
    check_type(key, value, kinds, accepted, advice)
    return value


def four_axes(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Q, K and V as the op takes them, views; the leading axis of three counts as heads.

    Args:
        query: ``(B, H, N, d)`` or ``(H, N, d)``.
        key: ``(B, H_k, M, d)`` or ``(H_k, M, d)``.
        value: ``(B, H_k, M, d_v)`` or ``(H_k, M, d_v)``.
        mask: looked at for its number of axes only.
        enable_gqa: H may be another multiple of H_k than 1.

    Raises:
        ValueError: other numbers of axes, or sizes that do not broadcast.
        TypeError: something that is no tensor.
    """
    check_tensors(query, key, value)
    if mask is not None:
        check_type("attn_mask", mask, Tensor, "a tensor, or None", "give a bool or floating tensor")
        check_layout("attn_mask", mask)
    axes = query.dim()
    for name, t in (("query", query), ("key", key), ("value", value)):
        if t.is_nested:
            accepted = "a tensor with strides"
            advice = "call distr_compile.attention_varlen with its values and offsets"
            raise ValueError(sentence(name, "a nested tensor", accepted, advice))
        if t.dim() not in (3, 4) or t.dim() != axes:
            got = f"{t.dim()} dimensions beside {axes} of query"
            accepted = "(batch, heads, tokens, width) or (batch, tokens, width), the same of all"
            raise ValueError(sentence(name, got, accepted, "flatten or add leading dimensions"))
    if mask is not None and mask.dim() > axes:
        accepted = f"at most {axes}, broadcast to (..., query tokens, key tokens)"
        advice = "take leading dimensions away"
        raise ValueError(sentence("attn_mask", f"{mask.dim()} dimensions", accepted, advice))
    q, k, v = (t if axes == 4 else t.unsqueeze(0) for t in (query, key, value))
    # Of the batch the op broadcasts K and V itself; of the heads it has its own rule.
    batch = _common(q.shape[0], k.shape[0], v.shape[0], "batch sizes")
    key_heads = _common(k.shape[1], v.shape[1], 1, "heads")
    heads = q.shape[1]
    if heads != key_heads and not enable_gqa:
        heads = _common(heads, key_heads, 1, "heads")
    q = q.expand(batch, heads, -1, -1)
    k, v = (t if t.shape[1] == key_heads else t.expand(-1, key_heads, -1, -1) for t in (k, v))
    return q, k, v


def _common(a: int, b: int, c: int, what: str) -> int:
    """The size that all are, but those of 1."""
    sizes = [n for n in (a, b, c) if n != 1]
    if any(n != sizes[0] for n in sizes):
        accepted = "one size, or 1"
        advice = "expand them" + ("; enable_gqa=True shares key heads" if what == "heads" else "")
        got = " and ".join(map(str, sizes))
        raise ValueError(sentence(f"query, key, value: {what}", got, accepted, advice))
    return sizes[0] if sizes else 1
