"""Calls of SDPA whose mask is causal: where they stay exact, SDPA is told so and gets no mask.

What a row sees is the same, so the result is; and kernels compute half of the scores.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import distr_compile

from .by_backend import EXACT, compiled
from .capture import Capture, error, run, run_exact

SDPA = F.scaled_dot_product_attention
N, HEADS, WIDTH = 37, 4, 32


def draw(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(sum(sizes)), dtype=dtype)


def operands(
    rows: int = N, keys: int = N, heads: int = HEADS, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    return [draw(2, h, n, WIDTH, dtype=dtype) for h, n in ((HEADS, rows), *[(heads, keys)] * 2)]


def seen(q: Tensor, k: Tensor, offset: int = 0) -> Tensor:
    return torch.arange(k.shape[-2]) <= torch.arange(q.shape[-2])[:, None] + offset


def additive(q: Tensor, k: Tensor, low: float = -torch.inf, offset: int = 0) -> Tensor:
    hidden = ~seen(q, k, offset)
    return torch.zeros(hidden.shape, dtype=q.dtype).masked_fill(hidden, low)


def masks_given(capture: Capture) -> list[Any]:
    """Of each call of SDPA in the rewritten graphs: its mask, and whether it is told "causal"."""
    calls = [n for graph in capture.graphs for n in graph.graph.nodes if n.target is SDPA]
    masks = [c.kwargs.get("attn_mask", c.args[3] if len(c.args) > 3 else None) for c in calls]
    return [
        (mask is not None, c.kwargs.get("is_causal", False))
        for c, mask in zip(calls, masks, strict=True)
    ]


TOLD: dict[str, Callable[..., Tensor]] = {
    "bool": lambda q, k, v: SDPA(q, k, v, seen(q, k)),
    "keyword": lambda q, k, v: SDPA(q, k, v, attn_mask=seen(q, k)[None, None], scale=0.3),
    "expanded": lambda q, k, v: SDPA(q, k, v, seen(q, k).expand(q.shape[0], 1, -1, -1)),
    "additive": lambda q, k, v: SDPA(q, k, v, additive(q, k)),
    "additive, finite": lambda q, k, v: SDPA(q, k, v, additive(q, k, torch.finfo(q.dtype).min)),
    "transposed operands": lambda q, k, v: SDPA(
        *(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)), seen(q, k)
    ).transpose(1, 2),
    "three axes": lambda q, k, v: SDPA(q[0], k[0], v[0], seen(q, k)),
}


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", TOLD)
def test_a_causal_mask_becomes_a_flag(name: str, dynamic: bool, grad: bool) -> None:
    inputs = [x.requires_grad_(grad) for x in operands()]
    capture = run_exact(TOLD[name], inputs, dynamic=dynamic, grad=grad)
    assert masks_given(capture) == [(False, True)]
    assert (capture.row.decision, capture.row.mask) == ("exact", "causal")
    expected = TOLD[name](*inputs)
    assert error(capture.output, expected) < 1e-6
    assert capture.output.stride() == expected.stride()
    if grad:
        g = draw(*expected.shape)
        ours, theirs = (torch.autograd.grad(x, inputs, g) for x in (capture.output, expected))
        for a, b in zip(ours, theirs, strict=True):
            assert error(a, b) < 1e-5


def test_fewer_key_heads() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return SDPA(q, k, v, seen(q, k), enable_gqa=True)

    inputs = operands(heads=2, dtype=torch.bfloat16)
    capture = run_exact(attend, inputs)
    assert masks_given(capture) == [(False, True)]
    assert error(capture.output, attend(*inputs)) < 1e-2


KEPT: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
    "an offset": (lambda q, k, v: SDPA(q, k, v, seen(q, k, 3)), operands()),
    "more keys": (lambda q, k, v: SDPA(q, k, v, seen(q, k)), operands(keys=50)),
    "fewer keys": (lambda q, k, v: SDPA(q, k, v, seen(q, k)), operands(keys=20)),
    "a window": (lambda q, k, v: SDPA(q, k, v, seen(q, k) & ~seen(q, k, -9)), operands()),
    "a weak fill": (lambda q, k, v: SDPA(q, k, v, additive(q, k, -5.0)), operands()),
    "a fill that scores may reach": (
        lambda q, k, v: SDPA(q * 100, k * 100, v, additive(q, k, -1e4)),
        operands(),
    ),
    "a negative scale": (lambda q, k, v: SDPA(q, k, v, seen(q, k), scale=-0.3), operands()),
    "a scale of 0": (lambda q, k, v: SDPA(q, k, v, seen(q, k), scale=0.0), operands()),
    "of the caller": (
        lambda q, k, v, mask: SDPA(q, k, v, mask),
        [*operands(), torch.ones(N, N, dtype=torch.bool).tril()],
    ),
    "dropout": (lambda q, k, v: SDPA(q, k, v, seen(q, k), dropout_p=0.5), operands()),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_is_kept(name: str) -> None:
    function, inputs = KEPT[name]
    torch.manual_seed(0)
    capture = run_exact(function, inputs)
    assert masks_given(capture) == [(True, False)]
    torch.manual_seed(0)
    assert error(capture.output, function(*inputs)) < 1e-6


def test_the_policy_keeps_it() -> None:
    policy = {"group_size": 1, "exact": "keep"}
    inputs = operands()
    capture = run(TOLD["bool"], inputs, policy=policy)
    assert masks_given(capture) == [(True, False)]
    assert torch.equal(capture.output, TOLD["bool"](*inputs))


def test_a_kernel_that_was_chosen_keeps_its_mask() -> None:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        assert masks_given(run_exact(TOLD["bool"], operands())) == [(True, False)]


def test_operands_of_several_dtypes_under_autocast() -> None:
    q, k, v = operands()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return SDPA(q, k, v.bfloat16(), seen(q, k))

    capture = run_exact(attend, [q, k, v])
    assert error(capture.output, attend(q, k, v)) < 1e-2


class Scaled(nn.Module):
    """The scale is an attribute: a symbol where all is dynamic."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 0.25

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return SDPA(q, k, v, seen(q, k), scale=self.scale)


def test_a_scale_that_changes_its_sign_later() -> None:
    """Of a causal call with a scale below 0 SDPA makes NaN on a CPU: a guard is on it."""
    model = Scaled()
    f = compiled(model, EXACT, dynamic=True)
    for scale in (0.25, 0.5, -0.25):
        model.scale = scale
        assert error(f(*operands()), model(*operands())) < 1e-6, scale


@pytest.mark.parametrize("compiler", ["eager", "inductor"])
def test_a_model_through_the_backend(compiler: str) -> None:
    """As compiled with the defaults, an attention after another; the report says who computes."""

    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = x.chunk(3, -1)
            mask = seen(q, k)
            return SDPA(SDPA(q, k, v, mask), k, v, mask)

    torch._dynamo.reset()
    model = Twice()
    f = torch.compile(model, backend="distr", options={"compiler": compiler})
    for n in (N, 50, 64):  # the second one makes sizes symbolic
        x = draw(2, HEADS, n, 3 * WIDTH)
        assert error(f(x), model(x)) < 1e-6
    rows = distr_compile.report(f).rows
    assert {(row.mask, row.kernel) for row in rows} == {("causal", "sdpa")}


# -- a causal mask that is part of another one ----------------------------------------------------


def padding(keys: int = N) -> Tensor:
    """``(2, keys)``: the first text ends nine tokens before the second one."""
    return torch.arange(keys) < torch.tensor([[keys - 9], [keys]])


def spelled(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, low: float = -torch.inf) -> Tensor:
    return (q @ k.mT * 0.2).masked_fill(hidden, low).softmax(-1) @ v


def _written_between(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    pad = pad[:, None, None].clone()
    mask = seen(q, k) & pad
    pad.fill_(False)
    return SDPA(q, k, v, mask)


def _written_before_the_values(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    pad = pad[:, None, None].clone()
    scores = (q @ k.mT * 0.2).masked_fill(~(seen(q, k) & pad), -torch.inf)
    pad.fill_(True)
    return scores.softmax(-1) @ v + 0 * pad.sum()


def _written_to(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    mask = seen(q, k) & pad[:, None, None]
    mask[..., 0] = True
    return SDPA(q, k, v, mask)


def _alibi(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    slopes = torch.arange(HEADS)[:, None, None] * 0.1
    scores = q @ k.mT * 0.2 + slopes * torch.arange(k.shape[-2])
    scores = scores.masked_fill(~pad[:, None, None], -torch.inf)
    return scores.masked_fill(~seen(q, k), -torch.inf).softmax(-1) @ v


SPLIT: dict[str, tuple[Callable[..., Tensor], str]] = {
    "both": (lambda q, k, v, pad: SDPA(q, k, v, seen(q, k) & pad[:, None, None]), "causal+bool"),
    "the other way": (
        lambda q, k, v, pad: SDPA(q, k, v, pad[:, None, None] & seen(q, k)),
        "causal+bool",
    ),
    "as transformers": (
        lambda q, k, v, pad: SDPA(
            q,
            k,
            v,
            (
                q.new_ones((), dtype=torch.bool)
                & seen(q, k).to("cpu")
                & pad[torch.arange(2)[:, None, None, None], torch.arange(k.shape[-2])].to("cpu")
            ).expand(2, -1, q.shape[-2], k.shape[-2]),
        ),
        "causal+bool",
    ),
    "three": (
        lambda q, k, v, pad: SDPA(
            q, k, v, torch.logical_and(seen(q, k, 5), pad[:, None, None]) & seen(q, k)
        ),
        "causal+bool",
    ),
    "a window too": (
        lambda q, k, v, pad: SDPA(q, k, v, seen(q, k) & ~seen(q, k, -9)),
        "causal+bool",
    ),
    "what is hidden": (
        lambda q, k, v, pad: spelled(q, k, v, ~seen(q, k) | ~pad[:, None, None]),
        "causal+bool",
    ),
    "not both": (
        lambda q, k, v, pad: spelled(q, k, v, ~(seen(q, k) & pad[:, None, None])),
        "causal+bool",
    ),
    "one after the other": (_alibi, "causal+float"),
    "beside a bias of integers": (
        lambda q, k, v, pad: (
            (q @ k.mT * 0.2 + torch.arange(k.shape[-2]) // 9)
            .masked_fill(~seen(q, k), -torch.inf)
            .softmax(-1)
            @ v
        ),
        "causal+float",
    ),
    "either": (lambda q, k, v, pad: SDPA(q, k, v, seen(q, k) | pad[:, None, None]), "bool"),
    "a finite fill": (
        lambda q, k, v, pad: spelled(q, k, v, ~(seen(q, k) & pad[:, None, None]), -1e9),
        "float",
    ),
    "a part is written": (_written_between, "bool"),
    "a part is written later": (_written_before_the_values, "bool"),
    "the whole is written": (_written_to, "bool"),
}


@pytest.mark.parametrize("keys", [N, 50], ids=["square", "more keys"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", SPLIT)
def test_what_is_causal_is_taken_out(name: str, dynamic: bool, keys: int) -> None:
    function, mask = SPLIT[name]
    inputs = [*operands(keys=keys), padding(keys)]
    expected = function(*inputs)
    for tensor in inputs if dynamic else ():
        torch._dynamo.mark_dynamic(tensor, tensor.dim() - 2 + (tensor.dim() == 2))
    approximated, exact = (how(function, inputs) for how in (run, run_exact))
    for capture in (approximated, exact):
        assert capture.row.mask == mask
        assert error(capture.output, expected) < 1e-6
    (call,) = approximated.calls
    assert call.get("is_causal", False) == ("causal" in mask)


SHOWN: dict[str, Callable[..., Tensor]] = {
    "SDPA, all keys": lambda q, k, v: SDPA(q, k, v, seen(q, k, 5000)),
    "SDPA, ones": lambda q, k, v: SDPA(q, k, v, torch.ones(q.shape[-2], 1, dtype=torch.bool)),
    "SDPA, zeros": lambda q, k, v: SDPA(q, k, v, torch.zeros(1, 1, 1, k.shape[-2])),
    "a negative scale": lambda q, k, v: SDPA(q, k, v, seen(q, k, 5000), scale=-0.2),
    "a fill": lambda q, k, v: spelled(q, k, v, ~seen(q, k, 5000)),
    "a finite fill": lambda q, k, v: spelled(q, k, v, ~seen(q, k, 5000), -1e9),
    "a bias of zeros": lambda q, k, v: (q @ k.mT * 0.2 + torch.zeros(k.shape[-2])).softmax(-1) @ v,
    "for more texts": lambda q, k, v: spelled(
        q[:1], k[:1], v[:1], ~seen(q, k, 5000).expand(2, 1, -1, -1)
    ),
}


@pytest.mark.parametrize("name", SHOWN)
def test_a_mask_that_hides_nothing_is_none(name: str) -> None:
    inputs = operands(keys=50)
    expected = SHOWN[name](*inputs)
    for capture in (run(SHOWN[name], inputs), run_exact(SHOWN[name], inputs)):
        assert capture.row.mask == "none"
        assert error(capture.output, expected) < 1e-6
        assert masks_given(capture) in ([], [(False, False)])
        assert not any(call.get("is_causal") for call in capture.calls)


def test_a_causal_mask_for_more_texts_than_there_are() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return spelled(q[:1], k[:1], v[:1], ~seen(q, k).expand(2, 1, -1, -1))

    inputs = operands()
    for capture in (run(attend, inputs), run_exact(attend, inputs)):
        assert capture.row.mask == "causal"
        assert error(capture.output, attend(*inputs)) < 1e-6


def test_a_mask_of_very_many_parts() -> None:
    """Each of 60 nodes reads the one before twice; the parts are two."""

    def attend(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        mask = seen(q, k) & pad[:, None, None]
        for _ in range(60):
            mask = mask & mask
        return SDPA(q, k, v, mask)

    inputs = [*operands(), padding()]
    capture = run(attend, inputs)
    assert capture.row.mask == "causal+bool"
    assert error(capture.output, attend(*inputs)) < 1e-6


def test_a_mask_with_rows_beside_the_causal_one_is_read_as_it_is() -> None:
    """Window and padding: the model's mask is there already, one for all layers."""

    def attend(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        mask = seen(q, k) & ~seen(q, k, -9) & pad[:, None, None]
        return SDPA(SDPA(q, k, v, mask), k, v, mask)

    inputs = [*operands(), padding()]
    capture = run(attend, inputs)
    assert {row.mask for row in capture.rows} == {"causal+bool"}
    nodes = capture.graphs[0].graph.nodes
    masks = {n.args[3] for n in nodes if getattr(n.target, "__name__", "") == "attention"}
    assert [mask.name for mask in masks] == ["mask"]
    seen_by_a_row = slice(None, N - 9)  # later rows of the first text see padding only
    expected = attend(*inputs)
    assert error(capture.output[:, :, seen_by_a_row], expected[:, :, seen_by_a_row]) < 1e-6


@pytest.mark.parametrize("name", ["padding", "padding and all", "causal"])
def test_what_is_left_of_a_mask_is_a_row_of_keys(name: str) -> None:
    """The call's mask is that of the padding: one row for each text, not N."""
    masks: dict[str, Callable[..., Tensor]] = {
        "padding": lambda q, k, pad: pad[:, None, None].expand(2, HEADS, N, N),
        "padding and all": lambda q, k, pad: (
            torch.ones((), dtype=torch.bool) & pad[:, None, None]
        ).expand(2, 1, N, N),
        "causal": lambda q, k, pad: (seen(q, k) & pad[:, None, None]).expand(2, 1, N, N),
    }

    def attend(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        return SDPA(q, k, v, masks[name](q, k, pad))

    inputs = [*operands(), padding()]
    capture = run(attend, inputs)
    nodes = capture.graphs[0].graph.nodes
    (call,) = [n for n in nodes if getattr(n.target, "__name__", "") == "attention"]
    assert call.args[3].meta["example_value"].shape == (2, 1, 1, N)
    assert error(capture.output, attend(*inputs)) < 1e-6
    assert torch.equal(run_exact(attend, inputs).output, attend(*inputs))
