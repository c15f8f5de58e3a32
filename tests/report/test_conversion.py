"""The page of a conversion."""

import html
import math
import re
import sys

import pytest
import torch
from torch import nn

from normprop.errors import MissingExtraError
from normprop.graph.plan import analyze
from normprop.graph.report import ConversionReport, SiteReport
from normprop.report.conversion import headline, page

EVIL = "</script><script>alert(1)</script>\"'&<b>"


@pytest.fixture(scope="module")
def report():
    """An absorbed norm, one in front of everything, one that is left."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8)
    )
    plan = analyze(net, torch.randn(8, 3, 6, 6), exclude="5")
    plan.apply()
    return plan.report


def rows(source):
    """Texts of the cells of every row of the table."""
    body = re.search(r"<tbody>(.*?)</tbody>", source, re.S)[1]
    found = []
    for row in re.findall(r"<tr(.*?)</tr>", body, re.S):
        cells = re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.S)
        found.append([" ".join(html.unescape(re.sub("<[^>]*>", "", cell)).split()) for cell in cells])
    return found


def site(action, **more):
    return SiteReport("bn", "BatchNorm2d", "batch norm", 8, 1, action, **more)


def test_every_site_has_a_row_with_its_numbers(report):
    found = rows(report.to_html())
    first, second, third = report.sites
    assert [row[1] for row in found] == ["0", "2", "5"]
    assert found[0][2].startswith("predicted → PredictedNorm")
    assert first.reason in found[0][2]
    assert found[1][2] == "absorbed → 1"
    assert found[2][2] == "kept" + third.reason
    assert found[1][3:5] == ["BatchNorm2d", "4"]
    mean, std = map(float, found[1][5].split(" ± "))
    assert (mean, std) == (pytest.approx(second.mean, abs=6e-4), pytest.approx(second.std, abs=6e-4))
    assert float(found[1][6]) == pytest.approx(second.correction, abs=6e-4)
    assert found[2][5:] == ["", ""]


def test_counts_and_facts_are_told(report):
    source = " ".join(html.unescape(re.sub("<[^>]*>", " ", page(report))).split())
    assert "2 of 3 normalisers are converted; 1 is kept." in source
    assert "1 absorbed into the weights of the layer in front 1 given predicted moments" in source
    assert "Weights fresh: to be trained from scratch" in source
    assert "Captured by torch.export" in source


@pytest.mark.parametrize(
    ("actions", "expected"),
    [
        ([], "There is no normaliser to convert."),
        (["absorbed"], "The one normaliser is converted."),
        (["cannot"], "The one normaliser cannot be converted."),
        (["kept", "kept"], "None of 2 normalisers is converted; 2 are kept."),
        (["absorbed", "predicted", "replaced"], "All 3 normalisers are converted."),
        (["absorbed", "kept", "cannot"], "1 of 3 normalisers is converted; 1 is kept; 1 cannot be converted."),
    ],
)
def test_the_headline_counts(actions, expected):
    assert headline(ConversionReport("Net", "normprop", "fresh", "export", [site(a) for a in actions])) == expected


def test_notes_unknown_operators_and_the_difference_are_shown():
    report = ConversionReport("Net", "normprop", "exact", "recorded (no graph)", [site("absorbed", into="conv")])
    report.notes, report.unknown, report.difference = ["a note"], ["node 3: warned"], 3e-16
    source = page(report)
    assert "a note" in source
    assert "No rule: node 3: warned" in source
    assert "3.0e-16 of the output" in source
    assert "recorded (no graph)" in source
    assert "Against depth" not in source


def test_a_dot_for_every_number_leads_to_its_row():
    values = [0.5, 2.0, None, math.inf, 0.1]
    sites = [site("absorbed", into="conv", mean=0.0, std=value) for value in values]
    source = page(ConversionReport("Net", "normprop", "fresh", "export", sites))
    dots = re.findall(r'<a href="#site-(\d)"><circle class="absorbed" cx="([\d.]+)" cy="([\d.]+)"', source)
    assert [dot[0] for dot in dots] == ["1", "2", "5"]
    assert all(f'id="site-{dot[0]}"' in source for dot in dots)
    across, down = [float(dot[1]) for dot in dots], [float(dot[2]) for dot in dots]
    assert across[1] - across[0] == pytest.approx((across[2] - across[0]) / 4, abs=0.2)
    # A logarithmic axis that points up.
    slope = (down[1] - down[0]) / math.log(2.0 / 0.5)
    assert slope < 0
    assert down[2] - down[0] == pytest.approx(slope * math.log(0.1 / 0.5), abs=0.2)


def test_every_text_is_escaped_and_nothing_is_loaded():
    sites = [
        SiteReport(EVIL, EVIL, EVIL, 8, 2, "cannot", EVIL, EVIL, 0.0, 1.0, 1.0, f"/home/me/{EVIL}:3: {EVIL}")
        for _ in range(2)
    ]
    source = page(ConversionReport(EVIL, EVIL, EVIL, EVIL, sites, [EVIL], [EVIL]))
    assert source.count("<script") == 1 == source.count("</script>")
    assert html.escape("alert(1)") in source
    assert "Content-Security-Policy" in source
    assert not re.search(r'src=|url\(|@import|href="[^#]', source)
    assert "/home/me" not in source


def test_page_is_written_and_returned(report, tmp_path):
    path = tmp_path / "deep" / "report.html"
    assert report.to_html(path) == page(report) == path.read_text(encoding="utf-8")


def test_names_the_extra_that_is_missing(report, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    for module in ("template", "conversion"):
        monkeypatch.delitem(sys.modules, f"normprop.report.{module}")
    with pytest.raises(MissingExtraError, match=r"normprop\[report\]"):
        report.to_html()
