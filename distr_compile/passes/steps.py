"""What may happen to the scores between the product and the softmax: a table of kinds of steps.

Of each kind it says how the walk goes back through a node (``back``) and, once the axes of the
scores are known, what that comes to (``forth``). What the rewritten call must be told of becomes a
:class:`.site.Step`, which says how it is written there (``write``).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import fx

from distr_compile.passes import vocabulary as voc
from distr_compile.passes.emit import Emitter
from distr_compile.passes.origin import Flow
from distr_compile.passes.site import Factor, Level, RefusedError, Step
from distr_compile.passes.vocabulary import fake, same_shape, same_size, shape_of, target_name

NO_CLAMP = 1.0e4
"""Bounds at least this far out guard against overflow; they do not change ordinary scores."""

BEYOND_BIAS = 6.5e4
"""No bias, in fp16 not even the largest, brings scores to a bound or a fill this far out."""


@dataclass
class Way:
    """The way from a softmax back to its product, and what happens to the scores on it.

    Attributes:
        flow: of the graph.
        interior: the nodes met, which nobody else may read.
        events: what happens to the scores, (record, node), last one first.
        places: where each axis of the softmax is among those of the scores here. Where they are
            reshaped on the way, the axes before the first reshape stand for the softmax's.
        dim: which of these the softmax runs over.
        capped: a tanh was met.
        sink: the column of sinks that was met.
        sink_level: likewise: the level at which they stand beside the scores.
        levels: of the events gone over forwards: the shapes that the scores take.
        steps: likewise: what the call must be told of.
        softcap: likewise; 0 for none.
        clamps: likewise: the nearer bound of each, or a fill, and the steps before it.
        shift: likewise: the numbers added to all scores so far; None where that is not known.
        hidden: likewise: how far below the others each finite fill puts scores.
        width: that of scores and sinks together, once the sinks stand beside the scores.
        dropout_p: of the weights, behind the softmax.
    """

    flow: Flow
    interior: list[fx.Node] = field(default_factory=list)
    events: list[tuple[voc.Op | Shift, fx.Node]] = field(default_factory=list)
    places: tuple[int, ...] = ()
    dim: int = 0
    capped: bool = False
    sink: voc.Append | None = None
    sink_level: Level | None = None
    levels: list[Level] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    softcap: float = 0.0
    clamps: list[tuple[float, int]] = field(default_factory=list)
    shift: float | None = 0.0
    hidden: list[float] = field(default_factory=list)
    width: Any = None
    dropout_p: float = 0.0

    def refuse_shift(self) -> None:
        """One number added to all scores: softmax ignores it, tanh or a sink beside them do not."""
        if self.capped:
            raise RefusedError("soft-cap", "a term is added to the scores inside the cap's tanh")
        if self.sink is not None:
            raise RefusedError("sinks", "the scores are shifted before the sinks stand beside them")

    def scores_side(self, reader: fx.Node, a: Any, b: Any) -> tuple[fx.Node, Any]:
        """(scores, other): of two operands the one with a product of two activations is first."""
        flow = self.flow
        chains = [flow.before(x, reader) if isinstance(x, fx.Node) else set() for x in (a, b)]
        carries = [bool(chain) for chain in chains]
        if carries[0] == carries[1]:
            carries = [any(flow.is_scores(p) for p in chain) for chain in chains]
        if carries[0] == carries[1]:
            raise RefusedError("two-products", "the scores are a sum of two products")
        scores, other = (a, b) if carries[0] else (b, a)
        if isinstance(other, fx.Node) and flow.behind[other] - flow.before(scores, reader):
            raise RefusedError("two-products", "a second product of activations is in the scores")
        return scores, other

    @property
    def level(self) -> Level:
        """The shape of the scores here; of the keys' scores, where sinks stand beside them."""
        return self.levels[-1]

    def go_to(self, event: Any, node: fx.Node, in_order: bool) -> None:
        """Take the shape that an event gives the scores."""
        shape, level = shape_of(node) or shape_of(event.x), self.level  # setitem returns nothing
        if isinstance(event, voc.Append):
            self.width, self.sink_level = shape[-1], level
        if self.width is not None:
            if not same_size(shape[-1], self.width):
                raise RefusedError("layout", "the softmax runs over reshaped keys")
            shape = (*shape[:-1], level.shape[-1])
        if isinstance(event, voc.Reshape):
            self.levels.append(Level(shape, _reshape_args(node), is_reshaped=True))
        elif in_order and not same_shape(shape[-2:], level.shape[-2:]):
            raise RefusedError("layout", "a bias or mask broadcasts the scores over rows or keys")
        elif in_order and not same_shape(shape[:-2], level.lead):  # the bias has a batch of its own
            self.levels.append(Level((*shape[:-2], *level.shape[-2:])))


@dataclass
class Written:
    """What the steps come to on the rewritten call: Q, one scale, and one mask in two parts.

    Attributes:
        emit: writes nodes.
        term: makes a tensor that broadcasts at a level broadcast against (B, H, N_q, N_k).
        dtype: of the site.
        q: Q times the factors that are tensors.
        scale: a number or the node of a symbolic one.
        bias: an additive mask.
        seen: a boolean mask, True attends.
    """

    emit: Emitter
    term: Callable[[fx.Node, Level], fx.Node]
    dtype: torch.dtype
    q: fx.Node
    scale: Any = 1.0
    bias: fx.Node | None = None
    seen: fx.Node | None = None

    def times(self, factor: Factor) -> None:
        """Take a factor into the scale."""
        scale, value = self.scale, factor.value
        if not isinstance(scale, fx.Node) and not isinstance(value, fx.Node):
            self.scale = scale / value if factor.divide else scale * value
        elif scale == 1.0 and not factor.divide:
            self.scale = value
        else:
            op = operator.truediv if factor.divide else operator.mul
            self.scale = self.emit.function(op, scale, value)

    def mask(self) -> fx.Node | None:
        """Both parts of the mask as one."""
        if self.bias is None or self.seen is None:
            return self.bias if self.seen is None else self.seen
        hidden = self.emit.method("logical_not", self.seen)
        return self.emit.method("masked_fill", self.bias, hidden, -math.inf)


# -- the kinds: the way back through each, what it comes to, how it is written ------------------


def _keep(way: Way, op: voc.Unary, node: fx.Node) -> fx.Node:
    """Keep what a node does to the scores, and go on to the scores that it reads."""
    way.events.append((op, node))
    return op.x


def _pass(way: Way, op: voc.Unary, node: fx.Node) -> fx.Node:
    """A cast or copy: go on."""
    return op.x


def _clamp_back(way: Way, op: voc.Clamp, node: fx.Node) -> fx.Node:
    low, high = (
        default if bound is None else way.flow.constants.number(bound, node)
        for bound, default in ((op.low, -math.inf), (op.high, math.inf))
    )
    if low is None or high is None or not (low <= -NO_CLAMP and high >= NO_CLAMP):
        raise RefusedError("scores-edited", "the scores are clamped")
    return _keep(way, voc.Clamp(op.x, low, high), node)


def _clamp_forth(way: Way, op: voc.Clamp, node: fx.Node) -> None:
    shift = math.nan if way.shift is None else way.shift
    near = min(shift - op.low, op.high - shift)
    if min(-op.low, op.high) >= torch.finfo(fake(op.x).dtype).max:
        return  # no number of the dtype passes it
    way.hidden = [max(value, op.low - shift) for value in way.hidden]
    is_biased = any(isinstance(step, AddStep) for step in way.steps)
    if not near >= (BEYOND_BIAS if is_biased else NO_CLAMP):
        raise RefusedError("scores-edited", "the scores are clamped where a term brings them")
    way.clamps.append((near, len(way.steps)))


def check_clamps(way: Way, factors: tuple[Factor, ...], product: fx.Node) -> None:
    """Refuse clamps and fills that are near, measured as products or as what softmax gets.

    Args:
        way: gone over forwards.
        factors: of the product, before all steps.
        product: reads the factors.
    """
    scales = [(0, x.value, x.divide, product) for x in factors]
    scales += [
        (i + 1, s.factor, s.divide, s.reader)
        for i, s in enumerate(way.steps)
        if isinstance(s, ScaleStep)
    ]
    for bound, place in way.clamps:
        before = after = 1.0
        for i, factor, divide, reader in scales:
            number = _size_of(way.flow, factor, reader)
            if number is None:
                text = "the scores are clamped or masked, and scaled by a factor that is not known"
                raise RefusedError("scores-edited", text)
            number = 1 / number if divide else number
            before, after = (before * number, after) if i <= place else (before, after * number)
        if bound < -voc.HIDDEN * before or bound * after < -voc.HIDDEN:
            raise RefusedError("scores-edited", "the scores are clamped or masked, and scaled")


def _size_of(flow: Flow, factor: Any, reader: fx.Node) -> float | None:
    """How large a factor of the scores is; a symbolic one may be anything in the next call."""
    number = flow.constants.number(factor, reader)
    return abs(float(number)) if number else None


def _permute_back(way: Way, op: voc.Permute, node: fx.Node) -> fx.Node:
    way.places = tuple(op.dims[place] for place in way.places)
    return _keep(way, op, node)


def _tanh_back(way: Way, op: voc.Tanh, node: fx.Node) -> fx.Node:
    if way.capped:
        raise RefusedError("soft-cap", "the scores pass through tanh twice")
    way.capped = True
    return _keep(way, op, node)


def _tanh_forth(way: Way, op: voc.Tanh, node: fx.Node) -> None:
    way.softcap = 1.0


def _sink_back(way: Way, op: voc.Append, node: fx.Node) -> fx.Node:
    if way.sink is not None:
        raise RefusedError("sinks", "more than one sink column is concatenated to the scores")
    if way.flow.behind[op.column] or way.flow.chained[op.column]:
        raise RefusedError("concat-scores", "one softmax runs over several score matrices")
    if way.places[way.dim] != len(way.places) - 1:
        raise RefusedError("softmax-axis", "a column is concatenated along another axis than keys")
    if not all(isinstance(event, voc.Reshape | voc.Clamp | Shift) for event, _ in way.events):
        raise RefusedError("sinks", "scores and sinks are changed after they are concatenated")
    way.sink = op
    return _keep(way, op, node)


@dataclass(frozen=True)
class ScaleStep(Step):
    """The scores are multiplied (or divided) by a number, a symbolic number or a tensor."""

    factor: voc.Scalar
    divide: bool

    def write(self, call: Written) -> None:
        """Write it into the scale, or into Q where it is a tensor; and into the bias before it."""
        emit, name, factor = call.emit, "div" if self.divide else "mul", self.factor
        if self.tensor is None:
            call.times(Factor(factor, self.divide))
        else:
            dtype, factor = fake(call.q).dtype, call.term(self.tensor, self.level)
            call.q = emit.method(name, call.q, factor)
            call.q = call.q if fake(call.q).dtype == dtype else emit.method("to", call.q, dtype)
        if call.bias is not None:
            call.bias = emit.method(name, call.bias, factor)


def _scale_back(way: Way, op: voc.Scale, node: fx.Node) -> fx.Node:
    scores, factor = way.scores_side(node, op.x, op.factor)
    if op.divide and scores is not op.x:
        raise RefusedError("scores-edited", "a tensor is divided by the scores")
    return _keep(way, voc.Scale(scores, factor, op.divide), node)


def _scale_forth(way: Way, op: voc.Scale, node: fx.Node) -> None:
    factor: Any = op.factor
    tensor = factor if voc.is_tensor(factor) else None
    if tensor is not None:
        shape = shape_of(tensor)
        if not same_shape(way.level.shape[-2:], way.levels[0].shape[-2:]):
            raise RefusedError("layout", "scores of split axes are scaled by a tensor")
        if shape and not same_size(shape[-1], 1):
            raise RefusedError("scores-edited", "the scores are scaled key by key")
        if not fake(tensor).dtype.is_floating_point:
            raise RefusedError("scores-edited", "the scores are scaled by integers")
    elif not isinstance(factor, int | float | fx.Node):
        raise RefusedError("scores-edited", "the scale is not a number")
    number = way.flow.constants.number(factor, node)
    if way.hidden and (number is None or number <= 0):
        raise RefusedError("scores-edited", "masked scores are scaled by a tensor")
    if way.shift:
        after = _times(way.shift, number, op.divide)
        way.shift = after if math.isfinite(after) else None
    way.hidden = [_times(x, number, op.divide) for x in way.hidden]
    if any(value > voc.HIDDEN for value in way.hidden):
        raise RefusedError("scores-edited", "masked scores are scaled until seen again")
    way.steps.append(ScaleStep(tensor, way.level, node, factor, op.divide))
    if way.softcap:
        number = _cap_factor(factor)
        way.softcap = way.softcap / number if op.divide else way.softcap * number


def _times(x: float, number: float | None, divide: bool) -> float:
    """``x`` after a factor; NaN where that is no number."""
    if number is None or (divide and number == 0):
        return math.nan
    return x / number if divide else x * number


def _cap_factor(given: voc.Scalar) -> float:
    """A factor of the soft cap; of a symbolic one it fixes the value, by a guard."""
    factor: Any = voc.value_of(given)
    if isinstance(factor, torch.SymFloat | torch.SymInt):
        factor = float(factor)
    if not isinstance(factor, int | float):
        raise RefusedError("soft-cap", "the soft cap is a tensor")
    if factor == 0 or not math.isfinite(factor):
        raise RefusedError("soft-cap", f"the soft cap's factor is {factor}")
    return factor


@dataclass(frozen=True)
class Shift:
    """A number is added to all scores: nothing to softmax, but to a clamp or a fill behind it.

    ``number`` is None where it is not known. ``is_maximum``: that of each row is subtracted.
    """

    x: fx.Node
    number: float | None
    is_maximum: bool = False


def _shift_forth(way: Way, op: Shift, node: fx.Node) -> None:
    if op.is_maximum:
        way.shift = 0.0
    elif op.number is not None and not math.isfinite(op.number):
        raise RefusedError("scores-edited", f"{op.number} is added to the scores")
    else:
        way.shift = None if way.shift is None or op.number is None else way.shift + op.number


@dataclass(frozen=True)
class AddStep(Step):
    """``alpha`` times a tensor is added to the scores."""

    tensor: fx.Node
    alpha: voc.Scalar

    def write(self, call: Written) -> None:
        """Write it into the bias."""
        emit, term = call.emit, call.term(self.tensor, self.level)
        if not fake(self.tensor).dtype.is_floating_point:
            term = emit.method("to", term, torch.promote_types(call.dtype, torch.float32))
        if self.alpha != 1:
            term = emit.method("mul", term, self.alpha)
        call.bias = term if call.bias is None else emit.method("add", call.bias, term)

    def offset(self, flow: Flow, later: list[Step]) -> float | None:
        """See :meth:`.Constants.offset`, where it is added as it is: floats, not scaled later."""
        is_scaled = self.alpha != 1 or any(isinstance(step, ScaleStep) for step in later)
        term = fake(self.tensor)
        if is_scaled or term.requires_grad or not term.dtype.is_floating_point:
            return None
        return flow.constants.offset(self.tensor, self.reader, self.level.shape)

    def is_sure(self, flow: Flow) -> bool:
        """Whether what it hides is so low that no score shows it again."""
        low = max(voc.ABSORBING, torch.finfo(fake(self.tensor).dtype).min)
        given = (self.tensor, self.reader, self.level.shape)
        return flow.constants.offset(*given, low=low) is not None


def _add_back(way: Way, op: voc.Add, node: fx.Node) -> fx.Node:
    if maximum := _row_maximum(op, node, way.places[way.dim]):
        made, others = way.flow.now(op.x, node), maximum - {node}
        if any(way.flow.memory.writers(made, n, node) for n in others):
            raise RefusedError("in-place-write", "the scores are written in place")
        way.refuse_shift()
        way.interior.extend(others)
        way.events.append((Shift(made, None, is_maximum=True), node))
        return made
    scores, term = way.scores_side(node, op.x, op.y)
    if scores is not op.x and op.alpha != 1:
        raise RefusedError("scores-edited", "the scores are subtracted from a tensor")
    if way.capped:
        way.refuse_shift()
    if voc.is_tensor(term):
        return _keep(way, voc.Add(scores, term, op.alpha), node)
    way.refuse_shift()
    number, alpha = (way.flow.constants.number(x, node) for x in (term, op.alpha))
    shift = None if number is None or alpha is None else number * alpha
    way.events.append((Shift(scores, shift), node))
    return scores


def _add_forth(way: Way, op: Any, node: fx.Node) -> None:
    term = voc.tensor_of(op.y)
    if term is None or term.dtype.is_complex:
        raise RefusedError("scores-edited", "a complex tensor is added")
    if any(value > -BEYOND_BIAS for value in way.hidden):
        raise RefusedError("scores-edited", "a bias may show again what a near fill hides")
    way.steps.append(AddStep(op.y, way.level, node, op.alpha))


def _row_maximum(op: voc.Add, reader: fx.Node, keys: int) -> set[fx.Node]:
    """``x - amax(x, keys)`` shifts rows, which softmax ignores: the nodes that read x for it.

    ``keys`` is the axis of x over which the softmax runs.
    """
    node: Any = op.y
    thin = tuple(1 if axis == keys else size for axis, size in enumerate(shape_of(op.x)))
    if op.alpha != -1 or not same_shape(shape_of(node), thin):
        return set()
    readers = {node}
    while target_name(node) in {"unsqueeze", "getitem", "detach"}:
        node = node.args[0]
        if not isinstance(node, fx.Node):
            return set()
        readers.add(node)
    if target_name(node) not in {"amax", "max"} or node.args[0] is not op.x:
        return set()
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    if not isinstance(dim, int) or dim % len(thin) != keys:
        return set()
    is_ours = all(user in readers or user is reader for n in readers for user in n.users)
    return readers if is_ours else set()


@dataclass(frozen=True)
class FillStep(Step):
    """The scores become ``value`` where ``tensor`` holds (with ``keep``: where it does not).

    ``dtype`` is that of the scores at that point: ``value`` fits it.
    """

    tensor: fx.Node
    value: float
    keep: bool
    dtype: torch.dtype

    def write(self, call: Written) -> None:
        """Write it into what is seen, or, where the value is finite, into the bias."""
        emit, condition = call.emit, call.term(self.tensor, self.level)
        if self.value == -math.inf:
            keep = condition if self.keep else emit.method("logical_not", condition)
            call.seen = keep if call.seen is None else emit.method("logical_and", call.seen, keep)
            return
        hidden = emit.method("logical_not", condition) if self.keep else condition
        # The model replaces scores, the mask is added: it must be so low that they vanish.
        value, dtype = min(self.value, voc.ABSORBING), self.dtype
        if call.bias is None:
            call.bias = emit.additive(hidden, dtype, value)
            return
        if dtype != call.dtype:  # scores upcast first: the number may not fit the bias's dtype
            call.bias = emit.method("to", call.bias, dtype)
        call.bias = emit.method("masked_fill", call.bias, hidden, value)

    def offset(self, flow: Flow, later: list[Step]) -> float | None:
        """See :meth:`.Constants.offset`."""
        shape, hidden = self.level.shape, not self.keep
        return flow.constants.offset(self.tensor, self.reader, shape, hidden)


def _fill_back(way: Way, op: voc.Fill, node: fx.Node) -> fx.Node:
    if way.capped:
        raise RefusedError("soft-cap", "the scores are masked inside the soft cap's tanh")
    return _keep(way, op, node)


def _fill_forth(way: Way, op: voc.Fill, node: fx.Node) -> None:
    value = way.flow.constants.number(op.value, node)
    if value is None:
        raise RefusedError("scores-edited", "the mask's fill value is not a constant")
    if value > voc.HIDING:
        raise RefusedError("scores-edited", f"scores are replaced by {value:g}: hides nothing")
    condition, scores = voc.tensor_of(op.condition), voc.tensor_of(op.x)
    if condition is None or condition.dtype is not torch.bool:
        raise RefusedError("scores-edited", "the mask's condition is not boolean")
    _check_hides(way, value)
    if value != -math.inf and scores is not None and scores.dtype is torch.float16:
        raise RefusedError("fp16-mask", "a finite fp16 fill value overflows as an additive mask")
    dtype = fake(op.x if voc.tensor_of(node) is None else node).dtype
    way.steps.append(FillStep(op.condition, way.level, node, value, op.keep, dtype))


def _check_hides(way: Way, value: float) -> None:
    """Refuse a finite fill that the scores around it may lie below."""
    is_biased = any(isinstance(step, AddStep) for step in way.steps)
    shift = math.nan if way.shift is None else way.shift
    below = value if value <= voc.ABSORBING else value - shift  # no shift is seen beside that
    way.hidden.append(below)
    if not below <= (-BEYOND_BIAS if is_biased else voc.HIDING):
        text = f"{value:g} replaces scores that a number or a bias may have brought below it"
        raise RefusedError("scores-edited", text)
    if below > -BEYOND_BIAS:  # as a clamp there: factors may bring the scores to it
        way.clamps.append((-below, len(way.steps)))


class Kind(NamedTuple):
    """What is to be known of a kind of step; how it is written is said by what ``forth`` adds."""

    back: Callable[[Way, Any, fx.Node], fx.Node]
    """Goes through a node and returns the scores that it reads."""
    forth: Callable[[Way, Any, fx.Node], None] | None = None
    """Adds what an event comes to, besides a shape."""


KINDS: dict[type, Kind] = {
    voc.Scale: Kind(_scale_back, _scale_forth),
    voc.Add: Kind(_add_back, _add_forth),
    Shift: Kind(_pass, _shift_forth),
    voc.Fill: Kind(_fill_back, _fill_forth),
    voc.Clamp: Kind(_clamp_back, _clamp_forth),
    voc.Tanh: Kind(_tanh_back, _tanh_forth),
    voc.Append: Kind(_sink_back),
    voc.Permute: Kind(_permute_back),
    voc.Reshape: Kind(_keep),
    voc.Cast: Kind(_pass),
    voc.Identity: Kind(_pass),
}
"""All that the walk passes through between the softmax and the product."""


def replay(way: Way, scores: Level, product: fx.Node, op: voc.Product, is_plain: bool) -> None:
    """Go over the events forwards, from the product and its scores.

    As long as the axes are not (lead..., query, key), only numbers may happen to the scores.
    """
    way.levels, permuted = [scores], "the axes of the scores are permuted around a bias"
    permutes = sum(isinstance(event, voc.Permute) for event, _ in way.events)
    if op.addend is not None:
        if permutes or not is_plain:
            raise RefusedError("layout", permuted)
        if not isinstance(op.beta, int | float):
            raise RefusedError("scores-edited", "baddbmm's beta is not a number")
        way.steps.append(AddStep(op.addend, scores, product, op.beta))
    for event, node in reversed(way.events):
        permutes -= isinstance(event, voc.Permute)
        in_order = is_plain and permutes == 0 and not isinstance(event, voc.Permute)
        way.go_to(event, node, in_order)
        if forth := KINDS[type(event)].forth:
            forth(way, event, node)
        has_tensors = any(step.tensor is not None for step in way.steps)
        if not in_order and (len(way.levels) > 1 or has_tensors):
            raise RefusedError("layout", permuted)
    way.softcap = abs(way.softcap)  # b tanh(a s) is odd in both: |b| tanh(a b s / |b|)


def drops_sink(user: fx.Node, sink: voc.Append) -> bool:
    """Whether a slice takes the keys' weights and leaves out the sink's."""
    whole, keys = slice(None, None, None), shape_of(sink.x)[-1]
    weights: Any = user.args[0]
    if not same_shape(shape_of(user), (*shape_of(weights)[:-1], keys)):
        return False
    if target_name(user) != "getitem" or not isinstance(user.args[1], tuple):
        return False
    *others, last = user.args[1]  # last of the axes, too: it is the one that became shorter
    if not all(other is Ellipsis or other == whole for other in others):
        return False
    starts = (1,) if sink.front else (None, 0)
    return isinstance(last, slice) and last.start in starts and last.step in (None, 1)


def _reshape_args(node: fx.Node) -> tuple[Any, ...] | None:
    """The sizes a ``view`` or ``reshape`` was called with."""
    if target_name(node) not in {"view", "reshape"}:
        return None
    args = node.args[1:]
    if len(args) == 1 and isinstance(args[0], list | tuple):
        args = tuple(args[0])
    return tuple(args) if len(args) == len(shape_of(node)) else None
