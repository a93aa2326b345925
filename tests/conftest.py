"""Settings of PyTorch and Triton that all tests share."""

import os

import torch

# Without a GPU the kernels run in Triton's interpreter, which is chosen when Triton is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import torch._dynamo

# torch 2.11 on Python >= 3.12 frees such guards while dicts still point at them, and the process
# aborts (pytorch/pytorch#183753). Off by default in later versions.
torch._dynamo.config.use_recursive_dict_tags_for_guards = False
