"""The anatomy read from a config equals what loading the model gives."""

import pytest
import torch

import tiny
from moesmith import ExpertsConfig
from moesmith.errors import UserError
from moesmith.experts.report import count
from moesmith.models.anatomy import COLUMNS, dissect, meta_model
from moesmith.models.checkpoint import model_class, read_config

# per expert, fused, transposed with biases, no gate, two sets a layer, tied, dense layers first, gates
SOME = (
    "olmoe",
    "gemma4",
    "gpt_oss",
    "nemotron_h",
    "ernie4_5_vl_moe",
    "diffusion_gemma",
    "deepseek_v3",
    "qwen2_moe",
)


def config_of(family: str) -> dict:
    return {**tiny.config(family).to_dict(), "architectures": [tiny.model_class(family).__name__]}


@pytest.mark.parametrize("family", SOME)
def test_totals_are_those_of_the_real_model(family):
    model = tiny.build(family)
    anatomy = dissect(meta_model(config_of(family)))
    assert anatomy.total == sum(parameter.numel() for parameter in model.parameters())
    assert anatomy.experts + anatomy.linears < anatomy.total
    assert anatomy.active < anatomy.total
    assert not anatomy.outside and not anatomy.unpackable


@pytest.mark.slow
@pytest.mark.parametrize("family", [f for f in tiny.FAMILIES if f not in (*SOME, "qwen3_omni_moe_talker")])
def test_totals_of_every_other_family(family):
    test_totals_are_those_of_the_real_model(family)


@pytest.mark.parametrize("family", ["olmoe", "gemma4", "gpt_oss"])
@pytest.mark.parametrize("title", [title for title, *_ in COLUMNS])
def test_expert_bytes_are_those_of_the_packed_model(checkpoint, family, title):
    scheme, double_quant = {name: (s, dq) for name, s, dq, _ in COLUMNS}[title]
    folder = checkpoint(family)
    config = read_config(folder)
    model = model_class(config).from_pretrained(
        folder, quantization_config=ExpertsConfig(scheme, double_quant=double_quant), dtype=torch.bfloat16
    )
    counts = count(model)
    anatomy = dissect(meta_model(config))
    extras = sum(  # biases go with their experts, and are counted as 16 bits
        p.nbytes for name, p in model.named_parameters() if ".experts." in name and name.endswith("_bias")
    )
    assert anatomy.expert_bytes[title] == counts.expert_bytes + extras
    if scheme != "bf16":
        assert sum(counts.matrices.values()) >= anatomy.matrices // 2 and counts.not_packed == []


def test_active_parameters_are_those_a_token_meets():
    anatomy = dissect(meta_model(config_of("olmoe")))
    stacks = anatomy.experts
    assert anatomy.active == anatomy.total - stacks + stacks * tiny.TOP_K // tiny.NUM_EXPERTS
    assert (anatomy.num_experts, anatomy.top_k, anatomy.moe_layers) == ([8], [2], 3)


def test_image_experts_and_towers_are_not_active():
    ernie = dissect(meta_model(config_of("ernie4_5_vl_moe")))
    assert ernie.towers > 0
    assert ernie.active < ernie.total - ernie.towers - ernie.experts * (1 - tiny.TOP_K / tiny.NUM_EXPERTS)


def test_what_stands_beside_the_experts():
    assert dissect(meta_model(config_of("gemma4"))).beside == ["dense MLP"]
    assert dissect(meta_model(config_of("qwen2_moe"))).beside == ["shared expert"]
    assert dissect(meta_model(config_of("olmoe"))).beside == []
    deepseek = dissect(meta_model(config_of("deepseek_v3")))
    assert deepseek.beside == ["shared expert"], "its dense MLP is in a layer without experts"
    assert (deepseek.moe_layers, deepseek.layers) == (2, 3)


def test_routers_and_gates_stay_in_16_bits():
    qwen = dissect(meta_model(config_of("qwen2_moe")))
    assert qwen.routers == ["gate"] and qwen.rest["gates"] == tiny.HIDDEN * tiny.LAYERS
    assert dissect(meta_model(config_of("gemma4"))).routers == [
        "router.scale", "router.per_expert_scale", "router.proj"]  # fmt: skip


def test_a_width_that_no_block_divides_is_named():
    config = config_of("olmoe") | {"intermediate_size": 72}
    anatomy = dissect(meta_model(config))
    assert anatomy.unpackable == [f"model.layers.{i}.mlp.experts.down_proj [8, 64, 72]" for i in range(3)]
    assert dissect(meta_model(config_of("olmoe") | {"intermediate_size": 96})).blocksizes == {64: 3, 32: 3}


def test_experts_outside_the_interface():
    config = {
        "model_type": "jetmoe", "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96,
        "num_key_value_heads": 2, "kv_channels": 16, "num_local_experts": 4, "vocab_size": 64,
    }  # fmt: skip
    anatomy = dissect(meta_model(config))
    assert anatomy.outside == "JetMoeParallelExperts" and anatomy.experts == 0 and anatomy.rest["experts"] > 0


def test_a_dense_model():
    config = {"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 96,
              "num_attention_heads": 2, "vocab_size": 64}  # fmt: skip
    anatomy = dissect(meta_model(config))
    assert anatomy.experts == anatomy.moe_layers == 0 and anatomy.outside is None
    assert anatomy.total == sum(p.numel() for p in meta_model(config).parameters())


def test_a_config_that_cannot_be_built():
    with pytest.raises(UserError, match="cannot build this olmoe config"):
        meta_model({"model_type": "olmoe", "hidden_size": "wide"})


PUBLISHED = {
    "OLMoE-1B-7B": (
        {
            "model_type": "olmoe", "hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16,
            "num_attention_heads": 16, "num_experts": 64, "num_experts_per_tok": 8, "vocab_size": 50304,
        }, 6.92, 1.28,
    ),
    "Qwen3-30B-A3B": (
        {
            "model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 48, "num_experts": 128,
            "num_experts_per_tok": 8, "moe_intermediate_size": 768, "num_attention_heads": 32,
            "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936,
        }, 30.53, 3.35,
    ),
    "Gemma-4-26B-A4B": (
        {
            "model_type": "gemma4", "audio_config": None,
            "architectures": ["Gemma4ForConditionalGeneration"],
            "text_config": {
                "model_type": "gemma4_text", "hidden_size": 2816, "num_hidden_layers": 30,
                "intermediate_size": 2112, "num_attention_heads": 16, "num_key_value_heads": 8,
                "num_global_key_value_heads": 2, "head_dim": 256, "global_head_dim": 512,
                "vocab_size": 262144, "hidden_size_per_layer_input": 0, "attention_k_eq_v": True,
                "enable_moe_block": True, "num_experts": 128, "top_k_experts": 8,
                "moe_intermediate_size": 704,
            },
            "vision_config": {
                "model_type": "gemma4_vision", "hidden_size": 1152, "intermediate_size": 4304,
                "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 72,
            },
        }, 25.81, 3.83,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    config, total, active = PUBLISHED[name]
    anatomy = dissect(meta_model(config))
    assert (round(anatomy.total / 1e9, 2), round(anatomy.active / 1e9, 2)) == (total, active)
