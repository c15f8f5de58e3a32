import html
import json
import re
import sys
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

from normprop.errors import MissingExtraError
from normprop.graph.inspect import inspect
from normprop.report.inspection import page, stages, traces

EVIL = "</script><script>alert(1)</script>\"'&<b>\u2028"


class Page(HTMLParser):
    """Table rows and attributes of a page; fails on tags that do not match."""

    def __init__(self, source):
        super().__init__()
        self.open, self.attributes, self.rows, self.text = [], [], [], ""
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in {"meta", "input"}:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([dict(attrs)])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data
            if {"td", "th"} & set(self.open):
                self.rows[-1][-1] += data.strip()


def payload(source):
    return json.loads(re.search(r'<script type="application/json" id="payload">(.*?)</script>', source, re.S)[1])


@pytest.fixture(scope="module")
def report():
    """A network whose first convolution is predicted badly: the images are of one colour each."""
    torch.manual_seed(0)
    stem = nn.Conv2d(1, 4, 3, bias=False)
    nn.init.constant_(stem.weight, 1 / 9)
    body = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU())
    model = nn.ModuleDict({"stem": stem, "body": body})
    model.forward = lambda x: body(stem(x))
    x = torch.randn(64, 1, 1, 1).expand(64, 1, 8, 8).contiguous()
    return inspect(model, x)


@pytest.fixture(scope="module")
def source(report):
    return report.to_html()


def test_page_has_a_row_for_every_call_with_its_numbers(report, source):
    read = Page(source)
    rows = {row[0]["id"]: row for row in read.rows if "id" in row[0]}
    assert [*rows] == [f"call-{number}" for number in range(1, 6)]
    assert [row[2] for row in rows.values()] == ["stem: conv2d", "0: batch_norm", "1: relu", "2: conv2d", "3: relu"]
    stem = rows["call-1"]
    site = report.sites[0]
    assert stem[3] == "64×4×6×6"
    assert float(stem[6]) == pytest.approx(site.predicted.std, abs=5e-3)
    assert float(stem[7]) == pytest.approx(site.measured.std, abs=5e-3)
    assert stem[10] == f"{site.ratio:.2f}" == "0.33"
    assert ["class" in row[0] for row in rows.values()] == [site.flagged for site in report.sites]
    assert "flagged (standard deviation beyond a factor 1.5 of its prediction)" in " ".join(read.text.split())


def test_page_loads_nothing(source):
    read = Page(source)
    assert ("meta", "http-equiv", "Content-Security-Policy") in read.attributes
    assert not [entry for entry in read.attributes if entry[1] in ("src", "href")]
    style = re.search(r"<style>(.*?)</style>", source, re.S)[1]
    assert "url(" not in style
    assert "@import" not in style


def test_plot_shows_predicted_and_measured_values_against_depth(report, source):
    drawn = payload(source)["traces"]
    assert drawn == json.loads(json.dumps(traces(report.to_dict())))
    by_part = {(trace["meta"]["quantity"], trace["meta"]["part"]): trace for trace in drawn}
    for quantity in ("std", "mean"):
        for part in ("predicted", "measured"):
            trace = by_part[quantity, part]
            assert trace["x"] == [1, 2, 3, 4, 5]
            values = [getattr(getattr(site, part), quantity) for site in report.sites]
            assert trace["y"] == pytest.approx(values, rel=1e-4, abs=1e-12)
    gradients = by_part["gradient", "gradient"]
    assert gradients["y"] == pytest.approx([site.gradient for site in report.sites], rel=1e-4)
    assert gradients["hovertext"][0].startswith("<b>stem</b><br>conv2d → 64×4×6×6<br>std ")
    assert [stage["name"] for stage in payload(source)["stages"]] == ["stem", "body.0", "body.1", "body.2", "body.3"]


def test_stages_stay_few():
    sites = [{"path": f"{part}.{block}.conv"} for part in ("stem", "body") for block in range(20)]
    named = stages({"model": "Net", "sites": sites})
    assert named == [{"name": "stem", "first": 1, "last": 20}, {"name": "body", "first": 21, "last": 40}]


def test_every_text_is_escaped_and_every_number_finite(report):
    document = report.to_dict()
    document["model"] = EVIL
    document["notes"] = [EVIL]
    hollow = {"predicted": None, "gradient": None, "ratio": None, "skew": "nan", "kurtosis": "inf"}
    document["sites"][1] |= {"path": EVIL, "op": EVIL, "source": f"{EVIL}.py:3: {EVIL}", "group": EVIL, **hollow}
    document["sites"][2] |= {"measured": dict.fromkeys(("mean", "std", "within", "between"), "nan"), "ratio": "inf"}
    source = page(document)
    read = Page(source)
    assert source.count("<script") == 3 == source.count("</script>")
    assert EVIL in read.text
    drawn = payload(source)["traces"]
    assert "NaN" not in json.dumps(drawn)
    assert [trace["y"][1] for trace in drawn if trace["meta"]["part"] != "measured"] == [None] * 3
    assert drawn[0]["hovertext"][1].startswith(f"<b>{html.escape(EVIL, quote=False)}</b><br>")


def test_page_is_written_and_returned(report, source, tmp_path):
    path = tmp_path / "deep" / "report.html"
    assert report.to_html(path) == source == path.read_text(encoding="utf-8")
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]


def test_a_network_without_calls(tmp_path):
    report = inspect(nn.Identity(), torch.zeros(2, 3))
    assert report.worst is None
    assert "0 calls, none of which can be judged" in str(report)
    assert "No call returns a floating point tensor" in report.to_html()


def test_names_the_extra_that_is_missing(report, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    for module in ("template", "inspection"):
        monkeypatch.delitem(sys.modules, f"normprop.report.{module}")
    with pytest.raises(MissingExtraError, match=r"normprop\[report\]"):
        report.to_html()
