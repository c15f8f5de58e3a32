import pytest
import torch
import torch.nn.functional as F

from normprop import norms
from normprop.errors import ConfigError
from normprop.norms.weight_standardization import standardize_weight


def test_block_equals_the_textbook_form():
    torch.manual_seed(0)
    block = norms.block("weight-standardized")(4, 8, 3, padding=1).double()
    input = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    weight = block.linear.linear.weight
    mean, std = weight.mean((1, 2, 3), keepdim=True), weight.std((1, 2, 3), correction=0, keepdim=True)
    expected = F.conv2d(input, (weight - mean) / (std + 1e-5), padding=1)
    expected = F.group_norm(expected, 4).relu()
    torch.testing.assert_close(block(input), expected, rtol=1e-12, atol=1e-12)


def test_output_does_not_depend_on_scale_and_offset_of_a_filter():
    """Exact but for the epsilon, 1e-5 of a deviation that grows from about 0.2 by the factor: at most 1e-4."""
    torch.manual_seed(0)
    block = norms.block("weight-standardized")(4, 8, 3).double()
    input = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    before = block(input)
    with torch.no_grad():
        weight = block.linear.linear.weight
        scale, offset = torch.rand(8, 1, 1, 1) + 0.5, torch.randn(8, 1, 1, 1)
        weight.copy_(weight * scale + offset)
    torch.testing.assert_close(block(input), before, rtol=1e-4, atol=1e-4)


def test_gradient_of_the_weight_and_constant_filters():
    torch.manual_seed(0)
    weight = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(standardize_weight, (weight,))
    constant = torch.full((2, 6), 0.3, requires_grad=True)
    standardized = standardize_weight(constant)
    standardized.sum().backward()
    # The mean of equal numbers may round: one unit in 0.3, magnified by 1 / eps.
    assert standardized.abs().max() < 0.01
    assert torch.isfinite(constant.grad).all()


def test_a_filter_of_one_weight_is_refused():
    with pytest.raises(ConfigError, match=r"norms.weight-standardized: .* single weight"):
        norms.block("weight-standardized")(4, 4, 1, groups=4)
