"""Our attention in Hugging Face models that DeepSpeed runs: BERT, GPT-2, GPT-NeoX, BLOOM, OPT and Llama.

    model = replace_attention(model, group)  # heads cut over group; needs no DeepSpeed
    engine = init_inference(model, dtype=torch.bfloat16, tensor_parallel={"tp_size": 2})

DeepSpeed's own tensor parallelism cuts attention by guessed names and its kernels replace whole layers; here
TritonSelfAttention has the attention, at any number of ranks up to the query heads, and DeepSpeed's AutoTP cuts the MLP
and the lm_head. Embeddings, norms and other heads are whole on every rank.

Options of deepspeed.init_inference:

  works      dtype: float32, float16 (the default), bfloat16
             tensor_parallel (tp): tp_size, tp_grain_size, tp_group, mpu; and mp_size, mpu
             max_out_tokens: the longest prompt of engine.generate
             keep_module_on_host: the model is not moved, but for attention on a group's device
             triton_autotune: tunes our kernels for this model's layers, up to max_out_tokens
  refused    replace_with_kernel_inject, use_triton, enable_cuda_graph, dtype=int8, quant, set_empty_params, checkpoint,
             base_dir, checkpoint_config, save_mp_checkpoint_path, injection_policy, injection_policy_tuple, config,
             moe, ep_size, ep_group, ep_mp_group, moe_experts, moe_type
  no effect  triangular_masking (the model says), zero, min_out_tokens, transposed_mode, return_tuple,
             training_mp_size, replace_method

Limit: inference; every rank first holds the whole model. engine.generate has no beams, as DeepSpeed's.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from torch import nn

from tp_attention.comm import MPIGroup, TPGroup, as_group
from tp_attention.deepspeed_policy import options

if TYPE_CHECKING:
    from tp_attention.deepspeed_policy.adapters import Adapter

__all__ = ["init_inference", "replace_attention"]


def replace_attention(model: nn.Module, mp_group: Any = None) -> nn.Module:
    """Put TritonSelfAttention in place of every attention in `model`, and return it; its forward stays the same.

    model: a Hugging Face model of one of the six families with its weights, whole on every rank. mp_group: the ranks to
    cut the heads over, a process group (torch's or deepspeed.comm's), TPGroup or MPIGroup; attention then lives on its
    device. None is one rank. The model no longer trains: nothing of it requires a gradient.

    Raises ValueError for another architecture, for a layer that cannot be swapped, and for more ranks than heads; the
    model is whole then.
    """
    from tp_attention.deepspeed_policy.families import FAMILIES  # here: it imports transformers
    from tp_attention.models.policy import MASKS

    found = list(_attentions(model, None, FAMILIES))
    if not found:
        known = ", ".join(sorted(kind.__name__ for kind in FAMILIES))
        raise ValueError(f"{type(model).__name__} has none of the attentions that can be replaced: {known}")
    group = as_group(mp_group, next(model.parameters()).device)
    made = [FAMILIES[type(source)](source, config, group) for _, _, source, config in found]
    for (parent, name, _, config), adapter in zip(found, made, strict=True):  # from here on nothing fails
        adapter.install(parent, name)
        config._attn_implementation = MASKS  # so that padding comes as [B, S], and the kernels do the rest of a mask
    return model.requires_grad_(False)


def _attentions(module: nn.Module, config: Any, kinds: Any) -> Iterator[tuple[nn.Module, str, nn.Module, Any]]:
    """(parent, name, attention, the innermost model's config) of every attention that is one of `kinds`."""
    config = getattr(module, "config", config)
    for name, child in module.named_children():
        if type(child) in kinds:
            yield module, name, child, config
        else:
            yield from _attentions(child, config, kinds)


def init_inference(
    model: nn.Module, config: str | dict[str, Any] | None = None, *, mp_group: Any = None, **kwargs: Any
) -> Any:
    """deepspeed.init_inference of `model` with our attention in it: the engine. The module's docstring has the options.

    mp_group: the ranks that share the model; None takes those of tensor_parallel (mpu, tp_group, or tp_size: all ranks
    of the world, which deepspeed.init_distributed joins). On the CPU more than one rank need LOCAL_SIZE to be set, as
    DeepSpeed's launcher does.

    Raises ValueError for an option that cannot work, and as replace_attention, before the model is changed.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.inference.config import DeepSpeedInferenceConfig

    from tp_attention.deepspeed_policy.adapters import Adapter

    given = options.read(config, kwargs, DeepSpeedInferenceConfig.model_fields)
    settings = DeepSpeedInferenceConfig(**given)
    legal = get_accelerator().supported_dtypes()
    if settings.dtype not in legal:
        device, dtypes = get_accelerator().device_name(), ", ".join(map(str, legal))
        raise ValueError(f"dtype={settings.dtype} does not work on {device}; pass dtype= one of {dtypes}")
    group = _ranks(settings.tensor_parallel, mp_group)
    if group is None:
        group = TPGroup.alone("cpu" if settings.keep_module_on_host else get_accelerator().current_device_name())
    replace_attention(model, group)
    adapters = [module for module in model.modules() if isinstance(module, Adapter)]
    given = {name: value for name, value in given.items() if name not in ("tensor_parallel", "mp_size", "mpu")}
    if group.size > 1:
        given |= _cut(model, adapters, group, settings.tensor_parallel.tp_grain_size)
    engine = deepspeed.init_inference(model, config=given)
    for module in model.modules():
        vars(module).pop("build_alibi_tensor", None)  # DeepSpeed's: for one rank's heads, while ours take all
    if settings.triton_autotune:
        adapters[0].attention.tune(max(2, settings.max_out_tokens))
    return engine


def _ranks(parallel: Any, mp_group: Any) -> TPGroup | None:
    """The ranks that share the model, of `mp_group` or DeepSpeed's `tensor_parallel` settings; None for one."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    if mp_group is None:
        mp_group = parallel.tp_group if parallel.mpu is None else parallel.mpu.get_model_parallel_group()
    if mp_group is None:
        if parallel.tp_size == 1:
            return None
        deepspeed.init_distributed()
        if (size := deepspeed.comm.get_world_size()) != parallel.tp_size:
            raise ValueError(
                f"tp_size={parallel.tp_size}, but the world has {size} ranks; start as many, or pass the ranks that "
                "share a model as mp_group"
            )
        get_accelerator().set_device(int(os.environ.get("LOCAL_RANK", 0)))
        mp_group = deepspeed.comm.get_world_group()
    group = as_group(mp_group)
    if "tp_size" in parallel.model_fields_set and parallel.tp_size != group.size:
        raise ValueError(f"tp_size={parallel.tp_size}, but the group has {group.size} ranks; leave tp_size out")
    if group.size > 1:
        if isinstance(group, MPIGroup):
            raise ValueError("DeepSpeed cannot cut the MLP over an MPIGroup; pass a process group as mp_group")
        deepspeed.init_distributed()  # DeepSpeed's own layers communicate too, by what there is already
    return group


def _cut(model: nn.Module, adapters: list[Adapter], group: TPGroup, grain: int) -> dict[str, Any]:
    """Options by which DeepSpeed cuts MLPs and the head over the group, and does not look at attention."""
    for family in {type(adapter) for adapter in adapters}:
        for module in model.modules():
            if type(module) is family.mlp:
                family.prepare_mlp(module)
    ranks = group.process_group
    return {
        "injection_policy": {adapter.mlp: (adapter.mlp_out,) for adapter in adapters},
        "tensor_parallel": {
            "tp_size": group.size,
            "tp_grain_size": grain,
            "tp_group": ranks,  # where DeepSpeed cuts,
            "mpu": SimpleNamespace(get_model_parallel_group=lambda: ranks),  # and what keeps it from making another
        },
    }
