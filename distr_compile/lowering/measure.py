"""What is faster here, by measurement: SDPA, our exact kernel, or an approximation.

Candidates take turns in pairs, on random numbers of the call's shape, dtype, memory order and kind
of mask: our exact kernel against SDPA, then the approximation against the better of these. A
decision changes what a model computes, and must not hang on noise: one candidate beats another
where the lower quartile of at least ``ROUNDS`` ratios of neighbouring times is above ``MARGIN``.
What is timed is a slice, some of the call's heads with all their tokens, and is scaled to all.

On a GPU SDPA runs in turn by each backend that takes the call, and the fastest is to beat.
"""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from distr_compile.estimators import ESTIMATORS
from distr_compile.lowering import choose, op, sdpa, training
from distr_compile.lowering.call import Approximation, Scores, Shape, op_arguments
from distr_compile.lowering.clock import Clock, clock_of

ROUNDS = 7
"""Ratios that a decision rests on, at least."""

MARGIN = 1.05
"""How much faster a candidate has to be."""

CALL_S = 2.0
"""Most seconds that a compile spends on one call."""

SLICE_BYTES = 256 << 20
"""Most bytes of inputs and outputs of what is timed."""

SLICE_S = 2e-2
"""Least time of a round on a CPU, if the call has so many heads."""

PROBE, OVERHEAD = 512, 3.0
"""Tokens of the call that is tried first, and how much of its time may be none of the length's."""

BACKEND = "sdpa "
"""How the names of SDPA's backends begin, where they take turns one by one."""

SEVERAL = {"cuda"}
"""Types of devices on which SDPA has several backends worth trying."""

DROPOUT = 0.1
"""The share of the weights that is dropped in what is timed, where a call drops any."""

SDPA, EXACT, DISTR = "sdpa", "exact", "distr"
"""The candidates: PyTorch's attention, ours at the full width, and the approximation."""


@dataclass(frozen=True)
class Race:
    """What came of two candidates taking turns.

    Attributes:
        seconds: of both, the one to beat first: the median over the rounds, of the whole call.
        kernel: what computes the other one.
        gain: lower quartile of the first one's time over the other's.
        rounds: how often they took turns.
        heads: how many heads of the call were timed.
        backend: by which SDPA was fastest, where it has several.
    """

    seconds: Mapping[str, float]
    kernel: str
    gain: float
    rounds: int
    heads: int
    backend: str = ""

    @property
    def is_won(self) -> bool:
        """Whether the other one is faster, by the margin."""
        return self.gain > MARGIN


@dataclass(frozen=True)
class Measured:
    """What is known of the speed of one call.

    Attributes:
        exact: our exact attention against SDPA; None where no implementation of ours computes it.
        distr: the approximation against the better of these; None where none was asked about.
    """

    exact: Race | None
    distr: Race | None = None

    @property
    def prefers_distr(self) -> bool:
        """Whether the approximation is faster than exact attention, by the margin."""
        return self.distr is not None and self.distr.is_won

    @property
    def prefers_ours(self) -> bool:
        """Whether our exact attention is faster than SDPA, by the margin."""
        return self.exact is not None and self.exact.is_won

    @property
    def best_exact(self) -> str:
        """Which exact attention runs where the call is exact: ``EXACT`` or ``SDPA``."""
        return EXACT if self.prefers_ours else SDPA

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each candidate; ``DISTR``'s in proportion to what it was raced against."""
        known = dict(self.exact.seconds) if self.exact is not None else {}
        if self.distr is not None:
            (name, against), (_, ours) = self.distr.seconds.items()
            known.setdefault(name, against)
            known[DISTR] = known[name] * ours / against
        return known

    @property
    def gains(self) -> dict[str, float]:
        """The gain of each race."""
        races = {"exact_gain": self.exact, "distr_gain": self.distr}
        return {name: race.gain for name, race in races.items() if race is not None}

    def __str__(self) -> str:
        """The times, such as ``sdpa 8.12 ms, exact (distr-cpu) 6.90 ms``."""
        races = {EXACT: self.exact, DISTR: self.distr}
        names = {arm: f" ({each.kernel})" for arm, each in races.items() if each is not None}
        backends = [each.backend for each in races.values() if each is not None and each.backend]
        if backends:
            names[SDPA] = f" ({backends[0]})"
        times = self.seconds.items()
        return ", ".join(f"{arm}{names.get(arm, '')} {1e3 * s:.3g} ms" for arm, s in times)


def race(
    shape: Shape,
    approximation: Approximation | None = None,
    against: str = SDPA,
    limit: float | None = None,
) -> Race | str:
    """Time our exact attention against SDPA, or an approximation against exact attention.

    Random numbers come from a generator of its own; gradients, autocast and dispatch modes are off
    inside and as they were afterwards. Call :func:`warm_up` first, which tells how long it takes.

    Args:
        shape: of the call; all sizes are numbers of at least 1.
        approximation: the candidate; None for our exact attention.
        against: ``SDPA`` or ``EXACT``.
        limit: most seconds; None for as long, and as much memory, as it takes.

    Returns:
        What was found, or why nothing was.
    """
    bound = math.inf if limit is None else limit
    how = approximation or Approximation.none(shape.head_dim)
    name = EXACT if approximation is None else DISTR
    units, count = shape.batch * shape.num_key_heads, 1
    with undisturbed(shape):
        pair, clock = _pair(shape, approximation, against, 1), clock_of(shape.device)
        rounds = [_round(pair, clock, 1)]
        if sum(rounds[0].values()) * ROUNDS > bound:  # the first touches its memory
            rounds = [_round(pair, clock, 1)]
        taken = sum(rounds[0].values())
        if taken * ROUNDS > bound:
            return _too_long(taken * ROUNDS, bound)
        count = _units_at_once(shape, units, bound / (ROUNDS + 2) / taken, taken)
        if count > 1:
            pair = _pair(shape, approximation, against, count)
            _round(pair, clock, 1)  # memory is touched for the first time
            rounds = [_round(pair, clock, 1)]
        repeats = math.ceil(clock.least_s / min(rounds[0].values()))
        rounds = rounds if repeats <= 1 else []
        started = time.perf_counter()
        while len(rounds) < ROUNDS:
            rounds.append(_round(pair, clock, max(1, repeats), len(rounds)))
            if time.perf_counter() - started > bound and len(rounds) < ROUNDS:
                return f"the machine is busy: {len(rounds)} of {ROUNDS} rounds took {bound:.3g} s"
    rounds, backend = _by_the_fastest(rounds)
    ratios = [each[against] / each[name] for each in rounds]
    return Race(
        seconds={
            arm: statistics.median(each[arm] for each in rounds) * units / count
            for arm in (against, name)
        },
        kernel=_kernel(shape, how),
        gain=statistics.quantiles(ratios, n=4, method="inclusive")[0],
        rounds=len(rounds),
        heads=count * (shape.num_heads // shape.num_key_heads),
        backend=backend,
    )


def _kernel(shape: Shape, how: Approximation) -> str:
    """What computes a call; of one that is trained both ways, where these are two."""
    if not shape.trained:
        return choose.name_of(shape, how)
    names = training.names(shape, how)
    return " + ".join(dict.fromkeys(names[:2]))


def _by_the_fastest(rounds: list[dict[str, float]]) -> tuple[list[dict[str, float]], str]:
    """The rounds with SDPA's times by its fastest backend, and that one's name, if it has any."""
    backends = [name for name in rounds[0] if name.startswith(BACKEND)]
    if not backends:
        return rounds, ""
    best = min(backends, key=lambda name: statistics.median(each[name] for each in rounds))
    others = [name for name in rounds[0] if name not in backends]
    kept = [{SDPA: each[best], **{name: each[name] for name in others}} for each in rounds]
    return kept, best.removeprefix(BACKEND)


def warm_up(
    shape: Shape,
    approximation: Approximation | None = None,
    against: str = SDPA,
    limit: float | None = None,
) -> str | None:
    """Compile what a race runs, on a shorter call, and foretell whether the race is too long.

    Args:
        shape: as for :func:`race`; approximation, against and limit too.
        approximation: see ``shape``.
        against: see ``shape``.
        limit: see ``shape``.

    Returns:
        Why there is no use in racing; None where there may be.
    """
    size = _bytes(shape, 1)
    if limit is not None and size > SLICE_BYTES:
        return f"one key head takes {size >> 20} MiB, more than {SLICE_BYTES >> 20}"
    tokens = {name: min(getattr(shape, name), PROBE) for name in ("num_queries", "num_keys")}
    short = shape.resized(tokens)
    with undisturbed(shape):
        pair, clock = _pair(short, approximation, against, 1), clock_of(shape.device)
        _round(pair, clock, 1)  # compiles
        taken = sum(_round(pair, clock, 1).values())
    scores = shape.num_queries * shape.num_keys / (short.num_queries * short.num_keys)
    # Of a short call much is overhead: in doubt the race itself finds out.
    if limit is not None and taken * scores * ROUNDS > OVERHEAD * limit:
        return _too_long(taken * scores * ROUNDS, limit)
    return None


def _too_long(seconds: float, bound: float) -> str:
    return f"it takes about {seconds:.2g} s, more than {bound:.3g} s"


def _units_at_once(shape: Shape, units: int, affordable: float, seconds: float) -> int:
    """Key heads to time together: a multiple of the threads, as far as time and memory go.

    Args:
        shape: of the call.
        units: key heads of all batches.
        affordable: how many of them there is time for.
        seconds: of a round with one of them.
    """
    fits = max(1, min(units, SLICE_BYTES // _bytes(shape, 1)))
    most = fits
    if shape.device.type == "cpu":  # a GPU has to be filled
        threads = torch.get_num_threads()
        # The host's own time for a call does not grow with the heads.
        enough = math.ceil(SLICE_S / seconds / threads) * threads
        most = min(fits, enough)
    return most if most <= affordable else 1


def _bytes(shape: Shape, units: int) -> int:
    """Bytes of inputs, outputs and mask, and of the mask SDPA needs for a causal offset."""
    heads = units * (shape.num_heads // shape.num_key_heads)
    widths = shape.head_dim + shape.value_dim
    size = (heads * shape.num_queries + units * shape.num_keys) * widths * shape.dtype.itemsize
    if shape.mask is not None:
        (batch, mask_heads, rows, keys), dtype = shape.mask
        size += (heads if batch * mask_heads > 1 else 1) * rows * keys * dtype.itemsize
    if shape.is_causal and (shape.causal_offset or shape.mask is not None):
        size += shape.num_queries * shape.num_keys
    return size


def _pair(shape: Shape, approximation: Approximation | None, against: str, units: int) -> Arms:
    candidates = arms(shape, approximation or Approximation.none(shape.head_dim), units)
    name = EXACT if approximation is None else DISTR
    first = {against: candidates[against]}
    if against == SDPA and shape.device.type in SEVERAL:
        first = _backends(candidates[SDPA])
    return {**first, name: candidates[DISTR]}


def _backends(run: Callable[[], Tensor]) -> Arms:
    """SDPA by each backend that is switched on and takes the call; as it is, if none does."""
    found: Arms = {}
    for name, backend in sdpa.switched_on().items():
        forced = partial(sdpa.by, backend, run)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they say why a backend does not take it
            try:
                forced()
            except RuntimeError as error:
                if choose.is_out_of_memory(error):
                    raise
                continue
        found[BACKEND + name] = forced
    return found or {SDPA: run}


Arms = dict[str, Callable[[], Any]]


def arms(shape: Shape, how: Approximation, units: int) -> Arms:
    """SDPA, our exact attention, and ``how``, on ``units`` key heads as a batch of one.

    Where the shape says that the call is trained, each also computes the gradients of Q, K and V.
    """
    q, k, v, mask = tensors = inputs(shape, units)
    scale, heads = 1 / math.sqrt(shape.head_dim), q.shape[1]
    softcap = 30.0 if shape.softcap else 0.0
    new: dict[str, Any] = {"dtype": torch.float32, "device": shape.device}
    sinks = torch.zeros(heads, **new) if shape.sinks else None
    offset = shape.causal_offset if shape.is_causal else None
    dropout_p = DROPOUT if shape.dropout else 0.0
    scores = Scores(scale, shape.is_causal, offset, softcap, dropout_p)
    seed = torch.zeros((), dtype=torch.int64, device=shape.device) if shape.dropout else None
    # A program makes the mask of an offset once.
    is_causal, seen = shape.is_causal, mask
    if is_causal and (offset or mask is not None):
        seen, is_causal = sdpa.with_causal(mask, q, k, offset or 0), False

    def by_pytorch() -> Tensor:
        if shape.dropout:
            gqa = k.shape[1] != heads
            return F.scaled_dot_product_attention(
                q, k, v, seen, dropout_p, is_causal, scale=scale, enable_gqa=gqa
            )
        return sdpa.attention(q, k, v, seen, scale=scale, is_causal=is_causal)

    def by_us(how: Approximation) -> Callable[[], Tensor]:
        bases: tuple[Tensor | None, ...] = (None, None)
        if ESTIMATORS[how.estimator].needs == "bases" and how.rank < shape.head_dim:
            bases = random_bases(units, shape.head_dim, how.rank, shape.device)
        arguments = op_arguments(how, scores)
        return lambda: op.call(*tensors, *bases, sinks, seed, **arguments)

    exact = by_us(Approximation.none(shape.head_dim))
    found: Arms = {SDPA: by_pytorch, EXACT: exact, DISTR: by_us(how)}
    if not shape.trained:
        return found
    grad = torch.ones_like(by_pytorch())
    return {name: _both_ways(run, (q, k, v), grad) for name, run in found.items()}


def _both_ways(
    run: Callable[[], Tensor], inputs: tuple[Tensor, ...], grad: Tensor
) -> Callable[[], object]:
    """The call, and then its backward."""
    for leaf in inputs:
        leaf.requires_grad_()

    def forward_and_backward() -> object:
        with torch.enable_grad():
            return torch.autograd.grad(run(), inputs, grad)

    return forward_and_backward


def inputs(shape: Shape, units: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Random Q, K, V, and a mask that hides nothing, of ``units`` key heads as a batch of one."""
    generator = torch.Generator(shape.device).manual_seed(0)
    heads = units * (shape.num_heads // shape.num_key_heads)

    def draw(order: tuple[int, ...], *sizes: int) -> Tensor:
        axes = [axis if axis >= 0 else ~axis for axis in order]
        lying = [sizes[axis] if axis >= 0 else 1 for axis in order]
        numbers = torch.randn(
            lying, generator=generator, device=shape.device, dtype=torch.float32
        ).to(shape.dtype)
        return numbers.permute(*(axes.index(axis) for axis in range(4))).expand(sizes)

    q = draw(shape.order[0], 1, heads, shape.num_queries, shape.head_dim)
    k = draw(shape.order[1], 1, units, shape.num_keys, shape.head_dim)
    v = draw(shape.order[2], 1, units, shape.num_keys, shape.value_dim)
    if shape.mask is None:
        return q, k, v, None
    (batch, mask_heads, rows, keys), dtype = shape.mask
    sizes = (1, heads if batch * mask_heads > 1 else 1, rows, keys)
    fill = torch.ones if dtype == torch.bool else torch.zeros
    return q, k, v, fill(sizes, dtype=dtype, device=shape.device)


def random_bases(
    key_heads: int, head_dim: int, rank: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """A and B ``(H_k, d, r)`` of no meaning, whose products have about the size of their input."""
    generator = torch.Generator(device).manual_seed(1)
    A, B = (
        torch.randn(
            (key_heads, head_dim, rank), generator=generator, device=device, dtype=torch.float32
        )
        / math.sqrt(head_dim)
        for _ in "AB"
    )
    return A, B


@contextmanager
def undisturbed(shape: Shape) -> Iterator[None]:
    """Run PyTorch as a plain call does, whatever is being traced or recorded around it."""
    plain = shape.mask is None and not shape.causal_offset
    drawn_on = [shape.device] if shape.device.type == "cuda" else []
    with (
        torch.random.fork_rng(drawn_on, enabled=shape.dropout),  # SDPA's dropout draws
        _disable_current_modes(),
        torch._C.DisableTorchFunction(),
        torch.no_grad(),
        torch.autocast(shape.device.type, enabled=False),
        sdpa.best_sdpa(shape.device) if plain else nullcontext(),  # as the backend compiles it
        peak_kept(shape.device),
    ):
        yield


@contextmanager
def peak_kept(device: torch.device) -> Iterator[None]:
    """Leave ``torch.cuda.max_memory_allocated`` as the caller's own tensors made it.

    A peak can be reset but not set: where it was raised inside, it is reset, and memory is
    allocated up to what it was, and freed at once. The other peaks (of reserved memory, of the
    number of blocks) begin anew then. Blocks are multiples of 512 bytes; the peak may come out
    lower by as many.
    """
    if device.type != "cuda" or not torch.cuda.is_initialized():
        yield
        return
    before = torch.cuda.max_memory_allocated(device)
    try:
        yield
    finally:
        if torch.cuda.max_memory_allocated(device) > before:
            torch.cuda.reset_peak_memory_stats(device)
            missing = (before - torch.cuda.memory_allocated(device)) // 512 * 512
            if missing > 0:
                with suppress(torch.cuda.OutOfMemoryError):  # others have it now
                    torch.empty(missing, dtype=torch.uint8, device=device)


def _round(arms: Arms, clock: Clock, repeats: int, turn: int = 0) -> dict[str, float]:
    """Seconds a call of each candidate; they begin with another one each turn."""
    names = list(arms)
    names = names[turn % len(names) :] + names[: turn % len(names)]
    return {name: clock.seconds(arms[name], repeats) for name in names}
