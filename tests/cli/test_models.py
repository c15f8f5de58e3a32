"""`normprop inspect`, `convert` and `fold`: models in, reports and weights out."""

import json
import re
import sys
from pathlib import Path

import numpy
import pytest
import safetensors.torch
import torch
from torch import nn

from normprop.cli.inputs import as_python, example
from normprop.cli.models import load

MODULE = """
import torch
from torch import nn

def small(num_classes=5, trained=False):
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8),
        nn.Conv2d(8, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, num_classes),
    )
    if trained:
        for norm in (net[1], net[3]):
            nn.init.normal_(norm.running_mean), nn.init.uniform_(norm.running_var, 0.5, 2.0)
            nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    return net.eval()

class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.norm, self.last = nn.Embedding(50, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)

    def forward(self, ids, scale):
        return self.last(self.norm(self.words(ids).mean(1))) * scale

ready, number = small(), 3

def wrong():
    return number
"""


@pytest.fixture(autouse=True)
def module(directory, request):
    """A module of the test's own in the current directory; its name."""
    name = f"mine_{abs(hash(request.node.nodeid))}"
    (directory / f"{name}.py").write_text(MODULE)
    yield name
    sys.modules.pop(name, None)


@pytest.fixture
def small(module):
    return (f"{module}:small", "--input", "4x3x8x8")


def code(out):
    """The Python that a command printed, run; its names."""
    lines = [line[4:] for line in out.split("in Python:")[1].splitlines() if line.startswith("    ")]
    assert any("load_state_dict" in line for line in lines)
    names = {}
    exec("\n".join(lines), names)
    return names


def evaluated(net, x):
    with torch.no_grad():
        return net.eval()(x)


# What comes in.


def test_shapes_become_inputs():
    torch.manual_seed(0)
    assert example(["4x3x8x8"]).shape == (4, 3, 8, 8)
    ids, mask = example(["64x5:7", "2"])
    assert (ids.dtype, ids.min(), ids.max()) == (torch.int64, 0, 6)
    assert mask.shape == (2,)
    assert {name: value.shape for name, value in example(["a=2x3", "b=4"]).items()} == {"a": (2, 3), "b": (4,)}


def test_an_array_of_ones_own_is_the_input(directory):
    values = numpy.arange(6, dtype=numpy.float32).reshape(2, 3)
    numpy.save("x.npy", values)
    assert torch.equal(example(["x.npy"]), torch.from_numpy(values))
    assert torch.equal(eval(as_python(["x.npy"]), {"torch": torch, "numpy": numpy}), torch.from_numpy(values))


@pytest.mark.parametrize("texts", [["3x4"], ["8x2:9"], ["3:4", "2x2"], ["a=3x4", "b=3:9"]])
def test_the_python_of_an_input_draws_the_same(texts):
    torch.manual_seed(0)
    drawn = example(texts)
    torch.manual_seed(0)
    again = eval(as_python(texts), {"torch": torch})
    assert str(drawn) == str(again)


def test_a_factory_gets_its_arguments_and_a_seed(module):
    loaded = load(f"{module}:small", '{"num_classes": 3}', ["1x3x8x8"], seed=1)
    assert loaded.model[-1].out_features == 3
    same = load(f"{module}:small", '{"num_classes": 3}', ["1x3x8x8"], seed=1)
    assert torch.equal(loaded.x, same.x)
    assert torch.equal(loaded.model[0].weight, same.model[0].weight)
    assert not torch.equal(loaded.x, load(f"{module}:small", "", ["1x3x8x8"], seed=2).x)
    ready = load(f"{module}:ready", "", ["1x3x8x8"])
    assert ready.model is sys.modules[module].ready
    assert "model = ready" in ready.lines


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nowhere:small", "--input", "1x3"], "there is no module 'nowhere'"),
        (["MODULE:none", "--input", "1x3"], "has no 'none'"),
        (["MODULE:number", "--input", "1x3"], "is a int, neither a factory nor a torch.nn.Module"),
        (["MODULE:wrong", "--input", "1x3"], "the factory returned int, not a torch.nn.Module"),
        (["MODULE", "--input", "1x3"], "give package.module:factory, or a .pt2 file"),
        (["MODULE:small"], "--input is missing"),
        (["MODULE:small", "--input", "0x3"], "--input must be a shape such as"),
        (["MODULE:small", "--input", "a=1x3", "--input", "1x3"], "give every input a name"),
        (["MODULE:small", "--input", "1x4x8x8"], "4 channels"),
        (["MODULE:small", "--input", "none.npy"], "none.npy: there is no such file"),
        (["MODULE:small", "--input", "1x3x8x8", "--args", "{"], "--args must be JSON"),
        (["MODULE:small", "--input", "1x3x8x8", "--args", "[1]"], "--args must be an object of names and values"),
        (["MODULE:small", "--input", "1x3x8x8", "--args", '{"depth": 3}'], "unexpected keyword argument 'depth'"),
        (["MODULE:ready", "--input", "1x3x8x8", "--args", '{"depth": 3}'], "is a Sequential already"),
        (["MODULE:small", "--input", "1x3x8x8", "--weights", "none.pt"], "none.pt: there is no such file"),
        (["MODULE:small", "--input", "1x3x8x8", "--weights", "none.safetensors"], "there is no such file"),
        (["none.pt2"], "none.pt2: there is no such file"),
        (["MODULE.py.pt2"], "there is no such file"),
    ],
)
@pytest.mark.parametrize("command", ["inspect", "convert", "fold"])
def test_one_line_and_code_2(line, directory, module, command, arguments, expected):
    before = sorted(directory.rglob("*.py"))
    assert expected in line(command, *(part.replace("MODULE", module) for part in arguments))
    assert sorted(path for path in directory.rglob("*") if path.suffix not in (".pyc", "")) == before


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["convert", "--mode", "exactly"], "weights must be one of 'fresh', 'exact', 'rescale'"),
        (["convert", "--to", "nothing"], "no method 'nothing'"),
        (["convert", "--calibrate", "much"], "calibrate must be one of"),
        (["convert", "--on-unknown", "guess"], "on_unknown must be one of"),
        (["convert", "--format", "pickle"], "--format must be one of safetensors, state-dict"),
        (["convert", "--dry-run", "--out", "x"], "--dry-run writes nothing"),
        (["convert", "--exclude", "*", "--out", "x"], "there is nothing to convert"),
        (["fold", "--out", "weights.bin"], "--out must be a file .safetensors or .pt"),
        (["fold", "--export", "model.pt"], "--export must be a file .pt2"),
        (["fold", "--converted", "x"], "x is no folder of normprop convert --out"),
        (["fold", "--converted", "x", "--convert", "exact"], "give --convert or --converted, not both"),
        (["inspect", "--threshold", "1"], "threshold must be above 1"),
    ],
)
def test_options_that_cannot_work(line, directory, small, arguments, expected):
    command, *options = arguments
    assert expected in line(command, *small, *options)
    assert not (directory / "x").exists()


def test_a_pickle_of_more_than_tensors_is_refused(line, directory, small, module):
    torch.save(load(*small[:1], inputs=["1x3x8x8"]).model, "whole.pt")
    message = line("inspect", *small, "--weights", "whole.pt")
    assert "whole.pt is refused" in message
    assert "save model.state_dict() alone" in message
    torch.save({"model": {}, "epoch": 3}, "checkpoint.pt")
    assert "holds a dict with 'model', 'epoch', not names and tensors" in line(
        "inspect", *small, "--weights", "checkpoint.pt"
    )
    Path("broken.safetensors").write_bytes(b"nothing")
    assert "broken.safetensors is no safetensors file" in line("inspect", *small, "--weights", "broken.safetensors")


def test_weights_of_another_network_are_named(line, small, module):
    torch.save(nn.Sequential(nn.Conv2d(3, 7, 3), nn.Linear(2, 2)).state_dict(), "other.pt")
    message = line("convert", *small, "--weights", "other.pt")
    assert "missing, such as '1.num_batches_tracked'" in message
    assert "of another shape, such as '0.bias'" in message


# What goes out.


def test_inspect_prints_and_writes(here, small, directory):
    shown = here("inspect", *small, "--html", "deep/page.html", "--json", "numbers.json")
    assert shown.returncode == 0, shown.err
    assert "1: batch_norm" in shown.out
    assert "in training mode on 4×3×8×8" in shown.out
    document = json.loads(Path("numbers.json").read_text())
    assert len(document["sites"]) == 8
    assert Path("deep/page.html").read_text().startswith("<!doctype html>")
    assert "in evaluation mode" in here("inspect", *small, "--eval").out


def test_inspect_takes_whole_numbers_by_name(here, module):
    shown = here("inspect", f"{module}:Words", "--input", "ids=16x4:50", "--input", "scale=16x1")
    assert shown.returncode == 0, shown.err
    assert "words: embedding" in shown.out


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(here, small, directory):
    before = {*directory.rglob("*.*")}
    shown = here("convert", *small, "--dry-run")
    assert shown.returncode == 0
    assert "2 normalisers to normprop, weights fresh (1 absorbed, 1 predicted)" in shown.out
    refused = here("convert", *small, "--dry-run", "--exclude", "[13]")
    assert refused.returncode == 2
    assert "2 kept" in refused.out
    assert "nothing to convert" in refused.err
    assert {path for path in directory.rglob("*.*") if path.suffix != ".pyc"} <= before | {directory / "__pycache__"}


@pytest.mark.parametrize("file_format", ["safetensors", "state-dict"])
@pytest.mark.parametrize(
    "options",
    [
        ["--mode", "exact"],
        ["--mode", "rescale", "--moments", "fixed", "--calibrate", "none"],
        ["--center", "--on-unknown", "measure"],
        ["--to", "group"],
        ["--include", "1", "--calibrate", "input"],
    ],
)
def test_the_printed_python_makes_the_same_network(here, small, directory, options, file_format):
    arguments = (*small, "--args", '{"trained": true}', "--seed", "3", "--out", "kept", "--format", file_format)
    shown = here("convert", *arguments, *options)
    assert shown.returncode == 0, shown.err
    suffix = {"safetensors": "safetensors", "state-dict": "pt"}[file_format]
    names = sorted(path.name for path in Path("kept").iterdir())
    assert names == sorted(["report.html", "report.json", "report.txt", f"weights.{suffix}"])
    assert Path("kept/report.txt").read_text() in shown.out
    made = code(shown.out)
    state = torch.load("kept/weights.pt") if suffix == "pt" else safetensors.torch.load_file("kept/weights.safetensors")
    assert {name: value.tolist() for name, value in made["net"].state_dict().items()} == {
        name: value.tolist() for name, value in state.items()
    }
    # The network of the command line, made again from the folder alone.
    exported = here(
        "fold", *small, "--args", '{"trained": true}', "--seed", "3", "--converted", "kept", "--export", "kept.pt2"
    )
    assert exported.returncode == 0, exported.err
    x = torch.randn(6, 3, 8, 8)
    plain = torch.export.load("kept.pt2").module()
    torch.testing.assert_close(plain(x), evaluated(made["net"], x), rtol=1e-4, atol=1e-5)
    if "exact" in options:
        torch.testing.assert_close(evaluated(made["net"], x), evaluated(made["model"], x), rtol=1e-4, atol=1e-5)


def test_weights_are_loaded_before_the_conversion(here, module, directory):
    torch.manual_seed(9)
    trained = load(f"{module}:small", '{"trained": true}', ["1x3x8x8"], seed=9).model
    safetensors.torch.save_file(trained.state_dict(), "trained.safetensors")
    command = ("convert", f"{module}:small", "--input", "4x3x8x8", "--weights", "trained.safetensors")
    made = code(here(*command, "--mode", "exact", "--out", "kept").out)
    x = torch.randn(6, 3, 8, 8)
    torch.testing.assert_close(evaluated(made["net"], x), evaluated(trained, x), rtol=1e-4, atol=1e-5)


def test_fold_leaves_plain_layers(here, small, directory):
    shown = here("fold", *small, "--args", '{"trained": true}', "--convert", "exact", "--out", "plain.pt")
    assert shown.returncode == 0, shown.err
    difference = float(re.search(r"largest difference (\S+) of the output", shown.out)[1])
    assert difference < 1e-5
    made = code(shown.out)
    assert not [module for module in made["net"].modules() if type(module).__module__.startswith("normprop")]
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(evaluated(made["net"], x), evaluated(made["model"], x), rtol=1e-4, atol=1e-5)
    assert sorted(path.name for path in directory.iterdir() if path.suffix in (".pt", ".pt2")) == ["plain.pt"]


def test_fold_writes_onnx_that_computes_the_same(here, small, directory):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    shown = here("fold", *small, "--args", '{"trained": true}', "--onnx", "plain.onnx")
    assert shown.returncode == 0, shown.err
    net = load(small[0], '{"trained": true}', ["4x3x8x8"]).model
    session = runtime.InferenceSession("plain.onnx", providers=["CPUExecutionProvider"])
    x = torch.randn(7, 3, 8, 8)
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), evaluated(net, x), rtol=1e-4, atol=1e-5)


def test_without_safetensors_one_line_names_the_extra(line, small, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert "pip install 'normprop[models]'" in line("convert", *small, "--out", "kept")
    assert not Path("kept").exists()
