"""Folding in any wiring: only what is exact, proved, and everything else as it was."""

import copy
import io
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normprop import fold, models, norms
from normprop import nn as np_nn
from normprop.errors import ConversionError
from normprop.graph import fold_merge
from normprop.nn import PredictedNorm
from tests.graph.fold_checks import agree, both_ways, kinds, stirred


class Wired(nn.Module):
    """One convolution, one batch norm and another convolution, wired by a function."""

    def __init__(self, wire, conv=None, after=None):
        super().__init__()
        self.conv = conv or nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.after = after or nn.Conv2d(4, 4, 3)
        self.wire = wire

    def forward(self, x):
        return self.wire(self, x)


def straight(m, x):
    return m.after(F.relu(m.norm(m.conv(x))))


WIRES = {
    # name: (forward, elementwise operations left, second convolution)
    "absorbed": (straight, 0, None),
    "through dropout": (lambda m, x: m.after(m.norm(F.dropout(m.conv(x), 0.5, m.training))), 0, None),
    "into the next": (lambda m, x: m.after(m.norm(F.relu(m.conv(x)))), 0, None),
    "through a max pool": (lambda m, x: m.after(F.max_pool2d(m.norm(F.relu(m.conv(x))), 2)), 0, None),
    "through an average": (lambda m, x: m.after(F.avg_pool2d(m.norm(F.relu(m.conv(x))), 3, 1, 0)), 0, None),
    "average that counts zeros": (lambda m, x: m.after(F.avg_pool2d(m.norm(F.relu(m.conv(x))), 3, 1, 1)), 1, None),
    "average that does not": (
        lambda m, x: m.after(F.avg_pool2d(m.norm(F.relu(m.conv(x))), 3, 1, 1, count_include_pad=False)),
        0,
        None,
    ),
    "zero padding": (lambda m, x: m.after(m.norm(F.relu(m.conv(x)))), 1, nn.Conv2d(4, 4, 3, padding=1)),
    "zero padding, transposed": (lambda m, x: m.after(m.norm(F.relu(m.conv(x)))), 1, nn.ConvTranspose2d(4, 4, 3)),
    "replicate padding": (
        lambda m, x: m.after(m.norm(F.relu(m.conv(x)))),
        0,
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="replicate", groups=2),
    ),
    "through flatten": (lambda m, x: m.after(m.norm(F.relu(m.conv(x))).flatten(1)), 0, nn.Linear(4 * 36, 2)),
    "through a view": (lambda m, x: m.after(m.norm(F.relu(m.conv(x))).view(x.size(0), -1)), 0, nn.Linear(4 * 36, 2)),
    "channels last": (lambda m, x: m.after(m.norm(F.relu(m.conv(x))).permute(0, 2, 3, 1)), 0, nn.Linear(4, 2)),
    "along another axis": (lambda m, x: m.after(m.norm(F.relu(m.conv(x)))), 1, nn.Linear(6, 2)),
    "read twice": (lambda m, x: m.after(m.norm(y := m.conv(x)) + y), 1, None),
    "returned as well": (lambda m, x: (m.norm(y := m.conv(x)), y), 1, None),
    "called twice": (lambda m, x: m.after(m.norm(m.conv(x)) + m.conv(x.flip(3))), 1, None),
    "both called twice": (lambda m, x: m.after(m.norm(m.conv(x)) + m.norm(m.conv(x.flip(3)))), 0, None),
    "norm called elsewhere": (lambda m, x: m.after(m.norm(m.norm(m.conv(x)))), 1, None),
    "gated": (lambda m, x: m.after(m.norm(m.conv(x)) * m.conv(x).sigmoid()), 1, None),
    "weight read": (lambda m, x: m.norm(m.conv(x)) * m.conv.weight.mean(), 1, None),
    "next read twice": (lambda m, x: m.after(m.norm(y := F.relu(m.conv(x)))) + m.after(y), 1, None),
    "into two": (lambda m, x: m.after(m.norm(y := F.relu(m.conv(x)))) + m.norm(y).mean(), 1, None),
    "clamped": (lambda m, x: m.after(m.norm(F.relu(m.conv(x))).clamp(max=50.0)), 1, None),
    "overwritten": (lambda m, x: m.norm((y := m.conv(x)).relu_()) + y, 1, None),
}


@pytest.mark.parametrize("name", WIRES)
def test_only_what_is_exact_is_folded_in_any_wiring(name):
    wire, left, after = WIRES[name]
    net = stirred(Wired(wire, after=copy.deepcopy(after))).double()
    plain = fold(net, torch.randn(2, 3, 8, 8))
    assert kinds(plain).count("Elementwise") == left
    assert not any(isinstance(module, nn.BatchNorm2d) for module in plain.modules())
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(plain(x), net(x), rtol=1e-9, atol=1e-10)


def test_a_negative_gain_does_not_pass_a_max_pool():
    net = stirred(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.MaxPool2d(2), nn.Conv2d(3, 2, 1)))
    x = torch.randn(2, 3, 6, 6)
    assert "Elementwise" not in kinds(fold(net, x))
    with torch.no_grad():
        net[1].weight[1] = -1.0
    plain = fold(net, x)
    assert "Elementwise" in kinds(plain)
    agree(plain, net, x, rtol=1e-6)


def test_the_border_is_part_of_the_proof(monkeypatch):
    """A fold that forgets that zeros are padded is right inside and wrong at the border: it must be refused."""
    net = stirred(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 3, padding=1)))
    monkeypatch.setattr(fold_merge, "_takes", lambda model, reader: True)
    with pytest.raises(ConversionError, match=r"Sequential differs from its folded form by \d"):
        fold(net, torch.zeros(1, 3, 6, 6))
    with pytest.raises(ConversionError, match="differs from its folded form"):
        fold(net)


def test_a_module_whose_form_is_wrong_is_named(monkeypatch):
    right = fold_merge.scaled_outputs
    net = nn.Sequential(nn.Sequential(nn.Flatten(), stirred(np_nn.Linear(4, 3, activation="relu"))))
    module = sys.modules["normprop.graph.fold"]
    monkeypatch.setattr(module, "form", lambda module, shape: right(nn.Linear(4, 3).double(), _one()))
    with pytest.raises(ConversionError, match=r"fold: 0\.1 \(Linear\) differs from its plain form by \d\.\de"):
        fold(net, torch.randn(2, 4))


def _one():
    return fold_merge.Affine(torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64))


def test_statistics_of_one_axis_are_not_folded_along_another():
    """After a linear layer on tokens, batch norm normalises tokens, not features."""
    net = stirred(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)))
    plain = fold(net, torch.randn(2, 4, 5))
    assert kinds(plain) == ["Linear", "Elementwise"]
    agree(plain, net, torch.randn(3, 4, 5), rtol=1e-6)
    assert kinds(fold(net, torch.randn(2, 5))) == ["Linear", "Identity"]


def test_batch_norm_of_every_dimension_and_kind_of_layer():
    convs = [
        (nn.Conv1d(4, 6, 3, groups=2), nn.BatchNorm1d(6), (4, 7)),
        (nn.Conv3d(4, 6, 2, bias=False), nn.BatchNorm3d(6, affine=False), (4, 5, 5, 5)),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, bias=False), nn.BatchNorm2d(6), (4, 5, 5)),
        (nn.ConvTranspose1d(4, 6, 3, groups=2), nn.BatchNorm1d(6), (4, 5)),
        (nn.Conv2d(4, 6, 3), nn.InstanceNorm2d(6, affine=True, track_running_stats=True), (4, 5, 5)),
        (nn.Linear(4, 6), nn.BatchNorm1d(6), (4,)),
    ]
    for conv, norm, shape in convs:
        for plain in both_ways(stirred(nn.Sequential(conv, norm)), torch.randn(2, *shape)):
            assert kinds(plain) == [type(conv).__name__, "Identity"]


def test_batch_norm_behind_a_relu_becomes_part_of_the_threshold():
    net = stirred(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)))
    for plain in both_ways(net, torch.randn(2, 3, 7, 7)):
        assert kinds(plain) == ["Conv2d", "Elementwise", "Identity", "Conv2d"]
        assert [type(module).__name__ for module in plain.children()][1] == "Elementwise"


def test_normalised_input_is_folded_where_no_zeros_are_padded():
    norm = np_nn.DataNorm((3, 1, 1)).fit(torch.randn(9, 3, 8, 8) * 2 + 1)
    for padding, left in ((0, 0), (1, 1)):
        net = nn.Sequential(norm, np_nn.Conv2d(3, 4, 3, padding=padding, activation="relu"))
        for plain in both_ways(stirred(net), torch.randn(2, 3, 8, 8)):
            assert kinds(plain[0]).count("Elementwise") == left
    norm = np_nn.DataNorm((3, 4, 4)).fit(torch.randn(9, 3, 4, 4) * 2 + 1)
    both_ways(stirred(nn.Sequential(norm, nn.Flatten(), np_nn.Linear(48, 2))), torch.randn(2, 3, 4, 4))


def test_predicted_moments_without_a_layer_to_go_to():
    norm = PredictedNorm(3)
    norm.predict(torch.randn(3), torch.rand(3) + 0.5)
    net = stirred(nn.Sequential(nn.ReLU(), norm, nn.ReLU()))
    plain = fold(net, torch.randn(2, 3, 5, 5))
    agree(plain, net, torch.randn(2, 3, 5, 5), rtol=1e-6)
    assert kinds(plain) == ["ReLU", "Elementwise", "ReLU"]
    with pytest.raises(ConversionError, match=r"fold: 1 normalises channels, .* call fold\(net, x\)"):
        fold(net)
    agree(fold(norm, torch.randn(2, 3, 5)), norm, torch.randn(2, 3, 5), rtol=1e-6)


def test_a_fresh_data_norm_is_refused():
    with pytest.raises(ConversionError, match=r"call fit\(training data\)"):
        fold(nn.Sequential(np_nn.DataNorm((3, 1, 1))), torch.randn(2, 3, 4, 4))


def test_types_gradients_and_sharing_are_kept():
    shared = np_nn.Conv2d(4, 4, 3, padding=1, activation="relu")
    net = nn.Sequential(np_nn.Conv2d(3, 4, 3), shared, nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), shared)
    net.to(torch.bfloat16)[3].float()
    net[0].requires_grad_(False)
    before = copy.deepcopy(net)
    plain = fold(stirred(net), torch.randn(2, 3, 8, 8))
    assert plain[1] is plain[4]
    assert {tensor.dtype for tensor in [*plain.parameters(), *plain.buffers()]} == {torch.bfloat16}
    assert [plain[0].weight.requires_grad, plain[1][0].weight.requires_grad] == [False, True]
    assert net.state_dict().keys() == before.state_dict().keys()
    agree(plain, net, torch.randn(2, 3, 8, 8), rtol=0.05)


def test_the_network_itself_stays_as_it_is():
    net = models.resnet(8, width=0.5).train()
    state, printed = copy.deepcopy(net.state_dict()), repr(net)
    fold(net, torch.randn(2, 3, 8, 8))
    assert net.training
    assert repr(net) == printed
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, state[name])
    assert not any(module._forward_pre_hooks for module in net.modules())


@pytest.mark.parametrize("name", ["nin", "resnet8"])
def test_the_result_is_independent_of_normprop_and_of_the_original(name):
    net = stirred(models.create(name, (3, 16, 16), 10, width=0.2))
    plain = fold(net, torch.randn(2, 3, 16, 16))
    file = io.BytesIO()
    torch.save(plain, file)
    assert b"normprop" not in file.getvalue()
    file.seek(0)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = plain(x)
        loaded = torch.load(file, weights_only=False)
        again = fold(net, x)
        again.load_state_dict(plain.state_dict())
        for parameter in net.parameters():
            parameter.zero_()
        for model in (loaded, again, copy.deepcopy(plain), fold(plain, x)):
            torch.testing.assert_close(model(x), expected)


def test_a_folded_network_still_trains():
    plain = fold(models.resnet(8, width=0.5), torch.randn(2, 3, 8, 8)).train()
    plain(torch.randn(1, 3, 8, 8)).square().sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in plain.parameters())


def test_inputs_of_every_kind():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(5, 4)
            self.layer = np_nn.Linear(4, 3, activation="relu")

        def forward(self, tokens, *, scale=None):
            output = self.layer(self.embed(tokens))
            return {"output": output if scale is None else output * scale}

    tokens = torch.tensor([[1, 2], [3, 4]])
    for inputs in (tokens, (tokens,), {"tokens": tokens, "scale": torch.rand(3)}):
        net = stirred(Two())
        with torch.no_grad():
            torch.testing.assert_close(fold(net, inputs)(tokens)["output"], net(tokens)["output"])


def test_what_cannot_be_folded_is_one_clear_line():
    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x):
            return self.norm(x) * self.norm.running_var.mean()

    class Depends(Wired):
        def forward(self, x):
            return self.norm(self.conv(x)) if x.sum() == 0 else self.conv(x)

    x = torch.zeros(2, 3, 8, 8)
    for net, message in (
        (Asks(), "Asks cannot run on the example input: .*; its forward may ask more"),
        (Depends(None), "Depends differs from its folded form by .* depend on values"),
        (nn.Sequential(nn.Linear(3, 3, dtype=torch.complex64)), "0.weight is complex"),
        (nn.Sequential(nn.Conv2d(4, 2, 1)), "cannot run in float64 on the example input"),
        (nn.Sequential(norms.create("rms", 3)), r"fold: 0 \(RMSNorm\) has no plain form: it normalises by statistics"),
    ):
        with pytest.raises(ConversionError, match=message) as error:
            fold(stirred(net) if "complex" not in message else net, x)
        assert "\n" not in str(error.value)


def test_a_network_that_normalises_nothing_is_copied():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    for plain in (fold(net, torch.randn(1, 3, 5, 5)), fold(net)):
        assert plain is not net
        assert repr(plain) == repr(net)


def test_a_hooked_convolution_keeps_its_output():
    """What a hook reads must stay what it was."""
    net = stirred(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    seen = []
    net[0].register_forward_hook(lambda module, args, output: seen.append(output))
    plain = fold(net, torch.randn(2, 3, 5, 5))
    seen.clear()
    x = torch.randn(2, 3, 5, 5)
    with torch.no_grad():
        plain(x), net(x)
    torch.testing.assert_close(seen[0], seen[1])
