"""The bar on stderr while a model runs over data."""

from __future__ import annotations

from operator import length_hint

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

from distr_compile.accuracy.batch import Batches


def progress_bar(show: bool) -> Progress:
    """A bar that counts batches and time, or one that shows nothing."""
    return Progress(
        *Progress.get_default_columns(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        disable=not show,
    )


def total(batches: Batches, limit: int | None = None) -> int | None:
    """How many batches ``batch.walk`` will give, at most; None if nothing tells."""
    # A data loader over a stream has a __len__ that raises; length_hint takes that for unknown.
    return min((count for count in (length_hint(batches), limit) if count), default=None)
