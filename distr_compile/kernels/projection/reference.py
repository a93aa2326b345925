"""The definition of ``projection``: bases A and B from two small Gram matrices.

Per key head and grouping block it replaces S = Q K^T by (Q A)(K B)^T, where Q A spans (nearly) the
leading r left singular vectors of S and B is the least-squares choice for that span. Nothing of the
size of S is made: Cq = Q^T Q and Ck = K^T K, both of d x d, say all there is to know.

Everything here is at least fp32. The bases of two correct implementations differ by signs, and in
directions that are lost in rounding by anything: compare A B^T, or scores.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distr_compile.kernels.counted import counted_for
from distr_compile.kernels.random import start_columns
from distr_compile.kernels.roles import Asked, Block, keys_of_block, prefix_edge
from distr_compile.kernels.rows import saturate

RIDGE = 2.0**-18
"""Added to the diagonal of Cq, relative to its Frobenius norm: well above the rounding of fp32.

As if Q had d more rows, a multiple of each unit vector. Least squares over the longer Q never
divides by a rounding error, and is still exact where the rows of K lie in the span.
"""


COMPUTES = ("projection",)


def factors(Q: Tensor, K: Tensor, mask: Tensor | None, asked: Asked) -> list[Block]:
    """Qhat = Q A and Khat = K B of each grouping block, with a pair of A and B for each.

    Args:
        Q: ``(B, H_k, rep, N, d)``.
        K: ``(B or 1, H_k, M, d)``.
        mask: says with ``asked`` which rows and keys count.
        asked: with ``strict`` A and B come from the rows and keys before a block, and Khat has
            these keys only.
    """
    key_heads, rep, num_queries, head_dim = Q.shape[1:]
    num_keys, offset = K.shape[2], asked.causal_offset or 0
    sizes = (num_queries, num_keys, key_heads, rep)
    queries, keys = counted_for(mask, *sizes, asked)
    first_columns = start_columns(head_dim, asked.rank, seed=asked.seed)
    blocks = []
    for number, (counted, rows) in enumerate(asked.blocks(num_queries)):
        seen = keys_of_block(asked, number, counted.stop, num_keys)
        if asked.strict:
            # From what comes before the block.
            seen = prefix_edge(rows.start, num_keys, offset)
            counted = slice(asked.first, counted.start)
        A, B = _bases(
            Q[..., counted, :],
            K[:, :, :seen],
            None if queries is None else queries[..., counted],
            None if keys is None else keys[..., :seen],
            first_columns,
            asked.rounds,
        )
        Qhat = saturate(Q[..., rows, :].to(A.dtype) @ A[:, :, None], Q.dtype)
        approximated = K[:, :, :seen] if asked.strict else K
        Khat = saturate(approximated.to(B.dtype) @ B, Q.dtype)
        blocks.append(Block(rows.start, rows.stop, Qhat.flatten(1, 2), Khat))
    return blocks


def _bases(
    Q: Tensor,
    K: Tensor,
    queries: Tensor | None,
    keys: Tensor | None,
    start: Tensor,
    rounds: int,
) -> tuple[Tensor, Tensor]:
    """A and B ``(B, H_k, d, r)`` of ``projection`` for one block, balanced.

    Q is ``(B, H_k, rep, l, d)`` and K ``(B or 1, H_k, m, d)`` the keys that count; ``queries`` and
    ``keys`` are as from ``counted_rows``, cut likewise.
    """
    if not K.shape[2]:  # the block sees no key: as if there were one that is 0
        K, keys = K.new_zeros(1, K.shape[1], 1, K.shape[3]), None
    rows, counts = Q.flatten(2, 3), None if queries is None else queries.flatten(2, 3)
    if not rows.shape[2]:  # no queries before the first block
        rows, counts = rows.new_zeros(*rows.shape[:2], 1, rows.shape[3]), None
    Cq, Q_exponent = gram(rows, counts, ridge=RIDGE)
    Ck, K_exponent = gram(K, keys, ridge=0)
    A, B = projection_bases(Cq, Ck, start, rounds=rounds)
    size = balance(
        Cq,
        Ck,
        Q_exponent,
        K_exponent,
        num_queries=rows.shape[2],
        num_keys=K.shape[2],
        rank=start.shape[1],
    )
    return A * size, B / size


def power_of_two(x: Tensor) -> Tensor:
    """The power of two 2^e with |x| / 2^e in [1, 2), elementwise; 1 where x is 0."""
    exponent = torch.where(x == 0, 0, torch.frexp(x).exponent - 1)
    return torch.ldexp(torch.ones_like(x), exponent)


def gram(rows: Tensor, counts: Tensor | None, *, ridge: float) -> tuple[Tensor, Tensor]:
    """X^T X of the counted rows, scaled to a Frobenius norm in [1, 4), plus a ridge.

    A matrix of 0 gives the identity: nothing is known, so all directions are alike.

    Args:
        rows: X, ``(..., n, d)``. Entries that are not finite count as 0: they spoil their own row
            of the scores, not the basis of all.
        counts: ``(..., n)`` bool, broadcast; None counts all.
        ridge: added to the diagonal of what is scaled; ``RIDGE`` for Q. 0 for K: there it would
            move the span, also where K has rank r.

    Returns:
        C ``(..., d, d)`` in at least fp32, and integers e ``(..., 1, 1)`` with X^T X = 4^e C but
        for the ridge. The scaling is exact, and nothing overflows on the way.
    """
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    kept = rows.isfinite() if counts is None else rows.isfinite() & counts[..., None]
    rows = rows.where(kept, 0)
    # A power of two: exact, and no square overflows.
    largest = power_of_two(rows.abs().amax((-2, -1), keepdim=True))
    rows = rows / largest
    return normalised(rows.mT @ rows, largest, ridge=ridge)


def normalised(C: Tensor, unit: Tensor, *, ridge: float) -> tuple[Tensor, Tensor]:
    """The end of ``gram``, from the sum C of (x / unit)^T (x / unit) over rows x.

    Args:
        C: ``(..., d, d)`` fp32 or fp64.
        unit: ``(..., 1, 1)``, a power of two.
        ridge: as in ``gram``.

    Returns:
        As ``gram``.
    """
    norm = C.square().sum((-2, -1), keepdim=True).sqrt()
    exponent = (torch.frexp(norm).exponent - 1) // 2  # C / 4^exponent has a norm in [1, 4)
    C = C * torch.ldexp(torch.ones_like(norm), -2 * exponent)
    identity = torch.eye(C.shape[-1], dtype=C.dtype, device=C.device)
    C = torch.where(norm > 0, C + ridge * identity, identity)
    return C, exponent + torch.frexp(unit).exponent - 1


def projection_bases(
    Cq: Tensor, Ck: Tensor, start: Tensor, *, rounds: int
) -> tuple[Tensor, Tensor]:
    """A, B from the Gram matrices: Q K^T is about (Q A)(K B)^T.

    Subspace iteration (Halko, Martinsson, Tropp 2011, algorithm 4.4) on S S^T, S = Q K^T, without
    S: for Y = Q X, S S^T Y = Q (Ck Cq X). Of all factors with the columns of Q X as their span,
    those with orthonormal Q A are taken: then K B = S^T (Q A) is the least-squares choice and no
    larger than S, so that rounding Qhat and Khat costs what rounding S would. ``r == d`` gives
    A B^T = I.

    Args:
        Cq: ``(..., d, d)`` of the queries, from ``gram``; fp32 or fp64.
        Ck: of the keys, likewise.
        start: ``(d, r)``, what the iteration starts from.
        rounds: applications of S S^T; 1 or 2.

    Returns:
        A and B, ``(..., d, r)``: A^T Cq A = I and B = Cq A.
    """
    X = start.to(Cq.device, Cq.dtype) / 64  # integers of at most 60 before
    for _ in range(rounds):
        # Any orthonormal basis of the span will do. Directions that are lost in rounding come out
        # as any others: a larger span is never worse.
        X = torch.linalg.qr(Ck @ (Cq @ X)).Q
    # With orthonormal X no eigenvalue of X^T Cq X is below the ridge: Cholesky cannot fail.
    # A = X L^-T: orthonormal in the product of Cq.
    L = torch.linalg.cholesky(X.mT @ (Cq @ X))
    A = torch.linalg.solve_triangular(L, X.mT, upper=False).mT
    B = Cq @ A
    # One Newton-Schulz step for A^T B = I: the condition of Cq left an error of up to 2^-6 in fp32.
    polish = 1.5 * torch.eye(A.shape[-1], dtype=A.dtype, device=A.device) - 0.5 * (A.mT @ B)
    return A @ polish, B @ polish


def balance(
    Cq: Tensor,
    Ck: Tensor,
    Q_exponent: Tensor,
    K_exponent: Tensor,
    *,
    num_queries: int,
    num_keys: int,
    rank: int,
) -> Tensor:
    """The power of two 2^e for which Q A 2^e and K B 2^-e have about the same mean square.

    The columns of Q A have the length 2^(Q's exponent); K B = S^T (Q A) has at most the Frobenius
    norm of S, whose square is the sum of Cq * Ck. Being a power of two the factor costs no
    accuracy, and the bound need not be sharp.

    Args:
        Cq: of ``gram``, ``(..., d, d)``; Ck likewise.
        Ck: see ``Cq``.
        Q_exponent: of ``gram``, ``(..., 1, 1)``.
        K_exponent: likewise.
        num_queries: rows of Q in the block, those of the ``rep`` heads counted each.
        num_keys: rows of K, at least 1.
        rank: r.

    Returns:
        ``(..., 1, 1)``, from 2^-120 to 2^120.
    """
    energy = (Cq * Ck).sum((-2, -1), keepdim=True) * (num_queries / (num_keys * rank))
    exponent = (torch.frexp(energy).exponent // 2 + K_exponent - Q_exponent) // 2
    return torch.ldexp(torch.ones_like(energy), exponent.clamp(-120, 120))
