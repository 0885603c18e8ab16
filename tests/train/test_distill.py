"""Distillation: the loss is the divergence, the teacher is read once, and a student learns to be like it."""

import pytest
import torch

from moesmith.errors import UserError
from moesmith.models.layers import moe_layers
from moesmith.models.surgery import slice_model
from moesmith.train.distill import DistillSession, Teacher, divergence
from moesmith.train.settings import LoraSettings
from runs import TOKENIZER, examples, model, settings


def pruned():
    student = model()
    slice_model(student, {layer.name: [0, 1, 2, 4, 6] for layer in moe_layers(student)})
    return student


def whole(n, start=0):
    """Rows of which every token but the first is learned."""
    found = examples(n, start)
    for example in found:
        example.labels = example.input_ids.copy()
        example.labels[0] = -100
    return found


def test_with_all_tokens_kept_it_is_the_kl_over_the_vocabulary():
    torch.manual_seed(0)
    teacher, student = torch.randn(7, 50), torch.randn(7, 50)
    logprobs, tokens = teacher.log_softmax(-1).topk(50)
    expected = torch.nn.functional.kl_div(
        student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    torch.testing.assert_close(divergence(student, tokens, logprobs), expected, rtol=1e-4, atol=1e-5)


def test_with_few_tokens_kept_it_is_a_lower_bound_and_zero_for_equal_models():
    torch.manual_seed(0)
    teacher, student = torch.randn(20, 50) * 3, torch.randn(20, 50) * 3
    full = torch.nn.functional.kl_div(
        student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    logprobs, tokens = teacher.log_softmax(-1).topk(8)
    bound = divergence(student, tokens, logprobs)
    assert (bound <= full + 1e-5).all() and (bound > 0).all()
    torch.testing.assert_close(divergence(teacher, tokens, logprobs), torch.zeros(20), atol=1e-5, rtol=0)


def test_what_the_teacher_said_is_found_at_each_position_of_a_batch(tmp_path):
    teacher, rows = Teacher(tmp_path), examples(3)
    reference = model()
    teacher.record(reference, rows, kept=5)
    teacher.load(rows)
    width = max(map(len, rows))
    learned = torch.tensor([4, width + 2, width + 6])  # one of line 0, two of line 1
    tokens, logprobs = teacher.lookup([rows[2].row, rows[0].row], learned, width)
    for i, (row, position) in enumerate([(rows[2], 4), (rows[0], 2), (rows[0], 6)]):
        ids = torch.as_tensor(row.input_ids, dtype=torch.long)[None]
        with torch.no_grad():
            expected = reference(input_ids=ids).logits[0, position].log_softmax(-1)
        torch.testing.assert_close(logprobs[i], expected[tokens[i]])
        assert tokens[i, 0] == expected.argmax()


def test_a_teacher_that_was_stopped_reads_only_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr("moesmith.train.distill.ROWS_PER_FILE", 2)
    teacher, rows = Teacher(tmp_path), examples(5)
    teacher.record(model(), rows)
    assert not teacher.missing(rows)
    (tmp_path / "00001.safetensors").unlink()
    assert teacher.missing(rows)
    reference, calls = model(), []
    reference.register_forward_hook(lambda *_: calls.append(1))
    teacher.record(reference, rows)
    assert len(calls) == 2 and not teacher.missing(rows)


def test_a_teacher_of_another_text_is_refused(tmp_path):
    teacher, rows = Teacher(tmp_path), examples(2)
    teacher.record(model(), rows)
    for row in rows:
        row.input_ids = row.input_ids[:-1]
    with pytest.raises(UserError, match="another text"):
        teacher.load(rows)


def test_a_teacher_whose_logits_are_not_finite_is_refused(tmp_path):
    broken = model()
    with torch.no_grad():
        broken.lm_head.weight[3] = torch.nan
    with pytest.raises(UserError, match="not finite in row"):
        Teacher(tmp_path).record(broken, examples(1))


@pytest.mark.parametrize("targets", [["router"], ["experts", "router"]])
def test_a_pruned_student_comes_nearer_to_the_teacher(tmp_path, targets):
    train, dev = whole(24), whole(4, start=40)
    teacher = Teacher(tmp_path / "teacher")
    teacher.record(model(), [*train, *dev])
    teacher.load([*train, *dev])
    cfg = settings(tmp_path / "out", lora=LoraSettings(r=8, alpha=16, targets=targets), max_steps=8, lr=1e-2)
    session = DistillSession(pruned(), TOKENIZER, train, dev, cfg, teacher=teacher, quiet=True)
    result = session.train()
    assert result.best_eval_loss < 0.95 * result.first_eval_loss

    # The held-out loss of the run is the divergence, by its definition, averaged over all positions.
    student, total, positions = pruned(), 0.0, 0
    for row in dev:
        ids = torch.as_tensor(row.input_ids, dtype=torch.long)[None]
        tokens, logprobs = teacher.lookup([row.row], torch.arange(len(row) - 1), len(row))
        with torch.no_grad():
            each = divergence(student(input_ids=ids).logits[0, :-1], tokens, logprobs)
        total, positions = total + float(each.sum()), positions + len(each)
    assert total / positions == pytest.approx(result.first_eval_loss, rel=1e-4)
