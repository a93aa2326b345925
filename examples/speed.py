"""Is it faster? Whole models on inputs long enough for attention to matter, on this machine.

    python examples/speed.py [vit] [llama] [--rounds 5] [--compiler inductor]

Per model and dtype, in turn in one run: plain ``torch.compile``, and ``backend="distr"`` with
G = 2 in every layer (``projection``, the default estimator; ``min_seq_len = 0`` approximates at
any length). Times are medians of a whole forward pass, the estimator's own work included. Weights
are random: what the last column says of likeness holds for these weights only.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import timm
import torch
import torch.nn.functional as F
import transformers
from tabulate import tabulate
from torch import Tensor, nn

from distr_compile.kernels.attention.cpu import unavailable_reason

POLICY = {"default": {"group_size": 2, "min_seq_len": 0}}


@dataclass(frozen=True)
class Subject:
    """A model, one input, and its output as rows of features."""

    title: str
    model: nn.Module
    inputs: Tensor
    rows: Callable[[object], Tensor]


def vit() -> Subject:
    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch16_224", img_size=1024, depth=4, num_classes=0)
    return Subject(
        "timm ViT-S/16 at 1024 px, 4 layers, 4,097 tokens",
        model.eval(),
        torch.randn(1, 3, 1024, 1024),
        lambda out: out,  # type: ignore[arg-type,return-value]
    )


def llama() -> Subject:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=1024,
    )
    return Subject(
        "Llama-type prefill, width 512, heads of 128, 4 layers, 4,096 tokens",
        transformers.LlamaModel(config).eval(),
        torch.randint(1024, (1, 4096)),
        lambda out: out.last_hidden_state[0],  # type: ignore[attr-defined]
    )


def main(argv: list[str] | None = None) -> None:
    subjects = {"vit": vit, "llama": llama}
    parser = argparse.ArgumentParser(description="see the module's docstring")
    parser.add_argument("models", nargs="*", help=f"of {', '.join(subjects)}; all by default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compiler", default="inductor", help="or eager: no compile, slower runs")
    options = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    reason = unavailable_reason()
    kernel = "fused C++ kernel" if reason is None else f"PyTorch products ({reason})"
    print(f"torch {torch.__version__}, {torch.get_num_threads()} CPU threads; {kernel}\n")
    lines = []
    for name in options.models or subjects:
        if name not in subjects:
            parser.error(f"got {name!r}; accepted: {', '.join(subjects)}")
        for dtype in (torch.float32, torch.bfloat16):
            lines.append(measure(subjects[name](), dtype, options.rounds, options.compiler))
            print(f"measured {name} in {str(dtype)[6:]}", flush=True)
    headers = ["model", "dtype", "torch.compile", "distr, G = 2", "speed", "cosine of outputs"]
    print("\n" + tabulate(lines, headers, tablefmt="simple", disable_numparse=True))


@torch.no_grad()
def measure(subject: Subject, dtype: torch.dtype, rounds: int, compiler: str) -> list[str]:
    model = subject.model.to(dtype)
    inputs = subject.inputs.to(dtype) if subject.inputs.is_floating_point() else subject.inputs
    torch.compiler.reset()
    options = {"policy": POLICY, "compiler": compiler}
    arms = {
        "plain": torch.compile(model, backend=compiler),
        "distr": torch.compile(model, backend="distr", options=options),
    }
    outputs = {name: subject.rows(run(inputs)) for name, run in arms.items()}
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):  # in turn, so that a busy machine slows both
        for name, run in arms.items():
            start = time.perf_counter()
            run(inputs)
            times[name].append(time.perf_counter() - start)
    ratios = [a / b for a, b in zip(times["plain"], times["distr"], strict=True)]
    likeness = F.cosine_similarity(*(out.double() for out in outputs.values()), dim=-1).mean()
    return [
        subject.title,
        str(dtype)[6:],
        f"{1e3 * statistics.median(times['plain']):.0f} ms",
        f"{1e3 * statistics.median(times['distr']):.0f} ms",
        f"{statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})",
        f"{likeness:.4f}",
    ]


if __name__ == "__main__":
    main()
