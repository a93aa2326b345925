"""The graphs of one model together: totals, the table, JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distr_compile.reporting import plain, table
from distr_compile.reporting.rows import CALLED, OUTSIDE_BLOCKS, GraphReport, NotAttention, SiteRow

SCHEMA_VERSION = 5


@dataclass(frozen=True, repr=False)
class Report:
    """All compiled graphs of one model; ``print`` it for the table.

    Attributes:
        parts: the graphs, in the order of compilation.
        name: what the report is about, usually the class name of the model.
        graphs_without_attention: number of further graphs that were compiled and have neither
            attention nor anything like it.
        skipped: sentences about code that PyTorch made no graph of, as far as that is known.
    """

    parts: tuple[GraphReport, ...]
    name: str = ""
    graphs_without_attention: int = 0
    skipped: tuple[str, ...] = ()

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
        """Notes of all graphs, each once, and what was skipped."""
        return _unique([*(note for part in self.parts for note in part.notes), *self.skipped])

    @property
    def graphs(self) -> int:
        """Number of compiled graphs that have an entry here; those without attention have none."""
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
        """Say the totals in one line."""
        if not self.parts and self.graphs_without_attention:
            return f"no attention in {table.count(self.graphs_without_attention, 'compiled graph')}"
        percent = self.flops_approximated_percent
        graphs = table.count(sum(map(_is_graph, self.parts)), "graph")
        called = sum(len(part.rows) for part in self.parts if _is_called(part))
        where = f" in {graphs}"
        if called:
            where = f"{where}, {called} of them" if called < self.found else ""
            where += " called without a graph"
        parts = [table.count(self.found, "attention") + where]
        parts.append(f"{self.distr} distr, {self.exact} exact")
        if percent is not None:
            parts.append(f"{percent:.1f} % of attention FLOPs approximated")
        if self.not_attention:
            parts.append(f"{len(self.not_attention)} not attention")
        return "; ".join(parts)

    def table(self, fold: bool = True, width: int = table.WIDTH) -> str:
        """Return the report as text.

        Args:
            fold: write rows that differ only in one number of the layer's name as one line,
                ``blocks.{0..11}.attn  x12``; False gives one line per site.
            width: columns the text may take; long names and reasons are wrapped.
        """
        footnotes = table.Footnotes()
        blocks = [
            self.name,
            table.sites_table(self.rows, fold, width, footnotes),
            table.not_attention_table(self.not_attention, fold, width, footnotes),
            footnotes.text(width),
            "\n".join(table.wrap(f"note: {note}", width) for note in self.notes),
            "\n".join(
                table.wrap(f"unmatched: policy pattern {pattern!r} matches no attention", width)
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
        """Return the report as plain data; run-time counters are as they are now."""
        return {
            "schema": SCHEMA_VERSION,
            "name": self.name,
            "totals": {
                "found": self.found,
                "distr": self.distr,
                "exact": self.exact,
                "not_attention": len(self.not_attention),
                "graphs": self.graphs,
                "graphs_without_attention": self.graphs_without_attention,
                "flops_approximated_percent": self.flops_approximated_percent,
            },
            "unmatched": list(self.unmatched),
            "skipped": list(self.skipped),
            "graphs": [plain.to_plain(part) for part in self.parts],
        }

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the report as JSON; it is also written to ``path``, whole or not at all.

        Raises:
            OSError: the folder of ``path`` does not exist or cannot be written.
        """
        text = json.dumps(self.to_dict(), indent=1)
        if path is not None:
            plain.write_whole(Path(path), text + "\n")
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
            return cls(
                tuple(plain.read_graph(graph) for graph in data["graphs"]),
                data["name"],
                data["totals"]["graphs_without_attention"],
                tuple(data["skipped"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"report: missing, unknown or wrong field: {error}") from error


def _is_graph(part: GraphReport) -> bool:
    """Whether something was compiled; what modules called themselves, or ran as it is, was not."""
    outside = {reason.code for row in part.rows for reason in row.reasons} & {OUTSIDE_BLOCKS}
    return not outside and not _is_called(part)


def _is_called(part: GraphReport) -> bool:
    return bool(part.rows) and all(row.form == CALLED for row in part.rows)


def _unique(items: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(items))
