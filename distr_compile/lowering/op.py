"""The op ``torch.ops.distr.attention``: what it accepts, what it promises, what runs it.

Importing this module registers the op. There is no arithmetic here: ``reference.py`` in
``kernels/attention`` defines the result, ``choose.py`` names what computes it, and ``sdpa.py``
computes what has to be exact because it is short.

The op is opaque to the compiler. It is registered through ``torch.library.Library``, whose boundary
costs about half as much host time a call as that of ``torch.library.custom_op``.

Layout: the output is a ``(B, H, N, d_v)`` view of memory in the order B, N, H, d_v, whatever the
strides of the inputs, because models go on with ``out.transpose(1, 2).reshape(B, N, H * d_v)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from distr_compile.estimators import (
    ESTIMATORS,
    MIN_QUERIES,
    MIN_RANK,
    arithmetic,
    auto_grouping_block,
    estimator_named,
)
from distr_compile.kernels.plan import geometry
from distr_compile.lowering import choose, exactly, sdpa
from distr_compile.lowering.call import Approximation, Scores
from distr_compile.lowering.choose import Call

# An integer that may be left out is optional here, and None means the default of ``attention``:
# AOTInductor hands over the default of such a keyword, and lists only those that were given.
SCHEMA = (
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask=None, Tensor? basis_q=None, "
    "Tensor? basis_k=None, Tensor? sinks=None, *, float scale, bool is_causal=False, "
    "SymInt? causal_offset=None, SymInt rank, str estimator, SymInt grouping_block, "
    "int? rounds=None, bool strict=False, SymInt? min_seq_len=None, int? seed=None, "
    "float softcap=0.0, float dropout_p=0.0, int? site=None) -> Tensor"
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

NOT_YET = {
    "dropout_p": 0.0,
}
"""Arguments of the schema that have no implementation, with the only value they may have."""

ExactSink = Callable[[int, str | None], None]
"""Is given the number of a site, and what failed if the device could not run its kernel."""

_exact_sink: ContextVar[ExactSink | None] = ContextVar("distr_exact_sink", default=None)


@contextmanager
def count_exact_calls(sink: ExactSink) -> Iterator[None]:
    """Call ``sink(site, failure)`` whenever the op turns to exact attention at run time.

    That happens for short sequences (``failure`` is None) and where a kernel does not compile or
    start (a text), and is told only in the thread or task that entered this context, and not when a
    recorded CUDA graph is replayed. Contexts nest; the innermost sink is called.
    """
    token = _exact_sink.set(sink)
    try:
        yield
    finally:
        _exact_sink.reset(token)


def _tell_exact(site: int, failure: str | None) -> None:
    sink = _exact_sink.get()
    if sink is not None:
        sink(site, failure)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    basis_q: Tensor | None = None,
    basis_k: Tensor | None = None,
    sinks: Tensor | None = None,
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
        dropout_p: only 0 yet.
        site: number handed to ``count_exact_calls``.

    Returns:
        ``(B, H, N, d_v)`` in the dtype of q, memory in the order B, N, H, d_v. Rows that see no
        key, by a bool mask, a float mask of -inf or causality, are 0.

    Raises:
        ValueError: shapes, dtypes or options that do not fit together.
        NotImplementedError: an argument that is not supported yet has a value; a ``torch.func``
            transform; as ``NoArithmeticError``, an estimator that nothing computes on the device.
        RuntimeError: gradients would be recorded.
    """
    key = None
    if q.device.type in choose.PLANNED:
        options = (scale, is_causal, causal_offset, rank, estimator, grouping_block, rounds)
        more = (strict, min_seq_len, seed, softcap, dropout_p)
        key = (geometry(q, k, v, mask, sinks, basis_q, basis_k), options, more)
        plan = choose.plans.get(key)
        if plan is not None and not _is_special((q, k, v, mask, sinks)):
            out = _empty_output(q, v)
            plan(q, k, v, mask, sinks, None if basis_q is None else (basis_q, basis_k), out)
            return out
    _validate(
        q,
        k,
        v,
        mask,
        sinks,
        is_causal=is_causal,
        causal_offset=causal_offset,
        rank=rank,
        estimator=estimator,
        grouping_block=grouping_block,
        min_seq_len=min_seq_len,
        softcap=softcap,
        rounds=rounds,
        strict=strict,
        not_yet=(dropout_p,),
    )
    bases = _validate_bases(q, k, basis_q, basis_k, rank, estimator)
    softmax: dict[str, Any] = {
        "scale": scale,
        "is_causal": is_causal,
        "causal_offset": causal_offset or 0,
        "softcap": softcap,
        "sinks": sinks,
    }
    if exactly.is_computing_exactly():
        return _lay_out(exactly.attention(q, k, v, mask, **softmax))
    if _is_short(q.shape[2], k.shape[2], min_seq_len):
        if rank < q.shape[3]:
            _tell_exact(site, None)
        return _lay_out(sdpa.attention(q, k, v, mask, **softmax))
    out = _empty_output(q, v)
    scores = Scores(scale, is_causal, causal_offset, softcap)
    approximation = Approximation(estimator, rank, grouping_block, rounds, seed, strict)
    failure = choose.run(Call(q, k, v, mask, sinks, scores, approximation, bases, out, key))
    if failure is not None and rank < q.shape[3]:
        _tell_exact(site, failure)
    return out


def _is_special(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether a call has to be looked at anew, though one like it has run."""
    if exactly.is_computing_exactly():
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    basis_q: Tensor | None = None,
    basis_k: Tensor | None = None,
    sinks: Tensor | None = None,
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
    _validate(
        q,
        k,
        v,
        mask,
        sinks,
        is_causal=is_causal,
        causal_offset=causal_offset,
        rank=rank,
        estimator=estimator,
        grouping_block=grouping_block,
        min_seq_len=min_seq_len,
        softcap=softcap,
        rounds=rounds,
        strict=strict,
        not_yet=(dropout_p,),
    )
    _validate_bases(q, k, basis_q, basis_k, rank, estimator)
    return _empty_output(q, v)


def _empty_output(q: Tensor, v: Tensor) -> Tensor:
    batch, heads, num_queries, _ = q.shape
    return q.new_empty(batch, num_queries, heads, v.shape[3]).transpose(1, 2)


def _lay_out(out: Tensor) -> Tensor:
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def _is_short(num_queries: int, num_keys: int, min_seq_len: int) -> bool:
    return num_queries < MIN_QUERIES or min(num_queries, num_keys) < min_seq_len


def _role(q: Tensor) -> Literal["cpu", "gpu"]:
    """Which arithmetic of an estimator a call asks for."""
    return "gpu" if q.is_cuda and q.dtype != torch.float64 else "cpu"


def _validate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    *,
    is_causal: bool,
    causal_offset: int | None,
    rank: int,
    estimator: str,
    grouping_block: int,
    min_seq_len: int,
    softcap: float,
    rounds: int,
    strict: bool,
    not_yet: tuple[object, ...],
) -> None:
    """Refuse what the op cannot do; of symbolic sizes only relations are asked."""
    for (name, only), value in zip(NOT_YET.items(), not_yet, strict=True):
        if value is not None and value != only:
            got = "a tensor" if isinstance(value, Tensor) else repr(value)
            raise NotImplementedError(
                f"{name}: got {got}; only {only!r} is supported yet: leave it out"
            )
    tensors = [t for t in (q, k, v, mask, sinks) if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise RuntimeError(
            "distr.attention: got an input that requires grad while gradients are recorded; the op "
            "has no backward: call under torch.no_grad(), or use F.scaled_dot_product_attention"
        )
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dim() != 4:
            raise ValueError(
                f"{name}: got {t.dim()} dimensions; must be (batch, heads, tokens, width): "
                "add or flatten leading dimensions"
            )
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(
            f"q, k, v: got {q.dtype}, {k.dtype}, {v.dtype}; must have one dtype of "
            f"{', '.join(map(str, DTYPES))}: cast them"
        )
    if any(t.device != q.device for t in tensors):
        raise ValueError(
            f"q, k, v, mask, sinks: got devices {', '.join(str(t.device) for t in tensors)}; "
            "must be one: move them"
        )
    arithmetic(estimator, _role(q))  # raises where there is none
    accepted = ESTIMATORS[estimator].rounds
    if rounds not in accepted:
        raise ValueError(
            f"rounds: got {rounds}; with {estimator} must be {' or '.join(map(str, accepted))}"
        )
    if strict and ESTIMATORS[estimator].strict == "never":
        able = ", ".join(e.name for e in ESTIMATORS.values() if e.strict != "never")
        raise ValueError(
            f"strict: got True; with {estimator} must be False, as it sees "
            f"{ESTIMATORS[estimator].sees}: take one of {able}"
        )
    if causal_offset is not None and not is_causal:
        raise ValueError("causal_offset: got a value without is_causal; set is_causal=True with it")
    if not softcap >= 0:
        raise ValueError(f"softcap: got {softcap}; must be > 0, or 0 for none")
    _validate_sizes(q, k, v, rank, estimator, grouping_block, min_seq_len)
    if sinks is not None:
        _require(
            sinks.dim() == 1 and sinks.is_floating_point() and sinks.shape[0] == q.shape[1],
            lambda: (
                f"sinks: got {tuple(sinks.shape)} of {sinks.dtype}; must be floating, one per head "
                f"of q: ({q.shape[1]},)"
            ),
        )
    if mask is not None:
        _validate_mask(q, k, mask)


def _validate_sizes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rank: int,
    estimator: str,
    grouping_block: int,
    min_seq_len: int,
) -> None:
    batch, heads, _, head_dim = q.shape
    k_batch, key_heads, num_keys, k_width = k.shape
    v_batch, v_heads, v_tokens, _ = v.shape
    for name, got in (("k", k_batch), ("v", v_batch)):
        _require(
            (got == batch) | (got == 1),
            lambda name=name, got=got: (  # type: ignore[misc]
                f"{name}: got batch size {got}; must be that of q, {batch}, or 1"
            ),
        )
    _require(k_width == head_dim, lambda: f"k: got width {k_width}; must be that of q, {head_dim}")
    _require(
        (v_heads == key_heads) & (v_tokens == num_keys),
        lambda: (
            f"v: got {v_heads} heads of {v_tokens} tokens; must be as in k, {key_heads} heads of "
            f"{num_keys}"
        ),
    )
    _require(key_heads >= 1, lambda: "k: got 0 heads; must be at least 1")
    _require(
        heads % key_heads == 0,
        lambda: f"k: got {key_heads} heads; must divide the {heads} heads of q",
    )
    if ESTIMATORS[estimator].divides:
        narrower, words = head_dim % max(rank, 1) == 0, "a divisor of it that is"
    else:
        narrower, words = rank < head_dim, "less and"
    _require(
        (rank == head_dim) | ((rank >= MIN_RANK) & narrower),
        lambda: (
            f"rank: got {rank} for head_dim {head_dim}; must be head_dim (exact) or, with "
            f"{estimator}, {words} at least {MIN_RANK}"
        ),
    )
    _require(
        grouping_block >= 0,
        lambda: f"grouping_block: got {grouping_block}; must be rows >= 1, or 0 for auto",
    )
    _require(min_seq_len >= 0, lambda: f"min_seq_len: got {min_seq_len}; must be >= 0")


def _validate_bases(
    q: Tensor,
    k: Tensor,
    basis_q: Tensor | None,
    basis_k: Tensor | None,
    rank: int,
    estimator: str,
) -> tuple[Tensor, Tensor] | None:
    """A and B where the estimator needs them, else None."""
    if ESTIMATORS[estimator].needs == "nothing":
        if basis_q is not None or basis_k is not None:
            names = ", ".join(e.name for e in ESTIMATORS.values() if e.needs == "bases")
            raise ValueError(
                f"basis_q, basis_k: got a tensor with {estimator}; accepted with {names} only: "
                "leave them out"
            )
        return None
    if basis_q is None or basis_k is None:
        raise ValueError(
            f"basis_q, basis_k: got None with {estimator}; must be two tensors of (key heads, "
            "head_dim, rank): take them from a file that distr calibrate wrote"
        )
    wanted = (k.shape[1], q.shape[3], rank)
    for name, basis in (("basis_q", basis_q), ("basis_k", basis_k)):
        if basis.dtype != torch.float32 or basis.device != q.device:
            raise ValueError(
                f"{name}: got {basis.dtype} on {basis.device}; must be torch.float32 on "
                f"{q.device}: cast or move it"
            )
        fits = basis.dim() == 3 and all(
            got == size for got, size in zip(basis.shape, wanted, strict=True)
        )
        _require(
            fits,
            lambda name=name, basis=basis: (  # type: ignore[misc]
                f"{name}: got {tuple(basis.shape)}; must be (key heads, head_dim, rank) = {wanted}"
            ),
        )
    return basis_q, basis_k


def _validate_mask(q: Tensor, k: Tensor, mask: Tensor) -> None:
    if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        raise ValueError(
            f"mask: got {mask.dtype}; must be torch.bool (True = attend) or floating (added): "
            "use mask.bool()"
        )
    full = (*q.shape[:3], k.shape[2])
    fits: bool | torch.SymBool = mask.dim() <= 4
    for got, wanted in zip(reversed(mask.shape), reversed(full), strict=False):
        fits = fits & ((got == 1) | (got == wanted))
    _require(
        fits,
        lambda: (
            f"mask: got {tuple(mask.shape)}; must broadcast to (batch, heads, queries, keys) = "
            f"{full}"
        ),
    )


def _require(condition: bool | torch.SymBool, message: Callable[[], str]) -> None:
    """Raise ValueError unless ``condition``; of symbols it becomes a guard on the relation."""
    if condition is not True:
        torch._check_value(condition, message)


def _autocast_rule(device: str, key: str) -> Callable[..., Tensor]:
    """As for SDPA: floating inputs but fp64 go to the autocast dtype, a bool mask stays."""
    autocast_key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def cast(t: Tensor | None) -> Tensor | None:
        if t is None or not t.is_floating_point() or t.dtype == torch.float64:
            return t
        return t.to(torch.get_autocast_dtype(device))

    def attention_autocast(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *rest: Any, **options: Any
    ) -> Tensor:
        with torch._C._ExcludeDispatchKeyGuard(autocast_key):
            op: Any = torch.ops.distr.attention.default
            result: Tensor = op(cast(q), cast(k), cast(v), cast(mask), *rest, **options)
            return result

    return attention_autocast


def _refuse_transforms(*_: Any, **__: Any) -> NoReturn:
    # Without this, torch.func.grad and jvp silently return a derivative that leaves the op out.
    raise NotImplementedError(
        "distr.attention: got a call inside a torch.func transform (vmap, grad, jvp, ...); the op "
        "has no rule for them: use F.scaled_dot_product_attention there"
    )


def _flops(
    q: tuple[int, ...],
    k: tuple[int, ...],
    v: tuple[int, ...],
    *_: Any,
    rank: int,
    estimator: str,
    grouping_block: int,
    rounds: int = 1,
    strict: bool = False,
    min_seq_len: int = 0,
    out_shape: Any = None,
    **__: Any,
) -> int:
    """FLOPs of one call from the shapes: both products of attention, and the estimator's own.

    A masked or causal call counts every score, as PyTorch's own formulas do; in the strict form of
    an estimator those of a block's own keys at the full width, whatever the offset and the mask.
    """
    batch, heads, num_queries, head_dim = q
    key_heads, num_keys = k[1:3]
    if _is_short(num_queries, num_keys, min_seq_len):
        rank = head_dim
    products = 2 * batch * heads * num_queries * num_keys * (rank + v[3])
    if rank == head_dim:
        return products
    row = estimator_named(estimator)
    cost = (row.prefix_cost if strict else None) or row.cost
    factors = cost(
        num_queries,
        num_keys,
        head_dim,
        rank,
        block=grouping_block or auto_grouping_block(num_queries, estimator, strict),
        rounds=rounds,
        rep=heads // key_heads,
    )
    return products + batch * key_heads * factors.flops


_library = torch.library.Library("distr", "FRAGMENT")
# Any strides are fine, so the compiler need not copy an input into the layout it had in the trace.
_library.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))
_library.impl("attention", attention, "CompositeExplicitAutograd")
_library.impl("attention", _autocast_rule("cpu", "AutocastCPU"), "AutocastCPU")
_library.impl("attention", _autocast_rule("cuda", "AutocastCUDA"), "AutocastCUDA")
_library.impl("attention", _refuse_transforms, "FuncTorchDynamicLayerFrontMode")
torch.library.register_fake("distr::attention", _attention_fake, lib=_library)
register_flop_formula(torch.ops.distr.attention)(_flops)

call = torch.ops.distr.attention.default
"""The op as PyTorch dispatches it."""
