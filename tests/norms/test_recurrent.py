"""The row LSTM block and the layer-norm LSTM against loops over equations, and the networks built of them."""

import pytest
import torch
import torch.nn.functional as F

from normprop import models, moments, nn, norms
from normprop.errors import ConfigError
from normprop.nn.recurrence import cell_constants, live_constants
from normprop.norms.recurrent import LayerNormLSTM


def unit_filters(weight):
    weight = weight - weight.flatten(1).mean(1).reshape(-1, *[1] * (weight.ndim - 1))
    return weight / weight.flatten(1).norm(dim=1).reshape(-1, *[1] * (weight.ndim - 1))


def stirred(module, seed=0):
    """Gains and biases off their initial values."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def gate_laws(linear, hidden, groups, channels):
    """Bias and variance of the gates, (4, channels), the filters of each group being its own f, i, o, g."""
    order = [
        group * 4 * (channels // groups) + gate * (channels // groups) + unit
        for gate in range(4)
        for group in range(groups)
        for unit in range(channels // groups)
    ]
    bias, gain = linear.bias[order].reshape(4, channels), linear.gain[order].reshape(4, channels)
    return order, bias, gain, hidden.gain.reshape(4, channels)


CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)


@torch.no_grad()
@pytest.mark.parametrize(("dims", "groups", "stride"), [(1, 1, 1), (2, 1, 1), (2, 2, 2), (3, 1, 1)])
def test_row_lstm_equals_a_loop_over_rows_and_positions(dims, groups, stride):
    block = stirred(norms.block("recurrent-normprop", dims)(4, 6, 3, stride, 1, groups, activation="tanh").double())
    torch.manual_seed(1)
    input = torch.randn(2, 4, 5, *[3] * (dims - 1), dtype=torch.float64)
    linear, hidden = block.lstm.linear, block.lstm.hidden
    pre = CONVOLUTIONS[dims - 1](input, unit_filters(linear.weight), None, stride, 1, 1, groups)
    pre = pre * linear.gain.reshape(-1, *[1] * dims) + linear.bias.reshape(-1, *[1] * dims)
    order, bias, gain, recurrent_gain = gate_laws(linear, hidden, groups, 6)
    pre = pre[:, order]
    recurrent = unit_filters(hidden.weight) * hidden.gain[:, None]
    (first,) = cell_constants(bias[1:], gain[1:].abs())
    (later,) = cell_constants(bias, (gain**2 + recurrent_gain**2).sqrt())
    expected = torch.empty(pre.shape[0], 6, *pre.shape[2:], dtype=torch.float64)
    flat, out = pre.flatten(3) if dims > 1 else pre.unsqueeze(3), expected.view(*expected.shape[:3], -1)
    for sample in range(flat.shape[0]):
        for position in range(flat.shape[3]):
            h = c = torch.zeros(6, dtype=torch.float64)
            for row in range(flat.shape[2]):
                constants = later if row else first
                f, i, o, g = (flat[sample, :, row, position] + recurrent @ h).reshape(4, 6)
                c = f.sigmoid() * c + i.sigmoid() * (g.tanh() - constants.candidate) * constants.update
                h = o.sigmoid() * c.tanh() * constants.output
                out[sample, :, row, position] = h
    expected = expected.tanh() / moments.of("tanh").std
    torch.testing.assert_close(block(input), expected)


@torch.no_grad()
def test_for_a_linear_layer_it_is_the_first_step_of_the_lstm():
    block = stirred(norms.block("recurrent-normprop", 0)(4, 3, activation=None).double())
    torch.manual_seed(1)
    input = torch.randn(5, 4, dtype=torch.float64)
    linear = block.lstm.linear
    i, o, g = F.linear(input, unit_filters(linear.weight) * linear.gain[:, None], linear.bias).chunk(3, 1)
    cell = i.sigmoid() * (g.tanh() - moments.of("tanh", linear.bias[6:], linear.gain[6:].abs()).mean)
    second = [moments.of("sigmoid", linear.bias[k], linear.gain[k].abs()).second for k in (slice(3), slice(3, 6))]
    cell = cell / (second[0] * moments.of("tanh", linear.bias[6:], linear.gain[6:].abs()).var).sqrt()
    expected = o.sigmoid() * cell.tanh() / (second[1] * moments.of("tanh").second).sqrt()
    torch.testing.assert_close(block(input), expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("dims", [0, 1, 2, 3])
@pytest.mark.parametrize("activation", [None, "relu", "tanh", torch.nn.PReLU()])
def test_outputs_have_mean_0_and_variance_1(dims, activation):
    """As far as h is Gaussian: it is bounded and flat instead (kurtosis 2.4), which moves relu by some hundredths."""
    torch.manual_seed(0)
    sizes = [(), (24,), (24, 4), (24, 2, 2)][dims]
    block = norms.block("recurrent-normprop", dims)(64, 64, *([1] if dims else []), activation=activation)
    output = block(torch.randn(1000 if dims == 0 else 60, 64, *sizes))
    assert output.mean().abs() < 0.1
    # tanh flattens the first step's h further (variance 1.15 in a linear layer).
    assert output.var().item() == pytest.approx(1.0, abs=0.2 if dims == 0 else 0.08)
    if dims:
        assert output[:, :, 0].var().item() == pytest.approx(1.0, abs=0.2)


def test_activation_is_normalised_per_channel_where_it_learns_per_channel():
    activation = torch.nn.PReLU(3)
    with torch.no_grad():
        activation.weight.copy_(torch.tensor([0.0, 0.5, 1.0]))
    block = norms.block("recurrent-normprop", 2)(4, 3, 1, activation=activation)
    plain = norms.block("recurrent-normprop", 2)(4, 3, 1, activation=None)
    plain.lstm.load_state_dict(block.lstm.state_dict())
    input = torch.randn(2, 4, 3, 3)
    hidden = plain(input)
    for channel, slope in enumerate((0.0, 0.5, 1.0)):
        law = moments.of(torch.nn.LeakyReLU(slope))
        expected = (F.leaky_relu(hidden[:, channel], slope) - law.mean) / law.std
        torch.testing.assert_close(block(input)[:, channel], expected, rtol=1e-4, atol=1e-5)
    block(input).square().sum().backward()
    assert activation.weight.grad.abs().min() > 0


def test_one_row_is_the_first_step_and_rows_below_do_not_matter():
    torch.manual_seed(0)
    block = norms.block("recurrent-normprop", 2)(4, 3, 1, activation=None)
    input = torch.randn(2, 4, 5, 3)
    output = block(input)
    torch.testing.assert_close(block(input[:, :, :1]), output[:, :, :1])
    changed = input.clone()
    changed[:, :, 3:] += torch.randn(2, 4, 2, 3)
    torch.testing.assert_close(block(changed)[:, :, :3], output[:, :, :3])
    assert (block(changed) - output)[:, :, 4].abs().max() > 1e-2


def test_live_constants_follow_gain_and_bias():
    lstm = nn.LSTM(4, 3)
    layer = lstm.layers[0]
    before = live_constants(layer.input.output_moments(), layer.hidden)[1]
    with torch.no_grad():
        layer.input.bias[0] = 2.0  # unit 0 forgets less: less needs to come in
        layer.input.bias[6 + 1] = -2.0  # unit 1 shows less: its output is amplified
    after = live_constants(layer.input.output_moments(), layer.hidden)[1]
    assert after.update[0] < before.update[0]
    assert after.output[1] > before.output[1]
    torch.testing.assert_close(after.update[1:], before.update[1:])


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm_lstm_equals_the_textbook_loop(bias):
    torch.manual_seed(0)
    lstm = stirred(LayerNormLSTM(3, 4, bias=bias, forget_bias=1.0 if bias else 0.0).double())
    layer = lstm.layers[0]
    input = torch.randn(5, 2, 3, dtype=torch.float64)

    def norm(value, module):
        value = (value - value.mean()) / (value.var(correction=0) + 1e-5).sqrt()
        return value * module.weight + (0.0 if module.bias is None else module.bias)

    output, (hidden, cell) = lstm(input)
    for sample in range(2):
        h = c = torch.zeros(4, dtype=torch.float64)
        for t in range(5):
            total = norm(layer.input.weight @ input[t, sample], layer.input_norm)
            f, i, o, g = (total + norm(layer.hidden.weight @ h, layer.hidden_norm)).chunk(4)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * norm(c, layer.cell_norm).tanh()
            torch.testing.assert_close(output[t, sample], h)
        torch.testing.assert_close((hidden[0, sample], cell[0, sample]), (h, c))
    torch.testing.assert_close(lstm(input, (torch.zeros(1, 2, 4).double(), torch.zeros(1, 2, 4).double()))[0], output)


def test_forget_bias_of_the_layer_norm_lstm():
    assert LayerNormLSTM(3, 2, forget_bias=1.0).layers[0].input_norm.bias.tolist() == [1.0] * 2 + [0.0] * 6
    with pytest.raises(ConfigError, match="LayerNormLSTM: forget_bias=1 needs bias=True"):
        LayerNormLSTM(3, 2, bias=False, forget_bias=1.0)


def test_residual_and_head_are_normprops():
    assert norms.method("recurrent-normprop").residual is nn.Residual
    head = norms.head("recurrent-normprop", 0)(4, 3)
    assert isinstance(head, nn.Linear)
    with pytest.raises(ConfigError, match="no drop-in layer"):
        norms.create("recurrent-normprop", 4)


@pytest.mark.parametrize("norm", ["none", "layer", "recurrent-normprop"])
def test_lstm_network_reads_rows_from_top_to_bottom(norm):
    torch.manual_seed(0)
    network = models.create("lstm", (2, 5, 3), 4, norm=norm, width=0.125)
    images = torch.randn(3, 2, 5, 3, requires_grad=True)
    logits = network(images)
    assert logits.shape == (3, 4)
    sequence = torch.stack([images[:, :, row].flatten(1) for row in range(5)])
    torch.testing.assert_close(network[1](network[0].lstm(sequence)[0][-1]), logits)
    logits[0].square().sum().backward()
    assert images.grad[0].abs().amin() > 0
    assert images.grad[1:].abs().max() == 0


def test_lstm_network_says_which_methods_it_has():
    with pytest.raises(ConfigError, match="no LSTM with norm 'batch'; there are none, layer, recurrent-normprop"):
        models.create("lstm", (1, 8, 8), 10, norm="batch")
    with pytest.raises(ConfigError, match="takes images"):
        models.create("lstm", (64,), 10, norm="layer")


@pytest.mark.parametrize("norm", ["layer", "recurrent-normprop"])
def test_lstm_networks_learn_a_sum_over_rows(norm):
    torch.manual_seed(0)
    network = models.lstm((1, 6, 4), 2, norm=norm, hidden_features=32)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(150):
        images = torch.randn(32, 1, 6, 4)
        loss = F.cross_entropy(network(images), (images[:, 0, :, 0].sum(1) > 0).long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.5
    assert sum(losses[-10:]) / 10 < 0.45  # log 2 = 0.69 by chance
