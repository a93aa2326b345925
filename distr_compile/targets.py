"""Models to look at from the command line: ``timm:NAME``, ``hf:NAME``, ``pkg.module:factory``.

``build`` makes random weights: what is compiled, and where attention is, does not depend on their
values. ``pretrained`` loads the published ones. Code from a model hub is never executed.
"""

from __future__ import annotations

import copy
import difflib
import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ACCEPTED = (
    "timm:NAME, hf:NAME (a model type such as bert, a config.json, a folder with one, or a model "
    "of the Hugging Face hub), or pkg.module:factory"
)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
BATCH = 2
TOKENS = 128
AUDIO_SAMPLES = 16_000
AUDIO_FRAMES = 256


class TargetError(ValueError):
    """A target that cannot be built: says what was got, what is accepted and what to do."""


class TargetSyntaxError(TargetError):
    """A target or an option of it that is written wrongly."""


@dataclass(frozen=True)
class Target:
    """A model in eval mode and inputs for one call of it.

    Attributes:
        name: the target as the user wrote it.
        model: the module, on the CPU.
        args: positional inputs.
        kwargs: keyword inputs.
    """

    name: str
    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def input_problem(self) -> str | None:
        """Why the inputs do not fit the signature of the model's forward, or None."""
        signature = inspect.signature(self.model.forward)
        try:
            signature.bind(*self.args, **self.kwargs)
        except TypeError as error:
            return (
                f"{self.name}: the inputs do not fit {type(self.model).__name__}.forward"
                f"{signature}: {error}; let the factory return (module, args) or (module, args, "
                "kwargs)"
            )
        return None


def build(
    target: str,
    *,
    shape: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    attn: str | None = None,
) -> Target:
    """Build the model that ``target`` names, with random weights, and inputs for it.

    The weights of timm and hf targets are the same in every process, so that what one command
    measured of them still holds in the next. The state of PyTorch's generator stays as it was.

    Args:
        target: ``timm:NAME``, ``hf:NAME`` or ``pkg.module:factory``, where the factory takes no
            argument and returns a module, (module, args) or (module, args, kwargs), or is a module.
        shape: sizes of the main input, batch first; of timm and hf targets only.
        dtype: of the weights and the floating-point inputs; None leaves them as they are.
        attn: "eager" or "sdpa", how the model spells attention; of timm and hf targets only.

    Raises:
        TargetSyntaxError: the target or an option is written wrongly.
        TargetError: no such model, a missing extra, inputs we cannot guess.
    """
    kind, colon, name = target.partition(":")
    if not (kind and colon and name):
        raise TargetSyntaxError(f"target: got {target!r}; accepted: {ACCEPTED}")
    if kind in _ZOOS:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            built = _ZOOS[kind](target, name, shape, attn)
    elif shape is not None or attn is not None:
        raise TargetSyntaxError(
            f"{target}: --shape and --attn are for timm: and hf: targets; a factory makes its own "
            "inputs"
        )
    else:
        built = _factory(target, kind, name)
    if dtype is not None:
        built.model.to(dtype)
    dtype = dtype or next((p.dtype for p in built.model.parameters()), torch.float32)
    args, kwargs = cast((built.args, built.kwargs), dtype)
    return Target(target, built.model.eval(), args, kwargs)


def cast(item: Any, dtype: torch.dtype) -> Any:
    """Copy ``item`` with every floating-point tensor in ``dtype``."""
    if isinstance(item, Tensor):
        return item.to(dtype) if item.is_floating_point() else item
    if type(item) in (tuple, list):
        return type(item)(cast(part, dtype) for part in item)
    if type(item) is dict:
        return {key: cast(part, dtype) for key, part in item.items()}
    return item


def pretrained(target: str) -> nn.Module:
    """The model that ``target`` names, with its published weights, in eval mode on the CPU.

    They are loaded by timm and transformers themselves, from their caches or a model hub; from a
    folder with ``timm:local-dir:PATH`` and ``hf:PATH``. Of transformers it is the class that the
    configuration names, such as GPT2LMHeadModel, with its head.

    Args:
        target: ``timm:NAME`` or ``hf:NAME``.

    Raises:
        TargetSyntaxError: the target is written wrongly, or is a factory.
        TargetError: no such model, no weights of it at hand, or a missing extra.
    """
    kind, colon, name = target.partition(":")
    if not (kind and colon and name):
        raise TargetSyntaxError(f"target: got {target!r}; accepted: {ACCEPTED}")
    if kind not in _LOADERS:
        raise TargetSyntaxError(
            f"{target}: pretrained weights are for timm: and hf: targets; a factory loads its own"
        )
    return _LOADERS[kind](target, name).eval()


# --- pkg.module:factory ------------------------------------------------------------------------


def _factory(target: str, module_name: str, factory_name: str) -> Target:
    if not all(map(str.isidentifier, [*module_name.split("."), factory_name])):
        raise TargetSyntaxError(f"target: got {target!r}; accepted: {ACCEPTED}")
    if os.getcwd() not in sys.path:  # a console script, unlike python -m, does not see the folder
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise TargetError(
            f"{target}: cannot import {module_name}: {error}; accepted: {ACCEPTED}"
        ) from error
    factory = getattr(module, factory_name, None)
    if not callable(factory):
        names = [name for name, value in vars(module).items() if callable(value)]
        raise TargetError(
            f"{target}: {module_name} has no function {factory_name}"
            + _nearest(factory_name, names)
        )
    made = factory if isinstance(factory, nn.Module) else factory()
    parts = made if isinstance(made, tuple) else (made,)
    whole = (*parts, *((), {})[len(parts) - 1 :])
    kinds: tuple[Any, ...] = (nn.Module, (tuple, list), dict)
    if len(whole) != 3 or not all(map(isinstance, whole, kinds)):
        raise TargetError(
            f"{target}: the factory returned {_kinds(made)}; accepted: a module, (module, args) or "
            "(module, args, kwargs) with args a tuple and kwargs a dict"
        )
    model, args, kwargs = whole
    return Target(target, model, tuple(args), kwargs)


def _kinds(made: Any) -> str:
    if isinstance(made, tuple):
        return "(" + ", ".join(type(part).__name__ for part in made) + ")"
    return type(made).__name__


# --- timm:NAME ---------------------------------------------------------------------------------


def _timm(target: str, name: str, shape: Sequence[int] | None, attn: str | None) -> Target:
    timm = _extra("timm", target)
    layers = importlib.import_module("timm.layers")
    if name.startswith("local-dir:"):
        raise TargetError(f"{target}: a folder of weights is loaded with --pretrained; add it")
    if not timm.is_model(name):
        raise TargetError(f"{target}: timm has no model {name}{_nearest(name, timm.list_models())}")
    before = layers.use_fused_attn(), layers.use_fused_attn(experimental=True)
    try:
        if attn is not None:  # read by every attention layer as it is made
            layers.set_fused_attn(attn == "sdpa")
        model = timm.create_model(name, pretrained=False)
    except RuntimeError as error:  # a tag that the model does not have
        raise TargetError(f"{target}: timm cannot create {name}: {error}") from error
    finally:
        layers.set_fused_attn(*before)
    return Target(target, model, (_noise(shape or (BATCH, *model.default_cfg["input_size"])),))


def _timm_pretrained(target: str, name: str) -> nn.Module:
    timm = _extra("timm", target)
    if ":" not in name and not timm.is_model(name):
        raise TargetError(f"{target}: timm has no model {name}{_nearest(name, timm.list_models())}")
    try:
        model: nn.Module = timm.create_model(name, pretrained=True)
    except Exception as error:  # each hub client has its own
        raise _no_weights(target, error, "timm:local-dir:PATH") from error
    return model


# --- hf:NAME -----------------------------------------------------------------------------------


def _hf(target: str, name: str, shape: Sequence[int] | None, attn: str | None) -> Target:
    transformers = _extra("transformers", target)
    config = _hf_config(transformers, target, name)

    def make() -> nn.Module:
        # from_config changes the configuration it is given.
        model: nn.Module = transformers.AutoModel.from_config(
            copy.deepcopy(config), trust_remote_code=False, attn_implementation=attn
        )
        return model

    _check_memory(target, make)
    model = make()
    return Target(target, model, (), _hf_inputs(target, model, shape))


def _hf_pretrained(target: str, name: str) -> nn.Module:
    transformers = _extra("transformers", target)
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        named = next(iter(getattr(config, "architectures", None) or ()), "AutoModel")
        make = getattr(transformers, named, transformers.AutoModel)
        model: nn.Module = make.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # each hub client has its own
        raise _no_weights(target, error, "hf:PATH, a folder that save_pretrained wrote") from error
    return model


def _hf_config(transformers: Any, target: str, name: str) -> Any:
    """The configuration: of a local file, a model type's defaults, or a model of the hub."""
    known = transformers.CONFIG_MAPPING
    path = Path(name)
    path = path / "config.json" if path.is_dir() else path
    if path.is_file():
        return _read_config(transformers, target, path)
    if path.suffix == ".json" or path.is_absolute() or name.startswith("."):
        raise TargetError(f"{target}: there is no file {path}")
    if name in known:
        return transformers.AutoConfig.for_model(name)
    try:
        return transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise TargetError(
            f"{target}: not a file, not a model type of transformers{_nearest(name, known)}, and "
            f"its configuration cannot be had from the hub: {reason}; without network give a model "
            "type or a config.json"
        ) from error


def _read_config(transformers: Any, target: str, path: Path) -> Any:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TargetError(f"{target}: {path} is not JSON: {error}") from error
    model_type = data.pop("model_type", None) if isinstance(data, dict) else None
    if model_type not in transformers.CONFIG_MAPPING:
        raise TargetError(
            f"{target}: {path}: got model_type {model_type!r}; accepted: a model type of "
            f"transformers{_nearest(str(model_type), transformers.CONFIG_MAPPING)}"
        )
    return transformers.AutoConfig.for_model(model_type, **data)


def _check_memory(target: str, make: Callable[[], nn.Module]) -> None:
    """Refuse a model that does not fit in memory: hf:llama alone means 7 billion parameters."""
    try:
        with torch.device("meta"):
            weights = list(make().parameters())
    except Exception:  # some models cannot be made without data; then they are made at once
        return
    needed = sum(p.numel() * p.element_size() for p in weights)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > 0.7 * memory:
        raise TargetError(
            f"{target}: the weights need {needed / 1e9:.0f} GB and this machine has "
            f"{memory / 1e9:.0f} GB; give a config.json with fewer layers"
        )


def _hf_inputs(target: str, model: Any, shape: Sequence[int] | None) -> dict[str, Tensor]:
    """Inputs for one call, by the name of the main one."""
    config, main = model.config, model.main_input_name
    accepted = inspect.signature(model.forward).parameters
    if main not in _HF_INPUTS:
        raise TargetError(
            f"{target}: cannot guess inputs of {type(model).__name__} (main input {main}); known: "
            f"{', '.join(_HF_INPUTS)}; write a factory and give pkg.module:factory"
        )
    inputs = {main: _HF_INPUTS[main](config, shape)}
    if main == "input_ids" and "attention_mask" in accepted:
        inputs["attention_mask"] = torch.ones_like(inputs[main])
    if config.is_encoder_decoder and "decoder_input_ids" in accepted:
        inputs["decoder_input_ids"] = _ids(config, None)
    # Models of two towers (CLIP) need both inputs; models with image tokens run on text alone.
    two_towers = hasattr(config, "vision_config") and not _first(config, *_IMAGE_TOKEN)
    if main == "input_ids" and two_towers and "pixel_values" in accepted:
        inputs["pixel_values"] = _pixels(config.vision_config, None)
    return inputs


_IMAGE_TOKEN = ("image_token_id", "image_token_index")


def _ids(config: Any, shape: Sequence[int] | None) -> Tensor:
    text = config.get_text_config()
    # Two positions are kept free: RoBERTa counts positions from its padding index on.
    limit = _first(text, "max_position_embeddings", "n_positions", default=TOKENS + 2) - 2
    size = tuple(shape or (BATCH, min(TOKENS, limit)))
    low = min(10, text.vocab_size - 1)  # the first ids are special tokens in most vocabularies
    generator = torch.Generator().manual_seed(0)
    return torch.randint(low, text.vocab_size, size, generator=generator, device="cpu")


def _pixels(config: Any, shape: Sequence[int] | None) -> Tensor:
    vision = getattr(config, "vision_config", config)
    size = _first(vision, "image_size", default=224)
    height, width = (size, size) if isinstance(size, int) else size
    frames = _first(vision, "num_frames")
    channels = _first(vision, "num_channels", default=3)
    return _noise(shape or (BATCH, *([frames] if frames else []), channels, height, width))


def _features(config: Any, shape: Sequence[int] | None) -> Tensor:
    mels = _first(config, "num_mel_bins")
    if mels:  # Whisper takes one length only and has its bins before the frames
        return _noise(shape or (BATCH, mels, 2 * config.max_source_positions))
    width = _first(config, "input_feat_per_channel", "feature_projection_input_dim", default=80)
    return _noise(shape or (BATCH, AUDIO_FRAMES, width))


def _values(config: Any, shape: Sequence[int] | None) -> Tensor:
    mels, frames = _first(config, "num_mel_bins"), _first(config, "max_length")
    return _noise(shape or ((BATCH, frames, mels) if mels and frames else (BATCH, AUDIO_SAMPLES)))


_HF_INPUTS: dict[str, Callable[[Any, Sequence[int] | None], Tensor]] = {
    "input_ids": _ids,
    "pixel_values": _pixels,
    "input_features": _features,
    "input_values": _values,
}

_ZOOS: dict[str, Callable[[str, str, Sequence[int] | None, str | None], Target]] = {
    "timm": _timm,
    "hf": _hf,
}


_LOADERS: dict[str, Callable[[str, str], nn.Module]] = {
    "timm": _timm_pretrained,
    "hf": _hf_pretrained,
}


# --- small helpers -----------------------------------------------------------------------------


def _extra(module: str, target: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise TargetError(f"{target}: {module} is not installed; pip install {module}") from error


def _no_weights(target: str, error: Exception, folder: str) -> TargetError:
    reason = (str(error).strip() or type(error).__name__).partition("\n")[0]
    return TargetError(
        f"{target}: its weights cannot be loaded: {reason}; without network give a model that is "
        f"in the cache, or {folder}"
    )


def _noise(shape: Sequence[int]) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(0), device="cpu")


def _first(config: Any, *names: str, default: Any = None) -> Any:
    """The first of the attributes that the configuration has and that is not None."""
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if value is not None), default)


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=3)
    return f" (did you mean {' or '.join(close)}?)" if close else ""
