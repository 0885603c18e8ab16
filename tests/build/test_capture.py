"""What a streamed pass sees in front of every FFN is what hooks on the whole model see, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import dense_models
import tiny
from dense_models import WINDOW, load, texts
from moesmith.build import capture as module
from moesmith.build.capture import LayerInputs, Text, batches, capture
from moesmith.errors import UserError


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "BATCH_TOKENS", 64)


def captured(folder: Path, given: list[Text], state: Path, **more: Any) -> list[Tensor]:
    found: list[Tensor] = []
    facts = capture(folder, given, lambda seen: found.append(seen.inputs), state, **more)
    assert facts["layers"] == len(found) and facts["tokens"] == sum(len(text.ids) for text in given)
    return found


def hooked(model: Any, given: list[Text], masked: bool = True) -> list[Tensor]:
    """(T, H) per layer, from the whole model on the same batches; texts put in order one by one."""
    ffns = [ffn for name, ffn in model.named_modules() if name.endswith(".mlp") and hasattr(ffn, "gate_proj")]
    found: list[dict[int, Tensor]] = [{} for _ in ffns]
    for batch in batches(given):
        seen: list[Tensor] = []
        hooks = [
            ffn.register_forward_pre_hook(lambda _m, args, into=seen: into.append(args[0])) for ffn in ffns
        ]
        with torch.no_grad():
            model(**(batch.inputs if masked else {"input_ids": batch.ids}), use_cache=False)
        for hook in hooks:
            hook.remove()
        for into, states in zip(found, seen, strict=True):
            into |= {n: row[: len(given[n].ids)] for n, row in zip(batch.texts, states, strict=True)}
    return [torch.cat([of_layer[n] for n in sorted(of_layer)]) for of_layer in found]


def test_batches_hold_every_token_once() -> None:
    given = texts()
    found = batches(given)
    assert sorted(torch.cat([batch.rows for batch in found]).tolist()) == list(range(118))
    tokens = torch.tensor([token for text in given for token in text.ids])
    for batch in found:
        assert torch.equal(batch.ids[batch.mask.bool()], tokens[batch.rows])
        assert batch.ids.numel() <= 64 or len(batch.ids) == 1
    assert [batch.texts for batch in found] == [[1], [6], [3, 5], [0, 2]]


def test_a_text_longer_than_a_batch_is_alone() -> None:
    assert [batch.texts for batch in batches(texts((100, 20, 20, 20, 20)))] == [[0], [1, 2, 3], [4]]


@pytest.mark.parametrize("family", dense_models.FAMILIES)
def test_captured_is_hooked(family: str, tmp_path: Path) -> None:
    folder, given = dense_models.save(family, tmp_path / "model"), texts()
    assert max(len(text.ids) for text in given) > 2 * WINDOW
    streamed, whole = captured(folder, given, tmp_path / "state"), hooked(load(folder), given)
    assert len(streamed) == 4
    assert all(torch.equal(x, y) for x, y in zip(streamed, whole, strict=True))
    assert not list((tmp_path / "state").iterdir())


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_captured_on_a_gpu(family: str, tmp_path: Path) -> None:
    folder, given = dense_models.save(family, tmp_path / "model"), texts()
    here, there = (captured(folder, given, tmp_path / "state", device=d) for d in ("cpu", "cuda"))
    for x, y in zip(here, there, strict=True):
        assert y.is_cuda
        torch.testing.assert_close(x, y.cpu(), rtol=1e-3, atol=1e-3)


def test_in_bf16(tmp_path: Path) -> None:
    folder, given = dense_models.save("gemma2", tmp_path / "model"), texts()
    streamed = captured(folder, given, tmp_path / "state", dtype="bfloat16")
    whole = hooked(load(folder, dtype=torch.bfloat16), given)
    assert streamed[0].dtype == torch.bfloat16
    assert all(torch.equal(x, y) for x, y in zip(streamed, whole, strict=True))


def test_batches_change_nothing_but_rounding(tmp_path: Path) -> None:
    """Padding and neighbours leave a text alone: law 8's dense half."""
    folder, given = dense_models.save("gemma3_text", tmp_path / "model"), texts()
    streamed = captured(folder, given, tmp_path / "state")
    alone = [hooked(load(folder), [text], masked=False) for text in given if text.ids]
    for layer, states in enumerate(streamed):
        torch.testing.assert_close(states, torch.cat([one[layer] for one in alone]), rtol=1e-4, atol=1e-4)


def test_what_visit_is_given(tmp_path: Path) -> None:
    folder, given = dense_models.save("llama", tmp_path / "model"), texts((3, 0, 2))
    model, seen, steps = load(folder), [], []

    def visit(found: LayerInputs) -> None:
        assert found.document.tolist() == [0, 0, 0, 2, 2] and found.position.tolist() == [0, 1, 2, 0, 1]
        weight = model.model.layers[found.layer].mlp.down_proj.weight
        assert torch.equal(found.ffn.down_proj.weight, weight)
        seen.append(found)

    facts = capture(folder, given, visit, tmp_path, on_step=lambda *step: steps.append(step))
    assert [found.layer for found in seen] == [0, 1, 2, 3]
    assert not any(list(found.ffn.parameters()) for found in seen)
    assert steps == [(2, 8), (4, 8), (6, 8), (8, 8)]
    assert facts["largest_layer_bytes"] == 4 * sum(p.numel() for p in model.model.layers[0].parameters())


def test_a_stopped_run_starts_over(tmp_path: Path) -> None:
    """Also behind a process that was killed and could not tidy up; other text is no hindrance."""
    folder = dense_models.save("llama", tmp_path / "model")
    (tmp_path / "state" / "hidden").mkdir(parents=True)
    (tmp_path / "state" / "hidden" / "state.json").write_text('{"identity": "another", "done": 2}')
    assert len(captured(folder, texts(), tmp_path / "state")) == 4

    def stop(found: LayerInputs) -> None:
        if found.layer == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        capture(folder, texts(), stop, tmp_path / "state")
    assert len(captured(folder, texts((7, 8)), tmp_path / "state")) == 4


def test_nan_names_layer_and_text(tmp_path: Path) -> None:
    folder, given = dense_models.save("llama", tmp_path / "model"), texts((9, 1, 4, 0, 5))
    assert given[2].ids[3] not in [token for text in given[:2] + given[4:] for token in text.ids]
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][given[2].ids[3]] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.layers\.0 reads NaN or infinity in text t2"):
        captured(folder, given, tmp_path / "state")


def test_no_tokens(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none of the 2 texts"):
        captured(dense_models.save("llama", tmp_path / "model"), texts((0, 0)), tmp_path)


def test_a_moe_is_refused(tmp_path: Path) -> None:
    tiny.save("mixtral", tmp_path)
    with pytest.raises(UserError, match=r"model\.layers\.0 of MixtralForCausalLM has no dense FFN"):
        captured(tmp_path, texts(), tmp_path / "state")
