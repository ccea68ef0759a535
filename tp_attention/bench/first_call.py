"""What the first forward pass of a layer costs: python -m tp_attention.bench.first_call.

Two processes, one after the other, share a fresh Triton cache: the first compiles, the second finds everything there.
Each then goes through other lengths, which must not compile anything.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

import torch

from tp_attention import AttentionConfig, KVCache, RopeConfig, TPSelfAttention

LENGTHS = (100, 333, 1, 1, 17, 65, 128, 200, 500, 1, 99, 257, 1, 640)


def main(hidden: int = 4096) -> None:
    """Print a line per process; hidden: of a layer with heads of 128, 4 to a kv head."""
    with tempfile.TemporaryDirectory() as cache:
        for which in ("compiling", "from Triton's cache"):
            command = [sys.executable, "-m", __spec__.name, str(hidden)]
            done = subprocess.run(
                command, env={**os.environ, "TRITON_CACHE_DIR": cache}, check=True, capture_output=True, text=True
            )
            print(f"{which}: {done.stdout.strip()}", flush=True)


@torch.inference_mode()
def measure(hidden: int) -> str:
    """First prefill of 512 tokens and first decode step in this process, in seconds, and the kernels compiled."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    heads = hidden // 128
    config = AttentionConfig(
        hidden_size=hidden,
        heads=heads,
        kv_heads=max(1, heads // 4),
        head_dim=128,
        norm="rmsnorm",
        rope=RopeConfig(),
        dtype=torch.bfloat16,
    )
    layer = TPSelfAttention(config, device=device)
    for weight in layer.parameters():
        weight.normal_(0, 0.02)
    cache = KVCache(layer.plan, 0, batch=1, max_length=4096, dtype=torch.bfloat16, device=device)

    def step(tokens: int) -> float:
        x = torch.randn(1, tokens, hidden, device=device, dtype=torch.bfloat16)
        _finish(device)
        start = time.perf_counter()
        layer(x, cache=cache.layers[0])
        _finish(device)
        return time.perf_counter() - start

    prefill, decode = step(512), step(1)
    kernels = _kernels()
    others = [step(tokens) for tokens in LENGTHS]
    return (
        f"prefill {prefill:.2f} s, decode {decode:.2f} s, {kernels} kernels; {len(LENGTHS)} other lengths: "
        f"{_kernels() - kernels} more, {max(others):.2f} s at most"
    )


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _kernels() -> int:
    """Kernels that launch() has looked up in this process."""
    launch = sys.modules.get("tp_attention.kernels.launch")
    return len(launch._compiled) if launch is not None else 0


if __name__ == "__main__":
    arguments: Sequence[str] = sys.argv[1:]
    if arguments:
        print(measure(int(arguments[0])))
    else:
        main()
