"""A timm ViT with a policy: exact first block, coarser groups in the last ones.

python examples/timm_vit.py
"""

from __future__ import annotations

import timm
import torch

import distr_compile

POLICY = {
    "default": {"group_size": 2, "min_seq_len": 0},  # 0: also where it is not faster, as on a CPU
    "rule": [
        {"layers": "blocks.0.attn", "group_size": 1},
        {"layers": r"re:blocks\.(9|10|11)\.attn", "group_size": 4},
    ],
}


@torch.no_grad()
def main(compiler: str = "inductor") -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224").eval()  # pretrained=True for real weights
    images = torch.randn(2, 3, 224, 224)

    # What would happen, before anything is compiled.
    print(distr_compile.explain(model, images, policy=POLICY).summary())

    options = {"policy": POLICY, "compiler": compiler}
    compiled = torch.compile(model, backend="distr", options=options)
    logits = compiled(images)
    print(distr_compile.report(compiled))

    error = (logits - model(images)).norm() / model(images).norm()
    print(f"\nrelative difference of the logits to the exact model: {error:.4f} (random weights)")


if __name__ == "__main__":
    main()
