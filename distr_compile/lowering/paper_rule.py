"""The paper's analytic choice of block sizes, for its own kernel (section 3.3.1, eq. 4 and 5).

Nothing here picks the tiles our kernels run with: those are the table in ``tiles.py``. The rule is
kept because the paper publishes its answers (Table 2), so that they can be checked.

The paper states: l (rows of a Q block) and m (rows of a K and V block) are multiples of N' = 16; an
SM must hold at least two warps per tensor core, W_b M_s / (w (l d + 2 m d)) >= 2 N_T; l is made as
large as possible, then m. It does not state W_b, M_s or N_T, and for no choice of them do these
sentences alone give Table 2: with the cards' own figures and four warps, d = 64 comes out as
(368, 16) and not as the printed (128, 128). We read the rest into it, openly:

1. W_b = 4 warps, as in FlashAttention-2's kernels of that width; M_s is all the shared memory an SM
   can give (100 KiB on each of the three cards); N_T = 4; w = 2 bytes.
2. l and m are powers of two, as in Triton and in every entry of the table.
3. The blocks of S (l x m) and O (l x d) stay in registers in fp32, as Figure 3 of the paper draws
   them: at most 255 registers for each of the 32 W_b threads.
4. l <= 4 m. Nothing in the paper says so beyond its remark that m = 1 starves the tensor cores;
   among the powers of two, 4 is the only bound under which the table comes out.
"""

from __future__ import annotations

from dataclasses import dataclass

TENSOR_CORE_ROWS = 16  # N' of equation 4
WARPS = 4  # W_b
MAX_REGISTERS = 255  # of one thread, on every NVIDIA GPU since Kepler
MAX_ASPECT = 4  # l / m


@dataclass(frozen=True)
class Card:
    """What equation 5 wants to know of a GPU.

    Attributes:
        shared_bytes: shared memory of one SM that thread blocks can use (M_s), in bytes.
        tensor_cores: tensor cores of one SM (N_T).
    """

    shared_bytes: int
    tensor_cores: int


# Shared memory: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability", rows
# 8.6 and 8.9. Tensor cores: NVIDIA's GA102 and Ada architecture whitepapers, "SM" diagrams.
CARDS = {
    "RTX 4090": Card(shared_bytes=100 * 1024, tensor_cores=4),  # compute capability 8.9
    "RTX 3090": Card(shared_bytes=100 * 1024, tensor_cores=4),  # 8.6
    "L40": Card(shared_bytes=100 * 1024, tensor_cores=4),  # 8.9
}


def paper_blocks(card: Card, head_dim: int, *, element_bytes: int = 2) -> tuple[int, int]:
    """Block sizes (l, m) by the rule at the top of this file.

    Args:
        card: one of ``CARDS``, or another.
        head_dim: d, the width of Q, K and V.
        element_bytes: w, bytes of one element.

    Raises:
        ValueError: no pair of block sizes satisfies the rule; the width is too large for the card.
    """
    sizes = [TENSOR_CORE_ROWS << n for n in range(8)]
    allowed = [
        (l, m)
        for l in sizes  # noqa: E741, the paper's name
        for m in sizes
        if WARPS * card.shared_bytes / (element_bytes * (l * head_dim + 2 * m * head_dim))
        >= 2 * card.tensor_cores
        and l * (m + head_dim) <= MAX_REGISTERS * 32 * WARPS
        and l <= MAX_ASPECT * m
    ]
    if not allowed:
        raise ValueError(
            f"head_dim: got {head_dim} at {element_bytes} bytes; the paper's rule finds no block "
            f"sizes for it in {card.shared_bytes} bytes of shared memory; take tiles.tile_for"
        )
    return max(allowed)
