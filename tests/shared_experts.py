"""What the tests of expert parallelism run on every rank: a model whose experts the ranks share, beside the
same model whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch.nn.functional import cross_entropy
from transformers import set_seed
from transformers.distributed import DistributedConfig

import runs
import tiny
from moesmith import ranks
from moesmith.data.masks import Example
from moesmith.experts.lora import ParamWrapper
from moesmith.experts.quantizer import ExpertsConfig
from moesmith.models.checkpoint import fingerprint
from moesmith.models.layers import adapter_targets
from moesmith.train import expert_parallel
from moesmith.train.settings import LoraSettings
from moesmith.train.sft import run_sft

LORA = LoraSettings(r=4, alpha=8, targets=["experts", "attention"])


def load(family: str, folder: Path, processes: int = 1, **sharing: Any) -> Any:
    """The family's model from a packed folder (or packed while it loads), shared by so many processes."""
    options = expert_parallel.loading(processes)
    if sharing:
        options["distributed_config"] = DistributedConfig(tp_size=processes, ep_size=processes, **sharing)
    packed = "quantization_config" in (folder / "config.json").read_text()
    if not packed:
        options["quantization_config"] = ExpertsConfig("nf4", double_quant=True)
    return tiny.model_class(family).from_pretrained(folder, dtype=torch.float32, **options)


def adapted(model: Any) -> PeftModel:
    """With an adapter on experts and attention, its first weights those of seed 0."""
    modules, parameters = adapter_targets(model, ("experts", "attention"))
    config = LoraConfig(r=4, lora_alpha=8, target_modules=modules, target_parameters=parameters)
    set_seed(0)
    return get_peft_model(model, config)


def disturbed(model: PeftModel) -> dict[str, torch.Tensor]:
    """Noise on the whole adapter, through PEFT's own functions; what it was before."""
    before = {name: t.clone() for name, t in get_peft_model_state_dict(model).items()}
    generator = torch.Generator().manual_seed(3)
    noisy = {n: t + 0.05 * torch.randn(t.shape, generator=generator) for n, t in sorted(before.items())}
    set_peft_model_state_dict(model, noisy)
    return before


def step(model: PeftModel) -> tuple[torch.Tensor, float]:
    """(logits, loss) of one forward pass with gradient checkpointing, and its gradients in the model."""
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = tiny.inputs(model.get_base_model())
    logits = model(**batch).logits
    loss = cross_entropy(logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())
    loss.backward()
    return logits.detach(), float(loss.detach())


def whole_gradients(model: PeftModel) -> dict[str, torch.Tensor]:
    """Gradients of every trainable parameter, those of shared factors put together; only on rank 0."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    for name, module in model.named_modules():
        if isinstance(module, ParamWrapper) and module.share is not None:
            for leaf, factor, parameter in module.factors():
                found[f"{name}.{leaf}"] = module.share.gather(factor, parameter.grad)
    return found


@torch.no_grad()
def answer(model: PeftModel) -> torch.Tensor:
    """What greedy decoding with a cache gives."""
    training = model.training
    batch = {name: t[:, :8] for name, t in tiny.inputs(model.get_base_model()).items()}
    words = model.eval().generate(**batch, max_new_tokens=6, do_sample=False)
    model.train(training)
    return words


def largest(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """The largest difference between two dicts of tensors with the same names."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in theirs)


def compare(family: str, folder: Path, out: Path, processes: int = 2, **sharing: Any) -> dict[str, Any]:
    """Everything a step computes and leaves on the disk, shared against whole."""
    shared = adapted(load(family, folder, processes, **sharing))
    before = disturbed(shared)
    logits, loss = step(shared)
    gradients = whole_gradients(shared)
    words = answer(shared)
    norm = float(expert_parallel.clip_grad_norm(shared, 1e-3))
    clipped = whole_gradients(shared)
    shared.save_pretrained(out / "shared", is_main_process=ranks.is_main())
    with expert_parallel.whole(shared):
        if ranks.is_main():
            shared.save_pretrained(out / "by-one-rank")
    ranks.barrier()
    again = PeftModel.from_pretrained(load(family, folder, processes, **sharing), out / "shared")
    with torch.no_grad():
        same = torch.equal(again(**tiny.inputs(again.get_base_model())).logits, logits)
    found: dict[str, Any] = {"reloaded": same, "fingerprint": fingerprint(shared.get_base_model())}
    own = sum(p.numel() for *_, p in expert_parallel.shared_factors(shared))
    if ranks.is_main():
        alone = adapted(load(family, folder))
        found["first weights"] = largest(before, disturbed(alone))
        its_logits, its_loss = step(alone)
        its_gradients = {name: p.grad.clone() for name, p in alone.named_parameters() if p.requires_grad}
        found["logits"] = float((logits - its_logits).abs().max())
        found["loss"] = abs(loss - its_loss)
        found["gradients"] = largest(gradients, its_gradients)
        found["answer"] = torch.equal(words, answer(alone))
        its_norm = torch.nn.utils.clip_grad_norm_(alone.parameters(), 1e-3)
        found["norm"] = abs(norm / float(its_norm) - 1)
        found["clipped"] = largest(
            clipped, {name: p.grad for name, p in alone.named_parameters() if p.requires_grad}
        )
        found["share"] = own / sum(
            p.numel() for n, p in alone.named_parameters() if ".experts" in n and "lora_" in n
        )
        alone.save_pretrained(out / "alone")
        found["same fingerprint"] = found["fingerprint"] == fingerprint(alone.get_base_model())
    return found


def rows(count: int, start: int = 0) -> list[Example]:
    return runs.examples(count, start)


def train(folder: Path, out: Path, processes: int = 2, resume: bool = False, **options: Any) -> dict:
    """A short run; what every rank has to agree on."""
    cfg = runs.settings(out, lora=LORA, expert_parallel=processes, **options)
    cfg = cfg.model_copy(update={"resume": resume})
    model = load("olmoe", folder, processes)
    result = run_sft(model, runs.TOKENIZER, rows(30), rows(4, start=40), cfg, quiet=True)
    return {"best": result.best_step, "tokens": result.tokens, "loss": result.best_eval_loss}
