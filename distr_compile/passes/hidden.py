"""Which keys the masks of a site hide: later ones, as every causal model does, or others too.

What is causal is taken out of the masks and said to the call in a word, what hides nothing is left
out. A kernel that knows it leaves half of the scores out, and the rest of the masks is often a row
of keys for each text, where the model has a row for each query.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import fx

from distr_compile.passes.origin import Flow
from distr_compile.passes.site import Causal, Level, Step
from distr_compile.passes.steps import AddStep, FillStep
from distr_compile.passes.vocabulary import same_shape, same_size, shape_of, target_name, tensor_of

# Operations on boolean masks, and what of their parts has to hold.
_BOTH = frozenset("and_ __and__ logical_and bitwise_and mul".split())
_EITHER = frozenset("or_ __or__ logical_or bitwise_or".split())
_NOT = frozenset("invert inv logical_not bitwise_not __invert__".split())
_AS_IT_IS = frozenset("expand to bool clone contiguous detach".split())


def mask_of(
    flow: Flow, output: fx.Node, scores: Level, steps: list[Step], is_causal: bool = False
) -> tuple[str, Causal | None, tuple[Step, ...]]:
    """What hides or biases keys, for the report; whether that is "causal"; the steps left.

    Args:
        flow: of the graph.
        output: the node in whose place the call will read the masks.
        scores: of the product.
        steps: of the site.
        is_causal: later keys are hidden, besides what the steps hide.
    """
    count, offsets, left, is_sure = sum(map(_is_mask, steps)), [], [], True
    for i, step in enumerate(steps):
        found = _Read([], [step])
        if isinstance(step, AddStep | FillStep):
            # An axis may be split in two there; and SDPA's flag is beside no mask.
            is_aligned = same_shape(step.level.shape[-2:], scores.shape[-2:]) and not is_causal
            parts: Sequence[AddStep | FillStep] = [step]
            if _is_hiding(step):
                parts = _parts(flow, step, output)
            is_only = count == len(parts) == 1
            found = _read(flow, parts, steps[i + 1 :], is_only=is_only, is_aligned=is_aligned)
            if len(found.rest) > 1 and any(_has_rows(part.tensor) for part in found.rest):
                found = _Read(found.offsets, [step])  # it is there, and not larger than these
        if found.offsets and isinstance(step, AddStep):
            is_sure = step.is_sure(flow)
        offsets += found.offsets
        left += found.rest
    masks = [step for step in left if _is_mask(step)]
    causal = Causal(0) if is_causal else None
    if offsets:
        causal = Causal(min(offsets), by_mask=True, is_sure=is_sure)
    kind = "bool" if all(map(_is_hiding, masks)) else "float"
    kinds = ["causal"] * (causal is not None) + [kind] * bool(masks)
    return "+".join(kinds) or "none", causal, tuple(left)


class _Read(NamedTuple):
    """What a mask comes to: the offsets of what is causal in it, and the steps left of it."""

    offsets: list[int]
    rest: list[Step]


def _is_mask(step: Step) -> bool:
    return isinstance(step, AddStep | FillStep)


def _is_hiding(step: Step) -> TypeGuard[FillStep]:
    return isinstance(step, FillStep) and step.value == -math.inf


def _read(
    flow: Flow,
    parts: Sequence[AddStep | FillStep],
    later: list[Step],
    *,
    is_only: bool,
    is_aligned: bool,
) -> _Read:
    """What a mask comes to, the only one or beside others.

    Beside others only what truly hides counts as causal: a finite fill may leave rows without a key
    that are a mean of all.
    """
    found = _Read([], [])
    for part in parts:
        offset = part.offset(flow, later)
        if offset == math.inf:
            continue
        if offset is None or not is_aligned or not (is_only or _is_hiding(part)):
            found.rest.append(part)
        else:
            found.offsets.append(int(offset))
    return found


def _has_rows(mask: fx.Node | None) -> bool:
    """Whether a mask has a row for each query."""
    shape = shape_of(mask)
    return len(shape) > 1 and not same_size(shape[-2], 1)


def _parts(flow: Flow, step: FillStep, output: fx.Node) -> list[FillStep]:
    """Conditions that all have to show a key for that of ``step`` to do so; they broadcast as it.

    They will be read at ``output``: what is written until then is not taken apart.
    """
    memory, found = flow.memory, []
    stack, seen = [(step.tensor, step.keep)], {(step.tensor, step.keep)}
    while stack:
        node, keep = stack.pop()
        given = _conditions(node, keep)
        is_written = memory.writes(node) or memory.may_change(node, node, output)
        if not given or is_written or any(memory.may_change(x, node, output) for x in given):
            is_whole = node is step.tensor
            found.append(step if is_whole else replace(step, tensor=node, keep=keep))
            continue
        each = [(x, keep != (target_name(node) in _NOT)) for x in given]
        stack += [x for x in each if x not in seen]
        seen.update(each)
    return found


def _conditions(node: fx.Node, keep: bool) -> list[fx.Node]:
    """The boolean tensors that a node makes one of, if all have to hold; of one it is that itself,
    its opposite, or it for more."""
    name, value = target_name(node), tensor_of(node)
    given: list[Any] = [x for x in node.args if isinstance(x, fx.Node)]
    if name in _NOT | _AS_IT_IS:
        given = given[:1]
    elif name not in (_BOTH if keep else _EITHER) or len(given) != 2:
        return []
    tensors = [tensor_of(x) for x in (node, *given)]
    is_alike = value is not None and all(
        x is not None and x.dtype is torch.bool and x.device == value.device for x in tensors
    )
    return given if is_alike else []
