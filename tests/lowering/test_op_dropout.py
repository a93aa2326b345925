"""Dropout through the op, its gradients, and the function that draws a seed.

The reference is the definition, and autograd through it, with the weights that the seed drops.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import distr_compile
from distr_compile.kernels.attention import reference
from distr_compile.kernels.attention.dropout import Dropout
from distr_compile.lowering import exactly, measure, training
from distr_compile.lowering.call import Approximation, Shape
from distr_compile.lowering.spelling import read_call, spelled
from tests.lowering.test_gradients import (
    CASES,
    FACTOR,
    _constant_bases,  # noqa: F401 (a fixture of every test)
    call_of,
    draw,
    forward,  # noqa: F401 (a fixture)
    leaves,
    op,
)

SEED = 0x1234_5678_9ABC_DEF0
P = 0.3
NAMES = (
    *("17 rows", "197 rows", "signed, blocks", "projection, two rounds", "calibrated", "strict"),
    *("strict, keys in front", "rows that see nothing", "bias of heads", "sinks", "one row"),
    *("a mask without gradient", "keys without gradient", "exact by rank", "exact by length"),
)


def by_op(name: str, dtype: torch.dtype, p: float = P, seed: int = SEED) -> list[Tensor]:
    """The result, and the gradients."""
    tensors, options = call_of(name, dtype)
    wanted = leaves(tensors, name)
    out = op(*tensors, torch.tensor(seed), dropout_p=p, **options)
    grad = draw(*out.shape, seed=9).to(dtype)
    return [out.detach(), *torch.autograd.grad(out, wanted, grad)]


def by_definition(name: str, dtype: torch.dtype, working: torch.dtype) -> list[Tensor]:
    tensors, options = call_of(name, dtype)
    q, k, v, mask, A, B, sinks = (
        None if t is None else t if t.dtype == torch.bool else t.to(working) for t in tensors
    )
    wanted = leaves([q, k, v, mask, A, B, sinks], name)
    if options.pop("min_seq_len", 0) or q.shape[2] < 16:
        options |= {"rank": q.shape[3], "estimator": "lsh-mean"}
    is_given = A is not None and options["rank"] < q.shape[3]
    options |= {"dropout": Dropout(P, torch.tensor(SEED), q.shape[1]), "sinks": sinks}
    out = reference.attention(q, k, v, mask, bases=(A, B) if is_given else None, **options)
    grad = draw(*out.shape, seed=9).to(dtype).to(working)
    found = [out.detach(), *torch.autograd.grad(out, wanted, grad)]
    return [t.double() for t in found]


@pytest.mark.usefixtures("forward")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_the_result_and_its_gradients(name: str, dtype: torch.dtype) -> None:
    """The rule of ``test_gradients.py``."""
    exact = by_definition(name, dtype, torch.float64)
    low = by_definition(name, dtype, dtype)
    factor = 2 * FACTOR if "projection" in str(CASES[name]) else FACTOR
    for got, wanted, rounded in zip(by_op(name, dtype), exact, low, strict=True):
        assert got.dtype == dtype
        size = wanted.norm().item() + 1e-30
        bound = factor * (rounded - wanted).norm().item() + torch.finfo(dtype).eps * size
        assert (got.double() - wanted).norm().item() <= bound


@pytest.mark.parametrize("name", NAMES)
def test_in_double_precision(name: str) -> None:
    exact = by_definition(name, torch.float64, torch.float64)
    bound = 1e-7 if "projection" in str(CASES[name]) else 1e-12
    for got, wanted in zip(by_op(name, torch.float64), exact, strict=True):
        torch.testing.assert_close(got, wanted, rtol=bound, atol=bound)


@pytest.mark.parametrize("name", ["17 rows", "strict", "exact by rank", "one row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_gradients_the_same_weights_are_dropped(name: str, dtype: torch.dtype) -> None:
    tensors, options = call_of(name, dtype)
    got = op(*tensors, torch.tensor(SEED), dropout_p=P, **options)
    torch.testing.assert_close(got, by_op(name, dtype)[0], rtol=1e-5, atol=1e-6)


def test_one_seed_repeats_and_another_does_not() -> None:
    first, again, other = (by_op("197 rows", torch.float32, seed=s) for s in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all((a - b).norm() > 0.1 * a.norm() for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("name", ["17 rows", "bias of heads", "strict", "sinks"])
def test_bits_do_not_depend_on_threads(name: str) -> None:
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(by_op(name, torch.float32))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_all_of_it() -> None:
    for found in by_op("sinks", torch.float32, p=1.0):
        assert not found.any()
    tensors, options = call_of("sinks", torch.float32)
    assert not op(*tensors, torch.tensor(1), dropout_p=1.0, **options).any()


def test_computing_exactly_drops_the_same_weights() -> None:
    tensors, options = call_of("17 rows", torch.float64)
    q, k, v = tensors[:3]
    dropout = Dropout(P, torch.tensor(SEED), q.shape[1])
    wanted = reference.attention(q, k, v, scale=options["scale"], rank=q.shape[3], dropout=dropout)
    with exactly.computing_exactly():
        got = op(*tensors, torch.tensor(SEED), dropout_p=P, **options)
        torch.testing.assert_close(got, wanted)
        torch.testing.assert_close(by_op("17 rows", torch.float64)[0], wanted)


@pytest.mark.parametrize("name", ["17 rows", "calibrated"])
def test_opcheck(name: str) -> None:
    tensors, options = call_of(name, torch.float32)
    leaves(tensors)
    given = (*tensors, torch.tensor(SEED))
    torch.library.opcheck(op.default, given, {"dropout_p": P, **options})


BAD = {
    "above 1": ({"dropout_p": 1.5}, torch.tensor(1), "dropout_p: got 1.5; must be from 0 to 1"),
    "below 0": ({"dropout_p": -0.5}, torch.tensor(1), "dropout_p: got -0.5; must be from 0 to 1"),
    "no seed": ({"dropout_p": 0.5}, None, "dropout_seed: got None with dropout_p 0.5; must be ()"),
    "a seed": ({}, torch.tensor(1), "dropout_seed: got a tensor with dropout_p 0.0; must be None"),
    "dtype": (
        {"dropout_p": 0.5},
        torch.tensor(1, dtype=torch.int32),
        "dropout_seed: got () of torch.int32; must be () of torch.int64",
    ),
    "shape": ({"dropout_p": 0.5}, torch.tensor([1]), "dropout_seed: got (1,) of torch.int64; must"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused(name: str) -> None:
    more, seed, message = BAD[name]
    tensors, options = call_of("17 rows", torch.float32)
    with pytest.raises(ValueError, match=re.escape(message)):
        op(*tensors, seed, **options, **more)


# --- the function ---------------------------------------------------------------------------------


def seeds_of(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The seeds of recorded calls, as they are made."""
    seen: list[Tensor] = []
    run = training.forward

    def spy(call: Any, saved: Any) -> Any:
        seen.append(call.dropout.seed.clone())
        return run(call, saved)

    monkeypatch.setattr(training, "forward", spy)
    return seen


def test_the_function_draws_from_the_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = seeds_of(monkeypatch)
    q, k, v = (draw(2, 4, 40, 32, seed=i).requires_grad_() for i in range(3))

    def run() -> Tensor:
        return distr_compile.attention(q, k, v, dropout_p=P, estimator="lsh-mean")

    torch.manual_seed(5)
    first, second = run(), run()
    torch.manual_seed(5)
    assert torch.equal(run(), first)
    assert not torch.equal(first, second)
    for found, seed in zip((first, second), seen, strict=False):
        dropout = Dropout(P, seed, 4)
        options = {"scale": 32**-0.5, "rank": 16, "estimator": "lsh-mean", "dropout": dropout}
        torch.testing.assert_close(found, reference.attention(q, k, v, **options))
    exact = distr_compile.attention(q, k, v, dropout_p=P, group_size=1)
    dropout = Dropout(P, seen[-1], 4)
    wanted = reference.attention(q, k, v, scale=32**-0.5, rank=32, dropout=dropout)
    torch.testing.assert_close(exact, wanted)
    with pytest.raises(ValueError, match=re.escape("dropout_p: got 1.5; must be from 0 to 1")):
        distr_compile.attention(q, k, v, dropout_p=1.5)


def test_the_mean_over_seeds_is_what_sdpa_has() -> None:
    """Mean and variance of the outputs, against those of SDPA's dropout."""
    q, k, v = (draw(1, 1, 24, 32, seed=i).float() for i in range(3))
    torch.manual_seed(0)
    count = 400
    ours = torch.stack(
        [distr_compile.attention(q, k, v, dropout_p=P, group_size=1) for _ in range(count)]
    )
    theirs = torch.stack(
        [F.scaled_dot_product_attention(q, k, v, dropout_p=P) for _ in range(count)]
    )
    exact = F.scaled_dot_product_attention(q, k, v)
    spread = theirs.std(0)
    assert ((ours.mean(0) - exact).abs() <= 5 * spread / count**0.5).all()
    assert abs((ours.std(0) / spread).mean() - 1) < 0.02


def test_checkpointed_gradients_have_equal_bits() -> None:
    q, k, v = (draw(1, 2, 40, 32, seed=i).float().requires_grad_() for i in range(3))

    def run(*tensors: Tensor) -> Tensor:
        return distr_compile.attention(*tensors, dropout_p=P)

    found = []
    for call in (run, lambda *t: checkpoint(run, *t, use_reentrant=False)):
        torch.manual_seed(1)
        found.append(torch.autograd.grad(call(q, k, v).square().sum(), (q, k, v)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# --- what is asked about it -----------------------------------------------------------------------


def test_a_call_with_dropout_is_spelled_and_timed() -> None:
    shape = Shape(
        *(1, 2, 2, 40, 40, 32, 32, False, None, torch.float32, torch.device("cpu")),
        trained=True,
        dropout=True,
    )
    how = Approximation("lsh-mean", 16)
    assert spelled(shape, how).endswith("training dropout")
    assert read_call(spelled(shape, how)) == (shape, how)
    torch.manual_seed(3)
    wanted = torch.rand(3)
    torch.manual_seed(3)
    race = measure.race(shape, how, limit=20.0)
    assert isinstance(race, measure.Race)
    assert torch.equal(torch.rand(3), wanted), "SDPA's dropout has drawn from a copy"
