"""What a model does with an attention's output, as far as its memory order matters to it.

The op lays its output out as (B, N, H, d_v); a matmul as (B, H, N, d_v). A view of merged axes
works on one of them only, and a write through a view reaches what shares the memory. Readers that
take any order are known by name; for all others the rewrite adds a copy in the original order.
"""

from __future__ import annotations

from torch import fx

from distr_compile.passes import vocabulary as voc
from distr_compile.passes.memory import Memory
from distr_compile.passes.vocabulary import fake, hint, read, target_name

_TAKES_ANY_ORDER = frozenset("reshape flatten contiguous linear layer_norm".split())
"""What these return does not depend on the order of what they are given."""

_PASSES_IT_ON = frozenset(
    "getitem unsqueeze squeeze chunk split unbind select narrow dropout detach clone to type_as "
    "float half bfloat16 neg sigmoid tanh relu gelu silu masked_fill where movedim".split()
)
_POINTWISE = voc.Scale | voc.Add | voc.Cast | voc.Permute


def order_to_copy(memory: Memory, out: fx.Node) -> tuple[int, ...] | None:
    """The axes of the output, outermost in memory first, if the model may rely on that order."""
    if not _order_matters(memory, out):
        return None
    strides = [hint(stride) for stride in fake(out).stride()]
    return tuple(sorted(range(len(strides)), key=lambda i: (-strides[i], i)))


def _order_matters(memory: Memory, out: fx.Node) -> bool:
    last = next(iter(reversed(out.graph.nodes)))
    stack = [out]
    while stack:
        node = stack.pop()
        # Also of a copy: in the other order it may be none, and the write would reach the output.
        if memory.writers(node, node, last):
            return True
        for user in node.users:
            name, op = target_name(user), read(user)
            if memory.writers(user, user, last):
                return True
            if user in memory.dead:
                continue
            # A reshape that is a view keeps the order: what reads it has it before itself.
            is_view = isinstance(op, voc.Reshape) and memory.storages(user) & memory.storages(node)
            if name in _TAKES_ANY_ORDER or isinstance(op, voc.Product):
                if not is_view:
                    continue
            elif name not in _PASSES_IT_ON and not isinstance(op, _POINTWISE):
                return True
            stack.append(user)
    return False
