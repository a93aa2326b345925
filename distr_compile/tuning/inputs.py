"""Batches to calibrate with, made from the one example input that a target of the CLI has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distr_compile.targets import Target, TargetError


def shuffled_batches(target: Target, count: int) -> list[dict[str, Any] | tuple[Any, ...]]:
    """The target's inputs, then copies with the elements of every tensor in another order.

    So they stay of the same kind: token ids in the vocabulary, noise as strong. A tensor of two
    different values or fewer, such as a mask, stays as it is.

    Raises:
        TargetError: the target has both positional and keyword inputs.
    """
    if target.args and target.kwargs:
        raise TargetError(
            f"{target.name}: got positional and keyword inputs; accepted: inputs of one kind; let "
            "the factory return (module, args) or (module, (), kwargs), or call "
            "distr_compile.calibrate in Python"
        )
    batches: list[dict[str, Any] | tuple[Any, ...]] = []
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        if target.kwargs:
            batches.append({k: _shuffled(v, generator, number) for k, v in target.kwargs.items()})
        else:
            batches.append(tuple(_shuffled(v, generator, number) for v in target.args))
    return batches


def _shuffled(value: Any, generator: torch.Generator, number: int) -> Any:
    if number == 0 or not isinstance(value, Tensor) or value.unique().numel() <= 2:
        return value
    order = torch.randperm(value.numel(), generator=generator)
    return value.flatten()[order].view(value.shape)


def text_batches(target: Target, path: Path, count: int) -> list[dict[str, Any]]:
    """Batches of token ids, as large as the target's own, from the beginning of a text file.

    Args:
        target: an ``hf:`` target whose name the tokenizer can be loaded by, too.
        path: a text in UTF-8.
        count: most batches; fewer if the text ends.

    Raises:
        TargetError: no model of text, no tokenizer, or a text shorter than one row.
    """
    kind, _, name = target.name.partition(":")
    example = target.kwargs.get("input_ids")
    if kind != "hf" or not isinstance(example, Tensor):
        raise TargetError(
            f"{target.name}: got a text for it; accepted: hf: targets that take input_ids; leave "
            "--text out, or call distr_compile.calibrate in Python"
        )
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise TargetError(
            f"{target.name}: no tokenizer for the text: {reason}; give a folder that has one"
        ) from error
    ids = tokenizer(path.read_text("utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < example.shape[1]:
        raise TargetError(
            f"{path}: got {len(ids)} tokens; accepted: {example.shape[1]} or more, one row of the "
            "input; give a longer text or a smaller --shape"
        )
    return list(_cut(target, torch.tensor(ids, dtype=example.dtype), count))


def _cut(target: Target, ids: Tensor, count: int) -> Iterator[dict[str, Any]]:
    example = target.kwargs["input_ids"]
    batch, length = example.shape
    rows = ids[: len(ids) // length * length].view(-1, length)
    for part in rows.split(batch)[:count]:
        # Other inputs of one row per text, such as the mask of ones, have as many rows.
        others = {
            name: value[: len(part)] if isinstance(value, Tensor) else value
            for name, value in target.kwargs.items()
        }
        yield {**others, "input_ids": part}
