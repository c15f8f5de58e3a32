"""Wrong arguments and the errors of every part: one line and exit code 2."""

import inspect
import subprocess
import sys
from dataclasses import fields

import pytest

from normprop.cli.app import run
from normprop.cli.options import _settings
from normprop.experiments.settings import Settings


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["compar"], "No such command 'compar'"),
        (["compare", "--nonsense"], "No such option: --nonsense"),
        (["compare", "--epochs", "many"], "--epochs"),
        (["compare", "--epochs", "0"], "epochs must be a whole number of at least 1"),
        (["compare", "--workers", "0"], "--workers"),
        (["compare", "--methods", "none,foo"], "no method 'foo'; there are all, none, normprop"),
        (["compare", "--methods", ","], "methods is empty"),
        (["compare", "--lrs", "0.1,fast"], "--lrs must be a comma list of numbers, got 'fast'"),
        (["compare", "--lrs", "0"], "lrs holds 0.0"),
        (["compare", "--seeds", "0,0"], "seeds names 0 more than once"),
        (["compare", "--batch-sizes", "1.5"], "--batch-sizes must be a comma list of whole numbers"),
        (["compare", "--data", "missing.npz"], "missing.npz"),
        (["compare", "--train", "100000"], "digits"),
        (["compare", "--model", "alexnet"], "no model 'alexnet'"),
        (["compare", "--model", "nowhere:factory"], "there is no module 'nowhere'"),
        (["compare", "--model", "mlp", "--storage", "nonsense"], "storage 'nonsense' does not open"),
        (["compare", "--augment", "rotate"], "augment"),
        (["train", "--method", "foo"], "no method 'foo'"),
        (["train", "--lr", "nan"], "lr must be a finite number above 0"),
        (["train", "--schedule", "steps"], "schedule must be one of constant, halving, linear, cosine"),
        (["train", "--resume"], "--resume needs --checkpoint"),
        (["train", "--resume", "--checkpoint", "missing.pt"], "missing.pt"),
        (["train", "--epochs", "0", "--momentum", "2"], "epochs must be"),
        (["train", "one", "two"], "unexpected extra argument"),
        (["report", "nothing"], "no study 'nothing'"),
        (["report"], "Missing argument 'study'"),
    ],
)
def test_one_line_and_code_2(line, arguments, expected):
    assert expected in line(*arguments)


def test_a_study_is_not_left_behind_by_wrong_arguments(line, directory):
    line("compare", "--model", "alexnet", "--storage", f"sqlite:///{directory}/study.db")
    assert list(directory.iterdir()) == []


def test_options_have_the_defaults_of_the_library():
    assert _settings() == Settings()
    named = {*inspect.signature(_settings).parameters, "training", "batch_size", "lr", "seed"}
    missing = {field.name for field in (*fields(Settings), *fields(Settings().training))} - named
    assert missing == set()


def test_version_and_help(capsys):
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("normprop ")
    for command in ("train", "compare", "report"):
        assert run([command, "--help"]) == 0
        assert command in capsys.readouterr().out


def test_without_typer_one_line_names_the_extra():
    code = "import sys; sys.modules['typer'] = None; from normprop.cli import main; main()"
    result = subprocess.run([sys.executable, "-c", code, "train"], capture_output=True, text=True, timeout=100)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == (
        "normprop: typer is not installed; it comes with the extra 'cli': pip install 'normprop[cli]'\n"
    )


def test_unexpected_errors_keep_their_traceback(normprop, directory, tiny):
    (directory / "broken.py").write_text("def factory(norm):\n    raise RuntimeError('a bug of mine')\n")
    result = normprop("train", *tiny, "--model", "broken:factory")
    assert result.returncode == 1
    assert "Traceback" in result.err
    assert "a bug of mine" in result.err
