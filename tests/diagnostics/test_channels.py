import pytest
import torch
from torch import nn

from normprop.diagnostics.channels import channel_axis, channel_moments, pooled, recording


def test_axes():
    assert channel_axis(nn.Sequential(nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3))) == 1
    assert channel_axis(nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))) == -1


@pytest.mark.parametrize("axis", [1, 2, -1])
def test_moments_are_over_samples_and_positions(axis):
    values = torch.randn(5, 4, 3, dtype=torch.float64) + 2
    channels = values.movedim(axis, 0).flatten(1)
    mean, var = channel_moments(values, axis)
    torch.testing.assert_close(mean, channels.mean(1))
    torch.testing.assert_close(var, channels.var(1, correction=0))
    assert channel_moments(values.bfloat16(), axis).dtype == torch.float32


def test_inputs_and_outputs_of_calls_are_recorded_and_pooled():
    layer = nn.Linear(3, 3)
    model, x = nn.Sequential(layer, nn.Tanh(), layer), torch.randn(20, 3)
    with recording([("a", layer), ("never", nn.Linear(1, 1))]) as outputs, recording([("a", layer)], True) as inputs:
        model(x)
    hidden = layer(x)
    assert [*outputs] == ["a"]
    for found, expected in ((outputs, [hidden, model(x)]), (inputs, [x, hidden.tanh()])):
        assert not found["a"][0].requires_grad
        mean, var = pooled(torch.stack(found["a"]))
        both = torch.cat(expected).detach()
        torch.testing.assert_close(mean, both.mean(0))
        torch.testing.assert_close(var, both.var(0, correction=0))
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks
