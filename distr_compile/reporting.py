"""What was found in each compiled graph, what was decided there, and why.

One compiled graph makes one ``GraphReport`` of ``SiteRow`` (an attention, rewritten or left exact)
and ``NotAttention`` (a softmax that is none). The graphs of one model make a ``Report``: the table
a user prints. ``record`` keeps the graphs of a compile, ``report`` finds them again, ``publish``
shows them where people look: ``TORCH_LOGS``, Dynamo's counters and tlparse.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import textwrap
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from tabulate import tabulate

log = logging.getLogger(__name__)

SCHEMA_VERSION = 2
TABLE_WIDTH = 132
LAYER_WIDTH = 60

Shape = tuple["int | str", ...]
"""Sizes of a tensor; a symbolic size is its name, such as "s77"."""

_LOCK = threading.Lock()


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


@dataclass(frozen=True)
class SiteRow:
    """One attention of a compiled graph and what became of it.

    Attributes:
        layer: name of the layer as in ``named_modules()`` of the compiled module.
        form: how the graph spelled the attention, such as "softmax" or "sdpa".
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
        site: number of the site within its graph.
        sdpa: the exact site was rewritten to ``F.scaled_dot_product_attention``.
        calls: the live counter of the graph, filled in by ``GraphReport``.
        failures: the live record of kernels that failed, likewise.

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
    site: int = 0
    sdpa: bool = False
    calls: Mapping[int, int] = field(default_factory=dict, repr=False, compare=False)
    failures: Mapping[int, Reason] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.decision not in ("distr", "exact"):
            raise ValueError(f"decision: got {self.decision!r}; accepted: 'distr', 'exact'")
        if self.decision == "exact" and not self.reasons:
            raise ValueError(f"{self.layer}: an exact site needs at least one reason, got none")

    @property
    def runtime_exact_calls(self) -> int:
        """Calls, up to now, in which this approximated site ran exactly.

        Because the input was short or the kernel failed. Replays of a CUDA graph are not seen.
        """
        return self.calls.get(self.site, 0)

    @property
    def runtime_reason(self) -> Reason | None:
        """Why the kernel of this approximated site failed in the latest call in which it did."""
        return self.failures.get(self.site)


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
        calls: live counter, site -> calls that ran exactly; shared with the rows.
        failures: live record, site -> why its kernel failed; shared with the rows.

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
    calls: dict[int, int] = field(default_factory=dict, repr=False, compare=False)
    failures: dict[int, Reason] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        sites = [row.site for row in self.rows]
        if len(set(sites)) != len(sites):
            raise ValueError(f"graph {self.index}: site numbers must be unique, got {sites}")
        for site in sites:
            self.calls.setdefault(site, 0)
        bound = tuple(
            replace(row, graph=self.index, calls=self.calls, failures=self.failures)
            for row in self.rows
        )
        object.__setattr__(self, "rows", bound)

    def count_exact(self, site: int, failure: str | None = None) -> None:
        """Count one call in which ``site`` ran exactly; seen by every row of the site at once.

        Args:
            site: number of the site.
            failure: what failed, where a kernel did; None for a short input.

        Raises:
            ValueError: no such site in this graph.
        """
        with _LOCK:
            if site not in self.calls:
                raise ValueError(f"site: got {site}; graph {self.index} has {sorted(self.calls)}")
            self.calls[site] += 1
            if failure is not None:
                self.failures[site] = Reason("kernel-failed", failure)

    def _placed(self, index: int, prefix: str) -> GraphReport:
        """The same graph as number ``index`` of a parent that calls its root ``prefix``."""

        def named(layer: str) -> str:
            return ".".join(part for part in (prefix, layer) if part)

        return replace(
            self,
            index=index,
            rows=tuple(replace(row, layer=named(row.layer)) for row in self.rows),
            not_attention=tuple(replace(n, layer=named(n.layer)) for n in self.not_attention),
        )


@dataclass(frozen=True, repr=False)
class Report:
    """All compiled graphs of one model; ``print`` it for the table.

    Attributes:
        parts: the graphs, in the order of compilation.
        name: what the report is about, usually the class name of the model.
    """

    parts: tuple[GraphReport, ...]
    name: str = ""

    @property
    def rows(self) -> tuple[SiteRow, ...]:
        """One row per attention, graph by graph."""
        return tuple(row for part in self.parts for row in part.rows)

    @property
    def not_attention(self) -> tuple[NotAttention, ...]:
        """One entry per softmax that is no attention, graph by graph."""
        return tuple(entry for part in self.parts for entry in part.not_attention)

    @property
    def unmatched(self) -> tuple[str, ...]:
        """Policy patterns that matched no attention in any of the graphs."""
        matched = {pattern for part in self.parts for pattern in part.matched}
        missed = _unique(pattern for part in self.parts for pattern in part.unmatched)
        return tuple(pattern for pattern in missed if pattern not in matched)

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes of all graphs, each once."""
        return _unique(note for part in self.parts for note in part.notes)

    @property
    def graphs(self) -> int:
        """Number of compiled graphs."""
        return len(self.parts)

    @property
    def found(self) -> int:
        """Number of attentions."""
        return len(self.rows)

    @property
    def distr(self) -> int:
        """Number of attentions that are approximated."""
        return sum(row.decision == "distr" for row in self.rows)

    @property
    def exact(self) -> int:
        """Number of attentions left exact."""
        return self.found - self.distr

    @property
    def flops_approximated_percent(self) -> float | None:
        """Share of all exact attention FLOPs that lies in approximated sites; None if unknown."""
        total = sum(row.flops for row in self.rows)
        if total == 0:
            return None
        return 100.0 * sum(row.flops for row in self.rows if row.decision == "distr") / total

    def summary(self) -> str:
        """The totals in one line."""
        percent = self.flops_approximated_percent
        parts = [f"{_count(self.found, 'attention')} in {_count(self.graphs, 'graph')}"]
        parts.append(f"{self.distr} distr, {self.exact} exact")
        if percent is not None:
            parts.append(f"{percent:.1f} % of attention FLOPs approximated")
        if self.not_attention:
            parts.append(f"{len(self.not_attention)} not attention")
        return "; ".join(parts)

    def table(self, fold: bool = True, width: int = TABLE_WIDTH) -> str:
        """The report as text.

        Args:
            fold: write rows that differ only in one number of the layer's name as one line,
                ``blocks.{0..11}.attn  x12``; False gives one line per site.
            width: columns the text may take; long names and reasons are wrapped.
        """
        footnotes = _Footnotes()
        blocks = [
            self.name,
            _sites_table(self.rows, fold, width, footnotes),
            _not_attention_table(self.not_attention, fold, width, footnotes),
            footnotes.text(width),
            "\n".join(_wrap(f"note: {note}", width) for note in self.notes),
            "\n".join(
                _wrap(f"unmatched: policy pattern {pattern!r} matches no attention", width)
                for pattern in self.unmatched
            ),
            self.summary(),
        ]
        return "\n\n".join(block for block in blocks if block)

    def __str__(self) -> str:
        return self.table()

    def __repr__(self) -> str:
        return f"<Report {self.name or 'of a compile'}: {self.summary()}>"

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data; run-time counters as they are now."""
        return {
            "schema": SCHEMA_VERSION,
            "name": self.name,
            "totals": {
                "found": self.found,
                "distr": self.distr,
                "exact": self.exact,
                "not_attention": len(self.not_attention),
                "graphs": self.graphs,
                "flops_approximated_percent": self.flops_approximated_percent,
            },
            "unmatched": list(self.unmatched),
            "graphs": [_plain(part) for part in self.parts],
        }

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """The report as JSON; also written to ``path``, whole or not at all.

        Raises:
            OSError: the folder of ``path`` does not exist or cannot be written.
        """
        text = json.dumps(self.to_dict(), indent=1)
        if path is not None:
            _write_whole(Path(path), text + "\n")
        return text

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Read what ``to_json`` wrote.

        Raises:
            ValueError: not JSON, another schema version, or a field missing, unknown or wrong.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"report: not JSON: {error}") from error
        version = data.get("schema") if isinstance(data, dict) else None
        if version != SCHEMA_VERSION:
            raise ValueError(
                f"report: got schema {version!r}; this version reads schema {SCHEMA_VERSION}: "
                "write the report again with to_json"
            )
        try:
            return cls(tuple(_read_graph(graph) for graph in data["graphs"]), data["name"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"report: missing, unknown or wrong field: {error}") from error


# --- the table ---------------------------------------------------------------------------------


class _Footnotes:
    """Reasons are long and repeat: a cell says ``code [1]``, the text stands once below."""

    def __init__(self) -> None:
        self.numbers: dict[Reason, int] = {}
        self.uses: dict[Reason, int] = {}

    def cite(self, reason: Reason, uses: int) -> str:
        number = self.numbers.setdefault(reason, len(self.numbers) + 1)
        self.uses[reason] = self.uses.get(reason, 0) + uses
        return f"{reason.code} [{number}]"

    def text(self, width: int) -> str:
        return "\n".join(
            _wrap(f"[{number}] {reason.text} ({self.uses[reason]}x)", width, indent=4)
            for reason, number in self.numbers.items()
        )


def _sites_table(rows: Sequence[SiteRow], fold: bool, width: int, notes: _Footnotes) -> str:
    with_graph = not fold and len({row.graph for row in rows}) > 1
    lines = []
    for layer, members in _fold([(row.layer, _said(row)) for row in rows], fold):
        row = rows[members[0]]
        line = {
            "layer": layer,
            "form": _break_name(row.form, 14),
            "shapes": _shapes_text(row.shapes),
            "dtype": row.dtype,
            "mask": row.mask,
            "decision": _decision_text(row, sum(rows[i].runtime_exact_calls for i in members)),
            "G": _width_text(row, ""),
            "estimator": _estimator_text(row),
            "reasons": "\n".join(notes.cite(reason, len(members)) for reason in _reasons(row)),
        }
        lines.append({"graph": str(row.graph), **line} if with_graph else line)
    return _fitted(lines, "layer", width)


def _reasons(row: SiteRow) -> tuple[Reason, ...]:
    """Why it is or was exact; of an approximated causal site, what its rows depend on."""
    reasons = row.reasons if row.runtime_reason is None else (*row.reasons, row.runtime_reason)
    if row.sees is None or "causal" not in row.mask:
        return reasons
    return (*reasons, Reason("sees", f"causal, and {row.estimator} sees {row.sees}"))


def _decision_text(row: SiteRow, exact_calls: int) -> str:
    if row.sdpa:
        return f"{row.decision}, sdpa"
    return f"{row.decision}\n({exact_calls}x exact)" if exact_calls else row.decision


def _estimator_text(row: SiteRow) -> str:
    if row.estimator is None:
        return "-"
    lines = [row.estimator]
    if row.rounds not in (None, 1):
        lines.append(f"rounds {row.rounds}")
    if row.grouping_block not in (None, "auto"):
        lines.append(f"block {row.grouping_block}")
    return "\n".join(lines)


def _width_text(row: SiteRow, name: str) -> str:
    """G, after ``name``, or the rank where G is no whole number."""
    return f"r={row.rank}" if row.group_size is None else f"{name}{row.group_size}"


def _said(row: SiteRow) -> Hashable:
    """Everything the table says of a row besides its layer; equal rows fold into one line."""
    return (
        *(row.form, tuple(row.shapes.items()), row.dtype, row.mask, row.decision, row.sdpa),
        *(row.group_size, row.rank, row.estimator, row.rounds, row.grouping_block, _reasons(row)),
    )


def _not_attention_table(
    entries: Sequence[NotAttention], fold: bool, width: int, notes: _Footnotes
) -> str:
    lines = []
    for layer, members in _fold([(e.layer, (e.op, e.shape, e.reason)) for e in entries], fold):
        entry = entries[members[0]]
        lines.append(
            {
                "not attention": layer,
                "op": entry.op,
                "shape": _shape_text(entry.shape),
                "reason": notes.cite(entry.reason, len(members)),
            }
        )
    return _fitted(lines, "not attention", width)


def _fitted(lines: list[dict[str, str]], name: str, width: int) -> str:
    """A table of dicts; names in column ``name`` are broken at dots as far as ``width`` asks."""
    if not lines:
        return ""
    for limit in range(LAYER_WIDTH, 11, -2):
        broken = [{**line, name: _break_name(line[name], limit)} for line in lines]
        text = _columns(broken)
        if max(map(len, text.splitlines())) <= width:
            break
    return text


def _columns(lines: list[dict[str, str]]) -> str:
    # Header and ruler as rows: tabulate pads every header by two columns more than we can spare.
    header = list(lines[0])
    columns = [[key, *(line[key] for line in lines)] for key in header]
    ruler = ["-" * max(len(part) for cell in c for part in cell.split("\n")) for c in columns]
    rows = [header, ruler, *(list(line.values()) for line in lines)]
    return tabulate(rows, tablefmt="plain", disable_numparse=True)


def _break_name(name: str, limit: int) -> str:
    """Break a name at dots and underscores into lines of about ``limit`` columns."""
    lines = [""]
    for part in re.split(r"(?<=[^.][._])(?=[^.])", name):
        if lines[-1].strip() and len(lines[-1]) + len(part) > limit:
            lines.append("  ")
        lines[-1] += part
    return "\n".join(lines)


def _shapes_text(shapes: Mapping[str, Shape]) -> str:
    """Shapes of q, k and v, equal ones said once."""
    names: dict[Shape, str] = {}
    for name, shape in shapes.items():
        names[shape] = names.get(shape, "") + name
    return "\n".join(f"{name} {_shape_text(shape)}" for shape, name in names.items())


def _shape_text(shape: Shape) -> str:
    return "[" + ",".join(map(str, shape)) + "]"


def _wrap(text: str, width: int, indent: int = 0) -> str:
    return textwrap.fill(text, max(width, 12), subsequent_indent=" " * indent)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _unique(items: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(items))


@dataclass
class _Run:
    """Layers of which the table says the same and whose names differ in one number."""

    parts: list[str]
    members: list[int]
    position: int | None = None
    numbers: list[int] = field(default_factory=list)

    def takes(self, parts: list[str], members: list[int]) -> bool:
        """Add a layer if its name fits; returns whether it did."""
        if len(parts) != len(self.parts):
            return False
        differing = [i for i, part in enumerate(parts) if part != self.parts[i]]
        if len(differing) != 1 or self.position not in (None, differing[0]):
            return False
        at = differing[0]
        if not (parts[at].isdigit() and self.parts[at].isdigit()):
            return False
        self.position = at
        self.numbers = [*(self.numbers or [int(self.parts[at])]), int(parts[at])]
        self.members.extend(members)
        return True

    def text(self) -> str:
        parts = list(self.parts)
        if self.position is not None:
            parts[self.position] = "{" + _ranges(sorted(self.numbers)) + "}"
        times = f"  x{len(self.members)}" if len(self.members) > 1 else ""
        return (".".join(parts) or "(root)") + times


def _fold(items: Sequence[tuple[str, Hashable]], fold: bool) -> list[tuple[str, list[int]]]:
    """Group (layer, what is said) pairs into lines of the table: (layer text, indices).

    Equal pairs (a module called twice) go together first, then layers that differ in one number.
    """
    if not fold:
        return [(layer or "(root)", [i]) for i, (layer, _) in enumerate(items)]
    equal: dict[tuple[str, Hashable], list[int]] = {}
    for i, item in enumerate(items):
        equal.setdefault(item, []).append(i)
    runs: dict[Hashable, list[_Run]] = {}
    ordered: list[_Run] = []
    for (layer, said), members in equal.items():
        candidates = runs.setdefault((said, len(members)), [])
        parts = layer.split(".")
        if not any(run.takes(parts, members) for run in candidates):
            candidates.append(_Run(parts, list(members)))
            ordered.append(candidates[-1])
    return [(run.text(), run.members) for run in ordered]


def _ranges(numbers: Sequence[int]) -> str:
    """``[0, 1, 2, 4]`` as ``0..2,4``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}..{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


# --- JSON --------------------------------------------------------------------------------------


_LIVE = ("calls", "failures")


def _plain(item: Any) -> Any:
    """Our dataclasses as plain data; a row's live counter becomes its number."""
    if isinstance(item, (SiteRow, GraphReport, NotAttention, Reason)):
        data = {f.name: _plain(getattr(item, f.name)) for f in fields(item) if f.name not in _LIVE}
        if isinstance(item, SiteRow):
            data["runtime_exact_calls"] = item.runtime_exact_calls
            data["runtime_reason"] = _plain(item.runtime_reason)
        return data
    if isinstance(item, (tuple, list)):
        return [_plain(part) for part in item]
    if isinstance(item, Mapping):
        return {key: _plain(part) for key, part in item.items()}
    return item


def _read_graph(data: Mapping[str, Any]) -> GraphReport:
    rows = [_read_row(row) for row in data["rows"]]
    return GraphReport(
        **{
            **data,
            "rows": tuple(rows),
            "not_attention": tuple(
                NotAttention(
                    **{**entry, "shape": tuple(entry["shape"]), "reason": Reason(**entry["reason"])}
                )
                for entry in data["not_attention"]
            ),
            **{name: tuple(data[name]) for name in ("matched", "unmatched", "notes")},
            "calls": {row.site: row.runtime_exact_calls for row in rows},
            "failures": {row.site: row.runtime_reason for row in rows if row.runtime_reason},
        }
    )


def _read_row(data: Mapping[str, Any]) -> SiteRow:
    rest = dict(data)
    calls = {rest["site"]: rest.pop("runtime_exact_calls")}
    failure = rest.pop("runtime_reason")
    failures = {} if failure is None else {rest["site"]: Reason(**failure)}
    rest["shapes"] = {name: tuple(shape) for name, shape in rest["shapes"].items()}
    rest["reasons"] = tuple(Reason(**reason) for reason in rest["reasons"])
    return SiteRow(**rest, calls=calls, failures=failures)


def _write_whole(path: Path, text: str) -> None:
    """Write beside the target and rename, so that a reader never sees half a file."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"report: cannot write {path}: there is no folder {path.parent}")
    part = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


# --- where reports are kept and shown ----------------------------------------------------------


@dataclass
class _Entry:
    """The graphs of one owner, held as long as the owner lives."""

    owner: weakref.ref[Any]
    policy: Hashable = None
    graphs: dict[Hashable, GraphReport] = field(default_factory=dict)
    warned: set[str] = field(default_factory=set)


# By identity, not by WeakKeyDictionary: code objects and some modules compare by value.
_ENTRIES: dict[int, _Entry] = {}


def record(
    owner: Any, graph: GraphReport, key: Hashable | None = None, policy: Hashable = None
) -> None:
    """Keep the report of one compiled graph for ``report``.

    Args:
        owner: the compiled ``nn.Module``, function or code object; held weakly.
        graph: what was found; it must hold no reference to the owner.
        key: names the graph among those of the owner, e.g. (frame name, input shapes). A graph
            recorded under the key of an earlier one (compiled again) replaces it; None never does.
            It must hold no reference to the owner.
        policy: the policy of the compile. With another one than the graph before, the owner's
            report starts over.

    Warns:
        DistrWarning: once per owner and pattern, for a policy pattern that matches no attention in
            any of the owner's graphs so far.
    """
    owner = _owner_of(owner)
    with _LOCK:
        entry = _ENTRIES.get(id(owner))
        if entry is None or entry.owner() is not owner or entry.policy != policy:
            entry = _Entry(weakref.ref(owner, _forget(id(owner))), policy)
            _ENTRIES[id(owner)] = entry
        entry.graphs[object() if key is None else key] = graph
        missed = set(Report(tuple(entry.graphs.values())).unmatched) - entry.warned
        entry.warned |= missed
    for pattern in graph.unmatched:
        if pattern in missed:
            warnings.warn(
                f"policy pattern {pattern!r} matches no attention of {graph.root}; the layers with "
                f"attention are listed by distr_compile.report(model)",
                DistrWarning,
                stacklevel=2,
            )


def report(obj: Any) -> Report:
    """The report of everything compiled with ``backend="distr"`` for ``obj`` up to now.

    Of one object compiled under several policies it is the report of the policy compiled last: a
    graph compiled under another policy drops those before it.

    Args:
        obj: an ``nn.Module``, what ``torch.compile`` returned for it, or a compiled or plain
            function. A module's report includes the submodules that were compiled one by one;
            their layers are named as the module names them.

    Raises:
        LookupError: nothing was compiled for ``obj``.
        TypeError: ``obj`` is neither module nor function.
    """
    owner = _owner_of(obj)
    name = owner.co_name if isinstance(owner, types.CodeType) else type(owner).__name__
    placed = []
    for prefix, part in _owners(owner):
        with _LOCK:
            entry = _ENTRIES.get(id(part))
            graphs = list(entry.graphs.values()) if entry and entry.owner() is part else []
        placed += [(prefix, graph) for graph in graphs]
    if not placed:
        raise LookupError(
            f"no report for {name}: nothing was compiled for it with backend='distr'. Compile the "
            "model with torch.compile(model, backend='distr'), call it once with real inputs, "
            "then ask for the report of that same model"
        )
    return Report(tuple(graph._placed(i, prefix) for i, (prefix, graph) in enumerate(placed)), name)


def publish(graph: GraphReport) -> None:
    """Show one compiled graph in ``TORCH_LOGS``, Dynamo's counters and the tlparse trace.

    ``TORCH_LOGS="+distr_compile"`` shows a line per site, ``TORCH_LOGS="distr_compile"`` the totals
    only. The counters are ``torch._dynamo.utils.counters["distr"]``: "found", "distr", "exact",
    "not_attention" and "reason: <code>". The trace gets an artifact named "distr_report".
    """
    # Imported here: a report can be read, and a policy checked, without loading torch.
    from torch._dynamo.utils import counters
    from torch._logging._internal import trace_structured

    whole = Report((graph,), graph.root)
    counts = counters["distr"]
    counts["found"] += whole.found
    counts["distr"] += whole.distr
    counts["exact"] += whole.exact
    counts["not_attention"] += len(whole.not_attention)
    for row in graph.rows:
        log.debug("graph %d %s", graph.index, _Line(row))
        for reason in row.reasons:
            counts[f"reason: {reason.code}"] += 1
    for entry in graph.not_attention:
        log.debug(
            "graph %d %s: %s is not attention: %s",
            *(graph.index, entry.layer or "(root)", entry.op, entry.reason),
        )
        counts[f"reason: {entry.reason.code}"] += 1
    log.info("%s: %s", graph.root, whole.summary())
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": "distr_report", "encoding": "json"},
        payload_fn=whole.to_json,
    )


class _Line:
    """One site as a line of the log, formatted only when the log is on."""

    def __init__(self, row: SiteRow) -> None:
        self.row = row

    def __str__(self) -> str:
        row = self.row
        if row.decision == "distr":
            rounds = "" if row.rounds in (None, 1) else f" in {row.rounds} rounds"
            what = f"distr, {_width_text(row, 'G = ')}, {row.estimator}{rounds}"
            what += f", block {row.grouping_block}"
        else:
            what = "exact: " + "; ".join(map(str, row.reasons))
        shapes = " ".join(_shapes_text(row.shapes).splitlines())
        return f"{row.layer or '(root)'} ({row.form}, {shapes}, {row.dtype}): {what}"


def _forget(identity: int) -> Callable[[weakref.ref[Any]], None]:
    def callback(ref: weakref.ref[Any]) -> None:
        # No lock: this may run inside a locked section of the same thread, and the pop is atomic.
        # An entry made meanwhile for a new object at the same address is not ours to drop.
        entry = _ENTRIES.get(identity)
        if entry is not None and entry.owner is ref:
            _ENTRIES.pop(identity, None)

    return callback


def _owner_of(obj: Any) -> Any:
    """The module or code object behind a module, a compiled wrapper or a function."""
    from torch.nn import Module

    while True:
        if isinstance(obj, Module):
            if "_orig_mod" not in obj._modules:
                return obj
            obj = obj._modules["_orig_mod"]
        elif isinstance(obj, types.CodeType):
            return obj
        elif hasattr(obj, "_torchdynamo_orig_callable"):
            obj = obj._torchdynamo_orig_callable
        elif isinstance(obj, functools.partial):
            obj = obj.func
        elif isinstance(obj, types.MethodType):
            obj = obj.__self__ if isinstance(obj.__self__, Module) else obj.__func__
        elif isinstance(obj, types.FunctionType):
            return obj.__code__
        else:
            raise TypeError(
                f"report: got {type(obj).__name__}; accepted: an nn.Module, a function, or what "
                "torch.compile returned for one"
            )


def _owners(owner: Any) -> Iterator[tuple[str, Any]]:
    """(name, object) of ``owner`` and, for a module, of all its submodules."""
    if isinstance(owner, types.CodeType):
        yield "", owner
        return
    for name, module in owner.named_modules():
        # A submodule replaced by its compiled wrapper keeps the name it has without the wrapper.
        yield ".".join(part for part in name.split(".") if part != "_orig_mod"), module
