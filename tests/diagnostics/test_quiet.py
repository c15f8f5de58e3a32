import pytest
import torch
from torch import nn

from normprop.diagnostics.quiet import call, quietly, trained
from normprop.errors import ConfigError


@pytest.mark.parametrize("training", [True, False])
def test_what_a_copy_does_leaves_no_trace(unchanged, training):
    model, x = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout()).train(training), torch.randn(6, 3)
    with unchanged(model), quietly(model, x, grad=True) as copied:
        assert copied[2].training == training
        copied(x).sum().backward()
        torch.rand(3)
        with torch.no_grad():
            copied[0].weight.zero_()
    with unchanged(model), torch.enable_grad(), quietly(model, x) as copied:
        assert not copied(x).requires_grad


def test_random_states_start_where_they_are_or_at_a_seed():
    drawn = []
    for seed in (None, None, 3, 3):
        with quietly(nn.Identity(), seed=seed):
            drawn.append(torch.rand(1).item())
    assert drawn[0] == drawn[1] == torch.rand(1).item()
    assert drawn[0] != drawn[2] == drawn[3]


def test_errors_are_one_line():
    frozen = nn.Linear(3, 2).requires_grad_(False)
    for action, words in [
        (lambda: call(frozen, torch.ones(2, 4)), r"^Linear: the network does not take inputs of shape \(2, 4\): "),
        (lambda: call(frozen, torch.ones(2, 4), "net"), "^net: the network does not take"),
        (lambda: trained(frozen), "^Linear: no parameter requires a gradient; call requires_grad_"),
    ]:
        with pytest.raises(ConfigError, match=words) as caught:
            action()
        assert "\n" not in str(caught.value)
