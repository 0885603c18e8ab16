"""The fused head in small tiles: the same log-probabilities, gradients too, in far less memory."""

import pytest
import torch
from trl.kernels import chunked_logprob
from trl.trainer import utils

import tiny
from moesmith.plan.footprint import CPU_TILE
from moesmith.train import head_tiles
from moesmith.train.head_tiles import small_tiles

LENGTH = 12


def scored():
    """(log-probabilities, gradient of the embeddings) of a tiny model through the fused head."""
    model = tiny.build("olmoe")
    utils.add_fused_lm_head(model)
    ids = (torch.arange(2 * LENGTH).view(2, LENGTH) * 7) % model.config.vocab_size
    out = model(input_ids=ids, labels=ids, fused_lm_head=True)
    out.loss.backward()
    return out.log_probs.detach(), model.get_input_embeddings().weight.grad.clone()


def test_the_tiles_are_taken_and_put_back(monkeypatch):
    before = chunked_logprob.TOKEN_CHUNK_SIZE, utils._CHUNKED_LOGPROB_CHUNK_SIZE
    with pytest.raises(ZeroDivisionError), small_tiles():
        assert (chunked_logprob.TOKEN_CHUNK_SIZE, utils._CHUNKED_LOGPROB_CHUNK_SIZE) == CPU_TILE
        raise ZeroDivisionError
    assert (chunked_logprob.TOKEN_CHUNK_SIZE, utils._CHUNKED_LOGPROB_CHUNK_SIZE) == before


def test_any_tile_gives_the_same_scores_and_gradients(monkeypatch):
    whole = scored()
    widths = []
    real = chunked_logprob._forward_tile

    def watched(tile, *args, **kwargs):
        widths.append(tuple(tile.shape))
        return real(tile, *args, **kwargs)

    monkeypatch.setattr(chunked_logprob, "_forward_tile", watched)
    monkeypatch.setattr(head_tiles, "CPU_TILE", (5, 16))
    with small_tiles():
        pieces = scored()
    assert len(widths) > 4 and max(rows for rows, _ in widths) == 5
    assert max(columns for _, columns in widths) == 16
    for one, other in zip(whole, pieces, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
