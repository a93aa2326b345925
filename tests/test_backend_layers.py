"""The backend, layer by layer: each keeps its name and its plan, whatever shares a graph."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import distr_compile
from tests.backend_models import (
    DISTR,
    EXACT,
    FORCED,
    MOVED,
    SAME,
    Attention,
    Block,
    Broken,
    approximate,
    attend,
    compiled,
    decisions,
    fresh,  # noqa: F401 (a fixture of every test)
    tokens,
    two_layers,
)


def test_a_policy_for_one_of_12_equal_blocks_behind_graph_breaks() -> None:
    model, x = Broken(12).eval(), tokens()
    policy = {"default": {"group_size": 1}, "rule": [{"layers": "blocks.3.attn", **DISTR}]}
    outs = compiled(model, policy)(x)
    report = distr_compile.report(model)
    expected = {f"blocks.{i}.attn": "distr" if i == 3 else "exact" for i in range(12)}
    assert decisions(report) == expected
    assert len(report.rows) == 12
    for i, block in enumerate(model.blocks):
        before = outs[i - 1] if i else x
        if i == 3:
            wanted = before + approximate(block.attn, block.norm(before))
            assert (outs[i] - block(before)).abs().max() > MOVED
        else:
            wanted = block(before)
        torch.testing.assert_close(outs[i], wanted, **SAME)


def test_more_blocks_than_dynamo_recompiles_one_code() -> None:
    depth = torch._dynamo.config.recompile_limit + 5
    model = Broken(depth).eval()
    rules = [{"layers": f"blocks.{i}.attn", **DISTR} for i in range(0, depth, 2)]
    compiled(model, {"default": {"group_size": 1}, "rule": rules})(tokens())
    report = distr_compile.report(model)
    assert [row.decision for row in report.rows] == [
        "exact" if i % 2 else "distr" for i in range(depth)
    ]
    (note,) = report.notes  # and none about a limit
    assert note.startswith("Dynamo gave up Broken.forward()")


def test_a_module_called_twice() -> None:
    layer = Attention()
    model, x = nn.Sequential(layer, layer).eval(), tokens()
    out = compiled(model, {**EXACT, "rule": [{"layers": "1", **DISTR}]})(x)
    # The one module has two names; the rule for either of them is a rule for the module.
    torch.testing.assert_close(out, approximate(layer, approximate(layer, x)), **SAME)
    assert [row.decision for row in distr_compile.report(model).rows] == ["distr", "distr"]


def test_one_module_under_two_parents() -> None:
    shared = Block()
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(Block(), shared)})
    function = compiled(model["b"], {**EXACT, "rule": [{"layers": "1.attn", **DISTR}]})
    x = tokens()
    out = function(x)
    first = model["b"][0](x)
    wanted = first + approximate(shared.attn, shared.norm(first))
    torch.testing.assert_close(out, wanted, **SAME)
    assert decisions(distr_compile.report(model["b"])) == {"0.attn": "exact", "1.attn": "distr"}
    assert decisions(distr_compile.report(model)) == {"b.0.attn": "exact", "b.1.attn": "distr"}


def attend_behind_a_break(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    return attend(q, k, v)


class Helped(Attention):
    """Its attention is a frame of its own that knows no module, so it cannot be guarded."""

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.merge(attend_behind_a_break(*self.split(x))))


def test_a_graph_that_layers_share_stays_exact_where_their_plans_differ() -> None:
    model, x = nn.Sequential(*(Helped() for _ in range(3))).eval(), tokens()
    exact = model(x)
    out = compiled(model, {**EXACT, "rule": [{"layers": "1", **DISTR}]})(x)
    torch.testing.assert_close(out, exact, **SAME)
    report = distr_compile.report(model)
    assert {row.decision for row in report.rows} == {"exact"}
    texts = [r.text for row in report.rows for r in row.reasons if r.code == "shared-graph"]
    assert texts
    assert all(text.startswith("graph shared by layers 0, 1, 2") for text in texts)


def test_a_graph_that_layers_share_is_approximated_where_their_plans_agree() -> None:
    model, x = nn.Sequential(*(Helped() for _ in range(3))).eval(), tokens()
    out = compiled(model)(x)
    wanted = x
    for layer in model:
        wanted = approximate(layer, wanted)
    torch.testing.assert_close(out, wanted, **SAME)
    assert any(n.startswith("graph shared by layers") for n in distr_compile.report(model).notes)


def test_two_models_of_one_class_with_different_policies() -> None:
    models, x = [two_layers() for _ in range(3)], tokens()
    policies = [EXACT, FORCED, {**EXACT, "rule": [{"layers": "1", **DISTR}]}]
    functions = [compiled(m, p) for m, p in zip(models, policies, strict=True)]
    for _ in range(2):
        outs = [function(x) for function in functions]
    exact, forced, mixed = models
    torch.testing.assert_close(outs[0], exact(x), **SAME)
    torch.testing.assert_close(outs[1], approximate(forced[1], approximate(forced[0], x)), **SAME)
    torch.testing.assert_close(outs[2], approximate(mixed[1], mixed[0](x)), **SAME)
    got = [tuple(decisions(distr_compile.report(f)).values()) for f in functions]
    assert got == [("exact", "exact"), ("distr", "distr"), ("exact", "distr")]


def test_one_model_compiled_with_two_policies_reports_the_latest() -> None:
    model, x = Attention().eval(), tokens()
    exact, forced = compiled(model, EXACT), compiled(model, FORCED)
    for _ in range(2):
        torch.testing.assert_close(exact(x), model(x), **SAME)
        torch.testing.assert_close(forced(x), approximate(model, x), **SAME)
    assert decisions(distr_compile.report(model)) == {"": "distr"}
    exact(tokens(batch=3))  # a new graph
    assert [row.decision for row in distr_compile.report(model).rows] == ["exact", "exact"]
    assert distr_compile.report(model) == distr_compile.report(exact)
