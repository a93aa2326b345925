"""diffusers: a pipeline whose transformer is compiled whole, or block by block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DiTPipeline,
    DiTTransformer2DModel,
    FluxTransformer2DModel,
)
from diffusers.schedulers import DDIMScheduler
from torch import Tensor, nn
from torch._dynamo.utils import counters

import distr_compile
from distr_compile import Policy

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

POLICY: dict[str, Any] = {"default": {"group_size": 2, "min_seq_len": 0}}
EAGER = {"policy": POLICY, "compiler": "eager"}


def flux() -> nn.Module:
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(8, 12, 12),
    )
    return model.eval()


def flux_inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    places = torch.zeros(64, 3)
    places[:, 1], places[:, 2] = torch.arange(64) // 8, torch.arange(64) % 8
    return {
        "hidden_states": torch.randn(1, 64, 4, generator=generator),
        "encoder_hidden_states": torch.randn(1, 24, 32, generator=generator),
        "pooled_projections": torch.randn(1, 32, generator=generator),
        "timestep": torch.ones(1),
        "img_ids": places,
        "txt_ids": torch.zeros(24, 3),
    }


LAYERS = [f"transformer_blocks.{i}.attn" for i in range(2)]
LAYERS += [f"single_transformer_blocks.{i}.attn" for i in range(3)]


def whole(model: nn.Module) -> None:
    model.compile(backend="distr", options=EAGER)


def plain(model: nn.Module) -> None:
    model.compile_repeated_blocks(backend="distr", options=EAGER)


def by_kind(model: nn.Module) -> None:
    groups = distr_compile.compile_blocks(model, POLICY, options={"compiler": "eager"})
    assert [len(names) for names in groups] == [2, 3]


@torch.no_grad()
def test_the_transformer_whole_and_by_its_blocks() -> None:
    inputs, found, graphs = flux_inputs(), {}, {}
    exact = flux()(**inputs).sample
    for way in (whole, plain, by_kind):
        torch._dynamo.reset()
        counters.clear()
        model = flux()
        way(model)
        found[way] = model(**inputs).sample
        graphs[way] = int(counters["stats"]["unique_graphs"])
        rows = distr_compile.report(model).rows
        assert {row.layer for row in rows} == set(LAYERS), way
        assert {row.decision for row in rows} == {"distr"}
    for way in (plain, by_kind):
        torch.testing.assert_close(found[way], found[whole], rtol=0, atol=1e-5)
    assert (found[whole] - exact).abs().max() > 1e-4, "nothing was approximated"
    assert graphs[plain] == 5  # one for each block
    assert graphs[by_kind] < graphs[plain]


@torch.no_grad()
def test_calibrated_blocks_of_one_kind_are_one_graph(tmp_path: Path) -> None:
    """Each with its own bases, as where the model is compiled whole."""
    model, inputs = flux(), flux_inputs()
    made = distr_compile.calibrate(model, [inputs], path=tmp_path / "bases", progress=False)
    fields = {"estimator": "calibrated", "group_size": 2, "min_seq_len": 0}
    policy = Policy(fields).with_bases(made.path, made.sha256)
    options = {"policy": policy, "compiler": "eager"}
    wanted = torch.compile(flux(), backend="distr", options=options)(**inputs).sample
    distr_compile.compile_blocks(model, policy, options={"compiler": "eager"})
    counters.clear()
    torch.testing.assert_close(model(**inputs).sample, wanted, rtol=0, atol=1e-5)
    rows = distr_compile.report(model).rows
    assert {(row.layer, row.estimator) for row in rows} == {(n, "calibrated") for n in LAYERS}
    calls = {name: sum(r.runtime_calls or 0 for r in rows if r.layer == name) for name in LAYERS}
    assert calls == dict.fromkeys(LAYERS, 1)
    assert int(counters["stats"]["unique_graphs"]) < len(LAYERS)


def test_rules_of_plain_repeated_blocks_go_by_names_within_a_block() -> None:
    model = flux()
    policy = {**POLICY, "rule": [{"layers": "transformer_blocks.0.attn", "group_size": 1}]}
    model.compile_repeated_blocks(backend="distr", options={**EAGER, "policy": policy})
    with torch.no_grad(), pytest.raises(Exception, match="names no module of the model"):
        model(**flux_inputs())
    torch._dynamo.reset()
    distr_compile.compile_blocks(model, policy, options={"compiler": "eager"})
    with torch.no_grad():
        model(**flux_inputs())
    decisions = {row.layer: row.decision for row in distr_compile.report(model).rows}
    assert decisions == dict.fromkeys(LAYERS, "distr") | {LAYERS[0]: "exact"}


def dit() -> DiTPipeline:
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        sample_size=16,
        num_layers=2,
        patch_size=2,
        attention_head_dim=32,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )
    vae = AutoencoderKL(block_out_channels=(32,), norm_num_groups=8)
    pipeline = DiTPipeline(transformer.eval(), vae.eval(), DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def images(pipeline: DiTPipeline) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 2, "output_type": "np"}
    return torch.from_numpy(pipeline([1], generator=generator, **options).images)


def test_a_pipeline() -> None:
    """Whole, by its blocks, and by diffusers' own method, which asks the class for its blocks."""
    exact = images(dit())
    compiled, regional, repeated = dit(), dit(), dit()
    compiled.transformer.compile(backend="distr", options=EAGER)
    wanted = images(compiled)
    groups = distr_compile.compile_blocks(
        regional.transformer, POLICY, options={"compiler": "eager"}
    )
    assert groups == [["transformer_blocks.0", "transformer_blocks.1"]]
    torch.testing.assert_close(images(regional), wanted, rtol=0, atol=1e-5)
    repeated.transformer._repeated_blocks = ["BasicTransformerBlock"]
    repeated.transformer.compile_repeated_blocks(backend="distr", options=EAGER)
    torch.testing.assert_close(images(repeated), wanted, rtol=0, atol=1e-5)
    assert (wanted - exact).abs().max() > 1e-5, "nothing was approximated"
    layers = {row.layer for row in distr_compile.report(regional.transformer).rows}
    assert layers == {f"transformer_blocks.{i}.attn1" for i in range(2)}
