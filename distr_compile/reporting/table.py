"""Rows as text: one line for layers of which the same is said, reasons as numbered footnotes."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from tabulate import tabulate

from distr_compile.reporting.rows import NotAttention, Reason, Shape, SiteRow

WIDTH = 132
LAYER_WIDTH = 60


class Footnotes:
    """Reasons are long and repeat: a cell says ``code [1]``, the text stands once below."""

    def __init__(self) -> None:
        self.numbers: dict[Reason, int] = {}
        self.uses: dict[Reason, int] = {}

    def cite(self, reason: Reason, uses: int) -> str:
        """The code and number of a reason that ``uses`` rows have."""
        number = self.numbers.setdefault(reason, len(self.numbers) + 1)
        self.uses[reason] = self.uses.get(reason, 0) + uses
        return f"{reason.code} [{number}]"

    def text(self, width: int) -> str:
        """The texts of all reasons cited, one below the other."""
        return "\n".join(
            wrap(f"[{number}] {reason.text} ({self.uses[reason]}x)", width, indent=4)
            for reason, number in self.numbers.items()
        )


def sites_table(rows: Sequence[SiteRow], fold: bool, width: int, notes: Footnotes) -> str:
    """The table of attentions; empty without any."""
    with_graph = not fold and len({row.graph for row in rows}) > 1
    with_mode = len({row.mode for row in rows}) > 1
    with_times = any(row.measured for row in rows)
    with_calls = any(row.runtime_calls is not None for row in rows)
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
        if with_calls:
            line["calls"] = "-" if row.runtime_calls is None else str(row.runtime_calls)
        if with_times:
            line["measured"] = _times_text(row)
        if with_mode:
            line = {"mode": row.mode.replace(", ", ",\n"), **line}
        if with_graph:
            line = {"graph": str(row.graph), **line}
        lines.append(line)
    return _fitted(lines, "layer", width)


def _reasons(row: SiteRow) -> tuple[Reason, ...]:
    """Why it is or was exact; of an approximated causal site, what its rows depend on."""
    at_run_time = (row.runtime_reason, row.runtime_backward_reason)
    reasons = (*row.reasons, *(reason for reason in at_run_time if reason is not None))
    if row.sees is None or "causal" not in row.mask:
        return reasons
    return (*reasons, Reason("sees", f"causal, and {row.estimator} sees {row.sees}"))


def _decision_text(row: SiteRow, exact_calls: int) -> str:
    lines: list[str] = [row.decision]
    if row.decision == "exact" and row.kernel is not None:
        lines = [f"exact, {row.kernel}"]
    if row.runtime_kernel is not None:
        lines.append(f"(ran: {row.runtime_kernel})")
    if row.backward is not None:
        lines.append(f"backward {row.backward}")
    if row.runtime_backward is not None:
        lines.append(f"(ran: {row.runtime_backward})")
    if row.sharding is not None:
        lines += textwrap.wrap(row.sharding, 24)
    if exact_calls:
        lines.append(f"({exact_calls}x exact)")
    return "\n".join(lines)


def _times_text(row: SiteRow) -> str:
    """Times of the candidates, one below the other."""
    found = row.measured or {}
    return "\n".join(
        f"{name} {1e3 * found[name]:.3g} ms" for name in ("sdpa", "exact", "distr") if name in found
    )


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
        *(row.mode, row.form, tuple(row.shapes.items()), row.dtype, row.mask, row.runtime_calls),
        *(row.decision, row.kernel, row.backward, row.sharding, _times_text(row)),
        *(row.runtime_kernel, row.runtime_backward),
        *(row.group_size, row.rank, row.estimator, row.rounds, row.grouping_block, _reasons(row)),
    )


def not_attention_table(
    entries: Sequence[NotAttention], fold: bool, width: int, notes: Footnotes
) -> str:
    """The table of what is no attention; empty without any."""
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


def wrap(text: str, width: int, indent: int = 0) -> str:
    """Break a text into lines, the second and further ones indented."""
    further = " " * indent
    # Names of files are kept whole.
    return textwrap.fill(text, max(width, 12), subsequent_indent=further, break_on_hyphens=False)


def count(number: int, noun: str) -> str:
    """A number and its noun, such as "2 graphs"."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


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


def line_of(row: SiteRow) -> str:
    """One site as a line of the log."""
    if row.decision == "distr":
        rounds = "" if row.rounds in (None, 1) else f" in {row.rounds} rounds"
        what = f"distr, {_width_text(row, 'G = ')}, {row.estimator}{rounds}"
        what += f", block {row.grouping_block}"
        what += "" if row.backward is None else f", backward {row.backward}"
        what += "" if row.sharding is None else f", {row.sharding}"
    else:
        what = "exact: " + "; ".join(map(str, row.reasons))
    shapes = " ".join(_shapes_text(row.shapes).splitlines())
    return f"{row.layer or '(root)'} ({row.form}, {shapes}, {row.dtype}): {what}"
