"""DeepSpeed's attention layer on several ranks: one import is another; config, weights and calls stay as they are.

DS_ACCELERATOR=cpu deepspeed --num_accelerators 2 examples/deepspeed_layer.py  # on GPUs: deepspeed --num_gpus 2 …
python examples/deepspeed_layer.py  # the same on one rank
"""

import sys

import torch
from deepspeed.ops.transformer.inference.config import DeepSpeedInferenceConfig

from tp_attention import TritonSelfAttention, launch  # it was deepspeed.ops.transformer.inference.triton.attention

HIDDEN, HEADS, TOKENS, PROMPT = 576, 9, 20, 12
LIMIT = 1e-5  # of the largest number, in fp32


def config(mp_size: int) -> DeepSpeedInferenceConfig:
    return DeepSpeedInferenceConfig(hidden_size=HIDDEN, heads=HEADS, mp_size=mp_size, dtype=torch.float32)


with launch.init() as world, torch.inference_mode():
    torch.manual_seed(0)  # random weights, the same on every rank
    weights = {"attn_qkvw": torch.randn(HIDDEN, 3 * HIDDEN) / 24, "attn_ow": torch.randn(HIDDEN, HIDDEN) / 24}
    weights |= {"attn_qkvb": torch.randn(3 * HIDDEN), "attn_ob": torch.zeros(HIDDEN)}
    x = torch.randn(2, TOKENS, HIDDEN).to(world.device)
    norm = {"norm_w": x.new_ones(HIDDEN), "norm_b": x.new_zeros(HIDDEN)}
    mask = torch.ones(2, TOKENS, dtype=torch.long, device=world.device)  # 1 = keep
    mask[1, :3] = 0  # the second sequence begins with padding

    whole = TritonSelfAttention(config(1)).load_unsharded(weights)
    expected = whole(x, mask, **norm)[0]  # all tokens at once

    layer = TritonSelfAttention(config(world.size), world.tp).load_unsharded(weights)
    outputs = [layer(x[:, :PROMPT], mask[:, :PROMPT], **norm)[0]]
    for end in range(PROMPT + 1, TOKENS + 1):  # then one by one: the layer remembers its keys
        outputs.append(layer(x[:, end - 1 : end], mask[:, :end], **norm)[0])

    difference = ((torch.cat(outputs, dim=1) - expected).abs().max() / expected.abs().max()).item()
    if world.rank == 0:
        print(layer.plan.describe())
        verdict = "equal" if difference <= LIMIT else "NOT EQUAL"
        print(f"{verdict}: ranks {world.size}, greatest difference {difference:.1e} of the largest (limit {LIMIT})")

sys.exit(difference > LIMIT)
