"""The benchmark's cases, its counts and its comparison with an earlier run; no test looks at a clock."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from normprop import norms
from normprop.errors import ConfigError
from normprop.experiments import bench as module
from normprop.experiments.bench import bench, run_case
from normprop.experiments.bench_baseline import compare, load
from normprop.experiments.bench_cases import NETWORKS, Case, cases, check_methods
from normprop.experiments.bench_memory import saved_bytes
from normprop.experiments.bench_table import markdown, tables
from normprop.experiments.timing import interleaved, ratios

CPU = torch.device("cpu")
ALL = {"networks": ["mlp", "nin"], "batch_sizes": [2], "seconds": 0, "width": 0.05}


def spread(ratio, width=0.0):
    return {"ratio": ratio, "low": ratio - width, "high": ratio + width}


def row(method, **values):
    """A row of a document."""
    case = {"network": "nin", "batch_size": 8, "mode": "eager", "layout": "contiguous", "dtype": "float32"}
    measured = {"milliseconds": 10.0, "rounds": 5, "to_none": spread(1.0), "to_batch": None}
    measured |= {"saved_bytes": 1000, "saved_ratio": 1.0, "peak_bytes": None}
    return {**case, "method": method, "reason": None, **measured, **values}


def document(*rows, **values):
    machine = {"processor": "a processor", "cores": 2, "threads": 1, "device": "cpu"}
    versions = {"torch": "2.13.0", "python": "3.11.7"}
    texts = {"title": "Training steps", "command": "normprop bench", "created": "2026-01-01", "notes": []}
    return {**texts, "machine": machine, "versions": versions, "settings": {"width": 1.0}, "rows": list(rows), **values}


def test_every_case_has_every_method_and_ratios_to_both(monkeypatch):
    monkeypatch.setattr(module, "_load", lambda: 0.2)
    result = bench(
        ["batch", "normprop"], layouts=["contiguous", "channels-last"], dtypes=["float32", "bfloat16"], **ALL
    )
    assert result["settings"]["methods"] == ["none", "batch", "normprop"]
    assert len(result["rows"]) == 3 * (2 + 4)  # mlp has no channels-last
    assert result["notes"] == ["mlp has no channels-last cases: its samples have no space."]
    for found in result["rows"]:
        assert found["reason"] is None
        assert found["rounds"] == 5
        assert found["milliseconds"] > 0
        assert found["peak_bytes"] is None
        own = {"none": found["to_none"], "batch": found["to_batch"]}.get(found["method"])
        assert own is None or own == spread(1.0)
        assert found["to_none"]["low"] <= found["to_none"]["ratio"] <= found["to_none"]["high"]
    # What is held does not depend on chance, nor on the layout.
    held = {}
    for found in result["rows"]:
        key = found["network"], found["method"], found["dtype"]
        assert held.setdefault(key, found["saved_bytes"]) == found["saved_bytes"]
    assert held["nin", "none", "float32"] < held["nin", "batch", "float32"]


def test_the_step_runs_in_the_layout_and_type_of_its_case(monkeypatch):
    seen = []

    class Spy(nn.Conv2d):
        def forward(self, x):
            output = super().forward(x)
            seen.append((x.is_contiguous(memory_format=torch.channels_last), output.dtype, self.training))
            return output

    def build(norm, width):
        return nn.Sequential(Spy(3, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    monkeypatch.setitem(module.NETWORKS, "nin", replace(NETWORKS["nin"], build=build))
    for layout, dtype in (("contiguous", "float32"), ("channels-last", "bfloat16")):
        seen.clear()
        run_case(Case("nin", 2, "eager", layout, dtype), ["none"], width=1.0, seconds=0, device=CPU)
        assert set(seen) == {(layout == "channels-last", getattr(torch, dtype), True)}


def test_the_mlp_holds_what_can_be_counted_by_hand():
    (found,) = run_case(Case("mlp", 4, "eager", "contiguous", "float32"), ["none"], width=1.0, seconds=0, device=CPU)
    hidden = 3 * 4 * 1024  # each ReLU's output, in place of its input
    loss = 4 * 10 + 1  # log-probabilities, and the sum of the labels' weights
    assert found["saved_bytes"] == 4 * (hidden + loss)


def test_a_method_that_cannot_run_says_why():
    rows = run_case(
        Case("mlp", 1, "eager", "contiguous", "float32"), ["none", "batch"], width=0.05, seconds=0, device=CPU
    )
    assert rows[0]["reason"] is None
    assert rows[0]["to_batch"] is None
    assert rows[1]["reason"].startswith("Expected more than 1 value per channel")
    assert "to_none" not in rows[1]
    assert "| batch | cannot run: Expected more than 1" in markdown(document(*rows))


def test_what_does_not_compile_says_why_and_what_does_is_compiled(monkeypatch):
    def compiler(network, **options):
        assert options == {"isolate_recompiles": True}
        compiled.append(network)
        if len(compiled) == 2:
            raise RuntimeError("the compiler gives up\nwith a long story")
        return network

    compiled = []
    monkeypatch.setattr(torch, "compile", compiler)
    case = Case("mlp", 2, "compiled", "contiguous", "float32")
    rows = run_case(case, ["none", "batch", "layer"], width=0.05, seconds=0, device=CPU)
    assert [found["reason"] for found in rows] == [None, "the compiler gives up", None]
    assert len(set(compiled)) == 3


def test_without_the_plain_network_there_is_no_ratio(monkeypatch):
    def build(norm, width):
        if norm == "none":
            raise RuntimeError("broken")
        return nn.Linear(784, 10)

    monkeypatch.setitem(module.NETWORKS, "mlp", replace(NETWORKS["mlp"], build=build))
    rows = run_case(Case("mlp", 2, "eager", "contiguous", "float32"), ["none", "layer"], width=1, seconds=0, device=CPU)
    assert [found["reason"] for found in rows] == ["broken", "there is no ratio: none cannot run: broken"]


def test_the_order_rotates_and_each_is_called_as_often():
    calls = []
    times = interleaved({name: lambda name=name: calls.append(name) for name in "abc"}, 0.0, CPU)
    assert "".join(calls) == "abcabc" + "abc" + "bca" + "cab" + "abc" + "bca"
    assert {name: len(own) for name, own in times.items()} == {"a": 5, "b": 5, "c": 5}


def test_ratios_are_taken_round_by_round():
    # The ratio is 2 in every round, though the medians of the times are 3 and 1.
    assert ratios([2.0, 4.0, 20.0, 2.0, 3.0], [1.0, 2.0, 10.0, 1.0, 1.5]) == (2.0, 2.0, 2.0)


def test_cases_are_the_product_of_the_lists():
    found, notes = cases(["nin", "unet3d"], [1, 8], ["eager", "compiled"], ["channels-last"], ["float32", "bfloat16"])
    assert len(set(found)) == 16
    assert notes == []


@pytest.mark.parametrize(
    ("lists", "expected"),
    [
        ({"networks": ["vgg"]}, "networks must be of nin, resnet18, mlp, unet3d; got 'vgg'"),
        ({"networks": []}, "list of networks is empty"),
        ({"networks": ["nin", "nin"]}, "names 'nin' more than once"),
        ({"batch_sizes": [0]}, "batch sizes must be of whole numbers above zero; got 0"),
        ({"modes": ["fast"]}, "modes must be of eager, compiled"),
        ({"layouts": ["nhwc"]}, "layouts must be of contiguous, channels-last"),
        ({"dtypes": ["float16"]}, "dtypes must be of float32, bfloat16"),
        ({"networks": ["mlp"], "layouts": ["channels-last"]}, "add contiguous"),
    ],
)
def test_wrong_lists(lists, expected):
    with pytest.raises(ConfigError, match=expected):
        cases(**{"networks": ["nin"], "batch_sizes": [1]} | lists)


def test_methods_are_checked_before_anything_is_timed():
    lacking = next(name for name in norms.names() if 0 not in norms.info(name).dims)
    with pytest.raises(ConfigError, match=f"{lacking} has no block of 0 dimensions, so mlp"):
        check_methods(["batch", lacking], ["nin", "mlp"])
    with pytest.raises(ConfigError, match="methods must be of none, normprop"):
        check_methods(["bach"], ["nin"])
    assert check_methods(["batch", "none"], ["nin"]) == ["batch", "none"]


def test_labels_and_buffers_are_no_memory_of_the_step():
    norm = nn.BatchNorm1d(64)
    x = torch.randn(8, 64)
    everything = saved_bytes(lambda: norm(x).sum(), [])
    assert everything - saved_bytes(lambda: norm(x).sum(), [x, *norm.parameters(), *norm.buffers()]) >= 4 * 8 * 64


def test_only_what_rose_beyond_both_spreads_is_a_rise():
    old = document(row("none"), row("batch", to_none=spread(1.2, 0.1)), row("normprop", to_none=spread(1.3, 0.1)))
    new = copy.deepcopy(old)
    new["rows"][1]["to_none"] = spread(1.35, 0.1)  # above, but the quartiles meet
    new["rows"][2]["to_none"] = spread(1.55, 0.1)
    result = compare(new, old)
    assert (result.compared, result.remarks) == (3, [])
    assert [str(rise) for rise in result.rises] == [
        "nin, batch 8, eager, contiguous, float32: normprop: time to none rose from 1.300 to 1.550"
    ]
    assert compare(old, new).rises == []


def test_memory_and_ratios_to_batch_are_compared_too():
    old = document(row("normprop", to_batch=spread(0.9, 0.01)))
    new = document(row("normprop", to_batch=spread(0.95, 0.01), saved_ratio=1.01))
    assert [rise.what for rise in compare(new, old).rises] == ["time to batch", "memory to none"]


def test_what_cannot_run_any_more_is_a_rise_and_the_reverse_is_not():
    broken = {"reason": "no more", "milliseconds": None, "to_none": None, "to_batch": None}
    old, new = document(row("batch")), document(row("batch", **broken))
    assert "cannot run any more: no more" in str(compare(new, old).rises[0])
    assert compare(old, new).rises == []


def test_what_is_not_comparable_is_said():
    old = document(row("none"), row("batch"))
    new = document(row("none"), row("layer"), row("weight"))
    new["machine"] = {**new["machine"], "threads": 2}
    remarks = compare(new, old).remarks
    assert remarks == [
        "the baseline is of another number of threads: 1, now 2",
        "1 rows are in the baseline alone and were not compared",
        "2 rows are in this run alone and were not compared",
    ]
    with pytest.raises(ConfigError, match="none of the cases"):
        compare(document(row("none")), document(row("batch")))


def test_baselines_that_are_none(tmp_path):
    path = tmp_path / "bench.json"
    for content, expected in (
        (None, "No such file"), ("nonsense", "not JSON"), ("[]", "not a document of normprop bench"),
    ):  # fmt: skip
        if content is not None:
            path.write_text(content)
        with pytest.raises(ConfigError, match=expected):
            load(path, 1.0)


def test_a_busy_machine_is_told(monkeypatch):
    monkeypatch.setattr(module, "_load", lambda: 3.14)
    notes = bench(["none"], networks=["mlp"], batch_sizes=[1], seconds=0, width=0.01)["notes"]
    assert notes == ["Other programs ran beside this one: before it began they kept 3.1 cores busy."]
    quiet, busy = (document(row("none", milliseconds_quartiles=[10.0, high])) for high in (11.0, 14.0))
    assert "busy" not in markdown(quiet)
    assert "The machine was busy: nin, batch 8, eager, contiguous, float32: quartiles of none from 10" in markdown(busy)


def test_tables_have_a_column_for_peaks_only_where_there_are_any():
    ((case, (cells,)),) = tables(document(row("none")))
    assert case == "nin, batch 8, eager, contiguous, float32"
    assert cells == ["none", "10", "1.000 (1.000–1.000)", "", "1 kB", "1.000"]
    ((_, (cells,)),) = tables(document(row("none", peak_bytes=12_345_678)))
    assert cells[-1] == "12.3 MB"
    page = markdown(document(row("none", peak_bytes=1000), notes=["A note."]))
    assert "| memory / none | peak |" in page
    assert "\n\nA note.\n\n" in page
