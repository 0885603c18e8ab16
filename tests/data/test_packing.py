"""Packed rows do not see each other, and a model where they would is refused."""

import numpy as np
import pytest
import torch

import tiny
from moesmith.data.masks import IGNORED, Example
from moesmith.data.packing import check_isolation, concatenate, pack
from moesmith.errors import UserError


def rows(*lengths, seed=0):
    made = []
    generator = np.random.default_rng(seed)
    for number, length in enumerate(lengths, 1):
        ids = generator.integers(5, 100, length).astype(np.int32)
        made.append(Example(number, ids, ids.copy()))
    return made


def test_bins_hold_every_row_once_and_are_not_overfull():
    lengths = np.random.default_rng(0).integers(3, 60, 200)
    examples = rows(*lengths)
    bins = pack(examples, 64)
    assert sorted(e.row for b in bins for e in b) == list(range(1, 201))
    assert max(sum(map(len, b)) for b in bins) <= 64
    assert len(bins) <= 1.07 * np.ceil(lengths.sum() / 64)
    assert [[e.row for e in b] for b in pack(examples, 64)] == [[e.row for e in b] for b in bins]


def test_best_fit():
    assert [[len(e) for e in b] for b in pack(rows(6, 3, 5, 4), 10)] == [[6, 4], [5, 3]]


def test_positions_start_again_and_no_row_learns_from_the_one_before():
    packed = concatenate(rows(3, 4))
    assert packed["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3]]
    assert (packed["labels"][0] == IGNORED).tolist() == [True, False, False, True, False, False, False]
    assert packed["input_ids"].shape == (1, 7)


@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe", "mixtral", "gemma4"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_logits_equal_separate_logits(family, attention):
    model = tiny.build(family).eval()
    model.set_attn_implementation(attention)
    examples = rows(20, 31, 12)
    packed = concatenate(examples)
    with torch.no_grad():
        inputs = {name: packed[name] for name in ("input_ids", "position_ids")}
        together = model(**inputs, use_cache=False).logits[0]
        start = 0
        for example in examples:
            alone = model(input_ids=torch.as_tensor(example.input_ids)[None].long(), use_cache=False).logits[
                0
            ]
            torch.testing.assert_close(together[start : start + len(example)], alone, rtol=2e-4, atol=2e-5)
            start += len(example)
    check_isolation(model, examples, 64)
    check_isolation(model.to(torch.bfloat16), examples, 64)


# gpt-oss builds its masks without position_ids, Mamba and linear attention carry a state along the sequence,
# and a sparse indexer chooses among the tokens of all rows.
@pytest.mark.parametrize("family", ["gpt_oss", "jamba", "qwen3_next", "mistral_large4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_would_mix_packed_rows_is_refused(family, dtype):
    model = tiny.build(family, dtype=dtype).train()
    with pytest.raises(UserError, match="cannot be trained on packed rows"):
        check_isolation(model, rows(20, 31, 25, 12), 64)
    assert model.training


def test_one_row_is_enough_for_the_check():
    check_isolation(tiny.build("olmoe"), rows(20), 64)
