"""What the matcher hands on: one :class:`AttentionSite` per attention, or why there is none."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import fx

from distr_compile.passes.vocabulary import Scalar, hint


def count(shape: tuple[Any, ...]) -> int:
    """The number of elements; symbolic sizes count by their hints."""
    return math.prod(max(hint(size), 0) for size in shape)


@dataclass(frozen=True)
class Level:
    """The shape under which the scores stand at some point of the chain.

    Attributes:
        shape: sizes, ints or SymInts, the last two of them usually (N_q, N_k).
        args: the arguments of the reshape that made it (ints, nodes, -1), where one did. Symbolic
            sizes are taken from here, so that rewriting never has to name a size itself.
        is_reshaped: the scores were reshaped to it; else they were broadcast to it.
    """

    shape: tuple[Any, ...]
    args: tuple[Any, ...] | None = None
    is_reshaped: bool = False

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


@dataclass(frozen=True)
class Factor:
    """One factor of the scale: a number or the node of a symbolic one."""

    value: Scalar
    divide: bool = False


@dataclass(frozen=True)
class Step:
    """What happens to the scores at one point of the chain; the kinds are in :mod:`.steps`.

    Attributes:
        tensor: that is brought to the scores, if one is.
        level: the shape of the scores there.
        reader: the node that does it.
    """

    tensor: fx.Node | None
    level: Level
    reader: fx.Node

    def write(self, call: Any) -> None:
        """Write it on the rewritten call, a :class:`.steps.Written`."""
        raise NotImplementedError


@dataclass(frozen=True)
class Causal:
    """The graph says that query i sees the keys ``j <= i + offset``, by a mask or in a word.

    ``is_sure``: no score is so large that it shows a hidden key.
    """

    offset: int
    by_mask: bool = False
    is_sure: bool = True


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Ints or SymInts; ``batch`` is the product of all leading sizes but the heads."""

    batch: Any
    num_heads: Any
    num_key_heads: Any
    num_queries: Any
    num_keys: Any
    head_dim: Any
    value_dim: Any

    @property
    def symbolic(self) -> list[str]:
        """Which of them are no numbers."""
        names = [each.name for each in fields(Sizes)]
        return [name for name in names if not isinstance(getattr(self, name), int)]

    @property
    def symbolic_lengths(self) -> list[str]:
        """Which of ``num_queries`` and ``num_keys`` are no numbers."""
        return [name for name in self.symbolic if name in ("num_queries", "num_keys")]


@dataclass(frozen=True, kw_only=True)
class AttentionSite(Sizes):
    """One ``softmax(Q K^T ...) V`` in a graph: what the report and the decision ask of it.

    Attributes:
        kind: ``"softmax"`` (spelled out), ``"sdpa"``, ``"mha"`` or ``"encoder"``. The first two are
            an :class:`OpenSite`; the projections, and masks, of the others are inside the node.
        anchor: the node the report counts: the softmax, or the fused call.
        form: the spelling, as names of operations from the product to the output.
        output: the node that the rewrite replaces.
        dtype, device, requires_grad: of the output; whether a gradient is recorded for it.
        steps: what happens to the scores between the product and the softmax, in order, but for
            what ``causal`` says.
        given: these steps as the model has them, where that is more.
        mask_kind: "none", "causal", "bool", "float" or a sum of them, for the report.
        causal: the graph says that query i sees keys j <= i + offset only, beside the steps.
        softcap: c > 0 where the scaled scores s become ``c * tanh(s / c)``, before every bias and
            mask; the scale then is that of all factors and steps together, on both sides of tanh.
        dropout_p: the share of the weights that is dropped.
        sinks: one number per query head, ``(H,)`` when flattened, that stands in the softmax as the
            score of one more key, whose weight is dropped.
        interior: the nodes from the product to the output, which nothing else reads, and what is
            dead around them.
        written_later: a gradient is recorded, and an input or the output is written in place after
            the attention: one call, which keeps them for its backward, would not find them again.
        is_sharded: a tensor is a DTensor.
    """

    kind: str
    anchor: fx.Node
    form: str
    output: fx.Node
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool = False
    steps: tuple[Step, ...] = ()
    given: tuple[Step, ...] = ()
    mask_kind: str = "none"
    causal: Causal | None = None
    softcap: float = 0.0
    dropout_p: float = 0.0
    sinks: fx.Node | None = None
    interior: tuple[fx.Node, ...] = ()
    written_later: bool = False
    is_sharded: bool = False

    @property
    def is_causal(self) -> bool:
        """Whether later keys are hidden, whatever the steps hide besides."""
        return self.causal is not None


@dataclass(frozen=True, kw_only=True)
class OpenSite(AttentionSite):
    """A site whose Q, K and V are nodes of the graph.

    Attributes:
        q, k, v: operands.
        shared: K and V before their heads were repeated (``repeat_kv``), where they were.
        factors: the scale of the product.
        levels: from the product's to the output's, each once.
        canonical: the one of them that the rewritten call has.
        output_dims: the output's axes, as a permutation of (lead..., query, width).
        compute_dtype: the dtype that Q, K and V are brought to, where they have several.
        copy_order: the output's axes, outermost first, if the model relies on that memory order.
    """

    q: Operand
    k: Operand
    v: Operand
    shared: tuple[Operand, Operand] | None
    factors: tuple[Factor, ...]
    levels: tuple[Level, ...]
    canonical: Level
    output_dims: tuple[int, ...]
    compute_dtype: torch.dtype | None
    copy_order: tuple[int, ...] | None

    @property
    def scores(self) -> Level:
        """The level of the product."""
        return self.levels[0]

    @property
    def out(self) -> Level:
        """The level of the output."""
        return self.levels[-1]


@dataclass(frozen=True)
class Unmatched:
    """An anchor that is no rewritable site, and why.

    ``flops`` are those of the exact attention, as far as the graph shows them.
    """

    anchor: fx.Node
    kind: str
    why: RefusedError
    form: str = ""
    flops: int = 0


class RefusedError(Exception):
    """Raised inside the matcher where a walk stops; becomes an :class:`Unmatched`.

    ``attention`` tells rows of the table (attention that stays exact) from nodes that are not
    attention at all.
    """

    def __init__(self, code: str, text: str, attention: bool = True) -> None:
        super().__init__(text)
        self.code, self.text, self.attention = code, text, attention


def dropped(p: Any) -> float:
    """The share of the weights that a call drops.

    Raises:
        RefusedError: it is no number while compiling.
    """
    if not isinstance(p, int | float):
        raise RefusedError("dropout", "the weights are dropped out by a share that is no number")
    return float(p)


def refusal(error: Exception) -> RefusedError:
    """Any error of the pass as a refusal: such an attention stays as it is, with the reason."""
    if isinstance(error, RefusedError):
        return error
    return RefusedError("not-run", f"{type(error).__name__}: {error}"[:300])
