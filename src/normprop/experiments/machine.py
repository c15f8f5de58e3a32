"""What ran an experiment: the machine and the versions of the software."""

import importlib.metadata
import os
import platform
from pathlib import Path

import torch


def cores() -> int:
    """Count the processor cores that this process may use.

    Returns:
        At least 1.

    Example:
        >>> cores() >= 1
        True
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def device(accelerator: str) -> torch.device:
    """Resolve an accelerator's name as Fabric does.

    Args:
        accelerator: "auto", "cpu", "gpu", "cuda" or "mps".

    Returns:
        The device of the first such accelerator.

    Example:
        >>> device("cpu")
        device(type='cpu')
    """
    found = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if accelerator == "cpu" or found is None else found


def describe(accelerator: str) -> dict[str, str | int]:
    """Describe the machine for a results document.

    Args:
        accelerator: name of the accelerator in use.

    Returns:
        Processor, cores, threads of torch in this process, and device.

    Example:
        >>> sorted(describe("cpu"))
        ['cores', 'device', 'processor', 'threads']
    """
    used = device(accelerator)
    name = torch.cuda.get_device_name(used) if used.type == "cuda" else used.type
    return {"processor": _processor(), "cores": cores(), "threads": torch.get_num_threads(), "device": name}


def versions() -> dict[str, str]:
    """List the versions behind a result.

    Returns:
        Versions of normprop, torch, numpy and python.

    Example:
        >>> sorted(versions())
        ['normprop', 'numpy', 'python', 'torch']
    """
    packages = {name: importlib.metadata.version(name) for name in ("normprop", "numpy")}
    return {**packages, "torch": torch.__version__, "python": platform.python_version()}


def _processor() -> str:
    """The processor's name; Linux tells it in a file only."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
