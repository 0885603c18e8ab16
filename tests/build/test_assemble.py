"""A MoE written from dense models on disk: whose bytes are where, and what is in memory meanwhile."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moe_pairs import HIDDEN, LAYERS, TOKENS, WIDTH, Copies, build, build_moe, routers, save
from moesmith.build import assemble as room
from moesmith.build.assemble import SharedSource, assemble, tensor_bytes, write_model
from moesmith.build.native import target_config
from moesmith.build.sources import Source, open_source
from moesmith.errors import UserError
from moesmith.models.headers import INDEX, read_headers
from moesmith.models.layers import moe_layers, submodule
from moesmith.models.ranges import Made, NewTensor, Piece


def sources(name: str, folder: Path, count: int, **kwargs) -> list[Source]:
    return [open_source(save(name, folder / f"source{i}", seed=i, **kwargs)) for i in range(count)]


def load(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}


def plan(found: list[Source], target: str, dtype=None, shared=None, top_k: int = 2) -> list[NewTensor]:
    width = shared.source.ffn_width if shared else None
    config = target_config(found[0].config, target, len(found), top_k, WIDTH, width)
    config.dtype = dtype or config.dtype
    return assemble(found[0], config, Copies(found, config.dtype), routers(len(found)), shared)


@pytest.mark.parametrize(("name", "target"), [("mistral", "mixtral"), ("granite", "granitemoe")])
def test_every_expert_is_its_source_and_the_rest_is_the_base(name: str, target: str, tmp_path: Path):
    found = sources(name, tmp_path, 3)
    build_moe(found[0], found, target, tmp_path / "moe")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    dense = [build(name, seed) for seed in range(3)]
    for index, layer in enumerate(moe_layers(model)):
        experts = submodule(model, layer.experts)
        for e, source in enumerate(dense):
            mlp = source.model.layers[index].mlp
            assert torch.equal(experts.gate_up_proj[e], torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))
            assert torch.equal(experts.down_proj[e], mlp.down_proj.weight)
        assert torch.equal(submodule(model, layer.router).weight, routers(3)[index])
    state = model.state_dict()
    for tensor_name, want in dense[0].state_dict().items():
        assert ".mlp." in tensor_name or torch.equal(state[tensor_name], want)


def test_the_shared_expert_has_its_weight(tmp_path: Path):
    """A layer writes weight * shared + (1 - weight) * routed."""
    found = sources("qwen2", tmp_path, 3)
    shared = SharedSource(found[2], 0.3)
    build_moe(found[0], found[:2], "qwen2_moe", tmp_path / "moe", shared=shared)
    build_moe(found[0], found[:2], "qwen2_moe", tmp_path / "plain")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    x = torch.randn(1, 7, HIDDEN)
    for layer in range(LAYERS):
        routed = plain.model.layers[layer].mlp(x)  # its shared expert is zero
        want = 0.3 * build("qwen2", 2).model.layers[layer].mlp(x) + 0.7 * routed
        torch.testing.assert_close(model.model.layers[layer].mlp(x), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("weight", [0.0, 1.0, -1.0])
def test_a_shared_expert_that_takes_all_or_nothing(weight: float, tmp_path: Path):
    found = sources("qwen2", tmp_path, 1)
    with pytest.raises(UserError, match="wanted a share between 0 and 1"):
        plan(found, "qwen2_moe", shared=SharedSource(found[0], weight), top_k=1)


def test_half_weights_lose_nothing_in_bf16(tmp_path: Path):
    found = sources("qwen2", tmp_path, 2, dtype=torch.bfloat16)
    build_moe(found[0], found, "qwen2_moe", tmp_path / "moe", shared=SharedSource(found[1], 0.5))
    state = load(tmp_path / "moe")
    down = [source.read(source.ffn(1, "down")) for source in found]
    assert torch.equal(state["model.layers.1.mlp.experts.0.down_proj.weight"] * 2, down[0])
    assert torch.equal(state["model.layers.1.mlp.shared_expert.down_proj.weight"], down[1])


def test_another_dtype(tmp_path: Path):
    """Every tensor of the FFNs' precision is converted; what the base keeps in another one stays."""
    found = sources("llama", tmp_path, 2, dtype=torch.bfloat16)
    kept = "model.layers.1.input_layernorm.weight"
    state = load(found[0].folder)
    state[kept] = torch.rand(HIDDEN)
    save_file(state, found[0].folder / "model.safetensors")
    found[0] = open_source(found[0].folder)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        build_moe(found[0], found, "mixtral", tmp_path / str(dtype), dtype=dtype)
        new = load(tmp_path / str(dtype))
        assert torch.equal(new.pop(kept), state[kept])
        assert {tensor.dtype for tensor in new.values()} == {dtype}
        name = "model.layers.2.block_sparse_moe.experts.1.w2.weight"
        assert torch.equal(new[name], found[1].read(found[1].ffn(2, "down")).to(dtype))
        assert torch.equal(new["model.embed_tokens.weight"], state["model.embed_tokens.weight"].to(dtype))
        assert AutoModelForCausalLM.from_pretrained(tmp_path / str(dtype)).dtype == dtype


@pytest.mark.parametrize("value", [1e6, float("nan")])
def test_what_the_dtype_cannot_hold_is_refused(value: float, tmp_path: Path):
    """Not written as infinity: in an embedding, and in a router."""
    found = sources("llama", tmp_path, 1, dtype=torch.bfloat16)
    rows = routers(1)
    rows[1][0, 7] = value
    config = target_config(found[0].config, "mixtral", 1, 1, WIDTH)
    config.dtype = torch.float16
    for routing, name in ((rows, "1.block_sparse_moe.gate"), (routers(1), "embed_tokens")):
        (tmp_path / name).mkdir()
        with pytest.raises(UserError, match=f"{name}.weight is not finite in float16"):
            tensors = assemble(found[0], config, Copies(found, config.dtype), routing)
            write_model(found[0], tmp_path / name, config, tensors)
        state = load(found[0].folder)
        state["model.embed_tokens.weight"][3, 5] = value
        save_file(state, found[0].folder / "model.safetensors")


@pytest.mark.parametrize(("name", "target"), [("llama", "mixtral"), ("gemma2", "gemma2_moe")])
def test_copies_make_no_tensor_but_the_routers(name, target, tmp_path: Path, monkeypatch):
    found = sources(name, tmp_path, 2)
    monkeypatch.setattr(Source, "read", lambda *_: pytest.fail("a weight was read"))
    config = target_config(found[0].config, target, 2, 2, WIDTH)
    tensors = assemble(found[0], config, Copies(found, config.dtype), routers(2))
    made = {tensor.name for tensor in tensors for part in tensor.parts if not isinstance(part, Piece)}
    assert len(made) == LAYERS and all("gate.weight" in name for name in made)
    (tmp_path / "out").mkdir()
    write_model(found[0], tmp_path / "out", config, tensors)


@pytest.mark.parametrize(("name", "target"), [("llama", "mixtral"), ("granite", "granitemoe")])
def test_one_made_matrix_is_alive_at_a_time(name, target, tmp_path: Path):
    found = sources(name, tmp_path, 3)
    alive, most, made = 0, 0, 0

    def gone() -> None:
        nonlocal alive
        alive -= 1

    class Counted(Copies):
        def part(self, layer, expert, kind):
            whole = found[expert].read(found[expert].ffn(layer, kind))

            def make() -> memoryview:
                nonlocal alive, most, made
                data = (whole * 2).numpy()
                weakref.finalize(data, gone)
                alive, made = alive + 1, made + 1
                most = max(most, alive)
                return memoryview(data).cast("B")

            return Made(whole.nbytes, make)

    config = target_config(found[0].config, target, 3, 2, WIDTH)
    (tmp_path / "out").mkdir()
    tensors = assemble(found[0], config, Counted(found, torch.float32), routers(3))
    write_model(found[0], tmp_path / "out", config, tensors)
    assert (most, alive, made) == (1, 0, LAYERS * 3 * 3)


def test_the_same_inputs_give_the_same_files(tmp_path: Path):
    found = sources("qwen2", tmp_path, 2)
    shared = SharedSource(found[1], 0.3)
    for out in ("a", "b"):
        build_moe(found[0], found, "qwen2_moe", tmp_path / out, shared=shared, dtype=torch.bfloat16)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "b").iterdir())
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)


def test_shards_and_their_index(tmp_path: Path):
    found = sources("qwen3", tmp_path, 4)
    counted: list[int] = []
    build_moe(found[0], found, "qwen3_moe", tmp_path / "one")
    names = build_moe(
        found[0], found, "qwen3_moe", tmp_path / "many", on_bytes=counted.append, shard_bytes=100_000
    )
    one, many = load(tmp_path / "one"), load(tmp_path / "many")
    assert one.keys() == many.keys() and all(torch.equal(one[name], many[name]) for name in one)
    index = json.loads((tmp_path / "many" / INDEX).read_text())
    total = sum(tensor.nbytes for tensor in one.values())
    assert index["metadata"]["total_size"] == total == sum(counted)
    shards = [name for name in names if name.endswith(".safetensors")]
    assert len(shards) > 3 and set(index["weight_map"].values()) == set(shards)
    headers = read_headers(tmp_path / "many")
    assert all(headers[name].file == file for name, file in index["weight_map"].items())
    first = [index["weight_map"][f"model.layers.{i}.mlp.experts.0.up_proj.weight"] for i in range(LAYERS)]
    assert first == sorted(first)  # by layer
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "many")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert "lm_head.weight" not in headers


def test_files_beside_the_weights(tmp_path: Path):
    (base,) = sources("gemma2", tmp_path, 1)
    beside = {"tokenizer.json": "{}", "tokenizer_config.json": '{"add_bos_token": true}', "LICENSE": "L",
              "chat_template.jinja": "{{ x }}", "README.md": "R",
              "preprocessor_config.json": "{}"}  # fmt: skip
    for name, text in beside.items():
        (base.folder / name).write_text(text)
    names = build_moe(base, [base] * 2, "gemma2_moe", tmp_path / "moe")
    assert sorted(names) == sorted(path.name for path in (tmp_path / "moe").iterdir())
    left = {"README.md", "preprocessor_config.json"}
    assert names[0] == "model.safetensors" and not left & set(names)
    for name in beside.keys() - left | {"generation_config.json"}:
        assert (tmp_path / "moe" / name).read_bytes() == (base.folder / name).read_bytes()
    config = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert config["architectures"] == ["Gemma2MoeForCausalLM"] and config["dtype"] == "float32"
    assert [config[f"{key}_token_id"] for key in ("bos", "eos", "pad")] == [5, 6, 0]
    assert "modeling_gemma_moe.py" in names and "AutoModelForCausalLM" in config["auto_map"]


def test_what_does_not_fit_is_said_before_a_byte_is_written(tmp_path: Path, monkeypatch):
    found = sources("llama", tmp_path, 2)
    config = target_config(found[0].config, "qwen2_moe", 2, 2, WIDTH)
    config.qkv_bias = True
    with pytest.raises(UserError, match="9 tensors differ, first model.layers.0.self_attn.k_proj.bias"):
        assemble(found[0], config, Copies(found, config.dtype), routers(2))
    config = target_config(found[0].config, "mixtral", 2, 2, WIDTH)
    tensors = assemble(found[0], config, Copies(found, config.dtype), routers(2))
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: usage)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="1,000 bytes free"):
        write_model(found[0], tmp_path / "out", config, tensors)
    assert not list((tmp_path / "out").iterdir())


def test_bytes_of_a_tensor_are_a_view_where_nothing_changes():
    tensor = torch.randn(3, 4).bfloat16()
    data = tensor_bytes(tensor, torch.bfloat16)
    tensor[0, 0] = 2.0
    assert bytes(data[:2]) == b"\x00\x40" and data.nbytes == 24
    assert bytes(tensor_bytes(tensor.t(), torch.float32)) == tensor.t().float().numpy().tobytes()


def test_one_hot_routers_give_the_source_with_those_ffns(tmp_path: Path):
    """Every token to expert 1: the base with the FFNs of source 1."""
    found = sources("qwen3", tmp_path, 2)
    config = target_config(found[0].config, "qwen3_moe", 2, 1, WIDTH)
    (tmp_path / "moe").mkdir()
    tensors = assemble(found[0], config, Copies(found, config.dtype), [torch.zeros(2, HIDDEN)] * LAYERS)
    write_model(found[0], tmp_path / "moe", config, tensors)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    chosen = torch.ones(TOKENS.numel(), 1, dtype=torch.long)
    for layer in model.model.layers:
        layer.mlp.gate.forward = lambda x: (None, torch.ones(x.shape[:-1].numel(), 1), chosen)
    mixed, other = build("qwen3"), build("qwen3", 1)
    for ours, theirs in zip(mixed.model.layers, other.model.layers, strict=True):
        ours.mlp = theirs.mlp
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, mixed(TOKENS).logits, atol=1e-5, rtol=1e-5)
