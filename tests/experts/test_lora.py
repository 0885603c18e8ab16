"""Seam 3: adapters on packed experts are stock PEFT adapters."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, OlmoeConfig, OlmoeForCausalLM

import moesmith
from moesmith import ExpertsConfig
from moesmith.experts.storage import named_experts, stack, weight_names

TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("olmoe")
    config = OlmoeConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, num_experts=8, num_experts_per_tok=2, vocab_size=128, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    OlmoeForCausalLM(config).save_pretrained(folder)
    return folder


def load(folder, scheme="nf4", dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=ExpertsConfig(scheme), dtype=dtype
    )


def adapted(folder, scheme="nf4", dtype=torch.float32, seed=1):
    config = LoraConfig(target_modules=["q_proj"], target_parameters=TARGETS, r=4, lora_alpha=8)
    model = get_peft_model(load(folder, scheme, dtype), config)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


IDS = torch.arange(1, 33).reshape(2, 16)


def test_the_adapter_changes_the_model_and_disabling_it_restores_it(checkpoint):
    model, base = adapted(checkpoint), load(checkpoint)
    assert (model(IDS).logits - base(IDS).logits).abs().max() > 1e-2
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, base(IDS).logits)


def test_saved_and_loaded_again_it_is_the_same(checkpoint, tmp_path):
    model = adapted(checkpoint)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(checkpoint), tmp_path)
    assert torch.equal(model(IDS).logits, again(IDS).logits)


def test_stock_peft_loads_it_on_the_dequantised_model(checkpoint, tmp_path):
    model = adapted(checkpoint)
    model.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    for (_, ours), (_, theirs) in zip(named_experts(load(checkpoint)), named_experts(stock), strict=True):
        for name in weight_names(theirs):
            getattr(theirs, name).data.copy_(stack(ours, name).dense(torch.float32))
    moesmith.unregister()
    try:
        stock = PeftModel.from_pretrained(stock, tmp_path)
        expected = stock(IDS).logits
    finally:
        moesmith.register()
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_merged_equals_running_on_a_16bit_base(checkpoint):
    model = adapted(checkpoint, scheme="bf16")
    running = model(IDS).logits
    merged = model.merge_and_unload()(IDS).logits
    torch.testing.assert_close(merged, running, rtol=0.05, atol=0.05)  # one bf16 rounding of W + BA
    base = load(checkpoint, scheme="bf16")(IDS).logits
    assert (merged - running).abs().max() < 0.1 * (running - base).abs().max()


def test_merging_into_packed_weights_is_refused(checkpoint):
    with pytest.raises(ValueError, match="packed to nf4"):
        adapted(checkpoint).merge_and_unload()


@pytest.mark.parametrize("scheme", ["nf4", "int8", "bf16"])
def test_every_adapter_parameter_of_a_used_expert_gets_a_gradient_and_nothing_else(checkpoint, scheme):
    model = adapted(checkpoint, scheme)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    ids = torch.randint(1, 128, (8, 32))
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name), name
        if "lora_" in name:
            assert parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0, name


def test_gradients_equal_stock_peft_on_the_dequantised_model(checkpoint, tmp_path):
    model = adapted(checkpoint)
    model.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, experts_implementation="eager"
    )
    for (_, ours), (_, theirs) in zip(named_experts(model), named_experts(stock), strict=True):
        for name in weight_names(theirs):
            getattr(theirs, name).data.copy_(stack(ours, name).dense(torch.float32))
    moesmith.unregister()
    try:
        stock = PeftModel.from_pretrained(stock, tmp_path, is_trainable=True)
        stock(IDS, labels=IDS).loss.backward()
    finally:
        moesmith.register()
    model(IDS, labels=IDS).loss.backward()
    theirs = {name: p.grad for name, p in stock.named_parameters() if p.grad is not None}
    ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert ours.keys() == theirs.keys()
    for name, grad in ours.items():
        torch.testing.assert_close(grad, theirs[name], rtol=1e-3, atol=1e-5, msg=name)


def test_two_active_adapters_add_up(checkpoint):
    model = adapted(checkpoint)
    model.add_adapter(
        "second", LoraConfig(target_modules=["q_proj"], target_parameters=TARGETS, r=2, lora_alpha=2)
    )
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B.second" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    one = model(IDS).logits
    model.base_model.set_adapter(["default", "second"])
    both = model(IDS).logits
    assert (both - one).abs().max() > 1e-3
    experts = model.base_model.model.model.layers[0].mlp.experts
    hidden, index, weights = torch.randn(6, 64), torch.randint(8, (6, 2)), torch.rand(6, 2)
    before = experts(hidden, index, weights)
    for wrapper in (experts, experts.base_layer):  # fold the second adapter into one of rank 6 by hand
        first, second = wrapper.expert_lora("default"), wrapper.expert_lora("second")
        delta = [lora.scaling * lora.B @ lora.A for lora in (first, second)]
        rank6 = torch.cat([first.B * first.scaling, second.B * second.scaling], 2) @ torch.cat(
            [first.A, second.A], 1
        )
        torch.testing.assert_close(rank6, delta[0] + delta[1])
    model.base_model.set_adapter("default")
    assert (experts(hidden, index, weights) - before).abs().max() > 1e-4


def test_no_adapter_tensor_is_left_on_the_module_after_a_forward(checkpoint):
    model = adapted(checkpoint)
    model(IDS)
    assert all(module.experts_lora == {} for _, module in named_experts(model))


@torch.no_grad()
def test_decoding_sees_an_adapter_that_changed(checkpoint):
    model = adapted(checkpoint)
    experts = model.base_model.model.model.layers[0].mlp.experts
    call = torch.randn(1, 64), torch.tensor([[2, 5]]), torch.rand(1, 2)
    first = experts(*call)
    assert torch.equal(experts(*call), first)  # from what was kept
    for wrapper in (experts, experts.base_layer):
        wrapper.lora_B["default"].weight.mul_(2)
    changed = experts(*call)
    with torch.enable_grad():
        fresh = experts(*call)
    torch.testing.assert_close(changed, fresh)
    assert (changed - first).abs().max() > 1e-4
