"""Streamed losses are those of the whole model, token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import dense_models
from dense_models import load, texts
from moesmith.build import capture, token_losses
from moesmith.errors import UserError


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: Any) -> None:
    """Several batches, and slices of 7 tokens."""
    monkeypatch.setattr(capture, "BATCH_TOKENS", 64)
    monkeypatch.setattr(token_losses, "LOGITS", 7 * dense_models.VOCAB)


@pytest.mark.parametrize("family", dense_models.FAMILIES)
def test_as_the_model_says(family: str, tmp_path: Path) -> None:
    folder, given = dense_models.save(family, tmp_path / "model"), texts()
    losses = token_losses.token_losses(folder, given, state=tmp_path / "state")
    assert losses.shape == (118,) and losses.dtype == torch.float32
    assert int(losses.isnan().sum()) == 6  # the last of every text that has one
    model = load(folder)
    for text, found in zip(given, losses.split([len(text.ids) for text in given]), strict=True):
        if len(text.ids) < 2:
            continue
        ids = torch.tensor([text.ids])
        with torch.no_grad():
            wanted = model(input_ids=ids, labels=ids).loss
        torch.testing.assert_close(found[:-1].mean(), wanted, rtol=1e-5, atol=1e-5)
        assert found[-1].isnan()
    assert not list((tmp_path / "state").iterdir())


def test_without_a_state_folder(tmp_path: Path) -> None:
    folder, steps = dense_models.save("llama", tmp_path / "model"), []
    losses = token_losses.token_losses(
        folder, texts((4, 3)), dtype="bfloat16", on_text=lambda *s: steps.append(s)
    )
    assert losses.isfinite().tolist() == [True] * 3 + [False] + [True] * 2 + [False]
    assert steps == [(2, 8), (4, 8), (6, 8), (8, 8)]


def test_nan_names_the_text(tmp_path: Path) -> None:
    folder, given = dense_models.save("llama", tmp_path / "model"), texts((1, 0, 4, 5))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][given[3].ids[0]] = torch.nan
    assert given[3].ids[0] not in given[2].ids
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="the loss on text t3 is NaN"):
        token_losses.token_losses(folder, given)


def test_a_checkpoint_without_its_head(tmp_path: Path) -> None:
    folder = dense_models.save("llama", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"has no lm_head\.weight"):
        token_losses.token_losses(folder, texts())
