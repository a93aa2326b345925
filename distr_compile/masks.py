"""Which masks a model of transformers is given with ``attn_implementation="distr"``.

SDPA's masks are bool, and None where ``is_causal`` says enough. Code that does not ask transformers
for its attention function adds what it is given to its scores, and looks at no ``is_causal``: only
the masks of "eager" are right there.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import MODEL_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import eager_mask, sdpa_mask


def make(*, config: Any = None, **given: Any) -> Tensor | None:
    """The mask that transformers asks for, in the form that the model's code can use.

    Args:
        config: of the model whose mask it is.
        given: what transformers hands to its own mask functions.

    Returns:
        as ``sdpa_mask`` makes it, bool or None, for models that can use SDPA or, as they have soft
        caps or sinks, FlashAttention only; else as ``eager_mask`` does, in floating numbers to be
        added.
    """
    mask: Tensor | None
    if not reads_those_of_sdpa(type(config)):
        mask = eager_mask(**given)
        return mask
    if getattr(config, "num_kv_shared_layers", 0):
        # Such a model cuts rows out of its masks: of None it cannot.
        given["allow_is_causal_skip"] = False
    mask = sdpa_mask(**given)
    return mask


# A trace takes the answer as a constant: what it hangs on is no business of a graph.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def reads_those_of_sdpa(config: type) -> bool | None:
    """Whether models with this config read the masks of SDPA, and None as ``is_causal``.

    Args:
        config: a class of configs.

    Returns:
        None for a class that no loaded model has.
    """
    return _reads_those_of_sdpa(config)


@functools.cache
def _reads_those_of_sdpa(config: type) -> bool | None:
    kinds = [each for each in config.__mro__ if issubclass(each, PreTrainedConfig)]
    found = next(filter(None, map(_models_of, kinds[:-1])), None)
    return None if found is None else all(map(_reads_them, found))


def _models_of(config: type[PreTrainedConfig]) -> list[type[PreTrainedModel]]:
    """The models that have it, or that stand beside it, of which it is a part, or of its alias."""
    loaded = list(_models())
    beside = [model for model in loaded if _package(model) == _package(config)]
    named = [model for model in loaded if model.config_class is config]
    if named or beside:  # those that somebody derived elsewhere say less
        return [model for model in named if model in beside] or named or beside
    mapped: Any = MODEL_MAPPING.get(config, [])
    return list(mapped) if isinstance(mapped, (list, tuple)) else [mapped]


def _package(kind: type) -> str:
    return kind.__module__.rpartition(".")[0]


def _reads_them(model: type[PreTrainedModel]) -> bool:
    # Soft caps and sinks are beyond SDPA, not beyond us; FlashAttention takes no mask at all.
    by_flash = model._supports_flash_attn and model._supports_attention_backend
    return (model._supports_sdpa or by_flash) and model._can_set_attn_implementation()


def _models(base: type[PreTrainedModel] = PreTrainedModel) -> Iterator[type[PreTrainedModel]]:
    for each in base.__subclasses__():
        yield each
        yield from _models(each)
