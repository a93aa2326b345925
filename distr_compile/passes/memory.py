"""What the nodes of a graph write, and which of them share memory: learnt by running it.

No list says which operation writes in place or returns a view. The graph is run once on fake
tensors (no data, no arithmetic) under a dispatch mode that sees every ATen call: its schema says
what it writes, its results say whose storage they share. Nodes that cannot be run so (of functorch,
of higher-order operators, over tensor subclasses, or with an error) *may* write all that they are
given, and what they return may be a view of it.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves, tree_map

from distr_compile.lowering.sharded import is_sharded
from distr_compile.passes.vocabulary import hint, same_shape, target_name, value_of

_LEVELS = {"increment_nesting": 1, "enter_dual": 1, "decrement_nesting": -1, "exit_dual": -1}
"""Parts of the names of functorch's nodes that open and close a transform's level."""


class Geometry(NamedTuple):
    """Which elements of its storage a tensor is, and in which order."""

    dtype: torch.dtype
    numbers: tuple[Any, ...]
    """The offset, all sizes, all strides; they may be symbolic."""

    def same(self, other: Geometry) -> bool:
        """Whether both are the same elements in the same order, asked without a guard."""
        return self.dtype == other.dtype and same_shape(self.numbers, other.numbers)


class Memory:
    """Writes and aliases of one graph.

    Attributes:
        known: nodes that were run and call nothing but ATen operations without chance.
        pure: those of them that do nothing but compute a value: they write nothing.
        dead: pure nodes whose value nobody reads, directly or through others.
        without_grad: nodes that run where autograd does not record.
        autocasts: nodes that run where autocast is on.
        transformed: nodes inside a ``torch.func`` transform or a level of forward-mode AD.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.known: set[fx.Node] = set()
        self.pure: set[fx.Node] = set()
        self.dead: set[fx.Node] = set()
        self.transformed: set[fx.Node] = set()
        self.without_grad: set[fx.Node] = set()
        self.autocasts: set[fx.Node] = set()
        self._storages: dict[fx.Node, frozenset[int]] = {}
        self._geometry: dict[fx.Node, Geometry] = {}
        self._results: Mapping[fx.Node, Any] = {}
        self._arguments: frozenset[int] = frozenset()
        self._written: dict[fx.Node, dict[int, list[Geometry]]] = {}
        self._writers: dict[int, list[fx.Node]] = {}
        _Run(self, graph).run()
        given = (n for n in graph.nodes if n.op == "placeholder" and not _is_of_module(n))
        self._arguments = frozenset().union(*map(self.storages, given))
        for node in reversed(graph.nodes):
            if node in self.pure and all(user in self.dead for user in node.users):
                self.dead.add(node)

    def storages(self, node: fx.Node) -> frozenset[int]:
        """Names of the storages that a node's tensors may lie in."""
        return self._storages.get(node, frozenset())

    def writes(self, node: fx.Node) -> frozenset[int]:
        """Names of the storages that a node writes, or may write."""
        return frozenset(self._written.get(node, ()))

    def writes_into(self, node: fx.Node, target: fx.Node) -> bool:
        """Whether ``node`` may change what ``target`` holds."""
        return bool(self.writes(node) & self.storages(target))

    def writers(self, node: fx.Node, after: fx.Node, before: fx.Node) -> list[fx.Node]:
        """The nodes between two others that write the memory of ``node``, in order."""
        found: set[fx.Node] = set()
        for storage in self.storages(node):
            nodes = self._writers.get(storage, [])
            found.update(nodes[bisect_right(nodes, after) : bisect_left(nodes, before)])
        return sorted(found)

    def may_change(self, node: fx.Node, after: fx.Node, before: fx.Node) -> bool:
        """Whether something between two others may write the memory of ``node``.

        Of an argument of the call also what writes another one: a later call may be given two
        views of one memory, also in two dtypes, of which Dynamo knows nothing. Nodes that could
        not be run count where they are given the memory itself.
        """
        if self.writers(node, after, before):
            return True
        if not self.storages(node) & self._arguments:
            return False
        return any(
            after < writer < before and self._written[writer][storage]
            for storage in self._arguments
            for writer in self._writers.get(storage, ())
        )

    def definition(self, node: fx.Node, reader: fx.Node) -> fx.Node | None:
        """The node that made what ``node`` holds when ``reader`` reads it.

        That is the node itself, or the last one that wrote exactly its elements in place; None
        where something else may have written to some of them.
        """
        writers = self.writers(node, node, reader)
        if not writers:
            return node
        written = self._written[writers[-1]]
        own = self._geometry.get(node)
        hits = [g for storage in self.storages(node) for g in written.get(storage, [])]
        is_whole = own is not None and bool(hits) and all(own.same(g) for g in hits)
        return writers[-1] if is_whole else None

    def is_laid_anew(self, node: fx.Node) -> bool:
        """Whether sizes or strides of a node's tensor are not those that it was made with.

        The graph knows the last ones: of ``x.transpose_(0, 1)`` those afterwards, for all readers.
        """
        made, now = self._geometry.get(node), _geometry(self._results.get(node))
        if made is None or now is None:
            return False
        pairs = zip(made.numbers[1:], now.numbers[1:], strict=False)
        is_other = len(made.numbers) != len(now.numbers)
        return is_other or any(hint(a) != hint(b) for a, b in pairs)

    # -- filled in by the run ---------------------------------------------------------------------

    def note_results(self, results: Mapping[fx.Node, Any]) -> None:
        """Record what the nodes' results are at the end of the run."""
        self._results = results

    def note(self, node: fx.Node, storages: frozenset[int], geometry: Geometry | None) -> None:
        """Record where a node's result lies."""
        self._storages[node] = storages
        if geometry is not None:
            self._geometry[node] = geometry

    def note_writes(self, node: fx.Node, written: dict[int, list[Geometry]]) -> None:
        """Record what a node wrote: storage -> the elements of each write; none are known: []."""
        known = self._written.setdefault(node, {})
        for storage, geometries in written.items():
            if storage not in known:
                self._writers.setdefault(storage, []).append(node)
            known.setdefault(storage, []).extend(geometries)


class _Watch(TorchDispatchMode):
    """What ATen calls do while one node runs, whatever the Python code that makes them is called.

    Attributes:
        written: storage -> the elements that each write went to.
        is_known: only operations of ATen were called, and none that draws random numbers.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.written: dict[int, list[Geometry]] = {}
        self.is_known = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        is_ours = func.namespace in ("aten", "prims", "prim")
        if not is_ours or torch.Tag.nondeterministic_seeded in func.tags:
            self.is_known = False
        for place, argument in enumerate(func._schema.arguments if func._schema.is_mutable else ()):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            for x in tensors_in(args[place] if place < len(args) else kwargs.get(argument.name)):
                storage, geometry = _storage(x), _geometry(x)
                if storage is not None and geometry is not None:
                    self.written.setdefault(storage, []).append(geometry)
        return func(*args, **kwargs)


class _Run:
    """The run of one graph on fake tensors; fills in a :class:`Memory`."""

    def __init__(self, memory: Memory, graph: fx.Graph) -> None:
        self.memory, self.graph = memory, graph
        self.values: dict[fx.Node, Any] = {}
        # Results of nodes that were not run: a storage of their own -> those it may share.
        self.may_alias: dict[int, frozenset[int]] = {}
        # Kept alive to the end: a freed storage's address would come back as another's name.
        self.alive: list[Any] = []
        values = (local_of(x) for node in graph.nodes for x in tensors_in(value_of(node)))
        self.mode = next((x.fake_mode for x in values if isinstance(x, FakeTensor)), None)
        self.autocast: list[Any] = []
        self.named: set[int] = set()  # storages that a node so far has given a name to

    def run(self) -> None:
        with _as_it_was(self.mode), contextlib.ExitStack() as stack:
            if self.mode is not None:
                stack.enter_context(self.mode)
                if self.mode.shape_env is not None:
                    stack.enter_context(self.mode.shape_env.suppress_guards())
                    stack.enter_context(self.mode.shape_env.ignore_fresh_unbacked_symbols())
            # The Python dispatcher: else composite operations make symbolic sizes constants.
            stack.enter_context(enable_python_dispatcher())
            level, grad = 0, torch.is_grad_enabled()
            stack.enter_context(torch.no_grad())
            for node in self.graph.nodes:
                if node.target is torch._C._set_grad_enabled:
                    grad = bool(node.args[0])
                name = target_name(node)
                grad = grad and name != "_enter_inference_mode"
                if not grad:
                    self.memory.without_grad.add(node)
                change = next((step for part, step in _LEVELS.items() if part in name), 0)
                level += max(change, 0)
                if level or _is_wrapped(value_of(node)):
                    self.memory.transformed.add(node)
                level += min(change, 0)
                self._visit(node)
                if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
                    self.memory.autocasts.add(node)
            for context in reversed(self.autocast):
                context.__exit__(None, None, None)
        self.memory.note_results(self.values)

    def _visit(self, node: fx.Node) -> None:
        memory = self.memory
        seen = self._execute(node)
        if seen is not None:  # what a node writes into memory of its own, nobody else has seen
            own = {s for s in seen.written if not self._closure(s) & self.named}
            seen.written = {s: at for s, at in seen.written.items() if s not in own}
        value = self.values[node]
        found = [s for x in tensors_in(value) if (s := _storage(x)) is not None]
        memory.note(node, frozenset().union(*map(self._closure, found)), _geometry(value))
        written: dict[int, list[Geometry]] = {}
        if seen is None:
            written = {storage: [] for storage in self._given(node)}
        elif seen.is_known and node.op != "output":
            memory.known.add(node)
            is_check = target_name(node) == "_assert_tensor_metadata"  # of an exported program
            if (value is not None or is_check) and not seen.written:
                memory.pure.add(node)
        for storage, geometries in seen.written.items() if seen is not None else ():
            for name in self._closure(storage):
                written.setdefault(name, []).extend(geometries)
        memory.note_writes(node, written)
        for given in node.all_input_nodes:
            self._follow(given, node)
        self.named.update(*map(memory.storages, (node, *node.all_input_nodes)))

    def _follow(self, given: fx.Node, node: fx.Node) -> None:
        """Note where a tensor lies now if ``node`` laid it elsewhere: ``set_``, ``x.data = y``."""
        storage, before = _storage(self.values[given]), self.memory.storages(given)
        if storage is not None and storage not in before:
            everywhere = before | self._closure(storage)
            self.memory.note(given, everywhere, None)
            self.memory.note_writes(node, {name: [] for name in everywhere})

    def _execute(self, node: fx.Node) -> _Watch | None:
        """Run one node; None if it could not be run and may have done anything to its inputs."""
        example = value_of(node)
        if node.target is torch.amp.autocast_mode._enter_autocast:
            self.autocast.append(node.target(*node.args))
        elif node.target is torch.amp.autocast_mode._exit_autocast and self.autocast:
            self.autocast.pop().__exit__(None, None, None)
        has_tensors = tensors_in([value_of(n) for n in node.all_input_nodes] + [example])
        if node.op in ("placeholder", "get_attr", "output") or not has_tensors:
            self.values[node] = self._shell(example, frozenset(), over_example=True)
            return _Watch()
        seen = self._try(node, example)
        if seen is None:
            self.values[node] = self._shell(example, self._given(node))
        return seen

    def _try(self, node: fx.Node, example: Any) -> _Watch | None:
        """Run one node; None if that cannot be, or gives something else than the graph says."""
        is_body = isinstance(node.target, torch._ops.HigherOrderOperator)
        is_strange = is_body or node.op == "call_module" or node in self.memory.transformed
        tensors = tensors_in([*(self.values[n] for n in node.all_input_nodes), example])
        if is_strange or not all(map(is_plain_fake, map(local_of, tensors))):
            return None
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.values.__getitem__)
        seen = _Watch()
        try:
            with _as_it_was(self.mode), seen:
                result = call(node, args, kwargs)
        except Exception:
            return None
        self.alive.append(result)
        if _kinds(result) != _kinds(example):
            return None
        if not tensors_in(result) or any(map(free_unbacked_symbols, tensors_in(result))):
            # Numbers, and sizes that depend on data, keep the names that the graph knows them by.
            result = self._shell(example, frozenset())
        self.values[node] = result
        return seen

    def _given(self, node: fx.Node) -> frozenset[int]:
        """The storages of all that a node reads."""
        return frozenset().union(*(self.memory.storages(n) for n in node.all_input_nodes))

    def _closure(self, storage: int) -> frozenset[int]:
        return self.may_alias.get(storage, frozenset()) | {storage}

    def _shell(self, example: Any, aliases: frozenset[int], *, over_example: bool = False) -> Any:
        """A stand-in for a recorded value: fresh, or over the memory of the value itself.

        Tensors that the mode cannot make (sparse ones, subclasses) stand for themselves.
        """

        def stand_in(x: Any) -> Any:
            if not is_plain_fake(x):
                made = x
            elif over_example:
                made = x.detach()
            else:
                made = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
            storage = _storage(made)
            if storage is not None and aliases:
                self.may_alias[storage] = aliases
            self.alive.append(made)
            return made

        return tree_map(stand_in, example)


@contextlib.contextmanager
def _as_it_was(mode: FakeTensorMode | None) -> Iterator[None]:
    """Leave functorch, grad mode, autocast and unbacked symbols as they were, whatever happens."""
    functorch = torch._C._functorch
    depth = functorch.get_dynamic_layer_stack_depth()
    grad, forward_grad = torch.is_grad_enabled(), torch._C._is_fwd_grad_enabled()
    autocast = torch.is_autocast_cache_enabled()
    shapes = mode.shape_env if mode is not None else None
    pending = list(shapes.pending_fresh_unbacked_symbols) if shapes is not None else []
    try:
        yield
    finally:
        if functorch.get_dynamic_layer_stack_depth() > depth:
            functorch.pop_dynamic_layer_stack_and_undo_to_depth(depth)
        torch._C._set_grad_enabled(grad)
        torch._C._set_fwd_grad_enabled(forward_grad)
        torch.set_autocast_cache_enabled(autocast)
        if shapes is not None:
            shapes.pending_fresh_unbacked_symbols[:] = pending


def _is_of_module(node: fx.Node) -> bool:
    """Whether an input is a parameter or buffer; what is not known to be one is an argument."""
    parts = ("_parameters_", "_buffers_", "_modules_")
    return isinstance(value_of(node), torch.nn.Parameter) or any(p in node.name for p in parts)


def call(node: fx.Node, args: Any, kwargs: Any) -> Any:
    """What the call of a node gives with these arguments in place of its own."""
    if callable(node.target):
        return node.target(*args, **kwargs)
    return getattr(args[0], str(node.target))(*args[1:], **kwargs)


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in a value: itself, or those in a tuple, list or dict."""
    return [x for x in tree_leaves(value) if isinstance(x, Tensor)]


def _storage(x: Any) -> int | None:
    try:
        return int(local_of(x).untyped_storage()._cdata)
    except (AttributeError, NotImplementedError, RuntimeError):  # no tensor, sparse, functorch's
        return None


def _geometry(x: Any) -> Geometry | None:
    x = local_of(x)
    try:
        return Geometry(x.dtype, (x.storage_offset(), *x.shape, *x.stride()))
    except (AttributeError, NotImplementedError, RuntimeError):
        return None


def _kinds(value: Any) -> list[tuple[torch.dtype, int]]:
    return [(x.dtype, x.dim()) for x in tensors_in(value)]


def local_of(x: Any) -> Any:
    """The part of a DTensor that is here; anything else is itself."""
    return x._local_tensor if is_sharded(x) else x


def is_plain_fake(x: Any) -> bool:
    """Whether a value is an ordinary tensor, of no subclass and no transform."""
    if not isinstance(x, FakeTensor) or _is_wrapped(x):
        return False
    return x.layout is torch.strided and not is_traceable_wrapper_subclass(x)


def _is_wrapped(value: Any) -> bool:
    """Whether a value belongs to a ``torch.func`` transform."""
    return any(map(torch._C._functorch.is_functorch_wrapped_tensor, tensors_in(value)))
