"""A model as it is without any compile and without plans: what exact numbers are taken from.

A model may come compiled: by ``torch.compile``, in place, block by block, or with a function of its
own compiled. What then is called "the model itself" would be approximated, and a compile around it
would see nothing. The same holds for plans of ``distr_compile.transformers.apply``.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import nn

from distr_compile import calls, identity
from distr_compile.policy import LayerPlan
from distr_compile.reporting.registry import reports_apart
from distr_compile.restoring import modules_of

_Model = TypeVar("_Model", bound=Callable[..., Any])

_COMPILED, _ITS_OWN = "_torchdynamo_orig_callable", "_torchdynamo_wrapper_id"
"""Attributes of what ``torch.compile`` made of a function: that function, and its own id, by which
it is known from what ``functools.wraps`` has copied them to."""


@contextlib.contextmanager
def plain(model: _Model) -> Iterator[_Model]:
    """Give what is underneath a compiled model or function, with nothing in it compiled.

    In the context no module of the model is compiled in place, whatever the backend and whether
    whole or block by block; ``forward`` of each is what its class or its owner wrote; and of a
    model with ``attn_implementation="distr"`` all attention is exact, as without plans, and counts
    in no report. Reports of what is compiled in the context are seen in it only, and no others are.
    Afterwards, also after an exception, everything is as before. Contexts nest. Other threads that
    call the model meanwhile call it so, too.

    Args:
        model: a module, a function or a method. What is no module is searched for modules in its
            owner, its closure, its globals and its attributes.
    """
    run = _original(model)
    modules = _modules(run)
    with contextlib.ExitStack() as stack:
        stack.enter_context(reports_apart([run, *modules]))
        for module in modules:
            if module._compiled_call_impl is not None:
                stack.enter_context(_instead(module, "_compiled_call_impl", None))
            if (forward := _forward(module)) is not None:
                stack.enter_context(_instead(module, "forward", forward))
        if any(map(calls.is_asking, modules)):
            for module in modules:
                stack.enter_context(_instead(module, calls.ASSIGNED, _EXACT))
        yield run


def eagerly() -> AbstractContextManager[Any]:
    """Run compiled functions that a model calls, of whatever name, as they were written.

    PyTorch knows this for the whole process only: what other threads call runs so, too.
    """
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def has_plans(model: Callable[..., Any]) -> bool:
    """Whether ``distr_compile.transformers.apply`` gave some module of a model a plan."""
    return any(calls.ASSIGNED in module.__dict__ for module in _modules(_original(model)))


_EXACT = calls.Assigned("", LayerPlan(group_size=1), is_plain=True)


def _original(model: Any) -> Any:
    if isinstance(model, nn.Module):
        return identity.key_of(model)
    # Of a method it is an attribute of the function, which does not know the object. What is kept
    # from being compiled stays so.
    while not inspect.ismethod(model) and not getattr(model, "_torchdynamo_disable", False):
        if getattr(model, _ITS_OWN, None) != id(model):
            break
        model = getattr(model, _COMPILED)
    return model


def _modules(model: Any) -> list[nn.Module]:
    """The modules that a call may run; a wrapper of ``torch.compile`` and its module are two."""
    held = [model]
    if isinstance(model, functools.partial):
        held += [model.func, *model.args, *model.keywords.values()]
    elif not isinstance(model, nn.Module) and not inspect.isroutine(model):
        held += getattr(model, "__dict__", {}).values()
    found = (m for each in held if callable(each) for _, m in modules_of(each))
    return list({id(module): module for module in found}.values())


def _forward(module: nn.Module) -> Callable[..., Any] | None:
    """``forward`` as it was written, where it is compiled; else None."""
    own = module.__dict__.get("forward")
    of_class = inspect.getattr_static(type(module), "forward", None)
    if own is not None:
        original = _original(own)
        return original if original is not own else None
    original = _original(of_class)
    return types.MethodType(original, module) if original is not of_class else None


@contextlib.contextmanager
def _instead(module: nn.Module, name: str, value: object) -> Iterator[None]:
    """Another value of an attribute of an object itself."""
    own = module.__dict__
    was_there, before = name in own, own.get(name)
    own[name] = value
    try:
        yield
    finally:
        if was_there:
            own[name] = before
        else:
            own.pop(name, None)
