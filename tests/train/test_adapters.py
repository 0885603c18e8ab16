"""Adapters go where they were asked to, in the precision that was asked for."""

import pytest
import torch
from safetensors.torch import load_file

from moesmith.errors import UserError
from moesmith.train import sft as journey
from moesmith.train.adapters import attach
from moesmith.train.settings import LoraSettings
from moesmith.train.sft import run_sft
from runs import TOKENIZER, examples, model, run, settings


def test_adapters_keep_their_float32_values_on_a_packed_model(tmp_path, checkpoint):
    from transformers import AutoModelForCausalLM

    from moesmith import ExpertsConfig

    def packed():
        config = ExpertsConfig("nf4")
        return AutoModelForCausalLM.from_pretrained(
            checkpoint("olmoe"), quantization_config=config, dtype=torch.bfloat16
        )

    both = LoraSettings(r=4, targets=["experts", "attention"])
    cfg = settings(tmp_path / "out", lora=both, dtype="bfloat16", max_steps=1)
    fresh = attach(packed(), cfg.lora, cfg.seed)
    expected = {n: p.detach().clone() for n, p in fresh.named_parameters() if p.requires_grad}
    elsewhere = cfg.model_copy(update={"out": str(tmp_path / "elsewhere")})
    session = journey.Session(packed(), TOKENIZER, examples(8), [], elsewhere, quiet=True)
    trainer, _, _ = session._trainer(journey.console.Bar("", None, None), first=True)
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter, expected[name]), name
    result = run_sft(packed(), TOKENIZER, examples(8), examples(2, start=40), cfg, quiet=True)
    assert result.last_eval_loss < result.first_eval_loss
    saved = load_file(result.last / "adapter_model.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.float32}
    assert any("experts" in name for name in saved) and any("q_proj" in name for name in saved)


def test_placements_that_are_not_there_and_dropout_that_cannot_be(tmp_path):
    with pytest.raises(UserError, match="has no shared_experts"):
        run(tmp_path / "a", cfg=settings(tmp_path / "a", lora=LoraSettings(targets=["shared_experts"])))
    with pytest.raises(UserError, match="lora.dropout=0.1 is not possible"):
        run(tmp_path / "b", cfg=settings(tmp_path / "b", lora=LoraSettings(dropout=0.1)))
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    "targets", [["attention"], ["router"], ["experts"], ["router", "experts", "attention"]]
)
def test_any_mix_of_placements_trains_and_is_counted(tmp_path, targets):
    cfg = settings(tmp_path / "out", lora=LoraSettings(r=2, targets=targets), max_steps=2)
    session = journey.Session(model(), TOKENIZER, examples(8), examples(2, start=40), cfg, quiet=True)
    counts = session.plan.adapters
    assert set(counts.trainable) == set(targets)
    assert counts.total == sum(p.numel() for p in session.model.parameters() if p.requires_grad)
    before = {n: p.detach().clone() for n, p in session.model.named_parameters() if p.requires_grad}
    session.train()
    after = dict(session.model.named_parameters())
    assert all(not torch.equal(after[n], p) for n, p in before.items() if "lora_B" in n)
