"""`normprop methods` and the page made of it."""

import json
from pathlib import Path

from normprop import norms
from normprop.norms import table

ROOT = Path(__file__).parents[2]


def test_every_method_is_listed_with_its_facts(here):
    shown = here("methods").out
    assert all(name in shown for name in norms.names())
    listed = {method["name"]: method for method in json.loads(here("methods", "--json").out)}
    assert list(listed) == norms.names()
    assert listed["batch"]["depends_on_others"]
    assert not listed["normprop"]["depends_on_others"]


def test_one_method_comes_with_paper_and_advice(here, line):
    shown = " ".join(here("methods", "batch-renorm").out.split())
    assert norms.info("batch-renorm").paper in shown
    assert "Use it when" in shown
    assert "no method 'bach'" in line("methods", "bach")


def test_every_method_says_when_to_use_it():
    for name in norms.names():
        assert "do not use" in table.usage(name).lower(), name


def test_the_page_of_the_documentation_is_what_the_command_writes(here):
    page = (ROOT / "docs" / "methods.md").read_text()
    assert here("methods", "--markdown").out == page
    assert all(f"| `{name}` |" in page for name in norms.names())
