"""Networks that a conversion meets seldom: it converts them whole, or says in one line why not."""

import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import normprop
from normprop.errors import ConfigError, ConversionError, GraphError
from normprop.graph.batch_dependence import batch_dependence
from normprop.graph.capture import capture
from normprop.graph.propagate import propagate

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Frozen(nn.Module):
    """Batch norm of running statistics by hand."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.linspace(-1.0, 1.0, channels))
        self.register_buffer("running_var", torch.linspace(0.5, 2.0, channels))

    def forward(self, x: Tensor) -> Tensor:
        mean, var = (value[:, None, None] for value in (self.running_mean, self.running_var))
        return (x - mean) * (var + 1e-5).rsqrt()


class Gated(Frozen):
    """Running statistics that are applied in a way of its own."""

    def forward(self, x: Tensor, twice: bool) -> Tensor:
        return super().forward(x) * (2.0 if twice else 1.0)


class Code(nn.Module):
    """A network of given modules and forward."""

    def __init__(self, forward, **modules: nn.Module) -> None:
        super().__init__()
        self.code = forward
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, *args):
        return self.code(self, *args)


def outputs(model: nn.Module, x: Tensor = IMAGES) -> Tensor:
    with torch.no_grad():
        return model(x)


def test_a_frozen_norm_under_its_second_name_is_found():
    frozen = Frozen(8)
    model = Code(lambda m, x: m.second(m.conv(x)), conv=nn.Conv2d(3, 8, 3), first=frozen, second=frozen)
    net = normprop.convert(model, IMAGES, weights="exact")
    assert not any(isinstance(module, Frozen) for module in net.modules())
    torch.testing.assert_close(outputs(net.eval()), outputs(model.eval()))


@pytest.mark.parametrize("weights", ["fresh", "exact"])
def test_a_frozen_norm_that_is_called_twice_stays_one_of_two(weights):
    convs = {"one": nn.Conv2d(3, 8, 3, padding=1), "two": nn.Conv2d(8, 8, 3)}
    model = Code(lambda m, x: m.norm(m.two(m.norm(m.one(x)))), **convs, norm=Frozen(8))
    (site,) = normprop.analyze(model, IMAGES, weights=weights).report.sites
    assert (site.calls, site.action) == (2, "predicted")
    net = normprop.convert(model, IMAGES, weights=weights)
    assert isinstance(net.norm, normprop.nn.PredictedNorm)
    if weights == "exact":
        torch.testing.assert_close(outputs(net), outputs(model.eval()))


def test_running_statistics_that_are_no_batch_norm_are_named():
    model = Code(lambda m, x: m.norm(m.own(m.conv(x), True)), conv=nn.Conv2d(3, 8, 3), own=Gated(8),
                 norm=nn.BatchNorm2d(8), idle=nn.BatchNorm2d(3))  # fmt: skip
    left = {site.path: site.reason for site in normprop.analyze(model, IMAGES).report.sites if site.action == "kept"}
    assert left == {"own": "it is not batch norm in evaluation", "idle": "the example input never reaches it"}


def test_a_fused_norm_under_its_second_name_keeps_its_activation():
    class Fused(nn.BatchNorm2d):
        def __init__(self, channels: int) -> None:
            super().__init__(channels)
            self.act = nn.Hardtanh(-0.5, 0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.act(super().forward(x))

    fused = Fused(8)
    for names in (("first", "second"), ("a", "longer")):
        model = Code(lambda m, x: getattr(m, m.used)(m.conv(x)), conv=nn.Conv2d(3, 8, 3), **dict.fromkeys(names, fused))
        model.used = names[1]
        net = normprop.convert(model, IMAGES, weights="exact")
        torch.testing.assert_close(outputs(net.eval()), outputs(model.eval()))
        assert float(outputs(net).abs().max()) == 0.5


@pytest.mark.parametrize("held", [list, tuple, lambda steps: dict(enumerate(steps)), lambda steps: {"all": [steps]}])
def test_modules_in_plain_containers_are_exchanged_there_too(held):
    def forward(m, x):
        steps = m.steps["all"][0] if "all" in m.steps else m.steps
        for step in steps.values() if isinstance(steps, dict) else steps:
            x = step(x)
        return x

    model = Code(forward, conv=nn.Conv2d(3, 8, 3), norm=nn.BatchNorm2d(8), act=nn.ReLU())
    model.steps = held([model.conv, model.norm, model.act])
    net = normprop.convert(model, IMAGES)
    assert not batch_dependence(net, IMAGES)
    assert batch_dependence(model, IMAGES)
    with pytest.raises(ConversionError, match=r"fold: steps holds modules .* use nn.ModuleList"):
        normprop.fold(net, IMAGES)


def test_hooks_of_every_kind_move_to_the_module_in_its_place():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    calls: list[str] = []
    model[1].register_forward_pre_hook(lambda m, args, kwargs: calls.append("before"), with_kwargs=True)
    model[1].register_forward_hook(lambda m, args, kwargs, output: calls.append("after"), with_kwargs=True)
    net = normprop.convert(model, IMAGES)
    calls.clear()
    net(IMAGES)
    assert calls == ["before", "after"]


def test_a_weight_that_is_read_in_a_list_elsewhere_is_not_absorbed():
    model = Code(lambda m, x: (m.norm(m.conv(x)), torch.cat([m.conv.weight, m.conv.weight])),
                 conv=nn.Conv2d(3, 8, 3), norm=nn.BatchNorm2d(8))  # fmt: skip
    (site,) = normprop.analyze(model, IMAGES).report.sites
    assert site.action == "predicted"
    assert "the weight of conv is also used in" in site.reason


@pytest.mark.parametrize("call", [normprop.convert, normprop.inspect, normprop.fold])
def test_parameters_without_a_shape_are_named(call):
    model = nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d())
    with pytest.raises((GraphError, ConversionError), match=r"0\.weight has no shape yet; call the model on an input"):
        call(model, IMAGES)
    assert isinstance(model[0].weight, nn.UninitializedParameter)
    model(IMAGES)
    call(model, IMAGES)


def test_an_error_without_words_is_named():
    def forward(m, x):
        raise AssertionError

    for call in (normprop.fold, normprop.inspect, normprop.convert):
        with pytest.raises(GraphError, match="AssertionError"):
            call(Code(forward, norm=nn.BatchNorm2d(3)), IMAGES)


@pytest.mark.parametrize("policy", ["warn", "measure"])
def test_what_has_nothing_to_pass_on_is_refused(policy):
    model = Code(lambda m, ids: m.bag(ids), bag=nn.EmbeddingBag(10, 4, mode="max"))
    graph = capture(model, torch.arange(6).reshape(2, 3))
    with pytest.raises(GraphError, match="has no rule"):
        propagate(graph, on_unknown=policy)


class Draws(nn.Module):
    """Random numbers of every kind; where its code looks at values, it cannot be exported."""

    def __init__(self, looks: bool) -> None:
        super().__init__()
        self.looks = looks

    def forward(self, x: Tensor) -> Tensor:
        if self.looks and float(x.sum()) > 1e9:
            return x
        return x * random.random() + float(np.random.rand()) + torch.rand(1)


@pytest.mark.parametrize(("looks", "how"), [(False, "export"), (True, "recorded")])
def test_capture_leaves_all_random_states(looks, how):
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert capture(Draws(looks), IMAGES).how == how
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[:2]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_accelerators_that_take_no_part_are_not_seeded(monkeypatch):
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(), Frozen(8))
    normprop.inspect(model, IMAGES)
    normprop.fold(normprop.convert(model, IMAGES, weights="exact"), IMAGES)
    batch_dependence(model, IMAGES)
    assert not seeded


def test_batches_in_other_forms_are_refused_by_what_they_hold():
    model = Code(lambda m, batch: batch["x"])
    with pytest.raises(ConfigError, match="got a tuple with dict; call a model that takes its samples in another form"):
        batch_dependence(model, ({"x": IMAGES},))
