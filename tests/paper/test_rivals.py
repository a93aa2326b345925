"""The rivals against plain loops over tokens, in fp64, and their places in whole models."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from copy import deepcopy
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from benchmarks.paper.rivals import RIVALS, Flatten, Hydra, Hyper, Layer, Primal, Rival
from benchmarks.paper.rivals.dropin import kept, replace
from benchmarks.paper.rivals.flatten import linear_attention
from benchmarks.paper.rivals.hyper import SIGNS, Sizes, hyper, pairs, sizes_for
from benchmarks.paper.rivals.primal import penalty
from distr_compile.accuracy.metrics import main_output
from tests.zoo import ZooModel, load

SHAPES = [(1, 24), (17, 40), (197, 16), (70, 24)]
"""(N, d)"""


def drawn(layer: Layer, tokens: int, key_heads: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Q, K, V and X of two examples, fp64, tokens before heads in memory."""
    g = Generator().manual_seed(tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    heads = (layer.heads, key_heads or layer.heads, key_heads or layer.heads)
    q, k, v = (normal(2, tokens, h, layer.head_dim).transpose(1, 2) for h in heads)
    return q, k, v, normal(2, tokens, layer.width)


def random_(rival: Rival) -> Rival:
    """No parameter is left at a zero that would hide it."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in rival.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return rival.double()


def looped(rival: Rival, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    """The definition, example by example and token by token, without padding."""
    k, v = (t.repeat_interleave(rival.layer.heads // t.shape[1], 1) for t in (k, v))
    loop = LOOPS[type(rival)]
    return torch.stack([loop(rival, *each) for each in zip(q, k, v, x, strict=True)])


def loop_hydra(rival: Hydra, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    tokens, out = q.shape[1], torch.zeros_like(q)
    for i in range(tokens):
        total = torch.zeros_like(q[:, 0])
        for j in range(i + 1 if rival.layer.is_causal else tokens):
            total += k[:, j] / k[:, j].norm() * v[:, j]
        out[:, i] = q[:, i] / q[:, i].norm() * total
    return out


def loop_hyper(rival: Hyper, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    """One softmax over the keys seen, a sampled one with the weight of those it stands for."""
    sizes = rival.sizes or sizes_for(q.shape[1])
    generator = Generator().manual_seed(rival.seed)
    directions = torch.randn(q.shape[2], SIGNS, generator=generator).double()
    gray = {n ^ (n >> 1): n for n in range(2**SIGNS)}  # code -> place in the sequence

    def order(rows: Tensor) -> list[int]:
        signs = ((rows @ directions) > 0).tolist()
        place = [gray[sum(bit << i for i, bit in enumerate(row))] for row in signs]
        return sorted(range(len(rows)), key=lambda i: place[i])

    heads, tokens = q.shape[:2]
    weights = torch.zeros(heads, tokens, tokens, dtype=torch.float64)

    def see_all(rows: range, cols: range) -> None:
        if len(rows) < sizes.min_seq_len:
            weights[:, rows.start : rows.stop, cols.start : cols.stop] += 1
            return
        sample = torch.randint(len(cols), (heads, sizes.samples), generator=generator).tolist()
        for h in range(heads):
            by_q, by_k = order(q[h, rows]), order(k[h, cols])
            for place, i in enumerate(by_q):
                block = place // sizes.block
                for j in by_k[block * sizes.block : (block + 1) * sizes.block]:
                    weights[h, rows[i], cols[j]] += 1
                for drawn_place in sample[h]:
                    if drawn_place // sizes.block != block:
                        j = cols[by_k[drawn_place]]
                        weights[h, rows[i], j] += len(cols) / sizes.samples

    def see_earlier(rows: range) -> None:
        if len(rows) <= sizes.min_seq_len:
            for i in rows:
                weights[:, i, rows.start : i + 1] += 1
            return
        half = math.ceil(len(rows) / 2)
        see_earlier(rows[:half])
        see_earlier(rows[half:])
        see_all(rows[half:], rows[:half])

    (see_earlier(range(tokens)) if rival.layer.is_causal else see_all(range(tokens), range(tokens)))
    scale = rival.layer.scale or q.shape[2] ** -0.5
    found = weights * (q @ k.mT * scale).exp()
    return found / found.sum(-1, keepdim=True) @ v


def loop_flatten(rival: Flatten, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    layer = rival.layer
    heads, tokens, d = q.shape

    def phi(row: Tensor) -> Tensor:  # (C,)
        row = (row.relu() + 1e-6) / (1 + rival.sigma.exp()).log()
        return row.norm() * row**3 / (row**3).norm()

    fq = [phi(q[:, i].flatten()).view(heads, d) for i in range(tokens)]
    P = torch.zeros(tokens, heads * d) if rival.positions is None else rival.positions
    fk = [phi(k[:, j].flatten() + P[j]).view(heads, d) for j in range(tokens)]
    kernel, bias = rival.convolution.weight[:, 0], rival.convolution.bias
    out = torch.zeros_like(q)
    for h in range(heads):
        for i in range(tokens):
            seen = range(i + 1 if layer.is_causal else tokens)
            w = torch.stack([fq[i][h] @ fk[j][h] for j in seen])
            out[h, i] = w @ v[h, : len(seen)] / (w.sum() + 1e-6 * len(seen))
            if layer.grid is None:
                near = [(i - 4 + a, kernel[:, a]) for a in range(5) if i - 4 + a >= 0]
            elif i < layer.prefix:
                continue
            else:
                (rows, cols), place = layer.grid, i - layer.prefix
                at = [(place // cols + a - 2, place % cols + b - 2, a, b)
                      for a in range(5) for b in range(5)]  # fmt: skip
                near = [
                    (layer.prefix + y * cols + z, kernel[:, a, b])
                    for y, z, a, b in at
                    if 0 <= y < rows and 0 <= z < cols
                ]
            out[h, i] += bias + sum(weight * v[h, j] for j, weight in near)
    return out


def loop_primal(rival: Primal, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    heads, tokens, d = q.shape
    out = torch.zeros_like(q)
    for h in range(heads):
        e_map, r_map = rival.W_e[h], rival.W_r[h]
        if not rival.layer.is_causal:
            last = max(rival.rows - 1, 1)
            rows = [int(i * (tokens - 1) / last + 1e-9) for i in range(rival.rows)]
            chosen = x[rows, h * d : (h + 1) * d]
            e_map, r_map = chosen.T @ e_map, chosen.T @ r_map
        for i in range(tokens):
            a, b = q[h, i], k[h, i]
            if rival.layer.is_causal:
                a, b = q[h, : i + 1].mean(0), k[h, : i + 1].mean(0)
            scores = torch.cat([a / a.norm() @ e_map, b / b.norm() @ r_map])
            out[h, i] = rival.output.weight @ scores + rival.output.bias
    return out


LOOPS: dict[type, Callable[..., Tensor]] = {
    Hydra: loop_hydra,
    Hyper: loop_hyper,
    Flatten: loop_flatten,
    Primal: loop_primal,
}


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", RIVALS)
@torch.no_grad()
def test_as_a_loop_over_tokens(name: str, shape: tuple[int, int], is_causal: bool) -> None:
    tokens, d = shape
    layer = Layer(heads=2, head_dim=d, tokens=tokens, is_causal=is_causal)
    rival = random_(RIVALS[name](layer))
    inputs = drawn(layer, tokens, key_heads=1)
    torch.testing.assert_close(rival(*inputs), looped(rival, *inputs), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", RIVALS)
@torch.no_grad()
def test_an_image_with_a_token_of_its_class(name: str) -> None:
    layer = Layer(heads=3, head_dim=24, tokens=1 + 5 * 7, grid=(5, 7))
    rival = random_(RIVALS[name](layer))
    inputs = drawn(layer, layer.tokens)
    torch.testing.assert_close(rival(*inputs), looped(rival, *inputs), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", RIVALS)
@torch.no_grad()
def test_padding_is_as_if_it_were_not_there(name: str, is_causal: bool) -> None:
    layer = Layer(heads=2, head_dim=24, tokens=100, is_causal=is_causal)
    rival = random_(RIVALS[name](layer))
    q, k, v, x = drawn(layer, 100)
    keep = torch.ones(2, 100, dtype=torch.bool)
    keep[0, 77:] = keep[1, :9] = False  # at the end of one, at the beginning of the other
    out = rival(q, k, v, x, keep)
    for b in range(2):
        only = looped(rival, *(t[b : b + 1, :, keep[b]] for t in (q, k, v)), x[b : b + 1, keep[b]])
        torch.testing.assert_close(out[b : b + 1, :, keep[b]], only, rtol=1e-9, atol=1e-11)
        assert not out[b, :, ~keep[b]].any()


@pytest.mark.parametrize("name", RIVALS)
def test_gradients_reach_everything_and_are_right(name: str) -> None:
    layer = Layer(heads=2, head_dim=4, tokens=9, is_causal=True)
    make = RIVALS[name] if name != "Hyper" else lambda of: Hyper(of, Sizes(2, 2, 3))
    rival = random_(make(layer))
    q, k, v, x = (t.requires_grad_() for t in drawn(layer, 9))
    # Steps of 1e-6 leave the signs, the order and what is sampled as they are.
    assert torch.autograd.gradcheck(lambda *t: rival(*t, x), (q, k, v), atol=1e-5)
    rival(q, k, v, x).sum().backward()
    unused = {"L"} if name == "Primal" else set()  # only in the objective
    assert {n for n, p in rival.named_parameters() if p.grad is None} == unused


def test_linear_attention_in_chunks_is_that_of_all_scores() -> None:
    g = Generator().manual_seed(0)
    q, k, v = (torch.rand(1, 2, 300, 16, generator=g, dtype=torch.float64) for _ in range(3))
    scores = (q @ k.mT).tril()
    keys = torch.arange(1, 301)[:, None]
    wanted = scores @ v / (scores.sum(-1, keepdim=True) + 1e-6 * keys)
    torch.testing.assert_close(linear_attention(q, k, v, causal=True), wanted)


def test_hyper_with_a_block_of_all_keys_is_exact() -> None:
    q, k, v, _ = drawn(Layer(2, 24, 100), 100)
    found = hyper(q, k, v, sizes=Sizes(block=128, samples=8, min_seq_len=1))
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v))


def test_hyper_is_right_in_the_mean_over_samples() -> None:
    """Sums of the sampled weights are unbiased: 1024 times as many draws err a 32nd."""
    q, k, v, _ = drawn(Layer(1, 24, 100), 100)
    q = q / 4
    exact = F.scaled_dot_product_attention(q, k, v)
    few, many = (
        (hyper(q, k, v, sizes=Sizes(16, samples, 64)) - exact).norm() / exact.norm()
        for samples in (16, 16384)
    )
    assert few / 64 < many < few / 16


@pytest.mark.parametrize("causal", [False, True])
def test_pairs_are_those_that_are_computed(causal: bool) -> None:
    sizes = Sizes(block=4, samples=3, min_seq_len=8)
    assert pairs(7, sizes, causal=causal) == (28 if causal else 49)
    # Not causal, 10 keys: blocks of 4, 4 and 2. Causal: two exact halves of 5, 5 x 5 across.
    assert pairs(10, sizes, causal=causal) == (15 + 15 + 25 if causal else 36 + 30)
    assert sizes_for(1024) == Sizes(32, 32, 64)
    assert sizes_for(1025) == Sizes(256, 256, 512)


def test_numbers_of_parameters() -> None:
    def count(rival: Rival) -> int:
        return sum(p.numel() for p in rival.parameters())

    image, text = Layer(3, 8, 26, grid=(5, 5)), Layer(3, 8, 26)
    assert [count(RIVALS[name](image)) for name in ("Hydra", "Hyper")] == [0, 0]
    assert count(Flatten(image)) == 26 * 24 + 24 + 26 * 8
    assert count(Flatten(text)) == 24 + 6 * 8
    assert count(Primal(text, rank=2)) == 2 * 3 * 20 * 2 + 3 * 2 + 4 * 8 + 8


def test_penalty_of_primal() -> None:
    layer = Layer(2, 8, 30)
    rival = random_(Primal(layer, rank=2))
    q, k, v, x = drawn(layer, 30)
    keep = torch.ones(2, 30, dtype=torch.bool)
    keep[1, 25:] = False
    rival(q, k, v, x, keep)
    energy = []
    for b, h in ((b, h) for b in range(2) for h in range(2)):
        rows = keep[b].nonzero()[:, 0]
        at = [int(i * (len(rows) - 1) / 19 + 1e-9) for i in range(20)]
        chosen = x[b, rows[at], h * 8 : (h + 1) * 8]
        for i in rows.tolist():
            for t, weight in ((q, rival.W_e), (k, rival.W_r)):
                score = t[b, h, i] / t[b, h, i].norm() @ (chosen.T @ weight[h])
                energy.append((score * rival.L[h]).square().sum() / 2)
    traces = [(rival.W_e[h].T @ rival.W_r[h]).trace() for h in range(2)]
    J = 2 * sum(energy) / len(energy) - sum(traces) / 2
    torch.testing.assert_close(penalty(rival, 0.05), 0.05 * J**2)
    penalty(rival, 1.0).backward()
    assert all(p.grad is not None for n, p in rival.named_parameters() if "output" not in n)


# --- in whole models ---------------------------------------------------------------------------


class Exact(Rival):
    """Softmax attention: in its place a model must say what it always says."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """See :meth:`Rival.attend`."""
        assert x.shape[:2] == (q.shape[0], q.shape[2])
        given = {"is_causal": self.layer.is_causal, "scale": self.layer.scale}
        return F.scaled_dot_product_attention(q, k, v, **given)


@cache
def trained(name: str) -> ZooModel:
    return load(name)


def outputs(name: str, model: nn.Module) -> Tensor:
    """What a model says of the last two examples, padding left out."""
    batch = trained(name).batches[-1]
    args = [value[-2:] for value in batch.args]
    kwargs = {key: value[-2:] for key, value in batch.kwargs.items()}
    with torch.no_grad():
        out = main_output(model(*args, **kwargs))
    mask = kwargs.get("attention_mask")
    return out if mask is None else out[mask.bool()]


@pytest.mark.parametrize(
    ("name", "layers"), [("digits-vit", 3), ("tagger", 4), ("minilm", 6), ("llama", 4)]
)
def test_rivals_in_whole_models(name: str, layers: int) -> None:
    """Exact attention in their place changes nothing; each of them changes two layers."""
    own = trained(name).model
    before = outputs(name, own)
    model = deepcopy(own)
    assert len(replace(model, Exact)) == layers
    torch.testing.assert_close(outputs(name, model), before, rtol=1e-4, atol=1e-4)
    for make in RIVALS.values():
        model = deepcopy(own)
        replaced = replace(model, make, (-2, -1))
        assert [re.findall(r"\d", each) for each in replaced] == [[n] for n in LAST[name]]
        assert sum(isinstance(m, Rival) for m in model.modules()) == 2
        after = outputs(name, model)
        assert after.isfinite().all()
        assert (after - before).norm() > 1e-3 * before.norm()


LAST = {"digits-vit": "12", "tagger": "23", "minilm": "45", "llama": "23"}
"""The numbers of the last two layers."""


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got Linear; accepted: timm.*; write"):
        replace(torch.nn.Linear(2, 2), Hydra)
    with pytest.raises(ValueError, match=r"got \[3\]; accepted: -3 to 2; name"):
        replace(trained("digits-vit").model, Hydra, (3,))
    layer = Layer(2, 8, 10)
    q = torch.zeros(1, 2, 10, 8)
    with pytest.raises(ValueError, match=r"got .*beside 1 queries; accepted: self-att.*; call"):
        Hydra(layer)(q[:, :, :1], q, q, q)
    with pytest.raises(ValueError, match=r"got .*; accepted: 2 query heads of width 8.*; make"):
        Hydra(layer)(q[..., :4], q, q, q)
    with pytest.raises(ValueError, match=r"got a width of 12; accepted: 16.*; take"):
        Primal(layer)(q, q, q, torch.zeros(1, 10, 12))
    with pytest.raises(ValueError, match=r"got 10 tokens; accepted: 26.*; give"):
        Flatten(Layer(2, 8, 26, grid=(5, 5)))(q, q, q, q)
    with pytest.raises(ValueError, match="no Primal layer; accepted"):
        penalty(Hydra(layer), 0.1)
    with pytest.raises(RuntimeError, match="got no call; accepted"):
        _ = Primal(layer).objective


def test_masks_that_are_more_than_padding_are_refused() -> None:
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    assert kept(mask, causal=True).all()
    mask[:, :, :, :2] = False
    assert kept(mask, causal=True).tolist() == [[False, False, True, True, True, True]]
    with pytest.raises(ValueError, match="hides more than padding; accepted"):
        kept(mask, causal=False)
    mask[:, :, 5, 3] = False
    with pytest.raises(ValueError, match="hides more than padding; accepted"):
        kept(mask, causal=True)
