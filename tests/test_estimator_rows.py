"""Every row of the table of estimators against its definition, and rows that nothing computes.

A row names the modules that compute it. Where one is missing a call must raise: what it must never
do is to answer with the arithmetic of another row.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from distr_compile.estimators import (
    ESTIMATORS,
    Estimator,
    Implementation,
    NoArithmeticError,
    arithmetic,
    auto_grouping_block,
)
from distr_compile.kernels import roles
from distr_compile.kernels.attention import cpu as fused_kernel
from distr_compile.kernels.attention import reference
from distr_compile.kernels.roles import Asked, Block, Prologue
from distr_compile.lowering import checks, cpu, cuda
from distr_compile.lowering.call import call_of
from distr_compile.tuning import calibrate
from tests.kernels.cpu_kernel import require_kernel
from tests.walk import by_kernels as walked

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OP = torch.ops.distr.attention.default
RANK = 16
OPTIONS: dict[str, Any] = {"scale": 0.2, "rank": RANK, "grouping_block": 20}


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Q, K, V: 2 query heads on a key head of width 32, 50 rows, 40 keys; strong columns first."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 2, 50, 32), (1, 1, 40, 32), (1, 1, 40, 24))
    q, k, v = (torch.randn(s, generator=generator) for s in shapes)
    decay = torch.logspace(0, -0.7, 32)
    return (q * decay).to(dtype), (k * decay).to(dtype), v.to(dtype)


def bases_for(name: str) -> tuple[Tensor, Tensor] | None:
    if ESTIMATORS[name].needs == "nothing":
        return None
    generator = torch.Generator().manual_seed(1)
    A, B = (torch.randn(1, 32, RANK, generator=generator) / 32**0.5 for _ in "AB")
    return A, B


def mask_for(form: dict[str, Any]) -> tuple[Tensor | None, dict[str, Any]]:
    """The mask of a form, and the rest of it: options of the call."""
    return form.get("mask"), {key: value for key, value in form.items() if key != "mask"}


def lowered(name: str, form: dict[str, Any]) -> tuple[Tensor | None, dict[str, Any]]:
    """As the op hands a form on: what is strict by itself is not asked to be."""
    mask, options = mask_for(form)
    if ESTIMATORS[name].strict != "prefix":
        options.pop("strict", None)
    return mask, options


def defined(name: str, dtype: torch.dtype = torch.float64, **form: Any) -> Tensor:
    mask, options = mask_for(form)
    options = OPTIONS | {"estimator": name, "bases": bases_for(name)} | options
    return reference.attention(*inputs(dtype), mask, **options)


def on_cpu(name: str, fused: bool, **form: Any) -> Tensor:
    (q, k, v), (mask, options) = inputs(), lowered(name, form)
    options = OPTIONS | {"estimator": name, "bases": bases_for(name)} | options
    out = torch.full((1, 2, 50, 24), torch.nan)
    cpu.run(call_of(q, k, v, mask, out=out, **options), fused=fused)
    return out


def by_the_fused_kernel(name: str, **form: Any) -> Tensor:
    require_kernel()
    return on_cpu(name, fused=True, **form)


def by_the_op(name: str, **form: Any) -> Tensor:
    mask, options = mask_for(form)
    bases = bases_for(name) or ()
    got: Tensor = OP(*inputs(), mask, *bases, estimator=name, **OPTIONS | options)
    return got


def by_kernels(name: str, **form: Any) -> Tensor:
    """As the op does where there are kernels; interpreted without a GPU."""
    q, k, v = (t.to(DEVICE) for t in inputs())
    mask, options = lowered(name, form)
    mask = None if mask is None else mask.to(DEVICE)
    out = torch.full((1, 2, 50, 24), torch.nan, device=DEVICE)
    if (bases := bases_for(name)) is not None:
        module = arithmetic(name, "gpu", "prologue")
        A, B = (t.to(DEVICE) for t in bases)
        asked = Asked(name, RANK, q.shape[2], bases=(A, B))
        q, k = module.prologue(q, k, mask, asked).factors(q, k)
    return walked(q, k, v, mask, out=out, estimator=name, **OPTIONS | options).cpu()


IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {
    "definition": partial(defined, dtype=torch.float32),
    "products": partial(on_cpu, fused=False),
    "fused": by_the_fused_kernel,
    "op": by_the_op,
    "triton": by_kernels,
}


def forms() -> Iterator[Any]:
    """Every row, plainly and in each form that it takes."""
    generator = torch.Generator().manual_seed(2)
    mask = torch.rand(1, 1, 50, 40, generator=generator) > 0.2
    causal = {"is_causal": True, "causal_offset": 3}
    for name, row in ESTIMATORS.items():
        yield pytest.param(name, {}, id=name)
        yield pytest.param(name, causal | {"mask": mask}, id=f"{name}, causal, mask")
        for rounds in row.rounds[1:]:
            yield pytest.param(name, {"rounds": rounds}, id=f"{name}, {rounds} rounds")
        if row.strict != "never":
            yield pytest.param(name, causal | {"strict": True}, id=f"{name}, strict")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("name", "form"), [*forms()])
def test_every_implementation_gives_the_definition(
    name: str, form: dict[str, Any], implementation: str
) -> None:
    got = IMPLEMENTATIONS[implementation](name, **form)
    torch.testing.assert_close(got.double(), defined(name, **form), rtol=1e-5, atol=1e-5)


ROLES: dict[Implementation, tuple[str, tuple[str, ...]]] = {
    "definition": ("reference", ("factors",)),
    "cpu": ("cpu", ("elements", "counted", "bases", "groups")),
    "gpu": ("launch", ("prologue",)),
}
"""The file of each role in the folder of an estimator, and its functions."""


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_role_has_one_file_and_one_signature_in_every_folder(
    name: str, role: Implementation
) -> None:
    file, functions = ROLES[role]
    module = arithmetic(name, role, *functions)
    folder = module.__name__.split(".")[-2]
    assert module.__name__ == f"distr_compile.kernels.{folder}.{file}"
    assert {getattr(ESTIMATORS[name], other).split(".")[-2] for other in ROLES} == {folder}
    model = arithmetic("lsh-mean", role)
    for function in functions:
        got, wanted = (inspect.signature(getattr(m, function)) for m in (module, model))
        assert got == wanted, function
        assert f"``{function}" in (roles.__doc__ or ""), function


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_arithmetic_of_a_row_is_its_own(name: str) -> None:
    """A thousand times the tolerance of the test above from any other row's."""
    own = defined(name)
    for other in ESTIMATORS:
        if other != name:
            assert (own - defined(other)).abs().max() > 1e-2, other


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_documents_have_every_row(name: str) -> None:
    for document in ("policy.md", "estimators.md"):
        text = (Path(__file__).parents[1] / "docs" / document).read_text(encoding="utf-8")
        assert re.search(rf"^\| `{name}` \|", text, re.MULTILINE), document


FAULTY: dict[str, dict[str, str]] = {
    "names no module": {"definition": "", "cpu": "", "gpu": ""},
    "is a copy under a new name": {},
    "names what is no module": dict.fromkeys(("definition", "cpu", "gpu"), "distr_compile.gone"),
}


@pytest.fixture
def toy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Estimator:
    """A row that nothing computes, the default's under another name but for what is faulty."""
    row = replace(ESTIMATORS["projection"], name="toy", **FAULTY[request.param])
    monkeypatch.setitem(ESTIMATORS, "toy", row)
    return row


def on_fakes() -> Tensor:
    with FakeTensorMode() as mode:
        q, k, v = (mode.from_tensor(t) for t in inputs())
        result: Tensor = OP(q, k, v, estimator="toy", **OPTIONS)
        return result


CALLS: dict[str, tuple[str, Callable[[], object]]] = {
    "definition": ("definition", lambda: defined("toy")),
    "op": ("cpu", lambda: OP(*inputs(), estimator="toy", **OPTIONS)),
    "op, short": ("cpu", lambda: OP(*inputs(), estimator="toy", **OPTIONS, min_seq_len=99)),
    "op, tracing": ("cpu", on_fakes),
    "products": ("cpu", lambda: on_cpu("toy", fused=False)),
    "fused": ("cpu", lambda: on_cpu("toy", fused=True)),
    "kernels": ("gpu", lambda: by_kernels("toy")),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("toy", FAULTY, indirect=True)
def test_a_row_without_arithmetic_raises(toy: Estimator, call: str) -> None:
    implementation, run = CALLS[call]
    with pytest.raises(NoArithmeticError) as raised:
        run()
    message = str(raised.value)
    assert message.startswith("estimator: got 'toy', a row of ESTIMATORS without arithmetic here: ")
    assert repr(implementation) in message
    assert f"accepted: {', '.join(name for name in ESTIMATORS if name != 'toy')};" in message
    assert message.endswith("or write the module and name it in the row, as docs/extending.md says")


@pytest.mark.parametrize("toy", ["names no module"], indirect=True)
def test_with_kernels_no_other_device_steps_in(
    toy: Estimator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exact attention is for kernels that fail, and not for kernels that nobody wrote."""
    monkeypatch.setattr(checks, "role", lambda q: "gpu")
    with pytest.raises(NoArithmeticError, match="'gpu'"):
        OP(*inputs(), estimator="toy", **OPTIONS)


@pytest.mark.parametrize("name", ["definition", "products", "triton", "op"])
def test_unknown_names_are_refused(name: str) -> None:
    call = call_of(*inputs(), estimator="toy", **OPTIONS, out=torch.empty(1, 2, 50, 24))
    calls = {
        "definition": lambda: reference.attention(*inputs(), estimator="toy", **OPTIONS),
        "products": lambda: cpu.run(call, fused=False),
        "triton": lambda: cuda.attention(call),
        "op": lambda: OP(*inputs(), estimator="toy", **OPTIONS),
    }
    with pytest.raises(ValueError, match=r"estimator: got 'toy'; must be one of lsh-sample, .*: "):
        calls[name]()
    with pytest.raises(ValueError, match=r"estimator: got 'toy'; must be one of lsh-sample, .*: "):
        auto_grouping_block(100, "toy")


def test_bases_go_to_the_estimator_that_needs_them() -> None:
    A, B = torch.ones(2, 1, 32, RANK)
    with pytest.raises(ValueError, match="bases: got two matrices; with lsh-mean must be None"):
        reference.attention(*inputs(), **OPTIONS, estimator="lsh-mean", bases=(A, B))
    with pytest.raises(ValueError, match="bases: got None; with calibrated must be A and B"):
        reference.attention(*inputs(), **OPTIONS, estimator="calibrated")


def test_bases_that_nothing_makes_are_not_calibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "COMPUTES", ("other",))
    model = torch.nn.Module()
    wanted = calibrate._wanted(model, {"default": {"estimator": "calibrated"}}, None)
    with pytest.raises(NoArithmeticError, match=r"'calibrated', .* 'encoder'; accepted: other;"):
        wanted("encoder")
    assert not calibrate._wanted(model, {"default": {"estimator": "projection"}}, None)("encoder")


def test_a_function_that_a_module_lacks_is_named() -> None:
    with pytest.raises(NoArithmeticError, match=r"calibrated.launch, its 'gpu', has no tables;"):
        arithmetic("calibrated", "gpu", "prologue", "tables")


def test_an_import_that_fails_inside_the_module_is_told_as_it_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    (tmp_path / "toy_room.py").write_text("import no_such_library\n")
    monkeypatch.syspath_prepend(tmp_path)
    row = replace(ESTIMATORS["projection"], name="toy", definition="toy_room")
    monkeypatch.setitem(ESTIMATORS, "toy", row)
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        defined("toy")


def first_columns() -> ModuleType:
    """One module that is the definition, the CPU's and the GPU's of an estimator "toy".

    Qhat and Khat are the first columns of Q and K: A and B are the same part of a unit matrix.
    """
    module = ModuleType("toy_first_columns")

    def factors(Q: Tensor, K: Tensor, mask: Any, asked: Asked) -> list[Block]:
        Qhat = Q[..., : asked.rank].flatten(1, 2)
        return [Block(0, Q.shape[3], Qhat, K[..., : asked.rank])]

    def bases(Q: Tensor, K: Tensor, queries: Any, keys: Any, asked: Any) -> Any:
        A = torch.eye(Q.shape[-1], asked.rank, dtype=K.dtype).repeat(len(Q) * K.shape[1], 1, 1)
        yield A, A

    def prologue(q: Tensor, k: Tensor, mask: Any, asked: Asked) -> Prologue:
        def cut(Q: Tensor, K: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
            blocks = -(-Q.shape[2] // asked.block)
            Khat = K[:, :, None, :, : asked.rank].expand(-1, -1, blocks, -1, -1)
            return Q[..., : asked.rank].contiguous(), Khat.contiguous()

        return Prologue(cut)

    vars(module).update(
        COMPUTES=("toy",), ONE_BLOCK=True, BY_PLACE=False, READS_PANELS=False,
        factors=factors, bases=bases,
        elements=lambda head_dim, rank: 2 * head_dim * rank, counted=lambda *_: (None, None),
        groups=lambda *args: fused_kernel.stacked(bases(*args)), prologue=prologue,
    )  # fmt: skip
    return module


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_row_and_its_modules_are_all_it_takes(
    implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = first_columns()
    monkeypatch.setitem(sys.modules, module.__name__, module)
    places = dict.fromkeys(("definition", "cpu", "gpu"), module.__name__)
    monkeypatch.setitem(
        ESTIMATORS, "toy", replace(ESTIMATORS["lsh-mean"], name="toy", strict="always", **places)
    )
    q, k, v = inputs(torch.float64)
    weights = (0.2 * q[..., :RANK] @ k[..., :RANK].mT).softmax(-1)
    got = IMPLEMENTATIONS[implementation]("toy")
    torch.testing.assert_close(got.double(), weights @ v, rtol=1e-5, atol=1e-5)
