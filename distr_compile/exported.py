"""Names of layers in programs of ``torch.export``: each node says in which module it was traced.

The paths are names in the model that was exported, such as "blocks.0.attn"; those of Dynamo begin
at a variable ("L['self'].blocks.0"). Where Dynamo captures a module that was made of a program, the
nodes keep what the program wrote.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import fx, nn


def paths_of(node: fx.Node) -> list[str]:
    """Names of the modules a node of a program was traced in, outermost first, "" for the model."""
    return [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]


def innermost(paths: Sequence[list[str]]) -> str:
    """The innermost module that all of several nodes are in."""
    common = ""
    for level in zip(*paths, strict=False):
        if len(set(level)) > 1:
            break
        common = level[0]
    return common


def is_exported(node: fx.Node) -> bool:
    """Whether a node that Dynamo captured was written by an export."""
    return paths_of(node)[:1] == [""]


def layer(nodes: Iterable[fx.Node], root: nn.Module) -> str | None:
    """The layer that nodes of a program belong to, as a module below ``root`` would be called.

    Args:
        nodes: of a graph that Dynamo captured.
        root: what was compiled: the module of a program, or a model that has one somewhere.

    Returns:
        The name of the program's module in ``root``, then that within the program, which need not
        be a module any more. None where a node is of no program, or it is not clear of which: two
        modules of one program are not told apart.
    """
    nodes = list(nodes)
    if not nodes or not all(map(is_exported, nodes)):
        return None
    programs = {_program(node) for node in nodes}
    place = _places(root).get(programs.pop()) if len(programs) == 1 else None
    within = innermost([paths_of(node) for node in nodes])
    return None if place is None else _joined(place, within)


def layers(graph: fx.Graph, root: nn.Module) -> Iterator[str]:
    """Names of all layers of programs whose code is in a graph, as :func:`layer` has them."""
    nodes = [node for node in graph.nodes if is_exported(node)]
    places = _places(root) if nodes else {}
    for node in nodes:
        place = places.get(_program(node))
        yield from () if place is None else (_joined(place, path) for path in paths_of(node))


def _joined(*names: str) -> str:
    return ".".join(name for name in names if name)


def _places(root: nn.Module) -> dict[int | None, str]:
    """The name of each program's module below ``root``, where there is one."""
    places: dict[int | None, list[str]] = {}
    for name, module in root.named_modules():
        if isinstance(module, fx.GraphModule):
            known = {_program(node) for node in module.graph.nodes if is_exported(node)} - {None}
            for number in known:
                places.setdefault(number, []).append(name)
    return {number: names[0] for number, names in places.items() if len(names) == 1}


def _program(node: fx.Node) -> int | None:
    """What tells the program that a node comes from: its graph, as that was numbered."""
    sources = node.meta.get("from_node")
    return sources[-1].graph_id if sources else None
