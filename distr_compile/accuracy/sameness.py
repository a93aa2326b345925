"""Whether measurements that were kept are of the same model, metric and code as those to come."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType
from typing import Any

import torch
from torch import nn

from distr_compile.accuracy.batch import add_to_digest
from distr_compile.accuracy.evaluate import device_of
from distr_compile.accuracy.metrics import METRICS, Metric
from distr_compile.bases import fingerprint


class UnknownError(Exception):
    """What a function computes cannot be told from its code."""


# --- the model and the package ------------------------------------------------------------------


def of_model(model: nn.Module) -> str:
    """SHA-256 over parameters (a sample), buffers, modules, their plain attributes and the config.

    What else ``forward`` reads is not seen: attributes that are objects, and the code itself.
    """
    digest = hashlib.sha256(f"{fingerprint(model)}\n{model!r}\n".encode())
    config = getattr(model, "config", None)
    if callable(to_json := getattr(config, "to_json_string", None)):
        digest.update(str(to_json()).encode())
    for name, module in model.named_modules():
        # What begins with "_" is PyTorch's own; compiling a module adds to it.
        plain = {k: v for k, v in vars(module).items() if _is_plain(v) and not k.startswith("_")}
        digest.update(f"{name} {type(module).__qualname__} {sorted(plain.items())}\n".encode())
    for name, buffer in model.named_buffers():
        digest.update(f"{name}\n".encode())
        if buffer.device.type != "meta":
            bits = buffer.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(bits.numpy().tobytes())
    return digest.hexdigest()


def of_device(model: nn.Module) -> str:
    """Its kind and, of a GPU, the name."""
    device = device_of(model)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@functools.cache
def of_sources() -> str:
    """SHA-256 over the files of this package."""
    digest = hashlib.sha256()
    folder = Path(__file__).parents[1]
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder).as_posix()}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


# --- the metric ---------------------------------------------------------------------------------


def of_metric(metric: Metric) -> str | None:
    """What the metric computes, as a text to compare; None if that cannot be known.

    Functions are known by module, name, code, defaults, what their closures hold, and the functions
    and plain values of their own module that they name. An object with state of its own is not.
    """
    if METRICS.get(metric.name) is metric:
        return metric.name
    try:
        parts = [_function(f, set()) for f in (metric.statistic, metric.result)]
    except UnknownError:
        return None
    content = json.dumps([metric.name, metric.better, metric.ideal, *parts])
    return f"{metric.name} {hashlib.sha256(content.encode()).hexdigest()}"


def _function(f: Callable[..., Any], seen: set[int]) -> list[Any]:
    """Parts to compare, JSON."""
    if isinstance(f, functools.partial):
        return ["partial", *(_value(part, seen) for part in (f.func, f.args, f.keywords))]
    if isinstance(f, BuiltinFunctionType) and not isinstance(f.__self__, torch.Tensor):
        return [f.__module__, f.__qualname__]
    if not isinstance(f, FunctionType):
        raise UnknownError
    found: list[Any] = [f.__module__, f.__qualname__]
    if id(f) in seen:
        return found
    seen.add(id(f))
    found.append(_code(f.__code__))
    found.append(_value([f.__defaults__, f.__kwdefaults__], seen))
    for cell in f.__closure__ or ():
        try:
            content = cell.cell_contents
        except ValueError as error:  # empty so far
            raise UnknownError from error
        found.append(_value(content, seen))
    for name in sorted(_names(f.__code__)):
        value = f.__globals__.get(name)
        is_own = isinstance(value, FunctionType) and value.__module__ == f.__module__
        if is_own or _is_plain(value):
            found.append([name, _value(value, seen)])
    return found


def _value(value: Any, seen: set[int]) -> Any:
    if _is_plain(value):
        return repr(value)
    if isinstance(value, list | tuple):
        return [_value(part, seen) for part in value]
    if isinstance(value, Mapping):
        return [[repr(key), _value(part, seen)] for key, part in value.items()]
    if isinstance(value, Metric):
        return of_metric(value) or _refuse()
    if isinstance(value, torch.Tensor):
        digest = hashlib.sha256()
        add_to_digest(digest, value)
        return digest.hexdigest()
    return _function(value, seen)


def _refuse() -> str:
    raise UnknownError


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    plain = (bool, int, float, complex, str, bytes, torch.dtype, torch.device)
    return value is None or isinstance(value, plain)


def _code(code: CodeType) -> list[Any]:
    constants = [
        _code(value) if isinstance(value, CodeType) else _constant(value)
        for value in code.co_consts
    ]
    return [code.co_code.hex(), constants, list(code.co_names), list(code.co_varnames)]


def _constant(value: Any) -> str:
    # The order of a set is another one in every process.
    return repr(sorted(map(repr, value)) if isinstance(value, frozenset) else value)


def _names(code: CodeType) -> set[str]:
    inner = (value for value in code.co_consts if isinstance(value, CodeType))
    return set(code.co_names).union(*map(_names, inner))
