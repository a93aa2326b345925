"""What must stay exact, each with its own reason, and with its output unchanged to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .capture import OP, Capture, run, run_exact
from .inputs import KEYS, ROWS, VALUE_WIDTH, WIDTH, B, C, H, eager, example_inputs
from .refusals import REFUSALS, Refusal, refuse

# -- the weights are needed -----------------------------------------------------------------------


@refuse("weights returned", "weights-reused")
def _(q, k, v):
    weights = (q @ k.mT * C).softmax(-1)
    return weights @ v, weights


@refuse("scores returned", "weights-reused")
def _(q, k, v):
    scores = q @ k.mT * C
    return scores.softmax(-1) @ v, scores


@refuse("the maximum returned", "weights-reused")
def _(q, k, v):
    scores = q @ k.mT * C
    maximum = scores.amax(-1, keepdim=True)
    return (scores - maximum).softmax(-1) @ v, maximum


@refuse("weights read by two products", "weights-reused")
def _(q, k, v):
    weights = (q @ k.mT * C).softmax(-1)
    return weights @ v + weights @ v.cos()


@refuse("weights squared", "weights-reused")
def _(q, k):
    weights = (q @ k.mT * C).softmax(-1)
    return weights @ weights.mT


@refuse("weights renormalised (convit)", "weights-edited")
def _(q, k, v, keep):
    weights = (q @ k.mT * C).softmax(-1) * keep
    return (weights / weights.sum(-1, keepdim=True)) @ v


@refuse("weights gated", "weights-edited")
def _(q, k, v, bias):
    return ((q @ k.mT * C).softmax(-1) * bias) @ v


@refuse("weights masked after the softmax", "weights-edited")
def _(q, k, v, keep):
    return (q @ k.mT * C).softmax(-1).masked_fill(~keep, 0.0) @ v


@refuse("a number added to the weights", "weights-edited")
def _(q, k, v):
    return ((q @ k.mT * C).softmax(-1) + 1e-3) @ v


@refuse("the output added to in the same call", "weights-edited", q=(6, 17, 40), k=(6, 33, 40))
def _(q, k, v, start):
    return torch.baddbmm(start, (q @ k.mT * C).softmax(-1), v)


REFUSALS[-1].shapes.update(v=(6, 33, 24), start=(6, 17, 24))


@refuse("weights dropped out, without gradients", "dropout")
def _(q, k, v):
    torch.manual_seed(0)
    return F.dropout((q @ k.mT * C).softmax(-1), 0.5, training=True) @ v


@refuse("weights dropped out twice", "dropout")
def _(q, k, v):
    torch.manual_seed(0)
    return F.dropout(F.dropout((q @ k.mT * C).softmax(-1), 0.5), 0.2) @ v


@refuse("weights dropped out by SDPA", "dropout")
def _(q, k, v):
    torch.manual_seed(0)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)


@refuse("heads summed by the einsum", "weights-edited")
def _(q, k, v):
    return torch.einsum("bhqk,bhkd->bqd", (q @ k.mT * C).softmax(-1), v)


@refuse("weights summed by an einsum", "weights-edited", v=(B, H, ROWS, VALUE_WIDTH))
def _(q, k, v):
    return torch.einsum("bhqk,bhqd->bhkd", (q @ k.mT * C).softmax(-1), v)


@refuse("a softmax over the axis that PyTorch chooses", "softmax-axis")
def _(q, k, v):
    return F.softmax(q[0] @ k[0].mT * C) @ v[0]


# -- no attention at all --------------------------------------------------------------------------


@refuse("a classifier", "no-qk-product", attention=False)
class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(H * WIDTH, 5)

    def forward(self, x):
        return self.head(x).softmax(-1)


@refuse("a router of experts behind attention", "no-qk-product", attention=False)
class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.gate = nn.LayerNorm(VALUE_WIDTH), nn.Linear(VALUE_WIDTH, 4)

    def forward(self, q, k, v):
        out = F.scaled_dot_product_attention(q, k, v)
        gates = self.gate(self.norm(out)).softmax(-1)
        return out * gates.amax(-1, keepdim=True)


@refuse("outlook attention", "no-qk-product", attention=False)
class Outlook(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Linear(H * WIDTH, H * 9)

    def forward(self, x):
        weights = self.scores(x).reshape(B, ROWS, H, 3, 3).permute(0, 2, 1, 3, 4).softmax(-1)
        return weights @ x.reshape(B, ROWS, H, WIDTH).transpose(1, 2)[..., None, :].expand(
            -1, -1, -1, 3, -1
        )


@refuse("factor attention: K alone (coat)", "no-qk-product", attention=False)
class FactorAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(H * WIDTH, 3 * H * WIDTH)

    def forward(self, x):
        q, k, v = self.qkv(x).reshape(B, ROWS, 3, H, WIDTH).permute(2, 0, 3, 1, 4).unbind(0)
        return q @ (k.softmax(dim=2).transpose(-1, -2) @ v)


@refuse("scores of another graph", "graph-break", scores=(B, H, ROWS, KEYS))
def _(scores, v):
    return scores.softmax(-1) @ v


# -- writes in place ------------------------------------------------------------------------------


@refuse("scores set by an index", "in-place-write")
def _(q, k, v):
    scores = q @ k.mT * C
    scores[..., -1] = -torch.inf
    return scores.softmax(-1) @ v


@refuse("weights written in place", "weights-edited")
def _(q, k, v, keep):
    weights = (q @ k.mT * C).softmax(-1)
    weights.masked_fill_(~keep, 0.0)
    return weights @ v


@refuse("weights written by imul", "weights-edited")
def _(q, k, v, bias):
    weights = (q @ k.mT * C).softmax(-1)
    weights *= bias
    return weights @ v


@refuse("Q written after the product", "in-place-write")
def _(q, k, v):
    scores = q @ k.mT * C
    q.zero_()
    return scores.softmax(-1) @ v


@refuse("K written after the product, through a view", "in-place-write")
def _(q, k, v):
    scores = q @ k.mT * C
    k[:, 0].mul_(2.0)
    return scores.softmax(-1) @ v


@refuse("Q written by an activation in place", "in-place-write")
def _(q, k, v):
    scores = q @ k.mT * C
    F.relu(q, inplace=True)
    return scores.softmax(-1) @ v


@refuse("scores written by an activation in place", "scores-edited")
def _(q, k, v):
    scores = q @ k.mT * C
    torch.relu_(scores)
    return scores.softmax(-1) @ v


@refuse("the mask written after it was added", "in-place-write")
def _(q, k, v, bias):
    scores = q @ k.mT * C + bias
    bias.zero_()
    return scores.softmax(-1) @ v


@refuse("the boolean mask written after it was used", "in-place-write")
def _(q, k, v, keep):
    scores = (q @ k.mT * C).masked_fill(keep, -torch.inf)
    keep.logical_not_()
    return scores.softmax(-1) @ v


@refuse("a factor per head written after it was used", "in-place-write", heads=(H, 1, 1))
def _(q, k, v, heads):
    scores = q @ k.mT * heads
    heads.zero_()
    return scores.softmax(-1) @ v


@refuse("the output written to chosen rows (informer)", "in-place-write")
def _(q, k, v):
    rows = q.norm(dim=-1).sum((0, 1)).argsort()
    context = torch.zeros_like(q @ k.mT @ v)
    context[:, :, rows] = (q @ k.mT * C).softmax(-1) @ v
    return context


@refuse("the output written in place, read from the product", "in-place-write")
def _(q, k, v):
    scores = q @ k.mT * C
    q.relu_()
    out = scores.softmax(-1) @ v
    out += 1.0
    return out, q


# -- the tests ------------------------------------------------------------------------------------


def _case(refusal: Refusal) -> tuple[list[Tensor], Any, Capture]:
    inputs = example_inputs(refusal.function, refusal.shapes)
    expected = eager(refusal.function, inputs)
    return inputs, expected, run(refusal.function, [x.clone() for x in inputs])


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda r: r.name)
def test_refused_with_its_reason_and_unchanged(refusal: Refusal) -> None:
    _, expected, capture = _case(refusal)
    torch.testing.assert_close(capture.output, expected, rtol=1e-5, atol=1e-6, equal_nan=True)
    refused = [row.reasons for row in capture.rows if row.decision == "exact"]
    others = [entry.reason for entry in capture.not_attention]
    codes = [r[0].code for r in refused] if refusal.attention else [r.code for r in others]
    assert codes == [refusal.code]


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda r: r.name)
def test_refused_stays_as_it_is_when_exact(refusal: Refusal) -> None:
    inputs = example_inputs(refusal.function, refusal.shapes)
    expected = eager(refusal.function, inputs)
    capture = run_exact(refusal.function, inputs)
    torch.testing.assert_close(capture.output, expected, rtol=0, atol=0, equal_nan=True)
    assert OP not in capture.targets()
    assert not any(row.sdpa for row in capture.rows)


def test_an_exponential_that_weighs_nothing_is_no_attention() -> None:
    """A log-variance, averaged over positions and exponentiated (VITS): a factor of no product."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = F.relu(q @ k.mT * C)
        return torch.tanh((weights @ v).exp() * 0.7 + 1)

    inputs = [torch.randn(B, H, ROWS, WIDTH), *(torch.randn(B, H, KEYS, WIDTH) for _ in range(2))]
    capture = run(function, inputs)
    assert (capture.rows, capture.not_attention) == ([], [])


def test_a_band_written_in_place_is_called_one() -> None:
    """Chunks of the scores are laid side by side (Longformer, LED)."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT * C
        band = scores.new_zeros(*scores.shape[:2], 32, 16)
        band[:, :, :16] = scores.as_strided((*scores.shape[:2], 16, 16), scores.stride())
        band[:, :, 16:] = scores[:, :, -16:, -16:]
        return band.softmax(-1) @ v[:, :, :16]

    capture = run(function, [torch.randn(B, H, 32, WIDTH) for _ in range(3)])
    assert capture.codes == {"banded"}
