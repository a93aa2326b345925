"""The calibrated estimator on texts it was not calibrated on, beside the estimators without data.

    python -m benchmarks.calibrated_minilm

MiniLM with its trained weights, all layers, G = 2: bases from 64 pieces of documentation of
Python's standard library, measured on 64 others. Prints the mean cosine of the sentence embeddings
to the exact model's, and Spearman's correlation of all pairwise similarities.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

import distr_compile
from benchmarks.error_models import cosine, similarities, spearman
from examples import demo

TEXTS = 64


@torch.no_grad()
def main() -> None:
    subject = demo.minilm(2 * TEXTS)
    model, texts = subject.model, torch.cat(subject.batches)
    known, unknown = texts[0::2], texts[1::2]  # each module's documentation is in both halves
    print(f"calibrated on {len(known)} texts, measured on {len(unknown)} others")

    def embeddings(run: Any) -> torch.Tensor:
        return torch.cat([subject.output(run(part)) for part in unknown.split(16)])

    exact = embeddings(model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bases.safetensors"
        batches = [(part,) for part in known.split(16)]
        bases = distr_compile.calibrate(model, batches, path=path, progress=False)
        for estimator in ("calibrated", "projection", "lsh-mean"):
            policy: dict[str, Any] = {"default": {"estimator": estimator, "min_seq_len": 0}}
            if estimator == "calibrated":
                policy["bases"] = {"file": str(path), "sha256": bases.sha256}
            torch.compiler.reset()
            options = {"policy": policy, "compiler": "eager"}
            got = embeddings(torch.compile(model, backend="distr", options=options))
            rho = spearman(similarities(got), similarities(exact))
            print(f"{estimator:12} cosine {cosine(got, exact):.4f}, rank correlation {rho:.4f}")


if __name__ == "__main__":
    main()
