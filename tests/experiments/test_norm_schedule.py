import json
import math

import pytest
import torch

from normprop import models
from normprop.experiments.norm_curves import ARMS
from normprop.experiments.norm_schedule import main, normalized_blocks, staircase
from normprop.training.filter_norms import load_norms

OPTIONS = {"train": 128, "test": 100, "model": "resnet8", "width": 0.25, "batch-size": 16, "weight-decay": 0.5}


@pytest.fixture(autouse=True, scope="module")
def _single_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("norm-schedule")
    options = [f"--{name}={value}" for name, value in OPTIONS.items()]
    assert main([*options, "--momentum=0", "--seeds=3,1", "--out", str(out)]) == 0
    return out, json.loads((out / "curves.json").read_text())


def rows(document, arm, seed):
    return [row for row in document["curves"] if row["arm"] == arm and row["seed"] == seed]


def test_every_arm_and_seed_has_its_curve(results):
    out, document = results
    assert document["settings"]["seeds"] == [3, 1]
    assert document["settings"]["weight_decay"] == 0.5
    for arm in ARMS:
        for seed in (3, 1):
            curve = rows(document, arm, seed)
            assert [row["epoch"] for row in curve] == [1, 2, 3, 4]
            assert all(0 <= row["test_error"] <= 1 and math.isfinite(row["train_loss"]) for row in curve)
    assert sorted(path.name for path in out.iterdir()) == [
        "curves.json",
        "figure.html",
        "norms-1.npz",
        "norms-3.npz",
        "table.md",
    ]


def test_arms_differ_as_they_should(results):
    """Without momentum the corrected rate is decay but for rounding, and for the eps of batch norm."""
    _, document = results
    for seed in (3, 1):
        loss = {arm: [row["train_loss"] for row in rows(document, arm, seed)] for arm in ARMS}
        step = {arm: [row["effective_step"] for row in rows(document, arm, seed)] for arm in ARMS}
        assert loss["corrected rate"] == pytest.approx(loss["decay"], rel=1e-3)
        assert loss["no decay"] != pytest.approx(loss["decay"], rel=1e-3)
        assert step["corrected rate"] == step["decay"]
        assert step["norm schedule"] == pytest.approx(step["decay"], rel=1e-5)
        assert step["decay"][-1] < 0.01 * step["decay"][0]
        assert step["decay"][-1] > 1.01 * step["no decay"][-1]
        assert step["fixed rate"][-1] > 100 * step["no decay"][-1]
        # During the first quarter the rate is the same.
        assert step["fixed rate"][0] == step["no decay"][0]


def test_effective_step_is_rate_over_squared_length(results):
    out, document = results
    norms = load_norms(out / "norms-1.npz")
    for epoch, row in enumerate(rows(document, "decay", 1)):
        logs = [
            math.log(0.1 * 10.0**-epoch / float(length) ** 2)
            for value in norms.values()
            for length in value[8 * epoch : 8 * epoch + 8].flatten()
        ]
        assert row["effective_step"] == pytest.approx(math.exp(sum(logs) / len(logs)), rel=1e-4)


def test_table_and_figure(results):
    out, document = results
    lines = (out / "table.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == list(ARMS)
    errors = [100 * rows(document, "no decay", seed)[-1]["test_error"] for seed in (3, 1)]
    spread = abs(errors[0] - errors[1]) / math.sqrt(2)
    assert lines[3].split("|")[2].strip() == f"{sum(errors) / 2:.2f} ± {spread:.2f}"
    page = (out / "figure.html").read_text()
    assert 'id="norm-schedule"' in page
    assert '<script src="http' not in page


def test_staircase_has_four_equal_parts():
    assert [staircase(step, 8) for step in range(8)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_the_last_layer_is_not_among_the_normalised():
    model = models.create("nin", (1, 8, 8), 10, norm="batch", width=0.125)
    assert [len(block.linear.weight) for block in normalized_blocks(model).values()] == [24, 20, 12, 24, 24, 24, 24, 24]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: --out"),
        (["--out", "x", "--epochs", "few"], "argument --epochs: invalid int value"),
        (["--out", "x", "--seeds", "0;1"], "argument --seeds"),
        (["--out", "x", "--epochs", "0"], "epochs must be a whole number of at least 1"),
        (["--out", "x", "--data", "nowhere"], "nowhere: no such data set"),
        (["--out", "x", "--model", "lenet"], "no model 'lenet'"),
        (["--out", "x", "--lr", "1e30", "--train", "64"], "use a lower --lr"),
    ],
)
def test_errors_are_one_line_and_exit_with_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("normprop: ")
    assert error.count("\n") == 1
    assert list(tmp_path.glob("x/*")) == []
