"""Plots of diagnoses as SVG."""

import math
import re
import xml.etree.ElementTree as ElementTree

import pytest

from normprop.diagnostics.diagnosis import Diagnosis
from normprop.diagnostics.plot import Heat, Line, Plot, Reference
from normprop.report import diagnosis, plots


def plot(*lines, **settings):
    return Plot("Title <of> it", "x label", "y label", lines, **settings)


LINE = Line("batch", [1.0, 2.0, 3.0], [1.0, 10.0, 100.0])


def texts(document):
    return [node.text for node in ElementTree.fromstring(document).iter("{http://www.w3.org/2000/svg}text")]


def test_text_stays_text_and_equal_figures_give_equal_documents():
    document = plots.svg([plot(LINE, references=[Reference(5.0, "five"), Reference(2.0, "two", "x")])])
    assert document == plots.svg([plot(LINE, references=[Reference(5.0, "five"), Reference(2.0, "two", "x")])])
    assert {"Title <of> it", "x label", "y label", "batch", "five", "two"} <= set(texts(document))
    assert 'aria-label="Title &lt;of&gt; it"' in document


@pytest.mark.parametrize("style", ["line", "points", "both", "theory"])
@pytest.mark.parametrize("scale", ["linear", "log", "symlog"])
def test_all_styles_and_scales_also_with_gaps_and_bands(style, scale):
    line = Line("none", [1, 2, 3], [1.0, math.nan, math.inf], [0.5, math.nan, 1.0], [2.0, math.nan, math.inf], style)
    assert "<svg" in plots.svg([plot(line, x_scale=scale, y_scale=scale)])


def test_what_is_empty_is_drawn_empty():
    assert "<svg" in plots.svg([plot(Line("none", [], []))])
    assert "<svg" in plots.svg([plot()])


def test_many_figures_share_one_legend_and_its_colours():
    other = Line("normprop", [1.0], [2.0])
    document = plots.svg([plot(LINE), plot(other), plot(LINE, other)])
    assert texts(document).count("batch") == texts(document).count("normprop") == 1
    first, second = plots.palette()["m0"], plots.palette()["m1"]
    assert first in document
    assert second in document
    turned = plots.svg([plot(LINE)], names=["normprop", "batch"])
    assert second in turned


def test_a_logarithmic_axis_has_numbers_within_a_decade_and_may_be_empty():
    narrow = plots.svg([plot(Line("none", [1.0, 2.0], [1.5, 6.0]), y_scale="log")])
    assert {"2", "5"} <= set(texts(narrow))
    for scale in ("log", "symlog"):
        assert "<svg" in plots.svg([plot(Line("none", [1.0, 2.0], [math.nan, 0.0]), y_scale=scale)])


def test_words_stand_at_the_ticks():
    words = [(1.0, "first"), (3.0, "last")]
    assert {"first", "last"} <= set(texts(plots.svg([plot(LINE, x_ticks=words)])))


def test_a_matrix_with_words_and_one_of_zeros():
    heat = Heat("Heat", "class", "image", [[1.0, -2.0], [0.0, 3.0]], ["cat", "dog"], ["a", "b"])
    assert {"cat", "dog", "a", "b"} <= set(texts(plots.svg([heat])))
    assert "<svg" in plots.svg([Heat("Zeros", "x", "y", [[0.0, 0.0]])])
    assert "<svg" in plots.svg([Heat("Sequential", "x", "y", [[1.0, 2.0]], diverging=False)])


def test_a_page_paints_plots_in_its_own_colours():
    themed = plots.themed(plots.svg([plot(LINE)]))
    left = set(re.findall(r"#[0-9a-f]{6}\b", themed))
    assert not left & set(plots.palette().values())
    assert "var(--m0)" in themed


def test_the_page_of_a_diagnosis():
    found = Diagnosis(
        "growth",
        "Does it grow?",
        "Lines that rise.",
        "It grows by <2>.",
        {"rate": 1.23456789, "of": {"batch": 3, "lost": None}, "curve": [1.0, 2.0]},
        [plot(LINE)],
        "Somebody 2020",
    )
    page = diagnosis.page("Net", [found], ["none", "batch"], {"Data": "digits"}, ["Left out: one."])
    shown = ("Does it grow?", "Lines that rise.", "It grows by &lt;2&gt;.", "1.235", "of · batch", "Left out: one.")
    assert all(words in page for words in shown)
    assert "lost" not in page
    assert not re.search(r'(src|href)="(?!#)', page)
    identifiers = re.findall(r'(?<!xlink:href=")\bid="([^"]*)"', page)
    assert len(identifiers) == len(set(identifiers))
