"""A model card says what the records say, all of it and nothing else, and no path of this machine."""

import json
import re
from pathlib import Path

import pytest
import yaml

import tiny
from moesmith.export.card import collect, lineage, model_card


def write(path: Path, what) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(what if isinstance(what, str) else json.dumps(what))
    return path


def model(folder: Path, packed: bool = False) -> Path:
    """A folder with a model's config.json and nothing else."""
    config = tiny.config("olmoe").to_dict() | {"architectures": ["OlmoeForCausalLM"]}
    if packed:
        config["quantization_config"] = {"quant_method": "moesmith", "scheme": "nf4"}
    write(folder / "config.json", config)
    return folder


@pytest.fixture
def workshop(tmp_path):
    """hub model -> pruned -> packed -> SFT -> DPO, each with the record that its command leaves."""
    hub = model(tmp_path / "cache" / "models--org--Big-MoE" / "snapshots" / "abc")
    write(hub / "README.md", "---\nlicense: apache-2.0\ntags: [x]\n---\n# Big\n")
    pruned = model(tmp_path / "work" / "small")
    write(
        pruned / "moesmith.json",
        {"command": "prune", "source": str(hub), "date": "2026-11-02T10:00:00+00:00", "moesmith": "0.1.0",
         "config": {"model": "org/Big-MoE", "keep": 6, "out": "small"}},
    )  # fmt: skip
    write(
        pruned / "README.md",
        "# old\n\n## Pruned with moesmith\n\nKL 0.0123 [0.01, 0.02]\n\n## Use\n\nno\n",
    )
    packed = model(tmp_path / "work" / "packed", packed=True)
    write(
        packed / "moesmith.json",
        {"command": "quantize", "source": {"path": "work/small", "bytes": 7}, "moesmith": "0.1.0",
         "config": {"model": "work/small", "scheme": "nf4", "double_quant": True, "overwrite": True},
         "counts": {"matrices": {"nf4": 1440}, "not_packed": []}, "proof": {"tensors": 33}},
    )  # fmt: skip
    for name, extra, under in (("sft", {}, None), ("dpo", {"dpo": {"beta": 0.1}}, "work/sft/best")):
        run = tmp_path / "work" / name
        write(run / "best" / "adapter_config.json", {})
        write(run / "best" / "moesmith.json", {"base": {"path": str(packed)}, "moesmith": "0.1.0", **extra})
        config = {"out": str(run), "model": str(packed), "adapter": under, "train": {"lr": 0.002},
                  "lora": {"r": 8, "targets": ["experts"]},
                  "data": {"path": f"work/data/{name}.jsonl"}}  # fmt: skip
        write(run / "config.yaml", yaml.safe_dump(config))
        rows = {"read": 100, "kept": 90, "tokens": 5000, "learned": 700}
        write(run / "data.json", {"fingerprint": f"{name}-hash", "train": 90, "held_out": 10, "rows": rows})
        write(run / "result.json", {"first_eval_loss": 3.5, "best_eval_loss": 1.25, "best_step": 40})
        write(tmp_path / "work" / "data" / f"{name}.jsonl", "{}\n")
    evaluated = {
        "command": "eval", "adapter": {"folder": str(tmp_path / "work/dpo/best"), "digest": "d1"},
        "requests": {"path": "/secret/home/requests.jsonl"}, "how": {"decoding": "greedy"},
        "tool_calls": {"n": 160, "right": 32, "rate": 0.2, "interval": [0.145, 0.269]},
    }  # fmt: skip
    write(tmp_path / "work/dpo/held-out/eval.json", evaluated)
    other = evaluated | {"adapter": {"folder": str(tmp_path / "work/sft/best"), "digest": "s1"},
                         "tool_calls": {"n": 160, "rate": 0.77, "interval": [0.7, 0.8]}}  # fmt: skip
    write(tmp_path / "work/dpo/before/eval.json", other)
    return tmp_path / "work"


RECORD = {
    "command": "export", "action": "merged", "config": {"out": "out/Big-chat", "dtype": "bfloat16"},
    "merged": {"changed": {"experts": 96, "attention": 12}},
    "parity": [{"route": "merged", "against": "packed (nf4) with dpo/best", "bounds": {},
                "parity": {"prompts": 16, "max": 0.0123, "mean": 0.001, "kl": 1e-6, "agreement": 1.0}}],
}  # fmt: skip


def front(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def test_the_steps_are_walked_back_to_the_first_model(workshop):
    steps = lineage(workshop / "dpo" / "best")
    assert [(step["command"], step["made"]) for step in steps] == [
        (None, "abc"), ("prune", "small"), ("quantize", "packed"), ("sft", "best"), ("dpo", "best"),
    ]  # fmt: skip
    assert steps[0]["hub"] == "org/Big-MoE"
    assert steps[2]["options"] == {"scheme": "nf4", "double_quant": True}
    assert steps[4]["options"]["lora.r"] == 8 and steps[4]["data"]["rows"] == 90


def test_a_folder_that_is_gone_or_names_itself_ends_the_walk(tmp_path):
    lost = model(tmp_path / "lost")
    write(lost / "moesmith.json", {"command": "prune", "source": "/nowhere/at/all"})
    assert [step["made"] for step in lineage(lost)] == ["all", "lost"]
    ring = model(tmp_path / "ring")
    write(ring / "moesmith.json", {"command": "prune", "source": str(ring)})
    assert [step["made"] for step in lineage(ring)] == ["ring"]


def test_the_card_of_a_merged_export_says_what_every_record_says(workshop):
    text = model_card(collect(workshop / "packed", workshop / "dpo" / "best", RECORD))
    assert front(text) == {
        "base_model": "org/Big-MoE", "base_model_relation": "finetune", "library_name": "transformers",
        "pipeline_tag": "text-generation", "license": "apache-2.0", "tags": ["moe", "moesmith", "pruned"],
    }  # fmt: skip
    for words in (
        "# Big-chat", "8 experts, top-2", "96 of experts, 12 of attention",
        "begins with `org/Big-MoE`", "`moesmith prune` → `small` (2026-11-02, moesmith 0.1.0)", "keep 6",
        "### Pruned with moesmith", "KL 0.0123 [0.01, 0.02]", "1,440 expert matrices in nf4",
        "lora.targets experts", "eval loss 3.500 before, 1.250 at step 40",
        "| sft | sft.jsonl | 90 of 100 | 5,000 | 700 | `sft-hash` |", "| dpo | dpo.jsonl |",
        "| right tool calls, requests.jsonl | held-out | 160 | 20.0 % | 14.5 % to 26.9 % |",
        "| merged | packed (nf4) with dpo/best | 16 | 0.012 | 0.001 | 1e-06 | 100.0 % |",
        "moesmith serve Big-chat", "went through packing",
    ):  # fmt: skip
        assert words in text, words
    assert "77.0 %" not in text, "an evaluation of another adapter"
    assert "\n## Use" not in text, "an ancestor's README says how to use the ancestor"
    assert "was not measured" not in text


def test_no_path_of_this_machine_stays(workshop):
    record = RECORD | {
        "config": {"out": str(workshop / "out" / "x")},
        "source": {"path": str(workshop / "packed")},
    }
    for facts in (
        collect(workshop / "packed", workshop / "dpo" / "best", record),
        collect(workshop / "packed", None, None),
    ):
        facts["steps"][-1]["figures"] = [
            f"see {workshop}/secret/file.json, ~/home/of/mine and http://a.b/c/d"
        ]
        text = model_card(facts)
        assert str(workshop) not in text and "/secret" not in text and "/home/" not in text
        assert "see file.json, mine and http://a.b/c/d" in text
        assert not re.findall(r"(?<![\w:/.<])/(?:\w+/)+\w+", text)


def test_what_was_not_measured_is_said(workshop):
    (workshop / "dpo/held-out/eval.json").unlink()
    text = model_card(collect(workshop / "packed", workshop / "dpo" / "best", RECORD | {"parity": []}))
    assert "No evaluation of it was found" in text and "not compared with its source" in text
    assert "What was measured" not in text and "Is it the same model" not in text


@pytest.mark.parametrize(
    ("record", "head", "words"),
    [
        ({"action": "lora", "lora": {"form": "vllm", "rank": 24, "tensors": 9, "placements": {}}},
         {"library_name": "peft", "base_model_relation": "adapter",
          "tags": ["moe", "moesmith", "lora", "pruned"]},
         ("vllm serve small --enable-lora --max-lora-rank 32 --lora-modules x=x", "over packed experts")),
        ({"action": "lora", "lora": {"form": "gguf", "rank": 8, "tensors": 9, "file": "x.gguf"}},
         {"base_model_relation": "adapter", "tags": ["moe", "moesmith", "lora", "gguf", "pruned"]},
         ("llama-server -m small.gguf --lora x.gguf",)),
        ({"action": "gguf", "gguf": {"files": [{"file": "x-bf16.gguf"}, {"file": "x-Q4_K_M.gguf"}]}},
         {"base_model_relation": "quantized", "tags": ["moe", "moesmith", "gguf", "pruned"]},
         ("llama-server -m x-Q4_K_M.gguf",)),
        (None, {"library_name": "peft", "tags": ["moe", "moesmith", "lora", "pruned"]},
         ("moesmith chat packed --adapter dpo-best", "PeftModel")),
    ],
)  # fmt: skip
def test_every_kind_of_export_says_how_to_run_it(workshop, record, head, words):
    given = record and {"command": "export", "config": {"out": "out/x"}, **record}
    text = model_card(collect(workshop / "packed", workshop / "dpo" / "best", given))
    found = front(text)
    assert {key: found.get(key) for key in head} == head
    for one in words:
        assert one in text


def test_the_card_of_an_export_is_the_one_it_was_given(workshop):
    """From the folder alone, by its own moesmith.json."""
    record = RECORD | {
        "source": {"path": str(workshop / "packed"), "scheme": "nf4"},
        "adapters": [{"path": str(workshop / "dpo" / "best"), "digest": "d1"}],
    }
    out = model(workshop / "Big-chat")
    write(out / "moesmith.json", record)
    later = model_card(collect(out))
    given = model_card(collect(workshop / "packed", workshop / "dpo" / "best", record))
    for part in ("How it was made", "Is it the same model", "Data"):
        cut = [re.search(rf"## {part}\n.*?(?=\n## )", text, re.DOTALL).group() for text in (later, given)]
        assert cut[0] == cut[1]
    assert later.count("moesmith export merged") == 1
