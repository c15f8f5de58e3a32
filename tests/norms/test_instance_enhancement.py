import math

import pytest
import torch
import torch.nn.functional as F

from normprop.norms.instance_enhancement import InstanceEnhancementBatchNorm

SIZES = [(6, 4), (6, 4, 5), (6, 4, 3, 5), (3, 4, 2, 3, 2)]


def made(**values):
    norm = InstanceEnhancementBatchNorm(4).double()
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
        for name, value in values.items():
            getattr(norm, name).fill_(value)
    return norm


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("gate_bias", "factor"), [(-1.0, 1 / (1 + math.e)), (50.0, 1.0), (0.0, 0.5)])
def test_with_a_zero_it_is_batch_norm_with_a_scaled_gain(size, gate_bias, factor):
    torch.manual_seed(0)
    norm = made(gate_bias=gate_bias)
    mean, var = torch.zeros(4).double(), torch.ones(4).double()
    inputs = [(torch.randn(size).double() * 2 + 1).requires_grad_() for _ in range(2)]
    with torch.no_grad():
        inputs[1].copy_(inputs[0])
    gain, bias = (p.detach().clone().requires_grad_() for p in (norm.weight, norm.bias))
    ours = norm(inputs[0])
    theirs = F.batch_norm(inputs[1], mean, var, gain * factor, bias, True, 0.1)
    torch.testing.assert_close(ours, theirs)
    outer = torch.randn_like(ours)
    for mine, other in zip(
        torch.autograd.grad(ours, [inputs[0], norm.weight, norm.bias], outer),
        torch.autograd.grad(theirs, [inputs[1], gain, bias], outer),
        strict=True,
    ):
        torch.testing.assert_close(mine, other)
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, var)
    norm.eval()
    torch.testing.assert_close(norm(inputs[0]), F.batch_norm(inputs[0], mean, var, gain * factor, bias))


def test_starts_with_a_zero_and_b_minus_one():
    norm = InstanceEnhancementBatchNorm(4)
    assert norm.gate_weight.tolist() == [0.0] * 4
    assert norm.gate_bias.tolist() == [-1.0] * 4


@pytest.mark.parametrize("training", [True, False])
def test_definition(training):
    torch.manual_seed(0)
    norm = made().train(training)
    with torch.no_grad():
        norm.gate_weight.normal_()
        norm.gate_bias.normal_()
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    x = torch.randn(6, 4, 3, 5).double() * 2 + 1
    output = norm(x)
    if training:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    for n in range(6):
        for c in range(4):
            gate = 1 / (1 + torch.exp(-(norm.gate_weight[c] * x[n, c].sum() / 15 + norm.gate_bias[c])))
            expected = (x[n, c] - mean[c]) / (var[c] + 1e-5).sqrt() * norm.weight[c] * gate + norm.bias[c]
            torch.testing.assert_close(output[n, c], expected)


def test_the_gate_is_the_samples_own_and_blind_to_positions():
    torch.manual_seed(0)
    norm = made(gate_weight=0.7)
    x = torch.randn(3, 4, 2, 5).double()
    gate = norm.gate(x)
    assert gate.shape == (3, 4, 1, 1)
    permuted = x.flatten(2)[:, :, torch.randperm(10)].view_as(x)
    torch.testing.assert_close(norm.gate(permuted), gate)
    others = x.clone()
    others[1:] += 5
    torch.testing.assert_close(norm.gate(others)[0], gate[0])
    assert (norm.gate(others)[1:] > gate[1:]).all()


def test_gradients_by_finite_differences():
    torch.manual_seed(0)
    norm = made(gate_weight=0.3)
    x = torch.randn(3, 4, 2).double().requires_grad_()

    def run(input, *parameters):
        return torch.func.functional_call(norm, dict(zip(names, parameters, strict=True)), (input,))

    names = [name for name, _ in norm.named_parameters()]
    assert names == ["weight", "bias", "gate_weight", "gate_bias"]
    assert torch.autograd.gradcheck(run, (x, *(p.detach().requires_grad_() for p in norm.parameters())))


def test_one_value_per_channel():
    with pytest.raises(ValueError, match=r"norms.instance-enhancement: expected more than 1 value per channel"):
        made()(torch.zeros(1, 4).double())
    assert made().eval()(torch.zeros(1, 4).double()).shape == (1, 4)
