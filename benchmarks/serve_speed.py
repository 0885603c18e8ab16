"""One model behind two servers: ours over its nf4 packing, llama-server over its Q4_K_M. Tokens per second.

The same prompts, the same lengths, greedy, end-of-text ignored; 1 client and 8 at once; the same number of
threads. Both servers are up all the time and are asked in turns. Figures count tokens from the request to the
last token of the last client. Memory is what each process holds at its peak (VmHWM), files it maps included.

    python benchmarks/serve_speed.py --packed demo-out/packed --model demo-out/moe [--gguf FILE]
        [--adapter DIR] [--threads 1] [--clients 1 8] [--tokens 64] [--rounds 3] [--llama-cpp DIR]

Without --gguf the 16-bit --model is converted and quantised first. --adapter measures the same server with an
adapter on it too.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from common import arguments, emit, in_turns, say, summary, table, thread_env
from moesmith.export.llama_cpp import LlamaCpp
from moesmith.jobs._chat_server import Server

CONTEXT = 1024
COLUMNS = ("tokens_per_second", "tokens_per_second_median", "first_token_seconds")
WORDS = "Explain in a few sentences how a mixture of experts chooses which of its experts reads a token."


@contextlib.contextmanager
def our_server(
    packed: Path, adapter: Path | None, threads: int, slots: int
) -> Iterator[tuple[str, int, list[str]]]:
    """(url, pid, names) of `moesmith serve`."""
    command = [sys.executable, "-m", "moesmith", "serve", str(packed), "--port", "0", "--json"]
    command += ["--context", str(CONTEXT), "--slots", str(slots)]
    command += ["--adapter", f"adapter={adapter}"] if adapter is not None else []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=thread_env(threads))
    assert process.stdout is not None
    try:
        text = ""
        while not text.endswith("}\n"):
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(f"moesmith serve ended with {process.wait()}")
            text += line
        facts = json.loads(text)
        yield facts["url"], facts["pid"], facts["models"]
    finally:
        process.terminate()
        process.wait(60)


@contextlib.contextmanager
def quantized(model: Path | None, gguf: Path | None, llama: LlamaCpp) -> Iterator[Path]:
    """A Q4_K_M file: the one given, or one made of the model."""
    if gguf is not None:
        yield gguf
        return
    if model is None:
        raise SystemExit("--model, to make a GGUF of, or --gguf")
    with tempfile.TemporaryDirectory() as folder:
        whole, small = Path(folder) / "bf16.gguf", Path(folder) / "q4_k_m.gguf"
        llama.convert(model, whole)
        llama.quantize(whole, small, "q4_k_m")
        whole.unlink()
        yield small


def peak_memory(pid: int) -> int:
    """Most bytes the process has ever held, and of them none that another shares is left out."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def ask(server: Server, model: str, number: int, tokens: int, found: list[dict[str, float]]) -> None:
    """One answer, streamed; its figures are added to `found`."""
    began, first, usage = time.perf_counter(), 0.0, {}
    body = {
        "model": model, "messages": [{"role": "user", "content": f"{WORDS} ({number})"}], "temperature": 0,
        "max_tokens": tokens, "ignore_eos": True,
    }  # fmt: skip
    for chunk in server.chat(body):
        first = first or (
            time.perf_counter() if any(c["delta"].get("content") for c in chunk["choices"]) else 0.0
        )
        usage = chunk.get("usage") or usage
    found.append(
        {"tokens": usage["completion_tokens"], "prompt": usage["prompt_tokens"], "first": first - began}
    )


def load(url: str, model: str, clients: int, tokens: int, counter: Iterator[int]) -> dict[str, float]:
    """`clients` answers at once."""
    server, found = Server(url), list[dict[str, float]]()
    # No server may answer from what it remembers of an earlier round: every prompt is new.
    workers = [
        threading.Thread(target=ask, args=(server, model, next(counter), tokens, found))
        for _ in range(clients)
    ]
    began = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    seconds = time.perf_counter() - began
    if len(found) < clients:
        raise RuntimeError(f"{url}: only {len(found)} of {clients} answers")
    made = sum(answer["tokens"] for answer in found)
    if made != clients * tokens:
        raise RuntimeError(f"{url}: {made} tokens instead of {clients * tokens}")
    return {
        "seconds": seconds,
        "tokens_per_second": made / seconds,
        "first_token_seconds": statistics.median(answer["first"] for answer in found),
        "prompt_tokens": statistics.median(answer["prompt"] for answer in found),
    }


def measure(sides: dict[str, Callable[[], dict[str, float]]], rounds: int) -> dict[str, Any]:
    """Figures of every side, asked in turns."""
    figures: dict[str, Any] = {}
    for side, found in in_turns(sides, rounds).items():
        rates = [one["tokens_per_second"] for one in found]
        figures[f"{side}_tokens_per_second"] = max(rates)
        figures[f"{side}_tokens_per_second_median"] = statistics.median(rates)
        figures[f"{side}_prompt_tokens"] = found[0]["prompt_tokens"]
        for key, value in summary(found, "first_token_seconds").items():
            figures[f"{side}_{key}"] = value
    return figures


def both(args: Any, llama: LlamaCpp, gguf: Path, threads: int) -> Iterator[tuple[Any, ...]]:
    """Start the servers, measure them, print what was measured; rows for the table."""
    slots, numbers = max(args.clients), iter(range(10**9))
    with (
        our_server(args.packed, args.adapter, threads, slots) as (url, pid, names),
        llama.serve(gguf, threads=threads, ctx=CONTEXT, parallel=slots) as other,
    ):
        for clients in args.clients:
            asked = {"ours": (url, names[0]), "llama_cpp": (other.url, "any")}
            if args.adapter is not None:
                asked["ours_adapter"] = (url, names[1])
            sides = {
                side: partial(load, *where, clients, args.tokens, numbers) for side, where in asked.items()
            }
            figures = measure(sides, args.rounds)
            peaks = {"ours": peak_memory(pid), "llama_cpp": peak_memory(other.pid)}
            packed = sum(file.stat().st_size for file in args.packed.glob("*.safetensors"))
            setting = {
                "model": args.packed.name, "clients": clients, "threads": threads, "tokens": args.tokens,
                "packed_bytes": packed, "gguf_bytes": gguf.stat().st_size, "llama_cpp": llama.version(),
            }  # fmt: skip
            more = {f"{side}_peak_bytes": peak for side, peak in peaks.items()}
            emit("serve_speed", setting, figures | more, rounds=args.rounds)
            for side in sides:
                row = [figures[f"{side}_{key}"] for key in COLUMNS]
                yield side, threads, clients, *row, peaks.get(side, peaks["ours"]) / 1e6


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--packed", type=Path, required=True)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--llama-cpp", type=Path)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()

    llama = LlamaCpp.find(args.llama_cpp)
    with quantized(args.model, args.gguf, llama) as gguf:
        lines = [row for threads in args.threads for row in both(args, llama, gguf, threads)]
    table(("server", "threads", "clients", "tok/s best", "median", "first token s", "peak MB"), lines)
    say("best of the rounds; one round before them is not counted")


if __name__ == "__main__":
    main()
