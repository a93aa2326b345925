"""Table 6: the time to the first token of a Llama, with each attention.

    python -m benchmarks.paper.prefill_time

The paper runs the whole of Llama-3.2-1B on a GPU. Here: its widths (2048, 32 query heads on 8 key
heads of 64, 8192 within the feed-forward part) in two layers up to 2,048 tokens and one beyond,
random weights, a vocabulary of 1,000, one text, fp32, logits of the last token only. Nothing is
extrapolated to more layers; the share of attention says how far it can matter. The model runs as it
is, without Inductor; ours is ``backend="distr"`` over the same operations.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.cpu_kernel import measure
from benchmarks.paper.rivals import RIVALS
from benchmarks.paper.rivals.dropin import replace
from benchmarks.paper.script import NOT_MEASURED, Cells, Script, markdown
from benchmarks.store import MEASURED, Cell
from distr_compile import Policy

LENGTHS, QUICK_LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384), (64, 128)
TWO_LAYERS, THREE_ROUNDS, WHOLE_SCORES = 2048, 4096, 2048
"""The longest texts for two layers, for three rounds, and for N x N scores of all heads at once."""
STANDARD, FLASH = "Attn-Standard", "Flash2"
OURS = {
    "ours, exact": {"group_size": 1, "exact": "auto"},
    "ours, lsh-sample, G=2": {"estimator": "lsh-sample", "group_size": 2},
    "ours, projection, G=2": {"estimator": "projection", "group_size": 2},
    "ours, projection, G=4": {"estimator": "projection", "group_size": 4},
}
ARMS = (FLASH, STANDARD, *RIVALS, *OURS)
PUBLISHED = {
    "Flatten": (0.30, 0.31, 0.32, 0.35),
    "Primal": (0.27, 0.33, 0.41, 0.60),
    "Hydra": (0.18, 0.18, 0.19, 0.20),
    "Hyper": (0.18, 0.18, 0.19, 0.20),
    FLASH: (0.17, 0.17, 0.18, 0.20),
    STANDARD: (0.18, 0.19, 0.20, 0.20),
    "ours": (0.17, 0.17, 0.18, 0.19),
    "ours, with Flash2": (0.17, 0.17, 0.17, 0.17),
}
"""Seconds at 256, 512, 1024 and 2048 tokens."""


def cells(quick: bool) -> Cells:
    lengths = QUICK_LENGTHS if quick else LENGTHS
    return {f"N={n}": partial(cell, n, quick) for n in lengths}


def llama(tokens: int, quick: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1000,
            hidden_size=128 if quick else 2048,
            intermediate_size=256 if quick else 8192,
            num_hidden_layers=2 if tokens <= TWO_LAYERS else 1,
            num_attention_heads=2 if quick else 32,
            num_key_value_heads=1 if quick else 8,
            head_dim=64,
            max_position_embeddings=tokens,
            use_cache=False,
        )
    ).eval()


@torch.inference_mode()
def cell(tokens: int, quick: bool) -> Cell:
    model = llama(tokens, quick)
    ids = torch.randint(1000, (1, tokens), generator=torch.Generator().manual_seed(0))
    calls = {
        name: partial(run, ids, logits_to_keep=1)
        for name, run in models(model, tokens).items()
        if name != STANDARD or tokens <= WHOLE_SCORES
    }
    calls["SDPA alone"] = sdpa(model, tokens)
    times = measure(calls, 3 if tokens <= THREE_ROUNDS else 1, 0.0)
    alone = statistics.median(times.pop("SDPA alone"))
    return {
        "layers": model.config.num_hidden_layers,
        "s": times,
        "share of attention": alone / statistics.median(times[FLASH]),
        "over Flash2": {
            arm: [b / a for a, b in zip(seconds, times[FLASH], strict=True)]
            for arm, seconds in times.items()
        },
    }


def models(model: LlamaForCausalLM, tokens: int) -> dict[str, Callable[..., Any]]:
    """The same model with each attention; all share its weights."""

    def copy() -> LlamaForCausalLM:
        return deepcopy(model, {id(p): p for p in model.parameters()})

    found: dict[str, Callable[..., Any]] = {FLASH: model}
    found[STANDARD] = copy()
    found[STANDARD].set_attn_implementation("eager")  # type: ignore[attr-defined]
    for name, make in RIVALS.items():
        found[name] = copy()
        replace(found[name], make)  # type: ignore[arg-type]
    torch._dynamo.reset()
    for name, fields in OURS.items():
        policy = Policy(default={"min_seq_len": 0, **fields})
        options = {"policy": policy, "compiler": "eager"}
        found[name] = torch.compile(model, backend="distr", options=options)
    return found


def sdpa(model: LlamaForCausalLM, tokens: int) -> Callable[[], None]:
    """The attention of all layers and nothing else."""
    config: Any = model.config
    q, k, v = (
        torch.randn(1, tokens, heads, config.head_dim).transpose(1, 2)
        for heads in (config.num_attention_heads, *[config.num_key_value_heads] * 2)
    )

    def run() -> None:
        for _ in range(config.num_hidden_layers):
            F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return run


def table(found: dict[str, Cell]) -> str:
    """Seconds; in brackets how many times as fast as SDPA, the median of the rounds."""
    rows: list[list[object]] = []
    for name, seconds in PUBLISHED.items():
        rows.append([f"paper, {name}", *(f"{s:.2f}" for s in seconds)])
    for row in rows:
        row += [""] * (len(LENGTHS) + 1 - len(row))
    of = [found.get(f"N={n}") for n in LENGTHS]
    rows.append(["layers here", *(_text(c, "layers", "d") for c in of)])
    rows.append(["share of attention", *(_text(c, "share of attention", ".1%") for c in of)])
    for arm in ARMS:
        rows.append([arm, *(_time(c, arm) for c in of)])
    rows.append(["load", *(_text(c, "load", ".1f") for c in of)])
    return markdown(rows, ["attention", *(f"N = {n}" for n in LENGTHS)])


def _text(c: Cell | None, name: str, form: str) -> str:
    return NOT_MEASURED if c is None else f"{c[name]:{form}}"


def _time(c: Cell | None, arm: str) -> str:
    if c is None:
        return NOT_MEASURED
    if arm not in c["s"]:
        return "-"
    seconds, ratio = (statistics.median(c[x][arm]) for x in ("s", "over Flash2"))
    return f"{seconds:.2f} ({ratio:.2f})"


SCRIPT = Script(
    "prefill_time",
    "Table 6: seconds to the first token (in brackets: speed over SDPA)",
    cells,
    table,
    (*MEASURED, "benchmarks/paper/rivals"),
    ("transformers",),
)

if __name__ == "__main__":
    SCRIPT.main()
