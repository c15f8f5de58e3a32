import pytest
import torch
from torch import nn

from normprop import norms, recipes
from normprop.errors import ConfigError
from normprop.nn import Conv2d, Linear
from normprop.training import parameter_groups


def names(model: nn.Module, **options) -> tuple[set[str], set[str]]:
    """Names of decayed and undecayed parameters; each must be in one group, once."""
    groups = parameter_groups(model, weight_decay=0.01, **options)
    found = [id(p) for group in groups for p in group["params"]]
    assert sorted(found) == sorted(id(p) for p in model.parameters())
    by_id = {id(p): name for name, p in model.named_parameters()}
    decayed = {by_id[id(p)] for group in groups if group["weight_decay"] == 0.01 for p in group["params"]}
    kept = {by_id[id(p)] for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    assert decayed | kept == set(by_id.values())
    return decayed, kept


def test_plain_network():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.PReLU(4), nn.ConvTranspose1d(2, 2, 2), nn.Linear(4, 2)
    )
    decayed, kept = names(model)
    assert decayed == {"0.weight", "3.weight", "4.weight"}
    assert kept == {"0.bias", "1.weight", "1.bias", "2.weight", "3.bias", "4.bias"}


def test_norms_with_many_dimensions_and_embeddings_do_not_decay():
    model = nn.Sequential(nn.LayerNorm((3, 4, 4)), nn.GroupNorm(2, 4), nn.RMSNorm((2, 2)), nn.Embedding(5, 3))
    decayed, kept = names(model)
    assert not decayed
    assert len(kept) == 6


def test_weights_of_other_maps_decay():
    assert names(nn.MultiheadAttention(4, 2))[0] == {"in_proj_weight", "out_proj.weight"}
    assert names(nn.LSTM(3, 4))[0] == {"weight_ih_l0", "weight_hh_l0"}


def test_normprop_weights_decay_only_without_the_constraint():
    model = nn.Sequential(Conv2d(3, 4, 3, activation="relu"), nn.Flatten(), Linear(4, 2), nn.Linear(2, 2))
    assert names(model)[0] == {"3.weight"}
    assert names(model, unit_norm=False)[0] == {"0.weight", "2.weight", "3.weight"}


@pytest.mark.parametrize("unit_norm", [True, False])
def test_gains_and_biases_of_our_layers_learn_faster_where_there_is_a_rate(unit_norm):
    model = nn.Sequential(
        Linear(4, 3, activation="relu"), Linear(3, 3, bias=False), Linear(3, 2, **recipes.PAPER), nn.Linear(2, 2)
    )
    by_id = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, 0.01, unit_norm=unit_norm, lr=0.1, gain_rate=4)
    rates = {by_id[id(p)]: group["lr"] for group in groups for p in group["params"]}
    assert rates.keys() == set(by_id.values())
    assert {name for name, rate in rates.items() if rate == 0.4} == {"0.gain", "0.bias", "1.gain"}
    assert set(rates.values()) == {0.1, 0.4}
    assert names(model, unit_norm=unit_norm, lr=0.1, gain_rate=4) == names(model, unit_norm=unit_norm)
    assert len(parameter_groups(model, 0.01, unit_norm=unit_norm, lr=0.1)) == 2
    assert all("lr" not in group for group in parameter_groups(model, 0.01))
    with pytest.raises(ConfigError, match=r"^parameter_groups: gain_rate=4 multiplies a learning rate; give it as lr$"):
        parameter_groups(model, 0.01, gain_rate=4)


def test_shared_parameters_count_once_and_decay_only_if_all_owners_let_them():
    model = nn.ModuleDict({"embedding": nn.Embedding(5, 3), "output": nn.Linear(3, 5), "again": nn.Linear(3, 5)})
    model["output"].weight = model["embedding"].weight
    model["again"].bias = model["output"].bias
    decayed, kept = names(model)
    assert decayed == {"again.weight"}
    assert kept == {"embedding.weight", "output.bias"}
    twice = nn.Linear(3, 3)
    assert names(nn.Sequential(twice, twice)) == ({"0.weight"}, {"0.bias"})


def test_parameters_outside_any_layer_and_frozen_ones():
    model = nn.Sequential(nn.Linear(2, 2))
    model.register_parameter("scale", nn.Parameter(torch.ones(())))
    model.register_parameter("projection", nn.Parameter(torch.ones(2, 2), requires_grad=False))
    decayed, kept = names(model)
    assert decayed == {"0.weight", "projection"}
    assert kept == {"0.bias", "scale"}


def test_an_optimiser_takes_them():
    model = nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.fill_(1.0)
        model.bias.fill_(1.0)
    optimizer = torch.optim.SGD(parameter_groups(model, weight_decay=0.5), lr=0.1)
    model(torch.zeros(1, 3)).mul(0).sum().backward()
    optimizer.step()
    assert torch.equal(model.weight, torch.full((2, 3), 0.95))
    assert torch.equal(model.bias, torch.ones(2))


def test_no_empty_groups():
    assert [group["weight_decay"] for group in parameter_groups(nn.BatchNorm1d(3), 0.1)] == [0.0]
    assert [group["weight_decay"] for group in parameter_groups(nn.Linear(3, 2, bias=False), 0.1)] == [0.1]


@pytest.mark.parametrize(
    ("module", "layouts"),
    [
        (nn.Linear(2, 3), {"weight": (1, False)}),
        (nn.Conv2d(4, 6, 3, groups=2), {"weight": (2, False)}),
        (nn.ConvTranspose1d(4, 6, 3), {"weight": (1, True)}),
        (Conv2d(4, 6, 3), {"weight": (1, False)}),
        (nn.MultiheadAttention(4, 2), {"in_proj_weight": (3, False), "out_proj.weight": (1, False)}),
        (
            nn.LSTM(3, 4, proj_size=2),
            {"weight_ih_l0": (4, False), "weight_hh_l0": (4, False), "weight_hr_l0": (1, False)},
        ),
        (nn.GRUCell(3, 4), {"weight_ih": (3, False), "weight_hh": (3, False)}),
        (norms.block("bounded-weight", dims=0)(4, 3), {"linear.linear.weight": (1, False)}),
        (nn.Sequential(nn.LayerNorm((2, 2)), nn.Embedding(3, 2), nn.PReLU(3)), {}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_matrices_are_known_by_their_layout(module, layouts):
    by_id = {id(p): name for name, p in module.named_parameters()}
    groups = parameter_groups(module, 0.01, matrices=True)
    found = {by_id[id(p)]: group["matrices"] for group in groups if "matrices" in group for p in group["params"]}
    assert found == layouts
    assert names(module) == tuple(
        {by_id[id(p)] for group in groups if (group["weight_decay"] > 0) == decays for p in group["params"]}
        for decays in (True, False)
    )
