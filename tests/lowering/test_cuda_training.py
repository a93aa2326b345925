"""The Triton kernels both ways behind the ops; interpreted without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from distr_compile.lowering import cuda, cuda_training, training
from distr_compile.lowering.call import Approximation, Shape
from tests.lowering.test_gradients import (
    CASES,
    FACTOR,
    _constant_bases,  # noqa: F401 (a fixture of every test)
    by_definition,
    by_op,
)
from tests.lowering.test_op_dropout import by_definition as dropped_by_definition
from tests.lowering.test_op_dropout import by_op as dropped_by_op

pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU test_gpu.py does this"),
]

NAMES = (
    *("17 rows", "197 rows", "width 24", "width 80", "signed, blocks", "sample, causal"),
    *("projection, two rounds", "calibrated", "rows that see nothing", "soft cap"),
    *("a mask without gradient", "keys without gradient", "exact by rank", "exact by length"),
    *("padding", "padding, hashed"),
)


@pytest.fixture(autouse=True)
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Who ran, where the kernels take calls on the CPU, too."""
    seen: list[str] = []
    refuses = cuda.refuses

    def on_gpu(shape: Shape, how: Approximation) -> str | None:
        return refuses(shape._replace(device=torch.device("cuda")), how)

    def spy(name: str, run: Any) -> Any:
        return lambda *given, **options: (seen.append(name), run(*given, **options))

    monkeypatch.setattr(cuda, "refuses", on_gpu)
    monkeypatch.setattr(cuda_training, "is_for", lambda shape: True)
    forms = {name: spy(name, run) for name, run in cuda_training.FORMS.items()}
    monkeypatch.setattr(cuda_training, "FORMS", forms)
    monkeypatch.setattr(cuda_training, "backward", spy("backward", cuda_training.backward))
    return seen


def near(name: str, dtype: torch.dtype, got: Any, exact: Any, low: Any) -> None:
    """The rule of ``test_gradients.py``; Qhat and Khat are rounded to the dtype besides."""
    factor = 2 * FACTOR if "projection" in str(CASES[name]) else FACTOR
    for mine, wanted, rounded in zip(got, exact, low, strict=True):
        size = wanted.norm().item() + 1e-30
        bound = factor * (rounded - wanted).norm().item() + 2 * torch.finfo(dtype).eps * size
        assert (mine.double() - wanted).norm().item() <= bound


def expected(name: str) -> list[str]:
    """What runs: not our backward where the mask has a gradient."""
    mask = CASES[name][1]
    is_trained = mask not in (None, "bool", "padding") and "without gradient" not in name
    return ["distr-triton"] if is_trained else ["distr-triton", "backward"]


# Half of them in half precision, too: interpreted, that takes long.
@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in NAMES), *((name, torch.float16) for name in NAMES[::2])],
)
def test_gradients(name: str, dtype: torch.dtype, ran: list[str]) -> None:
    got = by_op(name, dtype)
    assert ran == expected(name)
    exact, low = (by_definition(name, dtype, working) for working in (torch.float64, dtype))
    near(name, dtype, got, exact, low)


@pytest.mark.parametrize("name", ["17 rows", "signed, blocks", "keys without gradient"])
def test_dropout(name: str, ran: list[str]) -> None:
    dtype = torch.float32
    got = dropped_by_op(name, dtype)
    assert ran == expected(name)
    exact, low = (dropped_by_definition(name, dtype, to) for to in (torch.float64, dtype))
    near(name, dtype, got, exact, low)


def test_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Head by head, where no more fits."""
    name, of_a_head = "signed, blocks", 2 * 50 + 4 * 24
    whole = by_op(name, torch.float32)
    sizes: list[int] = []
    factors = cuda_training._factors

    def spy(Q: Any, K: Any, *rest: Any) -> Any:
        Qhat, Khat = factors(Q, K, *rest)
        sizes.append(Qhat.nbytes + Khat.nbytes)
        return Qhat, Khat

    monkeypatch.setattr(cuda_training, "_factors", spy)
    batch, _, key_heads, *_ = CASES[name][0]
    one_head = of_a_head * 16 * 4
    for limit, parts in ((one_head, batch * key_heads), (key_heads * one_head, batch)):
        monkeypatch.setattr(cuda_training, "WORKSPACE_BYTES", limit)
        sizes.clear()
        again = by_op(name, torch.float32)
        assert len(sizes) == 2 * parts
        assert max(sizes) <= limit
        assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))


def test_who_computes_what() -> None:
    shape = Shape(2, 4, 2, 200, 160, 64, 48, True, None, torch.float16, torch.device("cpu"))
    how = Approximation("projection", 32)
    padded = shape._replace(mask=((2, 1, 1, 160), torch.bool))
    for computed in (shape, padded):
        assert training.names(computed, how) == ("distr-triton", "distr-triton", {})
    for shape_, how_, mask_grad, why in (
        (shape, Approximation("projection", 32, strict=True), False, "the strict form"),
        (shape._replace(head_dim=256), how, False, "takes widths up to 128"),
        (shape, how, True, "gives no gradient to a mask"),
        (shape._replace(dtype=torch.float64), how, False, "do not compute in fp64"),
        (
            shape._replace(num_queries=10**5, num_keys=10**5),
            Approximation("projection", 32, 64),
            False,
            "more than 256",
        ),
    ):
        found = training.names(shape_, how_, mask_grad=mask_grad)
        assert found.backward == "torch-products"
        assert found.forward == ("distr-triton" if mask_grad else "torch-products")
        assert why in found.refused["distr-triton, backward"]
