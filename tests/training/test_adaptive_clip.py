import pytest
import torch

from normprop.training.adaptive_clip import adaptive_gradient_clip_


@pytest.mark.parametrize("shape", [(5,), (5, 7), (5, 2, 3, 3), ()])
def test_every_unit_is_clipped_by_the_formula(shape):
    torch.manual_seed(0)
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    size = torch.logspace(-4, 2, 5, dtype=torch.float64).reshape(-1, *[1] * (len(shape) - 1)) if shape else 1.0
    gradient = torch.randn(shape, dtype=torch.float64) * size
    weight.grad = gradient.clone()
    adaptive_gradient_clip_([weight], clipping=0.02)
    rows = range(5) if len(shape) >= 2 else [...]
    clipped = 0
    for row in rows:
        w, g = weight.detach()[row].norm().item(), gradient[row].norm().item()
        limit = 0.02 * max(w, 1e-3)
        expected = gradient[row] * (limit / g) if g > limit else gradient[row]
        clipped += g > limit
        torch.testing.assert_close(weight.grad[row], expected, rtol=1e-12, atol=0)
    assert clipped > 0
    assert len(shape) < 2 or clipped < 5


def test_zero_weights_can_move_and_zero_gradients_stay():
    weight = torch.zeros(2, 3, requires_grad=True)
    weight.grad = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 0.0]])
    adaptive_gradient_clip_(weight)
    torch.testing.assert_close(weight.grad, torch.tensor([[0.6e-5, 0.8e-5, 0.0], [0.0, 0.0, 0.0]]))
    adaptive_gradient_clip_([torch.zeros(2, requires_grad=True)])  # without gradient
