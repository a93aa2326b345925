"""The command ``distr``: what the backend would do with a model, and whether a policy is right."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import select
import sys
from collections.abc import Sequence

from distr_compile.commands import calibrate, explain, measure, policy, regress, tune
from distr_compile.commands.common import FOUND_ERROR, OK, USAGE, CommandError
from distr_compile.policy import PolicyError

__all__ = ["FOUND_ERROR", "OK", "USAGE", "main"]

INTERRUPTED, ENDED = 130, 141  # as shells say it

DESCRIPTION = (
    "Cheaper attention in models you already have: what the torch.compile backend 'distr' would do "
    "with a model, what that costs on data, and whether a policy is right."
)
CODES = (
    "Exit codes: 0 is fine; 1, an error was found; 2, the command was written wrongly; 3, a policy "
    "asked outright for approximated attention and no call took it; 130, interrupted; 141, nobody "
    "reads the output any more."
)

COMMANDS = (explain, measure, calibrate, tune, regress, policy)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``distr`` with ``argv`` (``sys.argv[1:]`` if None) and return the exit code.

    0 is fine, 1 means that an error was found (invalid policy, unmatched rule, model that cannot be
    built or run), 2 that the command was written wrongly, 3 that a policy asked outright for
    approximated attention and no call took it, 130 that it was interrupted, 141 that nobody reads
    its output any more. An error is one message on stderr.
    """
    try:
        options = _parser().parse_args(argv)
    except SystemExit as end:  # argparse has already printed its message, or the help
        return int(end.code or OK)
    try:
        code = int(options.run(options))
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        if options.debug:
            raise
        kept = ""
        if "no_resume" in options and (getattr(options, "out", None) or options.json):
            kept = "; the same command goes on from what is done"
        print(f"distr: interrupted{kept}", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if isinstance(error, BrokenPipeError) and hasattr(select, "poll") and _nobody_reads():
            return ENDED
        if options.debug:
            raise
        print(f"distr: {_message(error)}", file=sys.stderr)
        return error.code if isinstance(error, CommandError) else FOUND_ERROR


def _nobody_reads() -> bool:
    """Whether who read has enough, as in "distr explain ... | head"; the rest is thrown away."""
    asked = select.poll()
    asked.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in asked.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _message(error: Exception) -> str:
    # Dynamo wraps what a backend raises; the user is to see the error itself.
    cause = getattr(error, "inner_exception", None) or error
    if isinstance(cause, OSError) and cause.filename is not None:
        return f"file: got {cause.filename}: {cause.strerror}; accepted: a path that can be used"
    if isinstance(cause, (CommandError, PolicyError, FileNotFoundError, IsADirectoryError)):
        return str(cause)
    return f"{type(cause).__name__}: {cause}\n(--debug shows where)"


def _version() -> str:
    try:
        return importlib.metadata.version("distr-compile")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed: run from its sources)"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="distr", description=DESCRIPTION, epilog=CODES)
    parser.add_argument("--version", action="version", version=f"%(prog)s {_version()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    for command in COMMANDS:
        command.add(commands, common)
    return parser


if __name__ == "__main__":
    sys.exit(main())
