"""Which module a graph, or one node of it, belongs to; and one graph per module.

Dynamo hands a backend a graph without saying whose it is. Two things are missing, and both are
found here from inside the backend call:

* the name. ``nn_module_stack`` holds paths relative to the frame being compiled ("L['self'].attn"),
  which after a graph break are the same for every layer. Its keys hold ``id(module)``, and an id
  leads to the name in ``named_modules()`` of the object that the user compiled: ``find_root``,
  ``layer_of``, ``common_layer``.
* the identity. Layers of one class run one code object, and Dynamo passes parameters in as inputs,
  so that equal layers behind a graph break share one compiled graph. A guard on the identity of the
  module makes Dynamo compile each of them: ``guard_frame_module``. Where none can be placed,
  ``shared_by`` tells which layers one graph may serve.

Dynamo counts recompilations (``recompile_limit``, 8) per guarded module if the guard is on a local
variable that is the module: any number of layers, up to ``accumulated_recompile_limit`` (256)
compilations of one code object. (A decorated method has its module in ``*args``, where Dynamo does
not.) ``FrameModule.compiles_left`` says how many remain; after the last, the frame runs eagerly.

Only ``_Frame``, ``_wrappers`` and their helpers touch what is private to PyTorch. When it is not
there, the answers are None or carry a reason; nothing here raises.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import CodeType, FrameType
from typing import Any, NamedTuple

from torch import fx, nn

from distr_compile import exported, naming


@dataclass(frozen=True)
class Root:
    """What the user compiled.

    Attributes:
        module: the compiled module. For a compiled function the largest module it is given, closes
            over or finds as a global; None if there is no such module.
        names: id(module) -> its names in ``module.named_modules(remove_duplicate=False)``.
        key: the compiled module or function, or the object of a bound method: ``key_of`` of what
            ``torch.compile`` returned.
        backend: what ``torch.compile`` made of backend and options; of two compiles two.
        shown: every name -> the one that policies and reports go by, without wrappers.
    """

    module: nn.Module | None
    names: dict[int, tuple[str, ...]]
    key: object
    backend: object = None
    shown: Mapping[str, str] = field(default_factory=dict)

    def show(self, name: str) -> str:
        """The name of a layer without wrappers."""
        return naming.of_layer(name, self.shown)


@dataclass(frozen=True)
class FrameModule:
    """The module whose code is being compiled, and whether the graph is its own.

    Attributes:
        module: the owner of the operations that stand in the frame itself, outside any submodule.
        local: the local variable that holds it; None if only a calling frame knows it.
        function: name of the function being compiled, the one before a graph break included.
        guards: the local variables whose identity is guarded. A graph that reaches all its layers
            through these serves no other layer.
        reason: why the graph may be shared; empty if every node asked about is guarded.
        compiles_left: how often Dynamo will still compile this code for this module, later shapes
            or layers running eagerly at 0. None if not known.
        code_key: hashable, tells one frame's code (resumed ones included) from another's.
        resumed: the frame continues the function after a graph break.
        held: ids of the modules behind ``guards``.
    """

    module: nn.Module | None = None
    local: str | None = None
    function: str = ""
    guards: frozenset[str] = frozenset()
    reason: str = ""
    compiles_left: int | None = None
    code_key: object = None
    resumed: bool = False
    held: frozenset[int] = frozenset()

    @property
    def guarded(self) -> bool:
        """This graph serves the guarded modules only."""
        return not self.reason

    def limit_note(self) -> str:
        """A sentence for the report if this is the last graph Dynamo compiles here, else empty."""
        if self.compiles_left is None or self.compiles_left > 0:
            return ""
        return (
            f"this is the last graph that Dynamo compiles of {self.function}(): further shapes or "
            "layers run eagerly, hence exactly, and are not in this report. Raise torch._dynamo."
            "config.recompile_limit (compiles per layer) or accumulated_recompile_limit (of all)"
        )


@dataclass(frozen=True)
class Layer:
    """The place of a node in the compiled model.

    Attributes:
        name: as in ``named_modules()`` of the root, "" for the root itself.
        names: all its names, that on this path first; if not registered, parent and attributes.
        call: 0, or k if this is the k-th repeated call of the module within the graph.
        anchor: id of the module through which the graph reaches the layer: the frame's own, else
            the outermost of the node's stack.
        local: the frame's local variable that the path to the layer begins with, None for a global.
    """

    name: str
    names: tuple[str, ...]
    call: int
    anchor: int
    local: str | None


# ------------------------------------------------------------------------------------- the root


def find_root() -> Root | None:
    """The object the user compiled; None outside of a Dynamo backend call.

    It is the callable of the outermost active ``torch.compile`` that has the same backend and
    options as the one now compiling. So modules that merely call a compiled one are not taken,
    submodules compiled one by one are roots of their own, and a model compiled as a whole keeps its
    names even where some of its submodules are compiled as well.
    """
    wrappers = _wrappers()
    if not wrappers:
        return None
    wrappers = [w for w in wrappers if w.backend == wrappers[0].backend]
    found = (w.module() for w in reversed(wrappers))
    module = next((m for m in found if m is not None), None)
    key, backend = key_of(wrappers[-1].fn), wrappers[-1].backend
    if module is None:
        return Root(None, {}, key, backend)
    return replace(root_of(module), key=key, backend=backend)


def compiling_backend() -> object:
    """What the ``torch.compile`` that compiles now made of its backend; None outside of a call.

    Each call of ``torch.compile`` makes one, which all graphs of what it returned have.
    """
    wrappers = _wrappers()
    return wrappers[0].backend if wrappers else None


def root_of(module: nn.Module, begin: str = "") -> Root:
    """A module as a root, whatever is being compiled; names of layers begin at ``begin``.

    Raises:
        ValueError: ``begin`` names no module.
    """
    names: dict[int, tuple[str, ...]] = {}
    for name, child in module.named_modules(remove_duplicate=False):
        names[id(child)] = (*names.get(id(child), ()), name)
    return Root(module, names, module, shown=naming.canonical(module, begin))


def key_of(compiled: Any) -> object:
    """The ``Root.key`` of a module, function, or whatever ``torch.compile`` made of them."""
    fn = _unwrap(compiled)
    return getattr(fn, "__self__", fn) if inspect.ismethod(fn) else fn


class _Wrapper(NamedTuple):
    """One active ``torch.compile``: its backend, what it compiles and the arguments of the call."""

    backend: object
    fn: Any
    arguments: tuple[Any, ...]

    def module(self) -> nn.Module | None:
        key = key_of(self.fn)
        if isinstance(key, nn.Module):
            return key
        held = [*self.arguments, *getattr(key, "__dict__", {}).values()]
        if isinstance(key, functools.partial):
            held += [*key.args, *key.keywords.values()]
        function = _unwrap(self.fn)
        function = function.__func__ if inspect.ismethod(function) else function
        if inspect.isfunction(function):
            held += naming.reached_by(function).values()
        modules = (m for h in held if isinstance(m := _unwrap(h), nn.Module))
        return max(modules, key=lambda m: sum(1 for _ in m.modules()), default=None)


def _wrappers() -> list[_Wrapper]:
    """The active ``torch.compile`` calls, innermost first; empty outside of a backend call."""
    try:
        from torch._dynamo.eval_frame import innermost_backend
    except ImportError:
        return []
    found = []
    for frame in _callers():
        if _is_wrapper(frame):
            values = frame.f_locals
            backend = innermost_backend(values["self"].callback)
            arguments = (*values["args"], *values["kwargs"].values())
            found.append(_Wrapper(backend, values["fn"], arguments))
    return found


def _unwrap(compiled: Any) -> Any:
    """Undo ``torch.compile`` and decorators, down to a module, a module's method or a function."""
    while True:
        if inspect.ismethod(compiled) and isinstance(compiled.__self__, nn.Module):
            compiled = compiled.__self__
        if isinstance(compiled, nn.Module):
            # By type: wrappers of other libraries forward unknown attributes to what they wrap.
            if type(compiled).__name__ != "OptimizedModule":
                return compiled
            compiled = compiled._orig_mod
        elif inspect.isroutine(compiled) and not inspect.ismethod(compiled):
            inner = getattr(compiled, "_torchdynamo_orig_callable", None)
            inner = inner or getattr(compiled, "__wrapped__", None)
            if inner is None:
                return compiled
            compiled = inner
        else:
            return compiled


def _callers() -> Iterable[FrameType]:
    """The Python frames outside of the present compilation, innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not _is_in(frame, "torch._dynamo.convert_frame"):
        frame = frame.f_back
    while frame is not None:
        if not _is_in(frame, "torch._dynamo.convert_frame"):
            yield frame
        frame = frame.f_back


def _is_wrapper(frame: FrameType) -> bool:
    """True for the frame in which ``torch.compile`` calls what it compiled."""
    values = frame.f_locals if _is_in(frame, "torch._dynamo.eval_frame") else {}
    return {"fn", "args", "kwargs"} <= values.keys() and hasattr(values.get("self"), "callback")


def _is_in(frame: FrameType, module: str) -> bool:
    return frame.f_globals.get("__name__") == module


# ------------------------------------------------------------------------------------- the frame


def guard_frame_module(
    nodes: Iterable[fx.Node], is_shared: bool = False, is_apart: bool = True, root: Any = None
) -> FrameModule:
    """Make Dynamo compile the present frame separately for each module that ``nodes`` belong to.

    Places an identity guard on every local variable through which one of the nodes is reached (that
    of the frame's own module for a node without a stack). All else recompiles no more than it did,
    but for a frame that has used up half of ``recompile_limit``: its own module is guarded in any
    case, because Dynamo then counts per module. (Layers that differ in a number compile once each;
    at the limit Dynamo runs the frame and all it calls eagerly: the attention, too.)

    Args:
        nodes: the nodes whose layer matters, those of higher-order bodies included; may be empty.
        is_shared: the graph shall serve several modules: nothing is guarded, until half of the
            limit is used up; else what keeps modules apart would have the last run eagerly.
        is_apart: layers may have different plans: what stands in ``*args`` is guarded, too.
        root: what is guarded there if the limit allows, since graphs may serve others like it.

    Returns:
        What is known of the frame; ``reason`` says why a node is not covered.
    """
    frame = _Frame.current()
    if frame is None:
        return FrameModule(reason="this version of PyTorch does not show the frame being compiled")
    modules = {name: m for name, v in frame.locals.items() if (m := _own_module(v)) is not None}
    local = "self" if "self" in modules else next(iter(modules), None)
    owner = modules[local] if local else _calling_module()

    stacks = [_stack(node) for node in nodes]
    wanted = {_local(stack[0].path, modules) if stack else local for stack in stacks}
    named = {*wanted, local} if frame.is_crowded and "[" not in str(local) else wanted
    possible = {name for name in named if name and isinstance(frame.locals.get(name), nn.Module)}
    # In *args Dynamo does not count per module: few are guarded there.
    own = {name for name in possible if "[" in name and frame.locals[name] is root}
    if frame.is_crowded or not is_apart:
        possible = own | {name for name in possible if "[" not in name}
    free = own if frame.is_crowded else set()
    reason = frame.unguardable if possible else ""
    if is_shared and not frame.is_crowded:
        reason = "it serves several modules"
    if not reason and not all(frame.guard(name) for name in sorted(possible - free)):
        reason = "this version of PyTorch takes no identity guard"
    guards: frozenset[str] = frozenset() if reason else frozenset(possible)
    if not reason and wanted - guards:
        reason = f"no local variable of {frame.function}() is the module"
    return FrameModule(
        module=owner,
        local=local,
        function=frame.function,
        guards=guards,
        reason=reason,
        compiles_left=frame.compiles_left,
        code_key=frame.code,
        resumed=frame.function != frame.code.co_name,
        held=frozenset(id(frame.locals[name]) for name in guards),
    )


def _own_module(value: Any) -> nn.Module | None:
    """The module that a local variable is, or is a method of (``nn.Sequential().compile()``)."""
    value = value.__self__ if inspect.ismethod(value) else value
    return value if isinstance(value, nn.Module) else None


def _local(path: str, known: Collection[str | None]) -> str | None:
    """What is known that a path such as "L['self'].blocks.0" or "L['args'][0]" begins with."""
    found = re.match(r"L\['(\w+)'\](\[\d+\])?", path)
    place = found and found[1] + (found[2] or "")
    return place if place in known else found and found[1]


@dataclass(frozen=True)
class _Frame:
    """The frame that Dynamo is compiling.

    Attributes:
        code: its code.
        function: name of its function, without the wrapping of a resumed one.
        locals: arguments and closure variables at entry, those of ``*args`` as "args[0]".
        unguardable: why identity guards would be dropped; empty if they are kept.
        is_crowded: half of ``recompile_limit`` is used up.
        compiles_left: see FrameModule.
    """

    code: CodeType
    function: str
    locals: dict[str, Any]
    unguardable: str
    is_crowded: bool
    compiles_left: int | None

    @classmethod
    def current(cls) -> _Frame | None:
        try:
            from torch._dynamo import config
            from torch._dynamo.symbolic_convert import InstructionTranslator

            translator = InstructionTranslator.current_tx()
            code: CodeType = translator.f_code
            values = dict(translator.f_locals)
            if code.co_flags & inspect.CO_VARARGS:
                name = code.co_varnames[code.co_argcount + code.co_kwonlyargcount]
                values |= {f"{name}[{i}]": x for i, x in enumerate(values.get(name, ()))}
        except (ImportError, AttributeError):
            return None
        outer = _compile_locals()
        unguardable = ""
        if getattr(config, "caching_precompile", False):
            unguardable = "caching_precompile drops identity guards"
        elif getattr(outer.get("hooks"), "guard_filter_fn", None) is not None:
            unguardable = "guard_filter_fn may drop identity guards"
        resumed = re.fullmatch(r"torch_dynamo_resume_in_(.*)_at_\d+", code.co_name)
        function = resumed[1] if resumed else code.co_name
        left = _compiles_left(outer.get("cache_size"))
        is_crowded = left is not None and left < config.recompile_limit // 2
        return cls(code, function, values, unguardable, is_crowded, left)

    def guard(self, name: str) -> bool:
        try:
            from torch._dynamo.guards import GuardBuilder, install_guard
            from torch._dynamo.source import GetItemSource, LocalSource

            local, _, place = name.rstrip("]").partition("[")
            source = GetItemSource(LocalSource(local), int(place)) if place else LocalSource(local)
            install_guard(source.make_guard(GuardBuilder.ID_MATCH))
        except (ImportError, AttributeError, TypeError, AssertionError):
            return False
        return True


def _compile_locals() -> dict[str, Any]:
    """Local variables of Dynamo's ``_compile``: the only place that knows its cache and hooks."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "_compile" and _is_in(frame, "torch._dynamo.convert_frame"):
            return dict(frame.f_locals)
        frame = frame.f_back
    return {}


def _compiles_left(cache_size: Any) -> int | None:
    """How many more compilations the limits in torch/_dynamo/cache_size.py allow."""
    try:
        from torch._dynamo import config
        from torch._guards import CompileContext

        compilation = CompileContext.current_compile_id()
        nth = compilation.frame_compile_id if compilation is not None else None
        same_module = cache_size.num_cache_entries_with_same_id_matched_objs
        if nth is None:
            return None
        left = min(config.accumulated_recompile_limit - nth, config.recompile_limit - same_module)
        return int(left) - 1
    except (ImportError, AttributeError):
        return None


def _calling_module() -> nn.Module | None:
    """The nearest module whose method is running on the Python stack, within ``torch.compile``."""
    for frame in _callers():
        if _is_wrapper(frame):
            return None
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            return owner
    return None


def entered_at(frame: FrameModule) -> list[tuple[str, int]]:
    """Files and lines at which the code of a frame is entered, the nearest first.

    Where a resumed function goes on; for any other, the lines of its callers.
    """
    places = []
    if isinstance(frame.code_key, CodeType) and frame.resumed:
        line = frame.code_key.co_name.rpartition("_")[2]
        places.append((frame.code_key.co_filename, int(line)))
    for caller in _callers():
        if _is_wrapper(caller):
            break
        places.append((caller.f_code.co_filename, caller.f_lineno))
    return places


# ------------------------------------------------------------------------------------- the layers


def layer_of(node: fx.Node, root: Root, frame: FrameModule | None = None) -> Layer | None:
    """The layer a node belongs to; None if neither the node nor the frame knows a module.

    Args:
        node: a node of the graph handed to the backend, or of a higher-order body within it.
        root: from ``find_root``.
        frame: from ``guard_frame_module``: gives the layer of a node without a stack, and tells two
            names of one module apart.
    """
    return common_layer([node], root, frame)


def common_layer(
    nodes: Iterable[fx.Node], root: Root, frame: FrameModule | None = None
) -> Layer | None:
    """The innermost layer that all ``nodes`` belong to. Arguments as for ``layer_of``."""
    nodes, frame = list(nodes), frame or FrameModule()
    if root.module is not None and (name := exported.layer(nodes, root.module)) is not None:
        return Layer(name, (name,), 0, id(frame.module), frame.local)
    stacks = [_stack(node) for node in nodes]
    stack: list[_Entry] = []
    for level in zip(*stacks, strict=False):
        if any(entry.key != level[0].key for entry in level):
            break
        stack.append(level[0])
    local = _local(stack[0].path, {frame.local, *frame.guards}) if stack else frame.local
    if frame.module is not None and (not stack or (local is not None and local == frame.local)):
        # The path begins at the frame's own module, which Dynamo lists only if it saw the call.
        own = id(frame.module)
        if not stack or stack[0].module != own:
            stack.insert(0, _Entry(str(own), own, 0, f"L['{local}']"))
    if not stack:
        return None
    names = _names(stack, root)
    return Layer(names[0], names, stack[-1].call, stack[0].module, local)


def shared_by(
    layer: Layer, root: Root, frame: FrameModule, calls: Iterable[fx.Node] = ()
) -> tuple[str, ...]:
    """Names of the layers that one piece of the present graph may serve, ``layer`` among them.

    Only ``layer`` itself if its identity is guarded. Otherwise also the same place below every
    module of the root that runs the method being compiled, or that calls the function being
    compiled from one of its methods. Not seen: callers that reach it through another function, and
    modules that are not registered in the root. Roots compiled one by one with equal options may
    share graphs too; their names are relative to each, hence equal.

    Args:
        layer: from ``layer_of`` or ``common_layer``.
        root: from ``find_root``.
        frame: from ``guard_frame_module``.
        calls: the nodes that call the higher-order body which the layer's nodes are in. Layers
            marked with ``torch.compiler.nested_compile_region`` are one body called several times.
    """
    callers = [c.name for n in calls if (c := layer_of(n, root, frame)) is not None]
    found = _moved(layer.name, [n for n in callers if _is_below(layer.name, n)], callers)

    if root.module is not None and layer.local not in frame.guards:
        found += _moved(layer.name, root.names.get(layer.anchor, ()), _siblings(layer, root, frame))
    known = {name for names in root.names.values() for name in names} if found else set()
    return tuple(dict.fromkeys([layer.name, *(n for n in found if n in known)]))


def _siblings(layer: Layer, root: Root, frame: FrameModule) -> list[str]:
    """Names of the modules that may run the present frame as the layer's anchor does."""
    modules = dict(root.module.named_modules()) if root.module is not None else {}
    anchor = next((type(m) for m in modules.values() if id(m) == layer.anchor), nn.Module)
    is_method = hasattr(anchor, frame.function)
    method = frame.function if is_method else "forward"
    return [
        name
        for name, module in modules.items()
        if _code(type(module), method) is _code(anchor, method)
        or (not is_method and _calls(type(module), frame.function))
    ]


def _moved(name: str, places: Sequence[str], others: Iterable[str]) -> list[str]:
    """The name with that of ``places`` which it lies below replaced by each of ``others``."""
    for place in places:
        if _is_below(name, place):
            below = name[len(place) :].lstrip(".")
            return [".".join(part for part in (other, below) if part) for other in others]
    return []


class _Entry(NamedTuple):
    """One entry of ``nn_module_stack``."""

    key: str
    module: int
    call: int
    path: str


def _stack(node: fx.Node) -> list[_Entry]:
    """The modules a node was traced in, outermost first. Keys are "id" or, called again, "id@k"."""
    entries: list[_Entry] = []
    if exported.is_exported(node):  # what stands there are no modules of now
        return entries
    for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items():
        module, _, call = str(key).partition("@")
        if module.isdecimal():
            entries.append(_Entry(str(key), int(module), int(call or 0), path))
    return entries


def _names(stack: list[_Entry], root: Root) -> tuple[str, ...]:
    """All names of the last module of ``stack``, the one that follows the stack first."""
    *parents, last = stack
    words = _words(last.path)

    def follows(name: str) -> tuple[int, int]:
        on_stack = sum(
            any(_is_below(name, parent) for parent in root.names.get(entry.module, ()))
            for entry in parents
        )
        own = name.split(".")
        ending = 0
        while ending < min(len(own), len(words)) and own[-1 - ending] == words[-1 - ending]:
            ending += 1
        return on_stack, ending

    names = root.names.get(last.module, ())
    if names:
        return tuple(sorted(names, key=follows, reverse=True))
    if not parents:
        return (".".join(words),)
    tail = words[len(_words(parents[-1].path)) :]
    return (".".join(w for w in (_names(parents, root)[0], *tail) if w),)


def _words(path: str) -> list[str]:
    """["blocks", "0", "attn"] of "L['self'].blocks.0.attn": what comes after the first variable."""
    words = re.findall(r"[^.\[\]'\"]+", path)
    words = words[2:] if path[1:2] == "[" else words
    return [w for w in words if w not in ("__self__", "__dict__", "_modules")]


def _is_below(name: str, parent: str) -> bool:
    return not parent or name == parent or name.startswith(parent + ".")


def _code(owner: type, method: str) -> object:
    return getattr(getattr(owner, method, None), "__code__", owner)


def _calls(owner: type, function: str) -> bool:
    """True if a method of the class names the function in its code."""
    members = [member for base in owner.__mro__ for member in vars(base).values()]
    codes = [code for m in members if isinstance(code := getattr(m, "__code__", None), CodeType)]
    return any(function in code.co_names for code in codes)
