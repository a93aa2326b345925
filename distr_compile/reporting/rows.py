"""What was found in one compiled graph, what was decided there, and why.

One compiled graph makes one ``GraphReport`` of ``SiteRow`` (an attention, rewritten or left exact)
and ``NotAttention`` (a softmax that is none).
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

Shape = tuple["int | str", ...]
"""Sizes of a tensor; a symbolic size is its name, such as "s77"."""

LOCK = threading.Lock()
"""Held while a counter or the registry changes."""


CALLED = "call"
"""The form of an attention that a module called itself: there is no graph around it."""

OUTSIDE_BLOCKS = "outside-blocks"
"""The reason of an attention that ``compile_blocks`` leaves as it is: no graph was compiled."""


class DistrWarning(UserWarning):
    """Something in a policy or a compile that is probably not what the user meant."""


@dataclass(frozen=True)
class Reason:
    """Why a site stayed exact, or why a softmax is no attention.

    Attributes:
        code: short kebab-case name to count and filter by, such as "min-seq-len".
        text: one sentence for the user, with the numbers that decided.
    """

    code: str
    text: str

    def __str__(self) -> str:
        return f"{self.code}: {self.text}"


Way = Literal["forward", "backward"]


@dataclass(frozen=True)
class Handover:
    """A call at run time that something else computed than the row says.

    Attributes:
        reason: what failed and why, or what else asked for it.
        by: what computed it, such as "torch-products".
        way: which part of the call.
        is_exact: whether an approximated call was so computed exactly.
    """

    reason: Reason
    by: str
    way: Way = "forward"
    is_exact: bool = False


@dataclass(frozen=True)
class SiteRow:
    """One attention of a compiled graph and what became of it.

    Attributes:
        layer: name of the layer as in ``named_modules()`` of the compiled module.
        form: how the graph spelled the attention, such as "softmax" or "sdpa"; ``CALLED`` without
            a graph.
        shapes: sizes of "q" (B, H, Nq, d), "k" (B, Hk, Nk, d) and "v" (B, Hk, Nk, dv).
        dtype: dtype of q, such as "float16".
        mask: "none", "causal", "bool", "float", ...
        decision: "distr" (approximated) or "exact".
        group_size: columns of Q and K merged into one (the paper's G*), d / rank; None where
            that is no whole number, 1 when exact.
        rank: columns left of Q and K, None when exact.
        estimator: name from the table of estimators, None when exact.
        rounds: how often the estimator refines its basis, None when exact.
        sees: which tokens the approximation of one row depends on, None when exact.
        grouping_block: query rows that share one grouping, "auto", or None when exact.
        reasons: every reason that kept the site exact; never empty for an exact site.
        flops: of the exact attention, 2 * B * H * Nq * Nk * (d + dv); symbolic sizes count by their
            hints, 0 when unknown.
        graph: index of the compiled graph.
        mode: in what state that graph was compiled, see ``GraphReport``.
        site: number of the site within its graph.
        kernel: what computes it, such as "distr-cpu"; of an exact site "sdpa" where it was
            rewritten to ``F.scaled_dot_product_attention``, None where its nodes were left alone.
        backward: what computes the gradients of an approximated site that records them, such as
            "torch-products"; None where it records none or is exact.
        sharding: how the processes of a device mesh share an approximated call whose tensors are
            DTensors, such as "heads sharded over 2 processes", or why they are gathered.
        refused: why each implementation of ours that was asked before that one does not compute it,
            by name; empty where none was asked.
        min_seq_len: the length below which the op itself computes exactly, where sizes are
            symbolic; else 0.
        measured: what was measured of it on this machine, if "auto" asked: seconds of "sdpa",
            "exact" (ours) and "distr", and under "exact_gain" and "distr_gain" the lower quartile
            of the ratios that decided.
        calls: the live counter of the graph, filled in by ``GraphReport``.
        handed: the live record of calls that something else computed, likewise.
        called: the live counter of all calls, likewise; empty where they are not counted.

    Raises:
        ValueError: unknown decision, or an exact site without a reason.
    """

    layer: str
    form: str
    shapes: Mapping[str, Shape] = field(hash=False)
    dtype: str
    mask: str
    decision: Literal["distr", "exact"]
    group_size: int | None = 1
    rank: int | None = None
    estimator: str | None = None
    rounds: int | None = None
    sees: str | None = None
    grouping_block: int | Literal["auto"] | None = None
    reasons: tuple[Reason, ...] = ()
    flops: int = 0
    graph: int = 0
    mode: str = ""
    site: int = 0
    kernel: str | None = None
    backward: str | None = None
    sharding: str | None = None
    refused: Mapping[str, str] = field(default_factory=dict, hash=False)
    min_seq_len: int = 0
    measured: Mapping[str, float] | None = field(default=None, hash=False)
    calls: Mapping[int, int] = field(default_factory=dict, repr=False, compare=False)
    handed: Mapping[tuple[int, Way], Handover] = field(
        default_factory=dict, repr=False, compare=False
    )
    called: Mapping[int, int] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.decision not in ("distr", "exact"):
            raise ValueError(f"decision: got {self.decision!r}; accepted: 'distr', 'exact'")
        if self.decision == "exact" and not self.reasons:
            raise ValueError(f"{self.layer}: an exact site needs at least one reason, got none")

    @property
    def sdpa(self) -> bool:
        """Whether the exact site was rewritten to ``F.scaled_dot_product_attention``."""
        return self.kernel == "sdpa"

    @property
    def runtime_exact_calls(self) -> int:
        """Calls, up to now, in which this approximated site ran exactly.

        Because the input was short, the kernel failed, or forward-mode AD asked for tangents.
        Replays of a CUDA graph are not seen.
        """
        return self.calls.get(self.site, 0)

    @property
    def runtime_calls(self) -> int | None:
        """Calls of this layer in this graph up to now; None where they are not counted.

        They are for the blocks of ``compile_blocks``, where one graph serves several layers.
        """
        return self.called.get(self.site)

    @property
    def runtime_reason(self) -> Reason | None:
        """Why ``kernel`` did not compute this site, in the latest call in which that was so.

        It failed, or forward-mode AD asked for tangents; short inputs have no reason.
        """
        handover = self.handed.get((self.site, "forward"))
        return None if handover is None else handover.reason

    @property
    def runtime_kernel(self) -> str | None:
        """What computed that call; None where every call so far was that of ``kernel``."""
        handover = self.handed.get((self.site, "forward"))
        return None if handover is None else handover.by

    @property
    def runtime_backward_reason(self) -> Reason | None:
        """Why ``backward`` did not compute the gradients, in the latest call in which it failed."""
        handover = self.handed.get((self.site, "backward"))
        return None if handover is None else handover.reason

    @property
    def runtime_backward(self) -> str | None:
        """What computed those gradients; None where it was always ``backward``."""
        handover = self.handed.get((self.site, "backward"))
        return None if handover is None else handover.by


@dataclass(frozen=True)
class NotAttention:
    """A softmax, SDPA or flex node that is no attention we could rewrite.

    Attributes:
        layer: name of the layer as in ``named_modules()``.
        op: what the graph calls, such as "softmax".
        shape: sizes of its output.
        reason: why it is none.
    """

    layer: str
    op: str
    shape: Shape
    reason: Reason


@dataclass(frozen=True)
class GraphReport:
    """Everything found in one compiled graph.

    Attributes:
        index: number of the graph, in the order of compilation; given to every row.
        root: class name of the compiled module, or name of the compiled function.
        rows: one per attention.
        not_attention: one per softmax that is none.
        matched: policy patterns that matched an attention of this graph.
        unmatched: policy patterns that name modules of the model but no attention of this graph.
        notes: what else the user should know, such as "graph shared by layers 0, 1".
        mode: in what state the graph was compiled: "eval" or "train", after the training flag of
            the module; "eval, grad" and "train, no grad" where grad mode is the other one; of code
            without a module "grad" or "no grad". Given to every row.
        calls: live counter, site -> calls that ran exactly; shared with the rows.
        handed: live record, site and way -> the latest call that something else computed than the
            row says; shared with the rows.
        called: live counter, site -> all its calls, shared with the rows; empty where they are not
            counted.

    Raises:
        ValueError: two rows with the same site number.
    """

    index: int
    root: str
    rows: tuple[SiteRow, ...] = ()
    not_attention: tuple[NotAttention, ...] = ()
    matched: tuple[str, ...] = ()
    unmatched: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    mode: str = ""
    calls: dict[int, int] = field(default_factory=dict, repr=False, compare=False)
    handed: dict[tuple[int, Way], Handover] = field(default_factory=dict, repr=False, compare=False)
    called: dict[int, int] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        sites = [row.site for row in self.rows]
        if len(set(sites)) != len(sites):
            raise ValueError(f"graph {self.index}: site numbers must be unique, got {sites}")
        for site in sites:
            self.calls.setdefault(site, 0)
        live = {"calls": self.calls, "handed": self.handed, "called": self.called}
        bound = tuple(
            replace(row, graph=self.index, mode=self.mode, **live)  # type: ignore[arg-type]
            for row in self.rows
        )
        object.__setattr__(self, "rows", bound)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is to be said of the graph: it has no attention and nothing like it."""
        return not (self.rows or self.not_attention or self.notes)

    def hear(self, site: int, handover: Handover | None = None) -> None:
        """Note one call that was not as the row says; seen by every row of the site at once.

        Args:
            site: number of the site.
            handover: why, and what computed it; None where it ran exactly as the input was short.

        Raises:
            ValueError: no such site in this graph.
        """
        with LOCK:
            if site not in self.calls:
                raise ValueError(f"site: got {site}; graph {self.index} has {sorted(self.calls)}")
            if handover is None or handover.is_exact:
                self.calls[site] += 1
            if handover is not None:
                self.handed[site, handover.way] = handover

    def count_calls(self, sites: Iterable[int]) -> None:
        """Count a call of each of ``sites``; seen by their rows at once."""
        with LOCK:
            for site in sites:
                self.called[site] = self.called.get(site, 0) + 1

    def placed(self, index: int, prefix: str) -> GraphReport:
        """The same graph as number ``index`` of a parent that calls its root ``prefix``."""

        def named(layer: str) -> str:
            return ".".join(part for part in (prefix, layer) if part)

        return replace(
            self,
            index=index,
            rows=tuple(replace(row, layer=named(row.layer)) for row in self.rows),
            not_attention=tuple(replace(n, layer=named(n.layer)) for n in self.not_attention),
        )
