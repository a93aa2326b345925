"""What is compared: ways to compute one attention, and what each of them should give."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from benchmarks.cells import Cell
from distr_compile.estimators import DEFAULT_ESTIMATOR, ESTIMATORS, auto_grouping_block
from distr_compile.kernels.attention import reference
from distr_compile.lowering import cuda
from distr_compile.lowering.call import Approximation, Call, Scores
from distr_compile.lowering.measure import random_bases

SDPA = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
}
EXACT = "ours, rank d"
ESTIMATED = {
    "calibrated G=2": ("calibrated", 2),
    "calibrated G=4": ("calibrated", 4),
    "projection G=2": ("projection", 2),
    "projection G=4": ("projection", 4),
    "lsh-mean G=2": ("lsh-mean", 2),
    "lsh-mean G=4": ("lsh-mean", 4),
    "lsh-sample G=2": ("lsh-sample", 2),
}
"""Name of an arm -> estimator and group size."""

DEFAULT = "sdpa default"
FLEX = "flex"

# torch 2.11 on Python >= 3.12 frees such guards while dicts still point at them, and the process
# aborts (pytorch/pytorch#183753). Off by default in later versions.
torch._dynamo.config.use_recursive_dict_tags_for_guards = False

FACTOR = 4
"""A kernel may err by this times the error of the same formula in its own precision."""

SINGLE = 8
"""Likewise for fp32 on a GPU, where three tf32 products stand for one."""

ALGEBRA = {"projection": 2.0**-11}
"""What making the factors costs besides, relative to the largest value, whatever the dtype.

The bases of ``projection`` come from Gram matrices in fp32, which square the condition of Q and K:
where it is 1000, scores keep 5e-4 of their precision.
"""


def algebra(estimator: str, rank: int, head_dim: int) -> float:
    """Of ``ALGEBRA``, where Q and K become narrow at all."""
    return ALGEBRA.get(estimator, 0.0) if rank < head_dim else 0.0


@dataclass(frozen=True)
class Inputs:
    """Random Q, K and V with heads side by side in memory, as models lay them out; a mask."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None


@dataclass(frozen=True)
class Arm:
    """One way to compute a cell.

    Attributes:
        call: computes it and returns the output.
        rank: width of the product of Q and K; d is exact.
        estimator: how the width was reduced.
        bases: A and B ``(H_k, d, r)`` where the estimator needs them.
    """

    call: Callable[[], Tensor]
    rank: int
    estimator: str = DEFAULT_ESTIMATOR
    bases: tuple[Tensor, Tensor] | None = None


def make_inputs(cell: Cell, device: str, *, drawn_on: str = "") -> Inputs:
    """Inputs of a cell.

    Args:
        cell: the shape.
        device: where they are to be; "meta" gives them no numbers.
        drawn_on: where they are drawn: the CPU draws the same for every device; as a default the
            device, which is faster.
    """
    place = drawn_on or device
    generator = None
    if place != "meta":
        generator = torch.Generator(place).manual_seed(cell.tokens + cell.head_dim)
    dtype = getattr(torch, cell.dtype)

    def draw(*shape: int) -> Tensor:
        if generator is None:
            return torch.empty(shape, device=device, dtype=dtype)
        return torch.randn(shape, generator=generator, device=place, dtype=dtype).to(device)

    q, k, v = (
        draw(cell.batch, cell.tokens, heads, cell.head_dim).transpose(1, 2)
        for heads in (cell.heads, cell.key_heads, cell.key_heads)
    )
    mask = None
    if cell.mask == "padding":  # the last eighth of the keys, one less in each further element
        lengths = cell.tokens * 7 // 8 - torch.arange(cell.batch, device=device)
        mask = torch.arange(cell.tokens, device=device) < lengths[:, None, None, None]
    elif cell.mask == "bias":
        mask = draw(1, cell.heads, cell.tokens, cell.tokens)
    return Inputs(q, k, v, mask)


def make_arms(
    cell: Cell, inputs: Inputs, *, with_flex: bool, by_pointers: bool = False
) -> dict[str, Arm]:
    """All arms by name. None has been called: what this device refuses raises then."""
    q, k, v, mask = inputs.q, inputs.k, inputs.v, inputs.mask
    d, scale = cell.head_dim, cell.scale
    is_shared = cell.heads != cell.key_heads

    def sdpa() -> Tensor:
        return F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=cell.is_causal, scale=scale, enable_gqa=is_shared
        )

    def forced(backend: SDPBackend) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with sdpa_kernel(backend):
                return sdpa()

        return call

    arms = make_ours(cell, inputs, by_pointers)
    for name, backend in SDPA.items():
        arms[name] = Arm(forced(backend), d)
    arms[DEFAULT] = Arm(sdpa, d)
    if with_flex and not cell.is_causal and mask is None:
        # It is one code object for PyTorch, which compiles that for a few shapes and then no more.
        torch._dynamo.reset()
        # Not compiled without a GPU: a compiler would take longer than everything else.
        flex = torch.compile(flex_attention, dynamic=False) if q.is_cuda else flex_attention
        arms[FLEX] = Arm(lambda: flex(q, k, v, scale=scale, enable_gqa=is_shared), d)
    return arms


def make_ours(cell: Cell, inputs: Inputs, by_pointers: bool = False) -> dict[str, Arm]:
    """Our kernels at the full width and with every estimator of ``ESTIMATED``."""
    d = cell.head_dim
    hows = {EXACT: Approximation.none(d)}
    for name, (estimator, group_size) in ESTIMATED.items():
        if d // group_size >= 16:
            hows[name] = Approximation(estimator, d // group_size)
    return {name: our_arm(cell, inputs, how, by_pointers) for name, how in hows.items()}


def our_arm(cell: Cell, inputs: Inputs, how: Approximation, by_pointers: bool = False) -> Arm:
    """Our kernels, called as the op calls them, bases given where the estimator needs them.

    Args:
        cell: the shape.
        inputs: of it.
        how: the approximation.
        by_pointers: in the form that the op falls back to where descriptors fail.
    """
    q, k, v = inputs.q, inputs.k, inputs.v
    bases = None
    if ESTIMATORS[how.estimator].needs == "bases" and how.rank < cell.head_dim:
        drawn = random_bases(cell.key_heads, cell.head_dim, how.rank, torch.device("cpu"))
        bases = (drawn[0].to(q.device), drawn[1].to(q.device))
    scores = Scores(cell.scale, cell.is_causal)
    kernels = cuda.IMPLEMENTATION
    if by_pointers:
        assert kernels.fallback is not None
        kernels = kernels.fallback

    def call() -> Tensor:
        out = q.new_empty(cell.batch, cell.tokens, cell.heads, cell.head_dim).transpose(1, 2)
        kernels.run(Call(q, k, v, inputs.mask, None, scores, how, bases, out))
        return out

    return Arm(call, how.rank, how.estimator, bases)


def picked(cell: Cell, inputs: Inputs) -> str:
    """The backend that SDPA takes when it is free to choose."""
    choice = torch._fused_sdp_choice(
        inputs.q,
        inputs.k,
        inputs.v,
        inputs.mask,
        0.0,
        cell.is_causal,
        scale=cell.scale,
        enable_gqa=cell.heads != cell.key_heads,
    )
    return str(SDPBackend(choice).name)


@dataclass(frozen=True)
class Sample:
    """A few rows of one head, with all that their output depends on."""

    b: int
    h: int
    rows: Tensor
    Qhat: Tensor
    Khat: Tensor
    V: Tensor
    mask: Tensor
    algebra: float = 0.0


def samples(
    cell: Cell,
    inputs: Inputs,
    rank: int,
    estimator: str,
    bases: tuple[Tensor, Tensor] | None = None,
) -> Iterator[Sample]:
    """Rows of the first block of the first head and of the last block of the last head.

    They are on the CPU, in fp64: nothing of the device is trusted with the check.
    """
    rep = cell.heads // cell.key_heads
    block = auto_grouping_block(cell.tokens, estimator)
    for b, h, start in ((0, 0, 0), (-1, cell.heads - 1, (cell.tokens - 1) // block * block)):
        key_h = h // rep
        rows = torch.linspace(start, min(start + block, cell.tokens) - 1, 4).long()
        heads = slice(key_h * rep, (key_h + 1) * rep)
        K, V = (t[b, None, key_h, None].cpu().double() for t in (inputs.k, inputs.v))
        Q = inputs.q[b, None, heads].cpu().double()
        mask = inputs.mask
        if mask is not None:
            shape = (cell.batch, cell.heads, -1, -1)
            mask = mask.expand(shape)[b, None, heads].cpu()
        given = None
        if bases is not None:  # as the kernels take them: rounded to the inputs' dtype
            A, B = (t[key_h, None].to(inputs.q.dtype).cpu().double() for t in bases)
            given = (A, B)
        if rank < cell.head_dim:
            # All rows, since which of them count depends on all of the mask.
            factors = reference.estimate(
                Q,
                K,
                mask,
                rank=rank,
                estimator=estimator,
                grouping_block=block,
                is_causal=cell.is_causal,
                bases=given,
            )[start // block]
            Q, K = factors.Qhat, factors.Khat
        else:
            Q = Q[:, :, start : start + block]
        yield Sample(
            b,
            h,
            rows,
            Q[:, h - key_h * rep, None, rows - start],
            K,
            V,
            _mask_of_rows(cell, inputs.mask, b, h, rows),
            algebra(estimator, rank, cell.head_dim),
        )


def _mask_of_rows(cell: Cell, mask: Tensor | None, b: int, h: int, rows: Tensor) -> Tensor:
    shape = (cell.batch, cell.heads, cell.tokens, cell.tokens)
    if mask is not None:
        return mask.expand(shape)[b, h, rows.to(mask.device)].cpu()
    last_key = rows[:, None] if cell.is_causal else torch.tensor(cell.tokens)
    return torch.arange(cell.tokens) <= last_key


def errors(
    samples: Iterator[Sample], out: Tensor, *, scale: float, factor: float = FACTOR
) -> dict[str, float | bool]:
    """Error of ``out`` on sampled rows, and the most it may be, relative to the largest value.

    A kernel is right when it errs by no more than ``factor`` times what the same formula errs in
    the kernel's own precision, a rounding of the result, and what ``ALGEBRA`` says. Of fp32 that is
    ``SINGLE`` times: three tf32 products stand for one of fp32.
    """
    error = allowed = largest = algebra = 0.0
    for s in samples:
        options = {"scale": scale, "rank": s.Qhat.shape[-1]}
        factors = (s.Qhat, s.Khat, s.V)
        wanted = reference.attention(*factors, s.mask, **options)
        same = reference.attention(*(t.to(out.dtype) for t in factors), s.mask, **options)
        got = out[s.b, s.h, s.rows.to(out.device)].cpu().double()
        here = (got - wanted[0, 0]).abs().max().item()
        error = here if here != here else max(error, here)  # NaN stays
        allowed = max(allowed, (same - wanted).abs().max().item())
        largest = max(largest, wanted.abs().max().item())
        algebra = max(algebra, s.algebra)
    if out.dtype == torch.float32 and out.is_cuda:
        factor = max(factor, SINGLE)
    allowed = factor * allowed + (torch.finfo(out.dtype).eps + algebra) * largest
    return {
        "max_error": error / largest,
        "allowed_error": allowed / largest,
        "is_right": error <= allowed,
    }
