"""One attention on a CPU by each of those who are compared: calls that are ready to be timed.

Besides PyTorch's own it asks ONNX Runtime for its ``MultiHeadAttention`` and OpenVINO for its
``scaled_dot_product_attention`` (``pip install onnx onnxruntime openvino``; neither is needed). An
arm gets its inputs in the layout that it takes without a copy: ours, PyTorch's and ONNX Runtime's
tokens before heads, as models leave them, OpenVINO's heads before tokens. Outputs of ours, of ONNX
Runtime and of OpenVINO lie in memory that is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.arms import Inputs, Sample, samples
from benchmarks.cells import Cell
from distr_compile.estimators import auto_grouping_block
from distr_compile.kernels.attention import reference
from distr_compile.lowering import cpu as lowering
from distr_compile.lowering.call import call_of


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


def exact_samples(cell: Cell, inputs: Inputs) -> Iterator[Sample]:
    """What exact attention should give, on a few rows; at rank d all estimators are exact."""
    return samples(cell, inputs, cell.head_dim, "lsh-mean")


@dataclass(frozen=True)
class Arm:
    """One way to compute a cell.

    Attributes:
        make: prepares a call; its error says why this peer does not do it here.
        wanted: what the call should give, on a few rows, in fp64.
        takes: whether the cell is one that this arm is for.
    """

    make: Maker
    wanted: Callable[[Cell, Inputs], Iterator[Sample]] = exact_samples
    takes: Callable[[Cell], bool] = lambda cell: True


# --- PyTorch --------------------------------------------------------------------------------------


def _returning(run: Callable[[], Tensor]) -> Call:
    return Call(run, run)


def sdpa(cell: Cell, inputs: Inputs, threads: int) -> Call:
    options = {"is_causal": cell.is_causal, "scale": cell.scale}
    q, k, v, mask = inputs.q, inputs.k, inputs.v, inputs.mask
    return _returning(lambda: F.scaled_dot_product_attention(q, k, v, mask, **options))


def compiled_sdpa(cell: Cell, inputs: Inputs, threads: int) -> Call:
    """SDPA compiled for the shapes of the cell."""
    fast = torch.compile(F.scaled_dot_product_attention, dynamic=False)
    options = {"is_causal": cell.is_causal, "scale": cell.scale}
    q, k, v, mask = inputs.q, inputs.k, inputs.v, inputs.mask
    return _returning(lambda: fast(q, k, v, mask, **options))


def flex(cell: Cell, inputs: Inputs, threads: int) -> Call:
    """FlexAttention compiled for the cell; a mask is a block mask, a bias a change of the score."""
    fast = torch.compile(flex_attention, dynamic=False)
    options: dict[str, Any] = {"scale": cell.scale}
    mask = inputs.mask
    if mask is not None and mask.is_floating_point():
        options["score_mod"] = lambda score, b, h, i, j: score + mask[b, h, i, j]
    elif mask is not None or cell.is_causal:
        sees = _causal if mask is None else lambda b, h, i, j: mask[b, 0, 0, j]
        sizes = (cell.batch, None, cell.tokens, cell.tokens)
        options["block_mask"] = create_block_mask(sees, *sizes, device="cpu")
    q, k, v = inputs.q, inputs.k, inputs.v
    return _returning(lambda: fast(q, k, v, **options))


def _causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return i >= j


# --- ours -----------------------------------------------------------------------------------------


def _output_like(q: Tensor) -> Tensor:
    """Room for the output, tokens before heads in memory."""
    return torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(
        1, 2
    )


def _ours(cell: Cell, inputs: Inputs, **options: Any) -> Call:
    """A call by the fused kernel, which must be there: nothing else has the names of these arms."""
    out = _output_like(inputs.q)
    options |= {"scale": cell.scale, "is_causal": cell.is_causal, "out": out}
    call = call_of(inputs.q, inputs.k, inputs.v, inputs.mask, **options)

    def run() -> Tensor:
        lowering.run(call, fused=True)
        return out

    return _returning(run)


def rank_d(cell: Cell, inputs: Inputs, threads: int) -> Call:
    return _ours(cell, inputs)


def estimated(estimator: str, group_size: int, *, strict: bool = False) -> Arm:
    """The whole call of an estimator, what makes its factors included."""

    def make(cell: Cell, inputs: Inputs, threads: int) -> Call:
        rank = cell.head_dim // group_size
        bases = _bases(cell, group_size) if estimator == "calibrated" else None
        return _ours(cell, inputs, rank=rank, estimator=estimator, strict=strict, bases=bases)

    def wanted(cell: Cell, inputs: Inputs) -> Iterator[Sample]:
        rank = cell.head_dim // group_size
        if estimator == "calibrated":
            A, B = (basis.double() for basis in _bases(cell, group_size))
            narrow = Inputs(inputs.q.double() @ A, inputs.k.double() @ B, inputs.v, inputs.mask)
            return samples(replace(cell, head_dim=rank), narrow, rank, estimator)
        if strict:
            return _strict_samples(cell, inputs, rank, estimator)
        return samples(cell, inputs, rank, estimator)

    def takes(cell: Cell) -> bool:
        is_wide = cell.head_dim // group_size >= 16 and cell.head_dim % group_size == 0
        return is_wide and (cell.is_causal or not strict)

    return Arm(make, wanted, takes)


def _bases(cell: Cell, group_size: int) -> tuple[Tensor, Tensor]:
    """Some bases: their numbers do not change the time."""
    generator = torch.Generator().manual_seed(group_size)
    shape = (cell.key_heads, cell.head_dim, cell.head_dim // group_size)
    A, B = (torch.randn(shape, generator=generator) * cell.head_dim**-0.5 for _ in range(2))
    return A, B


def _strict_samples(cell: Cell, inputs: Inputs, rank: int, estimator: str) -> Iterator[Sample]:
    """Rows of the last block of the last head, which sees most of the approximation.

    Keys before the block are scored by Qhat and Khat, the others exactly: one product of both side
    by side, with zeros where the other one counts.
    """
    block = auto_grouping_block(cell.tokens, estimator, strict=True)
    head = slice(cell.heads - 1, cell.heads)
    Q, K, V = (t[:, head].double() for t in (inputs.q, inputs.k, inputs.v))
    last = reference.estimate(
        Q,
        K,
        rank=rank,
        estimator=estimator,
        grouping_block=block,
        is_causal=True,
        strict=True,
    )[-1]
    rows = torch.linspace(last.start, cell.tokens - 1, 4).long()
    before = last.Khat.shape[2]
    Khat = torch.cat(
        [
            F.pad(last.Khat, (0, cell.head_dim)),
            F.pad(K[:, :, before:], (rank, 0)),
        ],
        dim=2,
    )
    Qhat = torch.cat([last.Qhat[:, :, rows - last.start], Q[:, :, rows]], dim=3)
    mask = torch.arange(cell.tokens) <= rows[:, None]
    yield Sample(0, cell.heads - 1, rows, Qhat, Khat, V, mask, 2.0**-11)


# --- other runtimes -------------------------------------------------------------------------------
def onnx_runtime(cell: Cell, inputs: Inputs, threads: int) -> Call:
    """``com.microsoft.MultiHeadAttention``, which takes ``(B, N, H d)`` and splits heads itself."""
    import onnxruntime
    from onnx import TensorProto, helper

    shape = [cell.batch, cell.tokens, cell.heads * cell.head_dim]
    element = {"float32": TensorProto.FLOAT, "bfloat16": TensorProto.BFLOAT16}[cell.dtype]
    names, domain = ["query", "key", "value"], "com.microsoft"
    kept = {
        name: t.transpose(1, 2).reshape(shape)
        for name, t in zip(names, (inputs.q, inputs.k, inputs.v), strict=True)
    }
    taken = {name: helper.make_tensor_value_info(name, element, shape) for name in names}
    mask = inputs.mask
    if mask is not None and mask.is_floating_point():
        names += ["", "", "attention_bias"]  # a bias of the projections, a padding mask: none
        kept["attention_bias"] = mask.contiguous()
        taken["attention_bias"] = helper.make_tensor_value_info(
            "attention_bias", element, list(mask.shape)
        )
    elif mask is not None:
        names += ["", "key_padding_mask"]
        kept["key_padding_mask"] = mask[:, 0, 0].int()
        taken["key_padding_mask"] = helper.make_tensor_value_info(
            "key_padding_mask", TensorProto.INT32, [cell.batch, cell.tokens]
        )
    graph = helper.make_graph(
        [
            helper.make_node(
                "MultiHeadAttention",
                names,
                ["output"],
                domain=domain,
                num_heads=cell.heads,
                scale=cell.scale,
                unidirectional=int(cell.is_causal),
            )
        ],
        "attention",
        list(taken.values()),
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
    for name, t in kept.items():
        binding.bind_ortvalue_input(name, value(t.numpy()))
    binding.bind_ortvalue_output("output", value(out.numpy()))
    heads = (cell.heads, cell.head_dim)
    return Call(
        lambda: session.run_with_iobinding(binding),
        lambda: out.unflatten(2, heads).transpose(1, 2),
        list(kept.values()),
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
    kinds, kept = [element] * 3, [t.contiguous() for t in (inputs.q, inputs.k, inputs.v)]
    if inputs.mask is not None:
        kinds.append(element if inputs.mask.is_floating_point() else ov.Type.boolean)
        kept.append(inputs.mask.contiguous())
        parameters.append(opset13.parameter(list(inputs.mask.shape), kinds[-1]))
    node = opset13.scaled_dot_product_attention(*parameters, causal=cell.is_causal)
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
    for i, (t, kind) in enumerate(zip(kept, kinds, strict=True)):
        request.set_input_tensor(i, _openvino_tensor(t, kind))
    request.set_output_tensor(_openvino_tensor(out, element))
    return Call(lambda: request.infer(share_outputs=True), lambda: out, kept)


def _openvino_tensor(t: Tensor, element: Any) -> Any:
    """The same memory as OpenVINO sees it; numpy, which is in between, has no bf16."""
    import openvino as ov

    return ov.Tensor(t.view(torch.uint8).numpy(), list(t.shape), element)


SDPA = "SDPA"
RUNTIMES = ("ONNX Runtime", "OpenVINO")
RANK_D = "rank d"

ARMS = {
    SDPA: Arm(sdpa),
    "compiled SDPA": Arm(compiled_sdpa),
    "FlexAttention": Arm(flex),
    "ONNX Runtime": Arm(onnx_runtime),
    "OpenVINO": Arm(openvino),
    RANK_D: Arm(rank_d),
    "projection G=2": estimated("projection", 2),
    "projection G=4": estimated("projection", 4),
    "strict projection G=2": estimated("projection", 2, strict=True),
    "calibrated G=2": estimated("calibrated", 2),
    "lsh-mean G=2": estimated("lsh-mean", 2),
    "lsh-sample G=2": estimated("lsh-sample", 2),
}
