"""What a checkpoint says about itself: config, tensor headers, tokenizer, template. No weights are read.

`Checkpoint.open` reads a local folder or, by byte range, the hub; config.json and the safetensors headers are
all it needs. Also here: where a model is, which class loads it, and the fingerprint that ties an adapter to
its base.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesmith.config import no_such_file
from moesmith.errors import UserError
from moesmith.models.headers import (
    CONVERT,
    CONVERT_GGUF,
    DTYPE_BITS,
    INDEX,
    TensorHeader,
    read_headers,
    read_json,
)

if TYPE_CHECKING:
    import torch

RECORD = "moesmith.json"  # what moesmith writes beside a packed model or an adapter

# Files that belong to a model beside its weights: tokenizer, template, processor, generation settings.
SIDE_FILES = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*",
    "generation_config.json", "*processor_config.json", "*.tiktoken", "tekken.json",
)  # fmt: skip

PAPERS = ("README.md", "LICENSE*", "NOTICE*", "USE_POLICY*")
# The same weights once more, in the layout of who trained them. A * of these patterns matches "/" too.
OTHER_WEIGHTS = ("*/*", "consolidated*")


@dataclass
class Checkpoint:
    """A checkpoint's description. `folder` is None for one that was read from the hub."""

    name: str
    folder: Path | None
    config: dict[str, Any]
    tensors: dict[str, TensorHeader] = field(default_factory=dict)
    has_tokenizer: bool = False
    chat_template: str | None = None

    @classmethod
    def open(cls, model: str | Path, weights: bool = True) -> Checkpoint:
        """Describe a local folder or a hub name.

        Args:
            weights: with False, a folder without weights (a config alone) is accepted.

        Raises:
            UserError: not there, no config, no safetensors, or a broken shard; says which and what to do.
        """
        folder = local_folder(model)
        return cls._open_hub(str(model)) if folder is None else cls._open_folder(folder, weights)

    @classmethod
    def _open_folder(cls, folder: Path, weights: bool) -> Checkpoint:
        config = read_config(folder)
        tensors = read_headers(folder, required=weights)
        return cls(str(folder), folder, config, tensors, has_tokenizer(folder), read_chat_template(folder))

    @classmethod
    def _open_hub(cls, name: str) -> Checkpoint:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import NotASafetensorsRepoError

        with _HubErrors(name):
            folder = Path(HfApi().snapshot_download(name, allow_patterns=["config.json", *SIDE_FILES]))
            try:
                metadata = HfApi().get_safetensors_metadata(name)
            except NotASafetensorsRepoError:
                raise UserError(
                    f"{name}: no safetensors weights on the hub", CONVERT.format(model=name)
                ) from None
        tensors = {}
        for file, header in metadata.files_metadata.items():
            for key, info in header.tensors.items():
                tensors[key] = TensorHeader(key, info.dtype, tuple(info.shape), file, *info.data_offsets)
        config = read_config(folder)
        return cls(name, None, config, tensors, has_tokenizer(folder), read_chat_template(folder))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors on disk."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def files(self) -> list[str]:
        """Weight files, sorted."""
        return sorted({tensor.file for tensor in self.tensors.values()})

    @property
    def quantization(self) -> dict[str, Any] | None:
        """The checkpoint's own quantisation settings; None when it is stored in plain floats."""
        # compressed-tensors and multimodal checkpoints put them in the text config
        text = self.config.get("text_config") or {}
        return self.config.get("quantization_config") or text.get("quantization_config")

    @property
    def is_packed(self) -> bool:
        """Whether moesmith packed this checkpoint."""
        return (self.quantization or {}).get("quant_method") == "moesmith"

    @property
    def marks_assistant(self) -> bool:
        """Whether the chat template marks assistant tokens ({% generation %})."""
        return (
            self.chat_template is not None
            and re.search(r"\{%-?\s*generation\b", self.chat_template) is not None
        )


# ---------------------------------------------------------------- where a model is


def local_folder(model: str | Path) -> Path | None:
    """The folder `model` names, None if it can only be a hub name. Raises UserError if it can be neither."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    text = str(model)
    if path.is_file():
        if path.suffix == ".gguf":
            raise UserError(f"{path} is a GGUF file, not a model folder", CONVERT_GGUF.format(file=path.name))
        raise UserError(
            f"{path} is a file, wanted a model folder or a hub name", f"its folder is {path.parent}"
        )
    looks_like_hub = isinstance(model, str) and re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", text) is not None
    if looks_like_hub and not path.parent.joinpath(path.name).exists():
        return None
    raise no_such_file(path)


def resolve(model: str | Path) -> Path:
    """A local folder holding the whole model, downloaded first if `model` is a hub name."""
    folder = local_folder(model)
    if folder is not None:
        return folder
    from huggingface_hub import HfApi

    with _HubErrors(str(model)):
        patterns = ["*.safetensors", INDEX, "config.json", *SIDE_FILES, *PAPERS]
        return Path(
            HfApi().snapshot_download(str(model), allow_patterns=patterns, ignore_patterns=[*OTHER_WEIGHTS])
        )


class _HubErrors:
    """Turns what the hub client raises into one line about `name`."""

    def __init__(self, name: str):
        self.name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None or isinstance(error, UserError):
            return
        from huggingface_hub import errors

        if isinstance(error, errors.GatedRepoError):
            raise UserError(
                f"{self.name} asks for its licence to be accepted first",
                f"accept it on the model's page, then `hf auth login` ({type(error).__name__})",
            ) from None
        if isinstance(
            error, (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError)
        ):
            raise UserError(
                f"{self.name}: no such folder here and no such model on the hub",
                "a private model needs `hf auth login` first",
            ) from None
        if isinstance(error, errors.SafetensorsParsingError):
            raise UserError(f"{self.name}: {' '.join(str(error).split())}") from None
        unreachable = (
            errors.OfflineModeIsEnabled,
            errors.LocalEntryNotFoundError,
            errors.HTTPError,
            ConnectionError,
        )
        if isinstance(error, unreachable) or isinstance(error.__cause__, unreachable):
            raise UserError(
                f"{self.name}: no such folder here, and the hub cannot be reached",
                "give the path of a model folder, or check the network (HF_HUB_OFFLINE, HF_ENDPOINT)",
            ) from None


# ---------------------------------------------------------------- config, tokenizer, template


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder. Raises UserError when there is none."""
    path = folder / "config.json"
    if path.is_file():
        return read_json(path)
    if (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder} holds an adapter, not a model", f"moesmith chat --adapter {folder}")
    inner = sorted(p.parent for p in folder.glob("*/config.json"))
    hint = f"did you mean {inner[0]}?" if inner else "a model folder holds config.json and *.safetensors"
    raise UserError(f"{folder}: no config.json", hint)


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder holds a tokenizer's vocabulary."""
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
    return any((folder / name).is_file() for name in names)


def read_chat_template(folder: Path) -> str | None:
    """The chat template, wherever the checkpoint keeps it; the one called "default" if there are several."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            template = read_json(folder / name).get("chat_template")
            if isinstance(template, list):
                named = {entry.get("name"): entry.get("template") for entry in template}
                template = named.get("default") or next(iter(named.values()), None)
            if template:
                return template
    return None


def side_files(folder: Path) -> list[Path]:
    """Tokenizer, template, processor and generation files of a model folder, sorted."""
    return sorted({path for pattern in SIDE_FILES for path in folder.glob(pattern) if path.is_file()})


def check_architecture(config: dict[str, Any]) -> None:
    """Raise UserError when neither the installed transformers nor moesmith has a class for this config."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from moesmith.models.custom import register_classes

    register_classes()
    model_type = config.get("model_type")
    if not model_type:
        raise UserError("config.json has no model_type", "it is not a transformers config")
    if model_type in CONFIG_MAPPING:
        return
    version = transformers.__version__
    if config.get("auto_map"):
        raise UserError(
            f"model_type {model_type!r} comes with its own code, which moesmith does not run",
            f"if transformers has this model by now: pip install -U transformers (here: {version})",
        )
    raise UserError(
        f"model_type {model_type!r} is unknown to transformers {version}",
        "pip install -U transformers may bring it",
    )


def model_class(config: dict[str, Any]) -> Any:
    """The class to load a checkpoint with: the one its config names, else the first that fits.

    Raises:
        UserError: there is a config class but no model class for it.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    from moesmith.models.custom import CUSTOM, register_classes

    if config.get("model_type") in CUSTOM:
        register_classes()
        own = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING
        return own[transformers.CONFIG_MAPPING[config["model_type"]]]
    for name in config.get("architectures") or []:
        if hasattr(transformers, name):
            return getattr(transformers, name)
    for task in ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "SEQ_TO_SEQ_CAUSAL_LM", "TOKEN_CLASSIFICATION"):
        name = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES").get(config["model_type"])
        if name is not None:
            return getattr(transformers, name[0] if isinstance(name, tuple) else name)
    raise UserError(
        f"transformers {transformers.__version__} has no language model for {config['model_type']!r}"
    )


# ---------------------------------------------------------------- the same base?


def fingerprint(model: Any) -> str:
    """A hash that equal models share, to know which base an adapter belongs to. Reads little of each tensor.

    Args:
        model: a live model, packed or not, before its first forward; adapters on it are left out. Or the
            folder of a packed model, which gives the same hash as the model loaded from it. A 16-bit folder
            and the model packed from it differ: packing is part of what is hashed.

    It covers the architecture, top-k, the storage scheme, and of every tensor its shape and 16 small samples:
    packed bytes as they are, floats rounded to bf16, so the dtype a model is loaded in does not matter. Names
    are left out: transformers renames some tensors between disk and memory.
    """
    is_folder = isinstance(model, (str, Path))
    if is_folder:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(model)
        samples = _samples_on_disk(Path(model))
    else:
        config = model.config
        samples = _samples_live(model)
    text = config.get_text_config()
    packing = getattr(config, "quantization_config", None) or {}
    packing = packing if isinstance(packing, dict) else packing.to_dict()
    essentials = {
        "model_type": text.model_type,
        "top_k": getattr(text, "num_experts_per_tok", None),
        **{key: packing.get(key) for key in ("quant_method", "scheme", "double_quant", "linears")},
    }
    digest = hashlib.sha256(json.dumps(essentials, sort_keys=True).encode())
    for sample in sorted(samples):
        digest.update(sample)
    return digest.hexdigest()[:32]


def base_record(model: Any, path: str | Path) -> dict[str, Any]:
    """What an adapter's `moesmith.json` says under "base": where the packed model is, how to recognise it."""
    packing = getattr(model.config, "quantization_config", None) or {}
    packing = packing if isinstance(packing, dict) else packing.to_dict()
    settings = {key: packing.get(key) for key in ("scheme", "linears", "double_quant", "blocksize")}
    return {"path": str(path), **settings, "fingerprint": fingerprint(model)}


SAMPLES, SAMPLE_ELEMENTS = 16, 8
_NOT_HASHED = re.compile(r"lora_|modules_to_save|\.quant_state\.|quant_map$")


def _offsets(numel: int) -> list[int]:
    """Where to sample: spread evenly, both ends included."""
    last = max(numel - SAMPLE_ELEMENTS, 0)
    return sorted({last * i // (SAMPLES - 1) for i in range(SAMPLES)})


def _digest_tensor(shape: tuple[int, ...], values: torch.Tensor) -> bytes:
    import torch

    if values.is_floating_point():
        values = values.to(torch.bfloat16)
    data = values.contiguous().view(torch.uint8).numpy().tobytes()
    kind = "float" if values.is_floating_point() else str(values.dtype)
    return hashlib.sha256(f"{kind} {[n for n in shape if n != 1]}".encode() + data).digest()


def _samples_live(model: torch.nn.Module) -> Iterator[bytes]:
    import torch

    from moesmith.experts.quantizer import elements

    seen = set()
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, torch.Tensor) or _NOT_HASHED.search(name) or tensor.numel() == 0:
            continue
        held = getattr(tensor, "_local_tensor", tensor)  # of a DTensor: experts that ranks share
        place = (held.data_ptr(), tuple(tensor.shape), tensor.dtype)
        if place in seen:  # tied weights are stored once
            continue
        seen.add(place)
        last = tensor.numel()
        index = [torch.arange(start, min(start + SAMPLE_ELEMENTS, last)) for start in _offsets(last)]
        yield _digest_tensor(tuple(tensor.shape), elements(tensor, torch.cat(index)))


def _samples_on_disk(folder: Path) -> Iterator[bytes]:
    import torch

    dtypes = {
        "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
        "I64": torch.int64, "I32": torch.int32, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    }  # fmt: skip
    for name, header in read_headers(folder).items():
        if _NOT_HASHED.search(name) or header.numel == 0:
            continue
        if header.dtype not in dtypes:
            raise UserError(f"{folder}: {name} is stored as {header.dtype}, which moesmith does not read")
        width = DTYPE_BITS[header.dtype] // 8
        chunks = []
        with open(folder / header.file, "rb") as file:
            for start in _offsets(header.numel):
                file.seek(header.start + start * width)
                chunks.append(file.read(min(SAMPLE_ELEMENTS, header.numel) * width))
        values = torch.frombuffer(bytearray(b"".join(chunks)), dtype=dtypes[header.dtype])
        yield _digest_tensor(header.shape, values)
