"""What a reshard of 4 GB costs: memory beside the largest tensor, and time beside cp of the same bytes."""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny_llama
import torch

from tp_attention.checkpoint.formats.output import OutputFile, OutputTensor
from tp_attention.checkpoint.packing import WHOLE
from tp_attention.checkpoint.writing import header

HIDDEN, INTERMEDIATE, LAYERS, VOCAB = 4096, 11008, 9, 32000
ROUNDS = 3  # of cp and of reshard in turn, the best of each: what else the disk does costs both

CHILD = """
import re, sys, threading, time
from tp_attention.checkpoint import reshard
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
before, peak, done = anonymous(), 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.005):
        peak = max(peak, anonymous())
thread = threading.Thread(target=watch)
thread.start()
started = time.perf_counter()
report = reshard(sys.argv[1], sys.argv[2], int(sys.argv[3]))
seconds = time.perf_counter() - started
done.set(), thread.join()
print(peak - before, seconds)
"""


def write_large(folder):
    """A Llama folder of 4.4 GB in bf16; bytes of its file."""
    sizes = {"hidden": HIDDEN, "intermediate": INTERMEDIATE, "vocab": VOCAB, "heads": 32, "kv_heads": 32}
    config, shapes = tiny_llama.model(layers=LAYERS, head_dim=HIDDEN // 32, **sizes)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    tensors = tuple(OutputTensor(name, name, WHOLE, torch.bfloat16, shape) for name, shape in shapes.items())
    start, _ = header(OutputFile("model.safetensors", 0, tensors, {"format": "pt"}))
    noise = np.random.default_rng().bytes(32 << 20)
    with open(folder / "model.safetensors", "wb") as stream:
        stream.write(start)
        for tensor in tensors:
            for at in range(0, tensor.nbytes, len(noise)):
                stream.write(noise[: tensor.nbytes - at])
    os.sync()
    return (folder / "model.safetensors").stat().st_size


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("tp", [2, 3])
def test_memory_and_throughput_on_4_gb(tmp_path, tp):
    size = write_large(tmp_path / "source")
    assert size > 4e9
    largest = max(VOCAB * HIDDEN // tp, 2 * INTERMEDIATE * HIDDEN // tp) * 2
    copying, resharding, memory = [], [], []
    try:
        for _ in range(ROUNDS):
            started = time.perf_counter()
            subprocess.run(["cp", tmp_path / "source" / "model.safetensors", tmp_path / "copy"], check=True)
            subprocess.run(["sync"], check=True)
            copying.append(time.perf_counter() - started)
            (tmp_path / "copy").unlink()
            os.sync()
            child = subprocess.run(
                [sys.executable, "-c", CHILD, tmp_path / "source", tmp_path / "cut", str(tp)],
                check=True,
                capture_output=True,
                text=True,
            )
            peak, seconds = child.stdout.split()
            memory.append(int(peak))
            resharding.append(float(seconds))
            shutil.rmtree(tmp_path / "cut")
            os.sync()
    finally:
        shutil.rmtree(tmp_path / "source")
    print(f"tp={tp}: cp {copying}, reshard {resharding} s, anonymous {memory}, largest tensor {largest} bytes")
    assert max(memory) <= 4 * largest + 100e6
    # 0.7 is what is wanted, and 0.65 to 0.85 what one machine gave on one day: its page cache and its neighbours move
    # both times by a third, from round to round too, so each round is compared with itself. This limit is for mistakes:
    # an unbuffered or twofold pass over the bytes.
    assert statistics.median(copied / cut for copied, cut in zip(copying, resharding, strict=True)) >= 0.5
