import copy

import numpy as np
import pytest
import torch

from normprop.errors import ConfigError
from normprop.nn import DataNorm


@pytest.mark.parametrize("shape", [(3, 4, 5), (3, 1, 1), (1, 4, 1)])
def test_streaming_statistics_equal_numpys(shape):
    data = torch.randn(50, 3, 4, 5) * 3 + 1000  # far from zero: a sum of squares would lose the variance in float32
    axes = (0, *(i + 1 for i, n in enumerate(shape) if n == 1))
    array = data.numpy().astype(np.float64)
    for source in (data, data.split([1, 20, 29]), [(part, None) for part in data.split(7)]):
        norm = DataNorm(shape).fit(source)
        np.testing.assert_allclose(norm.mean.numpy().squeeze(), array.mean(axes).squeeze(), rtol=1e-6)
        np.testing.assert_allclose(norm.var.numpy().squeeze(), array.var(axes).squeeze(), rtol=1e-5)
        assert int(norm.count) == 50
    output = norm(data)
    np.testing.assert_allclose(output.mean(axes).numpy(), 0, atol=2e-4)
    np.testing.assert_allclose(output.var(axes, correction=0).numpy(), 1, rtol=1e-3)


def test_global_mode_is_one_function_at_any_batch_size():
    norm = DataNorm((2, 3)).fit(torch.randn(40, 2, 3))
    batch = torch.randn(5, 2, 3)
    assert torch.equal(norm.train()(batch), norm.eval()(batch))
    assert torch.equal(norm(batch)[:1], norm(batch[:1]))
    assert norm(batch[:0]).shape == (0, 2, 3)


def test_constant_features_become_zero():
    data = torch.randn(20, 3)
    data[:, 1] = 7.0
    output = DataNorm((3,)).fit(data)(data)
    assert torch.equal(output[:, 1], torch.zeros(20))
    batch = DataNorm((3,), mode="batch")
    assert torch.equal(batch(data)[:, 1], torch.zeros(20))


def test_batch_mode_equals_batch_norm_without_affine_per_element():
    norm, reference = DataNorm((6,), mode="batch"), torch.nn.BatchNorm1d(6, eps=1e-12, affine=False)
    for _ in range(3):
        batch = torch.randn(8, 6) * 2 + 1
        torch.testing.assert_close(norm(batch), reference(batch))
    torch.testing.assert_close(norm.mean, reference.running_mean)
    torch.testing.assert_close(norm.var, reference.running_var)
    batch = torch.randn(4, 6)
    torch.testing.assert_close(norm.eval()(batch), reference.eval()(batch))


def test_batch_mode_passes_gradients_through_its_statistics():
    norm = DataNorm((2,), mode="batch", dtype=torch.float64)
    assert torch.autograd.gradcheck(norm, torch.randn(5, 2, dtype=torch.float64, requires_grad=True))


def test_state_travels():
    norm = DataNorm((3,)).fit(torch.randn(10, 3))
    batch = torch.randn(2, 3)
    other = DataNorm((3,))
    other.load_state_dict(norm.state_dict())
    assert torch.equal(other(batch), norm(batch))
    assert torch.equal(copy.deepcopy(norm)(batch), norm(batch))
    compiled = torch.compile(norm, fullgraph=True, backend="eager")
    assert torch.equal(compiled(batch), norm(batch))


def test_errors():
    with pytest.raises(ConfigError, match="mode must be"):
        DataNorm((3,), mode="none")
    with pytest.raises(ConfigError, match="call fit"):
        DataNorm((3,))(torch.randn(2, 3))
    with pytest.raises(ConfigError, match="do not fit samples of shape"):
        DataNorm((3,)).fit(torch.randn(2, 4))
    with pytest.raises(ConfigError, match="no sample"):
        DataNorm((3,)).fit(torch.randn(0, 3))
    with pytest.raises(ConfigError, match="one value per feature"):
        DataNorm((3,), mode="batch")(torch.randn(1, 3))
    unfitted = DataNorm((3,)).state_dict()
    fitted = DataNorm((3,)).fit(torch.randn(5, 3))
    fitted.load_state_dict(unfitted)
    with pytest.raises(ConfigError, match="call fit"):
        fitted(torch.randn(2, 3))
