"""A streamed replay adds up, bit for bit, what the whole model adds up on the same batches; kills too."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from moesmith import ExpertsConfig
from moesmith.errors import UserError
from moesmith.jobs._streamed import open_streamed, refuse_answers, replay_streamed, text_layers
from moesmith.models import layers
from moesmith.prune.observe import Collector
from moesmith.prune.stats import Document, Profile

REFUSED = {"diffusion_gemma"}  # an encoder and a decoder
# Takes another model's states instead of tokens: no profile can be made of it. test_layerwise runs it.
NO_PROFILE = {"qwen3_omni_moe_talker"}
DOCUMENTS = [Document(f"{d}/{n}", d, 20 - n, "") for d in ("code", "math") for n in range(2)]


@dataclass
class Batch:
    ids: Tensor
    mask: Tensor
    index: Tensor


def batches(seed: int = 0) -> list[Batch]:
    """Two batches of two documents each, the second of each shorter and padded."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for start in (0, 2):
        ids = torch.randint(3, 110, (2, 20), generator=generator)
        index = torch.tensor([[start], [start + 1]]).repeat(1, 20)
        index[1, 19:] = -1
        ids[index < 0] = 0
        found.append(Batch(ids, (index >= 0).long(), index))
    return found


def hooked(model: Any, given: list[Batch]) -> Profile:
    """The profile of the whole model in memory."""
    collector = Collector(layers.text_layers(model), DOCUMENTS)
    with torch.no_grad(), collector.attach(model):
        for batch in given:
            with collector.batch(batch.index):
                model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
    return collector.finish({})


def streamed_profile(folder: Path, state: Path, given: list[Batch], dtype: str = "auto") -> Profile:
    streamed = open_streamed(folder, dtype, "cpu")
    collector = Collector(text_layers(streamed), DOCUMENTS)
    replay_streamed(streamed, collector, given, state)
    return collector.finish({})


def assert_same(a: Profile, b: Profile) -> None:
    assert [stats.name for stats in a.layers] == [stats.name for stats in b.layers]
    for x, y in zip(a.layers, b.layers, strict=True):
        assert x.sums["tokens"].sum() > 0
        for name in x.sums:
            torch.testing.assert_close(x.sums[name], y.sums[name], rtol=0, atol=0, equal_nan=True)
        for name in x.per_document:
            assert torch.equal(x.per_document[name], y.per_document[name])
        for field in ("max_norm", "max_abs", "mean_output", "coactivation"):
            assert torch.equal(getattr(x, field), getattr(y, field)), field


@pytest.mark.parametrize("family", [name for name in tiny.FAMILIES if name not in REFUSED | NO_PROFILE])
def test_streamed_is_hooked(family: str, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = checkpoint(family)
    model = tiny.model_class(family).from_pretrained(folder).eval()
    given = batches()
    assert_same(hooked(model, given), streamed_profile(folder, tmp_path, given))


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "gemma4", "deepseek_v3", "qwen3_moe"])
def test_packed_is_hooked(family: str, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    model_class = tiny.model_class(family)
    packed = tmp_path / "packed"
    model_class.from_pretrained(
        checkpoint(family), quantization_config=ExpertsConfig("nf4"), dtype=torch.bfloat16
    ).save_pretrained(packed)
    model = model_class.from_pretrained(packed).eval()
    given = batches()
    assert_same(hooked(model, given), streamed_profile(packed, tmp_path / "state", given))


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_refused_before_any_work(family: str, checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match="2 stacks"):
        open_streamed(checkpoint(family))


def test_dtype_by_name(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = checkpoint("olmoe")
    model = tiny.model_class("olmoe").from_pretrained(folder, dtype=torch.bfloat16).eval()
    assert_same(hooked(model, batches()), streamed_profile(folder, tmp_path, batches(), "bfloat16"))


KILLED = """
    import os, signal, sys
    from pathlib import Path
    sys.path.insert(0, sys.argv[1])
    import test_streamed as t

    streamed = t.open_streamed(Path(sys.argv[2]))
    calls = 0

    class Killed(t.Collector):
        def _add(self, layer, *rest):
            global calls
            calls += 1
            if calls == int(sys.argv[4]):
                os.kill(os.getpid(), signal.SIGKILL)
            super()._add(layer, *rest)

    collector = Killed(t.text_layers(streamed), t.DOCUMENTS)
    t.replay_streamed(streamed, collector, t.batches(), Path(sys.argv[3]))
"""


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, state = checkpoint("olmoe"), tmp_path / "state"
    here = Path(__file__).parent
    done = subprocess.run(  # the fourth call is the second batch of layer 1
        [sys.executable, "-c", textwrap.dedent(KILLED), str(here), str(folder), str(state), "4"],
        env={**os.environ, "PYTHONPATH": str(here.parent)},
    )
    assert done.returncode == -signal.SIGKILL
    written = {path.name for path in state.glob("*.safetensors")}
    assert written == {"model.layers.0.mlp.experts.safetensors"}

    streamed = open_streamed(folder)
    collector = Collector(text_layers(streamed), DOCUMENTS)
    facts = replay_streamed(streamed, collector, batches(), state)
    assert facts["layers_before"] == 1
    collector.finish({}).write(tmp_path / "resumed")
    streamed_profile(folder, tmp_path / "anew", batches()).write(tmp_path / "whole")
    for name in ("stats.safetensors", "profile.json"):
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_finished_replay_is_not_done_again(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = checkpoint("mixtral")
    first = streamed_profile(folder, tmp_path, batches())
    streamed = open_streamed(folder)
    collector = Collector(text_layers(streamed), DOCUMENTS)
    assert replay_streamed(streamed, collector, batches(), tmp_path)["layers_before"] == 3
    assert_same(first, collector.finish({}))


def test_state_of_other_text(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    streamed_profile(checkpoint("mixtral"), tmp_path, batches())
    with pytest.raises(UserError, match="other text"):
        streamed_profile(checkpoint("mixtral"), tmp_path, batches(seed=1))


def test_answers_are_refused() -> None:
    refuse_answers(0)
    with pytest.raises(UserError, match=r"--stream cannot let the model answer .* \(40 prompts\)"):
        refuse_answers(40)


def test_facts(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    streamed = open_streamed(checkpoint("olmoe"))
    collector = Collector(text_layers(streamed), DOCUMENTS)
    facts = SimpleNamespace(**replay_streamed(streamed, collector, batches(), tmp_path))
    assert (facts.layers, facts.layers_before, facts.tokens) == (3, 0, 78)
    experts = sum(p.numel() for p in streamed.model.model.layers[0].parameters())
    assert facts.largest_layer_bytes == 4 * experts
