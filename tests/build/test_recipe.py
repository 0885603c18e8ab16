"""Recipes: what is filled in, what other tools' files mean here, what is refused before anything is read."""

from pathlib import Path

import pytest

from moesmith.build.recipe import Recipe, choose_route, filled, identical, read_recipe, translate
from moesmith.errors import UserError

EXAMPLES = Path(__file__).parents[2] / "examples"
PREDECESSOR = """
base_model: "google/gemma-2-9b-it"
num_experts_per_tok: 2
dtype: "bfloat16"

experts:
  - name: "Coding Expert"
    source_model: "google/gemma-2-9b-it" # Or a specific coding fine-tune
    positive_prompts:
      - "Write a Python function"
      - "Debug this segmentation fault"
    negative_prompts:
      - "Write a poem about flowers"
"""
SECOND = """
  - name: "Poetry Expert"
    positive_prompts: "Write a poem about flowers"
"""
MERGEKIT = """
base_model: base
gate_mode: {gate}
dtype: float16
experts_per_token: 1
architecture: qwen
shared_experts:
  - source_model: shared
experts:
  - source_model: models/code
    positive_prompts: [a, b]
    residual_scale: 0.5
  - source_model: models/math+loras/math
    positive_prompts: c
    noise_scale: 0.1
"""
TWO = {"base_model": "b", "experts": [{"source_model": "x/code"}, {"source_model": "x/math"}]}


def read(tmp_path, text, **over):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return read_recipe(path, over)


def refused(tmp_path, text, **over):
    with pytest.raises(UserError) as caught:
        read(tmp_path, text, **over)
    return caught.value


def test_a_recipe_of_gemma_2_moe_is_read_as_it_stands(tmp_path):
    recipe, said = read(tmp_path, PREDECESSOR + SECOND)
    assert said == [] and (recipe.num_experts_per_tok, recipe.dtype) == (2, "bfloat16")
    assert [e.source_model for e in recipe.experts] == ["google/gemma-2-9b-it"] * 2
    assert recipe.experts[0].negative_prompts == recipe.experts[1].positive_prompts
    assert choose_route(recipe)[0] == "centered" and identical(recipe)
    alone = refused(tmp_path, PREDECESSOR)
    assert "no mixture" in alone.message and "add a second entry under experts" in alone.hint


def test_a_recipe_of_mergekit_moe_is_translated_and_says_so(tmp_path):
    recipe, said = read(tmp_path, MERGEKIT.format(gate="cheap_embed"))
    assert (recipe.route, recipe.num_experts_per_tok, recipe.output) == ("embed", 1, "qwen2_moe")
    assert recipe.shared_expert.source_model == "shared"
    assert recipe.shared_expert.weight == 0.5
    code, math = recipe.experts
    assert (code.name, code.residual_scale, math.noise_scale) == ("code", 0.5, 0.1)
    assert (math.source_model, math.adapter, math.positive_prompts) == ("models/math", "loras/math", ["c"])
    assert [line.split(":")[0].split(" ")[0] for line in said] == [
        "architecture", "gate_mode", "experts_per_token", "shared_experts", "source_model",
    ]  # fmt: skip
    assert not identical(recipe)


@pytest.mark.parametrize("gate", ["hidden", "hidden_avg", "hidden_last"])
def test_gates_that_read_one_token_say_that_ours_reads_all(tmp_path, gate):
    recipe, said = read(tmp_path, MERGEKIT.format(gate=gate))
    assert recipe.route == "hidden"
    assert any("not the last one" in line for line in said) == (gate != "hidden_avg")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("gate_mode", "uniform_random", "route: random"),
        ("gate_mode", "nearest", "cheap_embed"),
        ("architecture", "DeepSeek MoE", "no part of transformers"),
        ("load_in_4bit", True, "one layer at a time"),
        ("tokenizer_source", "union", "always the base's"),
        ("merge_method", "ties", "averages"),
        ("shared_experts", [{"source_model": "a"}] * 2, "no class has more than 1"),
        ("shared_experts", [{"source_model": "a", "positive_prompts": ["x"]}], "every token passes"),
        ("shared_experts", [{"source_model": "a", "residual_scale": 0.2}], "weight: is its share"),
    ],
)
def test_what_means_something_else_is_refused_with_the_reason(key, value, words):
    with pytest.raises(UserError, match=words):
        translate({**TWO, key: value})


@pytest.mark.parametrize(
    ("second", "words"), [({"adapter": "lora"}, "no model"), ({"source_model": "b"}, "same source")]
)
def test_a_loss_route_needs_a_model_for_each_expert(second, words):
    experts = [{"corpus": "a"}, {"source_model": "c", "corpus": "b", **second}]
    with pytest.raises(UserError, match=words):
        filled(Recipe(base_model="b", route="loss", experts=experts))


def test_one_setting_by_two_names_is_refused():
    with pytest.raises(UserError, match="same setting"):
        translate({**TWO, "experts_per_token": 2, "num_experts_per_tok": 2})


def test_an_unknown_key_at_any_depth_names_the_nearest(tmp_path):
    found = refused(tmp_path, PREDECESSOR.replace("positive_prompts", "positve_prompts"))
    assert found.message == "unknown key experts[0].positve_prompts"
    assert found.hint == "did you mean positive_prompts?"
    found = refused(tmp_path, PREDECESSOR + "num_expert_per_tok: 3\n")
    assert (found.message, found.hint) == (
        "unknown key num_expert_per_tok",
        "did you mean num_experts_per_tok?",
    )
    found = refused(tmp_path, PREDECESSOR + "shared_expert: {source: x}\n")
    assert "shared_expert.source" in str(found) and "source_model" in str(found)
    found = refused(tmp_path, PREDECESSOR.replace("name:", "residual_scale: loud\n    name:"))
    assert found.message.startswith("experts[0].residual_scale=loud:")


@pytest.mark.parametrize(
    ("over", "words"),
    [
        ({"init": "split"}, "num_experts"),
        ({"num_experts": 4}, "only init: split"),
        ({"route": "ridge"}, "only for init: split"),
        ({"num_experts_per_tok": 3}, "only 2 experts"),
        ({"init": "virtual-group:4", "num_experts_per_tok": 6}, "multiple of 4"),
        ({"init": "split", "num_experts": 8, "route": "probe"}, "no domains"),
        ({"init": "sprinkle"}, "virtual-group"),
        ({"init": "split", "num_experts": 8, "base_model": "another"}, "cuts the FFNs of the base"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(tmp_path, over, words):
    text = PREDECESSOR if over.get("init") == "split" else PREDECESSOR + SECOND
    if over.get("route") == "probe":
        text = text.split("experts:")[0]
    found = refused(tmp_path, text.replace("num_experts_per_tok: 2\n", ""), **over)
    assert words in str(found)


@pytest.mark.parametrize("seed", [-1, 1 << 32, 1 << 70])
def test_a_seed_that_does_not_fit_is_refused(tmp_path, seed):
    assert refused(tmp_path, PREDECESSOR + SECOND, seed=seed).message.startswith(f"seed={seed}: ")
    assert read(tmp_path, PREDECESSOR + SECOND, seed=(1 << 32) - 1)[0].seed == (1 << 32) - 1


@pytest.mark.parametrize("key", ["residual_scale", "noise_scale"])
def test_a_scale_is_finite(tmp_path, key):
    text = PREDECESSOR + SECOND + f"    {key}: .inf\n"
    assert refused(tmp_path, text).message.startswith(f"experts[1].{key}=inf: ")


def test_a_name_is_one_short_line(tmp_path):
    recipe, _ = read(tmp_path, PREDECESSOR.replace("Coding Expert", " Coding\\n Expert ") + SECOND)
    assert recipe.experts[0].name == "Coding Expert"
    recipe, _ = read(tmp_path, PREDECESSOR.replace("Coding Expert", "  ") + SECOND)
    assert recipe.experts[0].name == "gemma-2-9b-it"
    found = refused(tmp_path, PREDECESSOR.replace("Coding Expert", "x" * 200) + SECOND)
    assert found.message == "experts[0].name: 200 characters" and "at most 60" in found.hint


def test_blank_text_is_no_text(tmp_path):
    text = "base_model: b\nexperts:\n- {name: one, corpus: ''}\n- {name: two, positive_prompts: [' ', a]}\n"
    assert "none for one" in refused(tmp_path, text).message
    assert read(tmp_path, text, route="random")[0].experts[1].positive_prompts == ["a"]


def test_every_expert_without_text_is_named_at_once(tmp_path):
    text = "base_model: b\nexperts:\n- {name: one}\n- {name: two, corpus: c.jsonl}\n- {name: three}\n"
    assert "none for one, three" in refused(tmp_path, text).message
    assert "route=lda" in refused(tmp_path, text, route="lda").message
    assert read(tmp_path, text, route="random")[0].route == "random"


def test_corpora_for_all_take_the_finer_route(tmp_path):
    text = "base_model: b\nexperts:\n- {name: one, corpus: a.jsonl}\n- {name: two, corpus: [c.jsonl, d.md]}\n"
    recipe, _ = read(tmp_path, text)
    route, why = choose_route(recipe)
    assert route == "probe" and "corpus" in why


def test_numbers_of_experts_and_of_active_ones_follow_from_the_init(tmp_path):
    split, _ = read(tmp_path, "base_model: b\ninit: split\nnum_experts: 16\n")
    assert split.num_experts_per_tok == 12 and choose_route(split)[0] == "ridge" and not identical(split)
    assert split.experts[0].source_model == "b"
    groups, _ = read(tmp_path, PREDECESSOR.replace("num_experts_per_tok: 2\n", ""), init="virtual-group:4")
    assert groups.num_experts_per_tok == 4
    groups, _ = read(tmp_path, PREDECESSOR + SECOND, init="virtual-group:4", num_experts_per_tok=None)
    assert groups.num_experts_per_tok == 8


def test_names_are_unique_and_a_filled_recipe_is_the_same_recipe(tmp_path):
    text = (
        "base_model: b\nroute: random\nexperts:\n- {source_model: a/m}\n- {source_model: c/m}\n- {name: x}\n"
    )
    recipe, _ = read(tmp_path, text)
    assert [e.name for e in recipe.experts] == ["m", "m 2", "x"]
    assert filled(recipe) == recipe


@pytest.mark.parametrize(
    ("example", "route"), [("build", "probe"), ("build-gemma2", "centered"), ("build-split", "ridge")]
)
def test_the_examples_are_recipes(example, route):
    recipe, said = read_recipe(EXAMPLES / f"{example}.yaml")
    assert choose_route(recipe)[0] == route and not said
    assert identical(recipe) == (example == "build-gemma2")
