"""What happens to the scores on their way, replayed forwards: shapes, steps, masks, soft cap."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from distr_compile.passes import vocabulary as voc
from distr_compile.passes.operands import See, unrepeated
from distr_compile.passes.origin import Flow
from distr_compile.passes.site import (
    AddStep,
    Causal,
    FillStep,
    Level,
    Operand,
    RefusedError,
    ScaleStep,
    Step,
)
from distr_compile.passes.vocabulary import hint, same_shape, same_size, shape_of, target_name


def sizes_of(level: Level, q: Operand, k: Operand, v: Operand) -> dict[str, Any]:
    """The sizes of a site: those of the scores, and of Q, K and V."""
    batch: Any = 1
    for size in level.lead[:-1]:
        batch = batch * size
    heads = level.lead[-1] if level.lead else 1
    has_heads = len(k.shape) == len(level.shape) and len(k.shape) > 2
    return {
        "batch": batch,
        "num_heads": heads,
        "num_key_heads": k.shape[-3] if has_heads else heads,
        "num_queries": q.shape[-2],
        "num_keys": k.shape[-2],
        "head_dim": q.shape[-1],
        "value_dim": v.shape[-1],
    }


def shared_heads(see: See, k: Operand, v: Operand) -> tuple[Operand, Operand] | None:
    """K and V before ``repeat_kv``, where both were repeated by the same count."""
    before_k, before_v = unrepeated(see, k), unrepeated(see, v)
    if before_k is None or before_v is None or before_k[1] != before_v[1]:
        return None
    return before_k[0], before_v[0]


def tensors_of(step: Step) -> list[fx.Node]:
    """The tensor that a step brings to the scores, if it brings one."""
    if isinstance(step, AddStep):
        return [step.term]
    if isinstance(step, FillStep):
        return [step.condition]
    return [step.factor] if voc.is_tensor(step.factor) else []  # type: ignore[list-item]


def preference(level: Level) -> tuple[int, int, int]:
    """Four axes first (batch, heads, N, N), then more, then fewer; of two the less broadcast."""
    rank = len(level.shape)
    return (0 if rank == 4 else 1 if rank > 4 else 2, -rank, -count(level.lead))


def count(shape: tuple[Any, ...]) -> int:
    """The number of elements; symbolic sizes count by their hints."""
    return math.prod(max(hint(size), 0) for size in shape)


def _reshape_args(node: fx.Node) -> tuple[Any, ...] | None:
    """The sizes a ``view`` or ``reshape`` was called with."""
    if target_name(node) not in {"view", "reshape"}:
        return None
    args = node.args[1:]
    if len(args) == 1 and isinstance(args[0], list | tuple):
        args = tuple(args[0])
    return tuple(args) if len(args) == len(shape_of(node)) else None


def replay(
    flow: Flow,
    scores: Level,
    events: list[tuple[voc.Op, fx.Node]],
    op: voc.Product,
    product: fx.Node,
    is_plain: bool,
) -> tuple[list[Level], list[Step], float]:
    """Go over the events forwards: the shapes the scores take, the steps at each, the soft cap.

    As long as the axes are not (lead..., query, key), only numbers may happen to the scores.
    """
    levels, level = [scores], scores
    steps: list[Step] = []
    softcap = 0.0
    width: Any = None
    permutes = sum(isinstance(event, voc.Permute) for event, _ in events)
    if op.addend is not None:
        if permutes or not is_plain:
            raise RefusedError("layout", "the axes of the scores are permuted around a bias")
        if not isinstance(op.beta, int | float):
            raise RefusedError("scores-edited", "baddbmm's beta is not a number")
        steps.append(AddStep(op.addend, op.beta, level, product))
    for event, node in reversed(events):
        shape = shape_of(node) or shape_of(event.x)  # type: ignore[attr-defined]  # a write by setitem returns nothing
        permutes -= isinstance(event, voc.Permute)
        in_order = is_plain and permutes == 0 and not isinstance(event, voc.Permute)
        if isinstance(event, voc.Append):
            width = shape[-1]
        if width is not None:  # the level is that of the keys' scores
            if not same_size(shape[-1], width):
                raise RefusedError("layout", "the softmax runs over reshaped keys")
            shape = (*shape[:-1], level.shape[-1])
        if isinstance(event, voc.Reshape):
            level = Level(shape, _reshape_args(node))
            levels.append(level)
        elif in_order and not same_shape(shape[-2:], level.shape[-2:]):
            raise RefusedError("layout", "a bias or mask broadcasts the scores over rows or keys")
        elif in_order and not same_shape(shape[:-2], level.lead):  # the bias has a batch of its own
            level = Level((*shape[:-2], *level.shape[-2:]))
            levels.append(level)
        if isinstance(event, voc.Scale):
            if voc.is_tensor(event.factor) and not same_shape(level.shape[-2:], scores.shape[-2:]):
                raise RefusedError("layout", "scores of split axes are scaled by a tensor")
            steps.append(_scale_step(event, node, level, steps))
            softcap = _times_cap(softcap, event)
        elif isinstance(event, voc.Tanh):
            softcap = 1.0
        elif isinstance(event, voc.Add):
            term = voc.tensor_of(event.y)
            if term is None or term.dtype.is_complex:
                raise RefusedError("scores-edited", "a complex tensor is added")
            steps.append(AddStep(event.y, event.alpha, level, node))  # type: ignore[arg-type]
        elif isinstance(event, voc.Fill):
            steps.append(_fill_step(flow, event, node, level))
        if not in_order and (len(levels) > 1 or any(map(tensors_of, steps))):
            raise RefusedError("layout", "the axes of the scores are permuted around a bias")
    # b tanh(a s) is odd in both: |b| tanh(a b s / |b|), the soft cap |b| of scores scaled by a b.
    return levels, steps, abs(softcap)


def _times_cap(softcap: float, event: voc.Scale) -> float:
    """The soft cap after one more factor; of a symbolic one it fixes the value, by a guard."""
    if not softcap:
        return softcap
    factor: Any = voc.value_of(event.factor)
    if isinstance(factor, torch.SymFloat | torch.SymInt):
        factor = float(factor)
    if not isinstance(factor, int | float):
        raise RefusedError("soft-cap", "the soft cap is a tensor")
    if factor == 0 or not math.isfinite(factor):
        raise RefusedError("soft-cap", f"the soft cap's factor is {factor}")
    return softcap / factor if event.divide else softcap * factor


def _scale_step(event: voc.Scale, node: fx.Node, level: Level, before: list[Step]) -> ScaleStep:
    factor = event.factor
    if voc.is_tensor(factor):
        shape = shape_of(factor)  # type: ignore[arg-type]
        if shape and not same_size(shape[-1], 1):
            raise RefusedError("scores-edited", "the scores are scaled key by key")
        if not voc.tensor_of(factor).dtype.is_floating_point:  # type: ignore[union-attr]
            raise RefusedError("scores-edited", "the scores are scaled by integers")
    elif not isinstance(factor, int | float | fx.Node):
        raise RefusedError("scores-edited", "the scale is not a number")
    hidden = [s.value for s in before if isinstance(s, FillStep)]
    if hidden and not (isinstance(factor, int | float) and factor > 0):
        raise RefusedError("scores-edited", "masked scores are scaled by a tensor")
    for value in hidden:
        if (value / factor if event.divide else value * factor) > voc.HIDDEN:  # type: ignore[operator]
            raise RefusedError("scores-edited", "masked scores are scaled until seen again")
    return ScaleStep(factor, event.divide, level, node)


def _fill_step(flow: Flow, event: voc.Fill, node: fx.Node, level: Level) -> FillStep:
    value = flow.constants.number(event.value, node)
    if value is None:
        raise RefusedError("scores-edited", "the mask's fill value is not a constant")
    if value > voc.HIDING:
        raise RefusedError("scores-edited", f"scores are replaced by {value:g}: hides nothing")
    condition, scores = voc.tensor_of(event.condition), voc.tensor_of(event.x)
    if condition is None or condition.dtype is not torch.bool:
        raise RefusedError("scores-edited", "the mask's condition is not boolean")
    if value != voc.INFINITE and scores is not None and scores.dtype is torch.float16:
        raise RefusedError("fp16-mask", "a finite fp16 fill value overflows as an additive mask")
    value_of_node = voc.tensor_of(node)
    dtype = (scores if value_of_node is None else value_of_node).dtype  # type: ignore[union-attr]
    return FillStep(event.condition, value, event.keep, level, node, dtype)


def _is_added_as_it_is(step: AddStep, steps: list[Step]) -> bool:
    """Whether a bias is of floats, and is not multiplied with the scores afterwards."""
    term = voc.tensor_of(step.term)
    later = steps[steps.index(step) + 1 :]
    is_float = term is not None and term.dtype.is_floating_point
    return is_float and not any(isinstance(each, ScaleStep) for each in later)


def mask_kind_of(
    flow: Flow, scores: Level, steps: list[Step]
) -> tuple[str, Causal | None, list[Step]]:
    """What hides or biases keys, for the report; whether that is "causal"; the steps left."""
    masks = [s for s in steps if isinstance(s, AddStep | FillStep)]
    if not masks:
        return "none", None, steps
    if len(masks) == 1:
        only = masks[0]
        rows, keys = only.level.shape[-2:]
        offset, find = None, flow.constants.causal_offset
        if not same_shape((rows, keys), scores.shape[-2:]):
            pass  # queries or keys are split into several axes there
        elif isinstance(only, FillStep):
            offset = find(only.condition, only.reader, rows, keys, hidden=not only.keep)
        elif only.alpha == 1 and _is_added_as_it_is(only, steps):
            offset = find(only.term, only.reader, rows, keys)
        if offset is not None:
            return "causal", Causal(offset, only), [s for s in steps if s is not only]
    is_bool = all(isinstance(s, FillStep) and s.value == voc.INFINITE for s in masks)
    return ("bool" if is_bool else "float"), None, steps
