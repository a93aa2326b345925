"""``distr_compile.export``: the numbers of the backend, in a program that others can load."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import distr_compile
from distr_compile import exporting
from distr_compile.policy import PolicyError

ROOT = Path(__file__).parents[1]
OP = torch.ops.distr.attention.default


class Block(nn.Module):
    """Attention spelled out, of one head of width 64."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-2, -1) / 8).softmax(-1) @ v

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 1, 64)).permute(2, 0, 3, 1, 4)
        return x + self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))


class Causal(Block):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.Sequential(Block(), Causal())

    def forward(self, x: Tensor, *, bias: Tensor | None = None) -> dict[str, Tensor]:
        y = self.blocks(x if bias is None else x + bias)
        return {"y": y, "mean": y.mean()}


POLICY = {
    "default": {"group_size": 2, "min_seq_len": 0},
    "rule": [{"layers": "blocks.1", "causal": "strict", "grouping_block": 16}],
}
DYNAMIC = {"x": {1: Dim.DYNAMIC}, "bias": None}


def inputs(tokens: int = 40) -> tuple[Tensor]:
    return (torch.randn(2, tokens, 64, generator=torch.Generator().manual_seed(tokens)),)


def by_backend(model: nn.Module, x: Tensor, policy: Any = POLICY) -> Tensor:
    torch._dynamo.reset()
    options = {"policy": policy, "compiler": "eager"}
    with torch.no_grad():
        y: Tensor = torch.compile(model, backend="distr", options=options)(x)["y"]
    return y


def ops(program: ExportedProgram) -> list[Any]:
    return [node for node in program.graph.nodes if node.target is OP]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_the_numbers_are_the_backends(strict: bool, dynamic: bool) -> None:
    model = Model().eval()
    shapes = DYNAMIC if dynamic else None
    program = distr_compile.export(
        model, inputs(), {"bias": None}, policy=POLICY, strict=strict, dynamic_shapes=shapes
    )
    assert [(n.kwargs["rank"], n.kwargs.get("strict", False)) for n in ops(program)] == [
        (32, False),
        (32, True),
    ]
    for tokens in (40, 77) if dynamic else (40,):
        (x,) = inputs(tokens)
        got = program.module()(x, bias=None)  # with gradients recorded elsewhere: no error
        wanted = by_backend(model, x)
        torch.testing.assert_close(got["y"], wanted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(got["mean"], wanted.mean())
        with torch.no_grad():
            assert (wanted - model(x)["y"]).abs().max() > 1e-4, "nothing was approximated"


def test_the_report_has_the_layers_by_name() -> None:
    model = Model().eval()
    distr_compile.export(model, inputs(), policy=POLICY)
    rows = distr_compile.report(model).rows
    assert [(row.layer, row.decision) for row in rows] == [
        ("blocks.0", "distr"),
        ("blocks.1", "distr"),
    ]


def test_the_model_is_left_as_it_was() -> None:
    model = Model().eval()
    program = distr_compile.export(model, inputs(), policy=POLICY)
    assert all(p.requires_grad for p in model.parameters())
    for name, parameter in program.named_parameters():
        own = model.get_parameter(name)
        assert parameter.data_ptr() == own.data_ptr()
        assert not parameter.requires_grad


def test_keyword_arguments() -> None:
    model = Model().eval()
    (x,) = inputs()
    program = distr_compile.export(model, (x,), {"bias": torch.ones(64)}, policy=POLICY)
    assert len(ops(program)) == 2
    got = program.module()(x, bias=torch.ones(64))["y"]
    torch.testing.assert_close(got, by_backend(model, x + 1), atol=1e-5, rtol=1e-5)


def test_exact_layers_are_sdpa_and_exact() -> None:
    model = Model().eval()
    program = distr_compile.export(model, inputs(), policy={"default": {"group_size": 1}})
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("aten.scaled_dot_product_attention.default") == 2
    assert not ops(program)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(*inputs())["y"], model(*inputs())["y"])


def test_what_auto_comes_to_is_in_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model().eval()
    assert not ops(distr_compile.export(model, inputs()))  # no measuring in tests: exact

    faster = SimpleNamespace(prefers_distr=True, exact=None, seconds={}, gains={})
    asked = []

    class Judge:
        def __call__(self, shape: Any, *_: Any, **__: Any) -> Any:
            asked.append(shape.num_queries)
            return faster

    monkeypatch.setattr(exporting, "Judge", Judge)
    assert len(ops(distr_compile.export(model, inputs()))) == 2
    assert asked == [40, 40]


def test_a_rule_that_names_nothing() -> None:
    for layers, message in (("blocks.2", "names no module"), ("blocks.0.out", r"blocks\.0\.out")):
        policy = {"rule": [{"layers": layers, "group_size": 1}]}
        with pytest.raises(PolicyError, match=message):
            distr_compile.export(Model().eval(), inputs(), policy=policy)


def test_bases_are_constants_of_the_program(tmp_path: Path) -> None:
    model, path = Model().eval(), tmp_path / "bases.safetensors"
    batches = [distr_compile.Batch(inputs()) for _ in range(2)]
    made = distr_compile.calibrate(model, batches, path=path, progress=False)
    plan = {"estimator": "calibrated", "min_seq_len": 0, "rank": 20}
    policy = distr_compile.Policy(plan).with_bases(path, made.sha256)
    program = distr_compile.export(model, inputs(), policy=policy)
    torch.export.save(program, tmp_path / "program.pt2")
    path.unlink()
    loaded = torch.export.load(tmp_path / "program.pt2")
    got = loaded.module()(*inputs())["y"]
    path.write_bytes(made.bases.to_bytes())
    torch.testing.assert_close(got, by_backend(model, *inputs(), policy), atol=1e-5, rtol=1e-5)


def test_the_backend_compiles_a_module_of_a_program() -> None:
    """Of a plain program it sees the attention; of ours there is nothing left to find."""
    model, (x,) = Model().eval(), inputs()
    options = {"policy": {"default": {"min_seq_len": 0}}, "compiler": "eager"}
    with torch.no_grad():
        plain = torch.export.export(model, (x,)).module()
        compiled = torch.compile(plain, backend="distr", options=options)
        got = compiled(x)["y"]
        assert [row.decision for row in distr_compile.report(compiled).rows] == ["distr"] * 2
        wanted = by_backend(model, x, options["policy"])
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
        ours = distr_compile.export(model, (x,), policy=options["policy"]).module()
        got = torch.compile(ours, backend="distr", options=options)(x)["y"]
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


class Attend(nn.Module):
    """Without parameters: nothing of it is left in a program but its name."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-2, -1) / 8).softmax(-1) @ v


class Deep(Block):
    def __init__(self) -> None:
        super().__init__()
        self.core = Attend()

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.core(q, k, v)


class Outer(nn.Module):
    """A model with programs in it, beside a layer of its own."""

    def __init__(self, *programs: nn.Module) -> None:
        super().__init__()
        self.own, self.programs = Block(), nn.ModuleList(programs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.own(x)
        for program in self.programs:
            x = program(x)
        return x


def decisions(model: nn.Module, x: Tensor, policy: Any) -> dict[str, str]:
    torch._dynamo.reset()
    options = {"policy": policy, "compiler": "eager"}
    with torch.no_grad():
        compiled = torch.compile(model, backend="distr", options=options)
        compiled(x)
    return {row.layer: row.decision for row in distr_compile.report(compiled).rows}


@pytest.mark.parametrize("strict", [False, True])
def test_the_layers_of_a_program_that_is_compiled_have_their_names(
    strict: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, (x,) = nn.Sequential(Block(), Deep(), Block()).eval(), inputs()
    program = torch.export.export(model, (x,), strict=strict)
    policy = {**POLICY, "rule": [{"layers": "1.core", "group_size": 1}]}
    wanted = {"0": "distr", "1.core": "exact", "2": "distr"}
    assert decisions(model, x, policy) == wanted
    assert decisions(program.module(), x, policy) == wanted
    torch.export.save(program, tmp_path / "program.pt2")
    assert decisions(torch.export.load(tmp_path / "program.pt2").module(), x, policy) == wanted
    with pytest.raises(Exception, match="names no module of the model"):
        decisions(program.module(), x, {**POLICY, "rule": [{"layers": "3.core", "rank": 16}]})


def test_programs_within_a_model() -> None:
    torch.manual_seed(0)
    (x,) = inputs()
    first = torch.export.export(nn.Sequential(Block(), Deep()).eval(), (x,))
    second = torch.export.export(Block().eval(), (x,), strict=True)
    policy = {**POLICY, "rule": [{"layers": "programs.0.*.core", "group_size": 1}]}
    found = decisions(Outer(first.module(), second.module()), x, policy)
    names = ["own", "programs.0.0", "programs.0.1.core", "programs.1"]
    assert found == dict(zip(names, ["distr", "distr", "exact", "distr"], strict=True))
    twice = decisions(Outer(second.module(), second.module()), x, {"default": POLICY["default"]})
    assert twice == {"own": "distr", "": "distr"}, "one program's modules are not told apart"


def test_bases_of_a_model_are_those_of_its_program(tmp_path: Path) -> None:
    model, path = Model().eval(), tmp_path / "bases.safetensors"
    batches = [distr_compile.Batch(inputs())]
    made = distr_compile.calibrate(model, batches, path=path, progress=False)
    plan = {"estimator": "calibrated", "min_seq_len": 0, "rank": 20}
    policy = distr_compile.Policy(plan).with_bases(path, made.sha256)
    module = torch.export.export(model, inputs()).module()
    assert decisions(module, *inputs(), policy) == {"blocks.0": "distr", "blocks.1": "distr"}
    got = by_backend(module, *inputs(), policy)
    torch.testing.assert_close(got, by_backend(model, *inputs(), policy), atol=1e-5, rtol=1e-5)


# --- other processes -----------------------------------------------------------------------------

LOAD = """
    import logging, sys, torch
    program, package, x, y = sys.argv[1:]
    x, y = torch.load(x, weights_only=True), torch.load(y, weights_only=True)
    assert not any(name.startswith("distr_compile") for name in sys.modules)
    try:
        torch.export.load(program)
    except Exception as error:
        print("program:", error)
    try:
        torch._inductor.aoti_load_package(package)(x)
    except Exception as error:
        print("package:", error)
    import distr_compile.ops
    print((torch.export.load(program).module()(x)["y"] - y).abs().max().item())
    print((torch._inductor.aoti_load_package(package)(x)["y"] - y).abs().max().item())
"""


def test_saved_loaded_and_run_in_a_fresh_process(tmp_path: Path) -> None:
    """Without this package: what torch raises, and its warning, name what is missing."""
    model, (x,) = Model().eval(), inputs(77)
    shapes = ({1: Dim.DYNAMIC},)
    program = distr_compile.export(model, inputs(), policy=POLICY, dynamic_shapes=shapes)
    files = [tmp_path / name for name in ("program.pt2", "package.pt2", "x.pt", "y.pt")]
    torch.export.save(program, files[0])
    torch._inductor.aoti_compile_and_package(program, package_path=str(files[1]))
    torch.save(x, files[2])
    torch.save(by_backend(model, x), files[3])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LOAD), *map(str, files)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert "package: " in said[-3]
    assert "distr::attention" in said[-3]
    assert "program: " in done.stdout
    assert exporting.HINT in done.stderr
    assert float(said[-2]) < 1e-5
    assert float(said[-1]) < 1e-5


class Minimal(nn.Module):
    """What AOTInductor could not run: keywords of the op that are left out, or have the default."""

    def forward(self, q: Tensor) -> Tensor:
        keywords = {"scale": 0.125, "rank": 32, "estimator": "projection", "grouping_block": 0}
        given = {"rounds": 1, "min_seq_len": 0, "seed": 0, "site": -1, "causal_offset": None}
        short: Tensor = torch.ops.distr.attention(q, q, q, **keywords)
        long: Tensor = torch.ops.distr.attention(q, short, q, **keywords, **given)
        offset = given | {"is_causal": True, "causal_offset": 3, "seed": 5, "min_seq_len": 7}
        return long + torch.ops.distr.attention(q, q, q, **keywords, **offset)


def test_integers_that_are_left_out_do_not_confuse_aotinductor(tmp_path: Path) -> None:
    """Else "Mismatch between ints consumed and num_ints": see the schema of the op."""
    q = torch.randn(1, 2, 40, 64, generator=torch.Generator().manual_seed(0))
    program = torch.export.export(Minimal(), (q,))
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "m.pt2"))
    got = torch._inductor.aoti_load_package(path)(q)
    torch.testing.assert_close(got, Minimal()(q), atol=1e-5, rtol=1e-5)
