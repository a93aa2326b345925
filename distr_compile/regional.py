"""Models that are compiled block by block, each kind of block once."""

from __future__ import annotations

import fnmatch
import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import Any

import torch
from torch import fx, nn

from distr_compile import identity, naming, surroundings
from distr_compile.backend import Options, compile_graph, plan_of
from distr_compile.bases import BasesOfModel
from distr_compile.estimators import ESTIMATORS
from distr_compile.policy import LayerPlan, Policy, RuleAudit
from distr_compile.policy.errors import check_type, collected, sentence
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
    types, shapes and dtypes, the same hooks, the policy the same plans for them, and its file bases
    of the same sizes: Dynamo then captures and Inductor compiles the first that is called, and all
    others run that code with their own weights and bases, which are inputs of the graph. What they
    are given may still need a graph of its own, as other shapes do, and so may plain attributes in
    which they differ, such as a layer's number. What stands outside of the blocks runs in eager;
    its attention has rows, exact for the reason "outside-blocks", found in the first call.
    Attention in the very code of a module that holds blocks has none: a note names such code. Seeds
    tell no blocks apart: a policy has none, and those of dropout are drawn by the graph.

    Rules of the policy, and the rows of ``distr_compile.report(model)``, go by the names of layers
    in the whole model; ``runtime_calls`` of a row says how often its layer was called. What is
    decided for the block that is captured is decided for its group: plans and shapes are the same,
    and "auto" is measured once. Names in rules are held against the whole model here, before
    anything is compiled; group sizes and ranks in the first call, as the widths of heads are known
    then. That call, and every one after it, raises PolicyError for a rule that fits no layer.

    A block has a graph of its own where calibrated layers stand in the body of a higher-order op,
    as an activation checkpoint within the block is, which takes no further inputs; and where
    several of its layers are one body, as with ``torch.compiler.nested_compile_region``.

    Args:
        model: the whole model.
        policy: as in ``torch.compile(..., options={"policy": ...})``, or given there.
        blocks: names of the blocks' classes, or patterns of their names in the model. None takes
            the classes that the model names in ``_repeated_blocks``, as models of diffusers do, or
            what stands in its lists of modules of one class.
        options: those of the backend, and Inductor's; with ``root`` the names of layers
            and blocks begin there.
        dynamic: as for ``torch.compile``.
        fullgraph: as for ``torch.compile``.

    Returns:
        The names of the blocks, in groups.

    Raises:
        ValueError: there are no such blocks, an option is unknown, or there are two policies.
        TypeError: no module, or no names of blocks.
        PolicyError: the policy is wrong: for itself, or for this model, as where a rule asks for
            approximation of modules outside of the blocks only; or it has no file of bases where an
            estimator needs one. That bases are of this model is looked at when a block is
            compiled.
    """
    check_type("model", model, nn.Module, "a torch.nn.Module", "give the whole model")
    if blocks is not None and not isinstance(blocks, str):
        accepted, advice = "a name, a list of names, or None", "give classes' or blocks' names"
        check_type("blocks", blocks, (list, tuple, set, frozenset), accepted, advice)
    checked = _parsed(policy, options)
    root = identity.root_of(model, checked.root)
    checked.policy.check_ambiguous(naming.ambiguous(model, root.shown))
    checked.policy.audit({*root.shown, *root.shown.values()}).check_names()
    found = _named_blocks(model, root, blocks)
    _check_places(checked.policy, root, found)
    bases = BasesOfModel(checked.policy, model)
    groups: dict[object, list[str]] = {}
    for name, block in found.items():
        groups.setdefault(_kind(name, block, checked.policy, root, bases), []).append(name)
    notes = surroundings.notes(model, list(found.values()))
    rules = _Rules(checked.policy.audit())
    for names in groups.values():
        members = tuple(names)
        shared = Shared(model, members, len(groups) == 1, checked.root, notes, rules.audits)
        backend = _Backend(checked, shared)
        rules.groups.append((backend, _names_in([found[name] for name in names], root)))
        for name in names:
            member: Any = found[name]
            given = {"backend": backend, "dynamic": dynamic, "fullgraph": fullgraph}
            member.compile(**given, **_limits(len(found)))
            without = functools.partial(_alone, backend, name)
            run = entered(name, member._compiled_call_impl, without)
            member._compiled_call_impl = _watched(run, backend, member, rules)
    surroundings.watch(model, root.shown, list(found.values()), checked)
    return list(groups.values())


def _parsed(policy: Any, options: Mapping[str, Any] | None) -> Options:
    """The options, with the policy from where it is given.

    Raises:
        ValueError, PolicyError: as ``compile_blocks``.
    """
    given = dict(options or {})
    if policy is not None and given.get("policy") is not None:
        got = "one as an argument and another in options"
        raise ValueError(sentence("policy", got, "one of them", "leave the other out"))
    return Options.parse(given if policy is None else {**given, "policy": policy}, None)


@dataclass(eq=False)
class _Backend:
    """What compiles the blocks of one group; Dynamo keeps the graphs of each backend apart."""

    options: Options
    shared: Shared
    was_called: bool = False
    has_warned: bool = False
    ran_alone: set[str] = field(default_factory=set)

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        self.was_called = True
        return compile_graph(gm, example_inputs, self.options, shared=self.shared)


def _limits(blocks: int) -> dict[str, int]:
    """How many graphs Dynamo may make of what all blocks run: as many of each as it may of one.

    Blocks that differ in a number, such as that of the layer, need a graph each. Where this version
    of PyTorch takes no such limit, ``identity.guard_frame_module`` keeps apart what Dynamo counts.
    """
    if "recompile_limit" not in inspect.signature(torch.compile).parameters:
        return {}
    return {"recompile_limit": torch._dynamo.config.recompile_limit * blocks}


def _alone(backend: _Backend, name: str) -> None:
    """Warn once of a block that ran as it is, where others of its group run graphs."""
    if not backend.was_called or name in backend.ran_alone:
        return
    backend.ran_alone.add(name)
    warnings.warn(
        f"compile_blocks: {name} was called and no graph ran in it: its attention was exact, and "
        "row.runtime_calls does not count the call. Dynamo makes no graph where its limits are "
        "reached, compiling is off, or nothing is computed; give fewer different blocks and shapes "
        "or raise torch._dynamo.config.recompile_limit and accumulated_recompile_limit",
        stacklevel=4,
    )


@dataclass(eq=False)
class _Rules:
    """Holds the rules of the policy against what was compiled up to now.

    Attributes:
        begin: the rules, and nothing that they met.
        audits: what they met, graph by graph, as the groups are compiled.
        groups: what compiles each group, and the names of all modules in its blocks.
        num_checked: graphs that were looked at.
    """

    begin: RuleAudit
    audits: list[RuleAudit] = field(default_factory=list)
    groups: list[tuple[_Backend, frozenset[str]]] = field(default_factory=list)
    num_checked: int = 0

    def check(self) -> None:
        """Refuse rules that fit no attention, once each block that they name was compiled.

        Raises:
            PolicyError: as where the model is compiled whole; in each call, as there.
        """
        if len(self.audits) == self.num_checked:
            return
        later = {name for backend, names in self.groups if not backend.was_called for name in names}
        rules = tuple(each for each in self.begin.rules if not any(map(each[1].matches, later)))
        replace(sum(self.audits, self.begin), rules=rules).check_sizes()
        self.num_checked = len(self.audits)


def _watched(
    run: Callable[..., Any], backend: _Backend, block: nn.Module, rules: _Rules
) -> Callable[..., Any]:
    """A block's compiled call, which warns once of a group where nothing was compiled."""

    def call(*args: Any, **kwargs: Any) -> Any:
        result = run(*args, **kwargs)
        if torch.compiler.is_compiling():
            return result
        rules.check()
        if not (backend.was_called or backend.has_warned):
            backend.has_warned = True
            said = "".join(f"\n{line}" for line in passed_over(block))
            warnings.warn(
                f"compile_blocks: nothing was compiled of {', '.join(backend.shared.blocks)}: they "
                f"ran as they are{said}",
                stacklevel=2,
            )
        return result

    return call


def _named_blocks(
    model: nn.Module, root: identity.Root, wanted: str | Sequence[str] | None
) -> dict[str, nn.Module]:
    """The blocks by their names.

    Raises:
        ValueError: there are none, or two of one name.
    """
    found: dict[str, nn.Module] = {}
    for name, block in _blocks(model, root.shown, wanted):
        if found.setdefault(name, block) is not block:
            got = f"two blocks that are called {name}"
            accepted = "blocks whose names differ without wrappers, and from the root on"
            raise ValueError(sentence("blocks", got, accepted, "name one of them in blocks="))
    if "" in _names_in(list(found.values()), root):
        accepted = "a module that holds blocks"
        message = sentence("root", "a module of a block", accepted, "name one above the blocks")
        raise ValueError(message)
    if not found:
        accepted = "names of classes, or patterns of names, that some modules of the model have"
        got = repr(wanted) if wanted else "no list of modules of one class"
        raise ValueError(sentence("blocks", got, accepted, "name the blocks of the model"))
    return found


def _check_places(policy: Policy, root: identity.Root, blocks: Mapping[str, nn.Module]) -> None:
    """Refuse rules that would approximate modules outside of the blocks, and none within.

    Raises:
        PolicyError: every such rule.
    """
    inside = _names_in(list(blocks.values()), root)
    errors = []
    for index, rule in enumerate(policy.rule):
        if any(map(rule.matches, inside)):
            continue
        named = [n for n in {*root.shown, *root.shown.values()} if rule.matches(n)]
        if all(policy.resolve(name).is_exact for name in named):
            continue
        got = f'"{rule.layers}", which names modules outside of the blocks only: they stay exact'
        accepted = f"a pattern for modules within the blocks, such as {next(iter(blocks))}"
        advice = (
            'compile the whole model with backend="distr" to approximate them, give their class or '
            "name in blocks=, or leave the rule out"
        )
        errors.append(f"{policy.where(index)}: {sentence('layers', got, accepted, advice)}")
    if errors:
        raise collected(errors)


def _names_in(blocks: Sequence[nn.Module], root: identity.Root) -> frozenset[str]:
    """All names, with wrappers and without, of the modules in some blocks."""
    wholes = (name for b in blocks for m in b.modules() for name in root.names[id(m)])
    return frozenset(each for name in wholes for each in (name, root.show(name)))


def _blocks(
    model: nn.Module, shown: Mapping[str, str], wanted: str | Sequence[str] | None
) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of each block, the outermost where they are nested."""
    if wanted is None:
        wanted = getattr(model, "_repeated_blocks", None) or None
    patterns = [wanted] if isinstance(wanted, str) else wanted
    listed = {name for parent in _lists(model, shown) for name in parent}
    last: str | None = None
    for whole, module in model.named_modules():
        name = shown[whole]
        if last is not None and whole.startswith(f"{last}."):
            continue
        if patterns is None:
            is_block = name in listed
        else:
            is_block = type(module).__name__ in patterns or any(
                fnmatch.fnmatchcase(each, pattern) for pattern in patterns for each in (name, whole)
            )
        if is_block and whole:
            last = whole
            yield name, module


def _lists(model: nn.Module, shown: Mapping[str, str]) -> Iterator[list[str]]:
    """Names of the modules in each list of several modules of one class with submodules."""
    for name, parent in model.named_modules():
        if not isinstance(parent, (nn.ModuleList, nn.Sequential)) or len(parent) < 2:
            continue
        kinds = {type(child) for child in parent}
        if kinds & {nn.ModuleList, nn.ModuleDict}:  # nobody calls a list
            continue
        if len(kinds) == 1 and any(True for _ in next(iter(parent)).children()):
            yield [shown[f"{name}.{i}" if name else str(i)] for i in range(len(parent))]


def _kind(
    name: str, block: nn.Module, policy: Policy, root: identity.Root, bases: BasesOfModel
) -> object:
    """What blocks have in common that may run one graph."""
    plans: dict[str, LayerPlan] = {}
    for own, module in block.named_modules():
        wholes = root.names[id(module)]
        plan = plan_of(policy, (*map(root.show, wholes), *wholes))
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
    return (modules, tensors, tuple(plans.items()), block.training, sorted_sizes, _hooks(block))


_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def _hooks(block: nn.Module) -> tuple[object, ...]:
    """The hooks of a block's modules, each by what it calls: the graph has them inside.

    And ``forward`` where it is not that of the class.
    """
    own_forwards = tuple(
        (own, _called(module.__dict__["forward"]))
        for own, module in block.named_modules()
        if "forward" in module.__dict__
    )
    hooks = tuple(
        (own, kind, _called(hook), key in getattr(module, f"{kind}_with_kwargs", ()))
        for own, module in block.named_modules()
        for kind in _HOOKS
        for key, hook in getattr(module, kind, {}).items()
    )
    return own_forwards + hooks


def _called(hook: object) -> tuple[int, ...]:
    """A function by its identity, as blocks hold it; a method by its own and its object's."""
    if inspect.ismethod(hook):  # made anew wherever it is asked for
        return (id(hook.__self__), id(hook.__func__))
    return (id(hook),)


def _is_in(layer: str, block: str) -> bool:
    """Whether an attention, by its name in a file of bases, stands in a block."""
    return layer.startswith(block) and layer[len(block) : len(block) + 1] in ("", ".", "#")
