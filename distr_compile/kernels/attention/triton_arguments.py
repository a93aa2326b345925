"""Arguments of the attention kernels in Triton, from tensors and values."""

from __future__ import annotations

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from distr_compile.kernels.attention.dropout import Dropout


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
