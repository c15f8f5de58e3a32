"""What batch_dependence finds and whom it names, on networks whose answer is known by construction."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normprop import norms
from normprop.graph.batch_dependence import batch_dependence

VECTORS = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2))
SQUARE = torch.randn(4, 4, 6, generator=torch.Generator().manual_seed(3))  # as many steps as samples
STEPS = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(4))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Code(nn.Module):
    """A module of the given forward code and children."""

    def __init__(self, code, **children):
        super().__init__()
        self.code = code
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, *args, **kwargs):
        return self.code(self, *args, **kwargs)


def conv(inputs=3, outputs=8):
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def functional_norm(x):
    return F.batch_norm(x, None, None, training=True)


def zeroed(linear):
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def named(found, kind):
    return [entry.path for entry in found.modules if entry.kind == kind]


def seeded(build):
    """Build under a fixed seed and leave the random state alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build()


class Subclass(nn.BatchNorm2d):
    pass


class Fused(nn.BatchNorm2d):
    def forward(self, input):
        return F.relu(super().forward(input), inplace=True)


class Backward(torch.autograd.Function):
    """The identity, whose gradient is centred over the batch."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient - gradient.mean(0)


class Experts(nn.Module):
    """Rows go to one of two experts; with a capacity, to the first if their scores are the highest of the batch."""

    def __init__(self, capacity=None):
        super().__init__()
        self.score = nn.Linear(6, 2)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.capacity = capacity

    def forward(self, x):
        rows = x.flatten(0, 1)
        first = self.score(rows).argmax(-1) == 0
        if self.capacity:
            first = torch.zeros_like(first).index_fill(0, self.score(rows)[:, 0].topk(self.capacity).indices, 1)
        result = torch.zeros_like(rows)
        for expert, chosen in zip(self.experts, (first, ~first), strict=True):
            result[chosen] = expert(rows[chosen])
        return result.view_as(x)


@pytest.mark.parametrize("name", norms.names())
def test_every_method_agrees_with_its_facts(name):
    facts = norms.info(name)
    dims = 2 if 2 in facts.dims else max(facts.dims)
    blocks = [norms.block(name, dims)(8, 8, 3, padding=1, activation=f) for f in ("relu", None)]
    network = norms.finish(name, nn.Sequential(*blocks))
    found = batch_dependence(network, torch.randn(6, 8, 6, 6))
    assert found.output == found.gradient == facts.depends_on_others
    assert found.state == facts.running_state
    assert found.untested == ()
    for kind in ("output", "gradient"):
        paths = named(found, kind)
        assert {path[0] for path in paths} == ({"0", "1"} if facts.depends_on_others else set())
        assert all("linear" not in path and "activation" not in path for path in paths)
    if facts.same_in_eval:
        assert not batch_dependence(network.eval(), torch.randn(6, 8, 6, 6))


@pytest.mark.parametrize("samples", [2, 3, 4, 5])
def test_all_of_many_norms_that_validators_by_type_miss_are_found(samples):
    layers, width = [], 3
    for index in range(49):
        norm = (Subclass, Fused, nn.BatchNorm2d)[index % 3](6, affine=index % 2 == 0)
        layers += [nn.Conv2d(width, 6, 3, padding=1), norm.requires_grad_(False), nn.LeakyReLU()]
        width = 6
    found = batch_dependence(nn.Sequential(*layers), torch.randn(samples, 3, 4, 4))
    expected = [str(index) for index in range(1, 147, 3)]
    assert named(found, "output") == named(found, "gradient") == named(found, "state") == expected
    assert found.untested == ()


FOUND = seeded(
    lambda: {
        "no running statistics, in eval": (
            nn.Sequential(conv(), nn.BatchNorm2d(8, track_running_stats=False)).eval(),
            IMAGES,
            ["1"],
        ),
        "one of two frozen": (nn.Sequential(conv(), nn.BatchNorm2d(8).eval(), nn.BatchNorm2d(8)), IMAGES, ["2"]),
        "functional": (Code(lambda m, x: m.b(functional_norm(m.a(x))), a=conv(), b=conv(8)), IMAGES, [""]),
        "functional inside": (
            nn.Sequential(conv(), Code(lambda m, x: m.b(functional_norm(m.a(x))), a=conv(8), b=conv(8)), nn.ReLU()),
            IMAGES,
            ["1"],
        ),
        "centred": (nn.Sequential(nn.Linear(6, 6), Code(lambda m, x: x - x.mean(0)), nn.Linear(6, 3)), VECTORS, ["1"]),
        "running sum over the batch": (nn.Sequential(nn.Linear(6, 6), Code(lambda m, x: x.cumsum(0))), VECTORS, ["1"]),
        "mixed with another": (
            nn.Sequential(nn.Linear(6, 6), Code(lambda m, x: 0.9 * x + 0.1 * x.flip(0))),
            VECTORS,
            ["1"],
        ),
        "two of the samples": (nn.Sequential(nn.Linear(6, 6), Code(lambda m, x: x + x[[2, 1, 0, 3]])), VECTORS, ["1"]),
        "moved": (nn.Sequential(nn.Linear(6, 6), Code(lambda m, x: x.roll(1, 0)), nn.Linear(6, 3)), VECTORS, ["1"]),
        "contrastive": (
            Code(lambda m, x: (lambda z: z @ z.T)(F.normalize(m.encoder(x), dim=1)), encoder=nn.Linear(6, 5)),
            VECTORS,
            [""],
        ),
        "two samples of features": (
            nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8)),
            VECTORS[:2],
            ["1", "4"],
        ),
        "half of the channels": (
            nn.Sequential(
                conv(),
                Code(
                    lambda m, x: torch.cat([m.instance(x[:, :4]), m.batch(x[:, 4:])], 1),
                    instance=nn.InstanceNorm2d(4),
                    batch=nn.BatchNorm2d(4),
                ),
                conv(8),
            ),
            IMAGES,
            ["1.batch"],
        ),
        "shared, with a residual": (
            Code(lambda m, x: m.norm(x + m.norm(m.a(x))), a=conv(3, 3), norm=nn.BatchNorm2d(3)),
            IMAGES,
            ["norm"],
        ),
        "between shuffles": (
            Code(
                lambda m, x: m.encoder(x[[2, 0, 3, 1]])[[1, 3, 0, 2]],
                encoder=nn.Sequential(conv(), nn.BatchNorm2d(8), nn.ReLU(), conv(8)),
            ),
            IMAGES,
            ["encoder.1"],
        ),
        "steps folded into the batch": (
            Code(lambda m, x: m.norm(m.a(x.flatten(0, 1))).view(4, 5, 7), a=nn.Linear(6, 7), norm=nn.BatchNorm1d(7)),
            STEPS,
            ["norm"],
        ),
        "batch folded into the steps": (
            Code(
                lambda m, x: m.norm(m.a(x.transpose(0, 1).flatten(0, 1))).view(5, -1, 7).transpose(0, 1),
                a=nn.Linear(6, 7),
                norm=nn.BatchNorm1d(7),
            ),
            STEPS,
            ["norm"],
        ),
        "recurrent over the samples": (Code(lambda m, x: m.lstm(x)[0], lstm=nn.LSTM(6, 5)), SQUARE, ["lstm"]),
        "attention over the samples": (
            Code(lambda m, x: m.a(x, x, x)[0], a=nn.MultiheadAttention(6, 2)),
            SQUARE,
            ["a"],
        ),
        "before steps first": (
            Code(
                lambda m, x: m.lstm(functional_norm(x.transpose(1, 2)).permute(2, 0, 1))[0].transpose(0, 1),
                lstm=nn.LSTM(6, 5),
            ),
            SQUARE,
            [""],
        ),
        "after tokens": (
            Code(lambda m, x: m.norm(m.a(x).transpose(1, 2)), a=nn.Embedding(9, 6), norm=nn.BatchNorm1d(6)),
            torch.arange(20).view(4, 5) % 9,
            ["norm"],
        ),
        "experts of limited capacity": (nn.Sequential(nn.Linear(6, 6), Experts(10)), STEPS, ["1"]),
        "list of samples": (Code(lambda m, x: [m.a(row - x.mean(0)) for row in x], a=nn.Linear(6, 4)), VECTORS, [""]),
    }
)


@pytest.mark.parametrize("case", FOUND)
def test_the_innermost_module_in_whose_code_samples_meet_is_named(case):
    model, x, expected = FOUND[case]
    found = batch_dependence(model, x)
    assert found.output
    assert found.gradient
    assert named(found, "output") == named(found, "gradient") == expected
    assert all(entry.effect > 1e-7 for entry in found.modules)


CLEAN = seeded(
    lambda: {
        "group, layer and instance norm": (
            nn.Sequential(conv(), nn.GroupNorm(2, 8), nn.InstanceNorm2d(8), nn.LayerNorm([8, 8, 8])),
            IMAGES,
        ),
        "batch norm in eval": (nn.Sequential(conv(), nn.BatchNorm2d(8)).eval(), IMAGES),
        "frozen batch norm": (nn.Sequential(conv(), nn.BatchNorm2d(8).eval(), conv(8)), IMAGES),
        "dropout": (nn.Sequential(conv(), nn.Dropout(0.5), nn.Dropout2d(0.3), nn.AlphaDropout(0.2)), IMAGES),
        "stochastic depth of the batch": (
            Code(lambda m, x: x + m.a(x) if random.random() + np.random.rand() < 1 else x, a=conv(3, 3)),
            IMAGES,
        ),
        "stochastic depth of samples": (
            Code(lambda m, x: x + m.a(x) * torch.rand(len(x), 1, 1, 1).round(), a=conv(3, 3)),
            IMAGES,
        ),
        "attention": (nn.TransformerEncoderLayer(6, 2, 12, batch_first=True), STEPS),
        "attention in eval": (nn.TransformerEncoderLayer(6, 2, 12, batch_first=True).eval(), STEPS),
        "steps first": (
            Code(lambda m, x: m.lstm(x.transpose(0, 1))[0].transpose(0, 1), lstm=nn.LSTM(6, 5)),
            SQUARE,
        ),
        "attention, steps first": (
            Code(
                lambda m, x: (lambda y: m.a(y, y, y)[0].transpose(0, 1))(x.transpose(0, 1)),
                a=nn.MultiheadAttention(6, 2),
            ),
            SQUARE,
        ),
        "folded": (Code(lambda m, x: m.a(x.flatten(0, 1)).view(-1, 5, 7), a=nn.Linear(6, 7)), STEPS),
        "shuffled and back": (Code(lambda m, x: m.a(x[[2, 0, 3, 1]])[[1, 3, 0, 2]], a=conv()), IMAGES),
        "experts": (nn.Sequential(nn.Linear(6, 6), Experts()), STEPS),
        "list of samples": (Code(lambda m, x: [m.a(row) for row in x], a=nn.Linear(6, 4)), VECTORS),
        "two views": (Code(lambda m, x: torch.cat([m.a(x), m.a(2 * x)]), a=nn.Linear(6, 4)), VECTORS),
        "input changed in place": (Code(lambda m, x: m.a(x.relu_()), a=nn.Linear(6, 4)), VECTORS),
        "one batch size only": (Code(lambda m, x: m.a(x.reshape(4, 2, 3)).view(4, 8), a=nn.Linear(3, 4)), VECTORS),
        "zero at the start": (nn.Sequential(nn.Linear(6, 6), zeroed(nn.Linear(6, 3))), VECTORS),
        "spectral norm": (nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))), VECTORS),
        "gradient in forward": (
            Code(lambda m, x: torch.autograd.grad(m.a(x).tanh().sum(), x, create_graph=True)[0], a=nn.Linear(6, 3)),
            VECTORS,
        ),
        "tokens, nothing trained": (
            nn.Sequential(nn.Embedding(9, 6), nn.LayerNorm(6)).requires_grad_(False),
            torch.arange(20).view(4, 5) % 9,
        ),
    }
)


@pytest.mark.parametrize("case", CLEAN)
def test_what_treats_samples_apart_is_not_accused(case):
    found = batch_dependence(*CLEAN[case])
    assert not found, str(found)
    assert found.modules == found.untested == ()
