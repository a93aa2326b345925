"""``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer``, which stay one node in a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

from .capture import error, run, run_exact

HEADS, WIDTH, ROWS, KEYS, BATCH = 3, 96, 17, 33, 2

HIDDEN = torch.ones(ROWS, KEYS, dtype=torch.bool).triu(5)
PADDING = torch.arange(KEYS)[None, :] >= torch.tensor([33, 20])[:, None]
PER_HEAD = torch.rand(BATCH * HEADS, ROWS, KEYS, generator=torch.Generator().manual_seed(1)) > 0.8


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def check(module: Callable[..., Tensor], inputs: list[Any], mask: str, **known: Any) -> None:
    """Approximated (computed exactly) and exact, both equal eager mode."""
    with torch.no_grad():
        expected = module(*inputs)
    capture = run(module, inputs)
    assert (capture.row.decision, capture.row.reasons) == ("distr", ())
    assert capture.row.mask == mask
    assert capture.row.shapes["q"] == (known.get("batch", BATCH), HEADS, ROWS, WIDTH // HEADS)
    assert len(capture.calls) == 1
    assert error(capture.output, expected) < 1e-5
    exact = run_exact(module, inputs)
    assert torch.equal(exact.output, expected)
    assert exact.codes == {"group-size-1"}


MULTI_HEAD_MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "bool": {"attn_mask": HIDDEN},
    "bool per head": {"attn_mask": PER_HEAD},
    "float": {"attn_mask": normal(ROWS, KEYS)},
    "float per head": {"attn_mask": normal(BATCH * HEADS, ROWS, KEYS)},
    "padding": {"key_padding_mask": PADDING},
    "float padding": {"key_padding_mask": PADDING.float().mul(-1e4)},
    "bool and padding": {"attn_mask": HIDDEN, "key_padding_mask": PADDING},
    "float and padding": {
        "attn_mask": normal(ROWS, KEYS),
        "key_padding_mask": PADDING.float().mul(-1e4),
    },
    "bool per head and padding": {"attn_mask": PER_HEAD, "key_padding_mask": PADDING},
    "causal": {"attn_mask": torch.ones(ROWS, KEYS, dtype=torch.bool).triu(1), "is_causal": True},
}


class Cross(nn.Module):
    """Queries of one sequence, keys and values of another."""

    def __init__(self, masks: dict[str, Any], **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, **options)
        self.masks = masks

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attention(q, k, v, need_weights=False, **self.masks)[0]


@pytest.mark.parametrize("masks", MULTI_HEAD_MASKS)
@pytest.mark.parametrize("is_batch_first", [True, False])
def test_multi_head_masks(masks: str, is_batch_first: bool) -> None:
    # The module itself makes boolean masks additive before it calls the function.
    kind = masks if masks in {"none", "causal"} else "float"
    torch.manual_seed(0)
    module = Cross(MULTI_HEAD_MASKS[masks], batch_first=is_batch_first)
    inputs = [normal(BATCH, ROWS, WIDTH), normal(BATCH, KEYS, WIDTH), normal(BATCH, KEYS, WIDTH)]
    if not is_batch_first:
        inputs = [x.transpose(0, 1) for x in inputs]
    check(module, inputs, kind)


def test_multi_head_weights_that_nobody_reads() -> None:
    """The module makes them in place, in memory of its own (WavLM asks for them)."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, _weights = attention(q, k, v, key_padding_mask=PADDING, need_weights=True)
        return out * 2

    check(attend, [normal(BATCH, ROWS, WIDTH), *[normal(BATCH, KEYS, WIDTH)] * 2], "float")


@pytest.mark.parametrize("masks", [m for m in MULTI_HEAD_MASKS if "float" not in m])
def test_multi_head_function_with_boolean_masks(masks: str) -> None:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(WIDTH, HEADS)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.multi_head_attention_forward(
            q,
            k,
            v,
            WIDTH,
            HEADS,
            module.in_proj_weight,
            module.in_proj_bias,
            None,
            None,
            False,
            0.3,
            module.out_proj.weight,
            module.out_proj.bias,
            training=False,
            need_weights=False,
            **MULTI_HEAD_MASKS[masks],
        )[0]

    inputs = [normal(ROWS, BATCH, WIDTH), normal(KEYS, BATCH, WIDTH), normal(KEYS, BATCH, WIDTH)]
    check(attend, inputs, masks if masks in {"none", "causal"} else "bool")


@pytest.mark.parametrize("options", [{"bias": False}, {"kdim": 40, "vdim": 24}])
def test_multi_head_projections(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module = Cross({}, batch_first=True, **options).eval()
    widths = options.get("kdim", WIDTH), options.get("vdim", WIDTH)
    keys, values = (normal(BATCH, KEYS, width) for width in widths)
    check(module, [normal(BATCH, ROWS, WIDTH), keys, values], "none")


def test_multi_head_without_a_batch() -> None:
    torch.manual_seed(0)
    inputs = [normal(ROWS, WIDTH), normal(KEYS, WIDTH), normal(KEYS, WIDTH)]
    check(Cross({"attn_mask": HIDDEN}), inputs, "float", batch=1)


@pytest.mark.parametrize(
    ("options", "masks", "code"),
    [
        ({"add_bias_kv": True}, {}, "extra-keys"),
        ({"add_zero_attn": True}, {}, "extra-keys"),
        ({"dropout": 0.5}, {}, "dropout"),
    ],
)
def test_multi_head_refused(options: dict[str, Any], masks: dict[str, Any], code: str) -> None:
    module = Cross(masks, batch_first=True, **options).train()
    inputs = [normal(BATCH, ROWS, WIDTH), normal(BATCH, KEYS, WIDTH), normal(BATCH, KEYS, WIDTH)]
    torch.manual_seed(0)
    with torch.no_grad():
        expected = module(*inputs)
    torch.manual_seed(0)
    capture = run(module, inputs)
    assert capture.codes == {code}
    assert torch.equal(capture.output, expected)


def test_multi_head_weights_returned() -> None:
    module = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).train()
    x = normal(BATCH, ROWS, WIDTH)
    with torch.no_grad():
        expected = module(x, x, x)
    capture = run(lambda x: module(x, x, x), [x])
    assert capture.codes == {"weights-reused"}
    for ours, theirs in zip(capture.output, expected, strict=True):
        assert torch.equal(ours, theirs)


SHORT = torch.arange(ROWS)[None, :] >= torch.tensor([[17], [9]])
ENCODER_MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "bool": {"src_mask": torch.ones(ROWS, ROWS, dtype=torch.bool).triu(3)},
    "float": {"src_mask": torch.full((ROWS, ROWS), -torch.inf).triu(1)},
    "padding": {"src_key_padding_mask": SHORT},
    "both": {
        "src_mask": torch.ones(ROWS, ROWS, dtype=torch.bool).triu(1),
        "src_key_padding_mask": SHORT,
    },
}


class Encoder(nn.Module):
    def __init__(self, masks: dict[str, Any], **options: Any) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 50, batch_first=True, **options)
        self.masks = masks

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, **self.masks)


@pytest.mark.parametrize("masks", ENCODER_MASKS)
@pytest.mark.parametrize("options", [{}, {"norm_first": True, "activation": "gelu"}], ids=str)
def test_encoder_layer(masks: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module = Encoder(ENCODER_MASKS[masks], **options).eval()
    x = normal(BATCH, ROWS, WIDTH)
    with torch.no_grad():
        expected = module(x)
    capture = run(module, [x])
    (row,) = capture.rows
    assert (row.decision, row.mask) == ("distr", "none" if masks == "none" else "float")
    assert error(capture.output, expected) < 1e-5
    assert torch.equal(run_exact(module, [x]).output, expected)


def test_flex_attention_is_reported() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v)

    inputs = [normal(2, 3, 128, 32) for _ in range(3)]
    capture = run(attend, inputs)
    assert capture.codes == {"flex"}
    assert error(capture.output, F.scaled_dot_product_attention(*inputs)) < 1e-5
