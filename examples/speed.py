"""Is it faster? Whole models on inputs long enough for attention to matter, on this machine.

    python examples/speed.py [vit] [llama] [padded] [encoder] [--rounds 5] [--compiler inductor]

Per model and dtype, in turn in one run: plain ``torch.compile``; ``backend="distr"`` with every
layer exact (``group_size = 1``), so that only kernels differ; and ``backend="distr"`` as it is,
which approximates with G = 2 where that was measured to be faster. Times are medians of a whole
forward pass, the estimator's own work included. What is measured for the first time is measured
before the first pass, at most 2 s a call, and kept. Weights are random: what the last column says
of likeness holds for these weights only.
"""

from __future__ import annotations

import argparse
import operator
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import timm
import torch
import torch.nn.functional as F
import transformers
from tabulate import tabulate
from torch import Tensor, nn

import distr_compile
from distr_compile.kernels.attention.cpu import unavailable_reason

EXACT = {"default": {"group_size": 1}}


@dataclass(frozen=True)
class Subject:
    """A model, one input, and its output as rows of features.

    ``more`` are further arguments, by name.
    """

    title: str
    model: nn.Module
    inputs: Tensor
    rows: Callable[[object], Tensor]
    more: dict[str, Tensor] = field(default_factory=dict)


def vit() -> Subject:
    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch16_224", img_size=1024, depth=2, num_classes=0)
    return Subject(
        "timm ViT-S/16 at 1024 px, 2 layers, 4,097 tokens",
        model.eval(),
        torch.randn(1, 3, 1024, 1024),
        lambda out: out,  # type: ignore[arg-type,return-value]
    )


def llama() -> Subject:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=1024,
    )
    return Subject(
        "Llama-type prefill, width 512, heads of 128, 2 layers, 4,096 tokens",
        transformers.LlamaModel(config).eval(),
        torch.randint(1024, (1, 4096)),
        lambda out: out.last_hidden_state[0],  # type: ignore[attr-defined]
    )


def padded() -> Subject:
    """The same with the mask that a tokenizer gives: the text is 4,000 tokens, the rest padding."""
    mask = torch.ones(1, 4096, dtype=torch.long)
    mask[:, 4000:] = 0
    return replace(
        llama(),
        title="The same with an attention_mask, 4,000 tokens and padding",
        rows=lambda out: out.last_hidden_state[0, :4000],  # type: ignore[attr-defined]
        more={"attention_mask": mask},
    )


def encoder() -> Subject:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=2,
        num_attention_heads=6,
        vocab_size=1024,
        max_position_embeddings=2048,
    )
    return Subject(
        "BERT-type encoder, width 384, heads of 64, 2 layers, 2,048 tokens",
        transformers.BertModel(config, add_pooling_layer=False).eval(),
        torch.randint(1024, (1, 2048)),
        lambda out: out.last_hidden_state[0],  # type: ignore[attr-defined]
    )


def main(argv: list[str] | None = None) -> None:
    subjects = {"vit": vit, "llama": llama, "padded": padded, "encoder": encoder}
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
    headers = ["model", "dtype", "torch.compile", "distr, exact", "distr", "approximated", "cosine"]
    columns = [18, None, None, None, None, None, None]
    table = tabulate(lines, headers, disable_numparse=True, maxcolwidths=columns)
    print(f"\n{table}\n\nIn brackets: speed over plain torch.compile, median of the rounds.")


@torch.no_grad()
def measure(subject: Subject, dtype: torch.dtype, rounds: int, compiler: str) -> list[str]:
    model = subject.model.to(dtype)
    inputs = subject.inputs.to(dtype) if subject.inputs.is_floating_point() else subject.inputs
    torch.compiler.reset()
    exact, ours = {"policy": EXACT, "compiler": compiler}, {"compiler": compiler}
    arms = {
        "plain": torch.compile(model, backend=compiler),
        "exact": torch.compile(model, backend="distr", options=exact),
        "distr": torch.compile(model, backend="distr", options=ours),
    }
    outputs = {name: subject.rows(run(inputs, **subject.more)) for name, run in arms.items()}
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):  # in turn, so that a busy machine slows all
        for name, run in arms.items():
            start = time.perf_counter()
            run(inputs, **subject.more)
            times[name].append(time.perf_counter() - start)
    found = distr_compile.report(arms["distr"])
    pair = (outputs[name].double() for name in ("plain", "distr"))

    def cell(name: str) -> str:
        ratio = statistics.median(map(operator.truediv, times["plain"], times[name]))
        return f"{1e3 * statistics.median(times[name]):.0f} ms ({ratio:.2f}x)"

    return [
        subject.title,
        str(dtype)[6:],
        f"{1e3 * statistics.median(times['plain']):.0f} ms",
        cell("exact"),
        cell("distr"),
        f"{found.distr} of {found.found}",
        f"{F.cosine_similarity(*pair, dim=-1).mean():.4f}",
    ]


if __name__ == "__main__":
    main()
