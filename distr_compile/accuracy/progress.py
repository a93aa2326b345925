"""Progress on stderr while a model runs over data: a bar, or lines where there is no terminal."""

from __future__ import annotations

import time
from operator import length_hint
from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TaskID, TimeElapsedColumn

from distr_compile.accuracy import ranks
from distr_compile.accuracy.batch import Batches

LINE_S = 10.0
"""Seconds between two lines."""


def progress_bar(show: bool) -> Progress:
    """A bar that counts batches and time; lines where stderr is no terminal; or nothing."""
    show = show and ranks.is_first()
    console = Console(stderr=True)
    if show and not console.is_terminal:
        return _Lines(console=console, disable=True, auto_refresh=False)
    return Progress(
        *Progress.get_default_columns(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=not show,
    )


class _Lines(Progress):
    """Says how far a task is, every ``LINE_S``."""

    _told = time.monotonic()

    def add_task(self, *args: Any, **kwargs: Any) -> TaskID:
        """Add a task, as a bar does; the time to the next line begins."""
        self._told = time.monotonic()
        return super().add_task(*args, **kwargs)

    def update(self, task_id: TaskID, **changes: Any) -> None:  # type: ignore[override]
        """Change a task, as a bar does."""
        super().update(task_id, **changes)
        self._tell(task_id)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """Advance a task, as a bar does."""
        super().advance(task_id, advance)
        self._tell(task_id)

    def _tell(self, task_id: TaskID) -> None:
        if time.monotonic() - self._told < LINE_S:
            return
        self._told = time.monotonic()
        task = self._tasks[task_id]
        whole = "" if task.total is None else f" of {task.total:.0f}"
        text = f"{task.description}: {task.completed:.0f}{whole}, {task.elapsed or 0:.0f} s"
        self.console.print(text, highlight=False, markup=False)


def total(batches: Batches, limit: int | None = None) -> int | None:
    """How many batches ``batch.walk`` will give, at most; None if nothing tells."""
    # A data loader over a stream has a __len__ that raises; length_hint takes that for unknown.
    return min((count for count in (length_hint(batches), limit) if count), default=None)
