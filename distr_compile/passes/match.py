"""Find every softmax(QK^T)V of a graph: back from the softmax to QK^T, forward to PV.

No list of patterns: the walk goes through a small vocabulary (:mod:`.vocabulary`) and either
arrives, or stops at a node it can name. Both ends are structure: the product of two activations
whose last axis is the one the softmax runs over, and the product that contracts this axis with V.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import torch
from torch import fx

from distr_compile.passes import open_up
from distr_compile.passes import vocabulary as voc
from distr_compile.passes.anchors import anchor_kind
from distr_compile.passes.memory import is_plain_fake, local_of
from distr_compile.passes.operands import common_dtype, operand
from distr_compile.passes.origin import Flow
from distr_compile.passes.site import (
    AttentionSite,
    Factor,
    Level,
    OpenSite,
    RefusedError,
    Step,
    Unmatched,
    count,
    dropped,
    refusal,
)
from distr_compile.passes.steps import AddStep, FillStep
from distr_compile.passes.vocabulary import hint, read, same_shape, shape_of, target_name
from distr_compile.passes.walk import Walk, banded, is_banded, open_site

_TRANSFORM = "vmap, another transform of torch.func or forward-mode AD is around it"

_BY_HAND = "exp of the scores, normalised in a way that is not read as a softmax"
_EXPONENTIALS = frozenset({"exp", "exp_", "exp2"})


def find(graph: fx.Graph) -> list[AttentionSite | Unmatched]:
    """All attention of one graph, in graph order: one entry per softmax or fused call."""
    anchors = [(node, kind) for node in graph.nodes if (kind := anchor_kind(node))]
    if not anchors and not any(target_name(node) in _EXPONENTIALS for node in graph.nodes):
        return []
    try:
        flow = Flow(graph)
    except Exception as error:  # fake tensors and dispatch modes are PyTorch's: anything can happen
        return [Unmatched(node, kind, refusal(error)) for node, kind in anchors]
    inner = {n for a, _ in anchors if isinstance(op := read(a), voc.Softmax) for n in op.inner}
    found = {node: _read_anchor(node, kind, flow) for node, kind in anchors}
    for node in graph.nodes:
        if node not in inner and _is_by_hand(node, flow):
            why = RefusedError("softmax-form", _BY_HAND)
            found[node] = Unmatched(node, "softmax", why, target_name(node).strip("_"))
    return sorted(found.values(), key=lambda each: each.anchor)


def _is_by_hand(node: fx.Node, flow: Flow) -> bool:
    """Whether scores are exponentiated, and it is not read as a softmax."""
    if target_name(node) not in _EXPONENTIALS or isinstance(read(node), voc.Softmax):
        return False
    scores = [n for n in node.all_input_nodes if voc.is_tensor(n)]
    is_of_scores = any(flow.is_scores(p) for n in scores for p in flow.chained[n])
    return is_of_scores and _reaches_product(node, flow)


def _reaches_product(node: fx.Node, flow: Flow) -> bool:
    """Whether the values, scaled and masked, are a factor of a product, as weights are of PV."""
    seen, stack = {node}, [node]
    while stack:
        for user in stack.pop().users.keys() - seen:
            op = flow.read(user)
            if isinstance(op, voc.Product):
                return True
            if isinstance(op, voc.ONE_TO_ONE | voc.Scale | voc.Add):
                seen.add(user)
                stack.append(user)
    return False


def _read_anchor(node: fx.Node, kind: str, flow: Flow) -> AttentionSite | Unmatched:
    walk = Walk(flow)
    site: AttentionSite
    try:
        if kind == "softmax":
            site = walk.softmax(node)
        elif kind == "sdpa":
            site = _sdpa(node, flow)
        elif kind == "mha":
            site = open_up.multi_head_site(node, flow.memory)
        elif kind == "encoder":
            site = open_up.encoder_layer_site(node)
        else:
            raise RefusedError("flex", "flex_attention: its score function is left as it is")
        return _left_alone(site, flow)
    except Exception as error:
        refused = refusal(error)  # also of a graph that the walk was not made for
        value, op = voc.tensor_of(node), read(node)
        if refused.code == "in-place-write" and isinstance(op, voc.Softmax):
            refused = banded() if is_banded(op.x, flow) else refused  # the band is written in place
        if refused.attention and node in flow.memory.transformed:
            refused = RefusedError("transform", _TRANSFORM)
        elif refused.attention and value is not None and not is_plain_fake(value):
            refused = RefusedError("tensor-subclass", f"a tensor is a {type(value).__name__}")
        fused = "sdpa" if kind == "sdpa" else target_name(node).strip("_")
        form = walk.form() if kind == "softmax" else fused
        flops = _flops(node, kind, flow) if refused.attention else 0
        return Unmatched(node, kind, refused, form, flops)


def _left_alone(site: AttentionSite, flow: Flow) -> AttentionSite:
    """The site, unless it stands where a call of ours would not mean the same.

    Raises:
        RefusedError: it is inside a transform, works on a tensor subclass, or writes in place what
            others read.
    """
    memory, nodes = flow.memory, set(site.interior)
    read_too = {n for node in nodes for n in node.all_input_nodes}
    # Also where V records none: the output of a call of ours would record that of Q and K.
    is_recorded = site.output not in memory.without_grad
    if is_recorded and any(flow.cuts_gradient(n, site.output) for n in nodes):
        raise RefusedError("gradients", "a gradient is cut inside the attention: detach, no_grad")
    if any(memory.is_laid_anew(n) for n in nodes | read_too):
        raise RefusedError("in-place-write", "sizes or strides of a tensor change in place")
    wide = site.compute_dtype if isinstance(site, OpenSite) else None
    is_wide = wide is not None and wide.itemsize > voc.fake(site.output).dtype.itemsize
    if is_wide and memory.autocasts & nodes:
        text = "the scores are computed outside of autocast, and the weights used inside of it"
        raise RefusedError("mixed-dtype", text)
    if nodes & memory.transformed:
        raise RefusedError("transform", _TRANSFORM)
    values = [x for n in nodes | read_too if (x := voc.tensor_of(n)) is not None]
    others = {type(x).__name__ for x in values if not is_plain_fake(local_of(x))}
    is_sharded = any(local_of(x) is not x for x in values)
    if is_sharded and not (isinstance(site, OpenSite) and not site.symbolic):
        others.add("DTensor")
    if others:
        raise RefusedError("tensor-subclass", f"a tensor is a {', '.join(sorted(others))}")
    if is_sharded and site.dropout_p:
        raise RefusedError("dropout", "the weights of DTensors are dropped out")
    site = replace(site, is_sharded=is_sharded)
    for writer in nodes:
        # What is written goes with the nodes: nobody else may look at it.
        for reader in writer.graph.nodes if memory.writes(writer) else ():
            looks = any(memory.writes_into(writer, n) for n in reader.all_input_nodes)
            is_input = reader.op in ("placeholder", "get_attr")
            if is_input and memory.writes_into(writer, reader):
                raise RefusedError("in-place-write", "the scores are written into an input")
            if looks and reader > writer and reader not in nodes | memory.dead:
                raise RefusedError("in-place-write", f"{reader} reads what is written in place")
    if site.requires_grad:
        last = next(iter(reversed(site.output.graph.nodes)))
        kept = read_too | {site.output} | _tensors(site)
        is_written = any(memory.writers(n, site.output, last) for n in kept)
        site = replace(site, written_later=is_written)
    return site


def _tensors(site: AttentionSite) -> set[fx.Node]:
    """What a call in the site's place is given: operands, masks and biases, as they are."""
    masks = (s for s in (*site.steps, *site.given) if isinstance(s, AddStep | FillStep))
    found = {s.tensor for s in masks}
    if isinstance(site, OpenSite):
        found |= {x.node for x in (site.q, site.k, site.v, *(site.shared or ()))}
    return found


def _flops(node: fx.Node, kind: str, flow: Flow) -> int:
    """FLOPs of both products of an attention that was not read through, if one is seen."""
    op = read(node)
    if isinstance(op, voc.Softmax):
        products = flow.chained[op.x] | flow.behind[op.x]
        widths = [hint(shape_of(flow.read(p).a)[-1]) for p in products if shape_of(flow.read(p).a)]  # type: ignore[union-attr]
        return 4 * count(shape_of(node)) * max(widths, default=0)
    if isinstance(op, voc.Sdpa):
        return 4 * count(shape_of(op.query)) * hint(shape_of(op.key)[-2])
    shape = shape_of(node.all_input_nodes[0]) if node.all_input_nodes else ()
    axis = 0 if kind == "mha" else 1 if kind == "encoder" else -2
    return 4 * count(shape) * hint(shape[axis]) if len(shape) > 1 else 0


def _sdpa(node: fx.Node, flow: Flow) -> OpenSite:
    """A call of ``F.scaled_dot_product_attention``."""
    op = read(node)
    if not isinstance(op, voc.Sdpa) or not all(map(voc.is_tensor, (op.query, op.key, op.value))):
        raise RefusedError("scores-edited", "the arguments of SDPA are not known")
    if not node.users:
        raise RefusedError("dead", "nothing reads the result of this attention")
    dropout_p = dropped(op.dropout_p)
    if not isinstance(op.is_causal, bool) or not isinstance(op.enable_gqa, bool):
        raise RefusedError("scores-edited", "is_causal or enable_gqa is not a constant")
    if voc.is_tensor(op.scale):
        raise RefusedError("scores-edited", "the scale is a tensor")
    out = voc.fake(node)
    rank, width = len(out.shape), max(hint(shape_of(op.query)[-1]), 1)
    scale = 1.0 / math.sqrt(width) if op.scale is None else op.scale
    see = partial(flow.through, out=node)
    q, k, v = (operand(see, x, rank, transposed=False) for x in (op.query, op.key, op.value))
    q, k, compute_dtype = common_dtype(see, q, k, v, node, node)
    level = Level((*out.shape[:-2], q.shape[-2], k.shape[-2]))
    steps: list[Step] = []
    if op.attn_mask is not None:
        mask = voc.tensor_of(op.attn_mask)
        if mask is None:
            raise RefusedError("scores-edited", "SDPA's mask is not a tensor")
        if mask.dtype is torch.bool:
            steps = [FillStep(op.attn_mask, level, node, -math.inf, True, out.dtype)]
        else:
            steps = [AddStep(op.attn_mask, level, node, 1)]
    if op.enable_gqa and not same_shape(k.shape[-3:-2], v.shape[-3:-2]):
        raise RefusedError("layout", "K and V have different numbers of heads")
    return open_site(
        flow,
        node,
        (q, k, v),
        (level,),
        level,
        steps,
        is_causal=op.is_causal,
        share_heads=not op.enable_gqa,
        compute_dtype=compute_dtype,
        kind="sdpa",
        anchor=node,
        form="sdpa",
        factors=(Factor(scale),),
        dropout_p=dropout_p,
        output_dims=tuple(range(rank)),
        interior=(node,),
    )
