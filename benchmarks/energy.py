"""Tokens per joule while decoding, against the batch: what a larger batch saves in energy.

Energy comes from the device itself: the power that nvidia-smi reads for a GPU, RAPL (/sys/class/powercap)
for a CPU. Machines without either get one line saying so, and no figures. `net` takes
away what the device draws while it idles, measured just before.

    python benchmarks/energy.py MODEL [--batches 1 2 4 8 16 32] [--tokens 64] [--device cuda]
"""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from common import arguments, emit, say, table

POWERCAP = Path("/sys/class/powercap")
IDLE_SECONDS = 3.0
SAMPLE_SECONDS = 0.1
LEAST_SECONDS = 5.0  # of decoding per batch


class Rapl:
    """Joules from the processor's own counters, package domains added up."""

    name = "RAPL, processor packages"

    def __init__(self) -> None:
        zones = [zone for zone in POWERCAP.glob("intel-rapl:*") if zone.name.count(":") == 1]
        self.zones = [(zone / "energy_uj", int((zone / "max_energy_range_uj").read_text())) for zone in zones]
        if not self.zones:
            raise OSError("no RAPL zone")
        self._read()

    def _read(self) -> list[int]:
        return [int(file.read_text()) for file, _ in self.zones]

    @contextmanager
    def measure(self) -> Any:
        """Yields a function that gives the joules so far; the counter may wrap round once."""
        start = self._read()

        def joules() -> float:
            pairs = zip(start, self._read(), self.zones, strict=True)
            return sum((now - then) % limit for then, now, (_, limit) in pairs) / 1e6

        yield joules


class Smi:
    """Joules of a GPU: power read every 0.1 s by nvidia-smi and summed over time."""

    name = "nvidia-smi power.draw"

    def __init__(self) -> None:
        self._watts()

    def _watts(self) -> float:
        query = ["nvidia-smi", "--query-gpu=power.draw", "--format=csv,noheader,nounits", "--id=0"]
        return float(subprocess.run(query, capture_output=True, text=True, check=True).stdout)

    @contextmanager
    def measure(self) -> Any:
        """Yields a function that gives the joules so far."""
        total, done = [0.0], threading.Event()

        def sample() -> None:
            last = time.perf_counter()
            while not done.wait(SAMPLE_SECONDS):
                watts, now = self._watts(), time.perf_counter()
                total[0] += watts * (now - last)
                last = now

        thread = threading.Thread(target=sample, daemon=True)
        thread.start()
        try:
            yield lambda: total[0]
        finally:
            done.set()
            thread.join()


def meter(device: str) -> Rapl | Smi | None:
    """What measures energy on this device; None when nothing does."""
    try:
        return Smi() if device == "cuda" else Rapl()
    except (OSError, ValueError, subprocess.CalledProcessError):
        return None


def decode(model: Any, batch: int, tokens: int) -> Callable[[], None]:
    """Generates `tokens` tokens for each of `batch` random prompts of 16 tokens, greedy, no early end."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(10, vocabulary, (batch, 16), device=model.device)

    def run() -> None:
        model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=tokens,
            max_new_tokens=tokens, pad_token_id=0,
        )  # fmt: skip
        if model.device.type == "cuda":
            torch.cuda.synchronize()

    return run


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("model", help="a packed folder")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    source = meter(args.device)
    if source is None:
        wanted = "nvidia-smi" if args.device == "cuda" else "RAPL (/sys/class/powercap)"
        say(f"this machine's {args.device} reports no power: {wanted} gives no reading")
        emit("energy", {"model": Path(args.model).name, "device": args.device}, {"meter": None})
        return
    from moesmith.models.checkpoint import Checkpoint, model_class

    kind = model_class(Checkpoint.open(Path(args.model)).config)
    model = kind.from_pretrained(args.model, device_map={"": 0} if args.device == "cuda" else None).eval()
    with source.measure() as joules:
        time.sleep(IDLE_SECONDS)
        idle_watts = joules() / IDLE_SECONDS
    rows = []
    for batch in args.batches:
        run = decode(model, batch, args.tokens)
        run()  # shapes met for the first time
        rounds = 0
        with source.measure() as joules:
            start = time.perf_counter()
            while time.perf_counter() - start < LEAST_SECONDS:
                run()
                rounds += 1
            seconds, energy = time.perf_counter() - start, joules()
        tokens = rounds * batch * args.tokens
        figures = {
            "meter": source.name,
            "tokens_per_second": tokens / seconds,
            "watts": energy / seconds,
            "idle_watts": idle_watts,
            "tokens_per_joule": tokens / energy,
            "tokens_per_joule_net": tokens / max(energy - idle_watts * seconds, 1e-9),
        }
        emit("energy", {"model": Path(args.model).name, "device": args.device, "batch": batch}, figures)
        rows.append([batch, *(figures[name] for name in list(figures)[1:])])
    say(f"energy by {source.name}")
    table(("batch", "tokens/s", "watts", "idle watts", "tokens/J", "tokens/J net of idle"), rows)


if __name__ == "__main__":
    main()
