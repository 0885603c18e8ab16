"""Dense models on disk: FFNs by plain names, and everything that cannot become an expert is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

import tiny
from moe_pairs import HIDDEN, LAYERS, SHAPE, TOKENS, WIDTH, build, build_moe, save
from moesmith.build.sources import check_sources, open_source
from moesmith.errors import UserError

UP = "model__layers__2__mlp__up_proj__weight"
TOWER = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 16, "image_size": 16,
    "intermediate_size": 64, "patch_size": 4,
}  # fmt: skip
TEXT = {**SHAPE, "head_dim": 16, "sliding_window": 8}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untied, in two shards; do not write to it."""
    return save("llama", tmp_path_factory.mktemp("dense") / "llama", max_shard_size="150KB")


def edited(llama: Path, folder: Path, config: dict | None = None, **tensors: torch.Tensor | None) -> Path:
    """A copy in one file, with config keys and tensors set; a tensor of None is taken out."""
    folder.mkdir()
    content = json.loads((llama / "config.json").read_text()) | (config or {})
    (folder / "config.json").write_text(json.dumps(content))
    state = {name: tensor for file in llama.glob("*.safetensors") for name, tensor in load_file(file).items()}
    state |= {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file({n: t.contiguous() for n, t in state.items() if t is not None}, folder / "model.safetensors")
    return folder


def test_what_a_source_says_and_reads(llama: Path):
    source, dense = open_source(llama), build("llama")
    assert (source.num_layers, source.hidden_size, source.ffn_width) == (LAYERS, HIDDEN, WIDTH)
    assert source.dtype == source.config.dtype == torch.float32 and source.name == str(llama)
    assert len({header.file for header in source.tensors.values()}) > 1
    assert source.tensors.keys() == dense.state_dict().keys()
    for name, want in dense.state_dict().items():
        assert torch.equal(source.read(name), want)
        piece = source.piece(name)
        (offset, length), *more = piece.runs
        data = Path(piece.file).read_bytes()[piece.start + offset :][:length]
        assert not more and data == want.numpy().tobytes() and Path(piece.file).is_absolute()
    assert source.ffn(1, "down") == "model.layers.1.mlp.down_proj.weight"


def test_a_head_that_is_stored_though_tied(tmp_path: Path):
    """It is left out; if it differs, the model is not tied, as transformers has it."""
    folder = save("llama tied", tmp_path / "dense")
    assert "lm_head.weight" not in open_source(folder).tensors
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, folder / "model.safetensors")
    assert "lm_head.weight" not in open_source(folder).tensors
    state["lm_head.weight"][3] += 1
    save_file(state, folder / "model.safetensors")
    source = open_source(folder)
    assert "lm_head.weight" in source.tensors and not source.config.tie_word_embeddings


@pytest.mark.parametrize("kind", ["gemma3", "mistral3"])
@torch.no_grad()
def test_the_text_part_of_a_multimodal_model(kind: str, tmp_path: Path):
    torch.manual_seed(0)
    if kind == "gemma3":
        config = Gemma3Config(
            text_config=TEXT, vision_config=TOWER, mm_tokens_per_image=4, eos_token_id=[6, 9]
        )
        whole, target = Gemma3ForConditionalGeneration(config), "gemma3_moe_text"
    else:
        text, tower = {**TEXT, "model_type": "mistral"}, {**TOWER, "model_type": "pixtral"}
        config = Mistral3Config(
            text_config=text, vision_config=tower, spatial_merge_size=2, eos_token_id=[6, 9]
        )
        whole, target = Mistral3ForConditionalGeneration(config), "mixtral"
    whole.eval().save_pretrained(tmp_path / "whole")
    source = open_source(tmp_path / "whole")
    assert all(
        name.startswith(("model.layers", "model.embed", "model.norm", "lm_head")) for name in source.tensors
    )
    assert any("vision" in name for name in (load_file(tmp_path / "whole" / "model.safetensors")))
    build_moe(source, [source] * 2, target, tmp_path / "moe")
    moe = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    torch.testing.assert_close(moe(TOKENS).logits, whole(input_ids=TOKENS).logits, atol=1e-5, rtol=1e-5)
    assert moe.config.eos_token_id == [6, 9] and moe.config.bos_token_id == 5


def refused(folder: Path) -> UserError:
    with pytest.raises(UserError) as caught:
        open_source(folder)
    assert "\n" not in caught.value.message
    return caught.value


def test_models_without_gated_ffns(tmp_path: Path):
    GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=48, n_head=2, vocab_size=97)).save_pretrained(
        tmp_path / "gpt2"
    )
    assert "wanted 2 layers with FFNs of gate_proj" in refused(tmp_path / "gpt2").message
    t5 = T5Config(d_model=32, d_ff=64, num_layers=2, num_heads=2, d_kv=16, vocab_size=97)
    T5ForConditionalGeneration(t5).save_pretrained(tmp_path / "t5")
    assert "no decoder-only language model (t5)" in refused(tmp_path / "t5").message
    tiny.save("mixtral", tmp_path / "moe")
    assert "Mixture-of-Experts already (mixtral" in refused(tmp_path / "moe").message


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"quantization_config": {"quant_method": "awq"}}, {}, "is quantised (awq)"),
        (
            {"mlp_bias": True},
            {f"model__layers__{i}__mlp__{kind}_proj__bias": torch.zeros(HIDDEN if kind == "down" else WIDTH)
             for i in range(LAYERS) for kind in ("gate", "up", "down")},
            "gate_proj has a bias",
        ),
        ({}, {"model__layers__1__mlp__up_proj__weight": None}, "has no model.layers.1.mlp.up_proj.weight"),
        ({}, {"model__layers__1__self_attn__k_proj__weight": None}, "has no model.layers.1.self_attn.k_proj"),
        ({}, {"lm_head__weight": None}, "has no lm_head.weight"),
        (
            {}, {UP: torch.zeros(WIDTH, HIDDEN, dtype=torch.float8_e4m3fn)},
            "is stored as F8_E4M3",
        ),
        ({}, {UP: torch.zeros(64, HIDDEN)}, "is [64, 48], wanted [80, 48]"),
        ({"num_key_value_heads": 4}, {}, "config.json makes it"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_checkpoints_that_cannot_be_used(
    llama: Path, tmp_path: Path, config: dict, tensors: dict, message: str
):
    assert message in refused(edited(llama, tmp_path / "bad", config, **tensors)).message


def test_broken_folders(llama: Path, tmp_path: Path):
    cut = edited(llama, tmp_path / "cut")
    os.truncate(cut / "model.safetensors", 200_000)
    assert "cut short" in refused(cut).message
    (cut / "model.safetensors").rename(cut / "model.gguf")
    assert "GGUF" in refused(cut).message
    assert "no such" in refused(tmp_path / "nowhere").message


def test_a_snapshot_of_the_hub_is_read_through_its_links(llama: Path, tmp_path: Path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    for number, file in enumerate(sorted(llama.iterdir())):
        (tmp_path / "blobs" / f"{number:x}").write_bytes(file.read_bytes())
        (tmp_path / "snapshot" / file.name).symlink_to(f"../blobs/{number:x}")
    source, name = open_source(tmp_path / "snapshot"), "model.layers.2.mlp.up_proj.weight"
    assert torch.equal(source.read(name), open_source(llama).read(name))
    build_moe(source, [source] * 2, "mixtral", tmp_path / "moe")
    assert not any(file.is_symlink() for file in (tmp_path / "moe").iterdir())


def test_old_buffers_are_not_part_of_the_model(llama: Path, tmp_path: Path):
    name = "model__layers__0__self_attn__rotary_emb__inv_freq"
    source = open_source(edited(llama, tmp_path / "old", **{name: torch.zeros(6)}))
    assert source.tensors.keys() == open_source(llama).tensors.keys()


# ---------------------------------------------------------------- sources beside each other


def with_tokenizer(folder: Path, added: list[str], kind: str = "bpe") -> Path:
    words = ["a", "b", "c"]
    model = (
        models.BPE({w: i for i, w in enumerate(words)}, [])
        if kind == "bpe"
        else models.Unigram([(w, -1.0) for w in words])
    )
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens(added)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_sources_with_the_same_or_no_vocabulary(kind: str, llama: Path, tmp_path: Path):
    base = open_source(with_tokenizer(edited(llama, tmp_path / "base"), ["<s>"], kind))
    twin = open_source(with_tokenizer(edited(llama, tmp_path / "twin", {"rms_norm_eps": 0.1}), ["<s>"], kind))
    assert check_sources(base, [base, twin]) == [
        f"{twin.name} has rms_norm_eps=0.1: its FFNs run with 0.001 of {base.name}"
    ]
    (note,) = check_sources(base, [open_source(llama), open_source(llama)])
    assert str(llama) in note and "no tokenizer.json" in note
    other = open_source(with_tokenizer(edited(llama, tmp_path / "other"), ["<s>", "<tool>"], kind))
    with pytest.raises(UserError) as caught:
        check_sources(base, [twin, other])
    assert '1 of 4 tokens differ, first "<tool>" (id 4, wanted none)' in caught.value.message


def test_sources_that_differ(llama: Path, tmp_path: Path):
    base = open_source(llama)
    state = {f"model__layers__2__{n}": None for n in (
        "input_layernorm__weight", "post_attention_layernorm__weight", "mlp__gate_proj__weight",
        "mlp__up_proj__weight", "mlp__down_proj__weight", "self_attn__q_proj__weight",
        "self_attn__k_proj__weight", "self_attn__v_proj__weight", "self_attn__o_proj__weight")}  # fmt: skip
    shorter = edited(llama, tmp_path / "short", {"num_hidden_layers": 2}, **state)
    gelu = edited(llama, tmp_path / "gelu", {"hidden_act": "gelu"})
    mistral = save("mistral", tmp_path / "mistral")
    for folder, message in (
        (shorter, "number of layers 2, wanted 3"),
        (gelu, "activation gelu, wanted silu"),
        (mistral, "architecture mistral, wanted llama"),
    ):
        with pytest.raises(UserError) as caught:
            check_sources(base, [open_source(folder)])
        assert message in caught.value.message and str(folder) in caught.value.message
