"""How far approximate attention is from exact attention: scores, weights and output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.error_inputs import Inputs
from distr_compile.estimators import ESTIMATORS
from distr_compile.kernels.attention import reference
from distr_compile.kernels.roles import Block

SVD_LIMIT = "SVD limit"

Method = Callable[..., list[Block]]
"""(Q, K, *, rank, grouping_block, is_causal) -> what ``reference.estimate`` returns"""


def svd_limit(
    Q: Tensor, K: Tensor, *, rank: int, grouping_block: int, is_causal: bool = False
) -> list[Block]:
    """The truncated SVD of every block's scores: no factors of this rank are nearer (Eckart-Young).

    With causality a block's scores are those with the keys before its end, the only ones that
    any of its rows sees. S is never made: with Q = U R and K = W T, its SVD is that of R T^T, d by
    d, between U and W.
    """
    num_queries = Q.shape[2]
    blocks = []
    for start in range(0, num_queries, grouping_block):
        stop = min(start + grouping_block, num_queries)
        U, R = torch.linalg.qr(Q[:, :, start:stop])
        seen = K[:, :, :stop] if is_causal else K
        W, T = torch.linalg.qr(seen)
        left, sizes, right = torch.linalg.svd(R @ T.mT, full_matrices=False)
        Qhat = U @ (left * sizes[..., None, :])[..., :rank]
        Khat = W @ right.mT[..., :rank]
        unseen = K.new_zeros(*K.shape[:2], K.shape[2] - seen.shape[2], Khat.shape[-1])
        blocks.append(Block(start, stop, Qhat, torch.cat([Khat, unseen], dim=2)))
    return blocks


def methods() -> dict[str, Method]:
    """Every estimator that needs no calibration, with every number of rounds; and the limit."""
    found: dict[str, Method] = {}
    for name, estimator in ESTIMATORS.items():
        if estimator.needs == "nothing":
            for rounds in estimator.rounds:
                title = name if len(estimator.rounds) == 1 else f"{name}, rounds = {rounds}"
                found[title] = partial(reference.estimate, estimator=name, rounds=rounds)
    return {**found, SVD_LIMIT: svd_limit}


@dataclass(frozen=True)
class Errors:
    """Of one attention call, or the mean of several.

    Attributes:
        scores: Frobenius norm of Shat - S over that of S, all heads of a batch element together;
            the mean over the batch. With causality S has the keys before the end of the grouping
            block.
        output: the same of softmax(S / sqrt(d)) V.
        kl: Kullback-Leibler divergence of the approximate attention weights from the exact ones,
            in nats, mean over the rows.
    """

    scores: float
    output: float
    kl: float


def errors(inputs: Inputs, blocks: list[Block]) -> Errors:
    """Compare what ``blocks`` make of the scores with the scores."""
    Q, K, V = inputs.Q, inputs.K, inputs.V
    batch, _, num_queries, head_dim = Q.shape
    zero = Q.new_zeros(batch)
    wrong_scores, all_scores, wrong_output, all_output, kl = zero, zero, zero, zero, zero
    for block in blocks:
        end = block.stop if inputs.is_causal else K.shape[2]
        S = Q[:, :, block.start : block.stop] @ K[:, :, :end].mT
        Shat = scores(inputs, [block])[:, :, block.start : block.stop, :end]
        wrong_scores = wrong_scores + _squares(Shat - S)
        all_scores = all_scores + _squares(S)
        seen = S.new_ones(S.shape[-2:], dtype=torch.bool)
        if inputs.is_causal:
            seen = seen.tril(block.start)
        scale = inputs.scale or head_dim**-0.5
        bias = 0 if inputs.mask is None else inputs.mask[:, :, block.start : block.stop, :end]
        exact, ours = (
            torch.log_softmax((t * scale + bias).masked_fill(~seen, -torch.inf), -1)
            for t in (S, Shat)
        )
        output = exact.exp() @ V[:, :, :end]
        wrong_output = wrong_output + _squares(ours.exp() @ V[:, :, :end] - output)
        all_output = all_output + _squares(output)
        surprise = (exact - ours).masked_fill(exact == -torch.inf, 0)
        kl = kl + (exact.exp() * surprise).sum(-1).mean(1).sum(-1)
    return Errors(
        (wrong_scores / all_scores).sqrt().mean().item(),
        (wrong_output / all_output).sqrt().mean().item(),
        (kl / num_queries).mean().item(),
    )


def scores(inputs: Inputs, blocks: list[Block]) -> Tensor:
    """Shat, ``(B, H, N, M)``."""
    return reference.scores(inputs.Q, inputs.K, blocks)


def attention(inputs: Inputs, blocks: list[Block]) -> Tensor:
    """softmax(Shat / sqrt(d)) V, ``(B, H, N, d)``, in the dtype of the inputs."""
    outputs = []
    for block in blocks:
        end = block.stop if inputs.is_causal else inputs.K.shape[2]
        Shat = scores(inputs, [block])[:, :, block.start : block.stop, :end]
        Shat = Shat * inputs.Q.shape[-1] ** -0.5
        if inputs.is_causal:
            seen = torch.ones_like(Shat, dtype=torch.bool).tril(block.start)
            Shat = Shat.masked_fill(~seen, -torch.inf)
        outputs.append(Shat.softmax(-1) @ inputs.V[:, :, :end])
    return torch.cat(outputs, dim=2)


def mean(found: list[Errors]) -> Errors:
    """Of several calls, such as the layers of a model."""
    return Errors(
        *(sum(getattr(e, name) for e in found) / len(found) for name in ("scores", "output", "kl"))
    )


def _squares(t: Tensor) -> Tensor:
    return t.square().sum((1, 2, 3))


# --- the paper's tables ------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """Least, greatest and mean relative error, in percent."""

    min: float
    max: float
    mean: float


def element_wise(S: Tensor, Shat: Tensor) -> Spread:
    """|Shat - S| / |S| of every score, over all of them."""
    return _spread((Shat - S).abs() / S.abs())


def of_the_sum(S: Tensor, Shat: Tensor) -> Spread:
    """|sum of Shat - sum of S| / |sum of S|, over the trials (the first dimension)."""
    total, estimated = (t.flatten(1).sum(1) for t in (S, Shat))
    return _spread((estimated - total).abs() / total.abs())


def _spread(error: Tensor) -> Spread:
    percent = 100 * error
    return Spread(percent.min().item(), percent.max().item(), percent.mean().item())
