"""Run a model twice from one state, and leave it as it was: its tensors, attributes, random state.

Nothing here knows of attention. :func:`clones` and :func:`copied` copy what a call is given,
:class:`Snapshot` keeps what the modules of a model hold, :class:`RandomState` the generators;
:class:`Repeatable` puts them together for calls over data.
"""

from __future__ import annotations

import copy
import inspect
import random
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import FunctionType, SimpleNamespace
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.utils import _pytree as pytree

from distr_compile.naming import reached_by


@dataclass(frozen=True)
class RandomState:
    """The default generators of torch (every device in use), NumPy and Python."""

    cpu: Tensor
    cuda: tuple[Tensor, ...]
    numpy: Any
    python: Any

    @classmethod
    def now(cls) -> RandomState:
        """Take the states as they stand."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else ()
        return cls(torch.get_rng_state(), tuple(cuda), np.random.get_state(), random.getstate())

    def restore(self) -> None:
        """Let the next random numbers be those that would have come then."""
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(list(self.cuda))
        np.random.set_state(self.numpy)
        random.setstate(self.python)


def clones(tensors: Iterable[Tensor], *, keep_grad: bool = True) -> dict[int, Tensor]:
    """Copies of tensors, by the ``id`` of each; tensors that share memory have copies that do.

    Args:
        tensors: of any kind. Those that are no plain strided tensors are cloned one by one, and so
            are results of a recorded operation, whose copies are results too.
        keep_grad: copies require a gradient where the tensors do; else none does.
    """
    copies: dict[int, Tensor] = {}
    storages: dict[int, torch.UntypedStorage] = {}
    for tensor in tensors:
        if id(tensor) in copies:
            continue
        with torch.no_grad():
            if _is_plain(tensor):
                source = tensor.untyped_storage()
                if source._cdata not in storages:
                    storages[source._cdata] = source.clone()
                place = (tensor.storage_offset(), tensor.size(), tensor.stride())
                new = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
                new = new.set_(storages[source._cdata], *place)  # type: ignore[call-overload]
            else:
                new = tensor.detach().clone()
        if keep_grad and tensor.requires_grad:
            new.requires_grad_()
            new = new if tensor.is_leaf else new.clone()
        copies[id(tensor)] = new
    return copies


def _is_plain(tensor: Tensor) -> bool:
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout is torch.strided
        and not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg() or tensor.is_nested)
        and tensor.device.type != "meta"
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def copied(arguments: Any) -> Any:
    """A copy of the arguments of a call that shares no tensor with them.

    Objects are copied deeply, such as a cache of keys and values; where one cannot be, the tensors
    in lists, tuples and dicts are copied and the objects are shared.
    """
    leaves = [x for x in pytree.tree_leaves(arguments) if isinstance(x, Tensor)]
    copies = clones(leaves)
    try:
        return copy.deepcopy(arguments, dict(copies))
    except Exception as error:  # whatever an object of the user's may raise
        warnings.warn(
            "the arguments or the output of a call hold an object that cannot be copied, which the "
            f"runs that are compared share: {type(error).__name__}: {error}",
            stacklevel=2,
        )
        return pytree.tree_map(lambda x: copies.get(id(x), x), arguments)


def modules_of(model: Callable[..., Any]) -> list[tuple[str, nn.Module]]:
    """A module and its submodules; of a function those that it closes over or finds as globals."""
    if isinstance(model, nn.Module):
        return list(model.named_modules())
    owner = getattr(model, "__self__", None)
    if isinstance(owner, nn.Module):
        return list(owner.named_modules())
    function = inspect.unwrap(model)
    if not inspect.isfunction(function):
        return []
    return [
        (".".join(part for part in (root, name) if part), module)
        for root, value in reached_by(function).items()
        if isinstance(value, nn.Module)
        for name, module in value.named_modules()
    ]


class Snapshot:
    """What the modules of a model hold now: tensors by value, attributes and containers by item.

    Parameters, buffers and other tensors in attributes, lists, tuples, dicts, sets, deques and the
    attributes of objects are kept by value, which takes as much memory again. Objects of classes of
    PyTorch that are no containers, and what has no attributes, are kept as references.

    Args:
        model: a module or a function, see :func:`modules_of`.
        parameters: False leaves out ``nn.Parameter``, which a forward without gradients reads only.
    """

    def __init__(self, model: Callable[..., Any], *, parameters: bool = True) -> None:
        # A lazy module becomes one of another class in its first call: it is what it is then.
        named = [(name, m) for name, m in modules_of(model) if not isinstance(m, LazyModuleMixin)]
        self._modules = [module for _, module in named]
        self._parameters = parameters
        self._containers: list[tuple[Any, Any]] = []
        self._tensors: dict[int, tuple[str, Tensor]] = {}
        self._keep((module.__dict__, name, 0) for name, module in named)
        self._values = clones((t for _, t in self._tensors.values()), keep_grad=False)

    def _keep(self, held: Iterable[tuple[Any, str, int]]) -> None:
        """Keep values and what they hold, nearest first; each with its name and depth."""
        left, seen = deque(held), set[int]()
        while left:
            value, name, depth = left.popleft()
            if isinstance(value, Tensor):
                is_read = isinstance(value, nn.Parameter) and not self._parameters
                if not is_read and not nn.parameter.is_lazy(value):
                    self._tensors.setdefault(id(value), (name, value))
                continue
            if id(value) in seen:
                continue
            seen.add(id(value))
            if not isinstance(value, _CONTAINERS):
                if depth == _OBJECTS_DEEP or not _is_plain_object(value):
                    continue
                value, depth = value.__dict__, depth + 1
            if not isinstance(value, tuple):
                self._containers.append((value, copy.copy(value)))
            for key, item in _items(value):
                hidden = isinstance(key, str) and key in ("_parameters", "_buffers", "_modules")
                left.append((item, name if hidden else f"{name}.{key}".strip("."), depth))

    @property
    def dtypes(self) -> set[torch.dtype]:
        """The dtypes of the floating tensors."""
        return {t.dtype for _, t in self._tensors.values() if t.is_floating_point()}

    def written(self) -> dict[str, Tensor]:
        """Copies of the tensors that are no longer what they were, by name."""
        return {
            name: tensor.detach().clone()
            for name, tensor in (self._tensors[key] for key in self.changed())
        }

    def changed(self) -> list[int]:
        """The tensors that are no longer what they were, for ``restore``."""
        return [key for key, (_, t) in self._tensors.items() if not _same(t, self._values[key])]

    def restore(self, changed: Iterable[int] | None = None) -> None:
        """Make everything as it was when this snapshot was taken; ``changed``: these tensors."""
        for module in self._modules:
            # FSDP2 puts whole parameters into their place, and has to take them back itself.
            if _is_sharded_by_fsdp(module):
                module.reshard()
        for container, before in self._containers:
            if _is_as_before(container, before):
                continue
            container.clear()
            is_list = isinstance(container, list | deque)
            (container.extend if is_list else container.update)(before)
        for key in self.changed() if changed is None else changed:
            tensor = self._tensors[key][1]
            # Through .data: what autograd has saved of this tensor stays valid.
            with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                if tensor.shape != self._values[key].shape:  # ``x.data`` is another tensor by now
                    tensor.data = self._values[key].clone()
                else:
                    tensor.data.copy_(self._values[key])


class Repeatable:
    """Calls a model over data so that several calls of one batch start from one state.

    That is what the model held when this object was made, copies of the arguments, and the random
    numbers of the batch. Parameters are taken to be read only.
    """

    def __init__(self, model: Callable[..., Any]) -> None:
        self._held = Snapshot(model, parameters=False)
        self._numbers = RandomState.now()

    def begin(self) -> None:
        """Begin a batch: all calls until the next have the random numbers that come now."""
        self._numbers = RandomState.now()

    def once(self, model: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Begin a batch of which there is this call only."""
        self.begin()
        return self.call(model, args, kwargs)

    def call(self, model: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The output of a model or of what it was compiled to; nothing else is left of the call."""
        args, kwargs = copied((args, kwargs))
        self._numbers.restore()
        changed = None
        try:
            out = model(*args, **kwargs)
            changed = self._held.changed()
            return copied(out) if changed else out  # it may lie in what is put back
        finally:
            self._held.restore(changed)


_CONTAINERS = (dict, list, tuple, set, deque)
_OBJECTS_DEEP = 3
"""How many objects may hold one another: a cache its layers, and these their own."""


def _is_plain_object(value: Any) -> bool:
    """Whether an object is its attributes: a cache or a namespace, none of PyTorch or Python."""
    if isinstance(value, (type, FunctionType, nn.Module)):
        return False
    home = type(value).__module__.partition(".")[0]
    is_foreign = home == "torch" or home in sys.stdlib_module_names
    if is_foreign and not isinstance(value, SimpleNamespace):
        return False
    return isinstance(getattr(value, "__dict__", None), dict)


def _is_sharded_by_fsdp(module: nn.Module) -> TypeGuard[Any]:
    distributed = sys.modules.get("torch.distributed.fsdp")
    return distributed is not None and isinstance(module, distributed.FSDPModule)


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    return iter(value.items()) if isinstance(value, dict) else enumerate(value)


def _is_as_before(container: Any, before: Any) -> bool:
    if isinstance(container, set):
        return bool(container == before)
    now, then = list(_items(container)), list(_items(before))
    return len(now) == len(then) and all(
        (a is b or a == b) and x is y for (a, x), (b, y) in zip(now, then, strict=True)
    )


def _same(a: Tensor, b: Tensor) -> bool:
    if a.device.type == "meta" or a.shape != b.shape:
        return a.device.type == "meta"
    if a.layout is not torch.strided or a.is_nested or a.is_quantized:
        return True  # not compared: hardly ever written in place
    try:
        equal = (a == b) | (a.isnan() & b.isnan()) if a.is_floating_point() else a == b
        return bool(equal.all())
    except (RuntimeError, NotImplementedError):  # of bits, which PyTorch compares not: likewise
        return True
