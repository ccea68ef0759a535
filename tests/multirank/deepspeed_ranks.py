"""What each rank of test_deepspeed_policy.py runs under DeepSpeed's launcher: `deepspeed --module …deepspeed_ranks`."""

import sys
from types import SimpleNamespace

import deepspeed
import pytest
import torch
from deepspeed.module_inject.layers import LinearAllreduce, LinearLayer

from tests.hugging_face_families import MODELS, build, expected_logits, generated, logits
from tests.tolerances import assert_close
from tp_attention.deepspeed_policy import init_inference

PADDINGS = ("none", "full", "left", "right")


def say(*words):
    sys.stdout.write(" ".join(map(str, words)) + "\n")  # at once: print would let the ranks' lines mix
    sys.stdout.flush()


def equal(engine, name):
    """The engine's model is DeepSpeed's `name` with our attention, and computes what transformers does."""
    whole = build(name)
    for padding in PADDINGS:
        assert_close(logits(engine, padding), expected_logits(whole, padding), torch.float32)
    if name != "bert":
        assert torch.equal(generated(engine), generated(whole))


def main():
    deepspeed.init_distributed()
    world = deepspeed.comm.get_world_group()
    spellings = [
        {"config": {"tensor_parallel": {"tp_size": 2}}},
        {"config": {"tp": {"tp_size": 2, "tp_grain_size": 16}}},
        {"tensor_parallel": {"mpu": SimpleNamespace(get_model_parallel_group=lambda: world)}},
        {"mp_group": world},
        {"tensor_parallel": {"tp_group": world}},
        {"tensor_parallel": {"tp_size": 2}, "triton_autotune": True, "replace_method": "auto"},
    ]
    for name, spelling in zip(MODELS, spellings, strict=True):
        engine = init_inference(build(name), dtype=torch.float32, **spelling)
        kinds = {type(module) for module in engine.module.modules()}
        assert {LinearLayer, LinearAllreduce} <= kinds, f"DeepSpeed did not cut the MLP: {kinds}"
        equal(engine, name)
        say(name, "equals")
    equal(init_inference(build("llama"), dtype="fp32", keep_module_on_host=True), "llama")
    equal(init_inference(build("bert"), dtype="fp32", tp={"tp_size": 2}, keep_module_on_host=True), "bert")
    half = init_inference(build("opt"), dtype=torch.bfloat16, mp_size=2, max_out_tokens=6)
    error = (logits(half) - expected_logits(build("opt"))).abs().max()
    assert error < 0.1 * expected_logits(build("opt")).abs().max(), error  # 2 layers of roundings at 2^-8
    with pytest.raises(RuntimeError, match="exceeds maximum length of 6"):
        generated(half)
    with pytest.raises(ValueError, match="tp_size=3, but the world has 2 ranks"):
        init_inference(build("gpt2"), dtype="fp32", mp_size=3)
    with pytest.raises(ValueError, match="tp_size=1, but the group has 2 ranks"):
        init_inference(build("gpt2"), dtype="fp32", tensor_parallel={"tp_size": 1}, mp_group=world)
    say("one rank equals")
    deepspeed.comm.destroy_process_group()


if __name__ == "__main__":
    main()
