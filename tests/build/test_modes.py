"""What every `init:` puts into an expert, on sources that were saved to disk."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from moesmith.build.modes import ExpertSource, low_rank, make_experts, parse_init, repeat_rows
from moesmith.build.native import FITS, target_config
from moesmith.build.sources import Source, open_source
from moesmith.errors import UserError
from moesmith.models.layers import moe_layers, submodule
from moesmith.models.ranges import Made, Piece

KINDS = ("gate", "up", "down")
LAYERS, WIDTH, HIDDEN = 3, 128, 48


@pytest.fixture
def save(tmp_path) -> Callable[..., Source]:
    def save(model: PreTrainedModel, name: str = "base", dtype: torch.dtype = torch.float32) -> Source:
        model.to(dtype).save_pretrained(tmp_path / name)
        return open_source(tmp_path / name)

    return save


def tiny() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=HIDDEN, intermediate_size=WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=6, num_key_value_heads=2, initializer_range=0.2, tie_word_embeddings=True,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def tuned(model: PreTrainedModel, seed: int = 1, rank: int = WIDTH) -> PreTrainedModel:
    """The same model with other FFNs: each matrix plus a random one of this rank."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".mlp." in name:
                left = torch.randn(weight.shape[0], rank, generator=generator)
                weight += 0.3 * left @ torch.randn(rank, weight.shape[1], generator=generator) / rank**0.5
    return model


def values(experts, layer: int, expert: int, kind: str, dtype: torch.dtype) -> torch.Tensor:
    """The bytes of a part as they would stand in the file."""
    part = experts.part(layer, expert, kind)
    if isinstance(part, Made):
        data = bytes(part.make())
        assert len(data) == part.nbytes
    else:
        ((start, length),) = part.runs
        data = Path(part.file).read_bytes()[part.start + start :][:length]
    shape = (HIDDEN, experts.width) if kind == "down" else (experts.width, HIDDEN)
    return torch.frombuffer(bytearray(data), dtype=dtype).view(shape)


def weight(model: PreTrainedModel, layer: int, kind: str) -> torch.Tensor:
    return model.model.layers[layer].mlp.get_submodule(f"{kind}_proj").weight.detach()


def as_model(dense: PreTrainedModel, experts, top_k: int, rows: torch.Tensor) -> PreTrainedModel:
    """A live MoE of the native class: these experts, these router rows in every layer."""
    target = FITS[dense.config.model_type][0].target
    config = target_config(dense.config, target, experts.num_experts, top_k, experts.width)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.load_state_dict(dense.state_dict(), strict=False)
    with torch.no_grad():
        for number, layer in enumerate(moe_layers(model)):
            submodule(model, layer.router).weight.copy_(rows)
            live = submodule(model, layer.experts)
            for expert in range(experts.num_experts):
                gate, up, down = (values(experts, number, expert, kind, torch.float32) for kind in KINDS)
                live.gate_up_proj[expert], live.down_proj[expert] = torch.cat([gate, up]), down
    return model


@torch.no_grad()
def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return model(ids).logits


# ---------------------------------------------------------------- copy, noise, drop


@pytest.mark.parametrize("init", ["copy", "noise:0", "drop:0"])
def test_nothing_to_change_is_a_range_of_the_source(save, init):
    model = tiny()
    source = save(model)
    experts = make_experts(init, [ExpertSource(source, source)] * 2, torch.float32, 0)
    assert isinstance(experts.part(1, 1, "up"), Piece)
    for kind in KINDS:
        assert torch.equal(values(experts, 1, 1, kind, torch.float32), weight(model, 1, kind))
    assert experts.facts()["matrices_copied"] == 3 and experts.facts()["matrices_made"] == 0


def test_another_dtype_rounds_once_and_the_residual_scale_is_of_down(save):
    model = tiny()
    entry = ExpertSource(save(model), save(model), residual_scale=0.7)
    experts = make_experts("copy", [entry], torch.bfloat16, 0)
    for kind, scale in (("gate", 1), ("up", 1), ("down", 0.7)):
        want = (weight(model, 2, kind) * scale).bfloat16()
        assert torch.equal(values(experts, 2, 0, kind, torch.bfloat16), want)
    assert experts.facts()["matrices_made"] == 3


@pytest.mark.parametrize("init", ["noise:0.1", "drop:0.5", "virtual-group:4", "lora:5"])
def test_order_of_making_does_not_matter_and_the_seed_does(save, init):
    base = tiny()
    entries = [ExpertSource(save(tuned(base), "tuned"), save(tiny()))] * 2
    places = [(layer, expert, kind) for layer in (0, 2) for expert in (0, 1) for kind in KINDS]

    def made(order, seed):
        experts = make_experts(init, entries, torch.float32, seed)
        torch.rand(seed + 3)  # the global generator has no say
        return {place: values(experts, *place, torch.float32) for place in order}

    one, other, reseeded = made(places, 0), made(places[::-1], 0), made(places, 1)
    assert all(torch.equal(one[place], other[place]) for place in places)
    assert init == "lora:5" or not all(torch.equal(one[place], reseeded[place]) for place in places)


def test_noise_is_relative_to_the_matrix_and_adds_up(save):
    model = tiny()
    weight(model, 0, "up").mul_(50)
    entry = ExpertSource(save(model), save(model), noise_scale=0.4)
    experts = make_experts("noise:0.3", [entry, entry], torch.float32, 0)
    for kind in KINDS:
        old = weight(model, 0, kind)
        ratio = (values(experts, 0, 0, kind, torch.float32) - old).std() / old.std()
        assert 0.48 < ratio < 0.52  # sqrt(0.3^2 + 0.4^2)
    assert not torch.equal(experts.matrix(0, 0, "gate"), experts.matrix(0, 1, "gate"))


def test_drop_draws_the_same_neurons_of_all_three_matrices(save):
    model = tiny()
    weight(model, 1, "up").add_(3)
    entry = ExpertSource(save(model), save(model))
    experts = make_experts("drop:0.25", [entry, entry], torch.float32, 0)
    changed = []
    for expert in (0, 1):
        for kind in KINDS:
            old, new = weight(model, 1, kind), values(experts, 1, expert, kind, torch.float32)
            if kind == "down":
                old, new = old.T, new.T
            different = (old != new).any(dim=1)
            changed.append(frozenset(different.nonzero().flatten().tolist()))
            assert (old != new)[different].all()  # whole neurons
            drawn, dropped = new[different], old[different]
            torch.testing.assert_close(drawn.mean(), dropped.mean(), atol=0.03, rtol=0)
            torch.testing.assert_close(drawn.std(), dropped.std(), atol=0.02, rtol=0.1)
    assert changed[0] == changed[1] == changed[2] and len(changed[0]) == WIDTH // 4
    assert changed[3] == changed[4] == changed[5] != changed[0]
    assert experts.facts()["redrawn"] == 32 and experts.facts()["redrawn_share"] == 0.25


def test_drop_takes_mean_and_spread_of_what_it_drops(save):
    """Not those of the whole matrix."""
    model = tiny()
    source = save(model)
    neurons = make_experts("drop:0.25", [ExpertSource(source, source)], torch.float32, 0).neurons(1, 0)
    weight(model, 1, "gate")[neurons] = weight(model, 1, "gate")[neurons] * 5 + 3
    source = save(model, "uneven")
    new = make_experts("drop:0.25", [ExpertSource(source, source)], torch.float32, 0).matrix(1, 0, "gate")
    old = weight(model, 1, "gate")[neurons]
    torch.testing.assert_close(new[neurons].mean(), old.mean(), atol=0.1, rtol=0)
    torch.testing.assert_close(new[neurons].std(), old.std(), atol=0, rtol=0.1)


def test_every_layer_expert_and_matrix_is_drawn_alone(save):
    model = tiny()
    entry = ExpertSource(save(model), save(model))
    dropped = make_experts("drop:0.5", [entry] * 2, torch.float32, 0)
    places = [(layer, expert) for layer in range(LAYERS) for expert in range(2)]
    assert len({tuple(dropped.neurons(*place).tolist()) for place in places}) == len(places)
    noisy = make_experts("noise:1", [entry], torch.float32, 0)
    gate, up = (noisy.matrix(0, 0, kind) > weight(model, 0, kind) for kind in ("gate", "up"))
    assert 0.4 < (gate == up).float().mean() < 0.6
    groups = make_experts("virtual-group:4", [entry], torch.float32, 0)
    assert not torch.equal(groups.members(0), groups.members(1))


def test_a_source_of_two_dtypes_is_copied_where_it_can_be(save):
    model = tiny()
    source = save(model)
    path = source.folder / "model.safetensors"
    name = source.ffn(1, "up")
    save_file(load_file(path) | {name: weight(model, 1, "up").half()}, path, metadata={"format": "pt"})
    source = open_source(source.folder)
    experts = make_experts("copy", [ExpertSource(source, source)], torch.float32, 0)
    assert isinstance(experts.part(0, 0, "up"), Piece) and isinstance(experts.part(1, 0, "gate"), Piece)
    assert torch.equal(values(experts, 1, 0, "up", torch.float32), weight(model, 1, "up").half().float())


def test_drop_of_everything_keeps_nothing(save):
    model = tiny()
    experts = make_experts("drop:1", [ExpertSource(save(model), save(model))], torch.float32, 0)
    assert (experts.matrix(0, 0, "gate") != weight(model, 0, "gate")).all()


# ---------------------------------------------------------------- split and virtual groups


def test_all_slices_on_is_the_dense_model(dense, chunks, save):
    members = [torch.randperm(WIDTH).view(8, 16) for _ in range(LAYERS)]
    source = save(dense)
    experts = make_experts("split", [ExpertSource(source, source)], torch.float32, 0, members, fold=8)
    model = as_model(dense, experts, 8, torch.zeros(8, HIDDEN))
    torch.testing.assert_close(logits(model, chunks[0]), logits(dense, chunks[0]), atol=1e-4, rtol=1e-4)
    assert torch.equal(experts.matrix(1, 3, "up"), weight(dense, 1, "up")[members[1][3]])
    assert torch.equal(experts.matrix(2, 5, "down"), weight(dense, 2, "down")[:, members[2][5]] * 8)


@pytest.mark.parametrize("top_k", [4, 8])
def test_virtual_groups_of_one_model_are_that_model(dense, chunks, save, top_k):
    source = save(dense)
    experts = make_experts("virtual-group:4", [ExpertSource(source, source)] * 3, torch.float32, 0)
    assert (experts.num_experts, experts.width) == (12, 32)
    model = as_model(dense, experts, top_k, repeat_rows(torch.randn(3, HIDDEN), 4))
    torch.testing.assert_close(logits(model, chunks[0]), logits(dense, chunks[0]), atol=1e-4, rtol=1e-4)


def test_a_picked_group_is_the_ffn_of_its_source(save):
    base = tiny()
    others = [tuned(tiny(), seed) for seed in (1, 2, 3)]
    source = save(base)
    entries = [ExpertSource(save(other, f"tuned{n}"), source) for n, other in enumerate(others)]
    experts = make_experts("virtual-group:4", entries, torch.float32, 0)
    rows = torch.randn(3, HIDDEN)
    block = as_model(base, experts, 4, repeat_rows(rows, 4)).model.layers[1].mlp
    x = torch.randn(1, 40, HIDDEN)
    winners = (x[0] @ rows.T).argmax(dim=1)
    assert len(winners.unique()) == 3
    with torch.no_grad():
        got = block(x)[0]
        for token, winner in enumerate(winners):
            want = others[winner].model.layers[1].mlp(x[0, token])
            torch.testing.assert_close(got[token], want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("sources", "group"), [(2, 4), (5, 3), (8, 8)])
def test_top_k_takes_whole_groups_unless_two_sources_tie(dtype, sources, group):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(sources, HIDDEN, generator=generator)
    x = torch.randn(5000, HIDDEN, generator=generator).to(dtype)
    logits = (x @ repeat_rows(rows, group).to(dtype).T).float()
    picked = torch.zeros_like(logits).scatter_(1, logits.softmax(1).topk(group).indices, 1)
    whole = (picked.view(-1, sources, group).sum(2) % group == 0).all(dim=1)
    best = logits.view(-1, sources, group)[:, :, 0].topk(2).values
    tied = (best[:, 0] - best[:, 1]).abs() < 1e-5
    assert whole[~tied].all()
    assert tied.float().mean() < 0.02


def test_group_must_divide_the_width(save):
    source = save(tiny())
    with pytest.raises(UserError, match="5 does not divide the FFN width 128") as caught:
        make_experts("virtual-group:5", [ExpertSource(source, source)], torch.float32, 0)
    assert caught.value.hint == "2, 4, 8, 16, 32, 64 do"


# ---------------------------------------------------------------- lora


def test_rank_zero_is_the_base_and_full_rank_is_the_source(save):
    base, source = tiny(), tuned(tiny())
    entry = ExpertSource(save(source, "tuned"), save(base))
    for kind in KINDS:
        zero = make_experts("lora:0", [entry], torch.float32, 0)
        assert torch.equal(values(zero, 1, 0, kind, torch.float32), weight(base, 1, kind))
        assert zero.facts()["smallest"]["share"] == 0
        full = make_experts("lora:48", [entry], torch.float32, 0)
        torch.testing.assert_close(
            values(full, 1, 0, kind, torch.float32), weight(source, 1, kind), atol=1e-5, rtol=0
        )
        assert full.facts()["smallest"]["share"] == pytest.approx(1, abs=1e-6)


def test_rank_of_the_difference_is_enough(save):
    base, source = tiny(), tuned(tiny(), rank=3)
    experts = make_experts("lora:3", [ExpertSource(save(source, "tuned"), save(base))] * 2, torch.float32, 0)
    for kind in KINDS:
        got = values(experts, 0, 1, kind, torch.float32)
        torch.testing.assert_close(got, weight(source, 0, kind), atol=1e-5, rtol=0)
    (layer,) = experts.facts()["kept"]
    assert layer["layer"] == 0 and all(layer[kind] == pytest.approx(1, abs=1e-6) for kind in KINDS)


def test_kept_share_is_that_of_the_exact_svd(save):
    base, source = tiny(), tuned(tiny())
    experts = make_experts("lora:8", [ExpertSource(save(source, "tuned"), save(base))], torch.float32, 0)
    got = values(experts, 2, 0, "gate", torch.float32)
    delta = weight(source, 2, "gate") - weight(base, 2, "gate")
    energy = torch.linalg.svdvals(delta).square()
    facts = experts.facts()
    assert facts["kept"][0]["gate"] == pytest.approx(float(energy[:8].sum() / energy.sum()), rel=1e-3)
    left = (weight(source, 2, "gate") - got).square().sum() / delta.square().sum()
    assert facts["smallest"] == {"layer": 2, "expert": 0, "kind": "gate", "share": facts["kept"][0]["gate"]}
    assert facts["smallest"]["share"] + float(left) == pytest.approx(1, abs=1e-5)


def test_low_rank_of_a_flat_spectrum():
    """A random matrix: the hardest case, as what long training changes."""
    matrix = torch.randn(300, 200, generator=torch.Generator().manual_seed(0))
    left, right = low_rank(matrix, 20, torch.Generator().manual_seed(1))
    energy = torch.linalg.svdvals(matrix).square()[:20].sum()
    assert 0.98 < float(right.square().sum() / energy) <= 1.00001
    torch.testing.assert_close(left.T @ left, torch.eye(20), atol=1e-5, rtol=0)


def test_the_base_itself_is_copied(save):
    source = save(tiny())
    experts = make_experts("lora:4", [ExpertSource(source, source)], torch.float32, 0)
    assert isinstance(experts.part(0, 0, "down"), Piece)
    assert experts.facts()["smallest"] is None


# ---------------------------------------------------------------- adapters

OPTIONS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {r"layers\.1\.mlp\.gate_proj": 5}},
}


def adapted(folder: Path, **options) -> PreTrainedModel:
    """Saves a LoRA of the tiny Llama to `folder`; returns PEFT's own merge of it."""
    given = {"target_modules": ["gate_proj", "up_proj", "down_proj", "q_proj"], "r": 4, "lora_alpha": 6}
    config = LoraConfig(init_lora_weights=False, **(given | options))
    torch.manual_seed(3)
    model = get_peft_model(tiny(), config)
    model.save_pretrained(folder)
    return model.merge_and_unload()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_adapter_is_merged_as_peft_merges_it(save, tmp_path, options):
    source = save(tiny())
    merged = adapted(tmp_path / "lora", **options)
    entry = ExpertSource(source, source, adapter=tmp_path / "lora")
    experts = make_experts("copy", [ExpertSource(source, source), entry], torch.float32, 0)
    for layer in range(LAYERS):
        for kind in KINDS:
            got, want = values(experts, layer, 1, kind, torch.float32), weight(merged, layer, kind)
            torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)
            assert (got - values(experts, layer, 0, kind, torch.float32)).abs().max() > 1e-3
    (facts,) = experts.facts()["adapters"]
    assert (facts["expert"], facts["merged"], facts["left_out"]) == (1, 9, {"q_proj": 6})
    edit(tmp_path / "lora", base_model_name_or_path="org/base")
    again = make_experts("copy", [entry], torch.float32, 0)
    assert again.facts()["adapters"][0]["trained_on"] == "org/base"
    assert experts.facts()["matrices_copied"] == experts.facts()["matrices_made"] == 9


def test_matrices_that_an_adapter_does_not_touch_are_copied(save, tmp_path):
    source = save(tiny())
    adapted(tmp_path / "lora", target_modules=["up_proj"], layers_to_transform=[1])
    experts = make_experts("copy", [ExpertSource(source, source, tmp_path / "lora")], torch.float32, 0)
    made = [
        (layer, kind)
        for layer in range(LAYERS)
        for kind in KINDS
        if isinstance(experts.part(layer, 0, kind), Made)
    ]
    assert made == [(1, "up")]


def test_low_rank_of_an_adapter_is_the_adapter(save, tmp_path):
    """base + rank-4 part of (base + LoRA of rank 4 - base)."""
    source = save(tiny())
    merged = adapted(tmp_path / "lora")
    experts = make_experts("lora:4", [ExpertSource(source, source, tmp_path / "lora")], torch.float32, 0)
    got = values(experts, 0, 0, "down", torch.float32)
    torch.testing.assert_close(got, weight(merged, 0, "down"), atol=1e-5, rtol=0)
    assert experts.facts()["smallest"]["share"] == pytest.approx(1, abs=1e-6)


def edit(folder: Path, **changes) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: edit(folder, use_dora=True), "LoRA with use_dora=True is not merged"),
        (lambda folder: edit(folder, init_lora_weights="pissa_niter_4"), "init_lora_weights=pissa_niter_4"),
        (lambda folder: edit(folder, peft_type="IA3"), "peft_type is 'IA3', wanted 'LORA'"),
        (lambda folder: edit(folder, r=8), "wanted .48, 8. and .8, 128. for"),
        (lambda folder: adapted(folder, target_modules=["q_proj", "v_proj"]), "no FFN, only q_proj, v_proj"),
        (lambda folder: adapted(folder, use_dora=True) and edit(folder, use_dora=False), "not a plain LoRA"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "is no PEFT adapter"),
    ],
)
def test_adapters_that_cannot_be_merged_are_refused_before_anything_is_made(save, tmp_path, spoil, message):
    source = save(tiny())
    adapted(tmp_path / "lora")
    spoil(tmp_path / "lora")
    with pytest.raises(UserError, match=message):
        make_experts("copy", [ExpertSource(source, source, tmp_path / "lora")], torch.float32, 0)


# ---------------------------------------------------------------- what a user writes


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("copy", ("copy", None)),
        ("split", ("split", None)),
        ("drop:0.5", ("drop", 0.5)),
        ("noise:1e-2", ("noise", 0.01)),
        ("virtual-group:4", ("virtual-group", 4)),
        ("lora:64", ("lora", 64)),
    ],
)
def test_init_is_read(text, want):
    assert parse_init(text) == want


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("clone", "no such mode"),
        ("copy:2", "copy takes no number"),
        ("drop", "wanted drop:P, P from 0 to 1"),
        ("drop:1.5", "P from 0 to 1"),
        ("noise:nan", "noise:S"),
        ("noise:inf", "noise:S"),
        ("virtual-group:1", "G from 2"),
        ("lora:1.5", "lora:R"),
        ("lora:-1", "lora:R"),
    ],
)
def test_init_that_means_nothing_is_refused_with_the_modes(text, message):
    with pytest.raises(UserError, match=message) as caught:
        parse_init(text)
    assert caught.value.hint is not None and "virtual-group:G" in caught.value.hint


def test_numbers_too_large_for_the_dtype_are_refused(save):
    model = tiny()
    weight(model, 0, "down")[3, 5] = 40_000.0
    source = save(model)
    members = [torch.arange(WIDTH).view(4, 32)] * LAYERS
    experts = make_experts("split", [ExpertSource(source, source)], torch.float16, 0, members, fold=2)
    with pytest.raises(UserError, match="layers.0.mlp.down_proj.weight is not finite"):
        experts.part(0, 1, "down").make()
    experts.part(1, 1, "down").make()


@pytest.mark.parametrize("init", ["lora:4", "noise:0.1"])
def test_a_damaged_source_is_told_from_a_dtype_that_is_too_small(save, init):
    base, broken, loud = save(tiny()), tuned(tiny()), tuned(tiny())
    with torch.no_grad():
        weight(broken, 1, "up")[3, 5] = torch.nan
        weight(loud, 1, "up").mul_(1e6)
    cases = ((save(broken, "broken"), "damaged: fetch"), (save(loud, "loud"), "try dtype: bfloat16"))
    for source, advice in cases:
        experts = make_experts(init, [ExpertSource(source, base)] * 2, torch.float16, 0)
        with pytest.raises(UserError, match=source.name) as error:
            values(experts, 1, 0, "up", torch.float16)
        assert advice in (error.value.hint or "")
