"""Compile the native kernels for this machine, once.

The library lands in a cache folder under a name that carries a hash of the sources, the compiler and the
processor's features, so an upgrade or another machine on a shared home folder compiles its own. `python -m
moesmith.ops.cpu.build` does it ahead of time.

MOESMITH_CACHE    the folder (default: $XDG_CACHE_HOME/moesmith, else ~/.cache/moesmith)
MOESMITH_NO_NATIVE=1    never compile or load; plain PyTorch does the work
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent
SOURCES = ("blocks.c", "grouped.c", "decode.c", "gram.c")
HEADERS = ("kernels.h", "unpack.h")
# -ffp-contract=off: a fused multiply-add where bitsandbytes rounds twice would change bits
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden")


class BuildError(RuntimeError):
    """No native library could be made; the message is one line saying why."""


def cache_folder() -> Path:
    """Where compiled libraries live."""
    if root := os.environ.get("MOESMITH_CACHE"):
        return Path(root)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moesmith"


def find_compiler() -> str:
    """$CC, cc, gcc or clang, whichever is there first. BuildError if none is."""
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        if name and (path := shutil.which(name)):
            return path
    raise BuildError("no C compiler found (tried $CC, cc, gcc, clang)")


def torch_openmp() -> list[str]:
    """torch's own OpenMP runtime, to link against: two runtimes in one process fight over the cores."""
    import torch

    found = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    found += sorted((Path(torch.__file__).parent.parent / "torch.libs").glob("libgomp*.so*"))
    return [str(path) for path in found[:1]]


def _processor() -> str:
    """Name and feature flags of the processor: -march=native depends on them."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().split("\n\n")[0].splitlines()
        return "\n".join(
            line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))
        )
    return platform.processor()


def _version(compiler: str) -> str:
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False, timeout=60)
    return done.stdout


def library_path(compiler: str) -> Path:
    """The file this machine's library has, or will have."""
    digest = hashlib.sha256()
    for name in (*SOURCES, *HEADERS):
        digest.update((FOLDER / name).read_bytes())
    for text in (" ".join(FLAGS), compiler, _version(compiler), _processor(), *torch_openmp()):
        digest.update(text.encode())
    return cache_folder() / f"kernels-{digest.hexdigest()[:16]}.so"


def build() -> Path:
    """Path of the compiled library, compiling it if it is not there yet. BuildError if that fails.

    Safe when several processes start at once: each compiles to a name of its own and renames it into place.
    """
    compiler = find_compiler()
    target = library_path(compiler)
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = tempfile.mkdtemp(dir=target.parent)
    except OSError as error:
        raise BuildError(f"cache folder {target.parent} is not writable: {error.strerror}") from error
    try:
        library = Path(work) / target.name
        _compile(compiler, library)
        library.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _compile(compiler: str, library: Path) -> None:
    objects = []
    for name in SOURCES:
        objects.append(str(library.with_name(name + ".o")))
        _run([compiler, *FLAGS, "-fopenmp", "-c", str(FOLDER / name), "-o", objects[-1]])
    shared = [compiler, "-shared", *objects, "-o", str(library), "-lm"]
    openmp = torch_openmp()
    try:
        _run([*shared, *openmp] if openmp else [*shared, "-fopenmp"])
    except BuildError:
        # clang's code wants its own runtime
        if not openmp:
            raise
        _run([*shared, "-fopenmp"])


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} did not run: {error}") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        reason = next(
            (line for line in lines if "error" in line.lower()), lines[-1] if lines else "no message"
        )
        raise BuildError(f"{command[0]} failed: {reason}")


if __name__ == "__main__":
    print(build())
