"""Law 9: an observed model computes what it computes unobserved, and the sums are the definition's."""

from __future__ import annotations

import pytest
import torch
from transformers.integrations.moe import grouped_mm_experts_forward

import tiny
from moesmith.errors import UserError
from moesmith.experts.storage import named_experts
from moesmith.models.layers import moe_layers, submodule
from moesmith.prune.observe import Collector
from moesmith.prune.stats import SUMS, Document, Profile

DOCUMENTS = [Document("a", "code", 40), Document("b", "math", 64), Document("c", "code", 24)]
# Two rows: document 0 and the start of 2 in the first, document 1 in the second, padding at both ends.
INDEX = torch.full((2, 64), -1)
INDEX[0, :40], INDEX[0, 44:60], INDEX[1, 2:] = 0, 2, 1

# One set of experts there sees only some of a batch's tokens (image tokens, a canvas of another length).
PARTIAL = {"diffusion_gemma", "ernie4_5_vl_moe"}


def logits(model, inputs):
    torch.manual_seed(0)  # diffusion_gemma draws
    with torch.no_grad():
        return model(**inputs).logits


def observe(model, inputs, index=INDEX, documents=DOCUMENTS) -> Profile:
    collector = Collector(moe_layers(model), documents)
    with collector.attach(model), collector.batch(index):
        logits(model, inputs)
    return collector.finish({})


@pytest.mark.parametrize("family", [name for name in tiny.FAMILIES if name not in PARTIAL])
def test_observed_is_plain_bit_for_bit_and_every_choice_is_counted(family):
    model = tiny.build(family)
    inputs = tiny.inputs(model)
    model.set_experts_implementation("grouped_mm")
    plain = logits(model, inputs)
    collector = Collector(moe_layers(model), DOCUMENTS)
    with collector.attach(model), collector.batch(INDEX):
        assert torch.equal(logits(model, inputs), plain)
    profile = collector.finish({})
    assert torch.equal(logits(model, inputs), plain)
    assert all(not hasattr(module, "experts_observer") for _, module in named_experts(model))
    for layer in profile.layers:
        tokens = int((INDEX >= 0).sum())
        chosen = layer.total("tokens").sum()
        # zaya may skip a layer; deepseek_v4's id table may name an expert twice
        assert chosen == tokens * layer.top_k if family != "zaya" else 0 < chosen <= tokens
        assert torch.isfinite(layer.sums["contribution"]).all()


@pytest.mark.parametrize("family", sorted(PARTIAL))
def test_a_model_that_splits_its_tokens_is_refused(family):
    model = tiny.build(family)
    with pytest.raises(UserError, match="of the batch's"):
        observe(model, tiny.inputs(model))


def by_definition(model, inputs, layer):
    """Every sum of one layer, straight from the arguments and weights of its experts call, in fp64."""
    module = submodule(model, layer.name)
    seen = {}

    def spy(module_, args, output):
        seen["call"] = (*args, output)

    hooks = [module.register_forward_hook(spy)]
    block_norm = next(m for n, m in model.named_modules() if n == layer.layer.rsplit(".", 1)[0])
    hooks.append(
        block_norm.post_attention_layernorm.register_forward_hook(
            lambda _m, args, _o: seen.update(residual=args[0])
        )
    )
    logits(model, inputs)
    for hook in hooks:
        hook.remove()
    x, index, gates, y = seen["call"]
    h = seen["residual"].reshape(x.shape).double()
    y = y.double()
    turned = (1 - torch.cosine_similarity(h, h + y, dim=-1)).clamp_min(0)
    sums = {name: torch.zeros(2, layer.num_experts, dtype=torch.float64) for name in SUMS}
    squares = torch.zeros(len(DOCUMENTS), layer.num_experts, dtype=torch.float64)
    for token, document in enumerate(INDEX.flatten().tolist()):
        if document < 0:
            continue
        domain = ["code", "math"].index(DOCUMENTS[document].domain)
        for expert, gate in zip(index[token].tolist(), gates[token].double(), strict=True):
            one = torch.tensor([[expert]])
            f = grouped_mm_experts_forward(module, x[token : token + 1], one, torch.ones(1, 1))[0].double()
            norm = f.norm()
            squares[document, expert] += (gate * norm) ** 2
            for name, value in {
                "tokens": 1.0,
                "gate": gate,
                "gate_sq": gate**2,
                "norm": norm,
                "norm_sq": norm**2,
                "contribution": gate * norm,
                "contribution_sq": (gate * norm) ** 2,
                "easyep": gate * norm * turned[token],
                "relative": (gate * norm) ** 2 / y[token].norm() ** 2,
            }.items():
                sums[name][domain, expert] += value
    for document, root in zip(DOCUMENTS, squares.sqrt(), strict=True):
        sums["prompt_norm"][["code", "math"].index(document.domain)] += root
    return sums


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "glm4_moe", "olmoe"])
def test_the_sums_are_the_definition(family):
    model = tiny.build(family)
    inputs = tiny.inputs(model)
    profile = observe(model, inputs)
    layer = profile.layers[-1]
    for name, expected in by_definition(model, inputs, layer).items():
        rtol = 1e-3 if name == "easyep" else 1e-5  # one minus a cosine near one
        torch.testing.assert_close(
            layer.sums[name], expected, rtol=rtol, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_batches_one_document_each_give_the_same_sums_as_one_batch():
    model = tiny.build("mixtral")
    ids = tiny.inputs(model)["input_ids"]
    documents = [Document("a", "x", 64), Document("b", "y", 64)]
    index = torch.tensor([0, 1])[:, None].expand(2, 64)
    together = observe(model, {"input_ids": ids}, index, documents)
    collector = Collector(moe_layers(model), documents)
    with collector.attach(model):
        for row in (0, 1):
            with collector.batch(index[row : row + 1]):
                logits(model, {"input_ids": ids[row : row + 1]})
    apart = collector.finish({})
    for one, other in zip(together.layers, apart.layers, strict=True):
        for name in SUMS:
            torch.testing.assert_close(one.sums[name], other.sums[name], rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(one.mean_output, other.mean_output, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(one.max_norm, other.max_norm, rtol=1e-5, atol=1e-9)
        assert torch.equal(one.coactivation, other.coactivation)
        assert torch.equal(one.coactivation.diagonal(), one.total("tokens"))


def test_stopped_and_continued_is_the_same_to_the_bit():
    model = tiny.build("qwen3_moe")
    ids = tiny.inputs(model)["input_ids"]
    documents = [Document("a", "x", 64), Document("b", "y", 64)]

    def run(collector, rows):
        with collector.attach(model):
            for row in rows:
                with collector.batch(torch.full((1, 64), row)):
                    logits(model, {"input_ids": ids[row : row + 1]})

    whole = Collector(moe_layers(model), documents)
    run(whole, (0, 1))
    first = Collector(moe_layers(model), documents)
    run(first, (0,))
    saved = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    second = Collector(moe_layers(model), documents)
    second.load_state_dict(saved)
    run(second, (1,))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


def test_a_nan_names_the_layer_the_expert_and_the_document():
    model = tiny.build("mixtral")
    layer = moe_layers(model)[1]
    with torch.no_grad():
        submodule(model, layer.experts).down_proj[5] = torch.nan
    with pytest.raises(UserError, match=rf"{layer.experts}: expert 5 gave NaN .* document"):
        observe(model, tiny.inputs(model))


def test_norms_do_not_overflow_in_16_bits():
    """The norm of a large fp16 vector is infinite in fp16; ours is taken in fp32."""
    model = tiny.build("mixtral")
    module = submodule(model, moe_layers(model)[0].experts)
    rows = torch.full((8, 64), 30_000.0, dtype=torch.float16)
    assert rows.norm(dim=-1).isinf().all()
    norms = torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float32)
    torch.testing.assert_close(norms, torch.full((8,), 240_000.0))
    with torch.no_grad():
        module.down_proj.mul_(1e5 / module.down_proj.abs().max())
    profile = observe(model.bfloat16(), tiny.inputs(model))
    assert profile.layers[0].sums["norm"].isfinite().all()


def test_a_dense_model_has_nothing_to_profile():
    with pytest.raises(UserError, match="no MoE layers"):
        Collector([], DOCUMENTS)


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "gemma4", "deepseek_v3"])
def test_on_a_gpu_the_sums_are_those_of_the_cpu(family):
    model = tiny.build(family)
    inputs = tiny.inputs(model)
    on_cpu = observe(model, inputs)
    on_gpu = observe(model.cuda(), {name: tensor.cuda() for name, tensor in inputs.items()})
    for one, other in zip(on_cpu.layers, on_gpu.layers, strict=True):
        for name in ("tokens", "gate", "norm", "contribution"):
            torch.testing.assert_close(one.sums[name], other.sums[name], rtol=2e-2, atol=1e-3)
