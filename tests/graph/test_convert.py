"""Conversion: every family fresh and exact, the traps, the options, and that the result is an ordinary module."""

import copy

import pytest
import torch
from torch import Tensor, nn

import normprop
from normprop import norms
from normprop.errors import ConfigError, ConversionError
from normprop.graph.batch_dependence import batch_dependence
from normprop.nn import Predicted, PredictedConv2d, PredictedNorm
from tests.graph.families import FAMILIES, TRAPS, look_trained

# What the report says of these: the only ones of the traps that cannot be converted.
STUCK = {"functional_norm"}
BATCH_NORM = nn.modules.batchnorm._BatchNorm


def tensors(output: object) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def trained(case):
    look_trained(case.model, torch.Generator().manual_seed(0))
    return case


def norms_left(net: nn.Module) -> list[str]:
    return [name for name, module in net.named_modules() if isinstance(module, BATCH_NORM)]


@pytest.mark.parametrize("name", [*FAMILIES, *(name for name in TRAPS if name not in STUCK)])
def test_a_fresh_network_trains_at_batch_size_1_with_predicted_deviations(name):
    case = (FAMILIES | TRAPS)[name]()
    before = copy.deepcopy(case.model.state_dict())
    plan = normprop.analyze(case.model, case.args)
    net = plan.apply()
    assert not norms_left(net)
    assert all(torch.equal(value, before[key]) for key, value in case.model.state_dict().items())

    outputs: dict[str, Tensor] = {}
    for site in plan.sites:
        net.get_submodule(site.path).register_forward_hook(
            lambda module, args, output, path=site.path: outputs.update({path: output.detach().double()})
        )
    generator = torch.Generator().manual_seed(1)
    repeats = 64 // case.args[0].shape[0]
    noise = [torch.cat([torch.randn(x.shape, generator=generator) for _ in range(repeats)]) for x in case.args]
    with torch.no_grad():
        net(*noise)
    for site in plan.sites:
        if len(site.places) > 1:
            continue  # one set of moments for several inputs: the mixture is right, each alone is not
        if site.places[0].tail:
            continue  # the activation is part of the module
        output = outputs[site.path].transpose(0, 1).flatten(1)
        deviation = float(output.var(1, correction=0).mean().sqrt())
        gain = 1.0 if site.weight is None else float(site.weight.detach().double().square().mean().sqrt())
        if gain > 0.0:
            assert 1 / 1.5 < deviation / gain < 1.5, site.path

    net.train()
    loss = sum(output.square().mean() for output in tensors(net(*(x[:1] for x in case.args))))
    loss.backward()
    assert torch.isfinite(loss)
    gradients = [parameter.grad for parameter in net.parameters() if parameter.requires_grad]
    assert all(gradient is not None and bool(torch.isfinite(gradient).all()) for gradient in gradients)


@pytest.mark.parametrize("name", [*FAMILIES, *(name for name in TRAPS if name not in STUCK | {"no_running_stats"})])
def test_an_exact_conversion_is_the_trained_network_in_evaluation(name):
    case = trained((FAMILIES | TRAPS)[name]())
    plan = normprop.analyze(case.model, case.args, weights="exact")
    net = plan.apply()
    assert not norms_left(net)
    assert plan.report.difference < 1e-13
    case.model.eval(), net.eval()
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        expected = tensors(case.model(*case.args))
        torch.manual_seed(0)
        found = tensors(net(*case.args))
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5 * float(one.abs().max() + 1))
    net.train()
    sum(output.square().mean() for output in tensors(net(*(x[:1] for x in case.args)))).backward()


@pytest.mark.parametrize("name", ["resnet_v1_basic", "densenet", "efficientnet", "pointnet", "unet_3d", "levit"])
def test_nothing_depends_on_the_other_samples(name):
    case = FAMILIES[name]()
    x = tuple(part[:3] for part in case.args)
    assert batch_dependence(case.model, x if len(x) > 1 else x[0])
    assert not batch_dependence(normprop.convert(case.model, case.args), x if len(x) > 1 else x[0])


def test_rescale_keeps_directions_gains_and_biases():
    case = trained(FAMILIES["vgg"]())
    net = normprop.convert(case.model, case.args, weights="rescale")
    old, new = case.model.features[3], net.features[3]
    assert isinstance(new, PredictedConv2d)
    assert not new.center
    ratio = new.effective()[0] / old.weight
    torch.testing.assert_close(ratio, ratio[:, :1, :1, :1].expand_as(ratio))
    norm = case.model.features[4]
    torch.testing.assert_close(new.gain, norm.weight)
    torch.testing.assert_close(new.bias, norm.bias)


def test_fresh_weights_of_a_trained_network_are_drawn_anew():
    case = trained(FAMILIES["resnet_v1_basic"]())
    torch.manual_seed(1)  # the network was drawn with 0
    plan = normprop.analyze(case.model, case.args)
    net = plan.apply()
    assert not torch.equal(net.fc.weight, case.model.fc.weight)
    assert bool((net.conv1.gain == 1).all())
    assert plan.report.notes[0].startswith("the network had seen data")
    untrained = FAMILIES["resnet_v1_basic"]()
    fresh = normprop.convert(untrained.model, untrained.args)
    assert torch.equal(fresh.fc.weight, untrained.model.fc.weight)
    assert torch.equal(fresh.conv1.weight, untrained.model.conv1.weight)


def test_fixed_moments_stay_and_live_ones_follow():
    case = FAMILIES["vgg"]()
    fixed = normprop.convert(case.model, case.args, moments="fixed").eval()
    live = normprop.convert(case.model, case.args, moments="live").eval()
    torch.testing.assert_close(fixed(*case.args), live(*case.args))
    for net in (fixed, live):
        with torch.no_grad():
            net.features[0].gain.mul_(3.0)
    mean, var = live.features[3].predicted()
    old_mean, old_var = fixed.features[3].predicted()
    # ReLU is homogeneous: three times the deviation, nine times the variance
    torch.testing.assert_close(mean, 3 * old_mean)
    torch.testing.assert_close(var, 9 * old_var)


def test_live_moments_send_gradients_to_the_layers_before():
    case = FAMILIES["resnet_v1_basic"]()
    net = normprop.convert(case.model, case.args).double()
    layer = net.layer2[1].conv2
    mean, var = layer.predicted()
    bias = net.layer2[1].conv1.bias
    (gradient,) = torch.autograd.grad(var.sum() + mean.sum(), bias)
    assert bool((gradient != 0).all())
    eps = 1e-6
    with torch.no_grad():
        sums = []
        for sign in (1, -1):
            bias[0] += sign * eps
            sums.append(float(sum(part.sum() for part in layer.predicted())))
            bias[0] -= sign * eps
    assert float(gradient[0]) == pytest.approx((sums[0] - sums[1]) / (2 * eps), rel=1e-5)


def test_absorbed_layer_is_batch_norm_by_the_predicted_moments():
    conv, norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
    net = normprop.convert(nn.Sequential(conv, norm), torch.randn(2, 2, 6, 6), weights="rescale", calibrate=None)
    x = torch.randn(40_000, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = net(x).double()
        # what batch norm does on very many samples: the prediction is exact for white noise, borders included
        expected = nn.functional.batch_norm(conv(x).double(), None, None, training=True)
    torch.testing.assert_close(output, expected, rtol=0.0, atol=0.03)


def test_in_place_keeps_the_parameters_that_an_optimiser_holds():
    case = FAMILIES["resnet_v1_basic"]()
    weight, gain = case.model.conv1.weight, case.model.bn1.weight
    net = normprop.convert(case.model, case.args, inplace=True)
    assert net is case.model
    assert net.conv1.weight is weight
    assert net.conv1.gain is gain


def test_a_failing_conversion_leaves_the_network_alone():
    case = FAMILIES["vgg"]()
    with torch.no_grad():
        case.model.features[3].weight.fill_(float("nan"))
    keys = case.model.state_dict().keys()
    with pytest.raises(
        ConversionError, match=r"features\.3: after conversion its output in the rehearsal is not finite"
    ):
        normprop.convert(case.model, case.args, inplace=True)
    assert case.model.state_dict().keys() == keys


def test_what_would_do_nothing_raises():
    with pytest.raises(ConversionError, match="there is nothing to convert, it calls no batch norm"):
        normprop.convert(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), torch.zeros(2, 2))
    case = FAMILIES["vgg"]()
    with pytest.raises(ConversionError, match="its 4 normalisers are all left as they are"):
        normprop.convert(case.model, case.args, exclude="*")
    with pytest.raises(ConversionError, match="nothing to convert"):
        normprop.convert(case.model, case.args, include="elsewhere.*")
    net = normprop.convert(case.model, case.args)
    with pytest.raises(ConversionError, match="nothing to convert"):
        normprop.convert(net, case.args)


def test_include_and_exclude():
    case = FAMILIES["resnet_v1_basic"]()
    plan = normprop.analyze(case.model, case.args, include="layer1.*", exclude=["*.bn2"])
    assert {site.path for site in plan.sites} == {"layer1.0.bn1", "layer1.0.downsample.1", "layer1.1.bn1"}
    net = plan.apply()
    assert {"bn1", "layer1.0.bn2"} < set(norms_left(net))
    kept = next(site for site in plan.report.sites if site.path == "bn1")
    assert (kept.action, kept.reason) == ("kept", "not among those to convert")
    assert "not among those to convert" in str(plan)
    chosen = normprop.analyze(case.model, case.args, include=lambda path, module: module.num_features == 8)
    assert all(site.channels == 8 for site in chosen.sites)


def test_what_cannot_be_converted_is_named():
    case = TRAPS["functional_norm"]()
    with pytest.raises(ConversionError, match=r"called as a function in the model's own forward at .*F\.batch"):
        normprop.convert(case.model, case.args)
    (site,) = normprop.analyze(case.model, case.args).report.sites
    assert site.action == "cannot"
    case = TRAPS["no_running_stats"]()
    with pytest.raises(ConversionError, match="1: it has no running statistics, so its function in evaluation depends"):
        normprop.convert(case.model, case.args, weights="exact")


def test_a_batch_norm_that_is_never_called_is_reported():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    model[0].spare = nn.BatchNorm2d(4)
    report = normprop.analyze(model, torch.zeros(2, 3, 4, 4)).report
    assert [(site.path, site.action) for site in report.sites] == [("1", "absorbed"), ("0.spare", "kept")]
    assert report.sites[1].reason == "the example input never reaches it"


@pytest.mark.parametrize("method", [name for name in norms.names() if name not in ("normprop", "none")])
def test_every_method_can_take_the_place(method):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, dilation=2), nn.BatchNorm2d(8)
    )
    weight = model[3].weight.detach().clone()
    x = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    try:
        net = normprop.convert(model, x, to=method)
    except ConversionError as error:
        assert method in str(error)  # noqa: PT017 - which methods refuse, and that they say so, is what is tested
        return
    output = net(x)
    assert output.shape == (4, 8, 6, 6)
    assert bool(torch.isfinite(output).all())
    assert any(parameter.shape == weight.shape for parameter in net.parameters())
    if norms.method(method).layer is not None:
        assert torch.equal(net[3].weight, weight)


def test_group_norm_takes_over_gain_and_bias():
    case = trained(FAMILIES["vgg"]())
    net = normprop.convert(case.model, case.args, to="group", weights="rescale")
    assert isinstance(net.features[1], nn.GroupNorm)
    torch.testing.assert_close(net.features[1].weight, case.model.features[1].weight)
    assert net.features[1].num_groups > 1


def test_bad_options():
    model, x = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), torch.zeros(2, 3, 4, 4)
    with pytest.raises(ConfigError, match="weights must be one of 'fresh', 'exact', 'rescale', got 'old'"):
        normprop.convert(model, x, weights="old")
    with pytest.raises(ConfigError, match="no method 'banana'"):
        normprop.convert(model, x, to="banana")
    with pytest.raises(ConfigError, match="weights='exact' keeps a trained network's function, which 'group' cannot"):
        normprop.convert(model, x, to="group", weights="exact")
    with pytest.raises(ConfigError, match="holds no tensor"):
        normprop.convert(model, 3)
    with pytest.raises(normprop.NormPropError, match="cannot run on the example input"):
        normprop.convert(model, torch.zeros(2, 5, 4, 4))


def test_a_normaliser_that_stands_in_two_places_is_one():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), nn.Sequential(nn.Conv2d(4, 4, 1)))
    model[1].append(model[0][1])
    look_trained(model, torch.Generator().manual_seed(0))
    plan = normprop.analyze(model, torch.randn(2, 3, 4, 4), weights="exact")
    assert [(site.path, len(site.places)) for site in plan.sites] == [("0.1", 2)]
    net = plan.apply()
    assert net[0][1] is net[1][1]
    assert isinstance(net[0][1], PredictedNorm)


def test_batch_of_one_and_keyword_arguments():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)

        def forward(self, *, x: Tensor) -> dict[str, Tensor]:
            return {"y": self.norm(self.fc(x))}

    net = normprop.convert(Named(), {"x": torch.zeros(1, 3)})
    assert net(x=torch.randn(1, 3))["y"].shape == (1, 4)


def test_zero_initialised_branches_stay_silent():
    case = FAMILIES["resnet_v1_basic"]()
    nn.init.zeros_(case.model.layer1[0].bn2.weight)
    net = normprop.convert(case.model, case.args)
    assert bool((net.layer1[0].conv2.gain == 0).all())
    assert all(bool(torch.isfinite(output).all()) for output in tensors(net(*case.args)))


def test_report(tmp_path):
    case = FAMILIES["densenet"]()
    plan = normprop.analyze(case.model, case.args)
    plan.apply()
    document = plan.report.to_dict()
    assert document["counts"] == {"absorbed": 7, "predicted": 8}
    site = document["sites"][1]
    assert site["path"] == "block1.0.norm1"
    assert site["reason"].startswith("it follows cat") or "also read" in site["reason"]
    assert site["std"] > 0
    assert site["correction"] == pytest.approx(1.0, abs=0.5)
    text = str(plan.report)
    assert text.splitlines()[0] == "DenseNet: 15 normalisers to normprop, weights fresh (7 absorbed, 8 predicted)"
    assert len(text.splitlines()) == 17
    assert "<html" in plan.report.to_html(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text().startswith("<!")


def test_frozen_statistics_become_parameters_that_do_not_train():
    case = trained(TRAPS["frozen_norm"]())
    net = normprop.convert(case.model, case.args, weights="exact")
    assert not net[0].gain.requires_grad
    assert net[0].weight.requires_grad


def test_predicted_norm_stands_where_nothing_absorbs():
    case = FAMILIES["resnet_v2"]()
    net = normprop.convert(case.model, case.args)
    assert isinstance(net.blocks[0].bn1, PredictedNorm)
    assert all(isinstance(module.correction, Tensor) for module in net.modules() if isinstance(module, Predicted))
