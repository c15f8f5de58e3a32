import json
from dataclasses import fields

import pytest

from normprop.errors import ConfigError
from normprop.training import TrainConfig

WRONG = {
    "epochs": [0, 1.5, True, "3"],
    "batch_size": [0, -1, 2.0],
    "lr": [0, -0.1, float("nan"), float("inf"), "0.1"],
    "momentum": [-0.1, 1.0, float("nan")],
    "weight_decay": [-1e-4, float("inf")],
    "schedule": ["step", "", None],
    "warmup": [-0.1, 1.0],
    "halve_every": [0, 0.5],
    "label_smoothing": [-0.1, 1.0],
    "clip_grad": [0, -1.0, float("inf"), "1"],
    "clip_unit": [0, -1.0, float("inf"), "1"],
    "optimizer": ["adam", None],
    "augment": [("rotate",), "flip", ["flip"]],
    "data_norm": ["sample", None],
    "seed": [-1, 2**32, 0.0],
    "precision": ["32", 16, "fp8"],
    "accelerator": ["tpu", None],
    "devices": [0, "auto"],
    "unit_norm": [1, None],
    "gain_rate": [0, -1.0, float("inf"), "4", None],
    "decouple": [1, None],
    "channels_last": [1, None],
}


def test_every_field_is_checked():
    assert set(WRONG) == {field.name for field in fields(TrainConfig)}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_wrong_value_gives_one_line_that_names_field_and_value(name, value):
    with pytest.raises(ConfigError) as caught:
        TrainConfig(**{name: value})
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{name} must be ")
    assert message.endswith(f"got {value!r}")


def test_each_wrong_field_has_its_line():
    with pytest.raises(ConfigError) as caught:
        TrainConfig(epochs=0, lr=-1, schedule="step")
    assert [line.split()[0] for line in str(caught.value).split("\n")] == ["epochs", "lr", "schedule"]


def test_more_devices_than_samples_per_batch():
    with pytest.raises(ConfigError, match=r"^batch_size must be at least devices.*batch_size 2 for 3 devices$"):
        TrainConfig(batch_size=2, devices=3)


def test_round_trip_through_json():
    config = TrainConfig(epochs=3, augment=("crop", "flip"), clip_grad=0.5, precision="bf16-mixed")
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_unknown_setting():
    with pytest.raises(ConfigError, match="unknown training setting learning_rate; there are accelerator, "):
        TrainConfig.from_dict({"learning_rate": 0.1})
