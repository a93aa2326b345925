"""Replace one site by one call: ``torch.ops.distr.attention``, or SDPA where it stays exact.

``layout.py`` brings the operands and the mask to the axes of the call. Where it cannot, the site
stays as it is, with the reason.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from distr_compile.kernels.attention.dropout import MOST_SEEDS
from distr_compile.lowering.call import Approximation, Scores, op_arguments
from distr_compile.passes import open_up
from distr_compile.passes import vocabulary as voc
from distr_compile.passes.decide import Decision
from distr_compile.passes.emit import STANDS_FOR, Emitter
from distr_compile.passes.layout import Layout
from distr_compile.passes.open_up import Attend
from distr_compile.passes.shapes import read_stand_in, shape_readers
from distr_compile.passes.site import AttentionSite, OpenSite, RefusedError, refusal
from distr_compile.passes.steps import AddStep, FillStep, ScaleStep, Written
from distr_compile.passes.timing import Stopwatch, shape_of_call
from distr_compile.passes.vocabulary import fake, same_shape, same_size, shape_of, tensor_of


def rewrite(
    graph: fx.Graph,
    site: AttentionSite,
    decision: Decision,
    number: int,
    bases: tuple[torch.Tensor, torch.Tensor] | None,
    *,
    watch: Stopwatch,
    change: bool,
) -> int:
    """Put ``distr.attention`` in the place of a site.

    Args:
        graph: the site's graph; changed.
        site: from :func:`.match.find`.
        decision: from :func:`.decide.decide`; if ``"exact"``, the op computes exactly.
        number: the site's number within its graph, for the run-time counter.
        bases: A and B, ``(H_k, d, r)`` on the site's device, for an estimator that needs them.
        watch: is asked whether the call is faster than what it replaces.
        change: False only tries it, and leaves the graph as it was.

    Returns:
        The length below which the op computes exactly; 0 for none.

    Raises:
        RefusedError: the operands cannot be laid out, or the call is not faster; the graph is as it
            was.
    """
    limit = decision.min_seq_len

    def attend(emit: Emitter, q: Any, k: Any, v: Any, mask: Any, scale: Any) -> fx.Node:
        nonlocal limit
        rest: tuple[Any, ...] = ()
        if bases is not None:
            rest = tuple(map(emit.constant, names_of_bases(number), bases))
        if site.sinks is not None:
            rest = (*(rest or (None, None)), emit.method("flatten", site.sinks))
        if site.dropout_p:
            drawn = {"dtype": torch.int64, "device": site.device}  # anew in each run
            seed = emit.function(torch.randint, MOST_SEEDS, (), **drawn)
            rest = (*rest, *(None,) * (3 - len(rest)), seed)
        offset = site.causal.offset or None if site.causal is not None else None
        scores = Scores(scale, site.is_causal, offset, site.softcap, site.dropout_p)
        approximation = Approximation.none(site.head_dim)
        if decision.is_distr:
            approximation = decision.approximation
        kind = {"sinks": site.sinks is not None, "trained": site.requires_grad}
        shape = shape_of_call((q, k, v), mask, scores, site.dtype, **kind)
        if site.is_sharded:
            watch.see_shards(*map(tensor_of, (q, k, v)))
        if decision.is_distr:
            bias = tensor_of(mask)
            mask_grad = bias is not None and bias.requires_grad
            moving = site.symbolic_lengths
            least = watch.least_length(shape, approximation, moving, mask_grad=mask_grad)
            limit = max(limit, least)
        else:
            watch.prefer_ours(shape)
        arguments = op_arguments(approximation, scores, limit, number)
        op = torch.ops.distr.attention.default
        return emit.function(op, q, k, v, mask, *rest, **arguments)

    _replace(graph, site, attend, share_heads=True, change=change)
    return limit


def names_of_bases(number: int) -> tuple[str, str]:
    """The constants that hold A and B of a site."""
    return f"distr_basis_q_{number}", f"distr_basis_k_{number}"


def rewrite_exact(graph: fx.Graph, site: AttentionSite, *, change: bool) -> bool:
    """Put SDPA in the place of an exact site that is spelled out, or masked in vain.

    A call of SDPA whose mask is causal loses the mask and is told so: kernels that know it compute
    half of the scores, and nothing makes or reads a mask of N_q x N_k. It loses one that hides
    nothing, too.

    Returns:
        Whether it did, or without ``change`` would. Other fused calls are left alone, and sites
        that SDPA cannot say: with a soft cap, sinks, several dtypes, or a bias whose dtype is not
        that of Q. So are all where ``sdpa_kernel`` chooses among SDPA's kernels: perhaps none is
        left.
    """
    chooses = graph.find_nodes(op="call_function", target=torch.nn.attention._sdpa_kernel)
    if chooses or not torch.backends.cuda.math_sdp_enabled():
        return False
    site = _as_sdpa_takes_it(site)
    if site.kind == "sdpa":
        return _without_mask(graph, site, change=change)
    if not isinstance(site, OpenSite) or not _sdpa_means_the_same(site):
        return False

    def attend(emit: Emitter, q: Any, k: Any, v: Any, mask: Any, scale: Any) -> fx.Node:
        if site.is_causal and scale <= 0:  # of which SDPA on a CPU makes NaN
            q, scale = emit.method("mul", q, scale), 1.0
        options = {"attn_mask": mask, "dropout_p": 0.0, "is_causal": site.is_causal, "scale": scale}
        return emit.function(F.scaled_dot_product_attention, q, k, v, **options)

    try:
        _replace(graph, site, attend, share_heads=False, change=change)
    except RefusedError:
        return False
    return True


def _as_sdpa_takes_it(site: AttentionSite) -> AttentionSite:
    """The site with the masks that the model has, if any is left or SDPA has no word for it.

    Its ``is_causal`` knows no offset and stands beside no mask.
    """
    causal, is_masked = site.causal, any(isinstance(s, AddStep | FillStep) for s in site.steps)
    if is_masked or (causal is not None and causal.offset):
        is_flag = causal is not None and not causal.by_mask
        return replace(site, causal=causal if is_flag else None, steps=site.given)
    return site


def _without_mask(graph: fx.Graph, site: AttentionSite, *, change: bool) -> bool:
    """Let SDPA's own ``is_causal`` say all that the mask of a call says, or drop one that hides
    nothing, where all else is as before.

    Not beside dropout: which kernel draws says which numbers.
    """
    old, op = site.anchor, voc.read(site.anchor)
    if not isinstance(op, voc.Sdpa) or op.attn_mask is None or site.dropout_p or site.steps:
        return False
    # Of other lengths some kernels count from the end.
    is_square = same_size(site.num_queries, site.num_keys)
    if site.causal is not None and not (is_square and site.causal.is_sure):
        return False
    options = {"is_causal": site.is_causal, "scale": op.scale, "enable_gqa": op.enable_gqa}
    emit = Emitter(graph, old)
    try:
        new = emit.function(F.scaled_dot_product_attention, op.query, op.key, op.value, **options)
        is_same = _is_laid_out_alike(fake(new), fake(old))
        # Of another scale SDPA makes NaN on a CPU. Asked of a symbolic one, this makes a guard.
        if is_same and site.is_causal and op.scale is not None:
            is_same = bool(voc.value_of(op.scale) > 0)
    except Exception:  # as in _replace: mixed dtypes under autocast, for one
        is_same = False
    if not is_same or not change:
        emit.undo()
        return is_same
    old.replace_all_uses_with(new)
    new.meta[STANDS_FOR] = old.name
    graph.erase_node(old)
    return True


def _is_laid_out_alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        same_shape(tuple(a.shape), tuple(b.shape))
        and same_shape(tuple(a.stride()), tuple(b.stride()))
        and (a.dtype, a.device) == (b.dtype, b.device)
    )


def keep_from_fusion(module: fx.GraphModule) -> None:
    """Write each softmax over another axis than the last one as one over the last, transposed.

    Inductor's ``fuse_attention`` does not look at the axis: it would make SDPA of it, which is
    wrong (pytorch#196468). Fusions of a softmax over the last axis are right and are not touched.
    """
    for body in (m for m in module.modules() if isinstance(m, fx.GraphModule)):
        for softmax in list(body.graph.nodes):
            op = voc.read(softmax)
            if not isinstance(op, voc.Softmax) or op.dim == len(shape_of(softmax)) - 1:
                continue
            if op.inner or "out" in softmax.kwargs:
                _set_apart(body.graph, softmax, op.dim)
                continue
            emit = Emitter(body.graph, softmax)
            x = emit.method("transpose", op.x, op.dim, -1)
            x = emit.method("neg", x) if op.sign < 0 else x
            x = emit.method("softmax", x, -1, dtype=op.dtype)
            softmax.replace_all_uses_with(emit.method("transpose", x, op.dim, -1))
            body.graph.erase_node(softmax)


def _set_apart(graph: fx.Graph, weights: fx.Node, dim: int) -> None:
    """Put a copy that no pattern looks through between weights and their products."""
    for reader in [user for user in weights.users if isinstance(voc.read(user), voc.Product)]:
        emit = Emitter(graph, reader)
        x = emit.method("contiguous", emit.method("transpose", weights, dim, -1))
        reader.replace_input_with(weights, emit.method("transpose", x, dim, -1))


def may_overflow(site: AttentionSite) -> bool:
    """Whether Q may overflow under scores that do not: in fp16 a tensor is multiplied into it."""
    is_scaled = any(isinstance(s, ScaleStep) and s.tensor is not None for s in site.steps)
    return is_scaled and site.dtype == torch.float16


def _sdpa_means_the_same(site: OpenSite) -> bool:
    """SDPA knows no soft cap and no sinks, takes a float mask in Q's dtype only, and its dropout
    draws other numbers than the model's; and Q in fp16 may overflow under what scores do not."""
    is_more = site.softcap or site.sinks or site.compute_dtype or site.dropout_p
    if site.kind != "softmax" or is_more:
        return False
    dtype = fake(site.q.node).dtype
    if any(fake(s.tensor).dtype != dtype for s in site.steps if isinstance(s, AddStep)):
        return False
    if may_overflow(site):
        return False
    fills = [s for s in site.steps if isinstance(s, FillStep) and s.value != -math.inf]
    return all(s.dtype in {dtype, site.dtype} for s in fills)


def _replace(
    graph: fx.Graph, site: AttentionSite, attend: Attend, *, share_heads: bool, change: bool
) -> None:
    readers = shape_readers(site)
    emit = Emitter(graph, site.output)
    try:
        if isinstance(site, OpenSite):
            out = _write(site, emit, attend, share_heads)
        else:
            out = open_up.spell_out(site, emit, attend)
    except Exception as error:  # what is written is tried on fake tensors: anything may be raised
        emit.undo()
        raise refusal(error) from error
    if not change:
        emit.undo()
        return
    if site.kind == "mha":
        open_up.replace_results(site, out)
    site.output.replace_all_uses_with(out)
    out.meta[STANDS_FOR] = site.output.name
    for reader, node in readers:
        read_stand_in(graph, reader, node)
    for node in sorted(site.interior, reverse=True):
        graph.erase_node(node)


def _write(site: OpenSite, emit: Emitter, attend: Attend, share_heads: bool) -> fx.Node:
    layout = Layout(emit, site)
    q, k, v = layout.operands(share_heads)
    call = Written(emit, layout.term, site.dtype, q)
    for factor in site.factors:
        call.times(factor)
    for step in site.steps:
        step.write(call)
    mask = call.mask()
    if isinstance(call.scale, fx.Node):
        # As an argument of the call a symbolic float would be specialised; here it is not.
        call.q, call.scale = emit.method("mul", call.q, call.scale), 1.0
    return layout.output(attend(emit, call.q, k, v, mask, call.scale))
