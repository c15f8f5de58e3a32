"""The benchmark's document as tables: one for each case, a row for each method."""

from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any

from normprop.experiments.bench_cases import Case
from normprop.experiments.timing import BASELINE

_RESTLESS = 1.25  # quartiles of one network's own time further apart than this say that something else was running

HEADINGS = ("method", "ms", "time / none", "time / batch", "memory", "memory / none", "peak")
"""The columns; a document without peaks has no last one."""


def tables(document: Mapping[str, Any]) -> Iterator[tuple[str, list[list[str]]]]:
    """Lay the rows of a document out, case by case.

    Args:
        document: from :func:`normprop.experiments.bench.bench`.

    Returns:
        Pairs of a case in words and its rows: texts under ``HEADINGS``. A method that cannot run has its name and the
        reason alone.

    Example:
        >>> ratio = {"ratio": 1.0, "low": 0.9, "high": 1.25}
        >>> row = {"network": "nin", "batch_size": 8, "mode": "eager", "layout": "contiguous", "dtype": "float32"}
        >>> row |= {"method": "none", "reason": None, "milliseconds": 12.3, "to_none": ratio, "to_batch": None}
        >>> row |= {"saved_bytes": 2_500_000, "saved_ratio": 1.0, "peak_bytes": None}
        >>> next(tables({"rows": [row]}))
        ('nin, batch 8, eager, contiguous, float32',
         [['none', '12.3', '1.000 (0.900–1.250)', '', '2.5 MB', '1.000']])
    """
    peaks = has_peaks(document)
    for case, rows in groupby(document["rows"], key=case_of):
        yield str(case), [_cells(row, peaks) for row in rows]


def case_of(row: Mapping[str, Any]) -> Case:
    """The case that a row belongs to.

    Args:
        row: of a document.

    Returns:
        The case.
    """
    return Case(*(row[key] for key in ("network", "batch_size", "mode", "layout", "dtype")))


def has_peaks(document: Mapping[str, Any]) -> bool:
    """Whether a document knows the peak of memory, as on CUDA.

    Args:
        document: from :func:`normprop.experiments.bench.bench`.

    Returns:
        True if any row does.
    """
    return any(row.get("peak_bytes") is not None for row in document["rows"])


def introduction(document: Mapping[str, Any]) -> list[str]:
    """Say what was measured, where, and what was left out.

    Args:
        document: from :func:`normprop.experiments.bench.bench`.

    Returns:
        Sentences, one for each paragraph.
    """
    machine, versions = document["machine"], document["versions"]
    threads = f"{machine['threads']} thread{'s'[: machine['threads'] - 1]}"
    return [
        "Forward, backward and SGD step, all methods of a case interleaved in one process: median time, and median "
        "over the rounds of the ratios with their quartiles. Memory: bytes that autograd keeps from forward to "
        "backward, without parameters, buffers and batch.",
        f"{machine['processor']}, {machine['cores']} cores, {threads}, {machine['device']}; torch {versions['torch']}, "
        f"Python {versions['python']}, {document['created'][:10]}.",
        *(["Peak: most memory allocated during a step, above what was there before."] if has_peaks(document) else []),
        *document["notes"],
        *_restless(document),
    ]


def markdown(document: Mapping[str, Any]) -> str:
    """Write the document as a page.

    Args:
        document: from :func:`normprop.experiments.bench.bench`.

    Returns:
        Markdown.
    """
    headings = HEADINGS if has_peaks(document) else HEADINGS[:-1]
    parts = [f"# {document['title']}", *introduction(document)]
    if document["command"]:
        parts.append(f"    {document['command']}")
    for case, rows in tables(document):
        full = [row if len(row) > 2 else [row[0], f"cannot run: {row[1]}", *[""] * (len(headings) - 2)] for row in rows]
        lines = [headings, ["---"] * len(headings), *full]
        parts += [f"## {case}", "\n".join(f"| {' | '.join(line)} |" for line in lines)]
    return "\n\n".join(parts) + "\n"


def _restless(document: Mapping[str, Any]) -> Iterator[str]:
    """A warning for each case in which the machine did other things as well."""
    for row in document["rows"]:
        low, high = row.get("milliseconds_quartiles", (1.0, 1.0))
        if row["method"] == BASELINE and high > _RESTLESS * low:
            yield (
                f"The machine was busy: {case_of(row)}: quartiles of {BASELINE} from {low:.3g} to {high:.3g} ms. Run "
                "this case again on a quiet machine."
            )


def _cells(row: Mapping[str, Any], peaks: bool) -> list[str]:
    if row["reason"] is not None:
        return [row["method"], row["reason"]]
    cells = [row["method"], f"{row['milliseconds']:.3g}", _ratio(row["to_none"]), _ratio(row["to_batch"])]
    cells += [_bytes(row["saved_bytes"]), f"{row['saved_ratio']:.3f}"]
    return [*cells, _bytes(row["peak_bytes"])] if peaks else cells


def _ratio(spread: Mapping[str, float] | None) -> str:
    return "" if spread is None else f"{spread['ratio']:.3f} ({spread['low']:.3f}–{spread['high']:.3f})"


def _bytes(count: int) -> str:
    return f"{count / 1e6:.3g} MB" if count >= 1e6 else f"{count / 1e3:.3g} kB"
