"""Build a Hugging Face model with our sharded layers and fill it with this rank's slices, and nothing more.

The model is built on the meta device; each parameter is allocated when its first slice arrives. Peak memory is the
rank's share plus one slice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel

from tp_attention.checkpoint.hugging_face import SafetensorsFolder
from tp_attention.checkpoint.layouts import Layout, Placement
from tp_attention.comm import TPGroup
from tp_attention.models.bert import BertPolicy
from tp_attention.models.folders import resolve
from tp_attention.models.llama import LlamaPolicy
from tp_attention.models.policy import Policy
from tp_attention.sharding import ShardPlan

POLICIES: tuple[Policy, ...] = (LlamaPolicy(), BertPolicy())


class TensorSource(Protocol):
    """Whole tensors by name, read in part: a SafetensorsFolder, or StateDict."""

    def names(self) -> list[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int = 0) -> Tensor: ...


class StateDict:
    """The tensors of a model that is in memory."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int = 0) -> Tensor:
        tensor = self.tensors[name]
        return tensor if dim is None else tensor.narrow(dim, start, stop - start)


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

    Every rank of `group` calls this; None is one process alone. dtype: None keeps the checkpoint's. progress: called
    with the bytes of each tensor as it arrives. The model carries `shard_plan` and `tp_group`.
    Raises ValueError when the model is unknown, damaged, or tp does not fit it.
    """
    group = TPGroup.alone() if group is None else group
    folder = resolve(name_or_path)
    config = AutoConfig.from_pretrained(folder)
    policy = policy_for(config)
    dtype = dtype or checkpoint_dtype(config)
    plan = policy.plan(config, group.size, dtype)
    source = SafetensorsFolder(folder)
    with torch.device("meta"):
        model = policy.build(config, dtype)
        policy.shard(model, plan, group, dtype)
    _fill(model, source, policy.layout, plan, group, progress)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return _finished(model, plan, group)


def shard(model: PreTrainedModel, group: TPGroup) -> PreTrainedModel:
    """Shard a loaded Hugging Face model in place: this rank keeps its slices, in the model's dtype, on group.device.

    Raises ValueError, with the model untouched, when its architecture or a weight is unknown or tp does not fit it.
    """
    policy, dtype = policy_for(model.config, type(model).__name__), model.dtype
    plan = policy.plan(model.config, group.size, dtype)
    source = StateDict(dict(model.state_dict()))
    for name in source.names():
        policy.layout.place(name, plan, group.rank)  # an adapter's weights, say, are refused before anything changes
    with torch.device("meta"):
        policy.shard(model, plan, group, dtype)
    _fill(model, source, policy.layout, plan, group)
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
    source: TensorSource,
    layout: Layout,
    plan: ShardPlan,
    group: TPGroup,
    progress: Callable[[int], object] | None = None,
) -> None:
    slots = _slots(model)
    for name in source.names():
        placement = layout.place(name, plan, group.rank)
        if placement is None:
            continue
        if placement.target not in slots:
            raise ValueError(
                f"checkpoint tensor {name!r} has no place in the model; does config.json belong to this checkpoint?"
            )
        shape, dim = source.shape(name), placement.dim
        if dim is not None and (dim >= len(shape) or shape[dim] != placement.size):
            raise ValueError(f"{name} has shape {list(shape)}; config.json makes dimension {dim} {placement.size}")
        data = source.read(name, dim, *placement.source)
        slots[placement.target].put(placement, data, name, group.device)
        if progress is not None:
            progress(data.nbytes)
    missing = sorted(name for name, slot in slots.items() if slot.written < slot.parameter.numel())
    if missing:
        raise ValueError(f"the checkpoint lacks {len(missing)} weights or parts of them: {', '.join(missing[:5])}")


@dataclass
class _Slot:
    """A parameter of the model, where it is held (in two places if tied), and how many elements have arrived."""

    parameter: nn.Parameter
    holders: list[tuple[nn.Module, str]]
    written: int = 0

    def put(self, placement: Placement, data: Tensor, name: str, device: torch.device) -> None:
        if self.parameter.device != device:  # on meta, or whole in a model that is sharded in place
            real = torch.empty_like(self.parameter, device=device)
            self.parameter = nn.Parameter(real, requires_grad=False)
            for module, attribute in self.holders:
                setattr(module, attribute, self.parameter)
        target = self.parameter.data
        if placement.dim == 0:
            target = target[placement.row : placement.row + data.shape[0]]
        if target.shape != data.shape:
            raise ValueError(f"{name} gives {list(data.shape)}, the model has {list(target.shape)} for it")
        self.written += data.numel()
        if self.written > self.parameter.numel():
            raise ValueError(f"{name} is in the checkpoint twice, or under two names")
        target.copy_(data)


def _slots(model: nn.Module) -> dict[str, _Slot]:
    by_identity: dict[int, _Slot] = {}
    by_name: dict[str, _Slot] = {}
    for path, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            slot = by_identity.setdefault(id(parameter), _Slot(parameter, []))
            slot.holders.append((module, attribute))
            by_name[f"{path}.{attribute}"] = slot
    return by_name
