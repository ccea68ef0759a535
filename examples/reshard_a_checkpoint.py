"""Cut a model's files for 3 ranks and put them together again: not a bit is lost.

python examples/reshard_a_checkpoint.py
"""

import sys
import tempfile
from pathlib import Path

import torch

from tp_attention import checkpoint, models

with tempfile.TemporaryDirectory() as folder:
    source = models.resolve("minilm")  # or the path of a Hugging Face, Megatron, DeepSpeed or GGUF checkpoint
    cut, back = Path(folder) / "cut", Path(folder) / "back"
    checkpoint.reshard(source, cut, tp=3)
    checkpoint.reshard(cut, back, tp=1, format="hf")
    print("cut:", *sorted(path.name for path in cut.iterdir()))

    model = models.load(cut)  # on any number of ranks, whatever the files are cut for
    print("loaded:", sum(parameter.numel() for parameter in model.parameters()), "parameters")

    restored = dict(checkpoint.iter_tensors(back))
    same = [torch.equal(tensor, restored.pop(name)) for name, tensor in checkpoint.iter_tensors(source)]
    print(f"restored: {sum(same)} of {len(same)} tensors are the same, {len(restored)} are new")

sys.exit(not all(same) or bool(restored))
