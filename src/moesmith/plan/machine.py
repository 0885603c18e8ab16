"""How fast this machine moves and multiplies: a few rates, measured once and kept in the user's cache.

The same code measures a CPU and a GPU. Until someone measures, cautious defaults stand in, and `measured`
says that they are no figures of this machine.
"""

from __future__ import annotations

import json
import os
import platform
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from moesmith.config import write_atomically
from moesmith.errors import UserError

VERSION = 1  # of the file in the cache


@dataclass(frozen=True)
class Machine:
    """Rates of one machine. Bytes and operations per second."""

    name: str
    on_gpu: bool
    memory: float
    """bytes/s that the device reads from its own memory"""
    ram_copy: float
    """bytes/s of a copy from RAM to RAM"""
    link: float
    """bytes/s from pinned RAM to the device; on a CPU the same as ram_copy"""
    disk: float
    """bytes/s read from disk, past the page cache"""
    gemm: float
    """bf16 FLOP/s of a large matrix product"""
    packed: float
    """bytes/s of 4-bit codes that the packed kernels work through when one token decodes"""
    rows: float
    """FLOP/s of the packed kernels at 64 rows per expert, forward"""
    measured: bool = False
    """False: cautious defaults, no figure of this machine"""


def assumed(on_gpu: bool) -> Machine:
    """Cautious rates for a machine that was not measured: a laptop's CPU, a card of the 12 GB class."""
    if on_gpu:  # an RTX 3060's datasheet, PCIe 4 x8
        return Machine("a 12 GB card", True, 300e9, 8e9, 12e9, 1e9, 40e12, 40e9, 15e12)
    return Machine("a CPU", False, 15e9, 8e9, 8e9, 5e8, 2e11, 5e9, 1e11)


def known(on_gpu: bool) -> Machine:
    """What was measured here before, else `assumed`."""
    try:
        stored = json.loads(_cache_file().read_text(encoding="utf-8"))[_key(on_gpu)]
        if {f.name for f in fields(Machine)} == stored.keys():
            return Machine(**stored)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return assumed(on_gpu)


def measure(on_gpu: bool, folder: Path | None = None) -> Machine:
    """Measure this machine, in under 20 s, and remember it.

    Args:
        folder: where the disk is read; the cache folder if not given.

    Raises:
        UserError: a GPU is to be measured and torch sees none.
    """
    import torch

    if on_gpu and not torch.cuda.is_available():
        raise UserError("torch sees no GPU to measure", "measure the CPU with --device cpu")
    device = torch.device("cuda" if on_gpu else "cpu")
    ram_copy = _copy_rate(torch.device("cpu"), torch.device("cpu"))
    machine = Machine(
        name=_name(on_gpu),
        on_gpu=on_gpu,
        memory=_memory_rate(device),
        ram_copy=ram_copy,
        link=_copy_rate(torch.device("cpu"), device) if on_gpu else ram_copy,
        disk=_disk_rate(folder or _cache_file().parent),
        gemm=_gemm_rate(device),
        packed=_decode_rate(device),
        rows=_rows_rate(device),
        measured=True,
    )
    _remember(on_gpu, machine)
    return machine


# ---------------------------------------------------------------- the rates


def _best(work: Callable[[], Any], seconds: float = 1.0, device: Any = None) -> float:
    """Seconds of the fastest of many calls within about `seconds`."""
    import torch

    def finish() -> None:
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)

    work()
    finish()
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until or best == float("inf"):
        started = time.perf_counter()
        work()
        finish()
        best = min(best, time.perf_counter() - started)
    return best


def _memory_rate(device: Any) -> float:
    import torch

    data = torch.ones(1 << 26, dtype=torch.float32, device=device)  # 268 MB, past every cache
    return data.nbytes / _best(data.sum, device=device)


def _copy_rate(source: Any, target: Any) -> float:
    import torch

    data = torch.ones(1 << 27, dtype=torch.uint8, pin_memory=target.type == "cuda")
    room = torch.empty_like(data, device=target)
    return data.nbytes / _best(lambda: room.copy_(data, non_blocking=True), device=target)


def _gemm_rate(device: Any) -> float:
    import torch

    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    return 2 * n**3 / _best(lambda: a @ b, device=device)


def _stack(device: Any, experts: int, rows: int, columns: int) -> Any:
    """A stack of random nf4 codes."""
    import torch

    from moesmith.experts.storage import packed_placeholder

    packed = packed_placeholder(torch.Size((experts, rows, columns)), "nf4", 64, False, device)
    packed.codes.random_(0, 256)
    assert packed.absmax is not None
    packed.absmax.fill_(0.01)
    return packed


def _decode_rate(device: Any) -> float:
    """Bytes of codes and scales per second when 8 of 64 experts get one row each."""
    import torch

    from moesmith.ops.grouped import grouped_linear

    stack = _stack(device, 64, 1024, 2048)
    x = torch.randn(8, 2048, device=device).bfloat16()
    chosen, turn = 8, 0

    def step() -> None:
        nonlocal turn
        turn = (turn + 1) % 8  # other experts every time: none of them is still in a cache
        offsets = [min(chosen, max(0, e - 8 * turn)) for e in range(65)]
        grouped_linear(x, stack, offsets)

    with torch.no_grad():
        seconds = _best(step, device=device)
    return 8 * (stack.codes.nbytes + stack.absmax.nbytes) / 64 / seconds


def _rows_rate(device: Any) -> float:
    """FLOP per second when 8 experts get 64 rows each."""
    import torch

    from moesmith.ops.grouped import grouped_linear

    stack = _stack(device, 8, 1024, 2048)
    x = torch.randn(512, 2048, device=device).bfloat16()
    offsets = [64 * e for e in range(9)]
    with torch.no_grad():
        seconds = _best(lambda: grouped_linear(x, stack, offsets), device=device)
    return 2 * x.numel() * 1024 / seconds


def _disk_rate(folder: Path) -> float:
    """Sequential reads of a file that was dropped from the page cache first."""
    folder.mkdir(parents=True, exist_ok=True)
    size = 128 << 20
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        piece = os.urandom(1 << 20)
        for _ in range(size >> 20):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
        best = float("inf")
        buffer = bytearray(1 << 22)
        for _ in range(3):
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, size, os.POSIX_FADV_DONTNEED)
            with open(file.name, "rb", buffering=0) as reader:
                started = time.perf_counter()
                while reader.readinto(buffer):
                    pass
                best = min(best, time.perf_counter() - started)
    return size / best


# ---------------------------------------------------------------- what is remembered


def _cache_file() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "moesmith" / "machine.json"


def _name(on_gpu: bool) -> str:
    """The processor, or the GPU."""
    if on_gpu:
        import torch

        return torch.cuda.get_device_name() if torch.cuda.is_available() else "GPU"
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{model or platform.processor() or 'CPU'}, {cores} cores"


def _key(on_gpu: bool) -> str:
    """A home folder may be shared by several machines."""
    return f"{VERSION} {platform.node()} {_name(on_gpu)} {'gpu' if on_gpu else 'cpu'}"


def _remember(on_gpu: bool, machine: Machine) -> None:
    file = _cache_file()
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        stored = {}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps({**stored, _key(on_gpu): asdict(machine)}, indent=2) + "\n")


# ---------------------------------------------------------------- how much there is

UNITS = {"": 1, "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12, "g": 1e9, "m": 1e6}
UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def parse_size(text: str | float) -> int:
    """'12GB' -> 12_000_000_000, '8 GiB' -> 8_589_934_592, a bare number is bytes.

    Raises:
        UserError: not a size, or one of nothing.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", str(text))
    if match is None or match[2].lower() not in UNITS:
        raise UserError(f"{text!r} is not a size", "write it like 12GB or 8GiB")
    nbytes = int(float(match[1]) * UNITS[match[2].lower()])
    if nbytes < 1:
        raise UserError(f"{text!r} is no memory at all", "write it like 12GB or 8GiB")
    return nbytes
