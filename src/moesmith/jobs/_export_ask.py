"""What `moesmith export` asks two models, and how it asks the source: what is there, its adapter running.

Everything is computed in 32 bits, so that what differs afterwards is the export and not the rounding of one
forward pass. A model that does not fit into memory like that is asked layer by layer, its adapter put on each
layer while it is there.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesmith import console
from moesmith.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from moesmith.export.parity import Logprobs

QUESTIONS = 16
PASSAGES = 8
PASSAGE_TOKENS = 64
LONGEST = 512
"""tokens of a prompt; of a longer one the end is asked"""


@dataclass
class Prompts:
    """What is asked."""

    ids: list[list[int]]
    texts: list[str]
    what: str
    """for people"""
    cut: int = 0
    """prompts of which only the end is asked"""

    @property
    def longest(self) -> int:
        return max(map(len, self.ids))

    def facts(self) -> dict[str, Any]:
        """For the record."""
        digest = hashlib.sha256(json.dumps(self.ids).encode()).hexdigest()[:32]
        return {
            "what": self.what,
            "prompts": len(self.ids),
            "tokens": sum(map(len, self.ids)),
            "hash": digest,
        }


def read_prompts(path: Path | None, tokenizer: Any | None, config: Mapping[str, Any]) -> Prompts:
    """The user's prompts, or ours: questions in the model's chat template, and plain passages.

    Args:
        path: rows with `messages`, `prompt` or `text`; None for questions and passages we have.
        tokenizer: None for a model without one: its prompts are numbers.
        config: the model's config.json.

    Raises:
        UserError: a file without any row that can be asked.
    """
    text = config.get("text_config") or config
    room = min(LONGEST, int(text.get("max_position_embeddings") or LONGEST) - 1)
    if tokenizer is None:
        if path is not None:
            raise UserError(f"--prompts {path}: the model has no tokenizer to read them with")
        vocabulary = int(text["vocab_size"])
        ids = [
            [3 + (7 * i + 13 * j * j) % (min(vocabulary, 1000) - 3) for j in range(8 + i)] for i in range(16)
        ]
        return Prompts(ids, [str(one) for one in ids], "16 rows of token ids (the model has no tokenizer)")
    rows = _own_rows() if path is None else _rows_of(path)
    asked = Prompts([], [], "")
    for row in rows:
        tokens, said = _encode(row, tokenizer)
        if tokens:
            asked.cut += len(tokens) > room
            asked.ids.append(tokens[-room:])
            asked.texts.append(said)
    if not asked.ids:
        raise UserError(f"prompts: {path}: no row has a token to ask")
    form = "in the chat template" if tokenizer.chat_template else "as plain text"
    asked.what = (
        f"{QUESTIONS} questions {form}, {PASSAGES} passages"
        if path is None
        else f"{len(asked.ids):,} prompts of {path.name}"
    )
    return asked


def _own_rows() -> Iterator[dict[str, Any]]:
    """Questions of five domains, shipped with us, and the beginnings of Python's own help."""
    from importlib import import_module
    from importlib.resources import files

    from moesmith.data.corpora import PROMPTS

    lines = files("moesmith.data").joinpath(PROMPTS).read_text(encoding="utf-8").splitlines()
    prompts = sorted((json.loads(line)["prompt"] for line in lines), key=len)[: 2 * QUESTIONS]
    yield from ({"prompt": prompt} for prompt in prompts[::2])
    topics: dict[str, str] = import_module("pydoc_data.topics").topics
    names = sorted(topics, key=lambda name: (-len(topics[name]), name))
    for number, name in enumerate(names[:PASSAGES]):
        words = " ".join(topics[name].split()).split(" ")
        yield {"text": " ".join(words[20 : 20 + PASSAGE_TOKENS // 2 + 3 * number])}


def _rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """Rows that can be asked; a file where none can is refused."""
    from moesmith.data.rows import read_rows

    found, read = 0, 0
    for row in read_rows(str(path), key="prompts"):
        read += 1
        if not row.problem and any(row.value.get(key) for key in ("messages", "prompt", "text")):
            found += 1
            yield row.value
    if not found:
        raise UserError(
            f"prompts: {path}: none of {read:,} rows can be asked",
            'wanted {"prompt": "..."}, {"messages": [...]} or {"text": "..."}',
        )


def _encode(row: Mapping[str, Any], tokenizer: Any) -> tuple[list[int], str]:
    """(token ids, what is asked). A prompt is a question; of messages the last answer is left out."""
    messages = row.get("messages")
    if messages is None and isinstance(row.get("prompt"), list):
        messages = row["prompt"]
    if messages is None and row.get("prompt") and tokenizer.chat_template:
        messages = [{"role": "user", "content": row["prompt"]}]
    if messages is not None:
        if messages and messages[-1].get("role") == "assistant":
            messages = messages[:-1]
        if not tokenizer.chat_template:
            said = "\n".join(str(message.get("content") or "") for message in messages)
            return list(tokenizer(said).input_ids), said
        said = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        question = str(messages[-1].get("content") or "") if messages else ""
        return list(tokenizer(said, add_special_tokens=False).input_ids), question
    said = str(row.get("prompt") or row["text"])
    return list(tokenizer(said).input_ids), said


# ---------------------------------------------------------------- asking in transformers


@dataclass
class Said:
    """Next-token log-probabilities of every prompt, with the adapters, and without where there are any."""

    full: list[dict[int, float]]
    bare: list[dict[int, float]] | None = None
    rounded: list[dict[int, float]] | None = None
    """the same as `full`, but computed in 16 bits"""
    streamed: bool = False
    seconds: dict[str, float] = field(default_factory=dict)


def ask(
    folder: Path,
    adapters: Sequence[Path],
    prompts: Prompts,
    *,
    also: Sequence[Logprobs] | None = None,
    stream: bool = False,
    device: str = "auto",
    also_in: str = "float32",
    label: str = "asking",
) -> Said:
    """Ask a model folder, packed or 16-bit, with its adapters running.

    Args:
        also: tokens whose log-probabilities are wanted beside the most likely ones.
        stream: one layer at a time, whether the model fits or not.
        also_in: a 16-bit dtype to compute in once more, to see how much that alone changes.
        label: stands beside the bar.

    Raises:
        UserError: an adapter that does not fit, a model that neither fits nor can be streamed.
    """
    wanted, there = needed_bytes(folder), available(device)
    if stream or wanted > there:
        if not stream:
            console.note(
                f"{folder.name} takes {console.size(wanted)} in 32 bits, {console.size(there)} are free: "
                "asked layer by layer"
            )
        return _ask_streamed(folder, adapters, prompts, also, also_in, label)
    return _ask_in_memory(folder, adapters, prompts, also, device, also_in, label)


def _passes(adapters: Sequence[Path], also_in: str) -> int:
    """How often a model is asked: with its adapters, without them, in 16 bits."""
    return 1 + bool(adapters) + (also_in != "float32")


def _ask_in_memory(
    folder: Path,
    adapters: Sequence[Path],
    prompts: Prompts,
    also: Sequence[Logprobs] | None,
    device: str,
    also_in: str,
    label: str,
) -> Said:
    from moesmith.export.parity import TOP, next_logprobs

    said = Said([])
    total = len(prompts.ids) * _passes(adapters, also_in)
    with one_adapter(adapters) as adapter, console.bar(label, total=total) as bar:
        model = load(folder, device)
        adapted = put(model, adapter) if adapter is not None else model
        said.full = next_logprobs(adapted, prompts.ids, TOP, also, bar.advance)
        if adapter is not None:
            with adapted.disable_adapter():
                said.bare = next_logprobs(adapted, prompts.ids, TOP, said.full, bar.advance)
        del model, adapted
        if also_in != "float32":
            model = load(folder, device, also_in)
            adapted = put(model, adapter) if adapter is not None else model
            said.rounded = next_logprobs(adapted, prompts.ids, TOP, said.full, bar.advance)
    return said


def load(folder: Path, device: str = "auto", dtype: str = "float32") -> Any:
    """A model as it lies in a folder, everything that is not packed in `dtype`."""
    import torch

    from moesmith.models.checkpoint import check_architecture, model_class, read_config

    config = read_config(folder)
    check_architecture(config)
    if not console.stderr().is_terminal:
        from transformers.utils import logging

        logging.disable_progress_bar()
    on_gpu = torch.cuda.is_available() if device == "auto" else device == "cuda"
    kind = model_class(config)
    place = {"": 0} if on_gpu else None
    return kind.from_pretrained(folder, dtype=getattr(torch, dtype), device_map=place).eval()


def put(model: nn.Module, adapter: Path) -> Any:
    """The model with an adapter running on it, by stock PEFT."""
    from moesmith.train.stack import load_adapter

    loaded: Any = load_adapter(model, adapter, "default", trainable=False)  # type: ignore[arg-type]
    return loaded.eval()


@contextmanager
def one_adapter(adapters: Sequence[Path]) -> Iterator[Path | None]:
    """A folder with the adapter; None of none; of several, one whose update is their sum, with the last's
    tokenizer.
    """
    if len(adapters) < 2:
        yield adapters[0] if adapters else None
        return
    from safetensors.torch import save_file

    from moesmith.models.checkpoint import side_files
    from moesmith.models.lora_factors import read_adapter
    from moesmith.train.stack import join

    config, weights = join([read_adapter(adapter) for adapter in adapters])
    with tempfile.TemporaryDirectory(prefix="moesmith-") as folder:
        save_file(weights, Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(folder)
        for file in (file for file in side_files(adapters[-1]) if file.name != "README.md"):
            shutil.copyfile(file, Path(folder) / file.name)
        yield Path(folder)


def needed_bytes(folder: Path) -> int:
    """Memory that a folder's tensors take, floats that are not packed in 32 bits, and a tenth more."""
    from moesmith.models.headers import read_headers

    wide = ("BF16", "F16", "F32", "F64")
    tensors = read_headers(folder).values()
    return int(1.1 * sum(4 * one.numel if one.dtype in wide else one.nbytes for one in tensors))


def available(device: str = "auto") -> int:
    """Bytes that can be had now: of the GPU if one is used, else of RAM."""
    import torch

    if torch.cuda.is_available() and device != "cpu":
        return torch.cuda.mem_get_info()[0]
    from moesmith import ram

    return ram.available()


# ---------------------------------------------------------------- layer by layer


def _ask_streamed(
    folder: Path,
    adapters: Sequence[Path],
    prompts: Prompts,
    also: Sequence[Logprobs] | None,
    also_in: str,
    label: str,
) -> Said:
    import torch

    from moesmith.export.deltas import Deltas
    from moesmith.models.layerwise import Layerwise

    deltas = Deltas.read(adapters, _unpacked(folder)) if adapters else None
    chunks = [{"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
              for ids in prompts.ids]  # fmt: skip

    passed = 0

    def once(
        deltas: Deltas | None, wanted: Sequence[Logprobs] | None, dtype: str = "float32"
    ) -> list[dict[int, float]]:
        from moesmith.export.parity import TOP, keep_top

        nonlocal passed
        streamed = Layerwise.open(folder, getattr(torch, dtype))
        layers = len(streamed.decoder_layers)
        if deltas is not None:
            _check_inside(deltas, streamed.decoder_layers)
        hidden: dict[int, Any] = {}
        with tempfile.TemporaryDirectory(prefix="moesmith-") as spool:
            streamed.run(
                chunks, Path(spool) / "spool",
                around_layer=None if deltas is None else _adapted(streamed.decoder_layers, deltas),
                on_layer=lambda i: bar.update((passed + (i + 1) / layers) / _passes(adapters, also_in)),
                on_output=lambda number, state: hidden.__setitem__(number, state[:, -1:].clone()),
            )  # fmt: skip
        passed += 1
        with streamed.head() as logits:
            return [
                keep_top(logits(hidden[i])[0, -1], TOP, wanted[i] if wanted is not None else ())
                for i in range(len(chunks))
            ]

    with console.bar(f"{label}, layer by layer", total=1) as bar:
        full = once(deltas, also)
        bare = once(None, full) if deltas is not None else None
        rounded = once(deltas, full, also_in) if also_in != "float32" else None
    return Said(full, bare, rounded, streamed=True)


def _unpacked(folder: Path) -> nn.Module:
    """The model without weights, and without what packing makes of its experts."""
    from moesmith.models.anatomy import meta_model
    from moesmith.models.checkpoint import read_config

    return meta_model(
        {key: value for key, value in read_config(folder).items() if key != "quantization_config"}
    )


def _check_inside(deltas: Any, layers: Sequence[str]) -> None:
    prefixes = tuple(f"{name}." for name in layers)
    outside = next((name for name in deltas.places if not name.startswith(prefixes)), None)
    if outside is not None:
        raise UserError(
            f"the adapter's {outside} lies outside the decoder layers: it cannot be asked layer by layer",
            "use a machine with more memory",
        )


def _adapted(layers: Sequence[str], deltas: Any) -> Any:
    """A context that puts the adapters on a layer: beside packed experts, into everything else."""

    @contextmanager
    def around(index: int, layer: nn.Module) -> Iterator[None]:
        prefix = f"{layers[index]}."
        hooks = []
        for name in [name for name in deltas.places if name.startswith(prefix)]:
            above, _, leaf = name.removeprefix(prefix).rpartition(".")
            hooks.append(_put_on_one(layer.get_submodule(above), leaf, name, deltas))
        try:
            yield
        finally:
            for remove in hooks:
                remove()

    return around


def _put_on_one(module: nn.Module, leaf: str, name: str, deltas: Any) -> Any:
    """Put one place's update on a module; returns what takes it off again."""
    from torch import nn

    from moesmith.experts.storage import WEIGHT_NAMES, scheme_of
    from moesmith.ops.grouped import Lora

    weight, part = getattr(module, leaf), deltas.places[name]
    if scheme_of(module) is not None and leaf in WEIGHT_NAMES:
        running: dict[str, list[Lora]] = module.experts_lora  # type: ignore[assignment]
        running[leaf] = [Lora(part.a_ERI, part.b_EOR, 1.0)]
        return lambda: running.pop(leaf, None)
    if not weight.is_floating_point():  # a linear in 8 or 4 bits

        def add(_module: nn.Module, args: tuple, output: Any) -> Any:
            return output + args[0] @ part.a_ERI[0].T @ part.b_EOR[0].T

        return module.register_forward_hook(add).remove
    added = deltas.add(name, weight.detach()).to(weight.dtype)
    setattr(module, leaf, nn.Parameter(added, requires_grad=False))
    return lambda: None
