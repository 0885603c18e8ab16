"""What llama.cpp cannot hold of a model, said before any work: `check_gguf`.

The converter drops some options of a config without a word, because llama.cpp's graph for the architecture
knows one value only; the file then answers wrongly or does not load. FIXED lists them, read in src/models/
of llama.cpp and measured on tiny models by tests/export/test_llama_cpp.py. An architecture that has no row is
not refused: the parity check after the export decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from moesmith.errors import UserError

from .modelfile import modelfile

if TYPE_CHECKING:
    from .llama_cpp import LlamaCpp

__all__ = ["FIXED", "MAX_EXPERTS", "Fixed", "check_gguf", "modelfile", "remarks"]

MAX_EXPERTS = 1024
"""LLAMA_MAX_EXPERTS in src/llama-hparams.h."""

COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
SERVE = "moesmith serve runs it; transformers and vLLM run the merged folder: moesmith export merged"


class Fixed(NamedTuple):
    """An option of a config for which llama.cpp's graph knows only some values."""

    key: str
    allowed: tuple[Any, ...]
    default: Any
    """what transformers takes when the config does not say"""
    why: str


_SUM = Fixed(
    "norm_topk_prob",
    (True,),
    False,
    "divides the weights of the chosen experts by their sum, whatever the config says",
)
_RAW = Fixed(
    "norm_topk_prob", (False,), False,
    "never divides the weights of the chosen experts by their sum, whatever the config says",
)  # fmt: skip
_SILU = Fixed("hidden_act", ("silu", "swish"), "silu", "computes SiLU")
_NO_WINDOW = Fixed(
    "sliding_window", (None,), None, "lets every layer see everything: it has no sliding window here"
)
_UNUSED_WINDOW = Fixed("use_sliding_window", (False, None), False, _NO_WINDOW.why)
_EVERY = (
    Fixed("decoder_sparse_step", (1,), 1, "has experts in every layer of this architecture"),
    Fixed("mlp_only_layers", (None, []), None, "has experts in every layer of this architecture"),
)

FIXED: dict[str, tuple[Fixed, ...]] = {
    "Qwen2MoeForCausalLM": (_RAW, _SILU, _UNUSED_WINDOW, *_EVERY),  # qwen2moe.cpp
    "Qwen3MoeForCausalLM": (_SUM, _SILU, _UNUSED_WINDOW, *_EVERY),  # qwen3moe.cpp
    "Qwen3NextForCausalLM": (_SUM._replace(default=True), _SILU, *_EVERY),  # qwen3next.cpp
    "OlmoeForCausalLM": (  # olmoe.cpp
        _RAW, _SILU,
        Fixed("clip_qkv", (None,), None, "does not clip queries, keys and values"),
    ),
    "MixtralForCausalLM": (_SILU, _NO_WINDOW),  # llama.cpp
    "GptOssForCausalLM": (  # openai-moe.cpp; ggml_swiglu_oai
        Fixed("swiglu_alpha", (1.702,), 1.702, "has this factor in its code"),
        Fixed("swiglu_limit", (7.0,), 7.0, "has this limit in its code"),
    ),
}  # fmt: skip


def check_gguf(config: Mapping[str, Any], folder: Path, llama: LlamaCpp | None = None) -> None:
    """Raise UserError with the reason when this model cannot become a GGUF file that computes the same.

    Args:
        config: config.json of the checkpoint that would be converted.
        folder: where its tokenizer is.
        llama: the llama.cpp that would convert it; None leaves its list of architectures to the converter.
    """
    text = _text(config)
    name = architecture(config)
    from moesmith.models.custom import CUSTOM

    if config.get("model_type") in CUSTOM or config.get("auto_map"):
        raise UserError(
            f"llama.cpp cannot run {name}: the class is no part of it, and a GGUF file holds no code", SERVE
        )
    if llama is not None and name not in llama.architectures():
        raise UserError(f"llama.cpp's converter does not know {name}", SERVE)
    _check_experts(text)
    for rule in FIXED.get(name, ()):
        value = text.get(rule.key, rule.default)
        if value not in rule.allowed:
            raise UserError(
                f"{name} with {rule.key}={value} would be another model as a GGUF file: llama.cpp {rule.why}",
                SERVE,
            )
    heads, kv_heads = text.get("num_attention_heads"), text.get("num_key_value_heads")
    if name == "OlmoeForCausalLM" and kv_heads is not None and kv_heads != heads:
        raise UserError(
            f"OlmoeForCausalLM with {kv_heads} key-value heads for {heads} heads: llama.cpp wants as many",
            SERVE,
        )
    if name.startswith("Gemma4") and text.get("global_head_dim") is None and not text.get("per_layer_config"):
        raise UserError(
            "llama.cpp's converter wants global_head_dim in Gemma 4's config, and transformers leaves it out "
            "where it equals head_dim",
            f'add "global_head_dim": {text.get("head_dim")} to text_config in config.json',
        )
    if name.startswith("Gemma4") and text.get("final_logit_softcapping") is None:
        raise UserError(
            f"{name} without final_logit_softcapping would be another model as a GGUF file: llama.cpp caps "
            "the logits at 30 when the file does not say",
            SERVE,
        )
    if not any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise UserError(
            f"{folder} has no tokenizer, and a GGUF file holds one", "put tokenizer.json beside the weights"
        )


def remarks(config: Mapping[str, Any]) -> list[str]:
    """Differences that llama.cpp keeps, too small to refuse; each explains part of a parity figure."""
    text = _text(config)
    said = []
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type"))
    if kind == "yarn" and rope.get("truncate") is False:
        said.append(
            "YaRN: llama.cpp rounds the bounds between which it interpolates to whole dimensions, this model "
            "does not (truncate: false)"
        )
    act = text.get("hidden_activation") or text.get("hidden_act") or ""
    if "gelu" in act:
        said.append("GELU: llama.cpp looks it up in a table of 16-bit values")
    return said


def architecture(config: Mapping[str, Any]) -> str:
    """The class name that llama.cpp's converter goes by: the text model's if the config names it."""
    names = (config.get("text_config") or {}).get("architectures") or config.get("architectures")
    if not names:
        raise UserError(
            "config.json names no architectures, and llama.cpp's converter goes by them",
            "a folder written by transformers names its class there",
        )
    return str(names[0])


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config with that of its text model on top, as the converter reads it."""
    return {**config, **(config.get("text_config") or {})}


def _check_experts(text: Mapping[str, Any]) -> None:
    """One number of experts for the whole model, and no more than llama.cpp has room for."""
    for key in COUNTS:
        count = text.get(key)
        if isinstance(count, (list, tuple)) and len(set(count)) > 1:
            raise UserError(
                f"layers with different numbers of experts ({key}={list(count)}) fit into no GGUF file: "
                "it has one number for the whole model",
                "prune to the same number in every layer: moesmith prune ... --keep N",
            )
        if isinstance(count, int) and count > MAX_EXPERTS:
            raise UserError(f"{key}={count}: llama.cpp has room for {MAX_EXPERTS} experts", SERVE)
