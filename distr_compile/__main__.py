"""``python -m distr_compile``: the command ``distr``, also as one of several processes.

    torchrun --nproc-per-node 4 -m distr_compile regress mine:model --data mine:data ...

The processes share the batches of ``calibrate``, ``tune`` and ``regress``, see ``accuracy.ranks``;
the first of them speaks.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import os
import sys
from collections.abc import Sequence

from distr_compile import cli

SHARED = ("calibrate", "regress", "tune")
"""The subcommands that several processes can run together."""

_PATIENCE = datetime.timedelta(days=1)
"""How long a process waits for another, which may be timing or compiling."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``distr`` and return its exit code, see ``cli.main``; as part of a group under torchrun.

    Args:
        argv: ``sys.argv[1:]`` if None.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    # A job scheduler may set WORLD_SIZE alone; torchrun sets both.
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return cli.main(given)
    for name in ("WORLD_SIZE", "RANK"):
        if not os.environ[name].isdecimal():
            print(
                f"distr: {name}: got {os.environ[name]!r}; accepted: a number, as torchrun sets "
                "it; unset it to run one process, or start torchrun",
                file=sys.stderr,
            )
            return cli.USAGE
    if int(os.environ["WORLD_SIZE"]) == 1:
        return cli.main(given)
    is_first = int(os.environ["RANK"]) == 0
    command = next((word for word in given if not word.startswith("-")), "")
    if command not in SHARED:
        if is_first:
            print(
                f"distr: {command or 'no subcommand'}: got several processes; accepted: "
                f"{', '.join(SHARED)}; run it without torchrun",
                file=sys.stderr,
            )
        return cli.USAGE
    if is_first:
        return _together(given)
    said = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        code = _together(given)
    if code and "OtherProcessError" not in said.getvalue():
        print(f"process {os.environ['RANK']}: {said.getvalue()}", end="", file=sys.stderr)
    return code


def _together(argv: list[str]) -> int:
    import torch
    import torch.distributed as dist

    from distr_compile.accuracy.ranks import dealing

    if torch.cuda.is_available():
        torch.cuda.set_device(
            int(os.environ.get("LOCAL_RANK", os.environ["RANK"])) % torch.cuda.device_count()
        )
    # What is exchanged lies in the memory of the host.
    try:
        dist.init_process_group("gloo", timeout=_PATIENCE)
    except ValueError as error:  # a variable of the environment is missing or wrong
        print(f"distr: {error}; accepted: what torchrun sets; start torchrun", file=sys.stderr)
        return cli.USAGE
    try:
        with dealing():
            return cli.main(argv)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
