"""Launch plans: what is repeated, what is not, and that launches are those of the first call."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distr_compile.kernels import plan as plans
from distr_compile.kernels.calibrated import launch as calibrated
from distr_compile.kernels.plan import Plans, geometry, launch, new, recording
from distr_compile.lowering import choose, exactly
from distr_compile.lowering.call import Call
from distr_compile.lowering.choose import Implementation

ROOT = Path(__file__).parents[2]


class Kernel:
    """As Triton's: ``kernel[grid](...)`` runs it and returns what runs it again at a grid."""

    def __init__(self, function: Callable[..., None], *names: str) -> None:
        self.function, self.arg_names, self.grids = function, list(names), []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def run(*given: Any, **named: Any) -> Kernel:
            self.grids.append(grid)
            values = dict(zip(self.arg_names, given, strict=False)) | named
            self.function(*(values[name] for name in self.arg_names))
            return self

        return run


def scaled(source: Tensor, target: Tensor, factor: float) -> None:
    target.copy_(source.reshape(target.shape) * factor)


def summed(source: Any, other: Tensor, target: Tensor) -> None:
    base = source.base if hasattr(source, "block_shape") else source
    target.copy_(base.reshape(target.shape) + other.reshape(target.shape))


SCALE = Kernel(scaled, "source", "target", "factor")
SUM = Kernel(summed, "source", "other", "target")


class Descriptor:
    def __init__(self, base: Tensor, shape: Any, strides: Any, block_shape: list[int]) -> None:
        self.base, self.shape, self.strides, self.block_shape = base, shape, strides, block_shape


def call(x: Tensor, y: Tensor, out: Tensor) -> None:
    """2 x + 3 y, in three launches with two temporaries."""
    a, b = new(x, *x.shape), new(x, *y.shape, dtype=torch.float64)
    launch(SCALE, (4, 2), x, a, factor=2.0, num_warps=4)
    launch(SCALE, (1,), y[:, None], target=b, factor=3.0)
    launch(SUM, (1,), Descriptor(a, a.shape, a.stride(), [8]), b, out)


def test_a_plan_repeats_the_launches_with_other_tensors() -> None:
    x, y, out = torch.randn(8), torch.randn(8), torch.empty(8)
    with recording((x, y, None, out)) as recorder:
        call(x, y, out)
    plan = recorder.plan()
    assert plan is not None
    torch.testing.assert_close(out, 2 * x + 3 * y)
    kept = [weakref.ref(t) for t in recorder.kept]
    del recorder
    gc.collect()
    assert not any(ref() is not None for ref in kept), "a plan holds no tensor"
    SCALE.grids.clear()
    for _ in range(2):
        x, y, out = torch.randn(8), torch.randn(8), torch.full((8,), torch.nan)
        plan(x, y, None, out)
        torch.testing.assert_close(out, 2 * x + 3 * y)
    assert SCALE.grids == [(4, 2, 1), (1, 1, 1)] * 2
    first, second, third = plan.launches
    assert [len(each.made) for each in plan.launches] == [1, 1, 0]
    assert (first.over, second.over) == ([], [])
    assert sorted(third.over) == [4, 5], "temporaries are given back after their last launch"


def test_nothing_is_taken_down_outside() -> None:
    x, y, out = torch.randn(8), torch.randn(8), torch.empty(8)
    call(x, y, out)
    with recording((x, y, out)) as recorder:
        pass
    assert recorder.plan() is None


def strange(x: Tensor, y: Tensor, out: Tensor) -> None:
    launch(SUM, (1,), x.clone(), y, out)


def later_rows(x: Tensor, y: Tensor, out: Tensor) -> None:
    launch(SUM, (1,), x[4:], y[:4], out[:4])


def as_other_dtype(x: Tensor, y: Tensor, out: Tensor) -> None:
    launch(SCALE, (1,), x.view(torch.int32), out, 1.0)


def refusing(x: Tensor, y: Tensor, out: Tensor) -> None:
    call(x, y, out)
    plans.do_not_repeat()


def interpreted(x: Tensor, y: Tensor, out: Tensor) -> None:
    kernel = {(1,): lambda *given: None}
    launch(kernel, (1,), x, y, out)


@pytest.mark.parametrize(
    "what", [strange, later_rows, as_other_dtype, refusing, interpreted], ids=lambda f: f.__name__
)
def test_what_a_plan_cannot_repeat_has_none(what: Callable[..., None]) -> None:
    x, y, out = torch.randn(8), torch.randn(8), torch.empty(8)
    with recording((x, y, out)) as recorder:
        what(x, y, out)
        call(x, y, out)
    assert recorder.plan() is None
    assert not recorder.kept


def test_inputs_at_one_address_cannot_be_told_apart() -> None:
    x, out = torch.randn(8), torch.empty(8)
    for inputs in ((x, x, out), (x, torch.empty(0), out)):
        with recording(inputs) as recorder:
            call(x, x, out)
        assert recorder.plan() is None


def test_plans_are_found_by_all_that_launches_depend_on() -> None:
    x = torch.randn(4, 6, 8)
    other = torch.randn(4 * 6 * 8 + 1)[1:].view(4, 6, 8)
    kinds = [x, x[:2], x.transpose(0, 1).contiguous().transpose(0, 1), x.half(), other, None]
    assert len({geometry(t) for t in kinds}) == len(kinds)
    assert geometry(x, None) == geometry(torch.randn(4, 6, 8), None)
    kept = Plans(most=2)
    for key in "abc":
        kept.put(key, print)
    assert kept.get("c") is print
    assert kept.get("a") is None


# --- through the op -------------------------------------------------------------------------------


def test_the_op_looks_for_a_plan_first(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def run(told: Call) -> None:
        seen.append("run")
        told.out.fill_(1)
        choose.plans.put(told.key, repeat)

    def repeat(q: Any, k: Any, v: Any, mask: Any, sinks: Any, *rest: Any) -> None:
        seen.append("plan")
        seed, bases, out = rest
        assert seed is dropout_seed
        assert bases is None
        out.fill_(2)

    each = Implementation("fake", lambda *_: None, run)
    monkeypatch.setattr(choose, "implementations", lambda: (each,))
    monkeypatch.setattr(choose, "PLANNED", {"cpu"})
    monkeypatch.setattr(choose, "plans", Plans())
    q, k, v = (torch.randn(1, 2, 20, 32) for _ in "qkv")
    options = {"scale": 0.2, "rank": 16, "estimator": "projection", "grouping_block": 0}
    op, dropout_seed = torch.ops.distr.attention, None
    assert (op(q, k, v, **options) == 1).all()
    got = op(q, k, v, **options)
    assert (got == 2).all()
    assert got.transpose(1, 2).is_contiguous()
    for changed in ({"rank": 20}, {"seed": 1}, {"is_causal": True}, {"scale": 0.3}):
        assert (op(q, k, v, **options | changed) == 1).all()
    assert (op(q, k, v, q.new_zeros(20, 20), **options) == 1).all()
    assert seen == ["run", "plan", *["run"] * 5]
    for p in (0.1, 0.2):  # a plan holds for any seed, and for one share only
        for value in (1, 2):
            dropout_seed = torch.tensor(value)
            rest = (None, None, None, None, dropout_seed)
            assert (op(q, k, v, *rest, dropout_p=p, **options) == value).all()
    with exactly.computing_exactly():  # does not ask for plans
        assert (op(q, k, v, **options) != 2).any()
    recorded = op(q.requires_grad_(), k, v, **options)  # another op, which has no plans
    assert recorded.requires_grad
    assert (recorded != 2).any()
    with pytest.raises(ValueError, match="k: got batch size 3"):
        op(q.detach(), torch.randn(3, 2, 20, 32), v, **options)


SCRIPT = """
import json, sys
import torch
from triton.compiler.compiler import CompiledKernel
from benchmarks import host_time
from distr_compile.lowering import choose, op
from distr_compile.lowering.call import Approximation, Scores, op_arguments
from distr_compile.lowering.measure import random_bases

torch.set_num_threads(1)
found = {}
with torch.no_grad(), host_time.launching_nothing("sm_90"):
    launched = []
    CompiledKernel.run = lambda self, *arguments: launched.append((self, arguments))
    for case in json.loads(sys.argv[1]):
        H, H_k, N, d = (case[name] for name in ("H", "H_k", "N", "d"))
        rank, estimator = case["rank"], case["estimator"]

        def draw(heads):
            return torch.randn(2, N, heads, d).half().transpose(1, 2)

        def told(inputs):
            names = {t.data_ptr(): name for name, t in inputs.items()}
            lines = []
            for kernel, arguments in launched:
                grid, values = arguments[:3], []
                for value in arguments[9:]:
                    base = value.base if hasattr(value, "block_shape") else value
                    if isinstance(base, torch.Tensor):
                        new = f"{base.numel()} {base.dtype}, {len(names)}"
                        told = names.setdefault(base.data_ptr(), new)
                        if base is not value:
                            shapes = (value.shape, value.strides, value.block_shape)
                            told = [told, *map(list, shapes)]
                        value = told
                    is_plain = isinstance(value, (str, int, float, list))
                    values.append(value if is_plain else str(value))
                lines.append([kernel.hash, *grid, *values])
            launched.clear()
            return lines

        scores = Scores(d**-0.5, case["is_causal"], softcap=case["softcap"])
        options = op_arguments(Approximation(estimator, rank), scores)
        bases = ()
        if estimator == "calibrated":
            bases = random_bases(H_k, d, rank, torch.device("cpu"))
        runs = []
        for _ in range(2):
            inputs = {"q": draw(H), "k": draw(H_k), "v": draw(H_k)}
            out = op.call(*inputs.values(), None, *bases, **options)
            runs.append(told(inputs | {"out": out}))
        found[case["name"]] = {"runs": runs, "plans": len(choose.plans.found)}
        choose.plans.found.clear()
print(json.dumps(found))
"""


def case(name: str, **told: Any) -> dict[str, Any]:
    plain = {"H": 4, "H_k": 4, "N": 64, "d": 64, "rank": 32, "is_causal": False, "softcap": 0.0}
    return plain | {"name": name, "estimator": "projection"} | told


CASES = [
    case("rank d", rank=64),
    case("rank d, causal, soft cap", rank=64, is_causal=True, softcap=2.0, N=77),
    case("projection"),
    case("projection, causal, shared heads", is_causal=True, H_k=2, N=197),
    case("projection, several blocks", N=1000, H=2, H_k=1),
    case("lsh-mean, odd", estimator="lsh-mean", N=197),
    case("calibrated", estimator="calibrated"),
]


def test_the_second_call_launches_what_the_first_did(tmp_path: Path) -> None:
    """The same kernels at the same grids with the same numbers, and each tensor in its place."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(CASES)],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert list(found) == [each["name"] for each in CASES]
    for name, told in found.items():
        assert told["plans"] == 1, name
        first, second = told["runs"]
        assert len(first) == (5 if "projection" in name else 4 if "lsh" in name else 1), name
        assert first == second, name


# --- bases that are given -------------------------------------------------------------------------


def test_bases_are_prepared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Tensor] = []
    real = calibrated.saturate
    monkeypatch.setattr(calibrated, "saturate", lambda t, dtype: made.append(t) or real(t, dtype))
    basis = torch.randn(2, 8, 4)
    wanted = basis.repeat_interleave(3, 0).half()
    for _ in range(2):
        assert torch.equal(calibrated.prepared(basis, torch.float16, 3), wanted)
    assert len(made) == 1
    assert torch.equal(calibrated.prepared(basis, torch.bfloat16, 1), basis.bfloat16())
    basis.mul_(2)  # a write is seen
    assert torch.equal(calibrated.prepared(basis, torch.bfloat16, 1), basis.bfloat16())
    assert len(made) == 3
    number = id(basis)
    del basis, made[:]
    gc.collect()
    assert number not in calibrated._prepared, "nothing is kept of what is gone"
    with torch.inference_mode():
        uncounted = torch.randn(2, 8, 4)
    for _ in range(2):
        calibrated.prepared(uncounted, torch.float16, 1)
    assert len(made) == 2
