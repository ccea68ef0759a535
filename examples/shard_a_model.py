"""Shard a Hugging Face model in three lines; the rest is text in and text out.

torchrun --nproc-per-node=2 examples/shard_a_model.py
python examples/shard_a_model.py          # the same on one rank
"""

import torch
from transformers import AutoTokenizer

from tp_attention import launch, models

with launch.init() as world, torch.inference_mode():
    folder = models.resolve("smollm2")  # or the path of any Llama, Mistral, Qwen2 or Qwen3 folder
    model = models.load(folder, world.tp)  # this rank reads its slices only

    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = ["The capital of France is", "Water boils at"]
    tokenizer.padding_side = "left"
    batch = tokenizer(prompts, padding=True, return_tensors="pt").to(world.device)
    output = model.generate(**batch, max_new_tokens=12, do_sample=False)  # Hugging Face's own generate
    if world.rank == 0:
        print(*tokenizer.batch_decode(output, skip_special_tokens=True), sep="\n")
