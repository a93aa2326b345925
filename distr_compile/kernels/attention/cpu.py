"""The fused CPU kernel ``cpu.cpp``: its arguments, handed over by ctypes.

The first question, ``unavailable_reason()``, builds or loads the library (``build.py``).
"""

from __future__ import annotations

import ctypes
import itertools
import os
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from distr_compile.kernels.attention import build, reference
from distr_compile.kernels.attention.dropout import Dropout
from distr_compile.kernels.rows import four_dimensions

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""Dtypes of Q, K, V and the output, as the library numbers them."""

MASK_DTYPES = {**DTYPES, torch.bool: 3, torch.float64: 4}

NO_MASK = -1

RANK_UNIT = 16
"""B comes with its width padded to a multiple of it by zeros."""

BASES = 1 << 20
"""Elements of A and B together that are alive at a time; more blocks take several calls."""

_int64, _pointer = ctypes.c_int64, ctypes.c_void_p


class DroppedWeights(ctypes.Structure):
    """``struct Dropout`` of ``dropout.h``, field by field; all 0 drops nothing."""

    _fields_ = (
        *((name, _int64) for name in "seed threshold heads head row".split()),
        ("scale", ctypes.c_double),
    )

    @classmethod
    def of(cls, dropout: Dropout) -> DroppedWeights:
        """What the kernel is told of a part of a call that begins at the first key."""
        place = (dropout.heads, dropout.head, dropout.row)
        return cls(int(dropout.seed), dropout.threshold, *place, dropout.scale)


class _Call(ctypes.Structure):
    """``struct Call`` of ``engine.h``, field by field."""

    _fields_ = (
        ("size", _int64),
        *((name, _pointer) for name in "q k v mask q_exact k_exact a b sinks out lse".split()),
        ("q_strides", _int64 * 4),
        ("k_strides", _int64 * 5),
        ("v_strides", _int64 * 4),
        ("mask_strides", _int64 * 4),
        ("q_exact_strides", _int64 * 4),
        ("k_exact_strides", _int64 * 4),
        ("a_strides", _int64 * 3),
        ("b_strides", _int64 * 3),
        ("out_strides", _int64 * 4),
        ("lse_strides", _int64 * 3),
        *(
            (name, _int64)
            for name in "batch heads key_heads queries keys rank head_dim value_dim block "
            "is_causal causal_offset strict dtype mask_kind".split()
        ),
        ("scale", ctypes.c_double),
        ("softcap", ctypes.c_double),
        ("dropout", DroppedWeights),
        ("parallel_for", _pointer),
        ("threads", _int64),
        ("workspace", _pointer),
    )


_loaded: build.Library | None = None
_lock = threading.Lock()


def _library() -> build.Library:
    """The library of this process; a failure is remembered too, until ``forget``."""
    global _loaded
    if os.environ.get(build.SWITCH) == "0":
        return build.Library(None, 0, f"{build.SWITCH}=0 forbids it")
    if _loaded is None:
        with _lock:
            # Another thread may have loaded it meanwhile.
            if _loaded is None:
                _loaded = build.load(_self_test)
    return _loaded


def _unlock_after_fork() -> None:
    global _lock
    _lock = threading.Lock()  # another thread of the parent may have held it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlock_after_fork)


def forget() -> None:
    """Unload the library and let the next question look for it anew; no call may be running."""
    global _loaded
    if _loaded is not None:
        build.close(_loaded.handle)
    _loaded = None


def unavailable_reason() -> str | None:
    """Why the kernel cannot run in this process, in words; None where it can.

    The first question builds the library where it is not in the cache.
    """
    return _library().reason


def library() -> build.Library:
    """The loaded library.

    Raises:
        RuntimeError: the kernel is not available.
    """
    loaded = _library()
    if loaded.handle is None:
        raise RuntimeError(f"the CPU kernel is not available: {loaded.reason}")
    return loaded


def available(dtype: torch.dtype) -> bool:
    """Whether the kernel runs here on inputs of ``dtype``."""
    return dtype in DTYPES and unavailable_reason() is None


def _self_test(library: build.Library) -> str | None:
    """What is wrong with the library's results on a small call of each dtype, or None."""
    with _disable_current_modes(), torch.no_grad(), torch.autocast("cpu", enabled=False):
        return _wrong(library)


def _wrong(library: build.Library) -> str | None:
    generator = torch.Generator().manual_seed(0)
    new: Any = {"dtype": torch.float32, "device": "cpu"}
    q, k, v = (torch.randn(1, 2, 40, 40, generator=generator, **new) for _ in range(3))
    for dtype in DTYPES:
        inputs = [t.to(dtype) for t in (q, k, v)]
        options: dict[str, Any] = {"scale": 0.2, "is_causal": True}
        exact = reference.attention(*(t.double() for t in inputs), rank=40, **options)
        # What the kernel leaves out stays NaN, which is within no bound.
        out = torch.full_like(inputs[0], torch.nan)
        query, key, value = inputs
        attention(query, key[:, :, None], value, out=out, lib=library, **options)
        error = (out.double() - exact).abs().max().item()
        if not error <= 4 * torch.finfo(dtype).eps * exact.abs().max().item():
            return f"its result in {dtype} is off by {error:.1e}"
        if wrong := _wrong_gradients(library, inputs, out, options):
            return f"its gradients in {dtype} are off by {wrong:.1e}"
    return None


def _wrong_gradients(
    library: build.Library, inputs: list[Tensor], out: Tensor, options: dict[str, Any]
) -> float:
    """The error of a small call's gradients against fp64, where it is too large; else 0."""
    from distr_compile.kernels.attention.backward import backward  # which needs this module

    # By the formula: there is no autograd where the library is first asked for inside an op.
    query, key, value = (t.double() for t in inputs)
    scores = query @ key.mT * options["scale"]
    scores = scores.masked_fill(torch.ones_like(scores).triu(1) > 0, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp()
    slope = value.sum(-1)[:, :, None] - (weights @ value).sum(-1, keepdim=True)
    by_score = weights * slope * options["scale"]
    wanted = [by_score @ key, by_score.mT @ query, weights.mT @ torch.ones_like(value)]
    # The kernel writes fp32, whatever the default dtype of the program is.
    new: Any = {"dtype": torch.float32, "device": "cpu"}
    found = [torch.empty_like(inputs[0]), *(torch.empty(t.shape, **new) for t in inputs[1:])]
    q, k, v = inputs
    made: dict[str, Any] = dict(zip(("dq", "dk", "dv"), found, strict=True))
    backward(q, k, v, None, out, lse.float(), torch.ones_like(out), lib=library, **made, **options)
    largest = max(t.abs().max().item() for t in wanted)
    error = max((a.double() - b).abs().max().item() for a, b in zip(found, wanted, strict=True))
    return 0.0 if error <= 16 * torch.finfo(out.dtype).eps * largest else error


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scale: float,
    is_causal: bool = False,
    causal_offset: int = 0,
    grouping_block: int = 0,
    softcap: float = 0.0,
    bases: tuple[Tensor, Tensor] | None = None,
    exact: tuple[Tensor, Tensor] | None = None,
    follows: bool = False,
    out: Tensor,
    lse: Tensor | None = None,
    dropout: Dropout | None = None,
    lib: build.Library | None = None,
) -> Tensor:
    """softmax(scale * Qhat Khat^T + mask) V, as ``triton_fwd.py`` computes it on a GPU.

    Qhat and Khat are given, or with ``bases`` made in the kernel: Qhat = Q A and Khat = K B, in
    fp32, then rounded to the dtype of Q where that is bf16 and the CPU multiplies it.

    Beside inputs and output the call allocates at most 16 MiB, and per thread
    ``4 (528 (d + r) + 272 d_v)`` bytes and 108 KiB at most, with dropout 48 KiB more. Bits do not
    depend on the number of threads, which is that of ``torch.set_num_threads``.

    Args:
        q: Qhat ``(B, H, N, r)`` fp32, fp16 or bf16, any strides; with ``bases`` Q ``(B, H, N, d)``.
        k: Khat ``(B or 1, H_k, blocks or 1, M, r)``, a copy per grouping block; with ``bases`` K
            ``(B or 1, H_k, 1, M, d)``. Query head h uses key head ``h // (H / H_k)``.
        v: ``(B or 1, H_k, M, d_v)``.
        mask: bool (True = attend) or floating (added), broadcastable to ``(B, H, N, M)``.
        sinks: ``(H,)`` floating; one more score per row, in the softmax's denominator only.
        scale: multiplies the scores.
        is_causal: row i sees keys ``j <= i + causal_offset``.
        causal_offset: see ``is_causal`` and ``exact``.
        grouping_block: query rows that share a Khat; 0 for all.
        softcap: c > 0 makes scaled scores s ``c * tanh(s / c)``, before the mask; 0 does not.
        bases: A^T ``(B or 1, H_k, blocks, r, d)`` and B ``(B or 1, H_k, blocks, d, padded r)``,
            as ``laid_out`` makes them.
        exact: Q ``(B, H, N, d)`` and K ``(B or 1, H_k, M, d)`` of the strict form: a block that
            starts at row s > 0 uses Qhat and Khat for keys before ``s + causal_offset`` only, and
            Q and K for the others; the first block uses Q and K for all.
        follows: these rows follow others of the sequence: the first block is as any other then.
        out: ``(B, H, N, d_v)`` in the dtype of q, any strides; filled and returned.
        lse: ``(B, H, N)`` fp32, any strides; filled with the logarithm of each row's sum of
            exponentials, sinks included, -inf where the row sees nothing.
        dropout: says which weights are dropped.
        lib: the library that computes it, where it is not yet known to be fit; else ``library()``.

    Raises:
        RuntimeError: the kernel is not available.
    """
    lib = library() if lib is None else lib
    if not out.numel():
        return out
    if not v.shape[2] and sinks is None and lse is None:
        return out.zero_()
    queries = q.shape[2]
    call = _Call(size=ctypes.sizeof(_Call), scale=scale, softcap=softcap)
    call.batch, call.heads, call.queries = q.shape[0], q.shape[1], queries
    call.key_heads, call.keys, call.value_dim = v.shape[1], v.shape[2], v.shape[3]
    call.block = min(grouping_block or queries, queries)
    call.is_causal, call.causal_offset = is_causal, causal_offset
    call.dtype, call.mask_kind = DTYPES[q.dtype], NO_MASK
    # The struct has addresses only: what they point to must outlive the call.
    keep = [point(call, "q", q), point(call, "v", v), point(call, "out", out)]
    keep.append(point(call, "k", k))
    # The width of q is both; bases say another rank, exact another head_dim.
    call.head_dim = call.rank = q.shape[3]
    if bases is not None:
        call.rank = bases[0].shape[3]
        keep += [_set_basis(call, "a", bases[0]), _set_basis(call, "b", bases[1])]
    if exact is not None:
        call.strict, call.head_dim = (2 if follows else 1), exact[0].shape[3]
        keep += [point(call, "q_exact", exact[0]), point(call, "k_exact", exact[1])]
    if mask is not None:
        call.mask_kind = MASK_DTYPES[mask.dtype]
        keep.append(point(call, "mask", four_dimensions(mask)))
    if sinks is not None:
        keep.append(sinks := sinks.float().contiguous())
        call.sinks = sinks.data_ptr()
    if lse is not None:
        keep.append(point(call, "lse", lse))
    if dropout is not None:
        call.dropout = DroppedWeights.of(dropout)
    _run(lib, call)
    return out


def padded(rank: int) -> int:
    """The width that B has in memory."""
    return -(-rank // RANK_UNIT) * RANK_UNIT


def laid_out(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """A and B ``(..., d, r)`` as the kernel reads them: A^T, and B padded by zeros, in fp32."""
    return (
        A.mT.float().contiguous(),
        torch.nn.functional.pad(B.float(), (0, padded(B.shape[-1]) - B.shape[-1])).contiguous(),
    )


Group = tuple[Tensor, Tensor]
"""A^T ``(b h, blocks, r, d)`` and B ``(b h, blocks, d, padded r)`` of successive blocks."""


def stacked(bases: Iterator[tuple[Tensor, Tensor]]) -> Iterator[Group]:
    """Groups from A and B ``(b h, d, r)`` of each block in turn."""
    for first in bases:
        # As many blocks together as ``BASES`` elements hold.
        at_once = max(1, BASES // (first[0].numel() + first[1].numel()))
        some = [first, *itertools.islice(bases, at_once - 1)]
        A, B = (torch.stack(matrices, 1) for matrices in zip(*some, strict=True))
        yield laid_out(A, B)


def workspace(size: int) -> Tensor:
    """``size`` bytes on the CPU that start at a multiple of 64."""
    memory = torch.empty(size + 64, dtype=torch.uint8, device="cpu")
    return memory[-memory.data_ptr() % 64 :]


def _run(lib: build.Library, call: Any) -> None:
    call.threads = torch.get_num_threads()
    call.parallel_for = lib.parallel_for
    memory = workspace(lib.handle.distr_workspace(ctypes.byref(call)))
    call.workspace = memory.data_ptr()
    lib.handle.distr_attention(ctypes.byref(call))


def point(call: Any, name: str, t: Tensor) -> Tensor:
    """Point the call at ``t``; a dimension of size 1 is broadcast."""
    # The kernel reads memory, where a lazy negation is not done yet.
    t = t.resolve_neg()
    setattr(call, name, t.data_ptr())
    strides = [s if n > 1 else 0 for s, n in zip(t.stride(), t.shape, strict=True)]
    # Rows of these have columns that are walked: one column counts as dense.
    if name in ("q", "k", "v", "out", "q_exact", "k_exact"):
        strides[-1] = t.stride(-1) if t.shape[-1] > 1 else 1
    getattr(call, f"{name}_strides")[:] = strides
    return t


def _set_basis(call: Any, name: str, t: Tensor) -> Tensor:
    setattr(call, name, t.data_ptr())
    getattr(call, f"{name}_strides")[:] = [
        s if n > 1 else 0 for s, n in zip(t.stride()[:3], t.shape[:3], strict=True)
    ]
    return t
