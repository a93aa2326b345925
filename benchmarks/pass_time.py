"""Time of our passes: their share of a whole compile, and how they grow with the graph.

    python benchmarks/pass_time.py [--json PATH] [--sizes 1250 5000 20000]

Share: timm's vit_base_patch16_224 and a Llama of 32 layers (hidden width 256), compiled by Inductor
with all caches off; the whole is the first call less a second one. Growth: rows of plain
transformer layers, traced by Dynamo and rewritten, but compiled by nothing. In both the passes'
time is that spent in ``run_pass``: matching, deciding, rewriting, naming the layers, reporting;
``CPU`` is the processor's, which is what counts on a machine that does other things as well.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from tabulate import tabulate
from torch import Tensor, nn

from distr_compile import backend

POLICY = {"default": {"min_seq_len": 0}}


@dataclass
class Measured:
    """Seconds in our passes, elapsed and of the processor, and the size of their graphs."""

    seconds: float = 0.0
    cpu: float = 0.0
    nodes: int = 0
    sites: int = 0


@dataclass(frozen=True)
class Line:
    """One line of the table; ``percent`` of the whole compile where there is one."""

    name: str
    nodes: int
    sites: int
    pass_s: float
    pass_cpu_s: float
    compile_s: float | None = None
    percent: float | None = None


class Block(nn.Module):
    """A pre-norm transformer layer with its attention spelled out."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(32), nn.LayerNorm(32)
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        """``(1, 16, 32)`` in and out."""
        q, k, v = self.qkv(self.norm1(x)).view(1, 16, 3, 1, 32).permute(2, 0, 3, 1, 4).unbind(0)
        weights = torch.softmax(torch.matmul(q, k.transpose(-2, -1)) / 32**0.5, dim=-1)
        x = x + self.out(torch.matmul(weights, v).transpose(1, 2).reshape(1, 16, 32))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


@contextmanager
def timed_passes() -> Iterator[Measured]:
    """Adds up what ``run_pass`` takes inside this context."""
    measured, run_pass = Measured(), backend.run_pass

    def timed(gm: torch.fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        measured.nodes += len(gm.graph.nodes)
        start, start_cpu = time.perf_counter(), time.thread_time()
        result = run_pass(gm, *args, **kwargs)
        measured.seconds += time.perf_counter() - start
        measured.cpu += time.thread_time() - start_cpu
        measured.sites += len(result.graph.rows)
        return result

    with mock.patch.object(backend, "run_pass", timed):
        yield measured


@torch.no_grad()
def measure(name: str, model: nn.Module, inputs: Tensor, compiler: str) -> Line:
    torch.compiler.reset()
    options = {"policy": POLICY, "compiler": compiler}
    compiled = torch.compile(model.eval(), backend="distr", options=options)
    with timed_passes() as measured, torch._inductor.config.patch(force_disable_caches=True):
        start = time.perf_counter()
        compiled(inputs)
        first = time.perf_counter() - start
    start = time.perf_counter()
    compiled(inputs)
    whole = first - (time.perf_counter() - start)
    line = Line(name, measured.nodes, measured.sites, measured.seconds, measured.cpu)
    if compiler != "inductor":
        return line
    return replace(line, compile_s=whole, percent=100 * measured.seconds / whole)


def share() -> Iterator[Line]:
    import timm
    import transformers

    yield measure(
        "timm vit_base_patch16_224",
        timm.create_model("vit_base_patch16_224"),
        torch.randn(1, 3, 224, 224),
        "inductor",
    )
    config = transformers.LlamaConfig(
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=1024,
    )
    llama = transformers.LlamaForCausalLM(config)
    yield measure("Llama, 32 layers", llama, torch.randint(1024, (1, 128)), "inductor")


def growth(sizes: list[int]) -> Iterator[Line]:
    def stack(count: int) -> Line:
        layers = nn.Sequential(*(Block() for _ in range(count)))
        return measure(f"{count} layers", layers, torch.randn(1, 16, 32), "eager")

    one, two = stack(1), stack(2)
    per_layer = two.nodes - one.nodes
    for size in sizes:
        yield stack(max(1, round(size / per_layer)))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="see the module's docstring")
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1250, 2500, 5000, 10000, 20000])
    parser.add_argument("--no-share", action="store_true", help="growth only")
    options = parser.parse_args(argv)
    machine = {
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    lines = [] if options.no_share else list(share())
    lines += growth(options.sizes)
    header = ["graph", "nodes", "sites", "passes, s", "CPU, s", "compile, s", "passes, %"]
    body = [
        [
            *(x.name, x.nodes, x.sites, f"{x.pass_s:.3f}", f"{x.pass_cpu_s:.3f}"),
            "-" if x.compile_s is None else f"{x.compile_s:.1f}",
            "-" if x.percent is None else f"{x.percent:.2f}",
        ]
        for x in lines
    ]
    print(tabulate(body, headers=header, disable_numparse=True))
    if options.json:
        options.json.write_text(
            json.dumps({**machine, "lines": [asdict(x) for x in lines]}, indent=1)
        )


if __name__ == "__main__":
    main()
