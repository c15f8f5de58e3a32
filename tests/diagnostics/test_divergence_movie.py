import copy
import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from normprop import models
from normprop.diagnostics.diagnosis import Subject
from normprop.diagnostics.divergence_movie import Movie, describe, diverging_rate, measure, movie
from normprop.errors import ConfigError
from normprop.models.mlp import mlp


def data(samples=64, features=6, classes=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(samples, features, generator=generator, dtype=dtype)
    return inputs, torch.arange(samples) % classes


def perceptron(norm="none"):
    torch.manual_seed(0)
    return models.create("mlp", (6,), 3, norm=norm, width=0.1)


@pytest.mark.parametrize("rate", [0.5, 0.9, 1.3])
def test_linear_unit_in_closed_form(rate):
    """w <- (1 - 2 rate E x^2) w: mean and variance of the output are powers of that factor."""
    torch.manual_seed(0)
    x = torch.randn(50, 1, dtype=torch.float64) + 0.5
    model = nn.Linear(1, 1, bias=False).double()
    w, factor = model.weight.item(), 1 - 2 * rate * float(x.square().mean())
    found = movie(model, [(x, torch.zeros_like(x))], rate, steps=40, loss=F.mse_loss)
    for step, loss in enumerate(found.losses):
        scale = w * factor**step
        assert loss == pytest.approx(scale**2 * float(x.square().mean()), rel=1e-9)
        assert found.means[0][step].item() == pytest.approx(scale * float(x.mean()), rel=1e-9)
        assert found.variances[0][step].item() == pytest.approx(scale**2 * float(x.var(correction=0)), rel=1e-9)
    assert found.diverged == (abs(factor) > 1)
    assert len(found.losses) == (40 if not found.diverged else sum(loss <= 1e3 for loss in found.losses) + 1)
    assert found.growth.item() == pytest.approx(factor ** (2 * found.last), rel=1e-9)
    assert found.last == len(found.losses) - 1


def test_limit_of_a_linear_unit_is_two_over_the_curvature():
    x = torch.tensor([[1.0], [2.0]], dtype=torch.float64)  # E x^2 = 2.5, so the limit is 2 / 5
    model = nn.Linear(1, 1, bias=False).double()
    batch = [(x, torch.zeros_like(x))]
    rates = [0.41, 0.38, 0.39, 0.5]
    assert diverging_rate(model, batch, rates, steps=400, loss=F.mse_loss) == 0.41
    assert diverging_rate(model, batch, [0.1, 0.39], steps=400, loss=F.mse_loss) is None


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_frames_against_a_loop_by_hand(momentum):
    model, (x, y) = perceptron(), data()
    batches = [(x[:32], y[:32]), (x[32:], y[32:])]
    found = movie(model, batches, 0.05, steps=5, momentum=momentum)
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=momentum)
    for step in range(5):
        inputs, labels = batches[step % 2]
        hidden = twin[0](inputs)
        for index, layer in enumerate(list(twin)[1:]):
            hidden = layer(hidden)
            torch.testing.assert_close(found.means[index][step], hidden.detach().mean(0))
            torch.testing.assert_close(found.variances[index][step], hidden.detach().var(0, correction=0))
        loss = F.cross_entropy(hidden, labels)
        assert found.losses[step] == pytest.approx(loss.item(), rel=1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert found.layers == ("1", "2", "3", "4", "5")
    assert not found.diverged


def test_channels_of_images_tokens_and_repeated_calls():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.token = nn.Conv2d(2, 5, 3), nn.Linear(5, 5)

        def forward(self, x):
            self.maps = self.conv(x)
            self.first = self.token(self.maps.flatten(2).mT)
            self.second = self.token(self.first)
            return self.second.mean(1)

    torch.manual_seed(0)
    net = Net().double()
    x = torch.randn(4, 2, 6, 7, dtype=torch.float64)
    found = movie(net, [(x, torch.arange(4))], 1e-9, steps=1)
    net(x)
    assert [values.shape for values in found.means] == [(1, 5), (1, 5)]
    torch.testing.assert_close(found.means[0][0], net.maps.detach().mean((0, 2, 3)))
    torch.testing.assert_close(found.variances[0][0], net.maps.detach().var((0, 2, 3), correction=0))
    both = torch.cat([net.first, net.second]).detach()
    torch.testing.assert_close(found.means[1][0], both.mean((0, 1)))
    torch.testing.assert_close(found.variances[1][0], both.var((0, 1), correction=0))


def test_moments_grow_with_depth_and_step_without_a_norm():
    torch.manual_seed(0)
    x, y = data(128)
    deep = mlp((6,), 3, norm="none", depth=6, hidden_features=32)
    rate = diverging_rate(deep, [(x, y)], [10 ** (k / 4) for k in range(-8, 9)])
    found = movie(deep, [(x, y)], rate)
    assert found.diverged
    assert found.losses[-1] > 100 * found.losses[0]
    hidden = found.growth[:-1].log()
    depth = torch.arange(len(hidden), dtype=hidden.dtype)
    assert torch.corrcoef(torch.stack([depth, hidden]))[0, 1] > 0.8
    assert hidden[-1] > hidden[0] + math.log(10)
    # Normalised hidden layers do not grow with depth, even where the run is lost.
    normed = mlp((6,), 3, norm="batch", depth=6, hidden_features=32)
    other = movie(normed, [(x, y)], diverging_rate(normed, [(x, y)]))
    assert other.diverged
    assert other.rate > rate
    assert other.growth[-2] / other.growth[0] < 0.01 * found.growth[-2] / found.growth[0]


def test_a_loss_that_is_not_finite_ends_the_movie():
    x, y = data()
    found = movie(perceptron(), [(x, y)], 1e30, steps=50)
    assert not math.isfinite(found.losses[-1]) or found.losses[-1] > 1e3
    assert all(math.isfinite(loss) and loss <= 1e3 for loss in found.losses[:-1])
    nans = movie(perceptron(), [(x * math.nan, y)], 0.1)
    assert len(nans.losses) == 1
    assert nans.diverged
    assert nans.last == 0
    document = describe({"none": nans})
    assert "was nan after 0 steps" in document.found
    assert "without measure" in document.found
    json.dumps(document.numbers, allow_nan=False)


def test_last_frame_is_the_last_finite_one():
    frames = torch.tensor([[1.0], [4.0], [math.inf]])
    found = Movie(1.0, 1e3, ("0",), (1.0, 2.0, math.nan), (torch.zeros(3, 1),), (frames,))
    assert found.last == 1
    assert found.growth.tolist() == [4.0]
    overflowed = Movie(1.0, 1e3, ("0",), (1.0, 2.0, math.nan), (frames,), (torch.ones(3, 1),))
    assert overflowed.last == 1


@pytest.mark.parametrize("norm", ["batch", "normprop", "none"])
def test_network_and_random_state_are_left_alone(norm):
    torch.manual_seed(0)
    model = nn.Sequential(perceptron(norm), nn.Dropout(0.2)).eval()
    x, y = data()
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(3)
    state = torch.get_rng_state()
    with torch.no_grad():
        found = measure(Subject(norm, model, x, y), steps=10)
    assert found.diverged == (norm != "normprop")  # whose constraint bounds each update, whatever the rate
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not any(part.training for part in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(part._forward_hooks for part in model.modules())


def test_measure_is_the_movie_just_above_the_limit():
    x, y = data()
    subject, batches = Subject("none", perceptron(), x, y), [(x[:32], y[:32]), (x[32:], y[32:])]
    found = measure(subject, rates=[0.01, 100.0], steps=20, batch_size=32)
    tried = [0.1, 1.0, 10.0, 100.0]
    assert found.rate == pytest.approx(diverging_rate(subject.model, batches, tried, 20))
    assert found.rate < 100.0
    assert found.losses == movie(subject.model, batches, found.rate, 20).losses
    only = measure(subject, rates=[1000.0], steps=20)
    assert (only.rate, only.diverged) == (1000.0, True)
    borne = measure(subject, rates=[0.001, 0.01], steps=5)
    assert (borne.rate, borne.diverged, len(borne.losses)) == (0.01, False, 5)
    assert "the loss was still " in describe({"none": borne}).found


def test_describe_one_and_two():
    def frames(*values):
        return tuple(torch.tensor([[1.0, 1.0], [value, value]]) for value in values)

    layers = ("0", "1", "2")
    lost = Movie(0.316, 1e3, layers, (2.3, 5000.0), frames(1, 2, 3), frames(2.0, 50.0, 1e6))
    borne = Movie(10.0, 1e3, layers, (2.3, 1.5), frames(1, 1, 1), frames(1.0, 1.5, 0.5))
    one = describe({"none": lost})
    assert one.found == (
        "none: at a learning rate of 0.316 the loss was 5e+03 after 1 step; the variance of the channels changed "
        "2-fold in the first layer, 50-fold in the last hidden one, 1e+06-fold in the last."
    )
    two = describe({"batch": borne, "none": lost})
    first, second = two.found.splitlines()
    assert first.startswith("batch: at a learning rate of 10 the loss was still 1.5 after 1 step;")
    assert second == one.found
    assert [line.name for line in two.figures[1].lines] == ["batch", "none"]
    assert list(two.figures[1].lines[1].y) == [2.0, 50.0, 1e6]
    assert two.figures[2].title.startswith("none")  # the run that diverged
    assert two.figures[2].rows == layers
    assert two.figures[2].values[2] == [0.0, pytest.approx(6.0)]
    numbers = json.loads(json.dumps(two.numbers, allow_nan=False))
    assert numbers["none"]["growth of the variance"] == [2.0, 50.0, 1e6]
    assert numbers["none"]["mean size, last finite frame"] == [1.0, 2.0, 3.0]
    assert numbers["batch"]["diverged"] == "no"
    assert two.title.endswith("?")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: movie(perceptron(), [], 0.1), "0 batches and 100 steps"),
        (lambda: movie(perceptron(), [data()], 0.1, steps=0), "1 batches and 0 steps"),
        (lambda: movie(nn.ReLU(), [data()], 0.1), "ReLU has no linear map to watch"),
        (lambda: measure(Subject("net", perceptron(), data()[0])), "net: the loss needs labels"),
        (lambda: measure(Subject("net", perceptron(), *data()), rates=[]), "no rates to try"),
    ],
)
def test_errors_are_one_line(call, message):
    with pytest.raises(ConfigError) as raised:
        call()
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
