"""Build a Hugging Face model with our sharded layers and fill it with this rank's share, and nothing more.

The model is built on the meta device; each parameter is allocated when it is filled, from whatever checkpoint
open_checkpoint reads. Peak memory is the rank's share plus one tensor. Limit: no quantised weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel

from tp_attention.checkpoint.formats import open_checkpoint
from tp_attention.checkpoint.layouts import EXTRA, SCALE
from tp_attention.checkpoint.logical import LogicalTensors, StateDict
from tp_attention.comm import TPGroup, as_group
from tp_attention.models.bert import BertPolicy
from tp_attention.models.folders import resolve
from tp_attention.models.llama import LlamaPolicy
from tp_attention.models.policy import Policy
from tp_attention.sharding import ShardPlan

POLICIES: tuple[Policy, ...] = (LlamaPolicy(), BertPolicy())


def policy_for(config: PreTrainedConfig, architecture: str | None = None) -> Policy:
    """The policy of an architecture, the config's own if None. Raises ValueError naming those that are known."""
    architecture = architecture or (config.architectures or ["(none given in config.json)"])[0]
    for policy in POLICIES:
        if architecture in policy.architectures:
            policy.check(config)
            return policy
    known = ", ".join(name for policy in POLICIES for name in policy.architectures)
    raise ValueError(f"architecture {architecture} is not supported; known: {known}")


def checkpoint_dtype(config: PreTrainedConfig) -> torch.dtype:
    """The dtype config.json names, fp32 where it names none."""
    return config.dtype or torch.float32


def load(
    name_or_path: str | Path,
    group: TPGroup | None = None,
    *,
    dtype: torch.dtype | None = None,
    progress: Callable[[int], object] | None = None,
) -> PreTrainedModel:
    """This rank's share of a model, as its own Hugging Face class: call it, or `model.generate`, as ever.

    The folder holds Hugging Face files or ours (`tp-attention reshard`), cut for any number of ranks.

    Every rank of `group` calls this; None is one process alone. dtype: None keeps the checkpoint's. progress: called
    with the bytes of each parameter as it is filled. The model carries `shard_plan` and `tp_group`.
    Raises ValueError when the model is unknown, damaged, or tp does not fit it.
    """
    group = as_group(group)
    folder = resolve(name_or_path)
    config = AutoConfig.from_pretrained(folder)
    policy = policy_for(config)
    dtype = dtype or checkpoint_dtype(config)
    plan = policy.plan(config, group.size, dtype)
    source = LogicalTensors(open_checkpoint(folder))
    with torch.device("meta"):
        model = policy.build(config, dtype)
        policy.shard(model, plan, group, dtype)
    _fill(model, source, policy, plan, group, progress)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return _finished(model, plan, group)


def shard(model: PreTrainedModel, group: TPGroup) -> PreTrainedModel:
    """Shard a loaded Hugging Face model in place: this rank keeps its slices, in the model's dtype, on group.device.

    Raises ValueError, with the model untouched, when its architecture or a weight is unknown or tp does not fit it.
    """
    if isinstance(getattr(model, "shard_plan", None), ShardPlan):
        raise ValueError(f"this model is sharded over {model.shard_plan.tp} ranks already; shard one that is whole")
    group = as_group(group)
    policy, dtype = policy_for(model.config, type(model).__name__), model.dtype
    plan = policy.plan(model.config, group.size, dtype)
    # An adapter's weights, say, are refused here, before anything changes.
    source = LogicalTensors(StateDict(dict(model.state_dict()), policy.layout, policy.plan(model.config, 1, dtype)))
    with torch.device("meta"):
        policy.shard(model, plan, group, dtype)
    _fill(model, source, policy, plan, group)
    return _finished(model, plan, group)


def _finished(model: PreTrainedModel, plan: ShardPlan, group: TPGroup) -> PreTrainedModel:
    model.shard_plan, model.tp_group = plan, group
    return model.eval().requires_grad_(False)


def held_bytes(model: nn.Module) -> int:
    """Bytes of the weights that the model really holds (tied ones once); equals ShardPlan.weight_bytes."""
    return sum(parameter.nbytes for parameter in model.parameters())


@torch.no_grad()
def _fill(
    model: nn.Module,
    source: LogicalTensors,
    policy: Policy,
    plan: ShardPlan,
    group: TPGroup,
    progress: Callable[[int], object] | None = None,
) -> None:
    _check_dimensions(source, plan)
    slots = _slots(model)
    for native in source.names():
        if native.startswith(EXTRA) or (native.startswith("head.") and plan.vocab_matrices == 1):
            continue  # no part of what we run; a tied head is the embedding once more
        slot = slots.get(policy.place(native))
        if slot is None:
            raise ValueError(f"{native} has no place in the model; does config.json belong to this checkpoint?")
        packing = source.packing(native)
        shape = source.shape(native, packing, plan, group.rank)
        if shape != slot.parameter.shape:
            raise ValueError(
                f"{native} ({', '.join(packing.parts)}) of the checkpoint is {list(shape)} on rank {group.rank}, the "
                f"model has {list(slot.parameter.shape)} for it"
            )
        parameter = slot.allocate(group.device)
        if source.checkpoint.plan.tp == 1:
            source.fill(parameter, native, packing, plan, group.rank)
        else:  # what ranks hold twice is compared bit for bit, so it is joined in its own dtype, on the CPU
            parameter.copy_(source.share(native, plan, group.rank))
        if progress is not None:
            progress(parameter.nbytes)
    if missing := sorted(name for name, slot in slots.items() if not slot.filled):
        raise ValueError(f"the checkpoint lacks {len(missing)} weights: {', '.join(missing[:5])}")


def _check_dimensions(source: LogicalTensors, plan: ShardPlan) -> None:
    if scale := next((native for native in source.names() if native.endswith(SCALE)), None):
        raise ValueError(
            f"{source.checkpoint.path} is quantised (int8: it has {scale}); models take fp32, fp16 and bf16 weights, "
            "checkpoint.load_rank reads int8"
        )
    source.check_sizes(plan, "its config.json")


@dataclass
class _Slot:
    """A parameter of the model, and where it is held: in two places if tied."""

    parameter: nn.Parameter
    holders: list[tuple[nn.Module, str]]
    filled: bool = False

    def allocate(self, device: torch.device) -> nn.Parameter:
        if self.parameter.device != device:  # on meta, or whole in a model that is sharded in place
            self.parameter = nn.Parameter(torch.empty_like(self.parameter, device=device), requires_grad=False)
            for module, attribute in self.holders:
                setattr(module, attribute, self.parameter)
        self.filled = True
        return self.parameter


def _slots(model: nn.Module) -> dict[str, _Slot]:
    by_identity: dict[int, _Slot] = {}
    by_name: dict[str, _Slot] = {}
    for path, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            slot = by_identity.setdefault(id(parameter), _Slot(parameter, []))
            slot.holders.append((module, attribute))
            by_name[f"{path}.{attribute}"] = slot
    return by_name
