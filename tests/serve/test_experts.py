"""The picture of a text's experts: its counts, its tokens one by one, and that watching changes nothing."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

import tiny
from moesmith.errors import UserError
from moesmith.experts.quantizer import ExpertsConfig
from moesmith.models.layers import adapter_targets, submodule, text_layers
from moesmith.serve import experts
from moesmith.serve.experts import picture

IDS = torch.randint(3, 120, (40,), generator=torch.Generator().manual_seed(3)).tolist()
SOME = ["olmoe", "qwen3_moe", "mixtral", "gemma4", "gpt_oss", "deepseek_v3", "granitemoe", "zaya"]


@pytest.fixture(scope="module")
def packed(checkpoint):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        checkpoint("olmoe"), quantization_config=ExpertsConfig("nf4"), dtype=torch.float32
    ).eval()


def adapted(model):
    """The model with an adapter that moves its routes."""
    modules, parameters = adapter_targets(model, ("experts", "attention"))
    model = get_peft_model(model, LoraConfig(r=4, target_modules=modules, target_parameters=parameters))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.parametrize("family", SOME)
def test_counts_add_up_in_every_layer(family):
    model = tiny.build(family)
    facts = picture(model, IDS, start=11)
    layers = text_layers(model)
    assert facts["layers"] == [layer.name for layer in layers] and facts["experts"] == tiny.NUM_EXPERTS
    assert facts["tokens"] == IDS[11:] and facts["chosen_tokens"] == 29
    for layer, counts, weights, chosen in zip(
        layers, facts["counts"], facts["weights"], facts["chosen"], strict=True
    ):
        if family != "zaya":  # one of its slots routes nowhere
            assert sum(counts) == 29 * layer.top_k
        assert 0 < sum(counts) <= 29 * layer.top_k and len(counts) == layer.num_experts
        assert [w == 0 for w in weights] == [c == 0 for c in counts]
        assert len(chosen) == 29 and all(len(set(of)) == layer.top_k for of in chosen)
        if family != "zaya":
            assert counts == [sum(expert in of for of in chosen) for expert in range(layer.num_experts)]


def test_slots_that_route_nowhere_are_not_counted():
    """A weight of 0 (zaya's skip expert, filled with some id) and an id past the last expert."""
    index = torch.tensor([[0, 1], [0, 3], [0, 4]])
    weight = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.3, 0.7]])
    taken, mean = experts._sums(index, weight, 4)
    assert taken.tolist() == [3, 1, 0, 0]
    assert mean.tolist() == pytest.approx([0.6, 0.5, 0.0, 0.0])


def test_it_is_what_the_router_says(packed):
    """Against the router's own output, which the model computes without us."""
    layers, routed = text_layers(packed), {}
    hooks = [
        submodule(packed, layer.router).register_forward_hook(
            lambda _m, _a, out, name=layer.router: routed.__setitem__(name, out)
        )
        for layer in layers
    ]
    packed(input_ids=torch.tensor([IDS]))
    for hook in hooks:
        hook.remove()
    facts = picture(packed, IDS, start=5)
    for place, layer in enumerate(layers):
        _, weights, index = routed[layer.router]
        assert facts["chosen"][place] == index[5:].tolist()
        for expert in range(layer.num_experts):
            mine = weights[5:][index[5:] == expert]
            expected = mine.mean().item() if len(mine) else 0.0
            assert facts["weights"][place][expert] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", ["plain", "packed", "adapter"])
def test_watching_changes_no_bit_and_leaves_nothing(kind, packed, checkpoint):
    model = tiny.build("olmoe") if kind == "plain" else packed
    if kind == "adapter":
        from transformers import AutoModelForCausalLM

        model = adapted(
            AutoModelForCausalLM.from_pretrained(
                checkpoint("olmoe"), quantization_config=ExpertsConfig("nf4"), dtype=torch.float32
            )
        )
    ids = torch.tensor([IDS])
    before = model(input_ids=ids, use_cache=False).logits
    layers, seen = text_layers(model), {}
    with experts._watching(model, layers, seen):
        watched = model(input_ids=ids, use_cache=False).logits
    picture(model, IDS)
    after = model(input_ids=ids, use_cache=False).logits
    if kind == "plain":  # observed, it leaves the stock loop for the grouped product: rounding
        assert torch.allclose(before, watched, atol=1e-5)
    else:
        assert torch.equal(before, watched)
    assert torch.equal(before, after)
    assert not any(hasattr(module, "experts_observer") for module in model.modules())


def test_an_adapter_has_its_own_routes(checkpoint):
    from transformers import AutoModelForCausalLM

    def fresh():
        return AutoModelForCausalLM.from_pretrained(
            checkpoint("olmoe"), quantization_config=ExpertsConfig("nf4"), dtype=torch.float32
        ).eval()

    base, tuned = picture(fresh(), IDS), picture(adapted(fresh()), IDS)
    assert base["layers"] == tuned["layers"] and base["counts"] != tuned["counts"]
    assert [sum(row) for row in base["counts"]] == [sum(row) for row in tuned["counts"]]


def test_what_stands_before_is_read_but_not_counted(packed):
    whole, part = picture(packed, IDS), picture(packed, IDS, start=30)
    for all_of_them, last in zip(whole["chosen"], part["chosen"], strict=True):
        assert all_of_them[30:] == last
    assert picture(packed, IDS[30:])["chosen"] != part["chosen"], "the context decides too"


def test_a_long_answer_keeps_its_counts_and_loses_only_single_tokens(packed, monkeypatch):
    monkeypatch.setattr(experts, "PER_TOKEN", 3 * tiny.TOP_K * 7)
    short, whole = picture(packed, IDS), None
    monkeypatch.undo()
    whole = picture(packed, IDS)
    assert short["counts"] == whole["counts"] and short["chosen_tokens"] == 7
    assert short["chosen"] == [rows[:7] for rows in whole["chosen"]]


def test_an_error_inside_leaves_the_model_as_it_was(packed):
    with pytest.raises(IndexError):
        picture(packed, [10**6, 5])
    assert not any(hasattr(module, "experts_observer") for module in packed.modules())


@pytest.mark.parametrize(("ids", "start"), [([], 0), (IDS, len(IDS)), (IDS, -1)])
def test_nothing_to_show_is_said(packed, ids, start):
    with pytest.raises(UserError, match="nothing to show"):
        picture(packed, ids, start)


def test_a_dense_model_has_no_experts_to_show():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=128
    )
    with pytest.raises(UserError, match="no MoE layers"):
        picture(LlamaForCausalLM(config), IDS)
