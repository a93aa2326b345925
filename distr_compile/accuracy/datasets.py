"""Data for models that are named on the command line: folders of pictures, and text."""

from __future__ import annotations

import importlib
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from distr_compile.accuracy.batch import Batch
from distr_compile.accuracy.metrics import IGNORED
from distr_compile.targets import TargetError

MAX_TOKENS = 512
"""Of a row of text, where the model could take more."""

MASKED = 0.15
"""Share of the tokens that a masked language model is asked for, as BERT was trained."""


class Images:
    """The pictures of a folder with a folder for each class, as timm prepares them for a model.

    They come in an order drawn once with a fixed seed, so that the first batches hold all classes.
    Labels are the places of the classes' folders in alphabetical order, as everywhere for ImageNet;
    they are left out where their number is not the model's.

    Attributes:
        note: empty, or why there are no labels.

    Args:
        model: of timm; it says size, crop and normalisation.
        folder: of the pictures.
        batch_size: pictures in a batch.
        dtype: of the pictures.

    Raises:
        TargetError: no such folder, none with pictures, or two of one name, which timm would take
            for one class.
    """

    def __init__(
        self, model: Any, folder: Path, batch_size: int, dtype: torch.dtype = torch.float32
    ) -> None:
        data = importlib.import_module("timm.data")
        if not folder.is_dir():
            raise TargetError(
                f"--data: there is no folder {folder}; accepted: a folder with one for each class"
            )
        try:
            dataset = data.create_dataset("", root=str(folder), is_training=False)
        except RuntimeError as error:
            raise TargetError(
                f"--data: no pictures in {folder} ({error}); accepted: a folder with one for each "
                "class"
            ) from error
        _check_class_folders(folder, dataset.reader.samples)
        has, wants = len(dataset.reader.class_to_idx), getattr(model, "num_classes", 0)
        self.note = ""
        if has != wants:
            self.note = f"{folder} has {has} classes and the model {wants}: the labels are left out"
        random.Random(0).shuffle(dataset.reader.samples)
        config = data.resolve_data_config({}, model=model)
        self._loader = data.create_loader(
            dataset,
            input_size=config["input_size"],
            interpolation=config["interpolation"],
            mean=config["mean"],
            std=config["std"],
            crop_pct=config["crop_pct"],
            crop_mode=config["crop_mode"],
            batch_size=batch_size,
            num_workers=min(4, (os.cpu_count() or 1) - 1),
            use_prefetcher=False,
            persistent_workers=False,
        )
        self._dtype = dtype

    def __len__(self) -> int:
        """Number of batches."""
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        """Batches of pictures."""
        for pictures, labels in self._loader:
            yield Batch((pictures.to(self._dtype),), labels=None if self.note else labels)


def _check_class_folders(folder: Path, samples: list[tuple[str, int]]) -> None:
    found: dict[int, Path] = {}
    for name, label in samples:
        other, own = found.setdefault(label, Path(name).parent), Path(name).parent
        if own != other:
            raise TargetError(
                f"--data: got {folder} with {other} and {own}, which would be one class; accepted: "
                "a folder with one for each class; give the one right above the classes"
            )


def text_batches(model: Any, tokenizer: Any, text: str, kind: str, **sizes: int) -> list[Batch]:
    """Rows of equally many tokens from a text.

    Args:
        model: of transformers.
        tokenizer: the model's own.
        text: as long as there is.
        kind: "causal": every token is the label of the position before it. "masked": some tokens
            are masked, which ones is drawn with a fixed seed, and are the labels there. "": no
            labels, for models that only encode.
        **sizes: ``batch_size``, rows; ``tokens``, the width of a row, 0 for what the model takes
            but at most ``MAX_TOKENS``.

    Raises:
        TargetError: the tokenizer knows no words or has no mask, the text is shorter than one row,
            or a row has no place for a token or more than the model takes.
    """
    found = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    ids = torch.tensor(found, dtype=torch.int64, device="cpu")
    if text.strip() and not len(ids):
        raise TargetError(
            "--text: got no token from the tokenizer; accepted: a folder with the tokenizer "
            "beside the model; write it there with tokenizer.save_pretrained(FOLDER)"
        )
    width = sizes["tokens"] or _width(model, tokenizer)
    first, last = tokenizer.cls_token_id, tokenizer.sep_token_id
    if kind == "causal":
        first = last = None
    inner = width - (first is not None) - (last is not None)
    most = min(_positions(model), default=width)
    if inner < 1 or width > most:
        raise TargetError(
            f"--tokens: got {width}; accepted: from {width - inner + 1}, as the tokenizer adds "
            f"{width - inner} of its own, to what the model has positions for"
            f"{f', {most}' if _positions(model) else ''}; give another number"
        )
    needed = inner + (kind == "causal")
    if len(ids) < needed:
        raise TargetError(
            f"--text: got {len(ids)} tokens; accepted: {needed} or more, one row; give a longer "
            "text or fewer --tokens"
        )
    rows = ids[: (len(ids) - needed) // inner * inner + needed].unfold(0, needed, inner)
    if kind == "causal":
        inputs, labels = rows[:, :-1], rows[:, 1:]
    else:
        ends = [
            [] if end is None else [rows.new_full((len(rows), 1), end)] for end in (first, last)
        ]
        inputs, labels = torch.cat([*ends[0], rows, *ends[1]], 1), None
    if kind == "masked":
        special = torch.ones_like(inputs, dtype=torch.bool)
        special[:, len(ends[0]) : len(ends[0]) + inner] = False
        inputs, labels = _masked(inputs, special, tokenizer)
    return [
        Batch(
            kwargs={"input_ids": inputs[i : i + sizes["batch_size"]].contiguous()},
            labels=None if labels is None else labels[i : i + sizes["batch_size"]].contiguous(),
        )
        for i in range(0, len(inputs), sizes["batch_size"])
    ]


def _width(model: Any, tokenizer: Any) -> int:
    # Two positions are kept free: RoBERTa counts positions from its padding index on.
    known = [size - 2 for size in _positions(model)]
    return int(min(MAX_TOKENS, tokenizer.model_max_length, *known))


def _positions(model: Any) -> list[int]:
    config = model.config.get_text_config()
    sizes = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions")]
    return [size for size in sizes if size]


def _masked(inputs: Tensor, special: Tensor, tokenizer: Any) -> tuple[Tensor, Tensor]:
    if tokenizer.mask_token_id is None:
        raise TargetError(
            "--text: the tokenizer has no mask token, and the model is a masked language model; "
            "give --data pkg.module:loader"
        )
    new: Any = {"dtype": torch.float32, "device": "cpu"}
    chance = torch.rand(inputs.shape, generator=Generator().manual_seed(0), **new)
    asked = (chance < MASKED) & ~special
    asked[:, 1] |= ~asked.any(1)  # one at least
    labels = inputs.masked_fill(~asked, IGNORED)
    return inputs.masked_fill(asked, tokenizer.mask_token_id), labels


def tokenizer_of(name: str) -> Any:
    """The tokenizer of a model of transformers.

    Raises:
        TargetError: there is none at hand.
    """
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # each hub client has its own
        reason = (str(error).strip() or type(error).__name__).partition("\n")[0]
        raise TargetError(
            f"hf:{name}: no tokenizer for the text: {reason}; give a folder that has one"
        ) from error


def language_model(config: Any) -> str:
    """ "causal", "masked", "seq2seq" or "": the language model a configuration names, if any."""
    from transformers.models.auto import modeling_auto as auto

    named = set(getattr(config, "architectures", None) or ())
    tables = {
        "causal": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "masked": auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        "seq2seq": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    }
    found = [kind for kind, table in tables.items() if named & set(table.values())]
    return found[0] if found else ""
