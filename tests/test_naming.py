"""Rules, reports and files name a layer the same, whatever the model is wrapped in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import distr_compile
from distr_compile import naming
from distr_compile.policy import PolicyError


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(64, 192)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 1, 64)).permute(2, 0, 3, 1, 4)
        return x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.Sequential(Block(), Block())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.blocks(x)
        return y


class Net(nn.Module):
    """A container, as training frameworks have them."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.blocks = net, nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(self.blocks(x))
        return y


class Owner(nn.Module):
    """It has a child called ``module``, and is no wrapper."""

    def __init__(self) -> None:
        super().__init__()
        self.module = Model()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.module(x)
        return y


def as_of(library: str, name: str) -> type:
    """A stand-in for a class of a library that is not installed here."""
    return type(name, (nn.Module,), {"__module__": library, "__qualname__": name})


class LoraModel(as_of("peft.tuners.tuners_utils", "BaseTuner")):  # type: ignore[misc]
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.model(x)
        return y


class Peft(as_of("peft.peft_model", "PeftModel")):  # type: ignore[misc]
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = LoraModel(model)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_model(x)
        return y


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", rank=0, world_size=1, store=store)
    yield
    dist.destroy_process_group()


def checkpointed() -> nn.Module:
    model = Model()
    model.blocks[1] = checkpoint_wrapper(model.blocks[1])
    return model


def compiled_inside() -> nn.Module:
    model = Model()
    model.blocks[1] = torch.compile(model.blocks[1], backend="eager")  # type: ignore[assignment]
    return model


WRAPPED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "DDP": (lambda: DistributedDataParallel(Model()), "module.blocks.1"),
    "DataParallel": (lambda: DataParallel(Model()), "module.blocks.1"),
    "AveragedModel": (lambda: AveragedModel(Model()), "module.blocks.1"),
    "AveragedModel of DDP": (
        lambda: AveragedModel(DistributedDataParallel(Model())),
        "module.module.blocks.1",
    ),
    "checkpointed block": (checkpointed, "blocks.1._checkpoint_wrapped_module"),
    "compiled block": (compiled_inside, "blocks.1._orig_mod"),
    "peft": (lambda: Peft(Model()), "base_model.model.blocks.1"),
    "DDP of peft": (
        lambda: DistributedDataParallel(Peft(Model())),
        "module.base_model.model.blocks.1",
    ),
}
PLAN = {"layers": "blocks.1", "rank": 24}
POLICY = {"default": {"min_seq_len": 0}, "rule": [PLAN]}


def policy(layers: str) -> dict[str, Any]:
    return {**POLICY, "rule": [{**PLAN, "layers": layers}]}


def compiled(model: nn.Module, given: Any, **options: Any) -> tuple[Tensor, list[tuple[str, int]]]:
    torch._dynamo.reset()
    options = {"policy": given, "compiler": "eager", **options}
    called = torch.compile(model.eval(), backend="distr", options=options)
    x = torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = called(x)
    return y, [(row.layer, row.rank) for row in distr_compile.report(called).rows]


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("name", WRAPPED)
def test_a_rule_names_the_layer_through_its_wrappers(name: str) -> None:
    make, whole = WRAPPED[name]
    wanted, rows = compiled(Model(), POLICY)
    assert rows == [("blocks.0", 32), ("blocks.1", 24)]
    for layers in ("blocks.1", whole, "re:blocks\\.1"):
        got, named = compiled(make(), policy(layers))
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
        assert named == rows, layers


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("name", WRAPPED)
def test_explain_has_the_same_names(name: str) -> None:
    report = distr_compile.explain(WRAPPED[name][0]().eval(), torch.randn(2, 40, 64), policy=POLICY)
    assert [row.layer for row in report.rows] == ["blocks.0", "blocks.1"]


def test_names_are_dropped_by_type() -> None:
    owner = Owner()
    assert naming.canonical(owner)["module.blocks.1"] == "module.blocks.1"
    rows = compiled(owner, policy("module.blocks.1"))[1]
    assert rows == [("module.blocks.0", 32), ("module.blocks.1", 24)]
    with pytest.raises(Exception, match="names no module"):
        compiled(owner, POLICY)
    wrapped = DataParallel(owner)
    assert naming.canonical(wrapped)["module.module.blocks.1"] == "module.blocks.1"


def test_fsdp_segments() -> None:
    """Of its class only: such a model needs a group of processes to run."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    wrapper = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    nn.Module.__init__(wrapper)
    wrapper._fsdp_wrapped_module = Model()
    names = {name: naming.canonical(wrapper)[name] for name, _ in nn.Module.named_modules(wrapper)}
    assert names["_fsdp_wrapped_module.blocks.1.qkv"] == "blocks.1.qkv"
    assert names["_fsdp_wrapped_module"] == names[""] == ""


def test_a_container_and_its_root() -> None:
    wanted, rows = compiled(Model(), POLICY)
    got, named = compiled(Net(Model()), POLICY, root="net")
    torch.testing.assert_close(got, wanted)
    assert named == rows
    assert compiled(Net(Model()), policy("*.blocks.1"))[1] == [
        ("net.blocks.0", 32),
        ("net.blocks.1", 24),
    ]
    wrapped = DataParallel(Net(Model()))
    assert compiled(wrapped, POLICY, root="net")[1] == rows
    assert compiled(wrapped, POLICY, root="module.net")[1] == rows


def test_a_root_that_names_nothing() -> None:
    message = r"root: got 'nett', which names no module .*; accepted: .*; nearest modules: net"
    with pytest.raises(Exception, match=message):
        compiled(Net(Model()), POLICY, root="nett")
    with pytest.raises(Exception, match="root: got 3; accepted: the name of a module"):
        compiled(Net(Model()), POLICY, root=3)


def test_two_layers_of_one_name() -> None:
    model = Peft(Model())
    model.blocks = nn.Sequential(Block(), Block())  # beside what it wraps
    message = r"which without wrappers is both \S+ and \S+; accepted: the whole name of one"
    with pytest.raises(Exception, match=message) as error:
        compiled(model, POLICY)
    for whole in ("base_model.model.blocks.1", " blocks.1"):
        assert whole in str(error.value)
    rows = compiled(model, policy("base_model.model.blocks.1"))[1]
    assert rows == [("blocks.0", 32), ("blocks.1", 24)]
    assert len(compiled(model, policy("*"))[1]) == 2, "a rule that means both is no question"


def test_export_likewise() -> None:
    model = DataParallel(Model()).eval()
    x = torch.randn(2, 40, 64)
    program = distr_compile.export(model.module, (x,), policy=POLICY)
    assert [row.layer for row in distr_compile.report(model.module).rows] == [
        "blocks.0",
        "blocks.1",
    ]
    averaged = AveragedModel(Model()).eval()
    wrapped = distr_compile.export(averaged, (x,), policy=POLICY)
    ranks = [
        [
            n.kwargs["rank"]
            for n in each.graph.nodes
            if n.target is torch.ops.distr.attention.default
        ]
        for each in (program, wrapped)
    ]
    assert ranks == [[32, 24]] * 2


def test_bases_fit_a_wrapped_model(tmp_path: Path) -> None:
    path = tmp_path / "bases.safetensors"
    batches = [distr_compile.Batch((torch.randn(2, 40, 64),))]
    made = distr_compile.calibrate(Model().eval(), batches, path=path, progress=False)
    plan = {"estimator": "calibrated", "min_seq_len": 0, "rank": 20}
    given = distr_compile.Policy(plan).with_bases(path, made.sha256)
    wanted, rows = compiled(Model(), given)
    assert rows == [("blocks.0", 20), ("blocks.1", 20)]
    torch.testing.assert_close(compiled(AveragedModel(Model()), given)[0], wanted)


def test_tune_writes_names_without_wrappers(tmp_path: Path) -> None:
    batches = [distr_compile.Batch((torch.randn(2, 40, 64),)) for _ in range(4)]
    path = tmp_path / "distr.toml"
    distr_compile.tune(
        AveragedModel(Model()).eval(), batches, 0.5, metric="cosine", time="products", path=path
    )
    text = path.read_text()
    assert "module.blocks" not in text
    assert "blocks" in text
    assert all(row[1] for row in compiled(Model(), str(path))[1])


def test_a_policy_error_is_a_policy_error() -> None:
    names = naming.canonical(Model())
    assert naming.ambiguous(Model(), names) == {}
    with pytest.raises(PolicyError, match="is both a and b"):
        distr_compile.Policy(rule=[{"layers": "x", "rank": 16}]).check_ambiguous({"x": ("a", "b")})
