"""DTensors on two processes: the op computes heads and batches where they lie, and models do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import distr_compile
from distr_compile.lowering.sharded import told
from tests.processes import together
from tests.test_functional import qkv

SHARDINGS: dict[str, list[Any]] = {
    "heads": [Shard(1)],
    "batch": [Shard(0)],
    "tokens": [Shard(2)],
    "whole": [Replicate()],
    "both": [Shard(0), Shard(1)],
}
"""Of Q, K and V; the last on a mesh of two axes, of which one is of size 1."""

OUT = {
    "heads": ["S1"],
    "batch": ["S0"],
    "tokens": ["R"],
    "whole": ["R"],
    "both": ["S0", "S1"],
    "three heads, heads": ["R"],
    "three heads, both": ["S0", "R"],
}
"""Where the output lies, by the sharding, or by call and sharding."""

CALLS = (
    "plain", "mask per head", "mask of batches", "everything", "calibrated", "lsh", "short",
    "shared keys", "three heads",
)  # fmt: skip
WITH_OTHERS = {
    ("mask per head", "heads"): [["S0"]],
    ("mask of batches", "heads"): [["R"]],
    ("everything", "heads"): [["S1"], ["S0"]],
    ("calibrated", "heads"): [["S0"], ["S0"]],
    ("mask per head", "batch"): [["R"]],
    ("mask of batches", "batch"): [["S0"]],
    ("everything", "batch"): [["S0"], ["R"]],
    ("calibrated", "batch"): [["R"], ["R"]],
}
"""Calls and shardings of which masks, bases and sinks are DTensors too, and where these lie."""

CAUSAL = {"scale": 0.125, "is_causal": True, "rank": 32, "estimator": "projection"}


def operands(name: str) -> tuple[list[Tensor | None], dict[str, Any]]:
    """Q, K, V, the mask, A, B and sinks of a call of the op, and its keywords."""
    g = torch.Generator().manual_seed(2)
    q, k, v = qkv((2, 6, 45, 64), (2, 2, 45, 64), (2, 2, 45, 48))
    mask, A, B, sinks = None, None, None, None
    options: dict[str, Any] = {"grouping_block": 16, **CAUSAL}
    if name == "mask per head":
        mask = torch.randn(6, 45, 45, generator=g)
    if name == "mask of batches":
        mask = torch.randn(2, 1, 1, 45, generator=g)
    if name == "everything":
        mask, sinks = torch.rand(2, 6, 45, 45, generator=g) > 0.2, torch.randn(6, generator=g)
        options |= {"strict": True, "softcap": 20.0}
    if name == "calibrated":
        A, B = (torch.randn(2, 64, 32, generator=g) / 8 for _ in "AB")
        options["estimator"] = name
    if name == "lsh":
        options |= {"estimator": "lsh-mean", "rank": 16, "is_causal": False}
    if name == "shared keys":
        k, v = k[:1], v[:1]
    if name == "three heads":
        q, k, v = q[:, :3], torch.cat([k, k[:, :1]], 1), torch.cat([v, v[:, 1:]], 1)
    if name == "short":
        q = q[:, :, :7]
    return [q, k, v, mask, A, B, sinks], options


def on(mesh: DeviceMesh, tensors: list[Tensor | None], sharding: list[Any]) -> list[Any]:
    """Q, K and V sharded; the others are plain and whole everywhere."""
    first = [
        # Of keys that all entries of the batch share there is nothing to divide.
        distribute_tensor(t, mesh, [Replicate()] * mesh.ndim if len(t) == 1 else sharding)
        for t in tensors[:3]
        if t is not None
    ]
    return [*first, *tensors[3:]]


def all_on(mesh: DeviceMesh, tensors: list[Tensor | None], label: str) -> list[Any]:
    """Every operand sharded by heads or by the batch, as far as it has that axis."""
    axis = {"heads": 1, "batch": 0}[label]
    size = 6 if label == "heads" else 2

    def of(number: int, t: Tensor | None) -> Any:
        if t is None:
            return None
        own = axis if number < 3 else {4: 0, 5: 0, 6: 0}.get(number, t.ndim - 4 + axis)
        divides = label == "heads" or number < 4
        if number == 3:
            divides = own >= 0 and t.shape[own] == size
        return distribute_tensor(t, mesh, [Shard(own)] if divides else [Replicate()])

    return [of(number, t) for number, t in enumerate(tensors)]


def letters(t: Tensor) -> list[str]:
    assert isinstance(t, DTensor)
    return [f"S{p.dim}" if isinstance(p, Shard) else "R" for p in t.placements]


def gradients(tensors: list[Any], options: dict[str, Any], weights: Tensor) -> list[Tensor]:
    """Of Q, K, V, a floating mask and sinks, whole."""
    asked = [t for t in (*tensors[:4], tensors[6]) if t is not None and t.is_floating_point()]
    for t in asked:
        t.requires_grad_()
    out = torch.ops.distr.attention(*tensors, **options)
    if isinstance(out, DTensor):
        weights = distribute_tensor(weights, out.device_mesh, out.placements)
    (out * weights).sum().backward()
    found = [t.grad for t in asked]
    return [g.full_tensor() if isinstance(g, DTensor) else g for g in found]


def calls() -> dict[str, Any]:
    """Every call under every sharding: how far off, where the output lies, gradients too."""
    found: dict[str, Any] = {}
    line, square = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (1, 2))
    for name in CALLS:
        for label, sharding in SHARDINGS.items():
            mesh = square if label == "both" else line
            tensors, options = operands(name)
            wanted = torch.ops.distr.attention(*tensors, **options)
            out = torch.ops.distr.attention(*on(mesh, tensors, sharding), **options)
            off = (out.full_tensor() - wanted).abs().max().item()
            weights = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1))
            pairs = zip(
                gradients(on(mesh, operands(name)[0], sharding), options, weights),
                gradients(operands(name)[0], options, weights),
                strict=True,
            )
            worst = max((a - b).abs().max().item() for a, b in pairs)
            found[f"{name}, {label}"] = [off, letters(out), worst]
    for name, label in WITH_OTHERS:
        tensors, options = operands(name)
        wanted = torch.ops.distr.attention(*tensors, **options)
        given = all_on(line, tensors, label)
        out = torch.ops.distr.attention(*given, **options)
        off = (out.full_tensor() - wanted).abs().max().item()
        others = [letters(t) for t in given[3:] if t is not None]
        found[f"{name}, all by {label}"] = [off, letters(out), others]
    return found


def words() -> dict[str, str]:
    """What is said of how a call is shared."""
    mesh = init_device_mesh("cpu", (2,))
    q, k, v = qkv((4, 6, 40, 32), (4, 3, 40, 32), (4, 3, 40, 32))

    def of(q: Tensor, k: Tensor, v: Tensor, sharding: Any) -> str:
        return told(*(distribute_tensor(t, mesh, [sharding]) for t in (q, k, v)))

    partial = DTensor.from_local(q, mesh, [Partial()], run_check=False)
    return {
        "plain": told(q, k, v),
        "heads": of(q, q, q, Shard(1)),
        "batch": of(q, k, v, Shard(0)),
        "three key heads": of(q, k, v, Shard(1)),
        "three entries": of(q[:3], k[:3], v[:3], Shard(0)),
        "tokens": of(q, k, v, Shard(2)),
        "width": of(q, k, v, Shard(3)),
        "whole": of(q, k, v, Replicate()),
        "partial": told(partial, distribute_tensor(q, mesh, [Replicate()]), partial),
        "one of three": told(distribute_tensor(q, mesh, [Shard(1)]), q, q),
    }


WORDS = {
    "plain": "",
    "heads": "heads sharded over 2 processes",
    "batch": "batch sharded over 2 processes",
    "three key heads": "gathered: 3 key heads over 2 processes do not divide",
    "three entries": "gathered: 3 entries of the batch over 2 processes do not divide",
    "tokens": "gathered: sharded along tokens",
    "width": "gathered: sharded along width",
    "whole": "replicated",
    "partial": "gathered: partial sums",
    "one of three": "heads sharded over 2 processes",
}


class Attention(nn.Module):
    """Self-attention whose heads lie where the products leave them."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(128, 128) for _ in "qkvo")

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (-1, 32)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        weights = (q @ k.transpose(-2, -1) / 32**0.5).softmax(-1)
        result: Tensor = self.out((weights @ v).transpose(1, 2).flatten(2))
        return result


def model() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(Attention(), nn.Tanh(), Attention()).eval()


def tensor_parallel(kind: str, compiler: str) -> dict[str, Any]:
    """A model whose heads are sharded, as DTensors or as plain local ones."""
    mesh, whole, parts = init_device_mesh("cpu", (2,)), model(), model()
    ways: dict[str, Any] = {}
    for layer in ("0", "2"):
        for name in "qkv":
            ways[f"{layer}.{name}"] = ColwiseParallel(use_local_output=kind == "local")
        ways[f"{layer}.out"] = RowwiseParallel()
    parts = parallelize_module(parts, mesh, ways)
    policy = {"default": {"group_size": 2, "min_seq_len": 0}, "rule": [RULE]}
    options = {"policy": policy, "compiler": compiler}
    # Of more entries torch 2.11 cannot multiply DTensors that are sharded by heads.
    x = torch.randn(1, 70, 128, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        exact = whole(x)
        wanted = torch.compile(whole, backend="distr", options=options)(x)
        compiled = torch.compile(parts, backend="distr", options=options)
        got = compiled(x)
    assert not isinstance(got, DTensor)
    rows = distr_compile.report(compiled).rows
    said = [[r.layer, r.decision, r.rank, r.shapes["q"][1], r.sharding] for r in rows]
    scale = (wanted - exact).abs().max().item()
    return {"off": (got - wanted).abs().max().item(), "approximation": scale, "rows": said}


RULE = {"layers": "2", "rank": 24}


def dropped() -> str:
    """What is said of dropout on the weights."""
    mesh = init_device_mesh("cpu", (2,))
    q, k, v = (distribute_tensor(t, mesh, [Shard(1)]) for t in qkv(*((1, 2, 40, 32),) * 3))
    try:
        distr_compile.attention(q, k, v, dropout_p=0.2)
    except NotImplementedError as error:
        return str(error)
    return "nothing"


def gathered() -> dict[str, Any]:
    """Queries, keys and values that are sharded along tokens, in a compiled function."""
    mesh = init_device_mesh("cpu", (2,))
    q, k, v = qkv((1, 2, 64, 64), (1, 2, 64, 64), (1, 2, 64, 64))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-2, -1) / 8).softmax(-1) @ v

    options = {"policy": {"default": {"group_size": 2, "min_seq_len": 0}}, "compiler": "aot_eager"}
    compiled = torch.compile(attend, backend="distr", options=options)
    with torch.no_grad():
        out = compiled(*(distribute_tensor(t, mesh, [Shard(2)]) for t in (q, k, v)))
        off = (out.full_tensor() - distr_compile.attention(q, k, v)).abs().max().item()
    report = distr_compile.report(compiled)
    return {"off": off, "table": str(report), "json": report.to_dict()}


def all_of_it() -> dict[str, Any]:
    return {
        "calls": calls(),
        "words": words(),
        "DTensor": tensor_parallel("DTensor", "aot_eager"),
        "local": tensor_parallel("local", "aot_eager"),
        "gathered": gathered(),
        "dropped": dropped(),
        "rank": dist.get_rank(),
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return together(all_of_it, 2, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("name", CALLS)
def test_a_sharded_call_is_the_whole_one(found: list[Any], name: str, sharding: str) -> None:
    own = OUT.get(f"{name}, {sharding}", OUT[sharding])
    for process in found:
        off, places, gradients_off = process["calls"][f"{name}, {sharding}"]
        assert off < 1e-6
        assert places == own
        assert gradients_off < 1e-5


@pytest.mark.parametrize(("name", "label"), WITH_OTHERS)
def test_masks_bases_and_sinks_are_sharded_too(found: list[Any], name: str, label: str) -> None:
    for process in found:
        off, places, others = process["calls"][f"{name}, all by {label}"]
        assert off < 1e-6
        assert places == OUT[label]
        assert others == WITH_OTHERS[name, label]


def test_how_a_call_is_shared_is_said(found: list[Any]) -> None:
    assert all(process["words"] == WORDS for process in found)


@pytest.mark.parametrize("kind", ["DTensor", "local"])
def test_a_tensor_parallel_model_is_the_whole_one(found: list[Any], kind: str) -> None:
    for process in found:
        said = process[kind]
        assert said["off"] < 1e-6
        assert said["approximation"] > 1e-4
        heads, sharding = {"DTensor": (4, WORDS["heads"]), "local": (2, None)}[kind]
        rows = [["0", "distr", 16, heads, sharding], ["2", "distr", 24, heads, sharding]]
        assert said["rows"] == rows


def test_a_sequence_shard_is_gathered_and_the_report_says_so(found: list[Any]) -> None:
    for process in found:
        said = process["gathered"]
        assert said["off"] < 1e-6
        assert "gathered: sharded" in said["table"]
        assert WORDS["tokens"] in str(said["json"])


def test_dropout_is_refused(found: list[Any]) -> None:
    for process in found:
        said = "dropout_p: got 0.2 with DTensors; accepted: 0; use local heads"
        assert process["dropped"].startswith(said)
