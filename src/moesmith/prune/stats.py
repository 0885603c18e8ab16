"""What a profile is: sums over tokens for every layer, expert and domain, and how it is kept on disk.

A folder holds `stats.safetensors` (all numbers) and `profile.json` (what they are about). Every score of
`criteria` derives from these sums, so one profile answers for any number of experts.

g is the routing weight as the experts call receives it (after renormalisation and scaling), f an expert's
output before it, y a layer's routed sum, h the residual stream before it. Norms are taken in fp32 and summed
in fp64.
"""

# D domains, E experts, N documents, H width of the experts' output

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesmith.config import no_such_file, write_atomically
from moesmith.errors import UserError
from moesmith.models.identity import model_hash, router_hash

STATS, RECORD = "stats.safetensors", "profile.json"
FORMAT = 1

# Sums over the routed tokens of an expert, (D, E) each, with what they are measured in.
SUMS = {
    "tokens": "tokens routed to the expert",
    "gate": "sum of g",
    "gate_sq": "sum of g^2",
    "norm": "sum of |f|",
    "norm_sq": "sum of |f|^2",
    "contribution": "sum of g |f|",
    "contribution_sq": "sum of g^2 |f|^2",
    "easyep": "sum of g |f| max(0, 1 - cos(h, h + y)); NaN where h is out of sight",
    "relative": "sum of g^2 |f|^2 / |y|^2",
    "prompt_norm": "sum over documents of sqrt(sum over tokens of g^2 |f|^2)",
}
ROUTERS_ONLY = (
    "{model}: the profile was made of a model with the same routers, but not of this very one; right for a "
    "packed or cast copy, wrong for a fine-tune with frozen routers, which looks the same: profile that anew"
)
PER_DOCUMENT = ("tokens", "gate", "norm", "contribution", "contribution_sq")


@dataclass
class Document:
    """One document of the calibration text, as a profile remembers it."""

    id: str
    domain: str
    tokens: int
    hash: str = ""


@dataclass
class LayerStats:
    """One MoE layer."""

    name: str
    """its experts module"""
    layer: str
    """its MoE block, the name that surgery and plans use"""
    num_experts: int
    top_k: int
    n_group: int
    sums: dict[str, Tensor]
    """(D, E) fp64 for each name in SUMS"""
    max_norm: Tensor
    """(D, E) fp64: largest |f|"""
    max_abs: Tensor
    """(D, E) fp64: largest absolute element of f"""
    mean_output: Tensor
    """(E, H) fp32: mean f over the tokens routed to the expert, zero for one that got none"""
    coactivation: Tensor
    """(E, E) fp64: tokens routed to both"""
    per_document: dict[str, Tensor]
    """(N, E) fp64 for each name in PER_DOCUMENT"""
    topk_group: int = 1
    """groups that a token's experts may come from, where routing is limited to groups"""

    def total(self, name: str) -> Tensor:
        """A sum over all domains, (E,)."""
        return self.sums[name].sum(dim=0)


@dataclass
class Profile:
    """Statistics of all MoE layers over a set of documents."""

    layers: list[LayerStats]
    domains: list[str]
    documents: list[Document]
    meta: dict[str, Any] = field(default_factory=dict)
    """where the numbers come from: model, hashes, corpus, settings, versions, date"""

    def domain_tokens(self) -> Tensor:
        """Tokens replayed per domain, (D,) int64."""
        counts = [sum(d.tokens for d in self.documents if d.domain == domain) for domain in self.domains]
        return torch.tensor(counts)

    def document_domains(self) -> Tensor:
        """Domain index of every document, (N,) int64."""
        return torch.tensor([self.domains.index(d.domain) for d in self.documents], dtype=torch.long)

    def write(self, folder: Path) -> None:
        """Write both files; profile.json comes last and makes the profile a whole one."""
        from moesmith.models.whole import save_whole

        folder.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {}
        layers = []
        for index, stats in enumerate(self.layers):
            for name, tensor in _tensors(stats).items():
                tensors[f"{index}.{name}"] = tensor
            keys = ("name", "layer", "num_experts", "top_k", "n_group", "topk_group")
            layers.append({key: getattr(stats, key) for key in keys})
        save_whole(tensors, folder / STATS, {"format": "pt"})
        record = {
            "format": FORMAT,
            "domains": self.domains,
            "layers": layers,
            "documents": [asdict(document) for document in self.documents],
            "units": SUMS,
            "meta": self.meta,
        }
        write_atomically(folder / RECORD, json.dumps(record, indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Profile:
        """Read and check a profile.

        Raises:
            UserError: no profile there, an unfinished or foreign one, numbers missing or not finite.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(folder)
        if not folder.is_dir():
            raise no_such_file(folder, "profile")
        if not (folder / RECORD).is_file():
            raise UserError(
                f"{folder}: no {RECORD}, so no finished profile",
                f"moesmith profile MODEL --out {folder} makes one, or goes on with one that was stopped",
            )
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if record.get("format") != FORMAT:
            raise UserError(f"{folder}: profile format {record.get('format')}, this version reads {FORMAT}")
        try:
            tensors = load_file(folder / STATS)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{folder / STATS} cannot be read: {error}", "make the profile again") from None
        documents = [Document(**document) for document in record["documents"]]
        domains = record["domains"]
        layers = [
            _layer(folder, index, entry, tensors, len(domains), len(documents))
            for index, entry in enumerate(record["layers"])
        ]
        return cls(layers, domains, documents, record["meta"])


def same_model(profile: Profile, folder: Path) -> bool:
    """Whether `folder` holds the very model that was profiled; False if only its routers are the same.

    A packed or cast copy has the same routers. So has a fine-tune whose routers were frozen, which has other
    experts: nothing on disk tells the two apart, so whoever asks should say it (`ROUTERS_ONLY`).

    Raises:
        UserError: the routers differ.
    """
    if profile.meta.get("model_hash") == model_hash(folder):
        return True
    routers = profile.meta.get("router_hash")
    if routers and routers == router_hash(folder, {stats.num_experts for stats in profile.layers}):
        return False
    raise UserError(
        f"the profile was made of another model ({profile.meta.get('model', 'unknown')}), not of {folder}: "
        "routers differ",
        f"moesmith profile {folder} --out prof",
    )


def identity(folder: Path, num_experts: set[int]) -> dict[str, str]:
    """The part of a profile's meta that `same_model` compares."""
    return {"model_hash": model_hash(folder), "router_hash": router_hash(folder, num_experts)}


def _tensors(stats: LayerStats) -> dict[str, Tensor]:
    """Flat names for one layer's tensors."""
    return {
        **{f"sums.{name}": tensor for name, tensor in stats.sums.items()},
        **{f"per_document.{name}": tensor for name, tensor in stats.per_document.items()},
        "max_norm": stats.max_norm,
        "max_abs": stats.max_abs,
        "mean_output": stats.mean_output,
        "coactivation": stats.coactivation,
    }


def _layer(
    folder: Path, index: int, entry: dict[str, Any], tensors: dict[str, Tensor], domains: int, documents: int
) -> LayerStats:
    experts = entry["num_experts"]
    shapes = {
        **{f"sums.{name}": (domains, experts) for name in SUMS},
        **{f"per_document.{name}": (documents, experts) for name in PER_DOCUMENT},
        "max_norm": (domains, experts),
        "max_abs": (domains, experts),
        "mean_output": (experts, None),
        "coactivation": (experts, experts),
    }
    found = {}
    for name, shape in shapes.items():
        tensor = tensors.get(f"{index}.{name}")
        fits = tensor is not None and all(
            want in (None, got) for want, got in zip(shape, tensor.shape, strict=True)
        )
        if tensor is None or not fits:
            got = "nothing" if tensor is None else list(tensor.shape)
            raise UserError(
                f"{folder / STATS}: {name} of {entry['name']} is {got}, wanted {list(shape)}",
                "the files come from different profiles: make the profile again",
            )
        if name != "sums.easyep" and not bool(tensor.isfinite().all()):
            raise UserError(f"{folder / STATS}: {name} of {entry['name']} is not finite")
        found[name] = tensor
    return LayerStats(
        **entry,
        sums={name: found[f"sums.{name}"] for name in SUMS},
        max_norm=found["max_norm"],
        max_abs=found["max_abs"],
        mean_output=found["mean_output"],
        coactivation=found["coactivation"],
        per_document={name: found[f"per_document.{name}"] for name in PER_DOCUMENT},
    )
