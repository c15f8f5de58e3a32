import json

import pytest
import torch

from normprop.experiments.two_view import readable, share
from normprop.experiments.two_view_command import main


def test_the_experiment_writes_its_results(tmp_path, capsys):
    options = [
        "--train",
        "150",
        "--test",
        "100",
        "--epochs",
        "1",
        "--seeds",
        "0,1",
        "--methods",
        "batch-layer,reg-none",
    ]
    assert main([*options, "--out", str(tmp_path)]) == 0
    document = json.loads((tmp_path / "results.json").read_text())
    assert document["methods"] == ["batch-layer", "reg-none"]
    assert [(trial["method"], trial["seed"]) for trial in document["trials"]] == [
        (method, seed) for seed in (0, 1) for method in ("batch-layer", "reg-none")
    ]
    for trial in document["trials"]:
        assert set(trial["accuracy"]) == {"correlated", "independent"}
        assert ("residual" in trial["readable"]) == (trial["method"] == "reg-none")
    printed = capsys.readouterr()
    assert printed.out.splitlines()[0].startswith("| method | accuracy")
    assert printed.out.splitlines()[2].startswith("| batch-layer | ")
    assert len(printed.err.splitlines()) == 4
    page = (tmp_path / "figure.html").read_text()
    assert "reg-none" in page
    assert "<script src=" not in page
    assert printed.out.splitlines()[:4] == (tmp_path / "results.md").read_text().splitlines()[2:6]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nothing"], "no such data set"),
        (["--methods", "batch,bach"], "no method 'bach'"),
        (["--epochs", "many"], "argument --epochs: invalid int"),
        (["--seeds", "a"], "argument --seeds"),
        (["--speed", "1"], "unrecognized arguments"),
        (["--correlation", "2"], "correlation with the label must be from 0 to 1"),
        (["--out", "/dev/null/here"], "cannot make the directory"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert message in error


def test_what_is_readable_and_its_share_have_closed_forms():
    generator = torch.Generator().manual_seed(0)
    z, noise, other = torch.randn(3, 40_000, generator=generator, dtype=torch.double)
    features = torch.stack([z + noise, 2 * other], 1)
    # Standard errors are about 1 / sqrt(20000) = 0.007.
    assert readable(features[:20_000], z[:20_000], features[20_000:], z[20_000:]) == pytest.approx(0.5, abs=0.03)
    assert share(features, z) == pytest.approx(1 / 6, abs=0.02)
    mixed = features @ torch.tensor([[3.0, 1.0], [0.5, -7.0]], dtype=torch.double) + 100
    assert readable(mixed, z, mixed, z) == pytest.approx(readable(features, z, features, z), abs=1e-9)
