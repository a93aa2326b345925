"""What several subcommands share: exit codes, errors, parsers of arguments, the model to look at.

Nothing here loads torch before a model is built: checking a policy does not need it.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from distr_compile.policy import PolicyError

if TYPE_CHECKING:
    from distr_compile.targets import Target

# Exit codes: fine; an error was found; the command was written wrongly; a policy that asks outright
# for approximated attention had no call that took it.
OK, FOUND_ERROR, USAGE, IDLE = 0, 1, 2, 3

TARGET_HELP = "timm:NAME, hf:NAME (model type, config.json or hub name) or pkg.module:factory"
DTYPES = ("float32", "float16", "bfloat16")


def add_parser(
    commands: Any, common: argparse.ArgumentParser, name: str, *, help: str, more: str, example: str
) -> argparse.ArgumentParser:
    """A subcommand with a description and an example in its help."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        parents=[common],
        help=help,
        description=f"{help[0].upper()}{help[1:]}. {more}".replace("%%", "%"),
        epilog=f"example:\n  {example}",
        formatter_class=_Help,
    )
    return parser


class _Help(argparse.RawDescriptionHelpFormatter):
    """The description is wrapped, the example stays as it is written."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith("example:"):
            return super()._fill_text(text, width, indent)
        return argparse.HelpFormatter._fill_text(self, text, width, indent)


def add_idle_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--allow-exact``; see ``IDLE``."""
    parser.add_argument(
        "--allow-exact",
        action="store_true",
        help="exit with 0, not 3, where a policy sets group_size >= 2 or a rank from an explicit "
        "min_seq_len on and no call took it",
    )


def idle(names: Iterable[str]) -> int:
    """Say which policies asked in vain, and return the exit code."""
    for name in names:
        print(
            f"distr: {name}: got a group_size >= 2 or a rank with an explicit min_seq_len, and no "
            "call took it; accepted: a policy that approximates something here; distr explain "
            "says why, --allow-exact accepts it",
            file=sys.stderr,
        )
    return IDLE


class CommandError(Exception):
    """A message for the user and the exit code that goes with it."""

    def __init__(self, message: str, code: int = FOUND_ERROR) -> None:
        super().__init__(message)
        self.code = code


def shape(text: str) -> tuple[int, ...]:
    """Sizes, written 2,128 or 2x128."""
    if not re.fullmatch(r"[1-9]\d*([,x][1-9]\d*)*", text):
        raise argparse.ArgumentTypeError(f"got {text!r}; accepted: positive sizes such as 2,128")
    return tuple(map(int, re.split("[,x]", text)))


def count(text: str) -> int:
    """A number of batches, examples or tokens."""
    if not re.fullmatch(r"[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"got {text!r}; accepted: a number >= 1")
    return int(text)


def amount(text: str) -> float:
    """A finite number that is not negative."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"got {text!r}; accepted: a number >= 0 such as 0.02")
    return number


def check_files(**files: str | None) -> None:
    """Tell before anything is built which file could not be written.

    Args:
        **files: what is to be written, by the option that names it, without its dashes.

    Raises:
        CommandError: a folder, or a file in a folder that is not there.
    """
    from distr_compile.accuracy.given import check_folder

    for option, path in files.items():
        if path is not None:
            try:
                check_folder(path, f"--{option}")
            except ValueError as error:
                raise CommandError(str(error), USAGE) from None


def imported(text: str, option: str) -> Any:
    """The object that ``pkg.module:name`` names.

    Raises:
        CommandError: it is written in another way, or there is none.
    """
    module_name, _, name = text.partition(":")
    accepted = "pkg.module:name of a function"
    if not all(map(str.isidentifier, [*module_name.split("."), name])):
        message = f"{option}: got {text!r}; accepted: {accepted}; write the module's whole name"
        raise CommandError(message, USAGE)
    if os.getcwd() not in sys.path:  # a console script, unlike python -m, does not see the folder
        sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module_name), name)
    except (ModuleNotFoundError, AttributeError) as error:
        raise CommandError(f"{option}: got {text!r}: {error}; accepted: {accepted}") from error


def add_model_arguments(parser: argparse._ActionsContainer) -> None:
    """Add what says how a target is built and looked at, to a parser or one of its groups.

    ``build_model`` reads it.
    """
    parser.add_argument("--shape", type=shape, help="main input, batch first: 2,3,224,224")
    parser.add_argument("--dtype", choices=DTYPES, help="of the model")
    parser.add_argument("--attn", choices=("eager", "sdpa"), help="how the model spells attention")
    parser.add_argument("--policy", metavar="FILE", help="policy file (default: $DISTR_POLICY)")
    parser.add_argument("--dynamic", action="store_true", help="symbolic sizes")


def build_model(options: argparse.Namespace) -> Target:
    """The target that was asked for, with inputs that fit it.

    Raises:
        CommandError: it cannot be built, or its inputs do not fit.
    """
    target = build(options.target, options.shape, options.dtype, options.attn)
    check_inputs(target)
    return target


def symbolic_sizes(options: argparse.Namespace) -> AbstractContextManager[Any]:
    """A context in which every size is symbolic, if ``--dynamic`` asks for it."""
    import torch._dynamo.config as dynamo

    return dynamo.patch(assume_static_by_default=False) if options.dynamic else nullcontext()


def build(
    name: str,
    shape: tuple[int, ...] | None = None,
    dtype: str | None = None,
    attn: str | None = None,
) -> Target:
    """The model a target names; see ``targets.build``.

    Raises:
        CommandError: it cannot be built.
    """
    from distr_compile import targets

    kind = targets.DTYPES[dtype] if dtype else None
    try:
        return targets.build(name, shape=shape, dtype=kind, attn=attn)
    except targets.TargetSyntaxError as error:
        raise CommandError(str(error), USAGE) from error
    except targets.TargetError as error:
        raise CommandError(str(error)) from error


def check_inputs(target: Target) -> None:
    """Refuse a target whose inputs do not fit its model."""
    problem = target.input_problem()
    if problem:
        raise CommandError(problem)


Call = tuple[str, Sequence[Any], Mapping[str, Any]]
"""What a message calls the inputs, and the arguments."""


@contextmanager
def in_its_own_words(
    name: str, model: Any, calls: Callable[[], Iterable[Call]], advice: str, *, debug: bool
) -> Iterator[None]:
    """Where the model itself cannot take its inputs, say what it says, and no more.

    Nothing is run unless an error came out of PyTorch.

    Args:
        name: the target.
        model: it is run on each call, until it fails, to see whether it does without us, too.
        calls: gives the inputs that it had.
        advice: what to do about wrong ones.
        debug: show what PyTorch logs of a call that fails: frames of its own.

    Raises:
        CommandError: the model fails. Any other error stays as it is.
    """
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, log.disabled or not debug
    try:
        yield
    except (CommandError, PolicyError):
        raise
    except Exception as error:
        if _came_out_of_torch(error):
            _check_runs(name, model, calls(), advice, error)
        raise
    finally:
        log.disabled = before


def _came_out_of_torch(error: BaseException) -> bool:
    at = error.__traceback__
    while at is not None:
        if str(at.tb_frame.f_globals.get("__name__")).partition(".")[0] == "torch":
            return True
        at = at.tb_next
    return False


def _check_runs(
    name: str, model: Any, calls: Iterable[Call], advice: str, error: Exception
) -> None:
    import torch

    for inputs, args, kwargs in calls:
        try:
            with torch.no_grad():
                model(*args, **kwargs)
        except Exception as own:
            said = str(own).strip().splitlines() or ["no message"]
            raise CommandError(
                f"{name}: {type(model).__name__} does not run on {inputs}: {type(own).__name__}: "
                f"{said[-1]}; accepted: inputs that it takes; {advice}"
            ) from error
