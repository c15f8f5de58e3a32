"""The package as a whole: what importing it needs, and the README's own code."""

import re
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
EXTRAS = ["typer", "rich", "PIL", "sklearn", "lightning_fabric", "optuna", "plotly", "scipy"]
BLOCK = f"import sys; sys.modules.update(dict.fromkeys({EXTRAS!r}))\n"


def run(code):
    return subprocess.run([sys.executable, "-c", BLOCK + code], capture_output=True, text=True, check=False)


def test_the_core_needs_torch_and_numpy_alone():
    code = """
import normprop, torch
from normprop.training.unit_norm import constrain
from normprop.training.groups import parameter_groups
network = normprop.models.nin(3, 10, width=0.125)
optimizer = torch.optim.SGD(parameter_groups(network, 5e-4), lr=0.01)
constrain(optimizer, network)
network(torch.randn(1, 3, 32, 32)).sum().backward()
optimizer.step()
"""
    result = run(code)
    assert result.returncode == 0, result.stderr


def test_a_missing_extra_is_named_in_one_line():
    result = run("from normprop.cli import main; sys.argv = ['normprop', 'compare']; main()")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "pip install 'normprop[cli]'" in result.stderr
    result = run("from normprop import data; data.load('digits')")
    assert "pip install 'normprop[data]'" in result.stderr


def test_the_readmes_example_runs():
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    torch.manual_seed(0)
    for block in blocks:
        exec(block, {})


def test_the_wheel_carries_the_type_marker_and_the_reports_assets():
    package = ROOT / "src" / "normprop"
    assert (package / "py.typed").exists()
    assert list((package / "report" / "assets").glob("*.j2"))
