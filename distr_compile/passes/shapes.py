"""Nodes that read of a tensor only its shape, dtype or device: they need not keep it.

Scores that ``torch.ones_like`` or ``size`` looks at go all the same; such a reader gets a tensor of
their shape with one element in memory.
"""

from __future__ import annotations

import torch
from torch import fx

from distr_compile.passes.emit import Emitter
from distr_compile.passes.site import AttentionSite, RefusedError
from distr_compile.passes.vocabulary import fake, shape_of, target_name

_SHAPE_ONLY = {
    **dict.fromkeys("ones_like zeros_like full_like empty_like rand_like randn_like".split(), 0),
    **dict.fromkeys("new_ones new_zeros new_full new_empty new_tensor size dim numel".split(), 0),
    **dict.fromkeys("type_as expand_as view_as reshape_as to".split(), 1),
}


def shape_only_at(node: fx.Node) -> int | None:
    """Where in its arguments an operation of PyTorch reads shape, dtype or device only."""
    name = target_name(node)
    is_ours = node.op == "call_method" or node.target == getattr(torch, name, None)
    return _SHAPE_ONLY.get(name) if is_ours or str(node.target).startswith("aten.") else None


def reads_shape_only(user: fx.Node, node: fx.Node) -> bool:
    """Whether ``user`` looks at the shape or dtype of ``node``, not at its values."""
    given = (*user.args, *user.kwargs.values())
    return [place for place, x in enumerate(given) if x is node] == [shape_only_at(user)]


def shape_readers(site: AttentionSite) -> list[tuple[fx.Node, fx.Node]]:
    """Nodes that look at the shape or dtype of one that goes: ``bias.view_as(scores)``."""
    found = [
        (user, node)
        for node in site.interior
        for user in node.users
        if node is not site.output and user not in site.interior
    ]
    for user, node in found:
        is_static = all(isinstance(size, int) for size in shape_of(node))
        if not is_static and target_name(user) not in _CASTS:
            raise RefusedError("layout", f"{target_name(user)} reads a symbolic shape of scores")
        if target_name(user).endswith("_like") and not fake(node).is_contiguous():
            why = f"{target_name(user)} takes the order in memory of the scores"
            raise RefusedError("weights-reused", why)
    return found


_CASTS = {"type_as", "to"}


def read_stand_in(graph: fx.Graph, reader: fx.Node, node: fx.Node) -> None:
    """Give a shape reader a tensor of that shape, dtype and device with one element in memory.

    The reader stays: another attention may have it as a term.
    """
    emit, like = Emitter(graph, reader), fake(node)
    stand_in = emit.function(torch.empty, (), dtype=like.dtype, device=like.device)
    if target_name(reader) not in _CASTS:
        stand_in = emit.method("expand", stand_in, *shape_of(node))
    reader.replace_input_with(node, stand_in)
