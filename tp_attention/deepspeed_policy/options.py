"""What each option of deepspeed.init_inference does to a model whose attention is ours: works, is refused, or nothing.

The words for users are in __init__.py; a test holds the two and DeepSpeed's own list together.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

WORKS = ("dtype", "tensor_parallel", "mp_size", "mpu", "max_out_tokens", "keep_module_on_host", "triton_autotune")

_CHECKPOINT = "reads or writes DeepSpeed's layers; load the model's weights first, and save with tp-attention reshard"
_EXPERTS = "is for mixtures of experts, which none of these models is"
REFUSED = {
    "replace_with_kernel_inject": "puts DeepSpeed's whole layers, attention included, in place of ours; leave it out",
    "enable_cuda_graph": "replays one shape at fixed addresses, while keys grow and ranks communicate; leave it out",
    "quant": "quantises DeepSpeed's own layers; use tp-attention reshard --quantize for int8 weights",
    "use_triton": "turns on DeepSpeed's own Triton kernels; ours run wherever there is a GPU; leave it out",
    "set_empty_params": "is for DeepSpeed's own layers; build the model with its weights",
    "checkpoint": _CHECKPOINT,
    "base_dir": _CHECKPOINT,
    "checkpoint_config": _CHECKPOINT,
    "save_mp_checkpoint_path": _CHECKPOINT,
    "injection_policy": "says what DeepSpeed cuts, which is decided here: the MLP and the head; leave it out",
    "injection_policy_tuple": "is DeepSpeed's own; leave it out",
    "config": "replaces the model's config, from which its attention is described; change model.config",
    **dict.fromkeys(("moe", "ep_size", "ep_group", "ep_mp_group", "moe_experts", "moe_type"), _EXPERTS),
}
NO_EFFECT = (
    "triangular_masking",
    "min_out_tokens",
    "transposed_mode",
    "return_tuple",
    "training_mp_size",
    "replace_method",
    "zero",
)


def read(config: str | dict[str, Any] | None, keywords: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """The options of both, by their names instead of aliases.

    config: a dict, or the path of a JSON file. fields: DeepSpeedInferenceConfig.model_fields. Raises ValueError for an
    option that is given twice, and for one that cannot work; at its default, or off, an option asks for nothing.
    """
    loaded: dict[str, Any] = json.loads(Path(config).read_text()) if isinstance(config, str) else config or {}
    names = {field.alias or name: name for name, field in fields.items()}
    given: dict[str, Any] = {}
    for key, value in [*loaded.items(), *keywords.items()]:
        name = names.get(key, key)
        if given.get(name, value) != value:
            raise ValueError(f"{name} is given as {given[name]} and as {value}; give it once")
        given[name] = value
    for name, value in given.items():
        if value and name in fields and name not in WORKS + NO_EFFECT and value != fields[name].default:
            raise ValueError(f"{name}={value} {REFUSED.get(name, 'is not known to work with our attention')}")
    return given
