"""One attention on several processes: its heads are dealt out in rounds, the next while one runs.

This is how section 4.7 of the paper runs an attention on several GPUs, on ``torch.distributed``.
"""

from __future__ import annotations

import inspect
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.profiler import record_function

from distr_compile import functional
from distr_compile.lowering import op
from distr_compile.lowering.call import read_arguments
from distr_compile.lowering.checks import validate
from distr_compile.lowering.registering import empty_output
from distr_compile.policy.errors import check_type, sentence, shown

POST, COMPUTE, COLLECT = (f"scatter_heads: {what} round" for what in ("post", "compute", "collect"))
"""What ``torch.profiler`` calls the steps of a round; its number follows."""


@torch.compiler.disable  # type: ignore[untyped-decorator]
def scatter_heads(
    q: Tensor | None = None,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    heads_per_round: int = 20,
    src: int = 0,
    group: dist.ProcessGroup | None = None,
    attn_mask: Tensor | None = None,
    **options: Any,
) -> Tensor | None:
    """Compute ``distr_compile.attention`` of one process with the help of the others of its group.

    Every process of the group calls this, with the same options; the tensors are those of ``src``.
    In a round each process is given some heads of Q with the keys and values that belong to them;
    while it computes them those of the next round are on their way, so that two rounds at most take
    memory. ``src`` computes its share too. A process alone goes through the same rounds.

    The numbers are those of ``distr_compile.attention``, as heads that share keys stay together and
    no estimator looks beyond them. Nothing is differentiable here.

    Args:
        q: on ``src``: as ``query`` of ``distr_compile.attention``; None elsewhere.
        k: see ``q``.
        v: see ``q``.
        heads_per_round: most heads of Q that a process is given in a round. Heads that share keys
            are not parted: a process is given at least all those of one key head.
        src: the process that has the tensors, by its rank in the whole world, as in
            ``torch.distributed.scatter``.
        group: who takes part; all processes by default.
        attn_mask: on ``src``: as that of ``distr_compile.attention``. Heads get their part of it;
            one that is the same for all of them is sent once.
        options: the other arguments of ``distr_compile.attention``, such as ``is_causal`` or
            ``group_size``.

    Returns:
        On ``src``: what ``distr_compile.attention`` returns. None elsewhere.

    Raises:
        RuntimeError: ``torch.distributed`` is not initialised, or another process refused.
        ValueError: this process or ``src`` is not in the group; a tensor is missing on ``src``,
            given elsewhere, or on a device that the group's backend does not send from; the options
            differ between processes; what ``distr_compile.attention`` refuses. Every process raises
            then, so that none waits for another.
        TypeError: an option that ``distr_compile.attention`` does not have; no tensor or number
            where there must be one.
    """
    team = _Team.of(src, group)
    job, refused = None, None
    try:
        heads_per_round = _whole_heads(heads_per_round)
        if team.is_source:
            job = _job(q, k, v, attn_mask, options)
            team.require(job.plan.device)
        elif any(t is not None for t in (q, k, v, attn_mask)):
            got = f"tensors on rank {dist.get_rank()}, where src is {src}"
            raise ValueError(sentence("q, k, v, attn_mask", got, "None", "give them on src only"))
    except Exception as error:
        refused = error
    asked = sorted((n, repr(x)) for n, x in options.items())
    told = [repr(heads_per_round), team.src, asked]
    plan = team.agree(job, refused, zlib.crc32(json.dumps(told).encode()))
    rounds = deal(plan.key_heads, max(1, heads_per_round // plan.shared), team.size)
    if job is None:
        _work(team, plan, rounds)
        return None
    return _lead(team, job, rounds)


def deal(count: int, most: int, processes: int) -> list[list[slice]]:
    """Cut ``count`` key heads into rounds, and each round into a part for every process.

    Args:
        count: of all of them.
        most: how many a process is given in a round.
        processes: how many there are.

    Returns:
        For every round a slice for each process. Only the last may be smaller than it could be: it
        is as even as can be, and its last slices are empty where there are too few.
    """
    rounds = []
    for begin in range(0, count, most * processes):
        left = min(count - begin, most * processes)
        ends, end = [], begin
        for process in range(processes):
            end += left // processes + (process < left % processes)
            ends.append(end)
        starts = [begin, *ends[:-1]]
        rounds.append([slice(a, b) for a, b in zip(starts, ends, strict=True)])
    return rounds


def _whole_heads(heads_per_round: Any) -> int:
    """The number as an int of Python, which reads alike in all processes."""
    name, accepted = "heads_per_round", "a whole number >= 1"
    number: int = functional.number_of(name, heads_per_round, accepted, "give one", whole=True)
    if number < 1:
        raise ValueError(sentence(name, shown(number), accepted, "give one"))
    return number


# --- what is to be computed ---------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """What every process knows of a call.

    Attributes:
        sizes: those of Q, K, V and, if there is one, the mask, ``(B, H, N, M)`` or 1.
        dtypes: theirs, by name.
        device: type of the device of all.
        arguments: keywords of the op.
    """

    sizes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    device: str
    arguments: Mapping[str, Any]

    @property
    def key_heads(self) -> int:
        """H_k."""
        return self.sizes[1][1]

    @property
    def shared(self) -> int:
        """How many heads of Q share a key head."""
        return self.sizes[0][1] // self.key_heads

    @property
    def has_shared_mask(self) -> bool:
        """Whether there is a mask that all heads have."""
        return len(self.sizes) > 3 and self.sizes[3][1] == 1

    def heads(self, index: int, part: slice) -> slice:
        """Which heads of a tensor belong to some key heads: 0 is Q, 1 and 2 are K and V, 3 a mask.

        Of a mask that all heads have it is the only one there is.
        """
        if index == 3 and self.has_shared_mask:
            return slice(0, 1)
        times = self.shared if index in (0, 3) else 1
        return slice(part.start * times, part.stop * times)

    def travelling(self) -> range:
        """Numbers of the tensors of which each round sends a part."""
        return range(3 if self.has_shared_mask else len(self.sizes))

    def empty(self, index: int, part: slice) -> Tensor:
        """Memory for a part of a tensor."""
        batch, _, *rest = self.sizes[index]
        heads = self.heads(index, part)
        dtype = getattr(torch, self.dtypes[index])
        return torch.empty(batch, heads.stop - heads.start, *rest, dtype=dtype, device=self.place())

    def place(self) -> torch.device:
        """The device of this process."""
        return _own(self.device)

    @torch.no_grad()
    def compute(self, tensors: Sequence[Tensor], mask: Tensor | None) -> Tensor:
        """The attention of some heads."""
        q, k, v, *own_mask = tensors
        with torch.autocast(self.device, enabled=False):
            out: Tensor = op.call(q, k, v, own_mask[0] if own_mask else mask, **self.arguments)
        return out


@dataclass(frozen=True)
class _Job:
    """What ``src`` has besides.

    Attributes:
        tensors: Q, K, V and perhaps the mask, four axes each.
        has_four_axes: whether the caller's Q has.
        plan: the rest.
    """

    tensors: tuple[Tensor, ...]
    has_four_axes: bool
    plan: _Plan

    def part(self, index: int, part: slice) -> Tensor:
        """The heads of a tensor that belong to some key heads, a view."""
        heads = self.plan.heads(index, part)
        return self.tensors[index][:, heads]


def _job(
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor | None,
    mask: Tensor | None,
    options: Mapping[str, Any],
) -> _Job:
    """Check the call as ``distr_compile.attention`` does, without computing anything."""
    if q is None or k is None or v is None:
        missing = " and ".join(n for n, t in zip("qkv", (q, k, v), strict=True) if t is None)
        advice = "give them, or name the process that has them as src"
        raise ValueError(sentence(missing, "None on src", "tensors", advice))
    for name, t in (("q", q), ("k", k), ("v", v), ("attn_mask", mask)):
        if t is not None:
            check_type(name, t, Tensor, "a tensor", "give it as for distr_compile.attention")
    given = [t for t in (q, k, v, mask) if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        advice = "call under torch.no_grad(); attention that is trained is sharded by its module"
        accepted = "no gradients to record"
        got = "a tensor that requires gradients"
        raise ValueError(sentence("q, k, v, attn_mask", got, accepted, advice))
    if others := sorted({type(t).__name__ for t in given} - {"Tensor", "Parameter"}):
        advice = "give plain tensors, such as those of to_local()"
        raise ValueError(sentence("q, k, v, attn_mask", ", ".join(others), "tensors", advice))
    if options.get("dropout_p"):
        advice = "nothing is trained here: leave it out"
        raise ValueError(sentence("dropout_p", shown(options["dropout_p"]), "0", advice))
    four = q.dim() == 4
    kind = q.device.type
    if torch.is_autocast_enabled(kind):
        q, k, v = (t.to(torch.get_autocast_dtype(kind)) for t in (q, k, v))
    asked = inspect.signature(functional.attention).bind(q, k, v, mask, **options)
    asked.apply_defaults()
    q, k, v, arguments = functional.planned(*asked.args, **asked.kwargs)
    validate(q, k, v, mask, (None, None), (None, None), read_arguments(arguments))
    tensors = [q, k, v]
    if mask is not None:
        mask = mask[(None,) * (4 - mask.dim())]
        # What was expanded over the heads is the same for all.
        tensors.append(mask[:, :1] if mask.stride(1) == 0 else mask)
    sizes = tuple(tuple(t.shape) for t in tensors)
    dtypes = tuple(str(t.dtype).removeprefix("torch.") for t in tensors)
    plan = _Plan(sizes, dtypes, kind, arguments)
    return _Job(tuple(tensors), four, plan)


# --- the processes ------------------------------------------------------------------------------

Pending = tuple["dist.Work | None", Tensor]
"""A transfer that was begun, and the memory that it needs."""


@dataclass(frozen=True)
class _Team:
    """The processes that take part.

    Attributes:
        group: of ``torch.distributed``.
        ranks: of its members in the whole world, in the group's order.
        src: of them, the one with the tensors.
    """

    group: dist.ProcessGroup
    ranks: tuple[int, ...]
    src: int

    @classmethod
    def of(cls, src: int, group: dist.ProcessGroup | None) -> _Team:
        """The team of a group.

        Raises:
            RuntimeError, ValueError: see ``scatter_heads``.
        """
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "torch.distributed: got none initialised; accepted: a process group; call "
                "torch.distributed.init_process_group() first, or distr_compile.attention alone"
            )
        if dist.get_rank(group) < 0:
            got = f"one without this process, rank {dist.get_rank()}"
            raise ValueError(sentence("group", got, "one that has it", "call it on members only"))
        found = group if group is not None else dist.distributed_c10d._get_default_group()
        ranks = tuple(dist.get_process_group_ranks(found))
        if src not in ranks:
            accepted = ", ".join(map(str, ranks))
            raise ValueError(sentence("src", shown(src), accepted, "give a rank of the group"))
        return cls(found, ranks, int(src))

    @property
    def size(self) -> int:
        """How many there are."""
        return len(self.ranks)

    @property
    def is_source(self) -> bool:
        """Whether this process has the tensors."""
        return dist.get_rank() == self.src

    def part(self, shares: Sequence[slice], rank: int) -> slice:
        """What a process is given in a round; ``src`` comes first."""
        place = self.ranks.index(rank) - self.ranks.index(self.src)
        return shares[place % self.size]

    def others(self, shares: Sequence[slice]) -> Iterator[tuple[int, slice]]:
        """The processes besides ``src`` that have something to do in a round, with their parts."""
        for rank in self.ranks:
            part = self.part(shares, rank)
            if rank != self.src and part.start < part.stop:
                yield rank, part

    def agree(self, job: _Job | None, refused: Exception | None, options: int) -> _Plan:
        """Tell all processes what is to be done, or that one of them refuses.

        Args:
            job: on ``src``.
            refused: what this process is to raise.
            options: a number that is the same where the options are.

        Raises:
            Exception: ``refused``, or that another process refuses.
        """
        text = json.dumps(vars(job.plan)).encode() if job is not None else b""
        device = self._meeting_place()
        told = torch.tensor([refused is not None, len(text), options, -options], device=device)
        dist.all_reduce(told, dist.ReduceOp.MAX, self.group)
        is_refused, length, greatest, least = told.tolist()
        if refused is not None:
            raise refused
        if is_refused:
            raise RuntimeError(
                "scatter_heads: got another process that refused the call; accepted: a call that "
                "all accept; its own error says why"
            )
        if greatest != -least:
            advice = "call it alike on every process"
            raise ValueError(sentence("options", "others on some process", "the same", advice))
        words = torch.empty(length, dtype=torch.uint8, device=device)
        if job is not None:
            words.copy_(torch.tensor(list(text), dtype=torch.uint8))
        dist.broadcast(words, self.src, self.group)
        read = json.loads(bytes(words.tolist()))
        sizes = tuple(map(tuple, read["sizes"]))
        return _Plan(sizes, tuple(read["dtypes"]), read["device"], read["arguments"])

    def require(self, kind: str) -> None:
        """Refuse tensors that the group cannot send.

        Raises:
            ValueError: they are on a type of device that its backend does not send from.
        """
        backend = self._backends().get(kind)
        if self.size > 1 and (backend is None or (backend == "gloo" and kind != "cpu")):
            accepted = ", ".join(f"{x} by {y}" for x, y in self._backends().items() if y != "gloo")
            got = f"tensors on {kind} in a group whose backend there is {backend}"
            advice = 'call init_process_group("cpu:gloo,cuda:nccl"), or move them to the CPU'
            raise ValueError(sentence("q, k, v", got, accepted or "cpu by gloo", advice))

    def _backends(self) -> dict[str, str]:
        """Type of device -> what sends from it."""
        config = str(dist.get_backend_config(self.group))
        return dict(part.split(":") for part in config.split(","))

    def _meeting_place(self) -> torch.device:
        """A device that the group's backend can send from; the CPU where it can."""
        of = self._backends()
        return _own("cpu" if "cpu" in of else next(iter(of)))

    def send(self, tensor: Tensor, to: int) -> tuple[dist.Work | None, Tensor]:
        """Begin to send a tensor, whose memory has to stay until that is done."""
        data = _bytes(tensor.contiguous())
        return dist.isend(data, to, self.group), data

    def receive(self, into: Tensor, rank: int) -> tuple[dist.Work | None, Tensor]:
        """Begin to receive a tensor into memory without gaps."""
        return dist.irecv(_bytes(into), rank, self.group), into

    def share(self, tensor: Tensor) -> Tensor:
        """Give all a tensor of ``src``."""
        tensor = tensor.contiguous()
        dist.broadcast(_bytes(tensor), self.src, self.group)
        return tensor


def _own(kind: str) -> torch.device:
    """The device of a type that this process uses."""
    if kind == "cpu":
        return torch.device(kind)
    return torch.device(kind, torch.get_device_module(kind).current_device())


def _bytes(tensor: Tensor) -> Tensor:
    """The same memory as numbers that every backend can send."""
    return tensor.view(-1).view(torch.uint8)


def _wait(pending: Sequence[Pending]) -> None:
    for work, _ in pending:
        if work is not None:
            work.wait()


# --- the rounds ---------------------------------------------------------------------------------


def _work(team: _Team, plan: _Plan, rounds: Sequence[Sequence[slice]]) -> None:
    """What a process does that is not ``src``."""
    mask = team.share(plan.empty(3, slice(0, 1))) if plan.has_shared_mask else None
    parts = [team.part(shares, dist.get_rank()) for shares in rounds]
    parts = [part for part in parts if part.start < part.stop]

    def post(number: int) -> list[Pending]:
        if number >= len(parts):
            return []
        with record_function(f"{POST} {number}"):
            memory = [plan.empty(index, parts[number]) for index in plan.travelling()]
            return [team.receive(each, team.src) for each in memory]

    coming = post(0)
    going: list[Pending] = []
    for number in range(len(parts)):
        here, coming = coming, post(number + 1)
        _wait(here)
        with record_function(f"{COMPUTE} {number}"):
            out = plan.compute([memory for _, memory in here], mask)
        _wait(going)
        going = [team.send(out.transpose(1, 2), team.src)]
    _wait(going)


def _lead(team: _Team, job: _Job, rounds: Sequence[Sequence[slice]]) -> Tensor:
    """What ``src`` does: deal out, compute its own share, collect."""
    plan = job.plan
    mask = team.share(job.tensors[3]) if plan.has_shared_mask else None
    out = empty_output(job.tensors[0], job.tensors[2])

    def post(number: int) -> list[Pending]:
        if number >= len(rounds):
            return []
        with record_function(f"{POST} {number}"):
            return [
                team.send(job.part(index, part), rank)
                for rank, part in team.others(rounds[number])
                for index in plan.travelling()
            ]

    def collect(number: int, results: Sequence[tuple[Pending, slice]]) -> None:
        with record_function(f"{COLLECT} {number}"):
            for (work, memory), heads in results:
                _wait([(work, memory)])
                out[:, heads] = memory.transpose(1, 2)

    going = post(0)
    results: list[tuple[Pending, slice]] = []
    for number, shares in enumerate(rounds):
        here, going = going, post(number + 1)
        before, results = results, []
        for rank, part in team.others(shares):
            heads = plan.heads(0, part)
            memory = out.new_empty(out[:, heads].transpose(1, 2).shape)
            results.append((team.receive(memory, rank), heads))
        own = team.part(shares, team.src)
        with record_function(f"{COMPUTE} {number}"):
            out[:, plan.heads(0, own)] = plan.compute(
                [job.part(index, own) for index in plan.travelling()], mask
            )
        _wait(here)
        collect(number - 1, before)
    collect(len(rounds) - 1, results)
    return out if job.has_four_axes else out.squeeze(0)
