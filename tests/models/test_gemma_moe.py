"""Gemma 2 and Gemma 3 with experts: their laws against the dense classes. What holds for every family
(packed, pruned, permuted, adapted) is tested with the others, through `tiny`."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    PreTrainedModel,
)
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import tiny
from chats import tokenizer
from moesmith.models.anatomy import meta_model
from moesmith.models.checkpoint import check_architecture, model_class
from moesmith.models.custom import CUSTOM, unregister_classes, write_code
from moesmith.models.gemma_moe.modeling_gemma_moe import GemmaMoeRouter, load_balancing_loss
from moesmith.models.layers import moe_layers
from moesmith.models.rewrite import rewrite_checkpoint

E, WINDOW, LENGTH, TOLERANCE = 4, 8, 21, 1e-5

# Dense class, MoE model type, and what sets the tiny config apart from a Llama: each of it has to survive.
KINDS = {
    "gemma2": (Gemma2ForCausalLM, "gemma2_moe",
               {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0,
                "layer_types": ["sliding_attention", "full_attention"] * 2}),
    "gemma3": (Gemma3ForCausalLM, "gemma3_moe_text",
               {"layer_types": ["sliding_attention"] * 2 + ["full_attention", "sliding_attention"],
                "rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                                    "full_attention": {"rope_type": "linear", "factor": 2.0,
                                                       "rope_theta": 5000.0}}}),
}  # fmt: skip


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def dense(kind: str, seed: int = 0) -> PreTrainedModel:
    """A tiny dense model, fp32, eager, no norm at its start value. Another seed changes its MLPs only."""
    model_class, _, special = KINDS[kind]
    torch.manual_seed(0)
    config = model_class.config_class(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=24, sliding_window=WINDOW,
        initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2, **special,
    )  # fmt: skip
    config._attn_implementation = "eager"
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        torch.manual_seed(seed)
        for layer in model.model.layers:
            for linear in layer.mlp.children():
                if isinstance(linear, nn.Linear):
                    linear.weight.normal_(std=0.2)
    return model


@torch.no_grad()
def moe(kind: str, sources: list[PreTrainedModel], top_k: int, router: float = 3.0) -> PreTrainedModel:
    """Attention and norms of the first source, each source's MLPs as an expert, routers of this scale."""
    config_class = CONFIG_MAPPING[KINDS[kind][1]]
    values = sources[0].config.to_dict()
    del values["model_type"], values["architectures"]
    config = config_class(**values, num_experts=len(sources), num_experts_per_tok=top_k)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).eval()
    state = {k: v for k, v in sources[0].state_dict().items() if ".mlp." not in k}
    torch.manual_seed(1)
    for i in range(config.num_hidden_layers):
        mlps = [source.model.layers[i].mlp for source in sources]
        name = f"model.layers.{i}.mlp"
        state[f"{name}.experts.gate_up_proj"] = torch.stack(
            [torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]) for mlp in mlps]
        )
        state[f"{name}.experts.down_proj"] = torch.stack([mlp.down_proj.weight for mlp in mlps])
        state[f"{name}.gate.weight"] = torch.randn(len(sources), config.hidden_size) * router
    model.load_state_dict(state)
    return model


def ids(batch: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randint(3, 120, (batch, length), generator=torch.Generator().manual_seed(0))


def padded() -> tuple[Tensor, Tensor]:
    """A batch of two, the second 9 tokens shorter and padded on the left."""
    tokens, mask = ids(), torch.ones(2, LENGTH, dtype=torch.long)
    tokens[1, :9], mask[1, :9] = 0, 0
    return tokens, mask


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert float((actual - expected).abs().max()) <= TOLERANCE


# --- against the dense model ---


@pytest.mark.parametrize("top_k", [1, 2, E])
@torch.no_grad()
def test_identical_experts_are_the_dense_model(kind, top_k):
    """Beyond the sliding window, padded on the left, and decoded token by token from a cache."""
    source = dense(kind)
    model = moe(kind, [source] * E, top_k)
    assert_close(model(ids()).logits, source(ids()).logits)

    tokens, mask = padded()
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    given = {"attention_mask": mask, "position_ids": positions}
    expected = source(tokens, **given).logits
    assert_close(model(tokens, **given).logits[mask.bool()], expected[mask.bool()])

    cache, steps = None, []
    for start, end in [(0, 12), *((i, i + 1) for i in range(12, LENGTH))]:
        step = model(
            tokens[:, start:end], attention_mask=mask[:, :end], position_ids=positions[:, start:end],
            past_key_values=cache, use_cache=True,
        )  # fmt: skip
        cache = step.past_key_values
        steps.append(step.logits)
    assert_close(torch.cat(steps, 1)[mask.bool()], expected[mask.bool()])

    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(tokens, **options), source.generate(tokens, **options))


@pytest.mark.gpu
def test_identical_experts_are_the_dense_model_on_a_gpu(kind):
    source = dense(kind)
    model = moe(kind, [source] * E, top_k=2).to("cuda", torch.bfloat16)
    source.to("cuda", torch.bfloat16)
    with torch.no_grad():
        expected, actual = (m(ids().to("cuda")).logits.float() for m in (source, model))
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.05 * float(expected.std()))


@contextmanager
def forced(model: nn.Module, expert: int) -> Iterator[None]:
    """Every router gives all weight to one expert."""

    def force(_module, _args, output):
        logits, weights, index = output
        return logits, torch.ones_like(weights), torch.full_like(index, expert)

    hooks = [m.register_forward_hook(force) for m in model.modules() if isinstance(m, GemmaMoeRouter)]
    yield
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def test_one_expert_alone_is_its_source(kind):
    sources = [dense(kind, seed) for seed in range(E)]
    model = moe(kind, sources, top_k=1)
    for compute in ("eager", "batched_mm", "grouped_mm"):
        model.set_experts_implementation(compute)
        for expert, source in enumerate(sources):
            with forced(model, expert):
                assert_close(model(ids()).logits, source(ids()).logits)


class Mean(nn.Module):
    def __init__(self, mlps):
        super().__init__()
        self.mlps = nn.ModuleList(mlps)

    def forward(self, x):
        return torch.stack([mlp(x) for mlp in self.mlps]).mean(0)


@torch.no_grad()
def test_all_experts_and_a_uniform_router_are_their_mean(kind):
    sources = [dense(kind, seed) for seed in range(E)]
    model = moe(kind, sources, top_k=E, router=0.0)
    mean = copy.deepcopy(sources[0])
    for i, layer in enumerate(mean.model.layers):
        layer.mlp = Mean([source.model.layers[i].mlp for source in sources])
    assert_close(model(ids()).logits, mean(ids()).logits)


# flex_attention is compiled first: about a minute on one core.
@pytest.mark.parametrize("attention", ["sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)])
@torch.no_grad()
def test_attention_implementations_agree(kind, attention):
    # A sharp router would blow up their rounding: 3e-6 in the dense model's logits with flex_attention.
    model = moe(kind, [dense(kind, seed) for seed in range(E)], top_k=2, router=0.1)
    tokens, mask = padded()
    expected = model(tokens, attention_mask=mask).logits[mask.bool()]
    if (kind, attention) == ("gemma2", "sdpa"):  # it cannot cap logits: transformers refuses, dense or not
        with pytest.raises(ValueError, match="does not support an attention implementation"):
            model.set_attn_implementation(attention)
    else:
        model.set_attn_implementation(attention)
        assert_close(model(tokens, attention_mask=mask).logits[mask.bool()], expected)


def test_experts_are_dispatched_even_after_the_dense_class_was_asked(kind):
    """transformers keeps the dense class's no where its subclasses find it."""
    source = dense(kind)
    assert not source._can_set_experts_implementation()
    model = moe(kind, [source] * 2, top_k=1)
    assert model._can_set_experts_implementation()
    assert model.config._experts_implementation == "grouped_mm"


# --- training ---


def balanced(tokens: int, top_k: int) -> Tensor:
    """(tokens, E) logits that send equally many tokens to every expert."""
    row = torch.arange(tokens)[:, None]
    return 2.0 * ((torch.arange(E) - row) % E < top_k)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_balancing_loss_is_k_when_balanced_and_more_when_one_layer_collapses(top_k):
    even = balanced(4 * E, top_k)
    assert float(load_balancing_loss((even,) * 3, top_k)) == pytest.approx(top_k)
    collapsed = even[:1].expand_as(even)
    alone = float(load_balancing_loss((collapsed,), top_k))
    assert alone > top_k + 0.3
    among = float(load_balancing_loss((even, collapsed, even), top_k))
    assert among == pytest.approx(top_k + (alone - top_k) / 3)


def test_balancing_loss_of_a_collapse_in_every_layer_is_not_hidden_by_pooling():
    """Layer l sends all its tokens to expert l: even, when pooled over the layers as transformers does."""
    layers = tuple(torch.eye(E)[e].mul(30.0).expand(8, E) for e in range(E))
    assert float(load_balancing_loss_func(layers, E, 1)) == pytest.approx(1.0)
    assert float(load_balancing_loss(layers, 1)) == pytest.approx(E)


def test_balancing_loss_of_the_model(kind):
    """Padding does not count, the loss contains it, and it reaches every router."""
    model = moe(kind, [dense(kind)] * E, top_k=2, router=0.3)
    model.config.router_aux_loss_coef = 0.5
    tokens, mask = padded()
    given = {"attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}
    plain = model(tokens, **given)
    assert plain.aux_loss is None and plain.router_logits is None
    out = model(tokens, **given, output_router_logits=True)
    real = tuple(layer[mask.flatten().bool()] for layer in out.router_logits)
    assert [layer.shape for layer in real] == [(int(mask.sum()), E)] * 4
    assert out.aux_loss.item() == pytest.approx(load_balancing_loss(real, 2).item(), abs=1e-6)
    assert out.aux_loss.item() != pytest.approx(load_balancing_loss(out.router_logits, 2).item(), abs=1e-3)
    assert (out.loss - plain.loss).item() == pytest.approx(0.5 * out.aux_loss.item(), abs=1e-5)
    out.aux_loss.backward()
    assert all(layer.mlp.gate.weight.grad.abs().sum() > 0 for layer in model.model.layers)
    model.config.output_router_logits = True
    step = model(tokens[:, -1:], attention_mask=mask, past_key_values=plain.past_key_values)
    assert step.aux_loss.isfinite() and step.router_logits[0].shape == (2, E)


def test_gradient_checkpointing_changes_no_gradient(kind):
    model = moe(kind, [dense(kind, seed) for seed in range(E)], top_k=2).train()
    tokens, mask = padded()

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(tokens, attention_mask=mask, labels=tokens, output_router_logits=True).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    calls = []
    hook = model.model.layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    actual = gradients()
    hook.remove()
    assert len(calls) == 2  # forward, and again for the gradient
    for name, gradient in expected.items():
        assert gradient.abs().sum() > 0, name
        assert torch.equal(actual[name], gradient), name


# --- configs and folders ---


def test_a_config_that_cannot_route_is_refused():
    for name in CUSTOM:
        assert CONFIG_MAPPING[name](intermediate_size=24).moe_intermediate_size == 24
        with pytest.raises(Exception, match="num_experts_per_tok=3 with num_experts=2"):
            CONFIG_MAPPING[name](num_experts=2, num_experts_per_tok=3)


def test_the_tied_head_is_in_the_file_once(kind, tmp_path):
    moe(kind, [dense(kind)] * E, top_k=2).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight


CLEAN = """
import sys
sys.modules["moesmith"] = None  # importing it is an error from here on
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
logits = {}
for folder in map(Path, sys.argv[2:]):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    with torch.no_grad():
        logits[str(folder)] = model(torch.arange(3, 30)[None]).logits
    model.save_pretrained(folder / "again")
    assert AutoTokenizer.from_pretrained(folder)("a").input_ids
torch.save(logits, sys.argv[1])
"""


def test_saved_pruned_and_assembled_folders_load_without_moesmith(tmp_path):
    """Bit-equal logits in a process that cannot import moesmith, and what that process saves is whole too."""
    folders = []
    for name in CUSTOM:
        saved, pruned, assembled = (tmp_path / name / part for part in ("saved", "pruned", "assembled"))
        model = tiny.build(name)
        model.save_pretrained(saved)
        tokenizer().save_pretrained(saved)
        pruned.mkdir()
        rewrite_checkpoint(saved, pruned, {layer.name: [0, 2, 3, 7] for layer in moe_layers(model)})
        assembled.mkdir()  # as a writer of bytes leaves it: config, weights, tokenizer
        for file in saved.iterdir():
            if file.suffix != ".py":
                (assembled / file.name).write_bytes(file.read_bytes())
        config = json.loads((assembled / "config.json").read_text())
        del config["auto_map"]
        (assembled / "config.json").write_text(json.dumps(config))
        assert len(write_code(assembled)) == 2
        folders += [saved, pruned, assembled]

    out = tmp_path / "logits.pt"
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", CLEAN, out, *folders], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    logits = torch.load(out)
    for folder in folders:
        for copy_ in (folder, folder / "again"):
            with torch.no_grad():
                ours = AutoModelForCausalLM.from_pretrained(copy_)
                assert type(ours).__module__.startswith("moesmith.")
                assert torch.equal(ours(torch.arange(3, 30)[None]).logits, logits[str(folder)]), copy_
        code = sorted(file.name for file in folder.glob("*.py"))
        assert code == ["configuration_gemma_moe.py", "modeling_gemma_moe.py"]
        assert sorted(file.name for file in (folder / "again").glob("*.py")) == code


def test_the_parts_that_read_configs_register_the_classes_themselves():
    """`moesmith prune` plans without plugging anything in."""
    for name in CUSTOM:
        config = tiny.config(name).to_dict()
        for ask in (check_architecture, model_class, meta_model):
            unregister_classes()
            with pytest.raises(ValueError, match=name):
                AutoConfig.for_model(name)
            ask(config)
            assert isinstance(AutoConfig.for_model(name), CONFIG_MAPPING[name])
    assert type(meta_model(config)) is model_class(config)


def test_a_class_of_transformers_needs_no_code(checkpoint, tmp_path):
    (tmp_path / "config.json").write_bytes(before := (checkpoint("olmoe") / "config.json").read_bytes())
    assert write_code(tmp_path) == []
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_bytes() == before
