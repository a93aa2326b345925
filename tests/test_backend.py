"""The backend from end to end: what is compiled, what stays exact, and what the report says."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters

import distr_compile
from distr_compile import DistrWarning, Policy, PolicyError, Report, backend
from distr_compile.estimators import DEFAULT_ESTIMATOR
from distr_compile.kernels.attention import reference
from tests.backend_models import (
    EXACT,
    FORCED,
    HEADS,
    MOVED,
    SAME,
    TOKENS,
    WIDTH,
    Attention,
    approximate,
    attend,
    codes,
    compiled,
    decisions,
    fresh,  # noqa: F401 (a fixture of every test)
    inner,
    tokens,
    two_layers,
)

# --- a process that has never heard of us --------------------------------------------------------

STRANGER = """
    import json, sys, torch
    from torch import nn

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(64, 192)

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 32)).permute(2, 0, 3, 1, 4)
            return (q @ k.mT * 32**-0.5).softmax(-1) @ v

    torch.manual_seed(0)
    model, x = Attention().eval(), torch.randn(2, 32, 64)
    assert not any(name.startswith("distr_compile") for name in sys.modules)
    with torch.no_grad():
        exact = model(x)
        compiled = torch.compile(model, backend="distr", options={"policy": sys.argv[1]})
        error = ((compiled(x) - exact).norm() / exact.norm()).item()

    from torch._dynamo.utils import counters
    import distr_compile
    row, = distr_compile.report(compiled).rows
    print(json.dumps({
        "error": error, "row": [row.layer, row.decision, row.group_size, row.estimator],
        "counters": {k: v for k, v in counters["distr"].items()},
        "fx_hit": counters["inductor"]["fxgraph_cache_hit"],
        "fx_miss": counters["inductor"]["fxgraph_cache_miss"],
        "aot_hit": counters["aot_autograd"]["autograd_cache_hit"],
        "aot_miss": counters["aot_autograd"]["autograd_cache_miss"],
    }))
"""


IN_NEW_CACHES = {
    "TORCHINDUCTOR_VEC_ISA_OK": "0",
    "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0",
}
"""Neither vector instructions nor headers are compiled for one kernel."""


def run_stranger(folder: Path, policy: Path) -> dict[str, Any]:
    """Compile with Inductor in a new process whose caches lie in ``folder``."""
    inductor = {"TORCHINDUCTOR_CACHE_DIR": str(folder), **IN_NEW_CACHES}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(STRANGER), str(policy)],
        env={**os.environ, **inductor},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_a_second_process_hits_the_caches_and_still_has_its_report(tmp_path: Path) -> None:
    policy = tmp_path / "distr.toml"
    policy.write_text("[default]\nmin_seq_len = 0\n")
    first = run_stranger(tmp_path / "cache", policy)
    second = run_stranger(tmp_path / "cache", policy)
    assert (first["fx_hit"], first["aot_hit"]) == (0, 0)
    assert (first["fx_miss"], first["aot_miss"]) == (1, 1)
    assert second["aot_hit"] == 1
    assert second["aot_miss"] == second["fx_miss"] == 0
    for run in (first, second):
        assert run["row"] == ["", "distr", 2, DEFAULT_ESTIMATOR]
        assert run["counters"] == {"found": 1, "distr": 1, "exact": 0, "not_attention": 0}
        assert run["error"] == first["error"]
        assert MOVED < run["error"] < 0.5


# --- ways to compile -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ways",
    [
        {},
        {"dynamic": True},
        {"fullgraph": True},
        {"mode": "default"},
        {"mode": "reduce-overhead"},
        {"mode": "max-autotune-no-cudagraphs"},
        {"mode": "max-autotune"},
    ],
    ids=str,
)
def test_every_way_to_compile_with_inductor(
    ways: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = tmp_path / "distr.toml"
    policy.write_text("[default]\nmin_seq_len = 0\n")
    monkeypatch.setenv("DISTR_POLICY", str(policy))
    model, x = Attention().eval(), tokens()
    out = torch.compile(model, backend="distr", **ways)(x)
    torch.testing.assert_close(out, approximate(model, x), **SAME)
    assert decisions(distr_compile.report(model)) == {"": "distr"}


@pytest.mark.parametrize("compiler", ["inductor", "aot_eager", "eager"])
def test_every_compiler_gives_the_reference_and_with_group_size_1_the_model(compiler: str) -> None:
    model, x = Attention().eval(), tokens()
    expected = {2: approximate(model, x), 1: model(x)}
    for group_size, out in expected.items():
        policy = {"default": {"min_seq_len": 0, "group_size": group_size}}
        torch.testing.assert_close(compiled(model, policy, compiler)(x), out, **SAME)
    assert (expected[2] - expected[1]).abs().max() > MOVED


def test_mode_among_the_options() -> None:
    model, x = Attention().eval(), tokens()
    out = compiled(model, compiler="inductor", mode="max-autotune-no-cudagraphs")(x)
    torch.testing.assert_close(out, approximate(model, x), **SAME)


def test_module_compile() -> None:
    model, x = two_layers(), tokens()
    exact = model(x)
    model.compile(backend="distr", options={"policy": FORCED, "compiler": "aot_eager"})
    assert (model(x) - exact).abs().max() > MOVED
    assert decisions(distr_compile.report(model)) == {"0": "distr", "1": "distr"}


def test_submodules_one_by_one_report_with_their_parent() -> None:
    model, x = two_layers(), tokens()
    expected = approximate(model[1], approximate(model[0], x))
    for layer in model:
        layer.compile(backend="distr", options={"policy": FORCED, "compiler": "eager"})
    torch.testing.assert_close(model(x), expected, **SAME)
    assert decisions(distr_compile.report(model)) == {"0": "distr", "1": "distr"}
    assert decisions(distr_compile.report(model[1])) == {"": "distr"}


def test_submodules_replaced_by_compiled_ones() -> None:
    model, x = two_layers(), tokens()
    for i in range(2):
        model[i] = compiled(model[i], FORCED if i else EXACT)
    model(x)
    assert decisions(distr_compile.report(model)) == {"0": "exact", "1": "distr"}


def test_a_function_with_a_policy() -> None:
    q, k, v = torch.randn(3, 2, HEADS, TOKENS, 32)
    function = compiled(attend)
    expected = reference.attention(q, k, v, scale=32**-0.5, rank=16, estimator=DEFAULT_ESTIMATOR)
    torch.testing.assert_close(function(q, k, v), expected, **SAME)
    (row,) = distr_compile.report(function).rows
    assert (row.layer, row.decision) == ("", "distr")
    assert row.shapes == dict.fromkeys("qkv", (2, HEADS, TOKENS, 32))


def test_nothing_was_compiled() -> None:
    with pytest.raises(LookupError, match="nothing was compiled for it with backend='distr'"):
        distr_compile.report(two_layers())


def test_a_compile_with_a_name_where_torch_compile_takes_one() -> None:
    takes_name = "name" in inspect.signature(torch.compile).parameters
    model, x = Attention().eval(), tokens()
    out = torch.compile(model, backend="distr", **({"name": "ours"} if takes_name else {}))(x)
    torch.testing.assert_close(out, model(x), **SAME)


# --- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"polcy": "x"}, "got unknown key 'polcy'; accepted: policy, mode, .*mean 'policy'"),
        ({"max_autotne": True}, "got unknown key 'max_autotne'.*mean 'max_autotune'"),
        ({"max_autotune": "yes"}, "max_autotune, got str should be bool"),
        ({"mode": "max-autotun"}, "mode: got 'max-autotun'; accepted: .*mean 'max-autotune'"),
        ({"compiler": "inducter"}, "compiler: got 'inducter'; accepted: .*mean 'inductor'"),
        ({"compiler": "eager", "max_autotune": True}, "max_autotune: .*compiler is 'eager'"),
        ({"compiler": "eager", "mode": "max-autotune"}, "mode: for Inductor.*compiler is 'eager'"),
        ({"report": 3}, "report: got 3; accepted: a path"),
        ({"policy": 3}, "policy: got 3 "),
    ],
    ids=str,
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BackendCompilerFailed) as error:
        torch.compile(two_layers(), backend="distr", options=options)(tokens())
    assert isinstance(error.value.inner_exception, ValueError)
    assert re.search(message, inner(error))


def test_mode_and_options_together_are_refused_by_torch() -> None:
    with pytest.raises(RuntimeError, match="Either mode or options can be specified"):
        torch.compile(two_layers(), backend="distr", mode="default", options={"policy": {}})


def test_options_of_inductor_reach_it() -> None:
    seen: list[bool] = []

    def look(graph: Any) -> None:
        from torch._inductor import config

        seen.append(config.fallback_random)

    model, x = Attention().eval(), tokens()
    compiled(model, compiler="inductor", fallback_random=True, post_grad_custom_pre_pass=look)(x)
    assert seen == [True]


def test_policy_as_path_policy_and_dict(tmp_path: Path) -> None:
    policy = Policy(rule=[{"layers": "1", "group_size": 1}], **FORCED)
    policy.save(tmp_path / "distr.toml")
    given = [policy, str(tmp_path / "distr.toml"), tmp_path / "distr.toml", policy.to_dict()]
    for one in given:
        model = two_layers()
        compiled(model, one)(tokens())
        assert decisions(distr_compile.report(model)) == {"0": "distr", "1": "exact"}


def test_policy_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Policy(rule=[{"layers": "0", "min_seq_len": 0}]).save(tmp_path / "distr.toml")
    monkeypatch.setenv("DISTR_POLICY", str(tmp_path / "distr.toml"))
    model = two_layers()
    torch.compile(model, backend="distr", options={"compiler": "eager"})(tokens())
    assert decisions(distr_compile.report(model)) == {"0": "distr", "1": "exact"}


def test_report_as_json(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    model = two_layers()
    compiled(model, report=path)(tokens())
    read = Report.from_json(path.read_text())
    assert decisions(read) == {"0": "distr", "1": "distr"}
    assert read.to_dict() == distr_compile.report(model).to_dict()


def test_counters() -> None:
    compiled(two_layers(), {**FORCED, "rule": [{"layers": "1", "group_size": 1}]})(tokens())
    assert dict(counters["distr"]) == {
        "found": 2,
        "distr": 1,
        "exact": 1,
        "not_attention": 0,
        "reason: group-size-1": 1,
    }


# --- the policy against the model ----------------------------------------------------------------


def test_a_rule_that_names_no_module_is_an_error_before_anything_compiles() -> None:
    ran = []
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Attention()).eval()
    model[0].register_forward_hook(lambda *_: ran.append(1))
    policy = {"rule": [{"layers": "blocks.*", "group_size": 4}]}
    with pytest.raises(BackendCompilerFailed) as error:
        compiled(model, policy)(tokens())
    assert isinstance(error.value.inner_exception, PolicyError)
    assert 'rule 1: layers: got "blocks.*", which names no module' in inner(error)
    assert ran == []
    assert "distr" not in counters or not counters["distr"]


def test_a_rule_for_modules_without_attention_is_a_warning() -> None:
    model = nn.Sequential(Attention(), nn.Linear(WIDTH, WIDTH)).eval()
    policy = {**FORCED, "rule": [{"layers": "1", "group_size": 4}]}
    with pytest.warns(DistrWarning, match="policy pattern '1' matches no attention of Sequential"):
        compiled(model, policy)(tokens())
    report = distr_compile.report(model)
    assert report.unmatched == ("1",)
    assert decisions(report) == {"0": "distr"}


@pytest.mark.parametrize(("field", "value"), [("group_size", 5), ("rank", 32), ("rank", 64)])
def test_a_width_that_no_layer_can_take_is_an_error(field: str, value: int) -> None:
    policy = {**FORCED, "rule": [{"layers": "*", field: value}]}
    with pytest.raises(BackendCompilerFailed) as error:
        compiled(two_layers(), policy)(tokens())
    assert isinstance(error.value.inner_exception, PolicyError)
    assert f"rule 1: {field}: got {value} for head width 32" in inner(error)


class Widths(nn.Module):
    """Head widths 32 and 64."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.wide = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        outs = []
        for projection in (self.narrow, self.wide):
            q = projection(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            outs.append(attend(q, q, q).sum())
        return torch.stack(outs)


def test_a_group_size_that_some_layers_cannot_take_leaves_those_exact() -> None:
    model = Widths().eval()
    compiled(model, {**FORCED, "default": {"min_seq_len": 0, "group_size": 4}})(tokens())
    report = distr_compile.report(model)
    assert [row.decision for row in report.rows] == ["exact", "distr"]
    assert codes(report) == [["rank"], []]
    assert "at least 16 columns: at most 2" in report.rows[0].reasons[0].text


# --- lengths -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(0, []), (TOKENS, []), (TOKENS + 1, ["min-seq-len"]), ("auto", ["not-measured"])],
)
def test_min_seq_len(limit: int | str, expected: list[str]) -> None:
    model, x = Attention().eval(), tokens()
    out = compiled(model, {"default": {"min_seq_len": limit}})(x)
    assert codes(distr_compile.report(model)) == [expected]
    torch.testing.assert_close(out, model(x) if expected else approximate(model, x), **SAME)


def test_fewer_than_16_queries_are_exact() -> None:
    model = Attention().eval()
    for length in (15, 16):
        torch._dynamo.reset()
        x = tokens(length=length)
        out = compiled(model)(x)
        is_exact = length == 15
        torch.testing.assert_close(out, model(x) if is_exact else approximate(model, x), **SAME)
    assert codes(distr_compile.report(model)) == [["decode"], []]


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
def test_a_symbolic_length_is_decided_at_run_time(compiler: str) -> None:
    model = Attention().eval()
    function = compiled(model, {"default": {"min_seq_len": 24}}, compiler, dynamic=True)
    calls = 0
    for length, is_exact in ((32, False), (20, True), (24, False), (23, True), (10, True)):
        x = tokens(length=length)
        wanted = model(x) if is_exact else approximate(model, x)
        torch.testing.assert_close(function(x), wanted, **SAME)
        calls += is_exact
        (row,) = distr_compile.report(model).rows  # one graph for all lengths
        assert row.decision == "distr"
        assert row.runtime_exact_calls == calls
    assert isinstance(row.shapes["q"][2], str)
    assert counters["distr"]["found"] == 1


def test_gradients_are_a_reason() -> None:
    model, x = Attention().eval(), tokens()
    function = compiled(model)
    with torch.enable_grad():
        out = function(x)
        out.sum().backward()
    torch.testing.assert_close(out, model(x), **SAME)
    assert model.qkv.weight.grad is not None
    (row,) = distr_compile.report(model).rows
    assert [str(r) for r in row.reasons] == [
        'gradients: gradients are recorded, and the policy says training = "exact": set '
        '"approximate", or call under torch.no_grad()'
    ]
    with torch.inference_mode():
        torch.testing.assert_close(function(x), approximate(model, x), **SAME)


# --- decoders ------------------------------------------------------------------------------------


def llama() -> Any:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize(
    "cache", [{}, {"cache_implementation": "static", "disable_compile": True}], ids=str
)
def test_generate_prefills_with_distr_and_decodes_exactly(cache: dict[str, Any]) -> None:
    model, prompt = llama(), torch.randint(0, 97, (2, 40))

    def generate() -> Tensor:
        mask = torch.ones_like(prompt)
        return model.generate(
            prompt,
            attention_mask=mask,
            do_sample=False,
            min_new_tokens=4,
            max_new_tokens=4,
            **cache,
        )

    eager, forward = generate(), model.forward
    model.forward = compiled(forward, EXACT)
    assert torch.equal(generate(), eager)
    torch._dynamo.reset()  # else the lengths seen are symbolic from the start
    model.forward = compiled(forward, FORCED)
    assert generate().shape == eager.shape
    model.forward = forward

    rows = distr_compile.report(model).rows
    assert {row.layer for row in rows} == {f"model.layers.{i}.self_attn" for i in range(2)}
    prefill = [row for row in rows if row.shapes["q"][2] == 40]
    decode = [row for row in rows if row.shapes["q"][2] == 1]
    assert len(prefill) + len(decode) == len(rows)
    assert [row.decision for row in prefill] == ["distr", "distr"]
    assert len(decode) >= 2
    assert {(row.decision, *(r.code for r in row.reasons)) for row in decode} == {
        ("exact", "decode")
    }


def test_sdpa_layers_too() -> None:
    class Fused(Attention):
        def forward(self, x: Tensor) -> Tensor:
            out = F.scaled_dot_product_attention(*self.split(x))
            return self.out(self.merge(out))

    model, x = Fused().eval(), tokens()
    torch.testing.assert_close(compiled(model)(x), approximate(model, x), **SAME)


@pytest.mark.parametrize("compiler", ["inductor", "aot_eager", "eager"])
def test_a_misspelt_option_is_told_whatever_compiles(compiler: str) -> None:
    with pytest.raises(Exception, match=r"got unknown key 'polcy'.*did you mean 'policy'"):
        backend.Options.parse({"polcy": "p.toml", "compiler": compiler}, None)
