"""The native library: compiled once, safely; without it, a reason and the same answers."""

import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from moesmith import ops
from moesmith.ops import cpu, reference
from moesmith.ops.cpu import build


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """An empty cache folder, and nothing loaded yet; the loaded library comes back afterwards."""
    monkeypatch.setenv("MOESMITH_CACHE", str(tmp_path))
    monkeypatch.delenv("MOESMITH_NO_NATIVE", raising=False)
    cpu.forget()
    yield tmp_path
    monkeypatch.undo()
    cpu.forget()


@pytest.fixture
def compiler():
    try:
        return build.find_compiler()
    except build.BuildError as error:
        pytest.skip(str(error))


@pytest.fixture
def quick(monkeypatch):
    """Compile without optimising."""
    monkeypatch.setattr(build, "FLAGS", tuple("-O0" if flag == "-O3" else flag for flag in build.FLAGS))


def test_compiles_once(fresh, quick, compiler):
    path = build.build()
    made = path.stat().st_mtime_ns
    assert path.parent == fresh and build.build().stat().st_mtime_ns == made
    assert [p.name for p in fresh.iterdir()] == [path.name]
    assert cpu.available() and cpu.status().startswith("native kernels on") and str(path) in cpu.status()


def test_builders_at_the_same_time_do_not_hurt_each_other(fresh, quick, compiler):
    with ThreadPoolExecutor(3) as pool:
        paths = {future.result() for future in [pool.submit(build.build) for _ in range(3)]}
    assert len(paths) == 1 and [p.name for p in fresh.iterdir()] == [p.name for p in paths]
    assert cpu.available()


def test_switched_off(fresh, monkeypatch):
    monkeypatch.setenv("MOESMITH_NO_NATIVE", "1")
    assert not cpu.available() and not cpu.has_grouped()
    assert cpu.status() == "native kernels off: MOESMITH_NO_NATIVE is set"
    weight = torch.randn(2, 4, 128)
    codes, absmax = ops.quantize(weight, "nf4")
    assert torch.equal(codes[1], reference.quantize_matrix(weight[1], "nf4", 64)[0])
    assert torch.equal(ops.dequantize(codes, absmax, "nf4", weight.dtype),
                       reference.dequantize(codes, absmax, "nf4", weight.dtype))  # fmt: skip
    assert not list(fresh.iterdir())


def test_no_compiler(fresh, monkeypatch):
    monkeypatch.setenv("PATH", str(fresh))
    monkeypatch.delenv("CC", raising=False)
    assert not cpu.available()
    assert cpu.status() == "native kernels off: no C compiler found (tried $CC, cc, gcc, clang)"


def test_a_compiler_that_fails(fresh, monkeypatch):
    monkeypatch.setenv("CC", "false")
    assert not cpu.available() and "false failed" in cpu.status()


def test_a_folder_that_cannot_be_written(fresh, monkeypatch, compiler):
    (fresh / "file").write_text("")
    monkeypatch.setenv("MOESMITH_CACHE", str(fresh / "file" / "below"))
    assert not cpu.available() and "is not writable" in cpu.status()


def test_a_damaged_library_is_not_fatal(fresh, compiler):
    build.library_path(compiler).write_bytes(b"not a library")
    assert not cpu.available() and cpu.status().startswith("native kernels off")


def test_the_sources_name_the_library(fresh, monkeypatch, compiler):
    before = build.library_path(compiler)
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-O2"))
    assert build.library_path(compiler) != before


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names an x86 baseline")
@pytest.mark.parametrize("scheme", ["nf4", "fp4", "int8", "fp8"])
def test_plain_c_gives_the_same_bytes(fresh, monkeypatch, compiler, scheme):
    """What a machine without AVX512 runs."""
    flags = tuple("-march=x86-64-v2" if flag == "-march=native" else flag for flag in build.FLAGS)
    monkeypatch.setattr(build, "FLAGS", flags)
    assert cpu.available() and "plain C" in cpu.status() and not cpu.has_grouped()
    weight = torch.randn(6, 96, generator=torch.Generator().manual_seed(3))
    weight[0] = 0
    weight[1] *= 1e-39
    weight[2] *= 1e-42
    weight[3, 0] = 3e38
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        matrix = weight.to(dtype).nan_to_num(posinf=6e4, neginf=-6e4)
        codes, absmax = ops.quantize(matrix[None], scheme, 16)
        want, scales = reference.quantize_matrix(matrix, scheme, 16)
        assert torch.equal(codes[0], want) and torch.equal(absmax[0], scales)
        for out in (torch.float32, torch.bfloat16, torch.float16):
            assert torch.equal(
                ops.dequantize(codes, absmax, scheme, out)[0], reference.dequantize(want, scales, scheme, out)
            )


@pytest.mark.slow
def test_one_openmp_runtime(compiler):
    """The library shares torch's OpenMP runtime: a second one would fight it for the cores."""
    script = (
        "from moesmith.ops import cpu\n"
        "def runtimes(): return {line.split()[-1] for line in open('/proc/self/maps') if 'gomp' in line}\n"
        "before = runtimes(); assert cpu.available(), cpu.status()\n"
        "assert before and runtimes() == before, runtimes()"
    )
    if not build.torch_openmp():
        pytest.skip("this torch brings no libgomp")
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.slow
def test_prebuild_command(fresh, compiler):
    done = subprocess.run(
        [sys.executable, "-m", "moesmith.ops.cpu.build"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip().endswith(".so") and len(list(fresh.iterdir())) == 1
    assert "RuntimeWarning" not in done.stderr
