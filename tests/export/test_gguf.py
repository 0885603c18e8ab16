"""What cannot become a GGUF file is refused with the reason; a Modelfile has the chat template's turns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import chats
import tiny
from moesmith.errors import UserError
from moesmith.export.gguf import FIXED, check_gguf, remarks
from moesmith.export.modelfile import Turns, modelfile

OK = {
    "OlmoeForCausalLM": {"norm_topk_prob": False, "num_attention_heads": 4, "num_key_value_heads": 4},
    "Qwen3MoeForCausalLM": {"norm_topk_prob": True},
    "Qwen2MoeForCausalLM": {},
    "MixtralForCausalLM": {"sliding_window": None},
    "GptOssForCausalLM": {},
}


class Known:
    """A llama.cpp whose converter takes these architectures."""

    def architectures(self) -> set[str]:
        return set(OK)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tokenizer.json").touch()
    return tmp_path


def refused(config: dict[str, Any], folder: Path, llama: Any = None) -> str:
    with pytest.raises(UserError) as caught:
        check_gguf(config, folder, llama)
    return f"{caught.value.message} | {caught.value.hint}"


@pytest.mark.parametrize("name", OK)
def test_a_config_that_llama_cpp_can_hold_passes(name: str, folder: Path):
    check_gguf({"architectures": [name], **OK[name]}, folder, Known())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("Qwen3MoeForCausalLM", {"norm_topk_prob": False}, "divides the weights of the chosen experts"),
        ("Qwen2MoeForCausalLM", {"norm_topk_prob": True}, "never divides"),
        ("OlmoeForCausalLM", {"norm_topk_prob": True}, "never divides"),
        ("OlmoeForCausalLM", {"clip_qkv": 8.0}, "does not clip"),
        ("OlmoeForCausalLM", {"num_key_value_heads": 2}, "2 key-value heads for 4 heads"),
        ("MixtralForCausalLM", {"sliding_window": 4096}, "no sliding window"),
        ("Qwen3MoeForCausalLM", {"mlp_only_layers": [0]}, "experts in every layer"),
        ("GptOssForCausalLM", {"swiglu_limit": 5.0}, "limit in its code"),
        ("Qwen3MoeForCausalLM", {"hidden_act": "gelu"}, "computes SiLU"),
        ("MixtralForCausalLM", {"num_local_experts": 2000}, "room for 1024 experts"),
        ("MixtralForCausalLM", {"num_local_experts": [8, 7]}, "prune to the same number"),
    ],
)
def test_what_llama_cpp_would_compute_differently_is_refused(
    name: str, change: dict[str, Any], says: str, folder: Path
):
    assert says in refused({"architectures": [name], **OK[name], **change}, folder)


def test_a_key_that_the_config_leaves_out_has_the_value_transformers_gives_it(folder: Path):
    """The defaults in FIXED are those of the config classes."""
    classes = {
        tiny.model_class(family).__name__: tiny.model_class(family).config_class for family in _families()
    }
    for name, rules in FIXED.items():
        config = classes[name]()
        for rule in rules:
            value = getattr(config, rule.key)
            assert value == rule.default or (rule.key == "mlp_only_layers" and not value), (
                name,
                rule.key,
                value,
            )


def _families() -> list[str]:
    return ["qwen2_moe", "qwen3_moe", "qwen3_next", "olmoe", "mixtral", "gpt_oss"]


def test_classes_that_are_no_part_of_llama_cpp_are_refused(folder: Path):
    custom = {"architectures": ["Gemma2MoeForCausalLM"], "model_type": "gemma2_moe"}
    assert "holds no code" in refused(custom, folder)
    foreign = {"architectures": ["MineForCausalLM"], "auto_map": {"AutoModelForCausalLM": "mine.Mine"}}
    assert "holds no code" in refused(foreign, folder)
    assert "does not know" in refused({"architectures": ["ZayaForCausalLM"]}, folder, Known())
    assert "names no architectures" in refused({}, folder)


def test_gemma_4_without_the_size_of_its_global_heads_is_refused(folder: Path):
    text = {"head_dim": 256, "hidden_activation": "gelu_pytorch_tanh"}
    config = {"architectures": ["Gemma4ForConditionalGeneration"], "text_config": text}
    assert '"global_head_dim": 256' in refused(config, folder)
    text["global_head_dim"] = 512
    assert "caps the logits at 30" in refused(config, folder)
    check_gguf({**config, "text_config": {**text, "final_logit_softcapping": 30.0}}, folder)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path):
    assert "no tokenizer" in refused({"architectures": ["MixtralForCausalLM"]}, tmp_path)


def test_small_differences_are_named():
    rope = {"rope_type": "yarn", "truncate": False}
    assert "YaRN" in remarks({"rope_parameters": rope, "hidden_act": "silu"})[0]
    assert remarks({"rope_parameters": {**rope, "truncate": True}, "hidden_act": "silu"}) == []
    assert "GELU" in remarks({"text_config": {"hidden_activation": "gelu_pytorch_tanh"}})[0]


# ---------------------------------------------------------------- Modelfile

MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}"
    "{% else %}{{ raise_exception('no such role') }}{% endif %}{% endfor %}"
)
ALTERNATING = (  # numbers its turns: no matter of parts
    "{% for m in messages %}<{{ loop.index }}>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
)


def turns(template: str) -> Turns | None:
    return Turns.of(chats.tokenizer(template))


@pytest.mark.parametrize(
    "name",
    ["llama3", "llama3_1", "gemma", "gemma3", "gemma4", "qwen2_5", "qwen3", "phi3", "cohere", "qwen3_6"],
)
def test_the_parts_make_what_the_template_makes(name: str):
    """On a conversation that `of` has not seen."""
    tokenizer = chats.tokenizer(chats.trl_template(name))
    found = Turns.of(tokenizer)
    assert found is not None
    talk = chats.chat("Why?", "Because.", "And then?", "Nothing.", "Sure?")
    if found.system or found.joint is not None:
        talk = [{"role": "system", "content": "Be brief."}, *talk]
    assert found.render(talk) == tokenizer.apply_chat_template(
        talk, tokenize=False, add_generation_prompt=True
    )


def test_parts_of_chatml():
    found = turns(chats.CHATML)
    assert found is not None
    assert found.user == ("<|im_start|>user\n", "<|im_end|>\n")
    assert found.system == ("<|im_start|>system\n", "<|im_end|>\n")
    assert found.opening == "<|im_start|>assistant\n"


def test_a_template_that_refuses_system_messages_has_no_place_for_one():
    found = turns(MISTRAL)
    assert found is not None
    assert found.system is None and found.joint is None
    assert found.assistant[1] == "</s>"


@pytest.mark.parametrize(
    "template", [ALTERNATING, chats.trl_template("gptoss"), chats.trl_template("llama3_2")]
)
def test_a_template_that_is_more_than_turns_is_left_out_and_said(template: str):
    text = modelfile("m.gguf", chats.tokenizer(template))
    assert 'TEMPLATE """' not in text
    assert "# no TEMPLATE" in text


def test_a_token_that_llama_cpp_puts_first_is_not_in_the_turns():
    tokenizer = chats.tokenizer(chats.trl_template("llama3"))
    from tokenizers.processors import TemplateProcessing

    before = Turns.of(tokenizer)
    tokenizer._tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    after = Turns.of(tokenizer)
    assert before is not None and after is not None
    assert before.plain == "<s>"
    assert after.plain == ""


def test_a_modelfile_stops_and_samples_as_the_model_does():
    config = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "eos_token_id": [2, 4]}
    lines = modelfile("model-Q4_K_M.gguf", chats.tokenizer(), config).splitlines()
    assert lines[0] == "FROM ./model-Q4_K_M.gguf"
    assert [line for line in lines if line.startswith("PARAMETER")] == [
        'PARAMETER stop "</s>"',
        'PARAMETER stop "<|im_end|>"',
        "PARAMETER temperature 0.6",
        "PARAMETER top_p 0.95",
    ]
    greedy = modelfile("m.gguf", chats.tokenizer(), {**config, "do_sample": False})
    assert "temperature" not in greedy
