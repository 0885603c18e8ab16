import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, Qwen3Config

from moesmith.build import routerfit, split
from moesmith.build.capture import LayerInputs, Text, capture
from moesmith.build.native import NATIVE, native_config
from moesmith.build.split import (
    SplitFit,
    all_active_difference,
    ffn_weights,
    random_routers,
    refold,
    slice_ffn,
    split_model,
)
from moesmith.errors import UserError
from moesmith.models.layers import moe_layers, submodule


@torch.no_grad()
def logits(model, input_ids, **kwargs):
    return model(input_ids, **kwargs).logits


def test_all_experts_on_equals_the_dense_model(dense, chunks):
    model, report = split_model(dense, chunks, num_experts=8, top_k=8, verify=chunks[0])
    assert type(model.config).model_type == NATIVE[dense.config.model_type].model_type
    assert report.difference < 1e-4
    for layer in moe_layers(model):
        submodule(model, layer.router).weight.data.zero_()  # every expert at exactly 1/k
    ids = chunks[1]  # 24 tokens: three times the sliding window of the Mistral
    torch.testing.assert_close(logits(model, ids), logits(dense, ids), atol=1e-4, rtol=1e-4)
    mask = torch.ones_like(ids)
    mask[:2, :5] = 0  # left-padded rows
    kept = mask.bool()
    padded, wanted = logits(model, ids, attention_mask=mask), logits(dense, ids, attention_mask=mask)
    torch.testing.assert_close(padded[kept], wanted[kept], atol=1e-4, rtol=1e-4)


def test_top_k_equals_the_dense_ffn_restricted_to_the_chosen_neurons(dense, chunks):
    """The experts the router did not pick are missing, and nothing else changed: the weights are 1 each."""
    model, _ = split_model(dense, chunks, num_experts=8, top_k=5)
    layer = moe_layers(model)[0]
    block = submodule(model, layer.name)
    x = torch.randn(1, 7, 48)
    chosen = block.gate(x)[2]
    experts = submodule(model, layer.experts)
    with torch.no_grad():
        got = block(x)[0]
        for token in range(7):
            gate, up = torch.einsum("h,eih->ei", x[0, token], experts.gate_up_proj[chosen[token]]).chunk(2, 1)
            hidden = torch.nn.functional.silu(gate) * up
            want = torch.einsum("ei,ehi->h", hidden, experts.down_proj[chosen[token]] / 5)
            torch.testing.assert_close(got[token], want, atol=1e-3, rtol=1e-2)


def test_experts_are_the_dense_neurons_each_once(llama, chunks):
    model, _ = split_model(llama, chunks, num_experts=8, top_k=4)
    gate, up, down = ffn_weights(llama.model.layers[2].mlp, "layer")
    experts = submodule(model, moe_layers(model)[2].experts)
    rows = torch.cat(
        [experts.gate_up_proj[:, :16].reshape(-1, 48), experts.gate_up_proj[:, 16:].reshape(-1, 48)], 1
    )
    columns = experts.down_proj.permute(0, 2, 1).reshape(-1, 48) / 4
    found = torch.cdist(rows, torch.cat([gate, up], 1)).argmin(1)
    assert sorted(found.tolist()) == list(range(128))
    torch.testing.assert_close(rows, torch.cat([gate, up], 1)[found])
    torch.testing.assert_close(columns, down.T[found])


def test_fitted_router_keeps_more_than_a_random_one(dense, chunks):
    model, report = split_model(dense, chunks, num_experts=8, top_k=4)
    for layer in report.layers:
        assert layer.random == 0.5
        assert layer.random < layer.kept <= layer.best <= 1
    ids = chunks[-1]
    wanted = logits(dense, ids)
    fitted = (logits(model, ids) - wanted).square().mean()
    with random_routers(model):
        randomised = (logits(model, ids) - wanted).square().mean()
    assert fitted < randomised
    assert torch.equal((logits(model, ids) - wanted).square().mean(), fitted)  # the routers are back


def test_permuting_experts_with_router_rows_changes_nothing(llama, chunks):
    model, _ = split_model(llama, chunks, num_experts=8, top_k=4)
    for layer in moe_layers(model):  # the softmax of logits this small is the same number for some experts
        submodule(model, layer.router).weight.data *= 1e3
    ids = chunks[0]
    before = logits(model, ids)
    order = torch.tensor([3, 0, 7, 1, 2, 6, 5, 4])
    alone = copy.deepcopy(model)
    for changed, with_router in ((model, True), (alone, False)):
        for layer in moe_layers(changed):
            experts = submodule(changed, layer.experts)
            for weight in (experts.gate_up_proj, experts.down_proj):
                weight.data = weight.data[order]
            if with_router:
                router = submodule(changed, layer.router)
                router.weight.data = router.weight.data[order]
    torch.testing.assert_close(logits(model, ids), before, atol=1e-4, rtol=1e-4)
    assert (logits(alone, ids) - before).abs().max() > 0.1


def test_saved_and_loaded_by_the_stock_class(dense, chunks, tmp_path):
    model, _ = split_model(dense, chunks, num_experts=8, top_k=6)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, chunks[0]), logits(model, chunks[0]))
    assert loaded.config.num_experts_per_tok == 6
    if dense.config.tie_word_embeddings:
        assert loaded.lm_head.weight.data_ptr() == loaded.get_input_embeddings().weight.data_ptr()


def test_same_seed_same_bytes(llama, chunks):
    one, _ = split_model(llama, chunks, num_experts=8, top_k=4, seed=3)
    two, _ = split_model(llama, chunks, num_experts=8, top_k=4, seed=3)
    for (name, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_refold_changes_how_many_are_active(llama, chunks):
    model, _ = split_model(llama, chunks, num_experts=8, top_k=2)
    other, _ = split_model(llama, chunks, num_experts=8, top_k=6)
    assert not torch.allclose(logits(model, chunks[0]), logits(other, chunks[0]), atol=1e-2)
    refold(model, 6)
    torch.testing.assert_close(logits(model, chunks[0]), logits(other, chunks[0]), atol=1e-4, rtol=1e-4)
    with pytest.raises(UserError, match="top_k=9"):
        refold(model, 9)


def test_difference_shows_a_wrong_split(llama, chunks):
    model, _ = split_model(llama, chunks, num_experts=8, top_k=8)
    submodule(model, moe_layers(model)[1].experts).down_proj.data[3, 5, 7] += 1
    assert all_active_difference(llama, model, chunks[0]) > 1e-3


def test_slices_keep_dtype_and_fold():
    gate, up, down = torch.randn(12, 8), torch.randn(12, 8), torch.randn(8, 12)
    members = torch.randperm(12).view(3, 4)
    gate_up_proj, down_proj = slice_ffn(gate, up, down.bfloat16(), members, fold=4)
    assert gate_up_proj.shape == (3, 8, 8) and down_proj.shape == (3, 8, 4)
    assert down_proj.dtype == torch.bfloat16
    assert torch.equal(down_proj[1, :, 2], down.bfloat16()[:, members[1, 2]] * 4)
    assert torch.equal(gate_up_proj[2, 4 + 3], up[members[2, 3]])


@pytest.mark.parametrize(
    ("config", "num_experts", "top_k", "message"),
    [
        (GPT2Config(), 4, 2, "no native MoE class.*'gpt2'"),
        (LlamaConfig(intermediate_size=100), 16, 4, "does not divide the FFN width 100"),
        (LlamaConfig(intermediate_size=128), 16, 17, "top_k=17"),
        (LlamaConfig(intermediate_size=128, attention_bias=True), 16, 4, "attention_bias=True"),
        (
            Qwen3Config(intermediate_size=128, num_hidden_layers=4, use_sliding_window=True,
            max_window_layers=2), 16, 4, "layer_types=",
        ),
    ],
)  # fmt: skip
def test_refused_before_anything_is_computed(config, num_experts, top_k, message):
    with pytest.raises(UserError, match=message):
        native_config(config, num_experts, top_k)


def test_other_ffns_are_refused(chunks):
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=48, n_head=2, vocab_size=97))
    with pytest.raises(UserError, match="wanted gate_proj"):
        ffn_weights(model.transformer.h[0].mlp, "transformer.h.0")


def test_one_chunk_is_not_enough(llama, chunks):
    with pytest.raises(ValueError, match="wanted 2 or more"):
        split_model(llama, chunks[:1])


# ---------------------------------------------------------------- layer by layer


def texts(count: int, held_out: int) -> list[Text]:
    generator = torch.Generator().manual_seed(2)
    lengths = [20 + 3 * n for n in range(count)]
    ids = [torch.randint(0, 97, (length,), generator=generator).tolist() for length in lengths]
    return [Text(row, -1, n < count - held_out, str(n), "all") for n, row in enumerate(ids)]


def test_streamed_fit_is_a_split_of_every_layer(dense, tmp_path):
    dense.save_pretrained(tmp_path / "dense")
    given = texts(12, held_out=3)
    fit = SplitFit(given, num_experts=8, top_k=4)
    capture(tmp_path / "dense", given, fit.visit, tmp_path / "state")
    facts = fit.facts()
    assert len(fit.members) == len(fit.routers) == len(fit.layers) == 3
    assert facts["held_out"] and facts["held_out_tokens"] == sum(len(text.ids) for text in given[-3:])
    assert facts["tokens"] == sum(len(text.ids) for text in given[:-3])
    for members, router, layer in zip(fit.members, fit.routers, fit.layers, strict=True):
        assert sorted(members.flatten().tolist()) == list(range(128))
        assert router.shape == (8, 48) and router.dtype == torch.float32
        assert layer.random == 0.5 < layer.kept <= layer.best <= 1
        assert 0.5 < layer.picked <= 1
    assert facts["kept"] == pytest.approx(sum(layer.kept for layer in fit.layers) / 3)


def test_streamed_fit_is_the_fit_of_the_model_in_memory(llama, chunks, tmp_path):
    """Same tokens, same held-out ones: same experts and routers."""
    llama.save_pretrained(tmp_path / "dense")
    rows = torch.cat(chunks)
    given = [Text(row.tolist(), -1, n < len(rows) - 4, str(n), "all") for n, row in enumerate(rows)]
    fit = SplitFit(given, num_experts=8, top_k=4, seed=5)
    capture(tmp_path / "dense", given, fit.visit, tmp_path / "state")
    model, report = split_model(llama, chunks, num_experts=8, top_k=4, seed=5)
    for number, layer in enumerate(moe_layers(model)):
        gate, up, down = ffn_weights(llama.model.layers[number].mlp, "layer")
        gate_up_proj, down_proj = slice_ffn(gate, up, down, fit.members[number], fold=4)
        experts = submodule(model, layer.experts)
        assert torch.equal(experts.gate_up_proj, gate_up_proj)
        torch.testing.assert_close(experts.down_proj, down_proj)
        router = submodule(model, layer.router).weight
        torch.testing.assert_close(router, fit.routers[number], rtol=1e-2, atol=1e-8)
        assert fit.layers[number].kept == pytest.approx(report.layers[number].kept, abs=1e-4)


def layer_inputs(ffn: torch.nn.Module, tokens: int = 90, dtype: torch.dtype = torch.float32) -> LayerInputs:
    x = torch.randn(tokens, 48, generator=torch.Generator().manual_seed(4)).to(dtype)
    place = torch.arange(tokens)
    return LayerInputs(0, x, place // 30, place % 30, ffn)


def test_pieces_of_tokens_change_nothing(llama, monkeypatch):
    given = layer_inputs(llama.model.layers[0].mlp)
    fits = []
    for chunk in (1000, 7):
        monkeypatch.setattr(split, "CHUNK", chunk)
        monkeypatch.setattr(routerfit, "CHUNK", chunk)
        fits.append(SplitFit(texts(3, held_out=1), 8, 4))
        fits[-1].visit(given)
    assert torch.equal(fits[0].members[0], fits[1].members[0])
    torch.testing.assert_close(fits[0].routers[0], fits[1].routers[0], rtol=1e-3, atol=1e-9)


def test_held_out_tokens_are_not_fitted_on(llama):
    given = layer_inputs(llama.model.layers[0].mlp)
    one, two = SplitFit(texts(3, held_out=1), 8, 4), SplitFit(texts(3, held_out=1), 8, 4)
    one.visit(given)
    given.inputs[60:] = torch.randn(30, 48)
    two.visit(given)
    assert torch.equal(one.routers[0], two.routers[0]) and torch.equal(one.members[0], two.members[0])
    assert one.layers != two.layers


def test_without_held_out_text_the_facts_say_so(llama):
    fit = SplitFit(texts(3, held_out=0), 8, 4)
    fit.visit(layer_inputs(llama.model.layers[0].mlp))
    assert fit.facts()["held_out"] is False and fit.facts()["tokens"] == 90


def test_the_ffn_of_a_gemma_is_run_with_its_own_activation(llama):
    """gelu instead of silu: other neurons are busy, other experts come out."""
    ffn = copy.deepcopy(llama.model.layers[0].mlp)
    fits = []
    for activation in (torch.nn.SiLU(), torch.nn.GELU(approximate="tanh")):
        ffn.act_fn = activation
        fits.append(SplitFit(texts(3, held_out=1), 8, 4))
        fits[-1].visit(layer_inputs(ffn))
    assert not torch.equal(fits[0].members[0], fits[1].members[0])


def test_streamed_splits_that_cannot_be_are_refused(llama):
    ffn = copy.deepcopy(llama.model.layers[0].mlp)
    with pytest.raises(UserError, match="128 neurons cannot be split into 7"):
        SplitFit(texts(3, held_out=1), 7, 4).visit(layer_inputs(ffn))
    with pytest.raises(UserError, match="none of the 90 tokens is to fit on"):
        SplitFit(texts(3, held_out=3), 8, 4).visit(layer_inputs(ffn))
    ffn.down_proj.weight.data[3, 5] = torch.inf
    with pytest.raises(UserError, match="model.layers.0 writes NaN or infinity"):
        SplitFit(texts(3, held_out=1), 8, 4).visit(layer_inputs(ffn))
