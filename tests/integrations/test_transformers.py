"""``attn_implementation="distr"``: the numbers of the backend, without a graph."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import distr_compile
from distr_compile.policy import PolicyError
from tests.zoo import minilm

POLICY = {"default": {"group_size": 2, "min_seq_len": 0}}
WIDTHS = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
TOKENS = 40
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("DISTR_POLICY", raising=False)
    distr_compile.transformers.register()
    torch._dynamo.reset()
    yield
    monkeypatch.undo()
    distr_compile.transformers.register()


def ids(batch: int = 2) -> Tensor:
    return torch.randint(0, 100, (batch, TOKENS), generator=torch.Generator().manual_seed(0))


def padding(left: bool) -> Tensor:
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    mask[1, :11] = 0
    return mask if left else mask.flip(1)


def pixels() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


MODELS: dict[str, tuple[str, dict[str, Any], Any]] = {
    "llama": ("LlamaForCausalLM", WIDTHS, lambda: {"input_ids": ids()}),
    "llama, key heads, left padding": (
        "LlamaForCausalLM",
        WIDTHS | {"num_key_value_heads": 2},
        lambda: {"input_ids": ids(), "attention_mask": padding(left=True)},
    ),
    "bert, right padding": (
        "BertModel",
        WIDTHS,
        lambda: {"input_ids": ids(), "attention_mask": padding(left=False)},
    ),
    "gpt2, left padding": (
        "GPT2LMHeadModel",
        {"n_embd": 128, "n_layer": 2, "n_head": 4},
        lambda: {"input_ids": ids(), "attention_mask": padding(left=True)},
    ),
    "vit": (
        "ViTModel",
        WIDTHS | {"image_size": 64, "patch_size": 8},
        lambda: {"pixel_values": pixels()},
    ),
    "t5, position bias": (
        "T5ForConditionalGeneration",
        {"d_model": 128, "d_kv": 32, "d_ff": 128, "num_layers": 2, "num_heads": 4},
        lambda: {"input_ids": ids(), "decoder_input_ids": ids()},
    ),
    "gemma2, soft cap": (
        "Gemma2ForCausalLM",
        WIDTHS | {"num_key_value_heads": 2, "head_dim": 32, "sliding_window": 16},
        lambda: {"input_ids": ids()},
    ),
    "mistral, window": (
        "MistralForCausalLM",
        WIDTHS | {"num_key_value_heads": 2, "head_dim": 32, "sliding_window": 16},
        lambda: {"input_ids": ids()},
    ),
    "gpt-oss, sinks": (
        "GptOssForCausalLM",
        WIDTHS
        | {
            "num_key_value_heads": 2,
            "head_dim": 32,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
        },
        lambda: {"input_ids": ids()},
    ),
}
EAGER = ("Gemma2ForCausalLM", "GptOssForCausalLM")
"""Those that transformers does not give to SDPA."""


def built(name: str, implementation: str) -> nn.Module:
    """The same weights whatever the implementation."""
    cls, sizes, _ = MODELS[name]
    model_class = getattr(transformers, cls)
    config = model_class.config_class(**sizes)
    if hasattr(config, "vocab_size") and cls != "ViTModel":
        config.vocab_size = 100
    config.pad_token_id = 0
    torch.manual_seed(0)
    model: nn.Module = model_class._from_config(config, attn_implementation=implementation)
    return model.eval()


def both(name: str) -> tuple[nn.Module, nn.Module]:
    """A model for the backend, and one for the interface."""
    usual = "eager" if MODELS[name][0] in EAGER else "sdpa"
    return built(name, usual), built(name, "distr")


def by_backend(model: nn.Module, policy: Any, compiler: str = "eager") -> Any:
    return torch.compile(model, backend="distr", options={"policy": policy, "compiler": compiler})


def real_rows(output: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    mask = inputs.get("attention_mask")
    return output if mask is None else output[mask.bool()]


@pytest.mark.parametrize("name", MODELS)
def test_the_numbers_are_the_backends(name: str) -> None:
    usual, ours = both(name)
    distr_compile.transformers.apply(ours, POLICY)
    inputs = MODELS[name][2]()
    compiled = by_backend(usual, POLICY)
    with torch.no_grad():
        exact, wanted, got = (real_rows(m(**inputs)[0], inputs) for m in (usual, compiled, ours))
    rows = distr_compile.report(compiled).rows
    assert {row.decision for row in rows} == {"distr"}
    assert (wanted - exact).abs().max() > 10 * TOLERANCE, "nothing was approximated"
    torch.testing.assert_close(got, wanted, atol=TOLERANCE, rtol=TOLERANCE)
    named = dict(ours.named_modules())
    for row in rows:
        assert named[row.layer]._distr_assigned.name == row.layer


RULES = {
    "default": {"group_size": 2, "min_seq_len": 0},
    "rule": [
        {"layers": "model.layers.0.*", "group_size": 1},
        {
            "layers": "*.1.self_attn",
            "rank": 20,
            "rounds": 2,
            "causal": "strict",
            "grouping_block": 16,
        },
    ],
}


def test_each_layer_has_its_plan() -> None:
    usual, ours = both("llama")
    distr_compile.transformers.apply(ours, RULES)
    compiled = by_backend(usual, RULES)
    with torch.no_grad():
        wanted, got = (model(ids())[0] for model in (compiled, ours))
    assert [row.decision for row in distr_compile.report(compiled).rows] == ["exact", "distr"]
    torch.testing.assert_close(got, wanted, atol=TOLERANCE, rtol=TOLERANCE)
    distr_compile.transformers.apply(ours, {"default": {"group_size": 1}})
    with torch.no_grad():
        torch.testing.assert_close(ours(ids())[0], usual(ids())[0], atol=TOLERANCE, rtol=TOLERANCE)


def test_a_layer_that_cannot_take_its_plan_is_exact_as_with_the_backend() -> None:
    for plan in ({"group_size": 4}, {"estimator": "lsh-mean", "causal": "strict"}):
        usual, ours = both("llama")
        distr_compile.transformers.apply(ours, {"default": {"min_seq_len": 0, **plan}})
        with torch.no_grad():
            torch.testing.assert_close(ours(ids())[0], usual(ids())[0])


@pytest.mark.parametrize("estimator", ["projection", "lsh-mean"])
@pytest.mark.parametrize("name", ["bert, right padding", "llama, key heads, left padding"])
def test_padding_changes_no_row(name: str, estimator: str) -> None:
    policy = {"default": {"group_size": 2, "min_seq_len": 0, "estimator": estimator}}
    inputs = MODELS[name][2]()
    real = inputs["attention_mask"][1].bool()
    if "llama" in name:  # by default they do not heed the mask, and turn Q and K by other angles
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    alone = {key: value[1:, real] for key, value in inputs.items()}
    usual, ours = both(name)
    compiled = by_backend(usual, policy)
    distr_compile.transformers.apply(ours, policy)
    with torch.no_grad():
        exact = usual(**alone)[0]
        for model in (compiled, ours):
            got, wanted = model(**inputs)[0][1:, real], model(**alone)[0]
            torch.testing.assert_close(got, wanted, atol=TOLERANCE, rtol=TOLERANCE)
            assert (wanted - exact).abs().max() > 10 * TOLERANCE, "nothing was approximated"


def test_generate_is_that_of_the_backend() -> None:
    name = "llama, key heads, left padding"
    usual, ours = both(name)
    distr_compile.transformers.apply(ours, POLICY)
    inputs = MODELS[name][2]()
    asked: dict[str, Any] = {
        "max_new_tokens": 5,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    exact = usual.generate(**inputs, **asked)
    usual.compile(backend="distr", options={"policy": POLICY, "compiler": "eager"})
    wanted, got = (model.generate(**inputs, **asked) for model in (usual, ours))
    assert torch.equal(got.sequences, wanted.sequences)
    logits = [torch.stack(out.logits) for out in (got, wanted, exact)]
    torch.testing.assert_close(logits[0], logits[1], atol=TOLERANCE, rtol=TOLERANCE)
    assert (logits[1][0] - logits[2][0]).abs().max() > 10 * TOLERANCE, "prefill was exact"


@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_caches(cache: str) -> None:
    usual, ours = both("llama")
    distr_compile.transformers.apply(ours, {"default": {"group_size": 1}})
    asked: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "disable_compile": True}
    outputs = [m.generate(ids(), cache_implementation=cache, **asked) for m in (usual, ours)]
    assert torch.equal(*outputs)


def test_training_is_exact_and_no_gradient_is_lost() -> None:
    usual, ours = both("llama")
    distr_compile.transformers.apply(ours, POLICY)
    for model in (usual, ours):
        model.train()
        model(ids(), labels=ids()).loss.backward()
    wanted = {name: p.grad for name, p in usual.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], msg=name)
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0


def test_training_through_the_approximation_is_that_of_the_backend() -> None:
    policy = {"default": {**POLICY["default"], "training": "approximate"}}
    usual, ours = both("llama")
    distr_compile.transformers.apply(ours, policy)
    options = {"policy": policy, "compiler": "eager"}
    compiled = torch.compile(usual, backend="distr", options=options)
    for model in (compiled, ours):
        model.train()
        model(ids(), labels=ids()).loss.backward()
    assert distr_compile.report(compiled).distr == 2
    wanted = {name: p.grad for name, p in usual.named_parameters()}
    exact = built("llama", "sdpa").train()
    exact(ids(), labels=ids()).loss.backward()
    differs = False
    for (name, parameter), plain in zip(ours.named_parameters(), exact.parameters(), strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-6, msg=name)
        differs |= not torch.allclose(parameter.grad, plain.grad, rtol=1e-3)
    assert differs


def test_dropout_in_training_is_that_of_sdpa() -> None:
    usual, ours = (built("gpt2, left padding", each).train() for each in ("sdpa", "distr"))
    distr_compile.transformers.apply(ours, POLICY)
    inputs = MODELS["gpt2, left padding"][2]()
    outputs = []
    for model in (usual, ours):
        torch.manual_seed(3)
        outputs.append(real_rows(model(**inputs)[0], inputs))
    torch.testing.assert_close(*outputs)


def test_dropout_in_training_that_is_approximated() -> None:
    """Ours, by the seed; on the average over seeds what the model without dropout has."""
    models = [built("gpt2, left padding", "distr").train() for _ in range(2)]
    policy = {"default": {**POLICY["default"], "training": "approximate"}}
    for model, p in zip(models, (0.2, 0.0), strict=True):
        distr_compile.transformers.apply(model, policy)
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = p if name.endswith("attn_dropout") else 0.0
    inputs = MODELS["gpt2, left padding"][2]()
    dropped, plain = models

    def run(model: torch.nn.Module, seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return real_rows(model(**inputs)[0], inputs).detach()

    assert torch.equal(run(dropped, 1), run(dropped, 1))
    assert not torch.equal(run(dropped, 1), run(dropped, 2))
    many = torch.stack([run(dropped, seed) for seed in range(30)])
    assert (many.mean(0) - run(plain, 0)).norm() < 0.5 * (many[0] - run(plain, 0)).norm()
    dropped(**inputs)[0].sum().backward()


@pytest.mark.parametrize("backend", ["eager", "distr"])
def test_a_model_with_plans_can_be_compiled(backend: str) -> None:
    ours = built("llama, key heads, left padding", "distr")
    distr_compile.transformers.apply(ours, POLICY)
    inputs = MODELS["llama, key heads, left padding"][2]()
    options = {"options": {"policy": POLICY, "compiler": "eager"}} if backend == "distr" else {}
    compiled = torch.compile(ours, backend=backend, fullgraph=True, **options)
    with torch.no_grad():
        wanted, got = (real_rows(m(**inputs)[0], inputs) for m in (ours, compiled))
    torch.testing.assert_close(got, wanted, atol=TOLERANCE, rtol=TOLERANCE)


def test_compiled_with_auto_the_backend_decides() -> None:
    """In a trace nothing can be timed: SDPA stands in the graph, and the backend sees it."""
    ours = built("llama", "distr")
    compiled = by_backend(ours, POLICY)
    with torch.no_grad():
        got, exact = compiled(ids())[0], built("llama", "sdpa")(ids())[0]
    rows = distr_compile.report(compiled).rows
    assert [(row.form, row.decision) for row in rows] == [("sdpa", "distr")] * 2
    assert (got - exact).abs().max() > 10 * TOLERANCE


@pytest.mark.parametrize("body", ["a model with plans", "a function"])
def test_the_policy_of_a_compile_that_comes_too_late(body: str) -> None:
    """The report says of what was planned before that the backend leaves it."""
    ours = built("llama", "distr")
    distr_compile.transformers.apply(ours, POLICY)
    x = torch.randn(1, 2, 64, 64)
    cases: dict[str, Any] = {
        "a model with plans": (ours, ids(), 2),
        "a function": (lambda q: distr_compile.attention(q, q, q, group_size=2), x, 1),
    }
    called, given, count = cases[body]
    exact = {"default": {"group_size": 1}}
    compiled = by_backend(called, exact)
    with torch.no_grad():
        compiled(given)
        explained = distr_compile.explain(called, given, policy=exact)
    # explain works on the model without its plans: their calls are not in what it captures.
    told = [distr_compile.report(compiled)] + [explained] * (body == "a function")
    for report in told:
        assert report.rows == ()
        (note,) = report.notes
        assert f"in no row: {count}, planned by transformers.apply" in note
        assert "the policy of this compile does not apply to them" in note
        assert "0 attentions in 1 graph" in str(report)


def test_no_note_where_nothing_was_planned_before() -> None:
    compiled = by_backend(built("llama", "sdpa"), POLICY)
    with torch.no_grad():
        compiled(ids())
    assert distr_compile.report(compiled).notes == ()


PACKED = ("llama", "llama, key heads, left padding", "mistral, window", "gemma2, soft cap")


@pytest.mark.parametrize("name", PACKED)
def test_each_sequence_of_a_packed_batch_is_what_it_is_alone(name: str) -> None:
    """Layers of the last two see a window of 16 tokens."""
    usual, ours = both(name)
    distr_compile.transformers.apply(ours, POLICY)
    lengths, row = (40, 17, 1, 70), ids(5).flatten()[:128]
    batch = transformers.DataCollatorWithFlattening(return_position_ids=True)(
        [{"input_ids": part.tolist()} for part in row.split(lengths)]
    )
    given = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
    with torch.no_grad():
        got = ours(**given, use_cache=False).logits[0]
        alone = [ours(each[None], use_cache=False).logits[0] for each in row.split(lengths)]
        exact = usual(**given, use_cache=False).logits[0]
    torch.testing.assert_close(got, torch.cat(alone), atol=TOLERANCE, rtol=TOLERANCE)
    assert (got - exact).abs().max() > 10 * TOLERANCE, "nothing was approximated"
    assert (got[57:58] - exact[57:58]).abs().max() < TOLERANCE, "one token sees itself"


@pytest.mark.parametrize("estimator", ["projection", "lsh-sample", "lsh-mean", "lsh-signed"])
def test_an_embedding_is_the_same_beside_longer_texts(estimator: str) -> None:
    """MiniLM's own weights; the mean over a text's tokens, alone and padded on the right."""
    zoo = minilm.load()
    model = zoo.model
    model.set_attn_implementation("distr")
    default = {"group_size": 2, "min_seq_len": 0, "estimator": estimator}
    distr_compile.transformers.apply(model, {"default": default})
    batch = zoo.batches[-1].kwargs
    lengths = batch["attention_mask"].sum(1)
    some = lengths.argsort()[::5]
    tokens, mask, lengths = batch["input_ids"][some], batch["attention_mask"][some], lengths[some]
    assert lengths.min() < 100 < 200 < lengths.max()

    def embedded(tokens: Tensor, mask: Tensor) -> Tensor:
        states = model(input_ids=tokens, attention_mask=mask).last_hidden_state
        return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    with torch.no_grad():
        together = embedded(tokens, mask)
        alone = [
            embedded(row[None, :n], torch.ones(1, n))
            for row, n in zip(tokens, lengths, strict=True)
        ]
    cosine = torch.cosine_similarity(together.double(), torch.cat(alone).double())
    assert (1 - cosine).max() < 1e-6


def test_positions_of_one_sequence_are_not_packed() -> None:
    """A mask of ones says that all tokens see one another, whatever their positions."""
    usual, ours = both("llama")
    distr_compile.transformers.apply(ours, {"default": {"group_size": 1}})
    positions = torch.arange(TOKENS).remainder(20).expand(2, -1)
    for mask in (torch.ones(2, TOKENS, dtype=torch.long), padding(left=True)):
        inputs = {"input_ids": ids(), "attention_mask": mask, "position_ids": positions}
        with torch.no_grad():
            wanted, got = (real_rows(m(**inputs)[0], inputs) for m in (usual, ours))
        torch.testing.assert_close(got, wanted, atol=TOLERANCE, rtol=TOLERANCE)


# --- without apply -------------------------------------------------------------------------------


def test_auto_without_a_measurement_is_exact() -> None:
    usual, ours = both("llama")
    with torch.no_grad():
        torch.testing.assert_close(ours(ids())[0], usual(ids())[0])


def test_auto_approximates_where_that_was_measured_to_be_faster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usual, ours = both("llama")
    monkeypatch.setattr(distr_compile.transformers, "_slower", lambda *_: None)
    compiled = by_backend(usual, POLICY)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids())[0], compiled(ids())[0])


def test_the_default_of_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "distr.toml"
    path.write_text("[default]\nmin_seq_len = 0\nrank = 18\n")
    monkeypatch.setenv("DISTR_POLICY", str(path))
    usual, ours = both("llama")
    with torch.no_grad():
        wanted = by_backend(usual, str(path))(ids())[0]
        torch.testing.assert_close(ours(ids())[0], wanted, atol=TOLERANCE, rtol=TOLERANCE)


def test_rules_need_apply(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "rules.toml"
    path.write_text('[[rule]]\nlayers = "*.0.self_attn"\nmin_seq_len = 0\n')
    monkeypatch.setenv("DISTR_POLICY", str(path))
    distr_compile.transformers.register()
    ours = built("llama", "distr")
    message = r"rules.toml .*: got 1 rules .*; accepted: .*default.* only; call distr_compile.tran"
    with torch.no_grad(), pytest.raises(PolicyError, match=message):
        ours(ids())
    distr_compile.transformers.apply(ours)
    with torch.no_grad():
        ours(ids())


# --- what is refused -----------------------------------------------------------------------------


def test_a_rule_that_names_nothing() -> None:
    ours = built("llama", "distr")
    with pytest.raises(PolicyError, match="names no module"):
        distr_compile.transformers.apply(
            ours, {"rule": [{"layers": "layers.7.self_attn", "group_size": 1}]}
        )


def test_a_policy_that_fits_no_layer_changes_none() -> None:
    """Each rule is right by itself; of layer 1 they ask what no estimator does."""
    ours = built("llama", "distr")
    distr_compile.transformers.apply(ours, {"default": {"group_size": 1}})
    before = [vars(module).get("_distr_assigned") for module in ours.modules()]
    rules = [{"layers": "*", "rounds": 2}, {"layers": "*.1.self_attn", "estimator": "lsh-mean"}]
    with pytest.raises(PolicyError, match=r"layer 'model.layers.1.self_attn': rounds"):
        distr_compile.transformers.apply(ours, {"rule": rules})
    after = [vars(module).get("_distr_assigned") for module in ours.modules()]
    assert all(a is b for a, b in zip(after, before, strict=True))


def test_a_column_of_the_data_is_told_once_and_changes_nothing() -> None:
    ours = built("llama", "distr")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        wanted = ours(ids)[0]
        with pytest.warns(UserWarning, match="sample_weight: got a Tensor; accepted: None"):
            got = ours(ids, sample_weight=torch.ones(1))[0]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ours(ids, sample_weight=torch.ones(1))
    assert torch.equal(got, wanted)


def test_a_model_that_does_not_ask_for_it() -> None:
    with pytest.raises(TypeError, match=r"model: got None \(NoneType\); accepted: a model of tran"):
        distr_compile.transformers.apply(None)
    with pytest.raises(ValueError, match=r"attn_implementation: got a model with 'sdpa'; accepted"):
        distr_compile.transformers.apply(built("llama", "sdpa"), POLICY)
    with pytest.raises(ValueError, match=r"got a model with no config of transformers"):
        distr_compile.transformers.apply(nn.Linear(2, 2), POLICY)


def test_a_model_whose_attention_cannot_be_exchanged() -> None:
    config = transformers.BloomConfig(vocab_size=100, hidden_size=64, n_layer=1, n_head=2)
    model = transformers.BloomModel._from_config(config, attn_implementation="distr")
    with pytest.raises(ValueError, match="BloomModel, whose code does not look at it; accepted"):
        distr_compile.transformers.apply(model, POLICY)


def test_a_part_whose_attention_cannot_be_exchanged_is_told() -> None:
    config = transformers.BloomConfig(vocab_size=100, hidden_size=64, n_layer=1, n_head=2)
    bloom = transformers.BloomModel._from_config(config, attn_implementation="distr")
    whole = nn.ModuleList([built("llama", "distr"), bloom])
    with pytest.warns(UserWarning, match="BloomModel, whose code does not .* stays exact"):
        distr_compile.transformers.apply(whole, POLICY)


def test_weights_are_not_given() -> None:
    ours = built("llama", "distr")
    message = "output_attentions: got True; accepted: False or None; load the model with"
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        ours.model.layers[0].self_attn(
            torch.randn(1, 20, 128),
            ours.model.rotary_emb(torch.randn(1, 20, 128), torch.arange(20)[None]),
            None,
            output_attentions=True,
        )


def test_calibrated_bases(tmp_path: Path) -> None:
    usual, ours = both("llama")
    batches = [distr_compile.Batch((ids(),)) for _ in range(2)]
    path = tmp_path / "bases.safetensors"
    made = distr_compile.calibrate(usual, batches, path=path, progress=False)
    plan = {"estimator": "calibrated", "min_seq_len": 0, "rank": 20}
    policy = distr_compile.Policy(plan).with_bases(path, made.sha256)
    with torch.no_grad():
        distr_compile.transformers.apply(ours, policy)
        got, wanted = ours(ids())[0], by_backend(usual, policy)(ids())[0]
    torch.testing.assert_close(got, wanted, atol=TOLERANCE, rtol=TOLERANCE)


def test_a_copy_keeps_its_plans() -> None:
    ours = built("llama", "distr")
    distr_compile.transformers.apply(ours, POLICY)
    twin = copy.deepcopy(ours)
    with torch.no_grad():
        assert torch.equal(twin(ids())[0], ours(ids())[0])
