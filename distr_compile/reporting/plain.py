"""Rows as plain data, for JSON, and back."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from distr_compile.reporting.rows import GraphReport, Handover, NotAttention, Reason, SiteRow, Way

_LIVE = ("calls", "handed", "called")


_HANDED = ("runtime_reason", "runtime_kernel", "runtime_backward_reason", "runtime_backward")


def to_plain(item: Any) -> Any:
    """Our dataclasses as plain data; a row's live counter becomes its number."""
    if isinstance(item, (SiteRow, GraphReport, NotAttention, Reason)):
        data = {
            f.name: to_plain(getattr(item, f.name)) for f in fields(item) if f.name not in _LIVE
        }
        if isinstance(item, SiteRow):
            data["runtime_exact_calls"] = item.runtime_exact_calls
            data["runtime_calls"] = item.runtime_calls
            for name in _HANDED:
                data[name] = to_plain(getattr(item, name))
        return data
    if isinstance(item, (tuple, list)):
        return [to_plain(part) for part in item]
    if isinstance(item, Mapping):
        return {key: to_plain(part) for key, part in item.items()}
    return item


def read_graph(data: Mapping[str, Any]) -> GraphReport:
    """A graph from what ``to_plain`` wrote; a wrong field is a Key-, Type- or AttributeError."""
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
            "called": {row.site: n for row in rows if (n := row.runtime_calls) is not None},
            "handed": {key: one for row in rows for key, one in row.handed.items()},
        }
    )


def _read_row(data: Mapping[str, Any]) -> SiteRow:
    rest = dict(data)
    calls = {rest["site"]: rest.pop("runtime_exact_calls")}
    number = rest.pop("runtime_calls")
    called = {} if number is None else {rest["site"]: number}
    handed: dict[tuple[int, Way], Handover] = {}
    reason, by, backward_reason, backward = (rest.pop(name) for name in _HANDED)
    if reason is not None:
        handed[rest["site"], "forward"] = Handover(Reason(**reason), by)
    if backward_reason is not None:
        handed[rest["site"], "backward"] = Handover(Reason(**backward_reason), backward, "backward")
    rest["shapes"] = {name: tuple(shape) for name, shape in rest["shapes"].items()}
    rest["reasons"] = tuple(Reason(**reason) for reason in rest["reasons"])
    return SiteRow(**rest, calls=calls, handed=handed, called=called)


def write_whole(path: Path, text: str) -> None:
    """Write beside the target and rename, so that a reader never sees half a file."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"report: cannot write {path}: there is no folder {path.parent}")
    if path.is_dir():
        message = (
            f"report: cannot write {str(path)!r}, a folder; accepted: the path of a file; give one"
        )
        raise IsADirectoryError(message)
    part = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
