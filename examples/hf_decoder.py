"""A Hugging Face decoder that generates: the prompt is approximated, every decode step is exact.

A decode step has one query row, and there is nothing to group over in it: below 16 rows the op is
never used. The report has one row per attention and compiled graph, so it shows both.

python examples/hf_decoder.py
"""

from __future__ import annotations

import torch
import transformers

import distr_compile


@torch.no_grad()
def main(compiler: str = "inductor") -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
    )
    model = transformers.LlamaForCausalLM(config).eval()  # random weights
    prompt = torch.randint(256, (1, 64))
    request = {
        "attention_mask": torch.ones_like(prompt),
        "max_new_tokens": 8,
        "do_sample": False,
        "pad_token_id": 0,
    }
    exact = model.generate(prompt, **request)

    # In place, so that generate() calls the compiled forward.
    options = {"policy": {"default": {"min_seq_len": 0}}, "compiler": compiler}
    model.compile(backend="distr", options=options)
    ours = model.generate(prompt, **request)

    report = distr_compile.report(model)
    print(report)
    print("\nnew tokens, exact:      ", exact[0, 64:].tolist())
    print("new tokens, approximate:", ours[0, 64:].tolist(), "(random weights)")


if __name__ == "__main__":
    main()
