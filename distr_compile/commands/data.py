"""The model and the data that ``distr calibrate``, ``tune`` and ``regress`` work with."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distr_compile.commands import common
from distr_compile.commands.common import (
    DTYPES,
    TARGET_HELP,
    USAGE,
    Call,
    CommandError,
    build,
    count,
    imported,
)

BATCH_SIZE = 16


@dataclass(frozen=True)
class Subject:
    """What to measure.

    Attributes:
        name: the target.
        model: in eval mode, on the device and in the dtype that were asked for.
        batches: as ``batch.walk`` takes them.
        metrics: those asked for, or that go with the data; the first is of the task if one is.
    """

    name: str
    model: Any
    batches: Any
    metrics: tuple[Any, ...]


def add_arguments(parser: argparse.ArgumentParser, *, metric: bool = True) -> None:
    """Add the target and the options that ``load`` reads, with or without ``--metric``."""
    parser.set_defaults(metric=None)
    parser.add_argument("target", metavar="TARGET", help=TARGET_HELP)
    group = add_source(parser)
    if metric:
        group.add_argument(
            "--metric",
            action="append",
            metavar="NAME",
            help="top1, top5, perplexity, f1, ..., or pkg.module:function (output, batch) -> one "
            "score for each example; for regress also several; default: what goes with the data",
        )
    group.add_argument(
        "--limit", "--batches", type=count, metavar="N", help="batches (default: all)"
    )
    group.add_argument("--device", default="cpu", help="default: cpu")
    group.add_argument("--dtype", choices=DTYPES, help="of the model and the pictures")


def add_source(parser: argparse.ArgumentParser) -> Any:
    """Add the options that say where weights and data come from, in a group of their own."""
    group = parser.add_argument_group("model and data")
    group.add_argument(
        "--pretrained",
        action="store_true",
        help="published weights instead of random ones, for timm: and hf: targets",
    )
    group.add_argument(
        "--data",
        metavar="DATA",
        help="folder of pictures with a folder for each class, for timm: targets; or "
        "pkg.module:loader, a function that returns an iterable of batches",
    )
    group.add_argument("--text", metavar="FILE", help="text in UTF-8, for hf: targets that read")
    group.add_argument(
        "--batch-size",
        type=count,
        metavar="N",
        help=f"of pictures and texts (default: {BATCH_SIZE})",
    )
    group.add_argument(
        "--tokens", type=count, metavar="N", help="in a row of text (default: up to 512)"
    )
    return group


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of commands that run compiled policies and can be interrupted."""
    group = parser.add_argument_group("how it runs")
    group.add_argument(
        "--no-resume", action="store_true", help="start over where an earlier run was interrupted"
    )
    group.add_argument(
        "--compiler",
        choices=("eager", "aot_eager", "inductor"),
        default="eager",
        help="of the policy's graphs; of tune in its last check (default: eager)",
    )


def load(options: argparse.Namespace) -> Subject:
    """The model and its data.

    Raises:
        CommandError: one of them cannot be had, or they do not go together.
    """
    kind, _, name = options.target.partition(":")
    if bool(options.data) == bool(options.text):
        got = "both" if options.data else "neither"
        raise CommandError(f"--data, --text: got {got}; accepted: one of the two", USAGE)
    if options.text and kind != "hf":
        raise CommandError(f"--text: got one for {options.target}; accepted: hf: targets", USAGE)
    is_folder = bool(options.data) and (":" not in options.data or Path(options.data).is_dir())
    if is_folder and kind != "timm":
        raise CommandError(
            f"--data: got {options.data!r} for {options.target}; accepted: pkg.module:loader, and "
            "a folder for timm: targets",
            USAGE,
        )
    if options.text and not Path(options.text).is_file():
        raise CommandError(
            f"--text: got {options.text!r}, which is no file; accepted: a text in UTF-8; check the "
            "path"
        )
    if is_folder and not Path(options.data).is_dir():
        raise CommandError(
            f"--data: got {options.data!r}, which is no folder; accepted: a folder of pictures "
            "with a folder for each class, or pkg.module:loader; check the path"
        )
    takers = {"--tokens": "--text", "--batch-size": "--text or a folder of pictures"}
    unread = [] if options.text else ["--tokens"] if is_folder else list(takers)
    for option in unread:
        if getattr(options, option[2:].replace("-", "_")):
            raise CommandError(
                f"{option}: got one beside --data {options.data}, which does not read it; "
                f"accepted: with {takers[option]}; leave it out",
                USAGE,
            )
    # Slips in names are told before anything is loaded.
    asked = [_metric(text) for text in options.metric or ()]
    loader = imported(options.data, "--data") if options.data and not is_folder else None
    text = _read(options.text) if options.text else ""
    model = _model(options)

    from distr_compile.accuracy import datasets
    from distr_compile.targets import DTYPES as TORCH_DTYPES
    from distr_compile.targets import TargetError

    batches: Any
    natural: tuple[str, ...] = ()
    try:
        if loader is not None:
            batches = loader
        elif is_folder:
            dtype = TORCH_DTYPES[options.dtype or "float32"]
            size = options.batch_size or BATCH_SIZE
            batches = datasets.Images(model, Path(options.data), size, dtype)
            if batches.note:
                print(f"distr: {batches.note}", file=sys.stderr)
            natural = ("cosine", "sqnr") if batches.note else ("top1", "top5")
        else:
            batches, natural = _texts(model, name, text, options)
    except TargetError as error:
        raise CommandError(str(error)) from error
    return Subject(options.target, model, batches, tuple(asked or natural))


def in_its_own_words(subject: Subject, options: argparse.Namespace) -> AbstractContextManager[None]:
    """Do as ``common.in_its_own_words`` does, for a model that runs over data."""

    def calls() -> Iterator[Call]:
        from distr_compile.accuracy.batch import walk

        for index, batch in enumerate(walk(subject.batches, options.limit)):
            moved = batch.to(options.device)
            yield f"batch {index} (--data, --text)", moved.args, moved.kwargs

    advice = "give other data, or another model"
    return common.in_its_own_words(subject.name, subject.model, calls, advice, debug=options.debug)


def _model(options: argparse.Namespace) -> Any:
    from distr_compile import targets

    if not options.pretrained:
        if options.target.partition(":")[0] in ("timm", "hf"):
            print("distr: the weights are random; --pretrained loads real ones", file=sys.stderr)
        model = build(options.target, dtype=options.dtype).model
    else:
        try:
            model = targets.pretrained(options.target)
        except targets.TargetSyntaxError as error:
            raise CommandError(str(error), USAGE) from error
        except targets.TargetError as error:
            raise CommandError(str(error)) from error
        if options.dtype:
            model.to(targets.DTYPES[options.dtype])
    try:
        return model.to(options.device)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise CommandError(f"--device: got {options.device!r}: {reason}", USAGE) from error


def _read(path: str) -> str:
    try:
        return Path(path).read_text("utf-8")
    except UnicodeDecodeError as error:
        raise CommandError(
            f"--text: got {path!r}, whose byte {error.start} is no UTF-8; accepted: a text in "
            "UTF-8; convert it, as iconv does"
        ) from error


def _texts(
    model: Any, name: str, text: str, options: argparse.Namespace
) -> tuple[Any, tuple[str, ...]]:
    from distr_compile.accuracy import datasets

    kind = datasets.language_model(model.config) if options.pretrained else ""
    if kind == "seq2seq":
        raise CommandError(
            f"--text: got one for {options.target}, which reads one text and writes another; "
            "accepted: causal and masked language models, and encoders; give --data "
            "pkg.module:loader"
        )
    batches = datasets.text_batches(
        model,
        datasets.tokenizer_of(name),
        text,
        kind,
        batch_size=options.batch_size or BATCH_SIZE,
        tokens=options.tokens or 0,
    )
    return batches, ("perplexity",) if kind else ("rank-correlation",)


def _metric(text: str) -> Any:
    if ":" in text:
        return imported(text, "--metric")
    from distr_compile.accuracy.metrics import as_metric

    try:
        return as_metric(text)
    except ValueError as error:
        raise CommandError(f"--{error}", USAGE) from error
