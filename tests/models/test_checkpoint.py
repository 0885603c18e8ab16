"""A checkpoint described without reading weights; every broken download named in one line."""

import http.server
import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moesmith.errors import UserError
from moesmith.models.checkpoint import (
    Checkpoint,
    base_record,
    check_architecture,
    fingerprint,
    local_folder,
    model_class,
    resolve,
    side_files,
)

CONFIG = {"model_type": "olmoe", "architectures": ["OlmoeForCausalLM"]}


@pytest.fixture
def folder(tmp_path):
    """A model folder with one bf16 tensor."""
    write(tmp_path, {"w": torch.ones(2, 3, dtype=torch.bfloat16)})
    return tmp_path


def write(folder: Path, tensors: dict, config: dict = CONFIG) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def problem(folder: Path, **kwargs) -> UserError:
    with pytest.raises(UserError) as caught:
        Checkpoint.open(folder, **kwargs)
    assert "\n" not in caught.value.message
    return caught.value


def test_what_a_folder_holds(folder):
    (folder / "tokenizer.json").write_text("{}")
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.config == CONFIG and checkpoint.folder == folder
    assert checkpoint.nbytes == 12 and checkpoint.files == ["model.safetensors"]
    assert checkpoint.has_tokenizer and checkpoint.chat_template is None and not checkpoint.is_packed


def test_a_config_alone_is_enough_when_no_weights_are_wanted(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert Checkpoint.open(tmp_path, weights=False).tensors == {}
    assert "no weights" in problem(tmp_path).message


def test_the_template_is_found_wherever_it_is(folder):
    def found() -> str | None:
        return Checkpoint.open(folder).chat_template

    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "old"}))
    assert found() == "old"
    several = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    assert found() == "d"
    (folder / "chat_template.jinja").write_text("{%- generation -%}x{% endgeneration %}")
    assert Checkpoint.open(folder).marks_assistant
    (folder / "chat_template.jinja").write_text("{{ generation }}")
    assert not Checkpoint.open(folder).marks_assistant


def test_quantisation_is_read_wherever_it_is(folder):
    for config in (
        {**CONFIG, "quantization_config": {"quant_method": "moesmith", "scheme": "nf4"}},
        {"model_type": "gemma4", "text_config": {"quantization_config": {"quant_method": "moesmith"}}},
    ):
        (folder / "config.json").write_text(json.dumps(config))
        assert Checkpoint.open(folder).is_packed
    (folder / "config.json").write_text(
        json.dumps({**CONFIG, "quantization_config": {"quant_method": "mxfp4"}})
    )
    assert Checkpoint.open(folder).quantization and not Checkpoint.open(folder).is_packed


def test_no_model_there(tmp_path):
    assert problem(tmp_path).message == f"{tmp_path}: no config.json"
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "config.json").write_text("{}")
    assert problem(tmp_path).hint == f"did you mean {tmp_path}/inner?"
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "adapter" in problem(tmp_path).message
    (tmp_path / "config.json").write_text("{")
    assert "not valid JSON" in problem(tmp_path).message


def test_other_weights_say_how_to_convert(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "pytorch_model.bin").touch()
    error = problem(tmp_path, weights=False)
    assert "pytorch_model.bin" in error.message and "save_pretrained" in error.hint
    (tmp_path / "x.gguf").touch()
    assert "GGUF" in problem(tmp_path).message
    with pytest.raises(UserError, match="GGUF file"):
        local_folder(tmp_path / "x.gguf")


def test_local_or_hub():
    assert local_folder("org/name") is None and local_folder("name") is None
    for text in ("./org/name", "/no/such", "a/b/c", "~/nothing-here"):
        with pytest.raises(UserError, match="no such file"):
            local_folder(text)


def test_an_unreachable_hub_is_one_line():
    for attempt in (resolve, Checkpoint.open):
        with pytest.raises(UserError) as caught:
            attempt("no-such-org/no-such-model")
        assert "the hub cannot be reached" in caught.value.message


def test_unknown_architectures():
    check_architecture(CONFIG)
    for config, words in (
        ({}, "no model_type"),
        ({"model_type": "newmoe"}, "unknown to transformers"),
        ({"model_type": "newmoe", "auto_map": {"AutoConfig": "x.Y"}}, "its own code"),
    ):
        with pytest.raises(UserError, match=words):
            check_architecture(config)
    assert model_class({"model_type": "qwen3_moe"}).__name__ == "Qwen3MoeForCausalLM"
    gemma = {"model_type": "gemma4", "architectures": ["Gemma4ForConditionalGeneration"]}
    assert model_class(gemma).__name__ == "Gemma4ForConditionalGeneration"
    with pytest.raises(UserError, match="no language model"):
        model_class({"model_type": "clip_vision_model"})


def test_side_files(folder):
    names = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json",
             "preprocessor_config.json", "merges.txt"]  # fmt: skip
    for name in [*names, "README.md", "optimizer.pt"]:
        (folder / name).touch()
    assert [path.name for path in side_files(folder)] == sorted(names)


# ---------------------------------------------------------------- fingerprints


@pytest.fixture(scope="module")
def packed(checkpoint, tmp_path_factory):
    """(packed model, the folder it was saved in)."""
    from moesmith import ExpertsConfig

    model = load(checkpoint("olmoe"), quantization_config=ExpertsConfig("nf4"))
    folder = tmp_path_factory.mktemp("packed")
    model.save_pretrained(folder)
    return model, folder


def load(folder, **kwargs):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, **kwargs)


def test_the_fingerprint_survives_save_reload_and_dtype(packed):
    model, folder = packed
    mark = fingerprint(model)
    assert len(mark) == 32
    assert fingerprint(load(folder)) == mark
    assert fingerprint(folder) == mark
    assert (
        fingerprint(load(folder, dtype=torch.float32))
        == fingerprint(load(folder, dtype=torch.bfloat16))
        == mark
    )


def test_the_fingerprint_looks_through_adapters(packed):
    from peft import LoraConfig, get_peft_model

    _, folder = packed
    model = load(folder)
    mark = fingerprint(model)
    peft_model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    assert fingerprint(peft_model) == mark


@pytest.mark.parametrize(
    "settings", [{"scheme": "fp4"}, {"double_quant": True}, {"blocksize": 32}, {"scheme": "int8"}], ids=str
)
def test_another_packing_is_another_base(packed, checkpoint, settings):
    from moesmith import ExpertsConfig

    other = load(checkpoint("olmoe"), quantization_config=ExpertsConfig(**settings))
    assert fingerprint(other) != fingerprint(packed[0])


def test_a_changed_weight_is_another_base(packed):
    model, folder = packed
    changed = load(folder)
    with torch.no_grad():
        changed.model.layers[0].self_attn.q_proj.weight.mul_(1.25)
    assert fingerprint(changed) != fingerprint(model)


def test_the_base_record_says_where_and_how(packed):
    model, folder = packed
    record = base_record(model, folder)
    assert record["path"] == str(folder) and record["fingerprint"] == fingerprint(folder)
    assert (record["scheme"], record["double_quant"], record["linears"]) == ("nf4", False, None)


# ---------------------------------------------------------------- the hub


@pytest.fixture
def hub(checkpoint, tmp_path, monkeypatch):
    """A hub on this machine that serves one tiny model as tiny/olmoe; yields the bytes of weights it sent."""
    root = tmp_path / "served"
    shutil.copytree(checkpoint("olmoe"), root)
    (root / "tokenizer_config.json").write_text(json.dumps({"chat_template": "x"}))
    for name in ("LICENSE", "README.md"):
        (root / name).write_text(name)
    (root / "original").mkdir()
    for name in ("original/model.safetensors", "consolidated.safetensors"):
        shutil.copyfile(root / "model.safetensors", root / name)
    sent = {"weights": 0}

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer(False)

        def do_GET(self):
            self.answer(True)

        def answer(self, body: bool):
            path = self.path.split("?")[0]
            names = [str(file.relative_to(root)) for file in root.rglob("*") if file.is_file()]
            if path.startswith("/api/models/tiny/olmoe/tree/"):
                files = [
                    {"type": "file", "path": name, "size": (root / name).stat().st_size, "oid": "0"}
                    for name in names
                ]
                return self.reply(json.dumps(files).encode(), body)
            if path.startswith("/api/models/tiny/olmoe"):
                siblings = [{"rfilename": name} for name in names]
                return self.reply(
                    json.dumps({"id": "tiny/olmoe", "sha": "a" * 40, "siblings": siblings}).encode(), body
                )
            file = (
                root / path.partition(f"/{'a' * 40}/")[2]
                if "a" * 40 in path
                else root / path.rpartition("/")[2]
            )
            if not path.startswith("/tiny/olmoe/") or not file.is_file():
                self.send_response(404)
                self.send_header(
                    "X-Error-Code", "EntryNotFound" if "/tiny/olmoe/" in path else "RepoNotFound"
                )
                self.send_header("Content-Length", "0")
                return self.end_headers()
            data = file.read_bytes()
            if "Range" in self.headers or "range" in self.headers:
                first, last = self.headers["range"].removeprefix("bytes=").split("-")
                data = data[int(first) : int(last) + 1]
            if body and file.suffix == ".safetensors":
                sent["weights"] += len(data)
            return self.reply(data, body)

        def reply(self, data: bytes, body: bool):
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", f'"{abs(hash(self.path.split("?")[0])):x}"')
            self.send_header("X-Repo-Commit", "a" * 40)
            self.end_headers()
            if body:
                self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    url = f"http://127.0.0.1:{server.server_port}"
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield sent
    server.shutdown()
    server.server_close()


def test_a_hub_model_is_described_by_range_and_resolved_whole(hub, checkpoint):
    described = Checkpoint.open("tiny/olmoe")
    local = Checkpoint.open(checkpoint("olmoe"))
    assert described.config == local.config and described.chat_template == "x" and described.folder is None
    sizes = {name: (t.dtype, t.shape, t.nbytes) for name, t in described.tensors.items()}
    assert sizes == {name: (t.dtype, t.shape, t.nbytes) for name, t in local.tensors.items()}
    assert 0 < hub["weights"] < local.nbytes / 4
    folder = resolve("tiny/olmoe")
    assert Checkpoint.open(folder).tensors.keys() == local.tensors.keys()
    assert {path.name for path in folder.iterdir()} >= {"LICENSE", "README.md", "config.json"}
    assert [str(path.relative_to(folder)) for path in folder.rglob("*.safetensors")] == ["model.safetensors"]


def test_no_such_model_on_the_hub(hub):
    with pytest.raises(UserError, match="no such folder here and no such model on the hub"):
        Checkpoint.open("tiny/other")
