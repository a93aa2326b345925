"""The two ops of a call through which gradients flow: the recorded forward, and its backward.

``torch.ops.distr.attention`` is what a model calls. Where autograd would record a gradient it calls
``torch.ops.distr.attention_recorded``, which also gives what the backward needs, and the formula
registered here calls ``torch.ops.distr.attention_backward``. Both are opaque to the compiler. A
call without gradients never meets them and pays nothing for them.

The grouping of columns, or the basis, is held constant: nothing is differentiated but
softmax(scale * Q A (K B)^T + mask) V. So the gradient is that of the function with these very A
and B, and a biased estimate of how the output changes where A and B move with Q and K.

Saved are Q, K, V, the output, A and B in fp32 (fp64 for fp64 inputs), the logarithm of each row's
sum of exponentials, and a note (``notes.py``): whether the forward was told to compute exactly,
which a backward must follow wherever it runs, and who hears of a kernel that fails; Qhat, Khat and
the weights are rebuilt.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from distr_compile.estimators import ESTIMATORS
from distr_compile.lowering import exactly, notes, tangents, training
from distr_compile.lowering.call import KEYWORDS, Approximation, Arguments, Call, read_arguments
from distr_compile.lowering.checks import is_short, validate
from distr_compile.lowering.flops import attention_flops, backward_flops
from distr_compile.lowering.registering import (
    empty_heads,
    empty_output,
    register,
    register_autocast,
)
from distr_compile.lowering.saved import (
    Gradients,
    Saved,
    dropout_of,
    dtype_of,
    number_of_blocks,
)
from distr_compile.lowering.told import tell

RECORDED = (
    "attention_recorded(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? basis_q, "
    f"Tensor? basis_k, Tensor? sinks, Tensor? dropout_seed, *, {KEYWORDS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)

BACKWARD = (
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? sinks, "
    "Tensor out, Tensor lse, Tensor basis_q, Tensor basis_k, Tensor note, "
    f"Tensor? dropout_seed, *, {KEYWORDS}, "
    "bool mask_grad=False, bool sinks_grad=False) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def are_recorded(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether autograd records a gradient of a call with these arguments.

    Raises:
        ValueError: one of A and B asks for a gradient.
    """
    given = [t for t in tensors if t is not None]
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in given)):
        return False
    if any(t is not None and t.requires_grad for t in tensors[4:6]):
        raise ValueError(
            "basis_q, basis_k: got one that requires grad; must be constants, as no gradient flows "
            "to A and B: detach them"
        )
    return True


def recorded(*tensors: Tensor | None, **options: Any) -> Tensor:
    """The result of the op ``attention``, with its backward on autograd's tape.

    The arguments are those of the op; defaults may be left out.
    """
    given = (*tensors, *(None,) * (8 - len(tensors)))
    out: Tensor = torch.ops.distr.attention_recorded.default(*given, **options)[0]
    return out


_NONE: tuple[int, ...] = (0,)


class _SizesSaved(NamedTuple):
    """The sizes of what is saved beside the output."""

    lse: tuple[int, ...]
    bases: tuple[int, ...]


def _sizes_saved(q: Tensor, k: Tensor, mask: Tensor | None, how: Approximation) -> _SizesSaved:
    """``(B, H, N)``, and ``(B, H_k, blocks, d, r)`` of A and B, or nothing where there are none."""
    batch, heads, num_queries, head_dim = q.shape
    row, bases = ESTIMATORS[how.estimator], _NONE
    if how.rank != head_dim and row.needs == "nothing":
        blocks = number_of_blocks(num_queries, how, mask is not None)
        bases = (batch, k.shape[1], blocks, head_dim, how.rank)
    return _SizesSaved((batch, heads, num_queries), bases)


def _attention_recorded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    basis_q: Tensor | None,
    basis_k: Tensor | None,
    sinks: Tensor | None,
    dropout_seed: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The output ``(B, H, N, d_v)``, the logarithms ``(B, H, N)``, A, B, and a note.

    A and B are ``(B, H_k, blocks, d, r)`` of every grouping block; empty where the call is given
    them, or is exact by its rank; 0 where it is exact by its length.
    """
    arguments = read_arguments(options)
    given = validate(q, k, v, mask, (basis_q, basis_k), (sinks, dropout_seed), arguments)
    sizes, dtype = _sizes_saved(q, k, mask, arguments.approximation), dtype_of(q)
    lse = q.new_empty(sizes.lse, dtype=dtype)
    A, B = (q.new_zeros(sizes.bases, dtype=dtype) for _ in "AB")
    is_exact = exactly.is_computing_exactly()
    how = _applied(q, k, arguments, is_exact)
    if how.rank != arguments.approximation.rank and not is_exact:
        tell(arguments.site, None)
    out = empty_output(q, v)
    scores = arguments.scores
    dropout = dropout_of(q, scores.dropout_p, dropout_seed)
    call = Call(q, k, v, mask, sinks, scores, how, given, out, dropout=dropout)
    saved = Saved(lse, None if how.rank == q.shape[3] or not A.numel() else (A, B))
    if handover := training.forward(call, saved).handover():
        tell(arguments.site, handover)
    if is_exact:
        out.copy_(exactly.attention(q, k, v, mask, **call.softmax))
    return out, lse, A, B, notes.write(q)


def _recorded_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    basis_q: Tensor | None,
    basis_k: Tensor | None,
    sinks: Tensor | None,
    dropout_seed: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    arguments = read_arguments(options)
    validate(q, k, v, mask, (basis_q, basis_k), (sinks, dropout_seed), arguments)
    sizes, dtype = _sizes_saved(q, k, mask, arguments.approximation), dtype_of(q)
    lse, A, B = (q.new_empty(s, dtype=dtype) for s in (sizes.lse, sizes.bases, sizes.bases))
    return empty_output(q, v), lse, A, B, q.new_empty((), dtype=torch.int64)


def _applied(q: Tensor, k: Tensor, arguments: Arguments, is_exact: bool) -> Approximation:
    """What a call is computed by: exactly where it is short, or where the forward was told so."""
    how, head_dim = arguments.approximation, q.shape[3]
    if is_exact or is_short(q.shape[2], k.shape[2], arguments.min_seq_len):
        return Approximation.none(head_dim)
    return how


def _save(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any
) -> None:
    q, k, v, mask, basis_q, basis_k, sinks, dropout_seed = inputs
    out, lse, A, B, note = output
    if basis_q is not None:
        A, B = basis_q, basis_k
    ctx.save_for_backward(q, k, v, mask, sinks, out, lse, A, B, note, dropout_seed)
    ctx.options = keyword_only_inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, mask and sinks where they are asked for; A, B and a seed have none.

    With their tangents, where ``grad`` carries one.
    """
    if grad is None:
        return (None,) * 8
    if tangents.are_carried((grad,)):  # gradients are linear in it
        primal, tangent = forward_ad.unpack_dual(grad)
        pairs = zip(_differentiate(ctx, primal), _differentiate(ctx, tangent), strict=True)
        return tuple(None if a is None else forward_ad.make_dual(a, b) for a, b in pairs)
    for_q, for_k, for_v, for_mask, _A, _B, for_sinks, _seed = ctx.needs_input_grad
    found = torch.ops.distr.attention_backward.default(
        grad, *ctx.saved_tensors, mask_grad=for_mask, sinks_grad=for_sinks, **ctx.options
    )
    wanted = (for_q, for_k, for_v, for_mask, for_sinks)
    dq, dk, dv, dmask, dsinks = (
        t if is_wanted else None for t, is_wanted in zip(found, wanted, strict=True)
    )
    return dq, dk, dv, dmask, None, None, dsinks, None


def _attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    *kept: Any,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, mask and sinks; the last two empty where they are not asked for.

    The inputs are trusted: only the formula of ``attention_recorded`` calls this. ``kept`` is what
    that gave, with the bases that a call was given in the place of its own, and the dropout's seed.
    """
    if tangents.are_carried((grad,)):
        raise NotImplementedError(
            "distr.attention: got a gradient with a tangent (forward-mode AD) in a compiled "
            "backward; accepted: one without: call the compiled model with the tangent, too, which "
            "is exact then"
        )
    out, lse, basis_q, basis_k, note, dropout_seed = kept
    mask_grad, sinks_grad = (options.get(name) for name in ("mask_grad", "sinks_grad"))
    found = _empty_gradients(q, k, v, mask if mask_grad else None, sinks if sinks_grad else None)
    arguments = read_arguments(options)
    how = _applied(q, k, arguments, notes.is_exact(note))
    bases = None
    if how.rank != q.shape[3]:  # A and B that were given are the same for all batches and blocks
        bases = (basis_q, basis_k)
        if basis_q.dim() == 3:
            bases = (basis_q[None, :, None], basis_k[None, :, None])
    scores = arguments.scores
    dropout = dropout_of(q, scores.dropout_p, dropout_seed)
    call = Call(q, k, v, mask, sinks, scores, how, None, out, dropout=dropout)
    dq, dk, dv, dmask, dsinks = found
    wanted = Gradients(dq, dk, dv, dmask if mask_grad else None, dsinks if sinks_grad else None)
    handover = training.backward(call, Saved(lse, bases), grad, wanted).handover("backward")
    if handover is not None and (listener := notes.listener(note)) is not None:
        listener.hear(arguments.site, handover)
    return found


def _empty_gradients(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Not filled; in an order of memory that does not hang on the strides of the inputs."""
    dq, dk, dv = (empty_heads(t, *t.shape[2:]) for t in (q, k, v))
    dmask, dsinks = (q.new_empty(0) if t is None else t.new_empty(t.shape) for t in (mask, sinks))
    return dq, dk, dv, dmask, dsinks


def _backward_fake(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    *_: Any,
    mask_grad: bool = False,
    sinks_grad: bool = False,
    **__: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _empty_gradients(q, k, v, mask if mask_grad else None, sinks if sinks_grad else None)


def _refuse_second(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
    raise NotImplementedError(
        "distr.attention: got a gradient of its gradient (create_graph=True); the op has first "
        "derivatives only: use F.scaled_dot_product_attention there"
    )


register("attention_recorded", RECORDED, _attention_recorded, _recorded_fake, attention_flops)
register("attention_backward", BACKWARD, _attention_backward, _backward_fake, backward_flops)
register_autocast("attention_recorded")
register_autocast("attention_backward", casts=False)
torch.library.register_autograd("distr::attention_recorded", _differentiate, setup_context=_save)
torch.library.register_autograd("distr::attention_backward", _refuse_second)
