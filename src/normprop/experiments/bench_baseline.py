"""A benchmark against an earlier one: which ratios rose by more than their spread."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normprop.errors import ConfigError
from normprop.experiments.bench_table import case_of

_EXACT = 1e-3  # counted bytes have no spread; less than this is a scalar more or less


@dataclass(frozen=True)
class Rise:
    """A ratio that is higher than it was.

    Args:
        where: case and method in words.
        what: which ratio.
        before: in the baseline.
        now: in the new document.

    Example:
        >>> print(Rise("mlp, batch 8, eager, contiguous, float32: normprop", "time to none", 1.05, 1.2))
        mlp, batch 8, eager, contiguous, float32: normprop: time to none rose from 1.050 to 1.200
    """

    where: str
    what: str
    before: float
    now: float

    def __str__(self) -> str:
        """The rise in words."""
        return f"{self.where}: {self.what} rose from {self.before:.3f} to {self.now:.3f}"


@dataclass(frozen=True)
class Comparison:
    """A document against a baseline.

    Args:
        compared: number of rows that both have.
        rises: what rose.
        remarks: what makes the two less comparable, and what could not be compared.
    """

    compared: int
    rises: list[Rise]
    remarks: list[str]


def load(path: Path, width: float) -> dict[str, Any]:
    """Read a document that `normprop bench` wrote.

    Args:
        path: its bench.json.
        width: of the networks that are to be compared with it.

    Returns:
        The document.

    Raises:
        ConfigError: if there is no such file, it is something else, or its networks had another width.
    """
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not JSON"
        raise ConfigError(f"baseline {path}: {reason}; give the bench.json of an earlier run") from error
    if not isinstance(document, dict) or not {"rows", "settings", "machine", "versions"} <= document.keys():
        raise ConfigError(f"baseline {path} is not a document of normprop bench; give the bench.json of an earlier run")
    if document["settings"]["width"] != width:
        raise ConfigError(f"baseline {path} is of width {document['settings']['width']:g}; run with that --width")
    return document


def compare(document: Mapping[str, Any], baseline: Mapping[str, Any]) -> Comparison:
    """Find the ratios that rose by more than the spread of both: whose quartiles lie above those of the baseline.

    Ratios of time to "none" and to "batch" are compared, and those of the bytes held for the backward pass, which are
    exact. A method that ran and now cannot counts as a rise without bound.

    Args:
        document: the new one.
        baseline: the earlier one.

    Returns:
        What rose; rows that only one of the two has are counted in the remarks.

    Raises:
        ConfigError: if no row is in both.
    """
    before, now = ({_key(row): row for row in each["rows"]} for each in (baseline, document))
    shared = [key for key in now if key in before]
    if not shared:
        raise ConfigError("the baseline has none of the cases that ran: give the lists that it was made with")
    remarks = [
        f"the baseline is of another {name}: {old}, now {new}"
        for name, old, new in _circumstances(baseline, document)
        if old != new
    ]
    for count, words in ((len(before) - len(shared), "the baseline"), (len(now) - len(shared), "this run")):
        if count:
            remarks.append(f"{count} rows are in {words} alone and were not compared")
    return Comparison(len(shared), [rise for key in shared for rise in _rises(key, before[key], now[key])], remarks)


def _rises(where: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Rise]:
    if before["reason"] is not None:
        return []
    if now["reason"] is not None:
        return [Rise(where, f"time (cannot run any more: {now['reason']})", before["to_none"]["ratio"], float("inf"))]
    found = [
        Rise(where, f"time to {key[3:]}", before[key]["ratio"], now[key]["ratio"])
        for key in ("to_none", "to_batch")
        if before[key] is not None and now[key] is not None and now[key]["low"] > before[key]["high"]
    ]
    if now["saved_ratio"] > before["saved_ratio"] * (1 + _EXACT):
        found.append(Rise(where, "memory to none", before["saved_ratio"], now["saved_ratio"]))
    return found


def _key(row: Mapping[str, Any]) -> str:
    return f"{case_of(row)}: {row['method']}"


def _circumstances(baseline: Mapping[str, Any], document: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    return [
        (words, baseline[part][name], document[part][name])
        for part, name, words in (
            ("machine", "processor", "processor"),
            ("machine", "threads", "number of threads"),
            ("machine", "device", "device"),
            ("versions", "torch", "version of torch"),
        )
    ]
