import pytest
import torch

from normprop import models, nn, norms
from normprop.errors import ConfigError


@pytest.mark.parametrize("name", ["nin", "resnet8", "two-view", "mlp"])
@pytest.mark.parametrize("norm", norms.names())
def test_every_network_takes_every_method_and_trains(name, norm):
    torch.manual_seed(0)
    if name == "mlp" and 0 not in norms.info(norm).dims:
        with pytest.raises(ConfigError, match=rf"norms\.{norm}"):
            models.create(name, (3, 16, 16), 5, norm=norm, width=0.25)
        return
    network = models.create(name, (3, 16, 16), 5, norm=norm, width=0.25)
    logits = network(torch.randn(4, 3, 16, 16))
    assert logits.shape == (4, 5)
    torch.nn.functional.cross_entropy(logits, torch.arange(4)).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())


@pytest.mark.parametrize("norm", ["normprop", "normprop-paper"])
@pytest.mark.parametrize("name", ["nin", "resnet14", "mlp"])
def test_normprop_networks_do_not_mix_samples_and_take_batch_size_1(name, norm):
    torch.manual_seed(0)
    network = models.create(name, (3, 16, 16), 5, norm=norm, width=0.25)
    batch = torch.randn(3, 3, 16, 16)
    output = network(batch)
    torch.testing.assert_close(network.eval()(batch[:1]), output[:1], rtol=1e-4, atol=1e-5)


def test_nin_is_the_papers():
    for printed in (False, True):
        network = models.nin(3, 10, norm="none", printed_padding=printed)
        convolutions = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
        assert [c.out_channels for c in convolutions] == [192, 160, 96, 192, 192, 192, 192, 192, 10]
        assert [c.kernel_size[0] for c in convolutions] == [5, 1, 1, 5, 1, 1, 5, 1, 1]
        paddings = [c.padding[0] for c in convolutions]
        assert paddings == ([2, 0, 0, 2, 0, 0, 0, 2, 0] if printed else [2, 0, 0, 2, 0, 0, 2, 0, 0])
        sizes = []
        output = torch.randn(2, 3, 32, 32)
        for child in network:
            output = child(output)
            sizes.append(output.shape[-1])
        assert output.shape == (2, 10)
        expected = [32, 32, 16, 16, 16, 16, 8, 8, 4 if printed else 8, 8, 8, 1, 10]
        assert sizes == expected


@pytest.mark.parametrize("depth", [8, 14, 20])
def test_resnet_has_as_many_layers_as_it_says(depth):
    network = models.resnet(depth, norm="batch")
    layers = [m for m in network.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    projections = [m for m in layers if getattr(m, "kernel_size", None) == (1, 1)]
    assert len(layers) - len(projections) == depth
    assert len(projections) == 2


def test_residual_networks_of_normprop_predict_their_sums():
    network = models.resnet(14)
    assert sum(isinstance(m, nn.Residual) for m in network.modules()) == 6


def test_own_factories(tmp_path, monkeypatch):
    (tmp_path / "my_networks.py").write_text(
        "import torch\n"
        "def tiny(norm): return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))\n"
        "def wrong(norm): return norm\n"
    )
    monkeypatch.chdir(tmp_path)
    assert models.create("my_networks:tiny", (1, 2, 2), 2, norm="batch")(torch.zeros(1, 4)).shape == (1, 2)
    with pytest.raises(ConfigError, match="no callable 'absent'"):
        models.create("my_networks:absent", (1, 2, 2), 2)
    with pytest.raises(ConfigError, match=r"returned str, not a torch\.nn\.Module"):
        models.create("my_networks:wrong", (1, 2, 2), 2)
    with pytest.raises(ConfigError, match="no module 'nowhere_at_all'"):
        models.create("nowhere_at_all:f", (1, 2, 2), 2)


def test_errors():
    with pytest.raises(ConfigError, match="no model 'vgg'"):
        models.create("vgg", (3, 32, 32), 10)
    with pytest.raises(ConfigError, match="depth must be 6n"):
        models.create("resnet9", (3, 32, 32), 10)
    with pytest.raises(ConfigError, match="use mlp"):
        models.create("nin", (64,), 10)
