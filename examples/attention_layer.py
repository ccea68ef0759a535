"""One attention layer cut over 4 ranks of this machine, 9 query heads over 3 kv heads, against the whole layer.

python examples/attention_layer.py
"""

import sys

import torch

from tp_attention import AttentionConfig, RopeConfig, ShardPlan, TPSelfAttention, launch

CONFIG = AttentionConfig(hidden_size=576, heads=9, kv_heads=3, norm="rmsnorm", rope=RopeConfig(theta=1e5))
LIMIT = 1e-5  # of numbers around 1, in fp32


def whole_weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)  # the same on every rank; a real program reads a checkpoint instead
    rows = {"q": 9 * 64, "k": 3 * 64, "v": 3 * 64, "out": 576}
    return {f"{name}_weight": torch.randn(count, 576) / 24 for name, count in rows.items()} | {
        "norm_weight": torch.ones(576)
    }


@torch.inference_mode()
def forward() -> torch.Tensor:
    with launch.init() as world:
        layer = TPSelfAttention(CONFIG, world.tp).load_unsharded(whole_weights())
        x = torch.randn(2, 100, 576, generator=torch.Generator().manual_seed(1)).to(world.device)
        return layer(x).cpu()


if __name__ == "__main__":
    print(ShardPlan.for_layer(CONFIG, 4).describe())
    (whole,), shards = launch.spawn(forward, 1), launch.spawn(forward, 4)
    difference = max((y - whole).abs().max().item() for y in shards)
    verdict = "equal" if difference <= LIMIT else "NOT EQUAL"
    print(f"\n{verdict}: greatest difference of 4 ranks from 1 {difference:.1e} (limit {LIMIT})")
    sys.exit(difference > LIMIT)
