"""Without a GPU, Triton kernels run in the interpreter; it is chosen when they are imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
