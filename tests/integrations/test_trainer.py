"""The Trainer of transformers takes a model that was compiled in place: its numbers, a training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from tests.integrations.classifier import (
    OPTIONS,
    classifier,
    inputs,
    is_approximated_both_ways,
    texts,
    trainer_losses,
)
from tests.kernels.cpu_kernel import require_kernel


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def test_a_trainer_predicts_what_the_model_does(tmp_path: Path) -> None:
    model, given = classifier().eval(), inputs()
    with torch.no_grad():
        exact = model(**given).logits
        model.compile(backend="distr", options=OPTIONS)
        wanted = model(**given).logits
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True
    )
    trainer = transformers.Trainer(model=model, args=arguments)
    rows = [dict(zip(given, row, strict=True)) for row in zip(*given.values(), strict=True)]
    got = torch.from_numpy(trainer.predict(rows).predictions)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    assert (wanted - exact).abs().max() > 1e-4, "nothing was approximated"


def test_its_own_setting_does_not_know_the_backend(tmp_path: Path) -> None:
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, torch_compile_backend="distr"
    )
    with pytest.raises(ValueError, match="'DISTR' is not a valid DynamoBackend"):
        transformers.Trainer(model=classifier(), args=arguments)


def test_a_trainer_trains_through_it(tmp_path: Path) -> None:
    require_kernel()
    model = classifier()
    model.compile(backend="distr", options=OPTIONS)
    losses = trainer_losses(
        model,
        texts(),
        tmp_path,
        max_steps=30,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=2,
        logging_steps=5,
    )
    assert losses[-1] < 0.7 * losses[0]
    assert is_approximated_both_ways(model)
