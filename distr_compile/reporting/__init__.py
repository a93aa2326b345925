"""What was found in each compiled graph, what was decided there, and why.

The graphs of one model make a ``Report``: the table a user prints. ``record`` keeps the graphs of a
compile, ``report`` finds them again.
"""

from distr_compile.reporting.registry import record, report
from distr_compile.reporting.rows import (
    DistrWarning,
    GraphReport,
    Handover,
    NotAttention,
    Reason,
    SiteRow,
)
from distr_compile.reporting.summary import Report

__all__ = [
    "DistrWarning",
    "GraphReport",
    "Handover",
    "NotAttention",
    "Reason",
    "Report",
    "SiteRow",
    "record",
    "report",
]
