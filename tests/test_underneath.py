"""Models that are compiled already, or have plans: what is measured is measured against exact."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import distr_compile
from distr_compile import underneath
from distr_compile.accuracy.evaluate import evaluate
from tests.backend_models import Attention
from tests.tiny_models import noise, stack

POLICY: dict[str, Any] = {
    "default": {"estimator": "lsh-mean", "group_size": 2, "min_seq_len": 0, "rounds": 1}
}
OPTIONS = {"policy": POLICY, "compiler": "eager"}
BATCHES = [noise(seed, 2, 48) for seed in range(4)]

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def whole(model: nn.Module) -> Any:
    return torch.compile(model, backend="distr", options=OPTIONS)


def in_place(model: nn.Module, backend: str = "distr", **options: Any) -> nn.Module:
    model.compile(backend=backend, **options)
    return model


def by_blocks(model: nn.Module) -> nn.Module:
    distr_compile.compile_blocks(model, POLICY, options={"compiler": "eager"})
    return model


def its_forward(model: nn.Module) -> nn.Module:
    model.forward = torch.compile(model.forward, backend="distr", options=OPTIONS)
    return model


def a_layer(model: nn.Module) -> nn.Module:
    model.layers[0] = whole(model.layers[0])  # type: ignore[index,operator]
    return model


def a_function(model: nn.Module) -> Any:
    def function(x: Tensor) -> Any:
        return model(x)

    return torch.compile(function, backend="distr", options=OPTIONS)


WAYS: list[Callable[[nn.Module], Any]] = [
    whole,
    functools.partial(in_place, options=OPTIONS),
    functools.partial(in_place, backend="eager"),
    by_blocks,
    its_forward,
    a_layer,
]
NAMES = ["whole", "in place", "in place, by another", "by blocks", "forward", "a layer"]
each_way = pytest.mark.parametrize("way", WAYS, ids=NAMES)


def loss_by_hand() -> float:
    """SQNR in dB of the approximated model, from outputs of models that nothing else has seen."""
    signal = error = 0.0
    with torch.no_grad():
        compiled = whole(stack())
        for x in BATCHES:
            exact = stack()(x).double()
            signal += exact.square().sum().item()
            error += (compiled(x).double() - exact).square().sum().item()
    torch._dynamo.reset()
    return float(10 * torch.tensor(signal / error).log10())


@pytest.fixture(scope="module")
def sqnr() -> float:
    return loss_by_hand()


def told(model: Any) -> Any:
    """The report of a model as data; None if it has none."""
    try:
        return distr_compile.report(model).to_dict()
    except LookupError:
        return None


@pytest.mark.parametrize("way", [*WAYS, a_function], ids=[*NAMES, "a function"])
def test_a_policy_is_held_against_the_exact_model(way: Any, sqnr: float) -> None:
    model = way(stack())
    before, reported = model(BATCHES[0]), told(model)
    found = distr_compile.regress(model, BATCHES, POLICY, progress=False)
    of_policy = found.result.policies["policy"]
    assert of_policy.metrics["sqnr"].value == pytest.approx(sqnr, rel=1e-4)
    assert min(of_policy.layers.values()) > 0.1
    assert found.notes == ()
    values = evaluate(model, BATCHES, ["sqnr"], {"it": distr_compile.Policy.from_any(POLICY)})
    assert values["it"].values["sqnr"] == pytest.approx(sqnr, rel=1e-4)
    assert (of_policy.approximated, of_policy.attentions) == (2, 2)
    assert told(model) == reported
    assert torch.equal(model(BATCHES[0]), before), "it is no longer compiled as it was"


@each_way
def test_layers_are_found(way: Any, tmp_path: Path) -> None:
    model = way(stack())
    path = tmp_path / "bases.safetensors"
    made = distr_compile.calibrate(model, BATCHES, path=path, progress=False)
    assert sorted(made.bases.layers) == ["layers.0", "layers.1"]
    with torch.no_grad():
        checked = distr_compile.verify(model, BATCHES[0], policy=POLICY)
    assert checked.ok
    assert [row.layer for row in checked.rows] == ["layers.0", "layers.1"]
    explained = distr_compile.explain(model, BATCHES[0], policy=POLICY)
    assert [row.layer for row in explained.rows] == ["layers.0", "layers.1"]
    assert explained.not_attention == ()


@pytest.mark.parametrize("way", [whole, by_blocks], ids=["whole", "by blocks"])
def test_tuned_as_if_it_were_not_compiled(way: Any) -> None:
    given: dict[str, Any] = {"time": "products", "candidates": [POLICY["default"]]}
    tuned = [
        distr_compile.tune(model, BATCHES, 0.5, metric="sqnr", progress=False, **given)
        for model in (stack(), way(stack()))
    ]
    assert tuned[0].policy.rule, "nothing was chosen"
    assert tuned[1].policy.to_dict() == tuned[0].policy.to_dict()
    for half in ("tuning", "held_out"):
        wanted, got = (getattr(each, half).loss for each in tuned)
        assert got == pytest.approx(wanted, rel=1e-3)
        assert wanted > 0


def test_a_decorator_around_something_compiled_stays() -> None:
    """``functools.wraps`` copies by what PyTorch finds the function that it compiled."""
    inner = whole(stack())

    @functools.wraps(torch.compile(inner.__call__, backend="eager"))
    def outer(x: Any) -> Any:
        return 100 * inner(x) + 7

    with torch.no_grad(), underneath.plain(outer) as own:
        assert own is outer


def test_a_function_that_closes_over_what_is_not_there_yet() -> None:
    def made() -> Any:
        model = stack()

        def function(x: Any) -> Any:
            return model(x) if x is not None else later(x)

        return function
        later = None

    assert len(distr_compile.explain(made(), BATCHES[0], policy=POLICY).rows) == 2


def test_all_is_put_back_also_after_an_error() -> None:
    model = its_forward(in_place(stack(), options=OPTIONS))
    compiled = whole(model)
    before = [dict(module.__dict__) for module in model.modules()]
    with underneath.plain(compiled) as own, underneath.plain(own) as same:
        assert same is own is model
        assert own._compiled_call_impl is None
        assert "forward" in own.__dict__
    with pytest.raises(KeyError), underneath.plain(compiled):
        raise KeyError
    assert [dict(module.__dict__) for module in model.modules()] == before


class Skipped(Attention):
    """Nobody makes a graph of it."""

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


@pytest.mark.parametrize("others", [0, 1])
def test_attention_outside_of_every_graph_is_not_verified(others: int) -> None:
    model = nn.Sequential(*(Attention() for _ in range(others)), Skipped()).eval()
    x = torch.randn(1, 40, model[0].qkv.in_features)
    found = distr_compile.verify(model, x)
    rows = [row.status for row in found.rows]
    if others:  # a softmax of its own may be anything
        assert (found.ok, rows) == (True, ["ok"])
    else:
        assert (found.ok, rows) == (False, ["not-verified"])
        assert "Dynamo makes no graph of this code" in str(found)


# --- models of transformers with plans ----------------------------------------------------------

TOKENS = torch.randint(0, 100, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def _registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("DISTR_POLICY", raising=False)
    distr_compile.transformers.register()
    yield
    monkeypatch.undo()
    distr_compile.transformers.register()


def llama(implementation: str) -> Any:
    sizes = dict.fromkeys(("hidden_size", "intermediate_size"), 128)
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
    config = transformers.LlamaConfig(**sizes, use_cache=False)
    torch.manual_seed(0)
    model: Any = transformers.LlamaForCausalLM._from_config(
        config, attn_implementation=implementation
    )
    return model.eval()


@pytest.mark.usefixtures("_registered")
@pytest.mark.parametrize("is_compiled", [False, True])
def test_plans_of_a_model_are_set_aside(is_compiled: bool) -> None:
    usual, ours = llama("sdpa"), llama("distr")
    distr_compile.transformers.apply(ours, POLICY)
    model = whole(ours) if is_compiled else ours
    batches = [{"input_ids": TOKENS}]
    with torch.no_grad():
        before, rows = model(TOKENS)[0], len(distr_compile.report(ours).rows)
    wanted, got = (
        distr_compile.regress(m, batches, POLICY, progress=False) for m in (usual, model)
    )
    (of_usual,), (of_ours,) = wanted.result.policies.values(), got.result.policies.values()
    assert (of_ours.approximated, of_ours.attentions) == (2, 2)
    assert 0 < of_usual.metrics["sqnr"].value < 80
    for name, value in of_usual.metrics.items():
        assert of_ours.metrics[name].value == pytest.approx(value.value, rel=1e-3)
    assert any("plans that distr_compile.transformers.apply gave" in note for note in got.notes)
    checked = distr_compile.verify(model, input_ids=TOKENS, policy=POLICY)
    assert checked.ok
    assert len(checked.rows) == 2
    explained = distr_compile.explain(model, TOKENS, policy=POLICY)
    assert explained.distr == 2
    assert any("a compile keeps them" in note for note in explained.notes)
    with torch.no_grad():
        assert torch.equal(model(TOKENS)[0], before)
    assert len(distr_compile.report(ours).rows) == rows
