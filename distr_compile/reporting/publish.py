"""Shows a compiled graph where people look: ``TORCH_LOGS``, Dynamo's counters and tlparse."""

from __future__ import annotations

import logging

from distr_compile.reporting import table
from distr_compile.reporting.rows import GraphReport, SiteRow
from distr_compile.reporting.summary import Report

log = logging.getLogger(__name__)


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
        return table.line_of(self.row)
