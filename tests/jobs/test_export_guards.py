"""What a killed `moesmith export` leaves behind, and what is refused before it costs anything."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from moesmith.errors import UserError
from moesmith.export.parity import compare, tolerance
from moesmith.jobs import _export, _export_gguf, export

WRITER = """
import sys
from pathlib import Path
from moesmith.jobs._export import making
with making(Path(sys.argv[1])) as folder:
    (folder / "work").write_text("half")
    print("in", flush=True)
    sys.stdin.readline()
"""


def test_what_a_killed_export_left_is_cleared_away(tmp_path):
    out = tmp_path / "out"
    other = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "in\n"
    other.kill()
    other.wait()
    with _export.making(out) as folder:
        assert not (folder / "work").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("quant", "imatrix", "said"),
    [
        (["q4_k_m", "q9_x"], None, "q9_x: llama-quantize does not know it"),
        (["iq2_xs"], None, "iq2_xs needs an importance matrix"),
        (["iq2_xs", "f32"], "auto", None),
    ],
)
def test_a_quantisation_that_cannot_be_made_is_refused_first(quant, imatrix, said):
    llama = SimpleNamespace(kinds=lambda: {"Q4_K_M", "IQ2_XS", "BF16"})
    cfg = SimpleNamespace(quant=quant, imatrix=imatrix, dtype="float32")
    if said is None:
        return _export_gguf.check_kinds(cfg, llama)
    with pytest.raises(UserError, match=said):
        _export_gguf.check_kinds(cfg, llama)


@pytest.mark.parametrize(
    "words", [{"llama_cpp": "fetch"}, {"pre_tokenizer": "gpt-2"}, {"threads": 2}], ids=lambda w: next(iter(w))
)
def test_keys_of_llama_cpp_are_refused_where_it_is_not_used(words, tmp_path):
    cfg = export.Config(action="lora", adapter=[tmp_path], for_="vllm", out=tmp_path / "out", **words)
    with pytest.raises(UserError, match="goes with --for gguf"):
        export.check(cfg)


def test_a_quantised_file_of_an_undecided_model_is_measured_against_what_16_bits_do_to_it():
    """On a router that the last bit tips over, eight bits can do no better than sixteen."""
    said = [{0: -0.5, 1: -1.5}, {0: -1.5, 1: -0.5}]
    sixteen = compare(said, [{0: -0.9, 1: -1.1}, {0: -1.2, 1: -0.8}])
    eight = compare(said, [{0: -1.1, 1: -0.9}, {0: -1.1, 1: -0.9}])
    plain = tolerance("gguf 8 bits")
    assert any("mean" in why for why in plain.beyond(eight))
    assert not any("mean" in why for why in plain.widened(sixteen, "bfloat16").beyond(eight))
    assert plain.widened(sixteen, "bfloat16").agreement == plain.agreement, "the first tokens stayed"
