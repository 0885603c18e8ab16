"""llama.cpp's own tools, called one by one: convert, importance matrix, quantise, serve.

moesmith writes no GGUF itself; it hands folders to llama.cpp's converter and asks llama-server what came of
them. Every file is written under another name first and renamed when its tool is through. `tools.py` finds
and fetches them.

    llama = LlamaCpp.find()
    llama.convert(folder, out / "model-bf16.gguf")
    llama.quantize(out / "model-bf16.gguf", out / "model-Q4_K_M.gguf", "Q4_K_M")
    with llama.serve(out / "model-Q4_K_M.gguf") as server:
        server.next_logprobs([1, 2, 3], top=50)
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from moesmith.errors import UserError
from moesmith.models.headers import read_headers, read_json

from . import tools

_CONVERT = """
import runpy, sys
script, settled, *arguments = sys.argv[1:]
pre, *settled = settled.split(",")
sys.path.insert(0, "gguf-py")
from conversion import base
if pre:
    base.TextModel.get_vocab_base_pre = lambda self, tokenizer: pre
if "heads" not in settled:
    base.ModelBase.no_mtp = True
if "turned" in settled:
    from conversion import qwen3vl
    kind = qwen3vl.Qwen3VLMoeTextModel
    modify = kind.modify_tensors
    def turn(self, data, name, bid):
        stack = name.endswith(("experts.gate_up_proj", "experts.down_proj"))
        yield from modify(self, data.permute(0, 2, 1) if stack else data, name, bid)
    kind.modify_tensors = turn
sys.argv = [script, *arguments]
runpy.run_path(script, run_name="__main__")
"""
"""Runs a script of the tree with three things settled for which it has no option that fits all classes: the
name of the pre-tokenizer, that there are no heads for further tokens, and that stacks of experts lie as
transformers writes them. It does not load those heads, so folders that it wrote lack them, and for some
classes the converter insists. And it keeps the stacks of Qwen3-VL-MoE turned round from how the original
checkpoints hold them, which is how the converter wants them (`stacks_turned`)."""

OnShare = Callable[[float], None]
"""is told which share of the work is done, 0 to 1"""

_NEEDS_SPM = "pip install 'moesmith[gguf]'"
_HINTS = (
    ("pre-tokenizer was not recognized",
     "llama.cpp knows a tokenizer by what it makes of one test string, and does not know this one; if it "
     "splits text like a model that llama.cpp knows, name that one: --pre-tokenizer llama-bpe (or qwen2, "
     "gpt-2, smollm, ...)"),
    ("No module named 'sentencepiece'", _NEEDS_SPM),
    ("No module named 'gguf'", _NEEDS_SPM),
    ("No space left on device", "free some space, or give --out on another disk"),
    ("this quantization requires an importance matrix", "give an importance matrix: --imatrix auto"),
)  # fmt: skip


class LlamaCpp:
    """The converter and the tools of one llama.cpp."""

    def __init__(self, found: tools.Tools):
        self.tree = found.tree
        self.commands = found.commands

    @classmethod
    def find(cls, where: Path | None = None) -> LlamaCpp:
        """llama.cpp in `where`, $LLAMA_CPP, PATH or our cache. UserError says how to get it."""
        return cls(tools.find_tools(where))

    @classmethod
    def fetch(cls, say: Callable[[str], None]) -> LlamaCpp:
        """llama.cpp in our cache, fetched when it is not there. UserError says what stands in the way."""
        return cls(tools.fetch_tools(say))

    def run(self, tool: str) -> list[str]:
        """The beginning of a tool's command line. UserError when it is not there."""
        if tool not in self.commands:
            raise UserError(f"llama.cpp: no {tool} here", tools.FETCH)
        return list(self.commands[tool])

    def version(self) -> str:
        """What llama-server says of itself, like "0.7.0 (build 11669)"."""
        text = tools.run([*self.run("llama-server"), "--version"], "llama-server --version")
        found = re.search(r"^version: (.*?)(?:, commit.*)?\)?$", text, re.MULTILINE)
        return found[1] + (")" if "(" in found[1] else "") if found else "unknown"

    # ------------------------------------------------------------ converting

    def architectures(self) -> set[str]:
        """Names of the classes in config.json's `architectures` that the converter takes, text models only.

        Read from its table without running it, which takes seconds.
        """
        source = self._tree() / "conversion" / "__init__.py"
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            target = node.target if isinstance(node, ast.AnnAssign) else None
            if isinstance(target, ast.Name) and target.id == "TEXT_MODEL_MAP":
                return set(ast.literal_eval(node.value))  # type: ignore[attr-defined]
        raise UserError(
            f"{source} has no TEXT_MODEL_MAP: this llama.cpp is not one that moesmith knows", tools.FETCH
        )

    def convert(
        self, model: Path, out: Path, outtype: str = "bf16", pre_tokenizer: str | None = None,
        on_share: OnShare | None = None,
    ) -> None:  # fmt: skip
        """A 16-bit or 32-bit checkpoint folder -> one GGUF file.

        Args:
            outtype: f32, f16, bf16 or q8_0; norms and routers stay in 32 bits.
            pre_tokenizer: llama.cpp's name of the way a BPE tokenizer splits text, when it does not know the
                tokenizer.

        Raises:
            UserError: the converter refuses; its last words.
        """
        with _whole_file(out) as temporary:
            arguments = [str(model.resolve()), "--outfile", str(temporary), "--outtype", outtype]
            settled = [pre_tokenizer or ""]
            settled += ["heads"] if _has_further_heads(model) else []
            settled += ["turned"] if stacks_turned(model) else []
            self._python("convert_hf_to_gguf.py", arguments, f"converting {model}", settled, on_share)

    def convert_lora(self, adapter: Path, base: Path, out: Path, outtype: str = "f32") -> None:
        """An adapter folder with one 2-D pair per expert and projection -> one GGUF adapter.

        Args:
            base: the folder of the base model; its config and tokenizer are read, no weight.

        Raises:
            UserError: the converter refuses; its last words.
        """
        with _whole_file(out) as temporary:
            arguments = [str(adapter.resolve()), "--base", str(base.resolve()), "--outfile", str(temporary)]
            arguments += ["--outtype", outtype]
            self._python("convert_lora_to_gguf.py", arguments, f"converting {adapter}")

    def _python(
        self, script: str, arguments: list[str], what: str, settled: Sequence[str] = (),
        on_share: OnShare | None = None,
    ) -> str:  # fmt: skip
        command = [sys.executable, "-c", _CONVERT, script, ",".join(settled), *arguments]
        return _run(command, what, self._tree(), _shares(_WRITING, on_share))

    def _tree(self) -> Path:
        if self.tree is None:
            raise UserError("llama.cpp: no converter here", tools.FETCH)
        return self.tree

    # ------------------------------------------------------------ importance and quantisation

    def imatrix(
        self, gguf: Path, text: Path, out: Path, chunks: int | None = None, *, threads: int | None = None,
        chunk_tokens: int = 512, on_share: OnShare | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """How large the inputs of every weight are over a text, for `quantize`.

        Args:
            text: plain text; at least two chunks of it.
            chunks: how many of its chunks to read; None is all.

        Returns: `chunks`, `perplexity` of the text, and `partial`: tensor of experts -> share of its experts
            that saw any token, where not all did.

        Raises:
            UserError: the text is too short, or the tool failed.
        """
        with _whole_file(out) as temporary:
            command = [
                *self.run("llama-imatrix"), "-m", str(gguf), "-f", str(text), "-o", str(temporary),
                "--output-format", "gguf", "-c", str(chunk_tokens), "-b", str(chunk_tokens),
                "--chunks", str(-1 if chunks is None else chunks), *_threads(threads),
            ]  # fmt: skip
            said = _run(command, f"llama-imatrix of {gguf.name}", None, _shares(_CHUNKS, on_share, chunks))
            if not temporary.is_file():
                raise UserError(f"llama-imatrix of {gguf.name} wrote nothing: {tools.last_words(said, 0)}")
        return read_importance(said)

    def quantize(
        self, gguf: Path, out: Path, kind: str, imatrix: Path | None = None, threads: int | None = None,
        on_share: OnShare | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """A 16-bit GGUF file -> the same in fewer bits; `kind` is llama.cpp's name, Q4_K_M, q8_0, IQ2_XS, ...

        Returns: `kind`, `bytes`, `bpw` (bits per weight over the whole file), `tensors`, `types` (type ->
            tensors), `fallback` ("q4_K -> q5_0" -> tensors whose rows do not divide by the blocks of the type
            they should have).

        Raises:
            UserError: no such kind, a kind that needs an importance matrix, or the tool failed.
        """
        with _whole_file(out) as temporary:
            given = ["--imatrix", str(imatrix)] if imatrix else []
            command = [*self.run("llama-quantize"), *given, str(gguf), str(temporary), kind.upper()]
            said = _run(
                [*command, str(threads or os.cpu_count() or 1)],
                f"llama-quantize of {gguf.name} to {kind.upper()}",
                on_text=_shares(_TENSORS, on_share),
            )
            size = temporary.stat().st_size
        return {"kind": kind.upper(), "bytes": size, **read_quantized(said)}

    def kinds(self) -> set[str]:
        """Names of the quantisations that this llama-quantize knows, in capitals."""
        command = self.run("llama-quantize")
        shown = subprocess.run(
            [*command, "--help"], capture_output=True, text=True, errors="replace", check=False,
            env=tools.environment(command),
        )  # fmt: skip
        return set(re.findall(r"^ +\d+ +or +(\w+) +:", shown.stdout + shown.stderr, re.MULTILINE))

    # ------------------------------------------------------------ serving

    @contextlib.contextmanager
    def serve(
        self, gguf: Path, *, lora: Path | None = None, threads: int | None = None, ctx: int = 2048,
        parallel: int = 1, cache: str = "f16", timeout: float = 1800.0,
    ) -> Iterator[LlamaServer]:  # fmt: skip
        """llama-server with this file on a free port of the loopback address, until the block ends.

        Args:
            lora: a GGUF adapter, applied in full.
            ctx: tokens of context for each of the `parallel` clients.
            cache: type of the key-value cache; f32 with 32-bit weights leaves only the order of sums.
            timeout: seconds that loading may take.

        Raises:
            UserError: the server stopped or is not ready in time; its last words.
        """
        command = [
            *self.run("llama-server"), "-m", str(gguf), *(["--lora", str(lora)] if lora else []),
            "--host", "127.0.0.1", "--port", "0", "-c", str(ctx * parallel), "-np", str(parallel),
            *_threads(threads), "-ctk", cache, "-ctv", cache, "--fit", "off", "--cache-ram", "0",
            "--no-webui", "--offline", "--no-warmup", "-lv", "3",
        ]  # fmt: skip
        if cache == "f32":
            command += ["-fa", "off"]  # flash attention has its own rounding
        with tempfile.TemporaryFile() as log, _started(command, log) as process:
            yield LlamaServer(_ready(process, log, gguf, timeout), process, log)


class LlamaServer:
    """A running llama-server; `url` is its address, `pid` its process."""

    def __init__(self, url: str, process: subprocess.Popen[bytes], log: IO[bytes]):
        self.url = url
        self.pid = process.pid
        self._process = process
        self._log = log

    def next_logprobs(self, ids: Sequence[int], top: int = 50) -> dict[int, float]:
        """Log-probabilities of the `top` likeliest next tokens: log-softmax of logits, before any sampler.

        Args:
            ids: the prompt's tokens, taken as they are: no token is put before them.
        """
        request = {
            "prompt": list(ids), "n_predict": 1, "n_probs": top, "temperature": 0.0, "cache_prompt": False,
            "post_sampling_probs": False, "samplers": [], "seed": 0,
        }  # fmt: skip
        answer = self.post("/completion", request)
        try:
            found = answer["completion_probabilities"][0]["top_logprobs"]
            return {int(entry["id"]): float(entry["logprob"]) for entry in found}
        except (KeyError, IndexError, TypeError):
            raise UserError(f"llama-server gave no log-probabilities: {json.dumps(answer)[:200]}") from None

    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> dict[str, Any]:
        """The server's answer to a conversation, as OpenAI's JSON; `options` are further fields."""
        return self.post("/v1/chat/completions", {"messages": list(messages), **options})

    def tokenize(self, text: str, special: bool = True) -> list[int]:
        """The server's own tokens of a text, without the one that begins a document."""
        request = {"content": text, "add_special": False, "parse_special": special}
        return [int(token) for token in self.post("/tokenize", request)["tokens"]]

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """A JSON request, a JSON answer. UserError: the server's message, or its last words if it is gone."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with _direct.open(request) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")
            with contextlib.suppress(ValueError, KeyError, TypeError):
                said = json.loads(said)["error"]["message"]
            raise UserError(f"llama-server {path}: {error.code}: {said[:500]}") from None
        except OSError as error:
            with contextlib.suppress(subprocess.TimeoutExpired):  # it may be on its way out
                self._process.wait(2)
            if (code := self._process.poll()) is not None:
                raise UserError(f"llama-server stopped: {_last_words(self._log, code)}") from None
            raise UserError(f"llama-server {path}: {error}") from None


_direct = urllib.request.build_opener(
    urllib.request.ProxyHandler({})
)  # no proxy stands before the loopback address


# ---------------------------------------------------------------- what the tools say


def read_quantized(said: str) -> dict[str, Any]:
    """llama-quantize's own report as facts."""
    types: dict[str, int] = {}
    for entry in re.split(r"^\[ *\d+/ *\d+\]", said, flags=re.MULTILINE)[
        1:
    ]:  # warnings break its line in two
        found = re.search(r"converting to (\w+)", entry) or re.search(r"type = +(\w+)", entry)
        if found:
            types[found[1].lower()] = types.get(found[1].lower(), 0) + 1
    fallback: dict[str, int] = {}
    for wanted, got in re.findall(r"required for type +(\w+)\) -> falling back to +(\w+)", said):
        fallback[f"{wanted} -> {got}"] = fallback.get(f"{wanted} -> {got}", 0) + 1
    bits = re.search(r"quant size += .*\(([\d.]+) BPW\)", said)
    return {
        "bpw": float(bits[1]) if bits else None,
        "tensors": sum(types.values()),
        "types": types,
        "fallback": fallback,
    }


def read_importance(said: str) -> dict[str, Any]:
    """llama-imatrix's own report as facts."""
    chunks = re.search(r"computing over (\d+) chunks", said)
    final = re.search(r"Final estimate: PPL = ([\d.]+)", said)
    partial = re.findall(r"[Ee]ntry '([^']+)' has partial data \(([\d.]+)%\)", said)
    return {
        "chunks": int(chunks[1]) if chunks else 0,
        "perplexity": float(final[1]) if final else None,
        "partial": {name: float(share) / 100 for name, share in partial},
    }


# ---------------------------------------------------------------- processes and files


def _run(
    command: list[str], what: str, cwd: Path | None = None, on_text: Callable[[str], None] | None = None
) -> str:
    """tools.run with the hint that fits the error."""
    try:
        return tools.run(command, what, cwd=cwd, on_text=on_text)
    except UserError as error:
        hint = next((hint for words, hint in _HINTS if words in error.message), error.hint)
        raise UserError(error.message, hint) from None


_WRITING = re.compile(r"Writing: +(\d+)(%)\|")  # how each tool says where it is: done, of how many
_CHUNKS = re.compile(r"\[(\d+)\]-?[\d.]+()")
_TENSORS = re.compile(r"\[ *(\d+)/ *(\d+)\]")


def _shares(
    pattern: re.Pattern[str], on_share: OnShare | None, total: int | None = None
) -> Callable[[str], None] | None:
    """Reads the share that is done in what a tool writes; where it says no total, `total` is it."""
    if on_share is None:
        return None

    def read(text: str) -> None:
        if found := pattern.findall(text):
            done, of = found[-1]
            of = 100 if of == "%" else int(of or total or 0)
            if of:
                on_share(min(int(done) / of, 1.0))

    return read


def stacks_turned(model: Path) -> bool:
    """Whether a Qwen3-VL-MoE folder holds its stacks as transformers has them in memory, (E, out, in)."""
    config = read_json(model / "config.json")
    if config.get("model_type") != "qwen3_vl_moe":
        return False
    hidden = config["text_config"]["hidden_size"]
    shapes = {name.rpartition(".")[2]: one.shape for name, one in read_headers(model, required=False).items()}
    gate_up, down = shapes.get("gate_up_proj"), shapes.get("down_proj")
    if gate_up is None or down is None or len(gate_up) != 3 or len(down) != 3:
        return False
    return gate_up[2] == hidden and down[1] == hidden


def _has_further_heads(model: Path) -> bool:
    """Whether a checkpoint has heads for the tokens after the next: named so, or layers past the last."""
    config = read_json(model / "config.json")
    layers = (config.get("text_config") or config).get("num_hidden_layers")
    names = list(read_headers(model, required=False))
    last = max((int(layer) for name in names for layer in _LAYER.findall(name)), default=0)
    named = any(re.search(r"(^|\.)(mtp|nextn)\.", name) for name in names)
    return named or (layers is not None and last >= layers)


_LAYER = re.compile(r"^model\.(?:language_model\.)?layers\.(\d+)\.")


def _threads(threads: int | None) -> list[str]:
    return ["-t", str(threads)] if threads else []


@contextlib.contextmanager
def _whole_file(out: Path) -> Iterator[Path]:
    """A name beside `out` to write to; it becomes `out` when the block ends well and is removed when not."""
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.tmp")
    temporary.unlink(missing_ok=True)  # of a run that was killed
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _started(command: list[str], log: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """A process that ends with the block, and with this process however it ends."""
    process = subprocess.Popen(
        tools.tied(command), stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        env=tools.environment(command),
    )  # fmt: skip
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _ready(process: subprocess.Popen[bytes], log: IO[bytes], gguf: Path, timeout: float) -> str:
    """The server's address, once the model is loaded."""
    deadline = time.monotonic() + timeout
    url = None
    while True:
        if (code := process.poll()) is not None:
            raise UserError(f"llama-server does not load {gguf.name}: {_last_words(log, code)}")
        if url is None and (found := re.search(r"(http://127\.0\.0\.1:[1-9]\d*)", _read(log))):
            url = found[1]
        if url is not None:
            with contextlib.suppress(OSError), _direct.open(f"{url}/health", timeout=10):
                return url  # an answer with an error, "loading", is an OSError too
        if time.monotonic() > deadline:
            raise UserError(f"llama-server did not load {gguf.name} within {timeout:.0f} seconds")
        time.sleep(0.05)


def _read(log: IO[bytes]) -> str:
    """All of the log; the process goes on writing at its own place."""
    return os.pread(log.fileno(), 1 << 24, 0).decode(errors="replace")


def _last_words(log: IO[bytes], code: int) -> str:
    return tools.last_words(_read(log), code)
