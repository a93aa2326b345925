"""Attention on a CPU by what people turn to for it, beside ours: whole calls, in turn in one run.

    python -m benchmarks.peers [--threads 1] [--rounds 7] [--seconds 0.2] [--json PATH]
        [--dtypes float32 bfloat16] [--widths 64 128] [--tokens 512 1024 4096]

Besides PyTorch's own it asks ONNX Runtime for its ``MultiHeadAttention`` and OpenVINO for its
``scaled_dot_product_attention`` (``pip install onnx onnxruntime openvino``; neither is needed). A
peer that is not there, refuses, or errs too much is written down with the reason. With ``--json`` a
cell that the file has of the same machine, versions and settings is not measured again.

The output of an arm is checked before it is timed, on eight rows against the definition in fp64: it
may err by ``FACTOR`` times what the same formula errs in the dtype of the inputs, and a
rounding (``arms.errors``). An arm gets its inputs in the layout that it takes without a copy: ours,
PyTorch's and ONNX Runtime's tokens before heads, as models leave them, OpenVINO's heads before
tokens. Outputs of ours, of ONNX Runtime and of OpenVINO lie in memory that is kept.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from benchmarks import cpu_kernel
from benchmarks.arms import Inputs, errors, make_inputs, samples
from benchmarks.cells import Cell
from benchmarks.store import MEASURED, ROOT, Store, describe, version
from distr_compile.kernels.attention import cpu
from distr_compile.lowering import cpu as lowering
from distr_compile.lowering import cpu_fused

HEADS = {512: 8, 1024: 8, 4096: 2}
"""Query heads by tokens, so that no call takes longer than a sample should."""

DTYPES = list(cpu_kernel.DTYPES)

PACKAGES = ("torch", "onnx", "onnxruntime", "openvino", "numpy")

FACTOR = 8
"""An arm may err by this times the error of the same formula in the dtype of the inputs.

More than ``arms.FACTOR``, since libraries differ in how many numbers they add up one after another:
FlexAttention's fp32 sums erred by six times as much at 4096 tokens.
"""

SOURCES = (
    *MEASURED,
    *sorted(
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "distr_compile/kernels/attention").iterdir()
        if path.suffix in (".cpp", ".h")
    ),
)
"""What a result of ours depends on."""


@dataclass(frozen=True)
class Call:
    """A call that is ready to be timed.

    Attributes:
        run: computes the output, and may return anything.
        output: what ``run`` left, ``(1, H, N, d)``.
        keeps: memory that ``run`` reads and does not own.
    """

    run: Callable[[], object]
    output: Callable[[], Tensor]
    keeps: list[Tensor] = field(default_factory=list)


Maker = Callable[[Cell, Inputs, int], Call]  # cell, inputs, threads


@dataclass(frozen=True)
class Arm:
    """One way to compute a cell.

    Attributes:
        make: prepares a call; its error says why this peer does not do it here.
        group_size: G of ``projection``; 1 is exact.
    """

    make: Maker
    group_size: int = 1


# --- PyTorch, and ours ----------------------------------------------------------------------------


def _returning(run: Callable[[], Tensor]) -> Call:
    return Call(run, run)


def sdpa(cell: Cell, inputs: Inputs, threads: int) -> Call:
    q, k, v = inputs.q, inputs.k, inputs.v
    return _returning(lambda: F.scaled_dot_product_attention(q, k, v, scale=cell.scale))


def compiled(function: Callable[..., Tensor]) -> Maker:
    """A maker of calls of ``function(q, k, v, scale=...)``, compiled for the shapes of the cell."""

    def make(cell: Cell, inputs: Inputs, threads: int) -> Call:
        fast = torch.compile(function, dynamic=False)
        q, k, v = inputs.q, inputs.k, inputs.v
        return _returning(lambda: fast(q, k, v, scale=cell.scale))

    return make


def _output_like(q: Tensor) -> Tensor:
    """Room for the output, tokens before heads in memory."""
    return torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(
        1, 2
    )


def rank_d(cell: Cell, inputs: Inputs, threads: int) -> Call:
    q, k, v = inputs.q, inputs.k, inputs.v
    out = _output_like(q)
    return _returning(lambda: cpu_fused.exact_attention(q, k, v, scale=cell.scale, out=out))


def projection(cell: Cell, inputs: Inputs, threads: int) -> Call:
    q, k, v = inputs.q, inputs.k, inputs.v
    out, rank = _output_like(q), cell.head_dim // 2
    return _returning(
        lambda: lowering.attention(
            q, k, v, scale=cell.scale, rank=rank, estimator="projection", out=out
        )
    )


# --- other runtimes -------------------------------------------------------------------------------


def onnx_runtime(cell: Cell, inputs: Inputs, threads: int) -> Call:
    """``com.microsoft.MultiHeadAttention``, which takes ``(B, N, H d)`` and splits heads itself."""
    import onnxruntime
    from onnx import TensorProto, helper

    shape = [cell.batch, cell.tokens, cell.heads * cell.head_dim]
    element = {"float32": TensorProto.FLOAT, "bfloat16": TensorProto.BFLOAT16}[cell.dtype]
    names, domain = ["query", "key", "value"], "com.microsoft"
    graph = helper.make_graph(
        [
            helper.make_node(
                "MultiHeadAttention",
                names,
                ["output"],
                domain=domain,
                num_heads=cell.heads,
                scale=cell.scale,
            )
        ],
        "attention",
        [helper.make_tensor_value_info(name, element, shape) for name in names],
        [helper.make_tensor_value_info("output", element, shape)],
    )
    versions = [helper.make_opsetid("", 17), helper.make_opsetid(domain, 1)]
    model = helper.make_model(graph, opset_imports=versions, ir_version=10)

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Workers that spin while they wait would slow every other arm.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    value = onnxruntime.OrtValue.ortvalue_from_numpy  # shares memory
    binding, out = session.io_binding(), torch.empty(shape, dtype=inputs.q.dtype)
    kept = [t.transpose(1, 2).reshape(shape) for t in (inputs.q, inputs.k, inputs.v)]
    for name, t in zip(names, kept, strict=True):
        binding.bind_ortvalue_input(name, value(t.numpy()))
    binding.bind_ortvalue_output("output", value(out.numpy()))
    heads = (cell.heads, cell.head_dim)
    return Call(
        lambda: session.run_with_iobinding(binding),
        lambda: out.unflatten(2, heads).transpose(1, 2),
        kept,
    )


def openvino(cell: Cell, inputs: Inputs, threads: int) -> Call:
    """``scaled_dot_product_attention`` of opset 13 for fixed sizes, in the dtype of the inputs."""
    import openvino as ov
    from openvino import opset13

    core, name = ov.Core(), {"float32": "FP32", "bfloat16": "BF16"}[cell.dtype]
    offered = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if name not in offered:
        raise NotImplementedError(f"on this CPU it offers {', '.join(offered)}, not {name}")
    element = {"float32": ov.Type.f32, "bfloat16": ov.Type.bf16}[cell.dtype]
    shape = [cell.batch, cell.heads, cell.tokens, cell.head_dim]
    parameters = [opset13.parameter(shape, element) for _ in range(3)]
    node = opset13.scaled_dot_product_attention(*parameters, causal=False)
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        # One request at a time by one stream of all threads, whose workers (TBB's) sleep between
        # requests. Pinned ones would not make way for other work on their core.
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        "ENABLE_CPU_PINNING": False,
        "INFERENCE_PRECISION_HINT": element,
    }
    request = core.compile_model(ov.Model([node], parameters), "CPU", settings)
    request = request.create_infer_request()
    out = torch.empty(shape, dtype=inputs.q.dtype)
    kept = [t.contiguous() for t in (inputs.q, inputs.k, inputs.v)]
    for i, t in enumerate(kept):
        request.set_input_tensor(i, _openvino_tensor(t, element))
    request.set_output_tensor(_openvino_tensor(out, element))
    return Call(lambda: request.infer(share_outputs=True), lambda: out, kept)


def _openvino_tensor(t: Tensor, element: Any) -> Any:
    """The same memory as OpenVINO sees it; numpy, which is in between, has no bf16."""
    import openvino as ov

    return ov.Tensor(t.view(torch.uint8).numpy(), list(t.shape), element)


SDPA = "SDPA"
RUNTIMES = ("ONNX Runtime", "OpenVINO")
OURS = ("rank d", "projection G=2")

ARMS = {
    SDPA: Arm(sdpa),
    "compiled SDPA": Arm(compiled(F.scaled_dot_product_attention)),
    "FlexAttention": Arm(compiled(flex_attention)),
    "ONNX Runtime": Arm(onnx_runtime),
    "OpenVINO": Arm(openvino),
    "rank d": Arm(rank_d),
    "projection G=2": Arm(projection, group_size=2),
}


# --- measuring ------------------------------------------------------------------------------------


def checked(arm: Arm, cell: Cell, inputs: Inputs, threads: int) -> tuple[Call | None, Any]:
    """A call whose output is right, with its error; or None, with the reason."""
    try:
        call = arm.make(cell, inputs, threads)
        call.run()
        rank = cell.head_dim // arm.group_size
        wanted = samples(cell, inputs, rank, "projection")
        found = errors(wanted, call.output(), scale=cell.scale, factor=FACTOR)
    except ModuleNotFoundError as error:
        return None, {"reason": f"not installed: {error.name}"}
    except Exception as error:
        text = str(error).strip().partition("\n")[0]
        return None, {"reason": f"{type(error).__name__}: {text}"}
    if not found["is_right"]:
        error, allowed = found["max_error"], found["allowed_error"]
        return None, {"reason": f"errs by {error:.2g}, at most {allowed:.2g} is allowed"}
    return call, {name: found[name] for name in ("max_error", "allowed_error")}


def measure(
    cell: Cell, threads: int, rounds: int, least_s: float, arms: dict[str, Arm] = ARMS
) -> dict[str, Any]:
    """All arms of a cell: error and milliseconds of every round, or the reason for none."""
    torch._dynamo.reset()  # after a few shapes it would compile for any, or no more
    inputs = make_inputs(cell, "cpu")
    before = os.getloadavg()[0]
    found = {name: checked(arm, cell, inputs, threads) for name, arm in arms.items()}
    calls = {name: call.run for name, (call, _) in found.items() if call is not None}
    told = {name: facts for name, (_, facts) in found.items()}
    for name, seconds in cpu_kernel.measure(calls, rounds, least_s).items():
        told[name]["ms"] = [1e3 * s for s in seconds]
    return {
        "dtype": cell.dtype,
        "head_dim": cell.head_dim,
        "tokens": cell.tokens,
        "heads": cell.heads,
        "date": time.strftime("%Y-%m-%d"),
        "load": [before, os.getloadavg()[0]],
        "arms": told,
    }


def environment(threads: int, rounds: int, least_s: float) -> dict[str, str]:
    """What the results depend on: machine, versions, our sources, settings."""
    machine = cpu_kernel.machine(threads)
    del machine["date"]  # a cell has its own
    sources = describe("cpu", SOURCES)
    return {
        **{name: " ".join(v) if isinstance(v, list) else str(v) for name, v in machine.items()},
        **{package: version(package) for package in PACKAGES},
        "kernel": cpu.unavailable_reason() or "available",
        "sampling": f"{rounds} rounds of {least_s} s",
        "sources": sources["sources"],
        "commit": sources["commit"],
    }


# --- what is made of it ---------------------------------------------------------------------------


def times(cell: dict[str, Any]) -> dict[str, list[float]]:
    """The samples of the arms that have any."""
    return {name: arm["ms"] for name, arm in cell["arms"].items() if "ms" in arm}


def better_runtime(cell: dict[str, Any]) -> str | None:
    """Which of ONNX Runtime and OpenVINO has the lower median here."""
    measured = times(cell)
    return min(
        (name for name in RUNTIMES if name in measured),
        key=lambda name: statistics.median(measured[name]),
        default=None,
    )


def speed(cell: dict[str, Any], arm: str, over: str | None) -> float | None:
    """Median over rounds of how many times as fast ``arm`` is; None where one was not measured."""
    measured = times(cell)
    if over is None or not {arm, over} <= measured.keys():
        return None
    return cpu_kernel.ratio(measured, arm, over)


def table(cells: list[dict[str, Any]]) -> str:
    """A row a cell: speed over SDPA, then ours over the better of the two other runtimes."""
    names = [name for name in ARMS if name != SDPA]
    rows = []
    for cell in cells:
        better = better_runtime(cell)
        ratios = [speed(cell, name, SDPA) for name in names]
        ratios += [speed(cell, name, better) for name in OURS]
        shape = [cell["dtype"], cell["head_dim"], cell["tokens"]]
        rows.append([*shape, *("-" if r is None else f"{r:.2f}" for r in ratios), better or "-"])
    header = ["dtype", "d", "N", *names, *(f"{name} / runtime" for name in OURS), "runtime"]
    return tabulate(rows, header, tablefmt="github", disable_numparse=True)


def refusals(cells: list[dict[str, Any]]) -> list[str]:
    """A line for every reason why an arm has no time, with the cells that it holds for."""
    where: dict[tuple[str, str], list[str]] = {}
    for cell in cells:
        for name, arm in cell["arms"].items():
            if "reason" in arm:
                shape = f"{cell['dtype']} d={cell['head_dim']} N={cell['tokens']}"
                where.setdefault((name, arm["reason"]), []).append(shape)
    return [f"{name}: {reason} ({', '.join(at)})" for (name, reason), at in where.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description="attention on a CPU: others beside ours")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.2, help="least length of a sample")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--tokens", type=int, nargs="+", choices=HEADS, default=list(HEADS))
    parser.add_argument("--json", type=Path, help="results, to be written or gone on with")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    told = environment(args.threads, args.rounds, args.seconds)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        store = Store(args.json or Path(folder) / "peers.json", told)
        shown = []
        for dtype, d, tokens in itertools.product(args.dtypes, args.widths, args.tokens):
            cell = Cell(1, HEADS[tokens], HEADS[tokens], tokens, d, dtype)
            if not store.is_finished(cell.key):
                store.put(cell.key, measure(cell, args.threads, args.rounds, args.seconds))
            shown.append(store.cells[cell.key])
            print(cell.key, "load", *shown[-1]["load"], flush=True)
    print(table(shown), *refusals(shown), sep="\n")


if __name__ == "__main__":
    main()
