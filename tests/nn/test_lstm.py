"""NormProp's LSTM against a textbook float64 loop, Monte Carlo, and what mean-field theory predicts."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from scipy import integrate

from normprop import nn
from normprop.errors import ConfigError
from normprop.functional import normalize_weight
from normprop.nn.recurrence import CellConstants, cell_constants, fixed_constants, live_constants, recur, step
from normprop.training.unit_norm import constrain


def gaussian(function, mean=0.0, std=1.0):
    """E[function(Z)] for Z ~ N(mean, std^2) by adaptive quadrature."""
    density = 1 / math.sqrt(2 * math.pi)
    return integrate.quad(lambda x: function(mean + std * x) * math.exp(-x * x / 2) * density, -9, 9, epsabs=1e-12)[0]


def sigmoid(z):
    return 1 / (1 + math.exp(-z))


def constants_by_quadrature(bias, std, first_std):
    """Candidate mean, factors of update and output of one unit (f, i, o, g), for the first and the later steps."""
    result = []
    for spread, remembers in ((first_std, False), (std, True)):
        f, i, o = (gaussian(lambda z: sigmoid(z) ** 2, m, s) for m, s in zip(bias[:3], spread[:3], strict=True))
        centre = gaussian(math.tanh, bias[3], spread[3])
        var = gaussian(lambda z, centre=centre: (math.tanh(z) - centre) ** 2, bias[3], spread[3])
        update = math.sqrt((1 - f if remembers else 1) / (i * var))
        result.append((centre, update, 1 / math.sqrt(o * gaussian(lambda z: math.tanh(z) ** 2))))
    return result


def textbook(layer, input, state=None):
    """One direction of one layer as equations, in numpy, one sample and one unit at a time."""

    def unit_rows(weight):
        weight = weight.detach().double().numpy()
        if layer.input.center:
            weight = weight - weight.mean(1, keepdims=True)
        return weight / np.linalg.norm(weight, axis=1, keepdims=True)

    inputs, recurrent = unit_rows(layer.input.weight), unit_rows(layer.hidden.weight)
    gx, gh = (part.gain.detach().double().numpy() for part in (layer.input, layer.hidden))
    size = recurrent.shape[1]
    bias = np.zeros(4 * size) if layer.input.bias is None else layer.input.bias.detach().double().numpy()
    if layer.input.moments == "live":
        std = np.sqrt(gx**2 + gh**2).reshape(4, size)
        laws = [
            constants_by_quadrature(*(v[:, j] for v in (bias.reshape(4, size), std, np.abs(gx).reshape(4, size))))
            for j in range(size)
        ]
    else:
        laws = [constants_by_quadrature([0, 0, 0, 0], [1] * 4, [math.sqrt(0.9)] * 4)] * size
    outputs = np.zeros((*input.shape[:2], size))
    ends = np.zeros((2, input.shape[1], size))
    for n in range(input.shape[1]):
        h = c = None
        if state is not None:
            h, c = (value[n].double().numpy() for value in state)
        for t in range(input.shape[0]):
            a = gx * (inputs @ input[t, n].double().numpy()) + bias
            first = h is None
            if first:
                h, c = np.zeros(size), np.zeros(size)
            a = a + gh * (recurrent @ h)
            h, c = h.copy(), c.copy()
            for j in range(size):
                mean, update, scale = laws[j][0 if first else 1]
                f, i, o = (sigmoid(a[gate * size + j]) for gate in range(3))
                c[j] = f * c[j] + i * (math.tanh(a[3 * size + j]) - mean) * update
                h[j] = o * math.tanh(c[j]) * scale
            outputs[t, n] = h
        ends[0, n], ends[1, n] = h, c
    return torch.tensor(outputs), torch.tensor(ends[0]), torch.tensor(ends[1])


def stirred(module, seed=0):
    """Gains and biases off their initial values."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def cells(layer, input):
    """Cells and hidden states of all steps of a single layer."""
    weight = normalize_weight(layer.hidden.weight, layer.hidden.gain, center=layer.hidden.center)
    first, later = live_constants(layer.input.output_moments(), layer.hidden)
    gates = layer.input(input)
    hidden, cell = step(gates[0][:, layer.hidden.in_features :], None, first)
    states = [(hidden, cell)]
    for part in gates[1:]:
        hidden, cell = step(part + hidden @ weight.t(), cell, later)
        states.append((hidden, cell))
    return torch.stack([s[1] for s in states]), torch.stack([s[0] for s in states])


@pytest.mark.parametrize("forget_bias", [0.0, 1.0, -2.0])
def test_constants_at_the_initial_gains(forget_bias):
    expected = constants_by_quadrature([forget_bias, 0, 0, 0], [1] * 4, [math.sqrt(0.9)] * 4)
    for constants, wanted in zip(fixed_constants(forget_bias), expected, strict=True):
        assert tuple(constants) == pytest.approx(wanted, rel=1e-6, abs=1e-9)


def test_numbers_at_zero_bias():
    forget, power = gaussian(lambda z: sigmoid(z) ** 2), gaussian(lambda z: math.tanh(z) ** 2)
    assert (forget, power) == pytest.approx((0.2933790, 0.3942945), abs=1e-7)
    update, output = fixed_constants(0.0)[1][1:]
    assert update == pytest.approx(math.sqrt((1 - 0.2933790) / (0.2933790 * 0.3942945)), rel=1e-6)
    assert 1 / output == pytest.approx(0.340114, abs=1e-6)


def test_constants_of_any_gains_and_biases_by_monte_carlo():
    torch.manual_seed(0)
    mean, std = torch.randn(4, 6, dtype=torch.float64), 0.3 + torch.rand(4, 6, dtype=torch.float64)
    (constants,) = cell_constants(mean, std)
    z = mean + std * torch.randn(200_000, 4, 6, dtype=torch.float64)
    f, i, o = z[:, :3].sigmoid().unbind(1)
    g = z[:, 3].tanh()
    cell = torch.randn_like(f)
    new = f * cell + i * (g - constants.candidate) * constants.update
    hidden = o * cell.tanh() * constants.output
    # Standard errors at 200,000 draws: 0.0022 for means of variance 1, 0.0022 * sqrt(kurtosis - 1) for the variances.
    for value in (new, hidden):
        assert value.mean(0).abs().max() < 0.01
        assert (value.var(0) - 1).abs().max() < 0.03


@pytest.mark.parametrize("moments", ["live", "fixed"])
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("given", [False, True])
def test_layer_equals_the_textbook_loop(moments, center, given):
    torch.manual_seed(1)
    lstm = stirred(nn.LSTM(4, 3, center=center, moments=moments, dtype=torch.float64))
    input = torch.randn(6, 2, 4, dtype=torch.float64)
    state = (torch.randn(1, 2, 3).double(), torch.randn(1, 2, 3).double()) if given else None
    output, (hidden, cell) = lstm(input, state)
    expected = textbook(lstm.layers[0], input, None if state is None else (state[0][0], state[1][0]))
    for value, wanted in zip((output, hidden[0], cell[0]), expected, strict=True):
        # Fixed quadrature is good to about 1e-6.
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-5)


def test_layers_and_directions_are_wired_as_torchs():
    """torch's own LSTM with ours in place of its layers: order of states, concatenation, reversal."""
    torch.manual_seed(0)
    lstm = stirred(nn.LSTM(3, 4, num_layers=2, batch_first=True, bidirectional=True, dtype=torch.float64))
    input = torch.randn(2, 5, 3, dtype=torch.float64)
    h0, c0 = torch.randn(2, 4, 2, 4, dtype=torch.float64)
    output, (hidden, cell) = lstm(input, (h0, c0))
    theirs = torch.nn.LSTM(3, 4, num_layers=2, batch_first=True, bidirectional=True, dtype=torch.float64)
    expected_output, (expected_hidden, _) = theirs(input, (h0, c0))
    assert output.shape == expected_output.shape
    assert hidden.shape == cell.shape == expected_hidden.shape
    level = input.transpose(0, 1)
    for depth in range(2):
        forward, backward = lstm.layers[2 * depth], lstm.layers[2 * depth + 1]
        first = forward(level, (h0[2 * depth], c0[2 * depth]))
        second = backward(level.flip(0), (h0[2 * depth + 1], c0[2 * depth + 1]))
        level = torch.cat([first[0], second[0].flip(0)], 2)
        assert torch.equal(hidden[2 * depth], first[1][0])
        assert torch.equal(cell[2 * depth + 1], second[1][1])
    assert torch.equal(output, level.transpose(0, 1))
    # As in torch: the last hidden states are the forward output of the last step and the backward one of the first.
    assert torch.equal(hidden[2], output[:, -1, :4])
    assert torch.equal(hidden[3], output[:, 0, 4:])
    alone, (hidden_alone, _) = lstm(input[0], (h0[:, 0], c0[:, 0]))
    torch.testing.assert_close(alone, output[0])
    torch.testing.assert_close(hidden_alone, hidden[:, 0])


def test_a_sequence_in_two_parts_is_the_whole():
    torch.manual_seed(0)
    lstm = stirred(nn.LSTM(3, 4, num_layers=2))
    input = torch.randn(9, 2, 3)
    output, (hidden, cell) = lstm(input)
    first, state = lstm(input[:4])
    second, state = lstm(input[4:], state)
    torch.testing.assert_close(torch.cat([first, second]), output)
    torch.testing.assert_close(state, (hidden, cell))


@pytest.mark.parametrize("moments", ["live", "fixed"])
def test_gradients(moments):
    torch.manual_seed(0)
    lstm = stirred(nn.LSTM(3, 2, moments=moments, center=False, dtype=torch.float64))
    input = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    state = tuple(torch.randn(2, 1, 2, 2, dtype=torch.float64).requires_grad_().unbind(0))
    names, parameters = zip(*lstm.named_parameters(), strict=True)

    def run(input, h, c, *values):
        results = []
        for start in (None, (h, c)):
            present = dict(zip(names, values, strict=True))
            output, (hidden, cell) = torch.func.functional_call(lstm, present, (input, start))
            results += [output, hidden, cell]
        return tuple(results)

    assert torch.autograd.gradcheck(run, (input, *state, *parameters), fast_mode=True)


@torch.no_grad()
@pytest.mark.parametrize("forget_bias", [0.0, 1.0])
def test_variances_are_exactly_1_without_a_recurrent_part(forget_bias):
    torch.manual_seed(0)
    lstm = nn.LSTM(64, 128, forget_bias=forget_bias).double()
    lstm.layers[0].hidden.gain.zero_()
    lstm.layers[0].input.gain.fill_(1.0)
    # Orthogonal rows within a unit, so that its gates are independent: then nothing is left of the approximations.
    blocks = torch.linalg.qr(torch.randn(128, 63, 4, dtype=torch.float64))[0].permute(2, 0, 1)
    centred = torch.linalg.qr(torch.cat([torch.ones(64, 1), torch.randn(64, 63)], 1).double())[0][:, 1:]
    lstm.layers[0].input.weight.copy_((blocks @ centred.t()).reshape(512, 64))
    cell, hidden = cells(lstm.layers[0], torch.randn(600, 16, 64, dtype=torch.float64))
    # 9,600 draws of 128 units, neighbours in time correlated by E[f] (0.5 or 0.7): about 200,000 independent ones.
    assert cell.var().item() == pytest.approx(1.0, abs=0.02)
    assert cell[0].var().item() == pytest.approx(1.0, abs=0.1)
    assert cell.mean((0, 1)).abs().max() < 0.07
    # The cell is not quite Gaussian: its tanh has a little less or more power than that of N(0, 1).
    expected = cell.tanh().square().mean().item() / gaussian(lambda z: math.tanh(z) ** 2)
    assert hidden.var().item() == pytest.approx(expected, rel=0.01)
    assert hidden.var().item() == pytest.approx(1.0, abs=0.03)


@torch.no_grad()
def test_variances_over_1000_steps_are_as_theory_predicts():
    """Independent inputs, random weights, default gains: Var c is a little above 1, by as much as memory adds."""
    torch.manual_seed(0)
    cell, hidden = cells(nn.LSTM(64, 128).layers[0], torch.randn(1000, 16, 64))
    # First order in gamma_h^2 = 0.1: lag-n correlation of h is E[o]^2 slope^2 E[f]^n / 0.340114^2 with slope the mean
    # of tanh', candidates inherit 0.1 slope^2 of it, and the cell adds the candidates up.
    slope = gaussian(lambda z: 1 / math.cosh(z) ** 2)
    update, forget = fixed_constants(0.0)[1].update, 0.2933790
    lags = sum(0.5 ** (n - 1) * 0.1 * slope**2 * 0.25 / 0.340114**2 * slope**2 * 0.5**n for n in range(1, 40))
    predicted = 1 + 2 * update**2 * 0.5 * 0.25 * lags / (1 - forget)
    assert predicted == pytest.approx(1.042, abs=0.001)
    early, late = cell[20:200].var().item(), cell[800:].var().item()
    # Higher orders (h has variance 1.04 itself) add about as much again as a third of it.
    assert predicted - 0.01 < early < predicted + 0.04
    assert late == pytest.approx(early, abs=0.03)
    assert hidden[20:].var().item() == pytest.approx(1.03, abs=0.03)
    assert cell.mean().abs() < 0.03


@torch.no_grad()
def test_dividing_the_whole_cell_update_would_not_be_stable():
    """(f c + i g) / 0.639575 has variance 1 for independent gates, but in a network it grows without bound."""
    torch.manual_seed(0)
    layer = nn.LSTM(32, 64).layers[0]
    layer.input.gain.fill_(math.sqrt(0.5))
    layer.hidden.gain.fill_(math.sqrt(0.5))
    weight = normalize_weight(layer.hidden.weight, layer.hidden.gain, center=True)
    hidden = cell = divided = divided_hidden = torch.zeros(8, 64)
    later = fixed_constants(0.0)[1]
    for part in layer.input(torch.randn(200, 8, 32)):
        hidden, cell = step(part + hidden @ weight.t(), cell, later)
        f, i, o, g = (part + divided_hidden @ weight.t()).chunk(4, 1)
        divided = (f.sigmoid() * divided + i.sigmoid() * g.tanh()) / 0.639575
        divided_hidden = o.sigmoid() * divided.tanh() / 0.340114
    assert divided.square().mean() > 100
    assert cell.square().mean() < 3


@pytest.mark.parametrize("value", [0.0, 1.0, 30.0])
def test_constant_inputs_keep_states_and_gradients_finite(value):
    torch.manual_seed(0)
    lstm = nn.LSTM(8, 16, forget_bias=1.0)
    input = value * torch.linspace(-1, 1, 8).expand(1000, 2, 8)
    with torch.no_grad():
        # Each step adds at most 2.04, however long a forget gate stays near 1.
        assert lstm(input)[1][1].abs().max() <= 2.05 * 1000
    # At input 0 the network rests at a point that repels: gradients grow by up to 1.2 per step there.
    lstm(input[:200])[0].sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in lstm.parameters())


def test_gradients_do_not_explode_over_200_steps():
    norms = {}
    for name, build in (("ours", nn.LSTM), ("torch", torch.nn.LSTM)):
        torch.manual_seed(0)
        input = torch.randn(200, 4, 64, requires_grad=True)
        build(64, 128)(input)[0][-1].square().sum().backward()
        norms[name] = input.grad.flatten(1).norm(dim=1).flip(0)
    assert norms["ours"].argmax() == 0
    assert norms["ours"][199] < norms["ours"][0]
    # Ten steps back torch's initial LSTM has lost 99 % of its gradient, ours not.
    assert norms["torch"][10] < 0.01 * norms["torch"][0]
    assert norms["ours"][10] > 0.02 * norms["ours"][0]


def test_samples_do_not_depend_on_each_other_and_training_is_evaluation():
    torch.manual_seed(0)
    lstm = nn.LSTM(4, 8, num_layers=2).double()
    input = torch.randn(7, 5, 4, dtype=torch.float64)
    output = lstm(input)[0]
    changed = input.clone()
    changed[:, 1:] += 3.0
    torch.testing.assert_close(lstm(changed)[0][:, 0], output[:, 0])
    torch.testing.assert_close(lstm.eval()(input[:, :1])[0], output[:, :1])


def test_forget_bias_starts_the_bias_of_the_forget_gates_alone():
    lstm = nn.LSTM(4, 3, forget_bias=1.5, bidirectional=True)
    for layer in lstm.layers:
        assert layer.input.bias.tolist() == [1.5] * 3 + [0.0] * 9
    live = live_constants(lstm.layers[0].input.output_moments(), lstm.layers[0].hidden)
    for constants, wanted in zip(live, fixed_constants(1.5), strict=True):
        for value, number in zip(constants, wanted, strict=True):
            torch.testing.assert_close(value, torch.full((3,), number), rtol=1e-5, atol=1e-6)


def test_the_unit_norm_constraint_holds_both_maps_and_changes_nothing():
    torch.manual_seed(0)
    lstm = nn.LSTM(4, 8)
    input = torch.randn(5, 2, 4)
    before = lstm(input)[0]
    optimizer = torch.optim.SGD(lstm.parameters(), lr=0.5)
    constrain(optimizer, lstm)
    torch.testing.assert_close(lstm(input)[0], before)
    lstm(input)[0].square().sum().backward()
    optimizer.step()
    for part in (lstm.layers[0].input, lstm.layers[0].hidden):
        torch.testing.assert_close(part.weight.norm(dim=1), torch.ones(32))


def test_copies_state_dict_and_empty_batch():
    torch.manual_seed(0)
    lstm, input = stirred(nn.LSTM(3, 4, num_layers=2)), torch.randn(5, 2, 3)
    output = lstm(input)[0]
    other = nn.LSTM(3, 4, num_layers=2)
    other.load_state_dict(lstm.state_dict())
    for copied in (copy.deepcopy(lstm), pickle.loads(pickle.dumps(lstm)), other):
        assert torch.equal(copied(input)[0], output)
    assert lstm(input[:, :0])[0].shape == (5, 0, 4)


@pytest.mark.parametrize("moments", ["live", "fixed"])
def test_half_precision_and_autocast_stay_close(moments):
    torch.manual_seed(0)
    lstm, input = nn.LSTM(16, 32, moments=moments), torch.randn(20, 4, 16)
    output = lstm(input)[0]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = lstm(input)[0]
    half = copy.deepcopy(lstm).bfloat16()(input.bfloat16())[0]
    assert mixed.dtype == half.dtype == torch.bfloat16
    # bfloat16 rounds to 2^-9; the cell's memory of about two steps adds up a few of these.
    assert (mixed - output).abs().max() < 0.1
    assert (half - output).abs().max() < 0.1
    half.sum().backward()


def test_compiles():
    # With fixed moments, which compile quickly; the row LSTM block compiles with live ones in the blocks' own test.
    torch.manual_seed(0)
    lstm, input = stirred(nn.LSTM(3, 4, moments="fixed")), torch.randn(2, 2, 3)
    compiled = torch.compile(copy.deepcopy(lstm), backend="aot_eager")
    lstm(input)[0].square().sum().backward()
    output = compiled(input)[0]
    output.square().sum().backward()
    torch.testing.assert_close(output, lstm(input)[0])
    for first, second in zip(compiled.parameters(), lstm.parameters(), strict=True):
        torch.testing.assert_close(first.grad, second.grad, rtol=1e-4, atol=1e-5)


def test_numbers_and_tensors_give_the_same_recurrence():
    torch.manual_seed(0)
    gates, weight = torch.randn(4, 2, 12), torch.randn(12, 3)
    first, later = CellConstants(0.1, 1.5, 2.0), CellConstants(-0.2, 0.7, 1.5)
    tensors = [CellConstants(*(torch.full((3,), float(v)) for v in (0.0, *c[1:]))) for c in (first, later)]
    torch.testing.assert_close(
        recur(gates, weight, None, *tensors)[0],
        recur(gates, weight, None, first._replace(candidate=0.0), later._replace(candidate=0.0))[0],
    )


def test_errors():
    with pytest.raises(ConfigError, match="hidden_size must be a whole number above zero, got 0"):
        nn.LSTM(3, 0)
    with pytest.raises(ConfigError, match="forget_bias=1 needs bias=True"):
        nn.LSTM(3, 2, bias=False, forget_bias=1.0)
    lstm = nn.LSTM(3, 4)
    with pytest.raises(ConfigError, match="packed sequences are not supported"):
        lstm(torch.nn.utils.rnn.pack_sequence([torch.randn(3, 3), torch.randn(2, 3)]))
    with pytest.raises(ConfigError, match=r"expected \(T, N, 3\).*got \(5, 2, 4\)"):
        lstm(torch.randn(5, 2, 4))
    with pytest.raises(ConfigError, match="at least one step"):
        lstm(torch.randn(0, 2, 3))
    with pytest.raises(ConfigError, match=r"states of shape \(1, 2, 4\), got \(1, 3, 4\)"):
        lstm(torch.randn(5, 2, 3), (torch.zeros(1, 3, 4), torch.zeros(1, 3, 4)))
