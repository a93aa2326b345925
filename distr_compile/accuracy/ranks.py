"""Processes that share the batches of a run: batch i goes to process i mod K, all know the results.

``torchrun --nproc-per-node K -m distr_compile regress ...`` starts such processes. Each walks over
all of the data and runs the model on its own batches; what was found is exchanged and put together
in the order of the data, so that every process goes on as one alone would. The first of them times,
decides and writes. Outside of ``dealing`` there is one process, and nothing is exchanged.

What is exchanged is JSON and safetensors; nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor

from distr_compile.accuracy.batch import Batch, add_to_digest

_group: dist.ProcessGroup | None = None


class OtherProcessError(RuntimeError):
    """Another process failed, with its number and what it said."""


@contextlib.contextmanager
def dealing() -> Iterator[None]:
    """Share the batches of what runs in this context among the processes of the default group.

    Every process has to call the same functions on the same data.
    """
    global _group
    _group = dist.distributed_c10d._get_default_group()
    try:
        yield
    finally:
        _group = None


def world() -> int:
    """How many processes share the batches."""
    return 1 if _group is None else dist.get_world_size(_group)


def rank() -> int:
    """The number of this one."""
    return 0 if _group is None else dist.get_rank(_group)


def is_first() -> bool:
    """Whether this process is the one that times, decides and writes."""
    return rank() == 0


# --- what is exchanged --------------------------------------------------------------------------


def exchange(work: Callable[[], bytes]) -> list[bytes]:
    """What ``work`` gives in each process, in their order.

    Raises:
        Exception: what it raised here.
        OtherProcessError: it raised in another process only.
    """
    if _group is None:
        return [work()]
    failed, data = None, b""
    try:
        data = work()
    except Exception as error:
        failed, data = error, f"{type(error).__name__}: {error}".encode()
    found = _gathered((b"-" if failed else b"+") + data)
    if failed is not None:
        raise failed
    for number, each in enumerate(found):
        if each[:1] == b"-":
            raise OtherProcessError(f"process {number}: {each[1:].decode()}")
    return [each[1:] for each in found]


def _gathered(data: bytes) -> list[bytes]:
    """The bytes of each process, filled up to one length on the way."""
    length = torch.tensor([len(data)], device="cpu")
    lengths = [torch.zeros_like(length) for _ in range(world())]
    dist.all_gather(lengths, length, _group)
    sizes = [int(n) for n in lengths]
    sent = torch.zeros(max(sizes), dtype=torch.uint8, device="cpu")
    sent[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    parts = [torch.empty_like(sent) for _ in sizes]
    dist.all_gather(parts, sent, _group)
    return [part[:size].numpy().tobytes() for part, size in zip(parts, sizes, strict=True)]


def of_all(work: Callable[[], Any]) -> list[Any]:
    """What ``work`` gives in each process, as JSON has it."""
    if _group is None:
        return [work()]
    return [json.loads(each) for each in exchange(lambda: json.dumps(work()).encode())]


def of_first(work: Callable[[], Any]) -> Any:
    """What ``work`` gives in the first process, where alone it runs, as JSON has it."""
    if _group is None:
        return work()
    return of_all(lambda: work() if is_first() else None)[0]


def require_same(what: Mapping[str, Any]) -> None:
    """Refuse to go on where the processes are not at the same thing.

    Args:
        what: part by part, JSON.

    Raises:
        ValueError: a part differs, with its name; in every process.
    """
    parts = {name: hashlib.sha256(json.dumps(x, sort_keys=True).encode()).hexdigest()
             for name, x in what.items()}  # fmt: skip
    told = of_all(lambda: parts)
    if other := [name for name in parts if any(each[name] != told[0][name] for each in told)]:
        raise ValueError(
            f"{', '.join(other)}: got others in other processes; accepted: the same in all; seed "
            "random weights, switch shuffling off, and read the same files"
        )


# --- batches ------------------------------------------------------------------------------------


def dealt(
    batches: Iterable[Batch], work: Callable[[Batch], list[Tensor]]
) -> Iterator[tuple[Batch, list[Tensor]]]:
    """Every batch with what ``work`` made of it in the process that it was dealt to.

    Args:
        batches: the same in every process; taken a round at a time, one for each process.
        work: gives as many tensors for every batch.

    Raises:
        ValueError: the batches differ between processes.
        OtherProcessError: ``work`` failed in another process.
    """
    if _group is None:
        for batch in batches:
            yield batch, work(batch)
        return
    walked = iter(batches)
    while True:
        present = list(islice(walked, world()))
        require_same({"batches": _digest(present)})
        if not present:
            return

        def own(present: list[Batch] = present) -> bytes:
            if rank() >= len(present):
                return b""
            made = work(present[rank()])
            return save({str(i): t.detach().cpu().contiguous() for i, t in enumerate(made)})

        for batch, data in zip(present, exchange(own), strict=False):
            tensors = load(data)
            yield batch, [tensors[str(i)] for i in range(len(tensors))]


class Share:
    """The batches of this process, to be walked once; ``require_same`` is to be asked afterwards.

    Args:
        batches: the same in every process.
    """

    def __init__(self, batches: Iterable[Batch]) -> None:
        self._batches, self._digest = batches, hashlib.sha256()

    def __iter__(self) -> Iterator[Batch]:
        for index, batch in enumerate(self._batches):
            if world() > 1:
                add_to_digest(self._digest, batch)
            if index % world() == rank():
                yield batch

    def require_same(self) -> None:
        """Refuse batches that differ between processes.

        Raises:
            ValueError: they do.
        """
        if world() > 1:
            require_same({"batches": self._digest.hexdigest()})


def _digest(batches: list[Batch]) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        add_to_digest(digest, batch)
    return digest.hexdigest()
