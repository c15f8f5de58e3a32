"""`normprop bench` and `normprop bench-growth`."""

import json

import pytest

SMALL = ["--networks", "mlp", "--batch-sizes", "2", "--seconds", "0", "--width", "0.05", "--methods", "normprop"]


def test_it_writes_and_prints_its_table(here, directory):
    result = here("bench", *SMALL, "--out", "out", "--threads", "1")
    assert result.returncode == 0
    assert "mlp, batch 2, eager, contiguous, float32" in result.out
    assert result.out.splitlines()[-1] == "out/bench.md"
    assert result.err.splitlines() == ["0/1 cases mlp, batch 2, eager, contiguous, float32", "1/1 cases"]
    document = json.loads((directory / "out" / "bench.json").read_text())
    assert [row["method"] for row in document["rows"]] == ["none", "normprop"]
    assert document["machine"]["threads"] == 1
    assert document["command"].startswith("normprop bench --networks mlp")
    assert document["command"] in (directory / "out" / "bench.md").read_text()


def test_it_compares_with_a_baseline(here, line, directory):
    assert here("bench", *SMALL, "--out", "old", "--quiet").err == ""
    path = directory / "old" / "bench.json"
    document = json.loads(path.read_text())
    for row in document["rows"]:  # a baseline that no run can exceed in time
        row["to_none"] = {"ratio": 1e6, "low": 1e6, "high": 1e6}
    path.write_text(json.dumps(document))
    result = here("bench", *SMALL, "--baseline", str(path), "--quiet", "--json")
    assert result.returncode == 0
    assert json.loads(result.out)["rows"]
    assert result.err == "No ratio of 2 rows rose by more than the spread of both runs.\n"
    document["rows"][1]["saved_ratio"] *= 0.5
    path.write_text(json.dumps(document))
    result = here("bench", *SMALL, "--baseline", str(path), "--quiet")
    assert result.returncode == 1
    assert "normprop: memory to none rose from" in result.err
    assert "is of width 0.05" in line("bench", "--baseline", str(path), "--width", "1")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--networks", "vgg"], "networks must be of nin"),
        (["--batch-sizes", "many"], "--batch-sizes must be a comma list of whole numbers"),
        (["--methods", "bach"], "methods must be of none"),
        (["--device", "tpu"], "--device must be auto, cpu, gpu, cuda or mps"),
        (["--baseline", "missing.json"], "missing.json: No such file"),
        (["--out", "/dev/null/here"], "cannot write /dev/null/here/bench.json"),
    ],
)
def test_errors_are_one_line(line, arguments, expected):
    assert expected in line("bench", *SMALL, "--quiet", *arguments)


def test_growth_is_drawn(here, directory, monkeypatch):
    from normprop.experiments import growth

    monkeypatch.setattr(
        growth.grow, "__kwdefaults__", {**growth.grow.__kwdefaults__, "axes": [], "tool_widths": [0.25]}
    )
    result = here("bench-growth", "--seconds", "0", "--out", "out", "--quiet")
    assert (result.returncode, result.out) == (0, "out/growth.svg\n")
    assert (directory / "out" / "growth.svg").read_text().startswith("<svg ")
    assert len(json.loads((directory / "out" / "growth.json").read_text())["tools"]) == 1
