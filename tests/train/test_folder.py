"""A folder is one run's, and nobody else's."""

import pytest

from moesmith.errors import UserError
from runs import examples, log, run, settings


def test_a_folder_is_not_written_into_by_accident(tmp_path):
    out = tmp_path / "out"
    run(out)
    with pytest.raises(UserError, match="holds a run already"):
        run(out)
    with pytest.raises(UserError, match="train.lr: was 0.003, is 0.1"):
        run(out, cfg=settings(out, lr=0.1), resume=True)
    with pytest.raises(UserError, match="its rows or their chat template have changed"):
        run(out, train=examples(29), resume=True)
    (out / "transfers.json").write_text("{}")
    cfg = settings(out, max_steps=1).model_copy(update={"overwrite": True})
    assert run(out, cfg=cfg).steps == 1
    assert len(log(out)) == 3  # nothing of the first run is left
    assert not (out / "transfers.json").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="is not empty: thesis.tex"):
        run(tmp_path / "other")
