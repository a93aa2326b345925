"""``distr measure``: what is faster on this machine, for every attention of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from distr_compile.accuracy.progress import progress_bar
from distr_compile.explaining import explain_by
from distr_compile.lowering.call import Approximation, Shape
from distr_compile.lowering.judge import Judge
from distr_compile.lowering.measure import DISTR, EXACT, SDPA, Measured, Race
from distr_compile.lowering.spelling import spelled
from distr_compile.policy import Policy
from distr_compile.reporting import Report, SiteRow

Call = tuple[Shape, "Approximation | None"]


class Asking(Judge):
    """Notes what is asked and measures nothing."""

    def __init__(self) -> None:
        super().__init__(may_measure=False)
        self.asked: dict[str, Call] = {}

    def __call__(
        self, shape: Shape, approximation: Approximation | None, *, ours: bool = True
    ) -> Measured | str:
        """What is stored, if anything; the call is noted in ``asked`` by its text."""
        self.asked[spelled(shape, approximation)] = (shape, approximation)
        return super().__call__(shape, approximation, ours=ours)


@dataclass(frozen=True)
class Measurements:
    """What was measured.

    Attributes:
        calls: the text of each different call -> what was found, or why nothing was.
        report: of the model, after everything was measured; None without a model.
    """

    calls: Mapping[str, Measured | str]
    report: Report | None = None

    def __str__(self) -> str:
        """A table with a line for each call; times are of the whole call, in ms."""
        lines = []
        for text, found in self.calls.items():
            if isinstance(found, str):
                lines.append([text, "-", "-", "-", f"not measured: {found}"])
                continue
            times = [
                f"{1e3 * found.seconds[arm]:.3g}" if arm in found.seconds else "-"
                for arm in (SDPA, EXACT, DISTR)
            ]
            lines.append([text, *times, chosen(found)])
        headers = ["call", "sdpa", "exact", "distr", "chosen"]
        return tabulate(lines, headers, disable_numparse=True, maxcolwidths=[70, *[None] * 4])

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold: times in seconds."""
        return {
            text: {"not_measured": found}
            if isinstance(found, str)
            else {"chosen": chosen(found), **asdict(found)}
            for text, found in self.calls.items()
        }


def chosen(found: Measured) -> str:
    """Who computes such a call under "auto", with the ratio that decided."""
    if found.prefers_distr:
        return _by(DISTR, found.distr)
    return _by(EXACT, found.exact) if found.prefers_ours else SDPA


def _by(name: str, race: Race | None) -> str:
    return name if race is None else f"{name} ({race.kernel}, {race.gain:.2f}x)"


def measure_calls(calls: Sequence[Call], progress: bool = True) -> Measurements:
    """Measure calls, each for as long as it takes, and keep what is found.

    Args:
        calls: shapes with an approximation each, or None for exact attention.
        progress: show a bar on the terminal's stderr.
    """
    judge = Judge(call_limit=None, limit=None)
    with progress_bar(progress) as bar:
        return Measurements(
            {
                spelled(shape, approximation): judge(shape, approximation)
                for shape, approximation in bar.track(calls, description="measuring")
            }
        )


@torch.no_grad()
def measure_model(
    model: nn.Module | Callable[..., Any],
    *args: Any,
    policy: str | PathLike[str] | Policy | Mapping[str, Any] | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> Measurements:
    """Measure every call that ``model(*args, **kwargs)`` makes and whose policy says "auto".

    Args:
        model: a module or a function; nothing of it is compiled.
        *args: its arguments.
        policy: as ``explain`` takes it.
        progress: show a bar on the terminal's stderr.
        **kwargs: its keyword arguments.

    Raises:
        PolicyError: the policy is wrong.
    """
    known: dict[str, Measured | str] = {}
    asking = Asking()
    while True:  # where the approximation is slower, exact attention is asked about next
        report = explain_by(lambda: asking, model, args, kwargs, policy)
        new = [call for text, call in asking.asked.items() if text not in known]
        if not new:
            break
        known |= measure_calls(new, progress).calls
    # What is known of an approximation says how fast exact attention is, too.
    narrow = {shape for shape, approximation in asking.asked.values() if approximation is not None}
    said = {
        text: known[text]
        for text, (shape, approximation) in asking.asked.items()
        if approximation is not None or shape not in narrow
    }
    return Measurements(said, report)


def pinned(policy: Policy, report: Report) -> Policy:
    """The policy with what was measured as ``min_seq_len``, in a rule for each layer.

    The length itself where the approximation was chosen, and one more where it was not. Of several
    lengths of a layer the least from which on it was chosen at each.
    """
    lengths: dict[str, list[tuple[int, bool]]] = {}
    for row in report.rows:
        length = _pin(row)
        if length is not None:
            lengths.setdefault(row.layer, []).append((length, row.decision == "distr"))
    for layer, found in lengths.items():
        least = max((length for length, is_chosen in found if not is_chosen), default=0)
        chosen = [length for length, is_chosen in found if is_chosen and length >= least]
        length = min(chosen, default=least)
        # A function has no layers: what it has stands in [default].
        changed = policy.with_rule if layer else policy.with_default
        policy = changed(*[layer] * bool(layer), min_seq_len=length)
    return policy


def _pin(row: SiteRow) -> int | None:
    """The least length to approximate from; None where no measurement decided."""
    tokens = [size for name in ("q", "k") for size in row.shapes.get(name, ())[2:3]]
    numbers = [size for size in tokens if isinstance(size, int)]
    if row.decision == "distr" and row.measured is not None:
        return row.min_seq_len or min(numbers, default=0)
    if any(reason.code == "not-faster" for reason in row.reasons):
        return min(numbers) + 1 if numbers else None
    return None
