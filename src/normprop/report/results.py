"""The results document of a comparison, checked once and indexed for the page."""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

from normprop.errors import ConfigError

Row = dict[str, Any]

FINISHED = ("complete", "diverged", "impossible")
STATUSES = (*FINISHED, "running", "waiting")

_DOCUMENT = {
    "title": str,
    "methods": list,
    "batch_sizes": list,
    "lrs": list,
    "seeds": list,
    "trials": list,
    "table": list,
}
_OPTIONAL = {"command": str, "created": str, "settings": dict, "versions": dict, "machine": dict, "step_time": list}
_NUMBER = (int, float)
_TRIAL = {"method": str, "batch_size": _NUMBER, "lr": _NUMBER, "seed": int, "status": str}
_CELL = {"method": str, "batch_size": _NUMBER}
_STEP = {"method": str, "batch_size": _NUMBER, "ratio": _NUMBER}


@dataclass(frozen=True)
class Results:
    """A checked results document with look-ups by method, batch size and learning rate."""

    title: str
    command: str
    created: str
    settings: Row
    versions: Row
    machine: Row
    methods: list[str]
    batch_sizes: list[int]
    lrs: list[float]
    seeds: list[int]
    trials: list[Row]
    step_time: list[Row]
    cells: dict[tuple[str, int], Row]
    groups: dict[tuple[str, int], list[Row]]

    def runs(self, method: str, batch_size: int) -> list[Row]:
        """The trials of one method and batch size, over learning rates and seeds."""
        return self.groups.get((method, batch_size), [])

    def runs_at(self, method: str, batch_size: int, lr: float | None) -> list[Row]:
        """The trials of one method, batch size and learning rate, over seeds."""
        return [trial for trial in self.runs(method, batch_size) if trial["lr"] == lr]

    def cell(self, method: str, batch_size: int) -> Row:
        """The table's row of one method and batch size; empty when there is none."""
        return self.cells.get((method, batch_size), {})

    def error(self, method: str, batch_size: int) -> float | None:
        """The mean test error of one cell as a fraction, or None where there is none."""
        value = self.cell(method, batch_size).get("error_mean")
        return None if value is None else float(value)

    def leaders(self, batch_size: int) -> list[str]:
        """The methods that cannot be told apart from the best at a batch size, the best first.

        A method is within spread of the best if their means differ by at most sqrt(s_1^2 + s_2^2), s the standard
        deviations over seeds. Without a spread (one seed) only equal means are.
        """
        ranked = sorted((error, m) for m in self.methods if (error := self.error(m, batch_size)) is not None)
        if not ranked:
            return []
        least, best = ranked[0]
        spread = {m: self.cell(m, batch_size).get("error_std") for _, m in ranked}

        def reach(method: str) -> float:
            one, other = spread[best], spread[method]
            return 0.0 if one is None or other is None else math.hypot(one, other)

        return [m for error, m in ranked if m == best or error - least <= reach(m)]

    def counts(self) -> Counter[str]:
        """How many trials have each status."""
        return Counter(trial["status"] for trial in self.trials)

    @property
    def digits(self) -> int:
        """Decimals that errors in % are printed with: one more where errors are small."""
        errors = [row["error_mean"] for row in self.cells.values() if row.get("error_mean") is not None]
        return 2 if errors and min(errors) < 0.02 else 1


def read(document: object) -> Results:
    """Check a results document and index it.

    Numbers that are not finite become None: the page shows them as missing.

    Args:
        document: what ``normprop.experiments.results.document`` returns, or the same read from JSON.

    Returns:
        The indexed results.

    Raises:
        ConfigError: if a part that the page is made of is missing or of another kind.
    """
    whole = _finite(document)
    _require(whole, _DOCUMENT, "the results document")
    parts = {key: whole.get(key) or kind() for key, kind in _OPTIONAL.items()}
    _require(parts, _OPTIONAL, "the results document")
    for name, fields, rows in (
        ("trials", _TRIAL, whole["trials"]),
        ("table", _CELL, whole["table"]),
        ("step_time", _STEP, parts["step_time"]),
    ):
        for index, row in enumerate(rows):
            _require(row, fields, f"{name}[{index}] of the results document")
    for index, trial in enumerate(whole["trials"]):
        if trial["status"] not in STATUSES:
            raise ConfigError(
                f"trials[{index}] of the results document has status {trial['status']!r}; "
                f"expected one of {', '.join(STATUSES)}"
            )
    for name in ("batch_sizes", "lrs"):
        for value in whole[name]:
            if not isinstance(value, _NUMBER) or value <= 0:
                raise ConfigError(f"{name} of the results document holds {value!r}; expected numbers above zero")
    groups: dict[tuple[str, int], list[Row]] = {}
    for trial in whole["trials"]:
        groups.setdefault((trial["method"], trial["batch_size"]), []).append(trial)
    return Results(
        title=whole["title"],
        methods=[str(method) for method in whole["methods"]],
        batch_sizes=whole["batch_sizes"],
        lrs=whole["lrs"],
        seeds=whole["seeds"],
        trials=whole["trials"],
        cells={(row["method"], row["batch_size"]): row for row in whole["table"]},
        groups=groups,
        **parts,
    )


def _finite(value: Any) -> Any:
    """A copy in which every number that is not finite is None."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _require(row: Any, fields: dict[str, Any], where: str) -> None:
    """Raise unless `row` is a mapping with the given fields of the given types."""
    if not isinstance(row, dict):
        raise ConfigError(f"{where} is {type(row).__name__}; expected a mapping as `normprop compare` writes it")
    for key, kind in fields.items():
        if key not in row:
            raise ConfigError(f"{where} has no {key!r}; expected a document as `normprop compare` writes it")
        if not isinstance(row[key], kind):
            wanted = "number" if kind is _NUMBER else kind.__name__
            raise ConfigError(f"{where}: {key!r} is {type(row[key]).__name__}; expected {wanted}")
