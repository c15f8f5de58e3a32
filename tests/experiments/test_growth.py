"""The growth of costs: what is measured, and the picture of it."""

import math
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

from normprop.errors import ConfigError
from normprop.experiments.growth import AXES, grow
from normprop.report.growth import svg, ticks

SVG = "{http://www.w3.org/2000/svg}"


def document():
    """A document whose lines are known: time doubles with width, the ratio stays."""
    points = [
        {
            "value": value,
            "batch_size": 8,
            "times": [
                {"method": method, "milliseconds": factor * 100 * value, "ratio": factor}
                for method, factor in (("none", 1.0), ("<b>", 1.5))
            ],
        }
        for value in (0.25, 0.5, 1.0)
    ]
    machine = {"processor": "a processor", "threads": 1, "device": "cpu"}
    texts = {"title": "Costs & growth", "created": "2026-01-01T00:00", "machine": machine, "versions": {"torch": "2"}}
    axis = {"name": "width", "label": "share", "of": "NIN", "points": points}
    tools = [{"parameters": 10**power, "convert": 1.0, "inspect": 2.0} for power in (4, 5, 6)]
    return {**texts, "methods": ["none", "<b>"], "axes": [axis], "tools": tools}


def test_every_point_and_tool_is_measured():
    told = []
    axis = replace(AXES[1], values=(3,))
    result = grow(["layer"], seconds=0, axes=[axis], tool_widths=[0.1, 0.2], progress=lambda *step: told.append(step))
    (point,) = result["axes"][0]["points"]
    assert (point["value"], point["batch_size"]) == (3, 8)
    assert [time["method"] for time in point["times"]] == ["none", "layer"]
    assert result["tools"][0]["parameters"] < result["tools"][1]["parameters"]
    assert all(tool[name] > 0 for tool in result["tools"] for name in ("convert", "inspect"))
    assert told == [(0, 3, "depth 3"), (1, 3, "tools at width 0.1"), (2, 3, "tools at width 0.2"), (3, 3, "")]


def test_the_axes_grow_what_they_say():
    width, depth, batch = AXES
    numbers = [sum(p.numel() for p in width.network(value, "none").parameters()) for value in width.values]
    assert numbers == sorted(numbers)
    assert numbers[-1] > 10 * numbers[0]
    assert [len(depth.network(value, "none")) - 4 for value in depth.values] == list(depth.values)
    assert [batch.batch_size(value) for value in batch.values] == list(batch.values)


def test_unknown_methods():
    with pytest.raises(ConfigError, match="'bach'"):
        grow(["bach"])


def test_lines_are_straight_where_growth_is_a_power():
    page = ElementTree.fromstring(svg(document()))
    lines = [
        [tuple(map(float, point.split(","))) for point in line.get("points").split()]
        for line in page.iter(f"{SVG}polyline")
    ]
    assert len(lines) == 2 + 2 + 2
    for first, middle, last in lines:
        assert middle[0] - first[0] == pytest.approx(last[0] - middle[0], abs=0.15)
        assert middle[1] - first[1] == pytest.approx(last[1] - middle[1], abs=0.15)
    (plain, other), (level, above) = lines[:2], lines[2:4]
    assert all(own[1] < base[1] for own, base in zip(other, plain, strict=True))
    assert len({y for _, y in level}) == len({y for _, y in above}) == 1


def test_nothing_is_drawn_outside_the_page_and_names_are_escaped():
    page = ElementTree.fromstring(svg(document()))
    width, height = (float(page.get(name)) for name in ("width", "height"))
    texts = list(page.iter(f"{SVG}text"))
    assert {"Costs & growth", "<b>", "convert", "parameters"} <= {text.text for text in texts}
    assert all(0 <= float(text.get("x")) <= width and 0 <= float(text.get("y")) <= height for text in texts)


@pytest.mark.parametrize(("low", "high"), [(0.8, 30.0), (1e-3, 1e6), (0.9, 1.3), (3.1, 3.9), (1.0, 2.0)])
def test_ticks_are_round_and_neither_few_nor_many(low, high):
    found = ticks(low, high, 6)
    assert found == sorted(set(found))
    assert 2 <= len(found) <= 7
    assert all(low <= tick <= high for tick in found)
    assert all(math.isclose(tick, float(f"{tick:.2g}")) for tick in found)
