"""``distr_compile.parallel.scatter_heads``: what one process computes, in the order it says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import distr_compile
from distr_compile.parallel import COLLECT, COMPUTE, POST, _Team, deal, scatter_heads
from tests.processes import together
from tests.test_functional import assert_near, defined, qkv

WORLD = 3
SIZES = (1, 2, 3)
"""Of the groups, the first processes of the world each; the last of a group has the tensors."""


def inputs(name: str) -> tuple[list[Tensor], dict[str, Any]]:
    """Q, K and V, and the options, of a case by its name."""
    q, k, v = qkv((2, 14, 61, 64), (2, 7, 61, 64), (2, 7, 61, 40))
    g = torch.Generator().manual_seed(5)
    if name == "bfloat16":
        return [t.bfloat16() for t in (q, k, v)], {"enable_gqa": True, "is_causal": True}
    if name == "three axes":
        return [t[0] for t in (q[:, :7], k, v)], {"group_size": 4, "heads_per_round": 1}
    if name == "cross":
        return [q[:1, :, :33], k, v], {"enable_gqa": True, "rank": 24, "heads_per_round": 4}
    if name == "one key head":
        return [q, k[:, :1], v[:, :1]], {"estimator": "lsh-mean", "heads_per_round": 3}
    if name == "short":
        return [q[:, :, :9], k, v], {"enable_gqa": True, "heads_per_round": 2}
    options: dict[str, Any] = {"enable_gqa": True, "heads_per_round": 5}
    if name == "bool mask per head":
        options["attn_mask"] = torch.rand(14, 61, 61, generator=g) > 0.3
    if name == "float mask of all heads":
        options["attn_mask"] = torch.randn(2, 1, 1, 61, generator=g).expand(2, 14, 61, 61)
    if name == "strict":
        options |= {"is_causal": True, "causal": "strict", "grouping_block": 16}
    if name in ("lsh-sample", "lsh-signed"):
        options |= {"estimator": name, "heads_per_round": 100, "scale": 0.2}
    if name == "exact":
        options |= {"group_size": 1, "heads_per_round": 2}
    return [q, k, v], options


CASES = (
    "plain", "bfloat16", "three axes", "cross", "one key head", "short", "bool mask per head",
    "float mask of all heads", "strict", "lsh-sample", "lsh-signed", "exact",
)  # fmt: skip

REFUSED = (
    "no tensors", "tensors elsewhere", "heads_per_round", "options", "sizes", "gradients",
    "src", "outside", "unknown", "dropout", "lists", "mask",
)  # fmt: skip
FAULTS = {
    "no tensors": r"q and k and v: got None on src; accepted: tensors; give them, or name",
    "tensors elsewhere": r"q, k, v, attn_mask: got tensors on rank 0, where src is 1; accepted: No",
    "heads_per_round": r"heads_per_round: got 0 \(int\); accepted: a whole number >= 1; give one",
    "options": r"options: got others on some process; accepted: the same; call it alike",
    "sizes": r"query, key, value: heads: got 14 and 7; accepted: one size",
    "gradients": r"got a tensor that requires gradients; accepted: no gradients to record; call un",
    "src": r"src: got 2 \(int\); accepted: 0, 1; give a rank of the group",
    "outside": r"group: got one without this process, rank 2; accepted: one that has it; call",
    "unknown": r"unexpected keyword argument 'colour'",
    "lists": r"q: got \[\[\[.* \(list\); accepted: a tensor; give it as for distr_compile.attent",
    "mask": r"attn_mask: got \[True\] \(list\); accepted: a tensor; give it as for",
    "dropout": r"dropout_p: got 0.1 \(float\); accepted: 0; nothing is trained here",
}
"""What the process that is at fault says; the others say that another refused, or the same."""


def refused(name: str, groups: dict[int, Any]) -> str | None:
    """What a wrong call says in this process, of a group of two whose second has the tensors."""
    rank = dist.get_rank()
    if rank == 2 and name != "outside":
        return None
    (q, k, v), options = inputs("plain")
    tensors: tuple[Tensor | None, ...] = (q, k, v) if rank == 1 else (None,) * 3
    src = 2 if name == "src" else 1
    if name == "no tensors":
        tensors = (None,) * 3
    elif name == "tensors elsewhere" and rank == 0:
        tensors = (q, None, None)
    elif name == "heads_per_round":
        options["heads_per_round"] = 0
    elif name == "options":
        options["group_size"] = 2 + 2 * rank
    elif name == "sizes":
        options["enable_gqa"] = False
    elif name == "gradients" and rank == 1:
        tensors = (q.requires_grad_(), k, v)
    elif name == "lists" and rank == 1:
        tensors = (q.tolist(), k, v)
    elif name == "mask" and rank == 1:
        options["attn_mask"] = [True]
    elif name == "unknown":
        options["colour"] = "blue"
    elif name == "dropout":
        options["dropout_p"] = 0.1
    elif name == "outside" and rank < 2:
        return None
    try:
        scatter_heads(*tensors, src=src, group=groups[2], **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def steps(tensors: tuple[Tensor | None, ...], **options: Any) -> list[str]:
    """What this process does in a call, in order, as the profiler has recorded it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        scatter_heads(*tensors, **options)
    events = sorted(recorded.events(), key=lambda event: event.time_range.start)
    return [event.name for event in events if event.name.startswith("scatter_heads")]


def all_cases() -> dict[str, Any]:
    """Every case in every group; what there is to say of them."""
    rank, found = dist.get_rank(), {}
    groups = {size: dist.new_group(range(size)) for size in SIZES}
    for size in (size for size in SIZES if rank < size):
        for name in CASES:
            tensors, options = inputs(name)
            src = size - 1
            if rank != src:
                options.pop("attn_mask", None)
            given = tensors if rank == src else [None] * 3
            if name == "plain" and rank == src:  # a number of another kind, which reads as an int
                options["heads_per_round"] = np.int64(options["heads_per_round"])
            out = scatter_heads(*given, src=src, group=groups[size], **options)
            if rank != src:
                found[f"{name}, {size}"] = out is None
                continue
            options.pop("heads_per_round", None)
            wanted = distr_compile.attention(*tensors, **options)
            assert out is not None
            off = (out.double() - wanted.double()).abs().max().item()
            same = out.shape == wanted.shape and out.stride() == wanted.stride()
            found[f"{name}, {size}"] = [off, same, out.dtype == wanted.dtype]
    given = inputs("plain")[0] if rank == 0 else [None] * 3
    found["steps"] = steps(tuple(given), enable_gqa=True, heads_per_round=2)
    found["refused"] = {name: refused(name, groups) for name in REFUSED}
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return together(all_cases, WORLD, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CASES)
def test_it_is_what_one_process_computes(found: list[Any], name: str, size: int) -> None:
    *others, source = (found[rank][f"{name}, {size}"] for rank in range(size))
    off, *same = source
    assert off <= (0.02 if name == "bfloat16" else 1e-6)
    assert all(same)
    assert all(others), "only src has the output"


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_call_is_refused_by_all(found: list[Any], name: str) -> None:
    said = [text for text in (of["refused"][name] for of in found) if text is not None]
    at_fault = [text for text in said if re.search(FAULTS[name], text)]
    others = [text for text in said if text not in at_fault]
    assert at_fault
    assert all("got another process that refused the call; accepted" in text for text in others)
    assert len(said) == (1 if name == "outside" else 2)


def test_the_next_round_is_on_its_way_before_one_is_computed(found: list[Any]) -> None:
    """Seven key heads, one a round for each of three processes: three rounds, the last for one."""
    for rank, rounds in enumerate((3, 2, 2)):
        order = found[rank]["steps"]
        assert [name for name in order if COMPUTE in name] == [
            f"{COMPUTE} {i}" for i in range(rounds)
        ]
        for i in range(rounds - 1):
            assert order.index(f"{POST} {i + 1}") < order.index(f"{COMPUTE} {i}")
    order = found[0]["steps"]
    # The results of a round come in while the next is computed.
    assert order.index(f"{COMPUTE} 1") < order.index(f"{COLLECT} 0") < order.index(f"{COMPUTE} 2")


def parts(rounds: list[list[slice]]) -> Iterator[slice]:
    for shares in rounds:
        yield from shares


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
@pytest.mark.parametrize("most", [1, 2, 5, 20])
@pytest.mark.parametrize("count", [1, 2, 7, 48])
def test_heads_are_dealt_once_each(count: int, most: int, processes: int) -> None:
    rounds = deal(count, most, processes)
    assert [i for part in parts(rounds) for i in range(part.start, part.stop)] == list(range(count))
    sizes = [[part.stop - part.start for part in shares] for shares in rounds]
    assert all(shares == [most] * processes for shares in sizes[:-1])
    assert max(sizes[-1]) - min(sizes[-1]) <= 1
    assert max(sizes[-1]) <= most


def test_one_process_alone_computes_the_definition(tmp_path: Path) -> None:
    q, k, v = qkv((1, 5, 77, 64), (1, 5, 77, 64), (1, 5, 77, 64))
    place = f"file://{tmp_path}/rendezvous"
    dist.init_process_group("gloo", init_method=place, rank=0, world_size=1)
    try:
        out = scatter_heads(q, k, v, heads_per_round=2, is_causal=True)
    finally:
        dist.destroy_process_group()
    assert out is not None
    assert_near(out, defined(q, k, v, rank=32, is_causal=True))


def test_without_a_group_the_error_says_what_to_call() -> None:
    with pytest.raises(RuntimeError, match=r"got none initialised; accepted: .*; call torch.distr"):
        scatter_heads(*qkv((1, 2, 20, 32), (1, 2, 20, 32), (1, 2, 20, 32)))


def test_tensors_that_the_group_cannot_send_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As gloo cannot those of a GPU."""
    team = _Team(group=None, ranks=(0, 1), src=0)  # type: ignore[arg-type]
    for config, kind in (("cpu:gloo,cuda:gloo", "cuda"), ("cuda:nccl", "cpu")):
        monkeypatch.setattr(dist, "get_backend_config", lambda group, config=config: config)
        with pytest.raises(ValueError, match=rf"got tensors on {kind} .*; accepted: .*; call init"):
            team.require(kind)
    monkeypatch.setattr(dist, "get_backend_config", lambda group: "cpu:gloo,cuda:nccl")
    team.require("cpu")
    team.require("cuda")
