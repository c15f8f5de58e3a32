import builtins
import importlib.util
import subprocess
import sys

import pytest
import torch
from torch import nn

from tests.graph import conftest, real_libraries, real_models
from tests.graph.real_libraries import Candidate

MISSING = [name for name in real_libraries.LIBRARIES if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")


def batch_norms(model):
    return sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def test_torchvision_is_found_whole_and_as_published():
    models = real_libraries.import_torchvision().models
    found = {model.name: model for model in real_models.survey().models if model.library == "torchvision"}
    assert not any(key.startswith("torchvision") for key in real_models.survey().left_out)
    # Layers of the published networks, counted in their papers' tables.
    for name, layers in {"vgg16_bn": 13, "resnet18": 20, "resnet50": 53, "densenet121": 121}.items():
        with torch.device("meta"):
            assert batch_norms(models.get_model(name, weights=None)) == layers
        assert name in found
    for name in ("alexnet", "vgg16", "vit_b_16", "swin_t", "squeezenet1_0", "convnext_tiny"):
        assert name not in found
    # Published counts leave out the auxiliary classifiers that a fresh model has in training, but for inception_v3.
    segmentation = set(models.list_models(module=models.segmentation))
    for name, model in found.items():
        published = {int(weights.meta["num_params"]) for weights in models.get_model_weights(name)}
        assert model.parameters in published or name in segmentation | {"googlenet"}, name
    assert segmentation <= found.keys()


def test_only_transformers_that_cannot_be_built_are_left_out_and_each_with_a_reason():
    left_out = real_models.survey().left_out
    assert all(reason for reason in left_out.values())
    assert not [key for key in left_out if key.startswith(("torchvision/", "monai/"))]


def test_smallest_models_are_one_per_architecture_and_no_smaller_one_exists():
    models, chosen = real_models.survey().models, real_models.smallest_models(at_most=10**12)
    architectures = {(model.library, model.architecture) for model in models}
    assert [(model.library, model.architecture) for model in chosen] == sorted(architectures)
    for choice in chosen:
        same = [m for m in models if (m.library, m.architecture) == (choice.library, choice.architecture)]
        assert choice.parameters == min(model.parameters for model in same)
    quick = {model.name for model in real_models.smallest_models()}
    assert {model.name for model in chosen if model.library == "torchvision"} <= quick
    few = real_models.smallest_models(at_most=10**6)
    assert few
    assert all(model.parameters <= 10**6 for model in few)


def test_names_are_unique_and_build_finds_each_by_its_name():
    listed = list(real_models.real_models())
    keys = [(library, name) for library, name, _ in listed]
    assert len(set(keys)) == len(keys)
    library, name, build = min(
        ((model.library, model.name, model.build) for model in real_models.smallest_models(10**5)),
    )
    first, second = build(), real_models.build(library, name)
    assert torch.equal(first.args[0], second.args[0])
    for key, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[key]), key


def test_small_models_build_train_and_leave_the_random_state():
    for model in real_models.smallest_models(at_most=100_000):
        state = torch.random.get_rng_state()
        case = model.build()
        assert torch.equal(torch.random.get_rng_state(), state)
        assert all(module.training for module in case.model.modules())
        assert sum(parameter.numel() for parameter in case.model.parameters()) == model.parameters
        assert batch_norms(case.model) > 0
        assert case.args[0].shape[0] == 2
        output = case.model(*case.args)
        for tensor in torch.utils._pytree.tree_leaves(output):
            assert tensor is None or torch.isfinite(tensor).all(), model.name


class Picky(nn.Module):
    """Accepts maps of 96 pixels and more."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        if x.shape[-1] < 96:
            raise RuntimeError("too small")
        return self.norm(x)


def test_the_smallest_input_is_searched_and_a_model_without_one_named():
    assert real_models._build(Candidate("picky", "picky", Picky)).args[0].shape == (2, 3, 96, 96)
    with pytest.raises(ValueError, match=r"wrong accepts none of the sides .*: running_mean should contain 4 elements"):
        real_models._build(Candidate("wrong", "wrong", Picky, channels=4))


def test_a_library_that_is_not_installed_is_left_out_with_the_reason(monkeypatch):
    real_import = builtins.__import__

    def without_monai(name, *args, **kwargs):
        if name.startswith("monai"):
            raise ModuleNotFoundError("No module named 'monai'", name="monai")
        return real_import(name, *args, **kwargs)

    for name in [name for name in sys.modules if name.split(".")[0] == "monai"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without_monai)
    monkeypatch.setattr(real_models, "LIBRARIES", {"monai": real_libraries.monai_models})
    found = real_models.survey.__wrapped__()
    assert found.models == []
    assert found.left_out == {"monai": "No module named 'monai'"}


def test_transformers_comes_first_in_a_process_without_warnings(pytestconfig):
    code = "from tests.graph import real_libraries; print(next(real_libraries.transformers_models()).name)"
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=pytestconfig.rootpath, capture_output=True, text=True, check=True)
    assert "For" in done.stdout


def test_the_fixture_runs_over_the_smallest_models_and_finds_them_once(pytestconfig, monkeypatch):
    expected = [[model.library, model.name, ""] for model in real_models.smallest_models()]
    entries = conftest._entries(pytestconfig)
    assert [entry for entry in entries if entry[1]] == expected
    monkeypatch.setattr(real_models, "smallest_models", lambda: [])
    assert conftest._entries(pytestconfig) == entries


def test_the_fixture_skips_a_missing_library_with_the_reason():
    parameter = conftest._parameter("monai", "", "monai is not installed")
    assert parameter.id == "monai"
    assert [mark.kwargs["reason"] for mark in parameter.marks] == ["monai is not installed"]
    assert conftest._parameter("monai", "UNet-2d", "").marks == []
