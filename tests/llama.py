"""llama.cpp for the tests that run it, and tiny models that its converter takes.

`llama` is found on this machine or fetched, once per session; where neither works its tests are skipped, with
the reason. A test module gets it by `from llama import llama`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

import chats
import tiny
from moesmith.errors import UserError
from moesmith.export.llama_cpp import LlamaCpp, LlamaServer

PRE = "gpt-2"  # any name will do: the tests send token ids

YARN = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": True,
    "original_max_position_embeddings": 4096, "rope_theta": 150000.0,
}  # fmt: skip
MROPE = {
    "rope_type": "default", "rope_theta": 5000000.0, "mrope_interleaved": True, "mrope_section": [6, 5, 5],
}  # fmt: skip
GOOD: dict[str, dict[str, Any]] = {
    "olmoe": {"num_key_value_heads": 4},
    "qwen3_moe": {"norm_topk_prob": True},
    "qwen2_moe": {},
    "mixtral": {"sliding_window": None},
    "gpt_oss": {"rope_parameters": YARN},
    "gemma4": {"text_config__global_head_dim": 32, "text_config__final_logit_softcapping": 30.0},
    "granitemoe": {},
    "qwen3_next": {},
    "qwen3_vl_moe": {
        "text_config__rope_parameters": MROPE,
        "vision_config__deepstack_visual_indexes": [],  # as many as the tiny text model has layers, otherwise
    },
}
"""family -> what llama.cpp's graph fixes and transformers' defaults or `tiny` have otherwise"""


@pytest.fixture(scope="session")
def llama() -> LlamaCpp:
    try:
        return LlamaCpp.find()
    except UserError:
        try:
            return LlamaCpp.fetch(print)
        except UserError as error:
            pytest.skip(f"no llama.cpp: {error.message}")


def give_tokenizer(folder: Path, byte_fallback: bool = False) -> None:
    """A tokenizer of single characters; `byte_fallback`: of the kind Gemma's converter wants."""
    made = chats.tokenizer(merges=[("t", "h")])  # llama.cpp takes no BPE without merges
    if byte_fallback:  # and Gemma's vocabulary is as long as its embedding
        names = [*made.get_vocab(), *(f"<unused{i}>" for i in range(tiny.VOCAB - len(made)))]
        vocab = {name: made.get_vocab().get(name, i) for i, name in enumerate(names)}
        inner = Tokenizer(models.BPE(vocab=vocab, merges=[("t", "h")], byte_fallback=True))
        inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
        made = PreTrainedTokenizerFast(
            tokenizer_object=inner,
            pad_token="<pad>",
            bos_token="<s>",
            eos_token="</s>",
            chat_template=chats.CHATML,
        )
    made.save_pretrained(folder)


def build(family: str, **overrides: Any) -> Any:
    """The family's tiny model, with other values in its config than `tiny` gives; dots are written as __."""
    given = {key.replace("__", "."): value for key, value in overrides.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny.OVERRIDES, family, {**tiny.OVERRIDES.get(family, {}), **given})
        return tiny.build(family)


def save(model: Any, folder: Path) -> Path:
    """The model as a checkpoint with a tokenizer."""
    model.save_pretrained(folder)
    give_tokenizer(folder, byte_fallback=model.config.model_type.startswith(("gemma", "diffusion")))
    return folder


def prompts(count: int = 16) -> list[list[int]]:
    """Prompts of 1 to 46 tokens: longer than the tiny models' sliding window."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(5, 100, (1 + 3 * i,), generator=generator).tolist() for i in range(count)]


@torch.no_grad()
def worst(model: Any, server: LlamaServer, asked: Sequence[Sequence[int]], top: int = 50) -> float:
    """The largest difference of next tokens' log-probabilities, over the model's `top` of each prompt."""
    largest = 0.0
    for ids in asked:
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1].double()
        mine = logits.log_softmax(-1).topk(top)
        theirs = server.next_logprobs(ids, top=100_000)
        for value, token in zip(mine.values.tolist(), mine.indices.tolist(), strict=True):
            largest = max(largest, abs(value - theirs.get(token, -1e9)))
    return largest
