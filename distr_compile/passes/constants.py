"""Masks, fill values and scales that hang on constants only are computed, not recognised.

A constant is made of literals, sizes and factory calls (``ones``, ``arange``, ...) by operations
without chance; never of an input, a parameter or a buffer. The nodes that make it, those that write
to it in place included, run in program order on the CPU. With symbolic sizes they run on both sides
of every number in them, since a window of 4096 tokens is causal at 64. Of a large mask those rows
run that are near a number, near the first, the middle or the last one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map

from distr_compile.passes.memory import Memory, call, tensors_in
from distr_compile.passes.shapes import shape_only_at
from distr_compile.passes.vocabulary import HIDING, argument, target_name, value_of

SECONDS = 0.5
"""Processor time for the constants of one graph; what is not computed by then stays a tensor."""

BYTES = 64 * 2**20
"""Memory for one constant; of larger masks some rows are computed, where that is enough."""

LARGEST_SIZE = 2**24
"""No sequence is longer: a larger number in a program is no position."""

_FILLED = {
    **dict.fromkeys("zeros zeros_like new_zeros".split(), 0),
    **dict.fromkeys("ones ones_like new_ones".split(), 1),
    **dict.fromkeys("full full_like new_full".split()),
}
"""What a factory fills a tensor with; None: with what it is given."""

_POINTWISE = frozenset(
    "le lt ge gt eq ne less_equal greater_equal less greater logical_not bitwise_not invert inv "
    "logical_and logical_or logical_xor bitwise_and bitwise_or bitwise_xor and_ or_ xor iand ior "
    "__and__ __or__ __eq__ __ne__ __le__ __lt__ __ge__ __gt__ __invert__ add sub neg masked_fill "
    "where to bool float half bfloat16 double int long type type_as clone contiguous detach full "
    "arange tensor scalar_tensor full_like new_full tril triu zeros zeros_like new_zeros ones "
    "ones_like new_ones unsqueeze expand getitem diff".split()
)
"""What a mask may be made with that is computed for some sizes, or some rows: each acts on
elements, or by positions that it compares with a number in the program. A ``cumsum`` may be there
too, of what is False everywhere: transformers counts the texts in a row."""

_BITS = frozenset("bitwise_and bitwise_or bitwise_xor and_ or_ xor iand ior __and__ __or__".split())
"""Of integers these go by several positions at once, as a sum does."""

_SIZES_AT = {
    **dict.fromkeys("zeros ones".split(), slice(0, None)),
    **dict.fromkeys("expand new_zeros new_ones".split(), slice(1, None)),
    "full": slice(0, 1),
    "new_full": slice(1, 2),
}
"""Which arguments of a node say how large its result is, and are compared with nothing."""


_T = TypeVar("_T")


class _NotConstantError(Exception):
    """The value hangs on more than constants, or costs too much to compute."""


@dataclass
class _Rows:
    """The chunk of rows that is computed, of all rows that there are."""

    start: int
    stop: int
    total: int

    def cuts(self, shape: tuple[int, ...]) -> bool:
        """Whether of a tensor of this shape only a chunk is computed."""
        return self.is_part and len(shape) >= 2 and shape[-2] == self.total

    @property
    def is_part(self) -> bool:
        """Whether there are more rows."""
        return self.stop - self.start < self.total


class Constants:
    """Computes the constants of one graph."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self._seconds = SECONDS
        self._offsets: dict[tuple[Any, ...], float | None] = {}  # a model's layers share a mask

    def number(self, arg: Any, reader: fx.Node) -> float | None:
        """The number an argument stands for when ``reader`` reads it, if it is always the same."""
        if isinstance(arg, bool) or not isinstance(arg, int | float | fx.Node):
            return None
        if not isinstance(arg, fx.Node):
            return float(arg)
        try:
            programs = self._programs(self._nodes(arg, reader), arg, (), ())
        except _NotConstantError:
            return None
        tensors = (self._timed(p, _Rows(0, 0, 0)) for p in programs)
        ends = (f(x).item() for x in tensors if x.numel() for f in (torch.min, torch.max))
        found = _agreed(ends)
        return None if found is None else float(found)

    def offset(
        self,
        node: fx.Node,
        reader: fx.Node,
        shape: tuple[Any, ...],
        hidden: bool = False,
        low: float = HIDING,
    ) -> float | None:
        """The offset o >= 0 of a mask that shows row i the keys ``j <= i + o`` and no others.

        Args:
            node: bool, or floating: 0 shows and ``low`` or less hides. Broadcastable to the scores.
            reader: the node that reads it.
            shape: of the scores, (..., N_q, N_k), ints or SymInts.
            hidden: True where a boolean mask marks what is hidden.
            low: see ``node``.

        Returns:
            Infinity for a mask that shows everything, None for all others.
        """
        try:
            nodes = self._nodes(node, reader)
        except _NotConstantError:
            return None
        key = (node, tuple(nodes), *map(str, shape), hidden, low)
        if key not in self._offsets:
            *lead, rows, columns = shape
            programs = self._programs(nodes, node, (rows, columns), tuple(lead))
            self._offsets[key] = _agreed(
                self._offset_at(p, p.size(rows), p.size(columns), hidden, low) for p in programs
            )
        return self._offsets[key]

    def _offset_at(
        self, program: _Program, rows: int, columns: int, hidden: bool, low: float
    ) -> float:
        """The offset at one choice of sizes."""
        offset: int | None = None
        keys = torch.arange(columns, device="cpu")
        for chunk in program.chunks(rows, columns):
            visible = _visible(self._timed(program, chunk), hidden, low)
            visible = visible.expand(*visible.shape[:-2], chunk.stop - chunk.start, columns)
            first = visible.reshape(-1, *visible.shape[-2:])[0]
            if offset is None:
                offset = int(first[0].sum()) - 1
            queries = torch.arange(chunk.start, chunk.stop, device="cpu")[:, None]
            if offset < 0 or not (visible == (keys <= queries + offset)).all():
                raise _NotConstantError
        if offset is None:
            raise _NotConstantError
        return math.inf if offset >= columns - 1 > 0 else offset

    def _timed(self, program: _Program, rows: _Rows) -> Tensor:
        """Compute a program (or a chunk of its rows) on this graph's account."""
        start = time.thread_time()
        try:
            return program.run(rows, lambda: time.thread_time() - start > self._seconds)
        except Exception as error:
            raise _NotConstantError from error
        finally:
            self._seconds -= time.thread_time() - start

    def _programs(
        self, nodes: list[fx.Node], wanted: fx.Node, sizes: tuple[Any, ...], lead: tuple[Any, ...]
    ) -> Iterator[_Program]:
        """A program at every choice of sizes, and of what fresh memory holds.

        ``sizes`` are those that positions run over; ``lead``, the others of what reads it, are
        symbols of its own at most.
        """
        leaves = tree_leaves([*map(value_of, nodes), *sizes])
        numbers = [s for x in leaves for s in (x.shape if isinstance(x, Tensor) else (x,))]
        symbols = set().union(*map(_plain_symbols, numbers))
        lengths = set().union(*map(_plain_symbols, sizes))
        others = symbols - lengths
        if others - {s.node.expr for s in lead if isinstance(s, torch.SymInt)}:
            raise _NotConstantError  # a number of the caller's, not a size of the scores
        if symbols and not (_goes_by_positions(nodes) and _compared(nodes, None)[1] <= 2):
            raise _NotConstantError
        fillings = (0, 1) if any(target_name(n).startswith(_EMPTY) for n in nodes) else (0,)
        choices: Iterable[dict[Any, int]] = ({},)
        if symbols:
            length = sizes[0] if isinstance(sizes[0], int) and sizes[0] == sizes[1] else None
            choices = _choices(symbols & lengths, others, _numbers(nodes, length))
        for values in choices:
            for filling in fillings:
                yield _Program(nodes, wanted, values, filling)

    def _nodes(self, node: fx.Node, reader: fx.Node) -> list[fx.Node]:
        """All nodes that what ``reader`` reads of ``node`` hangs on, in program order.

        Raises:
            _NotConstantError: inputs, parameters or buffers are among them, or chance.
        """
        memory = self.memory
        found: set[fx.Node] = set()
        stack = [node]
        while stack:
            current = stack.pop()
            if current in found:
                continue
            found.add(current)
            if not tensors_in(value_of(current)) and not memory.writes(current):
                continue  # a size: its value is known by its expression
            is_call = current.op in ("call_function", "call_method")
            if not is_call or current not in memory.known or len(found) > 256:
                raise _NotConstantError
            skipped = shape_only_at(current)
            for place, given in enumerate((*current.args, *current.kwargs.values())):
                if place != skipped:
                    stack += [n for n in tree_leaves(given) if isinstance(n, fx.Node)]
            stack += memory.writers(current, current, reader)
        return sorted(found)


_EMPTY = ("empty", "new_empty")


@dataclass
class _Program:
    """Nodes to run, the one whose value is wanted, the value of every symbol."""

    nodes: list[fx.Node]
    wanted: fx.Node
    symbols: dict[Any, int]
    filling: int
    """What memory holds that nobody wrote."""

    def size(self, size: Any) -> Any:
        """A size, or a number or flag that hangs on sizes, as it is under this choice."""
        kind: Any = _SYMBOLIC.get(type(size))
        return size if kind is None else kind(size.node.expr.xreplace(self.symbols))

    def chunks(self, rows: int, columns: int) -> Iterator[_Rows]:
        """All rows at once if they fit into the memory allowed, else chunks of those that count.

        Where positions are compared with numbers in the program, sums of these and each other, all
        rows are alike that are far from the first one, from the last, whose position may be such a
        number, and from the middle, which is half of it. That is not so where three are compared.
        """
        tensors = [x for x in map(value_of, self.nodes) if isinstance(x, Tensor)]
        sized = [(x, self._shape(x)) for x in tensors]
        bytes_ = sum(math.prod(s) * x.itemsize for x, s in sized)
        count = max(1, math.ceil(bytes_ / BYTES))
        if count == 1:
            yield _Rows(0, rows, rows)
            return
        whole = sum(math.prod(s) * x.itemsize for x, s in sized if rows == 1 or s[-2:-1] != (rows,))
        if whole > BYTES or not _goes_by_positions(self.nodes):
            raise _NotConstantError
        step, near = max(1, rows // count), rows
        if rows == columns and _compared(self.nodes, rows)[1] <= 2:
            near = 2 * max(_numbers(self.nodes, rows)) + 3
        done = 0
        for middle in (0, rows // 2, rows):
            end = min(rows, middle + near)
            for start in range(max(done, middle - near), end, step):
                yield _Rows(start, min(start + step, end), rows)
            done = max(done, end)

    def run(self, rows: _Rows, is_late: Callable[[], bool]) -> Tensor:
        """The wanted value; of a chunk that is not all rows, these rows of it."""
        values: dict[fx.Node, Any] = {}
        for node in self.nodes:
            if is_late():
                raise TimeoutError
            values[node] = self._value(node, values, rows)
        result = values[self.wanted]
        assert isinstance(result, Tensor)
        return result

    def _value(self, node: fx.Node, values: dict[fx.Node, Any], rows: _Rows) -> Any:
        example, name = value_of(node), target_name(node)
        if example is not None and not tensors_in(example):
            return tree_map(self.size, example)
        shape = self._shape(example)
        is_wide = rows.cuts(shape)
        chunk = (*shape[:-2], rows.stop - rows.start, shape[-1]) if is_wide else shape
        if is_wide and name in _FILLED:
            fill: Any = _FILLED[name]
            fill = argument(node, 1, "fill_value") if fill is None else fill
            return torch.full((), fill, dtype=example.dtype, device="cpu").expand(chunk)

        def known(x: Any) -> Any:
            if isinstance(x, fx.Node) and x not in values:  # only its shape and dtype are looked at
                of = value_of(x)
                return torch.empty((), dtype=of.dtype, device="cpu").expand(self._shape(of))
            if isinstance(x, fx.Node):
                return values[x]
            return torch.device("cpu") if isinstance(x, torch.device) else x

        args: list[Any] = [fx.node.map_aggregate(a, known) for a in node.args]
        kwargs = {key: fx.node.map_aggregate(a, known) for key, a in node.kwargs.items()}
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        if is_wide and name in {"tril", "triu"}:
            diagonal: Any = args[1] if len(args) > 1 else kwargs.get("diagonal", 0)
            args, kwargs = [args[0]], {"diagonal": diagonal + rows.start}
        if is_wide and name == "expand":
            is_cut = rows.cuts(self._shape(value_of(node.args[0])))
            args = [args[0], *shape[:-2], -1 if is_cut else shape[-2], shape[-1]]
        if is_wide and name in {"cumsum", "diff"}:
            raise _NotConstantError
        result = call(node, args, kwargs)
        if isinstance(example, Tensor) and result.dtype != example.dtype:
            raise _NotConstantError  # autocast
        if name == "cumsum" and (self.symbols or rows.is_part) and result.any():
            raise _NotConstantError  # it may grow to any number, further on
        if name.startswith(_EMPTY):
            result.fill_(self.filling)
        places = [x for i, x in enumerate(node.args) if i != shape_only_at(node)]
        given = [n for n in tree_leaves([places, node.kwargs]) if isinstance(n, fx.Node)]
        if any(rows.cuts(self._shape(value_of(n))) for n in given):
            # Made of chunks: the chunk of what was made, or the rows are no longer the rows.
            if not is_wide or result.shape != chunk:
                raise _NotConstantError
        elif is_wide:
            result = result[..., rows.start : rows.stop, :]
        return result

    def _shape(self, example: Any) -> tuple[int, ...]:
        return tuple(map(self.size, example.shape)) if isinstance(example, Tensor) else ()


_SYMBOLIC: dict[type, type] = {torch.SymInt: int, torch.SymFloat: float, torch.SymBool: bool}


def _agreed(answers: Iterable[_T]) -> _T | None:
    """The answer of all programs; None where they differ, or where one cannot be computed."""
    found: set[_T] = set()
    try:
        for answer in answers:
            found.add(answer)
            if len(found) > 1:
                return None
    except _NotConstantError:
        return None
    return found.pop() if found else None


def _goes_by_positions(nodes: list[fx.Node]) -> bool:
    """Whether what the nodes compute may be asked of some sizes, or rows, instead of all."""
    return all(map(_acts_by_position, nodes)) and not _has_narrow_positions(nodes)


def _acts_by_position(node: fx.Node) -> bool:
    name, value = target_name(node), value_of(node)
    given = [value_of(leaf) for leaf in tree_leaves([node.args, node.kwargs])]
    if not tensors_in(value):  # a size; or a statement that writes
        return value is not None
    if "out" in node.kwargs or (name in {"iand", "ior"} and value.dtype is not torch.bool):
        return False  # positions and numbers that are written somewhere are not followed
    if name == "cumsum":
        return isinstance(given[0], Tensor) and given[0].dtype is torch.bool
    if name == "arange":  # one apart, or more
        return not any(isinstance(x, float | torch.SymFloat) for x in given)
    if name == "tensor":  # a list may say anything of each position
        return bool(value.numel() == 1)
    if name == "getitem" and any(isinstance(x, bool) for x in given):
        return False
    return name in _POINTWISE


def _visible(mask: Tensor, hidden: bool, low: float) -> Tensor:
    """Where a mask lets a row see a key."""
    mask = mask.reshape(*(1,) * (2 - mask.dim()), *mask.shape)
    if mask.dtype is torch.bool:
        return ~mask if hidden else mask
    visible = mask == 0
    if not mask.is_floating_point() or not (visible | (mask <= low)).all():
        raise _NotConstantError
    return visible


def _plain_symbols(size: Any) -> set[Any]:
    """The symbols of a number: one at most, and that plus a number; others are not computed."""
    if type(size) not in _SYMBOLIC:
        return set()
    expression = size.node.expr
    symbols = set(expression.free_symbols)
    is_plain = isinstance(size, torch.SymInt) and len(symbols) <= 1
    if not is_plain or any(not (expression - s).is_number for s in symbols):
        raise _NotConstantError
    return symbols


def _has_narrow_positions(nodes: list[fx.Node]) -> bool:
    """Whether positions pass through a type that cannot tell all of them apart, further on.

    A position is what an ``arange`` becomes until it is compared.
    """
    wide = (torch.int64, torch.int32, torch.float32, torch.float64)
    positions: set[fx.Node] = set()
    for node in nodes:
        value = value_of(node)
        if isinstance(value, torch.SymInt):  # the position behind the last one
            positions.add(node)
        if not isinstance(value, Tensor) or value.dtype is torch.bool:
            continue
        if target_name(node) == "arange" or positions & set(node.all_input_nodes):
            positions.add(node)
            if value.dtype not in wide:
                return True
    return False


def _choices(lengths: set[Any], others: set[Any], numbers: set[int]) -> Iterator[dict[Any, int]]:
    """Values for the symbols: on both sides of every number of the program.

    All lengths take them, equal and unequal, and each while the other one is small; the others take
    them beside equal and beside small lengths, and are small otherwise.
    """
    sizes = {s for c in numbers for s in (c - 1, c, c + 1, 2 * c + 3) if s >= 2}
    ordered, few = sorted(lengths, key=str), dict.fromkeys(others, 2)
    for size in sorted(sizes):
        equal = dict.fromkeys(ordered, size)
        if lengths:
            yield few | equal
        if others:
            yield equal | dict.fromkeys(others, size)
            yield dict.fromkeys(ordered, 3) | dict.fromkeys(others, size)
        if len(ordered) > 1:
            yield few | {symbol: size + 3 * i for i, symbol in enumerate(ordered)}
            yield few | {symbol: size + 5 * i for i, symbol in enumerate(reversed(ordered))}
            for symbol in ordered:
                yield few | dict.fromkeys(ordered, 3) | {symbol: size}


def _numbers(nodes: list[fx.Node], length: int | None) -> set[int]:
    """What a position may be compared with: the numbers of a program, and what they add up to.

    ``length`` is none of them where it says how large something is.
    """
    found = [x for n in nodes for x in _literals(n, length) if x <= LARGEST_SIZE]
    return {1, 3, max(sum(found), _compared(nodes, length)[0]), *found}


def _compared(nodes: list[fx.Node], length: int | None) -> tuple[int, int]:
    """How large all that is compared with positions may be, added up; how many positions at once.

    Numbers grow where tensors are added: 1, added to itself ten times over, is a window of 1024.

    Raises:
        _NotConstantError: positions or numbers grow beyond what a choice of sizes can show.
    """
    grown: dict[fx.Node, tuple[int, int]] = {}  # how many positions, and which number, a sum has
    compared = at_once = 0
    for node in nodes:
        value, name = value_of(node), target_name(node)
        leaves = (n for n in tree_leaves([node.args, node.kwargs]) if isinstance(n, fx.Node))
        given = [grown[n] for n in leaves if n in grown]
        positions, numbers = [p for p, _ in given], [n for _, n in given]
        own = sum(_literals(node, length, of_fills=True))
        if isinstance(value, torch.SymInt):  # a symbol, or that plus a number: ``_plain_symbols``
            grown[node] = len(value.node.expr.free_symbols), own
            continue
        if name == "diff":  # of neighbours
            positions, numbers = [2 * max(positions, default=0)], [2 * max(numbers, default=0)]
        is_sum = name in {"add", "sub", "diff"}
        if is_sum or (name in _BITS and value.dtype is not torch.bool):
            position, number = sum(positions), sum(numbers) + own
            is_exact = position or not value.dtype.is_floating_point
            if name == "diff":
                has_factor = argument(node, 1, "n", 1) != 1  # how often
            else:
                has_factor = len(node.args) > 2 or node.kwargs.get("alpha", 1) != 1
            if has_factor or position > 2 or (is_exact and number > LARGEST_SIZE):
                raise _NotConstantError
        elif name == "getitem" and len(given) > 1:  # positions of positions
            position, number = math.prod(p or 1 for p in positions), sum(numbers) + own
            if position > 2:
                raise _NotConstantError
        else:
            position, number = max(positions, default=0), max(numbers, default=0) + own
        if name == "arange":
            position = max(position, 1)
        if isinstance(value, Tensor) and value.dtype is torch.bool:
            compared += number if position else 0
            at_once = max(at_once, sum(positions))
            position, number = 0, 1
        grown[node] = position, number
    return min(compared, LARGEST_SIZE), at_once


def _literals(node: fx.Node, length: int | None, *, of_fills: bool = False) -> Iterator[int]:
    """The numbers in a node's arguments, or in its size, that a position may be compared with.

    What fills a score to hide it is none of them, if not ``of_fills``; nor is ``length`` where it
    says how large the result is.
    """
    size, terms, name = value_of(node), [], target_name(node)
    if isinstance(size, torch.SymInt):
        terms = [int(term) for term in size.node.expr.as_ordered_terms() if term.is_Integer]
    fills = name in {"masked_fill", "where", "full"} and not of_fills
    is_last = slice(0, 1) if len(node.args) == 1 else slice(1, 2)
    at = is_last if name == "arange" else _SIZES_AT.get(name, slice(0, 0))
    sizes = set(range(*at.indices(len(node.args))))
    given = [[a, i in sizes] for i, a in enumerate((*node.args, node.kwargs, terms))]
    for argument_, is_size in given:
        for leaf in tree_leaves(argument_):
            for x in (leaf.start, leaf.stop, leaf.step) if isinstance(leaf, slice) else (leaf,):
                if not isinstance(x, int | float) or not math.isfinite(x):
                    continue
                if not (fills and x <= HIDING) and not (is_size and x == length):
                    yield math.ceil(abs(x))
