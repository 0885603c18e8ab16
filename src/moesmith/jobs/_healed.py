"""The folder of a healed model: what goes into it beside the weights that were trained, and what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moesmith.config import write_atomically


def logits(model: Any, ids: Any) -> Any:
    """Of a fixed prompt."""
    import torch

    with torch.no_grad():
        return model(input_ids=ids.to(model.device), use_cache=False).logits.cpu()


def keep_what_was_not_loaded(source: Path, folder: Path) -> list[str]:
    """Copy tensors that transformers has no place for (heads for multi-token prediction) into a file of
    their own. Their names.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    from moesmith.models.headers import INDEX, SINGLE, read_headers

    headers, there = read_headers(source), read_headers(folder)
    missing = sorted(set(headers) - set(there))
    if not missing:
        return []
    tensors = {}
    for name in missing:
        with safe_open(source / headers[name].file, framework="pt") as file:
            tensors[name] = file.get_tensor(name)
    save_file(tensors, folder / "model-not-loaded.safetensors", metadata={"format": "pt"})
    single = "model-loaded.safetensors"
    if (folder / SINGLE).is_file():
        (folder / SINGLE).rename(folder / single)
    places = {name: single if header.file == SINGLE else header.file for name, header in there.items()}
    places |= dict.fromkeys(missing, "model-not-loaded.safetensors")
    total = sum(header.nbytes for header in there.values()) + sum(headers[name].nbytes for name in missing)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    write_atomically(folder / INDEX, json.dumps(index, indent=1) + "\n")
    return missing


def files_beside(folder: Path) -> list[Path]:
    """What belongs to the model beside its weights; what was measured on the pruned one is not among it."""
    weights = (".safetensors", ".safetensors.index.json", ".bin", ".gguf")
    skip = ("config.json", "moesmith.json", "heal.json", "report.html", "report.json", "report.png")
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file() and not path.name.endswith(weights) and path.name not in skip
    )


def say_healed(folder: Path, facts: dict[str, Any]) -> None:
    """Drop metadata and model card speak of this model: the pruned one's evidence goes, healing is added."""
    before, after = facts["before"]["kl"]["mean"], facts["after"]["kl"]["mean"]
    healed = {"stages": facts["accepted"], "kl_before": before, "kl_after": after}
    drops = folder / "expert_drop_metadata.json"
    if drops.is_file():
        record = json.loads(drops.read_text(encoding="utf-8"))
        for holder in (record, record.get("meta") or {}):
            holder.pop("evidence", None)
        write_atomically(drops, json.dumps({**record, "healed": healed}, indent=1) + "\n")
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    stages = " and ".join(facts["accepted"])
    section = (
        f"\n## Healed\n\nAfter pruning, {stages} were trained by distillation from the original "
        f"(`{facts['how']['command']}`). Divergence from the original on held-out text: {before:.4f} before, "
        f"{after:.4f} after (nats per token). Figures above this section are of the model before healing.\n"
    )
    write_atomically(card, text + section)
