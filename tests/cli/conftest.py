"""Running the command line in this process and in one of its own."""

import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from normprop.cli.app import run

COMMAND = [sys.executable, "-c", "from normprop.cli import main; main()"]
# The smallest comparison that trains anything.
TINY = ["--data", "digits", "--model", "mlp", "--width", "0.125", "--epochs", "1", "--train", "64", "--test", "50"]


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    """Every test runs in a directory of its own, with one thread per process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


@pytest.fixture
def tiny():
    return list(TINY)


@pytest.fixture
def normprop():
    """Run a command line in a process of its own and return what it left."""

    def call(*arguments):
        done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=200)
        return SimpleNamespace(returncode=done.returncode, out=done.stdout, err=done.stderr)

    return call


@pytest.fixture
def here(capfd):
    """Run a command line in this process, which saves the start of another, and return what it left."""

    def call(*arguments):
        capfd.readouterr()
        returncode = run(arguments)
        return SimpleNamespace(returncode=returncode, **capfd.readouterr()._asdict())

    return call


@pytest.fixture(autouse=True)
def as_in_a_terminal():
    """A shell that runs the tests in the background has them, and what they start, ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


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
def line(here):
    """Run a command line in this process; it must end with code 2 and one line on stderr, which is returned."""

    def call(*arguments):
        result = here(*arguments)
        assert result.returncode == 2
        assert result.out == ""
        assert result.err.startswith("normprop: ")
        assert result.err.count("\n") == 1
        return result.err

    return call
