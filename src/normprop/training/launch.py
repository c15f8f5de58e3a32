"""Running one function in several processes on this machine."""

import os
import pickle
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import distributed, multiprocessing
from torch.multiprocessing.spawn import start_processes

from normprop.errors import ConfigError, NormPropError

_POLL_SECONDS = 0.05


def run(function: Callable[..., Any], arguments: tuple[Any, ...], processes: int, report: Callable[[Any], None]) -> Any:
    """Call ``function(*arguments, report)`` in several fresh processes and wait for them.

    The processes find each other through the environment variables that torch and Lightning Fabric read. They end
    when this process ends, however that happens. Scripts that call this need torch's usual
    ``if __name__ == "__main__":``, because a fresh process imports them again.

    Args:
        function: a function defined at the top of a module; its last argument sends a value to ``report`` here.
        arguments: its other arguments; they are pickled.
        processes: how many.
        report: called in this process with each value that the first process reports.

    Returns:
        What the first process returned.

    Raises:
        ConfigError: if an argument cannot be pickled.
        NormPropError, ValueError: raised by the function in any of the processes.
        torch.multiprocessing.ProcessRaisedException: with the traceback of any other error.
    """
    try:
        payload = pickle.dumps((function, arguments))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"training in {processes} processes: {error}; use functions defined at the top of a module, or "
            f"functools.partial of them"
        ) from error
    messages = multiprocessing.get_context("spawn").SimpleQueue()
    threads = max(1, torch.get_num_threads() // processes)
    context = start_processes(
        _work, (processes, _free_port(), threads, payload, messages), nprocs=processes, join=False, daemon=True
    )
    try:
        returned = _follow(context, messages, report)
    finally:
        for process in context.processes:
            process.kill()
            process.join()
        messages.close()
    return returned


def _follow(context: Any, messages: Any, report: Callable[[Any], None]) -> Any:
    """Hand on what the processes say until all are done."""
    returned = None
    running = True
    while running:
        try:
            running = not context.join(timeout=_POLL_SECONDS)
        finally:  # a process that fails has said why before it ended
            while not messages.empty():
                kind, content = pickle.loads(messages.get())
                if kind == "error":
                    raise content
                if kind == "report":
                    report(content)
                else:
                    returned = content
    return returned


def _work(rank: int, processes: int, port: int, threads: int, payload: bytes, messages: Any) -> None:
    """Body of one process."""
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "LOCAL_RANK": str(rank),
        "RANK": str(rank),
        "WORLD_SIZE": str(processes),
    }
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def send(kind: str, content: Any) -> None:
        messages.put(pickle.dumps((kind, content)))

    try:
        function, arguments = pickle.loads(payload)
        returned = function(*arguments, (lambda value: send("report", value)) if rank == 0 else (lambda value: None))
        if rank == 0:
            send("return", returned)
    except (NormPropError, ValueError) as error:
        send("error", error)
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # all is said; in about one of ten ends after DistributedDataParallel torch's teardown never returns


def _end_with_parent() -> None:
    """End this process when its parent is gone, however that ended."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _free_port() -> int:
    """Find a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
