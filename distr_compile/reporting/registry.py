"""Reports of living modules: ``record`` keeps the graphs of a compile, ``report`` finds them."""

from __future__ import annotations

import functools
import types
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

from distr_compile.reporting.rows import LOCK, DistrWarning, GraphReport
from distr_compile.reporting.summary import Report


@dataclass
class _Entry:
    """The graphs of one owner, held as long as the owner lives."""

    owner: weakref.ref[Any]
    policy: Hashable = None
    graphs: dict[Hashable, GraphReport] = field(default_factory=dict)
    warned: set[str] = field(default_factory=set)


# By identity, not by WeakKeyDictionary: code objects and some modules compare by value.
_ENTRIES: dict[int, _Entry] = {}


def record(
    owner: Any, graph: GraphReport, key: Hashable | None = None, policy: Hashable = None
) -> None:
    """Keep the report of one compiled graph for ``report``.

    Args:
        owner: the compiled ``nn.Module``, function or code object; held weakly.
        graph: what was found; it must hold no reference to the owner.
        key: names the graph among those of the owner, e.g. (frame name, input shapes). A graph
            recorded under the key of an earlier one (compiled again) replaces it; None never does.
            It must hold no reference to the owner.
        policy: the policy of the compile. With another one than the graph before, the owner's
            report starts over.

    Warns:
        DistrWarning: once per owner and pattern, for a policy pattern that matches no attention in
            any of the owner's graphs so far.
    """
    owner = _owner_of(owner)
    with LOCK:
        entry = _ENTRIES.get(id(owner))
        if entry is None or entry.owner() is not owner or entry.policy != policy:
            entry = _Entry(weakref.ref(owner, _forget(id(owner))), policy)
            _ENTRIES[id(owner)] = entry
        entry.graphs[object() if key is None else key] = graph
        missed = set(Report(tuple(entry.graphs.values())).unmatched) - entry.warned
        entry.warned |= missed
    for pattern in graph.unmatched:
        if pattern in missed:
            warnings.warn(
                f"policy pattern {pattern!r} matches no attention of {graph.root}; the layers with "
                f"attention are listed by distr_compile.report(model)",
                DistrWarning,
                stacklevel=2,
            )


def report(obj: Any) -> Report:
    """The report of everything compiled with ``backend="distr"`` for ``obj`` up to now.

    Of one object compiled under several policies it is the report of the policy compiled last: a
    graph compiled under another policy drops those before it.

    Args:
        obj: an ``nn.Module``, what ``torch.compile`` returned for it, or a compiled or plain
            function. A module's report includes the submodules that were compiled one by one;
            their layers are named as the module names them.

    Raises:
        LookupError: nothing was compiled for ``obj``.
        TypeError: ``obj`` is neither module nor function.
    """
    owner = _owner_of(obj)
    name = owner.co_name if isinstance(owner, types.CodeType) else type(owner).__name__
    placed = []
    for prefix, part in _owners(owner):
        with LOCK:
            entry = _ENTRIES.get(id(part))
            graphs = list(entry.graphs.values()) if entry and entry.owner() is part else []
        placed += [(prefix, graph) for graph in graphs]
    if not placed:
        raise LookupError(
            f"no report for {name}: nothing was compiled for it with backend='distr'. Compile the "
            "model with torch.compile(model, backend='distr'), call it once with real inputs, "
            "then ask for the report of that same model"
        )
    return Report(tuple(graph.placed(i, prefix) for i, (prefix, graph) in enumerate(placed)), name)


def _forget(identity: int) -> Callable[[weakref.ref[Any]], None]:
    def callback(ref: weakref.ref[Any]) -> None:
        # No lock: this may run inside a locked section of the same thread, and the pop is atomic.
        # An entry made meanwhile for a new object at the same address is not ours to drop.
        entry = _ENTRIES.get(identity)
        if entry is not None and entry.owner is ref:
            _ENTRIES.pop(identity, None)

    return callback


def _owner_of(obj: Any) -> Any:
    """The module or code object behind a module, a compiled wrapper or a function."""
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
            obj = obj.__self__ if isinstance(obj.__self__, Module) else obj.__func__
        elif isinstance(obj, types.FunctionType):
            return obj.__code__
        else:
            raise TypeError(
                f"report: got {type(obj).__name__}; accepted: an nn.Module, a function, or what "
                "torch.compile returned for one"
            )


def _owners(owner: Any) -> Iterator[tuple[str, Any]]:
    """(name, object) of ``owner`` and, for a module, of all its submodules."""
    if isinstance(owner, types.CodeType):
        yield "", owner
        return
    for name, module in owner.named_modules():
        # A submodule replaced by its compiled wrapper keeps the name it has without the wrapper.
        yield ".".join(part for part in name.split(".") if part != "_orig_mod"), module
