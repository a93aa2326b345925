"""What the matcher hands on: one :class:`AttentionSite` per attention, or why there is none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from distr_compile.passes.vocabulary import Scalar


@dataclass(frozen=True)
class Level:
    """The shape under which the scores stand at some point of the chain.

    Attributes:
        shape: sizes, ints or SymInts, the last two of them usually (N_q, N_k).
        args: the arguments of the reshape that made it (ints, nodes, -1), where one did. Symbolic
            sizes are taken from here, so that rewriting never has to name a size itself.
    """

    shape: tuple[Any, ...]
    args: tuple[Any, ...] | None = None

    @property
    def lead(self) -> tuple[Any, ...]:
        """All sizes but the last two."""
        return self.shape[:-2]


@dataclass(frozen=True)
class Operand:
    """Q, K or V as a node, and how to see it as ``(..., rows, width)``.

    Attributes:
        node: the tensor.
        dims: the permutation that brings it to ``(lead..., rows, width)``; -1 inserts an axis of
            size 1.
        shape: its shape after that, ints or SymInts.
        replay: views to apply to ``node`` before ``dims``: a scale was taken out from under them.
    """

    node: fx.Node
    dims: tuple[int, ...]
    shape: tuple[Any, ...]
    replay: tuple[fx.Node, ...] = ()

    @property
    def is_plain(self) -> bool:
        """Whether the node already has that layout."""
        return self.dims == tuple(range(len(self.dims)))


@dataclass(frozen=True)
class Factor:
    """One factor of the scale: a number or the node of a symbolic one."""

    value: Scalar
    divide: bool = False


@dataclass(frozen=True)
class ScaleStep:
    """The scores are multiplied (or divided) by a number, a symbolic number or a tensor."""

    factor: Scalar
    divide: bool
    level: Level
    reader: fx.Node


@dataclass(frozen=True)
class AddStep:
    """``alpha`` times a tensor is added to the scores."""

    term: fx.Node
    alpha: Scalar
    level: Level
    reader: fx.Node


@dataclass(frozen=True)
class FillStep:
    """The scores become ``value`` where ``condition`` holds (with ``keep``: where it does not)."""

    condition: fx.Node
    value: float
    keep: bool
    level: Level
    reader: fx.Node
    dtype: torch.dtype
    """Of the scores at that point: ``value`` fits it."""


Step = ScaleStep | AddStep | FillStep
"""Each knows the shape of the scores at that point and the node that does it (``reader``)."""


@dataclass(frozen=True)
class Causal:
    """The graph says that query i sees the keys ``j <= i + offset``, by ``step`` if by a mask."""

    offset: int
    step: AddStep | FillStep | None = None


@dataclass(frozen=True)
class AttentionSite:
    """One ``softmax(Q K^T ...) V`` in a graph.

    Attributes:
        kind: ``"softmax"`` (spelled out), ``"sdpa"``, ``"mha"`` or ``"encoder"``.
        anchor: the node the report counts: the softmax, or the fused call.
        form: the spelling, as names of operations from the product to the output.
        output: the node that the rewrite replaces.
        dtype, device: of the output.
        batch, num_heads, num_key_heads, num_queries, num_keys, head_dim, value_dim: sizes, ints or
            SymInts; ``batch`` is the product of all leading sizes but the heads.
        q, k, v: operands; ``None`` for ``mha`` and ``encoder``, whose projections are inside the
            node.
        shared_k, shared_v: K and V before their heads were repeated (``repeat_kv``), where they
            were.
        factors: the scale of the product. Empty for an ``sdpa`` call without one: 1 / sqrt(d).
        steps: what happens to the scores between the product and the softmax, in order.
        softcap: c > 0 where the scaled scores s become ``c * tanh(s / c)``, before every bias and
            mask; the scale then is that of all factors and steps together, on both sides of tanh.
        sinks: one number per query head, ``(H,)`` when flattened, that stands in the softmax as the
            score of one more key, whose weight is dropped.
        scores, canonical, out: the levels of the product, of the rewritten call and of the output.
        output_dims: the output's axes, as a permutation of (lead..., query, width).
        mask: of an ``sdpa`` call, its mask node; ``None`` too where the mask only says "causal".
        mask_kind: "none", "causal", "bool", "float" or a sum of them, for the report.
        causal: the graph says that query i sees keys j <= i + offset only.
        compute_dtype: the dtype that Q, K and V are brought to, where they have several.
        copy_order: the output's axes, outermost first, if the model relies on that memory order.
        interior: the nodes from the product to the output, which nothing else reads, and what is
            dead around them.
        requires_grad: a gradient is recorded for the output.
    """

    kind: str
    anchor: fx.Node
    form: str
    output: fx.Node
    dtype: torch.dtype
    device: torch.device
    batch: Any
    num_heads: Any
    num_key_heads: Any
    num_queries: Any
    num_keys: Any
    head_dim: Any
    value_dim: Any
    q: Operand | None = None
    k: Operand | None = None
    v: Operand | None = None
    shared_k: Operand | None = None
    shared_v: Operand | None = None
    factors: tuple[Factor, ...] = ()
    steps: tuple[Step, ...] = ()
    softcap: float = 0.0
    sinks: fx.Node | None = None
    scores: Level | None = None
    canonical: Level | None = None
    out: Level | None = None
    output_dims: tuple[int, ...] = ()
    mask: fx.Node | None = None
    mask_kind: str = "none"
    causal: Causal | None = None
    compute_dtype: torch.dtype | None = None
    copy_order: tuple[int, ...] | None = None
    interior: tuple[fx.Node, ...] = ()
    requires_grad: bool = False

    @property
    def is_causal(self) -> bool:
        """Whether later keys are hidden, and nothing else by a mask of the graph's."""
        return self.causal is not None


@dataclass(frozen=True)
class Unmatched:
    """An anchor that is no rewritable site: the reason's code and text.

    ``attention`` tells rows of the table (attention that stays exact) from nodes that are not
    attention at all; ``flops`` are those of the exact attention, as far as the graph shows them.
    """

    anchor: fx.Node
    kind: str
    code: str
    text: str
    attention: bool
    form: str = ""
    flops: int = 0


class RefusedError(Exception):
    """Raised inside the matcher where a walk stops; becomes an :class:`Unmatched`."""

    def __init__(self, code: str, text: str, attention: bool = True) -> None:
        super().__init__(text)
        self.code, self.text, self.attention = code, text, attention


def refusal(error: Exception) -> RefusedError:
    """Any error of the pass as a refusal: such an attention stays as it is, with the reason."""
    if isinstance(error, RefusedError):
        return error
    return RefusedError("not-run", f"{type(error).__name__}: {error}"[:300])
