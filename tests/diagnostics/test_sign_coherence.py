import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normprop import models
from normprop.diagnostics import sign_coherence as sc
from normprop.diagnostics.diagnosis import Subject
from normprop.diagnostics.linear_calls import LinearCall
from normprop.diagnostics.loss import gradients
from normprop.errors import ConfigError
from normprop.functional import activate, normalization, normalize_weight
from normprop.moments import resolve


def subject(norm="batch", name="resnet8", shape=(3, 8, 8), samples=6):
    model = models.create(name, shape, 10, norm=norm, width=0.25)
    return Subject(norm, model, torch.randn(samples, *shape), torch.randint(0, 10, (samples,)))


def coherence(function, weight, u, d, **options):
    call = LinearCall("", function, {"input": u, "weight": weight, **options}, d)
    return sc.sign_coherence([call], [d])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": 1},
        {"padding": "valid"},
        {"stride": 2, "padding": (1, 0)},
        {"dilation": 2, "padding": 2},
        {"groups": 2},
        {"stride": (2, 1), "groups": 4, "padding": 1},
    ],
)
def test_convolution_entry_by_entry(options):
    # Brute force by autograd: one backward pass per output position, which is one term per entry.
    groups = options.get("groups", 1)
    weight = torch.randn(4, 4 // groups, 3, 2, dtype=torch.float64, requires_grad=True)
    u = torch.randn(3, 4, 6, 5, dtype=torch.float64)
    out = F.conv2d(u, weight, **options)
    d = torch.randn_like(out)
    a, b1, c = (torch.zeros_like(weight) for _ in range(3))
    for b in range(len(u)):
        sample = torch.zeros_like(weight)
        for y in range(out.shape[2]):
            for x in range(out.shape[3]):
                # Output channels have entries of their own, so one pass does for all of them.
                (term,) = torch.autograd.grad((out * d)[b, :, y, x].sum(), weight, retain_graph=True)
                a += term.abs()
                sample += term
        b1 += sample.abs()
        c += sample
    for found, expected in zip(coherence(F.conv2d, weight.detach(), u, d, **options), (a, b1, c.abs()), strict=True):
        torch.testing.assert_close(found, expected)


def test_linear_against_sums_over_terms():
    u, d = torch.randn(5, 3, 4, dtype=torch.float64), torch.randn(5, 3, 2, dtype=torch.float64)
    terms = torch.einsum("bpo,bpi->bpoi", d, u)
    a, b1, c = coherence(F.linear, torch.zeros(2, 4, dtype=torch.float64), u, d)
    torch.testing.assert_close(a, terms.abs().sum((0, 1)))
    torch.testing.assert_close(b1, terms.sum(1).abs().sum(0))
    torch.testing.assert_close(c, terms.sum((0, 1)).abs())


@pytest.mark.parametrize("function", [F.linear, F.conv1d, F.conv3d])
def test_positive_inputs_and_a_constant_gradient_have_one_sign(function):
    shapes = {
        F.linear: ((7, 3), (2, 3)),
        F.conv1d: ((7, 3, 9), (2, 3, 4)),
        F.conv3d: ((7, 3, 4, 4, 4), (2, 3, 2, 3, 1)),
    }
    inputs, kernel = shapes[function]
    u, weight = torch.rand(inputs, dtype=torch.float64), torch.randn(kernel, dtype=torch.float64)
    d = torch.full_like(function(u, weight), -0.3)
    a, b1, c = coherence(function, weight, u, d)
    torch.testing.assert_close(a, c)
    torch.testing.assert_close(a, b1)
    assert bool((a > 0).all())


def test_independent_signs_cancel_like_the_root_of_their_number():
    # E|sum of n independent N(0, 1) terms| / sum E|.| = 1 / sqrt(n): per sample n = 64 positions, over 8 samples 512.
    u = torch.ones(8, 1, 8, 8, dtype=torch.float64)
    d = torch.randn(8, 4000, 8, 8, dtype=torch.float64)
    a, b1, c = (value.mean().item() for value in coherence(F.conv2d, torch.zeros(4000, 1, 1, 1).double(), u, d))
    # |N(0, 1)| has standard deviation 0.756 of its mean.
    assert a / b1 == pytest.approx(8.0, rel=5 * 0.756 / math.sqrt(8 * 4000))
    assert a / c == pytest.approx(math.sqrt(512), rel=5 * 0.756 / math.sqrt(4000))


@pytest.mark.parametrize("norm", ["none", "batch", "group"])
def test_the_total_is_the_gradient_of_the_weight(norm):
    case = subject(norm)
    model, inputs = case.model.double(), case.inputs.double()
    found = sc.measure(Subject(norm, model, inputs, case.labels))
    _, own = gradients(model, inputs, case.labels)
    assert found.total == pytest.approx(own[f"{found.layer}.linear.weight"].abs().mean().item(), rel=1e-9)
    assert found.terms > found.per_sample > found.total


def test_of_normprop_it_is_the_gradient_by_the_effective_weight():
    model = models.create("mlp", (6,), 4, norm="normprop", width=0.1).double()
    inputs, labels = torch.randn(9, 6, dtype=torch.float64), torch.arange(9) % 4
    layer = model[1]
    with torch.no_grad():
        layer.gain.mul_(1.3)
    found = sc.measure(Subject("normprop", model, inputs, labels), "1")
    # The same network with the layer's effective weight as a leaf: a plain map, then the layer's own constants.
    rule = resolve(layer.activation)
    constants = normalization(rule, layer.gain, layer.bias, "live")
    weight = normalize_weight(layer.weight, constants.scale, center=layer.center).detach().requires_grad_()
    hidden = activate(F.linear(inputs, weight, constants.shift), rule, constants)
    torch.testing.assert_close(hidden, layer(inputs))
    (expected,) = torch.autograd.grad(F.cross_entropy(model[2:](hidden), labels), weight)
    assert found.total == pytest.approx(expected.abs().mean().item(), rel=1e-9)


def test_a_layer_that_is_called_twice_adds_its_terms():
    layer = nn.Linear(5, 5).double()
    model = nn.Sequential(layer, nn.Tanh(), layer)
    inputs, labels = torch.randn(7, 5, dtype=torch.float64), torch.arange(7) % 5
    found = sc.measure(Subject("shared", model, inputs, labels))
    _, own = gradients(model, inputs, labels)
    assert found.total == pytest.approx(own["0.weight"].abs().mean().item(), rel=1e-9)
    samples = [gradients(model, inputs[k : k + 1], labels[k : k + 1])[1]["0.weight"] / 7 for k in range(7)]
    assert found.per_sample == pytest.approx(sum(s.abs() for s in samples).mean().item(), rel=1e-9)


@pytest.mark.parametrize("norm", ["none", "normprop", "batch", "cross-iteration", "kalman-batch"])
@pytest.mark.parametrize("training", [True, False])
def test_the_network_stays_as_it_is(norm, training, unchanged):
    case = subject(norm)
    case.model.append(nn.Dropout(0.3)).train(training)
    with unchanged(case.model):
        with torch.no_grad():
            first, second = sc.measure(case), sc.measure(case)
        assert first == second


def test_unnormalised_terms_share_their_sign_more_than_normalised_ones():
    plain, normed = (sc.measure(subject(norm, "nin", (3, 16, 16), 32)) for norm in ("none", "batch"))
    assert plain.overall < normed.overall / 2


def test_errors_are_one_line():
    case = subject("none", "mlp", (5,))
    many = nn.Sequential(nn.Flatten(0, 1), nn.Linear(5, 5), nn.Unflatten(0, (2, 3)), nn.Flatten())
    for call, words in [
        (lambda: sc.measure(Subject("a", case.model, case.inputs)), "a: the loss needs labels"),
        (lambda: sc.measure(case, "nowhere"), "no layer 'nowhere' that calls .* there are 1, 2, 3, 4, 5"),
        (lambda: sc.measure(Subject("a", nn.Identity(), torch.ones(2, 3), torch.tensor([0, 1]))), "there are none"),
        (lambda: sc.measure(Subject("a", many, torch.ones(2, 3, 5), torch.tensor([0, 1]))), "one row for each of"),
        (lambda: sc.measure(Subject("a", case.model, torch.ones(6, 4), case.labels)), "cannot run under torch.func"),
        (lambda: coherence(F.linear, torch.ones(1, 1), torch.ones(3, 1), torch.ones(2, 1)), "got 3 and 2"),
    ]:
        with pytest.raises(ConfigError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_describe_one_and_more():
    a, b = sc.SignCoherence("3", 12.0, 6.0, 4.0), sc.SignCoherence("5", 12.0, 3.0, 0.0)
    assert sc.describe({"none": a}).found == (
        "none: without their signs, the terms of the gradient of layer 3 add up to 2 times what is left of them within "
        "images (a/b1), and 3 times what is left in all (a/c)."
    )
    zero, lost = sc.SignCoherence("1", 0.0, 0.0, 0.0), sc.SignCoherence("1", math.nan, 1.0, 1.0)
    more = sc.describe({"none": a, "batch": b, "zero": zero, "lost": lost})
    _, second, *rest = more.found.splitlines()
    assert second.startswith("batch: ")
    assert "layer 5 add up to 4 times" in second
    assert "and inf times what is left in all" in second
    assert rest == ["zero: all terms of the gradient of layer 1 are 0.", "lost: the gradient of layer 1 is not finite."]
    assert more.numbers["none"] == {"layer": "3", "a": 12, "b1": 6, "c": 4, "a_over_b1": 2, "a_over_c": 3}
    json.dumps(more.numbers, allow_nan=False)
    assert list(more.figures[0].lines[0].y) == pytest.approx([1, 1 / 2, 1 / 3])
