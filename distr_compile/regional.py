"""Models that are compiled block by block, each kind of block once."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import torch
from torch import fx, nn

from distr_compile import naming
from distr_compile.backend import Options, compile_graph
from distr_compile.bases import BasesOfModel
from distr_compile.estimators import ESTIMATORS
from distr_compile.policy import LayerPlan, Policy
from distr_compile.policy.errors import sentence
from distr_compile.reporting.breaks import passed_over
from distr_compile.running import Shared, entered


def compile_blocks(
    model: nn.Module,
    policy: str | PathLike[str] | Policy | Mapping[str, Any] | None = None,
    *,
    blocks: str | Sequence[str] | None = None,
    options: Mapping[str, Any] | None = None,
    dynamic: bool | None = None,
    fullgraph: bool = False,
) -> list[list[str]]:
    """Compile the repeated blocks of a model in place, equal ones by one graph.

    Blocks of one class go together if their submodules, parameters and buffers have the same names,
    types, shapes and dtypes, the policy the same plans for them, and its file bases of the same
    sizes: Dynamo then captures and Inductor compiles the first that is called, and all others run
    that code with their own weights and bases, which are inputs of the graph. What they are given
    may still need a graph of its own, as other shapes do. What stands between blocks runs in eager.
    Seeds tell no blocks apart: a policy has none, and those of dropout are drawn by the graph.

    Rules of the policy, and the rows of ``distr_compile.report(model)``, go by the names of layers
    in the whole model; ``runtime_calls`` of a row says how often its layer was called. What is
    decided for the block that is captured is decided for its group: plans and shapes are the same,
    and "auto" is measured once. Names in rules are held against the whole model here, before
    anything is compiled.

    A block has a graph of its own where calibrated layers stand in the body of a higher-order op,
    as an activation checkpoint within the block is, which takes no further inputs; and where
    several of its layers are one body, as with ``torch.compiler.nested_compile_region``.

    Args:
        model: the whole model.
        policy: as in ``torch.compile(..., options={"policy": ...})``.
        blocks: names of the blocks' classes, or patterns of their names in the model. None takes
            the classes that the model names in ``_repeated_blocks``, as models of diffusers do, or
            what stands in its lists of modules of one class.
        options: the other options of the backend, and Inductor's.
        dynamic: as for ``torch.compile``.
        fullgraph: as for ``torch.compile``.

    Returns:
        The names of the blocks, in groups.

    Raises:
        ValueError: there are no such blocks, or an option is unknown.
        PolicyError: the policy is wrong: for itself, or for this model; or it has no file of bases
            where an estimator needs one. That bases are of this model is looked at when a block is
            compiled.
    """
    checked = Options.parse({**(options or {}), "policy": policy}, None)
    shown = naming.canonical(model)
    checked.policy.check_ambiguous(naming.ambiguous(model, shown))
    checked.policy.audit({*shown, *shown.values()}).check_names()
    found = dict(_blocks(model, shown, blocks))
    if not found:
        accepted = "names of classes, or patterns of names, that some modules of the model have"
        got = repr(blocks) if blocks else "no list of modules of one class"
        raise ValueError(sentence("blocks", got, accepted, "name the blocks of the model"))
    bases = BasesOfModel(checked.policy, model)
    groups: dict[object, list[str]] = {}
    for name, block in found.items():
        groups.setdefault(_kind(name, block, checked.policy, bases), []).append(name)
    for names in groups.values():
        members = tuple(names)
        backend = _Backend(checked, Shared(model, members, len(groups) == 1))
        for name in names:
            member: Any = found[name]
            member.compile(backend=backend, dynamic=dynamic, fullgraph=fullgraph)
            run = entered(name, member._compiled_call_impl)
            member._compiled_call_impl = _watched(run, backend, member)
    return list(groups.values())


@dataclass(eq=False)
class _Backend:
    """What compiles the blocks of one group; Dynamo keeps the graphs of each backend apart."""

    options: Options
    shared: Shared
    was_called: bool = False
    has_warned: bool = False

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        self.was_called = True
        return compile_graph(gm, example_inputs, self.options, shared=self.shared)


def _watched(run: Callable[..., Any], backend: _Backend, block: nn.Module) -> Callable[..., Any]:
    """A block's compiled call, which warns once of a group where nothing was compiled."""

    def call(*args: Any, **kwargs: Any) -> Any:
        result = run(*args, **kwargs)
        if not (backend.was_called or backend.has_warned or torch.compiler.is_compiling()):
            backend.has_warned = True
            said = "".join(f"\n{line}" for line in passed_over(block))
            warnings.warn(
                f"compile_blocks: nothing was compiled of {', '.join(backend.shared.blocks)}: they "
                f"ran as they are{said}",
                stacklevel=2,
            )
        return result

    return call


def _blocks(
    model: nn.Module, shown: Mapping[str, str], wanted: str | Sequence[str] | None
) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of each block, the outermost where they are nested."""
    if wanted is None:
        wanted = getattr(model, "_repeated_blocks", None) or None
    patterns = [wanted] if isinstance(wanted, str) else wanted
    listed = {name for parent in _lists(model, shown) for name in parent}
    last = None
    for name, module in model.named_modules():
        name = shown[name]
        if last is not None and (not last or name.startswith(f"{last}.")):
            continue
        if patterns is None:
            is_block = name in listed
        else:
            is_block = type(module).__name__ in patterns or any(
                fnmatch.fnmatchcase(name, pattern) for pattern in patterns
            )
        if is_block and name:
            last = name
            yield name, module


def _lists(model: nn.Module, shown: Mapping[str, str]) -> Iterator[list[str]]:
    """Names of the modules in each list of several modules of one class with submodules."""
    for name, parent in model.named_modules():
        if not isinstance(parent, (nn.ModuleList, nn.Sequential)) or len(parent) < 2:
            continue
        kinds = {type(child) for child in parent}
        if len(kinds) == 1 and any(True for _ in next(iter(parent)).children()):
            yield [shown[f"{name}.{i}" if name else str(i)] for i in range(len(parent))]


def _kind(name: str, block: nn.Module, policy: Policy, bases: BasesOfModel) -> object:
    """What blocks have in common that may run one graph."""
    plans: dict[str, LayerPlan] = {}
    for own, _ in block.named_modules():
        plan = policy.resolve(f"{name}.{own}" if own else name)
        plans[own] = replace(plan, rule=())
    needs_bases = any(
        ESTIMATORS[plan.estimator].needs == "bases" and not plan.is_exact for plan in plans.values()
    )
    sizes: dict[str, tuple[int, ...]] = {}
    if needs_bases:
        of_file = bases.sizes().items()
        sizes = {each[len(name) :]: size for each, size in of_file if _is_in(each, name)}
    modules = tuple((own, type(module)) for own, module in block.named_modules())
    tensors = tuple(
        (own, tuple(t.shape), t.dtype, t.device, t.requires_grad)
        for own, t in (*block.named_parameters(), *block.named_buffers())
    )
    sorted_sizes = tuple(sorted(sizes.items()))
    return (modules, tensors, tuple(plans.items()), block.training, sorted_sizes)


def _is_in(layer: str, block: str) -> bool:
    """Whether an attention, by its name in a file of bases, stands in a block."""
    return layer.startswith(block) and layer[len(block) : len(block) + 1] in ("", ".", "#")
