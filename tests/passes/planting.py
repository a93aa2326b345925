"""Plant a fault in every graph that the pass has rewritten, before ``verify`` runs it.

The faults are edits of the rewritten graph, so that they do not depend on how the pass is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import fx

from distr_compile import verifying
from distr_compile.passes.emit import STANDS_FOR

OP = torch.ops.distr.attention.default
Edit = Callable[[fx.Graph, fx.Node], None]


@contextmanager
def planted(edit: Edit, target: Any = OP) -> Iterator[list[fx.Node]]:
    """Let ``edit(graph, node)`` change each call of ``target``; yields the nodes it was given."""
    found: list[fx.Node] = []
    real = verifying.run_pass

    def run_pass(gm: fx.GraphModule, policy: Any, *, change: bool) -> Any:
        result = real(gm, policy, change=change)
        for module in gm.modules():
            if not isinstance(module, fx.GraphModule):
                continue
            for node in list(module.graph.nodes):
                if node.target is target:
                    found.append(node)
                    edit(module.graph, node)
            module.graph.lint()
            module.recompile()
        return result

    with mock.patch.object(verifying, "run_pass", run_pass):
        yield found


def option(**values: Callable[[Any], Any]) -> Edit:
    """Change keyword arguments of the op, each by a function of what it was (None if not given)."""

    def edit(graph: fx.Graph, node: fx.Node) -> None:
        changed = {name: change(node.kwargs.get(name)) for name, change in values.items()}
        node.kwargs = {**node.kwargs, **changed}

    return edit


def argument(position: int, change: Callable[..., Any] | None) -> Edit:
    """Put ``change(argument)`` in the place of a positional argument; None drops it."""

    def edit(graph: fx.Graph, node: fx.Node) -> None:
        args = list(node.args)
        assert args[position] is not None
        if change is None:
            args[position] = None
        else:
            with graph.inserting_before(node):
                args[position] = graph.call_function(change, (args[position],))
        node.args = tuple(args)

    return edit


def without(*names: str) -> Edit:
    """Take out the last call of each method or function in front of the node."""

    def edit(graph: fx.Graph, node: fx.Node) -> None:
        for name in names:
            before = list(graph.nodes)[: list(graph.nodes).index(node)]
            calls = [n for n in before if getattr(n.target, "__name__", n.target) == name]
            calls[-1].replace_all_uses_with(calls[-1].args[0])  # type: ignore[arg-type]
            graph.erase_node(calls[-1])

    return edit


def result(change: Callable[..., Any]) -> Edit:
    """Put ``change(value)`` in the place of the value that stands for the site."""

    def edit(graph: fx.Graph, node: fx.Node) -> None:
        stands = next(n for n in graph.nodes if STANDS_FOR in n.meta)
        with graph.inserting_after(stands):
            changed = graph.call_function(change, (stands,))
        stands.replace_all_uses_with(changed, delete_user_cb=lambda user: user is not changed)
        changed.meta[STANDS_FOR] = stands.meta.pop(STANDS_FOR)

    return edit


SDPA = F.scaled_dot_product_attention
