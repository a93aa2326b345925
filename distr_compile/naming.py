"""Names of layers without the segments that wrappers put into them.

``DistributedDataParallel(model)`` makes ``module.blocks.0`` of ``blocks.0``; a rule, a report and a
file that ``tune`` wrote mean the layer, however it is wrapped. A segment goes by the type of the
module that owns it: a model of one's own with a child called ``module`` keeps that name. Imports no
torch: types are told by their names.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Mapping
from types import FunctionType
from typing import Any

WRAPPERS = {
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel": (
        "_fsdp_wrapped_module"
    ),
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.ActivationWrapper": (
        "_checkpoint_wrapped_module"
    ),
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    "torch.optim.swa_utils.AveragedModel": "module",
    "peft.peft_model.PeftModel": "base_model",
    "peft.tuners.tuners_utils.BaseTuner": "model",
    "peft.tuners.adaption_prompt.model.AdaptionPromptModel": "model",
    "peft.tuners.adaption_prompt.layer.AdaptedAttention": "model",
}
"""Types, those derived from them included, and the child that each of them wraps."""


def wrapped_child(module: Any) -> str | None:
    """The name of the child that a module merely wraps; None if it is no wrapper."""
    for base in type(module).__mro__:
        child = WRAPPERS.get(f"{base.__module__}.{base.__qualname__}")
        if child is not None:
            return child
    return None


def canonical(model: Any, root: str = "") -> dict[str, str]:
    """Every name in ``named_modules(remove_duplicate=False)`` -> the same without wrappers.

    Args:
        model: an ``nn.Module``.
        root: name of a module, with or without wrappers; names below it begin there, all others
            stay whole.

    Raises:
        ValueError: ``root`` names no module.
    """
    names = _without_wrappers(model)
    if not root:
        return names
    whole = names.get(root, root)
    if whole not in names.values():
        near = difflib.get_close_matches(root, [n for n in names.values() if n], n=3, cutoff=0.0)
        raise ValueError(
            f"root: got {root!r}, which names no module of the model; accepted: a name as in "
            f"named_modules(); nearest modules: {', '.join(near) or 'none'}"
        )
    below = f"{whole}."
    return {
        name: "" if short == whole else short.removeprefix(below) for name, short in names.items()
    }


def _without_wrappers(model: Any) -> dict[str, str]:
    found = {"": ""}
    wraps = {"": wrapped_child(model)}
    # A parent comes before its children.
    for name, module in model.named_modules(remove_duplicate=False):
        if not name:
            continue
        parent, _, child = name.rpartition(".")
        above = found[parent]
        found[name] = above if child == wraps[parent] else f"{above}.{child}".lstrip(".")
        wraps[name] = wrapped_child(module)
    return found


def of_layer(name: str, names: Mapping[str, str]) -> str:
    """The canonical name of a layer, also of one that is in no ``named_modules()``.

    Args:
        name: a module's, or that of a module with the attributes by which one below is reached.
        names: from :func:`canonical`.
    """
    known, rest = name, ""
    while known not in names and known:
        known, _, last = known.rpartition(".")
        rest = f"{last}.{rest}" if rest else last
    return ".".join(part for part in (names.get(known, known), rest) if part)


def ambiguous(model: Any, names: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Canonical names of two different modules -> the whole names of both.

    A wrapper and what it wraps have one name and are one layer.
    """
    innermost: dict[str, tuple[str, Any]] = {}
    found: dict[str, tuple[str, str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        short = names[name]
        child = wrapped_child(module)
        if child is not None and child in module._modules:
            continue  # stands for its child
        other = innermost.setdefault(short, (name, module))
        if other[1] is not module:
            found.setdefault(short, (other[0], name))
    return found


def with_wholes(names: Mapping[str, str], shorts: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Canonical names -> the whole names that they stand for, themselves left out."""
    wholes: dict[str, list[str]] = {short: [] for short in shorts}
    for name, short in names.items():
        if short in wholes and name != short:
            wholes[short].append(name)
    return {short: tuple(found) for short, found in wholes.items()}


def reached_by(function: FunctionType) -> dict[str, Any]:
    """What a function closes over or finds as globals, by name.

    A name that is bound later is left out, where ``inspect.getclosurevars`` raises.
    """
    code, known = function.__code__, function.__globals__
    found: dict[str, Any] = {}
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # nothing is in it yet
            found[name] = cell.cell_contents
    return found | {name: known[name] for name in code.co_names if name in known}
