import copy

import pytest

from normprop.errors import ConfigError
from normprop.report import summary
from normprop.report.marks import marks
from normprop.report.results import read


@pytest.fixture
def small(make_document):
    return make_document(["none", "normprop", "batch"], batch_sizes=[8, 32], lrs=[0.005, 0.02])


def cell(document, method, batch, **values):
    row = next(row for row in document["table"] if (row["method"], row["batch_size"]) == (method, batch))
    row.update(values)


def test_clear_winner_everywhere(small):
    for batch in (8, 32):
        cell(small, "none", batch, error_mean=0.6, error_std=0.01)
        cell(small, "normprop", batch, error_mean=0.4, error_std=0.01)
        cell(small, "batch", batch, error_mean=0.5, error_std=0.01)
    text = summary.sentence(read(small)).replace("\N{NO-BREAK SPACE}", " ")
    assert text == "normprop has the lowest test error at every batch size: 40.0 % at 8 and 40.0 % at 32."


def test_methods_within_spread_are_not_ranked(small):
    cell(small, "none", 8, error_mean=0.6, error_std=0.01)
    cell(small, "normprop", 8, error_mean=0.400, error_std=0.003)
    cell(small, "batch", 8, error_mean=0.4049, error_std=0.004)  # sqrt(0.003^2 + 0.004^2) is 0.005
    cell(small, "none", 32, error_mean=0.3, error_std=0.001)
    cell(small, "normprop", 32, error_mean=0.302, error_std=0.001)
    cell(small, "batch", 32, error_mean=0.5, error_std=0.001)
    results = read(small)
    assert results.leaders(8) == ["normprop", "batch"]
    assert results.leaders(32) == ["none"]
    text = summary.sentence(results).replace("\N{NO-BREAK SPACE}", " ")
    assert text == (
        "The plain network (none) has the lowest test error at batch size 32 (30.0 %); "
        "at batch size 8, normprop (40.0 %) and batch (40.5 %) are within spread of each other."
    )


def test_single_seeds_are_said_to_be_single(make_document):
    results = read(make_document(["normprop", "batch"], batch_sizes=[8], seeds=[0]))
    assert summary.sentence(results).endswith("every error is from a single seed, so small differences may be chance.")
    assert len(results.leaders(8)) == 1


def test_one_method_has_nothing_to_win_against(make_document):
    document = make_document(["normprop"], batch_sizes=[8])
    cell(document, "normprop", 8, error_mean=0.41, error_std=0.012)
    text = summary.sentence(read(document)).replace("\N{NO-BREAK SPACE}", " ")
    assert text == "normprop reaches a test error of 41.0 ± 1.2 % at batch size 8."


@pytest.mark.parametrize(
    ("status", "words"), [("diverged", "Every trial diverged"), ("impossible", "Every trial was impossible")]
)
def test_nothing_but_failures(small, status, words):
    for trial in small["trials"]:
        trial["status"] = status
    for row in small["table"]:
        row["error_mean"] = None
    assert summary.sentence(read(small)).startswith(words)


def test_progress_counts_every_status(small):
    assert summary.progress(read(small)) is None
    trials = small["trials"]
    assert {trial["status"] for trial in trials} == {"complete", "diverged"}
    trials[0]["status"] = "running"
    trials[1]["status"] = trials[2]["status"] = "waiting"
    trials[3]["status"] = "impossible"
    assert summary.progress(read(small)).startswith("Partial: 33 of 36 trials (1 running, 2 waiting)")


def test_remarks_name_what_could_not_run(make_document):
    remarks = summary.remarks(read(make_document()))
    assert "Cannot run at batch size 1: batch and instance." in remarks
    assert "Diverged at every learning rate at batch size 1: none." in remarks


def test_small_errors_get_one_more_digit(small):
    cell(small, "normprop", 8, error_mean=0.0154, error_std=0.0012)
    rows, _ = summary.table(read(small))
    assert rows[1]["cells"][0]["error"].strip("\N{FIGURE SPACE}") == "1.54"


def test_marks_are_distinct_and_stable():
    names = ["none", *(f"m{index}" for index in range(63))]
    found = marks(names)
    assert len({(mark.color, mark.shape) for mark in found}) == 64
    assert marks(names[:5]) == found[:5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("trials"), "has no 'trials'"),
        (lambda d: d.update(methods="normprop"), "'methods' is str; expected list"),
        (lambda d: d.update(settings=[1]), "'settings' is list; expected dict"),
        (lambda d: d["trials"][3].pop("lr"), r"trials\[3\] of the results document has no 'lr'"),
        (lambda d: d["trials"][2].update(status="lost"), r"trials\[2\].*status 'lost'; expected one of complete"),
        (lambda d: d["lrs"].append(0.0), "lrs of the results document holds 0.0; expected numbers above zero"),
        (lambda d: d["table"].append("row"), r"table\[6\] of the results document is str"),
        (lambda d: d["step_time"].append({"method": "none"}), r"step_time\[6\].*has no 'batch_size'"),
    ],
)
def test_malformed_documents_are_refused_in_one_line(small, change, message):
    document = copy.deepcopy(small)
    change(document)
    with pytest.raises(ConfigError, match=message) as caught:
        read(document)
    assert "\n" not in str(caught.value)


def test_another_kind_of_document_is_refused():
    with pytest.raises(ConfigError, match="is list; expected a mapping"):
        read([])
