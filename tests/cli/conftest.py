"""Running the command line in this process and in one of its own."""

import subprocess
import sys

import pytest

from normprop.cli.app import run

COMMAND = [sys.executable, "-c", "from normprop.cli import main; main()"]
# The smallest comparison that trains anything.
TINY = ["--data", "digits", "--model", "mlp", "--width", "0.125", "--epochs", "1", "--train", "64", "--test", "50"]


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    """Every test runs in a directory of its own, with one thread per process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


@pytest.fixture
def tiny():
    return list(TINY)


@pytest.fixture
def normprop():
    """Run a command line in a process of its own and return what it left."""

    def call(*arguments, **options):
        return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=200, **options)

    return call


@pytest.fixture
def start():
    """Start a command line in a process group of its own, which is ended with the test."""
    processes = []

    def call(*arguments):
        process = subprocess.Popen(
            [*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        processes.append(process)
        return process

    yield call
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.communicate()


@pytest.fixture
def line(capsys):
    """Run a command line in this process; it must end with code 2 and one line on stderr, which is returned."""

    def call(*arguments):
        assert run(arguments) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("normprop: ")
        assert captured.err.count("\n") == 1
        return captured.err

    return call
