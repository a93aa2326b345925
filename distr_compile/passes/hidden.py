"""Which keys the masks of a site hide: later ones, as every causal model does, or others too.

What is causal is taken out of the masks and said to the call in a word; a kernel that knows it
leaves half of the scores out, and what is left of the masks is often a row of keys for each text.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from distr_compile.passes.origin import Flow
from distr_compile.passes.site import Causal, Level, Step
from distr_compile.passes.steps import AddStep, FillStep
from distr_compile.passes.vocabulary import same_shape, target_name, tensor_of

# Operations on boolean masks, and what of their parts has to hold.
_BOTH = frozenset("and_ __and__ logical_and bitwise_and mul".split())
_EITHER = frozenset("or_ __or__ logical_or bitwise_or".split())
_NOT = frozenset("invert inv logical_not bitwise_not __invert__".split())
_AS_IT_IS = frozenset("expand to bool clone contiguous detach".split())


def mask_of(
    flow: Flow, scores: Level, steps: list[Step], is_causal: bool = False
) -> tuple[str, Causal | None, tuple[Step, ...]]:
    """What hides or biases keys, for the report; whether that is "causal"; the steps left.

    ``is_causal``: later keys are hidden, besides what the steps hide.
    """
    causal, left = Causal(0) if is_causal else None, steps
    if causal is None:
        causal, left = _causal_among(flow, scores, steps)
    masks = [s for s in left if isinstance(s, AddStep | FillStep)]
    is_bool = all(isinstance(s, FillStep) and s.value == -math.inf for s in masks)
    kinds = ["causal"] * (causal is not None) + ["bool" if is_bool else "float"] * bool(masks)
    return "+".join(kinds) or "none", causal, tuple(left)


def _causal_among(flow: Flow, scores: Level, steps: list[Step]) -> tuple[Causal | None, list[Step]]:
    """What is causal among the masks, or in one of them; the steps without it."""
    masks = [s for s in steps if isinstance(s, AddStep | FillStep)]
    for i, step in enumerate(steps):
        if not isinstance(step, AddStep | FillStep):
            continue
        if not same_shape(step.level.shape[-2:], scores.shape[-2:]):  # an axis is split in two
            continue
        is_only = len(masks) == 1
        # Beside others only what truly hides: rows may be left without a key, whose mean is of all.
        if not is_only and not (isinstance(step, FillStep) and step.value == -math.inf):
            continue
        offset = step.causal_offset(flow, steps[i + 1 :])
        rest: tuple[Step, ...] = ()
        if offset is None and isinstance(step, FillStep) and step.value == -math.inf:
            offset, rest = _taken_apart(flow, step)
        if offset is not None:
            return Causal(offset, step, rest), [*steps[:i], *rest, *steps[i + 1 :]]
    return None, steps


def _taken_apart(flow: Flow, step: FillStep) -> tuple[int | None, tuple[Step, ...]]:
    """The offset of what is causal in a condition made of several, and the others of them."""
    offsets, rest = [], []
    parts = _parts(flow, step.tensor, step.reader, step.keep)
    for part, keep in parts if len(parts) > 1 else ():
        alone = replace(step, tensor=part, keep=keep)
        offset = alone.causal_offset(flow, [])
        if offset is None:
            rest.append(alone)
        else:
            offsets.append(offset)
    return min(offsets, default=None), tuple(rest)


def _parts(flow: Flow, node: fx.Node, reader: fx.Node, keep: bool) -> list[tuple[fx.Node, bool]]:
    """Conditions that all have to show a key for ``node`` to do so, and whether True shows it.

    They broadcast as ``node`` does.
    """
    name, value, memory = target_name(node), tensor_of(node), flow.memory
    given: list[Any] = [x for x in node.args if isinstance(x, fx.Node)]
    if name in _NOT | _AS_IT_IS:
        given = given[:1]
    elif name not in (_BOTH if keep else _EITHER) or len(given) != 2:
        return [(node, keep)]
    tensors = [tensor_of(x) for x in (node, *given)]
    is_alike = value is not None and all(
        x is not None and x.dtype is torch.bool and x.device == value.device for x in tensors
    )
    is_written = memory.writes(node) or memory.may_change(node, node, reader)
    is_written = is_written or any(memory.may_change(x, node, reader) for x in given)
    if not is_alike or is_written:
        return [(node, keep)]
    keep = keep != (name in _NOT)
    return [part for x in given for part in _parts(flow, x, reader, keep)]
