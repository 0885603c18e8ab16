import pytest
import torch

from moesmith.eval.text_loss import text_loss


def test_equals_the_models_own_loss(model):
    ids = torch.randint(5, 128, (5, 20), generator=torch.Generator().manual_seed(0))
    losses = text_loss(model, ids, batch_size=2)
    assert losses.shape == (5,) and losses.dtype == torch.float64
    with torch.no_grad():
        own = torch.stack([model(input_ids=row[None], labels=row[None]).loss for row in ids])
    torch.testing.assert_close(losses.float(), own)


def test_batch_size_changes_nothing(model):
    ids = torch.randint(5, 128, (5, 20), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(text_loss(model, ids, batch_size=5), text_loss(model, ids, batch_size=1))


def test_progress_and_mode(model):
    done = []
    model.train()
    text_loss(model, torch.randint(5, 128, (5, 8)), batch_size=2, on_batch=done.append)
    assert done == [2, 4, 5] and model.training
    model.eval()


def test_loss_in_fp32_for_a_16_bit_model(model):
    ids = torch.randint(5, 128, (2, 20), generator=torch.Generator().manual_seed(2))
    import copy

    half = copy.deepcopy(model).bfloat16()
    with torch.no_grad():
        logits = half(input_ids=ids).logits[:, :-1].float()
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert float(text_loss(half, ids).mean()) == pytest.approx(float(wanted), abs=1e-6)
