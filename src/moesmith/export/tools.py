"""Find llama.cpp on this machine, or fetch it: the converter's source tree and the compiled tools.

`find_tools` looks where the user says, in $LLAMA_CPP, on PATH, and in our cache. `fetch_tools` fills the
cache: the tree comes with the source distribution of llama-cpp-python (through pip, its hash pinned), the
tools as signed Debian packages that are unpacked, not installed, and run with the C library that comes with
them; where there is no such source of packages they are compiled from the tree. What is in the cache is
whole: it is made under another name and renamed.

The tree and the tools may be of different days: a GGUF file says its own version, and newer tools read older
files.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from moesmith.errors import UserError

SDIST = "llama-cpp-python"
VERSION = "0.3.36"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
TREE = "vendor/llama.cpp"  # within the source distribution
CONVERTER = (
    "convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "conversion", "gguf-py", "models/templates",
    "LICENSE",
)  # fmt: skip
"""What the converter reads of the tree. The rest, 170 MB, is only unpacked to be compiled."""

PACKAGES = ("llama.cpp-tools", "llama.cpp-tools-extra")
SUITE = "sid"
TOOLS = ("llama-quantize", "llama-imatrix", "llama-server")
FETCH = "fetch it: --llama-cpp fetch   (or name a folder that has it: --llama-cpp DIR, or $LLAMA_CPP)"


@dataclass(frozen=True)
class Tools:
    """Where llama.cpp is: the converter's tree, and how each compiled tool is started."""

    tree: Path | None
    """Folder with convert_hf_to_gguf.py and its conversion/ and gguf-py/."""

    commands: Mapping[str, tuple[str, ...]]
    """Tool -> the beginning of its command line."""

    def missing(self) -> list[str]:
        """What is not there, in words."""
        converter = (
            [] if self.tree else ["converter (convert_hf_to_gguf.py with its conversion/ and gguf-py/)"]
        )
        return converter + [tool for tool in TOOLS if tool not in self.commands]


# ---------------------------------------------------------------- finding


def cache_folder() -> Path:
    """Where a fetched llama.cpp lives: one folder per version of it."""
    from moesmith.ops.cpu.build import cache_folder as ours

    return ours() / "llama.cpp" / VERSION


def find_tools(where: Path | None = None) -> Tools:
    """The first converter and the first of every tool, looked for in `where`, $LLAMA_CPP, PATH and our cache.

    Args:
        where: a llama.cpp tree, built or not, or a folder with its tools. It comes first; what it lacks is
            taken from the other places.

    Raises:
        UserError: something is nowhere; the message says what and where it was looked for.
    """
    if where is not None and not where.is_dir():
        raise UserError(f"--llama-cpp {where}: no such folder", FETCH)
    named = os.environ.get("LLAMA_CPP")
    places = [*([where] if where else []), *([Path(named)] if named else [])]
    tree: Path | None = None
    commands: dict[str, tuple[str, ...]] = {}
    for place in places:
        tree = tree or _tree(place)
        commands = {**_commands(place), **commands}
        if place == where and tree is None and not commands:
            raise UserError(f"--llama-cpp {where}: no part of llama.cpp is there", FETCH)
    for tool in TOOLS:
        if tool not in commands and (path := shutil.which(tool)):
            commands[tool] = (path,)
    if tree is None and (script := shutil.which("convert_hf_to_gguf.py")):
        tree = _tree(Path(script).resolve().parent)
    cache = cache_folder()
    tree = tree or _tree(cache)
    commands = {**_commands(cache), **commands}
    found = Tools(tree, commands)
    if missing := found.missing():
        looked = ", ".join([*map(str, places), "PATH", str(cache)])
        raise UserError(f"llama.cpp: no {', no '.join(missing)} in {looked}", FETCH)
    return found


def _tree(place: Path) -> Path | None:
    """The converter's tree in a folder, if it has one. Trees from before conversion/ are too old."""
    for folder in (place, place / "tree", place / "llama.cpp"):
        if (folder / CONVERTER[0]).is_file() and all((folder / part).is_dir() for part in CONVERTER[2:4]):
            return folder.resolve()
    return None


def _commands(place: Path) -> dict[str, tuple[str, ...]]:
    """How the tools of a folder are started: as they are, or by the loader of the C library beside them."""
    root = (place / "root").resolve()
    for loader in sorted(root.glob("usr/lib/*/ld-linux*.so*")):
        libraries = ":".join([str(loader.parent), str(loader.parent / "llama")])
        start = (str(loader), "--library-path", libraries)
        return {
            tool: (*start, str(root / "usr/bin" / tool))
            for tool in TOOLS
            if (root / "usr/bin" / tool).is_file()
        }
    found: dict[str, tuple[str, ...]] = {}
    for tool in TOOLS:
        for folder in (place, place / "bin", place / "build" / "bin"):
            if (folder / tool).is_file() and os.access(folder / tool, os.X_OK):
                found.setdefault(tool, (str((folder / tool).resolve()),))
    return found


# ---------------------------------------------------------------- fetching


def fetch_tools(say: Callable[[str], None]) -> Tools:
    """llama.cpp in our cache, fetched if it is not there yet.

    Args:
        say: is told each step, with what it takes.

    Raises:
        UserError: pip found no source distribution, or there is neither a source of packages nor a compiler.
    """
    cache = cache_folder()
    if not _is_whole(cache):
        try:
            cache.parent.mkdir(parents=True, exist_ok=True)
            work = Path(tempfile.mkdtemp(dir=cache.parent, prefix=f".{VERSION}-"))
        except OSError as error:
            raise UserError(
                f"cache folder {cache.parent} is not writable: {error.strerror}",
                "set $MOESMITH_CACHE to another",
            ) from None
        try:
            _fetch(work / "whole", work / "parts", say)
            _take_place(work / "whole", cache)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return Tools(_tree(cache), _commands(cache))


def _is_whole(cache: Path) -> bool:
    return not Tools(_tree(cache), _commands(cache)).missing()


def _take_place(made: Path, cache: Path) -> None:
    """Give the folder its name. Another process may have been faster: its folder is as good."""
    try:
        made.rename(cache)
    except OSError:
        if not _is_whole(cache):  # something else, or what an older moesmith wanted
            shutil.rmtree(cache, ignore_errors=True)
            made.rename(cache)


def _fetch(whole: Path, parts: Path, say: Callable[[str], None]) -> None:
    """The tree and the tools into `whole`; `parts` is for what is in between."""
    whole.mkdir()
    parts.mkdir()
    say(f"llama.cpp's converter: the source distribution of {SDIST} {VERSION} (77 MB), through pip")
    sdist = _download_sdist(parts / "sdist")
    _unpack(sdist, CONVERTER, whole / "tree")
    reason = _fetch_packages(whole / "root", parts / "apt", say)
    if reason is None:
        return
    shutil.rmtree(whole / "root", ignore_errors=True)
    say(f"no packages of llama.cpp here ({reason}); compiling it, which takes from minutes to half an hour")
    _unpack(sdist, None, parts / "source")
    _build(parts / "source", parts / "build", whole / "bin")


def _download_sdist(folder: Path) -> Path:
    """The source distribution, by the user's own pip and indexes; pip checks the hash before it unpacks."""
    folder.mkdir()
    wanted = folder / "wanted.txt"
    wanted.write_text(f"{SDIST}=={VERSION} --hash=sha256:{SHA256}\n", encoding="utf-8")
    run(
        [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", SDIST, "--require-hashes",
         "--dest", str(folder), "-r", str(wanted)],
        f"pip download of {SDIST} {VERSION}",
        hint=f"--llama-cpp fetch needs pip in this environment and an index that has {SDIST} {VERSION}; "
        "or clone llama.cpp, build it, and give --llama-cpp DIR",
    )  # fmt: skip
    files = list(folder.glob("*.tar.gz"))
    if len(files) != 1 or (seen := hashlib.sha256(files[0].read_bytes()).hexdigest()) != SHA256:
        raise UserError(
            f"pip brought {', '.join(f.name for f in files) or 'nothing'} for {SDIST} {VERSION}"
            + (f" with sha256 {seen}, wanted {SHA256}" if len(files) == 1 else "")
        )
    return files[0]


def _unpack(sdist: Path, parts: Iterable[str] | None, out: Path) -> None:
    """Files of the llama.cpp tree within the source distribution; `parts` are the ones wanted."""
    chosen = None if parts is None else tuple(parts)
    with tarfile.open(sdist) as archive:
        for member in archive:
            _, _, inner = member.name.partition(f"/{TREE}/")
            wanted = chosen is None or any(inner == part or inner.startswith(part + "/") for part in chosen)
            if not inner or not member.isfile() or not wanted:
                continue
            target = out / inner
            if not target.resolve().is_relative_to(out.resolve()):
                raise UserError(f"{sdist.name} holds a file outside of its folder: {member.name}")
            source = archive.extractfile(member)
            assert source is not None  # member.isfile()
            target.parent.mkdir(parents=True, exist_ok=True)
            with source, open(target, "wb") as file:
                shutil.copyfileobj(source, file)
            target.chmod(0o755 if member.mode & 0o100 else 0o644)


# ---------------------------------------------------------------- Debian's packages


def _fetch_packages(root: Path, work: Path, say: Callable[[str], None]) -> str | None:
    """Unpack the tools and every library they need into `root`. Returns why it could not be done, or None."""
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        return "this machine has no apt-get"
    mirror = debian_mirror()
    if mirror is None:
        return "its package sources name no Debian mirror"
    uri, options = mirror
    for folder in ("lists/partial", "archives/partial", "empty"):
        (work / folder).mkdir(parents=True)
    (work / "status").touch()  # nothing is installed, so every library comes along
    (work / "sources.list").write_text(f"deb {options}{uri} {SUITE} main\n", encoding="utf-8")
    settings = {
        "Dir::Etc::sourcelist": work / "sources.list", "Dir::Etc::sourceparts": work / "empty",
        "Dir::Etc::preferences": work / "none", "Dir::Etc::preferencesparts": work / "empty",
        "Dir::State": work, "Dir::State::lists": work / "lists", "Dir::State::status": work / "status",
        "Dir::Cache": work, "Dir::Cache::archives": work / "archives",
        "Debug::NoLocking": "true", "APT::Install-Recommends": "false",
        "APT::Update::Post-Invoke::": "", "DPkg::Pre-Install-Pkgs::": "",
    }  # fmt: skip
    apt = ["apt-get", "-q", *(f"-o{key}={value}" for key, value in settings.items())]
    say(f"llama.cpp's tools: Debian's packages ({SUITE}) of {uri}, unpacked in our cache, not installed")
    try:
        run([*apt, "update", "--error-on=any"], "apt-get update")
    except UserError:  # `--error-on` is young; without it a mirror that is not there is a warning
        try:
            run([*apt, "update"], "apt-get update")
        except UserError as error:
            return error.message
    try:
        run([*apt, "--yes", "--download-only", "install", *PACKAGES], "apt-get")
        for package in sorted((work / "archives").glob("*.deb")):
            run(["dpkg-deb", "--extract", str(package), str(root)], "dpkg-deb")
    except UserError as error:
        return error.message
    for loader in root.glob("usr/lib/*/ld-linux*.so*"):
        # ggml looks for its backends beside the program, which to the system is the loader
        for backend in sorted((loader.parent / "ggml").glob("backends*/*.so")):
            link = loader.parent / backend.name
            link.unlink(missing_ok=True)
            link.symlink_to(backend.relative_to(loader.parent))
    commands = _commands(root.parent)
    try:
        run([*commands["llama-server"], "--version"], "llama-server")
    except (KeyError, UserError) as error:
        return (
            f"the packages of {SUITE} do not run here: {getattr(error, 'message', 'no llama-server in them')}"
        )
    return None


def debian_mirror(etc: Path = Path("/etc/apt")) -> tuple[str, str] | None:
    """(URI, options) of the Debian mirror that the machine's own package sources name, or None.

    The options are those of a one-line entry, "" or "[signed-by=FILE] ".
    """
    for uri, signed_by in _sources(etc):
        debian = "debian-archive" in signed_by or re.search(r"/debian/?$", uri)
        if debian and "security" not in uri and "security" not in signed_by:
            return uri, f"[signed-by={signed_by}] " if signed_by else ""
    return None


def _sources(etc: Path) -> Iterator[tuple[str, str]]:
    """(URI, keyring or "") of every entry for packages, of both kinds of source files."""
    for path in (
        *sorted(etc.glob("sources.list.d/*.sources")),
        etc / "sources.list",
        *sorted(etc.glob("sources.list.d/*.list")),
    ):
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        if path.suffix == ".sources":
            for stanza in re.split(r"\n\s*\n", text):
                fields = dict(re.findall(r"^([A-Za-z-]+):[ \t]*(.*)$", stanza, re.MULTILINE))
                key = fields.get("Signed-By", "").strip()
                if "deb" in fields.get("Types", "").split() and fields.get("Enabled", "yes").lower() != "no":
                    yield from ((uri, key) for uri in fields.get("URIs", "").split())
        else:
            for line in text.splitlines():
                if entry := re.match(r"deb\s+(?:\[([^]]*)\]\s+)?(\S+)", line.strip()):
                    key = re.search(r"signed-by=(\S+)", entry[1] or "")
                    yield entry[2], key[1] if key else ""


# ---------------------------------------------------------------- compiling


def _build(source: Path, work: Path, out: Path) -> None:
    """Compile the tools with cmake into the folder `out`."""
    if not shutil.which("cmake"):
        raise UserError("llama.cpp has to be compiled on this machine, and there is no cmake", FETCH)
    flags = ("LLAMA_CURL=OFF", "LLAMA_OPENSSL=OFF", "LLAMA_BUILD_TESTS=OFF", "LLAMA_BUILD_EXAMPLES=OFF",
             "BUILD_SHARED_LIBS=OFF", "CMAKE_BUILD_TYPE=Release")  # fmt: skip
    run(["cmake", "-S", str(source), "-B", str(work), *(f"-D{flag}" for flag in flags)], "cmake")
    run(
        ["cmake", "--build", str(work), "--parallel", str(os.cpu_count() or 1), "--target", *TOOLS],
        "compiling llama.cpp",
    )
    out.mkdir()
    for tool in TOOLS:
        shutil.copy2(work / "bin" / tool, out / tool)


# ---------------------------------------------------------------- running

_TIED = """
import ctypes, os, sys
prctl = getattr(ctypes.CDLL(None), "prctl", None)
if prctl: prctl(1, 9)
if os.getppid() == int(sys.argv[1]): os.execvp(sys.argv[2], sys.argv[2:])
"""
"""Asks Linux to kill this process when its parent dies (PR_SET_PDEATHSIG), then becomes the tool. Asked for
between fork and exec instead, it would run Python code in a copy of a process with threads."""


def tied(command: list[str]) -> list[str]:
    """The command as one that dies with this process, however that ends; elsewhere than on Linux as it is.

    Linux ties it to the thread that starts it: start it from one that lives as long.
    """
    if not sys.platform.startswith("linux"):
        return command
    return [sys.executable, "-I", "-S", "-c", _TIED, str(os.getpid()), *command]


def environment(command: list[str]) -> dict[str, str]:
    """Our own environment, without what would be loaded into a tool that brings its own C library."""
    own = Path(command[0]).name.startswith("ld-linux")
    drop = ("LD_PRELOAD", "LD_LIBRARY_PATH") if own else ()
    return {key: value for key, value in os.environ.items() if key not in drop}


def run(
    command: list[str], what: str, hint: str | None = None, cwd: Path | None = None,
    on_text: Callable[[str], None] | None = None,
) -> str:  # fmt: skip
    """Run to the end and return what was written. Raises UserError with the last line that says something.

    Args:
        on_text: is given the last 500 characters whenever the tool writes.
    """
    with subprocess.Popen(
        tied(command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        env=environment(command), cwd=cwd,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        written = bytearray()
        try:
            while piece := os.read(process.stdout.fileno(), 1 << 16):
                written += piece
                if on_text is not None:
                    on_text(written[-500:].decode(errors="replace"))
        except BaseException:
            process.kill()
            raise
    text = written.decode(errors="replace")
    if process.returncode:
        raise UserError(f"{what}: {last_words(text, process.returncode)}", hint)
    return text


_NOISE = re.compile(
    r"^\s*(\^+|~+|\[notice\].*|(note|hint|warning|W|N): .*|[╰×].*|ggml_backend_load_best: .*)?\s*$",
    re.IGNORECASE,
)
_STAMP = re.compile(r"^[\d.]+ ([IWED]) ?")  # time and level before the messages of newer tools
_TROUBLE = re.compile(
    r"error|fail|invalid|cannot|could not|unable|unsupported|not supported|assert", re.IGNORECASE
)
_RAISED = re.compile(r"^[\w.]*(Error|Exception|Interrupt|Exit)\b:?")


def last_words(text: str, returncode: int) -> str:
    """The line of a tool's output that says why it stopped.

    That is what a traceback ends with, a failed assertion, or the first line of level "error": those that
    follow it are its consequences. Else it is the last line that speaks of trouble, or the last of all.
    """
    stamped = [line for line in text.splitlines() if (found := _STAMP.match(line)) and found[1] == "E"]
    lines = [line for line in map(_plain, text.splitlines()) if not _NOISE.match(line)]
    if not lines:
        return f"killed by signal {-returncode}" if returncode < 0 else f"exit code {returncode}, no message"
    if (raised := _RAISED.match(lines[-1])) and len(lines) > 1:
        return (
            f"{lines[-1]}: {lines[-2]}" if raised.end() == len(lines[-1]) else lines[-1]
        )  # a bare `assert x`
    asserted = [line for line in lines if "GGML_ASSERT" in line or "GGML_ABORT" in line]
    trouble = (
        asserted
        or [_plain(line) for line in stamped]
        or [line for line in lines if _TROUBLE.search(line)][-1:]
    )
    return (trouble or lines[-1:])[0]


def _plain(line: str) -> str:
    return _STAMP.sub("", line).strip()
