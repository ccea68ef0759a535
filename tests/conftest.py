import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports a kernel: they run on CPU tensors then

pytest_plugins = ["tp_attention.launch.testing"]
