"""The page of the documentation about models of one's own: its commands run, its Python is what they print."""

import shlex
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def commands():
    page = (ROOT / "docs" / "models.md").read_text()
    return [line.strip() for line in page.splitlines() if line.startswith("    normprop ")]


def test_every_command_runs(here, directory, monkeypatch):
    pytest.importorskip("onnxscript")
    shutil.copytree(ROOT / "examples", directory / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.syspath_prepend(str(directory))
    for name in [name for name in sys.modules if name.partition(".")[0] == "examples"]:
        monkeypatch.delitem(sys.modules, name)
    printed = ""
    for command in commands():
        shown = here(*shlex.split(command)[1:])
        assert shown.returncode == 0, (command, shown.err)
        printed += shown.out
    page = (ROOT / "docs" / "models.md").read_text()
    code = [block for block in page.split("\n\n") if block.startswith("    import ")]
    assert len(code) == 1
    assert code[0] in printed
    assert (directory / "runs" / "plain.onnx").exists()
    assert len(commands()) == 7
