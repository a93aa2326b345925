"""Reports of living modules: ``record`` keeps the graphs of a compile, ``report`` finds them."""

from __future__ import annotations

import contextlib
import functools
import types
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from distr_compile.naming import canonical
from distr_compile.reporting.breaks import passed_over, skipped
from distr_compile.reporting.rows import LOCK, DistrWarning, GraphReport
from distr_compile.reporting.summary import Report


@dataclass(frozen=True)
class _Compile:
    """One way in which an owner was compiled.

    Attributes:
        policy: its policy.
        backend: what ``torch.compile`` made of the backend and its options; None if not known.
    """

    policy: Hashable
    backend: weakref.ref[Any] | None

    def is_same(self, other: _Compile) -> bool:
        """Whether both are of one object, which has one reference: equal ones may die apart."""
        return self.policy == other.policy and self.backend is other.backend


@dataclass
class _Entry:
    """The graphs of one owner, held as long as the owner lives."""

    owner: weakref.ref[Any]
    compiles: list[_Compile] = field(default_factory=list)
    graphs: dict[tuple[int, Hashable], GraphReport] = field(default_factory=dict)
    """By the index among ``compiles`` and the graph's key, in the order of compilation."""
    recent: list[int] = field(default_factory=list)
    """Indices among ``compiles``, the one that compiled last at the end."""
    warned: list[tuple[Hashable, str]] = field(default_factory=list)
    """Policy and pattern of each warning."""

    def keep(self, compiled: _Compile, key: Hashable, graph: GraphReport) -> None:
        """Add or replace a graph; forget those of other policies that nobody can ask for."""
        same = (i for i, one in enumerate(self.compiles) if one.is_same(compiled))
        index = next(same, len(self.compiles))
        if index == len(self.compiles):
            self.compiles.append(compiled)
        self.graphs[index, key] = graph
        self.recent = [i for i in self.recent if i != index and self._is_wanted(i, index)]
        self.recent.append(index)
        self.graphs = {key: g for key, g in self.graphs.items() if key[0] in self.recent}

    def _is_wanted(self, index: int, latest: int) -> bool:
        one = self.compiles[index]
        is_gone = one.backend is not None and one.backend() is None
        return not is_gone or one.policy == self.compiles[latest].policy

    def of_policy(self, policy: Hashable) -> list[GraphReport]:
        """All graphs compiled under a policy."""
        chosen = {i for i in self.recent if self.compiles[i].policy == policy}
        return list({key: g for (i, key), g in self.graphs.items() if i in chosen}.values())

    def of_latest(self) -> list[GraphReport]:
        """All graphs of the policy compiled last."""
        return self.of_policy(self.compiles[self.recent[-1]].policy)

    def of_backend(self, backend: weakref.ref[Any]) -> list[GraphReport]:
        """The graphs of the policy that a compiled object has; empty if it was never called."""
        known = [self.compiles[i] for i in self.recent]
        own = [one for one in known if one.backend is None or one.backend == backend]
        return self.of_policy(own[-1].policy) if own else []


# By identity, not by WeakKeyDictionary: code objects and some modules compare by value.
_ENTRIES: dict[int, _Entry] = {}


def record(
    owner: Any,
    graph: GraphReport,
    key: Hashable | None = None,
    policy: Hashable = None,
    backend: Any = None,
) -> None:
    """Keep the report of one compiled graph for ``report``.

    Args:
        owner: the compiled ``nn.Module``, function, code object or other callable; held weakly. Of
            a callable that cannot be there is no report.
        graph: what was found; it must hold no reference to the owner.
        key: names the graph among those of the owner, e.g. (frame name, input shapes). A graph
            recorded under the key of an earlier one (compiled again) replaces it; None never does.
            It must hold no reference to the owner.
        policy: the policy of the compile.
        backend: tells compiled objects of one owner apart: the innermost backend that
            ``torch.compile`` calls for this one; held weakly.

    Warns:
        DistrWarning: once per owner, policy and pattern, for a policy pattern that matches no
            attention in any of the owner's graphs so far.
    """
    try:
        owner = _owner_of(owner)
    except TypeError:
        return
    with LOCK:
        entry = _ENTRIES.get(id(owner))
        if entry is None or entry.owner() is not owner:
            entry = _Entry(weakref.ref(owner, _forget(id(owner))))
            _ENTRIES[id(owner)] = entry
        entry.keep(_Compile(policy, _reference(backend)), object() if key is None else key, graph)
        missed = [
            pattern
            for pattern in Report(tuple(entry.of_latest())).unmatched
            if (policy, pattern) not in entry.warned
        ]
        entry.warned += [(policy, pattern) for pattern in missed]
    for pattern in graph.unmatched:
        if pattern in missed:
            warnings.warn(
                f"policy pattern {pattern!r} matches no attention of {graph.root}; the layers with "
                f"attention are listed by distr_compile.report(model)",
                DistrWarning,
                stacklevel=2,
            )


@contextlib.contextmanager
def reports_apart(owners: Iterable[Any]) -> Iterator[None]:
    """See no reports of before in the context, and keep none of those that are made in it.

    Args:
        owners: modules, functions and other callables, compiled or not, whose reports are meant.
    """
    known: list[Any] = []
    for each in owners:
        with contextlib.suppress(TypeError):  # nothing that could have a report
            known.append(_owner_of(each))
    known = list({id(owner): owner for owner in known}.values())
    with LOCK:
        before = {id(owner): _ENTRIES.pop(id(owner), None) for owner in known}
    try:
        yield
    finally:
        with LOCK:
            for identity, entry in before.items():
                _ENTRIES.pop(identity, None)
                if entry is not None:
                    _ENTRIES[identity] = entry


def report(obj: Any) -> Report:
    """Return the report of all that was compiled with ``backend="distr"`` for ``obj`` up to now.

    Where one module was compiled under several policies, the report of what ``torch.compile``
    returned is of its own policy, and that of the module itself of the policy compiled last.

    Args:
        obj: an ``nn.Module``, what ``torch.compile`` returned for it, or a compiled or plain
            function. A module's report includes the submodules that were compiled one by one;
            their layers are named as the module names them.

    Raises:
        LookupError: nothing was compiled for ``obj``.
        TypeError: ``obj`` is nothing that ``torch.compile`` takes.
    """
    owner, backend = _owner_of(obj), _reference(_backend_of(obj))
    name = owner.co_name if isinstance(owner, types.CodeType) else type(owner).__name__
    placed = []
    for prefix, part in _owners(owner):
        with LOCK:
            entry = _ENTRIES.get(id(part))
            graphs = []
            if entry is not None and entry.owner() is part:
                graphs = entry.of_backend(backend) if backend else entry.of_latest()
                if not graphs and part is not owner:  # compiled by itself, in another way
                    graphs = entry.of_latest()
        placed += [(prefix, graph) for graph in graphs]
    if not placed:
        known = "".join(f"\n{line}" for line in passed_over(owner))
        config = getattr(owner, "config", None)
        if getattr(config, "_attn_implementation", None) == "distr":
            known += "\nIt has attn_implementation='distr'; none of its attention was called yet."
        raise LookupError(
            f"no report for {name}: nothing was compiled for it with backend='distr'. Compile the "
            "model with torch.compile(model, backend='distr'), call it once with real inputs, "
            f"then ask for the report of that same model{known}"
        )
    full = [(prefix, graph) for prefix, graph in placed if not graph.is_empty]
    parts = tuple(graph.placed(i, prefix) for i, (prefix, graph) in enumerate(full))
    return Report(parts, name, len(placed) - len(full), skipped(owner))


def _reference(backend: Any) -> weakref.ref[Any] | None:
    """A weak reference; those of equal living objects are equal. None if there is nothing to it."""
    try:
        return None if backend is None else weakref.ref(backend)
    except TypeError:
        return None


def _backend_of(compiled: Any) -> Any:
    """The backend of what ``torch.compile`` returned, as it calls it; None if that is not known."""
    from torch.nn import Module

    if isinstance(compiled, Module):
        context = vars(compiled).get("dynamo_ctx")
    elif isinstance(compiled, types.FunctionType):
        names = compiled.__code__.co_freevars
        cells = dict(zip(names, compiled.__closure__ or (), strict=True))
        context = cells["self"].cell_contents if "self" in cells else None
    else:
        context = None
    try:
        from torch._dynamo.eval_frame import innermost_backend

        return innermost_backend(context.callback) if context is not None else None
    except (ImportError, AttributeError):
        return None


def _forget(identity: int) -> Callable[[weakref.ref[Any]], None]:
    def callback(ref: weakref.ref[Any]) -> None:
        # No lock: this may run inside a locked section of the same thread, and the pop is atomic.
        # An entry made meanwhile for a new object at the same address is not ours to drop.
        entry = _ENTRIES.get(identity)
        if entry is not None and entry.owner is ref:
            _ENTRIES.pop(identity, None)

    return callback


def _is_referable(obj: object) -> bool:
    try:
        weakref.ref(obj)
    except TypeError:
        return False
    return True


def _owner_of(obj: Any) -> Any:
    """The module or code object behind a module, a compiled wrapper or a function."""
    from torch._dynamo import external_utils
    from torch.nn import Module

    while True:
        if isinstance(obj, Module):
            if "_orig_mod" not in obj._modules:
                return obj
            obj = obj._modules["_orig_mod"]
        elif isinstance(obj, types.CodeType):
            return obj
        elif hasattr(obj, "_torchdynamo_orig_callable"):
            obj = obj._torchdynamo_orig_callable
        elif isinstance(obj, functools.partial):
            obj = obj.func
        elif isinstance(obj, types.MethodType):
            obj = obj.__self__ if _is_referable(obj.__self__) else obj.__func__
        elif isinstance(obj, types.FunctionType):
            if obj.__code__.co_filename != external_utils.__file__:
                return obj.__code__
            obj = vars(obj)["__wrapped__"]  # Dynamo put it around a callable that is no function
        elif not isinstance(obj, type) and _is_referable(obj):
            return obj  # a builtin function, an object that is called or whose method is
        else:
            raise TypeError(
                f"report: got {type(obj).__name__}; accepted: an nn.Module, a function, or what "
                "torch.compile returned for one"
            )


def _owners(owner: Any) -> Iterator[tuple[str, Any]]:
    """(name, object) of ``owner`` and, for a module, of all its submodules."""
    from torch.nn import Module

    if not isinstance(owner, Module):
        yield "", owner
        return
    shown = canonical(owner)
    for name, module in owner.named_modules():
        # A submodule replaced by its compiled wrapper keeps the name it has without the wrapper.
        yield shown[name], module
