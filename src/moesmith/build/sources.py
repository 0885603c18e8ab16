"""Dense models on disk that experts are made of: their FFNs by name, as tensors or as byte ranges.

A source is described by its config and headers; a weight is read when it is asked for, as a view of the
mapped file. Of a multimodal model only the text part is seen. Whatever cannot become an expert is said
here, before a byte is written.
"""

# H hidden size, F FFN width

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from moesmith.errors import UserError
from moesmith.models.checkpoint import Checkpoint, check_architecture, resolve
from moesmith.models.headers import TensorHeader, read_json
from moesmith.models.ranges import Piece

from .native import FITS, Kind, meta_model

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in FLOATS.items()}

FIRST, GATE = "layers.0.", "mlp.gate_proj.weight"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Config fields that change what an FFN reads; in the result they are the base's.
AROUND_FFN = (
    "rope_parameters", "rms_norm_eps", "layer_norm_eps", "num_attention_heads", "num_key_value_heads",
    "head_dim", "layer_types", "sliding_window", "attn_logit_softcapping", "query_pre_attn_scalar",
    "embedding_multiplier", "residual_multiplier", "attention_multiplier",
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """One dense model."""

    name: str
    """as the user called it"""
    folder: Path
    config: PreTrainedConfig
    """of the text model; its dtype is the one the FFNs are stored in"""
    tensors: dict[str, TensorHeader]
    """what the text model loads, under plain names: model.layers.0.mlp.gate_proj.weight; no tied head"""

    @property
    def num_layers(self) -> int:
        return self.config.num_hidden_layers

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def ffn_width(self) -> int:
        """F as stored, which is what counts: some configs adjust theirs."""
        return self.tensors[self.ffn(0, "gate")].shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Of the FFNs."""
        return FLOATS[self.tensors[self.ffn(0, "gate")].dtype]

    @property
    def activation(self) -> str | None:
        """Of the FFNs, as transformers calls it."""
        return getattr(self.config, "hidden_activation", None) or getattr(self.config, "hidden_act", None)

    def ffn(self, layer: int, kind: Kind) -> str:
        """Name of a matrix: gate and up are (F, H), down is (H, F)."""
        return f"model.layers.{layer}.mlp.{kind}_proj.weight"

    def read(self, name: str) -> Tensor:
        """A tensor as it is stored: a view of the mapped file, which is mapped as long as the view lives."""
        header = self.tensors[name]
        with safe_open(self.folder / header.file, framework="pt") as file:
            return file.get_tensor(header.name)

    def piece(self, name: str) -> Piece:
        """The bytes of a tensor; the file is absolute."""
        header = self.tensors[name]
        return Piece(str((self.folder / header.file).absolute()), header.start, ((0, header.nbytes),))


def open_source(model: str | Path) -> Source:
    """A dense model from a folder or the hub.

    Raises:
        UserError: not there, broken or incomplete, quantised, already a Mixture-of-Experts, or a model
            whose layers have no FFN of gate_proj, up_proj, down_proj without bias.
    """
    folder = resolve(model)
    checkpoint = Checkpoint.open(folder)
    check_architecture(checkpoint.config)
    if checkpoint.quantization:
        method = checkpoint.quantization.get("quant_method", "unknown method")
        raise UserError(
            f"{model} is quantised ({method}): experts are made of 16-bit or 32-bit weights",
            "use the model it was quantised from, or dequantise it first",
        )
    config = _text_config(folder, checkpoint.config)
    tensors = _plain_names(str(model), checkpoint.tensors, config)
    _check_ffns(str(model), tensors, config)
    _check_complete(str(model), tensors, config)
    source = Source(str(model), folder, config, tensors)
    config.dtype = source.dtype
    if config.tie_word_embeddings and HEAD in tensors:
        if torch.equal(source.read(HEAD), source.read(EMBEDDING)):
            del tensors[HEAD]
        else:  # transformers does not tie them either
            config.tie_word_embeddings = False
    return source


def check_sources(base: Source, others: Sequence[Source]) -> list[str]:
    """Refuse sources whose FFNs cannot stand in the base's layers.

    Returns what a user should know: what could not be compared, and where a source's FFNs were trained to
    read something else than the base's attention and norms give them.

    Raises:
        UserError: another family, depth, hidden size, FFN width, activation or vocabulary; names both.
    """
    notes = []
    tokens = _vocabulary(base.folder)
    for other in others:
        if other.folder == base.folder:
            continue
        for what, ours, theirs in (
            ("architecture", base.config.model_type, other.config.model_type),
            ("number of layers", base.num_layers, other.num_layers),
            ("hidden size", base.hidden_size, other.hidden_size),
            ("FFN width", base.ffn_width, other.ffn_width),
            ("activation", base.activation, other.activation),
        ):
            if ours != theirs:
                raise UserError(
                    f"{other.name} does not fit beside {base.name}: {what} {theirs}, wanted {ours}",
                    "all sources of a build are fine-tunes of one base model, or of its twin",
                )
        for field in AROUND_FFN:
            ours, theirs = getattr(base.config, field, None), getattr(other.config, field, None)
            if ours != theirs:
                notes.append(f"{other.name} has {field}={theirs}: its FFNs run with {ours} of {base.name}")
        their_tokens = _vocabulary(other.folder)
        if their_tokens is None or tokens is None:
            without = base if tokens is None else other
            notes.append(f"{without.name} has no tokenizer.json: its vocabulary was not compared")
        elif their_tokens != tokens:
            _refuse_vocabulary(base, tokens, other, their_tokens)
    return list(dict.fromkeys(notes))


def rounded(values: Tensor, dtype: torch.dtype, source: str, name: str) -> Tensor:
    """`values` in the dtype that is written; the same tensor if it is stored so.

    Raises:
        UserError: NaN or infinity, or a number that the dtype cannot hold.
    """
    new = values.to(dtype)
    if not all(map(math.isfinite, new.aminmax())):  # NaN is passed on; no copy is made
        if all(map(math.isfinite, values.aminmax())):
            hint = "its numbers are too large for that: try dtype: bfloat16"
        else:
            hint = "the weights are damaged: fetch them again"
        raise UserError(f"{source}: {name} is not finite in {str(dtype).removeprefix('torch.')}", hint)
    return new


def _text_config(folder: Path, raw: dict[str, Any]) -> PreTrainedConfig:
    try:
        whole = AutoConfig.from_pretrained(folder)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder / 'config.json'}: {' '.join(str(error).split())[:200]}") from None
    config = copy.deepcopy(whole.get_text_config(decoder=True))
    if config.model_type != whole.model_type:  # a multimodal config says these outside
        config.tie_word_embeddings = whole.tie_word_embeddings
        for key in IDS:
            if raw.get(key) is not None:
                setattr(config, key, raw[key])
    if not hasattr(config, "num_hidden_layers") or getattr(whole, "is_encoder_decoder", False):
        raise UserError(f"{folder} is no decoder-only language model ({whole.model_type})")
    return config


def _plain_names(
    model: str, tensors: dict[str, TensorHeader], config: PreTrainedConfig
) -> dict[str, TensorHeader]:
    """Tensors of the text model under the names that it has on its own."""
    experts = [name for name in tensors if ".experts." in name or ".block_sparse_moe." in name]
    if experts:
        raise UserError(
            f"{model} is a Mixture-of-Experts already ({config.model_type}: {experts[0]})",
            "sources are dense models",
        )
    last = f"layers.{config.num_hidden_layers - 1}.{GATE}"
    prefixes = [name.removesuffix(FIRST + GATE) for name in tensors if name.endswith(FIRST + GATE)]
    prefixes = [prefix for prefix in prefixes if prefix + last in tensors]
    prefixes = [p for p in prefixes if tensors[p + last].shape[-1] == config.hidden_size]  # no vision tower
    if len(prefixes) != 1:
        part = {name.split(".0.")[-1] for name in tensors if ".0." in name and "_proj" not in name}
        part |= {name.split(".0.")[-1] for name in tensors if ".0.mlp." in name}
        raise UserError(
            f"{model} ({config.model_type}): wanted {config.num_hidden_layers} layers with FFNs of "
            f"gate_proj, up_proj and down_proj, found {', '.join(sorted(part)[:6]) or 'none'}",
            f"dense architectures that fit: {', '.join(FITS)}",
        )
    prefix = prefixes[0]
    plain = {
        f"model.{name.removeprefix(prefix)}": header
        for name, header in tensors.items()
        if name.startswith(prefix)
    }
    heads = [name for name in tensors if name == HEAD or name.endswith("." + HEAD)]
    if len(heads) == 1:
        plain[HEAD] = tensors[heads[0]]
    return plain


def _check_ffns(model: str, tensors: dict[str, TensorHeader], config: PreTrainedConfig) -> None:
    width, hidden = tensors[f"model.{FIRST}{GATE}"].shape[0], config.hidden_size
    for layer in range(config.num_hidden_layers):
        for kind in ("gate", "up", "down"):
            stem = f"model.layers.{layer}.mlp.{kind}_proj"
            header = tensors.get(f"{stem}.weight")
            if header is None:
                raise UserError(
                    f"{model} has no {stem}.weight", "the checkpoint is incomplete: fetch it again"
                )
            if f"{stem}.bias" in tensors:
                raise UserError(f"{model}: {stem} has a bias, which no MoE class has a place for")
            if header.dtype not in FLOATS:
                raise UserError(
                    f"{model}: {stem}.weight is stored as {header.dtype}, wanted BF16, F16 or F32",
                    "use the model it was quantised from, or dequantise it first",
                )
            shape = (hidden, width) if kind == "down" else (width, hidden)
            if header.shape != shape:
                raise UserError(
                    f"{model}: {stem}.weight is {list(header.shape)}, wanted {list(shape)} as in layer 0 "
                    f"and config.json"
                )


def _check_complete(model: str, tensors: dict[str, TensorHeader], config: PreTrainedConfig) -> None:
    """Hold what is stored against what the model loads, and drop what it does not (old buffers)."""
    wanted = meta_model(config).state_dict()
    tied = HEAD if config.tie_word_embeddings else None
    for name, tensor in wanted.items():
        if name not in tensors:
            if name == tied:
                continue
            raise UserError(f"{model} has no {name}", "the checkpoint is incomplete: fetch it again")
        if tensors[name].shape != tuple(tensor.shape):
            raise UserError(
                f"{model}: {name} is {list(tensors[name].shape)}, config.json makes it {list(tensor.shape)}",
                "config and weights come from different models",
            )
    for name in tensors.keys() - wanted.keys():
        del tensors[name]


# ---------------------------------------------------------------- vocabularies


def _vocabulary(folder: Path) -> dict[str, int] | None:
    """Every token of tokenizer.json with its id, added ones included; None without such a file."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    content = read_json(path)
    vocabulary = (content.get("model") or {}).get("vocab") or {}
    if isinstance(vocabulary, list):  # unigram: pairs of token and score
        vocabulary = {token: index for index, (token, _) in enumerate(vocabulary)}
    added = {token["content"]: token["id"] for token in content.get("added_tokens") or []}
    return {**vocabulary, **added}


def _refuse_vocabulary(
    base: Source, tokens: dict[str, int], other: Source, their_tokens: dict[str, int]
) -> None:
    different = [t for t in tokens.keys() | their_tokens.keys() if tokens.get(t) != their_tokens.get(t)]
    first = min(different, key=lambda t: (min(tokens.get(t, 1 << 60), their_tokens.get(t, 1 << 60)), t))
    has, wanted = their_tokens.get(first, "none"), tokens.get(first, "none")
    raise UserError(
        f"{other.name} has another vocabulary than {base.name}: {len(different):,} of {len(tokens):,} "
        f"tokens differ, first {json.dumps(first, ensure_ascii=False)} (id {has}, wanted {wanted})",
        "the result reads text with the base's tokenizer; use a fine-tune that kept it",
    )
