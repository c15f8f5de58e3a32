"""Exported models as modules, and what of their files is refused."""

import io
import json
import os
import pickle
import zipfile

import pytest
import torch
from torch import nn

from normprop.errors import DataError
from normprop.graph.convert import convert
from normprop.graph.exported import load_exported


class Net(nn.Module):
    """Two inputs, one by name, and a dict of outputs."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, groups=1, bias=False), nn.BatchNorm2d(8), nn.SiLU())
        self.up = nn.ConvTranspose2d(8, 6, 3, 2, 1, 1, groups=2)
        self.padded = nn.Conv2d(6, 6, 3, padding=1, padding_mode="circular")
        self.head = nn.Linear(6, 4)

    def forward(self, x, *, scale):
        y = self.padded(self.up(self.body(x)))
        return {"maps": y, "scores": (self.head(y.mean((2, 3))) * scale, scale)}


@pytest.fixture(scope="module", params=["train", "eval"])
def net(request):
    torch.manual_seed(0)
    made = Net()
    nn.init.normal_(made.body[1].running_mean)
    return getattr(made, request.param)()


@pytest.fixture(scope="module")
def saved(net, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "net.pt2"
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(
        net,
        (torch.randn(4, 3, 8, 8),),
        {"scale": torch.randn(4, 1)},
        dynamic_shapes={"x": {0: batch}, "scale": {0: batch}},
    )
    torch.export.save(program, path)
    return path


def changed(saved, path, change):
    """The file with one entry changed or added."""
    with zipfile.ZipFile(saved) as old, zipfile.ZipFile(path, "w") as new:
        entries = {name.partition("/")[2]: old.read(name) for name in old.namelist()}
        change(entries)
        for name, content in entries.items():
            new.writestr(f"net/{name}", content)
    return path


def rewritten(entries, name, edit):
    document = json.loads(entries[name])
    edit(document)
    entries[name] = json.dumps(document).encode()


class Trap:
    """A pickle that leaves a mark when it is read."""

    def __reduce__(self):
        return os.mkdir, (os.environ["MARK"],)


@pytest.fixture(autouse=True)
def mark(tmp_path, monkeypatch):
    """Where a trap leaves its mark; no test may find one."""
    monkeypatch.setenv("MARK", str(tmp_path / "mark"))
    yield
    assert not (tmp_path / "mark").exists()


def test_modules_are_torchs_own_under_their_paths(net, saved):
    made, example = load_exported(saved)
    for path in ("body.0", "body.1", "up", "head"):
        one, other = made.get_submodule(path), net.get_submodule(path)
        assert repr(one) == repr(other)
        assert one.training == (other.training if path == "body.1" else True)
    assert made.state_dict().keys() == net.state_dict().keys()
    assert [tuple(value.shape) for value in example] == [(4, 3, 8, 8), (4, 1)]


def test_the_model_computes_the_same_on_any_batch(net, saved):
    made, _ = load_exported(saved)
    x, scale = torch.randn(7, 3, 8, 8), torch.randn(7, 1)
    with torch.no_grad():
        one, other = made(x, scale), net(x, scale=scale)
    assert one.keys() == other.keys()
    torch.testing.assert_close(one["maps"], other["maps"])
    torch.testing.assert_close(one["scores"], other["scores"])


def test_a_model_in_evaluation_can_be_put_into_training(saved):
    made, (x, scale) = load_exported(saved)
    made.train()
    before = made.body.get_submodule("1").running_mean.clone()
    made(x, scale)
    assert not torch.equal(made.body.get_submodule("1").running_mean, before)


def pickled_weight(entries):
    name = "data/weights/model_weights_config.json"
    rewritten(entries, name, lambda config: config["config"]["head.bias"].update(use_pickle=True))


def pickled_example(entries):
    content = io.BytesIO()
    torch.save(Trap(), content)
    entries["data/sample_inputs/model.pt"] = content.getvalue()


def opaque(entries):
    entries["data/constants/opaque_obj_0"] = pickle.dumps(Trap())


def legacy(entries):
    entries["data/weights/model.pt"] = pickle.dumps(Trap())


def compiled(entries):
    entries["data/aotinductor/model/model.so"] = b"\x7fELF"


def _targets(document, target):
    document["graph_module"]["graph"]["nodes"][0]["target"] = target


def command(entries):
    rewritten(entries, "models/model.json", lambda document: _targets(document, "torch.os.mkdir"))


def reads_files(entries):
    rewritten(entries, "models/model.json", lambda document: _targets(document, "torch.ops.aten.from_file.default"))


def calls_methods(entries):
    rewritten(entries, "models/model.json", lambda document: _targets(document, "_operator.methodcaller"))


def size(entries):
    text = entries["models/model.json"].decode()
    assert '"expr_str": "Symbol(\'' in text
    start = text.index('"expr_str": "') + len('"expr_str": "')
    end = text.index('"', start)
    code = "__import__('os').mkdir(__import__('os').environ['MARK'])"
    entries["models/model.json"] = (text[:start] + code + text[end:]).encode()


def imports(entries):
    def edit(document):
        signature = document["graph_module"]["module_call_graph"][0]["signature"]
        spec = json.loads(signature["in_spec"])
        context = {"default_factory_module": "os", "default_factory_name": "getcwd", "dict_context": []}
        spec[1]["children_spec"][1].update(type="collections.defaultdict", context=context)
        signature["in_spec"] = json.dumps(spec)

    rewritten(entries, "models/model.json", edit)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (pickled_weight, "'head.bias' of its weights is pickled"),
        (pickled_example, "its example input is a pickle of more than tensors"),
        (opaque, "it holds 'data/constants/opaque_obj_0'"),
        (legacy, "it holds 'data/weights/model.pt'"),
        (compiled, "it holds 'data/aotinductor/model/model.so'"),
        (command, "it calls 'torch.os.mkdir'"),
        (reads_files, "it calls 'torch.ops.aten.from_file.default'"),
        (calls_methods, "it calls '_operator.methodcaller'"),
        (size, "as the size of a tensor"),
        (imports, "an input or output of it is a collections.defaultdict"),
    ],
)
def test_what_could_run_is_refused(saved, tmp_path, change, expected):
    path = changed(saved, tmp_path / "net.pt2", change)
    with pytest.raises(DataError, match="is refused: ") as caught:
        load_exported(path)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_something_else(saved, tmp_path):
    path = tmp_path / "net.pt2"
    with pytest.raises(DataError, match="there is no such file"):
        load_exported(path)
    path.write_bytes(b"no zip")
    with pytest.raises(DataError, match="is no file of torch"):
        load_exported(path)
    torch.save({"weight": torch.zeros(2)}, path)
    with pytest.raises(DataError, match="is no file of torch"):
        load_exported(path)
    changed(saved, path, lambda entries: entries.update({"models/model.json": b"{"}))
    with pytest.raises(DataError, match="is damaged"):
        load_exported(path)
    changed(saved, path, lambda entries: entries.update({"models/model.json": b"{}"}))
    with pytest.raises(DataError, match="cannot be read"):
        load_exported(path)


def test_classes_keep_their_names(saved):
    made, _ = load_exported(saved)
    assert type(made).__name__ == "Net"
    assert type(made.body).__name__ == "Sequential"


class Shared(nn.Module):
    """A module called twice, once in each of two ways."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(4, 2)

    def part(self, x):
        return self.norm(self.conv(x)).relu()

    def forward(self, x):
        return self.last((self.part(x) + self.part(2 * self.part(x))).mean((2, 3)))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Shared()

    def forward(self, x):
        return self.inner(x) - self.inner(x.flip(2) * 2)


def test_modules_that_are_called_twice_stay_one(tmp_path):
    torch.manual_seed(0)
    net, x = Twice().eval(), torch.randn(3, 4, 5, 5)
    torch.export.save(torch.export.export(net, (x,)), tmp_path / "net.pt2")
    made, _ = load_exported(tmp_path / "net.pt2")
    torch.testing.assert_close(made(x), net(x))
    assert sum(isinstance(module, nn.BatchNorm2d) for module in made.modules()) == 1
    assert not [path for path, _ in made.named_modules() if "@" in path]
    converted = convert(made, x, weights="exact")
    torch.testing.assert_close(converted.eval()(x), net(x), rtol=1e-4, atol=1e-6)


def test_a_layer_alone(tmp_path):
    net, x = nn.Linear(3, 2), torch.randn(4, 3)
    torch.export.save(torch.export.export(net, (x,)), tmp_path / "net.pt2")
    made, _ = load_exported(tmp_path / "net.pt2")
    torch.testing.assert_close(made(x), net(x))
