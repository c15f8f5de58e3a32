import json
import re
from html.parser import HTMLParser

import pytest

from normprop.errors import ConfigError
from normprop.report.html import write

VOID = {"meta", "input", "br", "link", "img"}
EVIL = "</script><script>alert(1)</script>\"'&<b>\u2028"


class Page(HTMLParser):
    """Elements, attributes and text of a page; fails on tags that do not match."""

    def __init__(self, source):
        super().__init__()
        self.open, self.attributes, self.texts, self.tables = [], [], [], []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.texts.append(data)
            if {"td", "th"} & set(self.open):
                self.tables[-1][-1][-1] += data

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


@pytest.fixture
def render(tmp_path):
    def render(document):
        source = write(document, tmp_path / "report.html").read_text(encoding="utf-8")
        return source, Page(source)

    return render


def payload(source):
    text = re.search(r'<script type="application/json" id="payload">(.*?)</script>', source, re.S)[1]

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def group(data, name):
    return [figure for figure in data["figures"] if figure["id"].startswith(f"{name}-")]


def test_loads_nothing(make_document, render):
    _, page = render(make_document())
    loading = [a for a in page.attributes if a[1] in ("src", "href", "srcset", "data", "action", "poster")]
    assert loading
    assert all(value.startswith("#") for _, _, value in loading)
    policy = [value for _, name, value in page.attributes if name == "content" and "default-src" in value]
    assert len(policy) == 1
    assert "default-src 'none'" in policy[0]
    assert "http" not in policy[0]


def test_table_has_the_documents_numbers(make_document, render):
    document = make_document()
    _, page = render(document)
    head, *body = page.tables[0]
    assert [cell.split()[-1] for cell in head[1:]] == [str(batch) for batch in document["batch_sizes"]]
    assert [row[0].strip() for row in body] == document["methods"]
    cells = {(row["method"], row["batch_size"]): row for row in document["table"]}
    steps = {(row["method"], row["batch_size"]): row["ratio"] for row in document["step_time"]}
    for method, row in zip(document["methods"], body, strict=True):
        for batch, shown in zip(document["batch_sizes"], row[1:], strict=True):
            cell = cells[method, batch]
            if cell["impossible"]:
                assert shown.split() == ["cannot", "run1"]
            elif cell["best_lr"] is None:
                assert shown.split() == ["diverged", "at", "every", "rate"]
            else:
                assert shown.split()[0] == f"{100 * cell['error_mean']:.1f}"
                assert f"± {100 * cell['error_std']:.1f}" in shown
                assert f"rate {cell['best_lr']:g}" in shown
                assert ("†" in shown) == cell["edge"]
                assert f"{steps[method, batch]:.2f}×" in shown
                assert all(f"{lr:g}" in shown.split("diverged at")[1] for lr in cell["diverged_lrs"])
                assert ("diverged" in shown) == bool(cell["diverged_lrs"])
    assert "Expected more than 1 value per channel" in page.text


def test_lowest_of_each_batch_size_is_marked(make_document, render):
    document = make_document()
    _, page = render(document)
    for column, batch in enumerate(document["batch_sizes"], start=1):
        errors = {
            row["method"]: row["error_mean"]
            for row in document["table"]
            if row["batch_size"] == batch and row["error_mean"] is not None
        }
        marked = [row[0].strip() for row in page.tables[0][1:] if "lowest" in row[column]]
        assert marked == [min(errors, key=errors.get)]


def test_page_states_budget_selection_and_settings(make_document, render):
    document = make_document()
    source, page = render(document)
    for words in ("6 epochs", "4,000 training", "same budget", "lowest mean validation error", "20 November 2026"):
        assert words in page.text
    assert document["command"] in page.text
    for part in ("settings", "versions", "machine"):
        assert all(name.replace("_", " ") in page.text for name in document[part])
    assert f"<title>{document['title']}</title>" in source


def test_figures_hold_the_documents_values(make_document, render):
    document = make_document()
    data = payload(render(document)[0])
    index = document["methods"].index("group")
    cells = {row["batch_size"]: row for row in document["table"] if row["method"] == "group"}
    (by_batch,) = group(data, "batch")
    (trace,) = [trace for trace in by_batch["traces"] if trace["meta"]["method"] == index]
    assert trace["y"] == pytest.approx([100 * cells[b]["error_mean"] for b in document["batch_sizes"]], rel=1e-4)
    assert trace["error_y"]["array"] == pytest.approx(
        [100 * cells[b]["error_std"] for b in document["batch_sizes"]], rel=1e-4
    )
    assert len(group(data, "rate")) == len(group(data, "time")) == len(document["batch_sizes"])
    assert len(group(data, "curves")) == 3
    assert len(group(data, "layers")) == len(document["methods"])


def test_every_diverged_rate_has_a_cross(make_document, render):
    document = make_document()
    data = payload(render(document)[0])
    wanted = {(t["method"], t["batch_size"], t["lr"]) for t in document["trials"] if t["status"] == "diverged"}
    crosses = [t for figure in group(data, "rate") for t in figure["traces"] if t["meta"]["part"] == "diverged"]
    assert wanted
    assert sum(len(trace["x"]) for trace in crosses) == len(wanted)


def test_names_are_harmless(make_document, render):
    document = make_document(["none", EVIL], batch_sizes=[8])
    document |= {"title": EVIL, "command": EVIL, "settings": {EVIL: EVIL}, "created": EVIL}
    document["trials"][0]["reason"] = EVIL
    source, page = render(document)
    assert "alert(1)</script>" not in source
    assert [a for a in page.attributes if a[0] == "script"] == [
        ("script", "type", "application/json"),
        ("script", "id", "payload"),
    ]
    assert page.tables[0][2][0].strip() == EVIL.strip()
    data = payload(source)
    for figure in data["figures"]:
        for trace in figure["traces"]:
            assert "<script" not in json.dumps(trace)
    assert "\u2028" not in re.search(r'id="payload">(.*?)</script>', source, re.S)[1]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None])
def test_numbers_that_are_not_finite_are_missing(make_document, render, value):
    document = make_document(["none", "batch"], batch_sizes=[8])
    for trial in document["trials"]:
        trial |= {"test_error": value, "train_loss": value, "seconds": value, "reason": None}
        for record in trial["curve"]:
            record["train_loss"] = value
        for record in trial["layers"]:
            record["std"] = value
    for row in document["table"]:
        row |= {"error_std": value, "step_time": value}
    document["settings"]["clip_grad"] = value
    source, page = render(document)
    payload(source)
    assert "nan" not in page.text.lower().replace("normalis", "")
    assert "±" not in page.tables[0][1][1]


@pytest.mark.parametrize("missing", ["step_time", "created", "command", "settings", "versions", "machine"])
def test_optional_parts_may_be_missing(make_document, render, missing):
    document = make_document(["none", "batch"], batch_sizes=[8])
    del document[missing]
    source, _ = render(document)
    assert bool(group(payload(source), "time")) == (missing != "step_time")


def test_without_layers_and_curves(make_document, render):
    document = make_document(["none", "batch"], batch_sizes=[8])
    for trial in document["trials"]:
        trial["layers"], trial["curve"] = [], []
    data = payload(render(document)[0])
    assert group(data, "layers") == group(data, "curves") == []
    assert group(data, "batch")


def test_a_study_without_trials(render):
    lists = {name: [] for name in ("methods", "batch_sizes", "lrs", "seeds", "trials", "table")}
    source, page = render({"title": "Nothing yet", **lists})
    assert "There are no trials." in page.text
    assert payload(source)["figures"] == []


def test_one_of_everything(make_document, render):
    document = make_document(["normprop"], batch_sizes=[8], lrs=[0.02], seeds=[0])
    source, page = render(document)
    assert "±" not in page.tables[0][1][1]
    assert all(group(payload(source), name) for name in ("rate", "curves", "time", "layers"))
    assert group(payload(source), "batch") == []


@pytest.mark.parametrize("status", ["diverged", "impossible", "waiting", "running"])
def test_no_trial_has_an_error(make_document, render, status):
    document = make_document(["none", "batch"], batch_sizes=[8, 32])
    for trial in document["trials"]:
        trial |= {"status": status, "reason": None, "test_error": None, "validation_error": None}
        trial |= {"curve": [], "layers": []}
    for row in document["table"]:
        row |= {"best_lr": None, "error_mean": None, "error_std": None, "seeds": 0}
        row |= {"impossible": "one value per channel" if status == "impossible" else None}
    words = {"diverged": "diverged at every rate", "impossible": "cannot run"}.get(status, "not finished")
    _, page = render(document)
    assert all(words in cell for row in page.tables[0][1:] for cell in row[1:])
    assert ("Partial: 0 of 36 trials" in page.text) == (status in ("waiting", "running"))


def test_forty_methods(make_document, render):
    document = make_document(["batch", *(f"method-{index}" for index in range(39))], batch_sizes=[8, 32])
    source, page = render(document)
    assert len(page.tables[0]) == 41
    assert len(group(payload(source), "layers")) == 40
    rankings = group(payload(source), "ranking")
    assert [len(figure["traces"]) for figure in rankings] == [40, 40]
    errors = [trace["x"][0] for trace in rankings[0]["traces"]]
    assert errors == sorted(errors)
    rows = [row for row in document["table"] if row["batch_size"] == 8]
    assert errors == pytest.approx(sorted(100 * row["error_mean"] for row in rows), rel=1e-4)
    hidden = payload(source)["hidden"]
    assert 0 not in hidden
    assert 40 - len(hidden) <= 7
    best = min(range(40), key=lambda index: rows[index]["error_mean"])
    assert best not in hidden
    assert not payload(render(make_document(["none", "batch"], batch_sizes=[8]))[0])["hidden"]


def test_writes_whole_or_not_at_all(make_document, tmp_path):
    path = tmp_path / "deep" / "report.html"
    assert write(make_document(["none"], batch_sizes=[8]), path) == path
    first = path.read_bytes()
    with pytest.raises(ConfigError):
        write({"title": "broken"}, path)
    assert path.read_bytes() == first
    assert list(path.parent.iterdir()) == [path]
