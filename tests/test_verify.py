"""``distr_compile.verify`` and ``distr explain --verify``: what they find, and what they leave."""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import distr_compile
from distr_compile.bases import fingerprint
from distr_compile.cli import FOUND_ERROR, OK, main
from distr_compile.comparing import named_tensors, relative_error, row_error
from distr_compile.lowering.exactly import computing_exactly
from distr_compile.policy import PolicyError
from tests.passes import planting
from tests.passes.planting import SDPA, argument, option, planted

N, WIDTH = 24, 32


class Spelled(nn.Module):
    """Attention spelled out, with a bias over the keys, dropout and a gate on the output."""

    def __init__(self, gate: float = 1.0, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(64, 192)
        self.dropout = nn.Dropout(dropout)
        self.gate = gate

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, WIDTH)).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) / WIDTH**0.5
        if bias is not None:
            scores = scores + bias
        out = self.dropout(scores.softmax(-1)) @ v
        return x + self.gate * out.transpose(1, 2).flatten(2)


def x(*lead: int) -> Tensor:
    return torch.randn(*(lead or (2,)), N, 64, generator=torch.Generator().manual_seed(1))


BIAS = torch.randn(N, N, generator=torch.Generator().manual_seed(2))


def test_right_rewrites_are_ok() -> None:
    model = nn.Sequential(Spelled(), Spelled()).eval()
    found = distr_compile.verify(model, x())
    assert found.ok
    assert [(row.layer, row.decision, row.status) for row in found.rows] == [
        ("0", "distr", "ok"),
        ("1", "distr", "ok"),
    ]
    assert all(0 < row.error < 1e-5 and row.bound == 1e-4 for row in found.rows)
    assert [(out.name, out.status) for out in found.outputs] == [("out", "ok")]


@pytest.mark.parametrize(
    ("decision", "policy"),
    [
        ("distr", None),
        ("exact, sdpa", {"default": {"group_size": 1}}),
        ("exact", {"default": {"group_size": 1, "exact": "keep"}}),
    ],
)
def test_each_decision_is_checked(decision: str, policy: Any) -> None:
    found = distr_compile.verify(Spelled().eval(), x(), BIAS, policy=policy)
    assert found.ok
    assert [row.decision for row in found.rows] == [decision]


@pytest.mark.parametrize(
    ("edit", "target"),
    [
        (option(scale=lambda s: 1.05 * s), planting.OP),
        (argument(3, None), planting.OP),
        (argument(1, lambda k: k.flip(1)), planting.OP),
        (option(scale=lambda s: 1.05 * s), SDPA),
        (option(attn_mask=lambda _: None), SDPA),
        (argument(1, lambda k: k.flip(1)), SDPA),
    ],
    ids=["scale", "mask", "K", "sdpa scale", "sdpa mask", "sdpa K"],
)
@pytest.mark.parametrize("gate", [1.0, 0.0])
def test_a_wrong_rewrite_is_found_also_behind_a_gate_of_zero(
    edit: planting.Edit, target: Any, gate: float
) -> None:
    policy = {"default": {"group_size": 1}} if target is SDPA else None
    with planted(edit, target) as nodes:
        found = distr_compile.verify(Spelled(gate).eval(), x(), BIAS, policy=policy)
    assert len(nodes) == 1
    assert not found.ok
    assert [row.status for row in found.rows] == ["wrong"]
    assert [out.status for out in found.outputs] == ["wrong" if gate else "ok"]


def test_one_wrong_layer_is_the_only_one_blamed() -> None:
    def edit(graph: Any, node: Any) -> None:
        if node.kwargs["site"] == 1:
            option(scale=lambda s: 1.1 * s)(graph, node)

    with planted(edit):
        found = distr_compile.verify(nn.Sequential(*(Spelled() for _ in range(3))).eval(), x())
    assert [row.status for row in found.rows] == ["ok", "wrong", "ok"]
    assert [out.status for out in found.outputs] == ["wrong"]


def test_a_wrong_rewrite_in_a_body_is_found() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Spelled(gate=0.0)

        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=False)

    model = Checkpointed().eval()
    assert distr_compile.verify(model, x()).ok
    with planted(option(scale=lambda s: 1.1 * s)) as nodes:
        found = distr_compile.verify(model, x())
    assert len(nodes) == 1
    assert [(row.layer, row.status) for row in found.rows] == [("block", "wrong")]


def test_a_body_that_is_called_twice_is_compared_call_by_call() -> None:
    block = Spelled(gate=0.0).eval()

    @torch.compiler.nested_compile_region
    def region(x: Tensor) -> Tensor:
        return block(x)

    def twice(x: Tensor) -> Tensor:
        return region(region(x) + 1.0)

    with torch.no_grad():
        assert distr_compile.verify(twice, x()).ok
        with planted(option(scale=lambda s: 1.1 * s)):
            found = distr_compile.verify(twice, x())
    assert {row.status for row in found.rows} == {"wrong"}


def test_inside_a_transform_the_tensor_underneath_is_compared() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT).softmax(-1) @ v

    policy = {"default": {"group_size": 1, "exact": "keep"}}
    operands = torch.randn(3, 2, 2, N, WIDTH)
    found = distr_compile.verify(torch.vmap(attend), *operands, policy=policy)
    assert found.ok
    assert [row.error for row in found.rows] == [0.0]


def test_a_value_of_zero_verifies_nothing() -> None:
    model = Spelled().eval()
    with torch.no_grad():
        model.qkv.weight[128:] = 0
        model.qkv.bias[128:] = 0
    found = distr_compile.verify(model, x())
    assert not found.ok
    (row,) = found.rows
    assert (row.status, row.error) == ("not-verified", None)
    assert "0 or NaN everywhere" in row.why
    assert [out.status for out in found.outputs] == ["ok"]


def test_a_branch_that_is_not_taken_is_not_verified() -> None:
    block = Spelled().eval()

    def choose(flag: Tensor, x: Tensor) -> Tensor:
        return torch.cond(flag, lambda x: block(x), lambda x: x.sin(), (x,))

    with torch.no_grad():
        taken = distr_compile.verify(choose, torch.tensor(True), x())
        other = distr_compile.verify(choose, torch.tensor(False), x())
    assert [row.status for row in taken.rows] == ["ok"]
    assert [(row.status, row.why) for row in other.rows] == [("not-verified", "no call reached it")]
    assert [out.status for out in other.outputs] == ["ok"]


def test_rows_that_see_no_key_are_left_out_and_others_are_not() -> None:
    bias = BIAS.clone()
    bias[3] = -math.inf
    model = Spelled().eval()
    assert distr_compile.verify(model, x(), bias).ok
    with planted(argument(3, lambda m: m.clamp_min(-100.0) * 1.2)):
        assert not distr_compile.verify(model, x(), bias).ok


def test_dropout_that_is_approximated_in_training_stays_as_it_is() -> None:
    """Ours drops other weights than the model, so that nothing could be compared."""
    model = Spelled(dropout=0.5).train()
    policy = {"default": {"training": "approximate", "min_seq_len": 0}}
    with torch.enable_grad():
        found = distr_compile.verify(model, x(), policy=policy)
    assert found.ok
    assert [row.decision for row in found.rows] == ["exact"]


def test_dropout_draws_the_same_numbers_and_leaves_the_generator() -> None:
    model = Spelled(dropout=0.5)
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    training = distr_compile.verify(model.train(), x())
    evaluated = distr_compile.verify(model.eval(), x())
    assert torch.equal(torch.rand(3), expected)
    assert training.ok
    assert [row.decision for row in training.rows] == ["exact"]
    assert evaluated.ok
    assert [row.decision for row in evaluated.rows] == ["distr"]


class Counting(nn.Module):
    """Writes to a buffer, an attribute, a list and its input."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Spelled()
        self.norm = nn.BatchNorm1d(64)
        self.register_buffer("mean", torch.zeros(64))
        self.calls = 0
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Any]:
        self.calls += 1
        out = self.block(x)
        self.mean.mul_(0.5).add_(out.mean((0, 1)))
        self.seen.append(out)
        x.mul_(scale)
        normed = self.norm(out.transpose(1, 2))
        return {"out": out + self.mean, "normed": [normed], "label": "a", "index": out.argmax(-1)}


@pytest.mark.parametrize("training", [False, True])
def test_state_and_inputs_are_compared_and_left_as_they_were(training: bool) -> None:
    model = Counting().train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch = x()
    found = distr_compile.verify(model, batch, scale=0.5)
    assert found.ok
    names = {out.name for out in found.outputs}
    assert {"out['out']", "out['normed'][0]", "args[0] (written)", "mean (written)"} <= names
    assert ("norm.running_mean (written)" in names) == training
    assert model.calls == 0
    assert model.seen == []
    assert torch.equal(batch, x())
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_lost_write_to_a_buffer_is_wrong() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Spelled()
            self.register_buffer("mean", torch.ones(64))

        def forward(self, x: Tensor) -> Tensor:
            self.mean.mul_(0.5)
            return self.block(x)

    def edit(graph: Any, node: Any) -> None:
        gone = next(n for n in graph.nodes if n.target == "mul_")
        gone.replace_all_uses_with(gone.args[0])
        graph.erase_node(gone)

    with planted(edit):
        found = distr_compile.verify(Model().eval(), x())
    assert [row.status for row in found.rows] == ["ok"]
    assert {out.name: out.status for out in found.outputs} == {
        "out": "ok",
        "mean (written)": "wrong",
    }


def test_gradients_leave_sites_exact_and_outputs_require_them() -> None:
    model = Spelled()
    found = distr_compile.verify(model, x())
    assert found.ok
    assert [row.decision for row in found.rows] == ["exact, sdpa"]
    assert model.qkv.weight.grad is None


def test_a_lost_gradient_is_wrong() -> None:
    with planted(planting.result(lambda out: out.detach()), SDPA):
        found = distr_compile.verify(Spelled(), x())
    assert [row.status for row in found.rows] == ["ok"]
    assert [out.status for out in found.outputs] == ["wrong"]
    assert "requires_grad is False where the model has True" in found.outputs[0].why


def test_graph_breaks_and_functions() -> None:
    blocks = [Spelled().eval(), Spelled().eval()]

    def function(x: Tensor) -> tuple[Tensor, float]:
        y = blocks[0](x)
        torch._dynamo.graph_break()
        return blocks[1](y), 3.0

    with torch.no_grad():
        found = distr_compile.verify(function, x())
    assert found.ok
    assert [row.graph for row in found.rows] == [0, 1]
    assert found.name == "function"
    assert [out.name for out in found.outputs] == ["out[0]"]


def test_a_compiled_model_and_its_caches_are_left_alone() -> None:
    model = Spelled().eval()
    compiled = torch.compile(model, backend="distr", options={"compiler": "eager"})
    with torch.no_grad():
        expected = compiled(x())
        found = distr_compile.verify(compiled, x())
        assert found.ok
        assert [row.decision for row in found.rows] == ["distr"]
        assert torch.equal(compiled(x()), expected)
    assert [row.decision for row in distr_compile.report(compiled).rows] == ["exact"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_bounds_follow_the_dtype(dtype: torch.dtype) -> None:
    model = nn.Sequential(*(Spelled() for _ in range(4))).to(dtype).eval()
    found = distr_compile.verify(model, x().to(dtype))
    bound = {torch.float64: 1e-10, torch.bfloat16: 5e-2, torch.float16: 1e-2}[dtype]
    assert found.ok
    assert {check.bound for check in (*found.rows, *found.outputs)} == {bound}
    with planted(option(scale=lambda s: 1.5 * s)):
        assert not distr_compile.verify(model, x().to(dtype)).ok


def test_a_softmax_in_single_precision_is_no_fault_of_a_model_in_double() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.mT, -1, dtype=torch.float32).to(v.dtype) @ v

    found = distr_compile.verify(attend, *torch.randn(3, 1, 2, N, WIDTH).double())
    assert found.ok
    assert [row.bound for row in found.rows] == [1e-4]


def test_lengths_of_the_policy_do_not_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    path = tmp_path / "p.toml"
    path.write_text('[default]\nmin_seq_len = 4096\n[[rule]]\nlayers = "0"\nmin_seq_len = 9999\n')
    model = nn.Sequential(Spelled(), Spelled()).eval()
    for policy in (None, path):
        monkeypatch.setenv("DISTR_POLICY", str(path))
        found = distr_compile.verify(model, x(), policy=policy)
        assert [row.decision for row in found.rows] == ["distr", "distr"]


def test_a_wrong_policy_is_an_error() -> None:
    rule = {"layers": "nowhere.*", "group_size": 1}
    with pytest.raises(PolicyError, match=r"nowhere"):
        distr_compile.verify(Spelled().eval(), x(), policy={"rule": [rule]})


def test_what_the_model_raises_is_raised_and_the_state_is_restored() -> None:
    class Failing(Counting):
        def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Any]:
            super().forward(x, scale)
            raise KeyError("no such thing")

    model = Failing().eval()
    with pytest.raises(KeyError, match="no such thing"):
        distr_compile.verify(model, x())
    assert model.calls == 0
    assert not model.mean.any()


def test_table_and_json(tmp_path: Any) -> None:
    with planted(argument(3, None)):
        found = distr_compile.verify(Spelled(gate=0.0).eval(), x(), BIAS)
    text = str(found)
    assert "(root)" in text
    assert "NOT OK: 0 of 1 attention ok, 1 wrong; 1 of 1 output ok" in text
    data = json.loads(found.to_json(tmp_path / "v.json"))
    assert data == json.loads((tmp_path / "v.json").read_text())
    assert data["ok"] is False
    assert data["rows"][0]["status"] == "wrong"
    assert data["rows"][0]["decision"] == "distr"


def test_an_infinite_error_is_valid_json() -> None:
    with planted(planting.result(lambda out: out * math.nan)):
        found = distr_compile.verify(Spelled().eval(), x())
    assert json.loads(found.to_json(), parse_constant=pytest.fail)["rows"][0]["error"] == "inf"


# --- the measures -------------------------------------------------------------------------------


def test_one_wrong_row_counts_whole() -> None:
    want = torch.randn(1000, 16, generator=torch.Generator().manual_seed(0))
    got = want.clone()
    got[7] = 0
    assert row_error(want, got) == pytest.approx(1.0, rel=0.5)
    assert relative_error(want, got) == pytest.approx(1000**-0.5, rel=0.5)


def test_a_row_of_padding_is_held_to_the_typical_row() -> None:
    want = torch.ones(10, 4)
    want[3] = 1e-6
    assert row_error(want, want + 1e-6) < 1e-5


def test_what_cannot_be_compared_is_infinitely_wrong() -> None:
    ones = torch.ones(3)
    assert relative_error(ones, torch.ones(4)) == math.inf
    assert relative_error(ones, torch.tensor([1, 1, math.inf])) == math.inf
    assert relative_error(ones / 0, ones / 0) == 0
    assert relative_error(ones / 0, -ones / 0) == math.inf


def test_named_tensors_looks_into_objects() -> None:
    @dataclass
    class Cache:
        keys: list[Tensor]
        step: int = 3

    value = {"a": (torch.ones(1), torch.ones(1, dtype=torch.int)), "b": Cache([torch.ones(2)])}
    assert [name for name, _ in named_tensors(value)] == ["out['a'][0]", "out['b'].keys[0]"]


@pytest.mark.parametrize("offset", [None, 3])
def test_the_op_computes_exactly_in_chunks(
    monkeypatch: pytest.MonkeyPatch, offset: int | None
) -> None:
    monkeypatch.setattr("distr_compile.lowering.exactly.CHUNK_BYTES", 8 * 2 * 4 * N * 5)
    q, k, v = (torch.randn(2, h, N, WIDTH) for h in (4, 2, 2))
    mask = torch.randn(N, N)
    with computing_exactly():
        out = torch.ops.distr.attention(
            q,
            k,
            v,
            mask,
            scale=0.3,
            is_causal=True,
            causal_offset=offset,
            rank=16,
            estimator="projection",
            grouping_block=0,
        )
    seen = torch.ones(N, N, dtype=torch.bool).tril(offset or 0)
    bias = mask.masked_fill(~seen, -math.inf)
    expected = F.scaled_dot_product_attention(q, k, v, bias, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(out, expected)


# --- the command --------------------------------------------------------------------------------


FACTORY = """
import torch
from tests.test_verify import Spelled, x

def model():
    return Spelled().eval(), (x(),)
"""


@pytest.fixture
def target(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "verified_models.py").write_text(FACTORY)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delenv("DISTR_POLICY", raising=False)
    yield "verified_models:model"
    sys.modules.pop("verified_models", None)


def test_the_command_prints_the_verification(target: str, capsys: Any) -> None:
    assert main(["explain", target, "--verify"]) == OK
    out = capsys.readouterr().out
    assert "not-measured" in out  # the report, as without --verify
    assert "ok: 1 of 1 attention ok; 1 of 1 output ok" in out


def test_the_command_fails_where_a_rewrite_is_wrong(target: str, capsys: Any) -> None:
    with planted(option(scale=lambda s: 1.05 * s)):
        assert main(["explain", target, "--verify", "--dynamic"]) == FOUND_ERROR
    text = capsys.readouterr()
    assert "wrong" in text.out
    assert "NOT OK" in text.err


def test_what_cannot_be_called_is_refused() -> None:
    with pytest.raises(TypeError, match=r"model: got 3 \(int\); accepted: a module or a function"):
        distr_compile.verify(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"model: got 3 \(int\); accepted: a torch.nn.Module"):
        distr_compile.export(3, ())  # type: ignore[arg-type]


def test_where_nothing_is_compared_nothing_is_ok() -> None:
    found = distr_compile.verify(lambda x: None, torch.ones(2))
    assert not found.ok
    assert "0 of 0 attention" in found.summary()


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_a_model_that_fsdp_has_just_sharded_is_left_as_it_was() -> None:
    model = nn.Sequential(Spelled(), Spelled()).eval()
    wanted = model(x(1))
    mesh = init_device_mesh("cpu", (1,))
    for part in (*model, model):
        fully_shard(part, mesh=mesh)
    for _ in range(2):
        assert distr_compile.verify(model, x(1)).ok
        torch.testing.assert_close(model(x(1)), wanted)


@pytest.mark.usefixtures("group")
def test_regress_of_a_sharded_model_is_that_of_the_whole() -> None:
    policy = {"default": {"group_size": 2, "min_seq_len": 0}}
    whole = nn.Sequential(Spelled(), Spelled()).eval()
    sharded = copy.deepcopy(whole)
    for part in (*sharded, sharded):
        fully_shard(part, mesh=init_device_mesh("cpu", (1,)))
    values = []
    for model in (whole, sharded):
        found = distr_compile.regress(model, [x(1)], policy, progress=False).result
        (result,) = found.policies.values()
        assert result.approximated == 2
        values.append(result.metrics["sqnr"].value)
    assert values[0] == pytest.approx(values[1], rel=1e-4)
    assert fingerprint(whole) == fingerprint(sharded)


@pytest.mark.usefixtures("group")
def test_under_ddp_nothing_seems_to_run_outside_of_the_graphs() -> None:
    model = DistributedDataParallel(Spelled()).eval()
    assert distr_compile.verify(model, x(1)).ok
    assert distr_compile.explain(model, x(1)).not_attention == ()
