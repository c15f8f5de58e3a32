import math

import pytest
import torch
from torch import nn

from normprop.data import Dataset, Split
from normprop.diagnostics.covariate_shift import shift
from normprop.diagnostics.input_history import InputRecorder, following
from normprop.errors import ConfigError
from normprop.models.mlp import mlp
from normprop.training import TrainConfig
from normprop.training.loop import fit


def network():
    return nn.Sequential(nn.Linear(4, 3), nn.Identity(), nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))


def test_moments_are_those_of_the_layers_inputs():
    model, probe = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3)), torch.randn(6, 3, 8, 8)
    recorder = InputRecorder(model, probe)
    recorder.record(0)
    inputs = model[:2](probe).detach().double().transpose(0, 1).flatten(1)
    assert list(recorder.history.means) == ["2"]
    torch.testing.assert_close(recorder.history.means["2"][0], inputs.mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(recorder.history.stds["2"][0], inputs.std(1, correction=0), rtol=1e-5, atol=1e-6)


def test_rectified_inputs_have_the_mean_that_batch_norm_gives_and_normprop_none():
    """Why the paper's comparison is not like for like: 0.399 against 0 at the start, with no drift in either."""
    found = {}
    for name in ("batch", "normprop"):
        model = mlp(64, 10, name, depth=2, hidden_features=256).train()
        inputs = torch.randn(256, 64)
        for _ in range(40):
            model(inputs)  # running statistics
        recorder = InputRecorder(model, inputs)
        recorder.record(0)
        found[name] = recorder.history.means["3"][0].mean().item()
    assert found["batch"] == pytest.approx(1 / math.sqrt(2 * math.pi), abs=0.03)
    assert found["normprop"] == pytest.approx(0, abs=0.04)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.again = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x):
        return self.again(self.again(self.first(x)))


def test_a_layer_called_twice_counts_with_both_inputs():
    model, probe = Twice(), torch.randn(50, 2)
    recorder = InputRecorder(model, probe)
    recorder.record(0)
    first = model.first(probe)
    both = torch.cat([first, model.again(first)]).detach().double()
    torch.testing.assert_close(recorder.history.means["again"][0], both.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(recorder.history.stds["again"][0], both.std(0, correction=0), rtol=1e-5, atol=1e-6)


def test_following_a_run_of_fit():
    part = Split(torch.randn(80, 4), torch.arange(80) % 2)
    data = Dataset("tiny", ("a", "b"), part, part).split()
    run = following(network, torch.randn(16, 4))
    config = TrainConfig(epochs=2, batch_size=8, accelerator="cpu")
    result = fit(run.build, data, config, callback=run.callback)
    plain = fit(network, data, config)
    history = run.history()
    assert history.steps == tuple(record.step for record in result.curve)
    assert shift(history)[0].drift[-1] > 0
    assert [record.train_loss for record in result.curve] == [record.train_loss for record in plain.curve]
    with pytest.raises(ConfigError, match="no network was built in this process"):
        following(network, torch.randn(16, 4)).history()


def test_errors_are_one_line():
    with pytest.raises(
        ConfigError, match=r"^covariate-shift: Linear has no hidden layer; give two linear maps or more$"
    ):
        InputRecorder(nn.Linear(2, 2), torch.ones(4, 2))
    with pytest.raises(ConfigError, match=r"^covariate-shift: a probe of 1 samples, every=1; .*$"):
        InputRecorder(network(), torch.ones(1, 4))
    with pytest.raises(ConfigError, match=r"every=0"):
        InputRecorder(network(), torch.ones(4, 4), every=0)
