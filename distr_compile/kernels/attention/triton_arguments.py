"""Arguments of the attention kernels in Triton, from tensors and values."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from distr_compile.kernels.attention.dropout import Dropout
from distr_compile.kernels.blocks import Places
from distr_compile.kernels.padding import cdiv

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def dropped(dropout: Dropout | None) -> dict[str, float]:
    """Arguments that say where a dropout's part begins."""
    if dropout is None:
        names = ("threshold", "drop_heads", "drop_head", "drop_row", "drop_key")
        return {"drop_scale": 1.0, **dict.fromkeys(names, 0)}
    threshold = dropout.threshold
    return {
        "drop_scale": dropout.scale,
        "threshold": threshold - 2**32 if threshold >= 2**31 else threshold,  # an int32
        "drop_heads": dropout.heads,
        "drop_head": dropout.head,
        "drop_row": dropout.row,
        "drop_key": dropout.key,
    }


def descriptor(t: Tensor, block: list[int]) -> TensorDescriptor:
    """What reads blocks of this size out of a tensor."""
    return TensorDescriptor(t, list(t.shape), list(t.stride()), block)


def describable(t: Tensor) -> bool:
    """Whether the copy engine can read the tensor: steps of 16 bytes, none of them 0."""
    steps = t.stride()
    return (
        t.numel() > 0
        and t.data_ptr() % 16 == 0
        and min(steps) > 0
        and all(step * t.element_size() % 16 == 0 for step in steps[:-1])
    )


def power_of_two(size: int) -> int:
    """The next power of two, at least the 16 that a matrix instruction needs."""
    return max(16, 1 << max(size - 1, 0).bit_length())


def strides(tensor: str, dimensions: str, t: Tensor | None) -> dict[str, int]:
    """Arguments ``stride_<tensor><dimension>``; 0 for a batch of 1, which is then shared."""
    steps = [0] * len(dimensions) if t is None else list(t.stride()[: len(dimensions)])
    if t is not None and dimensions[0] == "b" and t.shape[0] == 1:
        steps[0] = 0
    return {f"stride_{tensor}{name}": step for name, step in zip(dimensions, steps, strict=True)}


def check(
    Qhat: Tensor,
    Khat: Tensor,
    V: Tensor,
    sinks: Tensor | None,
    grouping_block: int,
    out: Tensor,
    lse: Tensor | None,
    places: Places | None,
) -> None:
    """Refuse what the kernel would read wrongly, as ``attention_fwd`` documents."""
    if Qhat.dtype not in DTYPES or any(t.dtype != Qhat.dtype for t in (Khat, V, out)):
        got = ", ".join(str(t.dtype).removeprefix("torch.") for t in (Qhat, Khat, V, out))
        raise ValueError(
            f"dtypes of Qhat, Khat, V, out: got {got}; must be one of float16, bfloat16, float32, "
            "the same for all: convert them first"
        )
    batch, heads, num_queries, r = Qhat.shape
    key_heads, blocks, num_keys = Khat.shape[1:4]
    if grouping_block < 1:
        raise ValueError(f"grouping_block: got {grouping_block}; must be at least 1")
    needed = places.blocks if places else max(1, cdiv(num_queries, grouping_block))
    if key_heads < 1 or heads % key_heads:
        raise ValueError(f"Khat: got {key_heads} heads; must divide the {heads} heads of Qhat")
    if blocks not in ((needed,) if places else (1, needed)):
        raise ValueError(
            f"Khat: got {blocks} grouping blocks for {num_queries} rows in blocks of "
            f"{grouping_block}; must be {needed}, or 1 to be shared by all rows"
        )
    d_v = V.shape[-1]
    expected: dict[str, tuple[Tensor | None, list[tuple[int, ...]]]] = {
        "Khat": (Khat, [(n, key_heads, blocks, num_keys, r) for n in (batch, 1)]),
        "V": (V, [(n, key_heads, num_keys, d_v) for n in (batch, 1)]),
        "sinks": (sinks, [(heads,)]),
        "out": (out, [(batch, heads, num_queries, d_v)]),
        "lse": (lse, [(batch, heads, num_queries)]),
    }
    for name, (tensor, shapes) in expected.items():
        if tensor is not None and tuple(tensor.shape) not in shapes:
            wanted = " or ".join(map(str, dict.fromkeys(shapes)))
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}; must be {wanted}")
    if out.stride(-1) != 1 and d_v > 1:
        raise ValueError(f"out: got last stride {out.stride(-1)}; must be 1: pass a buffer")
    if lse is not None and lse.dtype != torch.float32:
        raise ValueError(f"lse: got {lse.dtype}; must be torch.float32")
