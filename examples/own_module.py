"""Attention written by hand, graph breaks between layers, and a policy read from a file.

python examples/own_module.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import distr_compile

POLICY = """
[default]
group_size = 2
min_seq_len = 0          # approximate at any length: this is a demonstration on a CPU

[[rule]]
layers = "layers.2"      # the name in model.named_modules()
group_size = 1           # stays exact
"""


class Attention(nn.Module):
    """Scores, softmax and values as anyone might write them; no name here means anything to us."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.project = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, tokens, width)`` in and out."""
        q, k, v = self.project(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / q.shape[-1] ** 0.5
        mixed = scores.softmax(dim=-1) @ v
        return x + self.out(mixed.transpose(1, 2).flatten(2))


class Model(nn.Module):
    """Four of them in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention(128, heads=2) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, tokens, width)`` in and out."""
        for layer in self.layers:
            x = layer(x)
            torch._dynamo.graph_break()  # each layer becomes a graph of its own, and keeps its name
        return x


@torch.no_grad()
def main(compiler: str = "inductor") -> None:
    torch.manual_seed(0)
    model = Model().eval()
    x = torch.randn(2, 96, 128)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "distr.toml"
        path.write_text(POLICY)
        options = {"policy": path, "compiler": compiler}
        compiled = torch.compile(model, backend="distr", options=options)
        y = compiled(x)
    print(distr_compile.report(compiled))

    exact = model(x)
    print(f"\nrelative difference to the exact model: {(y - exact).norm() / exact.norm():.4f}")


if __name__ == "__main__":
    main()
