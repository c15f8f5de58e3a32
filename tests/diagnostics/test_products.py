import math

import pytest
import torch
from torch import nn

from normprop import models
from normprop.diagnostics.products import differentiably, linearise, run
from normprop.errors import ConfigError


def test_dropout_is_one_draw_for_both_products():
    net = nn.Sequential(nn.Linear(20, 20), nn.Dropout(0.5), nn.Linear(20, 20)).train()
    x = torch.randn(2, 20, requires_grad=True)
    products = linearise(net(x), [x], "net")
    u, v = torch.randn(2, 20), torch.randn(2, 20)
    assert float((products.jvp([v]) * u).sum()) == pytest.approx(float((products.vjp(u)[0] * v).sum()), rel=1e-4)


def test_calls_hold_the_graph_of_the_network_and_can_be_differentiated_twice():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    with differentiably(net, x) as copied:
        whole, (first, second) = run(copied, x)
        products = linearise(second.output, [first.output], "net")
        tangent, cotangent = torch.randn(5, 4).double(), torch.randn(5, 2).double()
        forth, (back,) = products.jvp([tangent]), products.vjp(cotangent)
    weight, active = net[2].weight, first.output > 0
    torch.testing.assert_close(forth, (tangent * active) @ weight.T)
    torch.testing.assert_close(back, (cotangent @ weight) * active)
    torch.testing.assert_close(whole.output, net(x))


def test_the_network_stays_as_it_is(unchanged):
    net, x = models.mlp(6, 3, norm="batch", depth=1, hidden_features=8).requires_grad_(False), torch.randn(7, 6)
    with unchanged(net), torch.inference_mode(), differentiably(net, x.clone()) as copied:
        whole, _ = run(copied, x)
        assert math.isfinite(float(linearise(whole.output, [whole.input], "net").vjp(whole.output)[0].sum()))


def test_a_network_that_cannot_be_copied():
    net = nn.Linear(2, 2)
    net.own = (value for value in range(3))
    with pytest.raises(ConfigError, match=r"^Linear cannot be copied, .*$"), differentiably(net, torch.ones(1, 2)):
        pass
