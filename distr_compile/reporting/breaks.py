"""Where Dynamo broke off: graph breaks, frames it gave up, code it was told to leave alone.

Nothing is hooked into. Three things are read that PyTorch keeps anyway (2.11 to 2.14):

* ``graph_break_reasons``: every graph break since the last reset, with its reason and stack;
* ``get_compilation_metrics()``: the last 64 attempts to compile a frame. One that failed has an
  error and the place of its function; one at a recompile limit only the number of its frame;
* ``_torchdynamo_disable``: the mark that ``torch.compiler.disable`` leaves on a function.

All of it is private. What is missing is not reported; nothing here raises.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from distr_compile.naming import canonical

_ADVICE = (
    'TORCH_LOGS="graph_breaks" shows all breaks, torch.compile(fullgraph=True) makes them errors'
)
_SUPPRESSED = ("Unsupported", "UserError")
"""Errors after which Dynamo runs the frame as it is; others it raises, unless told not to."""
_OUTSIDE = "runs as it is, exactly, and attention in it is not in this report"


class Place(NamedTuple):
    """A line of Python code."""

    file: str
    line: int


def break_before(places: Iterable[tuple[str, int]], own: Any) -> str:
    """Why a graph does not begin earlier, and what to do about it.

    Args:
        places: files and lines at which the graph's code is entered, the nearest first: where a
            resumed function goes on, or the lines of its callers.
        own: ``compile_subgraph_reason`` of the graph, which is about its end.

    Returns:
        Sentences: where the break is, Dynamo's reason and its hints, as far as they are known.
    """
    if str(getattr(own, "reason", "")).startswith("DDPOptimizer"):
        return f"{own.reason}"
    breaks = [one for one in reversed(_graph_breaks()) if one.raw is not own]
    for place in places:
        for one in breaks:
            if place in one.stack:
                at = f"The graph break before it is at {one.at}"
                return f"{at}: {_first_line(one.text)}.{_advice_of(one.text)} {_ADVICE}"
    if not breaks:
        told = "or the scores are an input of what is compiled: no break is known"
        return f"A graph break lies between them, {told}. {_ADVICE}"
    return f"A graph break lies between them. {_ADVICE}"


def skipped(owner: Any) -> tuple[str, ...]:
    """Sentences about the code of ``owner`` that Dynamo made no graph of, as far as that is known.

    Args:
        owner: an ``nn.Module``, a code object, or another callable.
    """
    code_of, forwards = _finder(owner), _disabled_forwards(owner)
    calls, frames = _disabled_calls(code_of, forwards), _given_up(code_of)
    return tuple(dict.fromkeys([*_dynamo_is_off(), *forwards.values(), *calls, *frames]))


def passed_over(owner: Any) -> list[str]:
    """Lines on why nothing was compiled for ``owner``, as far as that is known.

    Args:
        owner: an ``nn.Module``, a code object, or another callable.
    """
    found, kind = [f"PyTorch tells: {sentence}" for sentence in skipped(owner)], type(owner)
    in_place = getattr(owner, "_compiled_call_impl", None) is not None
    if in_place and kind.__module__.startswith("torch.nn."):
        found.append(
            f"{kind.__name__} is a class of torch.nn, and .compile() of such a module compiles "
            "nothing in some versions of torch, with any backend, 2.11 among them: use what "
            "torch.compile(model, backend='distr') returns, or compile a module of your own "
            "around it"
        )
    return found


def _dynamo_is_off() -> Iterator[str]:
    with contextlib.suppress(ImportError, AttributeError):
        from torch._dynamo import config

        if config.disable:
            yield (
                "torch._dynamo.config.disable is set (TORCH_COMPILE_DISABLE=1 or "
                "TORCHDYNAMO_DISABLE=1): torch.compile does nothing"
            )


def _disabled_forwards(owner: Any) -> dict[str, str]:
    """Marked forward methods: name of the function -> a sentence with the layers it belongs to."""
    from torch.nn import Module

    if not isinstance(owner, Module):
        return {}
    layers: dict[str, list[str]] = {}
    shown = canonical(owner)
    for name, module in owner.named_modules():
        forward = getattr(module, "forward", None)
        if getattr(forward, "_torchdynamo_disable", False) is True:
            function = getattr(forward, "__qualname__", "forward")
            layers.setdefault(function, []).append(shown[name] or "(root)")
    return {
        function: f"{', '.join(names)}: {function}() is marked with torch.compiler.disable; it "
        f"{_OUTSIDE}"
        for function, names in layers.items()
    }


def _disabled_calls(code_of: _Finder, known: Iterable[str]) -> Iterator[str]:
    """Calls of marked functions, but for those ``known``."""
    for one in _graph_breaks():
        if "torch.compiler.disable" not in _first_line(one.text) or not one.stack:
            continue
        called = re.search(r"<function (\S+) at", one.text)
        if (called and called[1] in known) or code_of(one.stack[0]) is None:
            continue
        what = f"{called[1]}()" if called else "a function"
        yield (f"{one.at} calls {what}, which is marked with torch.compiler.disable: it {_OUTSIDE}")


def _given_up(code_of: _Finder) -> Iterator[str]:
    """Frames that Dynamo tried to compile and gave up."""
    frames: dict[str, Place] = {}
    failed: dict[tuple[Place, str], str] = {}
    for attempt in _attempts():
        # A recompile limit is noticed before the record gets a place, but the frame has its number.
        if attempt.place is not None:
            frames[attempt.frame] = attempt.place
        place = frames.get(attempt.frame)
        if place is None:
            continue
        if not attempt.error:  # with fullgraph=True an error before was raised, and is mended
            failed.pop((place, attempt.name), None)
        elif not attempt.is_raised and (code := code_of(place)) is not None:
            failed[place, attempt.name] = _why(code, attempt)
    yield from failed.values()


def _why(code: _Code, attempt: _Attempt) -> str:
    first = _first_line(attempt.error)
    if "recompile limit" in first.lower():
        return (
            f"Dynamo reached a recompile limit in {code}: with further shapes or for further "
            f"layers it {_OUTSIDE}. Raise torch._dynamo.config.recompile_limit or "
            "accumulated_recompile_limit"
        )
    what = f"Dynamo gave up {code}{attempt.at}: {first}"
    return f"{what}. What it computes itself {_OUTSIDE}.{_advice_of(attempt.error)}"


# --- what PyTorch keeps --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Break:
    """A graph break: PyTorch's own record, its text, and the stack, outermost frame first."""

    raw: Any
    text: str
    stack: tuple[Place, ...]

    @property
    def at(self) -> str:
        return f"{self.stack[-1].file}:{self.stack[-1].line}"


def _graph_breaks() -> list[_Break]:
    try:
        from torch._dynamo.utils import graph_break_reasons
    except ImportError:
        return []
    return [
        _Break(
            one,
            str(getattr(one, "reason", "")),
            tuple(Place(f.filename, f.lineno or 0) for f in getattr(one, "user_stack", None) or ()),
        )
        for one in graph_break_reasons
    ]


@dataclass(frozen=True)
class _Attempt:
    """One attempt to compile a frame.

    Attributes:
        frame: number of the frame, the same for each attempt.
        place: its function; None for one that is at a recompile limit.
        name: of its function.
        error: text of the error, empty if there was none.
        at: where in the user's code, for a sentence.
        is_raised: the error was not suppressed, the user saw it.
    """

    frame: str
    place: Place | None
    name: str
    error: str
    at: str
    is_raised: bool


def _attempts() -> list[_Attempt]:
    """Attempts to compile since the last reset, after which Dynamo numbers from 0/0 again."""
    try:
        from torch._dynamo import config
        from torch._dynamo.utils import get_compilation_metrics
    except ImportError:
        return []
    suppresses = getattr(config, "suppress_errors", False)
    attempts: list[_Attempt] = []
    for record in get_compilation_metrics():
        has = functools.partial(getattr, record)
        number, file = str(has("compile_id", "")), has("co_filename", None)
        if number == "0/0":
            attempts.clear()
        failed_in = has("fail_user_frame_filename", None)
        attempts.append(
            _Attempt(
                number.rpartition("/")[0],
                Place(file, has("co_firstlineno", None) or 0) if file else None,
                str(has("co_name", "")),
                has("fail_reason", None) or "",
                f" at {failed_in}:{has('fail_user_frame_lineno', '?')}" if failed_in else "",
                not suppresses and has("fail_type", None) not in _SUPPRESSED,
            )
        )
    return attempts


def _first_line(text: str) -> str:
    """The first line, with the one after a colon."""
    return re.sub(r":\s*\n\s*", ": ", text.strip(), count=1).partition("\n")[0].rstrip(".")


def _advice_of(text: str) -> str:
    """Dynamo's own first hint, which is the one for the case at hand."""
    hint = re.search(r"^ *Hint: (.+)$", text, flags=re.MULTILINE)
    return f" {hint[1]}" if hint else ""


# --- the code of a model -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Code:
    """A function and the lines that belong to it, those of functions within it included."""

    name: str
    file: str
    first: int
    last: int

    def __str__(self) -> str:
        return f"{self.name}() ({self.file}:{self.first})"

    def holds(self, place: Place) -> bool:
        return place.file == self.file and self.first <= place.line <= self.last


_Finder = Callable[[Place], "_Code | None"]


def _finder(owner: Any) -> _Finder:
    """Finds the function of ``owner`` that a line belongs to; they are listed when one is asked."""
    codes: list[_Code] = []

    def find(place: Place) -> _Code | None:
        if not codes:
            codes.extend(_codes(owner))
        return next((code for code in codes if code.holds(place)), None)

    return find


def _codes(owner: Any) -> Iterator[_Code]:
    """The code object itself, or all methods of a module and of its submodules."""
    if isinstance(owner, types.CodeType):
        yield _Code(owner.co_name, owner.co_filename, owner.co_firstlineno, _last_line(owner))
        return
    from torch.nn import Module

    if not isinstance(owner, Module):
        call = getattr(type(owner).__call__, "__code__", None)
        if call is not None:
            yield from _codes(call)
        return
    classes = {
        base
        for module in owner.modules()
        for base in type(module).__mro__
        if issubclass(base, Module) and base is not Module
    }
    for base in classes:
        for name, member in vars(base).items():
            function = inspect.unwrap(getattr(member, "__func__", member))
            code = getattr(function, "__code__", None)
            if isinstance(code, types.CodeType):
                yield _Code(
                    f"{base.__name__}.{name}",
                    *(code.co_filename, code.co_firstlineno, _last_line(code)),
                )


def _last_line(code: types.CodeType) -> int:
    own = [line for *_, line in code.co_lines() if line is not None]
    inner = [_last_line(const) for const in code.co_consts if isinstance(const, types.CodeType)]
    return max([code.co_firstlineno, *own, *inner])
