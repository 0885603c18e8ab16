"""Seam 1 on a tiny OLMoE: what is packed, what is not, what reloads, what is refused."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from moesmith import ExpertsConfig
from moesmith.errors import UserError
from moesmith.experts.linears import ROUTER, kept_linears
from moesmith.experts.report import count
from moesmith.experts.storage import named_experts, stack, weight_names


def olmoe_config(**kwargs):
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    moe = dict(
        num_key_value_heads=4,
        num_experts=8,
        num_experts_per_tok=2,
        vocab_size=128,
        max_position_embeddings=64,
    )
    return OlmoeConfig(**(sizes | moe | dict(pad_token_id=0, bos_token_id=1, eos_token_id=2) | kwargs))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("olmoe")
    OlmoeForCausalLM(olmoe_config()).save_pretrained(folder)
    return folder


@pytest.fixture
def ids():
    return torch.arange(1, 33).reshape(2, 16)


def load(folder, *args, dtype=torch.float32, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, *args, dtype=dtype, **kwargs)


def dequantised(folder, packed, dtype=torch.float32):
    """The stock model holding the dequantised weights of `packed`."""
    model = load(folder, dtype=dtype)
    for (_, ours), (_, theirs) in zip(named_experts(packed), named_experts(model), strict=True):
        for name in weight_names(theirs):
            getattr(theirs, name).data.copy_(stack(ours, name).dense(dtype))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", ["nf4", "fp4", "int8", "fp8", "bf16", "fp16"])
def test_packed_equals_the_stock_model_holding_the_dequantised_weights(checkpoint, ids, scheme, dtype):
    packed = load(checkpoint, quantization_config=ExpertsConfig(scheme), dtype=dtype)
    assert torch.equal(packed(ids).logits, dequantised(checkpoint, packed, dtype)(ids).logits)


@pytest.mark.parametrize("linears", [None, "nf4", "int8"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_save_and_reload_is_bit_equal(checkpoint, ids, tmp_path, linears, double_quant):
    config = ExpertsConfig("nf4", linears=linears, double_quant=double_quant)
    packed = load(checkpoint, quantization_config=config, dtype=torch.bfloat16)
    packed.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    before, after = dict(packed.named_parameters()), dict(again.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(packed(ids).logits, again(ids).logits)
    assert not any(p.requires_grad for n, p in again.named_parameters() if ".experts." in n)


def test_shards_and_a_single_file_pack_to_the_same_bytes(checkpoint, ids, tmp_path):
    load(checkpoint).save_pretrained(tmp_path, max_shard_size="200KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    one, many = (load(folder, quantization_config=ExpertsConfig("nf4")) for folder in (checkpoint, tmp_path))
    assert torch.equal(one(ids).logits, many(ids).logits)


def test_every_expert_matrix_is_packed_and_counted(checkpoint):
    packed = load(checkpoint, quantization_config=ExpertsConfig("nf4"))
    counts = count(packed)
    assert counts.matrices == {"nf4": 2 * 8 * 3}  # layers x experts x (gate, up, down)
    assert counts.not_packed == []
    assert counts.expert_bytes == counts.expert_parameters * 4.5 / 8
    dense = load(checkpoint)
    assert counts.expert_parameters + counts.other_parameters == sum(p.numel() for p in dense.parameters())


def test_packed_bytes_are_named_like_the_stack(checkpoint, tmp_path):
    load(checkpoint, quantization_config=ExpertsConfig("nf4")).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert tensors[name].shape == (8, 256, 32) and tensors[name].dtype == torch.uint8
    assert tensors[name + "_absmax"].shape == (8, 256, 1)
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert saved["quant_method"] == "moesmith" and saved["scheme"] == "nf4"


def test_a_checkpoint_with_another_layout_on_disk_keeps_its_stacks_whole_too(tmp_path, ids):
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = dict(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, vocab_size=128
    )
    torch.manual_seed(0)
    MixtralForCausalLM(MixtralConfig(**sizes, num_key_value_heads=4)).save_pretrained(tmp_path / "dense")
    packed = load(tmp_path / "dense", quantization_config=ExpertsConfig("nf4"))
    packed.save_pretrained(tmp_path / "packed")
    names = load_file(tmp_path / "packed" / "model.safetensors").keys()
    assert sum("experts" in name for name in names) == 4  # two stacks and their scales
    assert torch.equal(packed(ids).logits, load(tmp_path / "packed")(ids).logits)


def test_linears_are_quantised_but_never_routers_gates_and_heads(tmp_path, ids):
    config = Qwen2MoeConfig(
        hidden_size=64, intermediate_size=128, moe_intermediate_size=128, shared_expert_intermediate_size=128,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, num_experts=8,
        num_experts_per_tok=2, vocab_size=128,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen2MoeForCausalLM(config).save_pretrained(tmp_path)
    packed = load(tmp_path, quantization_config=ExpertsConfig("nf4", linears="nf4"), dtype=torch.bfloat16)
    kinds = {name: type(module).__name__ for name, module in packed.named_modules()}
    assert kinds["model.layers.0.self_attn.q_proj"] == "Linear4bit"
    assert kinds["model.layers.0.mlp.shared_expert.up_proj"] == "Linear4bit"
    assert kinds["model.layers.0.mlp.shared_expert_gate"] == "Linear"
    assert kinds["lm_head"] == "Linear"
    assert kept_linears(packed)["model.layers.0.mlp.shared_expert_gate"] == ROUTER
    packed(ids)  # runs


def test_adapters_on_4bit_linears_still_train_after_an_evaluation(checkpoint, ids):
    from peft import LoraConfig, get_peft_model

    packed = load(checkpoint, quantization_config=ExpertsConfig("nf4", linears="nf4"), dtype=torch.bfloat16)
    model = get_peft_model(packed, LoraConfig(target_modules=["q_proj"], r=4))
    with torch.no_grad():
        model.eval()(ids)
    model.train()(ids, labels=ids).loss.backward()
    grads = [p.grad for name, p in model.named_parameters() if "lora_B" in name]
    assert grads and all(g is not None and g.abs().sum() > 0 for g in grads)


def test_an_inner_size_that_64_does_not_divide_gets_smaller_blocks(tmp_path, ids):
    torch.manual_seed(0)
    OlmoeForCausalLM(olmoe_config(intermediate_size=96)).save_pretrained(tmp_path)
    packed = load(tmp_path, quantization_config=ExpertsConfig("nf4"))
    experts = packed.model.layers[0].mlp.experts
    assert stack(experts, "gate_up_proj").blocksize == 64
    assert stack(experts, "down_proj").blocksize == 32
    assert torch.equal(packed(ids).logits, dequantised(tmp_path, packed)(ids).logits)


def test_a_stack_that_no_block_fits_is_refused_or_kept_out_loud(tmp_path, ids):
    torch.manual_seed(0)
    OlmoeForCausalLM(olmoe_config(intermediate_size=36)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="down_proj: last dimension 36"):
        load(tmp_path, quantization_config=ExpertsConfig("nf4"))
    kept = load(tmp_path, quantization_config=ExpertsConfig("nf4", unpackable="keep"))
    assert len(count(kept).not_packed) == 2
    kept(ids)


def test_a_dense_model_is_refused(tmp_path):
    LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, vocab_size=64
        )
    ).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="nothing to pack"):
        load(tmp_path, quantization_config=ExpertsConfig("nf4"))


def test_weights_that_are_not_finite_fail_the_load_and_name_the_layer(tmp_path):
    torch.manual_seed(0)
    model = OlmoeForCausalLM(olmoe_config())
    model.model.layers[1].mlp.experts.down_proj.data[3, 0, 0] = float("inf")
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.experts\.down_proj.*expert 3"):
        load(tmp_path, quantization_config=ExpertsConfig("nf4"))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"scheme": "q4"}, "scheme='q4'"),
        ({"linears": "fp4"}, "linears='fp4'"),
        ({"blocksize": 48}, "blocksize=48"),
        ({"scheme": "bf16", "double_quant": True}, "double_quant"),
        ({"shceme": "nf4"}, "shceme"),
    ],
)
def test_a_wrong_value_is_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ExpertsConfig(**kwargs)


def test_a_model_cast_as_a_whole_says_so(checkpoint, ids):
    packed = load(checkpoint, quantization_config=ExpertsConfig("nf4")).to(torch.bfloat16)
    with pytest.raises(RuntimeError, match="dtype="):
        packed(ids)


def test_an_untested_transformers_version_warns(monkeypatch):
    import moesmith
    from moesmith.experts import seams

    moesmith.unregister()
    monkeypatch.setattr(seams, "version", lambda name: "5.99.0")
    try:
        with pytest.warns(UserWarning, match="5.99.0"):
            moesmith.register()
    finally:
        monkeypatch.undo()
        moesmith.unregister()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            moesmith.register()
