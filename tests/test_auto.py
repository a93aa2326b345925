"""What "auto" in a policy does to a graph: what is asked, and what comes of the answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import distr_compile
from distr_compile.lowering import choose, stored
from distr_compile.lowering import judge as judging
from distr_compile.lowering.call import Approximation, Shape
from distr_compile.lowering.judge import Judge
from distr_compile.lowering.measure import DISTR, EXACT, SDPA, Measured, Race
from distr_compile.lowering.spelling import read_call, spelled
from distr_compile.policy import Policy

EXACT_WINS = Race({SDPA: 4e-3, EXACT: 3e-3}, "e", 1.3, 7, 4)
DISTR_WINS = Race({EXACT: 3e-3, DISTR: 2e-3}, "d", 1.4, 7, 4)
BOTH = Measured(EXACT_WINS, DISTR_WINS)
OURS = Measured(EXACT_WINS, dataclasses.replace(DISTR_WINS, gain=0.9))
NEITHER = Measured(dataclasses.replace(EXACT_WINS, gain=0.9), OURS.distr)

SMALL = Shape(1, 1, 1, 20, 20, 32, 32, False, None, torch.float32, torch.device("cpu"))

OUR_KERNEL = choose.name_of(SMALL, Approximation.none(32))

Asked = list[tuple[Shape, "Approximation | None"]]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch, may_measure: Path) -> Callable[[Any], Asked]:
    """Lets measuring find what is given; returns what is asked."""

    def let(found: Measured | str | Callable[[Shape], Measured]) -> Asked:
        asked: Asked = []

        def race(shape: Shape, approximation: Any = None, *_: Any) -> Race | str:
            if (shape, approximation) not in asked:
                asked.append((shape, approximation))
            now = found(shape) if callable(found) else found
            if isinstance(now, str):
                return now
            raced = now.exact if approximation is None else now.distr
            assert raced is not None
            return raced

        monkeypatch.setattr(judging.measure, "race", race)
        monkeypatch.setattr(judging.measure, "warm_up", lambda *_: None)
        stored.forget()
        return asked

    return let


def qkv(*, keys: int = 48, key_heads: int = 4, order: str = "bhnd") -> list[Tensor]:
    made = []
    for heads, tokens in ((4, 40), (key_heads, keys), (key_heads, keys)):
        t = torch.randn(2, heads, tokens, 32)
        made.append(t if order == "bhnd" else t.transpose(1, 2).contiguous().transpose(1, 2))
    return made


def spelled_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / 32**0.5).softmax(-1) @ v


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def masked(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return (q @ k.mT / 32**0.5).masked_fill(~keep, -torch.inf).softmax(-1) @ v


def biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return (q @ k.mT / 32**0.5 + bias).softmax(-1) @ v


def packed(x: Tensor) -> Tensor:
    q, k, v = x.unflatten(-1, (3, 4, 32)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v)


CALLS: dict[str, tuple[Callable[..., Tensor], Callable[[], list[Tensor]]]] = {
    "spelled out": (spelled_out, qkv),
    "spelled out, axes in another order": (spelled_out, lambda: qkv(order="bnhd")),
    "three axes": (spelled_out, lambda: [t.flatten(0, 1) for t in qkv()]),
    "SDPA, shared heads": (sdpa, lambda: qkv(key_heads=2)),
    "causal": (causal, lambda: qkv(keys=40)),
    "key padding": (masked, lambda: [*qkv(), torch.rand(2, 1, 1, 48) < 0.9]),
    "a mask per query": (masked, lambda: [*qkv(), torch.rand(40, 48) < 0.9]),
    "a bias per head": (biased, lambda: [*qkv(), torch.randn(4, 40, 48)]),
    "expanded keys and values": (
        sdpa,
        lambda: [t if i == 0 else t.expand(-1, 4, -1, -1) for i, t in enumerate(qkv(key_heads=1))],
    ),
    "packed": (packed, lambda: [torch.randn(2, 40, 3 * 4 * 32)]),
}


class Of(nn.Module):
    """A function as a module: reports of functions are kept by their code."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Any:
        return self.function(*args)


def run(
    function: Callable[..., Any], *args: Tensor, policy: Any = None, **options: Any
) -> tuple[Tensor, Any]:
    model = Of(function).eval()
    options = {"policy": policy, "compiler": "eager"} | options
    compiled = torch.compile(model, backend="distr", options=options, dynamic=False)
    with torch.no_grad():
        out = compiled(*args)
    return out, distr_compile.report(model).rows


@pytest.mark.parametrize("name", CALLS)
def test_what_is_asked_about_is_what_runs(
    name: str, answers: Callable[[Any], Asked], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes, dtype, order in memory, mask and approximation, as the op then gets them."""
    asked, ran = answers(BOTH), []
    real = choose.run
    monkeypatch.setattr(choose, "run", lambda c: ran.append((c.shape, c.approximation)) or real(c))
    function, inputs = CALLS[name]
    args = inputs()
    out, (row,) = run(function, *args)
    assert row.decision == "distr"
    ((shape, approximation),) = ran
    assert asked == [(shape, None), (shape, approximation)]
    assert row.measured == {**BOTH.seconds, **BOTH.gains}
    assert row.kernel == choose.name_of(*ran[0])
    assert row.refused == choose.refusals(*ran[0])
    assert row.refused["distr-triton"] == "Triton's kernels need a GPU"
    assert out.shape == function(*args).shape


@pytest.mark.parametrize(
    ("name", "compiler"),
    [
        *((name, "eager") for name in CALLS),
        *((name, "inductor") for name in ("spelled out", "key padding", "packed")),
    ],
)
def test_exact_attention_in_our_kernel(
    name: str, compiler: str, answers: Callable[[Any], Asked], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(OURS)
    ran = []
    real = choose.run
    monkeypatch.setattr(choose, "run", lambda c: ran.append(c.approximation) or real(c))
    function, inputs = CALLS[name]
    args = inputs()
    out, (row,) = run(function, *args, compiler=compiler)
    assert (row.decision, row.kernel) == ("exact", choose.name_of(SMALL, Approximation.none(32)))
    assert ran == [Approximation.none(32)]
    wide = [t.double() if t.is_floating_point() else t for t in args]
    wanted = function(*wide)
    own = (function(*args).double() - wanted).norm()
    assert (out.double() - wanted).norm() <= 1.5 * own


def test_neither_is_faster(answers: Callable[[Any], Asked]) -> None:
    answers(NEITHER)
    q, k, v = qkv()
    out, (row,) = run(spelled_out, q, k, v)
    assert (row.decision, row.kernel) == ("exact", "sdpa")
    (reason,) = row.reasons
    assert reason.code == "not-faster"
    assert row.refused[OUR_KERNEL].startswith("not-faster: SDPA is as fast: sdpa 4 ms, exact (e)")
    assert "sdpa 4 ms, exact (e) 3 ms, distr (d) 2 ms; min_seq_len = 0 forces it" in reason.text
    torch.testing.assert_close(out, spelled_out(q, k, v))


def test_what_was_not_measured_names_the_command(answers: Callable[[Any], Asked]) -> None:
    asked = answers("it takes too long")
    _, (row,) = run(spelled_out, *qkv())
    assert row.refused[OUR_KERNEL].startswith("not-measured: it takes too long; to measure it: ")
    (reason,) = row.reasons
    assert (row.decision, row.kernel, reason.code) == ("exact", "sdpa", "not-measured")
    why, _, command = reason.text.partition("; to measure it: distr measure --call ")
    assert why == "it takes too long"
    shape, approximation = read_call(command.strip("'"))
    assert asked == [(shape, None)]
    assert approximation == Approximation("projection", 16)


def test_it_is_asked_once(answers: Callable[[Any], Asked]) -> None:
    """Two layers of one shape, and a second compile."""
    asked = answers(BOTH)

    def two(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return spelled_out(spelled_out(q, k, v), k, v)

    q, k, v = qkv(keys=40)
    _, rows = run(two, q, k, v)
    assert [row.decision for row in rows] == ["distr"] * 2
    torch.compiler.reset()
    run(spelled_out, q, k, v)
    assert len(asked) == 2


def test_explain_says_what_a_compile_does(answers: Callable[[Any], Asked]) -> None:
    for found in (BOTH, OURS, NEITHER, "no"):
        answers(found)
        stored.forget()
        q, k, v = qkv()
        explained = distr_compile.explain(Of(spelled_out).eval(), q, k, v).rows
        _, compiled = run(spelled_out, q, k, v)
        torch.compiler.reset()
        for a, b in zip(explained, compiled, strict=True):
            said = {"decision", "measured", "reasons", "rank", "min_seq_len", "kernel"}
            assert all(getattr(a, name) == getattr(b, name) for name in said)
        for path in stored.folder().glob("*.json"):  # type: ignore[union-attr]
            path.unlink()


def test_explain_leaves_the_graph(
    answers: Callable[[Any], Asked], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it tries is taken out again: what runs is the model's own attention."""
    answers(BOTH)
    ran = []
    monkeypatch.setattr(choose, "run", ran.append)
    (row,) = distr_compile.explain(Of(spelled_out).eval(), *qkv()).rows
    assert row.decision == "distr"
    assert not ran


def test_each_graph_has_its_own_seconds(
    answers: Callable[[Any], Asked], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In explain as in a compile: a graph break begins anew."""

    def broken(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = spelled_out(q, k, v)
        torch._dynamo.graph_break()
        return spelled_out(out[:, :, :30], k, v)

    clock = iter(range(0, 10**6, 12))
    monkeypatch.setattr(judging.time, "perf_counter", lambda: next(clock))
    answers(BOTH)
    explained = distr_compile.explain(Of(broken).eval(), *qkv()).rows
    for path in stored.folder().glob("*.json"):  # type: ignore[union-attr]
        path.unlink()
    stored.forget()
    _, compiled = run(broken, *qkv())
    assert [row.decision for row in explained] == [row.decision for row in compiled]


def test_autocast_decides_the_dtype(answers: Callable[[Any], Asked]) -> None:
    asked = answers(BOTH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        run(sdpa, *qkv())
    assert {shape.dtype for shape, _ in asked} == {torch.bfloat16}


@pytest.mark.parametrize("batch_first", [True, False])
def test_modules_are_asked_about_too(answers: Callable[[Any], Asked], batch_first: bool) -> None:
    asked = answers(BOTH)
    attention = nn.MultiheadAttention(64, 2, batch_first=batch_first).eval()

    def attend(x: Tensor) -> Tensor:
        return attention(x, x, x, need_weights=False)[0]

    x = torch.randn(40, 40, 64)
    out, (row,) = run(attend, x)
    assert row.decision == "distr"
    ((shape, _),) = asked
    assert (shape.batch, shape.num_heads, shape.num_queries, shape.head_dim) == (40, 2, 40, 32)
    torch.compiler.reset()
    answers(NEITHER)
    for path in stored.folder().glob("*.json"):  # type: ignore[union-attr]
        path.unlink()
    out, (row,) = run(attend, x)
    assert (row.decision, row.kernel) == ("exact", None)
    torch.testing.assert_close(out, attend(x))


# --- symbolic sizes -----------------------------------------------------------------------------


def longer_or_shorter(*tensors: Tensor) -> list[Tensor]:
    for tensor in tensors:
        torch._dynamo.mark_dynamic(tensor, 2)
    return list(tensors)


def test_a_symbolic_length_gets_the_break_even(answers: Callable[[Any], Asked]) -> None:
    answers(lambda shape: BOTH if shape.num_queries >= 32 else NEITHER)
    model = Of(sdpa).eval()
    compiled = torch.compile(model, backend="distr", options={"compiler": "eager"})
    with torch.no_grad():
        for tokens in (40, 33, 20):
            args = longer_or_shorter(*(torch.randn(2, 4, tokens, 32) for _ in range(3)))
            out = compiled(*args)
            if tokens < 32:
                torch.testing.assert_close(out, sdpa(*args))
    (row,) = distr_compile.report(model).rows
    assert (row.decision, row.min_seq_len, row.runtime_exact_calls) == ("distr", 32, 1)


def test_exact_attention_of_symbolic_sizes_is_left_to_sdpa(
    answers: Callable[[Any], Asked],
) -> None:
    answers(OURS)
    model = Of(spelled_out).eval()
    compiled = torch.compile(model, backend="distr", options={"compiler": "eager"})
    with torch.no_grad():
        compiled(*longer_or_shorter(*qkv()))
    (row,) = distr_compile.report(model).rows
    assert (row.decision, row.kernel) == ("exact", "sdpa")


# --- where it is not asked ----------------------------------------------------------------------


@pytest.mark.parametrize(("exact", "kernel"), [("keep", None), ("sdpa", "sdpa")])
def test_exact_is_what_the_policy_says(
    answers: Callable[[Any], Asked], exact: str, kernel: str | None
) -> None:
    asked = answers(OURS)
    _, (row,) = run(spelled_out, *qkv(), policy={"default": {"group_size": 1, "exact": exact}})
    assert (row.decision, row.kernel, asked) == ("exact", kernel, [])


def test_a_forced_length_is_not_asked_about(answers: Callable[[Any], Asked]) -> None:
    asked = answers(NEITHER)
    _, (row,) = run(spelled_out, *qkv(), policy={"default": {"min_seq_len": 0}})
    assert (row.decision, asked) == ("distr", [])


def test_recorded_gradients_stay_with_the_model(answers: Callable[[Any], Asked]) -> None:
    asked = answers(OURS)
    q, k, v = (t.requires_grad_() for t in qkv())
    model = Of(sdpa).eval()
    compiled = torch.compile(model, backend="distr", options={"compiler": "aot_eager"})
    compiled(q, k, v).sum().backward()
    (row,) = distr_compile.report(model).rows
    assert ([reason.code for reason in row.reasons], row.kernel) == (["gradients"], None)
    assert not asked
    assert q.grad is not None


def test_what_no_kernel_of_ours_does_as_sdpa(answers: Callable[[Any], Asked]) -> None:
    """fp64 and a decode step are not asked about."""
    asked = answers(OURS)
    policy = {"default": {"group_size": 1}}
    wide = [t.double() for t in qkv()]
    q, k, v = qkv()
    for args in (wide, [q[:, :, :1], k, v]):
        torch.compiler.reset()
        _, rows = run(spelled_out, *args, policy=policy)
        assert rows[-1].kernel == "sdpa"
    assert not asked


def test_options_and_environment(
    answers: Callable[[Any], Asked], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = answers(BOTH)
    _, (row,) = run(spelled_out, *qkv(), measure=False)
    assert row.reasons[0].code == "not-measured"
    assert "switched off" in row.reasons[0].text
    torch.compiler.reset()
    monkeypatch.setenv("DISTR_MEASURE", "0")
    _, rows = run(spelled_out, *qkv())
    assert rows[-1].reasons[0].code == "not-measured"
    assert not asked
    torch.compiler.reset()
    with pytest.raises(Exception, match="measure: got 'no'; accepted: True, False"):
        run(spelled_out, *qkv(), measure="no")


def test_losses_do_not_hang_on_times(answers: Callable[[Any], Asked]) -> None:
    asked = answers(NEITHER)
    batches = [distr_compile.Batch(tuple(qkv())) for _ in range(2)]

    class Model(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return spelled_out(q, k, v)

    model = Model().eval()
    found = distr_compile.regress(
        model, batches, {"auto": Policy(), "forced": Policy({"min_seq_len": 0})}, progress=False
    )
    auto, forced = (found.result.policies[name] for name in ("auto", "forced"))
    assert auto.approximated == forced.approximated == 1
    assert auto.metrics == forced.metrics
    assert any('auto: min_seq_len = "auto" counts as 0' in note for note in found.notes)
    assert distr_compile.verify(model, *batches[0].args).ok
    assert not asked


def test_a_call_can_be_asked_about_by_hand(answers: Callable[[Any], Asked]) -> None:
    answers(BOTH)
    assert Judge()(SMALL, None) == Measured(EXACT_WINS)
    assert spelled(SMALL, None) == "q=1x1x20x32 k=1x1x20 v=32 dtype=float32 device=cpu"
