"""The frame of reproductions: storage, pages, and the paper's figures at a tiny protocol."""

import dataclasses
import statistics
import sys

import pytest

from normprop.errors import ConfigError
from normprop.experiments import compare
from normprop.experiments.grid import Combination
from normprop.experiments.reproduce import NAMES, cifar, normprop_fig1, normprop_fig3, normprop_fig4, reproduce
from normprop.experiments.reproduce.context import Context
from normprop.experiments.reproduce.reproduction import Reproduction, Table
from normprop.experiments.settings import Settings
from normprop.report.reproduction import figure, markdown
from normprop.training.config import TrainConfig


@pytest.fixture
def context(tmp_path):
    return Context("small", f"sqlite:///{tmp_path / 'study.db'}", accelerator="cpu", workers=1, seeds=1)


@pytest.fixture
def tiny(monkeypatch):
    """The protocol on a few digits, for two epochs."""

    def settings(context, *, data_norm, augment=(), data="cifar10"):
        training = TrainConfig(
            epochs=10, momentum=0.9, schedule="halving", halve_every=2, data_norm=data_norm, accelerator="cpu"
        )
        return Settings(data="digits", model="mlp", width=0.05, train=60, validation=20, test=20, training=training)

    monkeypatch.setattr(cifar, "settings", settings)


@pytest.fixture
def trained(monkeypatch):
    """How often worker processes were started."""
    started = []
    module = sys.modules[compare.__module__]  # the package gives its function the same name
    original = module._train

    def count(study, settings, workers, report):
        if study.unfinished():
            started.append(study.name)
        original(study, settings, workers, report)

    monkeypatch.setattr(module, "_train", count)
    return started


def test_measurements_are_kept_and_not_made_again(context):
    made = []

    def run(combination):
        made.append(combination)
        return None if combination.method == "lost" else {"value": combination.lr, "nan": float("nan")}

    wanted = [Combination("kept", 1, 0.5, 0), Combination("lost", 1, 0.5, 0)]
    for _ in range(2):
        found = context.measure("some", {"epochs": 1}, wanted, run)
    assert made == wanted
    assert found[wanted[0]] == {"value": 0.5, "nan": None}
    assert found[wanted[1]] is None
    with pytest.raises(ConfigError, match="epochs=1, not epochs=2"):
        context.measure("some", {"epochs": 2}, wanted, run)


def test_an_interrupted_measurement_is_made_the_next_time(context):
    def interrupted(combination):
        raise KeyboardInterrupt

    wanted = [Combination("a", 1, 0.5, 0)]
    with pytest.raises(KeyboardInterrupt):
        context.measure("some", {}, wanted, interrupted)
    assert context.measure("some", {}, wanted, lambda _: {"value": 1})[wanted[0]] == {"value": 1}


def test_the_rate_is_chosen_by_the_first_seed(context, tiny, trained):
    settings = cifar.settings(context, data_norm="global")
    cells, rates = [("batch", 20), ("none", 10)], {10: (0.01,), 20: (0.1, 1e-9)}
    found = context.tuned("some", settings, cells, rates, [0, 1])
    assert [record.combination.lr for record in found["batch", 20]] == [0.1, 0.1]
    assert [record.combination.seed for record in found["none", 10]] == [0, 1]
    before = list(trained)
    assert context.tuned("some", settings, cells, rates, [0, 1]) == found
    assert trained == before


@pytest.mark.parametrize("module", [normprop_fig1, normprop_fig3, normprop_fig4])
def test_figures_of_the_paper(module, context, tiny, trained, monkeypatch):
    if module is normprop_fig4:
        monkeypatch.setitem(module.RATES, "small", {1: (0.001,), 50: (0.05,), 100: (0.08,), 250: (0.1,)})
    found = module.run(context)
    assert len(found.agrees) + len(found.contradicts) >= 1
    assert all(len(row) == len(found.table.head) for row in found.table.rows)
    assert "<svg" in figure(found)
    before = list(trained)
    assert before
    assert module.run(context) == found
    assert trained == before
    page = markdown(found, "normprop reproduce it", "it.svg")
    assert page.startswith(f"# {found.title}\n")
    assert "a small reproduction" in page


def test_figure_1_is_judged_by_its_numbers():
    close = {("global", 50): [90.0, 90.2], ("global", 100): [89.9, 90.1], ("batch", 100): [90.0, 90.0]}
    claims = normprop_fig1._claims(close | {("batch", 50): [90.4, 90.6]})
    assert [len(claims[key]) for key in ("agrees", "contradicts")] == [2, 0]
    claims = normprop_fig1._claims(close | {("batch", 50): [80.0, 80.2]})
    assert "within 10.0 points" in claims["contradicts"][0]
    assert "diverged" in normprop_fig1._claims(close | {("batch", 50): []})["contradicts"][0]


def test_figure_3_is_judged_by_its_numbers():
    steady = {epoch: [50.0 + epoch] for epoch in range(1, 11)}
    rough = {epoch: [40.0 + epoch - 5 * (epoch % 2)] for epoch in range(1, 11)}
    assert normprop_fig3.roughness(steady) == 0.0
    assert normprop_fig3.roughness(rough) == pytest.approx(statistics.fmean([0, 4, 0, 4, 0, 4, 0, 4, 0]))
    right = [agrees for agrees, _ in normprop_fig3._claims({"normprop-paper": steady, "batch": rough}, [1, 2, 10])]
    assert right == [True, True, False]
    wrong = [agrees for agrees, _ in normprop_fig3._claims({"normprop-paper": rough, "batch": steady}, [1, 2, 10])]
    assert wrong == [False, False, False]
    assert "diverged" in normprop_fig3._claims({"normprop-paper": {}, "batch": steady}, [1, 10])[0][1]


def test_figure_4_is_judged_by_its_numbers():
    curves = {1: (69.0, 90.0), 50: (63.0, 90.5), 100: (65.0, 90.0), 250: (48.0, 88.0)}
    claims = normprop_fig4._claims({size: {1: [first], 9: [last]} for size, (first, last) in curves.items()}, 9)
    assert [agrees for agrees, _ in claims] == [True, True, True]
    curves[1] = (40.0, 70.0)
    claims = normprop_fig4._claims({size: {1: [first], 9: [last]} for size, (first, last) in curves.items()}, 9)
    assert [agrees for agrees, _ in claims] == [False, True, False]


def test_every_name_has_its_file_and_others_are_refused(context):
    with pytest.raises(ConfigError, match="no reproduction 'fig1'; there are normprop-fig1, "):
        reproduce("fig1", context)
    assert len(set(NAMES)) == 14


def test_a_page_leaves_out_what_there_is_not():
    empty = Reproduction("name", "Title", "Paper", "paper", "Protocol.", "", Table(("a|b",), [("1",)]), [])
    page = markdown(empty, "command", "name.svg")
    assert "As in the paper" not in page
    assert "at the scale of the paper" in page
    assert "| a\\|b |" in page
    both = dataclasses.replace(empty, agrees=["Yes."], contradicts=["No."])
    assert "## As in the paper\n\n- Yes.\n\n## Not as in the paper\n\n- No." in markdown(both, "command", "x")


def test_a_table_has_a_text_under_every_heading():
    with pytest.raises(ValueError, match=r"rows of \[2, 1\] texts under 2 headings"):
        Table(("a", "b"), [("1", "2"), ("1",)])
