import pytest
import torch
from torch import nn

from moesmith.build.stream import decoder_layers, stream_layers
from moesmith.errors import UserError


def test_streamed_inputs_are_what_the_ffn_reads_in_a_plain_forward(dense, chunks):
    path, layers = decoder_layers(dense)
    assert path == "model.layers"
    seen: dict[int, list[torch.Tensor]] = {i: [] for i in range(len(layers))}
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _m, args, i=i: seen[i].append(args[0].flatten(0, 1)))
        for i, layer in enumerate(layers)
    ]
    with torch.no_grad():
        for chunk in chunks:
            dense(chunk)
    for hook in hooks:
        hook.remove()
    for streamed in stream_layers(dense, chunks):
        assert streamed.name == f"model.layers.{streamed.index}"
        torch.testing.assert_close(streamed.ffn_input, torch.cat(seen[streamed.index]))


def test_leaves_no_hook_behind(llama, chunks):
    for _ in stream_layers(llama, chunks):
        break
    assert not any(module._forward_pre_hooks for module in llama.modules())


def test_chunks_of_two_shapes_are_refused(llama, chunks):
    with pytest.raises(ValueError, match="share one shape"):
        next(stream_layers(llama, [chunks[0], chunks[1][:2]]))


def test_model_without_decoder_layers_is_refused():
    with pytest.raises(UserError, match="0 stacks"):
        decoder_layers(nn.Sequential(nn.Linear(2, 2)))
