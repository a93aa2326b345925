"""Attentions answered by a function: errors at every site, and any plan without compiling again."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distr_compile.accuracy.batch import Batch
from distr_compile.accuracy.instrument import Call, Instrument, layer_errors, site_errors
from distr_compile.accuracy.metrics import METRICS
from distr_compile.kernels.attention import reference
from distr_compile.policy import Policy, PolicyError
from distr_compile.tuning.calibrate import calibrate
from distr_compile.tuning.sensitivity import Bench
from tests.tiny_models import HEADS, WIDTH, Attention, noise, stack

HALF = {"estimator": "projection", "rank": 16}
MEAN = {"estimator": "lsh-mean", "group_size": 2}


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.compiler.reset()


def policy_of(fields: dict[str, Any], **more: Any) -> Policy:
    return Policy({**fields, "min_seq_len": 0, **more})


def through_the_backend(model: nn.Module, policy: Policy, x: Tensor) -> Tensor:
    options = {"policy": policy, "compiler": "eager"}
    with torch.no_grad():
        out: Tensor = torch.compile(model, backend="distr", options=options)(x)
    return out


def test_errors_are_those_of_the_exact_models_own_inputs() -> None:
    """Of both layers, over two batches, against the definition in fp64."""
    model, batches = stack(), [noise(1, 2, 64), noise(2, 3, 40)]
    errors = layer_errors(model, batches, {"half": HALF, "mean": MEAN})
    assert list(errors) == ["layers.0", "layers.1"]
    for index, name in enumerate(errors):
        for label, estimator in (("half", "projection"), ("mean", "lsh-mean")):
            error = norm = 0.0
            for x in batches:
                with torch.no_grad():
                    for layer in list(model.layers)[:index]:  # type: ignore[arg-type]
                        x = x + layer(x)
                    q, k, v = (t.double() for t in model.layers[index].operands(x))  # type: ignore[index,operator]
                options: dict[str, Any] = {"scale": WIDTH**-0.5, "is_causal": True}
                exact = reference.attention(q, k, v, **options, rank=WIDTH)
                ours = reference.attention(q, k, v, **options, rank=16, estimator=estimator)
                error += (ours - exact).square().sum().item()
                norm += exact.square().sum().item()
            assert errors[name][label] == pytest.approx(math.sqrt(error / norm), rel=1e-3)


def test_what_was_called_is_counted_by_shape() -> None:
    sites = site_errors(stack(), [noise(1, 2, 64), noise(2, 2, 64), noise(3, 3, 40)], {}).sites
    for site in sites.values():
        found = {(s.batch, s.num_queries): count for s, count in site.calls.items()}
        assert found == {(2, 64): 2, (3, 40): 1}
        shape = next(iter(site.calls))
        assert (shape.num_heads, shape.num_key_heads, shape.head_dim) == (HEADS, 2, WIDTH)
        assert shape.is_causal
        assert shape.mask is None
        assert shape.dtype == torch.float32


def test_any_choice_gives_what_the_backend_gives() -> None:
    """And nothing is compiled again for another choice."""
    model, x = stack(), noise(1, 2, 64)
    compiled = []

    class Counting(Instrument):
        def __call__(self, *args: Any) -> Any:
            compiled.append(1)
            return super().__call__(*args)

    chosen: dict[str, str] = {}

    def answer(call: Call) -> Tensor:
        label = chosen.get(call.site.layer)
        return call.exact() if label is None else call.approximate(label)

    policies = {"half": policy_of(HALF), "mean": policy_of(MEAN)}
    with Counting(answer, policies=policies).on(model) as run:
        torch.testing.assert_close(run(x), model(x))
        chosen["layers.0"] = "half"
        first = run(x)
        chosen["layers.1"] = "mean"
        both = run(x)
    assert len(compiled) == 1
    rules = [{"layers": "layers.0", **HALF}, {"layers": "layers.1", **MEAN}]
    default = {"group_size": 1, "min_seq_len": 0}
    torch.testing.assert_close(first, through_the_backend(model, Policy(default, rules[:1]), x))
    torch.compiler.reset()
    torch.testing.assert_close(both, through_the_backend(model, Policy(default, rules), x))
    assert (both - first).norm() > 1e-3 * first.norm()


def test_what_the_backend_would_refuse_is_no_candidate() -> None:
    plans = {
        "half": HALF,
        "wide": {"estimator": "lsh-mean", "rank": 17},
        "strict": policy_of(MEAN, causal="strict"),
        "long": Policy({**HALF, "min_seq_len": 65}),
        "exact": {"group_size": 1},
    }
    measured = site_errors(stack(), [noise(1, 2, 64)], plans)
    for name, site in measured.sites.items():
        assert site.possible == {"half"}
        assert list(measured.errors[name]) == ["half"]
        assert "17" in site.refused["wide"]
        assert "causal is strict" in site.refused["strict"]
        assert "min_seq_len is 65" in site.refused["long"]
        assert "group_size = 1" in site.refused["exact"]


def test_no_look_ahead_where_the_policy_forbids_it() -> None:
    """The candidate is then another one, the same as in the backend."""
    model, x = stack(), noise(1, 2, 64)
    strict = policy_of({**HALF, "grouping_block": 16}, causal="strict")
    chosen = {"layers.0": "strict", "layers.1": "strict"}
    with Bench(model, {"strict": strict}).ready() as output:
        ours = output(Batch.of(x), chosen)
    torch.testing.assert_close(ours, through_the_backend(model, strict, x))
    changed = x.clone()
    changed[:, 40:] += 1
    with Bench(model, {"strict": strict}).ready() as output:
        torch.testing.assert_close(output(Batch.of(changed), chosen)[:, :40], ours[:, :40])


def test_a_policy_is_measured_layer_by_layer() -> None:
    rules = [{"layers": "layers.1", "group_size": 1}]
    errors = layer_errors(
        stack(), [noise(1, 2, 64)], {"p": Policy({**HALF, "min_seq_len": 0}, rules)}
    )
    assert errors["layers.0"]["p"] > 1e-3
    assert errors["layers.1"] == {}


def test_short_calls_are_exact() -> None:
    measured = site_errors(stack(), [noise(1, 2, 8), noise(2, 2, 64)], {"half": HALF})
    assert measured.refused == {}
    alone = layer_errors(stack(), [noise(2, 2, 64)], {"half": HALF})
    for name, errors in measured.errors.items():
        assert errors["half"] == pytest.approx(alone[name]["half"], rel=1e-5)


def test_calibrated_bases_are_a_candidate_like_others(tmp_path: Path) -> None:
    model, x = stack(), noise(1, 2, 64)
    found = calibrate(model, [x], path=tmp_path / "b", layers="layers.0", progress=False)
    policy = policy_of({"estimator": "calibrated", "rank": 16}, causal="strict")
    policy = policy.with_bases(found.path, found.sha256)
    measured = site_errors(model, [x], {"fixed": policy})
    assert 1e-3 < measured.errors["layers.0"]["fixed"] < 0.5
    assert "no bases for the attention 'layers.1'" in measured.sites["layers.1"].refused["fixed"]
    rest = policy.with_rule("layers.1", group_size=1)
    bench = Bench(model, {"fixed": policy})
    rows = bench.rows([Batch.of(x)], [{"layers.0": "fixed"}], [METRICS["sqnr"]])
    out, exact = through_the_backend(model, rest, x), model(x)
    power = (out - exact).square().sum().item()
    assert rows[1][METRICS["sqnr"]][:, 1].sum().item() == pytest.approx(power, rel=1e-3)
    assert rows[0][METRICS["sqnr"]][:, 1].sum().item() == 0


class Cut(Attention):
    """A graph break between two attentions of one layer."""

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        first = super().forward(x, keep)
        torch._dynamo.graph_break()
        return first + super().forward(x + 1, keep)


@torch.compiler.nested_compile_region
def region(layer: Attention, x: Tensor) -> Tensor:
    return Attention.forward(layer, x)


class Regional(Attention):
    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        return region(self, x)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: nn.Sequential(Cut()), "a graph break cuts the layer in two"),
        (lambda: nn.Sequential(Regional(), Regional()), "one body is called for several layers"),
    ],
)
def test_attentions_that_mix_are_left_out(make: Any, why: str) -> None:
    model, x = make().eval(), noise(1, 2, 64)
    measured = site_errors(model, [x, x], {"half": HALF})
    assert measured.errors == {}
    assert all(why in reason for reason in measured.refused.values())
    assert measured.refused


def test_two_attentions_of_a_layer_are_two_sites() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = stack().layers[0]  # type: ignore[index]

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + self.layer(x.flip(1) + 1)  # type: ignore[no-any-return]

    errors = layer_errors(Twice().eval(), [noise(1, 2, 64)], {"half": HALF})
    assert list(errors) == ["layer#1of2", "layer#2of2"]
    assert errors["layer#1of2"] != errors["layer#2of2"]


def test_a_wrong_plan_is_an_error() -> None:
    with pytest.raises(PolicyError, match="estimater: got an unknown key"):
        layer_errors(stack(), [noise(1, 2, 64)], {"slip": {"estimater": "projection"}})
