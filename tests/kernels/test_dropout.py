"""Which weights are dropped: the numbers, their statistics, and that implementations agree."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from distr_compile.kernels.attention import cpu as kernel
from distr_compile.kernels.attention.dropout import LOW, MOST_SEEDS, Dropout, philox
from distr_compile.kernels.attention.triton_fwd import Tile, attention_fwd
from distr_compile.lowering import cpu, pieces
from distr_compile.lowering.call import call_of
from tests.kernels.cpu_kernel import require_kernel
from tests.walk import by_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")


def signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


# Known answers of Philox4x32 with 10 rounds, from the test vectors of its authors' Random123.
KNOWN = [
    ("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_the_numbers_are_those_of_philox(counter: str, key: str, words: str) -> None:
    c = tuple(torch.tensor(int(word, 16)) for word in counter.split())
    low, high = (int(word, 16) for word in key.split())
    found = philox(c, torch.tensor(signed(high << 32 | low)))
    assert [int(word) for word in found] == [int(word, 16) for word in words.split()]


def test_a_number_belongs_to_a_place() -> None:
    """Number by number, as the module says at its top; parts are cut out of the whole."""
    whole = Dropout(0.4, torch.tensor(1 << 40), heads=3)
    stays = whole.kept(whole.numbers(2, 3), 5, 11)
    for b, h, i, j in itertools.product(range(2), range(3), range(5), range(11)):
        counter = [torch.tensor(n) for n in (j // 4, i, 3 * b + h, 0)]
        number = int(philox(tuple(counter), whole.seed)[j % 4])
        assert bool(stays[b, h, i, j]) == (number >= 0.4 * 2**32)
    part = whole.part(batch=1, head=1, row=2, key=3)
    assert torch.equal(part.kept(part.numbers(1, 2), 3, 7), stays[1:, 1:, 2:, 3:10])
    again = part.part(row=1, key=2)
    assert torch.equal(again.kept(again.numbers(1, 2), 2, 3), stays[1:, 1:, 3:, 5:8])
    split = whole.kept(whole.numbers(2, 1, 3), 5, 11)
    assert torch.equal(split.squeeze(1), stays)


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_statistics(p: float) -> None:
    """Shares within 5 standard deviations, of all, of each key and row; neighbours do not hang
    together; another seed drops others."""

    def drawn(seed: int) -> Tensor:
        dropout = Dropout(p, torch.tensor(seed), heads=4)
        return (~dropout.kept(dropout.numbers(2, 4), 256, 256)).double()

    def is_near(share: Tensor, wanted: float, count: int) -> bool:
        bound = 5 * math.sqrt(wanted * (1 - wanted) / count)
        return bool(((share - wanted).abs() <= bound).all())

    dropped = drawn(7)
    assert is_near(dropped.mean(), p, dropped.numel())
    for axes, count in (((0, 1, 2), 2048), ((0, 1, 3), 2048), ((2, 3), 65536)):
        assert is_near(dropped.mean(axes), p, count)
    flat = dropped.flatten(0, 1)
    for other in (flat[:, :, 1:], flat[:, 1:], flat[1:], drawn(8).flatten(0, 1)):
        both = flat[: other.shape[0], : other.shape[1], : other.shape[2]] * other
        assert is_near(both.mean(), p * p, both.numel())


def test_shares_next_to_0_and_1() -> None:
    for p, threshold in ((1e-12, 0), (0.5, 2**31), (1 - 1e-12, LOW)):
        assert Dropout(p, torch.tensor(0), 1).threshold == threshold
    assert torch.iinfo(torch.int64).max == MOST_SEEDS


# --- every implementation ------------------------------------------------------------------------

ROWS, KEYS = 75, 75
PARTS = [
    Dropout(0.3, torch.tensor(MOST_SEEDS - 5), heads=4),
    Dropout(0.7, torch.tensor(-9), 7, 30, 5),
]


def weights(which: str, dropout: Dropout, dtype: torch.dtype, block: int = ROWS) -> Tensor:
    """The weights of one implementation ``(2, 4, ROWS, KEYS)``: all scores 0, V the identity."""
    q = torch.zeros(2, 4, ROWS, 16, dtype=dtype)
    k = torch.zeros(2, 2, KEYS, 16, dtype=dtype)
    v = torch.eye(KEYS, dtype=dtype).expand(2, 2, KEYS, KEYS)
    out = torch.full((2, 4, ROWS, KEYS), torch.nan, dtype=dtype)
    options = {"scale": 1.0, "dropout": dropout, "out": out}
    if which == "kernel":
        require_kernel()
        kernel.attention(q, k[:, :, None], v, grouping_block=block, **options)
    elif which == "products":
        cpu.run(call_of(q, k, v, **options), fused=False)
    else:
        q, k, v, on_device = (t.to(DEVICE) for t in (q, k, v, out))
        options |= {"dropout": Dropout(**vars(dropout) | {"seed": dropout.seed.to(DEVICE)})}
        tile = Tile(32, 64, 4) if which == "triton" else Tile(16, 32, 4)
        options |= {"out": on_device, "grouping_block": block, "tile": tile}
        attention_fwd(q, k[:, :, None], v, **options)
        out = on_device.cpu()
    return out


HALVES = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dropout", PARTS, ids=["whole", "part"])
@pytest.mark.parametrize(
    ("which", "dtype"),
    [
        *itertools.product(("kernel", "products", "triton"), HALVES),
        *itertools.product(("kernel", "products", "triton, small tiles"), (torch.float32,)),
    ],
)
def test_every_implementation_drops_the_same_weights(
    which: str, dtype: torch.dtype, dropout: Dropout
) -> None:
    if dtype == torch.bfloat16 and "triton" in which and DEVICE == "cpu":
        pytest.skip("Triton's interpreter computes bf16 on its bits, as integers")
    stays = dropout.kept(dropout.numbers(2, 4), ROWS, KEYS)
    for block in (ROWS, 20) if which != "products" else (ROWS,):
        found = weights(which, dropout, dtype, block)
        assert torch.equal(found > 0, stays)
        wanted = stays / (KEYS * (1 - dropout.p))
        assert (found - wanted).abs().max() <= torch.finfo(dtype).eps * wanted.max()


@pytest.mark.parametrize("first", [0, 4, 6, 7])
def test_keys_of_a_part_in_the_triton_kernel(first: int) -> None:
    """From any key on, also where it is no multiple of the four numbers that are made together."""
    whole = Dropout(0.5, torch.tensor(3, device=DEVICE), heads=2)
    q, k = torch.zeros(1, 2, 20, 16, device=DEVICE), torch.zeros(1, 2, 40, 16, device=DEVICE)
    v = torch.eye(40, device=DEVICE).expand(1, 2, 40, 40)
    out = torch.empty(1, 2, 20, 40, device=DEVICE)
    options = {"scale": 1.0, "grouping_block": 20, "tile": Tile(16, 16, 4), "out": out}
    attention_fwd(q, k[:, :, None], v, dropout=whole.part(key=first), **options)
    stays = whole.kept(whole.numbers(1, 2), 20, 40 + first)[..., first:]
    assert torch.equal(out > 0, stays)


def test_pieces_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Panels, tiles and chunks of keys of PyTorch's products, chunks of heads of the GPU's walk."""
    whole = weights("products", PARTS[1], torch.float64)
    for limit, size in zip(("CHUNK", "PANEL_ROWS", "KEY_ROWS"), (2048, 24, 22), strict=True):
        monkeypatch.setattr(pieces, limit, size)
    torch.testing.assert_close(weights("products", PARTS[1], torch.float64), whole)
    q, k, v = (torch.randn(2, 4, 75, 32, device=DEVICE) for _ in "qkv")
    dropout = Dropout(0.3, torch.tensor(5, device=DEVICE), heads=4)
    options = {"scale": 0.2, "rank": 16, "estimator": "lsh-mean", "grouping_block": 20}
    found = []
    for workspace in (1, 9_000, 1 << 24):
        out = torch.empty_like(q)
        found.append(by_kernels(q, k, v, out=out, dropout=dropout, workspace=workspace, **options))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_bits_do_not_depend_on_threads() -> None:
    require_kernel()
    dropout, before = PARTS[0], torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(weights("kernel", dropout, torch.float32, 20))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
