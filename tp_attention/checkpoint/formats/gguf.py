"""GGUF files, through transformers' own reading of them: Hugging Face's names and RoPE order, dequantised.

The limit: transformers gives the whole model at once, so opening a GGUF file takes memory for all of it, in fp32.
"""

from __future__ import annotations

import logging
import struct
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from tp_attention.checkpoint.dimensions import from_config, layout_of
from tp_attention.checkpoint.families import find
from tp_attention.checkpoint.formats.measure import contents
from tp_attention.checkpoint.formats.opened import Opened

log = logging.getLogger("tp_attention")


def open_gguf(path: Path, layout: str | Path | None = None) -> Opened:
    """The model in a GGUF file, in memory; its config and tokenizer come along as texts.

    Raises ValueError when transformers or gguf are missing, the file is broken, or it lacks a weight of its model.
    """
    try:
        import gguf  # noqa: F401  # transformers asks for it only once it reads
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
        from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
    except ImportError as error:
        raise ValueError(f"{path}: GGUF needs {error.name}; pip install 'tp_attention[models]'") from None
    with path.open("rb") as stream:
        if (magic := stream.read(4)) != b"GGUF":
            raise ValueError(f"{path} is no GGUF file: it starts with {magic!r}")
    log.info("%s: dequantised to fp32 in memory, all of it", path)
    source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        config = AutoConfig.from_pretrained(**source)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    except (ValueError, IndexError, OSError, struct.error) as error:  # gguf's reader, past a truncated file's end
        raise ValueError(f"{path} cannot be read as GGUF: {str(error).splitlines()[0]}") from None
    if missing := sorted(dict(model.named_parameters()).keys() - tensors.keys() - model.all_tied_weights_keys.keys()):
        raise ValueError(f"{path} lacks {len(missing)} weights of {type(model).__name__}: {', '.join(missing[:5])}")
    config.architectures, config.dtype = [type(model).__name__], torch.float32
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
        texts = {file.name: file.read_text(encoding="utf-8") for file in Path(folder).iterdir()}
    described = config.to_dict()
    chosen = find(layout) if layout else layout_of(described)
    plan = replace(from_config(described), mlp_unit=1, **contents(chosen, tensors))
    return Opened("gguf", path, (path,), chosen, plan, [tensors], texts=texts)
