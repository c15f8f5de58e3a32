import numpy as np
import pytest
import torch
from torch import nn

from normprop.nn import Linear
from normprop.training import statistics


def watched_names(model):
    return [name for name, _ in statistics.watched(model)]


def test_watched_are_the_largest_parts_with_one_linear_map():
    block = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.ReLU())
    model = nn.Sequential(
        block, nn.Sequential(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)), nn.AvgPool2d(2), nn.LayerNorm((2, 2))
    )
    assert watched_names(model) == ["0", "1.0", "1.1"]


def test_normprop_layers_and_plain_blocks_give_the_same_names():
    normprop = nn.Sequential(Linear(4, 4, activation="relu"), Linear(4, 2))
    plain = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.GroupNorm(2, 4), nn.ReLU()), nn.Linear(4, 2))
    assert watched_names(normprop) == watched_names(plain) == ["0", "1"]


def test_a_shared_layer_is_watched_once_and_a_bare_layer_is_its_own():
    layer = nn.Linear(2, 2)
    assert watched_names(nn.Sequential(layer, nn.Sequential(layer, nn.Linear(2, 2)))) == ["0", "1.1"]
    assert watched_names(layer) == ["Linear"]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Sequential(nn.Linear(5, 7), nn.ReLU(inplace=True)), nn.Dropout(0.5), nn.Linear(7, 3))


def test_values_against_numpy(model):
    probe = torch.randn(50, 5)
    records = statistics.measure(model, probe)
    w0, b0, w1, b1 = (p.detach().double().numpy() for p in model.parameters())
    hidden = np.maximum(probe.double().numpy() @ w0.T + b0, 0)
    outputs = [hidden, hidden @ w1.T + b1]
    assert [record.layer for record in records] == ["0", "2"]
    for record, output in zip(records, outputs, strict=True):
        assert record.mean == pytest.approx(output.mean(), abs=1e-6)
        assert record.std == pytest.approx(output.std(), rel=1e-5)


def test_calls_of_a_shared_layer_are_pooled():
    layer = nn.Linear(3, 3)
    probe = torch.randn(20, 3)
    first = layer(probe)
    both = torch.stack([first, layer(first)]).detach().double().numpy()
    (record,) = statistics.measure(nn.Sequential(nn.Sequential(layer), layer), probe, [("layer", layer)])
    assert record.mean == pytest.approx(both.mean(), abs=1e-6)
    assert record.std == pytest.approx(both.std(), rel=1e-5)


def test_low_precision_outputs_are_summed_in_float32():
    model = nn.Sequential(nn.Linear(1, 1, bias=False)).to(torch.bfloat16)
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    probe = torch.full((3001, 1), 1.0, dtype=torch.bfloat16)
    probe[0] = 2.0
    (record,) = statistics.measure(model, probe)
    assert record.mean == pytest.approx(1 + 1 / 3001, rel=1e-5)


def test_hooks_and_modes_are_put_back_even_after_an_error(model):
    model.train()
    model[1].eval()
    before = [module.training for module in model.modules()]
    statistics.measure(model, torch.randn(4, 5))
    with pytest.raises(RuntimeError):
        statistics.measure(model, torch.randn(4, 6))
    assert [module.training for module in model.modules()] == before
    assert all(not module._forward_hooks for module in model.modules())
    assert model(torch.randn(4, 5)).requires_grad


def test_a_layer_that_is_not_called_has_no_record(model):
    unused = nn.Linear(2, 2)
    assert statistics.measure(model, torch.randn(4, 5), [("unused", unused)]) == []
