"""A MoE of identical experts is the dense model, for every pair of the table, in files as the class has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    SeedOssConfig,
)

from moe_pairs import DENSE, HIDDEN, PAIRS, TOKENS, WIDTH, build, build_moe, save
from moesmith.build.assemble import SharedSource
from moesmith.build.native import FITS, LAYOUTS, layout_of, target_config, targets
from moesmith.build.sources import open_source
from moesmith.errors import UserError
from moesmith.models.headers import read_headers

MASK = torch.ones_like(TOKENS)
MASK[0, :5] = 0  # left-padded


@torch.no_grad()
def check(name: str, target: str, tmp_path: Path, top_k: int, shared: bool = False) -> None:
    dense = build(name)
    base = open_source(save(name, tmp_path / "dense"))
    extra = SharedSource(base, 0.25) if shared else None
    build_moe(base, [base] * 3, target, tmp_path / "moe", top_k, extra)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", output_loading_info=True)
    assert not any(info.values()), info
    assert model.config.model_type == target
    for mask in (None, MASK):
        got = model(TOKENS, attention_mask=mask).logits
        want = dense(TOKENS, attention_mask=mask).logits
        kept = MASK.bool() if mask is not None else torch.ones_like(MASK).bool()
        torch.testing.assert_close(got[kept], want[kept], atol=1e-5, rtol=1e-5)
    short = model.generate(TOKENS[:, :12], max_new_tokens=6, do_sample=False, eos_token_id=-1)
    assert torch.equal(
        short, dense.generate(TOKENS[:, :12], max_new_tokens=6, do_sample=False, eos_token_id=-1)
    )
    model.save_pretrained(tmp_path / "again")
    ours, theirs = read_headers(tmp_path / "moe"), read_headers(tmp_path / "again")
    assert {n: h.shape for n, h in ours.items()} == {n: h.shape for n, h in theirs.items()}


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize(("name", "target"), PAIRS, ids=lambda x: str(x))
def test_identical_experts_are_the_dense_model(name: str, target: str, top_k: int, tmp_path: Path):
    check(name, target, tmp_path, top_k)


WITH_SHARED = [
    (name, target) for name, target in PAIRS if LAYOUTS[target].shared_expert and "sliding" not in name
]


@pytest.mark.parametrize(("name", "target"), WITH_SHARED, ids=str)
def test_identical_experts_beside_a_shared_one(name: str, target: str, tmp_path: Path):
    check(name, target, tmp_path, top_k=2, shared=True)


def test_every_row_of_the_tables_is_tried():
    tried = {(DENSE[name][0], target) for name, target in PAIRS}
    assert tried == {(name, target) for name in FITS for target in targets(name)}
    assert {target for _, target in tried} == LAYOUTS.keys()


SMALL = {"hidden_size": HIDDEN, "intermediate_size": WIDTH, "num_hidden_layers": 4, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("config", "target", "options", "message", "hint"),
    [
        (GPT2Config(), "mixtral", {}, "attention and norms of 'gpt2'", "llama"),
        (LlamaConfig(**SMALL), "mixtrall", {}, "'mixtrall' is no MoE class", "'mixtral'"),
        (LlamaConfig(**SMALL), "qwen3_moe", {}, "'llama' does not fit into 'qwen3_moe'", "or qwen2_moe"),
        (LlamaConfig(**SMALL), "mixtral", {"top_k": 5}, "top_k=5 must be between 1 and num_experts=4", ""),
        (LlamaConfig(**SMALL), "mixtral", {"shared_width": 80}, "mixtral has no shared expert", "qwen2_moe"),
        (Qwen3Config(**SMALL), "qwen3_moe", {"shared_width": 80}, "no shared expert", "no class that qwen3"),
        (LlamaConfig(**SMALL, attention_bias=True), "mixtral", {}, "attention_bias=True", ""),
        (SeedOssConfig(**SMALL, attention_out_bias=True), "qwen2_moe", {}, "attention_out_bias=True", ""),
        (
            Qwen3Config(**SMALL, use_sliding_window=True, max_window_layers=2), "qwen3_moe", {},
            "one window for all layers", "",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_in_one_line(config, target, options, message, hint):
    options = {"top_k": 2, **options}
    with pytest.raises(UserError) as caught:
        target_config(config, target, 4, width=80, **options)
    assert message in caught.value.message and "\n" not in caught.value.message
    assert hint in (caught.value.hint or "")


def test_windows_reach_the_layers_they_were_on():
    every = target_config(MistralConfig(**SMALL, sliding_window=9), "qwen2_moe", 4, 2, 80)
    assert every.layer_types == ["sliding_attention"] * 4 and every.sliding_window == 9
    unused = Qwen3Config(**SMALL, use_sliding_window=True, sliding_window=9)  # from layer 28 on
    assert target_config(unused, "qwen3_moe", 4, 2, 80).sliding_window is None
    odd = LlamaConfig(**SMALL, sliding_window=9, layer_types=["sliding_attention"] * 4)  # of a Mistral once
    assert target_config(odd, "mixtral", 4, 2, 80).sliding_window is None  # a Llama does not read it
    some = Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=9, max_window_layers=3)
    assert target_config(some, "qwen2_moe", 4, 2, 80).layer_types == some.layer_types


def test_names_as_the_classes_write_them():
    mixtral, granite = layout_of("mixtral"), layout_of("granitemoe")
    assert mixtral.matrix(3, 7, "up") == "model.layers.3.block_sparse_moe.experts.7.w3.weight"
    assert mixtral.stack(3, "down") is None and mixtral.shared(3, "up") is None
    assert granite.matrix(0, 0, "up") is None
    assert granite.stack(1, "gate_up") == "model.layers.1.block_sparse_moe.input_linear.weight"
    assert layout_of("qwen2_moe").shared(0, "down") == "model.layers.0.mlp.shared_expert.down_proj.weight"
